"""What is to be measured: the options of the command line, checked, with every default filled in."""

import csv
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from kadapt_cli.bench.contenders import CONTENDERS, DTYPES, MAX_SIDE, Shape
from kadapt_cli.bench.step import BUNDLED, qkv_shape
from kadapt_cli.bench.timing import LAYER_MODES
from kadapt_cli.errors import MachineError, UsageError, shown

MODES = (*LAYER_MODES, "step")
WIDTHS = (192, 384, 768, 1024, 1280)
# 197 tokens of a 224-pixel image with patches of 16, in batches of 1 to 512; 128 images of 50 tokens (patches of 32).
ROWS = (197, 8 * 197, 32 * 197, 128 * 50, 128 * 197, 512 * 197)
DEFAULT_SHAPES = tuple(Shape(d, m) for d in WIDTHS for m in ROWS)


@dataclass(frozen=True)
class Plan:
    """What to measure. `step` is what a step's qkv layers are given, None without steps; `missing` says what is not."""

    device: torch.device
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    contenders: tuple[str, ...]
    modes: tuple[str, ...]
    model: str
    batch_size: int
    rounds: int
    missing: tuple[str, ...] = ()


def plan(
    *,
    device: str = "auto",
    quick: bool = False,
    shapes: Path | None = None,
    dtype: str | None = None,
    contenders: str | None = None,
    modes: str | None = None,
    model: str | None = None,
) -> Plan:
    """The plan for these options; lists are comma-separated, and None takes the default of the device.

    Raises:
        UsageError: An unknown dtype, contender, mode or model, or a shapes file that cannot be used.
        MachineError: CUDA or a contender asked for by name that is not here.
    """
    where = _device(device)
    cuda = where.type == "cuda"
    dtypes = chosen("--dtype", dtype, DTYPES) or ("bf16" if cuda else "fp32",)
    if "tf32" in dtypes and not cuda:
        raise MachineError("--dtype: tf32 is a mode of CUDA's tensor cores, and this runs on the CPU; use fp32")
    named = chosen("--contenders", contenders, CONTENDERS)
    asked = named or tuple(CONTENDERS)
    missing = {name: why for name in asked if (why := _missing(CONTENDERS[name].needs, cuda))}
    lines = [f"{name}: not measured, it needs {why}" for name, why in missing.items()]
    if named and missing:
        raise MachineError(f"--contenders: {'; '.join(lines)}; leave it out or install what it needs")
    taken = chosen("--modes", modes, MODES) or MODES
    if "step" in taken and (why := _missing("timm", cuda)):
        taken = tuple(mode for mode in taken if mode != "step")
        lines.append(f"step: not measured, it needs {why}")
    model = model or ("vit_base_patch16_224" if cuda else BUNDLED)
    if "step" in taken:
        qkv_shape(model, 1)
    return Plan(
        device=where,
        shapes=read_shapes(shapes) if shapes else default_shapes(cuda, quick),
        dtypes=dtypes,
        contenders=tuple(dict.fromkeys(["frozen", *(name for name in asked if name not in missing)])),
        modes=taken,
        model=model,
        batch_size=(32 if quick else 128) if cuda else (8 if quick else 64),
        rounds=(10 if quick else 30) if cuda else (5 if quick else 15),
        missing=tuple(lines),
    )


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise MachineError("--device: cuda was asked for, but PyTorch sees no CUDA GPU here; use --device cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def chosen(option: str, given: str | None, known: Iterable[str]) -> tuple[str, ...]:
    """The names of a comma-separated list, each once and in the order of those known; none for None.

    Raises:
        UsageError: A name that is not known.
    """
    known, names = list(known), [name.strip() for name in given.split(",")] if given is not None else []
    for name in names:
        if name not in known:
            raise UsageError(f"{option}: unknown {shown(name)!r}; known: {', '.join(known)}")
    return tuple(name for name in known if name in names)


def _missing(need: str, cuda: bool) -> str:
    """What is needed and not here, in words; nothing if it is."""
    if need == "a GPU":
        return "" if cuda else need
    return f"{need}, which is not installed" if need and importlib.util.find_spec(need) is None else ""


def default_shapes(cuda: bool, quick: bool) -> tuple[Shape, ...]:
    """The whole matrix on CUDA, small layers elsewhere; fewer when quick."""
    if cuda:
        return tuple(s for s in DEFAULT_SHAPES if s.d == 768 and s.M >= 6304) if quick else DEFAULT_SHAPES
    widths, rows = ((192, 384), (197, 788)) if quick else ((192, 384, 768), (197, 1576))
    return tuple(Shape(d, m) for d in widths for m in rows)


def read_shapes(path: Path) -> tuple[Shape, ...]:
    """The shapes of a CSV file with the columns d and M, each once.

    Raises:
        UsageError: No such file or columns, no rows, or a value that no layer can have; says the line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"d", "M"} <= set(reader.fieldnames or ()):
                given = ", ".join(shown(name) for name in reader.fieldnames or ()) or "nothing"
                raise UsageError(f"--shapes: {path}, line 1: expected the columns d,M, but {given} was given")
            found = [_shape(row, f"--shapes: {path}, line {reader.line_num}") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"--shapes: {path} cannot be read as a CSV file: {error}") from error
    if not found:
        raise UsageError(f"--shapes: {path} has the columns d,M but no rows")
    return tuple(dict.fromkeys(found))


def _shape(row: Mapping[str, str | None], where: str) -> Shape:
    numbers = []
    for name in ("d", "M"):
        text = (row[name] or "").strip()
        if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**31):
            raise UsageError(f"{where}: {name} must be a whole number above 0, but {text!r} was given")
        numbers.append(int(text))
    shape = Shape(*numbers)
    if shape.side == 1:
        raise UsageError(
            f"{where}: d = {shape.d} has no divisor from 2 to {MAX_SIDE}, so a packed qkv layer of {3 * shape.d} x "
            f"{shape.d} has no Kronecker factors; use a multiple of {MAX_SIDE}"
        )
    return shape
