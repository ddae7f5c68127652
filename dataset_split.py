"""Split the images in a folder or a table into training, validation and test images."""

import collections
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from class_files import normalise
from cli_utils import DataError, UsageError
from image_folders import (
    UNUSED,
    Skipped,
    count_skipped,
    likely_class,
    list_images_by_class,
    list_loose_files,
    list_unused,
    subfolders,
)
from tables import Row, is_table, read_table

TRAINING_FOLDERS = ("train", "training")  # the first one found is used
VALIDATION_FOLDERS = ("val", "valid", "validation")
TEST_FOLDERS = ("test", "testing")
VAL_RATE = 0.2  # default fraction of each class to hold out for validation


class Count(NamedTuple):
    """The number of training, validation and test images."""

    train: int
    val: int
    test: int


@dataclass
class Split:
    """The training, validation and test images. A label is an index into `class_names`."""

    class_names: list[str]
    train_paths: list[str]
    train_labels: list[int]
    val_paths: list[str]
    val_labels: list[int]
    skipped: list[Skipped] = field(default_factory=list)  # the files that are not used
    test_paths: list[str] = field(default_factory=list)
    test_labels: list[int] = field(default_factory=list)

    @property
    def subsets(self) -> dict[str, tuple[list[str], list[int]]]:
        """The paths and labels of "train", "val" and "test"."""
        return {
            "train": (self.train_paths, self.train_labels),
            "val": (self.val_paths, self.val_labels),
            "test": (self.test_paths, self.test_labels),
        }

    @property
    def paths(self) -> list[str]:
        """The paths of all images."""
        return [*self.train_paths, *self.val_paths, *self.test_paths]

    def drop(self, skipped: Sequence[Skipped]) -> "Split":
        """Return a split without the images that are skipped."""
        paths = {file.path for file in skipped}

        def keep(images: list[str], labels: list[int]) -> tuple[list[str], list[int]]:
            kept = [pair for pair in zip(images, labels, strict=True) if pair[0] not in paths]
            return [path for path, _ in kept], [label for _, label in kept]

        train, val, test = (keep(*images) for images in self.subsets.values())
        return Split(self.class_names, *train, *val, [*self.skipped, *skipped], *test)

    def count(self) -> dict[str, Count]:
        """Return the numbers of images per class."""
        train, val, test = (collections.Counter(labels) for _, labels in self.subsets.values())
        return {name: Count(train[label], val[label], test[label]) for label, name in enumerate(self.class_names)}

    def __str__(self) -> str:
        test = f"\n{len(self.test_paths)} images for testing." if self.test_paths else ""
        skipped = f"\nskipped {count_skipped(self.skipped)}" if self.skipped else ""
        return (
            f"{len(self.paths)} images were found in the dataset.\n"
            f"{len(self.train_paths)} images for training.\n"
            f"{len(self.val_paths)} images for validation.{test}{skipped}"
        )


class TrainingImages(NamedTuple):
    """The training images in a folder or a table, before any are held out."""

    source: str | os.PathLike  # the table, or the folder that contains the class folders
    by_class: dict[str, list[str]]
    val_path: str | os.PathLike | None  # the folder or table of the validation images that come with them
    test_path: str | os.PathLike | None  # the same for the test images
    skipped: list[Skipped]


def split_folder(root: str | os.PathLike, val_rate: float = VAL_RATE) -> Split:
    """Split a folder like `read_split_data`, without printing, writing or plotting."""
    skipped: list[Skipped] = []
    return _hold_out(TrainingImages(root, list_images_by_class(root, skipped), None, None, skipped), val_rate)


def _hold_out(images: TrainingImages, val_rate: float, test_rate: float = 0.0) -> Split:
    """Hold out a fraction of each class for validation, and another one for testing."""
    if not 0 <= val_rate < 1:
        raise ValueError(f"val_rate is {val_rate}; it must be at least 0 and below 1")
    split = Split(list(images.by_class), [], [], [], [], images.skipped)
    val_generator, test_generator = random.Random(0), random.Random(0)  # private: leave the global generator alone
    for label, paths in enumerate(images.by_class.values()):
        train, val = _draw(paths, val_rate, len(paths), val_generator)
        train, test = _draw(train, test_rate, len(paths), test_generator)
        for held_out, (subset_paths, subset_labels) in zip((train, val, test), split.subsets.values(), strict=True):
            subset_paths += held_out
            subset_labels += [label] * len(held_out)
    for rate, held_out, purpose in (val_rate, split.val_paths, "validation"), (test_rate, split.test_paths, "testing"):
        if rate > 0 and not held_out:
            source = os.fspath(images.source)
            raise DataError(f"{source}: too few images per class to hold out any for {purpose}; add images")
    return split


def _draw(paths: list[str], rate: float, total: int, generator: random.Random) -> tuple[list[str], list[str]]:
    """Draw `rate * total` of `paths`, at least one if two are left. Returns the others and the drawn ones, in order."""
    at_least, at_most = (1, len(paths) - 1) if rate > 0 and len(paths) > 1 else (0, 0)
    drawn = set(generator.sample(paths, k=min(at_most, max(at_least, int(total * rate)))))
    return [path for path in paths if path not in drawn], [path for path in paths if path in drawn]


def find_split(
    data_path: str | os.PathLike,
    val_path: str | os.PathLike | None = None,
    val_rate: float = VAL_RATE,
    test_rate: float = 0.0,
) -> tuple[Split, str]:
    """Find the training, validation and test images of a folder or a table.

    Args:
        data_path: a folder with one sub-folder per class, or with folders for training, validation and testing (see
            `TRAINING_FOLDERS`, `VALIDATION_FOLDERS`, `TEST_FOLDERS`) laid out in the same way; or a CSV table, see
            `read_table`.
        val_path: a validation folder with one sub-folder per class, or a table; takes precedence over the validation
            images in `data_path`.
        val_rate: fraction of each class to hold out if there are no validation images.
        test_rate: fraction of each class to hold out for testing. The validation images do not depend on it.

    Returns:
        The split, and a description of the source of its validation images.

    Raises:
        DataError: a class of the validation or test images is missing from the training images; the validation folder
            or table is the training one, is inside it, or is the test folder; a table has no validation images; or
            there are test images although `test_rate` is above 0. For other errors, see `read_split_data` and
            `read_table`.
        UsageError: the sum of the rates is 1 or more.
    """
    find = _find_in_table if is_table(data_path) else _find_in_folder
    images = find(data_path, val_path)
    source = images.source
    if val_path is not None and Path(val_path).resolve() == Path(source).resolve():
        kind = "table" if is_table(val_path) else "folder"
        raise DataError(f"{os.fspath(val_path)}: is both the training and the validation {kind}; omit --val-path")
    if val_path is None and images.val_path is None and val_rate + test_rate >= 1:
        raise UsageError(f"--val-rate {val_rate:g} and --test-rate {test_rate:g}: their sum must be below 1")
    if None not in (val_path, images.test_path) and Path(val_path).resolve() == Path(images.test_path).resolve():
        raise DataError(f"{os.fspath(val_path)}: is both the validation and the test folder; choose another --val-path")
    if images.test_path is not None and test_rate > 0:
        raise DataError(f"{os.fspath(images.test_path)}: has test images already; omit --test-rate")
    val_path = val_path or images.val_path
    split = _hold_out(images, val_rate if val_path is None else 0, test_rate)
    if images.test_path is not None:
        _add_subset(split, "test", images.test_path, source)
    if val_path is None:
        where = "" if Path(source) == Path(data_path) else f" in {source}"
        return split, f"{100 * val_rate:g}% of each class{where}, held out"
    _add_subset(split, "val", val_path, source)
    unused = "" if val_rate == VAL_RATE else "; --val-rate has no effect"
    return split, f"from {os.fspath(val_path)}{unused}"


def _add_subset(split: Split, subset: str, path: str | os.PathLike, source: str | os.PathLike) -> None:
    """Add the validation or test images in a folder or a table to a split.

    Args:
        subset: "val" or "test".
        source: the folder or table of the training images.
    """
    if is_table(path):
        wanted = ("", "val") if subset == "val" else ("test",)
        rows = read_table(path)
        images = _group_by_label([row for row in rows if row.subset in wanted])
        if Path(path) != Path(source):  # the rows of the training table are reported by `_find_in_table`
            split.skipped += [Skipped(row.path, UNUSED, UNUSED) for row in rows if row.subset not in wanted]
        if not images:
            raise DataError(f"{os.fspath(path)}: no row has the split {subset}")
    else:
        if Path(path).resolve().is_relative_to(Path(source).resolve()):
            raise DataError(f"{os.fspath(path)}: is inside the training folder {source}; move it elsewhere")
        images = list_images_by_class(path, split.skipped, min_classes=1)
    unknown = [name for name in images if name not in split.class_names]
    if unknown:
        likely = likely_class(unknown[0], split.class_names)
        hint = f"; is {unknown[0]} the class {likely}?" if likely else ""
        raise DataError(f"{os.fspath(path)}: classes missing from {source}: {', '.join(unknown)}{hint}")
    paths, labels = split.subsets[subset]
    for name, found in images.items():
        paths += found
        labels += [split.class_names.index(name)] * len(found)


def _find_in_folder(root: str | os.PathLike, val_path: str | os.PathLike | None) -> TrainingImages:
    """Find the training images in a folder.

    Args:
        val_path: the validation images to use instead of those in `root`.
    """
    skipped: list[Skipped] = []
    train_path, own_val_path, test_path = _find_subset_folders(root)
    images = list_images_by_class(train_path, skipped)
    if train_path != Path(root):
        used = {Path(path).resolve() for path in (train_path, val_path or own_val_path, test_path) if path}
        skipped += list_loose_files(root)
        skipped += list_unused(folder for folder in subfolders(root) if folder.resolve() not in used)
    return TrainingImages(train_path, images, own_val_path, test_path, skipped)


def _find_in_table(path: str | os.PathLike, val_path: str | os.PathLike | None) -> TrainingImages:
    """Find the training images in a table; see `_find_in_folder`."""
    rows = read_table(path)
    images = _group_by_label([row for row in rows if row.subset in ("", "train")])
    if len(images) < 2:
        found = f"only one, {next(iter(images))}" if images else "none"
        raise DataError(f"{os.fspath(path)}: needs training images of at least two labels; found {found}")
    own_val_path, test_path = (path if any(row.subset == name for row in rows) else None for name in ("val", "test"))
    unused = [row for row in rows if row.subset == "val" and val_path is not None]
    skipped = [Skipped(row.path, UNUSED, UNUSED) for row in unused]
    return TrainingImages(path, images, own_val_path, test_path, skipped)


def _group_by_label(rows: Iterable[Row]) -> dict[str, list[str]]:
    images: dict[str, list[str]] = {}
    for row in rows:
        images.setdefault(row.label, []).append(row.path)
    return images


def _find_subset_folders(root: str | os.PathLike) -> tuple[Path, Path | None, Path | None]:
    """Return the training, validation and test folders: sub-folders of `root`, or `root` itself, None and None.

    Other sub-folders are allowed beside them if train and val have a class in common. Without a folder for validation,
    the one for testing is used for it.
    """
    folders = {folder.name.lower(): folder for folder in subfolders(root)}
    classes = {name: {normalise(path.name) for path in subfolders(folder)} for name, folder in folders.items()}
    train = next((name for name in TRAINING_FOLDERS if classes.get(name)), None)
    if train is None:  # then "train" and "test" may be class names
        return Path(root), None, None
    # A folder without sub-folders may hold the unlabelled test images of a competition.
    held_out = [name for name in (*VALIDATION_FOLDERS, *TEST_FOLDERS) if classes.get(name)]
    val = held_out[0] if held_out else None
    test = next((name for name in held_out[1:] if name in TEST_FOLDERS), None)
    only_subsets = folders.keys() <= {*TRAINING_FOLDERS, *VALIDATION_FOLDERS, *TEST_FOLDERS}
    if only_subsets or (val and classes[train] & classes[val]):
        return folders[train], folders.get(val), folders.get(test)
    return Path(root), None, None


def require_usable_images(split: Split, usable: Split, explain: Callable[[str], object]) -> None:
    """Raise DataError if a class has no usable training images, or the validation or test set no usable images.

    Args:
        split: all images.
        usable: the usable ones.
        explain: returns why the image at a path is unusable.
    """
    emptied = set(split.train_labels) - set(usable.train_labels)
    if emptied:
        label = min(emptied)
        example = split.train_paths[split.train_labels.index(label)]
        raise DataError(f"class {split.class_names[label]}: no usable training images; {explain(example)}")
    for kind, images, left in (
        ("validation", split.val_paths, usable.val_paths),
        ("test", split.test_paths, usable.test_paths),
    ):
        if images and not left:
            raise DataError(f"no usable {kind} images; {explain(images[0])}")
