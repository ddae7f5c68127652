"""evaluate.py: its figures against numpy, which images it covers, the comparison, and its errors."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_image
from PIL import Image
from shortcuts import NAMES

import evaluate
from image_folders import file_checksum
from inference import run_inference
from my_dataset import EvalTransform, MyDataSet
from weights_io import load_model

pytestmark = pytest.mark.usefixtures("in_an_empty_folder", "small_network")


def run(capsys, *argv: object) -> tuple[int, list[str], list[str]]:
    """Run evaluate.py, and return its exit status and the lines on standard output and standard error."""
    status = evaluate.main([*map(str, argv), "--device", "cpu"])
    output = capsys.readouterr()
    return status, output.out.splitlines(), output.err.splitlines()


def report_of(capsys, *argv: object) -> dict:
    status, lines, _ = run(capsys, *argv, "--json", "--output", "")
    assert (status, len(lines)) == (0, 1)
    return json.loads(lines[0])


def copy_weights(weights: Path, run_folder: str, **subsets: list[Path]) -> Path:
    """Copy weights to a run that used the images in `subsets`, by "train", "val" or "test"."""
    path = Path(run_folder, "weights", "best.pth")
    path.parent.mkdir(parents=True)
    shutil.copy(weights, path)
    files = {
        str(image): [[subset, file_checksum(str(image))]] for subset, images in subsets.items() for image in images
    }
    Path(run_folder, "files.json").write_text(json.dumps(files))
    return path


def test_figures_agree_with_numpy(capsys, weights, sample):
    report = report_of(capsys, sample, "--weights", weights, "--amp", "off", "--topk", "2")
    model, info = load_model(weights)
    paths = sorted(map(str, sample.rglob("*.jpg")))
    labels = np.array([NAMES.index(Path(path).parent.name) for path in paths])
    data_set = MyDataSet(paths, labels.tolist(), EvalTransform(info["img_size"]))
    loader = torch.utils.data.DataLoader(data_set, batch_size=16, collate_fn=data_set.collate_fn)
    logits = run_inference(model, loader, "cpu").logits.double().numpy()

    def softmax(values: np.ndarray) -> np.ndarray:
        exponentials = np.exp(values - values.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    def calibration_error(probabilities: np.ndarray) -> float:
        confidence, bins = probabilities.max(axis=1), (probabilities.max(axis=1) * 15).astype(int)
        gaps = [abs(np.sum((right - confidence)[bins == index])) for index in range(15)]
        return sum(gaps) / len(labels)

    probabilities = softmax(logits / 0.8)
    predicted = probabilities.argmax(axis=1)
    right = predicted == labels
    about = {"abs": 2e-4}  # another batch size rounds differently
    assert report["images"] == len(paths) == sum(row["images"] for row in report["classes"].values())
    assert report["accuracy"]["value"] == pytest.approx(right.mean())
    in_top_2 = (logits.argsort(axis=1)[:, -2:] == labels[:, None]).any(axis=1)
    assert report["top_2_accuracy"]["value"] == pytest.approx(in_top_2.mean())
    assert report["loss"] == pytest.approx(-np.log(probabilities[np.arange(len(labels)), labels]).mean(), **about)
    assert report["mean_confidence"] == pytest.approx(probabilities.max(axis=1).mean(), **about)
    assert report["calibration_error"] == pytest.approx(calibration_error(probabilities), abs=0.01)
    assert report["uncalibrated_calibration_error"] == pytest.approx(calibration_error(softmax(logits)), abs=0.01)
    scores = []
    for index, name in enumerate(NAMES):
        row, hits = report["classes"][name], np.sum(right & (labels == index))
        guesses, images = np.sum(predicted == index), np.sum(labels == index)
        assert row["recall"]["value"] == pytest.approx(hits / images)
        if guesses:
            assert row["precision"]["value"] == pytest.approx(hits / guesses)
        else:
            assert row["precision"] is None
        scores.append(2 * hits / (guesses + images))
        assert row["f1"]["value"] == pytest.approx(scores[-1])
        matrix = [np.sum((labels == index) & (predicted == other)) for other in range(5)]
        assert report["confusion_matrix"][index] == matrix
        for metric in filter(None, (row["precision"], row["recall"], row["f1"])):
            assert metric["interval"][0] <= metric["value"] + 1e-9
            assert metric["value"] - 1e-9 <= metric["interval"][1]
    assert report["macro_f1"]["value"] == pytest.approx(np.mean(scores))
    confidence = probabilities.max(axis=1)
    for row in report["thresholds"]:
        if row["confidence"] is None:
            assert row["answered"] == 0
        else:
            answered = confidence >= row["confidence"] - 1e-4
            assert answered.mean() == pytest.approx(row["answered"], abs=0.02)
            assert row["errors"]["value"] <= row["error_rate"]


def test_files_that_are_written(capsys, weights, sample):
    status, lines, errors = run(capsys, sample, "--weights", weights)
    assert status == 0
    assert errors[-1] == "report, predictions and figures: evaluation"
    assert run(capsys, sample, sample / ".." / sample.name, "--weights", weights, "--output", "") == (
        *(status, lines),
        errors[:-1],
    )  # counts each image once
    names = {"report.json", "predictions.csv", "confusion_matrix.png", "reliability.png", "mistakes.png"}
    assert {path.name for path in Path("evaluation").iterdir()} == names
    for name in names:
        if name.endswith(".png"):
            with Image.open(Path("evaluation", name)) as figure:
                assert min(figure.size) > 200
    report = json.loads(Path("evaluation/report.json").read_text(encoding="utf-8"))
    accuracy = report["accuracy"]
    low, high = accuracy["interval"]
    assert f"accuracy            {accuracy['value']:.4f} ({low:.4f} to {high:.4f})" in lines
    with open("evaluation/predictions.csv", newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == report["images"] == 100
    assert np.mean([row["label"] == row["predicted"] for row in rows]) == pytest.approx(accuracy["value"])
    for row in rows:
        probabilities = {name: float(row[f"probability of {name}"]) for name in NAMES}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert row["predicted"] == max(probabilities, key=probabilities.get)
        assert float(row["loss"]) == pytest.approx(-math.log(probabilities[row["label"]]), abs=1e-3)
    assert run(capsys, sample / "roses", sample, "--weights", weights, "--topk", "1")[0] == 0  # replaces it
    assert json.loads(Path("evaluation/report.json").read_text(encoding="utf-8"))["images"] == 100  # each once


def test_images_that_the_run_has_used_are_not_included(capsys, weights, sample):
    roses, tulips = (sorted((sample / name).iterdir()) for name in ("roses", "tulips"))
    path = copy_weights(weights, "runs/a", train=roses[:15], val=roses[15:], test=tulips[:3])
    status, lines, _ = run(capsys, sample, "--weights", path)
    assert status == 0
    assert lines[0] == "80 images that the run has not used"
    assert [line.partition(" (")[0] for line in lines[1:3]] == [
        "not included: 5 validation images",
        "not included: 15 training images",
    ]
    report = report_of(capsys, sample, "--weights", path)
    assert (report["subset"], report["found"]) == ("new", {"new": 80, "val": 5, "train": 15})
    assert report["classes"]["roses"]["recall"] is None
    status, lines, _ = run(capsys, sample / "roses", sample / "roses", "--weights", path)
    assert (status, lines) == (1, [])  # no sub-folder is named after a class
    Path("photos").mkdir()
    shutil.copytree(sample / "roses", "photos/roses")
    _, lines, _ = run(capsys, "photos", "--weights", path)
    assert lines[0] == "5 validation images: the epoch was chosen on them, so the metrics are slightly too good"
    for image in roses[15:]:
        Path("photos/roses", image.name).unlink()
    _, lines, _ = run(capsys, "photos", "--weights", path)
    assert lines[0] == "15 training images: the network was trained on them, so the metrics are far too good"
    lines = run(capsys, sample, "--weights", weights)[1]
    assert lines[0] == "100 images; which images the network was trained on is unknown"


def test_comparison_of_two_networks(capsys, weights, sample):
    """The other network is the same one with its classes in another order, or with the wrong names for two of them."""
    content = torch.load(weights, weights_only=True)
    order = [4, 2, 0, 1, 3]
    state = content["state_dict"] | {key: content["state_dict"][key][order] for key in ("fc.weight", "fc.bias")}
    torch.save(content | {"state_dict": state, "class_names": [NAMES[index] for index in order]}, "same.pth")
    comparison = report_of(capsys, sample, "--weights", weights, "--compare", "same.pth")["comparison"]
    assert comparison["difference"]["value"] == comparison["only_this_right"] == comparison["only_other_right"] == 0
    assert comparison["p_value"] == 1

    torch.save(content | {"class_names": [NAMES[1], NAMES[0], *NAMES[2:]]}, "wrong.pth")
    status, lines, _ = run(capsys, sample, "--weights", weights, "--compare", "wrong.pth")
    assert status == 0
    comparison = json.loads(Path("evaluation/report.json").read_text(encoding="utf-8"))["comparison"]
    difference = comparison["accuracy"] - comparison["other_accuracy"]
    assert comparison["difference"]["value"] == pytest.approx(difference)
    assert (comparison["only_this_right"] - comparison["only_other_right"]) / 100 == pytest.approx(difference)
    assert lines[-1].startswith(f"exact McNemar test  p = {comparison['p_value']:.4g}: ")
    with open("evaluation/differences.csv", newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert sum(row["right"] == "this" for row in rows) == comparison["only_this_right"]
    assert sum(row["right"] == "other" for row in rows) == comparison["only_other_right"]
    assert all((row["this"] == row["label"]) != (row["other"] == row["label"]) for row in rows)
    run(capsys, sample, "--weights", weights)
    assert not Path("evaluation/differences.csv").exists()  # of the earlier evaluation


def test_images_that_the_other_network_was_trained_on_are_not_compared(capsys, weights, sample):
    roses = sorted((sample / "roses").iterdir())
    other = copy_weights(weights, "runs/b", train=roses)
    status, _, errors = run(capsys, sample, "--weights", weights, "--compare", other)
    assert status == 0
    assert any(f"20 images are not compared: training images of {other}" in line for line in errors)
    assert json.loads(Path("evaluation/report.json").read_text(encoding="utf-8"))["comparison"]["images"] == 80


def test_errors_are_one_line_and_write_nothing(capsys, weights, sample, tmp_path):
    write_image(Path("photos/cat/1.png"))
    torch.save(torch.load(weights, weights_only=True) | {"class_names": ["a", "b", "c", "d", "e"]}, "other.pth")
    Path("mine").mkdir()
    Path("mine/report.json").write_text("{}")
    Path("cross").mkdir()
    Path("cross/report.json").write_text('{"confusion_matrix": [], "folds": {}}')
    for flags, message in (
        (["photos"], "no labelled images in 'photos': it needs sub-folders named after the classes (daisy, "),
        ([], "has no test images: name a folder of labelled images, or train with --test-rate 0.2"),
        ([sample, "--compare", "other.pth"], "--compare other.pth: has other classes: a, b, c, d, e"),
        ([sample, "--output", "mine"], "--output mine: contains other files; pass a new folder"),
        ([sample, "--output", "cross"], "--output cross: contains other files; pass a new folder"),
        ([sample, "--output", "other.pth"], "--output other.pth: other.pth is not a writable folder; choose another"),
        ([sample, "--output", "other.pth/out"], "--output other.pth/out: "),
        (["photos", sample, "--output", "photos/cat/out"], "--output photos/cat/out: must not contain photos or lie"),
        ([sample, "--compare", "missing.pth"], "missing.pth: no such weights file"),
        (["missing"], "'missing': no such file or folder"),
    ):
        status, lines, errors = run(capsys, *flags, "--weights", weights)
        assert (status, lines) == (1, []), flags
        assert any(message in line for line in errors), (message, errors)
        assert not Path("evaluation").exists()
    assert Path("mine/report.json").read_text() == "{}"


def test_unreadable_and_unlabelled_images_are_reported(capsys, weights, sample):
    shutil.copytree(sample, "photos")
    Path("photos/roses/broken.jpg").write_bytes(b"not an image")
    write_image(Path("photos/holiday/1.png"))
    for number in range(3):
        Path(f"photos/roses/{number}.heic").touch()
    status, lines, errors = run(capsys, "photos", "--weights", weights)
    assert status == 1
    assert any("broken.jpg" in line for line in errors)
    assert "evaluate.py: skipped 1 image without a label" in errors
    report = json.loads(Path("evaluation/report.json").read_text(encoding="utf-8"))
    assert (report["images"], report["unreadable"]) == (100, 1)
    assert lines[0].startswith("100 images")
