"""Read a CSV table that lists images and their labels."""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from class_files import normalise
from cli_utils import DataError

DELIMITERS = ",;\t"
SUBSETS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
SUBSETS |= {"test": "test", "testing": "test"}


class Row(NamedTuple):
    """An image: its path, its label or "", and its subset: "train", "val", "test", or "" if there is no split."""

    path: str
    label: str
    subset: str


def is_table(path: str | os.PathLike) -> bool:
    """Return whether a path names a table and not a folder."""
    return Path(path).suffix.lower() == ".csv" and not Path(path).is_dir()


def read_table(path: str | os.PathLike, needs_labels: bool = True) -> list[Row]:
    """Read a table with the columns `path`, `label` and, optionally, `split`.

    Paths are relative to the table's folder. Fields are separated by commas, semicolons or tabs.

    Args:
        needs_labels: whether a missing label is an error.

    Returns:
        The rows, sorted by label and path. Labels are in Unicode's NFC.

    Raises:
        FileNotFoundError: the table is missing.
        DataError: a column is missing or a row is invalid; the message names its line.
    """
    rows, lines = [], {}
    required = ("path", "label") if needs_labels else ("path",)
    for where, row in read_rows(path, required, required):
        if row.get("split", "train").lower() not in SUBSETS:
            raise DataError(f"{where}: the split is {row['split']!r}; it must be train, val or test")
        image = str(Path(path).parent / row["path"])
        if image in lines:
            raise DataError(f"{where}: {row['path']!r} is already listed in line {lines[image]}")
        lines[image] = where.rpartition(" ")[2]
        subset = SUBSETS[row["split"].lower()] if "split" in row else ""
        rows.append(Row(image, normalise(row.get("label", "")), subset))
    return sorted(rows, key=lambda row: (row.label, row.path))


def read_rows(
    path: str | os.PathLike, columns: Sequence[str], filled: Sequence[str]
) -> list[tuple[str, dict[str, str]]]:
    """Read the rows of a CSV table of images.

    Args:
        columns: the columns that the table must have.
        filled: the columns that must not be empty.

    Returns:
        For each row its place, "FILE, line N", and its fields by the lower-case names of the columns.

    Raises:
        FileNotFoundError, DataError: see `read_table`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{os.fspath(path)}: no such table")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            delimiter = max(DELIMITERS, key=header.count)
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            rows = list(_parse_rows(reader, os.fspath(path), columns, filled))
    except (UnicodeDecodeError, csv.Error) as error:
        advice = 'save it as "CSV UTF-8" in the spreadsheet'
        raise DataError(f"{os.fspath(path)}: not a CSV table in UTF-8: {error}; {advice}") from error
    if not rows:
        raise DataError(f"{os.fspath(path)}: lists no images")
    return rows


def _parse_rows(
    reader: "csv._reader", path: str, required: Sequence[str], filled: Sequence[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    columns = [name.strip().lower() for name in next(reader, [])]
    if missing := [name for name in required if name not in columns]:
        found = ", ".join(map(repr, columns)) or "nothing"
        raise DataError(f"{path}: needs a column {missing[0]!r} in its first line; found {found}")
    if repeated := [name for name in (*required, "label", "split") if columns.count(name) > 1]:
        raise DataError(f"{path}: has several columns {repeated[0]!r}; keep one of them")
    for cells in reader:
        if not any(map(str.strip, cells)):
            continue
        where = f"{path}, line {reader.line_num}"
        if len(cells) > len(columns):
            raise DataError(f"{where}: has {len(cells)} fields instead of {len(columns)}")
        cells += [""] * (len(columns) - len(cells))  # some spreadsheets omit empty fields at the end of a row
        row = {name: cell.strip() for name, cell in zip(columns, cells, strict=True)}
        if empty := [name for name in filled if not row[name]]:
            raise DataError(f"{where}: the {empty[0]} is empty")
        if "\0" in row["path"]:
            raise csv.Error("line contains NUL")  # as Python 3.10 does
        yield where, row
