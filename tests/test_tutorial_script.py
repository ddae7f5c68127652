"""A script written for the tutorial's modules runs unchanged with ours."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PROJECT = Path(__file__).parents[1]


def test_tutorial_script_trains_in_an_empty_folder(tmp_path, sample):
    for module in PROJECT.glob("*.py"):
        shutil.copy(module, tmp_path)
    shutil.copytree(PROJECT / "plot_img", tmp_path / "plot_img")
    shutil.copy(PROJECT / "tests" / "tutorial_script.py", tmp_path / "my_train.py")
    done = subprocess.run(
        [sys.executable, "my_train.py", "--data-path", str(sample)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    assert "80 images for training." in done.stdout
    assert "[epoch 0] accuracy: " in done.stdout
    assert torch.load(tmp_path / "weights" / "model-0.pth", weights_only=True)["fc.weight"].shape == (5, 512)
    assert (tmp_path / "class_indices.json").exists()
    events = EventAccumulator(str(tmp_path / "runs" / "mine"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train_loss", "accuracy", "learning_rate"}
    assert events.Tags()["images"] == ["predictions vs. actuals"]
    assert set(events.Tags()["histograms"]) == {"conv1", "layer1/block0/conv1"}
    assert events.Tags()["graph"]
