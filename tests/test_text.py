"""Text embeddings as a start: the formula with any encoder, and the zero-shot answer of a random open_clip model."""

import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn

from kadapt_cli import text
from kadapt_cli.adapters import Head
from kadapt_cli.errors import KadaptError, ModelError, UsageError
from kadapt_cli.text import embed, text_weights

TEMPLATES = ("a photo of a {}.", "a drawing of the {}.", "{}")
CLASSES = ("sea_lion", "dog", "tabby cat", "{brace}")


def letters(sentences):
    """Counts of bytes: a tokenizer whose "tokens" tell every sentence of these tests from every other."""
    return torch.stack([torch.bincount(torch.tensor(list(s.encode())), minlength=128).double() for s in sentences])


def spread(counts):
    """A fixed linear encoder, whose embeddings are of very different lengths."""
    weight = torch.randn(128, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return counts.square() @ weight.requires_grad_()


def test_embed_is_the_unit_mean_over_templates_of_unit_embeddings():
    rows = []
    for name in ("sea lion", "dog", "tabby cat", "{brace}"):
        units = spread(letters([f"a photo of a {name}.", f"a drawing of the {name}.", name]))
        total = sum(vector / vector.norm() for vector in units)
        rows.append(total / total.norm())
    found = embed(spread, letters, CLASSES, TEMPLATES)
    assert (found.dtype, found.device.type, found.requires_grad) == (torch.float32, "cpu", False)
    assert torch.allclose(found.double(), torch.stack(rows), atol=1e-6)
    assert torch.equal(embed(spread, letters, CLASSES, TEMPLATES), found)
    assert torch.equal(embed(spread, letters, CLASSES[::-1], TEMPLATES), found.flip(0))


@pytest.fixture
def open_clip():
    return pytest.importorskip("open_clip", reason="needs the extra 'clip'")


@pytest.fixture
def tiny(open_clip, tmp_path, monkeypatch):
    """A CLIP model of one small block in each half with random weights, which open_clip and the hub seem to know."""
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    words = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": words}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {"tiny": config})
    known = {"tiny": {"openai": {"hf_hub": "me/tiny/", "quick_gelu": True}}}
    monkeypatch.setattr(open_clip.pretrained, "_PRETRAINED", known)
    monkeypatch.setitem(text.TOWERS, "vit_tiny_clip_32", ("tiny", {}))
    torch.manual_seed(3)
    model = open_clip.create_model("tiny", force_quick_gelu=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.logit_scale.fill_(2.0)
    save_file(model.state_dict(), tmp_path / text.WEIGHTS)
    monkeypatch.setattr(text, "fetch", lambda repo, name: {"me/tiny": tmp_path}[repo] / name)
    return SimpleNamespace(model=model, file=tmp_path / text.WEIGHTS)


def test_the_start_gives_open_clips_zero_shot_answer(open_clip, tiny):
    state = torch.get_rng_state()
    weight, scale = text_weights("vit_tiny_clip_quickgelu_32", "openai", CLASSES, TEMPLATES[2:])
    assert torch.equal(torch.get_rng_state(), state)
    assert scale == pytest.approx(torch.tensor(2.0).exp().item(), rel=1e-6)
    images = torch.randn(64, 3, 32, 32)
    sentences = open_clip.get_tokenizer("tiny")(["sea lion", "dog", "tabby cat", "{brace}"])
    with torch.no_grad():
        expected = tiny.model.get_logits(images, sentences)[0]
        tower = timm.create_model(
            "vit_base_patch32_clip_quickgelu_224", img_size=32, patch_size=16, embed_dim=64, depth=1, num_heads=1,
            num_classes=16,
        ).eval()  # fmt: skip
        tower.load_state_dict(checkpoint_filter_fn(tiny.model.state_dict(), tower))
        features = tower(images)
    logits = scale * torch.nn.functional.normalize(features, dim=1) @ weight.T
    assert torch.allclose(logits, expected, atol=1e-4)
    assert torch.equal((features @ weight.T).argmax(1), expected.argmax(1))
    head = Head(16, 4)
    head.start(features, torch.arange(64) % 4, init="text", text=weight * scale)
    assert torch.equal(head(features).argmax(1), expected.argmax(1))


def test_every_known_tower_has_a_text_half_of_its_own_width(open_clip):
    checked = set()
    for full in timm.list_pretrained("vit_*clip*"):
        plain, _, tag = full.replace("_quickgelu", "").partition(".")
        if plain in text.TOWERS and "_ft_" not in tag and not tag.startswith(("metaclip2", "apple")):
            name, tags = text.TOWERS[plain]
            repo = open_clip.get_pretrained_cfg(name, tags.get(tag, text.TAGS.get(tag, tag)))["hf_hub"]
            assert repo == f"timm/{plain}.{tag}/" if repo.startswith("timm") else repo.startswith(("laion/", "apple/"))
            assert open_clip.get_model_config(name)["embed_dim"] == timm.get_pretrained_cfg(full).num_classes, full
            checked.add(plain)
    assert checked == set(text.TOWERS)


def refused(kind: type[KadaptError], *arguments: str) -> str:
    with pytest.raises(kind) as caught:
        text_weights(*arguments, CLASSES, TEMPLATES)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("--head-init text: ")
    return str(caught.value)


def test_another_backbone_and_a_missing_package(monkeypatch):
    message = refused(ModelError, "vit_small_patch16_224", "augreg_in21k")
    assert "vit_small_patch16_224 has no text half that is known; use --model vit_base_patch32_clip_quick" in message
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert refused(UsageError, "vit_base_patch32_clip_224", "openai").endswith(
        "run: pip install 'open_clip_torch>=2.24'"
    )


def test_weights_that_cannot_be_had(open_clip, tmp_path: Path, monkeypatch):
    message = refused(ModelError, "vit_base_patch16_clip_224", "openai_ft_in1k")
    assert "weights of a whole CLIP model were expected, vit_base_patch16_clip_224.openai_ft_in1k given; " in message
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refused(ModelError, "vit_base_patch16_clip_224", "laion2b")
    repo = "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"
    assert message.startswith(f"--head-init text: {repo}: open_clip_model.safetensors cannot be fetched (")
    mend = f"'hf download {repo} open_clip_model.safetensors' and copy its cache, or use --head-init means"
    assert message.endswith(mend)


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_damaged_weights_are_named(tiny, damage):
    content = tiny.file.read_bytes()[:1000]
    save_file({"positional_embedding": torch.zeros(77, 64)}, tiny.file)
    if damage == "cut":
        tiny.file.write_bytes(content)
    message = refused(ModelError, "vit_tiny_clip_32", "openai")
    assert f"{tiny.file}: cannot be used (" in message
    assert message.endswith("; delete it to fetch it again")
