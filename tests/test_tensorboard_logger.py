"""TensorBoard logging: locked files, diverged weights, the projector and memory use over many epochs."""

import argparse
import gc
from pathlib import Path

import pytest
import torch
from conftest import write_classes
from torch.utils.data import DataLoader

from data_loading import DistributedBatchSampler, EpochSampler, SafeImages
from distributed import Distributed
from model import MODELS
from my_dataset import EvalTransform, MyDataSet, TrainTransform
from optimization import Schedule
from run_utils import Run
from tensorboard_logger import ProjectorFeatures, TensorBoardLogger
from train_eval_utils import Evaluation, Progress

CLASSES, SIZE, EPOCHS = ["cat", "dog"], 32, 100
STATM = Path("/proc/self/statm")


def resident_mib() -> float:
    return int(STATM.read_text().split()[1]) * 4096 / 2**20 if STATM.exists() else 0.0


@pytest.fixture
def logger(tmp_path, monkeypatch, small_network):
    """Return the logger of a run with one image, before its first epoch."""
    monkeypatch.setattr("tensorboard_logger.PLOT_IMG", tmp_path)  # without the flower images
    paths = sorted(write_classes(tmp_path / "pets", {"cat": 1}).rglob("*.png"))
    labels = [CLASSES.index(path.parent.name) for path in paths]
    train_set = SafeImages(MyDataSet(paths, labels, TrainTransform(SIZE)), replace=True)
    val_set = SafeImages(MyDataSet(paths, labels, EvalTransform(SIZE)), replace=False, return_index=True)
    sampler = EpochSampler(len(paths), seed=0)
    model = MODELS["resnet18"](num_classes=len(CLASSES))
    folder = tmp_path / "run"
    folder.mkdir()
    run = Run(
        folder,
        model,
        torch.optim.SGD(model.parameters()),
        torch.amp.GradScaler("cpu", enabled=False),
        Schedule(EPOCHS, 1, lr=0.1, lrf=0.1),
        {"model": "resnet18", "class_names": CLASSES, "img_size": SIZE},
        command=[],
        recipe={},
        global_batch=2,
        dist=Distributed(),
    )
    run.progress = Progress(sum=1.0, images=2, steps=1, right=1)
    with TensorBoardLogger(
        run,
        argparse.Namespace(batch_size=2, histograms="first"),
        DataLoader(train_set, batch_sampler=DistributedBatchSampler(sampler, batch_size=2)),
        DataLoader(val_set, batch_size=2),
        torch.device("cpu"),
        None,
    ) as logger:
        yield logger


def test_a_file_open_on_windows_is_left_unchanged(logger, monkeypatch, capsys):
    """On Windows a spreadsheet may lock metrics.csv, which must not stop training; elsewhere the error is raised."""

    def refuse(path: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    path = logger.run.folder / "metrics.csv"
    path.write_text("before")
    validation = Evaluation(torch.zeros(1, len(CLASSES)), torch.tensor([0]))
    arguments = [logger.run.progress, validation, torch.arange(1), ProjectorFeatures(1), 0.1, 1.0]
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", refuse)
        with pytest.raises(PermissionError):
            logger.log_epoch(*arguments, is_best=False, is_last=False)
        patched.setattr("tensorboard_logger.os", argparse.Namespace(name="nt"))
        logger.log_epoch(*arguments, is_best=True, is_last=False)
        logger.flush()
    assert path.read_text() == "before"
    assert "metrics.csv open" in capsys.readouterr().out
    logger.log_epoch(*arguments, is_best=False, is_last=False)
    assert len(path.read_text().splitlines()) == 4


def test_diverged_model_is_not_saved(logger):
    """The losses can stay finite although a BatchNorm variance is infinite."""
    logger.run.weights.mkdir()
    assert logger.run.judge(0.5, 1.0)
    logger.run.model.bn1.running_var.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="training diverged"):
        logger.run.finish_epoch()
    assert list(logger.run.weights.iterdir()) == []


def test_projector_samples_evenly_across_the_data(monkeypatch):
    """The validation set is ordered by class, so an even sample covers all classes."""
    monkeypatch.setattr("tensorboard_logger.PROJECTED", 10)
    collected = ProjectorFeatures(25)
    for numbers in torch.arange(25).split(8):
        collected.add(numbers[:, None].float(), numbers)
    features, numbers = collected.concatenated()
    assert numbers.tolist() == features.flatten().tolist() == list(range(0, 25, 3))


def test_figures_of_many_epochs_do_not_leak_memory(logger):
    """The large figures and the curves are drawn after 1, 2, 4, ... 64 epochs, the predictions after every epoch."""
    numbers, labels = torch.arange(1), torch.tensor([0])
    generator = torch.Generator().manual_seed(0)
    seen, features = [], ProjectorFeatures(1)
    for epoch in range(EPOCHS):
        logger.run.epoch = epoch
        validation = Evaluation(torch.randn(1, len(CLASSES), generator=generator), labels)
        logger.log_epoch(logger.run.progress, validation, numbers, features, 0.1, 1.0, is_best=False, is_last=False)
        if epoch in (EPOCHS // 6, EPOCHS - 1):
            gc.collect()
            seen.append((len(gc.get_objects()), resident_mib()))
    objects, mib = (after - before for before, after in zip(*seen, strict=True))
    assert objects < 5000  # one figure has more than 300
    assert mib < 40  # leaked figures take more than 70
    assert len(logger.run.history) == EPOCHS
