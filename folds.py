"""Divide the images of a dataset into folds for cross-validation, and list the training runs."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli_utils import DataError, number_of_workers
from duplicates import find_duplicates, read_pictures
from file_utils import write_csv
from learning_curve import DIVISORS
from prepare_data import Data, prepare_data


class FoldRun(NamedTuple):
    """A training run of the cross-validation.

    Attributes:
        fold: the number of the predicted fold; numbering continues across repeats.
        divisor: the run trains on 1 / `divisor` of the other images.
    """

    fold: int
    divisor: int = 1

    def __str__(self) -> str:
        return f"fold {self.fold}" + ("" if self.divisor == 1 else f", 1/{self.divisor} of the training images")

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return f"fold-{self.fold}" + ("" if self.divisor == 1 else f"-1of{self.divisor}")

    def table(self, folder: Path) -> Path:
        """Return the table of its training and validation images."""
        return folder / f"{self.name}.csv"


def list_runs(args: argparse.Namespace) -> list[FoldRun]:
    """List the training runs, in order."""
    divisors = DIVISORS if args.learning_curve else (1,)
    return [FoldRun(fold, divisor) for fold in range(args.folds * args.repeats) for divisor in divisors]


class Images(NamedTuple):
    """The images to cross-validate on.

    Attributes:
        labels: indices into `class_names`.
        groups: (N,) int64, equal for images that show the same picture.
        data: the images, checked; the test images are in no fold.
    """

    paths: list[str]
    labels: list[int]
    groups: np.ndarray
    class_names: list[str]
    data: Data


def find_images(args: argparse.Namespace, known_images: Path) -> Images:
    """Find the training and validation images of a dataset, check them, and group those that show the same picture.

    Args:
        known_images: see `prepare_data`.
    """
    data = prepare_data(args, known_images)
    paths = data.train_set.images_path + data.val_set.images_path
    labels = data.train_set.images_class + data.val_set.images_class
    workers = number_of_workers(args.workers)
    pictures, pixel_range = read_pictures(paths, workers)
    missing = [picture.skipped for picture in pictures if picture.thumbnail is None]
    if missing:
        raise DataError(f"{missing[0]}")
    groups, _ = find_duplicates(paths, pictures, pixel_range, workers)
    return Images(paths, labels, groups, data.class_names, data)


def draw_folds(labels: Sequence[int], groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Assign images to stratified folds at random; images of the same group share a fold.

    Args:
        labels: of N images.
        groups: (N,) int64.

    Returns:
        (N,) int64, the fold of each image, 0 to `folds` - 1.
    """
    labels = np.asarray(labels)
    generator = np.random.default_rng(seed)
    members: dict[int, list[int]] = {}
    for index in generator.permutation(len(labels)).tolist():
        members.setdefault(int(groups[index]), []).append(index)
    counts = np.zeros((folds, labels.max() + 1), dtype=np.int64)
    drawn = np.empty(len(labels), dtype=np.int64)
    for group in sorted(members.values(), key=len, reverse=True):  # a stable sort: the order stays random
        added = np.bincount(labels[group], minlength=counts.shape[1])
        fold = np.lexsort([counts.sum(axis=1), counts @ (added > 0)])[0]  # fewest images of these classes, then of all
        counts[fold] += added
        drawn[group] = fold
    return drawn


def require_divisible(images: Images, folds: np.ndarray, fold_count: int) -> None:
    """Raise DataError if a fold is empty, or all images of a class are in one: its network could not learn the class.

    Args:
        fold_count: the number of folds.
    """
    labels = np.asarray(images.labels)
    for label, name in enumerate(images.class_names):
        if len(np.unique(folds[labels == label])) < 2:
            raise DataError(f"class {name}: needs at least two images that show different pictures")
    pictures = len(np.unique(images.groups))
    if pictures < fold_count:
        raise DataError(f"--folds {fold_count}: there are only {pictures} different pictures; pass --folds {pictures}")


def require_subsets(images: Images, folds: np.ndarray) -> None:
    """Raise DataError if the numbers of training images for a learning curve are not all different."""
    labels = np.asarray(images.labels)
    for fold in range(folds.max() + 1):
        training = labels[folds != fold]
        if len({int(draw_subset(training, divisor, seed=0).sum()) for divisor in DIVISORS}) < len(DIVISORS):
            raise DataError(f"too few images for --learning-curve: subsets of {len(training)} images have equal sizes")


def require_listable(images: Images) -> None:
    """Raise DataError if a name is not valid Unicode, or starts or ends with a space: a table cannot list it."""
    for path, label in zip(images.paths, images.labels, strict=True):
        for text in (str(Path(path).absolute()), images.class_names[label]):
            if text.encode(errors="ignore").decode() != text.strip():
                raise DataError(f"{path}: a table cannot list this name; rename the file or its folder")


def draw_subset(labels: Sequence[int], divisor: int, seed: int) -> np.ndarray:
    """Draw a stratified subset of images at random; that of a larger `divisor` is contained in it.

    Returns:
        (N,) bool, whether each image is among the first `1 / divisor` of its class, rounded up.
    """
    labels = np.asarray(labels)
    order = np.random.default_rng(seed).permutation(len(labels))
    drawn = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        drawn[members[: math.ceil(len(members) / divisor)]] = True
    return drawn


def write_fold(images: Images, folds: np.ndarray, fold: int, path: Path, divisor: int = 1, seed: int = 0) -> None:
    """Write the table of a fold for --data-path: the images of `fold` for validation, the others for training.

    Args:
        divisor, seed: list only a subset of the training images, see `draw_subset`.
    """
    rows = []
    is_training = folds != fold
    is_training[is_training] = draw_subset(np.asarray(images.labels)[is_training], divisor, seed)
    for image, label, own, training in zip(images.paths, images.labels, folds, is_training, strict=True):
        if own != fold and not training:
            continue
        subset = "val" if own == fold else "train"
        rows.append({"path": str(Path(image).absolute()), "label": images.class_names[label], "split": subset})
    write_csv(rows, path)
