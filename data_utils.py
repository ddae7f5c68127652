"""The tutorial's functions to split a folder and plot images. Only functions that plot import matplotlib.

The functions of class_files.py can also be imported from here, as in the tutorial.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from class_files import (  # noqa: F401 - part of the tutorial's data_utils
    label_lines,
    normalise,
    read_class_indices,
    read_label_file,
    read_pickle,
    write_class_indices,
    write_pickle,
)
from cli_utils import DataError
from dataset_split import VAL_RATE, split_folder
from image_io import ImageError, read_image
from model import evaluation_mode
from my_dataset import MyDataSet, prepare_batch, to_pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE_IMAGES = 24  # maximum in the prediction figure


def read_split_data(
    root: str | os.PathLike,
    val_rate: float = VAL_RATE,
    plot_image: bool = False,
    *,
    class_indices_path: str | os.PathLike = "class_indices.json",
) -> tuple[list[str], list[int], list[str], list[int]]:
    """Split a folder of images, with one sub-folder per class, into training and validation images.

    Classes are sorted by name, and include the images in their own sub-folders. Of the n images of a class,
    `int(n * val_rate)` are held out, but at least one if there are two. The split depends on file names and `val_rate`
    only. Prints the numbers of images and of skipped files, and writes the class names to `class_indices_path`.

    Args:
        val_rate: fraction to hold out, 0 <= val_rate < 1.
        plot_image: show a bar chart of the number of images per class.

    Returns:
        train_paths, train_labels, val_paths, val_labels.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: `root` is missing, not a folder or unreadable.
        DataError: fewer than two classes, a class without images, or no class with two images.
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
                paths, names = zip(*labelled[:FIGURE_IMAGES], strict=True)
                images = [read_image(path, pixel_range=data_set.pixel_range) for path in paths]
                return torch.stack([data_set.transform(image) for image in images]), list(names)
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
