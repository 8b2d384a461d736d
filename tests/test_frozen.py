"""What is frozen is computed once: with the same result, and faster."""

import time

import pytest
import torch
from rich.console import Console

from kadapt_cli import session as sessions
from kadapt_cli import train as training
from kadapt_cli.adapters import METHODS
from kadapt_cli.config import TrainConfig
from kadapt_cli.data import open_images
from kadapt_cli.models import load
from kadapt_cli.progress import Display
from kadapt_cli.surgery import Tail, before_block, first_trained_block

# A fused qkv, rotary embeddings, a relative position bias, a CLIP tower, attention pooling.
MODELS = [
    pytest.param("vit32", 32),
    pytest.param("eva02_tiny_patch14_224", 56),
    pytest.param("beitv2_base_patch16_224", 64, marks=pytest.mark.slow),
    pytest.param("vit_base_patch32_clip_quickgelu_224", 64, marks=pytest.mark.slow),
    pytest.param("vit_base_patch16_siglip_224", 64, marks=pytest.mark.slow),
]
LAST_TWO = ("blocks.4.*", "blocks.5.*")


def quiet() -> Display:
    return Display(Console(stderr=True), quiet=True)


@pytest.mark.parametrize(("name", "size"), MODELS)
def test_the_tail_goes_on_where_the_front_stops(name, size):
    module = load(name, pretrained=False, img_size=None if name == "vit32" else size).module
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = module(images)
        for first in (1, len(module.blocks) - 1):
            activations, extra = before_block(module, first, images)
            torch.testing.assert_close(Tail(module, first, extra)(activations), whole, rtol=1e-5, atol=1e-5)


def test_the_first_trained_block():
    module = load("vit32").module
    assert first_trained_block(module) == 5
    module.norm.weight.requires_grad_(True)
    assert first_trained_block(module) == 5
    module.blocks[4].mlp.fc1.bias.requires_grad_(True)
    assert first_trained_block(module) == 4
    module.pos_embed.requires_grad_(True)
    assert first_trained_block(module) == 0


def fitted(monkeypatch, *, reuse: bool, method: str = "kadaptation", **changes) -> tuple[sessions.Session, float]:
    """A run on the digits with the last two of six blocks adapted, in memory, and its seconds."""
    settings = {"shots": 4, "epochs": 4, "augment": "none", "targets": LAST_TWO, "batch_size": 32} | changes
    config = TrainConfig(method=method, **settings)
    images = open_images("demo", shots=config.shots)
    with monkeypatch.context() as patch:
        if not reuse:
            patch.setattr(sessions, "keep_frozen", lambda session: None)
        began = time.perf_counter()
        session = training.prepare(config, None, quiet(), material=sessions.Material(images, load("vit32")))
    training.fit(session, quiet())
    return session, time.perf_counter() - began


@pytest.mark.parametrize("method", ["kadaptation", "adapter"])
def test_kept_activations_give_the_same_run(monkeypatch, method):
    kept, _ = fitted(monkeypatch, reuse=True, method=method)
    plain, _ = fitted(monkeypatch, reuse=False, method=method)
    assert isinstance(kept.train, sessions.Activations)
    assert not isinstance(plain.train, sessions.Activations)
    for name, parameter in plain.parameters.items():
        torch.testing.assert_close(kept.parameters[name], parameter, rtol=1e-5, atol=1e-5)
    assert kept.history[-1]["train_loss"] == pytest.approx(plain.history[-1]["train_loss"], rel=1e-5)
    assert kept.history[-1]["val_loss"] == pytest.approx(plain.history[-1]["val_loss"], rel=1e-5)


def test_augmented_images_and_a_trained_front_are_not_kept(monkeypatch):
    for changes in ({"augment": "light"}, {"targets": ("q", "v")}, {"targets": ("blocks.*.q",), "method": "full"}):
        session, _ = fitted(monkeypatch, reuse=True, epochs=1, **changes)
        assert not isinstance(session.train, sessions.Activations)


def test_runs_on_the_same_images_share_what_the_frozen_blocks_compute(monkeypatch):
    computed = []
    real = sessions.logits

    def logits(module, data, device, dtype):
        computed.append(getattr(module, "first", None))
        return real(module, data, device, dtype)

    monkeypatch.setattr(sessions, "logits", logits)
    material = sessions.Material(open_images("demo", shots=4), load("vit32"))
    config = TrainConfig(shots=4, epochs=1, augment="none")
    for targets in (LAST_TWO, LAST_TWO, ("blocks.5.q",), LAST_TWO):
        training.prepare(config.model_copy(update={"targets": targets}), None, quiet(), material=material)
    fronts = [first for first in computed if first is not None]  # the others are features for the head
    assert fronts == [4, 4, 5, 5, 4, 4]  # training and validation images; one block's at a time is kept


@pytest.mark.parametrize("method", METHODS)
def test_runs_on_the_same_images_share_the_frozen_weights_and_leave_them_alone(method):
    """No second model in memory: what is not trained is the material's own memory, before and after a run."""
    material = sessions.Material(open_images("demo", shots=2, val="none"), load("vit32"))
    before = {name: tensor.clone() for name, tensor in material.backbone.module.state_dict().items()}
    own = {p.untyped_storage().data_ptr(): p.numel() for p in material.backbone.module.parameters()}
    extra = {"projection": "identity"} if method == "subspace" else {}
    session = training.prepare(TrainConfig(method=method, epochs=1, **extra), None, quiet(), material=material)
    training.fit(session, quiet())
    for name, tensor in material.backbone.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    shared = {p.untyped_storage().data_ptr() for p in session.module.parameters()} & own.keys()
    trained = sum(p.numel() for p in session.adapted.adapter.values())
    in_place = method in ("full", "attention", "bitfit", "layernorm")
    assert sum(own[place] for place in shared) == sum(own.values()) - (trained if in_place else 0)


@pytest.mark.slow
def test_adapting_the_last_two_blocks_is_twice_as_fast(monkeypatch):
    """The frozen four of six blocks run once and not in each of 20 epochs; the best of three pairs, taking turns."""
    pairs = []
    for _ in range(3):
        pairs.append([fitted(monkeypatch, reuse=reuse, shots=12, epochs=20)[1] for reuse in (False, True)])
    assert max(plain / kept for plain, kept in pairs) >= 2.0, pairs
