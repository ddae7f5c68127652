"""Training, checking and predicting from a CSV table instead of a folder."""

import re
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import write_classes

import check_data
import predict
import train
from cli_utils import DataError
from dataset_split import find_split
from image_folders import count_skipped
from tables import is_table, read_table

pytestmark = pytest.mark.usefixtures("in_an_empty_folder", "small_network", "no_figures")
SMALL = ["--model", "resnet18", "--img-size", "32", "--batch-size", "4", "--workers", "0", "--epochs", "1"]


def write_table(path: Path, rows: list[list[str]], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    path.write_text("".join(delimiter.join(row) + "\n" for row in rows), encoding=encoding)
    return path


def describe(folder: Path, split: bool) -> Path:
    """Write a table beside `folder` that describes it, with or without the split of `find_split`."""
    found, _ = find_split(folder)
    subsets = dict.fromkeys(found.train_paths, "train") | dict.fromkeys(found.val_paths, "val")
    rows = [["label", "path"] + ["split"] * split]
    for path in sorted(subsets, reverse=True):
        relative = Path(path).relative_to(folder.parent)
        rows.append([Path(path).parent.name, str(relative)] + [subsets[path]] * split)
    return write_table(folder.parent / "table.csv", rows)


@pytest.mark.parametrize("split", [True, False])
def test_table_of_a_folder_gives_the_same_weights(two_classes, split):
    assert train.main(["--data-path", str(two_classes), *SMALL, "--name", "folder"]) == 0
    assert train.main(["--data-path", str(describe(two_classes, split)), *SMALL, "--name", "table"]) == 0
    one, other = (
        torch.load(Path("runs", name, "weights", "last.pth"), weights_only=True)["state_dict"]
        for name in ("folder", "table")
    )
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert train.main(["--resume", "table", "--epochs", "2"]) == 0


def test_check_data_and_predict_accept_a_table(two_classes, capsys):
    table = describe(two_classes, split=True)
    with table.open("a") as file:
        file.write("dog,pets/missing.png,train\n")
    assert check_data.main([str(table), "--workers", "0", "--save-plot", ""]) == 0
    output = capsys.readouterr().out
    assert "1 of 26 files skipped" in output
    assert f"{str(two_classes / 'missing.png')!r}: No such file" in output
    assert train.main(["--data-path", str(table), *SMALL]) == 0
    assert "skipped      1 file: 1 unreadable" in capsys.readouterr().out
    assert predict.main([str(table)]) == 1
    captured = capsys.readouterr()
    assert re.search(rf"{table}: accuracy .* of 5 validation images of the run\)", captured.out)
    assert "missing.png" in captured.err


def test_unknown_labels_are_reported_by_predict(two_classes, tmp_path, capsys):
    assert train.main(["--data-path", str(two_classes), *SMALL]) == 0
    capsys.readouterr()
    labels = {"pets/cat/cat 00.png": "Cat", "pets/cat/cat 01.png": "Cat", "pets/dog/dog 00.png": "", "cow.png": "cow"}
    shutil.copy(two_classes / "cat" / "cat 02.png", tmp_path / "cow.png")
    table = write_table(tmp_path / "new.csv", [["path", "label"], *map(list, labels.items())])
    assert predict.main([str(table)]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 4
    assert captured.err.splitlines()[-2:] == [
        f"predict.py: {table}: 2 images without a label: Cat is not a class; is it cat?",
        f"predict.py: {table}: 1 image without a label: cow is not a class",
    ]


def test_table_is_not_overwritten_by_the_output(two_classes, monkeypatch, capsys):
    table = describe(two_classes, split=False)
    content = table.read_bytes()
    assert check_data.main([str(table), "--save-plot", "", "--csv", f"{table.parent}/here/../table.csv"]) == 2
    assert "would overwrite an input table" in capsys.readouterr().err
    monkeypatch.chdir(table.parent)
    assert predict.main([str(table), "--csv", "table.csv"]) == 1
    assert "would overwrite an image or a table" in capsys.readouterr().err
    assert table.read_bytes() == content


def test_validation_table(two_classes, tmp_path):
    write_classes(tmp_path / "other", {"dog": 2})
    table = write_table(tmp_path / "val.csv", [["path", "label"], ["other/dog/dog 00.png", "dog"]])
    split, source = find_split(two_classes, table)
    assert (len(split.train_paths), split.val_labels, source) == (25, [1], f"from {table}")
    rows = [["path", "label", "split"], ["a.png", "cat", "train"], ["b.png", "dog", "train"], ["c.png", "cow", "val"]]
    with pytest.raises(DataError, match=r"classes missing from .*bad\.csv: cow"):
        find_split(write_table(tmp_path / "bad.csv", rows))


def test_validation_table_without_validation_images(two_classes, tmp_path):
    rows = [["path", "label", "split"], ["pets/dog/dog 00.png", "dog", "train"]]
    with pytest.raises(DataError, match=r"val\.csv: no row has the split val"):
        find_split(two_classes, write_table(tmp_path / "val.csv", rows))
    table = describe(two_classes, split=True)
    with pytest.raises(DataError, match=r"table\.csv: is both the training and the validation table; omit --val-path"):
        find_split(table, table)


def test_rows_outside_the_split_are_reported(tmp_path):
    names = ["train", "train", "val", "test", "Validation"]
    rows = [["path", "label", "split"], *([f"{n}.png", "ab"[n % 2], name] for n, name in enumerate(names))]
    table = write_table(tmp_path / "table.csv", rows)
    split, _ = find_split(table)
    assert [len(paths) for paths, _ in split.subsets.values()] == [2, 2, 1]
    assert split.skipped == []
    other = write_table(tmp_path / "other.csv", [["path", "label"], ["5.png", "a"]])
    split, _ = find_split(table, other)
    assert [len(paths) for paths, _ in split.subsets.values()] == [2, 1, 1]
    assert count_skipped(split.skipped) == "2 files: 2 outside the training, validation and test folders"
    rows = [["path", "label", "split"], ["5.png", "a", "val"], ["6.png", "a", "train"], ["7.png", "a", "test"]]
    split, _ = find_split(table, write_table(tmp_path / "other.csv", rows))
    assert sorted(Path(file.path).name for file in split.skipped) == ["2.png", "4.png", "6.png", "7.png"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_spreadsheet_dialects(tmp_path, delimiter, encoding):
    decomposed = unicodedata.normalize("NFD", "rosé")
    rows = [["Path ", "LABEL", "note"], ["b.png", decomposed, "x"], ["", " ", ""], [" a.png ", "rosé"]]
    table = write_table(tmp_path / "a.CSV", rows, delimiter, encoding)
    assert is_table(table)
    assert [(Path(row.path).name, row.label, row.subset) for row in read_table(table)] == [
        ("a.png", "rosé", ""),
        ("b.png", "rosé", ""),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs a column 'path' in its first line; found nothing"),
        ("file,label\na.png,cat\n", "needs a column 'path' in its first line; found 'file', 'label'"),
        ("path\na.png\n", "needs a column 'label'"),
        ("path,label,Label\na.png,cat,1\n", "has several columns 'label'"),
        ("path,label\n", "lists no images"),
        ("path,label\na.png,cat\n,dog\n", "line 3: the path is empty"),
        ("path,label\n\na.png,\n", "line 3: the label is empty"),
        ("path,label\na\0.png,cat\n", "not a CSV table in UTF-8: line contains NUL"),
        ("path,label\na.png\n", "line 2: the label is empty"),
        ("path,label\na.png,cat,b.png,dog\n", "line 2: has 4 fields instead of 2"),
        ('path,label\na.png,"cat\nb.png,dog\n', "not a CSV table in UTF-8: unexpected end of data"),
        ("path,label,split\na.png,cat,tain\n", "line 2: the split is 'tain'; it must be train, val or test"),
        ("path,label\na.png,cat\nb.png,dog\na.png,dog\n", "line 4: 'a.png' is already listed in line 2"),
        ("path,label\na.png,cat\n", "needs training images of at least two labels; found only one, cat"),
        ('path,label\n"a.png,cat\n' + "x" * 200_000, "not a CSV table in UTF-8"),
    ],
)
def test_invalid_tables_are_one_line_errors(tmp_path, capsys, text, message):
    (tmp_path / "table.csv").write_text(text)
    assert train.main(["--data-path", str(tmp_path / "table.csv"), *SMALL]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / 'table.csv'}" in error
    assert message in error
    assert not Path("runs").exists()


def test_missing_or_binary_table(tmp_path):
    (tmp_path / "table.tsv").write_text("path\tlabel\n")
    with pytest.raises(NotADirectoryError, match=r"table\.tsv: a file, not a folder of images or a \.csv table"):
        find_split(tmp_path / "table.tsv")
    with pytest.raises(FileNotFoundError, match="no such table"):
        find_split(tmp_path / "nowhere.csv")
    for content in (b"path,label\n\xff\xfe\n", "path\tlabel\na.png\tcat\n".encode("utf-16")):
        (tmp_path / "table.csv").write_bytes(content)
        with pytest.raises(DataError, match=r'not a CSV table in UTF-8.*save it as "CSV UTF-8"'):
            find_split(tmp_path / "table.csv")
    write_classes(tmp_path / "folder.csv", {"cat": 5, "dog": 5})
    assert find_split(tmp_path / "folder.csv")[0].class_names == ["cat", "dog"]
