"""--corrections: verdicts on labels."""

import json

import pytest
from conftest import write_classes
from shortcuts import NAMES

import check_data
import evaluate
import train
from cli_utils import DataError
from corrections import Corrections
from dataset_split import find_split

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
    assert "1 images with a verdict are not in the data" in capsys.readouterr().out


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
    assert "restore them" in capsys.readouterr().err

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
