"""Find the images named on the command line, and their labels."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from class_files import normalise
from cli_utils import DataError, UsageError, print_note
from image_folders import UNREADABLE, UNSUPPORTED, Skipped, count_skipped, likely_class, list_images
from tables import is_table, read_table

TEST_FILE = "test_images.json"  # in a run's folder: the paths and labels of its test images


class ImageFile(NamedTuple):
    """An image to classify.

    Attributes:
        label: the class that a folder or a table names, if any.
        argument: the command-line argument that the image belongs to.
        unknown_label: the label in a table if it is not a class.
    """

    path: str
    label: str | None
    argument: str
    unknown_label: str = ""


class ErrorLog:
    """Prints warnings and errors to standard error, and counts the errors."""

    def __init__(self, program: str) -> None:
        self.program, self.failures = program, 0

    def warn(self, message: object) -> None:
        """Print a message that does not change the exit status."""
        print_note(f"{self.program}: {message}")

    def fail(self, error: object) -> None:
        """Print an error, which makes the exit status 1."""
        self.warn(error)
        self.failures += 1


def find_images(argument: str, class_names: list[str], skipped: list[Skipped]) -> list[ImageFile]:
    """List an image, or all images in a table or below a folder.

    In a folder, the first sub-folder named after a class labels its images.

    Args:
        skipped: receives the other files, and unreadable sub-folders.

    Raises:
        FileNotFoundError: the file or folder is missing.
        DataError: the folder has no images, or the table is invalid.
    """
    root = Path(argument)
    known = {normalise(name): name for name in class_names}
    if argument and is_table(root):
        rows = read_table(root, needs_labels=False)
        return [
            ImageFile(row.path, known.get(row.label), argument, "" if row.label in known else row.label) for row in rows
        ]
    if not argument or not root.exists():  # "" is an unset shell variable; Path("") is the current folder
        raise FileNotFoundError(f"{argument!r}: no such file or folder")
    if not root.is_dir():
        return [ImageFile(argument, None, argument)]
    files = []
    for path in list_images(root, skipped):
        folders = map(normalise, Path(path).relative_to(root).parts[:-1])
        files.append(ImageFile(path, next((known[name] for name in folders if name in known), None), argument))
    if not files:
        found = f", only {count_skipped(skipped)}" if skipped else ""
        raise DataError(f"{argument!r}: no images in this folder{found}")
    return files


def require_outside(flag: str, folder: Path, files: Iterable[str]) -> None:
    """Raise a UsageError if an output folder contains one of `files`, is one of them, or is inside one.

    Args:
        files: the images, or the folders that are searched for them.
    """
    for file in files:
        inner, outer = folder.resolve(), Path(file).resolve()
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise UsageError(f"{flag} {folder}: must not contain {file} or lie inside it; choose another folder")


def require_writable(flag: str, folder: Path) -> None:
    """Raise a UsageError if a folder cannot be created or written to."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise UsageError(f"{flag} {folder}: {existing} is not a writable folder; choose another folder")


def find_and_report(argument: str, class_names: list[str], log: ErrorLog) -> list[ImageFile]:
    """Call `find_images`, and report errors, skipped files and images without a label."""
    skipped: list[Skipped] = []
    try:
        files = find_images(argument, class_names, skipped)
    except (OSError, DataError) as error:
        log.fail(error)
        return []
    for line in describe_unlabelled(files, class_names):
        log.warn(line)
    for folder in skipped:
        if folder.kind == UNREADABLE:
            log.fail(folder)
    if others := [file for file in skipped if file.kind != UNREADABLE]:
        report = log.fail if any(file.kind == UNSUPPORTED for file in others) else log.warn
        report(f"{argument}: skipped {count_skipped(others)}")
    return files


def describe_unlabelled(files: list[ImageFile], class_names: list[str]) -> list[str]:
    """Describe the images outside class folders, one line per folder, or those with unknown labels in a table.

    Returns:
        The lines to print; for a folder, none if no sub-folder's name is a class or resembles one.
    """
    if files and is_table(files[0].argument):
        labels = Counter(file.unknown_label for file in files if file.unknown_label)
        return [_without_label(files[0].argument, labels[name], name, class_names) for name in labels]
    folders = Counter(Path(file.path).parent for file in files if file.label is None and file.path != file.argument)
    likely = {folder: likely_class(folder.name, class_names) for folder in folders if folder != Path(files[0].argument)}
    if all(file.label is None for file in files) and not any(likely.values()):
        return []
    return [
        _without_label(folder, count, folder.name if folder in likely else None, class_names)
        for folder, count in folders.items()
    ]


def _without_label(place: str | Path, count: int, name: str | None, class_names: list[str]) -> str:
    images = "1 image" if count == 1 else f"{count} images"
    if name is None:
        return f"{place}: {images} without a label: not in a class folder"
    likely = likely_class(name, class_names)
    return f"{place}: {images} without a label: {name} is not a class{f'; is it {likely}?' if likely else ''}"
