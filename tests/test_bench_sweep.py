"""The tile sweep of kadapt bench-kernels, all but its timing, and the picture."""

import xml.etree.ElementTree as ET

import pytest
import torch

from kadapt_cli.bench import sweep, timing
from kadapt_cli.bench.contenders import Shape
from kadapt_cli.bench.picture import picture
from kadapt_cli.bench.timing import Row
from kadapt_kernels import testing
from kadapt_kernels.blocks import INTERPRETED
from kadapt_kernels.tiles import BackwardTiles, Tile

SVG = "{http://www.w3.org/2000/svg}"


def test_forward_candidates_fit():
    shape = Shape(768, 6304)
    found = sweep.forward_candidates(shape, 2, 227 * 1024)
    assert len(found) == len(set(found)) > 20
    assert Tile(128, 128, 64, 8, 3, 6, True) in found
    for tile in found:
        assert 768 % (tile.n * tile.tiles) == 768 % tile.k == 0
        assert tile.stages * (tile.m + tile.n + 32) * tile.k * 2 <= 227 * 1024
    assert set(sweep.forward_candidates(shape, 2, 99 * 1024)) < set(found)
    assert {tile.m for tile in sweep.forward_candidates(Shape(768, 64), 2, 227 * 1024)} == {64}


def test_backward_candidates_change_one_field():
    tile = Tile(7, 7, 7, 4, 2)
    base = BackwardTiles(tile, tile, tile, 3)
    for name in base._fields:
        found = sweep.backward_candidates(base, name)
        assert len(found) == len(set(found)) > 3
        assert all(getattr(c, name) != getattr(base, name) for c in found)
        assert {c._replace(**{name: None}) for c in found} == {base._replace(**{name: None})}


@pytest.mark.skipif(not INTERPRETED.value, reason="the interpreter runs a tile that no GPU would want")
def test_a_sweep_leaves_out_tiles_that_are_wrong_or_do_not_run(monkeypatch):
    """On the CPU, with calls in the place of CUDA graphs and times that fall from one tile to the next."""
    good, slow, broken = Tile(32, 16, 16, 4, 2), Tile(16, 16, 16, 4, 2), Tile(32, 16, 24, 4, 2)
    ticks = iter(range(1000, 0, -1))
    monkeypatch.setattr(timing, "captured", lambda work: work() or work)
    monkeypatch.setattr(timing, "timed", lambda work, device: float(next(ticks)))
    monkeypatch.setattr(timing, "failures", lambda: (Exception,))
    monkeypatch.setattr(sweep, "forward_candidates", lambda *_: [slow, good, broken])
    monkeypatch.setattr(sweep, "backward_candidates", lambda base, name: [base._replace(splits=3)] * (name == "splits"))
    shape, said = Shape(4, 3), []
    with torch.no_grad():
        inputs = [testing.make(shape.case, torch.float32)]
        forward, backward = sweep.sweep_shape(inputs, shape, 1, said.append)
    assert (forward.direction, forward.element, forward.shape, forward.tile) == ("forward", 4, shape, good)
    assert (backward.direction, backward.tile.splits) == ("backward", 3)
    assert len(said) == 1
    assert said[0].startswith(f"{broken}: left out, ")
    time_of = sweep._timer(lambda p, tile: [torch.full((2,), 2.0 if tile == "wrong" else 1.0)], inputs, 1, said.append)
    assert time_of("right") < float("inf") == time_of("wrong")
    assert said[1] == "wrong: left out, RuntimeError: its results differ from those of the table's tile"


def test_the_fastest_candidate_that_runs_is_chosen():
    inf = float("inf")
    assert sweep.fastest(["a", "b", "c"], {"a": 3.0, "b": inf, "c": 2.0}.__getitem__) == ("c", 2.0)
    assert sweep.fastest(["b"], {"b": inf}.__getitem__) == ("b", inf)
    choice = sweep.Choice("forward", 2, Shape(768, 6304), Tile(128, 128, 64, 8, 3), inf)
    assert sweep.table_literal([choice], "sm_90") == ""


def test_results_of_a_tile_must_agree():
    x = torch.randn(40, 40)
    assert sweep.agree([x, x], [x, x * 1.001])
    assert not sweep.agree([x, x], [x, x * 1.02])
    assert not sweep.agree([torch.full_like(x, torch.nan)], [x])


def test_the_table_literal_is_python():
    shape, tile = Shape(768, 6304), Tile(128, 128, 64, 8, 3, 6, True)
    tiles = BackwardTiles(tile, tile, tile, 66)
    text = sweep.table_literal(
        [sweep.Choice("forward", 2, shape, tile, 0.5), sweep.Choice("backward", 2, shape, tiles, 1.0)], "sm_90"
    )
    found: dict[str, object] = {}
    exec(text, {"Tile": Tile, "BackwardTiles": BackwardTiles}, found)
    assert found == {
        "FORWARD_MEASURED": {"sm_90": {(2, 768, 6304): tile}},
        "BACKWARD_MEASURED": {"sm_90": {(2, 768, 6304): tiles}},
    }


def test_roofline_is_drawn_where_the_peak_is_known():
    rows = []
    for m in (197, 6304):
        for name, ms in (("frozen", 1.0), ("kadapt", 1.25)):
            rows.append(Row(name, "fwd", 768, m, "bf16", ratio_frozen=ms, tflops=500 / ms, gb_per_s=2000 / ms))

    def texts(device: str) -> list[str | None]:
        root = ET.fromstring(picture(device, rows))
        return [text.text for text in root.iter(f"{SVG}text")]

    on_gpu = texts("NVIDIA H200")
    assert "TFLOP/s, fwd, d = 768, bf16" in on_gpu
    assert "200" in on_gpu  # FLOPs a byte: the points are at 250 and the ridge is at 206
    assert not {"0.5", "100", "2,000"} & set(on_gpu)
    assert not [words for words in texts("AMD EPYC, 2 threads") if words and "TFLOP/s" in words]


def test_flops_and_bytes_are_those_of_the_frozen_layer():
    shape = Shape(768, 25216)
    assert shape.flops("fwd") == 2 * 25216 * 768 * 2304
    assert shape.flops("fwd+bwd") == 4 * 25216 * 768 * 2304
    assert shape.bytes("bwd", 2) == 2 * (25216 * 768 + 768 * 2304 + 25216 * 2304)
    assert [Shape(d, 1).side for d in (768, 192, 40, 25, 14)] == [32, 32, 20, 25, 14]
