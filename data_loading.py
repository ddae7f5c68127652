"""DataLoaders for training and validation: samplers, data sets that tolerate broken files, cached features."""

import argparse
import contextlib
import copy
import functools
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, TensorDataset

from cli_utils import UsageError, number_of_workers, worker_init
from config import has_single_pixels, training_sizes
from distributed import Distributed
from image_io import ImageError
from model import ResNet
from my_dataset import EvalTransform, MyDataSet
from train_eval_utils import collect_features, gather_evaluation

T = TypeVar("T")


# --- samplers -----------------------------------------------------------------------------------------------------


class EpochSampler(Sampler):
    """The order of an epoch's images, with an augmentation seed per image and the image size, for `MyDataSet`.

    Yields (index, seed) or (index, seed, img_size). The order depends on `seed` and the epoch; an image's seed on
    `seed`, the epoch and the image's index. Neither depends on the number of workers. Call `set_epoch` before each
    epoch.

    Args:
        size: the number of images.
        seed: the run's random seed.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0, img_size: int | None = None) -> None:
        """Set the epoch of the next pass, from 0.

        Args:
            start: the number of images to skip when resuming mid-epoch.
            img_size: the image size in pixels; None for the transform's own.
        """
        self.epoch = epoch
        self.start = start
        self.img_size = img_size

    def __len__(self) -> int:
        return max(0, self.size - self.start)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        img_size = () if self.img_size is None else (self.img_size,)
        for index in order[self.start :].tolist():
            yield index, int(np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1)[0]), *img_size


class DistributedBatchSampler(Sampler):
    """The batches of one rank, for a DataLoader's `batch_sampler`: an even share of the images of each step.

    A step takes `world_size * accumulate * batch_size` images; the last step takes the rest. For a given step size, all
    ranks together see the same images in a step, whatever the world size.

    Args:
        order: the order of all images.
        batch_size: images per batch.
        accumulate: batches per step.
        drop_single: drop the last step if any of its batches would be a single image.
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
        drop_single: bool = False,
        drop_last: bool = False,
    ) -> None:
        self.order, self.batch_size = order, batch_size
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.drop_single, self.drop_last = drop_single, drop_last

    @property
    def global_batch(self) -> int:
        """The number of images per step over all ranks."""
        return self.batch_size * self.world_size * self.accumulate

    def steps(self) -> list[list[float]]:
        """Return, for each remaining step, the weights of its batches' mean losses.

        With these weights, a step's loss averaged over ranks is the mean over its images. A rank without images gets
        one with weight 0.
        """
        weights = []
        for images in self._sizes():
            batches = self._batches(images, self.rank)
            weights.append([batch * self.world_size / images for batch in batches] or [0.0])
        return weights

    def __len__(self) -> int:
        return sum(map(len, self.steps()))

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        items = iter(self.order)
        for images in self._sizes():
            of_step = list(itertools.islice(items, images))
            share = of_step[self.rank :: self.world_size] or of_step[:1]
            for start in range(0, len(share), self.batch_size):
                yield share[start : start + self.batch_size]

    def _sizes(self) -> list[int]:
        whole, left = divmod(len(self.order), self.global_batch)
        single = any(1 in self._batches(left, rank) for rank in range(min(self.world_size, left)))
        drops = left == 0 or self.drop_last or (single and self.drop_single)
        return [self.global_batch] * whole + ([] if drops else [left])

    def _batches(self, images: int, rank: int) -> list[int]:
        share = len(range(rank, images, self.world_size))
        return [min(self.batch_size, share - start) for start in range(0, share, self.batch_size)]


# --- data sets ----------------------------------------------------------------------------------------------------


class SafeImages(Dataset):
    """A data set whose files may disappear or become corrupt during a run; each one is reported on standard error.

    Args:
        images: the data set.
        replace: substitute the next readable image and its label; otherwise the item is None, which `collate_fn` skips.
        return_index: return (image, index) instead of (image, label), to identify skipped images.

    Raises (from `[]`):
        ImageError: an image has to be replaced, but no other image is readable.
    """

    def __init__(self, images: MyDataSet, *, replace: bool, return_index: bool = False) -> None:
        self.images, self.replace, self.return_index = images, replace, return_index

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int | tuple[int, ...]) -> tuple[Tensor | Image.Image, int] | None:
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
                    return self.images[(other, *how) if how else other]
            if self.replace:
                raise ImageError(f"{error}; nor any other image") from error
            return None

    @staticmethod
    def collate_fn(batch: Sequence[tuple[Tensor, int] | None]) -> tuple[Tensor, Tensor]:
        """Collate the readable items as `MyDataSet.collate_fn`; (0, 3, 0, 0) and (0,) if there are none."""
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

    def __getitem__(self, item: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        index, seed, *_ = item
        features, labels = self.views[seed % len(self.views)]
        return features[index], labels[index]


# --- loaders ------------------------------------------------------------------------------------------------------


def make_train_loader(
    train_set: MyDataSet, args: argparse.Namespace, device: torch.device, dist: Distributed
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
        drop_single=has_single_pixels(args) and not args.freeze_layers,
        drop_last=args.sync_bn,  # SyncBatchNorm needs equal batch sizes on all ranks
    )
    if not batches.steps():
        few, needed = len(train_set), batches.global_batch
        dist.fail(UsageError(f"{few} training images are too few: one step over all ranks takes {needed}"))
    return make_loader(SafeImages(train_set, replace=True), batches, args, device, dist)


def make_val_loader(
    val_set: MyDataSet, args: argparse.Namespace, device: torch.device, dist: Distributed
) -> DataLoader:
    """Create the loader of this rank's validation images and their indices; unreadable images are skipped."""
    batches = rank_share(range(len(val_set)), args.batch_size, dist)
    return make_loader(SafeImages(val_set, replace=False, return_index=True), batches, args, device, dist)


def load_bn_images(train_set: MyDataSet, args: argparse.Namespace, device: torch.device, dist: Distributed) -> Tensor:
    """Load the training images for `estimate_batch_norm`, preprocessed as for evaluation.

    Returns:
        (N, 3, img_size, img_size) uint8 on the CPU: `args.bn_images` images, or all if there are fewer, evenly spaced
        in the data set and the same on every rank.
    """
    images = copy.copy(train_set)  # drops the cache
    images.transform = EvalTransform(args.img_size)
    indices = np.linspace(0, len(images) - 1, min(args.bn_images, len(images))).astype(int).tolist()
    batches = BatchSampler(indices, args.batch_size, drop_last=False)
    loader = make_loader(SafeImages(images, replace=True), batches, args, device, dist)
    return torch.cat([batch for batch, _ in loader])


def head_loaders(
    model: ResNet,
    train_set: MyDataSet,
    train_batches: DistributedBatchSampler,
    val_loader: DataLoader,
    args: argparse.Namespace,
    device: torch.device,
    dist: Distributed,
    **options: Any,
) -> tuple[DataLoader, DataLoader]:
    """Compute the features of a frozen backbone, and create the loaders to train and validate `fc` on them.

    Args:
        train_batches: the training batches.
        val_loader: yields images and their indices.
        options: keyword arguments for `collect_logits`.
    """

    def features_of(loader: DataLoader) -> tuple[Tensor, Tensor]:
        return gather_evaluation(dist, functools.partial(collect_features, model, loader, device, **options))

    order, items = train_batches.order, []
    for view in range(args.feature_views):
        order.set_epoch(view, img_size=training_sizes(args)[1])
        items += sorted(order)  # sorted by image index
    images = SafeImages(train_set, replace=True)
    features, labels = features_of(make_loader(images, rank_share(items, args.batch_size, dist), args, device, dist))
    views = list(zip(features.split(len(train_set)), labels.split(len(train_set)), strict=True))
    train_features = DataLoader(CachedFeatures(views), batch_sampler=train_batches, generator=torch.Generator())
    features, numbers = features_of(val_loader)
    val_batches = rank_share(range(len(numbers)), 1024, dist)
    return train_features, DataLoader(TensorDataset(features, numbers), batch_sampler=val_batches)


def make_loader(
    dataset: Dataset,
    batches: Iterable[Sequence[Any]],
    args: argparse.Namespace,
    device: torch.device,
    dist: Distributed,
) -> DataLoader:
    """Create a DataLoader whose workers read the images."""
    workers = number_of_workers(args.workers, dist.local_world_size)
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
