"""Recipes, the best epoch, early stopping and frozen backbones."""

import csv
import itertools
import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_resume import after_steps, send

import train
from config import FLAG_DEFAULTS, RECIPES, training_sizes
from data_loading import EpochSampler, Loaders, build_train_loader, build_val_loader, cache_features
from dataset_split import find_split
from distributed import Distributed
from metrics import Evaluation
from model import MODELS, ResNet, to_device
from my_dataset import EvalTransform, MyDataSet, TrainTransform, prepare_batch
from optimization import Muon, Schedule, build_optimizer, build_schedule, set_learning_rate
from train_eval_utils import estimate_batch_norm

pytestmark = pytest.mark.usefixtures("in_an_empty_folder", "small_network", "no_figures")
TINY = ["--model", "resnet18", "--device", "cpu", "--workers", "0", "--amp", "off", "--batch-size", "5"]
RUN = Path("runs/flower_experiment")


def metrics() -> list[dict[str, str]]:
    with open(RUN / "metrics.csv", newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def script_validation(monkeypatch: pytest.MonkeyPatch, results: list[tuple[float, ...]]) -> None:
    """Replace the validation results by these: accuracy, loss and, optionally, macro F1 per epoch."""
    pending = iter(results)

    class Scripted(Evaluation):
        def __init__(self, *outputs: torch.Tensor, **more: torch.Tensor) -> None:
            super().__init__(*outputs, **more)
            self.scripted = next(pending)

        accuracy = property(lambda self: self.scripted[0])
        loss = property(lambda self: self.scripted[1])
        macro_f1 = property(lambda self: self.scripted[2] if len(self.scripted) > 2 else super().macro_f1)

    monkeypatch.setattr(train, "Evaluation", Scripted)


# --- recipes ----------------------------------------------------------------------------------------------------


def test_flags_override_the_recipe():
    tutorial = train.parse_args([])
    assert (tutorial.recipe.name, tutorial.epochs, tutorial.batch_size, tutorial.lr, tutorial.lrf) == (
        *("tutorial", 30, 16, 0.001, 0.1),
    )
    assert (tutorial.weight_decay, tutorial.label_smoothing, tutorial.warmup) == (0.005, 0, 0)
    for name, defaults in FLAG_DEFAULTS.items():
        args = train.parse_args(["--recipe", name])
        assert defaults.items() <= vars(args).items()
        assert args.recipe is RECIPES[name]
        assert defaults.keys() == FLAG_DEFAULTS["tutorial"].keys()
        args = train.parse_args(["--lr", "0.5", "--recipe", name, "--label_smoothing", "0.3"])
        assert (args.lr, args.label_smoothing, args.epochs) == (0.5, 0.3, defaults["epochs"])


def test_tutorial_recipe_uses_plain_sgd():
    model = MODELS["resnet18"](num_classes=5)
    optimizer = build_optimizer(train.parse_args([]), model, torch.device("cpu"))
    (group,) = optimizer.param_groups
    assert group["params"] == list(model.parameters())
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 0.005, False)


@pytest.mark.parametrize("muon_lr_scale", [0.0, 0.4])
def test_learning_rate_scale_of_each_parameter_group(muon_lr_scale):
    model = MODELS["resnet18"](num_classes=5)
    args = train.parse_args(["--recipe", "scratch", "--weight-decay", "0.25"])
    args.recipe = replace(args.recipe, backbone_lr_scale=0.1, muon_lr_scale=muon_lr_scale)
    optimizer = build_optimizer(args, model, torch.device("cpu"))
    set_learning_rate(optimizer, 2.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    seen = {names[p]: group for group in optimizer.param_groups for p in group["params"]}
    assert seen.keys() == set(names.values())
    for name, group in seen.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        uses_muon = bool(muon_lr_scale) and isinstance(layer, torch.nn.Conv2d)
        assert group["orthogonal"] == uses_muon, name
        assert group["weight_decay"] == 0.25, name
        rate = 2.0 if name.startswith("fc.") else 0.2 * (muon_lr_scale if uses_muon else 1)
        assert group["lr"] == pytest.approx(rate), name
        assert group["nesterov"]


def test_scratch_recipe_sets_sizes_smoothing_and_rates(two_classes, monkeypatch, capsys):
    sizes, smoothing = [], []
    train_one_epoch = train.train_one_epoch

    def look(model, optimizer, loader, *arguments, **options):
        sizes.append(next(iter(loader))[0].shape[-1])
        smoothing.append(options["label_smoothing"])
        return train_one_epoch(model, optimizer, loader, *arguments, **options)

    monkeypatch.setattr(train, "train_one_epoch", look)
    flags = ["--recipe", "scratch", "--img-size", "96", "--epochs", "4", "--lr", "0.01"]
    assert train.main(["--data-path", str(two_classes), *TINY, *flags]) == 0
    assert sizes == [48, 64, 64, 80]
    assert smoothing == [0.1] * 4
    schedule = Schedule(4, 4, lr=0.01, lrf=0.0, warmup=FLAG_DEFAULTS["scratch"]["warmup"], per_step=True)
    rates = [float(row["learning_rate"]) for row in metrics()]
    assert rates == pytest.approx([schedule.learning_rate(epoch, 3) for epoch in range(4)])  # at each last step
    assert "recipe       scratch, 4 epochs, batch size 5, lr 0.01," in capsys.readouterr().out
    flags = json.loads((RUN / "args.json").read_text(encoding="utf-8"))["flags"]
    assert flags["recipe"] == "scratch"
    assert FLAG_DEFAULTS["scratch"].items() - flags.items() == {
        *(("epochs", 30), ("batch_size", 64), ("lr", FLAG_DEFAULTS["scratch"]["lr"])),
    }


def test_scratch_initialises_conv1_unless_weights_are_given(two_classes, tmp_path):
    def conv1(*flags: str) -> torch.Tensor:
        assert train.main([*flags, *TINY, "--data-path", str(two_classes), "--img-size", "32", "--lr", "1e-9"]) == 0
        path = max(Path("runs").glob("*/weights/best.pth"), key=lambda path: path.stat().st_mtime_ns)
        return torch.load(path, weights_only=True)["state_dict"]["conv1.weight"]

    def is_paired(kernel: torch.Tensor) -> bool:
        positive, negative = kernel.chunk(2)
        return torch.allclose(positive, -negative, atol=1e-4)

    assert is_paired(conv1("--recipe", "scratch", "--epochs", "1"))
    assert not is_paired(conv1("--recipe", "tutorial", "--epochs", "1"))
    model = MODELS["resnet18"](num_classes=2)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    kernel = conv1("--recipe", "scratch", "--epochs", "1", "--weights", str(tmp_path / "weights.pth"))
    torch.testing.assert_close(kernel, model.conv1.weight.data, atol=1e-4, rtol=0)


def test_validation_uses_batch_norm_statistics_of_the_current_weights(two_classes):
    flags = ["--data-path", str(two_classes), *TINY, "--recipe", "scratch", "--img-size", "32", "--epochs", "2"]
    assert train.main([*flags, "--amp", "off"]) == 0
    state = torch.load(RUN / "weights" / "best.pth", weights_only=True)["state_dict"]
    model = to_device(MODELS["resnet18"](num_classes=2), "cpu")
    model.load_state_dict(state)
    split, _ = find_split(two_classes)
    images = MyDataSet(split.train_paths, split.train_labels, EvalTransform(32))
    estimate_batch_norm(model, torch.stack([image for image, _ in images]), "cpu")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], msg=name)


def test_weight_average_is_validated_and_saved(two_classes, monkeypatch):
    weights = []
    step = Muon.step

    def note(optimizer: Muon) -> None:
        step(optimizer)
        weights.append(optimizer.param_groups[-1]["params"][0].detach().clone())

    monkeypatch.setattr(Muon, "step", note)
    flags = ["--data-path", str(two_classes), *TINY, "--recipe", "scratch", "--img-size", "32", "--epochs", "1"]
    assert train.main(flags) == 0
    expected = weights[0]
    for value in weights[1:]:
        expected = 0.9 * expected + 0.1 * value
    last, best = (torch.load(RUN / "weights" / f"{name}.pth", weights_only=True) for name in ("last", "best"))
    (name,) = (name for name, value in last["state_dict"].items() if torch.equal(value, weights[-1]))
    torch.testing.assert_close(best["state_dict"][name], expected)
    assert not torch.equal(best["state_dict"][name], weights[-1])


def test_resume_with_per_step_schedule_is_bit_identical(two_classes):
    flags = ["--data-path", str(two_classes), *TINY, "--recipe", "scratch", "--img-size", "64", "--epochs", "3"]
    assert train.main([*flags, "--name", "undisturbed"]) == 0
    with after_steps(6, send(signal.SIGTERM)):
        assert train.main(flags) == 143
    assert train.main(["--resume", "flower_experiment"]) == 0
    undisturbed, resumed = (
        torch.load(Path("runs", name, "weights", "last.pth"), weights_only=True)
        for name in ("undisturbed", "flower_experiment")
    )
    for state, expected in [
        (resumed["state_dict"], undisturbed["state_dict"]),
        (resumed["resume"]["average"], undisturbed["resume"]["average"]),
    ]:
        assert len(state) > 50
        assert all(torch.equal(value, expected[name]) for name, value in state.items())


# --- the best epoch ---------------------------------------------------------------------------------------------


def test_lower_loss_breaks_ties_for_the_best_epoch(two_classes, monkeypatch, capsys):
    script_validation(monkeypatch, [(0.6, 2.0), (0.8, 1.5), (0.8, 1.0), (0.8, 1.2), (0.6, 0.1), (0.8, 1.0)])
    flags = ["--data-path", str(two_classes), *TINY, "--img-size", "32", "--patience", "4"]
    assert train.main([*flags, "--epochs", "3"]) == 0
    assert train.main(["--resume", "--epochs", "9"]) == 0  # the checkpoint keeps the best epoch
    best = torch.load(RUN / "weights" / "best.pth", weights_only=True)
    assert (best["epoch"], best["accuracy"], best["val_loss"]) == (2, 0.8, 1.0)
    assert "best accuracy 0.800 at epoch 2" in capsys.readouterr().out
    assert len(metrics()) == 6  # a lower loss does not reset patience, which counts from epoch 1
    assert train.main(["--resume"]) == 0
    assert "is complete: 4 epochs without improvement in accuracy" in capsys.readouterr().out


# --- early stopping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "best"), [("accuracy", 1), ("macro_f1", 2), ("val_loss", 3)])
def test_best_metric_decides_the_best_epoch(two_classes, monkeypatch, capsys, metric, best):
    results = [(0.6, 2.0, 0.1), (0.8, 1.5, 0.2), (0.7, 1.0, 0.9), (0.5, 0.5, 0.3), (0.8, 1.6, 0.4)]
    script_validation(monkeypatch, results)
    flags = ["--data-path", str(two_classes), *TINY, "--img-size", "32", "--best-metric", metric, "--epochs", "5"]
    assert train.main(flags) == 0
    assert torch.load(RUN / "weights" / "best.pth", weights_only=True)["epoch"] == best
    output = capsys.readouterr().out
    assert f"best {metric} " in output
    assert ("  macro_f1 0.900  " in output) == (metric == "macro_f1")
    if metric != "accuracy":
        assert train.main(["--resume", "--best-metric", "accuracy"]) == 1
        assert "--best-metric: the run" in capsys.readouterr().err


def test_patience_stops_a_run_without_improvement(two_classes, monkeypatch, capsys):
    script_validation(monkeypatch, [(accuracy, 1.0) for accuracy in (0.4, 0.6, 0.4, 0.6, 0.5)])
    flags = ["--data-path", str(two_classes), *TINY, "--img-size", "32", "--epochs", "9"]
    assert train.main([*flags, "--patience", "2"]) == 0
    assert len(metrics()) == 4
    assert len(list(RUN.glob("0000*/validation/tensors.tsv"))) == 1  # written by the last epoch only
    capsys.readouterr()
    assert train.main(["--resume"]) == 0
    assert "is complete: 2 epochs without improvement in accuracy" in capsys.readouterr().out
    assert train.main(["--resume", "--patience", "1"]) == 0
    assert "is complete: 1 epochs without improvement in accuracy" in capsys.readouterr().out
    assert train.main(["--resume", "--patience", "3"]) == 0
    assert len(metrics()) == 5


def test_resume_with_more_epochs_and_patience_left(two_classes, capsys):
    flags = ["--data-path", str(two_classes), *TINY, "--img-size", "32", "--lr", "1e-12", "--patience", "2"]
    assert train.main([*flags, "--epochs", "1"]) == 0
    assert train.main(["--resume", "--epochs", "2"]) == 0
    assert len(metrics()) == 2
    capsys.readouterr()
    assert train.main(["--resume"]) == 0
    assert "is complete: 2 epochs" in capsys.readouterr().out


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16, torch.float16])
def test_optimizer_is_not_fused_with_float16(amp_dtype):
    """The gradient scaler may skip a step, in which a fused optimizer would update its momentum."""
    args, cpu = train.parse_args(["--recipe", "scratch"]), torch.device("cpu")
    optimizer = build_optimizer(args, MODELS["resnet18"](num_classes=5), cpu, amp_dtype)
    assert optimizer.defaults["fused"] == (None if amp_dtype == torch.float16 else True)


@pytest.mark.parametrize(
    "flags",
    [
        ["--time-budget", "0"],
        ["--time-budget", "1", "--epochs", "3"],
        ["--time-budget", "1", "--recipe", "finetune", "--freeze-layers"],
        ["--warmup", "1"],
        ["--label-smoothing", "1"],
        ["--weight-decay", "-1"],
        ["--patience", "-1"],
        ["--timeout", "1e14"],
    ],
)
def test_invalid_training_flags_are_one_line_errors(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        train.main(flags)
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_resume_keeps_the_stored_recipe(two_classes, monkeypatch, capsys):
    flags = ["--data-path", str(two_classes), *TINY, "--img-size", "64", "--recipe", "scratch", "--epochs", "2"]
    with after_steps(1, send(signal.SIGTERM)):
        assert train.main(flags) == 143
    header = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("recipe"))
    monkeypatch.setitem(FLAG_DEFAULTS["scratch"], "lr", 7.0)
    monkeypatch.setitem(RECIPES, "scratch", replace(RECIPES["scratch"], progressive_resize_end=2.0, nesterov=False))
    assert train.main(["--resume"]) == 0
    assert header in capsys.readouterr().out
    assert max(float(row["learning_rate"]) for row in metrics()) < 1


def test_resume_of_another_checkpoint_format_is_refused(two_classes, capsys):
    flags = ["--data-path", str(two_classes), *TINY, "--img-size", "64", "--recipe", "scratch"]
    with after_steps(1, send(signal.SIGTERM)):
        assert train.main(flags) == 143
    last = RUN / "weights" / "last.pth"
    content = torch.load(last, weights_only=True)
    del content["resume"]["format"]  # the first versions had none
    torch.save(content, last)
    before = last.read_bytes()
    capsys.readouterr()
    assert train.main(["--resume"]) == 1
    said = capsys.readouterr().err
    assert f"--weights {last}" in said
    assert len(said.splitlines()) == 1
    assert last.read_bytes() == before


def test_fine_tuning_without_weights_is_warned_about(two_classes, capsys):
    flags = ["--data-path", str(two_classes), *TINY, "--img-size", "64", "--epochs", "1"]
    assert train.main([*flags, "--recipe", "finetune"]) == 0
    assert "warning: --recipe finetune" in capsys.readouterr().out
    assert train.main([*flags, "--recipe", "scratch"]) == 0
    assert "warning" not in capsys.readouterr().out


# --- a frozen backbone ------------------------------------------------------------------------------------------


def test_frozen_backbone_features_are_computed_once(two_classes, tmp_path, monkeypatch):
    weights = MODELS["resnet18"](num_classes=2)
    torch.save(weights.state_dict(), tmp_path / "w.pth")
    flags = ["--data-path", str(two_classes), *TINY, "--img-size", "64", "--weights", str(tmp_path / "w.pth")]
    passes = []
    feature_map = ResNet.feature_map
    monkeypatch.setattr(ResNet, "feature_map", lambda model, x: passes.append(x.shape[0]) or feature_map(model, x))
    assert train.main([*flags, "--recipe", "finetune", "--freeze-layers", "--epochs", "8"]) == 0
    state = torch.load(RUN / "weights" / "last.pth", weights_only=True)["state_dict"]
    for name, value in state.items():
        assert torch.equal(value, weights.state_dict()[name]) == (not name.startswith("fc.")), name
    rows = metrics()
    assert len(rows) == 8
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    views = RECIPES["finetune"].feature_views
    figures = 8 * 2 + 4 * 8  # 2 images after each epoch, up to 8 mistakes after 4 of them
    projector = 5
    assert sum(passes) <= views * 20 + 5 + figures + projector


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_long_runs_of_scratch_change_the_colours(tmp_path, recipe):
    Image.new("RGB", (40, 40), (200, 100, 50)).save(tmp_path / "a.png")
    images = MyDataSet([tmp_path / "a.png"], [0], TrainTransform(32))
    for epochs in (16, 48):
        args = train.parse_args(["--recipe", recipe, "--epochs", str(epochs)])
        schedule = build_schedule(args, 1, 32, Distributed())
        order, colours = EpochSampler(1), set()
        for epoch in range(5):
            order.set_epoch(epoch, **schedule.image_options(epoch))
            colours |= {tuple(images[item][0][:, 0, 0].tolist()) for item in order}
        assert (len(colours) > 1) == (recipe == "scratch" and epochs == 48)


def test_cached_features_match_their_images(two_classes):
    args = train.parse_args(["--recipe", "finetune", "--freeze-layers", *TINY, "--img-size", "64"])
    split, _ = find_split(two_classes)
    images = MyDataSet(split.train_paths, split.train_labels, TrainTransform(64))
    device, dist = torch.device("cpu"), Distributed()
    loaders = Loaders(build_train_loader(args, images, device, dist), build_val_loader(args, images, device, dist))
    model = MODELS["resnet18"](num_classes=2)
    head = cache_features(args, model, loaders, 64, device, dist).train
    sampler = EpochSampler(len(images))
    for view in range(args.recipe.feature_views):
        sampler.set_epoch(view, img_size=training_sizes(args.recipe, 64)[1])
        for index, seed, size in itertools.islice(sampler, 3):
            pixels, label = images[index, seed, size]
            with torch.no_grad():
                expected = model.eval().feature_map(prepare_batch(pixels[None], "cpu")).mean(dim=(2, 3))[0]
            features, its_label = head.dataset[index, view]
            assert int(its_label) == label
            assert torch.allclose(features, expected, atol=1e-4)
