"""export.py: files that agree with the network, and that predict.py and other programs can use."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from fault_files import draw_zoo
from PIL import Image
from shortcuts import NAMES, run_predict

import evaluate
import export
import export_check
import exported_file
import predict
import train
from exported_file import read_onnx, read_pt2
from exported_network import ExportedNetwork, resize_like
from familiarity import Familiarity
from image_folders import file_checksum
from image_io import read_image
from inference import record_layer1
from model import MODELS, evaluation_mode
from my_dataset import EvalTransform, prepare_batch
from weights_io import load_model

pytestmark = [pytest.mark.usefixtures("in_an_empty_folder", "small_network", "no_figures")]
FORMATS = ("pt2", "onnx")


def export_weights(weights: Path, *flags: object) -> int:
    return export.main(["--weights", str(weights), *map(str, flags)])


@pytest.fixture(scope="module")
def exported(weights, sample, tmp_path_factory) -> dict[str, Path]:
    """Export the network of the fixture `weights`, with a familiarity, in both formats."""
    folder = tmp_path_factory.mktemp("exported")
    model, _ = load_model(weights)
    images = [EvalTransform(64)(read_image(path)) for path in sample.glob("*/*")]
    with evaluation_mode(model), record_layer1(model) as layer1:
        model(prepare_batch(torch.stack(images), "cpu"))
    distances = (layer1[0] - layer1[0].mean(dim=0)).square().sum(dim=1)
    features = layer1[0].shape[1]
    familiarity = Familiarity(layer1[0].mean(dim=0), torch.eye(features), distances.median().item() + 1e-4)
    content = torch.load(weights, weights_only=True) | {"familiarity": familiarity._asdict()}
    torch.save(content, folder / "best.pth")
    for name in FORMATS:
        flags = ("--output", folder / f"best.{name}", "--images", sample)
        assert export_weights(folder / "best.pth", *flags) == 0
    return {name: folder / f"best.{name}" for name in ("pth", *FORMATS)}


@pytest.mark.parametrize("name", FORMATS)
def test_check_compares_the_validation_images(name, sample, capsys):
    flags = ["--data-path", str(sample), "--model", "resnet18", "--img-size", "32", "--epochs", "1", "--workers", "0"]
    assert train.main([*flags, "--device", "cpu", "--name", "flowers"]) == 0
    weights = Path("runs/flowers/weights/best.pth")
    capsys.readouterr()
    assert export.main(["--format", name]) == 0
    output = capsys.readouterr().out
    assert "check     20 of 20 images are predicted as the same class" in output
    assert float(re.search(r"difference in probability (\S+)", output)[1]) < 1e-4
    metadata = (read_pt2 if name == "pt2" else read_onnx)(weights.with_suffix(f".{name}"))[1]
    stored = torch.load(weights, weights_only=True)
    for key in ("model", "class_names", "img_size", "resize", "epoch", "accuracy"):
        assert metadata[key] == stored[key], key
    assert metadata["weights_checksum"] == file_checksum(str(weights))
    assert metadata["accuracy_images"] == 20
    low, high = metadata["accuracy_interval"]
    assert low <= metadata["accuracy"] <= high
    assert [threshold["error_rate"] for threshold in metadata["unsure_thresholds"]] == [0.01, 0.02, 0.05]


def test_int8_file_is_checked_by_its_accuracy(sample, capsys, monkeypatch):
    flags = ["--data-path", str(sample), "--model", "resnet18", "--img-size", "32", "--epochs", "1", "--workers", "0"]
    assert train.main([*flags, "--device", "cpu"]) == 0
    (folder,) = Path("runs").glob("*/weights")
    monkeypatch.setattr(export_check, "MAX_ACCURACY_DROP", 0.5)  # the network has hardly been trained
    assert export.main(["--format", "onnx"]) == 0
    capsys.readouterr()
    assert export.main(["--format", "onnx", "--int8"]) == 0
    assert re.search(r"accuracy \S+, original network 0\.", capsys.readouterr().out)
    small = folder / "best_int8.onnx"
    assert small.stat().st_size < 0.5 * (folder / "best.onnx").stat().st_size
    assert run_predict(capsys, sample, "--weights", small)[0] == 0
    monkeypatch.setattr(export_check, "MAX_ACCURACY_DROP", -2)
    assert export.main(["--format", "onnx", "--int8", "--output", "other.onnx"]) == 1
    assert "--int8 lowers the accuracy on 20 images by " in capsys.readouterr().err
    assert not Path("other.onnx").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_predict_and_evaluate_work_as_with_the_weights(name, exported, sample, capsys):
    status, expected, _ = run_predict(capsys, sample, "--weights", exported["pth"], "--json", "--amp", "off")
    assert status == 0
    status, lines, _ = run_predict(capsys, sample, "--weights", exported[name], "--json", "--amp", "off")
    assert (status, len(lines)) == (0, len(expected))
    flagged = 0
    for line, other in zip(map(json.loads, lines), map(json.loads, expected), strict=True):
        assert (line["image"], line["class"], line["flags"]) == (other["image"], other["class"], other["flags"])
        assert line["probability"] == pytest.approx(other["probability"], abs=1e-4)
        flagged += "unfamiliar" in line["flags"]
    assert 0 < flagged < len(lines)
    _, uncalibrated, _ = run_predict(capsys, sample, "--weights", exported["pth"], "--json", "--uncalibrated")
    _, lines, _ = run_predict(capsys, sample, "--weights", exported[name], "--json", "--uncalibrated")
    assert json.loads(lines[0])["probability"] == pytest.approx(json.loads(uncalibrated[0])["probability"], abs=0.01)
    reports = []
    for weights in (exported["pth"], exported[name]):
        assert evaluate.main([str(sample), "--weights", str(weights), "--json", "--device", "cpu", "--amp", "off"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0]["confusion_matrix"] == reports[1]["confusion_matrix"]
    assert Path("evaluation/mistakes.png").exists() == (name == "pt2")


def test_grad_cam_with_exported_files(exported, sample, capsys):
    image = next(sample.glob("*/*"))
    assert run_predict(capsys, image, "--weights", exported["pt2"], "--save-plot", "a.png")[0] == 0
    assert Path("a.png").exists()
    status, _, errors = run_predict(capsys, image, "--weights", exported["onnx"], "--save-plot", "b.png")
    assert (status, errors[-1]) == (
        1,
        "predict.py: error: --save-plot: Grad-CAM needs feature maps, which an ONNX file does not return; pass "
        "best.pth or a .pt2 file",
    )


@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
def test_resize_in_the_graph_agrees_with_the_transform(resize):
    transform = EvalTransform(64, resize)
    generator = torch.Generator().manual_seed(0)
    border = ExportedNetwork(MODELS["resnet18"](num_classes=2)).mean.round()
    for height, width in ((64, 64), (73, 200), (201, 74), (333, 222), (40, 31), (700, 71)):
        image = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)
        resized = resize_like(transform, image, border)
        difference = (resized - transform(image).float()).abs()
        assert resized.shape == (3, 64, 64)
        assert (difference <= 1).double().mean() >= 0.99, (height, width)


@pytest.mark.parametrize("name", FORMATS)
def test_with_resize_takes_whole_images(name, weights, sample, tmp_path, capsys):
    output = tmp_path / f"whole.{name}"
    assert export_weights(weights, "--with-resize", "--output", output, "--images", sample) == 0
    assert "one RGB image (3, H, W) uint8" in capsys.readouterr().out
    images = [*sample.glob("*/*")][:3]
    _, expected, _ = run_predict(capsys, *images, "--weights", weights, "--json", "--amp", "off")
    status, lines, _ = run_predict(capsys, *images, "--weights", output, "--json")
    assert status == 0
    for line, other in zip(map(json.loads, lines), map(json.loads, expected), strict=True):
        assert line["probability"] == pytest.approx(other["probability"], abs=0.05)  # reduced while decoding


def test_accuracy_is_not_stated_for_another_size(weights, sample):
    for flags, size, accuracy in (([], 64, 0.2), (["--img-size", "96"], 96, None)):
        assert export_weights(weights, *flags, "--output", "a.pt2", "--images", sample) == 0
        metadata = read_pt2("a.pt2")[1]
        assert (metadata["img_size"], metadata["accuracy"]) == (size, accuracy)


def test_extension_in_upper_case(weights, sample, tmp_path, capsys):
    for name in ("a.ONNX", "b.PT2"):
        assert export_weights(weights, "--output", tmp_path / name, "--images", sample) == 0
        assert run_predict(capsys, next(sample.glob("*/*")), "--weights", tmp_path / name)[0] == 0


@pytest.mark.parametrize("name", FORMATS)
def test_fixed_batch(name, weights, sample, tmp_path, capsys):
    output = tmp_path / f"three.{name}"
    assert export_weights(weights, "--batch", "3", "--output", output, "--images", sample) == 0
    assert "RGB images (3, 3, 64, 64) uint8" in capsys.readouterr().out
    images = [*sample.glob("*/*")][:4]
    _, expected, _ = run_predict(capsys, *images, "--weights", weights, "--json", "--amp", "off")
    _, lines, _ = run_predict(capsys, *images, "--weights", output, "--json", "--amp", "off")
    for line, other in zip(map(json.loads, lines), map(json.loads, expected), strict=True):
        assert line["probability"] == pytest.approx(other["probability"], abs=1e-4)


@pytest.mark.parametrize("fault", ["wrong", "crash"])
def test_file_that_disagrees_is_removed(fault, weights, sample, tmp_path, capsys, monkeypatch):
    output = tmp_path / "a.pt2"
    output.write_bytes(b"before")

    class Wrong(ExportedNetwork):
        def forward(self, images):
            return super().forward(images).flip(1)

    def write_nothing(network, img_size, batch, metadata, path, calibration):
        path.write_bytes(b"")

    if fault == "wrong":
        monkeypatch.setattr(export, "ExportedNetwork", Wrong)
    else:
        monkeypatch.setattr(export, "write_exported", write_nothing)
    assert export_weights(weights, "--output", output, "--images", sample) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    expected = (
        "disagrees with the network, and was not saved" if fault == "wrong" else "cannot be run, and was not saved"
    )
    assert expected in error
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.pt2"]
    assert output.read_bytes() == b"before"


def test_file_that_stops_the_process_before_the_first_image_is_an_error():
    with export_check.start_process(Path("missing.pt2"), whole=False) as process:
        process.process.wait()
        with pytest.raises(export_check.ExportCheckError, match="the exported file cannot be run"):
            process.predict([torch.zeros(3, 64, 64, dtype=torch.uint8)])


@pytest.mark.parametrize("labelled", [True, False])
def test_unreadable_images_are_reported(labelled, weights, sample, capsys):
    folder = Path("images", "roses") if labelled else Path("images")
    folder.mkdir(parents=True)
    shutil.copy(next(sample.glob("roses/*")), folder / "good.jpg")
    (folder / "bad.jpg").write_text("x")
    assert export_weights(weights, "--output", "a.pt2", "--images", "images") == 1
    output = capsys.readouterr()
    assert "1 of 1 images" in output.out
    assert [line for line in output.err.splitlines() if "cannot read image" in line and "bad.jpg" in line]
    Image.new("RGB", (400, 20)).save(folder / "bad.jpg")
    assert export_weights(weights, "--with-resize", "--output", "b.pt2", "--images", "images") == 1
    assert "bad.jpg: aspect ratio above 10, which --with-resize does not support" in capsys.readouterr().err
    assert Path("b.pt2").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_stopped_export_leaves_nothing(number, weights, sample, monkeypatch):
    write = export.write_exported

    def write_and_signal(*arguments):
        write(*arguments)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(export, "write_exported", write_and_signal)
    Path("a.pt2").write_bytes(b"before")
    with pytest.raises(SystemExit) as stopped:
        export_weights(weights, "--output", "a.pt2", "--images", sample)
    assert stopped.value.code == 128 + number
    assert [path.name for path in Path().iterdir()] == ["a.pt2"]
    assert Path("a.pt2").read_bytes() == b"before"


def test_ties_are_not_disagreements():
    result = export_check.CheckResult()
    expected = torch.tensor([[0.5, 0.5, 0.0], [0.7, 0.3, 0.0]])
    result.compare(torch.tensor([[0.49999, 0.50001, 0.0], [0.7, 0.3, 0.0]]), expected, torch.tensor([0, -1]))
    assert (result.images, result.agreeing) == (2, 2)
    result.compare(torch.tensor([[0.3, 0.7, 0.0]]), expected[1:], torch.tensor([0]))
    assert (result.images, result.agreeing) == (3, 2)
    assert (result.correct, result.labelled, result.accuracy_drop) == ((0, 2), 2, 1)
    assert result.difference == pytest.approx(0.4)
    result.compare(torch.full((1, 3), torch.nan), expected[1:], torch.tensor([-1]))
    assert result.difference == float("inf")


# --- files that are refused ---------------------------------------------------------------------------------------


def rewrite(source: Path, target: Path, changes: dict[str, bytes | None], seal: bool = True) -> None:
    """Copy a .pt2 file with some members replaced, added or removed; `seal` updates the checksum."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as copy:
        root = archive.namelist()[0].split("/")[0]
        contents = {name.removeprefix(f"{root}/"): archive.read(name) for name in archive.namelist()} | changes
        for name, content in contents.items():
            if content is not None and not (seal and name == exported_file.CHECKSUM):
                copy.writestr(f"{root}/{name}", content)
        if seal:
            copy.writestr(f"{root}/{exported_file.CHECKSUM}", exported_file._archive_checksum(copy))


class Payload:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("effect"),)


@pytest.mark.parametrize("fault", ["weights", "class names", "other code", "other program", "truncated", "names lost"])
def test_modified_pt2_files_are_refused_without_effect(fault, exported, tmp_path, capsys):
    source, target = exported["pt2"], tmp_path / "bad.pt2"
    metadata = read_pt2(source)[1]
    no_names = json.dumps({name: value for name, value in metadata.items() if name != "class_names"}).encode()
    code = pickle.dumps(Payload())
    if fault == "weights":
        with zipfile.ZipFile(source) as archive:
            member = next(name for name in archive.namelist() if name.endswith("weights/weight_3"))
            content = archive.read(member)
        rewrite(source, target, {"data/weights/weight_3": content[:-4] + b"\0\0\0\1"}, seal=False)
    elif fault == "class names":
        rewrite(source, target, {exported_file.METADATA: no_names}, seal=False)
    elif fault == "names lost":
        rewrite(source, target, {exported_file.METADATA: no_names})
    elif fault == "other code":
        rewrite(source, target, {"data/sample_inputs/model.pt": code, "data/aotinductor/model/a.so": code}, seal=False)
    elif fault == "other program":
        program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
        torch.export.save(program, target)
    else:
        target.write_bytes(source.read_bytes()[:-3000])
    status, lines, errors = run_predict(capsys, "photo.jpg", "--weights", target)
    assert (status, lines, len(errors)) == (1, [], 1)
    reasons = {"other program": "not written by export.py", "truncated": "corrupt, or not written by export.py"}
    reasons["names lost"] = "without class names"
    assert reasons.get(fault, "was modified after the export") in errors[0]
    assert not Path("effect").exists()


def test_code_in_a_sealed_pt2_file_is_not_run(exported, sample, tmp_path, capsys):
    code, image = pickle.dumps(Payload()), next(sample.glob("*/*"))
    rewrite(exported["pt2"], tmp_path / "a.pt2", {"data/sample_inputs/model.pt": code})
    assert run_predict(capsys, image, "--weights", tmp_path / "a.pt2")[0] == 0
    rewrite(exported["pt2"], tmp_path / "b.pt2", {"data/aotinductor/model/a.so": code})
    status, _, errors = run_predict(capsys, image, "--weights", tmp_path / "b.pt2")
    assert (status, "data/aotinductor/model/a.so, which export.py does not write" in errors[0]) == (1, True)
    assert not Path("effect").exists()
    pickle.loads(code)  # the payload works
    assert Path("effect").exists()


@pytest.mark.parametrize("fault", ["weights", "checksum", "other program", "empty"])
def test_modified_onnx_files_are_refused(fault, exported, tmp_path, capsys):
    content, target = bytearray(exported["onnx"].read_bytes()), tmp_path / "bad.onnx"
    if fault == "weights":
        content[len(content) // 2] ^= 1
    elif fault == "checksum":
        content = content.replace(b"blake2b:", b"blake2c:")
    else:
        content = bytearray(b"\x08\x0a" if fault == "other program" else b"")
    target.write_bytes(content)
    status, lines, errors = run_predict(capsys, "photo.jpg", "--weights", target)
    assert (status, lines, len(errors)) == (1, [], 1)
    assert ("was modified after the export" if fault == "weights" else "not written by export.py") in errors[0]


def test_external_data_in_an_onnx_file_is_not_read(exported, tmp_path, capsys, monkeypatch):
    import onnx

    monkeypatch.chdir(tmp_path)
    model = onnx.load(exported["onnx"])
    onnx.save(model, "bad.onnx", save_as_external_data=True, location="data.bin", size_threshold=0)
    sealed = Path("bad.onnx").read_bytes()
    found = re.search(rb"blake2b:([0-9a-f]{32})", sealed)[0]
    plain = sealed.replace(found, exported_file.PLACEHOLDER)
    Path("bad.onnx").write_bytes(sealed.replace(found, b"blake2b:" + exported_file._checksum(plain).encode()))
    status, lines, errors = run_predict(capsys, "photo.jpg", "--weights", "bad.onnx")
    assert (status, lines) == (1, [])
    assert "refers to external data files, which export.py does not write" in errors[-1]


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--weights", "missing.pth"], 1, "missing.pth: no such weights file"),
        (["--output", "a.onnx", "--format", "pt2"], 1, "--output a.onnx: name a .pt2 file in an existing folder"),
        (["--output", "nowhere/a.pt2"], 1, "name a .pt2/.onnx file in an existing folder"),
        (["--output", "folder.pt2"], 1, "--output folder.pt2: is a folder; name a file"),
        (["--output", ""], 2, "it must be the name of a file"),
        (["--batch", "0"], 2, 'it must be at least 1, or "dynamic"'),
        (["--batch", "2", "--with-resize"], 2, "--batch has no effect with --with-resize"),
        (["--int8"], 1, "--int8: only for --format onnx"),
        (["--images", "."], 1, "--images: there are no images to check the file with"),
        (
            ["--int8", "--format", "onnx", "--skip-check"],
            1,
            "--int8: no training images of the run were found to calibrate with; omit --int8",
        ),
        (["--int8", "--with-resize"], 2, "--int8 cannot be combined with --with-resize"),
        (["--images", "a", "--skip-check"], 2, "--images has no effect with --skip-check"),
        ([], 1, "the validation images of its run are unknown, or were moved; pass --images FOLDER"),
    ],
)
def test_invalid_flags_are_one_line(weights, capsys, flags, status, message):
    Path("folder.pt2").mkdir(exist_ok=True)
    arguments = flags if "--weights" in flags else ["--weights", str(weights), *flags]
    if status == 2:
        with pytest.raises(SystemExit):
            export.main(arguments)
    else:
        assert export.main(arguments) == status
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert [path.name for path in weights.parent.iterdir()] == ["best.pth"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_is_named(weights, sample, capsys, monkeypatch, package):
    find_spec = exported_file.importlib.util.find_spec
    monkeypatch.setattr(
        exported_file.importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    assert export_weights(weights, "--output", "a.onnx", "--images", sample) == 1
    assert capsys.readouterr().err == f"export.py: error: a .onnx file needs {package}: pip install {package}\n"


def test_exported_files_are_only_for_prediction(exported, sample, capsys):
    for name in FORMATS:
        assert train.main(["--data-path", str(sample), "--weights", str(exported[name]), "--device", "cpu"]) == 1
        assert "exported files are only for inference; pass the best.pth of its run" in capsys.readouterr().err
        image = next(sample.glob("*/*"))
        status, _, errors = run_predict(capsys, image, "--weights", exported[name], "--img-size", "128")
        assert (status, "is for images of 64 px; omit --img-size" in errors[-1]) == (1, True)
        assert export_weights(exported[name], "--skip-check") == 1
        assert "an exported file cannot be exported again; pass best.pth" in capsys.readouterr().err
    assert predict.main([str(image), "--weights", str(exported["onnx"]), "--amp", "on"]) == 1
    assert "ONNX files run on the CPU, without mixed precision; omit --device and --amp" in capsys.readouterr().err


# --- other programs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_client_in_the_documentation_agrees_with_predict(name, exported, tmp_path, capsys):
    page = (Path(export.__file__).parent / "docs" / "deploy.md").read_text(encoding="utf-8")
    Path("client.py").write_text(re.search(r"```python\n(.*?)```", page, re.S)[1], encoding="utf-8")
    folder = tmp_path / "zoo"
    folder.mkdir()
    images = [folder / file for file, usable in draw_zoo(folder).items() if usable and "\n" not in file]
    shutil.copy(exported[name], f"model.{name}")
    command = [sys.executable, "-I", "client.py", f"model.{name}", *map(str, images)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout
    _, expected, _ = run_predict(capsys, *images, "--weights", exported["pth"], "--json", "--topk", "5", "--amp", "off")
    assert len(expected) == len(images) > 10
    for path, line, other in zip(images, output.splitlines(), map(json.loads, expected), strict=True):
        found = json.loads(line.removeprefix(f"{path} ").replace("'", '"'))
        assert sorted(found) == NAMES
        for choice in other["top"]:
            assert found[choice["class"]] == pytest.approx(choice["probability"], abs=1e-3), path
