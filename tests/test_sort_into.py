"""predict.py: unsure and unfamiliar images, and --sort-into."""

import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import write_image
from shortcuts import NAMES
from shortcuts import run_predict as run

pytestmark = pytest.mark.usefixtures("in_an_empty_folder", "small_network")


def records(capsys, *argv: object) -> list[dict]:
    return [json.loads(line) for line in run(capsys, *argv, "--json")[1]]


def files_in(folder: str) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*.*")}


def test_images_below_the_minimum_confidence_are_unsure(capsys, weights, sample):
    every = records(capsys, sample, "--weights", weights)
    assert all(record["flags"] == [] for record in every)
    limit = sorted(record["probability"] for record in every)[50]
    flags = ["--weights", weights, "--min-confidence", limit]
    for record, unsure in zip(every, records(capsys, sample, *flags), strict=True):
        assert unsure["flags"] == (["unsure"] if record["probability"] < limit - 1e-6 else unsure["flags"])
        assert unsure["class"] == record["class"]
    status, lines, _ = run(capsys, sample, *flags, "--csv", "out.csv")
    images, accuracy = lines[:-1], lines[-1]
    assert status == 0
    assert 45 <= sum(": unsure: " in line for line in images) <= 51
    with open("out.csv", newline="", encoding="utf-8-sig") as file:
        assert [row["flags"] for row in csv.DictReader(file)] == ["unsure" * (": unsure: " in line) for line in images]
    sure = [line for line in images if ": unsure: " not in line]
    right = sum("(label: " not in line for line in sure)
    assert accuracy.endswith(f"without unsure images {right / len(sure):.4f} ({right} of {len(sure)})")


def test_the_temperature_changes_probabilities_but_not_classes(capsys, weights, sample):
    calibrated, raw = (records(capsys, sample, "--weights", weights, *flag) for flag in ([], ["--uncalibrated"]))
    for first, second in zip(calibrated, raw, strict=True):
        assert first["class"] == second["class"]
        assert first["probability"] > second["probability"]  # the temperature is below 1
    assert "temperature 0.800" in run(capsys, sample / "roses", "--weights", weights)[2][0]


def test_unfamiliar_images_are_flagged(capsys, weights, sample, tmp_path):
    content = torch.load(weights, weights_only=True)
    channels = content["state_dict"]["layer1.0.bn2.weight"].numel()
    familiarity = {"mean": torch.zeros(channels), "precision": torch.eye(channels), "threshold": 0.0}
    for threshold, flags in ((0.0, ["unfamiliar"]), (1e9, [])):
        content["familiarity"] = familiarity | {"threshold": threshold}
        torch.save(content, tmp_path / "best.pth")
        assert all(record["flags"] == flags for record in records(capsys, sample, "--weights", tmp_path / "best.pth"))
    content["familiarity"] = familiarity | {"mean": torch.zeros(3), "precision": torch.eye(3)}
    torch.save(content, tmp_path / "best.pth")
    status, lines, errors = run(capsys, sample, "--weights", tmp_path / "best.pth")
    assert (status, lines, len(errors)) == (1, [], 1)
    assert "its familiarity is for another network than resnet18" in errors[0]


def test_images_are_copied_into_class_folders(capsys, weights, sample):
    predicted = {record["image"]: record["class"] for record in records(capsys, sample, "--weights", weights)}
    expected = {f"{name}/{Path(path).name}": Path(path).read_bytes() for path, name in predicted.items()}
    before = files_in(str(sample))
    flags = [sample, "--weights", weights, "--sort-into", "sorted"]
    status, _, errors = run(capsys, *flags)
    assert status == 0
    assert files_in("sorted") == expected
    assert files_in(str(sample)) == before
    assert errors[-1].startswith("copied 100 images into sorted (")
    assert run(capsys, *flags)[2][-1] == "copied 0 images into sorted; 100 were there already"
    assert files_in("sorted") == expected


def test_unsure_images_have_their_own_folder(capsys, weights, sample):
    run(capsys, sample / "roses", "--weights", weights, "--sort-into", "sorted", "--min-confidence", "1")
    assert files_in("sorted") == {
        f"unsure/{name}": content for name, content in files_in(str(sample / "roses")).items()
    }


def test_nothing_is_overwritten(capsys, weights):
    paths = [write_image(Path(f"in/{number}/image.png"), seed=number) for number in range(3)]
    for name in NAMES:  # the files of someone else
        write_image(Path("sorted", name, "image.png"), seed=9)
    status, _, errors = run(capsys, *paths, "--weights", weights, "--sort-into", "sorted")
    assert status == 0
    assert errors[-1].startswith("copied 3 images into sorted (")
    found = files_in("sorted")
    other = write_image(Path("other.png"), seed=9).read_bytes()
    assert all(found[f"{name}/image.png"] == other for name in NAMES)
    copies = sorted(content for name, content in found.items() if not name.endswith("/image.png"))
    assert copies == sorted(path.read_bytes() for path in paths)


def test_the_folder_must_be_outside_the_images(capsys, weights, tmp_path):
    write_image(Path("photos/image.png"))
    status, lines, errors = run(capsys, "photos", "--weights", weights, "--sort-into", "photos/sorted")
    assert (status, lines) == (1, [])
    assert "--sort-into photos/sorted: must not contain photos or lie inside it" in errors[-1]
    for images in (["photos/image.png"], ["photos"]):
        status, lines, errors = run(capsys, *images, "--weights", weights, "--sort-into", ".")
        assert (status, lines) == (1, [])
        assert f"--sort-into .: must not contain {images[0]}" in errors[-1]
    status, lines, errors = run(capsys, "photos", "--weights", weights, "--sort-into", "photos/image.png/sorted")
    assert (status, lines) == (1, [])
    assert "image.png is not a writable folder" in errors[-1]
    content = torch.load(weights, weights_only=True)
    for name in ("../other", "a\\b", "..", "", "C:", "unsure", 256 * "x"):
        torch.save(content | {"class_names": [*NAMES[:4], name]}, tmp_path / "best.pth")
        status, lines, errors = run(capsys, "photos", "--weights", tmp_path / "best.pth", "--sort-into", "sorted")
        assert (status, lines) == (1, [])
        assert "cannot be the name of a folder" in errors[-1]
    assert not Path("sorted").exists()
