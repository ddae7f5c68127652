"""Arrays, names and numbers become matplotlib figures. Reads no file, knows no network, shows no window.

Class names are text: a dollar sign is a dollar sign (`parse_math=False`), not the start of a formula, and control
characters are written as escapes.
Every function draws on the `figure` it is given, or else on a new one that pyplot does not know: nothing to close.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from run_utils import printable

MAX_COLUMNS = 8


def class_distribution(class_names: Sequence[str], counts: Sequence[int], figure: Figure | None = None) -> Figure:
    """A bar a class, its number of images on top."""
    figure = figure or Figure()
    figure.set_size_inches(max(6.4, 0.45 * len(class_names)), 4.8)
    axes = figure.add_subplot(xlabel="class", ylabel="images", title="Class distribution")
    axes.bar_label(axes.bar(range(len(class_names)), counts))
    crowded = sum(map(len, class_names)) > 60
    axes.set_xticks(
        range(len(class_names)),
        [printable(name) for name in class_names],
        parse_math=False,
        rotation=45 if crowded else 0,
        ha="right" if crowded else "center",
    )
    axes.margins(y=0.1)
    figure.set_layout_engine("constrained")
    return figure


def labelled_images(images: np.ndarray, names: Sequence[str], figure: Figure | None = None) -> Figure:
    """Images (N, H, W, 3) uint8 in a row, the name of each below it."""
    figure = figure or Figure()
    figure.set_size_inches(2.5 * len(images), 3)
    for number, (image, name) in enumerate(zip(images, names, strict=True), start=1):
        axes = figure.add_subplot(1, len(images), number, xticks=[], yticks=[])
        axes.imshow(image)
        axes.set_xlabel(printable(name), parse_math=False)
    figure.set_layout_engine("constrained")
    return figure


def predictions(
    images: Sequence[np.ndarray],
    predicted: Sequence[str],
    probabilities: Sequence[float],
    actual: Sequence[str | None],
    figure: Figure | None = None,
) -> Figure:
    """Images (H, W, 3) uint8, each under its predicted class and probability (0..1) and, where known, its label.

    Up to eight in a row. Green with a tick is right, red with a cross is wrong: the mark is for those who cannot tell
    the two colours apart. Black is unknown.
    """
    columns = min(len(images), MAX_COLUMNS)
    rows = -(-len(images) // columns)
    figure = figure or Figure(dpi=100)
    figure.set_size_inches(2.5 * columns, 3.3 * rows)
    for index, (image, guess, probability, label) in enumerate(
        zip(images, predicted, probabilities, actual, strict=True)
    ):
        axes = figure.add_subplot(rows, columns, index + 1, xticks=[], yticks=[])
        axes.imshow(image)
        title = f"{printable(guess)}, {probability * 100:.2f}%"
        colour = "black"
        if label is not None:
            right = guess == label
            title += f"\n(label: {printable(label)})"
            colour = "green" if right else "red"
            axes.set_xlabel("\N{CHECK MARK}" if right else "\N{MULTIPLICATION SIGN}", color=colour, fontsize=16)
        axes.set_title(title, color=colour, parse_math=False)
    figure.set_layout_engine("constrained")
    return figure
