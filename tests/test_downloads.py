"""Downloads: taken up again, held against a checksum, unpacked whole or not at all."""

import gzip
import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kadapt_cli import downloads
from kadapt_cli.errors import DataError


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`, but ends each of the first `cuts` answers half way through what was asked for."""

    content = b""
    cuts = 0
    ranges: list[str | None]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        body = self.server.content[start:]
        self.send_response(416 if not body else 206 if wanted else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.cuts > 0:
            self.server.cuts -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.ranges = []
    made.content = np.random.default_rng(0).bytes(1 << 20)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def download(server: Server, folder: Path, md5: str | None = None, name: str = "set.bin") -> bytes:
    from torchvision.datasets.utils import download_url

    with downloads.resumable():
        download_url(f"http://127.0.0.1:{server.server_port}/{name}", str(folder), md5=md5)
    return (folder / name).read_bytes()


def md5_of(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def test_a_broken_connection_is_taken_up_again(server: Server, tmp_path: Path) -> None:
    server.cuts = 2
    assert download(server, tmp_path, md5_of(server.content)) == server.content
    assert server.ranges == [None, "bytes=524288-", "bytes=786432-"]
    assert [path.name for path in tmp_path.iterdir()] == ["set.bin"]


def test_a_later_command_goes_on_where_the_first_stopped(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.bin.part").write_bytes(server.content[:1000])
    assert download(server, tmp_path, md5_of(server.content)) == server.content
    assert server.ranges == ["bytes=1000-"]
    (tmp_path / "set.bin").rename(tmp_path / "set.bin.part")
    assert download(server, tmp_path, md5_of(server.content)) == server.content


def test_a_server_that_is_gone_leaves_what_arrived(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.bin.part").write_bytes(server.content[:1000])
    with (
        pytest.raises(RuntimeError, match=r"/set.bin could not be fetched: .*refused; 1,000 bytes of it are kept"),
        downloads.resumable(),
    ):
        downloads._fetch("http://127.0.0.1:9/set.bin", tmp_path / "set.bin")
    assert (tmp_path / "set.bin.part").stat().st_size == 1000


def test_a_wrong_checksum_is_named_and_mended_by_another_try(server: Server, tmp_path: Path) -> None:
    right, server.content = server.content, b"something else"
    with pytest.raises(DataError, match=r"http://127.0.0.1:\d+/set.bin: the checksum of the download is not"):
        download(server, tmp_path, md5_of(right))
    server.content = right
    assert download(server, tmp_path, md5_of(right)) == right


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_files_that_torchvision_has_no_checksum_for_are_held_against_ours(
    kind: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When they come, and those that are there already."""
    right, server.content = server.content, b"something else"
    monkeypatch.setitem(downloads.CHECKSUMS, "set.bin", (kind, hashlib.new(kind, right).hexdigest()))
    for _ in range(2):
        with pytest.raises(DataError, match=r"http://127.0.0.1:\d+/set.bin: the checksum of the download is not"):
            download(server, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["set.bin"]
    server.content = right
    for _ in range(2):
        assert download(server, tmp_path) == right
    assert len(server.ranges) == 3  # the last was not fetched again


def test_patch_camelyon_comes_by_plain_http_and_is_unpacked_whole(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import PCAM

    pixels = server.content
    server.content = gzip.compress(pixels)
    server.cuts = 1
    files = {part: (f"{part}.h5", "", md5_of(server.content)) for part in ("images", "targets")}
    monkeypatch.setattr(downloads, "PCAM", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(PCAM, "_FILES", {"test": files})
    with downloads.resumable():
        PCAM(str(tmp_path), split="test", download=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "pcam").glob("*.h5")} == {
        "images.h5": pixels,
        "targets.h5": pixels,
    }
    assert sorted(path.name for path in (tmp_path / "pcam").iterdir() if path.suffix != ".h5") == [
        "images.h5.gz",
        "targets.h5.gz",
    ]
    assert server.ranges[0] is None
    assert server.ranges[1].startswith("bytes=")


def test_a_gzip_file_that_ends_early_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    write(tmp_path / "x.h5.gz", gzip.compress(np.random.default_rng(0).bytes(100_000))[:-1000])
    with pytest.raises(EOFError):
        downloads._decompress(str(tmp_path / "x.h5.gz"))
    assert not (tmp_path / "x.h5").exists()


def packed(archive: Path, *sources: Path, named: str) -> bytes:
    """A tar archive of files, in the folder `named` of it."""
    with tarfile.open(archive, "w") as made:
        for source in sources:
            made.add(source, f"{named}/{source.name}")
    return archive.read_bytes()


def unpack(archive: Path, target: Path, md5: str | None) -> None:
    """What torchvision does with a download: hold it against its checksum, then unpack it."""
    from torchvision.datasets import utils

    assert utils.check_integrity(str(archive), md5)
    utils.extract_archive(str(archive), str(target))


def test_an_archive_is_unpacked_whole_or_not_at_all_and_joins_what_is_there(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.bin", "b.bin")]
    for file in files:
        write(file, np.random.default_rng(0).bytes(100_000))
    whole = packed(tmp_path / "set.tar", *files, named="set/images")
    write(tmp_path / "here/set/labels/c.txt", "c")
    with downloads.resumable():
        write(tmp_path / "set.tar", whole[:150_000])
        with pytest.raises(tarfile.ReadError):
            unpack(tmp_path / "set.tar", tmp_path / "here", md5_of(whole[:150_000]))
        assert [path.name for path in (tmp_path / "here").rglob("*")] == ["set", "labels", "c.txt"]
        write(tmp_path / "set.tar", whole)
        unpack(tmp_path / "set.tar", tmp_path / "here", md5_of(whole))
    names = sorted(path.name for path in (tmp_path / "here").rglob("*.*"))
    assert names == ["a.bin", "b.bin", "c.txt"]


def test_an_archive_is_unpacked_only_if_a_checksum_holds(tmp_path: Path) -> None:
    """One of the user, say, that lies where a download would; but an archive in an archive (Caltech-101) is covered."""
    write(tmp_path / "a.txt", "a")
    packed(tmp_path / "inner.tar", tmp_path / "a.txt", named="images")
    outer = packed(tmp_path / "outer.tar", tmp_path / "inner.tar", named="parts")
    here = tmp_path / "here"
    with downloads.resumable():
        with pytest.raises(DataError, match=r"/outer.tar: no checksum is known .* unpack it yourself into .*/here if"):
            unpack(tmp_path / "outer.tar", here, None)
        assert not here.exists()
        unpack(tmp_path / "outer.tar", here, md5_of(outer))
        from torchvision.datasets import utils

        utils.extract_archive(str(here / "parts/inner.tar"), str(here))
    assert (here / "images/a.txt").read_text() == "a"


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt"])
def test_no_member_of_an_archive_leaves_its_folder(name: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as made:
        member = tarfile.TarInfo(name)
        member.size = 4
        made.addfile(member, io.BytesIO(b"evil"))
        link = tarfile.TarInfo("set/link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        made.addfile(link)
    with downloads.resumable(), pytest.raises(tarfile.FilterError):
        unpack(tmp_path / "set.tar", tmp_path / "a/here", md5_of((tmp_path / "set.tar").read_bytes()))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "here", "set.tar"]


def test_torchvision_is_left_as_it_was(server: Server, tmp_path: Path) -> None:
    from torchvision.datasets import utils

    before = (utils._urlretrieve, utils._get_redirect_url, utils.extract_archive)
    server.content = gzip.compress(b"pixels")
    with downloads.resumable():
        address = f"http://127.0.0.1:{server.server_port}/images-idx3-ubyte.gz"
        utils.download_and_extract_archive(address, str(tmp_path), md5=md5_of(server.content))
    assert (tmp_path / "images-idx3-ubyte").read_bytes() == b"pixels"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images-idx3-ubyte", "images-idx3-ubyte.gz"]
    assert (utils._urlretrieve, utils._get_redirect_url, utils.extract_archive) == before
