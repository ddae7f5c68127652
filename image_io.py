"""Decode image files of any format and mode that Pillow supports to upright 8-bit RGB images."""

import math
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

STRIP_PIXELS = 2**22  # large images are converted in strips of this size


class ImageError(OSError):
    """An unreadable image file. The message is one line with the file's name and the reason."""

    def __str__(self) -> str:
        # A DataLoader prepends its worker's traceback to the message.
        return super().__str__().rstrip().rpartition("\n")[-1].rpartition("ImageError: ")[-1]


def read_image(path: str | os.PathLike, min_side: int | None = None) -> Image.Image:
    """Read an image file as 8-bit RGB.

    The EXIF orientation is applied. 16-bit grey is scaled, not clipped; transparent pixels become white; only
    the first frame of an animation is read.

    Args:
        min_side: the minimum length of the shorter side in pixels. A larger image is reduced to 1/2, 1/3, 1/4, ... of
            its size. JPEG files are reduced by powers of 2 while decoding, which is much faster.

    Raises:
        ImageError: the file is missing, unreadable, corrupt or not an image.
    """
    return decode(path, min_side)[0]


def decode(path: str | os.PathLike, min_side: int | None = None) -> tuple[Image.Image, bool]:
    """Read an image like `read_image`. Returns the image, and whether it has been reduced."""
    with _image_errors(path), _open(path) as file:
        full_size = min(file.size)
        if min_side is not None:
            factor = max(1, full_size // min_side)
            file.draft(None, (math.ceil(file.width / factor), math.ceil(file.height / factor)))
        file.load()  # applies the orientation of a TIFF file
        image = _to_rgb(file, max(1, min(file.size) // min_side) if min_side is not None else 1)
        image.info.clear()
        image.getexif()[ExifTags.Base.Orientation] = _orientation(file)
        ImageOps.exif_transpose(image, in_place=True)
        return image, min(image.size) < full_size


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
        raise ImageError(f"cannot read image {os.fspath(path)!r}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or of an unknown format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _to_rgb(image: Image.Image, factor: int) -> Image.Image:
    """Convert to RGB at 1/factor of the size, in strips to limit the memory for huge images."""
    rows = factor * max(1, STRIP_PIXELS // (image.width * factor))
    strips = [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]
    has_any_range = image.mode == "F" or (image.mode == "I" and image.format == "TIFF")
    white = max(_white_level(image.crop(strip)) for strip in strips) if has_any_range else 65535
    if len(strips) == 1:
        return _strip_to_rgb(image, white).reduce(factor)
    result = Image.new("RGB", (math.ceil(image.width / factor), math.ceil(image.height / factor)))
    for strip in strips:
        result.paste(_strip_to_rgb(image.crop(strip), white).reduce(factor), (0, strip[1] // factor))
    return result


def _strip_to_rgb(image: Image.Image, white: float) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow would clip values above 255
        image = Image.fromarray((_finite(image) / white * 255).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _white_level(image: Image.Image) -> float:
    """Return the value of white: by convention 1 or 255 (floats), 1, 255 or 65535 (integers); else the maximum."""
    largest, levels = _finite(image).max(initial=0), (1, 255) if image.mode == "F" else (1, 255, 65535)
    return next((level for level in levels if largest <= level), largest)


def _finite(image: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
