"""Train a small vision transformer from scratch, such as the bundled one, on a zip archive or folder of CLASS/IMAGE.

OUT becomes a folder that timm loads as local-dir:OUT, with log.csv (a row per epoch; time_s and images_per_s are those
of its training alone) and state.safetensors, from which --resume goes on. The random numbers of an epoch depend on the
seed and the epoch alone, so that a resumed run equals an unbroken one, bit for bit on a CPU. Images are decoded once,
into one uint8 tensor on the device, and augmented there by the batch: a loader could not feed a GPU at this size.

The recipe:
  AdamW, 1e-3, weight decay 0.05, stochastic depth 0.1, label smoothing 0.1, mixup or cutmix on half of the batches,
      erasing on a quarter of the images: small ViTs on CIFAR, Lee et al. 2021, arXiv:2112.13492 and its code
  no decay of biases, norms, tokens and positions; mixup 0.8, cutmix 1.0: DeiT, Touvron et al. 2020, arXiv:2012.12877
  linear warm-up in the first 5 % of the steps, then one cosine to 0: SGDR, Loshchilov, Hutter 2016, arXiv:1608.03983
  averaged weights, decay min(0.999, (1 + t) / (10 + t)): TensorFlow's ExponentialMovingAverage
  two of seven operations an image: RandAugment, Cubuk et al. 2019, arXiv:1909.13719; their strength drawn uniformly:
      TrivialAugment, Müller, Hutter 2021, arXiv:2103.10158
  reflect-padded crop and flip; erased rectangles of 2 to 33 %: Random Erasing, Zhong et al. 2017, arXiv:1708.04896
"""

import argparse
import csv
import hashlib
import io
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import timm
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

ARCHITECTURE = "vit_tiny_patch16_224"
SUFFIXES = (".webp", ".png", ".jpg", ".jpeg", ".bmp")
# What zipfile and Pillow raise on files that are damaged, encrypted, too large or no images.
READ_ERRORS = (OSError, BadZipFile, zlib.error, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError)
# Options that change what comes out; --resume wants them unchanged.
RECIPE = ["epochs", "batch_size", "lr", "weight_decay", "dim", "depth", "heads", "image_size", "patch", "seed"]
EVALUATE_EVERY = 10  # epochs
SAVE_EVERY_S = 60.0


class RunError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""


@dataclass(frozen=True)
class Images:
    """A labelled set: pixels uint8 (n, 3, S, S) and labels int64 (n,) on the device, and the SHA-256 of both."""

    source: str
    classes: list[str]
    pixels: Tensor
    labels: Tensor
    digest: str


def read_files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Name (CLASS/IMAGE) and bytes of each image file, sorted by name; a zip archive is read in place."""
    if source.is_dir():
        names = [path.relative_to(source).as_posix() for path in source.glob("*/*")]
        for name in sorted(name for name in names if name.lower().endswith(SUFFIXES)):
            yield name, (source / name).read_bytes()
    else:
        with ZipFile(source) as archive:
            names = [name for name in archive.namelist() if name.count("/") == 1]
            for name in sorted(name for name in names if name.lower().endswith(SUFFIXES)):
                yield name, archive.read(name)


def decode(data: bytes, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One image as uint8 (3, size, size): shorter side to size, then the centre, as timm's evaluation transform."""
    with Image.open(io.BytesIO(data)) as image:
        rgb = image.convert("RGB")
    short = min(rgb.size)
    if short != size:
        rgb = rgb.resize((size * rgb.width // short, size * rgb.height // short), Image.Resampling.BICUBIC)
    left, top = round((rgb.width - size) / 2), round((rgb.height - size) / 2)
    return np.ascontiguousarray(np.asarray(rgb.crop((left, top, left + size, top + size))).transpose(2, 0, 1))


def read_images(source: Path, size: int, device: torch.device, classes: list[str] | None = None) -> Images:
    """Decode a source, labelled by its class folders in sorted order; those must be `classes` when given."""
    names, arrays, name = [], [], "the source"
    try:
        for name, data in read_files(source):
            names.append(name.partition("/")[0])
            arrays.append(decode(data, size))
    except READ_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RunError(f"{source}: {name} cannot be read ({reason}); give a folder or zip of CLASS/IMAGE") from None
    found = sorted(set(names))
    if len(found) < 2:
        raise RunError(f"{source}: expected CLASS/IMAGE files of two classes or more, found {len(found)}; give others")
    if classes is not None and found != classes:
        odd = sorted(set(found) ^ set(classes))
        raise RunError(f"{source}: its classes are not those of the training images ({odd[0]}, …); give the same ones")
    pixels, labels = np.stack(arrays), np.array([found.index(name) for name in names])
    digest = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    return Images(source.name, found, torch.from_numpy(pixels).to(device), torch.from_numpy(labels).to(device), digest)


def normalise(x: Tensor) -> Tensor:
    """Pixels in 0..1 (B, 3, S, S) to the model's input."""
    return (x - channels(IMAGENET_DEFAULT_MEAN, x.device)) / channels(IMAGENET_DEFAULT_STD, x.device)


@cache
def channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A number for each channel (3, 1, 1), copied once: a copy to a GPU waits until it has done all it was given."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def augment(pixels: Tensor) -> Tensor:
    """uint8 (B, 3, S, S) to float32 in 0..1, each image moved, bent, recoloured and erased in its own way."""
    x = pixels.float() / 255
    chosen = torch.rand(len(x), 7, device=x.device).argsort(1) < 2  # two of the seven operations, at random
    strength = chosen * (torch.rand(len(x), 7, device=x.device) * 2 - 1)
    return erase(recolour(warp(x, strength[:, :4]), strength[:, 4:, None, None, None]))


def warp(x: Tensor, strength: Tensor) -> Tensor:
    """Flip and crop every image; rotate, shear along x and y, and zoom by strengths (B, 4) in -1..1."""
    n, size = len(x), x.shape[-1]
    angle, shear_x, shear_y, zoom = strength.T
    cos, sin, one = torch.cos(angle * math.pi / 6), torch.sin(angle * math.pi / 6), torch.ones_like(angle)
    flip = torch.randint(2, (n,), device=x.device) * 2.0 - 1
    pad = size // 8
    shift = torch.randint(-pad, pad + 1, (n, 2, 1), device=x.device) * 2 / size  # whole pixels: a crop does not blur
    rotation = torch.stack([cos * flip, -sin, sin * flip, cos], 1).view(n, 2, 2)
    shear = torch.stack([one, 0.3 * shear_x, 0.3 * shear_y, one], 1).view(n, 2, 2)
    matrix = rotation @ shear * torch.exp2(0.5 * zoom)[:, None, None]
    grid = F.affine_grid(torch.cat([matrix, shift], 2), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def recolour(x: Tensor, strength: Tensor) -> Tensor:
    """Change brightness, contrast and saturation by strengths (B, 3, 1, 1, 1) in -1..1."""
    brightness, contrast, saturation = (1 + 0.8 * strength).unbind(1)
    x = x * brightness
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * contrast
    grey = x.mean(1, keepdim=True)
    return (grey + (x - grey) * saturation).clamp(0, 1)


def erase(x: Tensor) -> Tensor:
    """Fill a rectangle of noise into one image in four: 2 to 33 % of the area, sides 3:10 to 10:3."""
    n, size = len(x), x.shape[-1]
    chance, area, aspect, row, column = torch.rand(5, n, 1, device=x.device)
    area, aspect = 0.02 + 0.31 * area, torch.exp((aspect * 2 - 1) * math.log(10 / 3))
    at = torch.arange(size, device=x.device)
    inside = []
    for start, side in ((row, (area * aspect).sqrt() * size), (column, (area / aspect).sqrt() * size)):
        side = side.clamp(1, size)
        first = (start * (size - side)).floor()
        inside.append((at >= first) & (at < first + side))
    rectangle = (chance < 0.25)[:, :, None] & inside[0][:, :, None] & inside[1][:, None, :]
    return torch.where(rectangle[:, None], torch.rand_like(x), x)


@dataclass
class Training:
    """Where training stands: the models, the optimizer, and a row per finished epoch."""

    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.AdamW
    log: list[dict[str, Any]] = field(default_factory=list)


def seed_epoch(seed: int, epoch: int) -> None:
    """Seed every generator that an epoch draws from, timm's Mixup included; epoch 0 is the initialisation."""
    number = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    torch.manual_seed(number)
    np.random.seed(number)


def start(options: argparse.Namespace, classes: int, device: torch.device) -> Training:
    """A model with random weights, its average and its optimizer."""
    seed_epoch(options.seed, 0)
    model = timm.create_model(ARCHITECTURE, num_classes=classes, drop_path_rate=0.1, **options.model_args).to(device)
    groups = param_groups_weight_decay(model, options.weight_decay, no_weight_decay_list=model.no_weight_decay())
    ema = deepcopy(model).eval().requires_grad_(False)
    return Training(model, ema, torch.optim.AdamW(groups, lr=options.lr, fused=device.type == "cuda"))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Of step 0..steps-1: a linear warm-up to the peak in the first 5 % of the steps, then a cosine to 0."""
    warm_up = max(1, round(0.05 * steps))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2


def train_epoch(training: Training, images: Images, options: argparse.Namespace, epoch: int) -> dict[str, Any]:
    """One pass over the images but for those that fill no whole batch; returns the epoch's row of log.csv."""
    began = time.perf_counter()
    seed_epoch(options.seed, epoch)
    n, device = len(images.labels), images.labels.device
    batch = min(options.batch_size, n) // 2 * 2  # Mixup pairs the images of a batch
    mixup = Mixup(0.8, 1.0, prob=0.5, label_smoothing=0.1, num_classes=len(images.classes))
    averages, weights = list(training.ema.parameters()), list(training.model.parameters())
    training.model.train()
    total = torch.zeros((), device=device)
    for index, chosen in enumerate(torch.randperm(n, device=device)[: n // batch * batch].split(batch)):
        step = (epoch - 1) * (n // batch) + index
        rate = learning_rate(step, options.epochs * (n // batch), options.lr)
        for group in training.optimizer.param_groups:
            group["lr"] = rate
        x, target = mixup(normalise(augment(images.pixels[chosen])), images.labels[chosen])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = training.model(x)
        loss = F.cross_entropy(logits.float(), target)
        training.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        training.optimizer.step()
        get_ema_multi_avg_fn(min(0.999, (1 + step) / (10 + step)))(averages, weights, step)
        total += loss.detach()
    train_loss = total.item() / (index + 1)
    if not math.isfinite(train_loss):
        raise RunError(f"epoch {epoch}: the loss is {train_loss}; start again with a lower --lr")
    time_s = time.perf_counter() - began
    row = {"epoch": epoch, "lr": rate, "train_loss": train_loss, "test_accuracy": None}
    return row | {"images_per_s": round((index + 1) * batch / time_s, 1), "time_s": round(time_s, 3)}


@torch.no_grad()
def accuracy(ema: nn.Module, images: Images) -> float:
    """Of the averaged weights, rounded to float16 as they are shipped, in float32."""
    weights = {name: weight.half().float() for name, weight in ema.named_parameters()}
    right = torch.zeros((), dtype=torch.int64, device=images.labels.device)
    for pixels, labels in zip(images.pixels.split(1024), images.labels.split(1024), strict=True):
        right += (functional_call(ema, weights, normalise(pixels.float() / 255)).argmax(1) == labels).sum()
    return right.item() / len(images.labels)


def commit(path: Path, data: bytes | str) -> None:
    """Write a file so that after a crash it is there whole or as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def save_state(out: Path, training: Training, settings: dict[str, Any]) -> None:
    """Commit state.safetensors, which holds the log too, and then log.csv."""
    tensors: dict[str, Tensor] = {}
    for (name, weight), average in zip(training.model.named_parameters(), training.ema.parameters(), strict=True):
        parts = {"model": weight, "ema": average} | training.optimizer.state[weight]
        tensors |= {f"{part}.{name}": tensor.detach().cpu() for part, tensor in parts.items()}
    info = json.dumps({"settings": settings, "log": training.log})
    commit(out / "state.safetensors", save(tensors, metadata={"pretrain": info}))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(training.log[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(training.log)
    commit(out / "log.csv", text.getvalue())


@torch.no_grad()
def load_state(out: Path, training: Training, settings: dict[str, Any]) -> None:
    """Put back what `save_state` wrote; the settings must be the same."""
    try:
        with safe_open(out / "state.safetensors", framework="pt") as file:
            info = json.loads(file.metadata()["pretrain"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"--resume: {out}/state.safetensors cannot be read ({error}); start without --resume") from None
    for key, value in settings.items():
        if info["settings"].get(key) != value:
            raise RunError(f"--resume: {key} was {info['settings'].get(key)}, now {value}; give the same as before")
    for (name, weight), average in zip(training.model.named_parameters(), training.ema.parameters(), strict=True):
        weight.copy_(tensors[f"model.{name}"])
        average.copy_(tensors[f"ema.{name}"])
        moments = ("step", "exp_avg", "exp_avg_sq")
        training.optimizer.state[weight] = {key: tensors[f"{key}.{name}"].to(weight.device) for key in moments}
    training.log = info["log"]


def write_model(out: Path, training: Training, train: Images, test: Images, options: argparse.Namespace) -> None:
    """Commit model.safetensors (float16), config.json and the model card: what timm loads as local-dir."""
    weights = {name: tensor.half().cpu().contiguous() for name, tensor in training.ema.state_dict().items()}
    commit(out / "model.safetensors", save(weights, metadata={"format": "pt"}))
    pretrained = {
        "tag": Path(train.source).stem.removesuffix("-train"), "custom_load": False,
        "input_size": [3, options.image_size, options.image_size], "fixed_input_size": True, "interpolation": "bicubic",
        "crop_pct": 1.0, "crop_mode": "center", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "num_classes": len(train.classes), "pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head",
        "license": "apache-2.0",
    }  # fmt: skip
    config = {
        "architecture": ARCHITECTURE, "num_classes": len(train.classes), "num_features": options.dim,
        "global_pool": "token", "label_names": train.classes, "model_args": options.model_args,
        "pretrained_cfg": pretrained,
    }  # fmt: skip
    commit(out / "config.json", json.dumps(config, indent=2) + "\n")
    commit(out / "README.md", model_card(out, training, train, test, options))


def model_card(out: Path, training: Training, train: Images, test: Images, options: argparse.Namespace) -> str:
    """What the weights are, what they were trained on, how well they do and where they fail."""
    last, size, device = training.log[-1], options.image_size, train.labels.device
    arguments = ", ".join(f"{key}={value}" for key, value in options.model_args.items())
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    hours = sum(row["time_s"] for row in training.log) / 3600
    recipe = ", ".join(f"{name} {getattr(options, name)}" for name in ("batch_size", "lr", "weight_decay", "seed"))
    return f"""---
license: apache-2.0
library_name: timm
tags:
- image-classification
- timm
---

# {out.resolve().name}: a small vision transformer for {size}-pixel images

| | |
|---|---|
| Architecture | timm `{ARCHITECTURE}` with `{arguments}`; class token, {len(train.classes)} classes |
| Parameters | {sum(weight.numel() for weight in training.ema.parameters()):,} |
| Input | RGB, {size} × {size} pixels, mean {IMAGENET_DEFAULT_MEAN}, std {IMAGENET_DEFAULT_STD} |
| Training images | `{train.source}`: {len(train.labels):,}, SHA-256 of pixels and labels `{train.digest}` |
| Test images | `{test.source}`: {len(test.labels):,}, SHA-256 of pixels and labels `{test.digest}` |
| Test accuracy | {last["test_accuracy"]:.2%}, last epoch, not picked; measured with these float16 weights |
| Epochs | {last["epoch"]} of the {options.epochs} that the learning rate was planned for |
| Recipe | `benchmarks/pretrain_backbone.py` of kadapt, supervised from random weights: {recipe}; averaged weights |
| Trained | {date.today()}, {hours:.2f} hours on {machine}, torch {torch.__version__}, timm {timm.__version__} |
| Licence | Apache-2.0 for the weights; it does not cover the images |

Meant as a start for small images. Features for other kinds of images than its classes may be weak, and detail below
{size} pixels is lost. It was not examined for fairness or robustness; decide nothing about people with it.
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked, and `model_args`: what timm needs beside the architecture and the number of classes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="training images, a zip archive or a folder of CLASS/IMAGE files")
    parser.add_argument("--test", type=Path, required=True, help="test images of the same classes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after the epoch that passes this limit")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.safetensors")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    counts = {"epochs": 200, "batch_size": 1024, "dim": 192, "depth": 6, "heads": 3, "image_size": 32, "patch": 4}
    for name, value in counts.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    options = parser.parse_args(arguments)
    if min(options.batch_size - 1, options.seed + 1, *(getattr(options, name) for name in counts)) < 1:
        raise RunError(f"--batch-size from 2, --seed from 0, {', '.join(counts)} from 1 were expected; change them")
    if options.dim % options.heads or options.image_size % options.patch:
        raise RunError("--dim must be a multiple of --heads, and --image-size of --patch; change one of them")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif options.device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device: no CUDA device was found; give --device cpu")
    if not options.resume and options.out.exists() and any(options.out.iterdir()):
        raise RunError(f"--out: {options.out} is not empty; give a new folder, or --resume to go on with a run")
    sizes = {"img_size": options.image_size, "patch_size": options.patch, "embed_dim": options.dim}
    options.model_args = sizes | {"depth": options.depth, "num_heads": options.heads}
    return options


def run(options: argparse.Namespace) -> None:
    """Read, train, evaluate and write."""
    began = saved = time.monotonic()
    device = torch.device(options.device)
    train = read_images(options.source, options.image_size, device)
    test = read_images(options.test, options.image_size, device, train.classes)
    print(
        f"{len(train.labels):,} and {len(test.labels):,} images, {time.monotonic() - began:.1f} s to decode", flush=True
    )
    settings = {name: getattr(options, name) for name in RECIPE} | {"train": train.digest, "test": test.digest}
    training = start(options, len(train.classes), device)
    if options.resume:
        load_state(options.out, training, settings)
    options.out.mkdir(parents=True, exist_ok=True)
    for epoch in range(len(training.log) + 1, options.epochs + 1):
        row = train_epoch(training, train, options, epoch)
        last = epoch == options.epochs or time.monotonic() - began > options.minutes * 60
        if last or epoch % EVALUATE_EVERY == 0:
            row["test_accuracy"] = accuracy(training.ema, test)
        training.log.append(row)
        tested = "" if row["test_accuracy"] is None else f"   test {row['test_accuracy']:.2%}"
        left = row["time_s"] * (options.epochs - epoch) / 60
        print(f"epoch {epoch}/{options.epochs}   loss {row['train_loss']:.3f}   {row['images_per_s']:,.0f} images/s   "
              f"about {left:.1f} min left{tested}", flush=True)  # fmt: skip
        if last or time.monotonic() - saved > SAVE_EVERY_S:
            save_state(options.out, training, settings)
            saved = time.monotonic()
        if last:
            break
    write_model(options.out, training, train, test, options)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        run(parse(arguments))
    except (RunError, OSError) as error:  # the latter: a disk that is full or may not be written
        print(f"pretrain_backbone: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
