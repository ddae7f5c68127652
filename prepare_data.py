"""Find, check and split the images of a run."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cli_utils import DataError, UsageError, map_files, number_of_workers
from data_utils import Split, file_checksum, find_split, require_training_images
from download import download_flower_photos
from file_utils import read_json
from image_io import ImageError, read_image
from my_dataset import MAX_ASPECT_RATIO, MyDataSet
from sample_flowers import draw_sample

SAMPLE = Path(__file__).resolve().parent / "data" / "sample_flowers"

Files = dict[str, list[list[str]]]  # the checksums of the image files, see `describe_files`


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
    print("to use your own images: --data-path FOLDER, with one sub-folder per class")
    return SAMPLE


class ImageCheck(NamedTuple):
    """The result of checking an image file."""

    size: int  # bytes
    time: int  # of the last modification, ns
    checksum: str | None  # None if the file is unreadable
    problem: str | None  # the reason why the image is unusable


def check_images(paths: Sequence[str], known: Mapping[str, Any], workers: int = 0) -> dict[str, ImageCheck]:
    """Decode every image to find the unusable ones.

    Args:
        known: earlier results, possibly loaded from JSON. A usable file is read again only if its size or modification
            time has changed.
        workers: the number of worker processes.

    Returns:
        The results by absolute path.
    """
    result: dict[str, ImageCheck] = {}
    unknown = []
    for path in dict.fromkeys(map(_absolute, paths)):
        size, time = _size_and_time(path)
        match known.get(path):
            case [before, then, str(checksum), None] if (before, then) == (size, time):
                result[path] = ImageCheck(size, time, checksum, None)
            case _:
                result[path] = ImageCheck(size, time, None, None)
                unknown.append(path)
    for path, (checksum, problem) in zip(
        unknown, map_files(_check_image, unknown, workers, "checking images"), strict=True
    ):
        result[path] = result[path]._replace(checksum=checksum, problem=problem)
    return result


def _check_image(path: str) -> tuple[str | None, str | None]:
    """Return a file's checksum, and the reason why the image is unusable or None."""
    try:
        read_image(path, min_side=16)  # decodes the whole file, but to a tiny image
    except ImageError as error:
        return file_checksum(path), str(error)
    return file_checksum(path), None


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        status = Path(path).stat()
    except OSError:  # a dangling link, or a folder without permission: reported when the file is read
        return -1, -1
    return status.st_size, status.st_mtime_ns


def drop_unusable(split: Split, checked: dict[str, ImageCheck]) -> tuple[Split, list[str]]:
    """Remove the unusable images from a split.

    Args:
        checked: the results of `check_images` for all images.

    Returns:
        The usable images, and the reasons why the others are unusable.

    Raises:
        DataError: there are no usable training images of a class, or no usable validation images.
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
    require_training_images(split, left.train_labels, lambda path: checked[_absolute(path)].problem)
    if split.val_paths and not left.val_paths:
        raise DataError(f"no usable validation images; {checked[_absolute(split.val_paths[0])].problem}")
    return left, problems


def describe_files(split: Split, checked: dict[str, ImageCheck]) -> Files:
    """Describe the files of a split, to detect changes on resume, even if the folder is moved.

    Returns:
        {"daisy/a.jpg": [["train", checksum]], ...}, with two entries if the file exists in both train and val. The
        checksum of an unreadable file is "".
    """
    files: Files = {}
    subsets = {"train": (split.train_paths, split.train_labels), "val": (split.val_paths, split.val_labels)}
    for subset, (paths, labels) in subsets.items():
        for path, label in zip(paths, labels, strict=True):
            name = f"{split.class_names[label]}/{Path(path).name}"
            files.setdefault(name, []).append([subset, checked[_absolute(path)].checksum or ""])
    return files


class Data(NamedTuple):
    """The data of a run."""

    train_set: MyDataSet
    val_set: MyDataSet
    class_names: list[str]
    counts: dict[str, tuple[int, int]]  # training and validation images per class
    val_source: str  # where the validation images come from
    problems: list[str]  # the reasons why images are unusable
    files: Files
    known: dict[str, Any]  # all results of `check_images`, including earlier ones


def prepare_data(args: argparse.Namespace, known_images: Path) -> Data:
    """Find, check and split the images.

    Args:
        known_images: a JSON file with the results of earlier checks, which may be missing.
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
    extreme = f"the readable ones have an aspect ratio above {MAX_ASPECT_RATIO}"
    require_training_images(split, left.train_labels, lambda path: extreme)
    if not len(val_set):
        raise DataError(f"no usable validation images; {extreme}")
    files = describe_files(found, checked)
    return Data(train_set, val_set, found.class_names, left.count(), val_source, problems, files, known | checked)
