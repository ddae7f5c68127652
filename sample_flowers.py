"""Draw the built-in sample dataset of five kinds of flowers, so that a first run needs no download.

    python sample_flowers.py FOLDER        # FOLDER/daisy/daisy_000.jpg ...

The classes are daisy, dandelion, roses, sunflowers and tulips. They differ in shape only, so that a network cannot
classify them by colour: the colours of petals and backgrounds have the same distribution in every class, and pose,
light and clutter vary.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

GOLDEN_ANGLE = np.pi * (3 - np.sqrt(5))  # between successive seeds or petals of a growing plant (Vogel 1979)
SAMPLE = Path(__file__).resolve().parent / "data" / "sample_flowers"
SUPERSAMPLE = 2  # draw larger, then scale down: Pillow's polygons have hard edges

# A flower is a sequence of filled outlines in painter's order, in units of its radius: (points (N, 2), colour).
Shapes = Iterator[tuple[np.ndarray, np.ndarray]]


def draw_sample(folder: str | os.PathLike, images_per_class: int = 60, size: int = 256, seed: int = 0) -> Path:
    """Draw the dataset into `folder`: one sub-folder per class with `images_per_class` JPEG files, `size` px square.

    `folder` appears only when it is complete. The pixels depend on the arguments only.

    Raises:
        FileExistsError: `folder` already exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} already exists; choose another folder, or remove this one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        unfinished.chmod(0o755)  # mkdtemp grants access to the owner only
        for kind in CLASS_NAMES:
            (unfinished / kind).mkdir()
            for index in range(images_per_class):
                image = draw_flower(kind, index=index, size=size, seed=seed)
                image.save(unfinished / kind / f"{kind}_{index:03d}.jpg", quality=90)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process has drawn the sample in the meantime
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def draw_flower(kind: str, index: int = 0, size: int = 256, seed: int = 0) -> Image.Image:
    """Draw image number `index` of one kind of flower, RGB, `size` px square.

    The pixels depend on the arguments only.

    Raises:
        ValueError: `kind` is not in CLASS_NAMES.
    """
    if kind not in _FLOWERS:
        raise ValueError(f"unknown flower {kind!r}; choose one of {', '.join(CLASS_NAMES)}")
    rng = np.random.default_rng([seed, CLASS_NAMES.index(kind), index])
    pixels = size * SUPERSAMPLE
    canvas = _background(rng, size).resize((pixels, pixels), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(canvas)

    radius = rng.uniform(0.38, 0.47) * pixels
    centre = pixels * (0.5 + rng.uniform(-0.07, 0.07, 2))
    turn = rng.uniform(-0.45, 0.45)
    pose = _rotation(turn) * radius

    stem = _ribbon(np.array([[0, 0.3], [rng.uniform(-0.3, 0.3), 1.5], [rng.uniform(-0.5, 0.5), 4]]), 0.045)
    _fill(pen, stem @ pose.T + centre, _leaf_colour(rng))
    for outline, colour in _FLOWERS[kind](rng, _petal_colour(rng), _petal_colour(rng)):
        _fill(pen, outline @ pose.T + centre, colour)

    canvas = canvas.resize((size, size), Image.Resampling.BOX)
    return _lit(canvas, rng)


# --- the five classes -------------------------------------------------------------------------------------------


def _daisy(rng: np.random.Generator, petals: np.ndarray, heart: np.ndarray) -> Shapes:
    """Draw a ring of long, narrow petals with rounded tips around a small disc."""
    tilt = _tilt(rng)
    count = rng.integers(8, 13)
    width = rng.uniform(0.5, 0.62) * np.pi / count
    for angle in _ring(rng, count):
        outline = _petal(0.15, rng.uniform(0.92, 1.0), width, roundness=0.45)
        yield from _veined(outline @ _rotation(angle).T @ tilt, petals * rng.uniform(0.82, 1.08))
    disc = rng.uniform(0.2, 0.27)
    yield _circle(disc) @ tilt, heart * 0.85
    yield _circle(disc * 0.6) @ tilt, heart


def _dandelion(rng: np.random.Generator, tufts: np.ndarray, heart: np.ndarray) -> Shapes:
    """Draw a seed head: a ball of fine rays, each with a small parachute at its end."""
    count = rng.integers(90, 140)
    hairs = [_line((0, 0), (0.13 * np.cos(spread), 0.13 * np.sin(spread)), 0.007) for spread in (-0.9, -0.3, 0.3, 0.9)]
    for index in range(count):
        reach = np.sqrt(1 - (1 - (index + 0.5) / count) ** 2) * rng.uniform(0.94, 1.0)  # uniform over a half-sphere
        turn = _rotation(index * GOLDEN_ANGLE).T
        shade = tufts * rng.uniform(0.7, 1.1)
        yield _line((0.05, 0), (reach, 0), 0.008) @ turn, shade
        for hair in hairs:
            yield (hair + np.array([reach, 0])) @ turn, shade
    yield _circle(rng.uniform(0.09, 0.14)), heart * 0.8


def _rose(rng: np.random.Generator, petals: np.ndarray, heart: np.ndarray) -> Shapes:
    """Draw overlapping whorls of broad petals, smaller and darker towards the middle."""
    tilt = _tilt(rng)
    count = rng.integers(17, 23)
    start = rng.uniform(0, 2 * np.pi)
    for index in range(count):
        depth = index / count
        reach = 1.0 - 0.86 * depth
        outline = _petal(0.05 * reach, reach, 0.52 * reach, roundness=0.38)
        turn = _rotation(start + index * GOLDEN_ANGLE).T @ tilt
        shade = petals * (1.05 - 0.4 * depth) * rng.uniform(0.93, 1.05)
        yield outline @ turn, shade * 0.45  # its shadow on the petal below
        yield (outline * [0.96, 0.93]) @ turn, shade
    yield _circle(0.08) @ tilt, petals * 0.45


def _sunflower(rng: np.random.Generator, petals: np.ndarray, heart: np.ndarray) -> Shapes:
    """Draw two rings of short pointed petals around a large disc of seeds in Vogel's spiral."""
    tilt = _tilt(rng)
    count = rng.integers(14, 20)
    for layer in range(2):
        for angle in _ring(rng, count):
            outline = _petal(0.4, rng.uniform(0.9, 1.0) - 0.08 * layer, 0.145, roundness=0.95)
            shade = petals * (0.78 + 0.24 * layer) * rng.uniform(0.9, 1.05)
            yield from _veined(outline @ _rotation(angle).T @ tilt, shade)
    disc = rng.uniform(0.5, 0.6)
    yield _circle(disc) @ tilt, heart * 0.45
    seed = _circle(0.02, corners=6)
    for index in range(130):
        spot = disc * 0.95 * np.sqrt(index / 130)
        place = spot * np.array([np.cos(index * GOLDEN_ANGLE), np.sin(index * GOLDEN_ANGLE)])
        yield (seed + place) @ tilt, heart * (0.6 if spot < disc * 0.45 else 0.85)


def _tulip(rng: np.random.Generator, petals: np.ndarray, heart: np.ndarray) -> Shapes:
    """Draw a cup of overlapping upright petals seen from the side, with two long leaves below."""
    green = _leaf_colour(rng)
    for side in (-1, 1):
        reach = rng.uniform(0.5, 0.9) * side
        bow = np.array([[0, 2.1], [reach * 0.9, 1.3], [reach, rng.uniform(0.1, 0.5)]])
        yield _ribbon(bow, 0.13, taper=True), green * rng.uniform(0.8, 1.1)
    openness = rng.uniform(0.1, 0.34)
    upright = _rotation(-np.pi / 2).T
    foot = np.array([0, 0.75])
    for lean, shade, width in ((0.0, 0.7, 0.4), (-1, 0.88, 0.42), (1, 0.95, 0.42), (0.0, 1.08, 0.36)):
        length = rng.uniform(1.45, 1.65)
        outline = _petal(0, length, width, roundness=0.8, widest=0.42)
        place = outline @ upright @ _rotation(lean * openness).T + foot + [lean * 0.16, 0]
        yield from _veined(place, petals * shade * rng.uniform(0.95, 1.05))


_FLOWERS: dict[str, Callable[[np.random.Generator, np.ndarray, np.ndarray], Shapes]] = {
    "daisy": _daisy,
    "dandelion": _dandelion,
    "roses": _rose,
    "sunflowers": _sunflower,
    "tulips": _tulip,
}
CLASS_NAMES = tuple(_FLOWERS)


# --- outlines, as points (N, 2) ---------------------------------------------------------------------------------


def _petal(start: float, end: float, width: float, roundness: float, widest: float = 0.55) -> np.ndarray:
    """Return a petal along the x axis; a `roundness` below 0.5 blunts its tip, and one near 1 sharpens it."""
    t = np.linspace(0, 1, 15)
    half = width * np.sin(np.pi * t ** (np.log(0.5) / np.log(widest))) ** roundness
    x = start + (end - start) * t
    return np.concatenate([np.stack([x, half], 1), np.stack([x, -half], 1)[::-1]])


def _veined(outline: np.ndarray, colour: np.ndarray) -> Shapes:
    """Draw a petal with a darker rim and a vein from its base to its tip."""
    middle = outline.mean(0)
    yield outline, colour * 0.6
    yield (outline - middle) * 0.9 + middle, colour
    tip, base = outline[len(outline) // 2], outline[0]
    yield _line(base, base + (tip - base) * 0.8, 0.008), colour * 0.8


def _circle(radius: float, corners: int = 40) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def _line(start: np.ndarray, end: np.ndarray, width: float) -> np.ndarray:
    """Return a straight band of half-width `width`."""
    start, end = np.asarray(start, float), np.asarray(end, float)
    across = (end - start)[::-1] * [-1, 1] / np.linalg.norm(end - start) * width
    return np.stack([start + across, end + across, end - across, start - across])


def _ribbon(bow: np.ndarray, width: float, taper: bool = False) -> np.ndarray:
    """Return a band of half-width `width` along the quadratic Bezier curve of three points."""
    t = np.linspace(0, 1, 12)[:, None]
    line = (1 - t) ** 2 * bow[0] + 2 * t * (1 - t) * bow[1] + t**2 * bow[2]
    along = np.gradient(line, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], 1) / (np.linalg.norm(along, axis=1, keepdims=True) + 1e-9)
    half = normal * width * (np.sqrt(1 - t) if taper else 1)
    return np.concatenate([line + half, (line - half)[::-1]])


def _ring(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return `count` slightly uneven angles around the circle from a random start."""
    return rng.uniform(0, 2 * np.pi) + 2 * np.pi * (np.arange(count) + rng.uniform(-0.15, 0.15, count)) / count


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _tilt(rng: np.random.Generator) -> np.ndarray:
    """Return a (2, 2) matrix that squeezes a flat flower in a random direction, as if seen at an angle."""
    turn = _rotation(rng.uniform(0, np.pi))
    return turn @ np.diag([1, rng.uniform(0.78, 1.0)]) @ turn.T


# --- colour, light and background -------------------------------------------------------------------------------


def _petal_colour(rng: np.random.Generator) -> np.ndarray:
    return _hsv(rng.uniform(0, 1), rng.uniform(0.1, 0.8), rng.uniform(0.65, 1.0))


def _leaf_colour(rng: np.random.Generator) -> np.ndarray:
    return _hsv(rng.uniform(0.2, 0.42), rng.uniform(0.3, 0.8), rng.uniform(0.15, 0.5))


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """Convert HSV in 0..1 to RGB in 0..255 (the usual hexagonal model)."""
    ramp = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return 255 * value * (1 - saturation * (1 - ramp))


def _fill(pen: ImageDraw.ImageDraw, outline: np.ndarray, colour: np.ndarray) -> None:
    pen.polygon([tuple(point) for point in outline.tolist()], fill=tuple(np.clip(colour, 0, 255).astype(int).tolist()))


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    """Draw soft patches of two colours, blades of grass and leaves, and round lights that are out of focus."""
    patches = rng.uniform(0, 1, (rng.integers(3, 7), rng.integers(3, 7)))
    mix = Image.fromarray((patches * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    near, far = (
        _leaf_colour(rng) if rng.uniform() < 0.5 else _hsv(*rng.uniform([0, 0, 0.05], [1, 0.6, 0.6])) for _ in range(2)
    )
    solid = [Image.new("RGB", (size, size), tuple(colour.astype(int).tolist())) for colour in (near, far)]
    canvas = Image.composite(*solid, mix)
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(4, 14)):
        start = rng.uniform(0, 1, 2)
        bow = np.stack([start, start + rng.uniform(-0.25, 0.25, 2), start + rng.uniform(-0.5, 0.5, 2)])
        _fill(pen, _ribbon(bow, rng.uniform(0.006, 0.05), taper=True) * size, _leaf_colour(rng))
    for _ in range(rng.integers(0, 4)):
        _fill(pen, (rng.uniform(0, 1, 2) + _circle(rng.uniform(0.02, 0.08))) * size, _petal_colour(rng))
    return canvas.filter(ImageFilter.GaussianBlur(size * rng.uniform(0.006, 0.02)))


def _lit(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Add light from one side, a tint, a little blur and camera noise."""
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.003) * image.width))
    pixels = np.asarray(image, dtype=np.float32)
    direction = rng.uniform(0, 2 * np.pi)
    across = np.linspace(-1, 1, image.width, dtype=np.float32)
    side = 1 + rng.uniform(0, 0.3) * (across * np.cos(direction) + across[:, None] * np.sin(direction))
    tint = rng.uniform(0.72, 1.15) * rng.uniform(0.9, 1.1, 3)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(1, 4))
    pixels = pixels * side.astype(np.float32)[..., None] * tint.astype(np.float32) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder to create, with one sub-folder per class")
    parser.add_argument("--images-per-class", type=int, default=60, help="number of images (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="width and height in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    args = parser.parse_args()
    if args.images_per_class < 1 or args.size < 16 or args.seed < 0:
        parser.error("--images-per-class must be at least 1, --size at least 16, --seed at least 0")
    try:
        folder = draw_sample(args.folder, args.images_per_class, args.size, args.seed)
    except OSError as error:
        parser.exit(1, f"sample_flowers.py: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "sample_flowers.py: interrupted\n")
    print(f"drew {len(CLASS_NAMES) * args.images_per_class} images in {folder}")


if __name__ == "__main__":
    main()
