"""A training run in memory: prepared, saved to the run folder, taken up again.

What a step reads is either a constant of the configuration or in the state file, so that a session restored from it
goes on to the same bits on a CPU.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from kadapt_cli import __version__, runs
from kadapt_cli.adapters import Adapted, adapt
from kadapt_cli.catalog import is_named
from kadapt_cli.config import TrainConfig
from kadapt_cli.data import ImageDataset, ImageSet, make_transform, open_images
from kadapt_cli.errors import MachineError, ModelError
from kadapt_cli.evaluate import choose_device, fill, load_backbone, logits, run_images, tensors_of
from kadapt_cli.progress import Display
from kadapt_kernels import why_no_triton

Row = dict[str, Any]


@dataclass
class Session:
    """A training run in memory. `step` counts finished optimizer steps, `epoch` finished epochs."""

    config: TrainConfig
    out: Path
    images: ImageSet
    adapted: Adapted
    device: torch.device
    dtype: torch.dtype
    train: ImageDataset
    val: ImageDataset | None
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    live: dict[str, Tensor]
    sums: Tensor  # of the current epoch: loss · images, right, images; float64
    micro: int
    epoch: int = 0
    step: int = 0
    history: list[Row] = field(default_factory=list)
    best: float = 0.0  # validation accuracy
    kept_epoch: int = 0  # whose adapter is in the run folder
    stop: str = ""
    epoch_time_s: float = 0.0

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train) / self.config.batch_size)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train: all epochs are done, or validation has stopped improving."""
        stale = self.val is not None and self.epoch - self.kept_epoch >= self.config.patience
        return self.epoch >= self.config.epochs or stale


def prepare(config: TrainConfig, out: Path, display: Display, *, resume: bool = False) -> Session:
    """Scan the data (to resume: the run's own images), build and adapt the model, move it to the device."""
    device = choose_device(config.device)
    dtype = _precision(config.precision, device)
    missing = why_no_triton(torch.empty(0, dtype=dtype, device=device)) if config.backend == "triton" else ""
    if missing:
        raise MachineError(f"--backend triton cannot run: {missing}; use --backend auto")
    torch.manual_seed(config.seed)  # for models that draw numbers themselves, such as dropout
    display.say(f"reading {config.data}")
    if resume:
        images = run_images(out, config.data, runs.load_tensors(out / runs.STATE, "state")[1]["classes"])
    else:
        images = open_images(
            config.data, shots=config.shots, seed=config.seed, val=config.val, skip_bad=config.skip_bad
        )
    for note in images.notes:
        display.say(f"note: {note}")
    if not config.pretrained and config.weights is None:
        display.say("WARNING: the backbone has RANDOM weights (--no-pretrained); its accuracy means nothing")
    backbone = load_backbone(config)
    adapted = adapt(backbone, config, len(images.classes))
    config = with_absolute_paths(adapted.config)
    module = adapted.module().to(device)
    if dtype != torch.float32:
        _cast_frozen(module, dtype)
    parameters = adapted.parameters()
    data_config = backbone.data_config
    evaluation = make_transform(data_config, augment="none")
    augmented = make_transform(data_config, augment=config.augment)
    return Session(
        config=config,
        out=out,
        images=images,
        adapted=adapted,
        device=device,
        dtype=dtype,
        train=ImageDataset(images, "train", augmented, seed=config.seed),
        val=ImageDataset(images, "val", evaluation, seed=config.seed) if images.splits["val"] else None,
        module=module,
        parameters=parameters,
        optimizer=_optimizer(parameters, config),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        live={name: torch.zeros_like(p, dtype=torch.bool) for name, p in parameters.items()},
        sums=torch.zeros(3, dtype=torch.float64, device=device),
        micro=config.micro_batch or config.batch_size,
    )


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The same, to be read from any working directory."""
    changes = {}
    if not is_named(config.data):
        changes["data"] = str(Path(config.data).resolve())
    if config.model.startswith("local-dir:"):
        changes["model"] = f"local-dir:{Path(config.model.removeprefix('local-dir:')).resolve()}"
    if config.weights is not None:
        changes["weights"] = str(Path(config.weights).resolve())
    return config.model_copy(update=changes)


def start_head(session: Session) -> None:
    """Start the head from the backbone's features of the training images."""
    transform = make_transform(session.adapted.backbone.data_config, augment="none")
    plain = ImageDataset(session.images, "train", transform, seed=session.config.seed)
    features, labels = logits(session.adapted.backbone.module, plain, session.device, session.dtype)
    session.adapted.head.start(features, labels)


def learning_rate(step: int, session: Session) -> float:
    """The rate of optimizer step `step` (from 0): a linear rise over the warm-up, then half a cosine to near 0."""
    config = session.config
    total = config.epochs * session.steps_per_epoch
    warmup = math.ceil(config.warmup * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def estimate_memory(session: Session) -> int:
    """Bytes that training needs on its device: model, optimizer and the activations kept for a micro-batch.

    Measured, not modelled: what one image keeps for the backward pass, times the micro-batch.
    """
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    height, width = session.adapted.backbone.data_config["input_size"][1:]
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(session.device.type, session.dtype, enabled=session.dtype != torch.float32),
    ):
        output = session.module(torch.zeros(1, 3, height, width, device=session.device))
    state = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in session.module.state_dict().values()}
    activations = sum(size for pointer, size in kept.items() if pointer not in state)
    del output
    trainable = sum(p.numel() * p.element_size() for p in session.parameters.values())
    return int(sum(state.values()) + 3 * trainable + activations * min(session.micro, len(session.train)))


def save_adapter(session: Session) -> None:
    info = runs.save_tensors(
        session.out / runs.ADAPTER,
        "adapter",
        tensors_of(session.adapted),
        _describe(session) | {"epoch": session.epoch},
    )
    runs.commit(session.out / runs.ADAPTER_INFO, json.dumps(info, indent=2, ensure_ascii=False) + "\n")


def save_state(session: Session) -> None:
    """Commit all that the next step reads."""
    tensors = {f"model.{name}": tensor for name, tensor in tensors_of(session.adapted).items()}
    for name, parameter in session.parameters.items():
        tensors[f"live.{name}"] = session.live[name]
        for key, value in session.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    tensors |= {"rng": torch.get_rng_state(), "sums": session.sums}
    info = {
        "epoch": session.epoch,
        "step": session.step,
        "history": session.history,
        "best": session.best,
        "kept_epoch": session.kept_epoch,
        "micro": session.micro,
        "epoch_time_s": session.epoch_time_s,
        "scaler": session.scaler.state_dict(),
        "base_digest": session.adapted.backbone.digest,
        "classes": list(session.images.classes),
    }
    runs.save_tensors(session.out / runs.STATE, "state", tensors, info)


def restore(session: Session) -> None:
    """Take a session back to its last committed state."""
    path = session.out / runs.STATE
    tensors, info = runs.load_tensors(path, "state")
    if info["base_digest"] != session.adapted.backbone.digest:
        raise ModelError(f"{path}: the weights of {session.config.model} differ from those the run was started on")
    model = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    fill(session.adapted, model, path)
    for name, parameter in session.parameters.items():
        session.live[name].copy_(tensors[f"live.{name}"])
        moments = {
            key: tensors[f"optimizer.{key}.{name}"].to("cpu" if key == "step" else parameter.device)
            for key in ("step", "exp_avg", "exp_avg_sq")
            if f"optimizer.{key}.{name}" in tensors
        }
        if moments:
            session.optimizer.state[parameter] = moments
    torch.set_rng_state(tensors["rng"])
    session.sums.copy_(tensors["sums"])
    session.epoch, session.step, session.history = info["epoch"], info["step"], info["history"]
    session.best, session.kept_epoch = info["best"], info["kept_epoch"]
    session.micro, session.epoch_time_s = info["micro"], info["epoch_time_s"]
    session.scaler.load_state_dict(info["scaler"])


def _describe(session: Session) -> Row:
    """What adapter.safetensors and adapter.json say of the adapter."""
    backbone = session.adapted.backbone
    return {
        "versions": {"kadapt": __version__, "torch": torch.__version__, "timm": timm.__version__},
        "method": session.config.method,
        "model": {
            "name": backbone.name,
            "architecture": backbone.architecture,
            "tag": backbone.tag,
            "digest": backbone.digest,
            "license": backbone.license,
        },
        "modules": [
            {"module": s.module, "segment": s.name, "rows": [s.start, s.stop]} for s in session.adapted.segments
        ],
        "tensors": {
            name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
            for name, t in tensors_of(session.adapted).items()
        },
        "classes": list(session.images.classes),
        "data_config": {k: list(v) if isinstance(v, tuple) else v for k, v in backbone.data_config.items()},
        "config": {k: list(v) if isinstance(v, tuple) else v for k, v in session.config.model_dump().items()},
    }


def _precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _cast_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep frozen weight matrices in the compute dtype once, instead of casting them in every step."""
    for parameter in module.parameters():
        if not parameter.requires_grad and parameter.dim() >= 2:
            parameter.data = parameter.data.to(dtype)


def _optimizer(parameters: dict[str, nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over named tensors; biases are not decayed."""
    decayed = [p for name, p in parameters.items() if "bias" not in name]
    free = [p for name, p in parameters.items() if "bias" in name]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr)
