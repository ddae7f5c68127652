"""Test images: how they are held out, and what train.py and evaluate.py do with them."""

import json
import os
from pathlib import Path

import pytest
from conftest import read_events, write_classes, write_image

import check_data
import evaluate
import train
from cli_utils import DataError
from dataset_split import find_split, split_folder

pytestmark = pytest.mark.usefixtures("in_an_empty_folder", "small_network", "no_figures")
SMALL = ["--model", "resnet18", "--img-size", "32", "--batch-size", "4", "--workers", "0", "--epochs", "1"]


def sizes(split) -> list[int]:
    return [len(paths) for paths, _ in split.subsets.values()]


def test_held_out_images_are_disjoint_and_seeded(tmp_path):
    counts = {"cat": 20, "dog": 10, "fox": 3, "owl": 2, "ray": 1}
    folder = write_classes(tmp_path / "data", counts)
    split, _ = find_split(folder, test_rate=0.3)
    assert split.count() == {"cat": (10, 4, 6), "dog": (5, 2, 3), "fox": (1, 1, 1), "owl": (1, 1, 0), "ray": (1, 0, 0)}
    assert len(set(split.paths)) == sum(counts.values())
    for paths, labels in split.subsets.values():
        assert [split.class_names[label] for label in labels] == [Path(path).parent.name for path in paths]
    assert find_split(folder, test_rate=0.3)[0] == split
    few = write_classes(tmp_path / "few", {"cat": 3, "dog": 3})
    assert find_split(few, val_rate=0.1, test_rate=0.85)[0].count() == {"cat": (1, 1, 1), "dog": (1, 1, 1)}
    without = split_folder(folder)
    assert (split.val_paths, split.val_labels) == (without.val_paths, without.val_labels)
    assert set(without.train_paths) == {*split.train_paths, *split.test_paths}


def test_test_folder_beside_train_and_val(tmp_path):
    for name, count in (("train", 4), ("val", 2), ("Testing", 3)):
        write_classes(tmp_path / "data" / name, {"cat": count, "dog": count})
    split, source = find_split(tmp_path / "data")
    assert sizes(split) == [8, 4, 6]
    assert source == f"from {tmp_path / 'data' / 'val'}"
    assert split.skipped == []
    other = write_classes(tmp_path / "other", {"cat": 1})
    assert sizes(find_split(tmp_path / "data", other)[0]) == [8, 1, 6]
    with pytest.raises(DataError, match=r"Testing: has test images already; omit --test-rate"):
        find_split(tmp_path / "data", test_rate=0.1)
    write_image(tmp_path / "data" / "Testing" / "cow" / "1.png")
    with pytest.raises(DataError, match=r"Testing: classes missing from .*train: cow"):
        find_split(tmp_path / "data")


def test_test_images_are_held_out_of_a_training_folder(tmp_path):
    for name in ("train", "val"):
        write_classes(tmp_path / "data" / name, {"cat": 10, "dog": 10})
    assert sizes(find_split(tmp_path / "data", test_rate=0.2)[0]) == [16, 20, 4]


def test_best_weights_are_evaluated_on_the_test_images_at_the_end(tmp_path, capsys):
    folder = write_classes(tmp_path / "pets", {"cat": 12, "dog": 12})
    assert train.main(["--data-path", str(folder), "--test-rate", "0.25", *SMALL]) == 0
    output = capsys.readouterr().out
    assert "images       14 for training, 4 for validation (20% of each class, held out), 6 for testing" in output
    run = Path("runs/flower_experiment")
    report = json.loads((run / "test_report.json").read_text(encoding="utf-8"))
    low, high = report["accuracy"]["interval"]
    interval = f"(95% interval {low:.3f} to {high:.3f})"
    assert f"test accuracy {report['accuracy']['value']:.3f} {interval} on 6 of 6 images\n" in output
    events = read_events(run)
    for metric in ("accuracy", "macro_f1"):
        assert events.Scalars(f"test/{metric}")[0].value == pytest.approx(report[metric]["value"])

    assert evaluate.main(["--output", "", "--json", "--device", "cpu"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["found"] == {"new": 6, "val": 0, "train": 0}
    report.pop("unreadable")
    assert {key: again[key] for key in report} == report
    assert evaluate.main([str(folder), "--output", "", "--json", "--device", "cpu"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["found"] == {"new": 6, "val": 4, "train": 14}
    assert {key: again[key] for key in report} == report


def test_training_does_not_depend_on_the_test_images(tmp_path, capsys):
    folder = write_classes(tmp_path / "pets", {"cat": 12, "dog": 12})
    split, _ = find_split(folder, test_rate=0.25)
    assert train.main(["--data-path", str(folder), "--test-rate", "0.25", "--name", "a", *SMALL]) == 0
    for path in split.test_paths:
        write_image(Path(path), seed=int(Path(path).stem.split()[1]) + 5000)
    assert train.main(["--data-path", str(folder), "--test-rate", "0.25", "--name", "b", *SMALL]) == 0
    rows = [Path(f"runs/{name}/mistakes.csv").read_text(encoding="utf-8-sig") for name in "ab"]
    assert rows[0] == rows[1]


def test_check_data_counts_test_images_and_finds_their_copies(tmp_path, capsys):
    folder = write_classes(tmp_path / "pets", {"cat": 20, "dog": 20})
    split, _ = find_split(folder, test_rate=0.2)
    copied, original = next(path for path in split.test_paths if "cat" in path), split.train_paths[0]
    Path(copied).write_bytes(Path(original).read_bytes())
    flags = [str(folder), "--test-rate", "0.2", "--save-plot", "health.png", "--workers", "0"]
    assert check_data.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "class  training  validation  test" in lines
    assert "cat          12           4     4" in lines
    assert "LEAK: the same picture in several of training, validation and test: 1" in lines
    assert Path("health.png").stat().st_size > 10_000
    assert train.main(["--data-path", str(folder), "--test-rate", "0.2", *SMALL]) == 0
    warning = "warning      test images that are identical to training or validation images: 1; run check_data.py"
    assert warning in capsys.readouterr().out


def test_interrupted_test_is_run_on_resume(tmp_path, capsys, monkeypatch):
    folder = write_classes(tmp_path / "pets", {"cat": 12, "dog": 12})
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_test_set", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(["--data-path", str(folder), "--test-rate", "0.25", *SMALL])
    report = Path("runs/flower_experiment/test_report.json")
    assert not report.exists()
    assert train.main(["--resume"]) == 0
    assert json.loads(report.read_text(encoding="utf-8"))["images"] == 6
    capsys.readouterr()
    assert train.main(["--resume"]) == 0
    assert "is complete" in capsys.readouterr().out


def test_missing_test_images_are_reported(tmp_path, capsys, monkeypatch):
    folder = write_classes(tmp_path / "pets", {"cat": 12, "dog": 12})
    paths = find_split(folder, test_rate=0.25)[0].test_paths
    evaluate_test_set, missing = train.evaluate_test_set, paths[:1]

    def remove_and_evaluate(*arguments: object) -> object:
        for path in missing:
            Path(path).unlink(missing_ok=True)
        return evaluate_test_set(*arguments)

    monkeypatch.setattr(train, "evaluate_test_set", remove_and_evaluate)
    assert train.main(["--data-path", str(folder), "--test-rate", "0.25", *SMALL]) == 0
    output = capsys.readouterr()
    assert "on 5 of 6 images" in output.out
    assert Path(paths[0]).name in output.err
    assert json.loads(Path("runs/flower_experiment/test_report.json").read_text())["unreadable"] == 1
    write_image(Path(paths[0]))
    missing[:] = paths
    assert train.main(["--data-path", str(folder), "--test-rate", "0.25", *SMALL]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "train.py: error: none of the 6 test images is readable; restore them, and resume the run"
    assert evaluate.main(["--weights", "runs/flower_experiment-2/weights/best.pth", "--device", "cpu"]) == 1
    assert "exists; if they were moved, name their folder" in capsys.readouterr().err.splitlines()[-1]


def test_images_that_the_run_has_used_do_not_become_test_images(tmp_path, capsys):
    folder = write_classes(tmp_path / "pets", {"cat": 20, "dog": 20})
    assert train.main(["--data-path", str(folder), "--test-rate", "0.25", *SMALL]) == 0
    files = Path("runs/flower_experiment/files.json").read_bytes()
    for name in ("cat", "dog"):
        write_image(folder / name / "0.png", seed=77)
    capsys.readouterr()
    assert train.main(["--resume", "--epochs", "2", "--allow-changed-data"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "images that the run has used would become test images; start a new run" in error
    assert Path("runs/flower_experiment/files.json").read_bytes() == files


def test_the_validation_folder_is_not_the_test_folder(tmp_path):
    for name in ("train", "val", "test"):
        write_classes(tmp_path / "data" / name, {"cat": 4, "dog": 4})
    with pytest.raises(DataError, match="is both the validation and the test folder; choose another --val-path"):
        find_split(tmp_path / "data", tmp_path / "data" / "val" / ".." / "test")


@pytest.mark.parametrize("name", [" cat ", "cat\n", "c,a;t", '"cat"', "caf\u0065\u0301", os.fsdecode(b"\xff")])
def test_odd_names_of_test_images_are_found_again(tmp_path, capsys, name):
    folder = write_classes(tmp_path / "pets", {"dog": 10})
    for index in range(10):
        write_image(folder / name / f" {name}{index}.png", seed=500 + index)
    assert train.main(["--data-path", str(folder), "--test-rate", "0.25", *SMALL]) == 0
    capsys.readouterr()
    assert evaluate.main(["--output", "", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 4


@pytest.mark.parametrize("program", [train, check_data])
def test_invalid_rates(two_classes, capsys, program):
    folder = [str(two_classes)] if program is check_data else ["--data-path", str(two_classes)]
    with pytest.raises(SystemExit) as caught:
        program.main([*folder, "--test-rate", "1"])
    assert caught.value.code == 2
    assert "it must be at least 0 and below 1" in capsys.readouterr().err
    assert program.main([*folder, "--test-rate", "0.8"]) != 0
    assert "--val-rate 0.2 and --test-rate 0.8: their sum must be below 1" in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []
