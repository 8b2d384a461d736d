"""Backbones: load a frozen timm vision transformer.

A name becomes a model in three steps. timm builds it on the meta device, which costs no memory and tells its
configuration and tensor shapes. kadapt finds one safetensors file with its weights: in a folder, in the hub's cache, or
on the hub. timm then builds the model again with these tensors, converting and resizing them as it does for its own
downloads, strictly. kadapt opens the file itself, so no pickle is ever read.
"""

import copy
import difflib
import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, cast

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from kadapt_cli.errors import ModelError, listed
from kadapt_cli.runs import check_header, digest

BUNDLED = Path(__file__).parent / "assets" / "vit32"
HUB_TIMEOUT_S = 5.0
MAX_IMG_SIZE = 4096  # pixels a side
MERGED = "kadapt"  # the metadata entry of a model file that merge-weights wrote
# Entries of timm's configuration that locate weights, or that describe a classifier which is not kept.
_DROPPED = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "label_names", "label_descriptions")
_POSITION_TABLES = ("pos_embed", "relative_position_bias_table")
# What timm raises for a folder, a configuration or tensors that do not fit together.
_TIMM_ERRORS = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, MemoryError,
    OSError,
)  # fmt: skip
MAX_CONFIG_BYTES = 4 << 20  # of a config.json; the names of 21,000 classes take one
MAX_NUMBER = 1 << 16  # in its model_args: widths, depths and image sides are less
MAX_DEPTH = 100
MAX_PATCHES = 1 << 16  # of an image: that many numbers a channel has a position table
# The hub's HTTP library changes with its version; the hub's own error always derives first from that library's base.
_NETWORK_ERRORS: tuple[type[BaseException], ...] = (OSError, HfHubHTTPError.__bases__[0])


@dataclass
class Backbone:
    """A frozen vision transformer and what is needed to feed, name and rebuild it.

    ``module`` maps (B, 3, H, W) float32 images to (B, feature_dim) features. ``digest`` is the sha256 of its state dict
    as loaded (`runs.digest`). ``projection`` is true for CLIP towers, whose frozen ``head`` stays in place.
    """

    module: nn.Module
    name: str
    architecture: str
    tag: str
    feature_dim: int
    projection: bool
    data_config: dict[str, Any]
    digest: str
    model_args: dict[str, Any]
    license: str

    def shared(self) -> "Backbone":
        """A copy whose module can be adapted and moved by itself, and whose tensors are this one's memory."""
        tensors: dict[int, Tensor] = {id(buffer): buffer.detach() for buffer in self.module.buffers()}
        tensors |= {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in self.module.parameters()}
        return replace(self, module=copy.deepcopy(self.module, tensors))


def load(
    name: str, *, pretrained: bool = True, weights: Path | None = None, img_size: int | None = None, seed: int = 0
) -> Backbone:
    """Load a timm vision transformer in float32 on the CPU, frozen and in eval mode.

    The global random state is left as it was. Costs about three times the model's size in memory.

    Args:
        name: A timm name with or without a tag, ``local-dir:DIR``, ``hf-hub:REPO``, or the bundled ``vit32``.
        pretrained: Load the pretrained weights; otherwise, without ``weights``, they are random.
        weights: A safetensors file with the timm state dict, used instead of the pretrained weights. A classifier in it
            is left out; position tables of another size are resized when ``img_size`` is given.
        img_size: Side of the square input in pixels, a multiple of the patch; the model's own when None.
        seed: Seed of random weights.

    Raises:
        ModelError: An unknown name, weights that are missing, damaged, not finite or of another shape, a hub that
            cannot be reached, or an image size that does not fit.
    """
    source, folder = _locate(name)
    reference = _build(name, source, device="meta")
    config = dict(reference.pretrained_cfg)
    _check_data_config(name, config)
    projection = _is_projection(config)
    arguments = {key: value for key, value in reference.pretrained_model_args.items() if key != "num_classes"}
    if img_size is not None:
        _check_img_size(name, reference, img_size)
        arguments["img_size"] = img_size
    state: dict[str, Tensor] | None = None
    if weights is not None or pretrained:
        dropped = () if projection else tuple(f"{key}." for key in _classifiers(config))
        file = weights or _pretrained_file(name, config, folder)
        whole = _read(file)
        if weights is None and folder is not None:
            _check_merged(file, whole, folder / "config.json")
        state = _without(whole, dropped)
        _check_size(file, state, _without(reference.state_dict(), dropped))
        if weights is not None:
            _check_fits(weights, state, _without(reference.state_dict(), dropped), resize=img_size is not None)
    classes = config["num_classes"] if projection else 0
    clean = {key: value for key, value in config.items() if key not in _DROPPED} | {"num_classes": classes}
    module = _build(
        name, config["architecture"], state=state, config=clean, seed=seed, num_classes=classes, **arguments
    )
    _check_finite(str(weights or name), module)
    module.float().requires_grad_(False).eval()
    return Backbone(
        module=module,
        name=name,
        architecture=config["architecture"],
        tag=config.get("tag") or "",
        feature_dim=module.head.out_features if projection else module.num_features,
        projection=projection,
        data_config=timm.data.resolve_input_data_config(module, {"img_size": img_size}),
        digest=digest(module.state_dict()),
        model_args=arguments,
        license=config.get("license") or "",
    )


def full_model(backbone: Backbone, num_classes: int) -> nn.Module:
    """The same architecture as a complete timm classifier with random weights, in float32 and train mode."""
    config = _config(backbone.module) | {"num_classes": num_classes}
    return cast(
        nn.Module,
        timm.create_model(backbone.architecture, pretrained_cfg=config, num_classes=num_classes, **backbone.model_args),
    )


def classifier_keys(backbone: Backbone) -> tuple[str, str]:
    """State-dict keys of the weight and bias of `full_model`'s classifier; `ModelError` when it has several."""
    names = _classifiers(_config(backbone.module))
    if len(names) != 1:
        raise ModelError(f"{backbone.architecture}: expected one classifier, it has {', '.join(names)}; choose another")
    return f"{names[0]}.weight", f"{names[0]}.bias"


def _locate(name: str) -> tuple[str, Path | None]:
    """What timm is asked to build, and the folder it comes from when it is no registered name."""
    prefix, colon, rest = name.partition(":")
    if name == "vit32":
        folder = BUNDLED
    elif prefix == "local-dir" and rest:
        folder = Path(rest)
    elif prefix == "hf-hub" and rest:
        folder = fetch(rest, "config.json").parent
    elif "/" in name and Path(name).is_dir():
        raise ModelError(f"{name}: a folder is given as local-dir:{name}")
    elif colon or "/" in name:
        raise ModelError(f"{name}: unknown model; give a folder as local-dir:DIR, a hub repository as hf-hub:REPO")
    else:
        _check_registered(name)
        return name, None
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name}: no config.json in {folder}; give a model folder as timm writes it")
    _check_config(folder / "config.json")
    return f"local-dir:{folder}", folder


def _check_config(file: Path) -> None:
    """A folder's config.json names a model of timm, and its numbers are those of one."""

    def refuse(what: str) -> NoReturn:
        raise ModelError(f"{file}: {what}; give a model folder as timm writes it")

    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            refuse(f"larger than {MAX_CONFIG_BYTES:,} bytes")
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        refuse(f"cannot be read ({error.strerror})")
    except (ValueError, RecursionError):
        refuse("not JSON")
    if not isinstance(config, dict):
        refuse("not a JSON object")
    architecture, arguments = config.get("architecture"), config.get("model_args") or {}
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        refuse(f"timm has no architecture {str(architecture)[:80]!r}")
    if not isinstance(arguments, dict) or not isinstance(config.get("pretrained_cfg") or {}, dict):
        refuse("model_args and pretrained_cfg were expected to be objects")
    for key, value in arguments.items():
        numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int | float)]
        most = MAX_DEPTH if key == "depth" else MAX_NUMBER
        if not all(abs(number) <= most for number in numbers):
            refuse(f"{key[:80]} was expected to be at most {most:,}")


def _check_data_config(name: str, config: dict[str, Any]) -> None:
    """What a model says of its images can be made a transform; nothing of it takes much memory."""
    size, crop = config.get("input_size"), config.get("crop_pct")
    is_size = isinstance(size, list | tuple) and len(size) == 3 and all(type(side) is int for side in size)
    if not is_size or not (size[0] == 3 and min(size) >= 1 and max(size) <= MAX_IMG_SIZE):  # type: ignore[index,arg-type]
        wrong = f"input_size 3 x H x W, up to {MAX_IMG_SIZE} pixels a side,"
    elif crop is not None and not (isinstance(crop, int | float) and 0.1 <= crop <= 2):
        wrong = "crop_pct from 0.1 to 2"
    elif config.get("interpolation") not in ("bilinear", "bicubic", "lanczos", "nearest", "box", "hamming", "random"):
        wrong = "an interpolation of Pillow"
    elif config.get("crop_mode") not in (None, "center", "squash", "border"):
        wrong = "crop_mode center, squash or border"
    elif not all(_is_colour(config.get(key)) for key in ("mean", "std")) or not min(config["std"]) > 0:
        wrong = "mean and std of three numbers, std above 0,"
    else:
        return
    raise ModelError(f"{name}: {wrong} was expected in its configuration; mend its config.json, or choose another")


def _is_colour(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(isinstance(v, int | float) and math.isfinite(v) for v in value)
    )


def _check_registered(name: str) -> None:
    architecture, _, tag = name.partition(".")
    tags = timm.list_pretrained(f"{architecture}.*")
    if timm.is_model(architecture) and (not tag or name in tags):
        return
    known = tags if timm.is_model(architecture) else ["vit32", *timm.list_models(), *timm.list_pretrained()]
    close = difflib.get_close_matches(name, known, n=3) or known[:3]
    raise ModelError(f"{name}: unknown model; did you mean {', '.join(close)}?")


def _build(
    name: str,
    source: str,
    *,
    device: str = "cpu",
    state: dict[str, Tensor] | None = None,
    config: dict[str, Any] | None = None,
    seed: int = 0,
    **arguments: Any,
) -> Any:
    """timm's model, filled with ``state`` when given; Any, since timm's models carry attributes nn.Module lacks."""
    if state is not None:
        config = {**(config or {}), "state_dict": state}
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            module = timm.create_model(source, pretrained=state is not None, pretrained_cfg=config, **arguments)
    except _TIMM_ERRORS as error:
        raise ModelError(f"{name}: timm cannot build it ({_one_line(error)}); choose another model or size") from None
    module.pretrained_cfg.pop("state_dict", None)
    return module


def _pretrained_file(name: str, config: dict[str, Any], folder: Path | None) -> Path:
    """The safetensors file with the pretrained weights, fetched when it is not there yet."""
    if name.startswith("hf-hub:"):
        return fetch(name.removeprefix("hf-hub:"), "model.safetensors")
    if folder is None and config.get("hf_hub_id"):
        return fetch(config["hf_hub_id"], "model.safetensors")
    if folder is None:
        raise ModelError(f"{name}: timm knows no safetensors weights for it; pass --weights FILE or --no-pretrained")
    files = sorted(folder.glob("*.safetensors"))
    files = [file for file in files if file.name == "model.safetensors"] or files
    if len(files) != 1:
        raise ModelError(
            f"{name}: expected model.safetensors in {folder}, found {len(files)} safetensors files; pickled weights"
            " (.bin, .pth) are never read, so save them as safetensors or pass --weights FILE"
        )
    return files[0]


def fetch(repo: str, filename: str) -> Path:
    """A file of a hub repository (``owner/name`` or ``owner/name@revision``): from the cache, else downloaded once."""
    repo, _, branch = repo.partition("@")
    revision = branch or None
    try:
        cached = huggingface_hub.try_to_load_from_cache(repo, filename, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        # hf_hub_download tries an unreachable hub for 20 s; this asks once.
        url = huggingface_hub.hf_hub_url(repo, filename, revision=revision)
        huggingface_hub.get_hf_file_metadata(url, timeout=HUB_TIMEOUT_S)
        return Path(huggingface_hub.hf_hub_download(repo, filename, revision=revision))
    except HFValidationError as error:
        raise ModelError(f"{repo}: no valid name of a hub repository ({_one_line(error)}); mend it") from None
    except RemoteEntryNotFoundError:
        raise ModelError(
            f"{repo}: has no {filename}, and pickled weights are never read; pass --weights FILE"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(f"{repo}: not on the hub, or closed to you; check the name or run 'hf auth login'") from None
    except _NETWORK_ERRORS as error:
        raise ModelError(
            f"{repo}: {filename} cannot be fetched ({_one_line(error)}); on a connected machine run 'hf download {repo}"
            " config.json model.safetensors --local-dir DIR', then give --model local-dir:DIR or"
            " --weights DIR/model.safetensors"
        ) from None


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if not file.is_file() and file.exists():  # a pipe would be waited on for ever
            raise ModelError(f"{file}: cannot be read (it is no file); give a safetensors file")
        check_header(file)
        state: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise ModelError(f"{file}: no whole safetensors file ({_one_line(error)}); no other format is read") from None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror or error}); give a safetensors file") from None
    if not state:
        raise ModelError(f"{file}: holds no tensors; give a safetensors file with the timm state dict")
    return state


def _check_size(file: Path, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """The model is not built where the file cannot fill it; which tensors fit is seen when timm loads them."""
    wanted, given = (sum(t.numel() for t in tensors.values()) for tensors in (own, state))
    if wanted > 2 * given + (1 << 26):  # position tables may grow with the image size
        raise ModelError(f"{file}: holds {given:,} numbers, but the model has {wanted:,}; give weights that fit it")
    wrong = [key for key in own.keys() & state.keys() if own[key].is_floating_point() != state[key].is_floating_point()]
    if wrong:
        raise ModelError(f"{file}: not of the model's number format: {listed(sorted(wrong))}; give weights that fit it")


def merged_digest(state: dict[str, Tensor], config: dict[str, Any]) -> str:
    """SHA-256 (hex) of a merged model: its tensors and what its config.json says of the model and its images."""
    read = {key: config.get(key) for key in ("architecture", "model_args", "pretrained_cfg")}
    return hashlib.sha256((digest(state) + json.dumps(read, sort_keys=True)).encode()).hexdigest()


def _check_merged(file: Path, state: dict[str, Tensor], config: Path) -> None:
    """A folder that kadapt merged is as it was written; others carry no digest."""
    with safe_open(file, framework="pt") as opened:
        wanted = (opened.metadata() or {}).get(MERGED)
    if wanted is not None and merged_digest(state, json.loads(config.read_text())) != wanted:
        raise ModelError(f"{file.parent}: damaged: not what was merged (SHA-256 differs); merge again")


def _without(state: dict[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


def _check_fits(file: Path, state: dict[str, Tensor], own: dict[str, Tensor], *, resize: bool) -> None:
    """The file has exactly the model's tensors; with ``resize``, timm may resize the position tables."""
    wrong = [f"{key} (missing)" for key in own if key not in state]
    wrong += [f"{key} (unexpected)" for key in state if key not in own]
    for key in own.keys() & state.keys():
        given, wanted = tuple(state[key].shape), tuple(own[key].shape)
        if given != wanted and not (resize and key.endswith(_POSITION_TABLES)):
            wrong.append(f"{key} (shape {given}, expected {wanted})")
    if wrong:
        raise ModelError(f"{file}: does not fit the model: {listed(sorted(wrong))}; give weights of this architecture")


def _check_finite(name: str, module: nn.Module) -> None:
    bad = [key for key, value in module.state_dict().items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise ModelError(f"{name}: not every weight is finite in {listed(bad)}; fetch or train them again")


def _check_img_size(name: str, reference: Any, img_size: int) -> None:
    patch = getattr(getattr(reference, "patch_embed", None), "patch_size", None)
    if patch and (img_size // patch[0]) ** 2 > MAX_PATCHES:
        raise ModelError(
            f"{name}: img_size = {img_size} makes {(img_size // patch[0]) ** 2:,} patches of {patch[0]} pixels; "
            f"give one that makes at most {MAX_PATCHES:,}"
        )
    if patch and img_size % patch[0]:
        nearest = max(1, round(img_size / patch[0])) * patch[0]
        raise ModelError(
            f"{name}: img_size = {img_size} is not a multiple of the patch, {patch[0]} pixels; give {nearest}"
        )


def _is_projection(config: dict[str, Any]) -> bool:
    """Whether timm's ``head`` is a CLIP tower's projection and not a classifier that somebody trained."""
    own = timm.get_pretrained_cfg(config["architecture"])
    if own is None or "_clip" not in config["architecture"] or config.get("label_names"):
        return False
    tags = f"{config.get('tag') or ''}_{own.tag or ''}".split("_")
    return "ft" not in tags and own.num_classes == config["num_classes"]


def _classifiers(config: dict[str, Any]) -> tuple[str, ...]:
    names = config.get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def _config(model: nn.Module) -> dict[str, Any]:
    return cast(dict[str, Any], getattr(model, "pretrained_cfg", {}))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
