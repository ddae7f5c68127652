#!/usr/bin/env python3
"""Flip labels at random, and measure how well cross_validate.py finds them.

python tests/label_noise.py flip FOLDER noisy.csv            # FOLDER has one sub-folder per class; 5% are flipped
python cross_validate.py --data-path noisy.csv --name noisy
python tests/label_noise.py score noisy.csv runs/noisy/label_issues.csv
python tests/label_noise.py fix noisy.csv runs/noisy/label_issues.csv found.csv

Both tables can be passed to --corrections. The column `verdict` of noisy.csv is the true class of each image; found.csv
has it for the flipped labels at the top of the list.
"""

import argparse
import csv
import random
from pathlib import Path

import numpy as np

Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def write(rows: Rows, path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def flip(folder: Path, table: Path, rate: float, seed: int) -> None:
    """Write a table of all images, with the fraction `rate` of the labels replaced by another class."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    images = [(name, image) for name in names for image in sorted((folder.resolve() / name).iterdir())]
    rows = [{"path": str(image), "label": name, "verdict": name} for name, image in images]
    generator = random.Random(seed)
    for row in generator.sample(rows, round(rate * len(rows))):
        row["label"] = generator.choice([name for name in names if name != row["verdict"]])
    write(rows, table)


def score(table: Path, issues: Path) -> None:
    """Print how many of the flipped labels are at the top of the list, and the area under the ROC curve."""
    true = {row["path"]: row["verdict"] for row in read(table)}
    flipped = np.array([row["label"] != true[row["path"]] for row in read(issues)])
    wrong, ranks = int(flipped.sum()), np.arange(len(flipped))
    area = 1 - (ranks[flipped].sum() - wrong * (wrong - 1) / 2) / (wrong * (len(flipped) - wrong))
    print(f"{len(flipped)} images, {wrong} flipped; {flipped[:wrong].mean():.1%} of the first {wrong} are flipped")
    print(f"area under the ROC curve {area:.4f}")


def fix(table: Path, issues: Path, verdicts: Path) -> None:
    """Copy a label_issues.csv; of K flipped labels, fill in the verdicts of those in its first K rows."""
    true, rows = {row["path"]: row["verdict"] for row in read(table)}, read(issues)
    flipped = sum(row["label"] != row["verdict"] for row in read(table))
    for row in rows[:flipped]:
        if row["label"] != true[row["path"]]:
            row["verdict"] = true[row["path"]]
    write(rows, verdicts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("flip", "score", "fix"))
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument(
        "--rate", type=float, default=0.05, help="fraction of the labels to flip (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    options = {"rate": args.rate, "seed": args.seed} if args.command == "flip" else {}
    {"flip": flip, "score": score, "fix": fix}[args.command](*args.paths, **options)
