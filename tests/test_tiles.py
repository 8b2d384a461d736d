"""Tile choice on paper: what fits, what descriptors need, how few rows shrink the tile, and what no table knows."""

from types import SimpleNamespace

import pytest
import torch

from kadapt_kernels.blocks import Layout
from kadapt_kernels.tiles import (
    DX,
    FORWARD,
    PROCESSORS,
    PROJECT,
    SHARED_LIMIT,
    TALL,
    Tile,
    aligned,
    architecture,
    backward_tiles,
    dx_shared,
    forward_shared,
    forward_tile,
    project_shared,
    shared_limit,
    tall_shared,
)

KNOWN = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942"]
UNKNOWN = ["sm_75", "sm_120", "gfx90a", "cpu"]
WIDTHS = (192, 384, 768, 1024, 1280)
ROWS = (0, 1, 197, 8 * 197, 32 * 197, 128 * 197)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def qkv(width: int, columns: int = 32) -> Layout:
    """A packed qkv weight with adapters on q and v."""
    return Layout(((0, width, 0), (width, 2 * width, -1), (2 * width, 3 * width, 1)), ((1, 1, 1, 1, 1),) * 2, columns)


def one(rows: int, columns: int = 32) -> Layout:
    return Layout(((0, rows, 0),), ((1, 1, 1, 1, 1),), columns)


@pytest.fixture
def unmeasured(monkeypatch):
    """What the model of time chooses, where no sweep has been."""
    for name in ("FORWARD_MEASURED", "BACKWARD_MEASURED"):
        monkeypatch.setattr(f"kadapt_kernels.tiles.{name}", {})


@pytest.mark.parametrize("arch", KNOWN + UNKNOWN)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("columns", [16, 32, 64])
def test_every_choice_fits_its_architecture(arch, dtype, columns):
    limit = shared_limit(architecture(arch))
    for width in WIDTHS:
        for rows in ROWS:
            tile = forward_tile(arch, dtype, rows, width, qkv(width, columns))
            tiles = backward_tiles(arch, dtype, rows, width, qkv(width, columns))
            assert forward_shared(tile, dtype, columns, arch) <= limit
            assert dx_shared(tiles.dx, dtype, arch) <= limit
            assert project_shared(tiles.project, dtype, columns, arch) <= limit
            assert tall_shared(tiles.tall, dtype, 2 * columns, arch) <= limit
            assert columns <= min(tile.columns, tiles.dx.columns, tiles.project.columns)
            assert 2 * columns <= tiles.tall.columns
            assert 1 <= tiles.splits <= max(1, rows)


def test_tables_hold_tiles_that_a_tensor_core_can_take():
    for table in (FORWARD, DX, PROJECT, TALL):
        for tiles in (tiles for by_size in table.values() for tiles in by_size.values()):
            for tile in tiles:
                sides = [side for side in (tile.m, tile.k) if side] + [tile.n] * bool(tile.n)
                assert all(side >= 16 and side & (side - 1) == 0 for side in sides), tile
                assert tile.warps in (4, 8)
                assert tile.tiles == 1 or table is FORWARD


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_descriptor_tiles_end_where_blocks_end(arch, width):
    for rows in ROWS:
        tile = forward_tile(arch, BF16, rows, width, qkv(width))
        assert tile.descriptor
        assert width % (tile.n * tile.tiles) == 0


def test_descriptors_need_whole_blocks_alignment_and_hopper():
    assert forward_tile("sm_90", BF16, 6304, 768, one(768)).descriptor
    assert not forward_tile("sm_90", BF16, 6304, 768, one(760)).descriptor
    assert not forward_tile("sm_90", BF16, 6304, 768, Layout(((0, 96, -1), (96, 864, 0)), (), 32)).descriptor
    assert not forward_tile("sm_90", BF16, 6304, 768, one(768), aligned=False).descriptor
    assert not forward_tile("sm_80", BF16, 6304, 768, one(768)).descriptor
    assert backward_tiles("sm_90", BF16, 6304, 768, one(760)).dx.descriptor, "dx is cut at its own edges"
    assert not backward_tiles("sm_90", BF16, 6304, 768, one(768), aligned=False).dx.descriptor
    assert not backward_tiles("sm_90", BF16, 6304, 764, one(768)).dx.descriptor, (
        "a row of dx is no multiple of 16 bytes"
    )


def test_aligned_says_what_a_descriptor_can_hold():
    whole = torch.zeros(9, 24, dtype=BF16)
    assert aligned(whole, whole[:, 8:16], whole[1:])
    assert not aligned(whole, whole[:, 4:12]), "starts 8 bytes into a row"
    assert not aligned(torch.zeros(9, 20, dtype=BF16)), "rows of 40 bytes"
    assert aligned(torch.zeros(9, 20, dtype=FP32)), "rows of 80 bytes"
    assert not aligned(whole.t())
    assert aligned(torch.empty(9, 24, dtype=BF16, device="meta"))


def test_few_rows_take_tiles_that_reach_more_processors(unmeasured):
    def programs(rows: int) -> tuple[Tile, int]:
        tile = forward_tile("sm_90", BF16, rows, 768, qkv(768))
        return tile, -(-rows // tile.m) * 2304 // (tile.n * tile.tiles)

    small, few = programs(197)
    large, many = programs(128 * 197)
    assert small.m * small.n < large.m * large.n
    assert few > 2304 // 256 * 2, "more than the large tile's programs"
    assert many > 4 * PROCESSORS["sm_90"]
    assert (
        backward_tiles("sm_90", BF16, 197, 768, qkv(768)).dx.m
        < backward_tiles("sm_90", BF16, 25216, 768, qkv(768)).dx.m
    )


def test_splits_fill_the_processors_once(unmeasured):
    tiles = backward_tiles("sm_90", BF16, 25216, 1280, qkv(1280))
    programs = tiles.splits * 2 * 1280 // tiles.tall.n
    assert PROCESSORS["sm_90"] < programs <= 4 * PROCESSORS["sm_90"]
    assert backward_tiles("sm_90", BF16, 300, 768, qkv(768)).splits == 3, "two blocks of 64 rows at least"


def test_wide_adapters_leave_out_the_tiles_that_would_spill():
    assert forward_tile("sm_90", BF16, 25216, 768, qkv(768, 32)).n == 256
    assert forward_tile("sm_90", BF16, 25216, 768, qkv(768, 64)).n == 128
    assert backward_tiles("sm_90", BF16, 25216, 768, qkv(768, 64)).tall.columns == 128


def test_shared_memory_of_known_tiles():
    """As the compiler reported them, but for h beside the loop and the part of a wgmma loop that fp32 does without."""
    tile = Tile(128, 256, 64, 8, 3, 3, descriptor=True)
    assert forward_shared(tile, BF16, 32, "sm_90") == (208 + 8) * 1024
    assert forward_shared(Tile(128, 128, 64, 8, 3), BF16, 32, "sm_90") == (108 + 8) * 1024
    assert forward_shared(Tile(128, 128, 64, 8, 3), BF16, 32, "sm_80") == (72 + 8) * 1024
    assert dx_shared(Tile(128, 256, 64, 8, 3), BF16, "sm_90") == 144 * 1024
    assert tall_shared(Tile(64, 128, 0, 4, 3), BF16, 64, "sm_90") == 72 * 1024
    assert project_shared(Tile(64, 0, 64, 4, 4), BF16, 32, "sm_90") == 48 * 1024


def test_unknown_architectures_take_pointer_tiles_within_the_usual_limit():
    assert [shared_limit(arch) for arch in ("sm_75", "sm_120", "gfx90a")] == [99 * 1024, 99 * 1024, 64 * 1024]
    for arch in ("sm_75", "sm_120", "gfx90a"):
        tile = forward_tile(arch, BF16, 25216, 768, qkv(768))
        assert not tile.descriptor
        assert forward_shared(tile, BF16, 32, arch) <= shared_limit(arch)
        assert not backward_tiles(arch, BF16, 25216, 768, qkv(768)).dx.descriptor
    assert set(SHARED_LIMIT) == set(PROCESSORS)


def test_architecture_of_a_device(monkeypatch):
    assert architecture("cpu") == architecture(torch.device("meta")) == "generic"
    assert architecture("sm_90") == "sm_90"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert architecture(torch.device("cuda")) == "sm_89"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert architecture("cuda:0") == "gfx942"


def test_a_rank_beyond_every_tile_says_what_to_do():
    expected = r"forward_tile: expected at most 64 columns of h or g, but T·r makes them 128; use backend='merge'"
    with pytest.raises(RuntimeError, match=expected):
        forward_tile("sm_90", BF16, 6304, 768, qkv(768, 128))
    with pytest.raises(RuntimeError, match="backward_tiles: expected at most 64 columns"):
        backward_tiles("sm_90", BF16, 6304, 768, qkv(768, 128))


def test_too_little_shared_memory_says_what_to_do(monkeypatch, unmeasured):
    monkeypatch.setattr("kadapt_kernels.tiles.SHARED_LIMIT", SHARED_LIMIT | {"sm_90": 16 * 1024})
    with pytest.raises(
        RuntimeError, match=r"forward_tile: .* 16384 bytes of shared memory of sm_90, but .* use backend="
    ):
        forward_tile("sm_90", BF16, 6304, 768, qkv(768))
    with pytest.raises(RuntimeError, match=r"backward_tiles: expected at most the 16384 bytes"):
        backward_tiles("sm_90", BF16, 6304, 768, qkv(768))


def test_measured_tiles_come_first_where_they_were_measured(monkeypatch):
    """At the nearest number of rows in ratio, up to four, for that width, dtype and architecture, where they fit."""
    few, many = Tile(64, 128, 64, 4, 4, 2, descriptor=True), Tile(128, 256, 64, 8, 3, 3, descriptor=True)
    monkeypatch.setattr(
        "kadapt_kernels.tiles.FORWARD_MEASURED", {"sm_90": {(2, 768, 197): few, (2, 768, 25_216): many}}
    )
    for rows, wanted in ((50, few), (780, few), (6_400, many), (100_000, many)):
        assert forward_tile("sm_90", BF16, rows, 768, qkv(768)) == wanted
    for rows in (0, 49, 800, 6_300, 101_000):
        assert forward_tile("sm_90", BF16, rows, 768, qkv(768)) not in (few, many), "too far from what was measured"
    usual = {
        (arch, dtype, width, columns, by): forward_tile(arch, dtype, 25_216, width, qkv(width, columns), by)
        for arch, dtype, width, columns, by in (
            ("sm_100", BF16, 768, 32, True),
            ("sm_90", FP32, 768, 32, True),
            ("sm_90", BF16, 1024, 32, True),
            ("sm_90", BF16, 768, 64, True),
            ("sm_90", BF16, 768, 32, False),
        )
    }
    assert many not in usual.values()
    assert not forward_tile("sm_90", BF16, 25_216, 768, one(700)).descriptor

    best = backward_tiles("sm_90", BF16, 25_216, 768, qkv(768))._replace(splits=7)
    monkeypatch.setattr("kadapt_kernels.tiles.BACKWARD_MEASURED", {"sm_90": {(2, 768, 25_216): best}})
    assert backward_tiles("sm_90", BF16, 20_000, 768, qkv(768)) == best
    for plan, by in ((qkv(768), False), (qkv(768, 64), True), (one(800), True)):
        assert backward_tiles("sm_90", BF16, 20_000, 768, plan, by).splits != 7
