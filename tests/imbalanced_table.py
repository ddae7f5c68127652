#!/usr/bin/env python3
"""Write a table with rare and frequent classes: python tests/imbalanced_table.py FOLDER table.csv

It lists 500 training images of one class of FOLDER (dandelion), 25 of another (roses), 100 of each other class, and 80
other images of each for validation. To measure --class-weights and --best-metric:

python train.py --data-path table.csv --recipe scratch --model resnet18 --img-size 96 --class-weights 0.5
"""

import argparse
import csv
import random
from pathlib import Path

COUNTS = {"dandelion": 500, "roses": 25}
OTHERS, VALIDATION = 100, 80


def main(folder: Path, table: Path) -> None:
    """Write the table."""
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "split"))
        for kind in sorted(path for path in folder.resolve().iterdir() if path.is_dir()):
            images = sorted(kind.iterdir())
            random.Random(0).shuffle(images)
            train = COUNTS.get(kind.name, OTHERS)
            for number, image in enumerate(images[: train + VALIDATION]):
                writer.writerow((image, kind.name, "val" if number < VALIDATION else "train"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("table", type=Path)
    args = parser.parse_args()
    main(args.folder, args.table)
