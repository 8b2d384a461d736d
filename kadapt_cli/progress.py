"""What a user sees while a run trains: a live display on a terminal, plain lines elsewhere. All of it on stderr."""

import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from kadapt_cli.errors import listed, visible

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def new_console(*, stderr: bool = False) -> Console:
    """A rich console on stdout or stderr; with NO_COLOR also without bold and dim, which rich would keep."""
    return Console(stderr=stderr, color_system=None if os.environ.get("NO_COLOR") else "auto")


def print_line(console: Console, line: str) -> None:
    """Print words as they are: no markup, no wrapping, control characters made visible."""
    console.print(Text(visible(line)), soft_wrap=True)


class Display:
    """Progress of one training run on a rich console; methods may be called at any time, in any order."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._seen = 0
        self._started = time.perf_counter()

    def say(self, line: str) -> None:
        """Print one line above the live display."""
        if not self.quiet:
            print_line(self.console, line)

    @contextmanager
    def training(self, epochs: int, images: int) -> Iterator[None]:
        """Show a bar over epochs × images for the duration, on a terminal only."""
        if self.quiet or not self.console.is_terminal:
            yield
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TextColumn("{task.fields[speed]:.0f} images/s"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            self._progress = progress
            self._task = progress.add_task("", total=epochs * images, epoch=1, speed=0.0, state="")
            self._images, self._seen, self._started = images, 0, time.perf_counter()
            yield
        self._progress = None

    def step(self, epoch: int, done: int, images: int) -> None:
        """Note `images` more, `done` in this epoch (from 0)."""
        if self._progress is None or self._task is None:
            return
        self._seen += images
        speed = self._seen / (time.perf_counter() - self._started)
        self._progress.update(self._task, completed=epoch * self._images + done, epoch=epoch + 1, speed=speed)

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """Print a finished epoch: loss, validation accuracy, speed, time left."""
        left = (epochs - row["epoch"]) * row["time_s"]
        state = f"loss {row['train_loss']:.3f}"
        if row["val_accuracy"] is not None:
            state += f"  val loss {row['val_loss']:.3f}  val accuracy {row['val_accuracy']:6.1%}"
        speed = f"{row['images_per_s']:.0f} images/s"
        kept = "  kept" if row["kept"] else ""
        self.say(f"epoch {row['epoch']:>3}/{epochs}  {state}  {speed}  {duration(left)} left{kept}")
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, state=state)


def duration(seconds: float) -> str:
    """Seconds as 12 s, 3 min 20 s or 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def show_result(result: dict[str, Any], console: Console) -> None:
    """Print what training, or its dry run, came to, and what to type next."""
    from kadapt_cli.adapters import METHODS

    def line(name: str, words: str) -> None:
        print_line(console, f"{name:<12}{words}")

    data, counts = result["data"], result["parameters"]
    line(
        "data",
        f"{data['name']}: {data['classes']} classes, {data['train']} train, {data['val']} val, {data['test']} test",
    )
    line("classes", listed(result["class_names"]))
    line("model", f"{result['model']}, {counts['backbone']:,} frozen parameters, on {result['device']}")
    line(
        "trained",
        f"{counts['trainable']:,} parameters: {result['method']} {counts['adapter']:,}, head {counts['head']:,}",
    )
    if "metrics" not in result:
        line("memory", f"about {result['memory_estimate_bytes'] / 2**20:,.0f} MiB for model, optimizer and activations")
        line("run", f"{result['run']} (dry run: nothing was written)")
        return
    for split, found in result["metrics"].items():
        if found:
            words = f"{found['metric']} {found['score']:.1%}"
            if found["accuracy"] is not None:
                words = f"accuracy {found['accuracy']:.1%}, balanced {found['balanced_accuracy']:.1%}"
            if found["metric"] == "roc_auc":
                words += f", area under the ROC curve {found['score']:.1%}"
            line(
                split,
                words + (f" (epoch {result['kept_epoch']} of {result['epochs']} kept)" if split == "val" else ""),
            )
    line(
        "time",
        f"{duration(result['time_s'])} of training, {result['images_per_s']:.0f} images/s, "
        f"peak memory {result['peak_bytes'] / 2**20:,.0f} MiB",
    )
    line("run", result["run"])
    run = shlex.quote(result["run"])
    print_line(console, "")
    print_line(console, "next:")
    merge = [] if METHODS[result["method"]].UNMERGED else [f"merge-weights {run} --out {run}-merged"]
    for command in (f"eval {run}", f"predict {run} IMAGE…", *merge):
        print_line(console, f"  kadapt {command}")
