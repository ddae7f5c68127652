"""Plot arrays, names and numbers as matplotlib figures, without access to files, models or windows.

Each function draws on `figure` if given, else on a new one, which need not be closed as pyplot does not track it.
"""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, ScalarFormatter

from figure_layout import create_grid, create_sheet, write_text
from figure_text import (
    fitting_font_size,
    legible,
    mark,
    prediction_title,
    shorten_middle,
    text_style,
    text_width,
)

MAX_COLUMNS = 8
# Blue, vermilion and bluish green, safe for colour-blind readers (Okabe & Ito 2008).
FIRST, SECOND, THIRD = "#0072B2", "#D55E00", "#009E73"
HEAT = "inferno"
DPI = 100
MAX_MATRIX_INCHES = 30  # at full size, 1,000 classes would take gigabytes


def class_distribution(class_names: Sequence[str], counts: Sequence[int], figure: Figure | None = None) -> Figure:
    """Plot the number of images per class as labelled bars."""
    figure = figure or Figure()
    figure.set_size_inches(max(6.4, 0.45 * len(class_names)), 4.8)
    axes = figure.add_subplot(xlabel="class", ylabel="images", title="Class distribution")
    axes.bar_label(axes.bar(range(len(class_names)), counts, color=FIRST))
    crowded = sum(map(text_width, class_names)) > 60
    axes.set_xticks(
        range(len(class_names)),
        list(map(legible, class_names)),
        **text_style(*class_names),
        rotation=45 if crowded else 0,
        ha="right" if crowded else "center",
    )
    axes.margins(y=0.1)
    figure.set_layout_engine("constrained")
    return figure


def labelled_images(images: np.ndarray, names: Sequence[str], figure: Figure | None = None) -> Figure:
    """Plot images (N, H, W, 3) uint8 with their names, up to eight per row."""
    figure = figure or Figure(dpi=DPI)
    cells = create_grid(figure, len(images), MAX_COLUMNS, below=0.3)
    for axes, image, name in zip(cells, images, names, strict=True):
        axes.imshow(image)
        axes.set_xlabel(legible(name), **text_style(name), fontsize=fitting_font_size(name, 2.2))
    return figure


def predictions(
    images: Sequence[np.ndarray],
    predicted: Sequence[str],
    probabilities: Sequence[float],
    actual: Sequence[str | None],
    figure: Figure | None = None,
) -> Figure:
    """Plot images (H, W, 3) uint8 with the predicted class, its probability (0..1) and the label, up to eight per row.

    Correct predictions are green with a tick, and wrong ones red with a cross, for colour-blind readers. Predictions
    for images without a label (None) are black.
    """
    figure = figure or Figure(dpi=DPI)
    cells = create_grid(figure, len(images), MAX_COLUMNS, above=0.5, below=0.35)
    for axes, image, guess, probability, label in zip(cells, images, predicted, probabilities, actual, strict=True):
        axes.imshow(image)
        title, colour = prediction_title(guess, probability, label)
        axes.set_title(title, color=colour, fontsize=fitting_font_size(title, 2.3), **text_style(title))
        if label is not None:
            axes.set_xlabel(mark(guess == label), color=colour, fontsize=16, labelpad=0)
    return figure


def training_batch(images: np.ndarray, names: Sequence[str], figure: Figure | None = None) -> Figure:
    """Plot images like `labelled_images`, but on a single Axes, which is faster."""
    figure = figure or Figure(dpi=DPI)
    sheet, boxes = create_sheet(figure, len(images), MAX_COLUMNS, below=0.3)
    for box, image, name in zip(boxes, images, names, strict=True):
        sheet.imshow(image, extent=box.extent)
        write_text(
            sheet, name, box.middle, box.bottom - 0.05, va="top", ha="center", fontsize=fitting_font_size(name, 2.2)
        )
    return figure


def mistakes(
    images: np.ndarray,
    heats: np.ndarray,
    predicted: Sequence[str],
    probabilities: Sequence[float],
    actual: Sequence[str],
    figure: Figure | None = None,
) -> Figure:
    """Plot images like `predictions`, each beside its heat map (see `overlay_heat`), up to four per row.

    Args:
        images: (N, H, W, 3) uint8.
        heats: (N, H, W) in 0..1.
    """
    figure = figure or Figure(dpi=DPI)
    sheet, boxes = create_sheet(figure, len(images), MAX_COLUMNS // 2, width=4.6, above=0.55, below=0.3)
    for box, image, heat, guess, probability, label in zip(
        boxes, images, heats, predicted, probabilities, actual, strict=True
    ):
        sheet.imshow(np.concatenate([image, overlay_heat(image, heat)], axis=1), extent=box.extent)
        title, colour = prediction_title(guess, probability, label)
        style = {"ha": "center", "color": colour}
        write_text(
            sheet, title, box.middle, box.top + 0.05, va="bottom", fontsize=fitting_font_size(title, 4.4), **style
        )
        write_text(sheet, mark(guess == label), box.middle, box.bottom - 0.02, va="top", fontsize=14, **style)
    return figure


def explained(
    images: Sequence[np.ndarray],
    heats: Sequence[np.ndarray],
    tops: Sequence[Sequence[tuple[str, float]]],
    titles: Sequence[str],
    labels: Sequence[str | None],
    figure: Figure | None = None,
) -> Figure:
    """Plot images (H, W, 3) uint8, each beside its heat map and the bars of its most probable classes.

    Args:
        heats: (H, W) in 0..1, see `overlay_heat`.
        tops: per image, the (class, probability in 0..1) of its most probable classes in descending order.
        titles: for example, file names.
        labels: the true classes, or None. The bars of other classes are vermilion instead of blue.
    """
    figure = figure or Figure(dpi=DPI)
    columns = 1 if len(images) <= 3 else 2 if len(images) <= 8 else 3
    sheet, boxes = create_sheet(figure, len(images), columns, width=7.4, above=0.35)
    for box, image, heat, top, title, label in zip(boxes, images, heats, tops, titles, labels, strict=True):
        pictures = (box.left, box.left + 4.6, box.bottom, box.top)
        sheet.imshow(np.concatenate([image, overlay_heat(image, heat)], axis=1), extent=pictures)
        suffix = "" if label is None else f"  (label: {shorten_middle(label, 24)}) {mark(top[0][0] == label)}"
        write_text(
            sheet, shorten_middle(title, 80 - text_width(suffix)) + suffix, box.left, box.top + 0.07, fontsize=10
        )
        left, row = box.left + 4.8, (box.top - box.bottom) / max(len(top), 3)
        for place, (name, probability) in enumerate(top):
            y = box.top - place * row
            words = f"{shorten_middle(name, 24)}  {probability:.1%}"
            write_text(sheet, words, left + 0.05, y - 0.08 * row, va="top", fontsize=min(9.0, 24 * row))
            colour = FIRST if label in (None, name) else SECOND
            sheet.barh(y - 0.68 * row, probability * (box.right - left), 0.42 * row, left=left, color=colour)
        sheet.plot([left, left], [box.bottom, box.top], color="black", linewidth=0.8)
    return figure


def overlay_heat(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Overlay an image (H, W, 3) uint8, in grey, with a heat map (H, W) in 0..1. Returns (H, W, 3) uint8."""
    grey = image.mean(axis=2, keepdims=True) * np.ones(3)
    colours = 255 * matplotlib.colormaps[HEAT](heat)[..., :3]
    return (0.45 * grey + 0.55 * colours).astype(np.uint8)


def confusion_matrix(confusion: np.ndarray, class_names: Sequence[str], figure: Figure | None = None) -> Figure:
    """Plot a confusion matrix (classes, classes) int: true classes in rows, predicted classes in columns.

    The numbers are counts, and the shades fractions of the true class. With hundreds of classes, there is only room for
    shades and some of the names.
    """
    figure = figure or Figure(dpi=DPI)
    classes = len(class_names)
    names = [shorten_middle(name, 24) for name in class_names]
    size = 12 if classes <= 6 else 10 if classes <= 20 else 8 if classes <= 50 else 7
    cell = 0.75 if classes <= 6 else 0.45 if classes <= 20 else 0.3 if classes <= 50 else 0.24
    inch = size / 72
    side = max(min(cell * classes, MAX_MATRIX_INCHES), 2.5)
    named = range(0, classes, math.ceil(cell * classes / side))  # all names, if there is room
    names_width = 0.65 * inch * max(map(text_width, names)) + 2.2 * inch
    vertical = max(map(text_width, names)) * 0.65 * inch > 0.9 * side / len(named)  # too long to fit side by side
    left, right = max(names_width, 0.9), 1.1
    bottom, top = (names_width if vertical else 0.7), 0.8
    width, height = left + side + right, bottom + side + top
    figure.set_size_inches(width, height)

    axes = figure.add_axes([left / width, bottom / height, side / width, side / height])
    fractions = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    shades = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    digits = len(f"{confusion.max()}")
    number_size = min(size, 0.8 * side / classes * 72 / (0.65 * digits))
    for row, column in np.argwhere(confusion) if len(named) == classes else []:
        axes.text(
            column,
            row,
            f"{confusion[row, column]}",
            ha="center",
            va="center",
            fontsize=number_size,
            color="white" if fractions[row, column] > 0.5 else "black",
        )
    style = text_style(*class_names) | {"fontsize": size}
    labels = [legible(names[index]) for index in named]
    axes.set_xticks(named, labels, rotation=90 if vertical else 0, **style)
    axes.set_yticks(named, labels, **style)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    images, correct = confusion.sum(), confusion.trace()
    axes.set_title(f"{images} images, {correct} right ({correct / max(images, 1):.1%})", pad=12)
    legend = figure.add_axes([1 - 0.85 / width, bottom / height, 0.15 / width, min(side, 4) / height])
    figure.colorbar(shades, cax=legend, ticks=[0, 0.5, 1], label="fraction of the true class")
    return figure


def curves(history: Sequence[Mapping[str, float]], figure: Figure | None = None) -> Figure:
    """Plot training and validation loss and accuracy per epoch.

    The loss axis ends at twice the highest training loss or twice the median validation loss, whichever is larger:
    the validation loss may spike while BatchNorm's running averages lag behind the weights.

    Args:
        history: dicts with "epoch", "train_loss", "val_loss", "train_accuracy" and "accuracy".
    """
    figure = figure or Figure(dpi=DPI)
    figure.set_size_inches(10, 4)
    epochs = [row["epoch"] for row in history]
    panels = [("loss", "train_loss", "val_loss"), ("accuracy", "train_accuracy", "accuracy")]
    for index, (title, train_key, val_key) in enumerate(panels):
        axes = figure.add_axes([0.07 + 0.5 * index, 0.14, 0.41, 0.76], title=title, xlabel="epoch")
        axes.plot(epochs, [row[train_key] for row in history], "o-", color=FIRST, markersize=3, label="training")
        axes.plot(epochs, [row[val_key] for row in history], "s--", color=SECOND, markersize=3, label="validation")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    loss, accuracy = figure.axes
    highest = 2 * max(*(row["train_loss"] for row in history), np.median([row["val_loss"] for row in history]))
    peak = max(row["val_loss"] for row in history)
    if peak > highest > 0:
        loss.set_ylim(0, highest)
        loss.set_title(f"loss (clipped; maximum {peak:.3g})")
    accuracy.set_ylim(0, 1)
    return figure


def reliability(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], figure: Figure | None = None
) -> Figure:
    """Plot a reliability diagram: accuracy over confidence, and the number of images at each confidence.

    Args:
        curves: by legend, the number of images, the mean confidence and the accuracy in each bin, (bins,) each.
    """
    figure = figure or Figure(dpi=DPI)
    figure.set_size_inches(6, 6.5)
    figure.set_layout_engine("constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color="grey", linestyle=":", label="perfectly calibrated")
    for (legend, (counts, confidences, accuracies)), (colour, marker) in zip(
        curves.items(), ((SECOND, "s--"), (FIRST, "o-")), strict=False
    ):
        counts = np.asarray(counts)
        used = counts > 0
        upper.plot(np.asarray(confidences)[used], np.asarray(accuracies)[used], marker, color=colour, label=legend)
        lower.stairs(counts, np.linspace(0, 1, len(counts) + 1), color=colour, linestyle=marker[1:])
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(-0.02, 1.02))
    figure.legend(loc="outside upper left", frameon=False)
    lower.set(xlabel="confidence", ylabel="images")
    lower.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    return figure


def learning_curve(
    sizes: np.ndarray,
    accuracies: np.ndarray,
    grid: np.ndarray,
    fitted: np.ndarray,
    interval: tuple[float, float],
    figure: Figure | None = None,
) -> Figure:
    """Plot the accuracy over the number of training images, the fitted curve, and the range at its end.

    Args:
        sizes, accuracies: (S,) measured.
        grid, fitted: (G,) the curve.
        interval: of the accuracy at the largest number of `grid`.
    """
    figure = figure or Figure(dpi=DPI)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot(xlabel="training images", ylabel="accuracy", title="Learning curve", xscale="log")
    axes.plot(grid, fitted, color=FIRST, linestyle="--", label="fitted power law")
    axes.plot(sizes, accuracies, "o", color=FIRST, label="measured")
    middle = fitted[-1]
    errors = [[middle - interval[0]], [interval[1] - middle]]
    axes.errorbar(
        grid[-1:], [middle], np.maximum(errors, 0), color=SECOND, marker="s", capsize=4, label="expected, 95%"
    )
    ticks = [*sizes, grid[-1]]
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def range_test(
    rates: np.ndarray, losses: np.ndarray, smoothed: np.ndarray, suggestion: float, figure: Figure | None = None
) -> Figure:
    """Plot a learning-rate range test: losses (N,) and smoothed losses (N,) over rates (N,), and the suggestion."""
    figure = figure or Figure(dpi=DPI)
    figure.set_size_inches(8, 4.5)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot(xlabel="learning rate", ylabel="training loss", xscale="log")
    axes.plot(rates, losses, color=FIRST, alpha=0.3, linewidth=1, label="per step")
    axes.plot(rates, smoothed, color=FIRST, linewidth=2, label="smoothed")
    if math.isfinite(suggestion):
        axes.axvline(suggestion, color=SECOND, linestyle="--", label=f"suggestion: {suggestion:.2g}")
    start, lowest = smoothed[0], smoothed.min()
    axes.set_ylim(lowest - 0.3 * (start - lowest) - 0.05, start + 0.7 * (start - lowest) + 0.05)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    return figure


def data_health(
    class_names: Sequence[str],
    counts: Mapping[str, Sequence[int]],
    sizes: np.ndarray,
    conflicts: Sequence[tuple[Sequence[np.ndarray], Sequence[str], Sequence[str]]],
    figure: Figure | None = None,
) -> Figure:
    """Plot the number of images per class, the image sizes, and pairs of images with conflicting labels.

    Args:
        counts: by subset, such as "training", the number of images per class.
        sizes: (N, 2), width and height in pixels.
        conflicts: per pair, two images (H, W, 3) uint8, their classes and their file names.
    """
    figure = figure or Figure(dpi=DPI)
    rows = -(-len(conflicts) // 2)
    heights = [max(4.0, 1 + 0.2 * len(class_names)), 2.6 * rows]
    figure.set_size_inches(12, sum(heights))
    figure.set_layout_engine("constrained")
    grid = figure.add_gridspec(2 if rows else 1, 1, height_ratios=heights if rows else None)

    top = figure.add_subfigure(grid[0]).subplots(1, 2)
    axes, positions = top[0], range(len(class_names))
    totals = np.zeros(len(class_names), dtype=int)
    for (subset, images), colour in zip(counts.items(), (FIRST, SECOND, THIRD), strict=False):
        bars = axes.barh(positions, images, left=totals, color=colour, label=subset)
        totals = totals + np.asarray(images)
    axes.bar_label(bars, list(map(str, totals)), padding=3)
    axes.set_yticks(positions, [shorten_middle(name, 28) for name in class_names], **text_style(*class_names))
    axes.set(xlabel="images", ylim=(len(class_names) - 0.4, -0.6))
    axes.margins(x=0.12)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(counts), frameon=False)

    axes = top[1]
    points, images = np.unique(sizes, axis=0, return_counts=True)
    axes.scatter(*points.T, s=12 + 150 * images / images.max(), color=FIRST, alpha=0.4, linewidths=0, rasterized=True)
    axes.set_title("image sizes (larger dot: more images)", fontsize="medium")
    axes.set(xlabel="width in pixels", ylabel="height in pixels", xscale="log", yscale="log")
    (left, low), (right, high) = points.min(axis=0) / 1.5, points.max(axis=0) * 1.5
    axes.set(xlim=(left, right), ylim=(low, high))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)

    if rows:
        below = figure.add_subfigure(grid[1])
        below.suptitle("label conflicts: the same picture in two classes", fontsize="medium")
        cells = below.add_gridspec(rows, 5, width_ratios=[1, 1, 0.2, 1, 1])
        for number, (images, classes, files) in enumerate(conflicts):
            for index in range(2):
                axes = below.add_subplot(cells[number // 2, 3 * (number % 2) + index], xticks=[], yticks=[])
                axes.imshow(images[index])
                axes.set_title(shorten_middle(classes[index], 28), **text_style(classes[index]), fontsize="medium")
                axes.set_xlabel(shorten_middle(files[index], 28), **text_style(files[index]), fontsize="small")
    return figure
