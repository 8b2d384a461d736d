"""One image file as 8-bit RGB, or a line that says why not."""

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from kadapt_cli.errors import DataError, shown

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # MPO, several JPEGs in one file, comes with JPEG
# Files with these endings are images; those in a format that is not read are refused by name rather than passed by.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".pnm", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".tga", ".psd", ".ico",
)  # fmt: skip
MAX_PIXELS = 89_478_485  # 256 MiB of RGB, where Pillow begins to warn
MAX_ASPECT = 200  # 1 x 10,000 pixels would become 224 x 2,240,000 before the evaluation crop
MAX_FILE_BYTES = 1 << 30
# What Pillow raises on damaged files of these formats.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def read_image(path: Path) -> Image.Image:
    """Read one image file as 8-bit RGB.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled by 1/257 and floating-point grey
    in 0..1 by 255, rounded to the nearest.

    Raises:
        DataError: The path and why: missing, empty, not an image, damaged, truncated, animated, or too large.
    """
    with quiet_decoder():
        return decode_image(read_bytes(path, str(path)), str(path))


def decode_image(data: bytes, name: str) -> Image.Image:
    """What `read_image` does, from the bytes of a file; `name` stands in the error."""
    if not data:
        raise DataError(f"{shown(name)}: the file is empty")
    with refusing(name), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return to_rgb(image)


@contextlib.contextmanager
def quiet_decoder() -> Iterator[None]:
    """Silence Pillow's warnings: what they warn of is either read all the same or refused by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def refusing(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises on a bad image into a `DataError` with the image's name and the reason."""
    try:
        yield
    except UnidentifiedImageError:
        raise DataError(f"{shown(name)}: not an image of a known format ({', '.join(FORMATS)})") from None
    except DECODE_ERRORS as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"{shown(name)}: {reason}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image as plain RGB; `ValueError` with the reason when it is too large, animated or out of range."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} is more than {MAX_PIXELS:,} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"one side of {width} x {height} is more than {MAX_ASPECT} times the other")
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise ValueError(f"animated or of several pages ({frames} frames)")
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bit(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    rgb = image.convert("RGB")
    rgb.info = {}  # embedded thumbnails and profiles would stay in memory with every kept image
    return rgb


def _to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit grey, or floating-point grey in 0..1, as 8-bit grey; Pillow's own conversion clips at 255."""
    values = np.asarray(image)
    top = 1.0 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= top):  # NaN fails this too
        raise ValueError(f"grey values from {values.min()} to {values.max()}, outside 0 to {top}")
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def read_bytes(path: Path, name: str) -> bytes:
    try:
        if not path.is_file():  # a pipe would be waited on for ever
            raise DataError(f"{shown(name)}: no such file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{shown(name)}: a file of more than {MAX_FILE_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{shown(name)}: cannot be read ({error.strerror})") from None
