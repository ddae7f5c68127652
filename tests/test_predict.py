"""The command line of predict.py."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, as_another_user, needs_fork, run_in_fork, write_image
from PIL import Image
from shortcuts import NAMES, describe_weights, run_predict

import backends
import check_data
import cli_utils
import predict
from class_files import write_class_indices
from inference import run_inference
from model import resnet18
from my_dataset import EvalTransform, MyDataSet
from weights_io import load_model

pytestmark = pytest.mark.usefixtures("small_network")


def run(capsys, *argv) -> tuple[int, list[str], list[str]]:
    """Run predict.py like `run_predict`, without the lines about the weights and the files that are written."""
    status, lines, errors = run_predict(capsys, *argv)
    notes = ("weights ", "predictions: ", "figure: ")
    return status, lines, [line for line in errors if not line.startswith(notes)]


def test_one_line_per_image(capsys, weights, sample):
    status, lines, errors = run(capsys, sample / "roses", "--weights", weights, "--topk", "2")
    assert (status, errors, len(lines)) == (0, [], 20)
    for path, line in zip(sorted((sample / "roses").iterdir()), lines, strict=True):
        pattern = rf"{re.escape(str(path))}: (\w+) (\d+\.\d\d)%, (\w+) (\d+\.\d\d)%"
        first, high, second, low = re.fullmatch(pattern, line).groups()
        assert first != second
        assert {first, second} <= set(NAMES)
        assert float(high) >= float(low)


def test_json_lines_match_evaluation(capsys, weights, sample):
    status, lines, _ = run(capsys, sample / "daisy", "--weights", weights, "--json", "--topk", "9", "--amp", "off")
    assert status == 0
    records = [json.loads(line) for line in lines]
    model, info = load_model(weights)
    paths = sorted(map(str, (sample / "daisy").iterdir()))
    data_set = MyDataSet(paths, [0] * len(paths), EvalTransform(info["img_size"]))
    loader = torch.utils.data.DataLoader(data_set, batch_size=16, collate_fn=data_set.collate_fn)
    expected = run_inference(model, loader, "cpu").logits
    expected = (expected / info["temperature"]).softmax(1)
    for record, path, row in zip(records, paths, expected, strict=True):
        assert record["image"] == path
        assert [entry["class"] for entry in record["top"]] == [NAMES[i] for i in row.argsort(descending=True)]
        got = {entry["class"]: entry["probability"] for entry in record["top"]}
        assert [got[name] for name in NAMES] == pytest.approx(row.tolist(), abs=1e-4)
        assert (record["class"], record["probability"]) == (record["top"][0]["class"], record["top"][0]["probability"])


def test_probabilities_do_not_depend_on_the_batch(capsys, weights, sample):
    paths = sorted((sample / "tulips").iterdir())[:11]
    _, together, _ = run(capsys, *paths, "--weights", weights, "--json")
    _, folder, _ = run(capsys, sample / "tulips", "--weights", weights, "--json")
    assert folder[:11] == together
    alone = [run(capsys, path, "--weights", weights, "--json")[1][0] for path in paths]
    assert alone == together


def test_accuracy_is_reported_for_a_labelled_folder(capsys, weights, sample, tmp_path):
    status, lines, _ = run(capsys, sample, "--weights", weights)
    assert status == 0
    assert len(lines) == 101
    right = sum("(label:" not in line for line in lines[:-1])
    assert lines[-1] == f"{sample}: accuracy {right / 100:.4f} ({right} of 100 images)"
    wrong = next(line for line in lines if "(label:" in line)
    assert re.search(r"(\w+)[\\/]\1_\d+\.jpg: (?!\1).*\(label: \1\)", wrong)
    _, lines, errors = run(capsys, sample, "--weights", weights, "--json")
    assert {json.loads(line)["label"] for line in lines} == set(NAMES)
    assert errors == [f"{sample}: accuracy {right / 100:.4f} ({right} of 100 images)"]
    shutil.copytree(sample / "roses", tmp_path / "mixed" / "other things")
    _, lines, _ = run(capsys, tmp_path / "mixed", "--weights", weights)
    assert len(lines) == 20  # no known class, so no accuracy


def test_unreadable_files_do_not_stop_the_rest(capsys, weights, sample, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    good = next((sample / "roses").iterdir())
    bad = [tmp_path / "broken.jpg", tmp_path / "missing.jpg", tmp_path / "empty"]
    status, lines, errors = run(capsys, bad[0], good, *bad[1:], good, "--weights", weights)
    assert status == 1
    assert [line.split(": ")[0] for line in lines] == [str(good)] * 2
    assert len(errors) == 3
    for path in bad:
        assert [line.startswith("predict.py: ") for line in errors if path.name in line] == [True]
    table = tmp_path / "predictions.csv"
    assert run(capsys, good, "--weights", weights, "--csv", table)[0] == 0
    earlier = table.read_bytes()
    assert run(capsys, *bad, "--weights", weights, "--csv", table)[0] == 1
    assert table.read_bytes() == earlier


def test_workers_give_the_same_output(capsys, weights, sample, tmp_path, monkeypatch):
    for path in sorted((sample / "roses").iterdir()):
        shutil.copy(path, tmp_path)
    (tmp_path / "roses_005_broken.jpg").write_bytes(b"no image")
    expected = run(capsys, tmp_path, "--weights", weights, "--json")
    monkeypatch.setattr(cli_utils, "MANY_FILES", 10)
    assert run(capsys, tmp_path, "--weights", weights, "--json") == expected
    status, lines, errors = expected
    assert (status, len(lines), len(errors)) == (1, 20, 1)


def test_amp_off_computes_in_float32(capsys, weights, sample):
    image = next((sample / "roses").iterdir())
    outputs = [run(capsys, image, "--weights", weights, "--json", "--amp", amp)[1] for amp in ("off", "on", "auto")]
    assert outputs[0] != outputs[1]
    assert outputs[2] in outputs[:2]
    probabilities = [json.loads(lines[0])["probability"] for lines in outputs]
    assert probabilities[0] == pytest.approx(probabilities[1], abs=0.05)


def test_long_image_is_centre_cropped(capsys, weights, tmp_path):
    long, centre = Image.new("RGB", (2, 20_000), "red"), Image.new("RGB", (2, 20), "blue")
    long.paste(centre, (0, 9_990))
    long.save(tmp_path / "long.png")
    centre.save(tmp_path / "short.png")
    status, lines, _ = run(capsys, tmp_path / "long.png", tmp_path / "short.png", "--weights", weights, "--topk", "5")
    assert status == 0
    assert lines[0].split(".png: ")[1] == lines[1].split(".png: ")[1]


def test_cyclic_links_and_locked_folders(capsys, weights, open_folder):
    write_image(open_folder / "sub" / "a.png")
    write_image(open_folder / "locked" / "b.png")
    try:
        (open_folder / "sub" / "again").symlink_to(open_folder, target_is_directory=True)
    except OSError:
        pytest.skip("this user may not make symbolic links")
    shutil.copy(weights, open_folder / "best.pth")
    (open_folder / "locked").chmod(0)
    with as_another_user():
        status, lines, errors = run(capsys, open_folder, "--weights", open_folder / "best.pth")
    assert status == 1
    assert [line.split(": ")[0] for line in lines] == [str(open_folder / "sub" / "a.png")]
    assert errors == [
        f"predict.py: {str(open_folder / 'locked')!r}: no permission to read this folder",
        f"predict.py: {open_folder}: skipped 1 file: 1 unknown file type (.pth 1)",
    ]


@pytest.mark.skipif(os.name == "nt", reason="Windows allows no such names")
def test_file_names_are_escaped(capsys, weights, tmp_path):
    path = write_image(tmp_path / "two\nlines \x1b[31m 向日葵.png")
    status, lines, _ = run(capsys, path, "--weights", weights)
    assert status == 0
    assert len(lines) == 1
    assert "two\\nlines \\x1b[31m 向日葵.png: " in lines[0]
    _, lines, _ = run(capsys, path, "--weights", weights, "--json")
    assert json.loads(lines[0])["image"] == str(path)


def test_default_weights_are_of_the_most_recent_run(capsys, weights, sample, monkeypatch, tmp_path):
    image = next((sample / "roses").iterdir())
    monkeypatch.chdir(weights.parents[3])
    status, lines, notes = run_predict(capsys, image)
    assert status == 0
    assert lines == run(capsys, image, "--weights", weights)[1]
    assert "\n".join([*notes, ""]) == describe_weights(Path("runs", "first", "weights", "best.pth"))
    monkeypatch.chdir(tmp_path)
    status, lines, errors = run(capsys, image)
    assert (status, lines, len(errors)) == (1, [], 1)
    assert "train a model first" in errors[0]


def test_plain_state_dict(capsys, weights, sample, tmp_path):
    plain = tmp_path / "model-29.pth"
    torch.save(torch.load(weights, weights_only=True)["state_dict"], plain)
    write_class_indices(NAMES, tmp_path / "class_indices.json")
    image = next((sample / "roses").iterdir())
    status, _, errors = run(capsys, image, "--weights", plain)
    assert status == 1
    assert len(errors) == 1
    assert "a resnet18 without class names; also pass --class-indices" in errors[0]
    flags = ["--weights", plain, "--model", "resnet18", "--class-indices", tmp_path / "class_indices.json"]
    status, lines, notes = run_predict(capsys, image, *flags)
    assert (status, len(lines)) == (0, 1)
    size = "224 px (the default, as no size is stored; change it with --img-size)"
    assert notes == [f"weights {plain}: resnet18, 5 classes, {size}"]
    assert run_predict(capsys, image, *flags[:2], *flags[4:]) == (0, lines, notes)  # the shapes are a resnet18's
    _, lines, notes = run_predict(capsys, image, *flags, "--img-size", "64")
    assert lines == run(capsys, image, "--weights", weights, "--uncalibrated")[1]
    assert notes == [f"weights {plain}: resnet18, 5 classes, 64 px (--img-size)"]


@pytest.fixture
def plain_in_run(weights, tmp_path) -> Path:
    """Return a model-4.pth in the folder of a run of 64 px."""
    path = tmp_path / "runs" / "first" / "weights" / "model-4.pth"
    path.parent.mkdir(parents=True)
    torch.save(torch.load(weights, weights_only=True)["state_dict"], path)
    network = {"model": "resnet18", "class_names": NAMES, "img_size": 64}
    (path.parents[1] / "args.json").write_text(json.dumps({"flags": {}, "network": network}))
    return path


def test_plain_state_dict_in_a_run(capsys, weights, sample, plain_in_run, tmp_path, monkeypatch):
    """It is predicted with the model, the class names and the image size of its run, like best.pth."""
    _, expected, _ = run(capsys, sample / "roses", "--weights", weights, "--json", "--uncalibrated")
    status, lines, notes = run_predict(capsys, sample / "roses", "--weights", plain_in_run, "--json")
    assert (status, lines) == (0, expected)
    assert notes == [f"weights {plain_in_run}: resnet18, 5 classes, 64 px"]
    monkeypatch.chdir(plain_in_run.parent)
    assert run(capsys, sample / "roses", "--weights", plain_in_run.name, "--json") == (0, expected, [])
    write_class_indices(NAMES[::-1], tmp_path / "class_indices.json")
    flags = ["--weights", plain_in_run, "--json", "--class-indices", tmp_path / "class_indices.json"]
    _, lines, _ = run(capsys, sample / "roses", *flags)
    others = dict(zip(NAMES, NAMES[::-1], strict=True))
    assert [json.loads(line)["class"] for line in lines] == [others[json.loads(line)["class"]] for line in expected]


def test_model_that_contradicts_the_stored_one_is_an_error(capsys, weights, sample, plain_in_run):
    for path, source in ((weights, weights), (plain_in_run, plain_in_run.parents[1] / "args.json")):
        status, lines, errors = run(capsys, sample / "roses", "--weights", path, "--model", "resnet34")
        message = f"{path}: --model is resnet34, but {source} states resnet18; omit --model"
        assert (status, lines, errors) == (1, [], [f"predict.py: error: {message}"])
    assert run(capsys, sample / "roses", "--weights", plain_in_run, "--model", "resnet18")[0] == 0


@pytest.mark.parametrize("args_json", [None, "{", "[]", '{"network": 3}', '{"network": {}}', "\xff"])
def test_run_with_a_corrupt_args_json(capsys, sample, plain_in_run, args_json):
    args_file = plain_in_run.parents[1] / "args.json"
    args_file.unlink()
    if args_json is not None:
        args_file.write_text(args_json, encoding="latin-1")
    status, _, errors = run(capsys, sample / "roses", "--weights", plain_in_run)
    assert (status, len(errors)) == (1, 1)
    assert "without class names; also pass --class-indices" in errors[0]


@pytest.mark.parametrize(
    "changes", [{"model": "vgg16"}, {"model": [1]}, {"class_names": "roses"}, {"img_size": "64"}, {"img_size": None}]
)
def test_run_with_invalid_metadata_is_an_error(capsys, sample, plain_in_run, changes):
    args_file = plain_in_run.parents[1] / "args.json"
    content = json.loads(args_file.read_text())
    content["network"] |= changes
    args_file.write_text(json.dumps(content))
    status, lines, errors = run(capsys, sample / "roses", "--weights", plain_in_run)
    assert (status, lines, len(errors)) == (1, [], 1)
    assert str(args_file) in errors[0]


def test_img_size_overrides_the_stored_size(capsys, weights, sample):
    image = next((sample / "roses").iterdir())
    _, expected, _ = run(capsys, image, "--weights", weights)
    status, lines, notes = run_predict(capsys, image, "--weights", weights, "--img-size", "96")
    assert status == 0
    assert lines != expected
    assert notes == [describe_weights(weights).replace("64 px", "96 px (--img-size)").strip()]


def test_empty_path_is_not_the_current_folder(capsys, weights, tmp_path, monkeypatch):
    """`predict.py "$PHOTO"` fails if the variable is not set."""
    write_image(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "", "--weights", weights) == (1, [], ["predict.py: '': no such file or folder"])


def main_of(program: str, weights: Path, images: Path) -> Callable[[], int]:
    """Return a function that does what `python PROGRAM IMAGES ...` does."""
    if program == "predict.py":
        return lambda: predict.main([str(images), "--weights", str(weights), "--device", "cpu"])
    return lambda: check_data.main([str(images), "--save-plot", "", "--workers", "0"])


@needs_fork
@pytest.mark.parametrize("program", ["predict.py", "check_data.py"])
def test_programs_run_without_stdout(weights, sample, program):
    """Services and pythonw have no standard output."""
    expected = describe_weights(weights) if program == "predict.py" else ""
    assert run_in_fork(main_of(program, weights, sample), stdout=None) == (0, expected)


@needs_fork
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(("program", "status"), [("predict.py", 1), ("check_data.py", 2)])
def test_failed_output_is_a_one_line_error(weights, sample, program, status):
    main = main_of(program, weights, sample)
    notes = describe_weights(weights) if program == "predict.py" else ""
    with open("/dev/full", "w") as full:
        result = run_in_fork(main, full.fileno())
    assert result == (status, f"{notes}{program}: error: [Errno 28] No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    assert run_in_fork(main, writer) == (status, notes)
    os.close(writer)


@needs_fork
def test_closed_standard_error_leaves_standard_output_unchanged(capsys, weights, sample, tmp_path):
    shutil.copytree(sample / "roses", tmp_path / "new" / "roses")
    (tmp_path / "new" / "roses" / "broken.jpg").write_bytes(b"")
    (tmp_path / "new" / "notes.txt").write_text("x")
    status, expected, _ = run(capsys, tmp_path / "new", "--weights", weights, "--json")
    assert (status, len(expected)) == (1, 20)

    def main() -> int:
        sys.stderr = None
        status = predict.main([str(tmp_path / "new"), "--weights", str(weights), "--device", "cpu", "--json"])
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the child ends here
        return status

    with open(tmp_path / "out.txt", "w") as out:
        assert run_in_fork(main, out.fileno()) == (1, "")
    assert (tmp_path / "out.txt").read_text().splitlines() == expected


@pytest.mark.parametrize("flags", [["--img-size", "0"], ["--img-size", "31"], ["--img-size", "10001"], ["--save", "a"]])
def test_invalid_flags_are_one_line_errors(capsys, flags):
    with pytest.raises(SystemExit) as caught:
        predict.main(["a.jpg", *flags])
    assert caught.value.code == 2
    stderr = capsys.readouterr().err
    assert flags[0] in stderr
    assert len(stderr.splitlines()) == 1


def test_folder_that_cannot_be_written_to_is_an_error_before_classifying(capsys, weights, sample, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    image = str(next((sample / "roses").iterdir()))
    assert predict.main([image, "--device", "cpu", "--weights", str(weights), "--csv", "out.csv"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--csv out.csv: no permission to write to its folder" in captured.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weights", "nowhere.pth"], "nowhere.pth: no such weights file"),
        (["--save-plot", "nowhere/out.png"], "--save-plot"),
        (["--save-plot", "out.xyz"], "--save-plot"),
        (["--csv", "nowhere/out.csv"], "--csv nowhere/out.csv"),
        (["--csv", "."], "--csv .: is a folder; name a file"),
        (["--device", "gpu"], "--device gpu"),
        (["--class-indices", "nowhere.json"], "nowhere.json: no such file"),
        (["--save-plot", "."], "--save-plot"),
    ],
)
def test_invalid_arguments_are_one_line_errors(capsys, weights, sample, flags, message):
    image = str(next((sample / "roses").iterdir()))
    assert predict.main([image, "--device", "cpu", "--weights", str(weights), *flags]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_ascii_output_without_matplotlib(tmp_path):
    code = (
        "import sys, predict; status = predict.main(sys.argv[1:]); "
        "sys.exit('matplotlib was imported' if 'matplotlib' in sys.modules else status)"
    )
    weights, path = tmp_path / "best.pth", write_image(tmp_path / "向日葵.png")
    content = {"model": "resnet18", "class_names": NAMES, "img_size": 64}
    torch.save(content | {"state_dict": resnet18(num_classes=5).state_dict()}, weights)
    command = [sys.executable, "-c", code, path, "--weights", weights, "--device", "cpu"]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=False)
    assert (done.returncode, done.stderr.decode()) == (0, f"weights {weights}: resnet18, 5 classes, 64 px\n")
    assert done.stdout.count(b"\n") == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "out of memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "a DataLoader worker died"),
        (ConnectionResetError(104, "Connection reset by peer"), "a DataLoader worker died"),
    ],
)
def test_resource_errors_are_one_line(capsys, weights, sample, monkeypatch, error, message):
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(backends, "compute_logits", fail)
    status, lines, errors = run(capsys, sample / "daisy", "--weights", weights)
    assert (status, lines, len(errors)) == (1, [], 1)
    assert message in errors[0]
