"""cross_validate.py: folds, out-of-fold predictions, label issues, and resuming."""

import csv
import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_events, run_in_fork, write_classes, write_image
from ranks import run_ranks

import cross_validate
import data_loading
import train
from dataset_split import find_split
from model import MODELS
from run_state import Run

pytestmark = [pytest.mark.usefixtures("in_an_empty_folder", "small_network", "no_figures")]
FOLDS = 3


@pytest.fixture(scope="module")
def pets(tmp_path_factory) -> Path:
    root = write_classes(tmp_path_factory.mktemp("data") / "pets", {"cat": 11, "dog": 10})
    shutil.copy(root / "cat" / "cat 00.png", root / "dog" / "copy.png")
    return root


def flags(data: Path, *more: str) -> list[str]:
    fixed = ["--model", "resnet18", "--img-size", "32", "--batch-size", "4", "--device", "cpu", "--workers", "0"]
    return ["--data-path", str(data), "--folds", str(FOLDS), "--epochs", "2", *fixed, *more]


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def files_of(folder: Path) -> dict[str, object]:
    """Return the results and the weights in the folder of a cross-validation, to compare."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".csv", ".json", ".png")}
    files.pop("cross_validation.json")
    best = [
        torch.load(path, weights_only=True)["state_dict"] for path in sorted(folder.glob("fold-*/weights/best.pth"))
    ]
    return files | {
        f"fold {fold}": {name: value.tolist() for name, value in each.items()} for fold, each in enumerate(best)
    }


def test_results(pets, capsys):
    assert cross_validate.main(flags(pets)) == 0
    output = capsys.readouterr().out
    folder = Path("runs/cross_validation")
    rows = read_csv(folder / "out_of_fold.csv")
    images = sorted(str(path) for path in pets.rglob("*.png"))
    assert [row["path"] for row in rows] == images
    for row in rows:
        probabilities = {name: float(row[f"probability of {name}"]) for name in ("cat", "dog")}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert row["predicted"] == max(probabilities, key=probabilities.get)
        assert row["label"] == Path(row["path"]).parent.name
        table = read_csv(folder / f"fold-{row['fold']}.csv")
        assert next(other["split"] for other in table if other["path"] == row["path"]) == "val"
    fold = {row["path"]: row["fold"] for row in rows}
    assert fold[str(pets / "cat" / "cat 00.png")] == fold[str(pets / "dog" / "copy.png")]

    report = json.loads((folder / "report.json").read_text())
    accuracy = np.mean([row["predicted"] == row["label"] for row in rows])
    assert report["accuracy"]["value"] == pytest.approx(accuracy)
    values = report["folds"]["accuracy"]["values"]
    for number, value in enumerate(values):
        own = [row["predicted"] == row["label"] for row in rows if row["fold"] == str(number)]
        assert value == pytest.approx(np.mean(own))
    assert report["folds"]["accuracy"]["standard_deviation"] == pytest.approx(np.std(values, ddof=1))
    assert f"accuracy            {accuracy:.4f}" in output

    issues = read_csv(folder / "label_issues.csv")
    assert sorted(row["path"] for row in issues) == images
    assert all(row["verdict"] == "" and row["suggested"] != row["label"] for row in issues)
    assert {path.name for path in folder.glob("*.png")} == {
        "confusion_matrix.png",
        "label_issues.png",
        "reliability.png",
    }
    assert set(read_events(folder).Tags()["images"]) == {"confusion matrix", "label issues", "reliability"}
    for number in range(FOLDS):
        assert read_events(folder / f"fold-{number}").Scalars("accuracy")[-1].value == pytest.approx(values[number])
    assert train.main(["--resume", "cross_validation"]) == 1
    assert "is a cross-validation; use cross_validate.py --resume cross_validation" in capsys.readouterr().err


def test_kill_and_resume_are_bit_identical(pets, capsys):
    assert cross_validate.main(flags(pets, "--name", "undisturbed")) == 0
    steps, due = itertools.count(), Run.save_is_due

    def die(run: Run) -> bool:
        if next(steps) == 9:  # in the middle of an epoch of the second fold
            os.kill(os.getpid(), signal.SIGKILL)
        return due(run)

    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "save_is_due", die)
            resume = ["--resume"] if Path("runs/killed").exists() else []
            arguments = ["--resume", "killed"] if resume else flags(pets, "--name", "killed")
            assert run_in_fork(lambda arguments=arguments: cross_validate.main(arguments), 2)[0] == -signal.SIGKILL
    assert cross_validate.main(["--resume", "killed"]) == 0
    assert files_of(Path("runs/killed")) == files_of(Path("runs/undisturbed"))
    (Path("runs/killed/label_issues.csv")).write_text("my verdicts")
    assert cross_validate.main(["--resume", "killed"]) == 0
    assert "is complete" in capsys.readouterr().out
    assert Path("runs/killed/label_issues.csv").read_text() == "my verdicts"


def stopped_after(number: int, arguments: list[str]) -> int:
    """Run cross_validate.py, and send SIGTERM after a number of training steps."""
    steps, due = itertools.count(), Run.save_is_due

    def stop(run: Run) -> bool:
        if next(steps) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return due(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save_is_due", stop)
        return cross_validate.main(arguments)


def test_stop_names_the_command_to_resume(pets, capsys, tmp_path, monkeypatch):
    assert stopped_after(9, flags(pets)) == 143
    assert "to resume: python cross_validate.py --resume runs/cross_validation" in capsys.readouterr().err
    folder = Path("runs/cross_validation").absolute()
    monkeypatch.chdir(tmp_path)
    assert cross_validate.main(["--resume", str(folder)]) == 0
    assert (folder / "label_issues.csv").exists()


def test_signal_after_the_last_step_of_a_fold_stops(pets, capsys):
    finish_epoch = Run.finish_epoch

    def finish_and_signal(run):
        finish_epoch(run)
        if run.finished:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "finish_epoch", finish_and_signal)
        assert cross_validate.main(flags(pets)) == 143
    assert not Path("runs/cross_validation/fold-1").exists()
    assert cross_validate.main(["--resume"]) == 0
    assert len(read_csv(Path("runs/cross_validation/out_of_fold.csv"))) == 22


def test_changes_before_a_resume_are_errors(pets, tmp_path, capsys):
    data = shutil.copytree(pets, tmp_path / "copy")
    torch.save(MODELS["resnet18"](num_classes=1000).state_dict(), "backbone.pth")
    assert stopped_after(9, flags(data, "--weights", "backbone.pth")) == 143
    folder, image = Path("runs/cross_validation"), data / "dog" / "dog 03.png"
    state = (folder / "cross_validation.json").read_text()
    original = image.read_bytes()
    capsys.readouterr()

    def resume(*more: str) -> tuple[int, str]:
        return cross_validate.main(["--resume", *more]), capsys.readouterr().err

    image.write_bytes((data / "dog" / "dog 04.png").read_bytes())
    status, error = resume()
    assert (status, "1 images were changed or removed since the start" in error, image.name in error) == (1, True, True)
    image.write_bytes(original)
    for flag in ({"folds": None}, {"seed": "a"}, {"recipe": "x"}, {"model": "x"}):
        content = json.loads(state)
        content["flags"] |= flag
        (folder / "cross_validation.json").write_text(json.dumps(content))
        assert resume()[1].endswith("cross_validation.json: corrupt, or written by another version\n"), flag
    (folder / "cross_validation.json").write_text(state)
    best = (folder / "fold-0" / "weights" / "best.pth").rename("best.pth")
    status, error = resume()
    assert (status, "best.pth: missing or empty; remove the folder" in error) == (1, True)
    best.rename(folder / "fold-0" / "weights" / "best.pth")
    assert resume("--weights", "backbone.pth")[0] == 0


@pytest.mark.parametrize("content", [None, b"junk"])
def test_invalid_weights_leave_nothing(pets, capsys, content):
    if content:
        Path("a.pth").write_bytes(content)
    assert cross_validate.main(flags(pets, "--weights", "a.pth")) == 1
    assert "a.pth" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_two_ranks(pets, tmp_path_factory):
    assert run_ranks(2, lambda: cross_validate.main(flags(pets))) == [0, 0]
    assert len(read_csv(Path("runs/cross_validation/out_of_fold.csv"))) == 22
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def resume_with_runs_on_one_machine_only() -> int:
        if os.environ["RANK"] == "1":
            os.chdir(elsewhere)
        return cross_validate.main(["--resume", "cross_validation"])

    Path("runs/cross_validation/label_issues.csv").unlink()
    assert run_ranks(2, resume_with_runs_on_one_machine_only) == [0, 0]
    assert Path("runs/cross_validation/label_issues.csv").exists()


def test_repeats_are_averaged(pets):
    assert cross_validate.main(flags(pets, "--repeats", "2", "--folds", "2")) == 0
    folder = Path("runs/cross_validation")
    rows = read_csv(folder / "out_of_fold.csv")
    assert len(rows) == 22
    for row in rows:
        first, second = map(int, row["fold"].split())
        assert first in (0, 1)
        assert second in (2, 3)
    assert len({row["fold"] for row in rows}) > 2
    assert len(json.loads((folder / "report.json").read_text())["folds"]["accuracy"]["values"]) == 4


def test_weights_trained_on_the_same_images_are_refused(pets, capsys):
    training = flags(pets)
    del training[2:4]  # --folds
    assert train.main([*training, "--name", "before"]) == 0
    status = cross_validate.main(flags(pets, "--weights", "runs/before/weights/best.pth"))
    assert status == 1
    assert "their run used 21 of these images" in capsys.readouterr().err
    assert not Path("runs/cross_validation").exists()


def test_corrections_are_applied(pets, tmp_path):
    (tmp_path / "v.csv").write_text(
        f"path,verdict\n{pets / 'cat' / 'cat 01.png'},dog\n{pets / 'cat' / 'cat 02.png'},drop\n"
    )
    assert cross_validate.main(flags(pets, "--corrections", str(tmp_path / "v.csv"))) == 0
    labels = {Path(row["path"]).name: row["label"] for row in read_csv(Path("runs/cross_validation/out_of_fold.csv"))}
    assert labels["cat 01.png"] == "dog"
    assert "cat 02.png" not in labels
    assert "cat 02.png': dropped by the corrections" in Path("runs/cross_validation/skipped_files.txt").read_text()
    issues = read_csv(Path("runs/cross_validation/label_issues.csv"))  # it contains them, for the next round
    verdicts = {Path(row["path"]).name: row["verdict"] for row in issues if row["verdict"]}
    assert verdicts == {"cat 01.png": "dog", "cat 02.png": "drop"}
    assert len(issues) == 22
    arguments = flags(pets, "--corrections", "runs/cross_validation/label_issues.csv", "--name", "second")
    assert cross_validate.main(arguments) == 0
    assert len(read_csv(Path("runs/second/out_of_fold.csv"))) == 21


def test_next_command_names_all_data(pets, tmp_path, capsys):
    shutil.copytree(pets, tmp_path / "more")
    for number, path in enumerate(sorted((tmp_path / "more").rglob("*.png"))):
        write_image(path, seed=100 + number)
    assert cross_validate.main(flags(pets, "--val-path", str(tmp_path / "more"))) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert f"train.py --data-path {pets} --val-path {tmp_path / 'more'} --corrections " in command


def test_test_images_are_those_of_train(pets):
    assert cross_validate.main(flags(pets, "--test-rate", "0.3")) == 0
    split, _ = find_split(pets, test_rate=0.3)
    paths = {row["path"] for row in read_csv(Path("runs/cross_validation/out_of_fold.csv"))}
    assert paths == {*split.train_paths, *split.val_paths}
    assert len(split.test_paths) == 6


def test_learning_curve(pets, capsys):
    assert cross_validate.main(flags(pets, "--folds", "2", "--epochs", "1", "--learning-curve")) == 0
    folder = Path("runs/cross_validation")
    rows = {path.stem: read_csv(path) for path in folder.glob("fold-*.csv")}
    assert len(rows) == 8
    for fold in range(2):
        held_out = {row["path"] for row in rows[f"fold-{fold}"] if row["split"] == "val"}
        larger = None
        for name in (f"fold-{fold}", f"fold-{fold}-1of2", f"fold-{fold}-1of4", f"fold-{fold}-1of8"):
            assert {row["path"] for row in rows[name] if row["split"] == "val"} == held_out
            training = {row["path"] for row in rows[name] if row["split"] == "train"}
            assert larger is None or training < larger
            larger = training
    curve = json.loads((folder / "report.json").read_text())["learning_curve"]
    sizes = [np.mean([sum(row["split"] == "train" for row in rows[f"fold-{fold}{end}"]) for fold in range(2)])
             for end in ("-1of8", "-1of4", "-1of2", "")]  # fmt: skip
    assert curve["training_images"] == [round(size) for size in sizes]
    out_of_fold = read_csv(folder / "out_of_fold.csv")
    accuracy = np.mean([row["predicted"] == row["label"] for row in out_of_fold])
    assert curve["accuracies"][-1] == pytest.approx(accuracy)
    low, high = curve["twice_as_many"]["interval"]
    assert 0 <= low <= high <= 1
    assert set(curve["classes"]) == {"cat", "dog"}
    assert (folder / "learning_curve.png").exists()
    assert "expected with twice as many" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--folds", "9"], "--folds 9: there are only 8 different pictures; pass --folds 8"),
        (["--folds", "2", "--learning-curve"], "too few images for --learning-curve"),
    ],
)
def test_too_few_images_are_an_error_before_the_training(tmp_path, capsys, arguments, message):
    pets = write_classes(tmp_path / "pets", {"cat": 4, "dog": 4})
    shutil.copy(pets / "cat" / "cat 00.png", pets / "cat" / "copy.png")
    assert cross_validate.main(flags(pets, *arguments)) == 1
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_frozen_features_are_computed_once(pets, monkeypatch):
    backbone = Path("backbone.pth")
    torch.save(MODELS["resnet18"](num_classes=1000).state_dict(), backbone)
    passes = []
    run_inference = data_loading.run_inference
    monkeypatch.setattr(data_loading, "run_inference", lambda *a, **k: passes.append(1) or run_inference(*a, **k))
    frozen = ["--recipe", "finetune", "--freeze-layers", "--weights", str(backbone)]
    assert cross_validate.main(flags(pets, *frozen, "--name", "once")) == 0
    assert len(passes) == 2  # for training and for evaluation
    assert run_in_fork(lambda: stopped_after(9, flags(pets, *frozen, "--name", "stopped")), 2)[0] == 143
    assert cross_validate.main(["--resume", "stopped"]) == 0
    assert files_of(Path("runs/stopped")) == files_of(Path("runs/once"))


def test_time_budget_is_shared(pets):
    assert cross_validate.main([*flags(pets)[:4], *flags(pets)[6:], "--time-budget", "0.2"]) == 0
    shares = [json.loads(path.read_text())["flags"]["time_budget"] for path in Path("runs").glob("*/fold-*/args.json")]
    assert len(shares) == FOLDS
    assert sum(shares) < 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--val-rate", "0.3"], "--val-rate has no effect"),
        (["--find-lr"], "--find-lr: not supported"),
        (["--folds", "1"], "must be at least 2"),
        (["--patience", "3"], "--patience has no effect with --best-metric last"),
    ],
)
def test_flags_without_effect_are_errors(capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        cross_validate.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_resume_refuses_other_flags(pets, capsys):
    assert cross_validate.main(flags(pets)) == 0
    assert cross_validate.main(["--resume", "--folds", "7"]) == 1
    assert "--folds: the run runs/cross_validation was started with 3; omit the flag" in capsys.readouterr().err
    assert cross_validate.main(["--resume", "nothing"]) == 1
    assert (
        "--resume nothing: no cross_validation.json to resume from; start a new cross-validation"
        in capsys.readouterr().err
    )
