"""Data: draws are stratified, disjoint and free of file order; folders are taken as met, and what is bad is named."""

import csv
import hashlib
import io
import os
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checks import CONFIG, paths, per_class, refused
from PIL import Image

from kadapt_cli import data
from kadapt_cli.data import (
    ImageSet,
    manifest_csv,
    merged,
    open_images,
    open_split,
    parse_manifest,
    restore,
)
from kadapt_cli.images import read_image
from kadapt_cli.tensors import ImageDataset, make_transform


def digests(images: ImageSet) -> dict[str, set[str]]:
    return {split: {sample.digest for sample in samples} for split, samples in images.splits.items()}


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


def test_merged_moves_validation_into_train(photos: Path) -> None:
    images = open_images(str(photos), shots=5)
    both = merged(images)
    assert both.splits["train"] == open_images(str(photos), shots=5, val="none").splits["train"]
    assert (both.splits["val"], both.splits["test"]) == ([], images.splits["test"])
    assert per_class(images, "val") == [1, 1, 1], "the set itself stays as it is"
    assert both.cache is images.cache


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
