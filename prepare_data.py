"""Find, check and split the images of a run."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cli_utils import DataError, UsageError, map_files, number_of_workers
from corrections import Corrections
from dataset_split import Count, Split, find_split, require_usable_images
from download import download_flower_photos
from file_utils import read_json
from image_folders import UNREADABLE, UNSUPPORTED, Skipped, file_checksum, unreadable
from image_io import ImageError, PixelRange, merge_pixel_ranges, read_image, read_pixel_range
from my_dataset import EXTREME, MyDataSet, is_extreme
from sample_flowers import SAMPLE, draw_sample

Files = dict[str, list[list[str]]]  # the checksums of the image files, see `describe_files`


def find_data(args: argparse.Namespace) -> str | Path:
    """Return the folder or table to train on; download the photographs or draw the built-in sample if needed."""
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
    pixel_range: PixelRange | None  # see `read_pixel_range`
    skipped: Skipped | None  # why the image is unusable


def check_images(paths: Sequence[str], known: Mapping[str, Any], workers: int = 0) -> dict[str, ImageCheck]:
    """Decode every image, to find the unusable ones.

    Args:
        known: earlier results, possibly loaded from JSON. A usable file is read again only if its size or modification
            time has changed.
        workers: the number of worker processes.

    Returns:
        The results by absolute path.
    """
    result: dict[str, ImageCheck] = {}
    unknown = {}
    for path in paths:
        status, absolute = _size_and_time(path), _absolute(path)
        match known.get(absolute):
            case [size, time, str(checksum), None | [float(), float()] as pixels, None] if (size, time) == status:
                result[absolute] = ImageCheck(*status, checksum, pixels and tuple(pixels), None)
            case _:
                result[absolute] = ImageCheck(*status, None, None, None)
                unknown[absolute] = path
    findings = map_files(_check_image, list(unknown.values()), workers, "checking images")
    for path, (checksum, pixel_range, skipped) in zip(unknown, findings, strict=True):
        result[path] = result[path]._replace(checksum=checksum, pixel_range=pixel_range, skipped=skipped)
    return result


def _check_image(path: str) -> tuple[str | None, PixelRange | None, Skipped | None]:
    """Return a file's checksum, its pixel range, and why the image is unusable or None."""
    pixel_range, skipped = None, None
    try:
        read_image(path, min_side=16)  # decodes the whole file, but to a tiny image
        pixel_range = read_pixel_range(path)
        if is_extreme(path):
            skipped = Skipped(path, EXTREME, EXTREME)
    except ImageError as error:
        skipped = unreadable(path, error)
    return file_checksum(path), pixel_range, skipped


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        status = Path(path).stat()
    except OSError:  # a dangling link, or a folder without permission: reported when the file is read
        return -1, -1
    return status.st_size, status.st_mtime_ns


def drop_unusable(split: Split, checked: dict[str, ImageCheck]) -> Split:
    """Return a split without the unusable images, which are added to its skipped files.

    Args:
        checked: the results of `check_images` for all images.

    Raises:
        DataError: see `require_usable_images`.
    """
    images = dict.fromkeys(split.paths)
    unusable = {path: checked[_absolute(path)].skipped for path in images}
    usable = split.drop([skipped._replace(path=path) for path, skipped in unusable.items() if skipped is not None])
    require_usable_images(split, usable, unusable.get)
    return usable


def _accept_extreme(image: ImageCheck) -> ImageCheck:
    is_skipped = image.skipped is not None and image.skipped.kind == EXTREME
    return image._replace(skipped=None) if is_skipped else image


def describe_files(split: Split, checked: dict[str, ImageCheck]) -> Files:
    """Describe the files of a split, to detect changes on resume, even if the folder is moved.

    Returns:
        {"daisy/a.jpg": [["train", checksum]], ...}, with two entries if the file exists in both train and val. An
        unusable image has "skipped" instead of "train", "val" or "test", and the checksum "" if it is unreadable.
    """
    files: Files = {}
    for subset, (paths, labels) in split.subsets.items():
        for path, label in zip(paths, labels, strict=True):
            name = f"{split.class_names[label]}/{Path(path).name}"
            image = checked[_absolute(path)]
            files.setdefault(name, []).append([subset if image.skipped is None else "skipped", image.checksum or ""])
    return files


class Data(NamedTuple):
    """The data of a run."""

    train_set: MyDataSet
    val_set: MyDataSet
    test_images: list[tuple[str, str]]  # path and class
    class_names: list[str]
    counts: dict[str, Count]  # images per class
    val_source: str  # where the validation images come from
    leaked: dict[str, int]  # "val": identical to a training image; "test": to a training or validation image
    skipped: list[Skipped]
    pixel_range: PixelRange | None  # of the images with more than 8 bits
    files: Files
    known: dict[str, Any]  # all results of `check_images`, including earlier ones


def prepare_data(args: argparse.Namespace, known_images: Path, checkpoint: Mapping[str, Any] | None = None) -> Data:
    """Find, check and split the images.

    Args:
        known_images: a JSON file with the results of earlier checks, which may be missing.
        checkpoint: the checkpoint of a run to resume, whose pixel range is kept.
    """
    found, val_source = find_split(find_data(args), args.val_path, args.val_rate, args.test_rate)
    if args.corrections:
        found = Corrections(args.corrections).correct_split(found)
    if args.num_classes not in (None, len(found.class_names)):
        raise UsageError(f"--num-classes is {args.num_classes}, but the data has {len(found.class_names)} classes")
    known = read_json(known_images)
    checked = check_images(found.paths, known, number_of_workers(args.workers))
    known |= checked
    if args.resize == "pad":  # extreme shapes are usable, as nothing is cut off
        checked = {path: _accept_extreme(image) for path, image in checked.items()}
    split = drop_unusable(found, checked)
    unusable = [file for file in split.skipped if file.kind in (UNREADABLE, UNSUPPORTED)]
    if unusable and args.strict:
        raise DataError(f"--strict: unusable images found: {len(unusable)}; {unusable[0]}")
    if checkpoint is None:
        seen = [checked[_absolute(path)] for path in split.train_paths + split.val_paths]
        pixel_range = merge_pixel_ranges(image.pixel_range for image in seen)
    else:
        pixel_range = checkpoint.get("pixel_range")
    options = {"pixel_range": pixel_range, "skip_extreme": False}  # they have been dropped above
    checksums = {
        subset: [checked[_absolute(path)].checksum for path in paths] for subset, (paths, _) in split.subsets.items()
    }
    seen = {"val": set(checksums["train"]), "test": {*checksums["train"], *checksums["val"]}}
    return Data(
        train_set=MyDataSet(split.train_paths, split.train_labels, **options),
        val_set=MyDataSet(split.val_paths, split.val_labels, **options),
        test_images=[
            (path, split.class_names[label]) for path, label in zip(split.test_paths, split.test_labels, strict=True)
        ],
        class_names=split.class_names,
        counts=split.count(),
        val_source=val_source,
        leaked={subset: sum(checksum in others for checksum in checksums[subset]) for subset, others in seen.items()},
        skipped=split.skipped,
        pixel_range=pixel_range,
        files=describe_files(found, checked),
        known=known,
    )
