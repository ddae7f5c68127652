"""Check output paths, write files atomically, and read and write JSON and CSV files."""

import contextlib
import csv
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli_utils import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def output_path(flag: str, name: str | None, formats: Sequence[str] = ()) -> Path | None:
    """Return the path of the output file that a flag names, or None if the name is empty.

    Raises:
        UsageError: it cannot be written, or its extension is not in `formats`.
    """
    if not name:
        return None
    path = Path(name)
    folder = path.resolve().parent
    if not folder.is_dir() or (formats and path.suffix.lower() not in formats):
        kind = f"{'/'.join(formats)} file".lstrip()
        raise UsageError(f"{flag} {path}: name a {kind} in an existing folder")
    if path.is_dir():
        raise UsageError(f"{flag} {path}: is a folder; name a file")
    if (path.is_file() or not path.exists()) and not os.access(folder, os.W_OK):  # see `atomic_file`
        raise UsageError(f"{flag} {path}: no permission to write to its folder")
    return path


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which then replaces `path`, so that no reader sees a partial file.

    A symbolic link is kept, and its target replaced. A pipe or a device is written to directly.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()
    # The end of the name includes the extension, which decides the format; the whole name might be too long.
    unfinished = path.with_name(f".{os.getpid()}.tmp.{path.name[-40:]}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_png(figure: "Figure", path: Path) -> None:
    """Save a figure as PNG atomically."""
    with atomic_file(path) as unfinished:
        figure.savefig(unfinished, pil_kwargs={"compress_level": 1})  # the default takes three times as long


def write_json(content: dict[str, Any], path: Path, indent: int | None = None) -> None:
    """Write a JSON file atomically."""
    with atomic_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=indent), encoding="utf-8")


def write_csv(rows: Iterable[Mapping[str, Any]], path: Path, columns: Sequence[str] = ()) -> None:
    """Write a CSV file atomically: first `columns`, then the other keys of the first row.

    The file starts with a byte-order mark, without which Excel does not read UTF-8: open it with encoding="utf-8-sig".
    Characters that UTF-8 cannot encode, which file names may contain, are escaped.

    Raises:
        ValueError: a later row has other keys.
    """
    rows = iter(rows)
    first = next(rows, {})
    with (
        atomic_file(path) as unfinished,
        open(unfinished, "w", newline="", encoding="utf-8-sig", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, [*dict.fromkeys([*columns, *first])])
        writer.writeheader()
        writer.writerows(itertools.chain([first] if first else [], rows))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; return an empty one if the file is missing or corrupt."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
