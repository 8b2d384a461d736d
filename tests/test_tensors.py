"""From images to tensors: normalised, and augmented by seed, epoch and index alone."""

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import CONFIG
from PIL import Image

from kadapt_cli import tensors
from kadapt_cli.data import (
    open_images,
)
from kadapt_cli.images import read_image
from kadapt_cli.tensors import ImageDataset, epoch_order, make_transform


def test_tensors_are_normalised_and_labelled(photos: Path) -> None:
    images = open_images(str(photos), shots=4)
    for augment in ("none", "light", "strong"):
        dataset = ImageDataset(images, "train", make_transform(CONFIG, augment=augment))
        assert len(dataset) == len(images.splits["train"])
        for index, sample in enumerate(images.splits["train"]):
            tensor, label = dataset[index]
            assert (tensor.shape, tensor.dtype, label) == ((3, 32, 32), torch.float32, sample.label)
            assert tensor.abs().max() <= 1


@pytest.mark.parametrize("augment", ["light", "strong"])
def test_augmentation_depends_on_seed_epoch_and_index_alone(photos: Path, augment: str) -> None:
    images = open_images(str(photos), shots=4)
    transform = make_transform(CONFIG, augment=augment)
    dataset = ImageDataset(images, "train", transform, seed=1)
    forward = [dataset[index][0] for index in range(len(dataset))]
    random.random(), np.random.rand(), torch.rand(1)
    backward = [dataset[index][0] for index in reversed(range(len(dataset)))][::-1]
    assert all(torch.equal(one, other) for one, other in zip(forward, backward, strict=True))
    resumed = ImageDataset(images, "train", transform, seed=1, epoch=5)
    dataset.set_epoch(5)
    assert torch.equal(resumed[2][0], dataset[2][0])
    assert not torch.equal(resumed[2][0], forward[2])
    assert not torch.equal(ImageDataset(images, "train", transform, seed=2)[2][0], forward[2])


def test_two_indices_of_one_picture_are_augmented_differently(photos: Path) -> None:
    dataset = ImageDataset(open_images(str(photos), shots=4), "train", make_transform(CONFIG, augment="light"))
    dataset.samples = [dataset.samples[0]] * 2
    assert not torch.equal(dataset[0][0], dataset[1][0])


def test_augmentation_leaves_the_global_generators_alone(photos: Path) -> None:
    images = open_images(str(photos), shots=4)
    dataset = ImageDataset(images, "train", make_transform(CONFIG, augment="strong"))
    for seed in range(3):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        expected = random.random(), np.random.rand(), torch.rand(1)
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        _ = [dataset[index] for index in range(4)]
        assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_without_augmentation_tensors_are_kept_while_they_fit(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_images(str(photos), shots=4)
    plain = ImageDataset(images, "test", make_transform(CONFIG, augment="none"))
    assert plain[0][0] is plain[0][0]
    assert torch.equal(plain[0][0], make_transform(CONFIG, augment="none")(images.image(plain.samples[0])))
    monkeypatch.setattr(tensors, "CACHE_BYTES", 4 * 3 * 32 * 32 * len(plain) - 1)
    full = ImageDataset(images, "test", make_transform(CONFIG, augment="none"))
    assert full[0][0] is not full[0][0]
    augmented = ImageDataset(images, "train", make_transform(CONFIG, augment="light"))
    assert augmented[0][0] is not augmented[0][0]


def test_light_keeps_and_strong_changes_more(photos: Path) -> None:
    light, strong = (str(make_transform(CONFIG, augment=name).steps) for name in ("light", "strong"))
    assert "scale=(0.35, 1.0), ratio=(0.75, 1.3333), interpolation=bicubic" in light
    assert "Flip" not in light
    assert "ColorJitter" in light
    assert "scale=(0.2, 1.0)" in strong
    parts = ("interpolation=bicubic", "RandomHorizontalFlip", "AutoAugment", "ColorJitter", "RandomErasing")
    assert all(part in strong for part in parts)


@pytest.mark.parametrize("augment", ["light", "strong"])
def test_augmentation_works_on_every_draw(photos: Path, augment: str) -> None:
    """timm's RandAugment fails now and then with Pillow 13, in posterize: no choice may reach it."""
    images = open_images(str(photos), shots=4)
    dataset = ImageDataset(images, "train", make_transform(CONFIG, augment=augment))
    for epoch in range(100):
        dataset.set_epoch(epoch)
        assert all(dataset[i][0].isfinite().all() for i in range(0, len(dataset), 3))


def test_the_evaluation_transform_is_timms(photos: Path) -> None:
    import timm.data

    picture = read_image(sorted((photos / "rose").iterdir())[0])
    expected = timm.data.create_transform(**CONFIG, is_training=False)(picture)
    assert torch.equal(make_transform(CONFIG, augment="none")(picture), expected)


def test_epoch_order_is_a_seeded_permutation() -> None:
    assert sorted(epoch_order(100, 0, 0)) == list(range(100))
    assert epoch_order(100, 0, 0) == epoch_order(100, 0, 0)
    assert len({tuple(epoch_order(100, seed, epoch)) for seed in range(5) for epoch in range(5)}) == 25
    assert epoch_order(8, 0, 0) == [1, 2, 7, 4, 6, 3, 0, 5], "runs that are resumed elsewhere depend on this"


def test_an_image_set_can_be_sent_to_worker_processes(photos: Path) -> None:
    images = open_images(str(photos), shots=4)
    dataset = ImageDataset(images, "train", make_transform(CONFIG, augment="light"), seed=3)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[1][0], dataset[1][0])


def test_squash_shows_the_whole_picture() -> None:
    picture = Image.new("RGB", (96, 32), "black")
    picture.paste("white", (0, 0, 16, 32))
    crop, squash = (make_transform(CONFIG, augment="none", squash=squash)(picture) for squash in (False, True))
    assert crop.shape == squash.shape == (3, 32, 32)
    assert crop.max() < -0.9, "the white sixth at the left is cut off"
    assert torch.allclose(squash[:, :, :4], torch.ones(()), atol=0.05)
    assert torch.allclose(squash[:, :, 8:], -torch.ones(()), atol=0.05)
