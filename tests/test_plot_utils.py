"""The content, layout and fonts of the figures."""

import io
import itertools
import warnings

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text

import figure_text
from plot_utils import (
    confusion_matrix,
    curves,
    explained,
    mistakes,
    overlay_heat,
    predictions,
    range_test,
    training_batch,
)

PICTURES = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
HEATS = np.linspace(0, 1, 16 * 32 * 32).reshape(16, 32, 32)
HISTORY = [
    {"epoch": epoch, "train_loss": 1.0, "val_loss": 1.1, "train_accuracy": 0.5, "accuracy": 0.4} for epoch in range(3)
]


def all_figures(names: list[str]) -> list[Figure]:
    """Return one figure of each kind with these class names."""
    names16 = [names[index % len(names)] for index in range(16)]
    tops = [[(name, 0.5), (names[0], 0.3)] for name in names16]
    return [
        predictions(PICTURES[:5], names16[:5], [0.5] * 5, names16[1:6]),
        mistakes(PICTURES[:8], HEATS[:8], names16[:8], [0.5] * 8, names16[1:9]),
        training_batch(PICTURES, names16),
        explained(PICTURES, HEATS, tops, [f"{name}.jpg" for name in names16], [*names16[1:], None]),
        confusion_matrix(
            np.ones((len(names), len(names)), dtype=int) if len(names) <= 20 else np.eye(len(names), dtype=int), names
        ),
        curves(HISTORY),
        range_test(np.geomspace(1e-5, 10, 20), np.linspace(2, 1, 20), np.linspace(2, 1, 20), 0.01),
    ]


def visible_texts(figure: Figure) -> list[Text]:
    figure.draw_without_rendering()
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


@pytest.mark.parametrize("classes", [2, 5, 20, 100])
def test_text_is_not_cut_off_and_does_not_overlap(classes):
    names = [f"class {index}" if index % 3 else f"a long name of class {index}" for index in range(classes)]
    for figure in all_figures(names)[:-2]:  # curves have ticks that are not drawn
        boxes = [(text.get_text(), text.get_window_extent()) for text in visible_texts(figure)]
        outside = [
            text for text, box in boxes if not all(figure.bbox.padded(1).contains(*c) for c in (box.min, box.max))
        ]
        assert outside == []
    labels = confusion_matrix(np.eye(classes, dtype=int), names).axes[0]
    labels.figure.draw_without_rendering()
    for axis in (labels.xaxis, labels.yaxis):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
        assert len(boxes) == classes
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def test_outlier_loss_does_not_dominate_the_axis():
    axes = curves([HISTORY[0] | {"val_loss": 40.0}, *HISTORY[1:]]).axes[0]
    assert 1.1 < axes.get_ylim()[1] < 3
    assert 40 in axes.lines[1].get_ydata()
    assert "40" in axes.get_title()
    over_fits = [row | {"train_loss": 0.01, "val_loss": 0.5 + 0.1 * row["epoch"]} for row in HISTORY]
    axes = curves(over_fits).axes[0]
    assert axes.get_ylim()[1] > 0.7
    assert axes.get_title() == "loss"


def test_confusion_matrix_of_a_thousand_classes():
    names = [f"class {index}" for index in range(1000)]
    figure = confusion_matrix(np.ones((1000, 1000), dtype=int), names)
    assert max(figure.get_size_inches()) * figure.dpi < 4000
    labels = figure.axes[0].get_xticklabels()
    assert (labels[0].get_text(), labels[0].get_position()[0]) == ("class 0", 0)
    assert 50 < len(labels) < 200
    figure.draw_without_rendering()
    assert not any(a.get_window_extent().overlaps(b.get_window_extent()) for a, b in itertools.pairwise(labels))


def test_confusion_matrix_shows_counts_and_row_fractions():
    figure = confusion_matrix(np.array([[3, 1], [0, 0]]), ["cat", "dog"])
    axes = figure.axes[0]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]]
    assert {(*text.get_position(), text.get_text()) for text in axes.texts} == {(0, 0, "3"), (1, 0, "1")}
    assert "4 images, 3 right (75.0%)" in axes.get_title()


def test_heat_map_brightness_increases_with_heat():
    grey = np.full((2, 2, 3), 100, dtype=np.uint8)
    shown = overlay_heat(grey, np.array([[0.0, 0.3], [0.6, 1.0]])).sum(axis=2).flatten().tolist()
    assert shown == sorted(shown)
    assert shown[0] < shown[-1]


def test_characters_without_a_font_are_escaped(monkeypatch):
    default = font_manager.findfont("DejaVu Sans")
    monkeypatch.setattr(figure_text, "_installed_fonts", lambda: [font_manager.FontEntry(fname=default)])
    forget_fonts()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph")  # missing from the font
        for figure in all_figures(["\u83ca\u82b1", "\u73ab\u7470 $x$ \u65cb\n"]):
            figure.savefig(io.BytesIO())
            assert not any("\u83ca" in text.get_text() for text in figure.findobj(Text))
    title = predictions(PICTURES[:1], ["\u83ca"], [1.0], ["\u83ca"]).axes[0].get_title()
    assert title == "\\u83ca, 100.00%\n(label: \\u83ca)"
    forget_fonts()


def test_fallback_font_is_used_for_missing_characters(monkeypatch):
    fonts = [font for font in font_manager.fontManager.ttflist if font.name == "STIXGeneral" and font.weight == 400]
    monkeypatch.setattr(figure_text, "_installed_fonts", lambda: fonts)
    missing = next(
        c
        for c in map(chr, range(0x2000, 0x2C00))
        if not figure_text._default_font_has(c)
        and c.isprintable()
        and any(figure_text._has(font.fname, c) for font in fonts)
    )
    forget_fonts()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = predictions(PICTURES[:1], [missing], [1.0], [missing])
        figure.savefig(io.BytesIO())
    assert missing in figure.axes[0].get_title()
    assert "STIXGeneral" in figure.axes[0].title.get_fontfamily()
    forget_fonts()


def forget_fonts() -> None:
    figure_text._font_for.cache_clear()
