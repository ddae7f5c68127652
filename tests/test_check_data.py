"""The command line of check_data.py, and its search for near-identical images."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from conftest import write_classes
from PIL import ExifTags, Image

import check_data
import plot_utils
from sample_flowers import draw_sample

KINDS = ["daisy", "dandelion", "roses", "sunflowers", "tulips"]
ROOT = Path(check_data.__file__).parent


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    """Draw 500 distinct flowers of 64 px, 100 per class."""
    return draw_sample(tmp_path_factory.mktemp("drawn") / "flowers", images_per_class=100, size=64)


@pytest.fixture
def flowers(tmp_path, drawn) -> Path:
    """Copy 20 images per class into a folder that the test may change."""
    for kind in KINDS:
        (tmp_path / "flowers" / kind).mkdir(parents=True)
        for path in sorted((drawn / kind).iterdir())[:20]:
            shutil.copy(path, tmp_path / "flowers" / kind)
    return tmp_path / "flowers"


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch) -> Path:
    """Change to an empty folder and return it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def run(capsys, *argv, plot: str = "") -> tuple[int, str, str]:
    """Run check_data.py, by default without a figure; return its exit status, standard output and standard error."""
    try:
        status = check_data.main([*map(str, argv), "--save-plot", plot])
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def groups_of(capsys, folder, *argv) -> dict[frozenset[str], tuple[str, str, str]]:
    """Map the paths of each group to its kind, conflict and leak columns in the CSV file."""
    run(capsys, folder, "--csv", "groups.csv", *argv)
    with open("groups.csv", newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return {
        frozenset(row["path"] for row in part): (part[0]["kind"], part[0]["conflict"], part[0]["leak"])
        for part in groups.values()
    }


def copies(path: Path) -> dict[str, tuple[Image.Image, dict]]:
    """Return typical copies of an image: file-name suffix -> (image, options for saving)."""
    image = Image.open(path).convert("RGB")
    found = {f"_q{quality}.jpg": (image, {"quality": quality}) for quality in (30, 50, 75, 95)}
    found |= {".png": (image, {}), "_30.webp": (image, {"quality": 30}), ".webp": (image, {"quality": 80})}
    for scale in (0.5, 0.9, 1.1, 2):
        size = (round(image.width * scale), round(image.height * scale))
        found[f"_{scale}.png"] = (image.resize(size, Image.Resampling.BICUBIC), {})
        found[f"_{scale}.jpg"] = (image.resize(size, Image.Resampling.BICUBIC), {"quality": 75})
    turned = image.transpose(Image.Transpose.ROTATE_90)  # as a camera stores it, with an EXIF tag
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    found["_turned.jpg"] = (turned, {"quality": 90, "exif": exif})
    return found


def test_drawn_flowers_have_no_duplicates(capsys, drawn):
    status, output, errors = run(capsys, drawn)
    assert (status, errors) == (0, "")
    assert "500 images were found" in output
    assert output.splitlines()[-1].startswith("no label conflicts: 0 pictures in several classes, 0 in several subsets")
    assert "0 duplicated in total; 0 of 500 files skipped" in output
    for kind in KINDS:
        assert f"{kind:10}        80          20" in output
    assert "size in pixels: smallest 64 x 64, median 64 x 64, largest 64 x 64" in output
    assert "shorter side below 224 px: 500" in output
    assert "mode: RGB 500\nformat: JPEG 500\n" in output


def test_all_copies_are_found(capsys, flowers):
    expected = {}
    for number, kind in enumerate(KINDS):
        path = flowers / kind / f"{kind}_{number:03d}.jpg"
        group = {f"{kind}/{path.name}"}
        for end, (image, options) in copies(path).items():
            name = f"{path.stem}{end}"
            image.save(flowers / kind / name, **options)
            group.add(f"{kind}/{name}")
        expected[frozenset(group)] = ("near-identical", "0", "0")
    assert groups_of(capsys, flowers, "--val-rate", "0") == expected


def test_conflicts_leaks_and_other_duplicates(capsys, tmp_path, flowers):
    val = tmp_path / "val"
    for kind in KINDS:
        (val / kind).mkdir(parents=True)
        shutil.move(flowers / kind / f"{kind}_019.jpg", val / kind)

    def smaller(path: Path, copy: Path) -> None:
        Image.open(path).resize((58, 58)).save(copy, quality=60)

    shutil.copy(flowers / "daisy/daisy_000.jpg", flowers / "roses/another.jpg")  # conflict
    smaller(flowers / "daisy/daisy_001.jpg", flowers / "tulips/small.jpg")  # conflict
    smaller(flowers / "roses/roses_002.jpg", val / "tulips/both.jpg")  # conflict and leak
    shutil.copy(flowers / "roses/roses_003.jpg", val / "roses/same.jpg")  # leak
    smaller(flowers / "roses/roses_004.jpg", val / "roses/small.jpg")  # leak
    shutil.copy(flowers / "tulips/tulips_005.jpg", flowers / "tulips/twice.jpg")
    smaller(flowers / "tulips/tulips_006.jpg", flowers / "tulips/tulips 6.jpg")

    expected = {
        frozenset({"daisy/daisy_000.jpg", "roses/another.jpg"}): ("identical", "1", "0"),
        frozenset({"daisy/daisy_001.jpg", "tulips/small.jpg"}): ("near-identical", "1", "0"),
        frozenset({"roses/roses_002.jpg", f"{val}/tulips/both.jpg"}): ("near-identical", "1", "1"),
        frozenset({"roses/roses_003.jpg", f"{val}/roses/same.jpg"}): ("identical", "0", "1"),
        frozenset({"roses/roses_004.jpg", f"{val}/roses/small.jpg"}): ("near-identical", "0", "1"),
        frozenset({"tulips/tulips_005.jpg", "tulips/twice.jpg"}): ("identical", "0", "0"),
        frozenset({"tulips/tulips_006.jpg", "tulips/tulips 6.jpg"}): ("near-identical", "0", "0"),
    }
    found = groups_of(capsys, flowers, "--val-path", val)
    assert found == expected
    about = [(conflict, leak) for _, conflict, leak in found.values()]
    assert about == [("1", "1"), ("1", "0"), ("1", "0"), ("0", "1"), ("0", "1"), ("0", "0"), ("0", "0")]
    status, output, _ = run(capsys, flowers, "--val-path", val)
    assert status == 1
    lines = output.splitlines()
    titles = [
        "LABEL CONFLICT: the same picture in several classes: 3",
        "LEAK: the same picture in several of training, validation and test: 2",
        "DUPLICATE: the same picture more than once in a class: 2",
    ]
    assert [line for line in lines if line in titles] == titles
    at = lines.index("    daisy/daisy_000.jpg  (daisy, training)")
    assert lines[at - 1 : at + 2 : 2] == ["  identical:", "    roses/another.jpg  (roses, training)"]
    assert lines.index("  near-identical, also a LEAK:") < lines.index(titles[1])
    assert lines.index(titles[1]) < lines.index(f"    {val}/roses/same.jpg  (roses, validation)")
    assert lines[-1].startswith("LABEL CONFLICTS: 3 pictures in several classes, 3 in several subsets, 7 ")


def test_validating_on_a_copy_of_the_training_folder_leaks(capsys, flowers, tmp_path):
    status, _, errors = run(capsys, flowers, "--val-path", flowers)
    assert status == 2
    assert "is both the training and the validation folder" in errors
    copy = shutil.copytree(flowers, tmp_path / "copy")
    status, output, _ = run(capsys, flowers, "--val-path", copy)
    assert status == 0
    assert "LEAK: the same picture in several of training, validation and test: 100" in output
    assert output.count("  identical:\n") == 20
    assert "... and 80 more groups (--csv lists them all)" in output
    assert len(groups_of(capsys, flowers, "--val-path", copy)) == 100


def test_train_and_val_sub_folders(capsys, tmp_path, flowers):
    shutil.copytree(flowers, tmp_path / "data" / "train")
    (tmp_path / "data" / "val" / "roses").mkdir(parents=True)
    shutil.copy(flowers / "roses" / "roses_000.jpg", tmp_path / "data" / "val" / "roses" / "x.jpg")
    expected = {frozenset({"train/roses/roses_000.jpg", "val/roses/x.jpg"}): ("identical", "0", "1")}
    assert groups_of(capsys, tmp_path / "data") == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_files_are_listed(capsys, flowers, workers):
    for number in range(11):
        (flowers / "daisy" / f"broken {number:02d}.jpg").write_bytes(b"not an image")
    (flowers / "daisy" / "bad\x1bname.jpg").write_bytes(b"")
    status, output, errors = run(capsys, flowers, "--workers", workers, "--val-rate", "0")
    assert (status, errors) == (0, "")
    assert "skipped 12 files: 12 unreadable\n" in output
    assert "broken 08.jpg': not an image, or of an unknown format\n" in output
    assert "broken 09.jpg" not in output
    assert "bad\\x1bname.jpg" in output
    assert "\x1b" not in output
    assert "  ... and 2 more files\n" in output
    assert output.splitlines()[-1].endswith("0 duplicated in total; 12 of 112 files skipped")


def test_summary_of_sizes_modes_formats_and_classes(capsys, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    pictures = {"a.png": (300, 250), "b.bmp": (30, 310), "c.tif": (90, 20)}
    for kind in ("a", "b"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    for name, (width, height) in pictures.items():
        Image.fromarray(noise[:height, :width]).save(tmp_path / "data" / "a" / name)
    Image.fromarray(noise[:230, 100:]).convert("CMYK").save(tmp_path / "data" / "b" / "d.jpg")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    Image.fromarray(noise[:50, :290]).convert("L").save(tmp_path / "data" / "b" / "e.jpg", exif=exif)  # 50 x 290 px
    for number in range(20):
        Image.fromarray(noise[number * 10 :, :240]).save(tmp_path / "data" / "a" / f"more {number}.png")
    _, output, _ = run(capsys, tmp_path / "data", "--val-rate", "0")
    assert "size in pixels: smallest 90 x 20" in output
    assert "largest 300 x 250" not in output
    assert "largest 240 x 400" in output
    assert "skipped 1 file: 1 aspect ratio above 10\n" in output
    assert "mode: RGB 22, CMYK 1, L 1\nformat: PNG 21, JPEG 2, TIFF 1\n" in output
    assert "very unbalanced: a has 11 times as many training images as b" in output


def test_figure(capsys, tmp_path, somewhere_else, flowers):
    shutil.copy(flowers / "daisy/daisy_000.jpg", flowers / "roses/$x^2$ another.jpg")
    status, output, _ = run(capsys, flowers, plot="data_health.png")
    assert status == 1
    assert "figure: data_health.png\n" in output
    with_pairs = matplotlib.image.imread(somewhere_else / "data_health.png")
    (flowers / "roses/$x^2$ another.jpg").unlink()
    status, _, _ = run(capsys, flowers, plot="data_health.png")
    assert (status, [path.name for path in somewhere_else.iterdir()]) == (0, ["data_health.png"])
    assert matplotlib.image.imread(somewhere_else / "data_health.png").shape[0] < with_pairs.shape[0]
    assert {path.name for path in flowers.iterdir()} == set(KINDS)
    run(capsys, flowers)
    assert [path.name for path in somewhere_else.iterdir()] == ["data_health.png"]


@pytest.mark.parametrize("classes", [2, 100])
def test_figure_labels_do_not_overlap(classes):
    names = [f"a rather long name $x^{{{i}}}$ of a class, the {i}th" for i in range(classes)]
    picture = np.zeros((50, 70, 3), dtype=np.uint8)
    pair = ([picture, picture.transpose(1, 0, 2)], names[:2], ["a_file_name_that_does_not_end.jpg"] * 2)
    sizes = np.array([[300, 200], [4000, 3000], [20, 300]])
    figure = plot_utils.data_health(
        names, {"training": [100] * classes, "validation": [20] * classes}, sizes, [pair] * 3
    )
    figure.draw_without_rendering()
    texts = []
    for axes in (axes for part in figure.subfigs for axes in part.axes):
        low, high = sorted(axes.get_ylim())
        ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
        texts += [label for tick, label in ticks if low <= tick <= high]  # the others are not drawn
        texts += [axes.title, axes.xaxis.label]
    boxes = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]
    assert len(boxes) > classes + 12
    assert not [1 for i, box in enumerate(boxes) for other in boxes[:i] if box.overlaps(other)]
    room = figure.bbox.padded(5)  # the layout is a few pixels off in a figure of 2,600 px
    boxes = [box for box in boxes if room.fully_overlaps(box)]  # drops tick labels beyond an axis
    assert len(boxes) > classes + 12
    assert all(room.contains(*corner) for box in boxes for corner in (box.min, box.max))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["{data}/cat"], "needs at least two sub-folders"),
        (["{data}", "--val-rate", "1"], "--val-rate: '1' is invalid; it must be at least 0 and below 1"),
        (["{data}", "--workers", "-1"], "--workers: '-1' is invalid; it must be at least 0"),
        (["{data}", "--val-path", "nowhere"], "nowhere: no such folder"),
        (["{data}", "--csv", "x.txt"], "--csv x.txt: name a .csv file in an existing folder"),
        (["{data}", "--csv", "{data}/cat/x.csv"], "is inside the data"),
        (["{data}", "--csv", "nowhere/x.csv"], "name a .csv file in an existing folder"),
    ],
)
def test_invalid_arguments_are_rejected(capsys, two_classes, flags, reason):
    status, output, errors = run(capsys, *[flag.format(data=two_classes) for flag in flags])
    assert (status, output) == (2, "")
    assert reason in errors
    assert errors.count("\n") == 1


def test_class_without_usable_images(capsys, two_classes):
    for path in (two_classes / "cat").iterdir():
        path.write_bytes(b"")
    status, output, errors = run(capsys, two_classes)
    assert status == 2
    assert "skipped 10 files: 10 unreadable" in output
    assert errors == (
        f"check_data.py: error: class cat: no usable training images; "
        f"{str(two_classes / 'cat' / 'cat 00.png')!r}: not an image, or of an unknown format\n"
    )


def test_no_usable_validation_images(capsys, two_classes, tmp_path):
    (tmp_path / "val" / "cat").mkdir(parents=True)
    (tmp_path / "val" / "cat" / "broken.png").write_bytes(b"")
    status, output, errors = run(capsys, two_classes, "--val-path", tmp_path / "val")
    assert status == 2
    assert "skipped 1 file: 1 unreadable" in output
    broken = str(tmp_path / "val" / "cat" / "broken.png")
    reason = "not an image, or of an unknown format"
    assert errors == f"check_data.py: error: no usable validation images; {broken!r}: {reason}\n"


def test_figure_is_not_written_into_the_data(capsys, two_classes, monkeypatch):
    status, _, errors = run(capsys, two_classes, plot=str(two_classes / "cat" / "x.png"))
    assert (status, "is inside the data" in errors) == (2, True)
    monkeypatch.chdir(two_classes)  # allowed in the current directory
    assert run(capsys, ".", plot="data_health.png")[0] == 0
    assert Path("data_health.png").is_file()


def test_names_are_escaped(capsys, tmp_path):
    data = write_classes(tmp_path / "data", {"a\x1b[31m": 3, "b": 3})
    shutil.copy(data / "b" / "b 00.png", data / "a\x1b[31m" / "\n.png")
    status, output, _ = run(capsys, data, "--val-rate", "0", plot="out.svg")
    assert status == 1
    assert "a\\x1b[31m/\\n.png" in output
    assert "\x1b" not in output + Path("out.svg").read_text(encoding="utf-8")


def test_csv_file_is_written_atomically(capsys, two_classes, somewhere_else, monkeypatch):
    shutil.copy(two_classes / "cat" / "cat 00.png", two_classes / "dog")
    Path("x.csv").write_text("from before")

    def full(writer: csv.DictWriter, rows: list) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(csv.DictWriter, "writerows", full)
        status, _, errors = run(capsys, two_classes, "--csv", "x.csv")
    assert status == 2
    assert "No space left on device" in errors
    assert [(path.name, path.read_text()) for path in somewhere_else.iterdir()] == [("x.csv", "from before")]


def test_command_line(two_classes, somewhere_else):
    shutil.copy(two_classes / "cat" / "cat 00.png", two_classes / "dog")
    done = subprocess.run(
        [sys.executable, ROOT / "check_data.py", two_classes], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[-1].startswith("LABEL CONFLICTS: 1 ")
    assert (somewhere_else / "data_health.png").is_file()
