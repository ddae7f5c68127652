"""Time budgets: the plan, the reserve, and resuming."""

import copy
import signal
import time
from dataclasses import replace

import pytest
import torch
from test_recipes import RUN, TINY, metrics, script_validation
from test_resume import after_steps, send
from torch.optim import Optimizer
from torch.utils.data import DataLoader

import train
from config import FLAG_DEFAULTS
from distributed import Distributed
from model import MODELS, ResNet
from prepare_data import prepare_data
from run_state import Run
from tensorboard_logger import TensorBoardLogger
from tuning import PLANNED_SIZES, choose_img_size

pytestmark = pytest.mark.usefixtures("in_an_empty_folder", "small_network", "no_figures")


def test_patience_stops_a_run_before_its_time_budget(two_classes, monkeypatch, capsys):
    script_validation(monkeypatch, [(accuracy, 1.0) for accuracy in (0.6, 0.4, 0.5)])
    flags = ["--data-path", str(two_classes), *TINY, "--img-size", "32", "--time-budget", "1"]
    assert train.main([*flags, "--patience", "1"]) == 0
    assert len(metrics()) == 2
    assert train.main(["--resume"]) == 0
    assert "is complete: 1 epochs without" in capsys.readouterr().out
    assert train.main(["--resume", "--patience", "2"]) == 0
    assert len(metrics()) == 3


def test_recipe_epochs_do_not_limit_a_time_budget(two_classes, monkeypatch, capsys):
    monkeypatch.setitem(FLAG_DEFAULTS["scratch"], "epochs", 1)
    flags = ["--data-path", str(two_classes), *TINY, "--recipe", "scratch", "--img-size", "32", "--time-budget", "2"]
    with after_steps(11, send(signal.SIGTERM)):
        assert train.main(flags) == 143
    with after_steps(1, send(signal.SIGTERM)):
        assert train.main(["--resume"]) == 143
    assert "resumed at epoch 2, step 3" in capsys.readouterr().out


def test_time_budget_completes_the_schedule(two_classes, capsys):
    flags = ["--data-path", str(two_classes), *TINY, "--recipe", "scratch", "--time-budget", "0.05"]
    assert train.main(flags) == 0
    printed = capsys.readouterr().out
    assert "planned      " in printed
    assert "scratch, 0.05 minutes" in printed
    last = torch.load(RUN / "weights" / "last.pth", weights_only=True)
    assert last["img_size"] in PLANNED_SIZES
    assert last["resume"]["finished"]
    assert float(metrics()[-1]["learning_rate"]) < FLAG_DEFAULTS["scratch"]["lr"] / 10
    assert (RUN / f"{len(metrics()) - 1:05d}" / "validation" / "tensors.tsv").exists()
    assert train.main(["--resume"]) == 0
    assert "its time budget is spent" in capsys.readouterr().out


def test_plan_picks_the_largest_size_for_the_recipes_epochs(two_classes, monkeypatch):
    def speed(model: ResNet, optimizer: Optimizer, loader: DataLoader, *_: object, **options: object) -> float:
        assert {len(batch) for batch in loader.batch_sampler} == {loader.batch_sampler.batch_size}  # whole ones
        return 1e7 / loader.batch_sampler.order.img_size**2  # images per second

    monkeypatch.setattr("tuning.measure_speed", speed)
    model, planned = MODELS["resnet18"](num_classes=2), {}
    for recipe in ("scratch", "finetune"):  # 30 and 10 epochs
        args = train.parse_args(["--data-path", str(two_classes), *TINY, "--recipe", recipe, "--time-budget", "0.0147"])
        args.batch_size = 6
        args.recipe = replace(args.recipe, bn_images=0)
        data = prepare_data(args, two_classes / "known.json")
        planned[recipe], _ = choose_img_size(args, model, data, torch.device("cpu"), None, Distributed())
    assert planned == {"scratch": 128, "finetune": 224}


def test_plan_measures_the_size_that_it_chooses(two_classes, monkeypatch):
    """On a GPU, the time for small images is that of the kernel launches, whatever their size."""
    sizes = []

    def speed(model: ResNet, optimizer: Optimizer, loader: DataLoader, *_: object, **options: object) -> float:
        sizes.append(loader.batch_sampler.order.img_size)
        return 1000 / max(1, sizes[-1] / 128) ** 4

    monkeypatch.setattr("tuning.measure_speed", speed)
    args = train.parse_args(["--data-path", str(two_classes), *TINY, "--recipe", "scratch", "--time-budget", "0.02"])
    args.recipe = replace(args.recipe, bn_images=0)
    data = prepare_data(args, two_classes / "known.json")
    model = MODELS["resnet18"](num_classes=2)
    img_size, _ = choose_img_size(args, model, data, torch.device("cpu"), None, Distributed())
    assert sizes[:2] == [64, 128]
    assert len(sizes) > 2
    assert img_size < 224


def test_time_budget_reserves_time_for_figures(two_classes, monkeypatch):
    """On a GPU, they are drawn in the background, so that only the last epoch waits for them."""
    monkeypatch.setattr("tensorboard_logger.WAIT_FOR_FIGURES", ())
    monkeypatch.setattr(TensorBoardLogger, "draw", lambda *figures: time.sleep(0.5))
    monkeypatch.setattr(Run, "save_is_due", lambda run: time.sleep(0.2))  # after each of four steps
    assert train.main(["--data-path", str(two_classes), *TINY, "--img-size", "32", "--time-budget", "0.08"]) == 0
    last = torch.load(RUN / "weights" / "last.pth", weights_only=True)
    assert last["resume"]["epoch"] > 1
    assert last["resume"]["schedule"]["reserve"] > 0.5


def test_plan_does_not_change_the_model(two_classes):
    args = train.parse_args(["--data-path", str(two_classes), *TINY, "--recipe", "scratch", "--time-budget", "0.01"])
    data = prepare_data(args, two_classes / "known.json")
    model = MODELS["resnet18"](num_classes=2)
    before = copy.deepcopy(model.state_dict())
    choose_img_size(args, model, data, torch.device("cpu"), None, Distributed())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tiny_time_budget_trains_one_epoch(two_classes):
    assert train.main(["--data-path", str(two_classes), *TINY, "--img-size", "64", "--time-budget", "1e-6"]) == 0
    assert len(metrics()) == 1
    assert torch.load(RUN / "weights" / "best.pth", weights_only=True)["epoch"] == 0


def test_resume_continues_the_time_budget(two_classes, capsys):
    flags = ["--data-path", str(two_classes), *TINY, "--recipe", "scratch", "--time-budget", "0.05"]
    with after_steps(1, send(signal.SIGTERM)):
        assert train.main(flags) == 143
    before = torch.load(RUN / "weights" / "last.pth", weights_only=True)
    spent = before["resume"]["schedule"]["spent"]
    assert spent > 0
    capsys.readouterr()
    assert train.main(["--resume"]) == 0
    assert "planned" not in capsys.readouterr().out
    after = torch.load(RUN / "weights" / "last.pth", weights_only=True)
    assert after["img_size"] == before["img_size"]
    assert after["resume"]["finished"]
    assert after["resume"]["schedule"]["spent"] >= spent
    assert len(metrics()) == after["resume"]["epoch"] > before["resume"]["epoch"]  # the interrupted epoch was evaluated


def test_explicit_img_size_is_not_planned(two_classes):
    flags = ["--data-path", str(two_classes), *TINY, "--time-budget", "0.02", "--img-size", "40"]
    assert train.main(flags) == 0
    assert torch.load(RUN / "weights" / "best.pth", weights_only=True)["img_size"] == 40
