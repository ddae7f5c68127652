"""What the ruler compares; how fast it is depends on the machine."""

import csv
import re
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).with_name("bench.py")
SMALL = ["--model", "resnet18", "--device", "cpu"]


def bench(folder: Path, *flags) -> str:
    """What it prints."""
    command = [sys.executable, BENCH, *flags, *SMALL]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_mixed_precision_the_losses_are_the_tutorials(sample, tmp_path):
    printed = bench(tmp_path, "losses", "--data-path", sample, "--img-size", "32", "--batch-size", "8")
    assert float(re.search(r"same weights: (\S+)", printed)[1]) < 1e-4
    assert len(re.findall(r"^ +\d+  ", printed, re.M)) == 10  # steps: 80 images, 8 a step


def test_training_is_compared_with_the_tutorials(sample, tmp_path):
    flags = ["--data-path", sample, "--images", "24", "--rounds", "1", "--img-size", "32"]
    printed = bench(tmp_path, "train", *flags)
    with open(tmp_path / "bench.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["figure"] for row in rows] == ["epoch", "start to end"]
    for row in rows:
        assert float(row["b_over_a"]) > 0
        assert f"{row['figure']} tutorial/ours" in printed
