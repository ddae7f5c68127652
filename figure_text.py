"""Text in figures: choose fonts that have its characters, escape the others, and choose sizes that fit."""

import contextlib
import functools
import unicodedata

from matplotlib import font_manager

TITLE_WIDTH = 32  # of a class name above an image


def text_style(*texts: str) -> dict[str, object]:
    """Return keyword arguments for matplotlib's text functions: no math mode ("$"), and fallback fonts as needed."""
    fonts = map(_font_for, sorted(set("".join(texts))))
    return {"parse_math": False, "fontfamily": list(dict.fromkeys(["sans-serif", *filter(None, fonts)]))}


def legible(text: str) -> str:
    """Escape control characters and those that no installed font has."""
    return "".join(c if _font_for(c) else c.encode("unicode_escape").decode("ascii") for c in text)


@functools.cache
def _font_for(character: str) -> str | None:
    """Return a font family for a character, the default one if possible; None if it cannot be drawn."""
    if not character.isprintable():
        return None
    if _default_font_has(character):
        return "sans-serif"
    entries = sorted(
        (font for font in _installed_fonts() if font.style == "normal" and not font.name.startswith("Last Resort")),
        key=lambda font: (font.weight != 400, "CJK" not in font.name, "Sans" not in font.name, font.name),
    )
    return next((font.name for font in entries if _has(font.fname, character)), None)


@functools.cache
def _default_font_has(character: str) -> bool:
    return _has(font_manager.findfont(font_manager.FontProperties()), character)


@functools.cache
def _installed_fonts() -> list[font_manager.FontEntry]:
    """Return matplotlib's fonts, including those installed since its font cache was built."""
    known = {font.fname for font in font_manager.fontManager.ttflist}
    for path in set(font_manager.findSystemFonts()) - known:
        with contextlib.suppress(RuntimeError, ValueError, OSError):  # unsupported by matplotlib
            font_manager.fontManager.addfont(path)
    return font_manager.fontManager.ttflist


def _has(path: str, character: str) -> bool:
    try:
        font = font_manager.get_font(path)
    except (RuntimeError, OSError):
        return False
    return font.scalable and font.get_char_index(ord(character)) != 0


def text_width(text: str) -> int:
    """Return the width of a line in columns. East Asian wide characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def fitting_font_size(text: str, inches: float, largest: float = 12) -> float:
    """Return the font size, 4 to `largest`, at which the longest line fits into `inches`."""
    columns = max(map(text_width, text.splitlines()), default=0)
    return max(4.0, min(largest, inches * 72 / (0.6 * max(columns, 1))))


def shorten_middle(text: str, width: int) -> str:
    """Replace the middle of `text` with an ellipsis if it takes more than `width` columns."""
    text = legible(text)
    while text_width(text) > width:
        middle = len(text) // 2
        text = text[: middle - 1] + "\N{HORIZONTAL ELLIPSIS}" + text[middle + 1 :]
    return text


def prediction_title(guess: str, probability: float, label: str | None) -> tuple[str, str]:
    """Return the title of a prediction and its colour."""
    title = f"{shorten_middle(guess, TITLE_WIDTH)}, {probability * 100:.2f}%"
    if label is None:
        return title, "black"
    return f"{title}\n(label: {shorten_middle(label, TITLE_WIDTH)})", "green" if guess == label else "red"


def mark(correct: bool) -> str:
    """Return a tick or a cross, so that not only the colour tells whether a prediction is right."""
    return "\N{CHECK MARK}" if correct else "\N{MULTIPLICATION SIGN}"
