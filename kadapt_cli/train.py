"""`kadapt train`: prepare data and model, fit adapter and head, keep an epoch by validation, measure it.

The loop is deterministic on a CPU: the order of images, their augmentation and the learning rate depend on the seed,
the epoch and the step alone, and everything else that a step reads is in the state file. A run that is killed at any
moment and resumed ends with the same adapter as one that was not.

Under torchrun every process takes its part of each batch, in as small micro-batches as its memory asks for, and
DistributedDataParallel around the trained tensors sums the gradients once each process has its own: the result is that
of one process up to the order of sums. The first process alone writes.
"""

import csv
import io
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from kadapt_cli import descriptions, metrics, report, runs, signals
from kadapt_cli.adapters import linear
from kadapt_cli.config import TrainConfig, to_toml
from kadapt_cli.data import manifest_csv
from kadapt_cli.errors import (
    DivergedError,
    InterruptedRunError,
    MachineError,
    ModelError,
    UsageError,
    is_out_of_memory,
)
from kadapt_cli.evaluate import choose_device, fill, logits, probabilities, stored_config
from kadapt_cli.progress import Display
from kadapt_cli.session import (
    Row,
    Session,
    estimate_memory,
    learning_rate,
    loss_sum,
    prepare,
    restore,
    save_adapter,
    save_state,
    with_absolute_paths,
)
from kadapt_cli.tensors import epoch_order

SCHEMA_VERSION = 1
WORKERS = 4
STATUS = Path("/proc/self/status")
HERE, PREPARED = "kadapt-here-", "kadapt-prepared"  # what processes that train together tell each other
LIVE_EPOCHS = 2  # in which gradients are looked at; the first may have a single step, too few for A and v to get one
CHECK_EVERY = 16  # steps between looks at the loss on a GPU, where each look waits for it


def train(config: TrainConfig, out: Path, *, resume: bool, display: Display) -> Row:
    """Train as configured into the run folder `out` and return the result, as result.json holds it.

    Under torchrun, the processes but the first return the result without its measurements.

    Raises:
        KadaptError: Anything the user can mend; the folder then holds the last good state.
    """
    if resume:
        runs.claim(out, resume=True)
        config = _resumed_config(config, out)
    with (
        _processes(config, out) as (rank, world, store),
        runs.writing(out, resume=resume) if rank == 0 else nullcontext(),
    ):
        if store and rank > 0:
            _await(store, [PREPARED])  # the first process downloads what there is to download
        session = prepare(config, out, display, resume=resume)
        session.rank, session.world = rank, world
        if store and rank == 0:
            store.set(PREPARED, "")
        if resume:
            restore(session)
            if session.writes:
                runs.commit(out / runs.CONFIG, to_toml(session.config))
            display.say(f"resumed {out} after {session.epoch} epochs, {session.step} steps")
        elif session.writes:
            runs.commit(out / runs.CONFIG, to_toml(session.config))
            runs.commit(out / runs.MANIFEST, manifest_csv(session.images))
            save_state(session)
        if world > 1:
            session.together = DistributedDataParallel(_Trained(session.parameters.values()))
        fit(session, display)
        try:
            return _finish(session, display) if rank == 0 else _summary(session)
        except signals.Stopped as stopped:
            message = f"trained, not measured yet; go on with: kadapt train --out {out} --resume"
            raise InterruptedRunError(message, stopped.exit_code) from None


@contextmanager
def _processes(config: TrainConfig, out: Path) -> Iterator[tuple[int, int, Store | None]]:
    """This process's rank, how many train together, and what they tell each other: torchrun's, or 0 and 1.

    Raises:
        MachineError: One of the others has ended.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1, None
        return
    on_gpu = choose_device(config.device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        store, rank, _ = next(rendezvous("env://"))
        store.set(f"{HERE}{rank}", "")
        _await(store, [f"{HERE}{other}" for other in range(world)])
        dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world)
        yield rank, world, store
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        again = "go on with --resume" if (out / runs.STATE).exists() else "start again"
        raise MachineError(f"{out}: a process that trains together with this one has ended; {again}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _await(store: Store, keys: list[str]) -> None:
    """Wait until others have set all keys; unlike a wait inside the library, a signal ends it."""
    while not store.check(keys):
        time.sleep(0.02)


def dry_run(config: TrainConfig, out: Path, display: Display) -> Row:
    """What `train` would do: classes, counts, parameters, memory; writes nothing."""
    runs.claim(out, resume=False)
    session = prepare(config, out, display, start=False)
    return _summary(session) | {"memory_estimate_bytes": estimate_memory(session)}


def fit(session: Session, display: Display) -> None:
    """Train until all epochs are done, validation stops improving, or the user interrupts."""
    if session.config.method == "linear":
        if not session.finished:
            _solve_head(session, display)
        return

    def ask(number: signal.Signals) -> None:
        session.stop = number
        if not display.quiet:
            signals.say(f"{number.name}: saving; once more to quit at once")
        if session.validating:
            signals.stop(number)

    def leave(number: signal.Signals) -> None:
        if session.repeatable:
            signals.stop(number)

    with (
        signals.handled(ask, late=leave),
        _heard_in_backward(session),
        display.training(session.config.epochs, len(session.train)),
    ):
        while not session.finished:
            try:
                _run_epoch(session, display)
                _end_epoch(session, display)
            except signals.Stopped:  # in validation or a long step, which a run that goes on begins with
                if session.writes and session.saved != session.position:
                    save_state(session)
            _leave_if_asked(session)
    _leave_if_asked(session)  # since then


@contextmanager
def _heard_in_backward(session: Session) -> Iterator[None]:
    """Let handlers of signals run after each layer of a backward pass on a CPU, which is one long call otherwise."""

    def pause(layer: nn.Module, given: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            output.register_hook(lambda gradient: None)

    layers = session.adapted.backbone.module.modules() if session.device.type == "cpu" else ()
    hooks = [layer.register_forward_hook(pause) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _repeatable(session: Session) -> Iterator[None]:
    """What is done here changes nothing that is saved but random states: a signal that has waited for long ends it.

    On a CPU alone: on a GPU steps are short, and compilers, which no exception may pass, run in the first of them.
    """
    session.repeatable = session.device.type == "cpu"
    try:
        yield
    finally:
        session.repeatable = False


def _solve_head(session: Session, display: Display) -> None:
    """The linear probe: no steps, one row of history."""
    started = time.perf_counter()
    head = session.adapted.head
    features, labels = session.material.features("train", session.device, session.dtype)
    standard = (features - head.mean.cpu()) / head.std.cpu()
    decay = session.config.weight_decay
    assert decay is not None
    weight, bias = linear.solve(standard, labels, len(session.images.classes), decay)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
        values = standard @ weight.float().T + bias.float()
    for mask in session.live.values():
        mask.fill_(True)
    right = (values.argmax(1) == labels).sum() if labels.dim() == 1 else torch.tensor(0.0)
    session.sums += torch.stack([loss_sum(values, labels), right, torch.tensor(len(labels))]).to(session.sums)
    session.epoch_time_s = time.perf_counter() - started
    session.step += 1
    _end_epoch(session, display)


def _run_epoch(session: Session, display: Display) -> None:
    config = session.config
    session.train.set_epoch(session.epoch)
    order = epoch_order(len(session.train), config.seed, session.epoch)
    batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    done = session.step - session.epoch * session.steps_per_epoch
    shares = [_share(session, batch) for batch in batches[done:]]
    started = saved = time.perf_counter()
    for (images, labels), batch in zip(_loader(session, shares), batches[done:], strict=True):
        _step(session, images.to(session.device), labels.to(session.device), len(batch), display)
        now = time.perf_counter()
        session.epoch_time_s, started = session.epoch_time_s + now - started, now
        done += 1
        display.step(session.epoch, min(done * config.batch_size, len(order)), len(batch))
        if session.device.type == "cpu" or session.step % CHECK_EVERY == 0:
            _check_finite(session)
        stop = session.stop if session.world == 1 else session.agreed
        if session.writes and (stop or now - saved >= config.save_every):
            _check_finite(session)
            save_state(session)
            saved = now
        _leave_if(stop, session)


def _share(session: Session, batch: list[int]) -> list[int]:
    """This process's part of a batch; where there are fewer images than processes, one that will not count."""
    return batch[session.rank :: session.world] or batch[:1]


def _agree(session: Session, found: Tensor, *, left: bool = False) -> Tensor:
    """What the processes that train together have found, added; a signal that one of them has heard, all have now.

    Raises:
        signals.Stopped: One of them has left what all of them do here, which is therefore to be done again.
    """
    session.agreed = session.stop
    if session.world > 1:
        heard = [float(session.stop == number) for number in signals.EXIT_CODES]
        told = torch.cat([found.new_tensor([float(left), *heard]), found])
        dist.all_reduce(told)
        leaving, *heard = told[: 1 + len(heard)].tolist()
        found, left = told[1 + len(heard) :], leaving > 0
        session.agreed = max((n for n, count in zip(signals.EXIT_CODES, heard, strict=True) if count), default=None)
    if left:
        assert session.agreed is not None
        raise signals.Stopped(session.agreed)
    return found


def _leave_if_asked(session: Session) -> None:
    """`_leave_if`, where all processes are at the end of the same step."""
    _agree(session, session.sums.new_zeros(0))
    _leave_if(session.agreed, session)


def _leave_if(stop: signal.Signals | None, session: Session) -> None:
    """Raise when a signal asked to stop; the state is saved, where there is a run folder."""
    if stop:
        saved = f"saved after {session.step} steps; go on with: kadapt train --out {session.out} --resume"
        raise InterruptedRunError(f"{stop.name}: {saved if session.out else 'stopped'}", signals.EXIT_CODES[stop])


def _step(session: Session, images: Tensor, labels: Tensor, batch: int, display: Display) -> None:
    """One optimizer step on this process's share of a batch.

    Raises:
        signals.Stopped: It took long, in this process or another one, and a signal did not wait: nothing has changed.
    """
    for group in session.optimizer.param_groups:
        group["lr"] = learning_rate(session.step, session)
    rng, sums = torch.get_rng_state(), None
    with suppress(signals.Stopped):
        sums = _fitting_gradients(session, images, labels, batch, display)
    try:
        sums = _agree(session, session.sums.new_zeros(3) if sums is None else sums, left=sums is None)
    except signals.Stopped:
        torch.set_rng_state(rng)
        raise
    if session.together is not None:
        session.together().backward()
    session.scaler.unscale_(session.optimizer)
    if _is_watched(session):
        for name, parameter in session.parameters.items():
            if parameter.grad is not None:
                session.live[name] |= parameter.grad != 0
    session.scaler.step(session.optimizer)
    session.scaler.update()
    session.step += 1
    session.sums += sums


def _fitting_gradients(session: Session, images: Tensor, labels: Tensor, batch: int, display: Display) -> Tensor:
    """`_gradients` in micro-batches that are halved when memory runs out."""
    while True:
        try:
            with _repeatable(session):
                return _gradients(session, images, labels, batch)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        if session.micro == 1:
            raise MachineError("out of memory with one image at a time; use a smaller --model or --img-size")
        session.micro = math.ceil(min(session.micro, len(labels)) / 2)
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
        display.say(f"out of memory: now {session.micro} images at a time, still {session.config.batch_size} a step")


def _gradients(session: Session, images: Tensor, labels: Tensor, batch: int) -> Tensor:
    """Accumulate this process's part of the gradient of the mean loss over a batch of so many images in all.

    Returns:
        Of this process's images: the sum of losses, how many were classified right, how many there are; float64.
    """
    session.optimizer.zero_grad(set_to_none=True)
    counts = session.rank < batch  # else the images stand in for an empty share
    sums = torch.zeros_like(session.sums)
    for x, y in zip(images.split(session.micro), labels.split(session.micro), strict=True):
        with torch.autocast(session.device.type, session.dtype, enabled=session.dtype != torch.float32):
            values = session.net(x)
        loss = loss_sum(values, y) * counts
        session.scaler.scale(loss * (session.world / batch)).backward()  # DistributedDataParallel takes the mean
        right = (values.argmax(1) == y).sum() if y.dim() == 1 else loss.new_zeros(())
        sums += torch.stack([loss.detach(), right * counts, right.new_tensor(len(y) * counts)]).to(sums)
    return sums


class _Trained(nn.Module):
    """The trained tensors; the gradient of the result adds nothing to theirs, so that what they hold is averaged."""

    def __init__(self, tensors: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(tensors)

    def forward(self) -> Tensor:
        return torch.stack([0 * tensor.sum() for tensor in self.tensors]).sum()


def _is_watched(session: Session) -> bool:
    """Whether gradients are looked at: in the first epochs, and until every tensor can have had one."""
    return session.epoch < LIVE_EPOCHS or session.step < _steps_to_life(session)


def _steps_to_life(session: Session) -> int:
    """Steps after which every trained tensor has a gradient: one more where the head starts at zero."""
    return 3 if session.config.head_init == "zero" else 2


def _end_epoch(session: Session, display: Display) -> None:
    """Validate, note the epoch, keep it unless an earlier one is clearly better, save."""
    watched = _is_watched(session)
    if session.world > 1:
        micro = torch.tensor(session.micro, device=session.device)
        dist.all_reduce(micro, dist.ReduceOp.MIN)
        session.micro = int(micro)  # what the smallest memory takes, as the run folder says
    _check_finite(session)
    loss, right, seen = session.sums.tolist()
    row: Row = {
        "epoch": session.epoch + 1,
        "step": session.step,
        "lr": learning_rate(session.step - 1, session) if session.config.lr else None,
        "train_loss": loss / seen,
        "train_accuracy": None if session.images.multi_label else right / seen,
        "val_loss": None,
        "val_accuracy": None,
        "kept": True,
        "images_per_s": seen / session.epoch_time_s,
        "time_s": session.epoch_time_s,
    }
    if session.val is not None:
        values, labels = _validated(session)
        row["val_loss"] = loss_sum(values, labels).item() / len(labels)
        row["val_accuracy"] = metrics.score(session.images.metric, values.numpy(), labels.numpy())
        session.best = max(session.best, row["val_accuracy"])
        row["kept"] = metrics.within_one_error(row["val_accuracy"], session.best, len(labels))
    session.epoch += 1
    session.epoch_time_s = 0.0
    session.sums.zero_()
    session.history.append(row)
    if watched and session.step >= _steps_to_life(session):
        check_live(session.live)
    if row["kept"]:
        session.kept_epoch = session.epoch
    if session.out is not None and session.writes:
        if row["kept"]:
            save_adapter(session)
        save_state(session)
        runs.commit(session.out / runs.METRICS, metrics_csv(session.history))
    display.epoch(row, session.config.epochs)


def _validated(session: Session) -> tuple[Tensor, Tensor]:
    """Logits and labels of the validation images.

    Raises:
        signals.Stopped: A signal ended it, in this process or another one.
    """
    assert session.val is not None
    found = None
    try:
        session.validating = True
        if session.stop:
            signals.stop(session.stop)
        found = logits(session.net, session.val, session.device, session.dtype)
        session.validating = False
    except signals.Stopped:
        session.validating = False
        if session.stop is None:  # nobody here waits for signals
            raise
    _agree(session, session.sums.new_zeros(0), left=found is None)
    assert found is not None
    return found


def metrics_csv(history: list[Row]) -> str:
    """A row per epoch; what was not measured is empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()


def check_live(live: dict[str, Tensor]) -> None:
    """Raise `ModelError` naming the trainable tensors that have not had a non-zero gradient yet."""
    dead = [name for name, mask in live.items() if not mask.any()]
    if dead:
        raise ModelError(
            f"{len(dead)} of {len(live)} trainable tensors never received a gradient ({', '.join(dead[:3])}"
            f"{', …' if len(dead) > 3 else ''}): this model does not use the layers they sit on; choose other --targets"
        )


def _loader(session: Session, batches: list[list[int]]) -> DataLoader[Any]:
    on_gpu = session.device.type == "cuda"
    dataset: Dataset[Any] = session.train
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=min(WORKERS, os.cpu_count() or 1) if on_gpu else 0,
        pin_memory=on_gpu,
        generator=torch.Generator(),  # of its own, so that starting a loader leaves the global one alone
    )


def _check_finite(session: Session) -> None:
    if not bool(session.sums[0].isfinite()):
        if session.config.lr is None:
            raise DivergedError(f"{session.images.name}: the features are not finite; use --precision fp32")
        lr = learning_rate(max(session.step - 1, 0), session)
        raise DivergedError(
            f"{session.out or session.images.name}: the loss is not finite at step {session.step} with learning rate "
            f"{lr:.2g}; try --lr {session.config.lr / 4:.2g}. The last good state is kept"
        )


def _resumed_config(config: TrainConfig, out: Path) -> TrainConfig:
    """The run's own configuration; `UsageError` when an option given now differs from it."""
    _, info, _ = runs.load_state(out)
    descriptions.check(out / runs.STATE, "state", info)
    stored = stored_config(info, out / runs.STATE)
    written = out / runs.CONFIG
    if written.exists() and written.read_bytes() != to_toml(stored).encode():
        raise ModelError(f"{written}: not what the run was started with; restore it, or delete it to go on as started")
    config = with_absolute_paths(config)
    for name in config.model_fields_set:
        if getattr(config, name) != getattr(stored, name):
            raise UsageError(
                f"--{name.replace('_', '-')}: {out} was started with {getattr(stored, name)!r}, but "
                f"{getattr(config, name)!r} was given; leave it out, or start a new run"
            )
    return stored


def _summary(session: Session) -> Row:
    splits = session.images.splits
    adapter = sum(p.numel() for p in session.adapted.adapter.values())
    head = sum(p.numel() for p in session.adapted.head.parameters())
    frozen = sum(p.numel() for p in session.module.parameters() if not p.requires_grad)
    return {
        "schema_version": SCHEMA_VERSION,
        "run": str(session.out),
        "method": session.config.method,
        "model": session.config.model,
        "data": {"name": session.images.name, "classes": len(session.images.classes)}
        | {split: len(splits[split]) for split in ("train", "val", "test")},
        "class_names": list(session.images.classes),
        "parameters": {"backbone": frozen, "trainable": adapter + head, "adapter": adapter, "head": head},
        "device": _device_name(session.device),
    }


def _finish(session: Session, display: Display) -> Row:
    """Measure the kept epoch as a reader of the run would, and write the result."""
    assert session.out is not None
    tensors, info = runs.load_tensors(session.out / runs.ADAPTER, "adapter")
    fill(session.adapted, tensors, session.out / runs.ADAPTER)
    measured: Row = {}
    for split in ("val", "test"):
        if session.images.splits[split]:
            display.say(f"measuring epoch {info['epoch']} on {len(session.images.splits[split])} {split} images")
            values, labels = logits(session.module, session.material.plain(split), session.device, session.dtype)
            measured[split] = _measure(session, values, labels)
    runs.commit(session.out / runs.METRICS, metrics_csv(session.history))  # the last commit may have come too late
    title = f"{session.images.name}: {session.config.method} on {session.config.model}"
    runs.commit(session.out / runs.CURVES, report.curves_svg(session.history, title))
    result = _summary(session)
    result["parameters"]["live"] = int(sum(mask.sum() for mask in session.live.values()))
    result |= {"metrics": {"val": None, "test": None} | measured} | costs(session)
    result |= {"kept_epoch": info["epoch"], "micro_batch": session.micro}
    runs.commit(session.out / runs.RESULT, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def _measure(session: Session, values: Tensor, labels: Tensor) -> Row:
    """What result.json says of a split; the confusion matrix goes to its file."""
    images = session.images
    row: Row = {"metric": images.metric, "score": metrics.score(images.metric, values.numpy(), labels.numpy())}
    if images.multi_label:
        return row | {"accuracy": None, "balanced_accuracy": None}
    assert session.out is not None
    found = metrics.evaluate(probabilities(values), labels.numpy(), images.classes)
    runs.commit(session.out / runs.CONFUSION, report.confusion_csv(found.confusion, images.classes))
    return row | {"accuracy": found.accuracy.value, "balanced_accuracy": found.balanced_accuracy.value}


def costs(session: Session) -> Row:
    """Epochs, seconds, speed and peak memory of a fitted session."""
    time_s = sum(row["time_s"] for row in session.history)
    return {
        "epochs": len(session.history),
        "time_s": time_s,
        "images_per_s": len(session.train) * len(session.history) / time_s,
        "peak_bytes": _peak_bytes(session.device),
    }


def _peak_bytes(device: torch.device) -> int:
    """Largest memory in use so far: allocated on the GPU, or resident of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if STATUS.exists():
        return 1024 * next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def forget_peak(config: TrainConfig) -> None:
    """Count the largest memory in use from now on, where the system can."""
    if choose_device(config.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif STATUS.exists():
        with suppress(OSError):  # some containers do not let a process do this
            STATUS.with_name("clear_refs").write_text("5")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"
