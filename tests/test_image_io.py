"""Decoding image files of every format and mode."""

import itertools
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile

import image_io
from image_io import (
    ImageError,
    conversion_advice,
    is_image_file,
    merge_pixel_ranges,
    read_header,
    read_image,
    read_pixel_range,
)

RAMP = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)


def saved(path: Path, image: Image.Image, **options) -> np.ndarray:
    image.save(path, **options)
    return np.asarray(read_image(path))


WRITABLE = {
    "png": ["1", "L", "P", "RGB", "RGBA", "LA"],
    "bmp": ["1", "L", "P", "RGB", "RGBA"],
    "gif": ["1", "L", "P", "RGB", "RGBA", "LA"],
    "tif": ["1", "L", "P", "RGB", "RGBA", "CMYK", "LA"],
    "webp": ["L", "RGB", "RGBA", "LA"],
    "jpg": ["1", "L", "RGB", "CMYK"],
}


@pytest.mark.parametrize(("extension", "mode"), [(ext, mode) for ext, modes in WRITABLE.items() for mode in modes])
def test_every_mode_is_converted_to_rgb(tmp_path, extension, mode):
    colour = Image.fromarray(np.dstack([RAMP, RAMP.T, 255 - RAMP])).resize((64, 64), Image.Resampling.NEAREST)
    image = colour.convert(mode)
    image.save(tmp_path / f"a.{extension}", **({"lossless": True} if extension == "webp" else {}))
    read = read_image(tmp_path / f"a.{extension}")
    assert (read.mode, read.size) == ("RGB", (64, 64))
    if extension not in ("jpg", "gif"):
        expected = image.convert("RGBA" if "A" in mode else "RGB").convert("RGB")
        assert np.abs(np.asarray(read).astype(int) - np.asarray(expected)).max() <= 2


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, extension):
    pixels = saved(tmp_path / f"a.{extension}", Image.fromarray(RAMP.astype(np.uint16) * 257))
    assert np.array_equal(pixels, np.dstack([RAMP] * 3))


@pytest.mark.parametrize("white", [1.0, 255.0, 4000.0])
def test_float_images_are_scaled(tmp_path, white):
    pixels = saved(tmp_path / "a.tif", Image.fromarray((RAMP / 255 * white).astype(np.float32)))
    assert np.abs(pixels.astype(int) - RAMP[..., None]).max() <= 1


def test_transparent_pixels_become_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    pixels = saved(tmp_path / "a.png", image)
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[3, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.jpg", {}), ("a.png", {}), ("a.webp", {}), ("a.tif", {}), ("a.tif", {"compression": "tiff_lzw"})],
)
def test_exif_orientation_is_applied(tmp_path, name, options):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be displayed rotated by 90 degrees clockwise
    pixels = saved(tmp_path / name, image, exif=exif, **options)
    assert pixels.shape == (40, 20, 3)
    assert pixels[:18].mean() > 250
    assert pixels[22:].mean() < 5


def jpeg(path: Path, size: tuple[int, int] = (1600, 1200), orientation: int = 1) -> Path:
    """Write a smooth JPEG without repeated regions, tagged with an EXIF orientation."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.dstack([x, y, 127 + 60 * np.sin(x / 9) * np.cos(y / 7)]).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, quality=95, exif=exif)
    return path


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize(
    ("min_side", "factor"), [(1300, 1), (601, 1), (600, 2), (301, 2), (300, 4), (100, 8), (75, 16)]
)
def test_downscaling_respects_min_side(tmp_path, orientation, min_side, factor):
    image = read_image(jpeg(tmp_path / "a.jpg", orientation=orientation), min_side)
    width, height = (1200, 1600) if orientation in (6, 8) else (1600, 1200)
    assert image.size == (math.ceil(width / factor), math.ceil(height / factor))


def test_jpeg_is_scaled_during_decoding(tmp_path, monkeypatch):
    decoded = []
    load = JpegImageFile.load
    monkeypatch.setattr(JpegImageFile, "load", lambda image: decoded.append(image.size) or load(image))
    read_image(jpeg(tmp_path / "a.jpg"), 150)
    assert set(decoded) == {(200, 150)}


@pytest.mark.parametrize(("mode", "factor"), [("RGB", 3), ("L", 3), ("P", 3), ("RGBA", 3), ("I;16", 3), ("1", 3)])
def test_other_formats_are_scaled_after_decoding(tmp_path, mode, factor):
    picture = Image.new("RGB", (320, 300), "red").convert("L" if mode == "I;16" else mode).convert(mode)
    picture.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 100).size == (math.ceil(320 / factor), 100)
    assert read_image(tmp_path / "a.png", 151).size == (320, 300)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16", "F"])
@pytest.mark.parametrize("min_side", [None, 40])
def test_huge_images_are_processed_in_strips(tmp_path, monkeypatch, mode, min_side):
    red, green, blue = (np.roll(RAMP.repeat(16, 0).repeat(16, 1), shift, 1) for shift in (0, 31, 77))
    picture = Image.fromarray(np.dstack([red, green, blue, blue]))
    if mode in ("I;16", "F"):
        picture = Image.fromarray(red.astype(np.uint16) * 257 if mode == "I;16" else red.astype(np.float32) * 9)
    picture = picture.convert(mode) if mode != "P" else picture.quantize(50)
    picture.save(tmp_path / "a.tif")
    whole = read_image(tmp_path / "a.tif", min_side)
    modes = []
    convert = Image.Image.convert
    monkeypatch.setattr(image_io, "STRIP_PIXELS", 1000)
    monkeypatch.setattr(Image.Image, "convert", lambda image, *mode: modes.append(image.size) or convert(image, *mode))
    strips = read_image(tmp_path / "a.tif", min_side)
    assert max(height for _, height in modes) < whole.height
    assert np.array_equal(np.asarray(strips), np.asarray(whole))
    assert np.asarray(whole).std() > 10


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("largest", [1, 1.01, 255, 256, 4095, 65535, 65536])
def test_wide_pixels_are_scaled_linearly_from_the_given_range(tmp_path, kind, largest):
    if kind != np.float32 and (largest != int(largest) or (kind == np.uint16 and largest > 65535)):
        return
    values = np.array([[0, largest / 2, largest]]).astype(kind).repeat(8, 0)
    if kind != np.uint16:
        values = np.hstack([-values, values])
    Image.fromarray(values).save(tmp_path / "a.tif")
    low, high = (0.0 if kind == np.uint16 else -largest), largest
    assert read_pixel_range(tmp_path / "a.tif") == pytest.approx((low, high))
    for limits in ((low, high), (low, 2 * high), (0.0, high)):
        pixels = np.asarray(read_image(tmp_path / "a.tif", pixel_range=limits)).astype(int)
        expected = (values.astype(float) - limits[0]).clip(0) / (limits[1] - limits[0]) * 255
        assert np.abs(pixels - expected[..., None]).max() <= 0.51
    assert np.array_equal(read_image(tmp_path / "a.tif"), read_image(tmp_path / "a.tif", pixel_range=(low, high)))


def test_range_ignores_non_finite_pixels(tmp_path):
    values = np.array([[np.nan, np.inf, -np.inf, 2, 4, 6]], dtype=np.float32).repeat(6, 0)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert read_pixel_range(tmp_path / "a.tif") == (2, 6)
    assert np.asarray(read_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 255, 0, 0, 128, 255]
    for flat in (np.full((4, 4), 7, np.float32), np.full((4, 4), np.nan, np.float32)):
        Image.fromarray(flat).save(tmp_path / "a.tif")
        assert np.asarray(read_image(tmp_path / "a.tif")).max() == 0
    assert read_pixel_range(tmp_path / "a.tif") is None  # must not extend the dataset's range to 0


def test_8_bit_images_have_no_range(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    assert read_pixel_range(tmp_path / "a.png") is None
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png", pixel_range=(0, 9)))[..., 0], RAMP)
    assert merge_pixel_ranges([None, (0, 7), (-2, 3), None]) == (-2, 7)
    assert merge_pixel_ranges([None]) is None


def test_known_formats_are_those_of_pillow(tmp_path):
    for name in ("a.jpg", "a.JFIF", "a.jpe", "a.jp2", "a.tga", "a.ppm", "a.ico"):
        assert is_image_file(tmp_path / name)
    for name in ("a.txt", "a.h5", "a.heic", "a.eps", "a.pdf", "a.db"):
        assert not is_image_file(tmp_path / name)
    for name in ("a.heic", "b.HEIF", "a.svg", "a.nef", "a.eps"):
        assert conversion_advice(tmp_path / name)
    for name in ("a.jpg", "a.txt", "a", "a.h5"):
        assert conversion_advice(tmp_path / name) is None
    Image.fromarray(RAMP).save(tmp_path / "photo", "PNG")
    (tmp_path / "notes").write_text("words")
    assert is_image_file(tmp_path / "photo")
    assert not is_image_file(tmp_path / "notes")
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(ImageError, match=r"a\.heic'\: unsupported image format \(pip install pillow-heif"):
        read_image(tmp_path / "a.heic")


def test_header_size_respects_exif_orientation(tmp_path):
    for name, orientation in itertools.product(("a.jpg", "a.png", "a.tif"), (1, 6)):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        Image.new("RGB", (40, 20)).save(tmp_path / name, exif=exif)
        assert read_header(tmp_path / name)[2] == read_image(tmp_path / name).size


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("exif", [b"Exif\0\0damaged", b"MM\0*\0\0\0\x08\0\1\x01\x12\0\2\0\0\0\1\x36\0\0\0\0\0\0\0"])
def test_corrupt_exif_is_ignored(tmp_path, name, exif):
    Image.new("RGB", (40, 20), "red").save(tmp_path / name, exif=exif)
    assert read_image(tmp_path / name).size == (40, 20)


def test_pillow_warnings_are_suppressed(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with Image.open(tmp_path / "a.jpg") as image:
            image.getexif()
        assert shown
        shown.clear()
        assert read_image(tmp_path / "a.jpg").size == (40, 20)
        assert not shown


def test_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pixels = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert pixels[0, 0].tolist() == [255, 0, 0]
