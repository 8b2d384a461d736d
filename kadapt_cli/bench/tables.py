"""What is printed and appended: tables for a terminal, and a CSV file with the machine and its versions in each row."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from kadapt_cli.bench.timing import Row
from kadapt_cli.errors import UsageError

AOT_HEADS = {
    "kernel": "kernel", "tile": "tile", "dtype": "dtype", "width": "d", "registers": "regs", "spill_bytes": "spill",
    "shared_bytes": "shared", "tensor_core_ops": "MMA", "pipelined": "pipelined",
}  # fmt: skip


def csv_writer(path: Path, device: str) -> Callable[[list[Row]], None]:
    """A function that appends rows, each with the machine, the versions and the date, to a CSV file.

    Raises:
        UsageError: The file has other columns or cannot be written.
    """
    about = {"device": device, "threads": torch.get_num_threads(), "date": date.today().isoformat()}
    about |= {package: _version(package) for package in ("triton", "timm", "peft")} | {"torch": torch.__version__}
    columns = [*(f.name for f in fields(Row)), *about]
    try:
        with path.open("a+", newline="", encoding="utf-8") as file:
            file.seek(0)
            header = next(csv.reader(file), None)
            if header is None:
                csv.writer(file, lineterminator="\n").writerow(columns)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--csv: {path} cannot be written: {error}") from error
    if header not in (None, columns):
        raise UsageError(f"--csv: {path} has other columns than this version writes; name a new file")

    def write(rows: list[Row]) -> None:
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, columns, lineterminator="\n").writerows(asdict(row) | about for row in rows)

    return write


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def tables(rows: Sequence[Row]) -> list[Table]:
    """A table for each dtype and width of the layer modes, and one for the training steps of each dtype."""
    groups: dict[tuple[bool, str, int], list[Row]] = {}
    for row in rows:
        step = row.mode == "step"
        groups.setdefault((step, row.dtype, 0 if step else row.d), []).append(row)
    ordered = sorted(groups, key=lambda group: group[0])
    return [(_step_table if group[0] else _layer_table)(groups[group]) for group in ordered]


def _layer_table(rows: list[Row]) -> Table:
    modes = list(dict.fromkeys(row.mode for row in rows))
    heads = [head for mode in modes for head in (mode, "ratio")]
    title = f"packed qkv, d = {rows[0].d}, {rows[0].dtype}: ms, ratio to frozen, relative error"
    table = _table(title, "contender", *heads, "error", "eager's")
    for m in dict.fromkeys(row.M for row in rows):
        table.add_row(Text(f"M = {m}", style="bold"))
        for name in dict.fromkeys(row.contender for row in rows):
            found = [row for row in rows if (row.M, row.contender) == (m, name)]
            cells = [cell for row in found for cell in (_milliseconds(row), _number(row.ratio_frozen, ".2f"))]
            table.add_row(name, *cells, _number(found[0].max_err, ".0e"), _number(found[0].eager_err, ".0e"))
        table.add_section()
    return table


def _step_table(rows: list[Row]) -> Table:
    first = rows[0]
    title = f"training step of {first.model}, batch {first.batch_size}, {first.dtype}"
    table = _table(title, "contender", "ms", "p20", "p80", "ratio", "trained", "peak MiB")
    for row in rows:
        times = (row.time_ms_p50, row.time_ms_p20, row.time_ms_p80)
        peak = None if row.peak_bytes is None else row.peak_bytes / 2**20
        cells = [*(_number(t, ".1f") for t in times), _number(row.ratio_frozen, ".2f")]
        table.add_row(row.contender, *cells, _number(row.trained, ",d"), _number(peak, ",.0f"))
    return table


def aot_table(arch: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The ahead-of-time report; a kernel that does not compile shows its error in the place of the figures."""
    table = _table(f"kernels compiled ahead of time for {arch} (compiled, not run)", *AOT_HEADS.values(), words=2)
    for row in rows:
        cells = ["–" if row.get(name) is None else str(row[name]) for name in AOT_HEADS]
        table.add_row(*([*cells[:4], f"does not compile: {row['error']}"] if row.get("error") else cells))
    return table


def _table(title: str, *headers: str, words: int = 1) -> Table:
    """The first columns hold words and may wrap, the others numbers, which must not be cut."""
    table = Table(
        title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True,
        title_justify="left", title_style="bold",
    )  # fmt: skip
    for i, header in enumerate(headers):
        number = i >= words
        table.add_column(header, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def _milliseconds(row: Row) -> str:
    return _number(row.time_ms_p50, ".3g" if (row.time_ms_p50 or 0) < 100 else ".0f")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
