"""Class names as the start of a classifier: the text half of the CLIP model that a backbone is the image half of.

A class becomes a unit vector in the space of the image features: its name is put into every template of the data set,
each sentence is embedded and brought to unit length, and their mean again (prompt ensembling; Radford et al., Learning
Transferable Visual Models From Natural Language Supervision, 2021, section 3.1.4). The class of an image is then the
one with the largest dot product, without any training.

timm holds the image halves only. The text half comes from open_clip (extra ``clip``), of the same architecture and the
same weights, read from safetensors alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from kadapt_cli.errors import ModelError, UsageError
from kadapt_cli.models import fetch

# timm's architecture without "_quickgelu" -> open_clip's model, and open_clip's names of timm's tags where they differ.
TOWERS: dict[str, tuple[str, dict[str, str]]] = {
    "vit_base_patch32_clip_224": ("ViT-B-32", {"laion2b": "laion2b_s34b_b79k"}),
    "vit_base_patch32_clip_256": ("ViT-B-32-256", {"datacompxl": "datacomp_s34b_b86k"}),
    "vit_base_patch16_clip_224": ("ViT-B-16", {"laion2b": "laion2b_s34b_b88k"}),
    "vit_large_patch14_clip_224": ("ViT-L-14", {"laion2b": "laion2b_s32b_b82k"}),
    "vit_large_patch14_clip_336": ("ViT-L-14-336", {}),
    "vit_huge_patch14_clip_224": ("ViT-H-14", {"laion2b": "laion2b_s32b_b79k"}),
    "vit_huge_patch14_clip_378": ("ViT-H-14-378", {}),
    "vit_giant_patch14_clip_224": ("ViT-g-14", {"laion2b": "laion2b_s12b_b42k"}),
    "vit_gigantic_patch14_clip_224": ("ViT-bigG-14", {"laion2b": "laion2b_s39b_b160k"}),
}
TAGS = {"datacompxl": "datacomp_xl_s13b_b90k", "metaclip_2pt5b": "metaclip_fullcc"}
WEIGHTS = "open_clip_model.safetensors"
MEND = "use --model vit_base_patch32_clip_quickgelu_224.openai or another CLIP tower, or --head-init means"


def text_weights(architecture: str, tag: str, classes: Sequence[str], templates: Sequence[str]) -> tuple[Tensor, float]:
    """The classes as unit vectors (C, D), float32 on the CPU, and the factor of CLIP's logits (about 100).

    Costs the download of the whole CLIP model once, its size in memory, and a pass of the text tower for every class
    and template. The global random state is left as it was.

    Args:
        architecture: timm's name of the image tower, such as "vit_base_patch32_clip_quickgelu_224".
        tag: timm's name of its weights, such as "openai".
        classes: C names; an underscore is read as a space.
        templates: Sentences with {} for the name, as ``ImageSet.templates`` has them.

    Raises:
        ModelError: Not a CLIP tower whose text half is known, or its weights cannot be fetched or read.
        UsageError: open_clip is not installed.
    """
    model, tokenize = _open_clip(architecture, tag)
    return embed(model.encode_text, tokenize, classes, templates), model.logit_scale.exp().item()


def embed(
    encode_text: Callable[[Any], Tensor],
    tokenize: Callable[[list[str]], Any],
    classes: Sequence[str],
    templates: Sequence[str],
) -> Tensor:
    """One unit vector a class, (C, D) float32 on the CPU: the mean over the templates of the unit text embeddings.

    Args:
        encode_text: From what `tokenize` gives for n sentences to embeddings (n, D) of any length.
        tokenize: From sentences to the input of `encode_text`.
        classes: As in `text_weights`.
        templates: As in `text_weights`.
    """
    rows = []
    with torch.no_grad():
        for name in classes:
            sentences = [template.format(name.replace("_", " ")) for template in templates]
            rows.append(_unit(encode_text(tokenize(sentences)).float()).mean(0).cpu())
    return _unit(torch.stack(rows))


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def _open_clip(architecture: str, tag: str) -> tuple[Any, Callable[[list[str]], Any]]:
    """The CLIP model of an image tower, on the CPU in eval mode, and its tokenizer."""
    name, tags = TOWERS.get(architecture.replace("_quickgelu", ""), ("", {}))
    if not name:
        raise ModelError(f"--head-init text: {architecture} has no text half that is known; {MEND}")
    try:
        import open_clip
    except ImportError as error:
        raise UsageError(
            f"--head-init text: needs open_clip ({error}); run: pip install 'open_clip_torch>=2.24'"
        ) from None
    known = open_clip.get_pretrained_cfg(name, tags.get(tag, TAGS.get(tag, tag)))
    repo = str(known.get("hf_hub", "")).rstrip("/")
    if not repo:
        full = f"{architecture}.{tag}"
        raise ModelError(f"--head-init text: weights of a whole CLIP model were expected, {full} given; {MEND}")
    try:
        file = str(fetch(repo, WEIGHTS))
    except ModelError as error:
        reason = str(error).split("; ")[0]
        mend = f"on a connected machine run 'hf download {repo} {WEIGHTS}' and copy its cache, or use --head-init means"
        raise ModelError(f"--head-init text: {reason}; {mend}") from None
    try:
        with torch.random.fork_rng(devices=[]):
            # The text half has the activation it was trained with, also where timm's image half has another.
            model = open_clip.create_model(name, file, force_quick_gelu=bool(known.get("quick_gelu")))
    except (RuntimeError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"--head-init text: {file}: cannot be used ({reason}); delete it to fetch it again") from None
    return model.eval(), open_clip.get_tokenizer(name)
