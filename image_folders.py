"""Find the images in folders, and account for every file that is not used."""

import collections
import difflib
import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from class_files import normalise
from cli_utils import DataError, printable
from file_utils import read_json
from image_io import ImageError, conversion_advice, is_image_file

CHECK_CACHE = ".checked_images.json"  # in the runs folder: the cached results of checking image files

UNKNOWN_TYPE = "unknown file type"
NOT_IN_A_CLASS = "not in a class folder"
UNREADABLE = "unreadable"
UNUSED = "outside the training, validation and test folders"
UNSUPPORTED = "unsupported image format"


class Skipped(NamedTuple):
    """A file that is not used. `kind` is the reason in a few words, for counting; `reason` is the full reason."""

    path: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path!r}: {self.reason}"


def unreadable(path: str, error: ImageError) -> Skipped:
    """Describe an image that cannot be read."""
    return Skipped(path, UNREADABLE, str(error).removeprefix(f"cannot read image {path!r}: "))


def count_skipped(skipped: Sequence[Skipped]) -> str:
    """Describe skipped files in one line: "3 files: 2 unknown file type (.txt 2), 1 unreadable"."""
    reasons = collections.Counter(file.reason if file.kind == UNSUPPORTED else file.kind for file in skipped)
    suffixes = collections.Counter(
        Path(file.path).suffix.lower() or "no extension" for file in skipped if file.kind == UNKNOWN_TYPE
    )
    types = ", ".join(f"{printable(suffix)} {count}" for suffix, count in suffixes.most_common(5))
    details = {UNKNOWN_TYPE: f" ({types})"}
    counts = ", ".join(f"{count} {reason}{details.get(reason, '')}" for reason, count in reasons.most_common())
    return f"{len(skipped)} {'file' if len(skipped) == 1 else 'files'}: {counts}"


# --- folder -> images ---------------------------------------------------------------------------------------------


def list_images(folder: str | os.PathLike, skipped: list[Skipped]) -> list[str]:
    """List the images in a folder and all its sub-folders, sorted by name; those directly in a folder come first.

    Ignores hidden files and folders, __MACOSX and the runs folders of train.py. Follows links, but visits each folder
    only once.

    Args:
        skipped: receives the other files, and unreadable sub-folders.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: `folder` is missing, not a folder or unreadable.
    """
    images: list[str] = []
    seen: set[Path] = set()

    def visit(current: Path, entries: list[Path]) -> None:
        seen.add(current.resolve())
        folders = dict.fromkeys(path for path in entries if _is_folder(path))
        _add_files([path for path in entries if path not in folders], images, skipped)
        for path in folders:
            if not _is_ignored(path) and path.resolve() not in seen:
                try:
                    inside = list_visible(path)
                except OSError as error:
                    skipped.append(Skipped(str(path), UNREADABLE, str(error).removeprefix(f"{path}: ")))
                else:
                    visit(path, inside)

    visit(Path(folder), list_visible(folder))
    return images


def _add_files(files: Iterable[Path], images: list[str], skipped: list[Skipped]) -> None:
    """Append each file to `images` or to `skipped`."""
    for path in files:
        if is_image_file(path):
            images.append(str(path))
        elif advice := conversion_advice(path):
            skipped.append(Skipped(str(path), UNSUPPORTED, f"{UNSUPPORTED} {path.suffix.lower()} ({advice})"))
        else:
            skipped.append(Skipped(str(path), UNKNOWN_TYPE, UNKNOWN_TYPE))


def list_images_by_class(root: str | os.PathLike, skipped: list[Skipped], min_classes: int = 2) -> dict[str, list[str]]:
    """List the images per class. The classes are the names of the sub-folders of `root`, in Unicode's NFC, sorted.

    Args:
        skipped: receives the files that are not used.
        min_classes: the minimum number of classes.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: see `list_images`.
        DataError: too few classes, or a class without images.
    """
    folders = subfolders(root)
    if len(folders) < min_classes:
        found = f"only one, {folders[0].name}" if folders else "none"
        needed = "at least two sub-folders" if min_classes > 1 else "sub-folders"
        raise DataError(f"{os.fspath(root)}: needs {needed} of images, one per class; found {found}")
    images: dict[str, list[str]] = {name: [] for name in sorted({normalise(folder.name) for folder in folders})}
    others: list[Skipped] = []
    for folder in folders:
        images[normalise(folder.name)] += list_images(folder, others)
    if empty := [name for name, paths in images.items() if not paths]:
        raise DataError(_explain_empty(root, empty, others))
    skipped += list_loose_files(root)
    skipped += others
    return images


def _explain_empty(root: str | os.PathLike, empty: list[str], skipped: list[Skipped]) -> str:
    inside = [file for file in skipped if normalise(Path(file.path).relative_to(root).parts[0]) in empty]
    found = f", only {count_skipped(inside)}" if inside else ""
    advice = "if it is not a class, move that folder elsewhere"
    return f"{os.fspath(root)}: no image in class {', '.join(empty)}{found}; {advice}"


def list_loose_files(root: str | os.PathLike) -> list[Skipped]:
    """Return the files beside the class folders in `root`, none of which is used."""
    images: list[str] = []
    skipped: list[Skipped] = []
    _add_files([path for path in list_visible(root) if not _is_folder(path)], images, skipped)
    return [Skipped(path, NOT_IN_A_CLASS, NOT_IN_A_CLASS) for path in images] + skipped


def list_unused(folders: Iterable[Path]) -> list[Skipped]:
    """Return all files in `folders`, the folders beside those of the training and validation images."""
    files: list[Skipped] = []
    images = [path for folder in folders for path in list_images(folder, files)]
    return [Skipped(path, UNUSED, UNUSED) for path in images + [file.path for file in files]]


def subfolders(root: str | os.PathLike) -> list[Path]:
    """Return the sub-folders of `root` that may hold images, sorted by name."""
    return [path for path in list_visible(root) if _is_folder(path) and not _is_ignored(path)]


def list_visible(folder: str | os.PathLike) -> list[Path]:
    """Return the files and folders in `folder` that are not hidden, sorted by name.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: `folder` is missing, not a folder or unreadable.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: a file, not a folder of images or a .csv table")
    try:
        return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)
    except PermissionError as error:
        raise PermissionError(f"{folder}: no permission to read this folder") from error


def _is_ignored(folder: Path) -> bool:
    """Return whether a folder holds the metadata of a macOS archive or the runs of train.py."""
    return folder.name == "__MACOSX" or os.access(folder / CHECK_CACHE, os.F_OK)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a link into a folder without permission
        return False


# --- names and checksums ------------------------------------------------------------------------------------------


def likely_class(name: str, class_names: Sequence[str]) -> str | None:
    """Return the class whose name resembles `name`, ignoring case, spaces and punctuation; or None."""
    simple = {_simplify(known): known for known in class_names}
    match = difflib.get_close_matches(_simplify(name), simple, n=1, cutoff=0.8)
    return simple[match[0]] if match else None


def _simplify(name: str) -> str:
    letters = "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c.isalnum())
    return letters or name


def file_checksum(path: str) -> str | None:
    """Return a file's 128-bit BLAKE2b checksum in hexadecimal, or None if it is unreadable."""
    content = hashlib.blake2b(digest_size=16)
    try:
        if not Path(path).is_file():  # a pipe or a device may never end
            return None
        with open(path, "rb") as file:
            while chunk := file.read(2**20):
                content.update(chunk)
    except OSError:  # reported when the image is read
        return None
    return content.hexdigest()


class RunFile(NamedTuple):
    """An image of a run: CLASS/FILE, "train", "val" or "test", and the checksum."""

    name: str
    subset: str
    checksum: str


def read_run_files(path: Path) -> Iterator[RunFile]:
    """Yield the valid entries of a run's files.json, see `prepare_data.describe_files`; none if it is missing."""
    for name, versions in read_json(path).items():
        for version in versions if isinstance(versions, list) else []:
            match version:
                case ["train" | "val" | "test" as subset, str(checksum)] if checksum:
                    yield RunFile(name, subset, checksum)


def read_run_checksums(path: Path) -> dict[str, str]:
    """Read a run's files.json.

    Returns:
        "train" or "val" per checksum, "train" for a file that is in both; empty if there is no valid files.json.
    """
    subsets: dict[str, str] = {}
    for file in read_run_files(path):
        if file.subset != "test" and subsets.get(file.checksum) != "train":
            subsets[file.checksum] = file.subset
    return subsets
