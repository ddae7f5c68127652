"""The drawn sample is reproducible, and colour alone does not separate its classes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sample_flowers import CLASS_NAMES, draw_flower, draw_sample


@pytest.mark.parametrize("kind", CLASS_NAMES)
def test_drawing_is_reproducible(kind):
    first = np.asarray(draw_flower(kind, index=1, size=96, seed=5))
    assert first.shape == (96, 96, 3)
    assert np.array_equal(first, np.asarray(draw_flower(kind, index=1, size=96, seed=5)))
    for other in (draw_flower(kind, index=2, size=96, seed=5), draw_flower(kind, index=1, size=96, seed=6)):
        assert np.abs(first.astype(int) - np.asarray(other)).mean() > 5


def test_one_sub_folder_per_class(tmp_path):
    folder = draw_sample(tmp_path / "deep" / "sample", images_per_class=2, size=32)
    assert sorted(path.name for path in folder.iterdir()) == sorted(CLASS_NAMES)
    assert all(len(list(path.iterdir())) == 2 for path in folder.iterdir())
    assert list(folder.parent.iterdir()) == [folder]  # no temporary files remain
    with pytest.raises(FileExistsError, match="already exists"):
        draw_sample(folder)


def test_failed_drawing_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.Image.Image.save", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        draw_sample(tmp_path / "sample", images_per_class=1, size=32)
    assert list(tmp_path.iterdir()) == []


def test_unknown_flower():
    with pytest.raises(ValueError, match="unknown flower 'orchid'"):
        draw_flower("orchid")


def test_command_line(tmp_path):
    program = Path(__file__).parents[1] / "sample_flowers.py"
    command = [sys.executable, program, tmp_path / "s", "--images-per-class", "1", "--size", "32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, f"drew 5 images in {tmp_path / 's'}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "already exists" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def colour_histograms(per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Return histograms of 4 x 4 x 4 colours (N, 64) and labels (N,)."""
    histograms, labels = [], []
    for label, kind in enumerate(CLASS_NAMES):
        for index in range(per_class):
            levels = np.asarray(draw_flower(kind, index, size=64)).astype(int) // 64
            codes = levels @ [16, 4, 1]
            histograms.append(np.bincount(codes.ravel(), minlength=64) / codes.size)
            labels.append(label)
    return np.array(histograms), np.array(labels)


def test_colour_alone_does_not_separate_the_classes():
    histograms, labels = colour_histograms(per_class=120)
    held_out = np.arange(len(labels)) % 4 == 0
    train_x, train_y, test_x, test_y = histograms[~held_out], labels[~held_out], histograms[held_out], labels[held_out]

    centroids = np.stack([train_x[train_y == label].mean(0) for label in range(5)])
    nearest = ((test_x[:, None] - centroids) ** 2).sum(-1).argmin(1)
    assert (nearest == test_y).mean() < 0.45

    mean, std = train_x.mean(0), train_x.std(0) + 1e-6
    x, y = torch.tensor((train_x - mean) / std).float(), torch.tensor(train_y)
    for weight_decay in (1e-3, 1e-2, 1e-1):  # even the best value must fail
        torch.manual_seed(0)
        classifier = torch.nn.Linear(64, 5)
        optimizer = torch.optim.Adam(classifier.parameters(), lr=0.05, weight_decay=weight_decay)
        for _ in range(300):
            optimizer.zero_grad()
            F.cross_entropy(classifier(x), y).backward()
            optimizer.step()
        predicted = classifier(torch.tensor((test_x - mean) / std).float()).argmax(1).numpy()
        assert (predicted == test_y).mean() < 0.45
