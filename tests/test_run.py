"""Files, TensorBoard events and output of train.py run as a program."""

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
from conftest import read_events, write_classes
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torchvision.models import resnet18 as torchvision_resnet18
from torchvision.transforms import v2

import train
from cli_utils import select_precision
from dataset_split import find_split
from model import resnet18
from my_dataset import EvalTransform, MyDataSet
from train_eval_utils import evaluate
from weights_io import load_model

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
PROGRAM = Path(train.__file__)
TINY = ["--model", "resnet18", "--img-size", "32", "--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, sample):
    """Train three epochs on the drawn sample and return the run's folder, stdout and stderr."""
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


def test_files_written_by_a_run(run):
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


def test_tensorboard_tags_and_steps(run):
    events = read_events(run[0])
    tags = events.Tags()
    assert tags["graph"]
    assert set(tags["scalars"]) == {
        *("train_loss", "val_loss", "train_accuracy", "accuracy", "best_accuracy", "macro_f1", "learning_rate"),
        *("calibration/error", "calibration/temperature"),
        *(f"recall/{name}" for name in ("daisy", "dandelion", "roses", "sunflowers", "tulips")),
        *("speed/images_per_second", "speed/seconds_per_epoch", "memory/peak_GiB", "step/train_loss"),
    }
    for tag in set(tags["scalars"]) - {"step/train_loss"}:
        assert [scalar.step for scalar in events.Scalars(tag)] == [0, 1, 2]
    assert [scalar.step for scalar in events.Scalars("step/train_loss")] == list(range(15))  # 5 steps per epoch
    images = {"predictions vs. actuals", "confusion matrix", "worst mistakes", "training batch", "reliability"}
    assert set(tags["images"]) == images
    for tag in images:
        steps = [image.step for image in events.Images(tag)]
        assert steps == [0, 1, 2] or (steps == [0, 2] and tag != "predictions vs. actuals")  # the epochs are short
    assert set(tags["histograms"]) == {"conv1", "layer1/block0/conv1"}
    for tag in tags["histograms"]:
        assert [histogram.step for histogram in events.Histograms(tag)] == [0, 1, 2]
    rates = [scalar.value for scalar in events.Scalars("learning_rate")]
    expected = [0.001 * (((1 + math.cos(math.pi * n / 3)) / 2) * (1 - 0.5) + 0.5) for n in range(3)]
    assert rates == pytest.approx(expected)


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def test_mistakes_csv_matches_the_best_weights(run):
    folder, *_ = run
    best = torch.load(folder / "weights" / "best.pth", weights_only=True)
    model = torchvision_resnet18(num_classes=5)  # torchvision only, none of our code
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
    runners_up = logits.softmax(dim=1).topk(2).values[:, 1]
    for row, index, margin in zip(rows, predicted.tolist(), (probabilities - runners_up).tolist(), strict=True):
        assert row["predicted"] == names[index] or margin < 2 * tolerance  # a tie within rounding
    assert [row["true"] for row in rows] == [Path(row["path"]).parent.name for row in rows]
    assert [float(row["loss"]) for row in rows] == sorted((float(row["loss"]) for row in rows), reverse=True)
    assert len({row["path"] for row in rows}) == 20  # the validation images, each once
    right = sum(row["true"] == row["predicted"] for row in rows)
    assert right / 20 == pytest.approx(best["accuracy"])


def test_metrics_csv_matches_tensorboard(run):
    folder, *_ = run
    events = read_events(folder)
    rows = read_csv(folder / "metrics.csv")
    assert [row.pop("epoch") for row in rows] == ["0", "1", "2"]
    assert set(rows[0]) == set(events.Tags()["scalars"]) - {"step/train_loss"}
    for tag in rows[0]:
        values = [scalar.value for scalar in events.Scalars(tag)]
        assert [float(row[tag]) for row in rows] == pytest.approx(values, rel=1e-5)
    recalls = [float(rows[-1][f"recall/{name}"]) for name in ("daisy", "dandelion", "roses", "sunflowers", "tulips")]
    assert sum(recalls) / 5 == pytest.approx(float(rows[-1]["accuracy"]))  # the classes are balanced
    assert float(rows[-1]["best_accuracy"]) == max(float(row["accuracy"]) for row in rows)


def test_text_projector_and_hparams_tabs(run):
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


def test_graph_shows_the_model(run):
    graph = read_events(run[0]).Graph()
    names = {node.name for node in graph.node}
    assert any("layer4" in name and "conv2" in name for name in names)
    sizes = [node.attr["_output_shapes"].list.shape for node in graph.node if node.name.startswith("input")]
    assert [dim.size for dim in sizes[0][0].dim] == [1, 3, 224, 224]


def test_output_of_a_run(run):
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
    assert complaints == ""  # no progress bar without a terminal
    best = torch.load(folder / "weights" / "best.pth", weights_only=True)
    assert f"best accuracy {best['accuracy']:.3f} at epoch {best['epoch']}" in printed


def test_best_checkpoint_stores_its_metrics(run, sample):
    folder, *_ = run
    model, info = load_model(folder / "weights" / "best.pth")
    assert (info["model"], info["img_size"]) == ("resnet18", 32)
    assert info["class_names"] == ["daisy", "dandelion", "roses", "sunflowers", "tulips"]
    events = read_events(folder)
    accuracies, losses = ([scalar.value for scalar in events.Scalars(tag)] for tag in ("accuracy", "val_loss"))
    assert info["accuracy"] == pytest.approx(max(accuracies))
    best = max(range(3), key=lambda epoch: (accuracies[epoch], -losses[epoch]))
    assert info["epoch"] == best
    paths, labels = find_split(sample)[0].val_paths, find_split(sample)[0].val_labels
    data_set = MyDataSet(paths, labels, EvalTransform(32))
    loader = torch.utils.data.DataLoader(data_set, batch_size=16, collate_fn=data_set.collate_fn)  # as in the run
    amp_dtype, _ = select_precision("auto", torch.device("cpu"))
    assert evaluate(model, loader, "cpu", amp_dtype=amp_dtype) == pytest.approx(info["accuracy"])


def test_last_checkpoint_contains_the_resume_state(run):
    last = torch.load(run[0] / "weights" / "last.pth", weights_only=True)
    assert last["epoch"] == 2
    resume = last["resume"]
    assert (resume["epoch"], resume["progress"]["steps"]) == (3, 0)
    assert resume["optimizer"]["state"]
    assert resume["best"].keys() == {"accuracy", "epoch", "macro_f1", "temperature", "val_loss"}
    assert resume["scaler"] == {}  # float16 only
    plain = torch.load(run[0] / "weights" / "model-1.pth", weights_only=True)
    assert plain.keys() == resnet18(num_classes=5).state_dict().keys()


def test_live_events_and_ctrl_c_with_a_closed_pipe(two_classes, tmp_path):
    command = [sys.executable, PROGRAM, "--data-path", two_classes, *TINY, "--epochs", "1000"]
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
        # Ctrl-C in `train.py 2>&1 | tee log` ends the reader as well.
        running.stderr.close()
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 130
    finally:
        running.kill()
        running.wait()
        running.stdout.close()


@pytest.mark.skipif(os.name == "nt", reason="Windows allows no such names")
def test_unprintable_class_names_are_escaped(tmp_path):
    data = write_classes(tmp_path / "data", {"向日葵": 5, "two\nlines": 5})
    command = [sys.executable, PROGRAM, "--data-path", data, *TINY, "--epochs", "1"]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, check=False)
    assert done.returncode == 0, done.stderr
    assert b"2: two\\nlines, \\u5411\\u65e5\\u8475" in done.stdout
    best = torch.load("runs/flower_experiment/weights/best.pth", weights_only=True)
    assert best["class_names"] == ["two\nlines", "向日葵"]
