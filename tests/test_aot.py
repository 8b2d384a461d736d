"""The GPU kernels compiled without a GPU: they fit, spill nothing, use the tensor cores, and keep work in flight.

Compiled is not right, and right under the interpreter does not mean it compiles: both are tested, this is the latter.
"""

import builtins
import json
import subprocess
import sys

import pytest

from kadapt_kernels import aot
from kadapt_kernels.tiles import SHARED_LIMIT, BackwardTiles, Tile

GEMM = ("forward.forward", "forward.forward, frozen", "backward.dx")
PRODUCTS = (*GEMM, "backward.project", "backward.tall")


def faults(rows: list[aot.Row], *, spills: bool = False) -> list[str]:
    """What is wrong with the rows: errors, too much shared memory, spills unless allowed, idle tensor cores, waits."""
    found = []
    for row in rows:
        if row["error"]:
            found.append(f"error: {row}")
            continue
        if row["shared_bytes"] > SHARED_LIMIT[row["arch"]]:
            found.append(f"shared memory: {row}")
        if row["spill_bytes"] and not spills:
            found.append(f"spills: {row}")
        if row["kernel"] in PRODUCTS and row["dtype"] in ("bf16", "fp16"):
            if not row["tensor_core_ops"]:
                found.append(f"no tensor cores: {row}")
            if row["arch"] == "sm_90" and row["pipelined"] != "products" and row["kernel"] in GEMM:
                found.append(f"waits for its products: {row}")
            if not row["pipelined"]:
                found.append(f"waits for its copies: {row}")
    return found


def test_the_default_layer_on_hopper():
    rows = aot.report("sm_90", ["bf16"], [768], rows=[128 * 197])
    assert faults(rows) == []
    kernels = {row["kernel"] for row in rows}
    assert kernels >= {*GEMM, "backward.project", "backward.tall", "backward.contract", "forward.compose"}
    assert kernels >= {"merge.merge", "merge.dense_gradient", "merge.contract"}
    descriptors = {row["kernel"] for row in rows if row["tile"].endswith("descriptor")}
    assert descriptors == set(GEMM)
    assert {row["kernel"] for row in rows if not row["tile"].endswith("descriptor")} == kernels, "pointer tiles too"


def test_bad_tiles_are_found_out(monkeypatch):
    """Tiles that spill, fit no shared memory, wait, and do not compile: the checks can fail, and the rest goes on.

    The compiler refuses n = 96, no power of two. A worker that cannot even start is the death of one.
    """
    job = aot.Job("forward", "sm_90", "bf16", 192, 6304, number=1)
    refused, spilling = job._replace(tile=Tile(64, 96, 64, 4, 3)), job._replace(tile=Tile(128, 128, 64, 4, 3, 3))
    deep, idle = job._replace(tile=Tile(128, 64, 64, 8, 10)), job._replace(tile=Tile(64, 64, 64, 4, 1))
    found = [{fault.split(":")[0] for fault in faults([row])} for row in aot.run([refused, idle, spilling, deep])]
    assert found == [{"error"}, {"waits for its products", "waits for its copies"}, {"spills"}, {"shared memory"}]
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (row,) = aot.run([job])
    assert row["error"] == "the compiler ended (1): no message"
    assert row["registers"] is None


def test_jobs_survive_the_way_to_the_other_process():
    tiles = BackwardTiles(Tile(64, 64, 32, 4, 2), Tile(64, 0, 64, 4, 3), Tile(64, 128, 0, 4, 3), 7)
    assert aot._tiles(json.loads(json.dumps(tiles))) == tiles


def test_the_least_that_loops_leave_in_flight():
    def loop(*body: str) -> str:
        return "\n".join(["  %0 = scf.for %i = %a to %b {", *(f"    {line}" for line in body), "  } loc(#l)"])

    dot = "%1 = ttng.warp_group_dot %x, %w, %acc"
    products = loop(dot, "ttng.warp_group_dot_wait %1 {pendings = 1 : i32}")
    copies = loop(dot, "ttng.warp_group_dot_wait %1 {pendings = 0 : i32}", "ttg.async_wait %2 {num = 2 : i32}")
    waits = loop(dot, "ttng.warp_group_dot_wait %1 {pendings = 0 : i32}", "ttg.async_wait %2 {num = 0 : i32}")
    stores = loop(
        dot, "ttng.warp_group_dot_wait %1 {pendings = 0 : i32}", "ttng.async_tma_store_wait {pendings = 1 : i32}"
    )
    assert aot.pipelined(products) == "products"
    assert aot.pipelined(f"{products}\n{copies}") == "copies"
    assert aot.pipelined(f"{waits}\n{products}") is False
    assert aot.pipelined(stores) is False
    assert aot.pipelined(loop("%1 = arith.addf %x, %y")) is None
    outer = "\n".join(["scf.for %j = %a to %b {", products, "ttng.warp_group_dot_wait %3 {pendings = 0 : i32}", "}"])
    assert aot.pipelined(outer) == "products", "the loop around it is not the main loop"


def test_unknown_names_and_a_missing_compiler_say_what_is_there(monkeypatch):
    with pytest.raises(
        ValueError, match=r"expected one of the architectures sm_80, sm_90, sm_100, gfx942, but 'sm_70'"
    ):
        aot.report("sm_70")
    with pytest.raises(ValueError, match="expected dtypes among bf16, fp16, fp32, tf32, but 'int8' was given"):
        aot.shipped("sm_90", ["int8"])
    real = builtins.__import__

    def without_triton(name, *rest):
        if name == "triton":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_triton)
    with pytest.raises(RuntimeError, match=r"expected Triton, but it is not installed; pip install 'triton>=3\.4'"):
        aot.report("sm_90")


def test_by_hand():
    arguments = ["sm_80", "--dtype", "fp16", "--width", "192", "--kernel", "forward.compose", "--json"]
    done = subprocess.run([sys.executable, "-m", "kadapt_kernels.aot", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["kernel"], row["arch"], row["dtype"], row["width"]) == ("forward.compose", "sm_80", "fp16", 192)
    assert row["registers"] > 0
    assert row["pipelined"] is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "tf32"])
def test_every_shipped_tile_on_hopper(dtype):
    assert faults(aot.shipped("sm_90", [dtype])) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "fp32", "tf32"])
def test_every_kernel_on_hopper(dtype):
    assert faults(aot.report("sm_90", [dtype], [768], rows=[128 * 197])) == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [192, 384, 1024, 1280])
def test_every_width_on_hopper(width):
    kernels = [*PRODUCTS, "backward.contract", "forward.compose"]
    assert faults(aot.report("sm_90", ["bf16"], [width], kernels, rows=[128 * 197])) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942"])
def test_other_architectures_compile_and_fit(arch, dtype):
    rows = aot.shipped(arch, [dtype]) + aot.report(arch, [dtype], [768], rows=[128 * 197])
    assert faults(rows, spills=True) == []
