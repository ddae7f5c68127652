"""TensorBoard logging: locked files, diverged weights, the projector and memory use over many epochs."""

import argparse
import gc
import math
from pathlib import Path

import pytest
import torch
from conftest import write_classes
from fault_harness import accumulated
from torch.utils.data import DataLoader

from data_loading import DistributedBatchSampler, EpochSampler, Loaders, SafeImages
from distributed import Distributed
from metrics import Evaluation
from model import MODELS
from my_dataset import EvalTransform, MyDataSet, TrainTransform
from optimization import Schedule
from run_state import Run
from run_utils import RunFolder
from tensorboard_logger import TensorBoardLogger
from train_eval_utils import Progress

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
        RunFolder(folder, lock=None),
        {},
        {"model": "resnet18", "class_names": CLASSES, "img_size": SIZE},
        model=model,
        optimizer=torch.optim.SGD(model.parameters()),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        schedule=Schedule(EPOCHS, 1, lr=0.1, lrf=0.1),
        global_batch=2,
        dist=Distributed(),
    )
    run.progress = Progress(loss_sum=1.0, images=2, steps=1, correct=1)
    loaders = Loaders(
        DataLoader(train_set, batch_sampler=DistributedBatchSampler(sampler, batch_size=2)),
        DataLoader(val_set, batch_size=2),
    )
    with TensorBoardLogger(run, loaders, torch.device("cpu"), None) as logger:
        yield logger


def test_a_file_open_on_windows_is_left_unchanged(logger, monkeypatch, capsys):
    """On Windows a spreadsheet may lock metrics.csv, which must not stop training; elsewhere the error is raised."""

    def refuse(path: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    path = logger.run.folder / "metrics.csv"
    path.write_text("before")
    validation = Evaluation(torch.zeros(1, len(CLASSES)), torch.tensor([0]), indices=torch.arange(1))
    logger.run.update_best(validation)
    arguments = [logger.run.progress, validation, 0.1, 1.0]
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", refuse)
        with pytest.raises(PermissionError):
            logger.log_epoch(*arguments)
        patched.setattr("tensorboard_logger.os", argparse.Namespace(name="nt"))
        logger.log_epoch(*arguments)
        logger.flush()
    assert path.read_text() == "before"
    assert "metrics.csv open" in capsys.readouterr().out
    logger.log_epoch(*arguments)
    assert len(path.read_text().splitlines()) == 4


def test_diverged_model_is_not_saved(logger):
    """The losses can stay finite although a BatchNorm variance is infinite."""
    logger.run.weights.mkdir()
    logger.run.update_best(Evaluation(torch.zeros(1, len(CLASSES)), torch.tensor([0])))
    assert logger.run.best is logger.run.last
    logger.run.model.bn1.running_var.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="training diverged"):
        logger.run.finish_epoch()
    assert list(logger.run.weights.iterdir()) == []


@pytest.mark.parametrize(("cost", "expected"), [(math.inf, [0, 1, 3, 4]), (0, [0, 4])])
def test_slow_figures_are_drawn_at_the_ends_and_if_they_are_cheap_in_between(logger, monkeypatch, cost, expected):
    monkeypatch.setattr("tensorboard_logger.FIGURE_COST", cost)
    indices = torch.arange(1)
    for epoch in range(5):
        logger.run.epoch = epoch
        features = {"features": torch.zeros(1, 2), "feature_rows": indices}
        validation = Evaluation(torch.zeros(1, len(CLASSES)), torch.tensor([0]), indices=indices, **features)
        logger.run.update_best(validation)
        logger.run.finished = "5 epochs" if epoch == 4 else ""
        logger.log_epoch(logger.run.progress, validation, 0.1, 1.0)
    logger.run.wait_for_background()
    assert accumulated(logger.run.folder)["confusion matrix"] == expected


def test_figures_of_many_epochs_do_not_leak_memory(logger):
    """The large figures and the curves are drawn after 1, 2, 4, ... 64 epochs, the predictions after every epoch."""
    indices, labels, seen = torch.arange(1), torch.tensor([0]), []
    generator = torch.Generator().manual_seed(0)
    for epoch in range(EPOCHS):
        logger.run.epoch = epoch
        validation = Evaluation(torch.randn(1, len(CLASSES), generator=generator), labels, indices=indices)
        logger.run.update_best(validation)
        logger.run.finished = ""
        logger.log_epoch(logger.run.progress, validation, 0.1, 1.0)
        if epoch in (EPOCHS // 6, EPOCHS - 1):
            gc.collect()
            seen.append((len(gc.get_objects()), resident_mib()))
    objects, mib = (after - before for before, after in zip(*seen, strict=True))
    assert objects < 5000  # one figure has more than 300
    assert mib < 40  # leaked figures take more than 70
    assert len(logger.run.history) == EPOCHS
