"""--corrections: verdicts on labels."""

import json
from pathlib import Path

import pytest
from conftest import write_classes
from shortcuts import NAMES

import check_data
import evaluate
import train
from cli_utils import DataError
from corrections import Corrections
from dataset_split import find_split
from labelled_images import ImageFile

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def write_verdicts(path, verdicts: dict[object, str]):
    lines = [f'"{image}","{verdict}"' for image, verdict in verdicts.items()]
    path.write_text("\n".join(["path,verdict", *lines]), encoding="utf-8")
    return path


@pytest.fixture
def pets(tmp_path):
    return write_classes(tmp_path / "pets", {"cat": 5, "dog": 5})


def test_labels_change_and_images_are_dropped_but_the_split_stays(pets, tmp_path, capsys):
    before, _ = find_split(pets)
    train_image, dropped, ok, val_image = *before.train_paths[:3], before.val_paths[0]
    verdicts = {train_image: "dog", dropped: "Drop", ok: "OK", val_image: "dog", before.train_paths[3]: ""}
    after = Corrections(write_verdicts(tmp_path / "v.csv", verdicts)).correct_split(before)
    assert (after.train_paths, after.val_paths) == (
        [path for path in before.train_paths if path != dropped],
        before.val_paths,
    )
    assert after.train_labels == [1, *before.train_labels[2:]]
    assert after.val_labels == [1, *before.val_labels[1:]]
    assert [file.path for file in after.skipped] == [dropped]
    assert "2 labels changed, 1 images dropped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "path,verdict\n{cat},dogs",
            "line 2: the verdict is 'dogs'; it must be a class, ok or drop; did you mean dog",
        ),
        ("path,verdict\n{cat},7", "line 2: the verdict is '7'; it must be a class, ok or drop"),
        ("path,verdict\nmissing.png,dog", "none of its 1 images with a verdict is in the data"),
        ("path,verdict\n{cat},", "contains no verdict"),
        ("path,label\n{cat},dog", "needs a column 'verdict'"),
        ("path,verdict\n", "lists no images"),
    ],
)
def test_invalid_tables_are_errors(pets, tmp_path, content, message):
    table = tmp_path / "v.csv"
    table.write_text(content.format(cat=pets / "cat" / "cat 00.png"), encoding="utf-8")
    with pytest.raises(DataError) as error:
        Corrections(table).correct_split(find_split(pets)[0])
    assert message in str(error.value)


def test_class_without_images_is_an_error(pets, tmp_path):
    split, _ = find_split(pets)
    table = write_verdicts(tmp_path / "v.csv", dict.fromkeys(split.train_paths[:4], "dog"))
    with pytest.raises(DataError, match="class cat: no usable training images"):
        Corrections(table).correct_split(split)


def test_unused_verdicts_are_reported(pets, tmp_path, capsys):
    table = write_verdicts(tmp_path / "v.csv", {pets / "cat" / "cat 00.png": "dog", "elsewhere.png": "cat"})
    Corrections(table).correct_split(find_split(pets)[0])
    assert "1 verdicts refer to images that are not in the data: " in (output := capsys.readouterr().out)
    assert output.rstrip().endswith("v.csv, line 3")


def test_verdict_that_is_a_class_means_the_class(tmp_path, capsys):
    root = write_classes(tmp_path / "parts", {"OK": 3, "defect": 3})
    verdicts = {root / "defect" / "defect 00.png": "ok", root / "OK" / "OK 00.png": "defect"}
    verdicts[root / "OK" / "OK 01.png"] = "OK"
    split = Corrections(write_verdicts(tmp_path / "v.csv", verdicts)).correct_split(find_split(root)[0])
    names = dict(zip(split.train_paths + split.val_paths, split.train_labels + split.val_labels, strict=True))
    expected = {"defect 00.png": 0, "OK 00.png": 1, "OK 01.png": 0}
    assert {path.name: names[str(path)] for path in verdicts} == expected
    assert "2 labels changed" in (output := capsys.readouterr().out)
    assert "the verdict OK means the class OK" in output


def test_verdict_on_a_link_leaves_other_links_alone(tmp_path):
    root = write_classes(tmp_path / "pets", {"cat": 3, "dog": 3})
    (root / "dog" / "link.png").symlink_to(root / "cat" / "cat 00.png")
    (tmp_path / "moved").symlink_to(root)
    table = write_verdicts(tmp_path / "v.csv", {"moved/dog/link.png": "drop"})
    split = Corrections(table).correct_split(find_split(root)[0])
    assert [Path(file.path).name for file in split.skipped] == ["link.png"]
    assert len(split.train_paths + split.val_paths) == 6


def test_dropping_all_images_is_an_error(pets, tmp_path):
    files = [ImageFile(str(path), "cat", str(pets)) for path in (pets / "cat").iterdir()]
    table = write_verdicts(tmp_path / "v.csv", {file.path: "drop" for file in files})
    with pytest.raises(DataError, match="its verdicts drop every image"):
        Corrections(table).correct_files(files, ["cat", "dog"])


def test_programs_apply_corrections(pets, sample, weights, tmp_path, capsys, monkeypatch, no_figures, small_network):
    cat = pets / "cat" / "cat 00.png"
    table = write_verdicts(tmp_path / "v.csv", {cat: "dog", pets / "cat" / "cat 01.png": "drop"})
    assert check_data.main([str(pets), "--corrections", str(table), "--workers", "0", "--save-plot", ""]) == 0
    assert "9 images were found" in capsys.readouterr().out
    flags = ["--data-path", str(pets), "--model", "resnet18", "--img-size", "32", "--epochs", "1", "--workers", "0"]
    assert train.main([*flags, "--device", "cpu", "--name", "a", "--corrections", str(table)]) == 0
    output = capsys.readouterr().out
    assert "corrections  1 labels changed, 1 images dropped" in output
    content = json.loads((tmp_path / "here" / "runs" / "a" / "args.json").read_text())
    assert content["flags"]["corrections"] == str(table)
    assert len(content["corrections_checksum"]) == 32
    table.write_text(table.read_text().replace('"drop"', '"dog"'))
    assert train.main(["--resume", "a", "--epochs", "2"]) == 1
    assert "the table has changed since the run started; restore it" in capsys.readouterr().err
    assert train.main(["--resume", "a", "--epochs", "2", "--allow-changed-data"]) == 0
    now = json.loads((tmp_path / "here" / "runs" / "a" / "args.json").read_text())
    assert now["corrections_checksum"] != content["corrections_checksum"]
    assert now | {"corrections_checksum": content["corrections_checksum"]} == content
    before = table.read_text()
    assert check_data.main([str(pets), "--corrections", str(table), "--csv", str(table), "--save-plot", ""]) == 2
    assert table.read_text() == before
    capsys.readouterr()

    rose = next((sample / "roses").iterdir())
    table = write_verdicts(tmp_path / "w.csv", {rose: "tulips"})
    before, after = {}, {}
    for report, corrections in (before, []), (after, ["--corrections", str(table)]):
        flags = [str(sample), "--weights", str(weights), "--device", "cpu", "--output", "", "--json", *corrections]
        assert evaluate.main(flags) == 0
        report |= json.loads(capsys.readouterr().out)
    counts = {name: after["classes"][name]["images"] - before["classes"][name]["images"] for name in NAMES}
    assert counts == dict.fromkeys(NAMES, 0) | {"roses": -1, "tulips": 1}


def test_contradicting_verdicts_are_an_error(pets, tmp_path):
    cat = pets / "cat" / "cat 00.png"
    (tmp_path / "v.csv").write_text(f"path,verdict\n{cat},dog\n{cat},dog\n{cat},ok\n")
    with pytest.raises(DataError, match=r"line 4: another verdict on .*cat 00.png than in .*v.csv, line 2"):
        Corrections(tmp_path / "v.csv")
