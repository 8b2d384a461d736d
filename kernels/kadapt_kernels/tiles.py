"""Which tile a kernel works on: pure functions of architecture, dtype and shape, over tables of tiles that compile.

Tables hold, by architecture and bytes an element, the tiles worth having; the functions leave out what does not fit
(shared memory, registers, the descriptors' conditions) and take the fastest of the rest by a small model of time::

    time = ⌈programs / processors⌉ · work of a program
    work = contraction · max(m · n, BALANCE · (m + n))

The first factor fills the processors: few rows make few row blocks, so small tiles. The second says that a large tile
loads fewer elements for its products: a square one below a side of 2 · BALANCE waits for its loads.

The tables come from ahead-of-time compiles (`aot.report`: no spills on sm_90, shared memory under the limit), BALANCE
and the rest of the model from data sheets. What a sweep on a GPU has measured goes before both.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kadapt_kernels.blocks import Layout


class Tile(NamedTuple):
    """How a kernel is cut and launched.

    Attributes:
        m: Rows of the result that a program makes at a time.
        n: Columns of the result that a program makes at a time.
        k: Length of the contraction that is loaded at a time.
        warps: Triton's num_warps.
        stages: Triton's num_stages.
        tiles: Column tiles that one program of the forward makes one after another; in a table the most that it may.
        descriptor: Whether tensor descriptors (TMA) load and store, not pointers.
        columns: Most columns of h (or g) at a time, R or G·R, that its registers hold without spilling.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    tiles: int = 1
    descriptor: bool = False
    columns: int = 64


class BackwardTiles(NamedTuple):
    """The tiles of the backward's kernels.

    Attributes:
        dx: n cuts the columns K of dx, k the contraction over N.
        project: m rows of g, k columns of dy at a time.
        tall: n columns of x (or dy) against all of g (or h), m rows at a time.
        splits: Runs of rows, each with its own partial sum of dL.
    """

    dx: Tile
    project: Tile
    tall: Tile
    splits: int


Choice = TypeVar("Choice", Tile, BackwardTiles)
Table = Mapping[str, Mapping[int, tuple[Tile, ...]]]  # architecture -> bytes an element -> tiles, the larger first

GENERIC = "generic"
RANK_STEP = 64  # most columns of g that dx takes at a time
TALL_WARPS = 16  # that a processor's registers hold
SHARED_LIMIT: Mapping[str, int] = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
PROCESSORS: Mapping[str, int] = {"sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90": 132, "sm_100": 148, "gfx942": 304}
# Multiply-adds in 16 bits that a processor does while it loads one element from the second-level cache.
BALANCE: Mapping[str, int] = {"sm_80": 43, "sm_86": 43, "sm_89": 43, "sm_90": 85, "sm_100": 170, "gfx942": 43}

FORWARD: Table = {
    GENERIC: {2: (Tile(32, 32, 32, 4, 2, 3),), 4: (Tile(32, 32, 32, 4, 2, 3),)},
    "sm_80": {
        2: (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 3)),
        4: (Tile(64, 64, 32, 8, 3),),
    },
    "sm_90": {
        2: (
            Tile(128, 256, 64, 8, 3, 6, descriptor=True, columns=32),
            Tile(128, 128, 64, 8, 3, 6, descriptor=True),
            Tile(64, 128, 64, 4, 4, 6, descriptor=True),
            Tile(128, 64, 64, 8, 4, 6, descriptor=True),
            Tile(64, 64, 64, 4, 4, 6, descriptor=True),
            Tile(128, 128, 64, 8, 3, 6, columns=32),
            Tile(64, 128, 64, 8, 3, 6),
            Tile(64, 64, 64, 8, 3, 6),
        ),
        4: (Tile(64, 64, 32, 8, 3, columns=32), Tile(32, 32, 32, 8, 3)),
    },
    "sm_100": {
        2: (
            Tile(128, 256, 64, 8, 3, 6, descriptor=True, columns=32),
            Tile(128, 128, 64, 8, 4, 6, descriptor=True),
            Tile(64, 128, 64, 4, 4, 6, descriptor=True),
            Tile(64, 64, 64, 4, 4, 6, descriptor=True),
            Tile(128, 128, 64, 8, 3, 6),
            Tile(64, 64, 64, 4, 3, 6),
        ),
        4: (Tile(64, 64, 32, 8, 3),),
    },
    "gfx942": {
        2: (Tile(128, 128, 64, 8, 2, 6), Tile(64, 128, 64, 4, 2, 6), Tile(64, 64, 64, 4, 2, 6)),
        4: (Tile(128, 64, 32, 8, 2, 6), Tile(64, 64, 32, 4, 2, 6)),
    },
}
DX: Table = {
    GENERIC: {2: (Tile(32, 32, 32, 4, 2),), 4: (Tile(32, 32, 32, 4, 2),)},
    "sm_80": {
        2: (Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 3)),
        4: (Tile(64, 64, 32, 8, 3, columns=32), Tile(32, 64, 32, 8, 3)),
    },
    "sm_90": {
        2: (
            Tile(128, 256, 64, 8, 3, descriptor=True),
            Tile(128, 128, 64, 8, 3, descriptor=True),
            Tile(64, 128, 64, 4, 4, descriptor=True),
            Tile(64, 64, 64, 4, 4, descriptor=True),
            Tile(128, 128, 64, 8, 3),
            Tile(64, 128, 64, 4, 3),
            Tile(64, 64, 64, 4, 3),
        ),
        4: (Tile(64, 64, 32, 8, 3, columns=32), Tile(32, 64, 32, 8, 3)),
    },
    "sm_100": {
        2: (
            Tile(128, 256, 64, 8, 3, descriptor=True),
            Tile(128, 128, 64, 8, 4, descriptor=True),
            Tile(64, 64, 64, 4, 4, descriptor=True),
            Tile(128, 128, 64, 8, 3),
            Tile(64, 64, 64, 4, 3),
        ),
        4: (Tile(64, 64, 32, 8, 3, columns=32), Tile(32, 64, 32, 8, 3)),
    },
    "gfx942": {
        2: (Tile(128, 128, 64, 8, 2), Tile(64, 128, 64, 4, 2), Tile(64, 64, 64, 4, 2)),
        4: (Tile(128, 64, 32, 8, 2), Tile(64, 64, 32, 4, 2)),
    },
}
PROJECT: Table = {
    GENERIC: {2: (Tile(32, 0, 32, 4, 2),), 4: (Tile(32, 0, 32, 4, 2),)},
    "sm_80": {2: (Tile(64, 0, 64, 4, 3),), 4: (Tile(64, 0, 32, 4, 3),)},
    "sm_90": {2: (Tile(64, 0, 64, 4, 4),), 4: (Tile(64, 0, 32, 4, 3),)},
    "sm_100": {2: (Tile(64, 0, 64, 4, 4),), 4: (Tile(64, 0, 32, 4, 3),)},
    "gfx942": {2: (Tile(64, 0, 64, 4, 2),), 4: (Tile(64, 0, 32, 4, 2),)},
}
TALL: Table = {
    GENERIC: {2: (Tile(32, 32, 0, 4, 2, columns=512),), 4: (Tile(32, 32, 0, 4, 2, columns=512),)},
    "sm_80": {
        2: (
            Tile(64, 128, 0, 8, 3, columns=128),
            Tile(64, 64, 0, 8, 3, columns=256),
            Tile(32, 64, 0, 8, 3, columns=512),
        ),
        4: (Tile(32, 64, 0, 8, 3, columns=128), Tile(32, 32, 0, 8, 3, columns=256), Tile(16, 32, 0, 8, 3, columns=512)),
    },
    "sm_90": {
        2: (
            Tile(64, 128, 0, 4, 3),
            Tile(64, 128, 0, 8, 3, columns=128),
            Tile(64, 64, 0, 8, 3, columns=256),
            Tile(32, 64, 0, 8, 3, columns=512),
        ),
        4: (Tile(32, 64, 0, 8, 3, columns=128), Tile(32, 32, 0, 8, 3, columns=256), Tile(16, 32, 0, 8, 3, columns=512)),
    },
    "sm_100": {
        2: (
            Tile(64, 128, 0, 4, 3),
            Tile(64, 128, 0, 8, 3, columns=128),
            Tile(64, 64, 0, 8, 3, columns=256),
            Tile(32, 64, 0, 8, 3, columns=512),
        ),
        4: (Tile(32, 64, 0, 8, 3, columns=128), Tile(32, 32, 0, 8, 3, columns=256), Tile(16, 32, 0, 8, 3, columns=512)),
    },
    "gfx942": {
        2: (
            Tile(64, 128, 0, 8, 2, columns=128),
            Tile(64, 64, 0, 8, 2, columns=256),
            Tile(32, 64, 0, 8, 2, columns=512),
        ),
        4: (Tile(32, 64, 0, 8, 2, columns=128), Tile(32, 32, 0, 8, 2, columns=256), Tile(16, 32, 0, 8, 2, columns=512)),
    },
}

# What a sweep prints, for a packed qkv with two adapters of up to 32 columns: architecture -> (bytes an element, d, M).
# sm_90: H200, PyTorch 2.11, Triton 3.6. Times of the backward are those of its parts, added.
FORWARD_MEASURED: Mapping[str, Mapping[tuple[int, int, int], Tile]] = {
    "sm_90": {
        (2, 384, 6304): Tile(64, 128, 64, 4, 4, 1, True, 64),  # 0.0317 ms
        (2, 384, 25216): Tile(64, 128, 64, 4, 4, 3, True, 64),  # 0.0805 ms
        (2, 768, 6304): Tile(128, 256, 64, 8, 3, 1, True, 64),  # 0.0611 ms
        (2, 768, 25216): Tile(128, 256, 64, 8, 3, 3, True, 64),  # 0.1880 ms
        (2, 1024, 6304): Tile(128, 256, 64, 8, 3, 1, True, 64),  # 0.0960 ms
        (2, 1024, 25216): Tile(128, 256, 64, 8, 3, 2, True, 64),  # 0.2899 ms
    },
}
BACKWARD_MEASURED: Mapping[str, Mapping[tuple[int, int, int], BackwardTiles]] = {
    "sm_90": {
        (2, 384, 6304): BackwardTiles(  # 0.0468 ms
            Tile(64, 128, 64, 4, 3, 1, True), Tile(64, 0, 128, 4, 3), Tile(64, 128, 0, 4, 3), 16
        ),
        (2, 384, 25216): BackwardTiles(  # 0.1037 ms
            Tile(64, 128, 64, 4, 3, 1, True), Tile(128, 0, 64, 4, 3), Tile(32, 128, 0, 4, 4), 33
        ),
        (2, 768, 6304): BackwardTiles(  # 0.0752 ms
            Tile(64, 128, 64, 4, 3, 1, True), Tile(64, 0, 128, 4, 3), Tile(32, 128, 0, 4, 4), 16
        ),
        (2, 768, 25216): BackwardTiles(  # 0.2207 ms
            Tile(128, 128, 64, 8, 3, 1, True), Tile(64, 0, 128, 4, 3), Tile(64, 64, 0, 4, 3), 16
        ),
        (2, 1024, 6304): BackwardTiles(  # 0.1110 ms
            Tile(64, 256, 64, 8, 4, 1, True), Tile(128, 0, 128, 4, 4), Tile(64, 128, 0, 4, 3), 8
        ),
        (2, 1024, 25216): BackwardTiles(  # 0.3240 ms
            Tile(128, 256, 64, 8, 3, 1, True), Tile(64, 0, 128, 4, 3), Tile(32, 64, 0, 4, 3), 24
        ),
    },
}
MEASURED_COLUMNS, MEASURED_ADAPTERS = 32, 2


def architecture(device: torch.device | str) -> str:
    """ "sm_90", "gfx942", … of a device; "generic" off the GPU. The name of an architecture stands for itself."""
    if isinstance(device, str) and device.startswith(("sm_", "gfx")):
        return device
    device = torch.device(device)
    if device.type != "cuda":
        return GENERIC
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def shared_limit(arch: str) -> int:
    """Bytes of shared memory a program may have; for an unknown architecture what most have."""
    return SHARED_LIMIT.get(arch, SHARED_LIMIT["gfx942" if arch.startswith("gfx") else "sm_86"])


def aligned(*matrices: Tensor) -> bool:
    """Whether descriptors can hold them: unit column stride, the first element and every row on a 16-byte boundary."""
    return all(
        t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in matrices
    )


def forward_tile(
    device: torch.device | str, dtype: torch.dtype, M: int, K: int, plan: Layout, aligned: bool = True
) -> Tile:
    """The tile of the row-fused forward for x (M, K) and the rows of W in plan.

    A descriptor tile needs `aligned` operands, and every block of rows to be a whole number of a program's, since its
    stores are cut at the end of y only. Where there is one it is taken: pointers cost registers and instructions. The
    column tiles a program makes are a trade: each program of an adapted block works out its own h, m·R·K multiply-adds
    that more tiles would share, but more tiles make fewer programs, which fill the processors less evenly.

    Raises:
        RuntimeError: No tile of the table holds so many columns, or fits the architecture's shared memory.
    """
    arch, candidates = architecture(device), _candidates(FORWARD, architecture(device), dtype)
    measured = _nearest(FORWARD_MEASURED.get(arch, {}), dtype, M, K)
    if measured and plan.columns <= MEASURED_COLUMNS:
        if not measured.descriptor or (aligned and plan.divides(measured.n * measured.tiles)):
            return measured
    lengths = [stop - start for start, stop, _ in plan.blocks]
    adapted = sum(stop - start for start, stop, adapter in plan.blocks if adapter >= 0) / sum(lengths)

    def time(tile: Tile) -> float:
        programs = _ceil(M, tile.m) * sum(_ceil(length, tile.n * tile.tiles) for length in lengths)
        return _waves(programs, arch) * K * (tile.tiles * _work(tile, arch) + adapted * tile.m * plan.columns)

    chunked = [t._replace(tiles=tiles) for t in candidates for tiles in (1, 2, 3, 4, 6) if tiles <= t.tiles]
    usable = [tile for tile in chunked if tile.descriptor and aligned and plan.divides(tile.n * tile.tiles)]
    pointers = [tile for tile in chunked if not tile.descriptor]
    shared = {tile: forward_shared(tile, dtype, plan.columns, arch) for tile in usable or pointers}
    return min(_fitting(shared, plan.columns, arch, "forward_tile"), key=time)


def backward_tiles(
    device: torch.device | str, dtype: torch.dtype, M: int, K: int, plan: Layout, aligned: bool = True
) -> BackwardTiles:
    """The tiles of the backward for x (M, K) and the rows of W in plan.

    dx takes descriptors where dy and W are `aligned`, whatever the blocks: its result is cut at its own edges only.
    There are as many runs of rows (`splits`) as it takes for every processor to
    hold the programs it can; more would only add partial sums to write and read. A run has two blocks of rows at least.

    Raises:
        RuntimeError: No tile of a table holds so many columns, or fits the architecture's shared memory.
    """
    arch = architecture(device)
    segments = [stop - start for start, stop, adapter in plan.blocks if adapter >= 0]
    measured = _nearest(BACKWARD_MEASURED.get(arch, {}), dtype, M, K)
    alike = plan.columns <= MEASURED_COLUMNS and len(segments) <= MEASURED_ADAPTERS and max(segments, default=0) <= K
    if measured and alike and (aligned or not measured.dx.descriptor):
        return measured
    R, widths = plan.columns, _power_of_2(max(1, len(segments)) * plan.columns)

    def time(tile: Tile) -> float:
        return _waves(_ceil(M, tile.m) * _ceil(K, tile.n), arch) * _work(tile, arch)

    usable = [t for t in _candidates(DX, arch, dtype) if t.descriptor and aligned and K * dtype.itemsize % 16 == 0]
    pointers = [t for t in _candidates(DX, arch, dtype) if not t.descriptor]
    dx = {t: dx_shared(t, dtype, arch) for t in usable or pointers}
    tall = {t: tall_shared(t, dtype, widths, arch) for t in _candidates(TALL, arch, dtype)}
    project = {t: project_shared(t, dtype, R, arch) for t in _candidates(PROJECT, arch, dtype)}
    tiles = BackwardTiles(
        min(_fitting(dx, R, arch, "backward_tiles"), key=time),
        _fitting(project, R, arch, "backward_tiles")[0],
        _fitting(tall, widths, arch, "backward_tiles")[0],
        1,
    )
    programs = max(1, sum(_ceil(length, tiles.tall.n) for length in segments))
    resident = max(1, min(shared_limit(arch) // tall[tiles.tall], TALL_WARPS // tiles.tall.warps))
    splits = max(1, min(_processors(arch) * resident // programs, _ceil(M, 2 * tiles.tall.m)))
    return tiles._replace(splits=splits)


def forward_shared(tile: Tile, dtype: torch.dtype, columns: int, arch: str) -> int:
    """Bytes of shared memory of the forward: x, W and the right factor for each stage; later, for a descriptor, y too.

    The tiles after the first need no right factor, but their stages are still there when y is stored. h is kept beside.
    """
    later = _buffers(tile, arch) * (tile.m + tile.n) * tile.k
    first = later + _buffers(tile, arch) * columns * tile.k
    return (max(first, later + tile.descriptor * tile.m * tile.n) + tile.m * columns) * dtype.itemsize


def dx_shared(tile: Tile, dtype: torch.dtype, arch: str) -> int:
    """Bytes of shared memory of dx: dy and W for each stage; g and R, then the result, take their place."""
    loop = _buffers(tile, arch) * (tile.m + tile.n) * tile.k
    return max(loop, (tile.m + tile.n) * RANK_STEP, tile.m * tile.n) * dtype.itemsize


def project_shared(tile: Tile, dtype: torch.dtype, columns: int, arch: str) -> int:
    """Bytes of shared memory of the product for g: dy and L for each stage."""
    return _buffers(tile, arch) * (tile.m + columns) * tile.k * dtype.itemsize


def tall_shared(tile: Tile, dtype: torch.dtype, columns: int, arch: str) -> int:
    """Bytes of shared memory of the sum over rows: x and g (or dy and h) for each stage; the sums take their place."""
    return max(_buffers(tile, arch) * tile.m * (tile.n + columns) * dtype.itemsize, 4 * tile.n * columns)


def _buffers(tile: Tile, arch: str) -> int:
    """Copies of a loop's operands: a wgmma or tcgen05 product still reads its own while the next are loaded."""
    return tile.stages if arch in ("sm_90", "sm_100") else tile.stages - 1


def _nearest(measured: Mapping[tuple[int, int, int], Choice], dtype: torch.dtype, M: int, K: int) -> Choice | None:
    """What was measured for this dtype and width with the nearest number of rows, M or up to four times as many or as
    few; None if nothing was."""
    ratios = {key: abs(log(max(M, 1) / key[2])) for key in measured if key[:2] == (dtype.itemsize, K)}
    nearest = min(ratios, key=ratios.__getitem__, default=None)
    return measured[nearest] if nearest and ratios[nearest] <= log(4) else None


def _candidates(table: Table, arch: str, dtype: torch.dtype) -> tuple[Tile, ...]:
    """An architecture that is not in the table takes the tiles of the oldest of its kind."""
    return table[arch if arch in table else "gfx942" if arch.startswith("gfx") else "sm_80"].get(dtype.itemsize, ())


def _fitting(shared: Mapping[Tile, int], columns: int, arch: str, where: str) -> list[Tile]:
    """The tiles that have room for the columns and fit, given the bytes that each takes; never none."""
    narrow = [tile for tile in shared if columns <= tile.columns]
    if not narrow:
        raise RuntimeError(
            f"{where}: expected at most {max(tile.columns for tile in shared)} columns of h or g, but T·r makes them "
            f"{columns}; use backend='merge'"
        )
    found = [tile for tile in narrow if shared[tile] <= shared_limit(arch)]
    if not found:
        raise RuntimeError(
            f"{where}: expected at most the {shared_limit(arch)} bytes of shared memory of {arch}, but the smallest "
            f"tile takes {min(shared[tile] for tile in narrow)}; use backend='merge' or 'eager'"
        )
    return found


def _work(tile: Tile, arch: str) -> int:
    """Multiply-adds of a tile per step of the contraction, or as many as fit into the time of its loads."""
    return max(tile.m * tile.n, BALANCE.get(arch, 43) * (tile.m + tile.n))


def _processors(arch: str) -> int:
    return 4 if arch == GENERIC else PROCESSORS.get(arch, 100)


def _waves(programs: int, arch: str) -> int:
    return _ceil(programs, _processors(arch))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
