"""Arrange images in a figure."""

from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figure_text import legible, text_style


class Box(NamedTuple):
    """The edges of an image, in inches from the left and the bottom of the figure."""

    left: float
    right: float
    bottom: float
    top: float

    @property
    def extent(self) -> tuple[float, float, float, float]:
        return tuple(self)

    @property
    def middle(self) -> float:
        return (self.left + self.right) / 2


def _place(
    figure: Figure,
    count: int,
    columns: int,
    width: float = 2.3,
    height: float = 2.3,
    above: float = 0.1,
    below: float = 0.1,
) -> list[Box]:
    """Size `figure` for `count` images in rows of `columns`, and return their positions.

    Args:
        width, height: the size of each image in inches.
        above, below: the space above and below it in inches.
    """
    columns, gap = min(count, columns), 0.15
    rows = -(-count // columns)
    figure.set_size_inches(columns * (width + gap) + gap, rows * (height + above + below) + gap)
    boxes = []
    for index in range(count):
        row, column = divmod(index, columns)
        left = gap + column * (width + gap)
        bottom = gap / 2 + (rows - row - 1) * (height + above + below) + below
        boxes.append(Box(left, left + width, bottom, bottom + height))
    return boxes


def create_grid(figure: Figure, *arguments: float, **sizes: float) -> list[Axes]:
    """Create an Axes without ticks for each image; for the arguments see `_place`."""
    boxes = _place(figure, *arguments, **sizes)
    width, height = figure.get_size_inches()
    return [
        figure.add_axes(
            [box.left / width, box.bottom / height, (box.right - box.left) / width, (box.top - box.bottom) / height],
            xticks=[],
            yticks=[],
        )
        for box in boxes
    ]


def create_sheet(figure: Figure, *arguments: float, **sizes: float) -> tuple[Axes, list[Box]]:
    """Create one Axes, in inches, for all images, as one per image is slow; for the arguments see `_place`."""
    boxes = _place(figure, *arguments, **sizes)
    sheet = figure.add_axes([0, 0, 1, 1])
    sheet.set_axis_off()
    width, height = figure.get_size_inches()
    sheet.set(xlim=(0, width), ylim=(0, height), autoscale_on=False)
    return sheet, boxes


def write_text(axes: Axes, text: str, x: float, y: float, **style: object) -> None:
    """Write text in a font that has its characters."""
    axes.text(x, y, "\n".join(map(legible, text.split("\n"))), **text_style(text), **style)
