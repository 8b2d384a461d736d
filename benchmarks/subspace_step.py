"""How much of a training step the projection of `subspace` takes, at fc1 of ViT-B (D = 2,359,296).

    python benchmarks/subspace_step.py [--dims 64 1024 16384] [--batch 8] [--threads 2]

A step is forward and backward of ViT-B/16 with fc1 of block 6 in a subspace; the projection, P z twice and Pᵀ g, is
timed by itself right after each step, so that both see the same machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from kadapt_cli.adapters import adapt
from kadapt_cli.adapters.subspace import SubspaceLinear
from kadapt_cli.config import TrainConfig
from kadapt_cli.models import load

MODEL = "vit_base_patch16_224"


def seconds(run: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def share(dims: int, batch: int, rounds: int) -> tuple[float, float, float]:
    """Median seconds of a step and of the projection in it, and the median of their ratio."""
    backbone = load(MODEL, pretrained=False)
    config = TrainConfig(model=MODEL, method="subspace", targets=("blocks.6.fc1",), dims=dims)
    adapted = adapt(backbone, config, 10)
    layer = backbone.module.get_submodule("blocks.6.mlp.fc1")
    assert isinstance(layer, SubspaceLinear)
    projection = layer.parts[0].projection
    net, x = adapted.module(), torch.randn(batch, 3, 224, 224)
    adapted.head.weight.data.normal_()
    z, g = torch.randn(dims), torch.randn(projection.size)
    steps, parts = [], []
    for _ in range(rounds + 1):
        steps.append(seconds(lambda: net(x).square().mean().backward()))
        parts.append(seconds(lambda: (projection.multiply(z), projection.multiply(z), projection.adjoint(g.clone()))))
    ratios = [part / step for part, step in zip(parts[1:], steps[1:], strict=True)]
    return statistics.median(steps[1:]), statistics.median(parts[1:]), statistics.median(ratios)


def main() -> None:
    """Print a line for each d."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 1024, 16384])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("d,batch,threads,step_ms,projection_ms,share")
    for dims in options.dims:
        step, part, ratio = share(dims, options.batch, options.rounds)
        print(f"{dims},{options.batch},{options.threads},{1000 * step:.0f},{1000 * part:.1f},{ratio:.4f}")


if __name__ == "__main__":
    main()
