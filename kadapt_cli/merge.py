"""`kadapt merge-weights`: fold adapter and head into plain weights that timm and transformers load.

The folder holds config.json and model.safetensors in timm's own format, and a model card. Before it gets its name, a
fresh process loads it with `timm.create_model("local-dir:DIR", pretrained=True)` and classifies real images; the logits
must agree with the adapted model's.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file
from timm.models import save_for_hf
from torch import Tensor

from kadapt_cli import __version__, runs
from kadapt_cli.adapters import Adapted, method
from kadapt_cli.data import ImageSet, open_images
from kadapt_cli.errors import CheckFailedError, DataError, UsageError, visible
from kadapt_cli.evaluate import Run, load_backbone, logits, open_run, run_images, transform_of
from kadapt_cli.models import MERGED, classifier_keys, full_model, merged_digest
from kadapt_cli.tensors import ImageDataset

LARGEST_DIFFERENCE = 1e-4
CHECKED_IMAGES = 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def merge(path: Path, out: Path, *, dtype: str) -> dict[str, Any]:
    """Write the run's merged model to `out` and verify it.

    Returns:
        {"out", "dtype", "max_difference", "images", "rounding_loss"}: the largest difference of a logit on the images
        checked, and the part of the weight updates' norm that rounding to `dtype` destroyed.

    Raises:
        UsageError: `out` is not free, or the run's method is no change of plain weights.
        ModelError: As `evaluate.open_run`.
        CheckFailedError: In fp32, logits differ by more than 1e-4, or timm cannot load the folder; there is none then.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out: {out} already exists; give a new or empty folder")
    run = open_run(path)
    images = _check_images(run)
    base = load_backbone(run.config).module.state_dict()  # anew: the run's model has its linears replaced
    state, loss = merged_state(run.adapted, base, DTYPES[dtype])
    with _becoming(out) as folder:
        _write(run, state, folder)
        difference = _verify(run, folder, images)
        if dtype == "fp32" and not difference <= LARGEST_DIFFERENCE:
            raise CheckFailedError(
                f"--out: merged and adapted logits differ by up to {difference:.1e} on {len(images)} images, more than "
                f"{LARGEST_DIFFERENCE:.0e}; nothing was written to {out}"
            )
    return {
        "schema_version": 1,
        "out": str(out),
        "dtype": dtype,
        "max_difference": difference,
        "images": len(images),
        "rounding_loss": loss,
    }


@contextmanager
def _becoming(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` in the end, and is gone when anything fails; those of killed processes are too."""
    made = [folder for folder in out.parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    for folder in made:
        runs.sync_folder(folder.parent)
    for path in out.parent.iterdir():
        stale = runs.OUR_TEMPORARY.fullmatch(path.name)
        if stale and path.name.endswith(f"-{out.name}") and path.is_dir() and not _is_others(int(stale[1])):
            shutil.rmtree(path)
    folder = out.with_name(f"{runs.TEMPORARY}{os.getpid()}-{out.name}")
    folder.mkdir()
    try:
        yield folder
        try:
            folder.rename(out)  # also over an empty folder
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise UsageError(f"--out: {out} was made by another process meanwhile; give another folder") from None
        folder = out
        runs.sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _is_others(pid: int) -> bool:
    return pid != os.getpid() and runs.is_alive(pid)


def merged_state(adapted: Adapted, base: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, Tensor], float]:
    """The state dict of the merged classifier, in timm's keys, and how much of ΔW its rounding destroyed.

    Sums are made in float64 and rounded once. The loss is ‖(round(W + ΔW) − round(W)) − ΔW‖ / ‖ΔW‖ over all
    weights that changed: 0 when every bit of the adapter survives, 1 when nothing does.

    Args:
        adapted: The model with its trained adapter and head.
        base: The state dict of its backbone before it was adapted.
        dtype: Of the result.

    Raises:
        UsageError: The method is no change of plain weights.
    """
    how = method(adapted.config.method)
    if how.UNMERGED:
        raise UsageError(f"{adapted.config.method} cannot be merged: {how.UNMERGED}; use the run with kadapt predict")
    before = {key: t.to(torch.float64, copy=True) if t.is_floating_point() else t for key, t in base.items()}
    state = {key: t.clone() for key, t in before.items()}
    tensors = {name: parameter.detach().cpu() for name, parameter in adapted.adapter.items()}
    how.merge(state, tensors, adapted.segments, adapted.config)
    lost, whole = 0.0, 0.0
    for key, tensor in state.items():
        if tensor.is_floating_point():
            delta = tensor - before[key]
            survived = tensor.to(dtype).double() - before[key].to(dtype).double()
            lost += float((survived - delta).square().sum())
            whole += float(delta.square().sum())
    weight, bias = adapted.head.folded()
    weight_key, bias_key = classifier_keys(adapted.backbone)
    if adapted.backbone.projection:  # classifier ∘ projection is again one linear layer
        bias = bias + weight @ state[bias_key]
        weight = weight @ state[weight_key]
    state[weight_key], state[bias_key] = weight, bias
    rounded = {key: t.to(dtype) if t.is_floating_point() else t for key, t in state.items()}
    return rounded, (lost / whole) ** 0.5 if whole else 0.0


def _write(run: Run, state: dict[str, Tensor], folder: Path) -> None:
    """Write timm's files and the card."""
    model = full_model(run.adapted.backbone, len(run.classes))
    model.load_state_dict(state, strict=True)
    labels = {"label_names": list(run.classes)}
    save_for_hf(
        model, folder, model_config=labels, data_config=run.adapted.backbone.data_config, safe_serialization=True
    )
    config = json.loads((folder / "config.json").read_text())
    for key in ("num_classes", "in_chans"):  # transformers passes these itself and fails on a second one
        config.get("model_args", {}).pop(key, None)
    config["pretrained_cfg"]["tag"] = "kadapt"
    runs.commit(folder / "config.json", json.dumps(config, indent=2) + "\n")
    whole = {key: tensor.contiguous() for key, tensor in state.items()}
    metadata = {"format": "pt", MERGED: merged_digest(whole, config)}
    runs.commit(folder / "model.safetensors", save(whole, metadata))
    runs.commit(folder / "README.md", _card(run))


def _card(run: Run) -> str:
    """A short model card; what it says of the model is from files, and stays in its place."""
    model = run.info["model"]
    result = run.path / runs.RESULT
    try:
        test = json.loads(result.read_bytes())["metrics"]["test"]
        score = f"Test: {test['metric']} {test['score']:.1%}, measured before merging.\n"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        score = ""  # not tested, or something else wrote it
    return (
        "---\nlibrary_name: timm\npipeline_tag: image-classification\n"
        f"license: {json.dumps(model['license'] or 'other')}\n---\n\n"
        f"# {visible(model['architecture'])} adapted to {len(run.classes)} classes\n\n"
        f"`{visible(model['name'])}` with a {run.config.method} adapter merged into its weights by "
        f"kadapt {__version__}.\n"
        f"{score}\n"
        "```python\nimport timm\nmodel = timm.create_model('local-dir:THIS_FOLDER', pretrained=True).eval()\n```\n"
    )


def _check_images(run: Run) -> Tensor:
    """Up to 32 real images as the model takes them: the run's test or training images, or handwritten digits."""
    try:
        images: ImageSet = run_images(run.path, run.config, run.info)
    except DataError:
        images = open_images("demo")
    split = next(s for s in ("test", "val", "train") if images.splits[s])
    dataset = ImageDataset(images, split, transform_of(run), seed=0)
    step = max(1, len(dataset) // CHECKED_IMAGES)
    return torch.stack([dataset[i][0] for i in range(0, len(dataset), step)][:CHECKED_IMAGES])


_FRESH = """
import sys, timm, torch
from safetensors.torch import load_file, save_file
folder, source, target = sys.argv[1:]
model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
with torch.inference_mode():
    save_file({"logits": model(load_file(source)["images"])}, target)
"""


def _verify(run: Run, written: Path, images: Tensor) -> float:
    """The largest difference between the adapted model's logits and those of the folder, loaded in a new process."""
    labelled = torch.utils.data.TensorDataset(images, torch.zeros(len(images), dtype=torch.long))
    expected, _ = logits(run.adapted.module(), labelled, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "images.safetensors", Path(folder) / "logits.safetensors"
        save_file({"images": images}, source)
        command = [sys.executable, "-c", _FRESH, str(written.resolve()), str(source), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise CheckFailedError(f"--out: timm cannot load the merged model ({last}); nothing was written")
        return float((load_file(target)["logits"] - expected).abs().max())
