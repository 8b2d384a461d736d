"""The command line: options, help, exit codes. Imports no torch until a command needs it.

stdout carries the result alone (with --json exactly one JSON document); everything else goes to stderr.
"""

import errno
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kadapt_cli import __version__
from kadapt_cli.config import MAX_COUNT, PROBE_BATCH_SIZE, PROBE_EPOCHS, TrainConfig, blaming, resolve
from kadapt_cli.errors import (
    ENVIRONMENT,
    MACHINE_ERRORS,
    USAGE,
    DataError,
    KadaptError,
    MachineError,
    UsageError,
    is_out_of_memory,
    listed,
)
from kadapt_cli.progress import Display, new_console, print_line, show_result

app = typer.Typer(
    name="kadapt",
    help="Adapt pretrained vision transformers to your images by training about 50 thousand parameters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MAX_ARGUMENT = 1 << 16  # characters
SHOTS = "Training images drawn a class, validation included."
MAX_LINE = 2000  # characters of an error

Device = Literal["auto", "cpu", "cuda"]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be used instead of stopping.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder made by 'kadapt train'.")]


def main() -> None:
    """Run the command line; what a user can mend is one line on stderr and an exit code, anything else a traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr] # a class name must not end a run on LANG=C
    if os.environ.get("NO_COLOR"):
        from typer import rich_utils  # of help and usage errors

        rich_utils.COLOR_SYSTEM = None
    code: Any = 0
    try:
        if not _has_folder():
            raise MachineError("the current folder was removed; change to another one")
        _check_arguments(sys.argv[1:])
        app(prog_name="kadapt")
    except SystemExit as done:
        code = done.code
    except KadaptError as error:
        code = _fail(str(error), error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        code = _fail("out of memory; close other programs, or use a smaller --model or --img-size", ENVIRONMENT)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        if error.errno == errno.ENAMETOOLONG:
            code = _fail(f"{where}the name is too long; give a shorter one", USAGE)
        elif error.errno in MACHINE_ERRORS:
            code = _fail(f"{where}{error.strerror}; nothing that was saved is lost", ENVIRONMENT)
        else:
            raise
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush at the end of the process
        code = code or _fail(f"stdout: cannot be written ({error.strerror})", ENVIRONMENT)
    sys.exit(code)


def _fail(line: str, code: int) -> int:
    words = " ".join(line.split())
    if len(words) > MAX_LINE:
        words = f"{words[: MAX_LINE // 2]} … {words[-MAX_LINE // 2 :]}"
    print_line(new_console(stderr=True), f"kadapt: {words}")
    return code


def _has_folder() -> bool:
    """Whether the process has a current folder; without one torch cannot load its libraries."""
    try:
        return bool(os.getcwd())
    except FileNotFoundError:
        return False


def _check_arguments(arguments: list[str]) -> None:
    """No option takes an empty value, which a path would read as the current folder, or one without end."""
    for place, argument in enumerate(arguments):
        name, is_joined, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        before = arguments[place - 1] if place else ""
        where = name or (before if before.startswith("-") else f"argument {place + 1}")
        if not value and (is_joined or not name):
            raise UsageError(f"{where}: is empty; give a value, or leave it out")
        if len(argument) > MAX_ARGUMENT:
            raise UsageError(f"{where}: {len(argument):,} characters were given; at most {MAX_ARGUMENT:,} can be")


def _version(value: bool) -> None:
    if value:
        print(f"kadapt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _option(name: str, *flags: str) -> Any:
    """A Typer option for a field of `TrainConfig`: its description and default make the help text."""
    field = TrainConfig.model_fields[name]
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    shown = "" if default is None or isinstance(default, bool) else f" \\[default: {default}]"
    return typer.Option(*flags, help=f"{field.description}{shown}", show_default=False)


@app.command()
def train(
    data: Annotated[str | None, _option("data")] = None,
    model: Annotated[str | None, _option("model")] = None,
    method: Annotated[str | None, _option("method")] = None,
    shots: Annotated[int | None, _option("shots")] = None,
    seed: Annotated[int | None, _option("seed")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder. [default: runs/NAME-N]", show_default=False)] = None,
    epochs: Annotated[int | None, _option("epochs")] = None,
    lr: Annotated[float | None, _option("lr")] = None,
    weight_decay: Annotated[float | None, _option("weight_decay")] = None,
    batch_size: Annotated[int | None, _option("batch_size")] = None,
    micro_batch: Annotated[int | None, _option("micro_batch")] = None,
    warmup: Annotated[float | None, _option("warmup")] = None,
    patience: Annotated[int | None, _option("patience")] = None,
    val: Annotated[Literal["auto", "none"] | None, _option("val")] = None,
    augment: Annotated[Literal["none", "light", "strong"] | None, _option("augment")] = None,
    img_size: Annotated[int | None, _option("img_size")] = None,
    targets: Annotated[str | None, _option("targets")] = None,
    terms: Annotated[int | None, _option("terms")] = None,
    rank: Annotated[int | None, _option("rank")] = None,
    width: Annotated[int | None, _option("width")] = None,
    rule: Annotated[Literal["factored", "full"] | None, _option("rule")] = None,
    scale: Annotated[float | None, _option("scale")] = None,
    dims: Annotated[int | None, _option("dims")] = None,
    projection: Annotated[Literal["fastfood", "dense", "sparse", "identity"] | None, _option("projection")] = None,
    said: Annotated[bool | None, _option("said", "--said")] = None,
    head_init: Annotated[Literal["means", "zero", "text"] | None, _option("head_init")] = None,
    metric: Annotated[str | None, _option("metric")] = None,
    device: Annotated[Device | None, _option("device")] = None,
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"] | None, _option("precision")] = None,
    deterministic: Annotated[bool | None, _option("deterministic", "--deterministic")] = None,
    backend: Annotated[Literal["auto", "eager", "merge", "triton"] | None, _option("backend")] = None,
    no_pretrained: Annotated[
        bool, typer.Option("--no-pretrained", help="Start from random weights: for counting and tests.")
    ] = False,
    weights: Annotated[str | None, _option("weights")] = None,
    save_every: Annotated[float | None, _option("save_every")] = None,
    skip_bad: SkipBad = False,
    config: Annotated[
        Path | None, typer.Option(help="A TOML file of these options, such as a run's config.toml.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Scan, count and estimate; write nothing.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Adapt a backbone to labelled images and keep the result in a run folder."""
    given = {name: value for name, value in locals().items() if name in TrainConfig.model_fields and value is not None}
    given |= {"targets": [t.strip() for t in targets.split(",")]} if targets is not None else {}
    given |= _random_weights(no_pretrained, weights)
    if not skip_bad:
        del given["skip_bad"]
    resolved = resolve(given, config)
    from kadapt_cli.runs import claim, default_out
    from kadapt_cli.train import dry_run as run_dry
    from kadapt_cli.train import train as run_train

    is_first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts, one speaks
    display = Display(new_console(stderr=True), quiet=not is_first)
    if resume and dry_run:
        raise UsageError("--resume: was given beside --dry-run, which starts no run; give one of them")
    with blaming(resolved, given, config):
        folder = out if out is not None else default_out(resolved, resume)
        _check_out(folder)
        if any(target == "auto" or target.endswith(".json") for target in resolved.targets):
            claim(folder, resume=resume)
            resolved = _with_probed_targets(resolved, folder, dry_run, display)
        if dry_run:
            result = run_dry(resolved, folder, display)
        else:
            result = run_train(resolved, folder, resume=resume, display=display)
    if as_json and is_first:
        _print_json(result)
    elif is_first:
        show_result(result, new_console())


def _with_probed_targets(config: TrainConfig, folder: Path, dry_run: bool, display: Display) -> TrainConfig:
    """The targets that a probe selected: a probe.json, or one that is made now beside the run folder."""
    from kadapt_cli.probe import auto_targets, read_selection

    if len(config.targets) > 1:
        raise UsageError("--targets: 'auto' or a probe.json was given beside other targets; give it alone")
    if config.targets != ("auto",):
        return config.model_copy(update={"targets": read_selection(Path(config.targets[0]))})
    if dry_run or "RANK" in os.environ:
        when = "--dry-run" if dry_run else "torchrun"
        raise UsageError(f"--targets: auto has to probe first, which {when} does not; run kadapt probe-id and give it")
    return config.model_copy(update={"targets": auto_targets(config, Path(f"{folder}-probe"), display)})


@app.command("eval")
def evaluate(
    run: RunArgument,
    data: Annotated[str | None, typer.Option(help="Other images with the run's classes.")] = None,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="Which of the run's images.")] = "test",
    device: DeviceOption = "auto",
    skip_bad: SkipBad = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure a run: accuracy, calibration, each class, confusions, with 95 % intervals."""
    from kadapt_cli import evaluate as worker

    opened, found = worker.evaluate(run, data=data, split=split, device=device, skip_bad=skip_bad)
    if as_json:
        head = {"schema_version": 1, "run": str(run), "data": data or opened.config.data, "split": split}
        _print_json(head | found.to_json())
        return
    from kadapt_cli import metrics, report

    console = new_console()
    if isinstance(found, metrics.MultiLabel):
        print_line(console, f"{found.metric} {found.score:.1%} on {found.images} images")
        return
    for table in (report.metrics_table(found), report.per_class_table(found), report.confusion_table(found)):
        console.print(table, "")


@app.command()
def predict(
    run: RunArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE…", help="Files, or folders of images.")],
    top: Annotated[int, typer.Option(help="How many classes to give an image.")] = 3,
    device: DeviceOption = "auto",
    skip_bad: SkipBad = False,
    as_json: JsonFlag = False,
) -> None:
    """Classify images with a run."""
    from kadapt_cli import predict as worker

    predictions, left_out = worker.predict(run, images, top=top, device=device, skip_bad=skip_bad)
    for line in left_out:
        print_line(new_console(stderr=True), f"left out: {line}")
    if as_json:
        _print_json({"schema_version": 1, "predictions": predictions})
        return
    for prediction in predictions:
        classes = "  ".join(f"{c['name']} {c['probability']:.1%}" for c in prediction["classes"])
        print_line(new_console(), f"{prediction['path']}  {classes}")


def merge_weights(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="The folder to write; new or empty.")],
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Number format of the weights.")] = "fp32",
    as_json: JsonFlag = False,
) -> None:
    """Fold adapter and head into plain weights that timm and transformers load, and verify them."""
    from kadapt_cli import merge as worker

    _check_out(out)
    result = worker.merge(run, out, dtype=dtype)
    if as_json:
        _print_json(result)
        return
    console = new_console()
    print_line(console, f"wrote {out}")
    print_line(
        console,
        f"loaded again by timm in a fresh process: largest difference of a logit on {result['images']} images "
        f"{result['max_difference']:.1e}",
    )
    if dtype != "fp32":
        print_line(console, f"rounding to {dtype} destroyed {result['rounding_loss']:.1%} of the adapter")


@app.command()
def methods(as_json: JsonFlag = False) -> None:
    """List the adaptation methods: what they train, and how many parameters."""
    from kadapt_cli.adapters import METHODS

    if as_json:
        keys = ("SUMMARY", "FORMULA", "LR", "OPTIONS", "UNMERGED")
        rows = [{"method": name} | {key.lower(): getattr(how, key) for key in keys} for name, how in METHODS.items()]
        _print_json({"schema_version": 1, "methods": rows})
        return
    from kadapt_cli.report import methods_table

    new_console().print(methods_table(METHODS))


@app.command()
def compare(
    context: typer.Context,
    data: Annotated[list[str], typer.Option(help="A data set as 'kadapt train' takes it; once for each.")],
    method: Annotated[
        list[str] | None, typer.Option(help="A method; once for each. \\[default: all but subspace]")
    ] = None,
    model: Annotated[str | None, _option("model")] = None,
    shots: Annotated[
        int | None, typer.Option(min=1, max=MAX_COUNT, help=f"{SHOTS} \\[default: 5]", show_default=False)
    ] = None,
    full_shot: Annotated[bool, typer.Option("--full-shot", help="All training images instead of --shots.")] = False,
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    search: Annotated[
        Literal["none", "coarse", "faithful", "optuna"],
        typer.Option(help="Of learning rate and weight decay: the methods' defaults, 6 trials, ELEVATER's, or Optuna."),
    ] = "none",
    trials: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_COUNT, help="Trials of --search optuna. \\[default: 20]", show_default=False),
    ] = None,
    search_epochs: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Epochs of a trial.")] = 10,
    select: Annotated[
        Literal["validation", "pooled", "test-best"],
        typer.Option(
            help="Settings by each cell's validation, or one setting a method by all cells; test-best also takes the "
            "best epoch on the test, to compare with benchmarks that do."
        ),
    ] = "validation",
    epochs: Annotated[int | None, _option("epochs")] = None,
    batch_size: Annotated[int | None, _option("batch_size")] = None,
    augment: Annotated[Literal["none", "light", "strong"] | None, _option("augment")] = None,
    head_init: Annotated[Literal["means", "zero", "text"] | None, _option("head_init")] = None,
    metric: Annotated[str | None, _option("metric")] = None,
    img_size: Annotated[int | None, _option("img_size")] = None,
    targets: Annotated[str | None, _option("targets")] = None,
    device: Annotated[Device | None, _option("device")] = None,
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"] | None, _option("precision")] = None,
    weights: Annotated[str | None, _option("weights")] = None,
    skip_bad: SkipBad = False,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Share the study: an Optuna journal file (journal:PATH) or a database URL; one with a password by "
            "the environment alone.",
            envvar="KADAPT_STORAGE",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=256, help="Processes that share the work.")] = 1,
    m0: Annotated[float, typer.Option(min=1, help="M0 of PE = score · exp(-log10(P/M0 + 1)).")] = 1e8,
    out: Annotated[Path, typer.Option(help="The folder of the study and its result; the same one goes on.")] = Path(
        "comparison"
    ),
    as_json: JsonFlag = False,
) -> None:
    """Compare adaptation methods at equal footing: the same images, the same budget of trials, one look at the test."""
    given = {name: value for name, value in locals().items() if name in TrainConfig.model_fields and value is not None}
    given = {name: value for name, value in given.items() if name not in ("data", "method")}
    given |= {"targets": [t.strip() for t in targets.split(",")]} if targets is not None else {}
    given |= {"shots": _drawn(shots, full_shot)}
    if trials is not None and search != "optuna":
        raise UsageError(f"--trials: is of --search optuna, but the search is {search}; leave it out")
    source = context.get_parameter_source("storage")
    if re.search("//[^/]*:[^/]*@", storage or "") and getattr(source, "name", "") != "ENVIRONMENT":
        raise UsageError("--storage: holds a password, which other users can see; give it by KADAPT_STORAGE instead")
    if not math.isfinite(m0):
        raise UsageError(f"--m0: a finite number was expected, {m0} given")
    base, numbers = resolve(given), _numbers("--seeds", seeds)
    _check_out(out)
    from kadapt_cli import compare as worker
    from kadapt_cli.adapters import COMPARED

    grid = worker.Grid(
        data=tuple(data),
        methods=tuple(method or COMPARED),
        seeds=numbers,
        base=base,
        search=search,
        search_epochs=search_epochs,
        trials=20 if trials is None else trials,
        select=select,
    )
    found = worker.compare(grid, out, Display(new_console(stderr=True)), storage=storage, jobs=jobs, m0=m0)
    if as_json:
        _print_json(found.document)
        return
    new_console().print(found.shown)
    print_line(new_console(), f"wrote {out / worker.PAGE}, and the same as .csv, .json and .svg")


@app.command("probe-id")
def probe_id(
    data: Annotated[str, _option("data")] = "demo",
    model: Annotated[str | None, _option("model")] = None,
    groups: Annotated[
        str, typer.Option(help="What to measure in each block: attn, mlp, q, k, v, proj, fc1, fc2, or blocks.")
    ] = "attn,mlp",
    per: Annotated[
        Literal["block", "model"], typer.Option(help="A dimension for each block, or one for all blocks together.")
    ] = "block",
    shots: Annotated[
        int | None, typer.Option(min=2, max=MAX_COUNT, help=f"{SHOTS} \\[default: 5]", show_default=False)
    ] = None,
    full_shot: Annotated[bool, typer.Option("--full-shot", help="All training images instead of --shots.")] = False,
    threshold: Annotated[float, typer.Option(help="The share of directly trained weights' score to reach.")] = 0.9,
    above: Annotated[
        Literal["zero", "head"],
        typer.Option(help="What it is a share of: the score, or what it gains over the head alone."),
    ] = "zero",
    projection: Annotated[
        Literal["fastfood", "dense", "sparse"], typer.Option(help="How d numbers move the weights.")
    ] = "fastfood",
    said: Annotated[bool, typer.Option("--said", help="A trained factor a tensor (SAID).")] = False,
    dims: Annotated[str, typer.Option(help="The d to try, comma-separated; auto: 8, 64, 512, … up to D/16.")] = "auto",
    refine: Annotated[int, typer.Option(min=0, max=64, help="Halvings of the gap in which d90 lies.")] = 2,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="How often all is measured, with seeds 0, 1, …")] = 1,
    folds: Annotated[
        int, typer.Option(min=1, max=100, help="Of the cross-validation; 1 uses the data's own validation images.")
    ] = 5,
    epochs: Annotated[int, typer.Option(help="Of a trial, over the training images.")] = PROBE_EPOCHS,
    batch_size: Annotated[int, typer.Option(help="Images an optimizer step of a trial.")] = PROBE_BATCH_SIZE,
    lr: Annotated[float | None, _option("lr")] = None,
    keep: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_COUNT, help="Select the so many lowest. \\[default: half]", show_default=False),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            min=1, max=2**40, help="Select what kadaptation trains with so many parameters.", show_default=False
        ),
    ] = None,
    rank_by: Annotated[
        Literal["direct", "full"],
        typer.Option(help="Select by the dimension for a module's own direct score, or for full fine-tuning's."),
    ] = "direct",
    metric: Annotated[str | None, _option("metric")] = None,
    img_size: Annotated[int | None, _option("img_size")] = None,
    device: Annotated[Device | None, _option("device")] = None,
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"] | None, _option("precision")] = None,
    no_pretrained: Annotated[
        bool, typer.Option("--no-pretrained", help="Start from random weights: for counting and tests.")
    ] = False,
    weights: Annotated[str | None, _option("weights")] = None,
    skip_bad: SkipBad = False,
    out: Annotated[Path, typer.Option(help="The folder of the trials and the result; the same one goes on.")] = Path(
        "probe"
    ),
    as_json: JsonFlag = False,
) -> None:
    """Measure how few dimensions each submodule needs, and choose what to adapt."""
    given = {name: value for name, value in locals().items() if name in TrainConfig.model_fields and value is not None}
    given |= {"method": "subspace", "augment": "none", "dims": None, "shots": _drawn(shots, full_shot)}
    base = resolve(given | _random_weights(no_pretrained, weights))
    _check_out(out)
    from kadapt_cli import probe as worker
    from kadapt_cli.probe.show import table

    plan = worker.Plan(
        base=base,
        groups=tuple(dict.fromkeys(part.strip() for part in groups.split(","))),
        per=per,
        threshold=threshold,
        above=above,
        dims=None if dims == "auto" else tuple(sorted(set(_numbers("--dims", dims)))),
        refine=refine,
        seeds=tuple(range(seeds)),
        folds=folds,
        budget=budget,
        keep=keep,
        rank_by=rank_by,
    )
    document = worker.probe(plan, out, Display(new_console(stderr=True)))
    if as_json:
        _print_json(document)
        return
    new_console().print(table(document))
    if document["selected"]:
        print_line(new_console(), f"next: kadapt train --data {data} --targets {out / worker.JSON}")


def _check_out(out: Path) -> None:
    """The folder to write need not be there, but neither it nor one above it can be a file, and its name is UTF-8."""
    try:
        str(out).encode()
    except UnicodeEncodeError:
        raise UsageError(f"--out: {str(out)!r} is no UTF-8, which weights are read by; give another name") from None
    for folder in (out, *out.parents):
        if folder.exists() and not folder.is_dir():
            raise UsageError(
                f"--out: {folder} is a file; give a folder that is new, empty or an earlier one of kadapt's"
            )


def _random_weights(no_pretrained: bool, weights: str | None) -> dict[str, Any]:
    """What --no-pretrained sets, if it is given."""
    if no_pretrained and weights is not None:
        raise UsageError("--no-pretrained: was given beside --weights; give one of them")
    return {"pretrained": False} if no_pretrained else {}


def _drawn(shots: int | None, full_shot: bool) -> int | None:
    """Shots a class, 5 when not given; None for all images."""
    if full_shot and shots is not None:
        raise UsageError("--shots: was given beside --full-shot; give one of them")
    return None if full_shot else 5 if shots is None else shots


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Comma-separated whole numbers from 0, of 32 bits."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 20 and int(part) < 2**32 for part in parts):
        raise UsageError(f"{option}: whole numbers from 0 were expected, separated by commas, {text!r} given")
    return tuple(int(part) for part in parts)


app.command("merge-weights")(merge_weights)
app.command("merge", hidden=True)(merge_weights)


@app.command("bench-kernels")
def bench_kernels(
    quick: Annotated[
        bool, typer.Option("--quick", help="Few shapes and rounds: under two minutes on two cores.")
    ] = False,
    shapes: Annotated[Path | None, typer.Option(help="A CSV file with the columns d,M.", show_default=False)] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16,fp16,fp32,tf32. \\[default: bf16 on CUDA, else fp32]", show_default=False)
    ] = None,
    contenders: Annotated[
        str | None,
        typer.Option(help="Names, comma-separated; frozen always runs. \\[default: all]", show_default=False),
    ] = None,
    modes: Annotated[
        str | None, typer.Option(help="fwd,bwd,fwd+bwd,step. \\[default: all]", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Vision transformer of the step. \\[default: vit_base_patch16_224 on CUDA, else vit32]",
            show_default=False,
        ),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Append the rows to this file.", show_default=False)] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw the ratios into this file.", show_default=False)] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Measure tiles on a CUDA GPU, print a table of them.")] = False,
    aot: Annotated[
        str | None,
        typer.Option(
            metavar="ARCH", help="Only compile the kernels for sm_80, sm_90, … and report.", show_default=False
        ),
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Measure kadapt's kernels against every other way to compute an adapted layer: accuracy first, then time."""
    from kadapt_cli import bench
    from kadapt_cli.bench import options, tables

    console, words = new_console(), new_console(stderr=True)

    def say(line: str) -> None:
        print_line(words, line)

    beside = {"--aot": aot, "--sweep": sweep, "--csv": csv, "--svg": svg, "--json": sweep and as_json}
    alone = [option for option, value in beside.items() if value]
    if len(alone) > 1 and alone[0] in ("--aot", "--sweep"):
        raise UsageError(f"{alone[1]}: was given beside {alone[0]}, which does not take it; give one of them")
    if aot is not None:
        rows = bench.aot(aot, dtype, quick)
        if as_json:
            _print_json({"schema_version": 1, "arch": aot, "rows": rows})
        else:
            console.print(tables.aot_table(aot, rows))
        return
    wanted = options.plan(
        device=device, quick=quick, shapes=shapes, dtype=dtype, contenders=contenders, modes=modes, model=model
    )
    if sweep:
        from kadapt_cli.bench import sweep as tiles
        from kadapt_kernels.tiles import architecture

        print(tiles.table_literal(list(tiles.sweep(wanted, say)), architecture(wanted.device)))
        return
    result = bench.run(wanted, say, csv, svg)
    if as_json:
        _print_json(result.to_json())
        return
    for table in tables.tables(result.rows):
        console.print(table, "")
    for note in result.notes:
        print_line(console, note)
    if wanted.device.type == "cpu":
        say("compiling the GPU kernels for sm_90")
        console.print("", tables.aot_table("sm_90", bench.aot("sm_90", quick=True)))
        print_line(console, "kadapt bench-kernels --aot ARCH reports on all of them")


data_app = typer.Typer(help="Named data sets: what there is, and whether it can be used.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command("list")
def data_list(as_json: JsonFlag = False) -> None:
    """List the data sets of the comparison, and which of them are on this machine."""
    from kadapt_cli import catalog

    rows = catalog.listing()
    if as_json:
        _print_json({"schema_version": 1, "folder": str(catalog.data_root()), "sets": rows})
        return
    from kadapt_cli.report import new_table

    table = new_table("name", "classes", "train", "val", "test")
    for header in ("metric", "from"):
        table.add_column(header, no_wrap=True)
    ways = {"download": "download", "Hugging": "hf extra", "by": "by hand"}
    for row in rows:
        counts = [f"{row[key]:,}" if row[key] else "–" for key in ("classes", "train", "val", "test")]
        way = "here" if row["present"] else ways[row["obtained"].split()[0]]
        table.add_row(row["name"], *counts, row["metric"], way)
    console = new_console()
    console.print(table, "")
    print_line(console, f"they live in {catalog.data_root()}, which KADAPT_DATA changes")


@data_app.command("check")
def data_check(
    source: Annotated[str, typer.Argument(metavar="NAME|PATH", help="A named set, or a folder of images.")],
    shots: Annotated[
        int | None, typer.Option(min=1, max=MAX_COUNT, help="Training images a class. \\[default: all]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the draw.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Open data as a run would, decode every image of its splits, and say what is there; bad images end with code 3."""
    from kadapt_cli import catalog

    found = catalog.check(source, shots=shots, seed=seed)
    if as_json:
        _print_json(found)
    else:
        _print_check(found)
    if found["bad"]:
        raise DataError(f"{source}: {len(found['bad'])} images cannot be used: {listed(found['bad'])}; mend them")


def _print_check(found: dict[str, Any]) -> None:
    console = new_console()
    print_line(console, f"{found['name']}: {len(found['classes'])} classes ({listed(found['classes'])})")
    print_line(console, f"metric: {found['metric']}")
    for split, count in found["splits"].items():
        words = f"{split}: {count:,} images in this draw"
        words += f", {found['own'].get(split, 0):,} in the set" if found["own"] is not None else ""
        words += f", {found['expected'][split]:,} expected there" if found["expected"] is not None else ""
        print_line(console, words)
    print_line(console, f"digest of the manifest: {found['digest']}")
    for note in found["notes"]:
        print_line(console, f"note: {note}")
    for line in found["bad"]:
        print_line(console, f"cannot be used: {line}")


def _print_json(document: dict[str, Any]) -> None:
    """One line; what is not printable, such as an escape sequence in a class name, as JSON's own \\u001b."""
    text = json.dumps(document, ensure_ascii="utf" not in sys.stdout.encoding.lower())
    print("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text))
