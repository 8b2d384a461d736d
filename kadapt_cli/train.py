"""`kadapt train`: prepare data and model, fit adapter and head, keep an epoch by validation, measure it.

The loop is deterministic on a CPU: the order of images, their augmentation and the learning rate depend on the seed,
the epoch and the step alone, and everything else that a step reads is in the state file. A run that is killed at any
moment and resumed ends with the same adapter as one that was not.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from kadapt_cli import metrics, report, runs
from kadapt_cli.config import TrainConfig, read_toml, resolve, to_toml
from kadapt_cli.data import ImageDataset, epoch_order, make_transform, manifest_csv
from kadapt_cli.errors import (
    INTERRUPTED,
    TERMINATED,
    DivergedError,
    InterruptedRunError,
    MachineError,
    ModelError,
    UsageError,
)
from kadapt_cli.evaluate import fill, logits, probabilities
from kadapt_cli.progress import Display
from kadapt_cli.session import (
    Row,
    Session,
    estimate_memory,
    learning_rate,
    prepare,
    restore,
    save_adapter,
    save_state,
    start_head,
    with_absolute_paths,
)

SCHEMA_VERSION = 1
WORKERS = 4
LIVE_EPOCHS = 2  # in which gradients are looked at; the first may have a single step, too few for A and v to get one
CHECK_EVERY = 16  # steps between looks at the loss on a GPU, where each look waits for it


def train(config: TrainConfig, out: Path, *, resume: bool, display: Display) -> Row:
    """Train as configured into the run folder `out` and return the result, as result.json holds it.

    Raises:
        KadaptError: Anything the user can mend; the folder then holds the last good state.
    """
    runs.claim(out, resume=resume)
    if resume:
        config = _resumed_config(config, out)
    session = prepare(config, out, display, resume=resume)
    with runs.writing(out):
        if resume:
            restore(session)
            display.say(f"resumed {out} after {session.epoch} epochs, {session.step} steps")
        else:
            runs.commit(out / runs.CONFIG, to_toml(session.config))
            runs.commit(out / runs.MANIFEST, manifest_csv(session.images))
            start_head(session)
            save_state(session)
        fit(session, display)
        return _finish(session, display)


def dry_run(config: TrainConfig, out: Path, display: Display) -> Row:
    """What `train` would do: classes, counts, parameters, memory; writes nothing."""
    runs.claim(out, resume=False)
    session = prepare(config, out, display)
    return _summary(session) | {"memory_estimate_bytes": estimate_memory(session)}


def fit(session: Session, display: Display) -> None:
    """Train until all epochs are done, validation stops improving, or the user interrupts."""
    with _signals(session, display), display.training(session.config.epochs, len(session.train)):
        while not session.finished:
            _run_epoch(session, display)
            _end_epoch(session, display)
            _leave_if_asked(session)


def _run_epoch(session: Session, display: Display) -> None:
    config = session.config
    session.train.set_epoch(session.epoch)
    order = epoch_order(len(session.train), config.seed, session.epoch)
    batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    done = session.step - session.epoch * session.steps_per_epoch
    started = saved = time.perf_counter()
    for images, labels in _loader(session, batches[done:]):
        _step(session, images.to(session.device), labels.to(session.device), display)
        now = time.perf_counter()
        session.epoch_time_s, started = session.epoch_time_s + now - started, now
        done += 1
        display.step(session.epoch, min(done * config.batch_size, len(order)), len(labels))
        if session.device.type == "cpu" or session.step % CHECK_EVERY == 0:
            _check_finite(session)
        if session.stop or now - saved >= config.save_every:
            _check_finite(session)
            save_state(session)
            saved = now
        _leave_if_asked(session)


def _leave_if_asked(session: Session) -> None:
    """Raise when a signal has come; the state is saved."""
    if session.stop:
        raise InterruptedRunError(
            f"{session.stop}: saved after {session.step} steps; go on with: kadapt train --out {session.out} --resume",
            TERMINATED if session.stop == "SIGTERM" else INTERRUPTED,
        )


def _step(session: Session, images: Tensor, labels: Tensor, display: Display) -> None:
    """One optimizer step on a batch, in micro-batches that are halved whenever memory runs out."""
    for group in session.optimizer.param_groups:
        group["lr"] = learning_rate(session.step, session)
    while True:
        try:
            loss, right = _gradients(session, images, labels)
            break
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
        if session.micro == 1:
            raise MachineError("out of memory with one image at a time; use a smaller --model or --img-size")
        session.micro = math.ceil(min(session.micro, len(labels)) / 2)
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
        display.say(f"out of memory: now {session.micro} images at a time, still {session.config.batch_size} a step")
    session.scaler.unscale_(session.optimizer)
    if session.epoch < LIVE_EPOCHS:
        for name, parameter in session.parameters.items():
            if parameter.grad is not None:
                session.live[name] |= parameter.grad != 0
    session.scaler.step(session.optimizer)
    session.scaler.update()
    session.step += 1
    session.sums += torch.stack([loss * len(labels), right, right.new_tensor(len(labels))]).to(session.sums)


def _gradients(session: Session, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Accumulate the batch's mean gradient; returns its mean loss and the number classified right."""
    session.optimizer.zero_grad(set_to_none=True)
    total, right = torch.zeros((), device=session.device), torch.zeros((), device=session.device)
    for x, y in zip(images.split(session.micro), labels.split(session.micro), strict=True):
        with torch.autocast(session.device.type, session.dtype, enabled=session.dtype != torch.float32):
            values = session.module(x)
        loss = F.cross_entropy(values.float(), y, reduction="sum") / len(labels)
        session.scaler.scale(loss).backward()
        total += loss.detach()
        right += (values.argmax(1) == y).sum()
    return total, right


def _end_epoch(session: Session, display: Display) -> None:
    """Validate, note the epoch, keep it unless an earlier one is clearly better, save."""
    _check_finite(session)
    loss, right, seen = session.sums.tolist()
    row: Row = {
        "epoch": session.epoch + 1,
        "step": session.step,
        "lr": learning_rate(session.step - 1, session),
        "train_loss": loss / seen,
        "train_accuracy": right / seen,
        "val_loss": None,
        "val_accuracy": None,
        "kept": True,
        "images_per_s": seen / session.epoch_time_s,
        "time_s": session.epoch_time_s,
    }
    if session.val is not None:
        values, labels = logits(session.module, session.val, session.device, session.dtype)
        row["val_loss"] = F.cross_entropy(values, labels).item()
        row["val_accuracy"] = (values.argmax(1) == labels).double().mean().item()
        session.best = max(session.best, row["val_accuracy"])
        row["kept"] = metrics.within_one_error(row["val_accuracy"], session.best, len(labels))
    session.epoch += 1
    session.epoch_time_s = 0.0
    session.sums.zero_()
    session.history.append(row)
    if session.step >= 2 and session.epoch <= LIVE_EPOCHS:
        check_live(session.live)
    if row["kept"]:
        session.kept_epoch = session.epoch
        save_adapter(session)
    save_state(session)
    runs.commit(session.out / runs.METRICS, metrics_csv(session.history))
    display.epoch(row, session.config.epochs)


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


def _loader(session: Session, batches: list[list[int]]) -> DataLoader[tuple[Tensor, int]]:
    on_gpu = session.device.type == "cuda"
    dataset: Dataset[tuple[Tensor, int]] = session.train
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=min(WORKERS, os.cpu_count() or 1) if on_gpu else 0,
        pin_memory=on_gpu,
        generator=torch.Generator(),  # of its own, so that starting a loader leaves the global one alone
    )


def _check_finite(session: Session) -> None:
    if not bool(session.sums[0].isfinite()):
        lr = learning_rate(max(session.step - 1, 0), session)
        raise DivergedError(
            f"{session.out}: the loss is not finite at step {session.step} with learning rate {lr:.2g}; "
            f"try --lr {session.config.lr / 4:.2g}. The last good state is kept"
        )


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


@contextmanager
def _signals(session: Session, display: Display) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the step, saves and stops; the second ends the process at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        if session.stop:
            os._exit(TERMINATED if number == signal.SIGTERM else INTERRUPTED)
        session.stop = signal.Signals(number).name
        display.say(f"{session.stop}: saving; once more to quit at once")

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _resumed_config(config: TrainConfig, out: Path) -> TrainConfig:
    """The run's own configuration; `UsageError` when an option given now differs from it."""
    stored = resolve(read_toml(out / runs.CONFIG))
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
    tensors, info = runs.load_tensors(session.out / runs.ADAPTER, "adapter")
    fill(session.adapted, tensors, session.out / runs.ADAPTER)
    measured: Row = {}
    transform = make_transform(session.adapted.backbone.data_config, augment="none")
    for split in ("val", "test"):
        if session.images.splits[split]:
            display.say(f"measuring epoch {info['epoch']} on {len(session.images.splits[split])} {split} images")
            dataset = ImageDataset(session.images, split, transform, seed=session.config.seed)
            values, labels = logits(session.module, dataset, session.device, session.dtype)
            found = metrics.evaluate(probabilities(values), labels.numpy(), session.images.classes)
            measured[split] = {"accuracy": found.accuracy.value, "balanced_accuracy": found.balanced_accuracy.value}
            confusion = report.confusion_csv(found.confusion, session.images.classes)
    if measured:
        runs.commit(session.out / runs.CONFUSION, confusion)
    runs.commit(session.out / runs.METRICS, metrics_csv(session.history))  # the last commit may have come too late
    title = f"{session.images.name}: {session.config.method} on {session.config.model}"
    runs.commit(session.out / runs.CURVES, report.curves_svg(session.history, title))
    result = _summary(session)
    result["parameters"]["live"] = int(sum(mask.sum() for mask in session.live.values()))
    time_s = sum(row["time_s"] for row in session.history)
    seen = len(session.train) * len(session.history)
    result |= {
        "metrics": {"val": None, "test": None} | measured,
        "epochs": len(session.history),
        "kept_epoch": info["epoch"],
        "time_s": time_s,
        "images_per_s": seen / time_s,
        "peak_bytes": _peak_bytes(session.device),
        "micro_batch": session.micro,
    }
    runs.commit(session.out / runs.RESULT, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def _peak_bytes(device: torch.device) -> int:
    """Largest memory in use so far: allocated on the GPU, or resident of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"
