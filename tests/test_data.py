"""Data: draws are stratified, disjoint and free of file order; images are read rightly once, and bad ones are named."""

import csv
import hashlib
import io
import os
import pickle
import random
import shutil
import struct
import sys
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kadapt_cli import catalog, data, tensors
from kadapt_cli import images as image_files
from kadapt_cli.data import (
    ImageSet,
    manifest_csv,
    merged,
    open_images,
    open_split,
    parse_manifest,
    restore,
)
from kadapt_cli.errors import DataError, KadaptError
from kadapt_cli.images import read_image
from kadapt_cli.tensors import ImageDataset, epoch_order, make_transform

CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 0.9,
    "crop_mode": "center",
}


def paths(images: ImageSet, split: str) -> list[str]:
    return [sample.path for sample in images.splits[split]]


def per_class(images: ImageSet, split: str) -> list[int]:
    counts = Counter(sample.label for sample in images.splits[split])
    return [counts[label] for label in range(len(images.classes))]


def digests(images: ImageSet) -> dict[str, set[str]]:
    return {split: {sample.digest for sample in samples} for split, samples in images.splits.items()}


def refused(call: Callable[[], object], exit_code: int = 3) -> str:
    """The message of a call that must be refused: one line, with the documented exit code."""
    with pytest.raises(KadaptError) as caught:
        call()
    message = str(caught.value)
    assert caught.value.exit_code == exit_code
    assert "\n" not in message
    return message


def save_png(path: Path, image: Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG")
    return path


# --- draws ---


def test_shots_are_stratified_and_disjoint_and_the_rest_is_test(photos: Path) -> None:
    images = open_images(str(photos), shots=6)
    assert images.classes == ("daisy", "rose", "tulip")
    assert per_class(images, "train") == [5, 5, 5]
    assert per_class(images, "val") == [1, 1, 1]
    assert per_class(images, "test") == [6, 4, 2]
    everything = paths(images, "train") + paths(images, "val") + paths(images, "test")
    assert len(everything) == len(set(everything)) == 30
    for samples in images.splits.values():
        assert [sample.path for sample in samples] == sorted(sample.path for sample in samples)
        assert all(images.classes[sample.label] == sample.path.split("/")[0] for sample in samples)


def test_without_shots_a_fifth_of_each_class_is_test_and_a_fifth_of_the_rest_validation(photos: Path) -> None:
    images = open_images(str(photos))
    assert per_class(images, "test") == [2, 2, 2]
    assert per_class(images, "val") == [2, 2, 1]
    assert per_class(images, "train") == [8, 6, 5]


def test_a_sample_has_the_size_and_digest_of_its_file(photos: Path) -> None:
    images = open_images(str(photos), shots=4)
    for samples in images.splits.values():
        for sample in samples:
            content = (photos / sample.path).read_bytes()
            assert (sample.size, sample.digest) == (len(content), hashlib.sha256(content).hexdigest())


def test_draws_do_not_depend_on_the_order_in_which_files_were_made(photos: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for path in sorted((path for path in photos.rglob("*.jpg")), reverse=True):
        target = other / path.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    assert digests(open_images(str(photos), shots=5)) == digests(open_images(str(other), shots=5))


def test_draws_do_not_depend_on_the_order_of_scandir(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_images(str(photos), shots=5).splits
    scandir = os.scandir

    class Reversed:
        def __init__(self, folder: Path) -> None:
            self.entries = list(scandir(folder))[::-1]

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(data.os, "scandir", Reversed)
    assert open_images(str(photos), shots=5).splits == before


def test_a_file_more_in_one_class_leaves_the_draw_of_the_others(photos: Path, tasks: Path) -> None:
    before = open_images(str(photos), shots=5)
    shutil.copy(sorted((tasks / "flowers5" / "rose").iterdir())[100], photos / "rose" / "000_new.jpg")
    after = open_images(str(photos), shots=5)
    for split in ("train", "val", "test"):
        for name in ("daisy", "tulip"):
            assert [p for p in paths(before, split) if p.startswith(name)] == [
                p for p in paths(after, split) if p.startswith(name)
            ]
    assert sum(per_class(after, "test")) == sum(per_class(before, "test")) + 1


def test_seed_decides_the_draw_and_more_shots_contain_fewer(photos: Path) -> None:
    for choice in ({"shots": 5}, {"shots": 5, "val": "none"}, {"val": "none"}):
        first, again, other = (open_images(str(photos), seed=seed, **choice) for seed in (1, 1, 2))
        assert first.splits == again.splits
        assert first.splits["train"] != other.splits["train"]
    few, many = open_images(str(photos), shots=3, val="none"), open_images(str(photos), shots=6, val="none")
    assert set(paths(few, "train")) < set(paths(many, "train"))


def test_validation_is_not_the_head_of_the_draw(photos: Path) -> None:
    """With its own salt: otherwise validation would be the same images whatever the number of shots."""
    chosen = {tuple(paths(open_images(str(photos), shots=shots), "val")) for shots in range(3, 8)}
    assert len(chosen) > 1


def test_val_none_trains_on_all_drawn_images(photos: Path) -> None:
    images = open_images(str(photos), shots=1, val="none")
    assert per_class(images, "train") == [1, 1, 1]
    assert images.splits["val"] == []
    assert per_class(images, "test") == [11, 9, 7]


def test_folders_of_splits_are_used_as_they_are(split_photos: Path) -> None:
    images = open_images(str(split_photos))
    assert [len(images.splits[split]) for split in data.SPLITS] == [24, 9, 12]
    for split in data.SPLITS:
        assert all(path.startswith(f"{split}/") for path in paths(images, split))
    assert images.notes == []


@pytest.mark.parametrize("name", ["validation", "valid"])
def test_other_names_of_val(split_photos: Path, name: str) -> None:
    (split_photos / "val").rename(split_photos / name)
    assert all(path.startswith(f"{name}/") for path in paths(open_images(str(split_photos)), "val"))


def test_shots_from_a_train_folder(split_photos: Path) -> None:
    with_test = open_images(str(split_photos), shots=3)
    assert per_class(with_test, "train") == [3, 3, 3]
    assert per_class(with_test, "test") == [4, 4, 4]
    shutil.rmtree(split_photos / "test")
    shutil.rmtree(split_photos / "val")
    without = open_images(str(split_photos), shots=3)
    assert per_class(without, "train") == [2, 2, 2]
    assert per_class(without, "val") == [1, 1, 1]
    assert per_class(without, "test") == [5, 5, 5]
    no_shots = open_images(str(split_photos))
    assert per_class(no_shots, "test") == [2, 2, 2]


def test_val_none_ignores_a_val_folder_with_a_note(split_photos: Path) -> None:
    images = open_images(str(split_photos), val="none")
    assert images.splits["val"] == []
    assert len(images.splits["train"]) == 24
    assert images.notes == ["val/ was ignored, as validation is off"]


def test_a_class_called_train_is_a_class(photos: Path) -> None:
    (photos / "daisy").rename(photos / "train")
    assert open_images(str(photos), shots=3).classes == ("rose", "train", "tulip")


def test_classes_in_the_order_asked_for(photos: Path) -> None:
    images = open_images(str(photos), shots=3, classes=("tulip", "daisy", "rose"))
    assert all(path.startswith("tulip/") for path in [s.path for s in images.splits["train"] if s.label == 0])


# --- what is met in folders ---


def test_nested_hidden_and_other_files(photos: Path, tasks: Path) -> None:
    clean = open_images(str(photos), shots=4).splits
    some = sorted((tasks / "flowers5" / "rose").iterdir())[90:94]
    (photos / "rose" / "._photo.jpg").write_bytes(b"\0\5\26\7 AppleDouble")
    (photos / ".cache" / "x").mkdir(parents=True)
    (photos / "__MACOSX" / "rose").mkdir(parents=True)
    shutil.copy(some[0], photos / ".cache" / "x" / "1.jpg")
    (photos / "rose" / ".hidden").mkdir()
    shutil.copy(some[0], photos / "rose" / ".hidden" / "1.jpg")
    (photos / "LICENSE.txt").write_text("CC BY 2.0")
    (photos / "rose" / "notes.md").write_text("roses")
    shutil.copy(some[1], photos / "stray.JPG")
    images = open_images(str(photos), shots=4)
    assert images.splits == clean
    assert images.notes == [
        "1 image beside the class folders was ignored (stray.JPG)",
        "2 other files were ignored (LICENSE.txt, rose/notes.md)",
    ]
    (photos / "rose" / "deep" / "er").mkdir(parents=True)
    shutil.copy(some[2], photos / "rose" / "deep" / "er" / "1.jpg")
    nested = open_images(str(photos), shots=4)
    everything = [path for split in data.SPLITS for path in paths(nested, split)]
    assert "rose/deep/er/1.jpg" in everything


def test_symbolic_links_are_followed_to_files_inside_only(photos: Path, tasks: Path) -> None:
    (photos / "rose" / "loop").symlink_to("..")
    (photos / "rose" / "self.jpg").symlink_to("self.jpg")
    (photos / "again").symlink_to(photos)
    (photos / "outside").symlink_to(tasks / "flowers5" / "sunflower")
    (photos / "rose" / "out.jpg").symlink_to(sorted((tasks / "flowers5" / "sunflower").iterdir())[0])
    target = sorted((photos / "daisy").iterdir())[0]
    (photos / "daisy" / "same.jpg").symlink_to(target.name)
    message = refused(lambda: open_images(str(photos), shots=4))
    assert "1 of 32 images cannot be used: rose/self.jpg: " in message
    (photos / "rose" / "self.jpg").unlink()
    images = open_images(str(photos), shots=4)
    assert images.classes == ("daisy", "rose", "tulip")
    assert sum(len(samples) for samples in images.splits.values()) == 31
    assert images.notes[0] == (
        "4 symbolic links to folders or out of the data folder were not followed "
        "(again, outside, rose/loop, rose/out.jpg)"
    )


def test_root_may_be_a_link_and_relative(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(photos)
    expected = open_images(str(photos), shots=4).splits
    monkeypatch.chdir(tmp_path)
    assert open_images("link", shots=4).splits == expected
    monkeypatch.chdir(photos)
    here = open_images(".", shots=4, cache_bytes=0)
    monkeypatch.chdir(tmp_path)
    assert here.splits == expected
    assert here.name == "photos"
    assert here.image(here.splits["train"][0]).mode == "RGB"


def test_the_same_picture_in_train_and_test_is_noted(split_photos: Path) -> None:
    twin = sorted((split_photos / "train" / "rose").iterdir())[0]
    shutil.copy(twin, split_photos / "test" / "rose" / "twin.jpg")
    assert open_images(str(split_photos)).notes == [
        f"1 of 13 test images are training images too (test/rose/twin.jpg = train/rose/{twin.name})"
    ]


def test_classes_that_a_split_lacks_and_an_empty_test_are_noted(split_photos: Path, photos: Path) -> None:
    shutil.rmtree(split_photos / "val" / "rose")
    assert open_images(str(split_photos)).notes == ["no val images of class rose"]
    for path in list(photos.rglob("*.jpg")):
        if path not in sorted(path.parent.iterdir())[:3]:
            path.unlink()
    assert "no images are left for test" in open_images(str(photos), shots=3).notes


def test_folders_beside_train_are_noted(split_photos: Path) -> None:
    (split_photos / "extra" / "rose").mkdir(parents=True)
    (split_photos / "readme.txt").write_text("x")
    assert open_images(str(split_photos)).notes == [
        "1 folder beside train/ was ignored (extra)",
        "1 other file was ignored (readme.txt)",
    ]


# --- bad input ---


def test_not_a_folder(tmp_path: Path) -> None:
    assert "nowhere: not a folder; give a folder with" in refused(lambda: open_images(str(tmp_path / "nowhere")))
    (tmp_path / "photos.zip").write_bytes(b"PK")
    assert "photos.zip: a file; unpack it first;" in refused(lambda: open_images(str(tmp_path / "photos.zip")))


def test_no_class_one_class_empty_class(copy_photos: Callable[..., Path], tmp_path: Path, tasks: Path) -> None:
    (tmp_path / "none").mkdir()
    assert "none: no class folders; put the images" in refused(lambda: open_images(str(tmp_path / "none")))
    flat = tmp_path / "flat"
    shutil.copytree(tasks / "sign_digits" / "0", flat)
    assert "flat: no class folders" in refused(lambda: open_images(str(flat)))
    one = copy_photos(tmp_path / "one", {"rose": 5})
    message = refused(lambda: open_images(str(one)))
    assert message.endswith("one: two classes or more were expected, rose is the only one")
    for name in ("a", "b", "c", "d", "e", "f"):
        (one / name).mkdir()
    (one / "a" / "notes.txt").write_text("no image")
    message = refused(lambda: open_images(str(one)))
    assert message.endswith("one: no images in class a, b, c, d, e and 1 more; add images or remove the folder")


def test_a_folder_of_links_says_so(photos: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    for path in photos.rglob("*.jpg"):
        (linked / path.parent.name).mkdir(parents=True, exist_ok=True)
        (linked / path.parent.name / path.name).symlink_to(path)
    assert refused(lambda: open_images(str(linked))).endswith("; 30 symbolic links were not followed")


def test_fewer_images_than_shots(photos: Path) -> None:
    message = refused(lambda: open_images(str(photos), shots=11))
    assert message.endswith(
        "photos: 11 shots need 11 usable images a class or more, too few in rose (10), tulip (8); "
        "add images or lower --shots"
    )
    for path in sorted((photos / "tulip").iterdir())[2:]:
        path.unlink()
    message = refused(lambda: open_images(str(photos)))
    assert message.endswith("photos: the splits need 3 usable images a class or more, too few in tulip (2); add images")


def test_wrong_choices_are_usage_errors(photos: Path) -> None:
    assert "pass --val none" in refused(lambda: open_images(str(photos), shots=1), exit_code=2)
    assert "1 or more was expected, 0 given" in refused(lambda: open_images(str(photos), shots=0), exit_code=2)
    wrong = refused(lambda: open_images(str(photos), val="some"), exit_code=2)
    assert "'auto', 'drawn' or 'none' was expected" in wrong
    assert "'weak' given" in refused(lambda: make_transform(CONFIG, augment="weak"), exit_code=2)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_train_lacks(split_photos: Path, split: str) -> None:
    (split_photos / split / "daisy").rename(split_photos / split / "ant")
    message = refused(lambda: open_images(str(split_photos)))
    expected = f"{split}: has class ant that training lacks (it has daisy, rose, tulip); rename or remove it"
    assert message.endswith(expected)


def test_splits_without_train(split_photos: Path) -> None:
    shutil.rmtree(split_photos / "train")
    assert "has val/, test/ but no folder train/" in refused(lambda: open_images(str(split_photos)))


def spoil(folder: Path, photo: Path) -> dict[str, str]:
    """Write one file of every kind that must be refused; file name -> what the message must say of it."""
    content = photo.read_bytes()
    base = Image.open(photo).convert("RGB")
    reasons = {
        "a_empty.jpg": "the file is empty",
        "b_text.jpg": "not an image of a known format",
        "c_truncated.jpg": "truncated",
        "d_short.png": "truncated",
        "e_animated.gif": "animated or of several pages (3 frames)",
        "f_animated.webp": "animated or of several pages (3 frames)",
        "g_animated.png": "animated or of several pages (3 frames)",
        "h_pages.tiff": "animated or of several pages (3 frames)",
        "i_huge.png": "9500 x 9500 is more than 89,478,485 pixels",
        "j_bomb.png": "could be decompression bomb",
        "k_thin.png": "one side of 1 x 10000 is more than 200 times the other",
        "l_phone.heic": "not an image of a known format",
        "m_float.tiff": "outside 0 to 1.0",
        "n_nan.tiff": "outside 0 to 1.0",
        "o_zeros.bmp": "not an image of a known format",
    }
    (folder / "a_empty.jpg").write_bytes(b"")
    (folder / "b_text.jpg").write_text("this is no picture")
    (folder / "c_truncated.jpg").write_bytes(content[: len(content) * 2 // 3])
    png = io.BytesIO()
    base.save(png, "PNG")
    (folder / "d_short.png").write_bytes(png.getvalue()[: len(png.getvalue()) // 2])
    frames = [base.rotate(90), base.rotate(180)]
    for name, fmt in (("e_animated.gif", "GIF"), ("f_animated.webp", "WEBP"), ("g_animated.png", "PNG")):
        base.save(folder / name, fmt, save_all=True, append_images=frames)
    base.save(folder / "h_pages.tiff", "TIFF", save_all=True, append_images=frames)
    Image.new("1", (9500, 9500)).save(folder / "i_huge.png")
    # A header that claims 60,000 x 60,000 pixels: nothing may be decoded to find that out.
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (folder / "j_bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + png.getvalue()[33:])
    Image.new("L", (1, 10000)).save(folder / "k_thin.png")
    (folder / "l_phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    Image.fromarray(np.full((4, 4), 3.5, np.float32)).save(folder / "m_float.tiff")
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(folder / "n_nan.tiff")
    (folder / "o_zeros.bmp").write_bytes(bytes(1000))
    return reasons


def test_bad_images_are_refused_by_name_at_most_five(photos: Path) -> None:
    good = open_images(str(photos), shots=4)
    reasons = spoil(photos / "rose", sorted((photos / "rose").iterdir())[0])
    message = refused(lambda: open_images(str(photos), shots=4))
    assert "photos: 15 of 45 images cannot be used: rose/" in message
    assert message.count("rose/") == 5
    assert " and 10 more; mend or remove them, or pass --skip-bad" in message
    skipping = open_images(str(photos), shots=4, skip_bad=True)
    assert skipping.splits == good.splits
    assert skipping.notes[0].startswith("15 of 45 images were left out: rose/")
    for name, reason in reasons.items():
        message = refused(lambda name=name: read_image(photos / "rose" / name))
        assert message.startswith(f"{photos / 'rose' / name}: "), name
        assert reason in message, name


def test_left_out_images_do_not_cost_shots(photos: Path) -> None:
    """The draw is made again from the good images: the same as if the bad ones had never been there."""
    drawn = open_images(str(photos), shots=4, val="none")
    for path in paths(drawn, "train")[::2]:
        (photos / path).write_bytes(b"damaged")
    kept = open_images(str(photos), shots=4, val="none", skip_bad=True)
    assert per_class(kept, "train") == [4, 4, 4]
    for path in paths(drawn, "train")[::2]:
        (photos / path).unlink()
    assert open_images(str(photos), shots=4, val="none").splits == kept.splits


def test_a_class_of_bad_images_only_is_refused_even_when_they_are_left_out(photos: Path) -> None:
    for path in (photos / "tulip").iterdir():
        path.write_bytes(b"damaged")
    message = refused(lambda: open_images(str(photos), shots=4, skip_bad=True))
    assert "4 shots need 4 usable images a class or more, too few in tulip (0)" in message


@pytest.mark.parametrize("part", range(10))
def test_truncated_photos_are_refused_at_every_length(photos: Path, part: int) -> None:
    content = sorted((photos / "rose").iterdir())[0].read_bytes()
    with pytest.raises(DataError):
        image_files.decode_image(content[: len(content) * part // 10], "cut.jpg")


@pytest.mark.parametrize("kind", image_files.FORMATS)
def test_whatever_byte_is_damaged_the_result_is_rgb_or_a_data_error(kind: str) -> None:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (9, 8, 7)).save(out, kind)
    refusals = 0
    for place in range(min(400, len(out.getvalue()))):
        for value in (0, 1, 2, 255):
            content = bytearray(out.getvalue())
            content[place] = value
            with image_files.quiet_decoder():
                try:
                    assert image_files.decode_image(bytes(content), "x").mode == "RGB"
                except DataError:
                    refusals += 1
    assert refusals > 20


def test_unreadable_names_are_refused(photos: Path, tasks: Path) -> None:
    some = sorted((tasks / "flowers5" / "rose").iterdir())[0]
    name = os.fsencode(photos / "rose") + b"/caf\xe9.jpg"
    shutil.copy(os.fsencode(some), name)
    message = refused(lambda: open_images(str(photos), shots=4))
    assert r"1 of 31 images cannot be used: b'rose/caf\xe9.jpg': the name is not valid UTF-8" in message
    assert len(open_images(str(photos), shots=4, skip_bad=True).splits["test"]) == 18
    os.remove(name)
    os.rename(os.fsencode(photos / "rose"), os.fsencode(photos) + b"/ros\xe9")
    assert r"b'ros\xe9' is not valid UTF-8; rename the folder" in refused(lambda: open_images(str(photos), shots=4))


def test_a_message_stays_in_one_line_whatever_the_names(photos: Path) -> None:
    (photos / "rose" / "line\nbreak {}.jpg").write_bytes(b"damaged")
    message = refused(lambda: open_images(str(photos), shots=4))
    assert r"1 of 31 images cannot be used: 'rose/line\nbreak {}.jpg': not an image" in message


def test_a_file_that_may_not_be_read_is_named(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = sorted((photos / "rose").iterdir())[2]
    read = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == locked.name:
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    message = refused(lambda: open_images(str(photos), shots=4))
    assert f"1 of 30 images cannot be used: rose/{locked.name}: cannot be read (Permission denied);" in message


def test_pipes_are_not_opened(photos: Path) -> None:
    os.mkfifo(photos / "rose" / "pipe.jpg")
    assert open_images(str(photos), shots=4).notes == ["1 other file was ignored (rose/pipe.jpg)"]
    assert "no such file" in refused(lambda: read_image(photos / "rose" / "pipe.jpg"))


# --- conversions ---


def test_sixteen_bit_grey_is_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 40000], [65535, 257]], np.uint16)
    for name in ("grey.png", "grey.tiff"):
        Image.fromarray(values).save(tmp_path / name)
        assert np.asarray(read_image(tmp_path / name))[..., 0].tolist() == [[0, 156], [255, 1]]
    (tmp_path / "grey.pgm").write_bytes(b"P5\n2 2\n65535\n" + values.astype(">u2").tobytes())
    assert np.asarray(read_image(tmp_path / "grey.pgm"))[..., 0].tolist() == [[0, 156], [255, 1]]


def test_floating_point_grey_is_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 0.25], [0.5, 1.0]], np.float32)).save(tmp_path / "grey.tiff")
    assert np.asarray(read_image(tmp_path / "grey.tiff"))[..., 2].tolist() == [[0, 64], [128, 255]]


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 255, 51)):
        rgba.putpixel((x, 0), (10, 0, 250, alpha))
    expected = [(255, 255, 255), (10, 0, 250), (206, 204, 254)]
    image = read_image(save_png(tmp_path / "rgba.png", rgba))
    assert [image.getpixel((x, 0)) for x in range(3)] == expected
    grey = Image.new("LA", (2, 1), (0, 0))
    grey.putpixel((1, 0), (100, 255))
    image = read_image(save_png(tmp_path / "la.png", grey))
    assert [image.getpixel((x, 0)) for x in range(2)] == [(255,) * 3, (100,) * 3]
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 10, 20, 1, 2, 3])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = 0
    image = read_image(save_png(tmp_path / "p.png", palette))
    assert [image.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (1, 2, 3)]


def test_cmyk_palette_grey_and_one_bit(tmp_path: Path, tasks: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    red, green, blue = read_image(tmp_path / "cmyk.jpg").getpixel((8, 8))
    assert (red > 250, green < 5, blue < 5) == (True, True, True)
    palette = Image.new("P", (1, 1))
    palette.putpalette([200, 10, 20])
    assert read_image(save_png(tmp_path / "p.png", palette)).getpixel((0, 0)) == (200, 10, 20)
    grey = Image.new("L", (1, 1), 77)
    assert read_image(save_png(tmp_path / "l.png", grey)).getpixel((0, 0)) == (77, 77, 77)
    character = sorted((tasks / "omniglot50" / "angelic-character02").iterdir())[0]
    assert Image.open(character).mode == "1"
    assert {color for _, color in read_image(character).getcolors()} == {(0, 0, 0), (255, 255, 255)}


@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, (0, 0)), (2, (1, 0)), (3, (1, 1)), (4, (0, 1)), (5, (0, 0)), (6, (1, 0)), (7, (1, 1)), (8, (0, 1))],
)
def test_exif_orientation_moves_the_corner(tmp_path: Path, orientation: int, corner: tuple[int, int]) -> None:
    """A red upper left corner of a 48 x 32 picture; `corner` is where a viewer shows it."""
    picture = Image.new("RGB", (48, 32), "blue")
    picture.paste("red", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "turned.jpg", quality=95, exif=exif)
    image = read_image(tmp_path / "turned.jpg")
    assert image.size == ((48, 32) if orientation < 5 else (32, 48))
    x, y = (4 if place == 0 else side - 4 for place, side in zip(corner, image.size, strict=True))
    assert image.getpixel((x, y))[0] > 200
    assert image.getexif().get(0x0112) is None


def test_the_first_picture_of_an_mpo_is_read(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    first.save(tmp_path / "two.mpo", "MPO", save_all=True, append_images=[second])
    assert Image.open(tmp_path / "two.mpo").n_frames == 2
    assert read_image(tmp_path / "two.mpo").getpixel((8, 8))[0] > 250


def test_format_is_that_of_the_content_not_of_the_name(tmp_path: Path) -> None:
    assert (
        read_image(save_png(tmp_path / "really_png.jpg", Image.new("RGB", (2, 2), "lime"))).getpixel((0, 0))[1] == 255
    )


def test_formats_that_are_not_listed_are_refused(tmp_path: Path) -> None:
    """Pillow would open it; the fewer decoders see a stranger's files, the better."""
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.jpg", "TGA")
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.ico")
    for name in ("picture.jpg", "picture.ico"):
        assert "not an image of a known format" in refused(lambda name=name: read_image(tmp_path / name))


# --- reading once ---


def test_images_that_fit_are_decoded_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    decode = data.decode_image

    def counting(content: bytes, name: str) -> Image.Image:
        calls[name] += 1
        return decode(content, name)

    monkeypatch.setattr(data, "decode_image", counting)
    (photos / "rose" / "bad.jpg").write_bytes(b"damaged")
    images = open_images(str(photos), shots=4, skip_bad=True)
    for split in data.SPLITS:
        dataset = ImageDataset(images, split, make_transform(CONFIG, augment="light"))
        for epoch in range(2):
            dataset.set_epoch(epoch)
            _ = [dataset[index] for index in range(len(dataset))]
    assert len(calls) == 31
    assert set(calls.values()) == {1}


def test_the_cache_stays_within_its_bytes_and_gives_the_same_pixels(photos: Path) -> None:
    whole = open_images(str(photos), shots=4)
    sizes = [3 * image.width * image.height for image in whole.cache.values()]
    partly = open_images(str(photos), shots=4, cache_bytes=sum(sizes) // 2)
    assert 0 < len(partly.cache) < 30
    assert sum(3 * image.width * image.height for image in partly.cache.values()) <= sum(sizes) // 2
    assert partly.splits == whole.splits
    for sample in whole.splits["test"]:
        assert partly.image(sample).tobytes() == whole.image(sample).tobytes()


def test_a_file_that_changes_after_the_check_is_refused(photos: Path) -> None:
    images = open_images(str(photos), shots=4, cache_bytes=0)
    sample = images.splits["train"][0]
    images.image(sample)
    shutil.copy(photos / images.splits["train"][1].path, photos / sample.path)
    assert f"{sample.path} has changed since it was checked" in refused(lambda: images.image(sample))
    (photos / sample.path).unlink()
    assert refused(lambda: images.image(sample)) == f"{sample.path}: no such file"


def test_an_image_set_can_be_sent_to_worker_processes(photos: Path) -> None:
    images = open_images(str(photos), shots=4)
    dataset = ImageDataset(images, "train", make_transform(CONFIG, augment="light"), seed=3)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[1][0], dataset[1][0])


# --- tensors ---


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


# --- the manifest, and opening a run's data again ---


def test_manifest_survives_awkward_names(photos: Path) -> None:
    awkward = 'ro,se "new"\r\n line 🌹 =1+1'
    (photos / "rose").rename(photos / awkward)
    first = sorted((photos / "daisy").iterdir())[0]
    first.rename(first.with_name('a, "b"\n🌼.jpg'))
    images = open_images(str(photos), shots=4)
    text = manifest_csv(images)
    assert text.splitlines()[0] == "path,label,split,bytes,sha256"
    assert parse_manifest(text, images.classes) == images.splits
    assert restore(str(photos), parse_manifest(text, images.classes), images.classes).splits == images.splits


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "line 0 cannot be used (the columns path,label,split,bytes,sha256 were expected)"),
        ("path,label\n", "line 1 cannot be used"),
        ("path,label,split,bytes,sha256\na.jpg,rose,train\n", "line 2 cannot be used"),
        ("path,label,split,bytes,sha256\na.jpg,ant,train,1,ab\n", "line 2 cannot be used ('ant')"),
        ("path,label,split,bytes,sha256\na.jpg,rose,tests,1,ab\n", "line 2 cannot be used ('tests')"),
        ("path,label,split,bytes,sha256\na.jpg,rose,test,one,ab\n", "line 2 cannot be used"),
        ("path,label,split,bytes,sha256\n../a.jpg,rose,test,1,ab\n", "'../a.jpg' leaves the data folder"),
        ("path,label,split,bytes,sha256\n/etc/a.jpg,rose,test,1,ab\n", "'/etc/a.jpg' leaves the data folder"),
        ('path,label,split,bytes,sha256\n"a.jpg,rose,test,1,ab\n', "cannot be used"),
    ],
)
def test_a_damaged_manifest_is_refused(text: str, reason: str) -> None:
    assert reason in refused(lambda: parse_manifest(text, ("rose", "tulip")))


def test_restore_gives_the_same_images_and_notices_a_changed_byte(photos: Path) -> None:
    images = open_images(str(photos), shots=4)
    manifest = parse_manifest(manifest_csv(images), images.classes)
    again = restore(str(photos), manifest, images.classes)
    assert (again.splits, again.classes, again.name) == (images.splits, images.classes, images.name)
    sample = images.splits["test"][3]
    assert again.image(sample).tobytes() == images.image(sample).tobytes()
    content = bytearray((photos / sample.path).read_bytes())
    content[-30] ^= 1
    (photos / sample.path).write_bytes(content)
    message = refused(lambda: restore(str(photos), manifest, images.classes))
    assert f"photos: 1 of 30 images of the run are missing or changed: {sample.path}: " in message
    for other in images.splits["train"]:
        (photos / other.path).unlink()
    message = refused(lambda: restore(str(photos), manifest, images.classes))
    assert "10 of 30 images of the run are missing or changed: " in message
    assert message.count(".jpg: ") == 5
    assert " and 5 more; put the original files back" in message


def test_restore_notices_a_longer_file(photos: Path) -> None:
    images = open_images(str(photos), shots=4)
    path = photos / images.splits["val"][0].path
    path.write_bytes(path.read_bytes() + b"\0")
    assert f"{images.splits['val'][0].path}: changed" in refused(
        lambda: restore(str(photos), images.splits, images.classes)
    )


def test_open_split_uses_every_image_with_the_runs_classes(photos: Path, split_photos: Path) -> None:
    classes = ("tulip", "poppy", "rose", "daisy")
    plain = open_split(str(photos), "test", classes)
    assert (len(plain.splits["test"]), plain.splits["train"], plain.splits["val"]) == (30, [], [])
    assert per_class(plain, "test") == [8, 0, 10, 12]
    assert plain.notes == ["no test images of class poppy"]
    for split, count in (("train", 24), ("val", 9), ("test", 12)):
        assert len(open_split(str(split_photos), split, classes).splits[split]) == count
    shutil.rmtree(split_photos / "train")
    assert len(open_split(str(split_photos), "test", classes).splits["test"]) == 12
    shutil.rmtree(split_photos / "test")
    assert "has no test split, only val" in refused(lambda: open_split(str(split_photos), "test", classes))
    message = refused(lambda: open_split(str(photos), "test", ("daisy", "rose")))
    assert message.endswith("photos: has class tulip that training lacks (it has daisy, rose); rename or remove it")


def test_open_split_can_leave_out_bad_images(photos: Path) -> None:
    (photos / "rose" / "bad.jpg").write_bytes(b"bad")
    assert "1 of 31 images cannot be used" in refused(
        lambda: open_split(str(photos), "test", ("daisy", "rose", "tulip"))
    )
    images = open_split(str(photos), "test", ("daisy", "rose", "tulip"), skip_bad=True)
    assert len(images.splits["test"]) == 30


# --- named sets ---


def test_demo_is_ten_shots_of_the_digits() -> None:
    images = open_images("demo")
    assert (images.name, images.root, images.classes) == ("demo", None, tuple("0123456789"))
    assert per_class(images, "train") == [8] * 10
    assert per_class(images, "val") == [2] * 10
    assert len(images.splits["test"]) == 1797 - 100
    from sklearn.datasets import load_digits

    digits = load_digits()
    for sample in images.splits["train"]:
        number = int(sample.path.removeprefix("demo/"))
        assert sample.label == digits.target[number]
        pixels = np.asarray(images.image(sample))
        assert np.array_equal(pixels[..., 0], np.rint(digits.images[number] * 255 / 16))
        assert (sample.size, sample.digest) == (192, hashlib.sha256(pixels.tobytes()).hexdigest())
    assert len(open_images("demo", shots=3).splits["train"]) == 20
    manifest = parse_manifest(manifest_csv(images), images.classes)
    assert restore("demo", manifest, images.classes).splits == images.splits
    assert len(open_split("demo", "test", images.classes).splits["test"]) == 1797


def write_idx(path: Path, values: np.ndarray) -> None:
    """The file layout of MNIST: two zero bytes, type 8, the number of dimensions, the dimensions, the bytes."""
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


@pytest.fixture
def mnist(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MNIST in miniature, 80 train and 30 test pictures, made from photos of hands that show digits."""
    raw = tmp_path / "sets" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, start, count in (("train", 0, 8), ("t10k", 8, 3)):
        hands = [
            path
            for digit in range(10)
            for path in sorted((tasks / "sign_digits" / str(digit)).iterdir())[start:][:count]
        ]
        pixels = np.stack([np.asarray(Image.open(path).convert("L").resize((28, 28))) for path in hands])
        write_idx(raw / f"{part}-images-idx3-ubyte", pixels)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.array([int(path.parent.name) for path in hands]))
    monkeypatch.setenv("KADAPT_DATA", str(tmp_path / "sets"))
    return raw


def test_a_named_set_through_timm(mnist: Path) -> None:
    images = open_images("torch/mnist", shots=5)
    assert (images.name, images.root, images.classes[3]) == ("mnist", None, "3 - three")
    assert per_class(images, "train") == [4] * 10
    assert per_class(images, "val") == [1] * 10
    assert per_class(images, "test") == [3] * 10, "the test part of the set, not what the draw leaves"
    assert images.splits["test"][0].path.startswith("torch/mnist/test/")
    stored = np.frombuffer((mnist / "train-images-idx3-ubyte").read_bytes()[16:], np.uint8).reshape(-1, 28, 28)
    for sample in images.splits["train"]:
        number = int(sample.path.removeprefix("torch/mnist/train/"))
        assert sample.label == number // 8
        assert np.array_equal(np.asarray(images.image(sample))[..., 1], stored[number])
    small = open_images("torch/mnist", shots=5, cache_bytes=0)
    assert small.cache == {}
    assert small.image(small.splits["train"][0]).tobytes() == images.image(images.splits["train"][0]).tobytes()


def test_a_named_set_can_be_restored_and_opened_by_split(mnist: Path) -> None:
    images = open_images("torch/mnist", shots=5)
    manifest = parse_manifest(manifest_csv(images), images.classes)
    assert restore("torch/mnist", manifest, images.classes).splits == images.splits
    assert len(open_split("torch/mnist", "train", images.classes).splits["train"]) == 80
    assert "has no val split, only train, test" in refused(lambda: open_split("torch/mnist", "val", images.classes))
    assert "not those of the run (rose, tulip)" in refused(lambda: open_split("torch/mnist", "test", ("rose", "tulip")))
    content = bytearray((mnist / "t10k-images-idx3-ubyte").read_bytes())
    content[20] ^= 1
    (mnist / "t10k-images-idx3-ubyte").write_bytes(content)
    assert "1 of 80 images of the run are missing or changed: torch/mnist/test/0: changed" in refused(
        lambda: restore("torch/mnist", manifest, images.classes)
    )


def test_a_set_that_cannot_be_had_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KADAPT_DATA", str(tmp_path))
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # urllib keeps the proxies of its first request for good
    message = refused(lambda: open_images("torch/kmnist"))
    assert message.startswith(f"torch/kmnist: could not be opened under {tmp_path} (")
    assert "set KADAPT_DATA" in message
    assert "Unknown torchvision dataset nonsense" in refused(lambda: open_images("torch/nonsense"))
    assert "given by its own path" in refused(lambda: open_images("torch/image_folder"))


class Pictures(list[tuple[Image.Image, int]]):
    """What a reader gives: pictures with labels, and perhaps class names."""

    classes: list[object]


def pictures(labels: list[int], classes: list[object]) -> Pictures:
    made = Pictures((Image.new("RGB", (8, 8), (place, 0, 0)), label) for place, label in enumerate(labels))
    made.classes = classes
    return made


def test_a_test_split_without_labels_is_replaced_by_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub sets of competitions carry -1 as the label of every test image."""
    splits = {
        "train": pictures([0, 0, 1, 1], ["cat", "dog"]),
        "validation": pictures([1, 0, 1], ["cat", "dog"]),
        "test": pictures([-1, -1], ["cat", "dog"]),
    }
    monkeypatch.setattr(catalog, "_create", lambda source, split: splits[split])
    images = open_images("hfds/org/Pets")
    assert (images.name, images.classes) == ("pets", ("cat", "dog"))
    assert paths(images, "test") == ["hfds/org/Pets/val/0", "hfds/org/Pets/val/1", "hfds/org/Pets/val/2"]
    assert len(images.splits["val"]) == 2
    assert images.notes[0] == "the test split has labels that are no class (-1) and was ignored"
    splits["train"][0] = (splits["train"][0][0], 7)
    assert "label 7 has no class name" in refused(lambda: open_images("hfds/org/Pets"))


def test_val_none_also_leaves_out_the_validation_of_a_named_set(monkeypatch: pytest.MonkeyPatch) -> None:
    made = pictures([0, 0, 0, 1, 1, 1], ["cat", "dog"])
    monkeypatch.setattr(catalog, "_create", lambda source, split: made)
    sizes = {
        val: [len(open_images("hfds/pets", val=val).splits[split]) for split in data.SPLITS] for val in ("auto", "none")
    }
    assert sizes == {"auto": [6, 6, 6], "none": [6, 0, 6]}


def test_class_names_of_named_sets_are_texts_and_unique(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[object] = [("tench", "Tinca tinca"), "crane", "crane"]
    monkeypatch.setattr(catalog, "_create", lambda source, split: pictures([0, 1, 2] * 3, names))
    assert open_images("torch/imagenet").classes == ("tench, Tinca tinca", "crane (1)", "crane (2)")
    monkeypatch.setattr(catalog, "_create", lambda source, split: pictures([20, 5] * 3, []))
    images = open_images("torch/imagenet")
    assert images.classes == ("5", "20")
    assert {sample.label for sample in images.splits["train"] if int(sample.path[-1]) % 2 == 0} == {1}


def test_a_stream_has_to_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"train": pictures([0, 1] * 3, ["cat", "dog"])}
    monkeypatch.setattr(catalog, "_create", lambda source, split: made[split])
    assert len(open_images("wds/pets", cache_bytes=6 * 192).splits["train"]) == 2
    assert "a streamed set has to fit in 0 MiB of memory" in refused(
        lambda: open_images("wds/pets", cache_bytes=6 * 192 - 1)
    )


def test_a_bad_image_in_a_named_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = pictures([0, 0, 0, 1, 1, 1, 1], ["cat", "dog"])
    made[3] = (io.BytesIO(b"damaged"), 1)  # type: ignore[assignment]
    monkeypatch.setattr(catalog, "_create", lambda source, split: made)
    message = refused(lambda: open_images("torch/imagenet"))
    assert "cannot be used: torch/imagenet/train/3: not an image of a known format" in message
    assert per_class(open_images("torch/imagenet", val="none", skip_bad=True), "train") == [3, 3]


def test_a_hub_set_is_read_by_its_own_reader(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="needs the extra 'hf'")
    monkeypatch.setenv("KADAPT_DATA", str(tmp_path / "sets"))
    images = open_images(f"hfds/{photos}", shots=5)
    assert images.classes == ("daisy", "rose", "tulip")
    assert (len(images.splits["train"]), len(images.splits["val"]), len(images.splits["test"])) == (12, 3, 15)
    first = images.splits["train"][0]
    original = {read_image(path).tobytes(): path.parent.name for path in photos.rglob("*.jpg")}
    assert original[images.image(first).tobytes()] == images.classes[first.label]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    assert "datasets" in refused(lambda: open_images("hfds/beans"))


def test_where_sets_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KADAPT_DATA", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert catalog.data_root() == Path("/a")
    monkeypatch.delenv("KADAPT_DATA")
    assert catalog.data_root() == Path("/b/kadapt/data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert catalog.data_root() == Path.home() / ".cache/kadapt/data"


# --- multi-label sets, and what else a named set brings ---

VOC = ("aeroplane", "bird", "cat", "dog")


def voc(seed: int, split: str = "train") -> list[tuple[str, tuple[int, ...]]]:
    """Rows of an invented multi-label set: about every second image shows dog, few show aeroplane, some show none."""
    draws = np.random.default_rng(seed).random((80, 4)) < (0.1, 0.2, 0.3, 0.5)
    return [(f"voc/{split}/{number}", tuple(np.flatnonzero(row).tolist())) for number, row in enumerate(draws)]


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Callable[..., catalog.NamedSet]:
    """named({"train": rows}, **fields) makes "torch/voc" a multi-label set of these rows, each picture another."""

    def make(entries: dict[str, list[tuple[str, tuple[int, ...]]]], **fields: object) -> catalog.NamedSet:
        table = [(Image.new("RGB", (4, 2), (number, 0, 0)), 0) for number in range(256)]
        tables = {f"voc/{split}": table for split in data.SPLITS}
        chosen = {"classes": VOC, "metric": "11point_mAP", "templates": ("a {}.",), "squash": True} | fields
        made = catalog.NamedSet(name="voc", entries=entries, tables=tables, **chosen)  # type: ignore[arg-type]
        monkeypatch.setattr(data, "open_named", lambda source, cache_bytes: made)
        return made

    return make


def test_the_draw_of_a_multi_label_set_is_greedy_in_the_order_of_the_hash(named: Callable[..., object]) -> None:
    for seed in range(20):
        rows = voc(seed)
        named({"train": rows})
        images = open_images("torch/voc", shots=3, seed=seed, val="none")
        expected, counts = set(), Counter[int]()
        for path, labels in sorted(rows, key=lambda row: hashlib.sha256(f"{seed}:{row[0]}".encode()).digest()):
            if any(counts[label] < 3 for label in labels):
                expected.add(path)
                counts.update(labels)
        assert set(paths(images, "train")) == expected
        assert min(counts.values()) >= 3
        assert set(paths(images, "test")) == {path for path, _ in rows} - expected
        span = f"which have {min(counts.values())} to {max(counts.values())} each"
        assert f"roughly 3 shots: an image counts for all its classes, {span}" in images.notes
        named({"train": rows[::-1]})
        assert open_images("torch/voc", shots=3, seed=seed, val="none").splits == images.splits


def test_test_and_validation_of_a_multi_label_set_leave_every_class_to_train_on(named: Callable[..., object]) -> None:
    """A fifth of each class or a little more, but not all of one whose images also show others that are wanted."""
    rows = [(f"voc/train/{n}", labels) for n, labels in enumerate([(0, 1), (0, 2), (0, 3), *[(1,), (2,), (3,)] * 2])]
    sizes = []
    for seed in range(40):
        for entries, shots in (({"train": rows}, None), ({"train": rows, "test": voc(0, "test")}, 3)):
            named(entries)
            images = open_images("torch/voc", shots=shots, seed=seed)
            assert {label for sample in images.splits["train"] for label in sample.labels} == {0, 1, 2, 3}
        named({"train": voc(seed), "test": voc(0, "test")})
        images = open_images("torch/voc", seed=seed)
        sizes.append(len(images.splits["val"]))
        assert all(sample.labels for sample in images.splits["val"])
    assert 0.15 * 80 < np.mean(sizes) < 0.3 * 80


def test_multi_label_samples_are_vectors_of_zeros_and_ones(named: Callable[..., object]) -> None:
    rows = [("voc/train/0", (3, 1)), ("voc/train/1", ()), ("voc/train/2", (2,)), ("voc/train/3", (0, 1, 2, 3))]
    named({"train": rows, "test": [("voc/test/9", (3,)), ("voc/test/8", (0, 2))]})
    images = open_images("torch/voc", val="none")
    assert "no test images of class bird" in images.notes
    assert [sample.labels for sample in images.splits["train"]] == [(1, 3), (), (2,), (0, 1, 2, 3)]
    assert images.splits["train"][1].label == -1
    dataset = ImageDataset(images, "train", make_transform(CONFIG, augment="none"))
    for _ in range(2):
        _, labels = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4)))
        assert labels.dtype == torch.float32
        assert labels.tolist() == [[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]]


def test_the_manifest_gives_back_any_name_and_holds_no_formula(photos: Path) -> None:
    names = ["a\rb", "line\nbreak", "=1+1", "'=1", "+x", "-x", "@SUM(A1)", '"', "a,b"]
    for number, name in enumerate(names):
        (photos / name).mkdir()
        for copy in range(3):
            picture = Image.new("RGB", (9, 9), (number, copy, 0))
            picture.save(photos / name / f"{name}{copy}.png")
    images = open_images(str(photos))
    text = manifest_csv(images)
    assert parse_manifest(text, images.classes) == images.splits
    cells = [cell for row in csv.reader(io.StringIO(text, newline="")) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]


def test_the_manifest_of_a_multi_label_set(named: Callable[..., object], photos: Path) -> None:
    named({"train": voc(0), "test": voc(1, "test")})
    images = open_images("torch/voc", shots=3)
    text = manifest_csv(images)
    assert {"", "dog", "cat|dog"} <= {line.split(",")[1] for line in text.splitlines()}
    assert parse_manifest(text, images.classes) == images.splits
    assert restore("torch/voc", parse_manifest(text, images.classes), images.classes).splits == images.splits
    assert "('ant')" in refused(lambda: parse_manifest(text.replace("cat|dog", "cat|ant"), images.classes))
    named({"train": voc(0)}, classes=("a|b", "c", "d", "e"))
    assert "class names without '|' were expected of a multi-label set, a|b given" in refused(
        lambda: open_images("torch/voc")
    )
    (photos / "rose").rename(photos / "daisy|tulip")
    single = open_images(str(photos), shots=4)
    assert parse_manifest(manifest_csv(single), single.classes) == single.splits
    manifest = parse_manifest(manifest_csv(single).replace(",tulip,", ",tulip|daisy,"), single.classes)
    message = refused(lambda: restore(str(photos), manifest, single.classes))
    assert "was expected to have one class, 2 given; the run is damaged" in message


def test_a_set_brings_its_metric_templates_and_squash(named: Callable[..., object], photos: Path) -> None:
    named({"train": voc(0), "test": voc(1, "test")})
    images = open_images("torch/voc")
    for opened in (images, open_split("torch/voc", "test", VOC), restore("torch/voc", images.splits, VOC)):
        assert (opened.metric, opened.templates, opened.squash) == ("11point_mAP", ("a {}.",), True)
    folder = open_images(str(photos))
    assert (folder.metric, folder.templates, folder.squash) == ("accuracy", ("a photo of a {}.",), False)


def test_squash_shows_the_whole_picture() -> None:
    picture = Image.new("RGB", (96, 32), "black")
    picture.paste("white", (0, 0, 16, 32))
    crop, squash = (make_transform(CONFIG, augment="none", squash=squash)(picture) for squash in (False, True))
    assert crop.shape == squash.shape == (3, 32, 32)
    assert crop.max() < -0.9, "the white sixth at the left is cut off"
    assert torch.allclose(squash[:, :, :4], torch.ones(()), atol=0.05)
    assert torch.allclose(squash[:, :, 8:], -torch.ones(()), atol=0.05)


def test_merged_moves_validation_into_train(photos: Path) -> None:
    images = open_images(str(photos), shots=5)
    both = merged(images)
    assert both.splits["train"] == open_images(str(photos), shots=5, val="none").splits["train"]
    assert (both.splits["val"], both.splits["test"]) == ([], images.splits["test"])
    assert per_class(images, "val") == [1, 1, 1], "the set itself stays as it is"
    assert both.cache is images.cache


def test_an_unknown_name_is_met_with_the_closest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(catalog, "suggest", lambda source: ["mnist", "kmnist"] if source == "mnits" else [])
    assert "mnits: not a folder; did you mean mnist or kmnist? Otherwise give a folder" in refused(
        lambda: open_images("mnits")
    )
    assert "did you mean" not in refused(lambda: open_images("nowhere"))
