"""Read and write class_indices.json, label.txt and pickles."""

import json
import os
import pickle
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from cli_utils import DataError


def normalise(name: str) -> str:
    """Return a name in Unicode's composed form (NFC): macOS writes é as two characters, other systems as one."""
    return unicodedata.normalize("NFC", name)


def write_class_indices(class_names: Sequence[str], path: str | os.PathLike = "class_indices.json") -> None:
    """Write {"0": "daisy", ...} as JSON."""
    indices = {str(index): name for index, name in enumerate(class_names)}
    Path(path).write_text(json.dumps(indices, indent=4), encoding="utf-8")


def read_class_indices(path: str | os.PathLike = "class_indices.json") -> list[str]:
    """Read the class names from a class_indices.json, in index order.

    Raises:
        FileNotFoundError: the file is missing.
        DataError: it is not a JSON object of the form {"0": "daisy", "1": ...}, or names a class twice.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{os.fspath(path)}: no such file; train.py writes one to the folder of each run")
    wrong = DataError(f'{os.fspath(path)}: not of the form {{"0": "daisy", "1": "dandelion", ...}}')
    try:
        indices = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise wrong from error
    if not isinstance(indices, dict) or not all(isinstance(name, str) for name in indices.values()):
        raise wrong
    names = [indices.get(str(index)) for index in range(len(indices))]
    if not names or None in names:
        raise wrong
    if len({*map(normalise, names)}) < len(names):
        raise DataError(f"{os.fspath(path)}: names a class twice")
    return names


def read_label_file(
    images_dir: str | os.PathLike, class_names: Sequence[str]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Read `images_dir`/label.txt. Each line consists of a file name, white space and a class name.

    Both names may contain spaces: the class is the longest of `class_names` that follows the name of an existing file.

    Returns:
        (image path, class name) for each valid line, and a message for each invalid one.

    Raises:
        FileNotFoundError: the folder or its label.txt is missing.
        DataError: label.txt is not UTF-8 text.
    """
    labelled, problems = [], []
    for line in label_lines(images_dir):
        try:
            labelled.append(_read_label_line(line, Path(images_dir), class_names))
        except DataError as error:
            problems.append(f"{Path(images_dir) / 'label.txt'}: {error}")
    return labelled, problems


def label_lines(images_dir: str | os.PathLike) -> list[str]:
    """Read the non-empty lines of `images_dir`/label.txt. For errors, see `read_label_file`."""
    label_file = Path(images_dir) / "label.txt"
    if not Path(images_dir).is_dir():
        raise FileNotFoundError(f"{os.fspath(images_dir)}: no such folder")
    if not label_file.is_file():
        raise FileNotFoundError(f"{label_file}: no such file")
    try:
        lines = label_file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{label_file}: not UTF-8 text") from error
    return [line.strip() for line in lines if line.strip()]


def _read_label_line(line: str, images_dir: Path, class_names: Sequence[str]) -> tuple[str, str]:
    for class_name in sorted(class_names, key=len, reverse=True):
        name = _remove_class(line, class_name)
        file = _find_file(images_dir, name.rstrip())
        if name != line and name != name.rstrip() and file is not None:
            return str(file), class_name
    name, *class_name = line.rsplit(maxsplit=1)
    if not class_name:
        raise DataError(f"{line!r} is not a file name followed by a class name")
    known = next((known for known in class_names if _remove_class(line, known) != line), None)
    if known is None:
        raise DataError(f"unknown class {class_name[0]!r}")
    name = _remove_class(line, known).rstrip()
    raise DataError(
        f"{name!r} is outside the folder" if _escapes_folder(name) else f"no image file {name!r} in the folder"
    )


def _spellings(name: str) -> list[str]:
    """Return a name as it is, and with its accents composed and decomposed, see `normalise`."""
    return [name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]


def _remove_class(line: str, class_name: str) -> str:
    """Return `line` without `class_name` at its end, or unchanged if it ends otherwise."""
    return next((line.removesuffix(name) for name in _spellings(class_name) if line.endswith(name)), line)


def _find_file(folder: Path, name: str) -> Path | None:
    if not name or _escapes_folder(name):
        return None
    return next((folder / spelling for spelling in _spellings(name) if (folder / spelling).is_file()), None)


def _escapes_folder(name: str) -> bool:
    return Path(name).is_absolute() or ".." in Path(name).parts


def write_pickle(list_info: list, file_name: str | os.PathLike) -> None:
    """Pickle lists, tuples, dicts, strings and numbers."""
    with open(file_name, "wb") as file:
        pickle.dump(list_info, file)


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that rejects classes and functions, so that no code can run."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"contains {module}.{name}, but only plain values are allowed")


def read_pickle(file_name: str | os.PathLike) -> list:
    """Read a pickle written by `write_pickle`, without running any code in it.

    Raises:
        FileNotFoundError: the file is missing.
        DataError: it is not a pickle of lists, tuples, dicts, strings and numbers.
    """
    with open(file_name, "rb") as file:
        try:
            return _PlainUnpickler(file).load()
        except Exception as error:  # corrupt pickles raise nearly anything
            raise DataError(f"{os.fspath(file_name)}: not a pickle of plain values: {error}") from error
