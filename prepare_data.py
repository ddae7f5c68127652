"""Find, check and split the images of a run."""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cli_utils import UsageError, number_of_workers, read_json, worker_init
from data_utils import DataError, Split, download_flower_photos, file_checksum, find_split
from image_io import ImageError, read_image
from my_dataset import MAX_ASPECT_RATIO, MyDataSet
from sample_flowers import draw_sample

SAMPLE = Path(__file__).resolve().parent / "data" / "sample_flowers"

Files = dict[str, list[list[str]]]  # checksums of a data set's files, see `describe_files`


def find_data(args: argparse.Namespace) -> str | Path:
    """Return the folder to train on; download the photographs or draw the built-in sample if needed."""
    if args.download:
        download_flower_photos(args.data_path)
    if args.data_path:
        return args.data_path
    if not SAMPLE.exists():
        print(f"drawing the built-in sample in {SAMPLE}", flush=True)
        draw_sample(SAMPLE)
    print("no --data-path given: training on the built-in sample of drawn flowers")
    print("for your own images: --data-path FOLDER, with one sub-folder per class")
    return SAMPLE


class Checked(NamedTuple):
    """The result of checking an image file.

    `size` is in bytes, the modification `time` in ns; `checksum` is None for an unreadable file, and `problem` is the
    reason why the image is unusable, or None.
    """

    size: int
    time: int
    checksum: str | None
    problem: str | None


class _Checks(Dataset):
    """A data set of (checksum, reason why the file is unusable or None)."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str | None, str | None]:
        path = self.paths[index]
        try:
            read_image(path, min_side=16)  # decodes the whole file, but to a tiny image
        except ImageError as error:
            return file_checksum(path), str(error)
        return file_checksum(path), None


def check_images(paths: Sequence[str], known: Mapping[str, Any], workers: int = 0) -> dict[str, Checked]:
    """Read every image to find unusable ones.

    Args:
        known: an earlier result, possibly loaded from JSON. A usable file is read again only if its size or
            modification time has changed.
        workers: the number of worker processes.

    Returns:
        The results by absolute path.
    """
    result: dict[str, Checked] = {}
    unknown = []
    for path in dict.fromkeys(map(_absolute, paths)):
        size, time = _size_and_time(path)
        match known.get(path):
            case [before, then, str(checksum), None] if (before, then) == (size, time):
                result[path] = Checked(size, time, checksum, None)
            case _:
                result[path] = Checked(size, time, None, None)
                unknown.append(path)
    loader = DataLoader(
        _Checks(unknown),
        batch_size=16,
        num_workers=workers if len(unknown) > 100 else 0,  # workers take a while to start
        collate_fn=list,
        worker_init_fn=worker_init,
        generator=torch.Generator(),  # leaves the global generator alone
    )
    with tqdm(total=len(unknown), desc="checking images", leave=False, disable=None, dynamic_ncols=True) as bar:
        checks = itertools.chain.from_iterable(loader)
        for path, (checksum, problem) in zip(unknown, checks, strict=True):
            result[path] = result[path]._replace(checksum=checksum, problem=problem)
            bar.update()
    return result


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        status = Path(path).stat()
    except OSError:  # a dangling link or a forbidden folder: reported when the file is read
        return -1, -1
    return status.st_size, status.st_mtime_ns


def drop_unusable(split: Split, checked: dict[str, Checked]) -> tuple[Split, list[str]]:
    """Remove unusable images from `split`; return it and the reasons.

    Args:
        checked: the results of `check_images` for all images.

    Raises:
        DataError: a class or the validation set has no usable images.
    """

    def usable(paths: list[str], labels: list[int]) -> tuple[list[str], list[int]]:
        kept = [pair for pair in zip(paths, labels, strict=True) if checked[_absolute(pair[0])].problem is None]
        return [path for path, _ in kept], [label for _, label in kept]

    problems = [image.problem for image in checked.values() if image.problem is not None]
    left = Split(
        split.class_names,
        *usable(split.train_paths, split.train_labels),
        *usable(split.val_paths, split.val_labels),
    )
    empty = set(split.train_labels) - set(left.train_labels)
    if empty:
        first = checked[_absolute(split.train_paths[split.train_labels.index(min(empty))])]
        raise DataError(f"class {split.class_names[min(empty)]}: no usable images; {first.problem}")
    if split.val_paths and not left.val_paths:
        first = checked[_absolute(split.val_paths[0])]
        raise DataError(f"no usable validation images; {first.problem}")
    return left, problems


def describe_files(split: Split, checked: dict[str, Checked]) -> Files:
    """Describe the files of a split independently of the folder's location, to detect changes on resume.

    Returns:
        {"daisy/a.jpg": [["train", checksum]], ...}, with two entries if the name exists in both train and val. The
        checksum of an unreadable file is "".
    """
    files: Files = {}
    sides = {"train": (split.train_paths, split.train_labels), "val": (split.val_paths, split.val_labels)}
    for side, (paths, labels) in sides.items():
        for path, label in zip(paths, labels, strict=True):
            name = f"{split.class_names[label]}/{Path(path).name}"
            files.setdefault(name, []).append([side, checked[_absolute(path)].checksum or ""])
    return files


class Data(NamedTuple):
    """The data of a run: images, classes, image counts per class, reasons why images are unusable, file checksums."""

    train_set: MyDataSet
    val_set: MyDataSet
    class_names: list[str]
    counts: dict[str, tuple[int, int]]
    val_source: str
    problems: list[str]
    files: Files
    known: dict[str, Any]


def prepare_data(args: argparse.Namespace, known_images: Path) -> Data:
    """Find, check and split the images.

    Args:
        known_images: a JSON file with the results of earlier checks.
    """
    found, val_source = find_split(find_data(args), args.val_path, args.val_rate)
    if args.num_classes not in (None, len(found.class_names)):
        raise UsageError(f"--num-classes is {args.num_classes}, but the data has {len(found.class_names)} classes")
    known = read_json(known_images)
    checked = check_images(found.train_paths + found.val_paths, known, number_of_workers(args.workers))
    split, problems = drop_unusable(found, checked)
    if problems and args.strict:
        raise DataError(f"--strict: {len(problems)} unusable images; {problems[0]}")
    train_set = MyDataSet(split.train_paths, split.train_labels)
    val_set = MyDataSet(split.val_paths, split.val_labels)
    left = Split(
        found.class_names, train_set.images_path, train_set.images_class, val_set.images_path, val_set.images_class
    )
    empty = set(split.train_labels) - set(left.train_labels)
    if empty:
        name, extreme = found.class_names[min(empty)], f"more than {MAX_ASPECT_RATIO} times as long as wide"
        raise DataError(f"class {name}: no usable training images; the readable ones are {extreme}")
    if not len(val_set):
        raise DataError("no usable validation images")
    files = describe_files(found, checked)
    return Data(train_set, val_set, found.class_names, left.count(), val_source, problems, files, known | checked)
