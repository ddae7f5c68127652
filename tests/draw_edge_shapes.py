#!/usr/bin/env python3
"""Draw wide images whose classes differ only at the ends: python tests/draw_edge_shapes.py FOLDER

To compare the modes of --resize (a centre crop cuts the ends off):

python train.py --data-path FOLDER --recipe scratch --model resnet18 --img-size 96 --batch-size 32 --resize pad
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES, IMAGES = ("circle", "square", "triangle"), 60
WIDTH, HEIGHT = 320, 80  # pixels


def main(folder: Path) -> None:
    """Draw the images, one sub-folder per shape."""
    generator = np.random.default_rng(0)
    for shape in SHAPES:
        (folder / shape).mkdir(parents=True)
        for index in range(IMAGES):
            noise = Image.fromarray(generator.integers(60, 200, (12, 48, 3), dtype=np.uint8))
            image = noise.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            draw, ink = ImageDraw.Draw(image), tuple(map(int, generator.integers(0, 60, 3)))
            size = int(generator.integers(22, 30))
            x, y = int(generator.choice([size + 4, WIDTH - size - 4])), HEIGHT // 2 + int(generator.integers(-6, 7))
            left, top, right, bottom = x - size, y - size, x + size, y + size
            if shape == "circle":
                draw.ellipse([left, top, right, bottom], fill=ink)
            elif shape == "square":
                draw.rectangle([left, top, right, bottom], fill=ink)
            else:
                draw.polygon([(x, top), (left, bottom), (right, bottom)], fill=ink)
            image.save(folder / shape / f"{index:02}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    main(parser.parse_args().folder)
