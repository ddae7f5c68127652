"""train.py from its command line: what it leaves behind, what it prints, what it refuses."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import write_classes, write_image
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torchvision.models import resnet18 as torchvision_resnet18
from torchvision.transforms import v2

import loaders
import report
import train
from data_utils import choose_figure_images, find_split
from loaders import make_train_loader
from model import BasicBlock, ResNet, load_model, named_convolutions, resnet18
from my_dataset import EpochSampler, EvalTransform, MyDataSet, TrainTransform
from program_utils import select_precision
from ranks import Ranks
from sample_flowers import draw_sample
from train_eval_utils import evaluate

PROGRAM = Path(train.__file__)
TINY = ["--model", "resnet18", "--img-size", "32", "--device", "cpu", "--workers", "0"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def read_events(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    events.Reload()
    return events


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "weights" / "last.pth", weights_only=True)["state_dict"]


def assert_same_weights(one: Path, other: Path) -> None:
    for (name, a), b in zip(weights_of(one).items(), weights_of(other).values(), strict=True):
        assert torch.equal(a, b), name


# --- a whole run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, sample):
    """A run of three epochs on the drawn sample: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    command = [
        sys.executable,
        PROGRAM,
        "--data-path",
        sample,
        *TINY,
        "--epochs",
        "3",
        "--lrf",
        "0.5",
        "--save-every",
        "2",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "flower_experiment", done.stdout, done.stderr


def test_what_a_run_leaves_behind(run):
    folder, *_ = run
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    events = {name for name in files if name.startswith("events.out.tfevents.")}
    assert len(events) == 1
    assert files - events == {
        *("args.json", "class_indices.json", "files.json", ".lock"),
        *("metrics.csv", "mistakes.csv", "confusion_matrix.png", "curves.png", "projector_config.pbtxt"),
        *(f"00002/validation/{name}" for name in ("tensors.tsv", "metadata.tsv", "sprite.png")),
        *(f"weights/{name}" for name in ("best.pth", "last.pth", "model-1.pth")),
    }
    assert {path.name for path in folder.parent.parent.iterdir()} == {"runs"}
    flags = json.loads((folder / "args.json").read_text(encoding="utf-8"))["flags"]
    assert (flags["epochs"], flags["lr"], flags["batch_size"], flags["model"]) == (3, 0.001, 16, "resnet18")
    assert json.loads((folder / "class_indices.json").read_text(encoding="utf-8"))["4"] == "tulips"


def test_the_events(run):
    events = read_events(run[0])
    tags = events.Tags()
    assert tags["graph"]
    assert set(tags["scalars"]) == {
        *("train_loss", "val_loss", "train_accuracy", "accuracy", "best_accuracy", "macro_f1", "learning_rate"),
        *(f"recall/{name}" for name in ("daisy", "dandelion", "roses", "sunflowers", "tulips")),
        *("speed/images_per_second", "speed/seconds_per_epoch", "memory/peak_GiB", "step/train_loss"),
    }
    for tag in set(tags["scalars"]) - {"step/train_loss"}:
        assert [scalar.step for scalar in events.Scalars(tag)] == [0, 1, 2]
    assert [scalar.step for scalar in events.Scalars("step/train_loss")] == list(range(15))  # 5 steps an epoch
    images = {"predictions vs. actuals", "confusion matrix", "worst mistakes", "training batch"}
    assert set(tags["images"]) == images
    for tag in images:
        assert [image.step for image in events.Images(tag)] == [0, 1, 2]
    assert set(tags["histograms"]) == {"conv1", "layer1/block0/conv1"}
    for tag in tags["histograms"]:
        assert [histogram.step for histogram in events.Histograms(tag)] == [0, 1, 2]
    rates = [scalar.value for scalar in events.Scalars("learning_rate")]
    expected = [0.001 * (((1 + math.cos(math.pi * n / 3)) / 2) * (1 - 0.5) + 0.5) for n in range(3)]
    assert rates == pytest.approx(expected)


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_mistakes_are_what_the_best_weights_say_of_each_image(run):
    folder, *_ = run
    best = torch.load(folder / "weights" / "best.pth", weights_only=True)
    model = torchvision_resnet18(num_classes=5)  # on its own: no code of ours
    model.load_state_dict(best["state_dict"])
    amp_dtype, _ = select_precision("auto", torch.device("cpu"))
    scale = v2.Compose(
        [
            *(v2.Resize(37), v2.CenterCrop(32), v2.ToDtype(torch.float32, scale=True)),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    rows = read_csv(folder / "mistakes.csv")
    images = [scale(v2.functional.pil_to_tensor(Image.open(row["path"]))) for row in rows]
    with torch.no_grad(), torch.autocast("cpu", amp_dtype, enabled=amp_dtype is not None):
        logits = model.eval()(torch.stack(images)).float()
    probabilities, predicted = logits.softmax(dim=1).max(dim=1)
    names = best["class_names"]
    labels = torch.tensor([names.index(row["true"]) for row in rows])
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    tolerance = 1e-3 if amp_dtype is None else 0.05
    assert [float(row["probability"]) for row in rows] == pytest.approx(probabilities.tolist(), abs=tolerance)
    assert [float(row["loss"]) for row in rows] == pytest.approx(losses.tolist(), abs=5 * tolerance)
    agree = sum(row["predicted"] == names[index] for row, index in zip(rows, predicted.tolist(), strict=True))
    assert agree >= len(rows) - (0 if amp_dtype is None else 1)  # rounding may turn one over
    assert [row["true"] for row in rows] == [Path(row["path"]).parent.name for row in rows]
    assert [float(row["loss"]) for row in rows] == sorted((float(row["loss"]) for row in rows), reverse=True)
    assert len({row["path"] for row in rows}) == 20  # the validation images, each once
    right = sum(row["true"] == row["predicted"] for row in rows)
    assert right / 20 == pytest.approx(best["accuracy"])


def test_metrics_are_those_of_tensorboard(run):
    folder, *_ = run
    events = read_events(folder)
    rows = read_csv(folder / "metrics.csv")
    assert [row.pop("epoch") for row in rows] == ["0", "1", "2"]
    assert set(rows[0]) == set(events.Tags()["scalars"]) - {"step/train_loss"}
    for tag in rows[0]:
        values = [scalar.value for scalar in events.Scalars(tag)]
        assert [float(row[tag]) for row in rows] == pytest.approx(values, rel=1e-5)
    recalls = [float(rows[-1][f"recall/{name}"]) for name in ("daisy", "dandelion", "roses", "sunflowers", "tulips")]
    assert sum(recalls) / 5 == pytest.approx(float(rows[-1]["accuracy"]))  # as many images of each class
    assert float(rows[-1]["best_accuracy"]) == max(float(row["accuracy"]) for row in rows)


def test_what_the_other_tabs_show(run):
    folder, *_ = run
    tensors = read_events(folder).Tags()["tensors"]
    assert {f"class/{name}" for name in ("daisy", "dandelion", "roses", "sunflowers", "tulips")} < set(tensors)
    assert {"run/text_summary", "custom_scalars__config__"} < set(tensors)
    card = read_events(folder).Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "python train.py --data-path" in card
    assert "| daisy | 16 | 4 |" in card
    assert "| all | 80 | 20 |" in card
    assert "| lrf | 0.5 |" in card
    assert f"| torch | {torch.__version__} |" in card
    metadata = (folder / "00002" / "validation" / "metadata.tsv").read_text(encoding="utf-8").splitlines()
    assert metadata[0].split("\t") == ["class", "predicted", "right or wrong"]
    assert len(metadata) == 21
    for line in metadata[1:]:
        label, predicted, verdict = line.split("\t")
        assert verdict == ("right" if label == predicted else "wrong")
    raw = [
        value.metadata.plugin_data
        for path in folder.glob("events.*")
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "hparams"
    ]
    content = [HParamsPluginData.FromString(plugin.content) for plugin in raw]
    flags = next(data.session_start_info.hparams for data in content if data.HasField("session_start_info"))
    assert flags["lrf"].number_value == 0.5
    assert flags["model"].string_value == "resnet18"
    assert sum(data.HasField("session_end_info") for data in content) == 1


def test_every_convolution_in_histograms(two_classes):
    assert train.main(["--data-path", str(two_classes), *TINY, "--epochs", "1", "--histograms", "all"]) == 0
    tags = read_events(Path("runs/flower_experiment")).Tags()["histograms"]
    names = set(named_convolutions(resnet18(2)))
    assert set(tags) == names | {f"gradients/{name}" for name in names}


def test_the_graph_is_the_models(run):
    graph = read_events(run[0]).Graph()
    names = {node.name for node in graph.node}
    assert any("layer4" in name and "conv2" in name for name in names)
    sizes = [node.attr["_output_shapes"].list.shape for node in graph.node if node.name.startswith("input")]
    assert [dim.size for dim in sizes[0][0].dim] == [1, 3, 224, 224]


def test_what_a_run_prints(run):
    folder, printed, complaints = run
    assert "cpu" in printed
    assert select_precision("auto", torch.device("cpu"))[1] in printed
    assert "resnet18, 11,179,077 parameters, from scratch" in printed
    assert "5: daisy, dandelion, roses, sunflowers, tulips" in printed
    assert "80 for training, 20 for validation" in printed
    assert f"runs{os.sep}flower_experiment" in printed
    assert "tensorboard --logdir=runs" in printed
    assert "http://localhost:6006/" in printed
    assert len(re.findall(r"^\[epoch \d\] train_loss", printed, re.M)) == 3
    assert "python predict.py" in printed
    assert len(printed.splitlines()) < 15
    assert complaints == ""  # no bar where there is no terminal
    best = torch.load(folder / "weights" / "best.pth", weights_only=True)
    assert f"best accuracy {best['accuracy']:.3f} at epoch {best['epoch']}" in printed


def test_the_weights_tell_what_was_measured(run, sample):
    folder, *_ = run
    model, info = load_model(folder / "weights" / "best.pth")
    assert (info["model"], info["img_size"]) == ("resnet18", 32)
    assert info["class_names"] == ["daisy", "dandelion", "roses", "sunflowers", "tulips"]
    accuracies = [scalar.value for scalar in read_events(folder).Scalars("accuracy")]
    assert info["accuracy"] == pytest.approx(max(accuracies))
    assert info["epoch"] == accuracies.index(max(accuracies))
    paths, labels = find_split(sample)[0].val_paths, find_split(sample)[0].val_labels
    data_set = MyDataSet(paths, labels, EvalTransform(32))
    loader = torch.utils.data.DataLoader(data_set, batch_size=7, collate_fn=data_set.collate_fn)
    amp_dtype, _ = select_precision("auto", torch.device("cpu"))
    assert evaluate(model, loader, "cpu", amp_dtype=amp_dtype) == pytest.approx(info["accuracy"])


def test_last_holds_what_a_resume_needs(run):
    last = torch.load(run[0] / "weights" / "last.pth", weights_only=True)
    assert last["epoch"] == 2
    resume = last["resume"]
    assert (resume["epoch"], resume["progress"]["steps"]) == (3, 0)
    assert resume["optimizer"]["state"]
    assert resume["best"].keys() == {"accuracy", "epoch", "val_loss"}
    assert resume["scaler"] == {}  # of float16 alone
    plain = torch.load(run[0] / "weights" / "model-1.pth", weights_only=True)
    assert plain.keys() == resnet18(num_classes=5).state_dict().keys()


def test_events_can_be_read_while_training_goes_on_and_ctrl_c_saves_though_nobody_listens(sample, tmp_path):
    command = [sys.executable, PROGRAM, "--data-path", sample, *TINY, "--epochs", "1000"]
    running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for line in running.stdout:
            if line.startswith("[epoch 1]"):
                break
        time.sleep(0.1)
        assert running.poll() is None
        events = read_events(tmp_path / "runs" / "flower_experiment")
        for tag in ("train_loss", "accuracy", "learning_rate"):
            assert [scalar.step for scalar in events.Scalars(tag)][:2] == [0, 1]
        assert events.Tags()["graph"]
        # As Ctrl-C does to `train.py 2>&1 | tee log`: it ends the reader, too.
        running.stderr.close()
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 130
    finally:
        running.kill()
        running.wait()
        running.stdout.close()


def test_learning_for_real(tmp_path):
    """A small network rises well above chance (20 %) on pictures that it has not seen."""
    split = find_split(draw_sample(tmp_path / "sample", images_per_class=40, size=72))[0]
    train_set = MyDataSet(split.train_paths, split.train_labels, TrainTransform(48))
    val_set = MyDataSet(split.val_paths, split.val_labels, EvalTransform(48))
    torch.manual_seed(0)
    sampler = EpochSampler(len(train_set))
    train_loader = torch.utils.data.DataLoader(train_set, 16, sampler=sampler, collate_fn=train_set.collate_fn)
    val_loader = torch.utils.data.DataLoader(val_set, 50, collate_fn=val_set.collate_fn)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    for epoch in range(6):
        sampler.set_epoch(epoch)
        train.train_one_epoch(model, optimizer, train_loader, "cpu", epoch)
    assert evaluate(model, val_loader, "cpu") >= 0.4


# --- repeatability ----------------------------------------------------------------------------------------------


def test_weights_are_a_function_of_the_flags(two_classes):
    flags = ["--data-path", str(two_classes), *TINY, "--batch-size", "4", "--epochs", "2", "--seed", "7"]
    assert train.main(flags) == 0
    torch.rand(3)  # what happened before does not matter
    assert train.main([*flags, "--workers", "2"]) == 0
    assert_same_weights(Path("runs/flower_experiment"), Path("runs/flower_experiment-2"))
    assert train.main([*flags, "--seed", "8", "--epochs", "1", "--name", "other"]) == 0
    one, other = (weights_of(Path("runs", name))["conv1.weight"] for name in ("flower_experiment", "other"))
    assert not torch.equal(one, other)


def test_workers_that_are_spawned_give_the_same(sample):
    args = train.parse_args(["--data-path", str(sample), *TINY[:-1], "1"])
    split, _ = find_split(sample)
    images = MyDataSet(split.train_paths, split.train_labels, TrainTransform(32))
    batches = []
    for context in ("fork", "spawn") if os.name == "posix" else ("spawn",):
        loader = make_train_loader(images, args, torch.device("cpu"), Ranks())
        loader.multiprocessing_context = context
        batches.append(list(loader))
    args.workers = 0
    batches.append(list(make_train_loader(images, args, torch.device("cpu"), Ranks())))
    for others in batches[1:]:
        for (pixels, labels), (others_pixels, others_labels) in zip(batches[0], others, strict=True):
            assert torch.equal(pixels, others_pixels)
            assert torch.equal(labels, others_labels)


@pytest.mark.parametrize("amp", ["on", "off"])
def test_mixed_precision_is_repeatable_too(two_classes, capsys, amp):
    flags = ["--data-path", str(two_classes), *TINY, "--batch-size", "4", "--epochs", "1", "--amp", amp]
    assert train.main(flags) == 0
    assert f"precision    {'bfloat16' if amp == 'on' else 'float32 (--amp off)'}" in capsys.readouterr().out
    assert train.main([*flags, "--workers", "1"]) == 0
    assert_same_weights(Path("runs/flower_experiment"), Path("runs/flower_experiment-2"))


def test_a_last_batch_of_one_image_is_left_out(tmp_path):
    data = write_classes(tmp_path / "data", {"cat": 3, "dog": 6})
    assert train.main(["--data-path", str(data), *TINY, "--epochs", "1", "--batch-size", "7"]) == 0


# --- data -------------------------------------------------------------------------------------------------------


def test_without_data_the_sample_is_drawn_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(loaders, "SAMPLE", tmp_path / "data" / "sample")
    drawn = []

    def draw(folder):
        drawn.append(folder)
        return write_classes(folder, {"daisy": 5, "roses": 5})

    monkeypatch.setattr(loaders, "draw_sample", draw)
    for _ in range(2):
        assert train.main([*TINY, "--epochs", "1"]) == 0
        assert "--data-path FOLDER" in capsys.readouterr().out
    assert drawn == [tmp_path / "data" / "sample"]


def test_folders_of_ones_own(tmp_path, capsys):
    data = write_classes(tmp_path / "pets" / "train", {"cat": 4, "a dog": 3}).parent
    write_classes(data / "val", {"cat": 1, "a dog": 2})
    assert train.main(["--data-path", str(data), *TINY, "--epochs", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"7 for training, 3 for validation (from {data / 'val'})" in printed
    assert len(read_events(Path("runs/flower_experiment")).Images("predictions vs. actuals")) == 1
    write_classes(tmp_path / "mine", {"cat": 2})
    assert train.main(["--data-path", str(data), "--val-path", str(tmp_path / "mine"), *TINY, "--epochs", "1"]) == 0
    assert f"7 for training, 2 for validation (from {tmp_path / 'mine'})" in capsys.readouterr().out


def test_the_prediction_figure_shows_plot_img_or_else_an_image_a_class(two_classes, sample):
    split, _ = find_split(sample)
    data_set = MyDataSet(split.val_paths, split.val_labels, EvalTransform(32))
    images, names = choose_figure_images(data_set, split.class_names, report.PLOT_IMG)
    assert images.shape == (5, 3, 32, 32)
    assert sorted(names) == split.class_names
    split, _ = find_split(two_classes)
    data_set = MyDataSet(split.val_paths, split.val_labels, EvalTransform(32))
    images, names = choose_figure_images(data_set, split.class_names, report.PLOT_IMG)
    assert images.shape == (2, 3, 32, 32)
    assert names == ["cat", "dog"]


@pytest.mark.parametrize("damage", ["label.txt", "photograph"])
def test_a_damaged_file_in_plot_img_ends_no_training(two_classes, tmp_path, monkeypatch, capsys, damage):
    picture = write_image(tmp_path / "plot_img" / "a.png")
    (tmp_path / "plot_img" / "label.txt").write_text("a.png cat", encoding="utf-16" if damage == "label.txt" else None)
    if damage == "photograph":
        picture.write_bytes(b"")
    monkeypatch.setattr(report, "PLOT_IMG", tmp_path / "plot_img")
    assert train.main(["--data-path", str(two_classes), *TINY, "--epochs", "1"]) == 0
    assert "shows images of the data instead" in capsys.readouterr().out
    assert len(read_events(Path("runs/flower_experiment")).Images("predictions vs. actuals")) == 1


def test_download_comes_before_training(two_classes, tmp_path, monkeypatch):
    monkeypatch.setattr(loaders, "download_flower_photos", lambda root: two_classes.rename(root))
    assert train.main(["--download", "--data-path", str(tmp_path / "new"), *TINY, "--epochs", "1"]) == 0
    assert (tmp_path / "new" / "cat").is_dir()


# --- weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["tutorial", "scratch"])  # finetune, which computes its features once, is apart
def test_a_frozen_backbone_keeps_the_weights_it_starts_from(two_classes, tmp_path, recipe, capsys):
    source = resnet18(num_classes=9)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    flags = ["--data-path", str(two_classes), *TINY, "--epochs", "1", "--weights", str(tmp_path / "w.pth")]
    assert train.main([*flags, "--freeze-layers", "--recipe", recipe]) == 0
    printed = capsys.readouterr().out
    assert "w.pth but for fc.weight, fc.bias, made for another number of classes; only fc learns" in printed
    assert "warning" not in printed
    for name, value in weights_of(Path("runs/flower_experiment")).items():
        if not name.startswith("fc."):
            assert torch.equal(value, source.state_dict()[name]), name
    assert train.main([*flags, "--freeze-layers", "False", "--recipe", recipe]) == 0
    moved = weights_of(Path("runs/flower_experiment-2"))
    assert not torch.equal(moved["conv1.weight"], source.state_dict()["conv1.weight"])


def test_a_frozen_random_backbone_is_warned_about(two_classes, capsys):
    assert (
        train.main(["--data-path", str(two_classes), *TINY, "--epochs", "1", "--freeze-layers", "--weights", ""]) == 0
    )
    assert "warning: --freeze-layers without --weights freezes a random backbone" in capsys.readouterr().out


# --- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["--epochs", "0"],
        ["--epochs", "-1"],
        ["--epochs", "many"],
        ["--batch-size", "0"],
        ["--batch_size", "-3"],
        ["--batch-size", "1", "--img-size", "32"],
        ["--lr", "-0.1"],
        ["--lr", "0"],
        ["--lr", "nan"],
        ["--lr", "inf"],
        ["--lrf", "-1"],
        ["--data-path", ""],
        ["--val-path", ""],
        ["--val-rate", "0"],
        ["--val-rate", "1"],
        ["--workers", "-1"],
        ["--seed", "-1"],
        ["--img-size", "8"],
        ["--num-classes", "1"],
        ["--save-every", "-1"],
        ["--name", "../elsewhere"],
        ["--name", ""],
        ["--model", "vgg16"],
        ["--freeze-layers", "perhaps"],
        ["--no-such-flag"],
    ],
)
def test_values_out_of_range_are_refused_in_one_line(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        train.main(flags)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("train.py: error: ")
    assert flags[0].replace("_", "-") in said
    assert len(said.splitlines()) == 1
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-path", "nowhere"], "nowhere: no such folder"),
        (["--data-path", "a.png"], "a.png: a file, not a folder"),
        (["--data-path", "loop"], "loop: no such folder"),
        (["--data-path", "empty"], "needs at least two sub-folders"),
        (["--data-path", "hollow"], "no image (.jpg .jpeg .png .webp .bmp .gif .tif .tiff) in class dog"),
        (["--data-path", "few"], "too few images"),
        (["--val-path", "nowhere"], "nowhere: no such folder"),
        (["--num-classes", "3"], "--num-classes is 3, but the data has 2 classes"),
        (["--weights", "resNet34.pth"], "resNet34.pth: no such weights file"),
        (["--weights", "a.png"], "a.png: not a PyTorch weights file"),
        (["--device", "gpu"], "--device gpu"),
        (["--download"], "not an empty folder"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(two_classes, flags, message, capsys):
    Path("empty").mkdir()
    Path("loop").symlink_to("loop")
    write_image(Path("a.png"))
    write_classes(Path("hollow"), {"cat": 1})
    Path("hollow/dog").mkdir()
    write_classes(Path("few"), {"cat": 2, "dog": 4})
    before = sorted(Path().rglob("*"))
    assert train.main(["--data-path", str(two_classes), *TINY, *flags]) == 1
    said = capsys.readouterr().err
    assert said.startswith("train.py: error: ")
    assert message in said
    assert len(said.splitlines()) == 1
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("batch_size", ["4", "32"])  # found in a later step, or in the evaluation after the only one
def test_divergence_is_one_line_and_nothing_is_saved_of_it(two_classes, capsys, batch_size):
    flags = ["--data-path", str(two_classes), *TINY, "--epochs", "30", "--lr", "1e25", "--batch-size", batch_size]
    assert train.main(flags) == 1
    assert [path.name for path in Path("runs/flower_experiment/weights").iterdir()] == ["last.pth"]
    assert all(value.isfinite().all() for value in weights_of(Path("runs/flower_experiment")).values())
    said = capsys.readouterr().err
    assert "training diverged" in said
    assert "learning rate 1e+25" in said
    assert len(said.splitlines()) == 1


def test_runs_where_nothing_may_be_written(two_classes, capsys):
    Path("runs").write_text("a file")
    assert train.main(["--data-path", str(two_classes), *TINY, "--epochs", "1"]) == 1
    assert "runs" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="Windows allows no such names")
def test_names_that_the_output_cannot_show(tmp_path):
    data = write_classes(tmp_path / "data", {"向日葵": 5, "two\nlines": 5})
    command = [sys.executable, PROGRAM, "--data-path", data, *TINY, "--epochs", "1"]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, check=False)
    assert done.returncode == 0, done.stderr
    assert b"2: two\\nlines, \\u5411\\u65e5\\u8475" in done.stdout
    assert load_model("runs/flower_experiment/weights/best.pth")[1]["class_names"] == ["two\nlines", "向日葵"]


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        train.main(["--help"])
    assert caught.value.code == 0
    readme = (PROGRAM.parent / "README.md").read_text(encoding="utf-8")
    for flag in set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help", "--logdir", "--nproc"}:
        assert f"`{flag}`" in readme, flag
