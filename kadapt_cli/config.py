"""What a training run is made of: one frozen, checked record, read from TOML and written back resolved.

Precedence is command-line options, then the file given by ``--config``, then the defaults that stand here and nowhere
else. The run folder's ``config.toml`` holds every value, so that ``kadapt train --config RUN/config.toml`` repeats it.
"""

import difflib
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from kadapt_cli.errors import UsageError

MAX_CONFIG_BYTES = 1 << 16
MAX_NAME = 1024  # characters of a path or name
MAX_TARGETS = 1000
MAX_DOTS = 64  # the parser takes minutes for a key of thousands
MAX_COUNT = 1_000_000
PROBE_EPOCHS, PROBE_BATCH_SIZE = 10, 8  # of a trial of `kadapt probe-id`


def _no_nul(name: str) -> str:
    if "\0" in name:
        raise ValueError("a name cannot hold the character NUL")
    return name


Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME), AfterValidator(_no_nul)]


class TrainConfig(BaseModel):
    """Every choice that decides what a training run computes.

    The field descriptions are the help texts of ``kadapt train``. Errors are `UsageError`, raised by `resolve`.
    """

    # Built on first use: `kadapt --help` reads the descriptions only.
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    data: Name = Field("demo", description="A folder of classes, 'demo', or a named set (torch/…, hfds/…).")
    model: Name = Field("vit32", description="A timm model name, 'local-dir:DIR', or the bundled 'vit32'.")
    method: Name = Field("kadaptation", description="The adaptation method; see 'kadapt methods'.")
    metric: Literal["accuracy", "mean-per-class", "11point_mAP", "roc_auc"] | None = Field(
        None, description="What the data is scored by; its own metric when not given, accuracy for a folder."
    )
    shots: int | None = Field(
        None,
        ge=1,
        le=MAX_COUNT,
        description="Training images drawn a class, validation included; all of them when not given.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the draw, the initialisation and the order of images.")
    epochs: int = Field(40, ge=1, le=MAX_COUNT, description="Passes over the training images.")
    lr: float | None = Field(None, gt=0, description="Peak learning rate; the method's own when not given.")
    weight_decay: float | None = Field(
        None, ge=0, description="Weight decay of AdamW (1e-4), or of linear's objective (0.1)."
    )
    batch_size: int = Field(32, ge=1, le=MAX_COUNT, description="Images an optimizer step.")
    micro_batch: int | None = Field(
        None,
        ge=1,
        le=MAX_COUNT,
        description="Images a forward pass; gradients accumulate up to the batch size. The batch size when not given.",
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="Part of the steps in which the learning rate rises.")
    patience: int = Field(
        20, ge=1, le=MAX_COUNT, description="Stop after so many epochs clearly worse than the best in validation."
    )
    val: Literal["auto", "none"] = Field(
        "auto", description="'auto' keeps 20 % of the drawn images for validation; 'none' trains on all of them."
    )
    augment: Literal["none", "light", "strong"] = Field("light", description="Augmentation of the training images.")
    img_size: int | None = Field(None, ge=8, le=4096, description="Image size; the model's own when not given.")
    targets: tuple[Name, ...] = Field(
        ("q", "v"),
        strict=False,  # a TOML array is a list
        min_length=1,
        max_length=MAX_TARGETS,
        description="What to adapt: comma-separated globs of q, k, v, proj, fc1, fc2, attn, mlp, blocks.N…",
    )
    terms: int | None = Field(
        None, ge=1, le=4096, description="T, Kronecker terms and side of A; up to 32 when not given."
    )
    rank: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="r, the rank of each block B_t = u_t v_tᵀ (1), of lora (4) or of lokr's block (4).",
    )
    width: int | None = Field(
        None, ge=1, le=65536, description="Bottleneck of adapter and compacter (64), prompts a block of vpt (10)."
    )
    rule: Literal["factored", "full"] = Field("factored", description="A_t as a_t b_tᵀ (factored) or as a full matrix.")
    scale: float | None = Field(None, gt=0, description="s, the factor before ΔW; the method's own when not given.")
    dims: int | None = Field(
        None,
        ge=0,
        lt=2**40,
        description="d, the dimensions of subspace (1000, or all the weights); 0 trains the head alone.",
    )
    projection: Literal["fastfood", "dense", "sparse", "identity"] = Field(
        "fastfood", description="Of subspace: how its d numbers move the weights; identity trains them directly."
    )
    said: bool = Field(False, description="Of subspace: a trained factor a tensor, which counts as a dimension.")
    head_init: Literal["means", "zero", "text"] = Field(
        "means",
        description="Start of the classifier: class means, zero, or CLIP's text embeddings of the class names.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to compute.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="Number format of the backbone.")
    deterministic: bool = Field(False, description="On a GPU the same bits in every run, at a cost in speed.")
    backend: Literal["auto", "eager", "merge", "triton"] = Field(
        "auto", description="How the adapted layers are computed; see kadapt_kernels.kron_linear."
    )
    pretrained: bool = Field(True, description="Load pretrained weights.")
    weights: Name | None = Field(None, description="A safetensors file with the backbone's weights.")
    save_every: float = Field(30.0, ge=0, description="Seconds between saves within an epoch.")
    skip_bad: bool = Field(False, description="Leave out images that cannot be used instead of stopping.")


def resolve(options: dict[str, Any], config_file: Path | None = None) -> TrainConfig:
    """Merge command-line options over a TOML file over the defaults, and check the result.

    Args:
        options: Values given on the command line, by field name; None means not given.
        config_file: A TOML file of the same names, or None.

    Raises:
        UsageError: An unknown key, a wrong type or a value out of range; names the key and where it came from.
    """
    given = {name: value for name, value in options.items() if value is not None}
    from_file = read_toml(config_file) if config_file is not None else {}
    for key in from_file:
        if key not in TrainConfig.model_fields:
            close = difflib.get_close_matches(key[:100], TrainConfig.model_fields, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(TrainConfig.model_fields)}"
            raise UsageError(f"{config_file}: unknown key {_brief(key)}; {hint}")
    try:
        return TrainConfig.model_validate(from_file | given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0])
        where = f"--{key.replace('_', '-')}" if key in given else f"{config_file}: {key}"
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{where}: {message}, but {_brief(first['input'])} was given") from None


@contextmanager
def blaming(config: TrainConfig, options: dict[str, Any], config_file: Path | None) -> Iterator[None]:
    """Errors of later checks name an option ("--rank: …"); when its value came from the file, they say so instead."""
    try:
        yield
    except UsageError as error:
        found = re.match(r"--([a-z-]+)", str(error))
        key = found[1].replace("-", "_") if found else ""
        if found and config_file is not None and key in config.model_fields_set and options.get(key) is None:
            raise UsageError(f"{config_file}: {key}{str(error)[found.end() :]}") from None
        raise


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file of at most 64 KiB; `UsageError` when it is missing, too large or malformed."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)  # a device has no size to ask for
        if len(data) > MAX_CONFIG_BYTES:
            raise UsageError(
                f"--config: {path}: larger than {MAX_CONFIG_BYTES} bytes, which is no configuration file of kadapt"
            )
        if max(part.count(b".") for part in re.split(rb"[,\n]", data)) > MAX_DOTS:
            raise RecursionError
        return tomllib.loads(data.decode())
    except OSError as error:
        raise UsageError(f"--config: {path} cannot be read ({error.strerror}); give the path of a TOML file") from None
    except RecursionError:
        raise UsageError(f"{path}: not a configuration file of kadapt: nested too deep") from None
    except ValueError as error:  # what is no TOML, no UTF-8, or a number of thousands of digits
        raise UsageError(f"{path}: not valid TOML: {error}") from None


def to_toml(config: TrainConfig) -> str:
    """The resolved configuration as TOML; values that are not set are left out. `read_toml` gives it back."""
    lines = [f"{key} = {_toml_value(value)}" for key, value in config.model_dump().items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml_value(value: bool | int | float | str | tuple[str, ...]) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in escaped) + '"'
    return repr(value)
