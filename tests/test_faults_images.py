"""Bad images and bad layouts through the command line: every file is used, refused by name, or counted in a note."""

import io
import json
import os
import stat
import struct
import subprocess
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import numpy as np
import pytest
from PIL import Image, features

from kadapt_cli import data, images, train  # noqa: F401 - imported once for all forks

pytestmark = pytest.mark.faults

ROW = "bad images and layouts"
SIZE = (40, 30)
Make = Callable[[Path], object]


def picture(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """A smooth random picture."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BILINEAR)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def fill(root: Path, classes: dict[str, int], start: int = 0) -> Path:
    """Folders of so many different pictures."""
    for number, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture(start + 100 * number + index).save(root / name / f"{index}.png")
    return root


def header(width: int, height: int) -> bytes:
    """A PNG that claims a size, followed by the data of a small one: nothing may be allocated to find that out."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    whole = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + whole + encoded(picture(0), "PNG")[33:]


def node(kind: int, device: int = 0) -> Make:
    return lambda path: os.mknod(path, kind | 0o600, device)


def link(target: str) -> Make:
    return lambda path: path.symlink_to(target)


def outside(path: Path) -> None:
    """A link to an image that is no part of the data."""
    picture(3).save(path.parents[2] / "outside.png")
    path.symlink_to(path.parents[2] / "outside.png")


def locked(path: Path) -> None:
    picture(1).save(path)
    path.chmod(0)


JPEG, PNG = encoded(picture(7), "JPEG", quality=95), encoded(picture(7), "PNG")
FRAMES = {"save_all": True, "append_images": [picture(8), picture(9)]}
GREY = np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50
# How the picture is stored so that each EXIF orientation shows it upright.
STORED = dict(enumerate([None, *(Image.Transpose(number) for number in (0, 3, 1, 5, 2, 6, 4))], 1))
CLEAR = Image.merge("RGBA", (*picture(7).split(), picture(8).getchannel(0)))
ON_WHITE = np.asarray(Image.alpha_composite(Image.new("RGBA", SIZE, "white"), CLEAR).convert("RGB"))
SCALED = np.repeat(np.rint(GREY / 257).astype(np.uint8)[..., None], 3, 2)


def oriented(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    stored = picture(7) if STORED[number] is None else picture(7).transpose(STORED[number])
    return encoded(stored, "PNG", exif=exif)


def paletted() -> Image.Image:
    image = picture(7).quantize(8)
    image.info["transparency"] = 0
    return image


# File name, its bytes or how to make it, and the pixels it must be read as (None: whatever they are), the words of its
# refusal, or the words of the note that counts it where it is no image file.
USED: list[tuple[str, bytes, np.ndarray | None]] = [
    ("one.png", encoded(picture(7, (1, 1)), "PNG"), None),
    ("sixteen.png", encoded(Image.fromarray(GREY), "PNG"), SCALED),
    ("integers.tiff", encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"), SCALED),
    ("floats.tiff", encoded(Image.fromarray((GREY / 65535).astype(np.float32)), "TIFF"), SCALED),
    ("palette.png", encoded(paletted(), "PNG"), None),
    ("cmyk.jpg", encoded(picture(7).convert("CMYK"), "JPEG"), None),
    ("grey-alpha.png", encoded(picture(7).convert("LA"), "PNG"), np.asarray(picture(7).convert("L").convert("RGB"))),
    ("alpha.png", encoded(CLEAR, "PNG"), ON_WHITE),
    ("bits.png", encoded(picture(7).convert("1"), "PNG"), np.asarray(picture(7).convert("1").convert("RGB"))),
    ("still.gif", encoded(picture(7), "GIF"), None),
    ("still.webp", encoded(picture(7), "WEBP", lossless=True), np.asarray(picture(7))),
    ("wrong-ending.jpg", PNG, np.asarray(picture(7))),
    *((f"rotated-{number}.png", oriented(number), np.asarray(picture(7))) for number in STORED),
]
REFUSED: list[tuple[str, bytes | Make, str]] = [
    *((f"cut-{part}.jpg", JPEG[: len(JPEG) * (2 * part + 1) // 20], "") for part in range(10)),
    ("empty.jpg", b"", "the file is empty"),
    ("text.jpg", b"this is no picture", "not an image of a known format"),
    ("zeros.jpg", bytes(1000), "not an image of a known format"),
    ("large.jpg", lambda path: (path.write_bytes(JPEG), os.truncate(path, (1 << 30) + 1)), "more than 1024 MiB"),
    ("resource.jpg", b"\0\5\26\7\0\2\0\0Mac OS X AppleDouble", "not an image of a known format"),
    ("short.png", PNG[: len(PNG) // 2], "truncated"),
    ("bomb-9500.png", header(9500, 9500), "is more than 89,478,485 pixels"),
    ("bomb-20000.png", header(20_000, 20_000), "could be decompression bomb"),
    ("bomb-60000.png", header(60_000, 60_000), "could be decompression bomb"),
    ("thin.png", encoded(Image.new("L", (1, 10_000)), "PNG"), "one side of 1 x 10000 is more than 200 times"),
    ("integers.tiff", encoded(Image.fromarray(GREY.astype(np.int32) * 100), "TIFF"), "outside 0 to 65535"),
    ("floats.tiff", encoded(Image.fromarray(np.full((30, 40), np.nan, np.float32)), "TIFF"), "outside 0 to 1.0"),
    ("animated.gif", encoded(picture(7), "GIF", **FRAMES), "animated or of several pages (3 frames)"),
    ("animated.webp", encoded(picture(7), "WEBP", **FRAMES), "animated or of several pages (3 frames)"),
    ("phone.heic", b"\0\0\0\x18ftypheic" + bytes(64), "not an image of a known format"),
    (
        "phone.avif",
        encoded(picture(7), "AVIF") if features.check("avif") else b"\0\0\0\x18ftypavif" + bytes(64),
        "known",
    ),
    ("broken-link.jpg", link("nowhere.jpg"), ""),
    ("loop.jpg", link("loop.jpg"), ""),
]
ASIDE: list[tuple[str, bytes | Make, str]] = [
    ("photo.jpg.txt", JPEG, "1 other file was ignored (a/photo.jpg.txt)"),
    ("pipe.jpg", node(stat.S_IFIFO), "1 other file was ignored (a/pipe.jpg)"),
    ("socket.jpg", node(stat.S_IFSOCK), "1 other file was ignored (a/socket.jpg)"),
    ("device.jpg", node(stat.S_IFCHR, os.makedev(1, 5)), "1 other file was ignored (a/device.jpg)"),
    (
        "zero.jpg",
        link("/dev/zero"),
        "1 symbolic link to folders or out of the data folder was not followed (a/zero.jpg",
    ),
    ("out.jpg", outside, "out of the data folder was not followed (a/out.jpg)"),
    ("._photo.jpg", b"\0\5\26\7\0\2\0\0Mac OS X AppleDouble", ""),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run on the classes a and b."""
    root = tmp_path_factory.mktemp("run")
    fill(root / "photos", {"a": 4, "b": 4})
    done = faults.kadapt("train", "--data", root / "photos", "--out", root / "run", "--epochs", 1, "--augment", "none")
    assert done.code == 0, done.err
    return root / "run"


def put(path: Path, content: bytes | Make) -> bool:
    """Make the file of a case; False where this machine does not let us."""
    try:
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
    except PermissionError:
        return False
    return True


def counted(evaluated: faults.Outcome) -> int:
    """How many images `eval --json` measured."""
    return sum(row["n"] for row in json.loads(evaluated.out)["per_class"])


def judge(
    name: str, folder: Path, run: Path, words: str | None, aside: bool, quick: bool
) -> Iterator[tuple[str, bool]]:
    """Each trial of one file beside eight good ones, and whether it went as it must.

    `words` None: it is used. Otherwise it is refused with these words, or with `aside` it is noted and no image.
    """
    bad = words is not None and not aside
    count = 8 + (words is None)
    checked = faults.kadapt("data", "check", folder, "--json")
    found = json.loads(checked.out) if checked.out else {"splits": {}, "bad": [], "notes": []}
    yield "check: code", checked.code == (3 if bad else 0)
    yield "check: used and bad are all", sum(found["splits"].values()) == count and len(found["bad"]) == int(bad)
    named = found["bad"] if bad else found["notes"]
    yield "check: named", words in (None, "") or any(name in line and words in line for line in named)
    yield "check: named on stderr", not bad or (name in checked.said and words in checked.said)
    yield "check: little memory", checked.peak_bytes < 100 << 20
    if quick:
        return
    shown = faults.kadapt("predict", run, folder, "--skip-bad", "--json")
    yield "predict: counts", shown.code == 0 and len(json.loads(shown.out)["predictions"]) == count
    yield "predict: named", not bad or any(name in line and "left out" in line for line in shown.err.splitlines())
    evaluated = faults.kadapt("eval", run, "--data", folder, "--skip-bad", "--json")
    yield "eval: counts", evaluated.code == 0 and counted(evaluated) == count
    options = ("train", "--data", folder, "--out", folder.parent / "none", "--dry-run", "--json")
    skipping = faults.kadapt(*options, "--skip-bad")
    sizes = json.loads(skipping.out)["data"] if skipping.code == 0 else {}
    yield "skip", sum(sizes.get(split, 0) for split in data.SPLITS) == count
    if words is None:
        return
    yield "skip: named", not bad or any(name in line and "left out" in line for line in skipping.err.splitlines())
    strict = faults.kadapt(*options)
    yield "strict", strict.code == 3 and name in strict.said if bad else strict.code == 0
    alone = faults.kadapt("predict", run, folder / "a" / name)
    yield "predict: the file alone", alone.code == (0 if name in ("photo.jpg.txt", "out.jpg") else 3)
    yield "predict: the file's name", alone.code == 0 or name in alone.said


@pytest.mark.parametrize("kind", ["used", "refused", "aside"])
def test_images(tmp_path: Path, run: Path, tally: Callable[[str, int], None], quick: bool, kind: str) -> None:
    """A file of every kind beside eight good ones: the counts of used and of bad images sum up to all."""
    cases = {"used": [(n, c, None) for n, c, _ in USED], "refused": REFUSED, "aside": ASIDE}[kind]
    failures, done = [], 0
    cases = [case for number, case in enumerate(cases) if not quick or number % 3 == 0 or case[0] == "out.jpg"]
    for number, (name, content, words) in enumerate(cases):
        folder = fill(tmp_path / str(number), {"a": 4, "b": 4})
        if not put(folder / "a" / name, content):
            continue
        done += 1
        trials = judge(name, folder, run, words, kind == "aside", quick)
        failures += [f"{name}: {trial}" for trial, good in trials if not good]
    assert not failures
    assert done > 2  # only root may make devices
    tally(ROW, done)


def test_pixels(tmp_path: Path, tally: Callable[[str, int], None]) -> None:
    """What is used is read as what it shows: orientation, depth, transparency."""
    wrong = []
    expected = [(name, content, pixels) for name, content, pixels in USED if pixels is not None]
    for name, content, pixels in expected:
        (tmp_path / name).write_bytes(content)
        if not np.array_equal(np.asarray(images.read_image(tmp_path / name)), pixels):
            wrong.append(name)
    assert not wrong
    tally(ROW, len(expected))


def test_what_may_not_be_read(tmp_path: Path, run: Path, tally: Callable[[str, int], None]) -> None:
    """A file and a folder without permission are named; a folder that may only be read is no problem."""
    folder = fill(tmp_path / "photos", {"a": 4, "b": 4})
    locked(folder / "a" / "locked.png")
    checked = faults.unprivileged("data", "check", folder, "--json")
    assert (checked.code, json.loads(checked.out)["splits"]) == (3, {"train": 4, "val": 2, "test": 2})
    assert json.loads(checked.out)["bad"] == ["a/locked.png: cannot be read (Permission denied)"]
    (folder / "a" / "locked.png").unlink()
    (folder / "a").chmod(0o555)
    folder.chmod(0o555)
    assert faults.unprivileged("data", "check", folder, "--json").code == 0
    (folder / "b").chmod(0)
    checked = faults.unprivileged("data", "check", folder)
    assert (checked.code, checked.said) == (3, f"{folder}/b: cannot be read (Permission denied)")
    (folder / "b").chmod(0o755)
    tally(ROW, 3)


def test_what_changes_between_scan_and_read(tmp_path: Path, run: Path, tally: Callable[[str, int], None]) -> None:
    """A file that vanishes, and one that is made a link out of the folder, after the folder was scanned."""
    read = data.read_bytes

    def replaced(path: Path, name: str) -> bytes:
        if name == "a/0.png":
            path.unlink()
        return read(path, name)

    def vanishing() -> None:
        data.read_bytes = replaced
        faults.command("data", "check", tmp_path / "photos", "--json")()

    fill(tmp_path / "photos", {"a": 4, "b": 4})
    done = faults.forked(vanishing)
    assert done.code == 3
    assert json.loads(done.out)["bad"] == ["a/0.png: no such file"]
    outside = tmp_path / "outside.png"
    evaluated = faults.kadapt("eval", run, "--split", "train")
    assert evaluated.code == 0, evaluated.err
    own = next((run.parent / "photos" / "a").iterdir())
    own.rename(outside)
    own.symlink_to(outside)
    try:
        refused = faults.kadapt("eval", run, "--split", "train")
    finally:
        outside.replace(own)
    assert refused.code == 3
    assert f"a/{own.name}: a link out of the data folder, which is not followed" in refused.said
    tally(ROW, 2)


def twins(root: Path) -> None:
    """The same picture in train and test."""
    fill(root / "train", {"a": 3, "b": 3})
    fill(root / "test", {"a": 2, "b": 2}, start=50)
    (root / "test" / "a" / "twin.png").write_bytes((root / "train" / "a" / "1.png").read_bytes())


def split(**splits: dict[str, int]) -> Make:
    return lambda root: [fill(root / name, classes, 37 * n) for n, (name, classes) in enumerate(splits.items())]


def plain(*names: str, count: int = 4) -> Make:
    return lambda root: fill(root, dict.fromkeys(names, count))


def beside(*paths: str, make: Callable[[Path], object] | None = None) -> Make:
    """Two good classes of four, and further files."""

    def write(root: Path) -> None:
        fill(root, {"a": 4, "b": 4})
        for number, path in enumerate(paths):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            picture(900 + number).save(root / path, "PNG") if make is None else make(root / path)

    return write


def deep(root: Path) -> None:
    """An image below 1,500 folders: more than Python nests calls."""
    folder = fill(root, {"a": 4, "b": 4}) / "a"
    for _ in range(1500):
        folder /= "d"
        folder.mkdir()
    picture(5).save(folder / "x.png")


def many(root: Path) -> None:
    """10,000 classes of one tiny image each in train/, two of them in val/ and test/."""
    fill(root / "val", {"c0000": 1, "c0001": 1})
    fill(root / "test", {"c0000": 1, "c0001": 1}, start=50)
    (root / "one.png").write_bytes(encoded(picture(1, (1, 1)), "PNG"))
    for number in range(10_000):
        folder = root / "train" / f"c{number:04}"
        folder.mkdir(parents=True)
        os.link(root / "one.png", folder / "0.png")


def not_utf8(path: bytes) -> Make:
    def write(root: Path) -> None:
        fill(root, {"a": 4, "b": 4})
        os.makedirs(os.path.dirname(os.fsencode(root) + b"/" + path), exist_ok=True)
        with open(os.fsencode(root) + b"/" + path, "wb") as file:
            file.write(PNG)

    return write


NFC, NFD = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
STRANGE = (
    "two words",
    "🌷",
    "line\nbreak",
    "[red]x[bold]",
    "\x1b[31mred",
    "=1+1",
    "a;rm -rf",
    "a..",
    "%s{}",
    "-x",
    "a\rb",
)
FULL = {"a": 2, "b": 2}

# Name, how to make it, options, and what is expected: the number of images used, or None; the classes, or None; words.
LAYOUTS: list[tuple[str, Make, int | None, tuple[str, ...] | None, str]] = [
    ("nothing", lambda root: root.mkdir(), None, None, "no class folders"),
    ("absent", lambda root: None, None, None, "not a folder; give a folder with a subfolder of images for each class"),
    ("file", lambda root: root.write_bytes(PNG), None, None, "a file; give a folder"),
    ("packed.zip", lambda root: root.write_bytes(b"PK"), None, None, "a file; unpack it first"),
    ("flat", lambda root: (root.mkdir(), put(root / "x.png", PNG)), None, None, "no class folders"),
    ("one class", plain("a"), None, None, "two classes or more were expected, a is the only one"),
    ("empty class", beside("c/x", make=lambda path: None), None, None, "no images in class c; add images"),
    ("class of texts", beside("c/x.txt"), None, None, "no images in class c; add images"),
    ("stray images", beside("stray.png", "other.jpg"), 8, ("a", "b"), "2 images beside the class folders were ignored"),
    ("same leaf names", beside("a/x/0.png", "a/y/0.png", "b/a/0.png"), 11, ("a", "b"), ""),
    ("letter case", beside("A/0.png", "A/1.png", "A/2.png", "a/0.PNG"), 12, ("A", "a", "b"), ""),
    ("normal forms", plain(NFC, NFD), 8, (NFD, NFC), ""),
    ("strange names", plain(*STRANGE, count=3), 33, tuple(sorted(STRANGE)), ""),
    (
        "strange files",
        beside("a/[red].png", "a/\x1b[2J.png", "a/a\nb.png", "a/a\rb.png", "a/=1+1.png", "a/🌷 .png"),
        14,
        ("a", "b"),
        "",
    ),
    ("class not UTF-8", not_utf8(b"caf\xe9/0.png"), None, None, r"b'caf\xe9' is not valid UTF-8; rename the folder"),
    (
        "folder not UTF-8",
        not_utf8(b"a/caf\xe9/0.png"),
        8,
        ("a", "b"),
        r"b'a/caf\xe9/0.png': the name is not valid UTF-8",
    ),
    ("file not UTF-8", not_utf8(b"a/caf\xe9.png"), 8, ("a", "b"), r"b'a/caf\xe9.png': the name is not valid UTF-8"),
    ("new class in val", split(train=FULL, val={"a": 1, "ant": 1}), None, None, "has class ant that training lacks"),
    ("new class in test", split(train=FULL, test={"a": 1, "ant": 1}), None, None, "has class ant that training lacks"),
    ("class not in val", split(train=FULL, val={"a": 2}, test=FULL), 10, ("a", "b"), "no val images of class b"),
    ("no train", split(val=FULL, test=FULL), None, None, "has val/, test/ but no folder train/"),
    ("only train", split(train={"a": 4, "b": 4}), 8, ("a", "b"), ""),
    ("empty val", lambda root: (split(train=FULL)(root), (root / "val").mkdir()), None, None, "val: no class folders"),
    ("leak", twins, 11, ("a", "b"), "1 of 5 test images are training images too (test/a/twin.png = train/a/1.png)"),
    ("one image a class", plain("a", "b", count=1), None, None, "the splits need 3 usable images a class or more"),
    ("hidden", beside(".git/x.png", "a/.x.png", "__MACOSX/a/x.png", "@eaDir/x.png"), 8, ("a", "b"), ""),
    ("long names", beside("a/" + 251 * "n" + ".png", 255 * "c" + "/x/y/0.png"), None, None, "usable images a class"),
    ("deep", deep, 9, ("a", "b"), ""),
    ("link to a folder", beside("c", make=lambda path: path.symlink_to("a")), 8, ("a", "b"), "not followed (c)"),
    ("loop of links", beside("a/up", make=lambda path: path.symlink_to("..")), 8, ("a", "b"), "not followed (a/up)"),
    ("folder outside", beside("a/out", make=link("/etc")), 8, ("a", "b"), "not followed (a/out)"),
    (
        "train is a link",
        lambda root: (split(old=FULL, val=FULL)(root), link("old")(root / "train")),
        8,
        ("old", "val"),
        "not followed (train)",
    ),
    ("link inside", beside("b/same.png", make=link("../a/0.png")), 9, ("a", "b"), ""),
    ("many", many, 10_004, None, "no val images of class c0002"),
]


def test_layouts(tmp_path: Path, tally: Callable[[str, int], None], quick: bool) -> None:
    """Every layout gives the right counts and classes, or exit code 3 and the words that say why; one line of them."""
    failures = []
    cases = LAYOUTS[::4] if quick else LAYOUTS
    for name, make, count, classes, words in cases:
        make(tmp_path / name)
        done = faults.kadapt("data", "check", tmp_path / name, "--json")
        subprocess.run(["rm", "-rf", tmp_path / name], check=True)  # pytest's own clean-up cannot go that deep
        found = json.loads(done.out) if done.out else {"splits": {}, "bad": [], "notes": [], "classes": []}
        told = [done.said, *found["bad"], *found["notes"]]
        trials = {
            "code": done.code == (3 if count is None or found["bad"] else 0),
            "count": count is None or sum(found["splits"].values()) == count,
            "classes": classes is None or tuple(found["classes"]) == classes,
            "words": any(words in line for line in told),
            "one line": len(done.err.splitlines()) == (done.code != 0),
            "no escapes": "\x1b" not in done.out + done.err,
        }
        failures += [f"{name}: {trial}: {told} {sum(found['splits'].values())}" for trial, g in trials.items() if not g]
    assert not failures
    tally(ROW, len(cases))


def test_fewer_images_than_shots_and_other_classes_than_the_run(
    tmp_path: Path, run: Path, tally: Callable[[str, int], None]
) -> None:
    """Layouts that only other commands can refuse."""
    folder = fill(tmp_path / "photos", {"a": 4, "b": 4})
    few = faults.kadapt("train", "--data", folder, "--shots", 5, "--out", tmp_path / "run", "--dry-run")
    assert (few.code, "too few in a (4), b (4); add images or lower --shots" in few.said) == (3, True)
    one = faults.kadapt("train", "--data", folder, "--shots", 1, "--out", tmp_path / "run", "--dry-run")
    assert (one.code, "pass --val none" in one.said) == (2, True)
    (folder / "a").rename(folder / "ant")
    new = faults.kadapt("eval", run, "--data", folder)
    assert (new.code, "has class ant that training lacks (it has a, b)" in new.said) == (3, True)
    for file in (folder / "ant").iterdir():
        file.unlink()
    (folder / "ant").rmdir()
    lacking = faults.kadapt("eval", run, "--data", folder, "--json")
    assert (lacking.code, counted(lacking)) == (0, 4)
    tally(ROW, 4)
