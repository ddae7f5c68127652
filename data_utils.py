"""Image folders and their split, class_indices.json, label.txt, pickles, the download, and figures.

Only functions that plot import matplotlib.
"""

import collections
import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import random
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets.utils import download_url

from cli_utils import DataError
from image_io import ImageError, read_image
from model import evaluation_mode
from my_dataset import MyDataSet, prepare_batch, to_pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FIGURE_IMAGES = 24  # maximum in the figure of predictions
VALIDATION_FOLDERS = ("val", "valid", "validation", "test")  # the first one found is used

FLOWER_PHOTOS_URL = "http://download.tensorflow.org/example_images/flower_photos.tgz"
FLOWER_PHOTOS_MD5 = "6f87fb78e9cc9ab41eff2015b380011d"
KNOWN_IMAGES = ".checked_images.json"  # in the runs folder: the cached checks of image files
DOWNLOADED = ".downloaded"  # in the downloaded folder: the MD5 of its archive


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


def require_training_images(split: Split, usable_labels: Iterable[int], explain: Callable[[str], str | None]) -> None:
    """Raise DataError if a class of `split` has no usable training images.

    Args:
        usable_labels: the labels of the usable training images.
        explain: returns the reason why the image at a path is unusable.
    """
    emptied = set(split.train_labels) - set(usable_labels)
    if emptied:
        label = min(emptied)
        example = split.train_paths[split.train_labels.index(label)]
        raise DataError(f"class {split.class_names[label]}: no usable training images; {explain(example)}")


def read_split_data(
    root: str | os.PathLike,
    val_rate: float = 0.2,
    plot_image: bool = False,
    *,
    class_indices_path: str | os.PathLike = "class_indices.json",
) -> tuple[list[str], list[int], list[str], list[int]]:
    """Split a folder of images, with one sub-folder per class, into training and validation images.

    Classes are sorted by name; hidden sub-folders, __MACOSX and a runs folder are skipped. `int(n * val_rate)` of the
    n images per class are held out. The split depends on file names and `val_rate` only, as it has its own generator.
    Prints the image counts and writes the class names to `class_indices_path`.

    Args:
        val_rate: fraction to hold out, 0 <= val_rate < 1.
        plot_image: show the number of images per class as a bar chart.

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
    """Split as `read_split_data` does, without printing, writing or plotting."""
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
            f"{os.fspath(root)}: too few images to hold any out for validation: with a rate of {val_rate:g} "
            f"some class must have {math.ceil(1 / val_rate)} images"
        )
    return split


def find_split(
    data_path: str | os.PathLike, val_path: str | os.PathLike | None = None, val_rate: float = 0.2
) -> tuple[Split, str]:
    """Find the training and validation images of a folder.

    Args:
        data_path: has one sub-folder per class; or `train` and `val` (or `valid`, `validation`, `test`) that do.
        val_path: a validation folder with one sub-folder per class, used first if given.
        val_rate: fraction of each class to hold out if there is no validation folder.

    Returns:
        The split, and a description of where its validation images come from.

    Raises:
        DataError: a validation class is missing in the training folder. For other errors, see `read_split_data`.
    """
    train_path, own_val_path = _train_and_val_folders(data_path)
    val_path = val_path or own_val_path
    if val_path is None:
        where = "" if Path(train_path) == Path(data_path) else f" in {train_path}"
        return split_folder(train_path, val_rate), f"{val_rate:g} of each class{where}, held out"
    split = split_folder(train_path, 0)
    val_images = list_images_by_class(val_path, least=1)
    unknown = sorted(val_images.keys() - set(split.class_names))
    if unknown:
        raise DataError(f"{os.fspath(val_path)}: no such class in {train_path}: {', '.join(unknown)}")
    for name, paths in val_images.items():
        split.val_paths += paths
        split.val_labels += [split.class_names.index(name)] * len(paths)
    return split, f"from {os.fspath(val_path)}"


def _train_and_val_folders(root: str | os.PathLike) -> tuple[Path, Path | None]:
    """Return the folders to train and validate on: sub-folders of `root`, or `root` itself and None."""
    folders = {folder.name.lower(): folder for folder in _subfolders(root)}
    if "train" not in folders or not folders.keys() <= {"train", *VALIDATION_FOLDERS}:
        return Path(root), None
    if not _subfolders(folders["train"]):  # "train" and "test" are then the names of two classes
        return Path(root), None
    # Skip a folder without class sub-folders, such as a competition's test images.
    return folders["train"], next(
        (folders[name] for name in VALIDATION_FOLDERS if name in folders and _subfolders(folders[name])), None
    )


def list_images_by_class(root: str | os.PathLike, least: int = 2) -> dict[str, list[str]]:
    """List the images per class, both sorted by name.

    Args:
        least: minimum number of classes.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: see `list_images`.
        DataError: too few classes, or a class without images.
    """
    classes = _subfolders(root)
    if len(classes) < least:
        found = f"only one, {classes[0].name}" if classes else "none"
        raise DataError(
            f"{os.fspath(root)}: needs {'at least two sub-folders' if least > 1 else 'sub-folders'}, one a class, "
            f"with the images of that class; there is {found}"
        )
    images = {folder.name: list_images(folder) for folder in classes}
    empty = [name for name, paths in images.items() if not paths]
    if empty:
        raise DataError(
            f"{os.fspath(root)}: no image ({' '.join(IMAGE_EXTENSIONS)}) in class {', '.join(empty)}; "
            f"add some, or move the folder elsewhere"
        )
    return images


def list_images(folder: str | os.PathLike) -> list[str]:
    """List the image files directly in `folder`, sorted by name. Skips hidden files; extensions match in any case.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: `folder` is missing, not a folder or unreadable.
    """
    return [str(path) for path in _visible(folder) if path.suffix.lower() in IMAGE_EXTENSIONS and not _is_folder(path)]


def list_images_below(folder: str | os.PathLike, on_error: Callable[[OSError], None]) -> list[str]:
    """List the images of a folder and all its sub-folders. Links are followed, each folder once.

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
            while piece := file.read(2**20):
                content.update(piece)
    except OSError:  # reported when the image is read
        return None
    return content.hexdigest()


def _subfolders(root: str | os.PathLike) -> list[Path]:
    return [path for path in _visible(root) if _is_folder(path) and not _is_known_to_hold_none(path)]


def _is_known_to_hold_none(folder: Path) -> bool:
    """Return whether this is a macOS archive's metadata folder or a runs folder."""
    return folder.name == "__MACOSX" or os.access(folder / KNOWN_IMAGES, os.F_OK)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a link into a folder without permission
        return False


def _visible(folder: str | os.PathLike) -> list[Path]:
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: a file, not a folder of images")
    try:
        return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)
    except PermissionError as error:
        raise PermissionError(f"{folder}: no permission to read this folder") from error


# --- class names, label.txt and pickles on disk -------------------------------------------------------------------


def write_class_indices(class_names: Sequence[str], path: str | os.PathLike = "class_indices.json") -> None:
    """Write {"0": "daisy", ...} as JSON."""
    indices = {str(index): name for index, name in enumerate(class_names)}
    Path(path).write_text(json.dumps(indices, indent=4), encoding="utf-8")


def read_class_indices(path: str | os.PathLike = "class_indices.json") -> list[str]:
    """Read the class names from a class_indices.json, in index order.

    Raises:
        FileNotFoundError: the file is missing.
        DataError: it is not a JSON object of the form {"0": "daisy", "1": ...}.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{os.fspath(path)}: no such file; it holds the class names, as read_split_data writes it"
        )
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
    return names


def read_label_file(
    images_dir: str | os.PathLike, class_names: Sequence[str]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Read `images_dir`/label.txt. A line is a file name, white space and a class name.

    Both may contain spaces: the class is the longest of `class_names` that follows the name of an existing file.

    Returns:
        The (image path, class name) of each valid line, and a message for each invalid one.

    Raises:
        FileNotFoundError: the folder or its label.txt is missing.
        DataError: label.txt is not UTF-8 text.
    """
    labelled, problems = [], []
    for line in _label_lines(images_dir):
        try:
            labelled.append(_read_label_line(line, Path(images_dir), class_names))
        except DataError as error:
            problems.append(f"{Path(images_dir) / 'label.txt'}: {error}")
    return labelled, problems


def _label_lines(images_dir: str | os.PathLike) -> list[str]:
    label_file = Path(images_dir) / "label.txt"
    if not Path(images_dir).is_dir():
        raise FileNotFoundError(f"{os.fspath(images_dir)}: no such folder")
    if not label_file.is_file():
        raise FileNotFoundError(f"{label_file}: no such file")
    try:
        lines = label_file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{label_file}: not a text file in UTF-8") from error
    return [line.strip() for line in lines if line.strip()]


def _read_label_line(line: str, images_dir: Path, class_names: Sequence[str]) -> tuple[str, str]:
    for class_name in sorted(class_names, key=len, reverse=True):
        name = line.removesuffix(class_name)
        if name != line and name != name.rstrip() and _is_file_in(images_dir, name.rstrip()):
            return str(images_dir / name.rstrip()), class_name
    name, *class_name = line.rsplit(maxsplit=1)
    if not class_name:
        raise DataError(f"{line!r} is not a file name and a class name")
    known = next((known for known in class_names if line.endswith(known)), None)
    if known is None:
        raise DataError(f"unknown class {class_name[0]!r}")
    name = line.removesuffix(known).rstrip()
    raise DataError(f"{name!r} is outside the folder" if _climbs_out(name) else f"no image file {name!r} in the folder")


def _is_file_in(folder: Path, name: str) -> bool:
    return bool(name) and not _climbs_out(name) and (folder / name).is_file()


def _climbs_out(name: str) -> bool:
    return Path(name).is_absolute() or ".." in Path(name).parts


def write_pickle(list_info: list, file_name: str | os.PathLike) -> None:
    """Write lists, tuples, dicts, strings and numbers to a pickle."""
    with open(file_name, "wb") as file:
        pickle.dump(list_info, file)


class _PlainUnpickler(pickle.Unpickler):
    """Reject every class and function in a pickle, so that no code can run."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"it holds a {module}.{name}; only lists, dicts, strings and numbers are read")


def read_pickle(file_name: str | os.PathLike) -> list:
    """Read a pickle from `write_pickle`. Never runs code.

    Raises:
        FileNotFoundError: the file is missing.
        DataError: it is not a pickle of plain values.
    """
    with open(file_name, "rb") as file:
        try:
            return _PlainUnpickler(file).load()
        except Exception as error:  # corrupt pickles raise nearly anything
            raise DataError(f"{os.fspath(file_name)}: not a pickle of plain values: {error}") from error


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
    r"""Predict the first `num_plot` images listed in `images_dir`/label.txt, and draw them in a row.

    The titles are "{predicted}, {probability}%\n(label: {true})", green if right, red if wrong. Invalid lines are
    skipped with a message. Runs `net` in evaluation mode without gradients, then restores its mode.

    Args:
        net: maps a batch (N, 3, H, W) to logits (N, classes).
        transform: the evaluation transform: PIL RGB image -> tensor (3, H, W), uint8 or normalised float.

    Returns:
        A pyplot figure (`plt.show()` shows it); None, after printing why, if there is nothing to draw.

    Raises:
        FileNotFoundError, DataError: class_indices.json is missing or invalid.
    """
    try:
        _label_lines(images_dir)
    except (FileNotFoundError, DataError) as error:
        print(f"no prediction figure: {error}")
        return None
    class_names = read_class_indices(class_indices_path)
    labelled, problems = read_label_file(images_dir, class_names)
    for problem in problems:
        print(f"{problem}, line skipped")
    images, names = [], []
    for path, name in labelled:
        if len(images) == num_plot:
            break
        try:
            images.append(transform(read_image(path)))
        except ImageError as error:
            print(f"{error}, line skipped")
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
    """Choose the images of `images_dir`/label.txt if all are valid, else one image per class of `data_set`.

    Returns:
        Up to 24 images (N, 3, H, W) uint8, and their class names.

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
            print(f"{error}; the figure of predictions shows images of the data instead")
    images, names = [], []
    for label in sorted(set(data_set.images_class))[:FIGURE_IMAGES]:
        for index in (index for index, other in enumerate(data_set.images_class) if other == label):
            with contextlib.suppress(ImageError):  # unreadable since the check; evaluation reports it
                images.append(data_set[index][0])
                names.append(class_names[label])
                break
    if not images:
        raise DataError("no image for validation can be read any more")
    return torch.stack(images), names


# --- download -----------------------------------------------------------------------------------------------------


def download_flower_photos(root: str | os.PathLike, url: str = FLOWER_PHOTOS_URL, md5: str = FLOWER_PHOTOS_MD5) -> None:
    """Download and unpack the TensorFlow team's flower_photos: 3,670 photographs, 218 MB.

    `root` itself holds the five class folders. The checksum is verified before unpacking, and `root` appears only when
    complete. Does nothing if it already holds this archive.

    Raises:
        DataError: `root` is a file, a mount point, the current folder or not empty; the archive is corrupt; or Python
            is too old to unpack it safely.
        OSError: no network, or the disk is full.
    """
    if not hasattr(tarfile, "data_filter"):
        raise DataError("unpacking an archive safely needs Python 3.10.12, 3.11.4, 3.12 or newer")
    root = Path(root).resolve()  # keeps a link, and replaces its target
    if root.exists() and root.samefile(Path.cwd()):
        raise DataError(f"{root}: the current folder, nothing downloaded; name one for the images")
    mark = root / DOWNLOADED
    if mark.is_file() and mark.read_bytes() == md5.encode():
        return
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DataError(
            f"{root}: not an empty folder, nothing downloaded; if it holds the images, leave out --download"
        )
    if root.is_mount():
        raise DataError(f"{root}: a mount point, nothing downloaded; name a folder in it")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as unfinished:
        archive = Path(unfinished, "archive.tgz")
        unpacked = Path(unfinished, "unpacked")
        progress = sys.stderr if sys.stderr and sys.stderr.isatty() else io.StringIO()
        try:
            with contextlib.redirect_stderr(progress):
                download_url(url, unfinished, archive.name, md5)
        except (OSError, HTTPException) as error:
            raise OSError(f"cannot download {url}: {getattr(error, 'reason', error)}") from error
        except RuntimeError as error:
            raise DataError(f"{url}: what came is damaged or incomplete (its checksum is another)") from error
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(unpacked, filter="data")
        except tarfile.TarError as error:
            raise DataError(f"{url}: cannot unpack the archive: {error}") from error
        content = unpacked / "flower_photos"
        list_images_by_class(content)
        (content / DOWNLOADED).write_bytes(md5.encode())
        if root.exists():
            root.rmdir()
        shutil.move(content, root)
