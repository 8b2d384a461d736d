"""Downloads of torchvision's data sets that can be taken up again, are held against a checksum, and are unpacked whole.

A download is unpacked only if a published checksum holds for it, or for the archive that it lay in.

torchvision knows where its sets are and what is in them; how a file comes here is replaced for the time of `resumable`.
"""

import contextlib
import gzip
import hashlib
import http.client
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import Progress

from kadapt_cli.errors import DataError
from kadapt_cli.progress import new_console

# Of files for which torchvision has no checksum. KITTI: TensorFlow Datasets, url_checksums/kitti.txt. FGVC-Aircraft:
# the page of the set at its authors, the Visual Geometry Group.
CHECKSUMS = {
    "data_object_image_2.zip": ("sha256", "351c5a2aa0cd9238b50174a3a62b846bc5855da256b82a196431d60ff8d43617"),
    "data_object_label_2.zip": ("sha256", "4efc76220d867e1c31bb980bbf8cbc02599f02a9cb4350effa98dbb04aaed880"),
    "fgvc-aircraft-2013b.tar.gz": ("md5", "d4acdd33327262359767eeaa97a4f732"),
}
# PatchCamelyon's files as its authors deposited them; torchvision's own source, a shared drive, needs another package
# and cannot go on where it stopped.
PCAM = "https://zenodo.org/records/2546921/files"


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Let torchvision download to FILE.part, go on there after an interruption, and unpack whole or not at all.

    Raises:
        DataError: A download that has another checksum than it should, or an archive that would be unpacked unchecked.
        RuntimeError: A file that cannot be fetched; what arrived of it is kept.
    """
    from torchvision.datasets import caltech, pcam, utils

    fetched: list[str] = []
    checked: set[Path] = set()  # archives whose checksum holds, and those that lay in them
    unpack, check = utils.extract_archive, utils.check_integrity
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)  # no member leaves the folder

    def is_whole(file: str | Path, md5: str | None = None) -> bool:
        path = Path(file)
        kind, expected = CHECKSUMS.get(path.name, ("", ""))
        whole = path.is_file() and _digest(path, kind) == expected if kind else bool(check(file, md5))
        if whole and (kind or md5):
            checked.add(path)
        return whole

    def fetch(url: str, filename: str | Path) -> None:
        fetched.append(url)
        _fetch(url, Path(filename))

    def fetch_pcam(file_id: str, root: str, filename: str, md5: str) -> None:
        utils.download_url(f"{PCAM}/{filename}", root, filename, md5)

    def unpack_whole(from_path: Any, to_path: Any = None, remove_finished: bool = False) -> None:
        target = Path(to_path or Path(from_path).parent)
        if Path(from_path) not in checked:
            raise DataError(
                f"{from_path}: no checksum is known to hold this archive against, so it is not unpacked; unpack it "
                f"yourself into {target} if you trust it"
            )
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".unpacking-") as scratch:
            unpack(from_path, scratch, remove_finished)
            checked.update(target / path.relative_to(scratch) for path in Path(scratch).rglob("*.tar*"))
            _move_into(Path(scratch), target)

    mended = [
        (utils, "check_integrity", is_whole),
        (utils, "_urlretrieve", fetch),
        (utils, "_get_redirect_url", lambda url, max_hops=3: url),  # urllib follows redirects; a probe is not needed
        (utils, "extract_archive", unpack_whole),
        (caltech, "extract_archive", unpack_whole),
        (pcam, "download_file_from_google_drive", fetch_pcam),
        (pcam, "_decompress", _decompress),
    ]
    kept = [(module, name, getattr(module, name)) for module, name, _ in mended]
    for module, name, own in mended:
        setattr(module, name, own)
    try:
        yield
    except RuntimeError as error:
        if fetched and "File not found or corrupted" in str(error):
            raise DataError(
                f"{fetched[-1]}: the checksum of the download is not the expected one; try again, and fetch it by "
                "other means if that does not help"
            ) from None
        raise
    finally:
        for module, name, original in kept:
            setattr(module, name, original)


def _fetch(url: str, file: Path) -> None:
    """Download a file by way of FILE.part, trying again as long as each try brings more of it."""
    part = file.with_name(f"{file.name}.part")
    while True:
        have = _size(part)
        try:
            _go_on(url, part, have)
            part.replace(file)
            return
        except (OSError, http.client.HTTPException) as error:
            if _size(part) <= have:
                kept = f"; {_size(part):,} bytes of it are kept" if _size(part) else ""
                # Not an OSError: torchvision would then try the same address without encryption.
                raise RuntimeError(f"{url} could not be fetched: {getattr(error, 'reason', error)}{kept}") from None


def _digest(file: Path, kind: str) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _go_on(url: str, part: Path, have: int) -> None:
    """One request for what comes after the first `have` bytes; from the start if the server cannot do that."""
    headers = {"User-Agent": "kadapt"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:
            return  # nothing comes after what is here; the checksum decides whether it is the file
        raise
    with response, Progress(console=new_console(stderr=True), transient=True) as progress:
        have = have if response.status == 206 else 0
        total = None if response.length is None else have + response.length
        bar = progress.add_task(url.rsplit("/", 1)[-1], total=total, completed=have)
        with part.open("ab" if have else "wb") as file:
            while chunk := response.read(1 << 18):
                progress.advance(bar, file.write(chunk))
    if total is not None and _size(part) < total:
        raise OSError(f"the connection ended after {_size(part):,} of {total:,} bytes")


def _decompress(archive: str) -> None:
    """Write FILE of FILE.gz: whole or not at all, and never all of it in memory."""
    target = Path(archive).with_suffix("")
    part = target.with_name(f".{target.name}.unpacking")
    with gzip.open(archive) as source, part.open("wb") as file:
        shutil.copyfileobj(source, file)
    part.replace(target)


def _move_into(source: Path, target: Path) -> None:
    """Move what a folder holds into another; a folder that both have is merged, a file is replaced."""
    for entry in source.iterdir():
        there = target / entry.name
        if entry.is_dir() and there.is_dir():
            _move_into(entry, there)
        else:
            entry.replace(there)
