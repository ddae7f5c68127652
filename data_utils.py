"""Split image folders into training and validation images, and plot images. Only functions that plot import matplotlib.

The functions of class_files.py can also be imported from here, as in the tutorial.
"""

import collections
import contextlib
import hashlib
import math
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from class_files import (  # noqa: F401 - part of the tutorial's data_utils
    label_lines,
    read_class_indices,
    read_label_file,
    read_pickle,
    write_class_indices,
    write_pickle,
)
from cli_utils import DataError
from image_io import ImageError, read_image
from model import evaluation_mode
from my_dataset import MyDataSet, prepare_batch, to_pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FIGURE_IMAGES = 24  # maximum in the prediction figure
VALIDATION_FOLDERS = ("val", "valid", "validation", "test")  # the first one found is used
CHECK_CACHE = ".checked_images.json"  # in the runs folder: the cached results of checking image files


# --- folder -> lists of files and labels --------------------------------------------------------------------------


@dataclass
class Split:
    """The training and validation images. A label is an index into `class_names`."""

    class_names: list[str]
    train_paths: list[str]
    train_labels: list[int]
    val_paths: list[str]
    val_labels: list[int]

    def count(self) -> dict[str, tuple[int, int]]:
        """Return the numbers of training and validation images per class."""
        train, val = collections.Counter(self.train_labels), collections.Counter(self.val_labels)
        return {name: (train[label], val[label]) for label, name in enumerate(self.class_names)}

    def __str__(self) -> str:
        return (
            f"{len(self.train_paths) + len(self.val_paths)} images were found in the dataset.\n"
            f"{len(self.train_paths)} images for training.\n"
            f"{len(self.val_paths)} images for validation."
        )


def read_split_data(
    root: str | os.PathLike,
    val_rate: float = 0.2,
    plot_image: bool = False,
    *,
    class_indices_path: str | os.PathLike = "class_indices.json",
) -> tuple[list[str], list[int], list[str], list[int]]:
    """Split a folder of images, with one sub-folder per class, into training and validation images.

    Classes are sorted by name; hidden sub-folders, __MACOSX and runs folders are ignored. Of the n images of a class,
    `int(n * val_rate)` are held out. The split depends on file names and `val_rate` only. Prints the image counts and
    writes the class names to `class_indices_path`.

    Args:
        val_rate: fraction to hold out, 0 <= val_rate < 1.
        plot_image: show a bar chart of the number of images per class.

    Returns:
        train_paths, train_labels, val_paths, val_labels.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: `root` is missing, not a folder or unreadable.
        DataError: fewer than two classes, a class without images, or too few images to hold one out.
        ValueError: `val_rate` is out of range.
    """
    split = split_folder(root, val_rate)
    print(split)
    write_class_indices(split.class_names, class_indices_path)
    if plot_image:
        import matplotlib.pyplot as plt

        from plot_utils import class_distribution

        labels = split.train_labels + split.val_labels
        counts = [labels.count(label) for label in range(len(split.class_names))]
        class_distribution(split.class_names, counts, figure=plt.figure())
        plt.show()
    return split.train_paths, split.train_labels, split.val_paths, split.val_labels


def split_folder(root: str | os.PathLike, val_rate: float = 0.2) -> Split:
    """Split a folder like `read_split_data`, without printing, writing or plotting."""
    if not 0 <= val_rate < 1:
        raise ValueError(f"val_rate is {val_rate}; it must be at least 0 and below 1")
    images = list_images_by_class(root)
    split = Split(list(images), [], [], [], [])
    generator = random.Random(0)  # private: leaves the global generator alone
    for label, paths in enumerate(images.values()):
        held_out = set(generator.sample(paths, k=int(len(paths) * val_rate)))
        train = [path for path in paths if path not in held_out]
        split.train_paths += train
        split.train_labels += [label] * len(train)
        split.val_paths += [path for path in paths if path in held_out]
        split.val_labels += [label] * len(held_out)
    if val_rate > 0 and not split.val_paths:
        raise DataError(
            f"{os.fspath(root)}: too few images to hold any out for validation; with a fraction of {val_rate:g}, "
            f"at least one class needs {math.ceil(1 / val_rate)} images"
        )
    return split


def find_split(
    data_path: str | os.PathLike, val_path: str | os.PathLike | None = None, val_rate: float = 0.2
) -> tuple[Split, str]:
    """Find the training and validation images of a folder.

    Args:
        data_path: a folder with one sub-folder per class, or with folders `train` and `val` (or `valid`, `validation`,
            `test`) laid out in the same way.
        val_path: a validation folder with one sub-folder per class; takes precedence over those in `data_path`.
        val_rate: fraction of each class to hold out if there is no validation folder.

    Returns:
        The split, and a description of the source of its validation images.

    Raises:
        DataError: a validation class is missing from the training folder. For other errors, see `read_split_data`.
    """
    train_path, own_val_path = _train_and_val_folders(data_path)
    val_path = val_path or own_val_path
    if val_path is None:
        source = "" if Path(train_path) == Path(data_path) else f" in {train_path}"
        return split_folder(train_path, val_rate), f"{100 * val_rate:g}% of each class{source}, held out"
    split = split_folder(train_path, 0)
    val_images = list_images_by_class(val_path, min_classes=1)
    unknown = sorted(val_images.keys() - set(split.class_names))
    if unknown:
        raise DataError(f"{os.fspath(val_path)}: classes missing from {train_path}: {', '.join(unknown)}")
    for name, paths in val_images.items():
        split.val_paths += paths
        split.val_labels += [split.class_names.index(name)] * len(paths)
    return split, f"from {os.fspath(val_path)}"


def _train_and_val_folders(root: str | os.PathLike) -> tuple[Path, Path | None]:
    """Return the training and validation folders: sub-folders of `root`, or `root` itself and None."""
    folders = {folder.name.lower(): folder for folder in _subfolders(root)}
    if "train" not in folders or not folders.keys() <= {"train", *VALIDATION_FOLDERS}:
        return Path(root), None
    if not _subfolders(folders["train"]):  # then "train" and "test" are class names
        return Path(root), None
    # Skip a folder without sub-folders, such as the unlabelled test images of a competition.
    return folders["train"], next(
        (folders[name] for name in VALIDATION_FOLDERS if name in folders and _subfolders(folders[name])), None
    )


def require_training_images(split: Split, usable_labels: Iterable[int], explain: Callable[[str], str | None]) -> None:
    """Raise DataError if a class of `split` has no usable training images.

    Args:
        usable_labels: the labels of the usable training images.
        explain: returns why the image at a path is unusable.
    """
    emptied = set(split.train_labels) - set(usable_labels)
    if emptied:
        label = min(emptied)
        example = split.train_paths[split.train_labels.index(label)]
        raise DataError(f"class {split.class_names[label]}: no usable training images; {explain(example)}")


def list_images_by_class(root: str | os.PathLike, min_classes: int = 2) -> dict[str, list[str]]:
    """List the images per class, both sorted by name.

    Args:
        min_classes: the minimum number of classes.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: see `list_images`.
        DataError: too few classes, or a class without images.
    """
    classes = _subfolders(root)
    if len(classes) < min_classes:
        found = f"only one, {classes[0].name}" if classes else "none"
        needed = "at least two sub-folders" if min_classes > 1 else "sub-folders"
        raise DataError(f"{os.fspath(root)}: needs {needed} of images, one per class; found {found}")
    images = {folder.name: list_images(folder) for folder in classes}
    empty = [name for name, paths in images.items() if not paths]
    if empty:
        raise DataError(
            f"{os.fspath(root)}: no image ({' '.join(IMAGE_EXTENSIONS)}) in class {', '.join(empty)}; "
            f"add some, or move that folder elsewhere"
        )
    return images


def list_images(folder: str | os.PathLike) -> list[str]:
    """List the image files directly in `folder`, sorted by name. Skips hidden files; extensions match in any case.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: `folder` is missing, not a folder or unreadable.
    """
    return [
        str(path) for path in _list_visible(folder) if path.suffix.lower() in IMAGE_EXTENSIONS and not _is_folder(path)
    ]


def list_images_below(folder: str | os.PathLike, on_error: Callable[[OSError], None]) -> list[str]:
    """List the images in a folder and all its sub-folders. Follows links, but visits each folder once.

    Args:
        on_error: called with the error of each unreadable folder, which is skipped.
    """
    images, waiting, seen = [], [Path(folder)], set()
    while waiting:
        current = waiting.pop()
        if current.resolve() in seen:
            continue
        seen.add(current.resolve())
        try:
            images += list_images(current)
            waiting += reversed(_subfolders(current))
        except OSError as error:
            on_error(error)
    return images


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


def _subfolders(root: str | os.PathLike) -> list[Path]:
    return [path for path in _list_visible(root) if _is_folder(path) and not _is_ignored(path)]


def _is_ignored(folder: Path) -> bool:
    """Return whether a folder holds the metadata of a macOS archive, or runs of train.py."""
    return folder.name == "__MACOSX" or os.access(folder / CHECK_CACHE, os.F_OK)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a link into a folder without permission
        return False


def _list_visible(folder: str | os.PathLike) -> list[Path]:
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: a file, not a folder of images")
    try:
        return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)
    except PermissionError as error:
        raise PermissionError(f"{folder}: no permission to read this folder") from error


# --- figures ------------------------------------------------------------------------------------------------------


def plot_data_loader_image(
    data_loader: DataLoader, *, class_indices_path: str | os.PathLike = "class_indices.json"
) -> None:
    """Show up to 4 images of each batch, denormalised, with their class names.

    Raises:
        FileNotFoundError, DataError: class_indices.json is missing or invalid.
    """
    import matplotlib.pyplot as plt

    from plot_utils import labelled_images

    class_names = read_class_indices(class_indices_path)
    for images, labels in data_loader:
        names = [class_names[label] for label in labels[:4].tolist()]
        figure = plt.figure("images of a batch", clear=True)  # one window for all batches
        labelled_images(to_pixels(images)[:4], names, figure)
        plt.show()


def plot_class_preds(
    net: nn.Module,
    images_dir: str | os.PathLike,
    transform: Callable,
    num_plot: int = 5,
    device: torch.device | str = "cpu",
    *,
    class_indices_path: str | os.PathLike = "class_indices.json",
) -> "Figure | None":
    r"""Plot the predictions for the first `num_plot` images listed in `images_dir`/label.txt.

    The titles are "{predicted}, {probability}%\n(label: {true})", green if right and red if wrong. Invalid lines are
    skipped with a message. Runs `net` in evaluation mode without gradients, then restores its mode.

    Args:
        net: maps a batch (N, 3, H, W) to logits (N, classes).
        transform: the evaluation transform: PIL RGB image -> tensor (3, H, W), uint8 or normalised float.

    Returns:
        A pyplot figure, which `plt.show()` displays; or None if there is nothing to plot (the reason is printed).

    Raises:
        FileNotFoundError, DataError: class_indices.json is missing or invalid.
    """
    try:
        label_lines(images_dir)
    except (FileNotFoundError, DataError) as error:
        print(f"no prediction figure: {error}")
        return None
    class_names = read_class_indices(class_indices_path)
    labelled, problems = read_label_file(images_dir, class_names)
    for problem in problems:
        print(f"{problem}; line skipped")
    images, names = [], []
    for path, name in labelled:
        if len(images) == num_plot:
            break
        try:
            images.append(transform(read_image(path)))
        except ImageError as error:
            print(f"{error}; line skipped")
        else:
            names.append(name)
    if not images:
        print(f"no prediction figure: no usable line in {Path(images_dir) / 'label.txt'}")
        return None
    batch = torch.stack(images)
    with evaluation_mode(net):
        probabilities, predicted = net(prepare_batch(batch, device)).float().softmax(dim=1).cpu().max(dim=1)
    guesses = [class_names[index] for index in predicted.tolist()]
    import matplotlib.pyplot as plt

    from plot_utils import predictions

    return predictions(to_pixels(batch), guesses, probabilities.tolist(), names, plt.figure(dpi=100))


def choose_figure_images(
    data_set: MyDataSet, class_names: Sequence[str], images_dir: str | os.PathLike
) -> tuple[Tensor, list[str]]:
    """Choose the images for the prediction figure.

    Returns:
        Up to 24 images (N, 3, H, W) uint8 and their class names: those listed in `images_dir`/label.txt if all are
        valid, else one image per class of the validation set `data_set`.

    Raises:
        DataError: no image is readable.
    """
    if Path(images_dir, "label.txt").is_file():
        try:
            labelled, problems = read_label_file(images_dir, class_names)
            if labelled and not problems:
                images = [data_set.transform(read_image(path)) for path, _ in labelled[:FIGURE_IMAGES]]
                return torch.stack(images), [name for _, name in labelled[:FIGURE_IMAGES]]
        except (DataError, ImageError) as error:  # a figure must not end the training
            print(f"{error}; the prediction figure shows validation images instead")
    images, names = [], []
    for label in sorted(set(data_set.images_class))[:FIGURE_IMAGES]:
        for index in (index for index, other in enumerate(data_set.images_class) if other == label):
            with contextlib.suppress(ImageError):  # has become unreadable; the evaluation reports it
                images.append(data_set[index][0])
                names.append(class_names[label])
                break
    if not images:
        raise DataError("no validation image is readable")
    return torch.stack(images), names
