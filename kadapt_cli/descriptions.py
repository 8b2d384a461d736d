"""What the description in adapter.safetensors and state.safetensors holds, checked before anything of it is used.

A digest shows that a file is as it was written, not that kadapt wrote it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kadapt_cli.errors import ModelError
from kadapt_cli.metrics import METRICS

Text = Annotated[str, Field(max_length=4096)]
Count = Annotated[int, Field(ge=0, lt=2**40)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{16,64}$")]
Classes = Annotated[list[Annotated[str, Field(max_length=1024)]], Field(min_length=1, max_length=1_000_000)]


class _Checked(BaseModel):
    """Types are taken as they are; what a reader does not use may be anything."""

    model_config = ConfigDict(strict=True)


class _Model(_Checked):
    name: Text
    architecture: Text
    tag: Text
    digest: Digest
    license: Text


class _Adapter(_Checked):
    """What evaluation, prediction and merging read."""

    config: dict[str, Any]
    classes: Classes
    model: _Model
    metric: Text
    squash: bool
    manifest: Digest
    epoch: Count


class _Row(_Checked):
    """An epoch of the history."""

    model_config = ConfigDict(strict=True, extra="forbid")

    epoch: Count
    step: Count
    lr: Real | None
    train_loss: Real
    train_accuracy: Real | None
    val_loss: float | None
    val_accuracy: float | None
    kept: bool
    images_per_s: Real
    time_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _State(_Checked):
    """What a run that goes on reads."""

    config: dict[str, Any]
    classes: Classes
    manifest: Digest
    base_digest: Digest
    epoch: Count
    step: Count
    history: list[_Row]
    best: Real
    kept_epoch: Count
    micro: Annotated[int, Field(ge=1, le=1_000_000)]
    epoch_time_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    scaler: dict[str, Real]


_KINDS: dict[str, type[_Checked]] = {"adapter": _Adapter, "state": _State}


def check(path: Path, kind: str, info: Mapping[str, Any]) -> None:
    """Raise `ModelError` unless a description holds what readers take from one of its kind."""
    try:
        _KINDS[kind].model_validate(dict(info))
        if len(set(info["classes"])) < len(info["classes"]):
            raise ValueError("a class is there twice")
        if info.get("metric", METRICS[0]) not in METRICS:
            raise ValueError(f"its metric is none of {', '.join(METRICS)}")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:40] for part in first["loc"])
        raise ModelError(f"{path}: its description is damaged ({where}: {first['msg']}); train again") from None
    except ValueError as error:
        raise ModelError(f"{path}: its description is damaged ({error}); train again") from None
