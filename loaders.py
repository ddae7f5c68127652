"""What a training reads: its images, found, checked and divided, and the batches of them."""

import argparse
import copy
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, TensorDataset
from tqdm import tqdm

from cli_utils import UsageError, available_cores, read_json, worker_init
from config import has_single_pixels, training_sizes
from data_utils import DataError, Split, download_flower_photos, file_checksum, find_split
from distributed import Distributed
from image_io import ImageError, read_image
from model import ResNet
from my_dataset import (
    MAX_ASPECT_RATIO,
    EpochSampler,
    EvalTransform,
    Features,
    MyDataSet,
    Numbered,
    ShareSampler,
    Tolerant,
)
from sample_flowers import draw_sample
from train_eval_utils import collect_features, gather_evaluation

T = TypeVar("T")

Files = dict[str, list[list[str]]]  # of a data set: see `describe_files`

HERE = Path(__file__).resolve().parent
SAMPLE = HERE / "data" / "sample_flowers"


# --- what to train on ---------------------------------------------------------------------------------------------


def find_data(args: argparse.Namespace) -> str | Path:
    """The folder to train on: downloaded or drawn first, where that is asked for."""
    if args.download:
        download_flower_photos(args.data_path)
    if args.data_path:
        return args.data_path
    if not SAMPLE.exists():
        print(f"drawing the built-in sample in {SAMPLE}", flush=True)
        draw_sample(SAMPLE)
    print("no --data-path given: training on the built-in sample of drawn flowers")
    print("for your own images: --data-path FOLDER, with one sub-folder a class")
    return SAMPLE


class Checked(NamedTuple):
    """What is known about an image file.

    `size` in bytes, `time` of the last change in ns, `checksum` of the content (None: it cannot be read), and the
    `problem`, or None.
    """

    size: int
    time: int
    checksum: str | None
    problem: str | None


class _Checks(Dataset):
    """Each image file's checksum, and what is wrong with it."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str | None, str | None]:
        path = self.paths[index]
        try:
            read_image(path, min_side=16)  # all of the file is read, next to nothing is kept
        except ImageError as error:
            return file_checksum(path), str(error)
        return file_checksum(path), None


def check_images(paths: Sequence[str], known: Mapping[str, Any], workers: int = 0) -> dict[str, Checked]:
    """Read every image, and say what is wrong with it.

    Args:
        known: the result of another time, perhaps by way of JSON: a file of the same size and time is not read again,
            if nothing was wrong with it.
        workers: processes that read.

    Returns:
        What is known now, by the path in full.
    """
    result: dict[str, Checked] = {}
    unknown = []
    for path in dict.fromkeys(map(_in_full, paths)):
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
        num_workers=workers if len(unknown) > 100 else 0,  # which take a while to start
        collate_fn=list,
        worker_init_fn=worker_init,
        generator=torch.Generator(),  # its own: looking at files moves no global generator
    )
    with tqdm(total=len(unknown), desc="checking images", leave=False, disable=None, dynamic_ncols=True) as bar:
        checks = itertools.chain.from_iterable(loader)
        for path, (checksum, problem) in zip(unknown, checks, strict=True):
            result[path] = result[path]._replace(checksum=checksum, problem=problem)
            bar.update()
    return result


def _in_full(path: str) -> str:
    return str(Path(path).absolute())


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        status = Path(path).stat()
    except OSError:  # a link to nowhere, a folder that must not be entered: reading will tell
        return -1, -1
    return status.st_size, status.st_mtime_ns


def leave_out(split: Split, checked: dict[str, Checked]) -> tuple[Split, list[str]]:
    """`split` without the images that cannot be used, and what is wrong with each of them.

    Args:
        checked: of all its images, from `check_images`.

    Raises:
        DataError: a class, or validation, would have no image left.
    """

    def usable(paths: list[str], labels: list[int]) -> tuple[list[str], list[int]]:
        kept = [pair for pair in zip(paths, labels, strict=True) if checked[_in_full(pair[0])].problem is None]
        return [path for path, _ in kept], [label for _, label in kept]

    problems = [image.problem for image in checked.values() if image.problem is not None]
    left = Split(
        split.class_names,
        *usable(split.train_paths, split.train_labels),
        *usable(split.val_paths, split.val_labels),
    )
    empty = set(split.train_labels) - set(left.train_labels)
    if empty:
        first = checked[_in_full(split.train_paths[split.train_labels.index(min(empty))])]
        raise DataError(f"class {split.class_names[min(empty)]}: none of its images can be used; {first.problem}")
    if split.val_paths and not left.val_paths:
        first = checked[_in_full(split.val_paths[0])]
        raise DataError(f"none of the images for validation can be used; {first.problem}")
    return left, problems


def describe_files(split: Split, checked: dict[str, Checked]) -> Files:
    """What tells whether a folder has changed, wherever it lies: the checksum of each file, from `check_images`.

    {"daisy/a.jpg": [["train", checksum]], ...}; two where train and val have that name, "" for a file that cannot be
    read.
    """
    files: Files = {}
    sides = {"train": (split.train_paths, split.train_labels), "val": (split.val_paths, split.val_labels)}
    for side, (paths, labels) in sides.items():
        for path, label in zip(paths, labels, strict=True):
            name = f"{split.class_names[label]}/{Path(path).name}"
            files.setdefault(name, []).append([side, checked[_in_full(path)].checksum or ""])
    return files


class Data(NamedTuple):
    """What a run is trained and validated on: with reasons, what cannot be used; and what is known of every file."""

    train_set: MyDataSet
    val_set: MyDataSet
    class_names: list[str]
    counts: dict[str, tuple[int, int]]
    val_source: str
    problems: list[str]
    files: Files
    known: dict[str, Any]


def read_data(args: argparse.Namespace, known_images: Path) -> Data:
    """Find the images that the flags name, and leave out what cannot be used.

    Args:
        known_images: the file of what earlier runs have found out about images.
    """
    found, val_source = find_split(find_data(args), args.val_path, args.val_rate)
    if args.num_classes not in (None, len(found.class_names)):
        raise UsageError(f"--num-classes is {args.num_classes}, but the data has {len(found.class_names)} classes")
    known = read_json(known_images)
    checked = check_images(found.train_paths + found.val_paths, known, number_of_workers(args))
    split, problems = leave_out(found, checked)
    if problems and args.strict:
        raise DataError(f"--strict: {len(problems)} images cannot be used; {problems[0]}")
    train_set = MyDataSet(split.train_paths, split.train_labels)
    val_set = MyDataSet(split.val_paths, split.val_labels)
    left = Split(
        found.class_names, train_set.images_path, train_set.images_class, val_set.images_path, val_set.images_class
    )
    empty = set(split.train_labels) - set(left.train_labels)
    if empty:
        name, extreme = found.class_names[min(empty)], f"more than {MAX_ASPECT_RATIO} times as long as wide"
        raise DataError(f"class {name}: none of its images for training can be used; the readable ones are {extreme}")
    if not len(val_set):
        raise DataError("no usable image is left for validation")
    files = describe_files(found, checked)
    return Data(train_set, val_set, found.class_names, left.count(), val_source, problems, files, known | checked)


# --- batches of it ------------------------------------------------------------------------------------------------


def make_train_loader(
    train_set: MyDataSet, args: argparse.Namespace, device: torch.device, dist: Distributed
) -> DataLoader:
    """The batches of this process, in the order of each epoch; an image that cannot be read is replaced.

    Raises:
        UsageError: there are too few images for a step.
    """
    batches = ShareSampler(
        EpochSampler(len(train_set), args.seed),
        args.batch_size,
        rank=dist.rank,
        world_size=dist.world_size,
        accumulate=args.accumulate,
        # A batch of one image, where it would end as a single pixel, leaves BatchNorm nothing to average over.
        drop_single=has_single_pixels(args) and not args.freeze_layers,
        drop_last=args.sync_bn,  # which needs a batch of the same size from every process
    )
    if not batches.steps():
        few, needed = len(train_set), batches.global_batch
        dist.fail(UsageError(f"{few} images for training are too few: a step of all processes takes {needed}"))
    return make_loader(Tolerant(train_set, replace=True), batches, args, device, dist)


def make_val_loader(
    val_set: MyDataSet, args: argparse.Namespace, device: torch.device, dist: Distributed
) -> DataLoader:
    """The evaluation batches of this process, in the folder's order, of images with their numbers."""
    batches = share_of(range(len(val_set)), args.batch_size, dist)
    return make_loader(Tolerant(Numbered(val_set), replace=False), batches, args, device, dist)


def load_bn_images(train_set: MyDataSet, args: argparse.Namespace, device: torch.device, dist: Distributed) -> Tensor:
    """Load the training images for `estimate_batch_norm`, preprocessed as for evaluation.

    Returns:
        (N, 3, img_size, img_size) uint8 on the CPU: `args.bn_images` images, or all if there are fewer, at even
        distances in the data set. The same on every rank.
    """
    images = copy.copy(train_set)
    images.transform = EvalTransform(args.img_size)
    images.keep_images(0)  # the training set's cache holds images for its own transform
    indices = np.linspace(0, len(images) - 1, min(args.bn_images, len(images))).astype(int).tolist()
    batches = BatchSampler(indices, args.batch_size, drop_last=False)
    loader = make_loader(Tolerant(images, replace=True), batches, args, device, dist)
    return torch.cat([batch for batch, _ in loader])


def head_loaders(
    model: ResNet,
    train_set: MyDataSet,
    train_batches: ShareSampler,
    val_loader: DataLoader,
    args: argparse.Namespace,
    device: torch.device,
    dist: Distributed,
    **options: Any,
) -> tuple[DataLoader, DataLoader]:
    """Loaders, for training `fc` and for validating it, of what it sees of the images, which is computed here.

    Args:
        train_batches: those of training.
        val_loader: numbers its images.
        options: as `collect_logits`'s.
    """

    def features_of(loader: DataLoader) -> tuple[Tensor, Tensor]:
        return gather_evaluation(dist, functools.partial(collect_features, model, loader, device, **options))

    order, items = train_batches.order, []
    for view in range(args.feature_views):
        order.set_epoch(view, img_size=training_sizes(args)[1])
        items += sorted(order)  # by the images' indices
    images = Tolerant(train_set, replace=True)
    features, labels = features_of(make_loader(images, share_of(items, args.batch_size, dist), args, device, dist))
    views = list(zip(features.split(len(train_set)), labels.split(len(train_set)), strict=True))
    train_features = DataLoader(Features(views), batch_sampler=train_batches, generator=torch.Generator())
    features, numbers = features_of(val_loader)
    val_batches = share_of(range(len(numbers)), 1024, dist)
    return train_features, DataLoader(TensorDataset(features, numbers), batch_sampler=val_batches)


def make_loader(
    dataset: Dataset,
    batches: Iterable[Sequence[Any]],
    args: argparse.Namespace,
    device: torch.device,
    dist: Distributed,
) -> DataLoader:
    """A loader of batches of images, which other processes read."""
    workers = number_of_workers(args, dist.local_world_size)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        collate_fn=dataset.collate_fn,
        worker_init_fn=worker_init,
        generator=torch.Generator(),  # its own: loading data moves no global generator
    )


def share_of(items: Sequence[T], batch_size: int, dist: Distributed) -> list[Sequence[T]]:
    """The part of this process in the batches that one alone would have."""
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    first, after = (len(batches) * rank // dist.world_size for rank in (dist.rank, dist.rank + 1))
    return batches[first:after]


def number_of_workers(args: argparse.Namespace, processes: int = 1) -> int:
    """The processes that read images, of each of so many processes on this machine."""
    return min(max(1, available_cores() // processes), 8) if args.workers is None else args.workers
