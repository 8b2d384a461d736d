"""How much a training step costs with each adapter, side by side: python benchmarks/train_step.py [--csv FILE]

One step is forward, loss, backward and optimizer on a batch of random images, with the bundled backbone. The floor is
the same model frozen whose input needs a gradient: it does the forward pass and the activation gradients that any
adapter in every block needs, and nothing else. The contenders take turns within each round, so that a noisy machine
treats them alike; the figure is the median over rounds of the ratio to the floor of the same round.

Prediction for kadaptation (d = 192, R = 32, 6 blocks): the thin products add 2·2·M·R·2d multiply-adds forward and twice
that backward to a qkv layer's M·d·3d and the same again for dx, which is 22 % of its forward and backward work; the
qkv layers are a quarter of the blocks' linear work, so about 1.06 by count, and more by what small products lose.
"""

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import peft
import torch
from peft import LoKrConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from kadapt_cli.adapters import adapt
from kadapt_cli.config import TrainConfig
from kadapt_cli.models import load

CLASSES = 10


def with_head(backbone: nn.Module, width: int) -> nn.Module:
    """A backbone with a linear classifier of CLASSES classes."""
    return nn.Sequential(backbone, nn.Linear(width, CLASSES))


def contenders(name: str) -> dict[str, tuple[nn.Module, bool]]:
    """Each model, ready to train, and whether its input needs a gradient."""
    config = TrainConfig(model=name)
    frozen, full, kron, lora, lokr = (load(name) for _ in range(5))
    full.module.requires_grad_(True)
    adapted = adapt(kron, config, CLASSES)
    nn.init.normal_(adapted.head.weight, std=0.1)
    targets = ["qkv"]
    as_lora = get_peft_model(lora.module, LoraConfig(r=32, lora_alpha=32, target_modules=targets))
    as_lokr = get_peft_model(lokr.module, LoKrConfig(r=32, alpha=32, target_modules=targets))
    return {
        "frozen, input gradient": (with_head(frozen.module, frozen.feature_dim), True),
        "kadaptation": (adapted.module(), False),
        "peft LoRA r=32 on qkv": (with_head(as_lora, lora.feature_dim), False),
        "peft LoKr r=32 on qkv": (with_head(as_lokr, lokr.feature_dim), False),
        "full fine-tuning": (with_head(full.module, full.feature_dim), False),
    }


def make_step(model: nn.Module, images: Tensor, labels: Tensor, input_gradient: bool) -> Callable[[], None]:
    """A training step as a function without arguments."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    x = images.clone().requires_grad_(input_gradient)

    def step() -> None:
        x.grad = None
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one round of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if index:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Measure, print a table, append it to a CSV file when asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="vit32")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    size = load(options.model).data_config["input_size"]
    images, labels = torch.randn(options.batch_size, *size), torch.randint(CLASSES, (options.batch_size,))
    models = contenders(options.model)
    steps = {name: make_step(model, images, labels, needs) for name, (model, needs) in models.items()}
    times = measure(steps, options.rounds)
    floor = times["frozen, input gradient"]
    rows = []
    for name, (model, _) in models.items():
        ratios = sorted(t / f for t, f in zip(times[name], floor, strict=True))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows.append(
            {
                "date": date.today().isoformat(), "contender": name, "model": options.model,
                "batch_size": options.batch_size, "threads": options.threads, "trained": trained,
                "ratio_p20": round(ratios[len(ratios) // 5], 3), "ratio_p50": round(statistics.median(ratios), 3),
                "ratio_p80": round(ratios[-1 - len(ratios) // 5], 3), "rounds": options.rounds,
                "machine": platform.machine(), "torch": torch.__version__, "peft": peft.__version__,
            }
        )  # fmt: skip
        print(
            f"{name:24} {trained:>10,} trained   ratio {rows[-1]['ratio_p50']:.2f}  "
            f"(p20 {rows[-1]['ratio_p20']:.2f}, p80 {rows[-1]['ratio_p80']:.2f})"
        )
    if options.csv:
        new = not options.csv.exists()
        with options.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
