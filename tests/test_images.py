"""One image file: every format is read rightly, and what is damaged is refused."""

import io
from pathlib import Path

import numpy as np
import pytest
from checks import refused
from PIL import Image

from kadapt_cli.errors import DataError
from kadapt_cli.images import FORMATS, decode_image, quiet_decoder, read_image


def save_png(path: Path, image: Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG")
    return path


@pytest.mark.parametrize("part", range(10))
def test_truncated_photos_are_refused_at_every_length(photos: Path, part: int) -> None:
    content = sorted((photos / "rose").iterdir())[0].read_bytes()
    with pytest.raises(DataError):
        decode_image(content[: len(content) * part // 10], "cut.jpg")


@pytest.mark.parametrize("kind", FORMATS)
def test_whatever_byte_is_damaged_the_result_is_rgb_or_a_data_error(kind: str) -> None:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (9, 8, 7)).save(out, kind)
    refusals = 0
    for place in range(min(400, len(out.getvalue()))):
        for value in (0, 1, 2, 255):
            content = bytearray(out.getvalue())
            content[place] = value
            with quiet_decoder():
                try:
                    assert decode_image(bytes(content), "x").mode == "RGB"
                except DataError:
                    refusals += 1
    assert refusals > 20


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
