"""The comparisons of bench.py. The timings depend on the machine and are not checked."""

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import bench
import pytest
from accuracy import divided

SMALL = ["--model", "resnet18", "--device", "cpu"]


@pytest.fixture
def printed_by_bench(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """Return a function that runs bench.py in an empty folder and returns its output."""

    def run(*flags: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, flags), *SMALL])
        bench.main()
        return capsys.readouterr().out

    return run


def test_float32_losses_match_the_tutorial(sample, printed_by_bench):
    printed = printed_by_bench("losses", "--data-path", sample, "--img-size", "32", "--batch-size", "8")
    assert float(re.search(r"same weights: (\S+)", printed)[1]) < 1e-4
    assert len(re.findall(r"^ +\d+  ", printed, re.M)) == 10  # steps: 80 images, 8 per step


def test_training_time_is_compared_with_the_tutorial(sample, tmp_path, printed_by_bench):
    flags = ["--data-path", sample, "--images", "24", "--rounds", "1", "--img-size", "32"]
    printed = printed_by_bench("train", *flags)
    with open(tmp_path / "bench.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["figure"] for row in rows] == ["epoch", "start to end"]
    for row in rows:
        assert float(row["b_over_a"]) > 0
        assert f"{row['figure']} tutorial/ours" in printed


@pytest.mark.parametrize(("figure", "ratio"), [("evaluate", "tutorial/ours"), ("ceiling", "memory/files")])
def test_evaluation_and_ceiling_report_a_ratio(figure, ratio, sample, printed_by_bench):
    flags = ["--data-path", sample, "--images", "24", "--rounds", "1", "--img-size", "32", "--workers", "0"]
    assert float(re.search(rf"{ratio}: (\S+)", printed_by_bench(figure, *flags))[1]) > 0


def test_accuracy_compares_recipes_and_reuses_finished_runs(sample, tmp_path, printed_by_bench):
    flags = ["accuracy", "--data-path", sample, "--minutes", "0", "--epochs", "1", "--img-size", "32", "--rounds", "1"]
    flags += ["--kinds", "scratch:lr=0.01,nesterov=False"]
    printed = printed_by_bench(*flags)
    with open(tmp_path / "accuracy.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["kind"], row["seed"], row["epoch"]) for row in rows] == [("scratch:lr=0.01,nesterov=False", "0", "0")]
    assert f"mean {float(rows[0]['accuracy']):.4f}" in printed
    assert f"{rows[0]['accuracy']} (loss {rows[0]['val_loss']})" in printed
    assert float(rows[0]["val_loss"]) > 0
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    before = (tmp_path / "accuracy.csv").read_bytes()
    assert printed_by_bench(*flags) == printed
    assert (tmp_path / "accuracy.csv").read_bytes() == before


def test_a_fifth_of_the_images_is_held_out(sample):
    def names(set_aside: bool) -> dict[str, set[str]]:
        with divided(str(sample), set_aside) as data:
            return {side: {path.name for path in (data / side).rglob("*.jpg")} for side in ("train", "val")}

    choices, final = names(set_aside=False), names(set_aside=True)
    assert len(final["train"] | final["val"]) == 100
    assert 10 <= len(final["val"]) <= 30
    assert choices["train"] | choices["val"] == final["train"]
    assert not choices["train"] & choices["val"]
    assert not final["train"] & final["val"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_gpu_report_needs_a_gpu(tmp_path):
    script = Path(bench.__file__).with_name("gpu_report.sh")
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(["bash", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "gpu_report.sh: no CUDA device is available; DEVICE=cpu tests the script without one"
    ]
