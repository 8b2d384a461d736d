"""From a folder of photos or a named set to one checked manifest and its splits.

Every image is read once: its bytes are hashed and decoded, and the pixels are kept while they fit in memory. A sample
is a path, a label, a size and a digest; the list of samples is the manifest that a run keeps and later checks.

A draw ranks the images of a class by sha256(seed:path) and takes the first k. It depends on nothing but the seed and
the paths of that class: not on the order of files, and not on files of other classes. An image of several classes
(a multi-label set) counts for each of them: in the same order, it is taken while one of its classes has fewer than k.
A class then has k images or more, roughly k (in the spirit of ELEVATER's few-shot draw).
"""

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath

from PIL import Image

from kadapt_cli import catalog
from kadapt_cli.catalog import NamedSet, is_named, open_named
from kadapt_cli.errors import DataError, UsageError, as_given, harmless, listed, shown
from kadapt_cli.images import IMAGE_SUFFIXES, decode_image, quiet_decoder, read_bytes, refusing, to_rgb

SPLITS = ("train", "val", "test")
FOLDERS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
JUNK_FOLDERS = ("__MACOSX", "@eaDir")  # left by archive tools and file servers; they hold thumbnails and resource forks
DEMO_SHOTS = 10
MANIFEST_COLUMNS = ["path", "label", "split", "bytes", "sha256"]

Loaded = tuple[int, str, Image.Image]  # bytes, sha256, RGB pixels
Splits = dict[str, list["Sample"]]


@dataclass(frozen=True)
class Sample:
    """One image of the manifest.

    ``path`` is relative to the data folder, or names a picture of a named set ("torch/mnist/train/12", "demo/0007").
    ``label`` is an index into the classes. ``size`` in bytes and ``digest`` (SHA-256) are those of the file, or of the
    RGB pixels in a named set; they are 0 and "" until the image has been checked. ``also`` are the further labels of an
    image of a multi-label set, where ``label`` is -1 if it has none.
    """

    path: str
    label: int
    size: int = 0
    digest: str = ""
    also: tuple[int, ...] = ()

    @property
    def labels(self) -> tuple[int, ...]:
        """All labels of the image; empty for an image of a multi-label set that shows none of its classes."""
        return (self.label, *self.also) if self.label >= 0 else ()


@dataclass
class ImageSet:
    """Checked images with their labels and splits.

    ``splits`` always has "train", "val" and "test", each sorted by path and possibly empty. ``classes`` are the names
    of the class folders, sorted; a named set keeps its own order. ``notes`` are lines for people; ``bad`` names each
    image that was left out, with the reason. ``metric`` is one of
    `metrics.METRICS`; ``templates`` put a class name into a sentence; with ``squash`` pictures are resized to a square
    without a crop.
    """

    name: str
    source: str
    root: Path | None
    classes: tuple[str, ...]
    splits: Splits
    notes: list[str]
    load: Callable[[str], Loaded] = field(repr=False)
    cache: dict[str, Image.Image] = field(default_factory=dict, repr=False)
    metric: str = "accuracy"
    templates: tuple[str, ...] = ("a photo of a {}.",)
    squash: bool = False
    bad: list[str] = field(default_factory=list)

    @property
    def multi_label(self) -> bool:
        """Whether an image can have several labels, or none."""
        return self.metric == "11point_mAP"

    def image(self, sample: Sample) -> Image.Image:
        """The RGB picture of a sample, shared with the cache: not to be changed in place.

        Raises:
            DataError: The picture was not kept in memory, and its file is gone or has changed since it was checked.
        """
        if sample.path in self.cache:
            return self.cache[sample.path]
        _, digest, image = self.load(sample.path)
        if digest != sample.digest:
            raise DataError(f"{self.source}: {shown(sample.path)} has changed since it was checked; start again")
        return image


# --- what is in a folder ---


@dataclass
class _Found:
    """A walk through the data folder `root` (`real` without links), and what it met besides the images of classes."""

    root: Path
    real: Path
    links: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def relative(self, entry: os.DirEntry[str]) -> str:
        return Path(entry.path).relative_to(self.root).as_posix()

    def follows(self, entry: os.DirEntry[str]) -> bool:
        """Links are followed to files inside the root only: never to a folder, so that no loop can occur."""
        if not entry.is_symlink():
            return True
        inside = Path(os.path.realpath(entry.path)).is_relative_to(self.real)
        return inside and not os.path.isdir(entry.path)

    def is_image(self, entry: os.DirEntry[str]) -> bool:
        is_file = entry.is_symlink() or entry.is_file()  # a broken link counts, and is refused when it is read
        return is_file and self.follows(entry) and Path(entry.name).suffix.lower() in IMAGE_SUFFIXES

    def set_aside(self, entry: os.DirEntry[str]) -> None:
        kind = self.strays if self.is_image(entry) else self.others if self.follows(entry) else self.links
        kind.append(shown(self.relative(entry)))

    def notes(self) -> list[str]:
        kinds = (
            (self.links, "symbolic link{} to folders or out of the data folder {} not followed"),
            (self.strays, "image{} beside the class folders {} ignored"),
            (self.folders, "folder{} beside train/ {} ignored"),
            (self.others, "other file{} {} ignored"),
        )
        forms = [(paths, text.format(*(("", "was") if len(paths) == 1 else ("s", "were")))) for paths, text in kinds]
        return [f"{len(paths)} {text} ({listed(paths)})" for paths, text in forms if paths]


def visible_entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, sorted by name, without hidden files; `DataError` when it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".") and entry.name not in JUNK_FOLDERS]
    except OSError as error:
        raise DataError(f"{shown(str(folder))}: cannot be read ({error.strerror})") from None
    return sorted(visible, key=lambda entry: os.fsencode(entry.name))


def _subfolders(folder: Path) -> list[str]:
    return [entry.name for entry in visible_entries(folder) if entry.is_dir(follow_symlinks=False)]


def _root_of(source: str) -> Path:
    root = Path(source)
    if root.is_dir():
        return root
    packed = "; unpack it first" if root.suffix.lower() in (".zip", ".tar", ".gz", ".tgz", ".7z") else ""
    what = f"a file{packed}" if root.is_file() else "not a folder"
    close = [] if root.is_file() else catalog.suggest(source)
    mend = f"did you mean {' or '.join(close)}? Otherwise give" if close else "give"
    raise DataError(
        f"{shown(source)}: {what}; {mend} a folder with a subfolder of images for each class, 'demo', "
        "or a named set (see 'kadapt data list'; torch/…, hfds/…)"
    )


def _layout(root: Path) -> dict[str, Path]:
    """Split -> its folder; empty for a plain folder of classes."""
    names = _subfolders(root)
    splits = {split: root / name for split, choices in FOLDERS.items() for name in reversed(choices) if name in names}
    others = set(names) - {name for choices in FOLDERS.values() for name in choices}
    # A class may be called 'train' (beside 'car' and 'plane') or 'test'.
    if others and not ("train" in splits and _subfolders(splits["train"])):
        return {}
    return splits


def _scan(folder: Path, found: _Found) -> dict[str, list[str]]:
    """Class -> paths of its images, for the class folders in a folder."""
    where = shown(str(folder))
    classes: dict[str, list[str]] = {}
    for entry in visible_entries(folder):
        if entry.is_dir(follow_symlinks=False):
            if not _is_utf8(entry.name):
                raise DataError(f"{where}: the name {os.fsencode(entry.name)!r} is not valid UTF-8; rename the folder")
            classes[entry.name] = list(_walk(Path(entry.path), found))
        else:
            found.set_aside(entry)
    links = f"; {len(found.links)} symbolic links were not followed" if found.links else ""
    if not classes:
        raise DataError(f"{where}: no class folders; put the images of each class in a folder of its own{links}")
    empty = [shown(name) for name, paths in classes.items() if not paths]
    if empty:
        raise DataError(f"{where}: no images in class {listed(empty)}; add images or remove the folder{links}")
    return classes


def _walk(folder: Path, found: _Found) -> Iterator[str]:
    left = visible_entries(folder)[::-1]
    while left:  # no recursion: folders may be nested deeper than calls
        entry = left.pop()
        if entry.is_dir(follow_symlinks=False):
            left += visible_entries(Path(entry.path))[::-1]
        elif found.is_image(entry):
            yield found.relative(entry)
        else:
            found.set_aside(entry)


def _is_utf8(name: str) -> bool:
    return not any("\udc80" <= letter <= "\udcff" for letter in name)  # how Python spells bytes it cannot decode


def _pool(groups: dict[str, list[str]], classes: Sequence[str], folder: Path) -> list[Sample]:
    """The images of scanned classes, not yet checked, by path; `DataError` for a class that is not among `classes`."""
    unknown = [shown(name) for name in groups if name not in classes]
    if unknown:
        known = listed([shown(name) for name in classes])
        where = shown(str(folder))
        raise DataError(
            f"{where}: has class {listed(unknown)} that training lacks (it has {known}); rename or remove it"
        )
    labels = {name: label for label, name in enumerate(classes)}
    return sorted((Sample(path, labels[name]) for name in groups for path in groups[name]), key=_by_path)


def _by_path(sample: Sample) -> str:
    return sample.path


# --- checking ---


def _load_file(root: Path, path: str) -> Loaded:
    if not _is_utf8(path):
        raise DataError(f"{os.fsencode(path)!r}: the name is not valid UTF-8")
    if not Path(os.path.realpath(root / path)).is_relative_to(root):  # a link put there since the folder was scanned
        raise DataError(f"{shown(path)}: a link out of the data folder, which is not followed")
    data = read_bytes(root / path, path)
    return len(data), hashlib.sha256(data).hexdigest(), decode_image(data, path)


def _load_named(named: NamedSet, path: str) -> Loaded:
    with refusing(path):
        picture = named.picture(path)
        if isinstance(picture, Image.Image):
            image = to_rgb(picture)
        else:
            with picture:
                image = decode_image(picture.read(), path)
    pixels = image.tobytes()
    return len(pixels), hashlib.sha256(pixels).hexdigest(), image


def _check(images: ImageSet, samples: Sequence[Sample], cache_bytes: int) -> tuple[dict[str, Sample], dict[str, str]]:
    """Read samples once, keeping pictures while they fit: path -> checked sample, and path -> what is wrong with it."""

    def load(sample: Sample) -> Loaded | DataError:
        try:
            return images.load(sample.path)
        except DataError as error:
            return error

    room = cache_bytes - sum(3 * image.width * image.height for image in images.cache.values())
    good, bad = {}, {}
    with quiet_decoder(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # In parts, so that pictures read ahead and jobs waiting stay few whatever the size of the set.
        parts = (samples[start : start + 256] for start in range(0, len(samples), 256))
        for sample, loaded in chain.from_iterable(zip(part, pool.map(load, part), strict=True) for part in parts):
            if isinstance(loaded, DataError):
                bad[sample.path] = str(loaded)
                continue
            size, digest, image = loaded
            good[sample.path] = replace(sample, size=size, digest=digest)
            room -= 3 * image.width * image.height
            if room >= 0:
                images.cache[sample.path] = image
    return good, bad


def _complete(images: ImageSet, divide: Callable[[Splits], Splits], skip_bad: bool, cache_bytes: int) -> ImageSet:
    """Divide the samples of a set and check those that a split holds; again without the bad ones if `skip_bad`.

    Ranks do not change when images are left out, so the result is a draw from the good images alone.
    """
    good: dict[str, Sample] = {}
    bad: dict[str, str] = {}
    pools = images.splits
    while True:
        try:
            images.splits = divide(pools)
        except DataError as error:
            if not bad:
                raise
            raise DataError(f"{error}; {len(bad)} cannot be used: {listed(list(bad.values()))}") from None
        drawn = [sample for split in SPLITS for sample in images.splits[split]]
        newly_good, newly_bad = _check(images, [sample for sample in drawn if sample.path not in good], cache_bytes)
        good |= newly_good
        bad |= newly_bad
        count, reasons = f"{len(bad)} of {len(good) + len(bad)} images", listed(list(bad.values()))
        if not newly_bad:
            break
        if not skip_bad:
            where = shown(images.source)
            raise DataError(f"{where}: {count} cannot be used: {reasons}; mend or remove them, or pass --skip-bad")
        pools = {split: [sample for sample in samples if sample.path not in bad] for split, samples in pools.items()}
    if bad:
        images.notes.append(f"{count} were left out: {reasons}")
        images.bad = list(bad.values())
    images.splits = {split: [good[sample.path] for sample in images.splits[split]] for split in SPLITS}
    images.notes += _split_notes(images.splits, images.classes)
    return images


def _split_notes(splits: Splits, classes: Sequence[str]) -> list[str]:
    """What people should know of a division: the same picture on both sides, and what cannot be measured."""
    notes = []
    first = {sample.digest: sample.path for sample in splits["train"]}
    for split in ("val", "test"):
        same = [sample for sample in splits[split] if sample.digest in first]
        if same:
            pair = f"{shown(same[0].path)} = {shown(first[same[0].digest])}"
            notes.append(f"{len(same)} of {len(splits[split])} {split} images are training images too ({pair})")
        labels = {label for sample in splits[split] for label in sample.labels}
        absent = [shown(name) for label, name in enumerate(classes) if label not in labels]
        if splits[split] and absent:
            notes.append(f"no {split} images of class {listed(absent)}")
    if splits["train"] and not splits["test"]:
        notes.append("no images are left for test")
    return notes


# --- drawing ---


def _divide(pools: Splits, classes: Sequence[str], shots: int | None, seed: int, val: str, where: str) -> Splits:
    """Draw train, val and test from the pools a source has ("train", and "val" and "test" where it has them)."""
    least = shots or 1 + (val != "none" and "val" not in pools) + ("test" not in pools)
    counts = Counter(label for sample in pools["train"] for label in sample.labels)
    short = [f"{shown(name)} ({counts[label]})" for label, name in enumerate(classes) if counts[label] < least]
    if short:
        need = f"{shots} shots need" if shots else "the splits need"
        mend = "add images or lower --shots" if shots else "add images"
        raise DataError(f"{where}: {need} {least} usable images a class or more, too few in {listed(short)}; {mend}")
    drawn, rest = pools["train"], list[Sample]()
    if shots is not None:
        drawn, rest = _take(drawn, lambda n: shots, f"{seed}")
    elif "test" not in pools:
        rest, drawn = _take(drawn, _fifth, f"{seed}", least=1)
    kept: list[Sample] = []
    if val == "auto" and "val" in pools:
        kept = pools["val"]
    elif val != "none":
        kept, drawn = _take(drawn, _fifth, f"{seed}:val", least=1)
    splits = {"train": drawn, "val": kept, "test": pools.get("test", rest)}
    return {split: sorted(samples, key=_by_path) for split, samples in splits.items()}


def _take(
    samples: Sequence[Sample], count: Callable[[int], int], salt: str, least: int = 0
) -> tuple[list[Sample], list[Sample]]:
    """Of each class, the first `count(n)` of its n samples by the hash of salt and path; and all the others.

    A sample of several classes is taken while one of them lacks samples, and none of them would be left with fewer than
    `least`; one without a class is never taken.
    """

    def rank(sample: Sample) -> bytes:
        return hashlib.sha256(os.fsencode(f"{salt}:{sample.path}")).digest()

    totals = Counter(label for sample in samples for label in sample.labels)
    lacking = {label: count(n) for label, n in totals.items()}
    taken, left = [], []
    for sample in sorted(samples, key=rank):
        wanted = any(lacking[label] > 0 for label in sample.labels)
        if wanted and all(totals[label] > least for label in sample.labels):
            taken.append(sample)
            for label in sample.labels:
                lacking[label] -= 1
                totals[label] -= 1
        else:
            left.append(sample)
    return taken, left


def _fifth(n: int) -> int:
    return max(1, round(0.2 * n))


# --- the three ways to open data ---


def open_images(
    source: str,
    *,
    shots: int | None = None,
    seed: int = 0,
    val: str = "auto",
    skip_bad: bool = False,
    classes: tuple[str, ...] | None = None,
    cache_bytes: int = 1 << 30,
) -> ImageSet:
    """Open a folder of classes, "demo" or a named set, draw the splits and check every image in them.

    A folder holds a subfolder of images for each class, or such folders in train/ and optionally val/ (validation/,
    valid/) and test/. Without test/ the test part is what the draw of `shots` leaves, or 20 % a class without `shots`.
    Without val/, validation is 20 % of the drawn training images, at least one a class.

    Args:
        source: The folder, "demo", or a name with one of timm's prefixes (torch/, hfds/, hfids/, wds/, tfds/).
        shots: Training images drawn a class, validation included; all of them when None (10 for "demo").
        seed: Seed of the draw.
        val: "auto" takes the source's own validation images, else 20 % of those drawn; "drawn" always the latter, as in
            a few-shot comparison; "none" trains on all drawn images. With the last two a val/ folder is ignored.
        skip_bad: Leave out images that cannot be used, with a note, and draw from the others.
        classes: The class names in the order wanted; those of the folders, sorted, when None. A named set has its own.
        cache_bytes: Decoded pictures are kept up to this many bytes; others are decoded again whenever asked for.

    Raises:
        DataError: Folders, classes or images that cannot be used as they are.
        UsageError: `shots` or `val` out of range, or one shot a class with validation drawn from it.
    """
    if val not in ("auto", "drawn", "none"):
        raise UsageError(f"val: 'auto', 'drawn' or 'none' was expected, {val!r} given")
    if shots is not None and shots < 1:
        raise UsageError(f"shots: 1 or more was expected, {shots} given")
    if source == "demo" and shots is None:
        shots = DEMO_SHOTS
    images = _open_named(source, cache_bytes) if is_named(source) else _open_folder(source, val, classes)
    if val == "drawn":
        images.splits.pop("val", None)
    has_val = "val" in images.splits
    if len(images.classes) < 2:
        raise DataError(
            f"{shown(source)}: two classes or more were expected, {shown(images.classes[0])} is the only one"
        )
    if shots == 1 and val != "none" and not has_val:
        mend = "pass --val none" if val == "auto" else "give two or more, or --search none"
        raise UsageError(f"--shots: one image a class leaves none to train on beside validation; {mend}")
    where = shown(source)
    divide = partial(_divide, classes=images.classes, shots=shots, seed=seed, val=val, where=where)
    images = _complete(images, divide, skip_bad, cache_bytes)
    if images.multi_label and shots is not None:
        drawn = images.splits["train"] + ([] if has_val else images.splits["val"])
        counts = Counter(label for sample in drawn for label in sample.labels).values()
        span = f"{min(counts)} to {max(counts)}"
        images.notes.append(f"roughly {shots} shots: an image counts for all its classes, which have {span} each")
    return images


def merged(images: ImageSet) -> ImageSet:
    """The same set with validation moved into train, for a final run on both; pictures in memory are shared."""
    train = sorted(images.splits["train"] + images.splits["val"], key=_by_path)
    return replace(images, splits={**images.splits, "train": train, "val": []}, notes=list(images.notes))


def folds(images: ImageSet, count: int) -> list[ImageSet]:
    """`count` sets for cross-validation: every training image is in validation in one of them, class by class."""
    place: dict[Sample, int] = {}
    seen: dict[int, int] = {}
    for sample in images.splits["train"]:
        place[sample] = seen[sample.label] = seen.get(sample.label, -1) + 1
    found = []
    for fold in range(count):
        val = [sample for sample in images.splits["train"] if place[sample] % count == fold]
        train = [sample for sample in images.splits["train"] if place[sample] % count != fold]
        found.append(replace(images, splits={**images.splits, "train": train, "val": val}, notes=list(images.notes)))
    return found


def _open_named(source: str, cache_bytes: int) -> ImageSet:
    """A named set with all samples of its own splits, none of them checked."""
    named = open_named(source, cache_bytes=cache_bytes)
    pools = {split: [_sample(path, label) for path, label in rows] for split, rows in named.entries.items()}
    images = ImageSet(named.name, source, None, named.classes, pools, named.notes, partial(_load_named, named))
    images.metric, images.templates, images.squash = named.metric, named.templates, named.squash
    awkward = [shown(name) for name in named.classes if "|" in name or not name]
    if images.multi_label and awkward:
        raise DataError(
            f"{source}: class names without '|' were expected of a multi-label set, {listed(awkward)} given, as '|' "
            "joins the names of an image's classes in the manifest; rename it"
        )
    return images


def _sample(path: str, labels: int | tuple[int, ...], size: int = 0, digest: str = "") -> Sample:
    """A sample of one label, or of the labels of a multi-label set, in increasing order."""
    first, *also = (labels,) if isinstance(labels, int) else sorted(set(labels)) or (-1,)
    return Sample(path, first, size, digest, tuple(also))


def _open_folder(source: str, val: str, classes: tuple[str, ...] | None) -> ImageSet:
    """A folder with all samples of the splits it has, none of them checked."""
    root = _root_of(source)
    layout = _layout(root)
    found = _Found(root, root.resolve())
    for entry in visible_entries(root) if layout else []:
        if not entry.is_dir(follow_symlinks=False):
            found.set_aside(entry)
        elif Path(entry.path) not in layout.values():
            found.folders.append(shown(entry.name))
    folders = layout or {"train": root}
    if "train" not in folders:
        have = ", ".join(f"{folder.name}/" for folder in folders.values())
        raise DataError(f"{shown(source)}: has {have} but no folder train/ (links to folders are not followed); add it")
    why = {"none": "as validation is off", "drawn": "as validation is drawn from the shots"}.get(val)
    notes = [f"{folders.pop('val').name}/ was ignored, {why}"] if why and "val" in folders else []
    groups = {split: _scan(folder, found) for split, folder in folders.items()}
    classes = classes or tuple(sorted(groups["train"]))
    pools = {split: _pool(groups[split], classes, folder) for split, folder in folders.items()}
    load = partial(_load_file, found.real)
    return ImageSet(found.real.name, source, found.real, classes, pools, notes + found.notes(), load)


def open_split(
    source: str, split: str, classes: tuple[str, ...], *, skip_bad: bool = False, cache_bytes: int = 1 << 30
) -> ImageSet:
    """Open other data to evaluate a run on: every image of one split, labelled with the run's classes.

    Args:
        source: A plain folder of classes, all of which is used; a folder with splits; "demo"; or a named set.
        split: "train", "val" or "test".
        classes: The run's class names in the run's order; `source` may lack some of them.
        skip_bad: As in `open_images`.
        cache_bytes: As in `open_images`.

    Returns:
        A set whose images are all in ``splits[split]``; the other splits are empty.

    Raises:
        DataError: A class that the run does not know, a source without that split, or images that cannot be used.
    """
    if is_named(source):
        images = _open_named(source, cache_bytes)
        if images.classes != classes:
            raise DataError(f"{source}: has classes {listed(images.classes)}, not those of the run ({listed(classes)})")
        samples = images.splits.get("train" if source == "demo" else split, [])
        have = list(images.splits)
    else:
        root = _root_of(source)
        layout = _layout(root)
        folder = layout.get(split) if layout else root
        have = [folder.name for folder in layout.values()]
        found = _Found(root, root.resolve())
        samples = _pool(_scan(folder, found), classes, folder) if folder else []
        load = partial(_load_file, found.real)
        images = ImageSet(found.real.name, source, found.real, classes, {}, found.notes(), load)
    if not samples:
        raise DataError(f"{shown(source)}: has no {split} split, only {', '.join(have)}; choose one of these")
    images.splits = {name: samples if name == split else [] for name in SPLITS}
    return _complete(images, lambda pools: pools, skip_bad, cache_bytes)


def restore(source: str, manifest: Splits, classes: tuple[str, ...], *, cache_bytes: int = 1 << 30) -> ImageSet:
    """Open the very images a run was made of; each must still have the size and digest of its manifest.

    Args:
        source: What the run was given as its data.
        manifest: The run's samples by split, from `parse_manifest`.
        classes: The run's class names in order.
        cache_bytes: As in `open_images`.

    Raises:
        DataError: Images that are missing or have changed, at most five by name.
    """
    if is_named(source):
        images = _open_named(source, cache_bytes)
    else:
        root = _root_of(source).resolve()
        images = ImageSet(root.name, source, root, classes, {}, [], partial(_load_file, root))
    images.classes, images.splits = classes, manifest
    wanted = [sample for split in SPLITS for sample in manifest[split]]
    strange = [sample for sample in wanted if len(sample.labels) != 1 and not images.multi_label]
    if strange:
        raise DataError(
            f"{shown(source)}: manifest.csv: {shown(strange[0].path)} was expected to have one class, "
            f"{len(strange[0].labels)} given; the run is damaged"
        )
    good, bad = _check(images, wanted, cache_bytes)
    bad |= {
        sample.path: f"{shown(sample.path)}: changed" for sample in wanted if good.get(sample.path, sample) != sample
    }
    if bad:
        raise DataError(
            f"{shown(source)}: {len(bad)} of {len(wanted)} images of the run are missing or changed: "
            f"{listed(list(bad.values()))}; put the original files back, or evaluate other data"
        )
    return images


# --- the manifest ---


def manifest_csv(images: ImageSet) -> str:
    """The samples of a set as CSV with the columns path, label (the class name), split, bytes and sha256.

    The names of an image's classes are joined by '|' in a multi-label set, where class names have no '|'.
    """
    text = io.StringIO(newline="")
    plain = csv.writer(text, lineterminator="\n")
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    plain.writerow(MANIFEST_COLUMNS)
    for split in SPLITS:
        for sample in images.splits[split]:
            names = "|".join(images.classes[label] for label in sample.labels)
            row = [harmless(sample.path), harmless(names), split, sample.size, sample.digest]
            (quoted if "\r" in sample.path + names else plain).writerow(row)  # plain takes \r for the end of a line
    return text.getvalue()


def digest_of(images: ImageSet) -> str:
    """What tells one draw of images from another: of every path, class, split and content."""
    return hashlib.sha256(manifest_csv(images).encode()).hexdigest()[:16]


def parse_manifest(text: str, classes: tuple[str, ...]) -> Splits:
    """What `manifest_csv` wrote, as samples by split.

    Raises:
        DataError: The text is no such manifest, or a path in it leaves the data folder; names the line.
    """
    splits: Splits = {split: [] for split in SPLITS}
    labels = {name: label for label, name in enumerate(classes)}
    rows = csv.reader(io.StringIO(text, newline=""))
    try:
        if next(rows, None) != MANIFEST_COLUMNS:
            raise ValueError(f"the columns {','.join(MANIFEST_COLUMNS)} were expected")
        for path, name, split, size, digest in rows:
            path, name = as_given(path), as_given(name)
            if "\0" in path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise ValueError(f"{path!r} leaves the data folder")
            names = [name] if name in labels else name.split("|") if name else []
            splits[split].append(_sample(path, tuple(labels[name] for name in names), int(size), digest))
    except (ValueError, KeyError, csv.Error) as error:
        raise DataError(f"manifest.csv: line {rows.line_num} cannot be used ({error}); the run is damaged") from None
    return splits
