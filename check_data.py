"""Check a folder of images before training on it.

python check_data.py FOLDER                      # one sub-folder per class, or train and val; draws data_health.png
python check_data.py FOLDER --val-path DIR --save-plot health.pdf --csv duplicates.csv

Exit status: 0 without label conflicts, 1 if a picture is in several classes, 2 if the folder could not be checked.
"""

import argparse
import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cli_utils import (
    FlagParser,
    UsageError,
    atomic_file,
    available_cores,
    escape_unprintable_output,
    explain_resource_error,
    flush_stdout,
    printable,
    worker_init,
    write_csv,
)
from data_utils import DataError, Split, file_checksum, find_split
from image_io import ImageError, read_header, read_image
from my_dataset import MAX_ASPECT_RATIO

# Thresholds for near-identical images, measured on photographs and drawn flowers of 64 px or more. Copies (re-encoded
# at quality 30 or more, or resized smoothly by a factor of 0.5 to 2) differ by at most 5 bits, 3.6 luma and 9.2 chroma.
# Among 2,936 photographs and 1,000 drawn flowers, no two distinct images with hashes that close differ by less than
# 6.7 luma. On 28 px digits the ranges overlap: quality 30 costs up to 5.3 luma, and two handwritten ones may differ by
# less.
THUMBNAIL = 16  # side length in pixels
HASH_BITS = 63  # an 8 x 8 block of DCT coefficients without the mean
FAINTEST = 1.0  # grey levels; weaker variation may be noise and is ignored
MAX_BITS = 8  # Hamming distance
MAX_LUMA, MAX_CHROMA = 5.0, 12.0  # RMS differences of thumbnails; JPEG compresses chroma more
MAX_SPREAD = 3  # multiple of these limits allowed between a group's first image and the others

PAIRS_AT_A_TIME = 2**20  # pairs of hashes
THUMBNAILS_AT_A_TIME = 2**12  # pairs of thumbnails, which fit into the CPU cache

MANY_IMAGES = 100  # above this, use workers, which take a while to start
SMALL_SIDE = 224  # pixels: train.py's default image size
UNBALANCED = 10  # warn from this ratio of the largest class to the smallest
LISTED_FILES, LISTED_GROUPS, LISTED_MEMBERS = 10, 20, 6  # maximum numbers to print
FIGURE_PAIRS = 8  # maximum number of label conflicts in the figure
FIGURE_FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg")


class Picture(NamedTuple):
    """The header, checksum and thumbnail (see `make_thumbnail`) of an image file; or the `problem` of reading it."""

    problem: str | None
    format: str = ""
    mode: str = ""
    size: tuple[int, int] = (0, 0)  # width and height in pixels, upright
    checksum: str = ""
    thumbnail: np.ndarray | None = None


class Member(NamedTuple):
    """An image of the folder."""

    path: str
    label: int
    side: str  # "training" or "validation"


class Group(NamedTuple):
    """Images of the same picture; `identical` if their files are equal byte for byte."""

    members: list[Member]
    identical: bool

    @property
    def conflict(self) -> bool:
        """Whether the images are in several classes."""
        return len({member.label for member in self.members}) > 1

    @property
    def leak(self) -> bool:
        """Whether the images are in both training and validation."""
        return len({member.side for member in self.members}) > 1

    @property
    def kind(self) -> str:
        return "identical" if self.identical else "near-identical"


def check_data(args: argparse.Namespace) -> int:
    """Run all checks and return the exit status."""
    plot_path = _output(args, "--save-plot", args.save_plot, FIGURE_FORMATS)
    csv_path = _output(args, "--csv", args.csv, (".csv",))
    split, val_source = find_split(args.folder, args.val_path, args.val_rate)
    images = [Member(*image, "training") for image in zip(split.train_paths, split.train_labels, strict=True)]
    images += [Member(*image, "validation") for image in zip(split.val_paths, split.val_labels, strict=True)]
    pictures = read_pictures([image.path for image in images], args.workers)

    print_classes(split, val_source)
    print_files(pictures)
    usable = [(image, picture) for image, picture in zip(images, pictures, strict=True) if picture.problem is None]
    without = set(split.train_labels) - {image.label for image, _ in usable if image.side == "training"}
    if without:
        raise DataError(f"class {split.class_names[min(without)]}: none of its images for training can be used")

    groups = find_groups(usable)
    print_groups(groups, split.class_names, args.folder)
    if csv_path:
        write_groups(groups, split.class_names, args.folder, csv_path)
        print(f"all of these groups: {printable(str(csv_path))}")
    if plot_path:
        save_figure(split, [picture.size for _, picture in usable], groups, plot_path)
        print(f"figure: {printable(str(plot_path))}")
    conflicts = sum(group.conflict for group in groups)
    leaks = sum(group.leak for group in groups)
    print(
        f"{'LABEL CONFLICTS' if conflicts else 'no label conflict'}: "
        f"{conflicts} {'picture' if conflicts == 1 else 'pictures'} in several classes, {leaks} in both training and "
        f"validation, {len(groups)} more than once in all; {len(images) - len(usable)} of {len(images)} files unusable"
    )
    return 1 if conflicts else 0


def _output(args: argparse.Namespace, flag: str, name: str | None, formats: Sequence[str]) -> Path | None:
    """Return a flag's output path, or None if it is empty.

    Raises:
        UsageError: the format is unsupported, the folder is missing, or the file would be inside the data, where the
            next run would read it. A data folder that is the working directory is allowed.
    """
    if not name:
        return None
    path = Path(name)
    if not (path.suffix.lower() in formats and path.parent.is_dir()):
        raise UsageError(f"{flag} {path}: give a file in an existing folder, {' '.join(formats)}")
    folder = path.parent.resolve()
    for data in map(Path.resolve, map(Path, filter(None, (args.folder, args.val_path)))):
        if folder.is_relative_to(data) and not folder == data == Path.cwd().resolve():
            raise UsageError(f"{flag} {path}: that is inside the data; name a file somewhere else")
    return path


# --- reading ------------------------------------------------------------------------------------------------------


class _Pictures(Dataset):
    """A data set that reads each file as a `Picture`."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Picture:
        path = self.paths[index]
        try:
            header = read_header(path)
            thumbnail = make_thumbnail(read_image(path, min_side=8 * THUMBNAIL))
            checksum = file_checksum(path)
            if checksum is None:
                raise ImageError(f"cannot read image {path!r}: it has vanished")
        except ImageError as error:
            return Picture(str(error))
        return Picture(None, *header, checksum, thumbnail)


def read_pictures(paths: Sequence[str], workers: int | None = None) -> list[Picture]:
    """Read each file, in `workers` processes (None: one per core, at most 8)."""
    workers = min(available_cores(), 8) if workers is None else workers
    loader = DataLoader(
        _Pictures(paths),
        batch_size=16,
        num_workers=workers if len(paths) > MANY_IMAGES else 0,
        collate_fn=list,
        worker_init_fn=worker_init,
        generator=torch.Generator(),  # leaves the global generator alone
    )
    pictures = itertools.chain.from_iterable(loader)
    bar = tqdm(pictures, total=len(paths), desc="reading images", leave=False, disable=None, dynamic_ncols=True)
    return list(bar)


# --- duplicates ---------------------------------------------------------------------------------------------------


def make_thumbnail(image: Image.Image) -> np.ndarray:
    """Resize an RGB image of any aspect ratio to a YCbCr thumbnail, (16, 16, 3) uint8."""
    small = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
    return np.asarray(small.convert("YCbCr"))


def perceptual_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """Hash thumbnails (N, 16, 16, 3) uint8 to (N,) uint64: 63 bits, few of which change when an image is re-encoded.

    The bits come from the low frequencies of the luma's DCT, after the "DCT based" hash of Zauner (2010),
    https://www.phash.org/docs/pubs/thesis_zauner.pdf. A bit is set if its coefficient is above `FAINTEST`, not the
    median as there, because noise decides the median of flat images.
    """
    frequency, place = np.ogrid[:8, :THUMBNAIL]
    basis = np.cos(np.pi * frequency * (2 * place + 1) / (2 * THUMBNAIL)) * np.sqrt(2 / THUMBNAIL)
    basis[0] /= np.sqrt(2)
    basis = basis.astype(np.float32)
    strengths = basis @ thumbnails[..., 0].astype(np.float32) @ basis.T / THUMBNAIL
    bits = strengths.reshape(-1, 64)[:, 1:] > FAINTEST
    return bits @ (np.uint64(1) << np.arange(HASH_BITS, dtype=np.uint64))


def near_groups(hashes: np.ndarray, thumbnails: np.ndarray) -> np.ndarray:
    """Group near-identical images, directly or through a chain of others.

    Two images are near-identical if their hashes differ by at most `MAX_BITS` bits and their thumbnails by at most
    `MAX_LUMA` and `MAX_CHROMA`. A long chain (the frames of a film, shades of grey) is split by `MAX_SPREAD`.

    Args:
        hashes: (N,) uint64, from `perceptual_hashes`.
        thumbnails: (N, 16, 16, 3) uint8.

    Returns:
        (N,) int64: for each image, the index of the first image of its group.
    """
    first: dict[bytes, int] = {}
    groups = np.array([first.setdefault(pixels.tobytes(), i) for i, pixels in enumerate(thumbnails)], dtype=np.int64)
    distinct = np.unique(groups)  # compares thousands of blank images only once
    for left, right in near_hashes(hashes[distinct], thumbnails[distinct, ..., 0].mean((1, 2))):
        left, right = distinct[left], distinct[right]
        for start in range(0, len(left), THUMBNAILS_AT_A_TIME):
            a, b = (side[start : start + THUMBNAILS_AT_A_TIME] for side in (left, right))
            apart = groups[a] != groups[b]  # some have been joined meanwhile
            a, b = a[apart], b[apart]
            alike = _alike(thumbnails[a], thumbnails[b])
            _join(groups, a[alike], b[alike])
    _cut_chains(groups, thumbnails)
    return groups


def near_hashes(hashes: np.ndarray, brightness: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Find all pairs of hashes that differ by at most `MAX_BITS` bits, and in brightness by at most `MAX_LUMA`.

    If hashes are split into `MAX_BITS` + 1 chunks, two such hashes have at least one chunk in common: "Fast Search in
    Hamming Space with Multi-Index Hashing" (Norouzi et al. 2012, https://arxiv.org/abs/1307.2982). Hashes with a common
    chunk are sorted by brightness, and each is compared with the next few.

    Args:
        hashes: (N,) uint64.
        brightness: (N,) floats from 0 to 255.

    Yields:
        The indices of the first and the second hash of some pairs, (M,) int64 each. Each pair occurs once.
    """
    width = -(-HASH_BITS // (MAX_BITS + 1))
    mask = np.uint64(2**width - 1)
    for shift in range(0, HASH_BITS, width):
        part = (hashes >> np.uint64(shift)) & mask
        keys = part * 1024.0 + brightness  # the chunks are further apart than any brightness
        order = np.argsort(keys)
        keys, codes = keys[order], hashes[order]
        counts = np.searchsorted(keys, keys + MAX_LUMA + 1e-6, side="right") - np.arange(len(keys)) - 1
        ends = np.cumsum(counts)
        following = np.arange(1, len(keys) + 1) - ends + counts
        start = 0
        while start < len(keys):
            before = ends[start] - counts[start]
            stop = max(start + 1, int(np.searchsorted(ends, before + PAIRS_AT_A_TIME, side="right")))
            left = np.repeat(np.arange(start, stop), counts[start:stop])
            right = np.arange(before, ends[stop - 1]) + np.repeat(following[start:stop], counts[start:stop])
            differing = codes[left] ^ codes[right]
            near = np.flatnonzero(_count_bits(differing) <= MAX_BITS)
            for earlier in range(0, shift, width):  # drop pairs already found by an earlier chunk
                near = near[(differing[near] >> np.uint64(earlier)) & mask != 0]
            yield order[left[near]], order[right[near]]
            start = stop


_BITS = np.array([bin(value).count("1") for value in range(2**16)], dtype=np.uint8)  # np.bitwise_count needs NumPy 2.0
# (16 * 16 * 3, 2): averages the luma, and both chroma channels, of flattened thumbnails
_MEANS = np.tile(np.array([[1, 0], [0, 0.5], [0, 0.5]], dtype=np.float32) / THUMBNAIL**2, (THUMBNAIL**2, 1))


def _count_bits(values: np.ndarray) -> np.ndarray:
    counts = _BITS[values.view(np.uint16)].reshape(-1, 4)
    return counts[:, 0] + counts[:, 1] + counts[:, 2] + counts[:, 3]


def _alike(left: np.ndarray, right: np.ndarray, spread: float = 1) -> np.ndarray:
    """Return whether thumbnails (N, 16, 16, 3) uint8 differ by at most `spread` times the limits: (N,) bool."""
    difference = np.subtract(left, right, dtype=np.float32).reshape(-1, 3 * THUMBNAIL**2)
    luma, chroma = (np.square(difference, out=difference) @ _MEANS).T
    return (luma <= (spread * MAX_LUMA) ** 2) & (chroma <= (spread * MAX_CHROMA) ** 2)


def _join(groups: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Merge the groups of the given pairs in place (union-find); `groups` maps each image to its group's first one."""
    for a, b in zip(groups[left].tolist(), groups[right].tolist(), strict=True):
        while groups[a] != a:
            a = groups[a]
        while groups[b] != b:
            b = groups[b]
        groups[max(a, b)] = min(a, b)
    while len(left) and (groups[groups] != groups).any():
        groups[:] = groups[groups]


def _cut_chains(groups: np.ndarray, thumbnails: np.ndarray) -> None:
    """Keep in each group only the images similar to its first one, and regroup the others in the same way."""
    order = np.argsort(groups, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        while len(members) > 1:
            close = _alike(thumbnails[members[:1]], thumbnails[members], MAX_SPREAD)
            groups[members[close]] = members[0]
            members = members[~close]
            groups[members] = members[:1]


def find_groups(usable: Sequence[tuple[Member, Picture]]) -> list[Group]:
    """Return the groups of duplicates: label conflicts first, then leaks, then the rest."""
    if not usable:
        return []
    thumbnails = np.stack([picture.thumbnail for _, picture in usable])
    members: dict[int, list[int]] = {}
    for index, group in enumerate(near_groups(perceptual_hashes(thumbnails), thumbnails).tolist()):
        members.setdefault(group, []).append(index)
    groups = [
        Group([usable[i][0] for i in indices], len({usable[i][1].checksum for i in indices}) == 1)
        for indices in members.values()
        if len(indices) > 1
    ]
    return sorted(groups, key=lambda group: (not group.conflict, not group.leak))


# --- output -------------------------------------------------------------------------------------------------------


def print_classes(split: Split, val_source: str) -> None:
    """Print the number of images per class."""
    train, val = Counter(split.train_labels), Counter(split.val_labels)
    names = [printable(name) for name in split.class_names]
    width = max(map(len, [*names, "class"]))
    print(f"{split}\nvalidation: {printable(val_source)}\n\n{'class':{width}}  training  validation")
    for label, name in enumerate(names):
        print(f"{name:{width}}  {train[label]:8}  {val[label]:10}")
    most, least = max(train, key=train.get), min(train, key=train.get)
    if train[most] >= UNBALANCED * train[least]:
        print(
            f"very unbalanced: {names[most]} has {train[most] / train[least]:.0f} times as many images for training as "
            f"{names[least]}; a network does well without ever learning the rare classes"
        )


def print_files(pictures: Sequence[Picture]) -> None:
    """Print sizes, modes and formats, and the unusable files with reasons."""
    usable = [picture for picture in pictures if picture.problem is None]
    if usable:
        sizes = sorted((picture.size for picture in usable), key=lambda size: (size[0] * size[1], size))
        smallest, median, largest = (f"{w} x {h}" for w, h in (sizes[0], sizes[len(sizes) // 2], sizes[-1]))
        small = sum(min(size) < SMALL_SIDE for size in sizes)
        extreme = sum(max(size) > MAX_ASPECT_RATIO * min(size) for size in sizes)
        print(f"\nsize in pixels: {smallest} the smallest, {median} the median, {largest} the largest")
        print(f"shorter side below {SMALL_SIDE} px: {small}")
        print(f"left out by train.py, more than {MAX_ASPECT_RATIO} times as long as wide or as wide as long: {extreme}")
        for what in ("mode", "format"):
            counts = Counter(getattr(picture, what) for picture in usable).most_common()
            print(f"{what}: {', '.join(f'{name} {count}' for name, count in counts)}")
    problems = [picture.problem for picture in pictures if picture.problem is not None]
    print(f"unusable: {len(problems)}")
    for problem in problems[:LISTED_FILES]:
        print(f"  {printable(problem)}")
    _print_more(len(problems) - LISTED_FILES, "files", "  ")


def print_groups(groups: Sequence[Group], class_names: Sequence[str], root: str) -> None:
    """Print the first label conflicts, leaks and other duplicates."""
    conflicts = [group for group in groups if group.conflict]
    leaks = [group for group in groups if group.leak and not group.conflict]
    rest = [group for group in groups if not group.leak and not group.conflict]
    for title, part in (
        ("LABEL CONFLICT: the same picture in several classes", conflicts),
        ("LEAK: the same picture in training and validation", leaks),
        ("more than once, in one class", rest),
    ):
        print(f"\n{title}: {len(part)}")
        for group in part[:LISTED_GROUPS]:
            print(f"  {group.kind}{', also a LEAK' if group.conflict and group.leak else ''}:")
            for member in group.members[:LISTED_MEMBERS]:
                where = f"{class_names[member.label]}, {member.side}"
                print(f"    {printable(relative(member.path, root))}  ({printable(where)})")
            _print_more(len(group.members) - LISTED_MEMBERS, "images", "    ")
        _print_more(len(part) - LISTED_GROUPS, "groups (--csv lists them all)", "  ")
    print()


def _print_more(count: int, what: str, indent: str) -> None:
    if count > 0:
        print(f"{indent}... and {count} more {what}")


def relative(path: str, root: str) -> str:
    """Return `path` relative to `root`, or unchanged if it is outside, as a validation folder may be."""
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
            "split": member.side,
            "path": relative(member.path, root),
        }
        for number, group in enumerate(groups, start=1)
        for member in group.members
    ]
    write_csv(rows, path, columns=("group", "kind", "conflict", "leak", "class", "split", "path"))


def save_figure(split: Split, sizes: Sequence[tuple[int, int]], groups: Sequence[Group], path: Path) -> None:
    """Plot class counts, image sizes and the first label conflicts, and save the figure."""
    from plot_utils import data_health  # imports matplotlib, which is slow, only if needed

    pairs = []
    for group in itertools.islice((group for group in groups if group.conflict), FIGURE_PAIRS):
        first = group.members[0]
        pair = (first, next(member for member in group.members if member.label != first.label))
        with contextlib.suppress(ImageError):  # the file has disappeared meanwhile
            images = [np.asarray(read_image(member.path, min_side=SMALL_SIDE)) for member in pair]
            pairs.append((images, [split.class_names[m.label] for m in pair], [Path(m.path).name for m in pair]))
    classes = len(split.class_names)
    counts = [
        np.bincount(np.array(labels, dtype=int), minlength=classes) for labels in (split.train_labels, split.val_labels)
    ]
    with atomic_file(path) as unfinished:
        data_health(split.class_names, *counts, np.array(sizes), pairs).savefig(unfinished)


def complain(error: Exception) -> None:
    """Print an error as one line on standard error."""
    print(f"check_data.py: {printable(str(error))}", file=sys.stderr, flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exit with one line if a value is invalid."""
    parser = FlagParser(prog="check_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="a folder with one sub-folder a class, or with train and val in it")
    add("--val-path", metavar="DIR", help="a folder of the same form to validate on")
    add("--val-rate", type=float, default=0.2, help="the part of each class to validate on (default: %(default)s)")
    add("--workers", type=int, help="processes that read images (default: one a core, at most 8)")
    add("--save-plot", metavar="OUT.png", default="data_health.png", help='"" for none (default: %(default)s)')
    add("--csv", metavar="OUT.csv", help="list all pictures that are there more than once")
    args = parser.parse_args(argv)
    if not args.folder or args.val_path == "":
        parser.error('a folder is ""; it must be the name of one')
    if not 0 <= args.val_rate < 1:
        parser.error(f"--val-rate is {args.val_rate}; it must be at least 0 and below 1")
    if args.workers is not None and args.workers < 0:
        parser.error(f"--workers is {args.workers}; it must be at least 0")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit status."""
    escape_unprintable_output()
    args = parse_args(argv)
    try:
        status = check_data(args)
        print(end="", flush=True)
        return status
    except BrokenPipeError:  # `check_data.py folder | head`
        return 2
    except (MemoryError, RuntimeError, ConnectionError, EOFError) as error:
        reason = explain_resource_error(error, "free some, or try --workers 0", "try --workers 0")
        if reason is None:
            raise
        complain(UsageError(reason))
        return 2
    except (DataError, UsageError, OSError) as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        flush_stdout()


if __name__ == "__main__":
    sys.exit(main())
