"""DataLoaders for training and validation: samplers, datasets that tolerate broken files, cached features."""

import argparse
import contextlib
import copy
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from cli_utils import UsageError, available_memory, number_of_workers, worker_init
from config import needs_two_images, training_sizes
from distributed import Distributed
from image_cache import HAS_CACHE, ImageCache, memory_file
from image_io import ImageError
from inference import Outputs, gather_outputs, run_inference
from model import ResNet
from my_dataset import EvalTransform, MyDataSet, TrainTransform, stack_images
from prepare_data import Data

T = TypeVar("T")


# --- samplers -----------------------------------------------------------------------------------------------------


class EpochSampler(Sampler):
    """Shuffle an epoch's images, and add an augmentation seed per image and other options, for `MyDataSet`.

    Yields (index, seed), (index, seed, img_size) or (index, seed, img_size, color_jitter). The order depends on `seed`
    and the epoch, and an image's seed also on its index. Neither depends on the number of workers. Call `set_epoch`
    before each epoch.

    Args:
        size: the number of images.
        seed: the run's random seed.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0, img_size: int | None = None, color_jitter: float = 0.0) -> None:
        """Set the epoch of the next pass, from 0.

        Args:
            start: the number of images to skip when resuming mid-epoch.
            img_size: the image size in pixels; None for the transform's own.
            color_jitter: the strength of the colour jitter.
        """
        self.epoch, self.start = epoch, start
        self.img_size, self.color_jitter = img_size, color_jitter

    def __len__(self) -> int:
        return max(0, self.size - self.start)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        options = () if self.img_size is None else (self.img_size,)
        if self.color_jitter > 0:
            options = (self.img_size, self.color_jitter)
        for index in order[self.start :].tolist():
            yield index, int(np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1)[0]), *options


class DistributedBatchSampler(Sampler):
    """A `batch_sampler` for a DataLoader that gives each rank an even share of the images of each step.

    A step takes `world_size * accumulate * batch_size` images; the last step takes the rest. For a given step size, all
    ranks together see the same images in a step, whatever the world size. With several ranks, the last step is dropped
    if any of its batches would be a single image, which gives no usable estimate of BatchNorm's statistics.

    Args:
        order: the order of all images.
        batch_size: images per batch.
        accumulate: batches per step.
        drop_single_image_batches: also drop that step with one rank.
        drop_last: drop the last step if it is smaller than the others.
    """

    def __init__(
        self,
        order: EpochSampler,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        drop_single_image_batches: bool = False,
        drop_last: bool = False,
    ) -> None:
        self.order, self.batch_size = order, batch_size
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.drop_single_image_batches = drop_single_image_batches or world_size > 1
        self.drop_last = drop_last

    @property
    def global_batch(self) -> int:
        """The number of images per step over all ranks."""
        return self.batch_size * self.world_size * self.accumulate

    def steps(self) -> list[list[float]]:
        """Return, for each remaining step, the weights of its batches' mean losses.

        With these weights, a step's loss averaged over ranks is the mean over its images.
        """
        return [
            [batch * self.world_size / images for batch in self._batches(images, self.rank)] for images in self._sizes()
        ]

    def __len__(self) -> int:
        return sum(map(len, self.steps()))

    def __iter__(self) -> Iterator[list[tuple[Any, ...]]]:
        items = iter(self.order)
        for images in self._sizes():
            step_items = list(itertools.islice(items, images))
            share = step_items[self.rank :: self.world_size]
            for start in range(0, len(share), self.batch_size):
                yield share[start : start + self.batch_size]

    def _sizes(self) -> list[int]:
        whole, left = divmod(len(self.order), self.global_batch)
        single = any(1 in self._batches(left, rank) for rank in range(self.world_size))
        drops = left == 0 or self.drop_last or (single and self.drop_single_image_batches)
        return [self.global_batch] * whole + ([] if drops else [left])

    def _batches(self, images: int, rank: int) -> list[int]:
        share = len(range(rank, images, self.world_size))
        return [min(self.batch_size, share - start) for start in range(0, share, self.batch_size)]


# --- datasets -----------------------------------------------------------------------------------------------------


class SafeImages(Dataset):
    """A dataset that tolerates missing and corrupt files during a run, and reports each one on standard error.

    Args:
        images: the dataset.
        replace: substitute the next readable image and its label; otherwise the item is None, which `collate_fn` skips.
        return_index: return (image, index) instead of (image, label), to identify skipped images.

    Raises (from `[]`):
        ImageError: an image has to be replaced, but no other image is readable.
    """

    def __init__(self, images: MyDataSet, *, replace: bool, return_index: bool = False) -> None:
        self.images, self.replace, self.return_index = images, replace, return_index

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int | tuple[Any, ...]) -> tuple[Tensor | Image.Image, int] | None:
        index, *how = item if isinstance(item, tuple) else (item,)
        try:
            image, label = self.images[item]
            return image, index if self.return_index else label
        except ImageError as error:
            action = "replaced by the next image" if self.replace else "skipped"
            print(f"{error}; {action}", file=sys.stderr, flush=True)
            for offset in range(1, len(self) if self.replace else 0):
                other = (index + offset) % len(self)
                with contextlib.suppress(ImageError):  # reported when its turn comes
                    image, label = self.images[(other, *how) if how else other]
                    return image, other if self.return_index else label
            if self.replace:
                raise ImageError(f"{error}; no other image is readable") from error
            return None

    @staticmethod
    def collate_fn(batch: Sequence[tuple[Tensor, int] | None]) -> tuple[Tensor, Tensor]:
        """Collate the readable items like `MyDataSet.collate_fn`: to (0, 3, 0, 0) and (0,) if there are none."""
        readable = [item for item in batch if item is not None]
        if not readable:
            return torch.empty(0, 3, 0, 0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        return MyDataSet.collate_fn(readable)


class CachedFeatures(Dataset):
    """Precomputed features of a frozen backbone, for several augmented views of each image.

    Args:
        views: per view, the features (N, F) float32 and the labels (N,) int64 of all images.

    `dataset[index, seed, ...]` selects a view by the seed that `MyDataSet` would use for the augmentation.
    """

    def __init__(self, views: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.views = views

    def __len__(self) -> int:
        return len(self.views[0][1])

    def __getitem__(self, item: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        index, seed, *_ = item
        features, labels = self.views[seed % len(self.views)]
        return features[index], labels[index]


# --- loaders ------------------------------------------------------------------------------------------------------


class Loaders(NamedTuple):
    """The data loaders of one rank.

    Attributes:
        train: yields training images and their labels.
        val: yields validation images and their indices in the validation set.
        bn_images: training images to compute statistics on, (N, 3, img_size, img_size) uint8 on the CPU, the same on
            every rank; None if the recipe uses BatchNorm's running averages.
        val_layer1: layer1's mean activations for the validation images, see `inference.Outputs`; None if `val` yields
            images, so that they are computed anew.
    """

    train: DataLoader
    val: DataLoader
    bn_images: Tensor | None = None
    val_layer1: Tensor | None = None

    @property
    def batches(self) -> DistributedBatchSampler:
        """The training batches."""
        return self.train.batch_sampler


def build_loaders(
    args: argparse.Namespace, data: Data, img_size: int, device: torch.device, dist: Distributed
) -> Loaders:
    """Create the loaders of this rank's training and validation images, and set the datasets' transforms.

    Raises:
        UsageError: there are too few training images for one step.
    """
    cache_images((data.train_set, data.val_set), dist)
    data.train_set.transform = build_train_transform(args, img_size)
    data.val_set.transform = EvalTransform(img_size, args.resize)
    train_loader = build_train_loader(args, data.train_set, device, dist)
    val_loader = build_val_loader(args, data.val_set, device, dist)
    bn_images = None
    if args.recipe.bn_images > 0 and not args.freeze_layers:  # a frozen backbone keeps its own statistics
        bn_images = load_evenly_spaced(data.train_set, args.recipe.bn_images, data.val_set.transform)
    return Loaders(train_loader, val_loader, bn_images)


def build_train_transform(args: argparse.Namespace, img_size: int) -> TrainTransform:
    """Create the augmentation of the training images."""
    return TrainTransform(img_size, resize=args.resize, hflip=args.hflip, vflip=args.vflip)


def cache_images(data_sets: Iterable[MyDataSet], dist: Distributed) -> None:
    """Give each dataset a cache for decoded images, which may use an eighth of the available memory."""
    (cache_bytes,) = dist.all_reduce_min(available_memory() // 8)
    for images in data_sets:
        if cache_bytes > 0 and HAS_CACHE:
            images.cache = ImageCache(len(images), int(cache_bytes), dist.share_file(memory_file))


def build_train_loader(
    args: argparse.Namespace, train_set: MyDataSet, device: torch.device, dist: Distributed
) -> DataLoader:
    """Create the loader of this rank's training batches; unreadable images are replaced.

    Raises:
        UsageError: there are too few images for one step.
    """
    batches = DistributedBatchSampler(
        EpochSampler(len(train_set), args.seed),
        args.batch_size,
        rank=dist.rank,
        world_size=dist.world_size,
        accumulate=args.accumulate,
        # BatchNorm cannot normalise a batch of a single value per channel.
        drop_single_image_batches=needs_two_images(args),
        drop_last=args.sync_bn,  # SyncBatchNorm needs equal batch sizes on all ranks
    )
    if not batches.steps():
        message = f"too few training images for one step: {len(train_set)}; {batches.global_batch} are enough"
        dist.fail(UsageError(message))
    workers = number_of_workers(args.workers, dist.local_world_size)
    return make_loader(SafeImages(train_set, replace=True), batches, workers, device)


def build_val_loader(
    args: argparse.Namespace, val_set: MyDataSet, device: torch.device, dist: Distributed
) -> DataLoader:
    """Create the loader of this rank's validation images and their indices; unreadable images are skipped.

    On a GPU, small batches are up to four times as large as in training: inference needs less memory per image.
    """
    larger = min(4 * args.batch_size, 128) if device.type == "cuda" else 0
    batches = rank_share(range(len(val_set)), max(args.batch_size, larger), dist)
    workers = number_of_workers(args.workers, dist.local_world_size)
    return make_loader(SafeImages(val_set, replace=False, return_index=True), batches, workers, device)


def load_evenly_spaced(data_set: MyDataSet, number: int, transform: EvalTransform) -> Tensor:
    """Load `number` evenly spaced images, or all if there are fewer, preprocessed as for evaluation.

    Returns:
        (N, 3, img_size, img_size) uint8. Unreadable images are replaced.
    """
    images = copy.copy(data_set)
    images.transform = transform
    readable = SafeImages(images, replace=True)
    indices = np.linspace(0, len(images) - 1, min(number, len(images))).astype(int).tolist()
    return stack_images([readable[index][0] for index in indices])


class FeatureStore:
    """Features of a frozen backbone, computed once and shared by several runs on subsets of a dataset.

    Args:
        paths, labels: all images of the runs, with the labels of their classes.
    """

    def __init__(self, paths: Sequence[str], labels: Sequence[int]) -> None:
        self.paths, self.labels = list(paths), list(labels)
        self.features: Features | None = None


class Features(NamedTuple):
    """The features of images for training and for evaluation, and the positions of the image files in them.

    Attributes:
        views: see `CachedFeatures`.
        val: the labels are the images' indices.
    """

    views: list[tuple[Tensor, Tensor]]
    train_rows: dict[str, int]
    val: Outputs
    val_rows: dict[str, int]


def cache_features(
    args: argparse.Namespace,
    model: ResNet,
    loaders: Loaders,
    img_size: int,
    device: torch.device,
    dist: Distributed,
    amp_dtype: torch.dtype | None = None,
    after_batch: Callable[[], None] | None = None,
    store: FeatureStore | None = None,
) -> Loaders:
    """Compute the features of a frozen backbone, and create the loaders to train and validate `fc` on them.

    Args:
        loaders: the loaders of the images.
        amp_dtype, after_batch: see `run_inference`.
        store: keeps the features for the next run on images of the same dataset.
    """
    train_set, val_set = loaders.train.dataset.images, loaders.val.dataset.images
    options = {"amp_dtype": amp_dtype, "feature_stride": 1, "after_batch": after_batch}
    compute = functools.partial(compute_features, args, model, img_size, device, dist, **options)
    if store is None:
        features = compute(train_set, val_set)
    else:
        all_images = [with_images(images, store.paths, store.labels) for images in (train_set, val_set)]
        features = store.features = store.features or compute(*all_images)
    rows = [features.train_rows[path] for path in train_set.images_path]
    views = [(values[rows], labels[rows]) for values, labels in features.views]
    train_loader = DataLoader(CachedFeatures(views), batch_sampler=loaders.batches, generator=torch.Generator())
    kept = [index for index, path in enumerate(val_set.images_path) if path in features.val_rows]
    rows = [features.val_rows[val_set.images_path[index]] for index in kept]
    val_batches = rank_share(range(len(kept)), 1024, dist)
    val_images = TensorDataset(features.val.features[rows], torch.tensor(kept))
    val_loader = DataLoader(val_images, batch_sampler=val_batches)
    return Loaders(train_loader, val_loader, val_layer1=features.val.layer1[rows])


def compute_features(
    args: argparse.Namespace,
    model: ResNet,
    img_size: int,
    device: torch.device,
    dist: Distributed,
    train_set: MyDataSet,
    val_set: MyDataSet,
    **options: Any,
) -> Features:
    """Compute the features of several augmented views of the training images, and those of the validation images.

    Args:
        options: keyword arguments for `run_inference`.
    """
    workers = number_of_workers(args.workers, dist.local_world_size)

    def compute(images: SafeImages, items: Sequence[Any]) -> Outputs:
        loader = make_loader(images, rank_share(items, args.batch_size, dist), workers, device)
        return gather_outputs(functools.partial(run_inference, model, loader, device, **options), dist)

    order, items = EpochSampler(len(train_set), args.seed), []
    for view in range(args.recipe.feature_views):
        order.set_epoch(view, img_size=training_sizes(args.recipe, img_size)[1])
        items += sorted(order)  # sorted by image index
    train = compute(SafeImages(train_set, replace=True), items)
    views = list(zip(train.features.split(order.size), train.labels.split(order.size), strict=True))
    val = compute(SafeImages(val_set, replace=False, return_index=True), range(len(val_set)))
    val_rows = {val_set.images_path[index]: row for row, index in enumerate(val.labels.tolist())}
    return Features(views, {path: row for row, path in enumerate(train_set.images_path)}, val, val_rows)


def with_images(data_set: MyDataSet, paths: Sequence[str], labels: Sequence[int]) -> MyDataSet:
    """Return a copy of a dataset with other images and without a cache."""
    images = copy.copy(data_set)
    images.images_path, images.images_class, images.cache = list(paths), list(labels), None
    return images


def make_loader(dataset: Dataset, batches: Iterable[Sequence[Any]], workers: int, device: torch.device) -> DataLoader:
    """Create a DataLoader whose workers read the images."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        collate_fn=dataset.collate_fn,
        worker_init_fn=worker_init,
        generator=torch.Generator(),  # leaves the global generator alone
    )


def rank_share(items: Sequence[T], batch_size: int, dist: Distributed) -> list[Sequence[T]]:
    """Split items into batches, and return this rank's contiguous share of the batches."""
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    first, after = (len(batches) * rank // dist.world_size for rank in (dist.rank, dist.rank + 1))
    return batches[first:after]
