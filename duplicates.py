"""Find near-identical images: the same picture re-encoded, resized or slightly changed."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from cli_utils import map_files
from image_folders import Skipped, file_checksum, unreadable
from image_io import ImageError, PixelRange, merge_pixel_ranges, read_header, read_image, read_pixel_range
from my_dataset import EXTREME, is_extreme

# Thresholds for near-identical images, measured on photographs and drawn flowers of 64 px or more. Copies (re-encoded
# at quality 30 or more, or resized smoothly by a factor of 0.5 to 2) differ by at most 5 bits, 3.6 luma and 9.2 chroma.
# Among 2,936 photographs and 1,000 drawn flowers, no two distinct images with hashes that close differ by less than
# 6.7 luma. On 28 px digits the ranges overlap: quality 30 costs up to 5.3 luma, and two different images may differ by
# less.
THUMBNAIL = 16  # side length in pixels
HASH_BITS = 63  # an 8 x 8 block of DCT coefficients without the mean
MIN_COEFFICIENT = 1.0  # grey levels; weaker variation may be noise and is ignored
MAX_BITS = 8  # Hamming distance
MAX_LUMA, MAX_CHROMA = 5.0, 12.0  # RMS differences of thumbnails; JPEG compresses chroma more
MAX_SPREAD = 3  # multiple of these limits allowed between a group's first image and the others

# Pages of text and the frames of a fixed camera look alike as thumbnails, so `detail_difference` compares blocks of
# larger images. For the same copies of photographs, drawn flowers and pages, it is at most 0.28 (0.33 after box
# filtering, 0.35 if both resized and re-encoded at quality 30). For different images with similar thumbnails, it is at
# least 0.98 (pages), 0.50 (forms with other words) and 0.63 (photographs with another object of a tenth of the side),
# but only 0.29 if that object is a sixteenth of the side, in images of 128 px.
DETAIL = 192  # maximum side length in pixels
BLOCK = 8  # side length in pixels
NOISE = np.array([14.0, 28.0, 28.0], dtype=np.float32)  # standard deviations of Y, Cb and Cr, in grey levels
MAX_DETAIL_DIFFERENCE = 0.4
MAX_COMPARED = 4  # each image is compared with this many others, those with the most similar thumbnails

HASH_PAIRS_PER_BATCH = 2**20
THUMBNAIL_PAIRS_PER_BATCH = 2**12  # fits into the CPU cache
THUMBNAIL_ROWS = 256  # rows of the distance matrix that are computed at once


def make_thumbnail(image: Image.Image) -> np.ndarray:
    """Resize an RGB image of any aspect ratio to a YCbCr thumbnail, (16, 16, 3) uint8."""
    small = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
    return np.asarray(small.convert("YCbCr"))


def perceptual_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """Hash thumbnails (N, 16, 16, 3) uint8 to (N,) uint64: 63 bits, few of which change when an image is re-encoded.

    The bits come from the low frequencies of the luma's DCT, after the "DCT based" hash of Zauner (2010),
    https://www.phash.org/docs/pubs/thesis_zauner.pdf. A bit is set if its coefficient is above `MIN_COEFFICIENT`;
    Zauner's threshold is the median, which depends on noise in flat images.
    """
    frequency, place = np.ogrid[:8, :THUMBNAIL]
    basis = np.cos(np.pi * frequency * (2 * place + 1) / (2 * THUMBNAIL)) * np.sqrt(2 / THUMBNAIL)
    basis[0] /= np.sqrt(2)
    basis = basis.astype(np.float32)
    coefficients = basis @ thumbnails[..., 0].astype(np.float32) @ basis.T / THUMBNAIL
    bits = coefficients.reshape(-1, 64)[:, 1:] > MIN_COEFFICIENT
    return bits @ (np.uint64(1) << np.arange(HASH_BITS, dtype=np.uint64))


def group_near_identical(hashes: np.ndarray, thumbnails: np.ndarray) -> np.ndarray:
    """Group images that are near-identical, directly or through a chain of others.

    Two images are near-identical if their hashes differ by at most `MAX_BITS` bits and their thumbnails by at most
    `MAX_LUMA` and `MAX_CHROMA`. A long chain (the frames of a film, shades of grey) is split by `MAX_SPREAD`.

    Args:
        hashes: (N,) uint64, from `perceptual_hashes`.
        thumbnails: (N, 16, 16, 3) uint8.

    Returns:
        (N,) int64: for each image, the index of the first image of its group.
    """
    first: dict[bytes, int] = {}
    groups = np.array([first.setdefault(pixels.tobytes(), i) for i, pixels in enumerate(thumbnails)], dtype=np.int64)
    distinct = np.unique(groups)  # compares thousands of blank images only once
    for left, right in near_hash_pairs(hashes[distinct], thumbnails[distinct, ..., 0].mean((1, 2))):
        left, right = distinct[left], distinct[right]
        for start in range(0, len(left), THUMBNAIL_PAIRS_PER_BATCH):
            a, b = (side[start : start + THUMBNAIL_PAIRS_PER_BATCH] for side in (left, right))
            apart = groups[a] != groups[b]  # some groups have since been merged
            a, b = a[apart], b[apart]
            similar = _are_similar(thumbnails[a], thumbnails[b])
            _merge(groups, a[similar], b[similar])
    _split_chains(groups, thumbnails)
    return groups


def nearest_thumbnails(thumbnails: np.ndarray) -> list[list[int]]:
    """Return for each thumbnail (N, 16, 16, 3) uint8 the indices of the `MAX_COMPARED` most similar ones before it."""
    luma = thumbnails[..., 0].reshape(len(thumbnails), -1).astype(np.float32)
    squares = np.square(luma).sum(1)
    nearest = []
    for start in range(0, len(luma), THUMBNAIL_ROWS):
        distances = squares - 2 * luma[start : start + THUMBNAIL_ROWS] @ luma.T  # up to a constant per row
        for i, row in enumerate(distances, start):
            count = min(i, MAX_COMPARED)
            nearest.append(np.argpartition(row[:i], count - 1)[:count].tolist() if count else [])
    return nearest


def make_detail(image: Image.Image) -> Image.Image:
    """Reduce an RGB image of any aspect ratio for `detail_difference`, to 192 x 192 px or less."""
    return image.resize((min(DETAIL, image.width), min(DETAIL, image.height)), Image.Resampling.BILINEAR)


def detail_difference(left: Image.Image, right: Image.Image) -> float:
    """Compare two images from `make_detail` at the smaller of their sizes.

    Both are slightly blurred, because copies differ most in the highest frequencies.

    Returns:
        The maximum over all blocks and channels of the mean squared difference, divided by the sum of both images'
        variances in the block and that of `NOISE`. It is about 0 for copies, and 1 for unrelated textures.
    """
    size = tuple(max(BLOCK, min(sides) // BLOCK * BLOCK) for sides in zip(left.size, right.size, strict=True))
    pixels = []
    for image in (left, right):
        blurred = image.resize(size, Image.Resampling.BILINEAR).filter(ImageFilter.GaussianBlur(1))
        pixels.append(np.asarray(blurred.convert("YCbCr"), dtype=np.float32))
    variances = sum(_block_means(np.square(values)) - np.square(_block_means(values)) for values in pixels)
    differences = _block_means(np.square(pixels[0] - pixels[1]))
    return float((differences / (variances + NOISE**2)).max())


def near_hash_pairs(hashes: np.ndarray, brightness: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Find all pairs of hashes that differ by at most `MAX_BITS` bits, and in brightness by at most `MAX_LUMA`.

    If hashes are split into `MAX_BITS` + 1 chunks, two such hashes have at least one chunk in common: "Fast Search in
    Hamming Space with Multi-Index Hashing" (Norouzi et al. 2012, https://arxiv.org/abs/1307.2982). Hashes with a common
    chunk are sorted by brightness, and each is compared with the next few.

    Args:
        hashes: (N,) uint64.
        brightness: (N,) floats from 0 to 255.

    Yields:
        The indices of the first and second hashes of a batch of pairs, (M,) int64 each. Each pair occurs once.
    """
    width = -(-HASH_BITS // (MAX_BITS + 1))
    mask = np.uint64(2**width - 1)
    for shift in range(0, HASH_BITS, width):
        chunk = (hashes >> np.uint64(shift)) & mask
        keys = chunk * 1024.0 + brightness  # the chunks are further apart than any brightness
        order = np.argsort(keys)
        keys, codes = keys[order], hashes[order]
        counts = np.searchsorted(keys, keys + MAX_LUMA + 1e-6, side="right") - np.arange(len(keys)) - 1
        ends = np.cumsum(counts)
        following = np.arange(1, len(keys) + 1) - ends + counts
        start = 0
        while start < len(keys):
            before = ends[start] - counts[start]
            stop = max(start + 1, int(np.searchsorted(ends, before + HASH_PAIRS_PER_BATCH, side="right")))
            left = np.repeat(np.arange(start, stop), counts[start:stop])
            right = np.arange(before, ends[stop - 1]) + np.repeat(following[start:stop], counts[start:stop])
            differing = codes[left] ^ codes[right]
            near = np.flatnonzero(_count_bits(differing) <= MAX_BITS)
            for earlier in range(0, shift, width):  # drop pairs already found by an earlier chunk
                near = near[(differing[near] >> np.uint64(earlier)) & mask != 0]
            yield order[left[near]], order[right[near]]
            start = stop


_BITS = np.array([bin(value).count("1") for value in range(2**16)], dtype=np.uint8)  # np.bitwise_count needs NumPy 2.0
# (16 * 16 * 3, 2): averages the luma, and both chroma channels, of flattened thumbnails
_MEANS = np.tile(np.array([[1, 0], [0, 0.5], [0, 0.5]], dtype=np.float32) / THUMBNAIL**2, (THUMBNAIL**2, 1))


def _count_bits(values: np.ndarray) -> np.ndarray:
    counts = _BITS[values.view(np.uint16)].reshape(-1, 4)
    return counts[:, 0] + counts[:, 1] + counts[:, 2] + counts[:, 3]


def _are_similar(left: np.ndarray, right: np.ndarray, spread: float = 1) -> np.ndarray:
    """Return whether thumbnails (N, 16, 16, 3) uint8 differ by at most `spread` times the limits: (N,) bool."""
    difference = np.subtract(left, right, dtype=np.float32).reshape(-1, 3 * THUMBNAIL**2)
    luma, chroma = (np.square(difference, out=difference) @ _MEANS).T
    return (luma <= (spread * MAX_LUMA) ** 2) & (chroma <= (spread * MAX_CHROMA) ** 2)


def _block_means(pixels: np.ndarray) -> np.ndarray:
    """Average an image, (height, width, 3), over blocks of `BLOCK` x `BLOCK` px."""
    height, width = pixels.shape[0] // BLOCK, pixels.shape[1] // BLOCK
    return pixels.reshape(height, BLOCK, -1).mean(1).reshape(height, width, BLOCK, 3).mean(2)


def _merge(groups: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Merge the groups of the given pairs in place (union-find); `groups` maps each image to its group's first."""
    for a, b in zip(groups[left].tolist(), groups[right].tolist(), strict=True):
        while groups[a] != a:
            a = groups[a]
        while groups[b] != b:
            b = groups[b]
        groups[max(a, b)] = min(a, b)
    while len(left) and (groups[groups] != groups).any():
        groups[:] = groups[groups]


def _split_chains(groups: np.ndarray, thumbnails: np.ndarray) -> None:
    """Keep in each group only the images similar to its first one; regroup the others in the same way."""
    order = np.argsort(groups, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        while len(members) > 1:
            close = _are_similar(thumbnails[members[:1]], thumbnails[members], MAX_SPREAD)
            groups[members[close]] = members[0]
            members = members[~close]
            groups[members] = members[:1]


# --- files --------------------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """An image file's header, checksum and thumbnail (see `make_thumbnail`), or the reason why it is skipped."""

    skipped: Skipped | None
    format: str = ""
    mode: str = ""
    size: tuple[int, int] = (0, 0)  # width and height in pixels, upright
    checksum: str = ""
    thumbnail: np.ndarray | None = None


def read_pictures(paths: Sequence[str], workers: int | None = None) -> tuple[list[Picture], PixelRange | None]:
    """Read image files, and the pixel range of those with more than 8 bits."""
    pixel_range = merge_pixel_ranges(map_files(pixel_range_or_none, paths, workers, "reading headers"))
    read = functools.partial(read_picture, pixel_range=pixel_range)
    return list(map_files(read, paths, workers, "reading images")), pixel_range


def pixel_range_or_none(path: str) -> PixelRange | None:
    """Call `read_pixel_range`; return None for an unreadable image, which is reported when it is read."""
    try:
        return read_pixel_range(path)
    except ImageError:
        return None


def read_picture(path: str, pixel_range: PixelRange | None) -> Picture:
    """Read an image file's header, thumbnail and checksum."""
    try:
        header = read_header(path)
        thumbnail = make_thumbnail(read_image(path, min_side=8 * THUMBNAIL, pixel_range=pixel_range))
        checksum = file_checksum(path)
        if checksum is None:
            raise ImageError(f"cannot read image {path!r}: it has been removed")
    except ImageError as error:
        return Picture(unreadable(path, error))
    return Picture(Skipped(path, EXTREME, EXTREME) if is_extreme(path) else None, *header, checksum, thumbnail)


def find_duplicates(
    paths: Sequence[str], pictures: Sequence[Picture], pixel_range: PixelRange | None, workers: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Find images that show the same picture.

    Args:
        pictures: of the usable images `paths`, at least one.

    Returns:
        (N,) int64: for each image, the index of the first image that shows the same picture; and (N,) int64: the index
        of the first image whose thumbnail looks alike.
    """
    thumbnails = np.stack([picture.thumbnail for picture in pictures])
    alike = group_near_identical(perceptual_hashes(thumbnails), thumbnails)
    return compare_in_detail(paths, pictures, thumbnails, alike, pixel_range, workers), alike


def compare_in_detail(
    paths: Sequence[str],
    pictures: Sequence[Picture],
    thumbnails: np.ndarray,
    alike: np.ndarray,
    pixel_range: PixelRange | None,
    workers: int | None,
) -> np.ndarray:
    """Read images that look alike as thumbnails again, and compare them in detail, unless their files are identical.

    Args:
        alike: (N,) int64: for each image, the group of the images that look like it.

    Returns:
        (N,) int64: for each image, the index of the first image that shows the same picture.
    """
    first: dict[str, int] = {}
    identical = np.array([first.setdefault(picture.checksum, i) for i, picture in enumerate(pictures)])
    distinct = np.unique(identical)
    distinct = distinct[np.argsort(alike[distinct], kind="stable")]
    pairs = []  # for each image, its index and those of the images to compare it with
    for group in np.split(distinct, np.flatnonzero(np.diff(alike[distinct])) + 1):
        nearest = nearest_thumbnails(thumbnails[group])
        pairs += [(i, group[others]) for i, others in zip(group, nearest, strict=True) if others]
    files = [[paths[i], *(paths[j] for j in others)] for i, others in pairs]
    same = np.arange(len(paths))
    compare = functools.partial(same_in_detail, pixel_range=pixel_range)
    for (i, others), equal in zip(pairs, map_files(compare, files, workers, "comparing images"), strict=True):
        for j in others[equal]:
            if same[i] != same[j]:
                same[same == max(same[i], same[j])] = min(same[i], same[j])
    return same[identical]


def same_in_detail(paths: Sequence[str], pixel_range: PixelRange | None) -> list[bool]:
    """Return for each image file after the first whether it shows the same picture as the first."""
    detail, *others = (make_detail(read_image(path, 2 * DETAIL, pixel_range)) for path in paths)
    return [detail_difference(detail, other) <= MAX_DETAIL_DIFFERENCE for other in others]
