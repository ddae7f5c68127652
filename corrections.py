"""Correct labels by the verdicts in a table, such as the label_issues.csv of cross_validate.py."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from class_files import normalise
from cli_utils import DataError, print_note, printable
from dataset_split import Split, require_usable_images
from image_folders import Skipped, likely_class
from labelled_images import ImageFile
from tables import read_rows

OK, DROP = "ok", "drop"  # the verdicts that are not a class
DROPPED = "dropped by the corrections"


class Verdict(NamedTuple):
    """A verdict: the true class, `OK` or `DROP`."""

    text: str
    where: str  # its place in the table, for messages


class Corrections:
    """The verdicts in a table with the columns `path` and `verdict`; rows without a verdict have no effect.

    Args:
        path: the table. Relative paths in it are relative to its folder.

    Raises:
        FileNotFoundError, DataError: the table is missing or invalid, or contains no verdict.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.verdicts: dict[str, Verdict] = {}
        for where, row in read_rows(path, ("path", "verdict"), ("path",)):
            file = image_key(self.path.parent / row["path"])
            if row["verdict"] and row["verdict"] != self.verdicts.setdefault(file, Verdict(row["verdict"], where)).text:
                raise DataError(f"{where}: another verdict on {row['path']} than in {self.verdicts[file].where}")
        if not self.verdicts:
            raise DataError(f"{self.path}: contains no verdict; fill in the column verdict with a class, ok or drop")
        self.used: set[str] = set()
        self.ambiguous: set[str] = set()  # verdicts that are also the name of a class
        self.changed = self.dropped = 0

    def label(self, path: str, label: str, class_names: Iterable[str]) -> str | None:
        """Return the corrected label of an image; None if it is dropped.

        Raises:
            DataError: the verdict is invalid.
        """
        file = image_key(path)
        verdict = self.verdicts.get(file)
        if verdict is None:
            return label
        self.used.add(file)
        names = {normalise(name): name for name in class_names}
        text = normalise(verdict.text)
        if text.lower() in (OK, DROP):
            same = [name for name in names if name.lower() == text.lower()]
            self.ambiguous.update(same)
            text = same[0] if same and text not in names else text
        if text in names:
            self.changed += names[text] != label
            return names[text]
        if text.lower() == DROP:
            self.dropped += 1
            return None
        if text.lower() != OK:
            likely = likely_class(text, list(names))
            hint = f"; did you mean {likely}?" if likely else ""
            raise DataError(f"{verdict.where}: the verdict is {text!r}; it must be a class, ok or drop{hint}")
        return label

    def correct_split(self, split: Split) -> Split:
        """Return a split with the corrected labels; the dropped images are added to its skipped files.

        Raises:
            DataError: a verdict is invalid, no image has a verdict, or a class loses all of its training images.
        """
        names, dropped = split.class_names, []
        corrected = Split(names, [], [], [], [], split.skipped)
        for subset, (paths, labels) in split.subsets.items():
            kept_paths, kept_labels = corrected.subsets[subset]
            for path, label in zip(paths, labels, strict=True):
                name = self.label(path, names[label], names)
                if name is None:
                    dropped.append(Skipped(path, DROPPED, DROPPED))
                else:
                    kept_paths.append(path)
                    kept_labels.append(names.index(name))
        print(*self.describe(), sep="\n", flush=True)
        require_usable_images(split, corrected, lambda path: f"see {self.path}")
        return corrected.drop(dropped)

    def correct_files(self, files: Iterable[ImageFile], class_names: Iterable[str]) -> list[ImageFile]:
        """Return labelled images with the corrected labels, without the dropped ones; see `correct_split`."""
        labels = [(file, self.label(file.path, file.label, class_names)) for file in files]
        for line in self.describe():
            print_note(line)
        kept = [file._replace(label=label) for file, label in labels if label is not None]
        if not kept:
            raise DataError(f"{self.path}: its verdicts drop every image")
        return kept

    def describe(self) -> list[str]:
        """Return lines that describe what has been corrected.

        Raises:
            DataError: no image has a verdict.
        """
        if not self.used:
            raise DataError(f"{self.path}: none of its {len(self.verdicts)} images with a verdict is in the data")
        lines = [f"corrections  {self.changed} labels changed, {self.dropped} images dropped ({self.path})"]
        if missing := [verdict.where for file, verdict in self.verdicts.items() if file not in self.used]:
            places = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            lines.append(f"             {len(missing)} verdicts refer to images that are not in the data: {places}")
        lines += [f"             the verdict {name} means the class {name}" for name in sorted(self.ambiguous)]
        return [printable(line) for line in lines]


def image_key(path: str | os.PathLike) -> str:
    """Return the absolute path of an image, with the links in its folder resolved; a link to the image is kept."""
    return str(Path(path).parent.resolve() / Path(path).name)
