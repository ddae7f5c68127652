"""Finding images: every file in a folder is used or reported, by all programs alike."""

import json
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import write_classes, write_image
from PIL import Image

import check_data
import config
import predict
import prepare_data
import train
from cli_utils import DataError
from dataset_split import find_split, split_folder
from image_folders import UNKNOWN_TYPE, Skipped, count_skipped, likely_class
from labelled_images import describe_unlabelled, find_images
from my_dataset import EvalTransform

pytestmark = pytest.mark.usefixtures("in_an_empty_folder", "small_network", "no_figures")
SMALL = ["--model", "resnet18", "--img-size", "32", "--batch-size", "4", "--workers", "0", "--epochs", "1"]


@pytest.fixture
def messy(tmp_path) -> Path:
    """Create a folder with nested, loose, corrupt and unsupported files, and a class of one image."""
    root = write_classes(tmp_path / "messy", {"cat": 6, "dog": 6, "cow": 1})
    for index in range(4):
        write_image(root / "cat" / "more" / "and more" / f"{index}.png", seed=50 + index)
    for name, kind in (("web.jfif", "JPEG"), ("scan.tga", "TGA"), ("no extension", "PNG")):
        Image.open(root / "dog" / "dog 00.png").rotate(len(name)).save(root / "dog" / name, kind)
    write_image(root / "cat" / "strip.png", size=(330, 30))
    (root / "cat" / "broken.png").write_bytes(b"hello")
    for name in ("IMG_1.heic", "IMG_2.HEIC", "raw.nef"):
        (root / "cat" / name).write_bytes(b"\0\0\0\x18ftypheic")
    for name in ("notes.txt", "dog/Thumbs.db", "dog/README"):
        (root / name).write_text("words")
    write_image(root / "loose.png", seed=99)
    (root / ".hidden").mkdir()
    (root / ".hidden" / "a.png").write_bytes(b"")
    return root


def number_of_files(root: Path) -> int:
    return sum(path.is_file() and ".hidden" not in path.parts for path in root.rglob("*"))


def run(capsys, program, *argv) -> tuple[int, str, str]:
    """Run a program; return its exit status, standard output and standard error."""
    status = program.main(list(map(str, argv)))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_all_programs_use_or_report_each_file(messy, capsys):
    total = number_of_files(messy)
    status, output, _ = run(capsys, check_data, messy, "--workers", "0", "--save-plot", "")
    assert status == 0
    assert f"9 of {total} files skipped" in output.splitlines()[-1]
    assert "no validation images of cow" in output
    skipped = re.search(r"skipped (9 files: .*)", output)[1]
    for part in (
        "2 unsupported image format .heic (pip install pillow-heif",
        "1 unsupported image format .nef",
        "3 unknown file type (.txt 1, no extension 1, .db 1)",
        "1 unreadable",
        "1 aspect ratio above 10",
        "1 not in a class folder",
    ):
        assert part in skipped
    assert f"{str(messy / 'cat' / 'raw.nef')!r}: unsupported image format .nef" in output

    status, output, _ = run(capsys, train, "--data-path", messy, *SMALL)
    assert status == 0
    train_images, val_images = map(int, re.search(r"images +(\d+) for training, (\d+) for validation", output).groups())
    assert train_images + val_images + 9 == total
    header = re.search(r"skipped +(9 files: .*); listed in (.*)", output)
    assert sorted(header[1].split(", ")) == sorted(skipped.split(", "))
    listed = Path(header[2]).read_text(encoding="utf-8").splitlines()
    assert len(listed) == 9
    assert "no validation images of cow" in output
    assert len(re.findall(r"accuracy \d\.\d{3} \(2 of 3 classes\)", output)) == 2  # the epoch, and the result

    status, output, errors = run(capsys, predict, messy)
    assert status == 1
    predictions = [line for line in output.splitlines() if ": accuracy " not in line]
    assert len(predictions) == train_images + val_images + 2  # the strip and the loose image are classified as well
    assert "broken.png" in errors
    assert f"{messy}: skipped 6 files: 3 unknown file type" in errors
    assert f"{messy}: 1 image without a label: not in a class folder" in errors
    assert f"{messy}: accuracy" in output
    assert f"of {train_images} training images of the run" in output
    assert f"of {val_images} validation images of the run, 2 of 3 classes" in output
    assert "of 1 images, 1 of 3 classes)" in output  # the strip

    write_image(messy / "dog" / "new.png", seed=123)
    _, output, _ = run(capsys, predict, messy)
    assert "of 2 images, 2 of 3 classes)" in output


def test_strict_refuses_unsupported_images(messy, capsys):
    (messy / "cat" / "broken.png").unlink()
    status, _, errors = run(capsys, train, "--data-path", messy, *SMALL, "--strict")
    assert status == 1
    assert "--strict: unusable images found: 3; " in errors
    assert len(errors.splitlines()) == 2  # the first one is about the device


def test_class_with_unsupported_images_only(tmp_path):
    folder = write_classes(tmp_path / "pets", {"cat": 5})
    (folder / "dog").mkdir()
    (folder / "dog" / "IMG_1.heic").write_bytes(b"")
    with pytest.raises(DataError, match=r"no image in class dog, only 1 file: 1 unsupported image format \.heic \(pip"):
        split_folder(folder)


def test_validation_folder_inside_the_training_folder(tmp_path):
    root = write_classes(tmp_path / "data", {"cat": 3, "dog": 3, "val/cat": 2})
    with pytest.raises(DataError, match=r"is inside the training folder .*; move it elsewhere"):
        find_split(root, root / "val")


@pytest.mark.parametrize(("train_name", "val_name"), [("Training", "Testing"), ("train", "Val"), ("TRAIN", "valid")])
def test_names_of_training_and_validation_folders(tmp_path, train_name, val_name):
    for name in (train_name, val_name):
        write_classes(tmp_path / "data" / name, {"cat": 3, "dog": 3})
    split, source = find_split(tmp_path / "data")
    assert (split.class_names, source) == (["cat", "dog"], f"from {tmp_path / 'data' / val_name}")
    assert len(split.train_paths) == 6


def test_extensions_are_printed_without_control_characters():
    skipped = [Skipped("photos/a.\x1b[2J", UNKNOWN_TYPE, UNKNOWN_TYPE)]
    assert count_skipped(skipped) == r"1 file: 1 unknown file type (.\x1b[2j 1)"


def test_folders_beside_train_and_val_are_reported(tmp_path):
    root = tmp_path / "data"
    for subset in ("train", "val", "test"):
        write_classes(root / subset, {"cat": 3, "dog": 3})
    (root / "annotations").mkdir()
    (root / "annotations" / "labels.xml").write_text("<annotations/>")
    split, source = find_split(root)
    assert (split.class_names, source) == (["cat", "dog"], f"from {root / 'val'}")
    assert count_skipped(split.skipped) == "1 file: 1 outside the training, validation and test folders"
    assert [len(paths) for paths, _ in split.subsets.values()] == [6, 6, 6]
    assert len(split.paths) + len(split.skipped) == number_of_files(root)
    assert find_split(root, root / "test" / ".." / "val")[0].skipped == split.skipped
    assert find_split(root, val_rate=0.5)[1] == f"from {root / 'val'}; --val-rate has no effect"

    other = write_classes(tmp_path / "classes", {"bus": 2, "train/red": 2, "car": 2})  # "train" is a class here
    assert find_split(other)[0].class_names == ["bus", "car", "train"]


def test_predict_labels_the_images_of_train_and_val_folders():
    write_classes(Path("data/train"), {"cat": 2, "dog": 2})
    write_classes(Path("data/val"), {"cat": 1, "dog": 1})
    files = find_images("data", ["cat", "dog"], [])
    assert [file.label for file in files] == ["cat", "cat", "dog", "dog", "cat", "dog"]


def test_names_are_compared_in_composed_form(tmp_path):
    composed = unicodedata.normalize("NFC", "rosé")
    decomposed = unicodedata.normalize("NFD", "rosé")
    write_classes(tmp_path / "train", {composed: 3, "tulipán": 3})
    write_classes(tmp_path / "val", {decomposed: 2, unicodedata.normalize("NFD", "tulipán"): 1})
    split, _ = find_split(tmp_path / "train", tmp_path / "val")
    assert split.val_labels == [0, 0, 1]
    assert split_folder(tmp_path / "val").class_names == split.class_names
    files = find_images(str(tmp_path / "val"), [decomposed, "tulipán"], [])
    assert [file.label for file in files] == [decomposed, decomposed, "tulipán"]


def test_likely_class():
    names = ["daisy", "dandelion", "sunflowers", "golden retriever", "向日葵"]
    for spelling, expected in {
        "Dandelion": "dandelion",
        "sun flowers": "sunflowers",
        "sunflower": "sunflowers",
        "GOLDEN_RETRIEVER": "golden retriever",
        "holiday 2024": None,
        "向日葵 ": "向日葵",
        "": None,
    }.items():
        assert likely_class(spelling, names) == expected
    assert likely_class("a", []) is None


def test_predict_names_folders_that_match_no_class(tmp_path):
    write_classes(tmp_path / "test", {"daisy": 2, "Roses": 3, "misc": 1})
    files = find_images(str(tmp_path / "test"), ["daisy", "roses"], [])
    lines = describe_unlabelled(files, ["daisy", "roses"])
    assert lines == [
        f"{tmp_path / 'test' / 'Roses'}: 3 images without a label: Roses is not a class; is it roses?",
        f"{tmp_path / 'test' / 'misc'}: 1 image without a label: misc is not a class",
    ]
    holiday = find_images(str(write_classes(tmp_path / "photos", {"2024": 2, "beach": 1})), ["daisy"], [])
    assert describe_unlabelled(holiday, ["daisy"]) == []


def test_validation_images_that_were_trained_on_are_reported(two_classes, tmp_path, capsys):
    status, _, errors = run(capsys, train, "--data-path", two_classes, "--val-path", two_classes / "." / "", *SMALL)
    assert status == 1
    assert "is both the training and the validation folder" in errors
    write_classes(tmp_path / "val", {"cat": 1, "dog": 1})
    for path in sorted((two_classes / "dog").iterdir())[:3]:
        shutil.copy(path, tmp_path / "val" / "dog" / f"copy of {path.name}")
    data = prepare_data.prepare_data(
        config.parse_args(["--data-path", str(two_classes), "--val-path", str(tmp_path / "val")]), Path("none.json")
    )
    assert data.leaked == {"val": 3 + 2, "test": 0}  # write_classes draws the same first images


# --- pixels with more than 8 bits ---------------------------------------------------------------------------------


def write_scans(root: Path, scale: float, kind: type, extension: str) -> Path:
    """Write 2 x 6 grey pictures with values from 0 to `scale`; some are dark."""
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for index in range(6):
            values = generator.random((40, 40)) * (1, 0.3)[index % 2]
            values.flat[:2] = 0, (1, 0.3)[index % 2]
            pixels = values * scale if kind == np.float32 else np.rint(values * scale)
            Image.fromarray(pixels.astype(kind)).save(root / name / f"{index}.{extension}")
    return root


@pytest.mark.parametrize(
    ("scale", "kind", "extension"),
    [(4095, np.uint16, "png"), (256, np.int32, "tif"), (1.01, np.float32, "tif"), (70_000, np.int32, "tif")],
)
def test_one_scale_per_dataset(tmp_path, scale, kind, extension):
    """The images that reach the network are those of 8-bit files of the same pictures."""
    wide, narrow = (
        prepare_data.prepare_data(config.parse_args(["--data-path", str(root)]), Path("none.json"))
        for root in (
            write_scans(tmp_path / "wide", scale, kind, extension),
            write_scans(tmp_path / "narrow", 255, np.uint8, "png"),
        )
    )
    assert wide.pixel_range == pytest.approx((0, scale))
    assert narrow.pixel_range is None
    for one, other in ((wide.train_set, narrow.train_set), (wide.val_set, narrow.val_set)):
        one.transform = other.transform = EvalTransform(32)
        for index in range(len(one)):
            assert (one[index][0].int() - other[index][0].int()).abs().max() <= 1


def test_range_is_kept_for_prediction_and_resume(tmp_path, capsys):
    scans = write_scans(tmp_path / "scans", 3000, np.uint16, "png")
    status, output, _ = run(capsys, train, "--data-path", scans, *SMALL)
    assert status == 0
    assert "pixel range  0 to 3000, scaled to 8 bits" in output
    dark, same = scans / "a" / "1.png", tmp_path / "8 bits.png"  # its brightest pixel is 900
    Image.fromarray(np.rint(np.asarray(Image.open(dark)) / 3000 * 255).astype(np.uint8)).save(same)
    _, output, _ = run(capsys, predict, dark, same, "--json", "--amp", "off")
    first, second = ([top["probability"] for top in json.loads(line)["top"]] for line in output.splitlines())
    assert first == pytest.approx(second, abs=1e-5)

    bright = np.full((40, 40), 60_000, np.uint16)
    Image.fromarray(bright).save(scans / "a" / "new.png")
    status, output, _ = run(capsys, train, "--resume", "--epochs", "2", "--allow-changed-data")
    assert status == 0
    assert "pixel range  0 to 3000" in output


def test_check_data_reports_the_range(tmp_path, capsys):
    for name, scale, kind in (("wide", 4095, np.uint16), ("narrow", 255, np.uint8)):
        root = write_scans(tmp_path / name, scale, kind, "png")
        status, output, _ = run(capsys, check_data, root, "--workers", "0", "--save-plot", "")
        assert status == 0
        assert ("pixel range: 0 to 4095, scaled to 8 bits\n" in output) == (name == "wide")
