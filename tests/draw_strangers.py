#!/usr/bin/env python3
"""Draw images that show no class of a set of photographs: python tests/draw_strangers.py FOLDER

To see how many of them a network recognises as unfamiliar:

python predict.py FOLDER --weights runs/flower_experiment/weights/best.pth
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

IMAGES, WIDTH, HEIGHT = 100, 320, 400


def page(generator: np.random.Generator) -> Image.Image:
    """Draw lines of random letters on white paper."""
    image = Image.new("L", (WIDTH, HEIGHT), int(generator.integers(230, 256)))
    draw, letters = ImageDraw.Draw(image), list("abcdefghijklmnopqrstuvwxyz     ")
    for y in range(20, HEIGHT - 20, 14):
        length = int(generator.integers(20, 46))
        draw.text((20, y), "".join(generator.choice(letters, length)), fill=int(generator.integers(0, 60)))
    return image


def noise(generator: np.random.Generator) -> Image.Image:
    """Draw independent pixels."""
    return Image.fromarray(generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def blurred_noise(generator: np.random.Generator) -> Image.Image:
    """Draw patches of colour that fade into one another."""
    patches = Image.fromarray(generator.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    return patches.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def main(folder: Path) -> None:
    """Draw the images, one sub-folder per kind."""
    kinds: dict[str, Callable[[np.random.Generator], Image.Image]] = {
        "pages": page,
        "noise": noise,
        "blurred_noise": blurred_noise,
    }
    for name, draw in kinds.items():
        generator = np.random.default_rng(0)
        (folder / name).mkdir(parents=True)
        for index in range(IMAGES):
            draw(generator).save(folder / name / f"{index:03}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a new folder")
    main(parser.parse_args().folder)
