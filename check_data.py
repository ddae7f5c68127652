"""Check a folder of images before training on it.

python check_data.py FOLDER                      # one sub-folder per class, or train and val; draws data_health.png
python check_data.py FOLDER --val-path DIR --save-plot health.pdf --csv duplicates.csv

Exit status: 0 if there are no label conflicts, 1 if a picture is in several classes, 2 if the check failed.
"""

import argparse
import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli_utils import FIGURE_FORMATS, FlagParser, UsageError, checked, printable, run_program
from corrections import Corrections
from dataset_split import VAL_RATE, Split, find_split, require_usable_images
from duplicates import MAX_COMPARED, Picture, find_duplicates, read_pictures
from file_utils import atomic_file, output_path, write_csv
from image_folders import UNKNOWN_TYPE, Skipped
from image_io import ImageError, PixelRange, read_image

SMALL_SIDE = 224  # pixels: train.py's default image size
UNBALANCED = 10  # warn from this ratio of the largest class to the smallest
LISTED_FILES, LISTED_GROUPS, LISTED_MEMBERS = 10, 20, 6  # maximum numbers to print
LOOK_ALIKES = 10  # warn if at least this many pictures, and images of a class, look alike as thumbnails
FIGURE_PAIRS = 8  # maximum number of label conflicts in the figure
SUBSETS = {"train": "training", "val": "validation", "test": "test"}


class Member(NamedTuple):
    """An image of the dataset."""

    path: str
    label: int
    subset: str  # "training", "validation" or "test"


class Group(NamedTuple):
    """Images that show the same picture; `identical` if their files are equal byte by byte."""

    members: list[Member]
    identical: bool

    @property
    def conflict(self) -> bool:
        """Whether the images are in several classes."""
        return len({member.label for member in self.members}) > 1

    @property
    def leak(self) -> bool:
        """Whether the images are in more than one subset."""
        return len({member.subset for member in self.members}) > 1

    @property
    def kind(self) -> str:
        return "identical" if self.identical else "near-identical"


def check_data(args: argparse.Namespace) -> int:
    """Run all checks and return the exit status."""
    folders = (args.folder, args.val_path)
    plot_path = output_outside_data("--save-plot", args.save_plot, FIGURE_FORMATS, [*folders, args.corrections])
    csv_path = output_outside_data("--csv", args.csv, (".csv",), [*folders, args.corrections])
    split, val_source = find_split(args.folder, args.val_path, args.val_rate, args.test_rate)
    if args.corrections:
        split = Corrections(args.corrections).correct_split(split)
    images = [
        Member(*image, SUBSETS[subset])
        for subset, (paths, labels) in split.subsets.items()
        for image in zip(paths, labels, strict=True)
    ]
    paths = [image.path for image in images]
    read, pixel_range = read_pictures(paths, args.workers)
    pictures = dict(zip(paths, read, strict=True))

    left = split.drop([picture.skipped for picture in pictures.values() if picture.skipped is not None])
    usable = [(image, pictures[image.path]) for image in images if pictures[image.path].skipped is None]
    print_classes(left, val_source)
    print_files([picture for _, picture in usable], pixel_range)
    print_skipped(left.skipped)
    require_usable_images(split, left, lambda path: pictures[path].skipped)

    groups, look_alikes = find_groups(usable, pixel_range, args.workers)
    print_groups(groups, split.class_names, args.folder)
    print_look_alikes(look_alikes, Counter(image.label for image, _ in usable), split.class_names)
    if csv_path:
        write_groups(groups, split.class_names, args.folder, csv_path)
        print(f"all groups: {printable(str(csv_path))}")
    if plot_path:
        save_figure(left, [picture.size for _, picture in usable], groups, plot_path)
        print(f"figure: {printable(str(plot_path))}")
    conflicts = sum(group.conflict for group in groups)
    leaks = sum(group.leak for group in groups)
    print(
        f"{'LABEL CONFLICTS' if conflicts else 'no label conflicts'}: "
        f"{conflicts} {'picture' if conflicts == 1 else 'pictures'} in several classes, {leaks} in several "
        f"subsets, {len(groups)} duplicated in total; {len(left.skipped)} of "
        f"{len(usable) + len(left.skipped)} files skipped"
    )
    return 1 if conflicts else 0


def output_outside_data(
    flag: str, name: str | None, formats: Sequence[str], folders: Sequence[str | None]
) -> Path | None:
    """Return the path of an output file, which must be outside the data folders: the next run would read it there.

    The working directory is allowed even if it is a data folder.

    Raises:
        UsageError: the path is inside the data folders, or is one of the tables. For other errors, see `output_path`.
    """
    path = output_path(flag, name, formats)
    if path is not None:
        if any(folder and path.resolve() == Path(folder).resolve() for folder in folders):
            raise UsageError(f"{flag} {path}: would overwrite an input table; choose another name")
        parent = path.parent.resolve()
        for data in (Path(folder).resolve() for folder in folders if folder):
            if parent.is_relative_to(data) and not parent == data == Path.cwd().resolve():
                raise UsageError(f"{flag} {path}: is inside the data folder; choose another folder")
    return path


def find_groups(
    usable: Sequence[tuple[Member, Picture]], pixel_range: PixelRange | None, workers: int | None = None
) -> tuple[list[Group], Counter[int]]:
    """Find images that show the same picture.

    Returns:
        The groups of duplicates: label conflicts first, then leaks, then the rest; and for each label, the number of
        images whose thumbnails look alike although they show `LOOK_ALIKES` or more different pictures.
    """
    if not usable:
        return [], Counter()
    paths = [image.path for image, _ in usable]
    same, alike = find_duplicates(paths, [picture for _, picture in usable], pixel_range, workers)
    members: dict[int, list[int]] = {}
    for index, picture in enumerate(same.tolist()):
        members.setdefault(picture, []).append(index)
    groups = [
        Group([usable[i][0] for i in indices], len({usable[i][1].checksum for i in indices}) == 1)
        for indices in members.values()
        if len(indices) > 1
    ]
    different = np.bincount(alike[np.unique(same)], minlength=len(usable)) >= LOOK_ALIKES
    look_alikes = Counter(usable[i][0].label for i in np.flatnonzero(different[alike]))
    return sorted(groups, key=lambda group: (not group.conflict, not group.leak)), look_alikes


# --- output -------------------------------------------------------------------------------------------------------


def print_classes(split: Split, val_source: str) -> None:
    """Print the number of images per class, and warn if the classes are unbalanced."""
    counts = split.count()
    width = max(len(printable(name)) for name in [*counts, "class"])
    columns = f"training  validation{'  test' if split.test_paths else ''}"
    print(f"{split}\nvalidation: {printable(val_source)}\n\n{'class':{width}}  {columns}")
    for name, count in counts.items():
        test = f"  {count.test:4}" if split.test_paths else ""
        print(f"{printable(name):{width}}  {count.train:8}  {count.val:10}{test}")
    unvalidated = [printable(name) for name, count in counts.items() if not count.val]
    if split.val_paths and unvalidated:
        print(f"no validation images of {', '.join(unvalidated)}")
    most, least = (choose(counts, key=lambda name: counts[name].train) for choose in (max, min))
    largest, fewest = counts[most].train, counts[least].train
    if largest >= UNBALANCED * fewest > 0:
        print(
            f"very unbalanced: {printable(most)} has {largest / fewest:.0f} times as many training images as "
            f"{printable(least)}; a network can reach a high accuracy without learning the rare classes"
        )


def print_files(usable: Sequence[Picture], pixel_range: PixelRange | None) -> None:
    """Print the sizes, modes and formats of the usable images, and the range of their pixel values."""
    if not usable:
        return
    sizes = sorted((picture.size for picture in usable), key=lambda size: (size[0] * size[1], size))
    smallest, median, largest = (f"{w} x {h}" for w, h in (sizes[0], sizes[len(sizes) // 2], sizes[-1]))
    print(f"\nsize in pixels: smallest {smallest}, median {median}, largest {largest}")
    print(f"shorter side below {SMALL_SIDE} px: {sum(min(size) < SMALL_SIDE for size in sizes)}")
    for attribute in ("mode", "format"):
        counts = Counter(getattr(picture, attribute) for picture in usable).most_common()
        print(f"{attribute}: {', '.join(f'{name} {count}' for name, count in counts)}")
    if pixel_range:
        print(f"pixel range: {pixel_range[0]:g} to {pixel_range[1]:g}, scaled to 8 bits")


def print_skipped(skipped: Sequence[Skipped]) -> None:
    """Print the first skipped files with the reasons, images first."""
    images_first = sorted(skipped, key=lambda file: file.kind == UNKNOWN_TYPE)
    for file in images_first[:LISTED_FILES]:
        print(f"  {printable(str(file))}")
    _print_more(len(skipped) - LISTED_FILES, "files", "  ")


def print_groups(groups: Sequence[Group], class_names: Sequence[str], root: str) -> None:
    """Print the first label conflicts, leaks and other duplicates."""
    conflicts = [group for group in groups if group.conflict]
    leaks = [group for group in groups if group.leak and not group.conflict]
    others = [group for group in groups if not group.leak and not group.conflict]
    for title, listed in (
        ("LABEL CONFLICT: the same picture in several classes", conflicts),
        ("LEAK: the same picture in several of training, validation and test", leaks),
        ("DUPLICATE: the same picture more than once in a class", others),
    ):
        print(f"\n{title}: {len(listed)}")
        for group in listed[:LISTED_GROUPS]:
            print(f"  {group.kind}{', also a LEAK' if group.conflict and group.leak else ''}:")
            for member in group.members[:LISTED_MEMBERS]:
                place = f"{class_names[member.label]}, {member.subset}"
                print(f"    {printable(relative(member.path, root))}  ({printable(place)})")
            _print_more(len(group.members) - LISTED_MEMBERS, "images", "    ")
        _print_more(len(listed) - LISTED_GROUPS, "groups (--csv lists them all)", "  ")
    print()


def print_look_alikes(look_alikes: Counter[int], totals: Counter[int], class_names: Sequence[str]) -> None:
    """Print a warning if many images of a class look alike as thumbnails, as pages of text do."""
    labels = sorted(label for label, count in look_alikes.items() if count >= LOOK_ALIKES)
    if labels:
        names = [f"{printable(class_names[i])} ({look_alikes[i]} of {totals[i]} images)" for i in labels]
        more = f" and {len(names) - LISTED_GROUPS} more classes" if len(names) > LISTED_GROUPS else ""
        print(
            f"LOOK-ALIKES: near-duplicates cannot be told apart reliably in {', '.join(names[:LISTED_GROUPS])}{more}; "
            f"they are nearly equal as thumbnails; in detail, each was compared with the {MAX_COMPARED} most similar\n"
        )


def _print_more(count: int, things: str, indent: str) -> None:
    if count > 0:
        print(f"{indent}... and {count} more {things}")


def relative(path: str, root: str) -> str:
    """Return `path` relative to `root`, or unchanged if it is outside, as in a separate validation folder."""
    return str(Path(path).relative_to(root)) if Path(path).is_relative_to(root) else path


def write_groups(groups: Sequence[Group], class_names: Sequence[str], root: str, path: Path) -> None:
    """Write a CSV file with one row for each image of each group."""
    rows = [
        {
            "group": number,
            "kind": group.kind,
            "conflict": int(group.conflict),
            "leak": int(group.leak),
            "class": class_names[member.label],
            "split": member.subset,
            "path": relative(member.path, root),
        }
        for number, group in enumerate(groups, start=1)
        for member in group.members
    ]
    write_csv(rows, path, columns=("group", "kind", "conflict", "leak", "class", "split", "path"))


def save_figure(split: Split, sizes: Sequence[tuple[int, int]], groups: Sequence[Group], path: Path) -> None:
    """Plot class counts, image sizes and the first label conflicts to a file."""
    from plot_utils import data_health  # imports matplotlib, which is slow to load

    pairs = []
    for group in itertools.islice((group for group in groups if group.conflict), FIGURE_PAIRS):
        first = group.members[0]
        pair = (first, next(member for member in group.members if member.label != first.label))
        with contextlib.suppress(ImageError):  # the file has since been removed
            images = [np.asarray(read_image(member.path, min_side=SMALL_SIDE)) for member in pair]
            pairs.append((images, [split.class_names[m.label] for m in pair], [Path(m.path).name for m in pair]))
    classes = len(split.class_names)
    counts = {
        SUBSETS[subset]: np.bincount(np.array(labels, dtype=int), minlength=classes)
        for subset, (_, labels) in split.subsets.items()
        if labels or subset != "test"
    }
    with atomic_file(path) as unfinished:
        data_health(split.class_names, counts, np.array(sizes), pairs).savefig(unfinished)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exit with one line if a value is invalid."""
    parser = FlagParser(prog="check_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    folder_help = "a folder with one sub-folder per class, or with train and val; or a CSV table"
    add("folder", metavar="FOLDER", help=folder_help)
    add("--val-path", metavar="DIR", help="a validation folder with one sub-folder per class, or a table")
    rate = checked(float, lambda x: 0 <= x < 1, "at least 0 and below 1")
    add("--val-rate", type=rate, default=VAL_RATE, help="fraction of each class to hold out (default: %(default)s)")
    test_help = "fraction of each class to hold out for testing (default: %(default)g)"
    add("--test-rate", type=rate, default=0.0, help=test_help)
    corrections_help = "apply the verdicts in this table, such as label_issues.csv of cross_validate.py"
    add("--corrections", type=checked(str, bool, "the name of a table"), metavar="CSV", help=corrections_help)
    count = checked(int, lambda n: n >= 0, "at least 0")
    add("--workers", type=count, help="worker processes that read images (default: one per core, at most 16)")
    add(
        "--save-plot",
        metavar="OUT.png",
        default="data_health.png",
        help='figure to write, "" for none (default: %(default)s)',
    )
    add("--csv", metavar="OUT.csv", help="write all duplicates to a CSV file")
    args = parser.parse_args(argv)
    if not args.folder or args.val_path == "":
        parser.error("a folder name is empty")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program(
        "check_data.py",
        lambda: check_data(parse_args(argv)),
        memory_advice="close other programs, or try --workers 0",
        worker_advice="try --workers 0",
        error_status=2,
    )


if __name__ == "__main__":
    sys.exit(main())
