"""Decode image files of any format and mode that Pillow supports to upright 8-bit RGB images."""

import functools
import math
import mimetypes
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

with suppress(ImportError):  # optional: HEIC, the format of iPhones
    from pillow_heif import register_heif_opener

    register_heif_opener()

STRIP_PIXELS = 2**22  # large images are converted in strips of this size
NOT_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow recognises, but cannot decode
RAW_EXTENSIONS = (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2")
HEIF_EXTENSIONS = (".heic", ".heif", ".hif")

PixelRange = tuple[float, float]  # the pixel values that become black and white


class ImageError(OSError):
    """An unreadable image file. The message is one line with the file's name and the reason."""

    def __str__(self) -> str:
        # A DataLoader prepends its worker's traceback to the message.
        return super().__str__().rstrip().rpartition("\n")[-1].rpartition("ImageError: ")[-1]


@functools.cache
def image_extensions() -> frozenset[str]:
    """Return the file extensions that the installed Pillow can decode, such as ".jpg", in lower case."""
    Image.init()
    formats = {*Image.OPEN, "MPO"} - NOT_DECODED - {"EPS"}  # Pillow opens MPO as JPEG; for EPS, see _open
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def is_image_file(path: str | os.PathLike) -> bool:
    """Return whether Pillow can decode a file with this extension or, if there is none, with this content."""
    if suffix := Path(path).suffix:
        return suffix.lower() in image_extensions()
    with suppress(ImageError):
        return read_header(path)[0] not in NOT_DECODED
    return False


def conversion_advice(path: str | os.PathLike) -> str | None:
    """Return advice if the extension is that of an image format that Pillow cannot decode, else None."""
    suffix = Path(path).suffix.lower()
    if suffix in image_extensions():
        return None
    if suffix in HEIF_EXTENSIONS:
        return "pip install pillow-heif, or convert it to JPEG"
    is_image = (mimetypes.guess_type(f"image{suffix}", strict=False)[0] or "").startswith("image/")
    return "convert it to JPEG or PNG" if is_image or suffix in (*RAW_EXTENSIONS, ".eps", ".jxl") else None


def read_image(
    path: str | os.PathLike, min_side: int | None = None, pixel_range: PixelRange | None = None
) -> Image.Image:
    """Read an image file as 8-bit RGB.

    The EXIF orientation is applied. Pixels with more than 8 bits are scaled linearly; transparent pixels become white;
    only the first frame of an animation is read.

    Args:
        min_side: the minimum length of the shorter side in pixels. A larger image is reduced to 1/2, 1/3, 1/4, ... of
            its size. JPEG files are reduced by powers of 2 while decoding, which is much faster.
        pixel_range: for images with more than 8 bits (16-bit, 32-bit or float grey), the values that become black and
            white. None: the image's own minimum and maximum.

    Raises:
        ImageError: the file is missing, unreadable, corrupt or not an image.
    """
    with _image_errors(path), _open(path) as file:
        if min_side is not None:
            factor = max(1, min(file.size) // min_side)
            file.draft(None, (math.ceil(file.width / factor), math.ceil(file.height / factor)))
        file.load()  # applies the orientation of a TIFF file
        if _has_wide_pixels(file):
            pixel_range = pixel_range or _value_range(file) or (0.0, 0.0)
        image = _to_rgb(file, max(1, min(file.size) // min_side) if min_side is not None else 1, pixel_range)
        image.info.clear()
        image.getexif()[ExifTags.Base.Orientation] = _orientation(file)
        ImageOps.exif_transpose(image, in_place=True)
        return image


def read_pixel_range(path: str | os.PathLike) -> PixelRange | None:
    """Return an image's minimum and maximum pixel value.

    None for an image of at most 8 bits per channel, or without a finite value.

    Raises:
        ImageError: see `read_image`.
    """
    with _image_errors(path), _open(path) as file:
        if not _has_wide_pixels(file):
            return None
        file.load()
        return _value_range(file)


def merge_pixel_ranges(ranges: Iterable[Sequence[float] | None]) -> PixelRange | None:
    """Return the smallest range that contains all `ranges`; None if all of them are None."""
    known = [pair for pair in ranges if pair is not None]
    return (min(low for low, _ in known), max(high for _, high in known)) if known else None


def read_header(path: str | os.PathLike) -> tuple[str, str, tuple[int, int]]:
    """Read an image's format, mode, and upright width and height in pixels from the header of its file.

    Raises:
        ImageError: the header is unreadable.
    """
    with _image_errors(path), _open(path) as file:
        size = file.size
        if file.format == "TIFF":  # newer versions of Pillow apply the orientation themselves
            size = file.tag_v2[ExifTags.Base.ImageWidth], file.tag_v2[ExifTags.Base.ImageLength]
        size = size[::-1] if _orientation(file) >= 5 else size  # rotated by 90 degrees
        return file.format or "unknown", file.mode, size


def aspect_ratio(path: str | os.PathLike) -> float:
    """Return the ratio of the longer side to the shorter one.

    Raises:
        ImageError: the header is unreadable.
    """
    with _image_errors(path), _open(path) as file:  # ignores the orientation: to read it, a PNG would be decoded
        return max(file.size) / min(file.size)


def _open(path: str | os.PathLike) -> Image.Image:
    if not stat.S_ISREG(Path(path).stat().st_mode):  # opening a pipe would block
        raise ValueError("not a file")
    image = Image.open(path)
    if image.format == "EPS":  # Pillow would execute it with Ghostscript
        image.close()
        raise ValueError("a PostScript program")
    return image


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, or 1 (upright) if it is missing or corrupt."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001 - corrupt tags raise nearly anything, and the pixels are still usable
        return 1
    return orientation if orientation in range(1, 9) else 1


@contextmanager
def _image_errors(path: str | os.PathLike) -> Iterator[None]:
    """Convert all of Pillow's exceptions to an ImageError with the file's name, and suppress its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise ImageError(f"cannot read image {os.fspath(path)!r}: {_reason(error, path)}") from error


def _reason(error: Exception, path: str | os.PathLike) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        advice = conversion_advice(path)
        return f"unsupported image format ({advice})" if advice else "not an image, or of an unknown format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _has_wide_pixels(image: Image.Image) -> bool:
    """Return whether an image is grey with more than 8 bits, which Pillow would clip at 255."""
    return image.mode == "F" or image.mode.startswith("I")


def _strips(image: Image.Image, factor: int = 1) -> list[tuple[int, int, int, int]]:
    """Split an image into boxes of full width and a multiple of `factor` rows, to limit the memory for huge images."""
    rows = factor * max(1, STRIP_PIXELS // (image.width * factor))
    return [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]


def _value_range(image: Image.Image) -> PixelRange | None:
    """Return the minimum and maximum of the finite pixel values, or None if there are none."""
    extremes = []
    for box in _strips(image):
        values = np.asarray(image.crop(box))
        if (values := values[np.isfinite(values)]).size:
            extremes += [float(values.min()), float(values.max())]
    return (min(extremes), max(extremes)) if extremes else None


def _to_rgb(image: Image.Image, factor: int, pixel_range: PixelRange | None) -> Image.Image:
    """Convert to RGB at 1/factor of the size."""
    boxes = _strips(image, factor)
    if len(boxes) == 1:
        return _strip_to_rgb(image, pixel_range).reduce(factor)
    result = Image.new("RGB", (math.ceil(image.width / factor), math.ceil(image.height / factor)))
    for box in boxes:
        result.paste(_strip_to_rgb(image.crop(box), pixel_range).reduce(factor), (0, box[1] // factor))
    return result


def _strip_to_rgb(image: Image.Image, pixel_range: PixelRange | None) -> Image.Image:
    if _has_wide_pixels(image):
        image = _scale_to_8_bits(np.asarray(image, dtype=np.float64), *pixel_range)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _scale_to_8_bits(values: np.ndarray, low: float, high: float) -> Image.Image:
    """Map `low` to black and `high` to white, and clip values beyond them. NaN becomes black."""
    finite = np.nan_to_num(values, nan=low, posinf=high, neginf=low).clip(low, high)
    scale = 255 / (high - low) if high > low else 0.0
    return Image.fromarray(np.rint((finite - low) * scale).astype(np.uint8))
