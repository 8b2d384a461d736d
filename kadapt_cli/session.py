"""A training run in memory: prepared, saved to the run folder, taken up again.

What a step reads is either a constant of the configuration or in the state file, so that a session restored from it
goes on to the same bits on a CPU.
"""

import json
import math
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from kadapt_cli import __version__, descriptions, runs
from kadapt_cli.adapters import Adapted, adapt
from kadapt_cli.catalog import is_named
from kadapt_cli.config import TrainConfig
from kadapt_cli.data import ImageSet, digest_of, open_images
from kadapt_cli.errors import MachineError, ModelError, UsageError
from kadapt_cli.evaluate import check_tensors, choose_device, fill, load_backbone, logits, run_images, tensors_of
from kadapt_cli.models import Backbone
from kadapt_cli.progress import Display
from kadapt_cli.surgery import Tail, before_block, first_trained_block
from kadapt_cli.tensors import ImageDataset, make_transform
from kadapt_kernels import why_no_triton

Row = dict[str, Any]
ACTIVATION_BYTES = 1 << 30  # most that is kept of what the frozen blocks before the adapter compute


@dataclass
class Material:
    """Images and a backbone that nothing has changed, and what several runs on them share."""

    images: ImageSet
    backbone: Backbone
    datasets: dict[str, ImageDataset] = field(default_factory=dict)
    found: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    text: Tensor | None = None  # CLIP's embeddings of the class names
    front: int = 0  # the block before which `activations` are
    activations: dict[str, "Activations"] = field(default_factory=dict)

    def plain(self, split: str) -> ImageDataset:
        """A split without augmentation."""
        if split not in self.datasets:
            transform = make_transform(self.backbone.data_config, augment="none", squash=self.images.squash)
            self.datasets[split] = ImageDataset(self.images, split, transform)
        return self.datasets[split]

    def features(self, split: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The backbone's features (n, D) of a split, and its labels; computed once."""
        if split not in self.found:
            self.found[split] = logits(self.backbone.module.to(device), self.plain(split), device, dtype)
        return self.found[split]


class Activations(Dataset[tuple[Tensor, Tensor]]):
    """What the frozen blocks before the adapter compute of a split, (tokens, d) an image, and its labels."""

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        self.x = x
        self.labels = labels

    def set_epoch(self, epoch: int) -> None:
        """Every epoch is the same."""

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.labels[index]


@dataclass
class Session:
    """A training run in memory. `step` counts finished optimizer steps, `epoch` finished epochs.

    `module` maps images to logits. `net` is what training feeds with `train` and `val`: the module, or its part behind
    the frozen blocks whose results are kept. Without `out` nothing is written.
    """

    config: TrainConfig
    out: Path | None
    material: Material
    adapted: Adapted
    device: torch.device
    dtype: torch.dtype
    train: ImageDataset | Activations
    val: ImageDataset | Activations | None
    module: nn.Module
    net: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    live: dict[str, Tensor]
    sums: Tensor  # of the current epoch and all processes: loss · images, right, images; float64
    micro: int
    epoch: int = 0
    step: int = 0
    history: list[Row] = field(default_factory=list)
    best: float = 0.0  # validation accuracy
    kept_epoch: int = 0  # whose adapter is in the run folder
    stop: signal.Signals | None = None  # that asked to stop
    agreed: signal.Signals | None = None  # that all processes which train together have heard of
    validating: bool = False  # where a signal need not wait for the end
    repeatable: bool = False  # where one need not wait for long: what is being done changes nothing
    saved: tuple[int, int, int] | None = None  # the position of the state in the run folder
    epoch_time_s: float = 0.0
    rank: int = 0  # of this process among `world` that train together
    world: int = 1
    together: nn.Module | None = None  # whose backward pass averages the gradients of these processes

    @property
    def images(self) -> ImageSet:
        """The images of the run."""
        return self.material.images

    @property
    def writes(self) -> bool:
        """Whether this process writes to the run folder."""
        return self.out is not None and self.rank == 0

    @property
    def position(self) -> tuple[int, int, int]:
        """What changes whenever anything does that is saved; the micro-batch may be halved in a step."""
        return self.epoch, self.step, self.micro

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train) / self.config.batch_size)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train: all epochs are done, or validation has stopped improving."""
        stale = self.val is not None and self.epoch - self.kept_epoch >= self.config.patience
        return self.epoch >= self.config.epochs or stale


def prepare(
    config: TrainConfig,
    out: Path | None,
    display: Display,
    *,
    resume: bool = False,
    start: bool = True,
    material: Material | None = None,
) -> Session:
    """Scan the data, build and adapt the model, move it to the device.

    Args:
        config: What to train.
        out: The run folder; None to keep all in memory.
        display: For notes.
        resume: Take the run's own images, and leave its state to `restore`.
        start: Start the head from the training images.
        material: Images and backbone that are there already, whose frozen weights are shared. Both are opened when
            None.
    """
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    device = choose_device(config.device)
    dtype = precision_of(config.precision, device)
    missing = why_no_triton(torch.empty(0, dtype=dtype, device=device)) if config.backend == "triton" else ""
    if missing:
        raise MachineError(f"--backend triton cannot run: {missing}; use --backend auto")
    torch.manual_seed(config.seed)  # for models that draw numbers themselves, such as dropout
    own = material or _open_material(config, out, display, resume)
    features = own.features("train", device, dtype) if start and not resume else None
    backbone = own.backbone if material is None else own.backbone.shared()
    adapted = adapt(backbone, config, len(own.images.classes))
    if material is not None:
        _own_trained(adapted, own.backbone)
    config = with_absolute_paths(adapted.config)
    if features is not None:
        adapted.head.start(*features, init=config.head_init, text=text_start(config, own))
    module = adapted.module().to(device)
    if dtype != torch.float32:
        _cast_frozen(module, dtype)
    parameters = adapted.parameters()
    augmented = make_transform(backbone.data_config, augment=config.augment, squash=own.images.squash)
    session = Session(
        config=config,
        out=out,
        material=own,
        adapted=adapted,
        device=device,
        dtype=dtype,
        train=ImageDataset(own.images, "train", augmented, seed=config.seed),
        val=own.plain("val") if own.images.splits["val"] else None,
        module=module,
        net=module,
        parameters=parameters,
        optimizer=_optimizer(parameters, config),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        live={name: torch.zeros_like(p, dtype=torch.bool) for name, p in parameters.items()},
        sums=torch.zeros(3, dtype=torch.float64, device=device),
        micro=config.micro_batch or config.batch_size,
    )
    if start:
        keep_frozen(session)
    return session


def _own_trained(adapted: Adapted, backbone: Backbone) -> None:
    """Give what is trained memory of its own where it is still the backbone's."""
    shared = {tensor.untyped_storage().data_ptr() for tensor in backbone.module.parameters()}
    for parameter in adapted.adapter.values():
        if parameter.untyped_storage().data_ptr() in shared:
            parameter.data = parameter.data.clone()


def _open_material(config: TrainConfig, out: Path | None, display: Display, resume: bool) -> Material:
    display.say(f"reading {config.data}")
    if resume:
        assert out is not None
        _, info, why = runs.load_state(out)
        descriptions.check(out / runs.STATE, "state", info)
        if why:
            display.say(f"note: {why}; going on from {runs.PREVIOUS_STATE}")
        images = run_images(out, config, info)
    else:
        images = open_images(
            config.data, shots=config.shots, seed=config.seed, val=config.val, skip_bad=config.skip_bad
        )
    choose_metric(images, config.metric)
    for note in images.notes:
        display.say(f"note: {note}")
    if not config.pretrained and config.weights is None:
        display.say("WARNING: the backbone has RANDOM weights (--no-pretrained); its accuracy means nothing")
    return Material(images, load_backbone(config))


def choose_metric(images: ImageSet, name: str | None) -> None:
    """Score the images by another metric than their own; `UsageError` for one that they cannot have."""
    if name is None:
        return
    if (name == "11point_mAP") != images.multi_label or (name == "roc_auc" and len(images.classes) != 2):
        fitting = "11point_mAP" if images.multi_label else "accuracy or mean-per-class"
        raise UsageError(
            f"--metric: {images.name}, of {len(images.classes)} classes, cannot have {name}; use {fitting}"
        )
    images.metric = name


def text_start(config: TrainConfig, material: Material) -> Tensor | None:
    """CLIP's text embeddings of the classes times its logit scale, (C, D), where the head starts from them."""
    if config.head_init != "text":
        return None
    from kadapt_cli.text import text_weights

    backbone = material.backbone
    if not backbone.projection:
        raise ModelError(f"--head-init text: {backbone.name} is no CLIP image tower; use --head-init means")
    if material.text is None:
        images = material.images
        weight, scale = text_weights(backbone.architecture, backbone.tag, images.classes, images.templates)
        material.text = weight * scale
    return material.text


def keep_frozen(session: Session) -> None:
    """Compute once what the frozen blocks before the first adapted one make of the images, where that is the same
    in every epoch: no augmentation, at least one block, and results that fit in 1 GiB. Runs on the same images whose
    adapters begin with the same block share it."""
    whole = session.adapted.backbone.module
    first = first_trained_block(whole)
    if session.config.augment != "none" or first == 0 or session.config.method == "linear":
        return
    close = 1e-5 if session.dtype == torch.float32 else 2e-2
    splits = {split: session.material.plain(split) for split in ("train", "val") if session.images.splits[split]}
    probe = torch.stack([splits["train"][0][0]]).to(session.device)
    with torch.no_grad(), torch.autocast(session.device.type, session.dtype, enabled=session.dtype != torch.float32):
        x, extra = before_block(whole, first, probe)
        tail = Tail(whole, first, extra)
        same = torch.allclose(tail(x), whole(probe), rtol=close, atol=close)
    if not same or 4 * x.numel() * sum(map(len, splits.values())) > ACTIVATION_BYTES:
        return
    kept = session.material.activations
    if session.material.front != first:
        kept.clear()
        session.material.front = first
    for split in splits.keys() - kept.keys():
        kept[split] = Activations(*logits(_Front(whole, first), splits[split], session.device, session.dtype))
    session.train, session.val = kept["train"], kept.get("val")
    session.net = nn.Sequential(tail, session.adapted.head)


class _Front(nn.Module):
    """Images to the activations before block `first`."""

    def __init__(self, module: nn.Module, first: int) -> None:
        super().__init__()
        self.module = module
        self.first = first

    def forward(self, images: Tensor) -> Tensor:
        return before_block(self.module, self.first, images)[0]


def loss_sum(values: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over images; for multi-hot labels binary cross-entropy, summed over classes too."""
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(values.float(), labels, reduction="sum")
    return F.cross_entropy(values.float(), labels, reduction="sum")


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


def learning_rate(step: int, session: Session) -> float:
    """The rate of optimizer step `step` (from 0): a linear rise over the warm-up, then half a cosine to near 0."""
    config = session.config
    assert config.lr is not None
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
    tensors = (*session.module.parameters(), *session.module.buffers())
    state = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    activations = sum(size for pointer, size in kept.items() if pointer not in state)
    del output
    trainable = sum(p.numel() * p.element_size() for p in session.parameters.values())
    return int(sum(state.values()) + 3 * trainable + activations * min(session.micro, len(session.train)))


def save_adapter(session: Session) -> None:
    """Commit the adapter as it is now to the run folder."""
    assert session.out is not None
    info = runs.save_tensors(
        session.out / runs.ADAPTER,
        "adapter",
        tensors_of(session.adapted),
        _describe(session) | {"epoch": session.epoch},
    )
    runs.commit(session.out / runs.ADAPTER_INFO, json.dumps(info, indent=2, ensure_ascii=False) + "\n")


def save_state(session: Session) -> None:
    """Commit all that the next step reads."""
    assert session.out is not None
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
        "manifest": digest_of(session.images),
        "config": session.config.model_dump(mode="json"),
    }
    previous = session.out / runs.PREVIOUS_STATE
    runs.save_tensors(session.out / runs.STATE, "state", tensors, info, previous=previous)
    session.saved = session.position


def restore(session: Session) -> None:
    """Take a session back to its last committed state."""
    assert session.out is not None
    path = session.out / runs.STATE
    tensors, info, why = runs.load_state(session.out)
    _check_state(session, tensors, info)
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
    try:
        torch.set_rng_state(tensors["rng"])
    except RuntimeError as error:
        raise ModelError(f"{path}: its random state is damaged ({error}); start again") from None
    session.sums.copy_(tensors["sums"])
    session.epoch, session.step, session.history = info["epoch"], info["step"], info["history"]
    session.best, session.kept_epoch = info["best"], info["kept_epoch"]
    session.micro, session.epoch_time_s = info["micro"], info["epoch_time_s"]
    session.scaler.load_state_dict(info["scaler"])
    session.saved = None if why else session.position


def _check_state(session: Session, tensors: dict[str, Tensor], info: Row) -> None:
    """Raise `ModelError` unless a state is one that this run can have saved."""
    assert session.out is not None
    path = session.out / runs.STATE
    descriptions.check(path, "state", info)
    wanted = {f"model.{name}": tensor for name, tensor in tensors_of(session.adapted).items()}
    wanted |= {"rng": torch.get_rng_state(), "sums": session.sums}
    for name, parameter in session.parameters.items():
        wanted[f"live.{name}"] = session.live[name]
        if f"optimizer.step.{name}" in tensors:
            wanted |= {f"optimizer.{key}.{name}": parameter for key in ("exp_avg", "exp_avg_sq")}
            wanted[f"optimizer.step.{name}"] = torch.zeros(())
    check_tensors(wanted, tensors, path)
    never_negative = [t for n, t in tensors.items() if n.startswith(("optimizer.step.", "optimizer.exp_avg_sq."))]
    steps, epoch = session.steps_per_epoch, info["epoch"]
    least = 0 if session.config.method == "linear" else epoch * steps
    if (
        any(bool((tensor < 0).any()) for tensor in never_negative)
        or not least <= info["step"] <= (epoch + 1) * steps
        or not info["kept_epoch"] <= epoch == len(info["history"])
    ):
        raise ModelError(f"{path}: its counts do not fit each other; start again")


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
        "metric": session.images.metric,
        "squash": session.images.squash,
        "data_config": {k: list(v) if isinstance(v, tuple) else v for k, v in backbone.data_config.items()},
        "manifest": digest_of(session.images),
        "config": session.config.model_dump(mode="json"),
    }


def precision_of(name: str, device: torch.device) -> torch.dtype:
    """The number format that a name, or 'auto', means on a device."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _cast_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep frozen weight matrices in the compute dtype once, instead of casting them in every step."""
    for parameter in module.parameters():
        if not parameter.requires_grad and parameter.dim() >= 2:
            parameter.data = parameter.data.to(dtype)


def _optimizer(parameters: dict[str, nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; matrices are decayed towards zero, biases, scales and norms are not."""
    decayed = [p for p in parameters.values() if p.dim() >= 2]
    free = [p for p in parameters.values() if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr or 0.0)
