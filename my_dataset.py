"""Images and labels as a data set: transforms, normalisation, collation, and the order of an epoch."""

import contextlib
import functools
import itertools
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from image_io import ImageError, aspect_ratio, decode, read_image

# Of the images of ImageNet, in RGB, on a scale of 0 to 1: what torchvision's weights expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

MAX_ASPECT_RATIO = 10


class MyDataSet(Dataset):
    """Images and their labels, read when they are asked for.

    Args:
        images_path: the image files.
        images_class: the label of each, an int from 0.
        transform: takes a PIL RGB image; without one the PIL image itself is the item. One with an attribute
            `min_side`, as this module's have, takes a uint8 tensor (3, H, W): the image that `read_image` gives.
        cache_bytes: keep images that `min_side` made smaller, for the epochs to come, in this much memory at most.
            It fills as they are read; the workers of a DataLoader share it, where they are forked (as on Linux).

    Images whose width/height is above 10 or below 0.1 are left out, with a line that says so; the lists given are not
    touched. `images_path` and `images_class` hold what is left.

    `dataset[i]` is (image, label). `dataset[i, seed]` draws what is random in the transform from `seed` and leaves the
    global generator as it was, so that an item does not depend on the process or the order it is read in;
    `dataset[i, seed, img_size]` asks the transform for another size.

    Raises (from `dataset[i]`):
        ImageError: the file cannot be read.
    """

    def __init__(
        self,
        images_path: Sequence[str | os.PathLike],
        images_class: Sequence[int],
        transform: Callable | None = None,
        *,
        cache_bytes: int = 0,
    ) -> None:
        if len(images_path) != len(images_class):
            raise ValueError(f"{len(images_path)} images, but {len(images_class)} labels")
        usable = [not _is_extreme(path) for path in images_path]
        self.images_path = [path for path, use in zip(images_path, usable, strict=True) if use]
        self.images_class = [label for label, use in zip(images_class, usable, strict=True) if use]
        self.transform = transform
        self.keep_images(cache_bytes)
        left_out = [os.fspath(path) for path, use in zip(images_path, usable, strict=True) if not use]
        if left_out:
            names = ", ".join(map(repr, left_out[:3])) + (", ..." if len(left_out) > 3 else "")
            print(
                f"{len(left_out)} of {len(images_path)} images left out, more than {MAX_ASPECT_RATIO} times as long as "
                f"wide or as wide as long: {names}"
            )

    def keep_images(
        self,
        cache_bytes: int,
        shared_memory: Callable[[int], mmap.mmap] | None = None,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        """Start with empty memory of that size: see `cache_bytes`.

        Args:
            shared_memory: maps a number of bytes, shared by several processes. Each fills its own part, and all read
                everything.
            part: which one this process fills, from 0, of how many.
        """
        images = len(self.images_path)
        self._cache = _ImageCache(images, cache_bytes, shared_memory, part, parts) if cache_bytes > 0 else None

    def __len__(self) -> int:
        return len(self.images_path)

    def __getitem__(self, item: int | tuple[int, ...]) -> tuple[Tensor | Image.Image, int]:
        index, seed, *img_size = item if isinstance(item, tuple) else (item, None)
        image = self._image(index)
        if self.transform is not None:
            with torch.random.fork_rng(devices=[], enabled=seed is not None):
                if seed is not None:
                    torch.default_generator.manual_seed(seed)
                image = self.transform(image, *img_size)
        return image, self.images_class[index]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": None}  # memory can be inherited, not sent: spawned workers do without

    def _image(self, index: int) -> Image.Image | Tensor:
        path, min_side = self.images_path[index], getattr(self.transform, "min_side", None)
        if min_side is None:
            return read_image(path)
        pixels = self._cache.get(index) if self._cache else None
        if pixels is None:
            image, is_reduced = decode(path, min_side)
            pixels = F.pil_to_tensor(image)
            if self._cache and is_reduced:
                self._cache.put(index, pixels)
        return pixels

    @staticmethod
    def collate_fn(batch: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """[(image (3, H, W), label)] -> images (N, 3, H, W) of the same dtype, labels (N,) int64.

        uint8 images come in channels-last order, in which a decoded image lies in memory and convolutions are fast.
        """
        images, labels = zip(*batch, strict=True)
        return stack_images(images), torch.as_tensor(labels, dtype=torch.int64)


class _ImageCache:
    """Decoded images (3, H, W) uint8, in memory that this process shares with those forked from it."""

    def __init__(
        self, images: int, size: int, shared_memory: Callable[[int], mmap.mmap] | None, part: int, parts: int
    ) -> None:
        # A mapping takes memory when it is written to; torch's shared tensors take all of it at once.
        memory = (shared_memory or functools.partial(mmap.mmap, -1))(24 * images + size)
        places = torch.frombuffer(memory, dtype=torch.int64, count=3 * images)
        self._places = places.view(images, 3)  # start, height, width
        self._pixels = torch.frombuffer(memory, dtype=torch.uint8, offset=24 * images)
        self._used = torch.multiprocessing.get_context().Value("q", size * part // parts)
        self._end = size * (part + 1) // parts

    def get(self, index: int) -> Tensor | None:
        start, height, width = self._places[index].tolist()
        if width == 0:
            return None
        return self._pixels[start : start + 3 * height * width].view(height, width, 3).permute(2, 0, 1)

    def put(self, index: int, image: Tensor) -> None:
        """Keep an image, if there is still room for it."""
        pixels = image.permute(1, 2, 0).flatten()
        with self._used.get_lock():
            start = self._used.value
            if start + len(pixels) > self._end:
                return
            self._used.value += len(pixels)
        self._pixels[start : start + len(pixels)] = pixels
        self._places[index] = torch.tensor([start, *image.shape[1:]])


class Features(Dataset):
    """What a frozen backbone says of images, each seen several times with another augmentation.

    Args:
        views: of each time, the features (N, F) float32 and the labels (N,) int64, in the order of the images.

    `[index, seed, ...]` takes the view that the seed tells, as `MyDataSet` draws the augmentation.
    """

    def __init__(self, views: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.views = views

    def __len__(self) -> int:
        return len(self.views[0][1])

    def __getitem__(self, item: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        index, seed, *_ = item
        features, labels = self.views[seed % len(self.views)]
        return features[index], labels[index]


class Numbered(Dataset):
    """`images`, each with its number in place of its label: where some cannot be read, the others can be told apart."""

    def __init__(self, images: MyDataSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor | Image.Image, int]:
        return self.images[index][0], index


class Tolerant(Dataset):
    """Images for long runs, during which files vanish and break: each such file is a line on standard error.

    Args:
        images: what to read.
        replace: the next image that can be read, with its label, takes the place of one that cannot; otherwise that
            is left out of its batch.

    Raises (from `[]`):
        ImageError: it is to be replaced, and no image at all can be read.
    """

    def __init__(self, images: MyDataSet | Numbered, *, replace: bool) -> None:
        self.images = images
        self.replace = replace

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int | tuple[int, ...]) -> tuple[Tensor | Image.Image, int] | None:
        index, *how = item if isinstance(item, tuple) else (item,)
        try:
            return self.images[item]
        except ImageError as error:
            print(
                f"{error}; {'the next image takes its place' if self.replace else 'left out'}",
                file=sys.stderr,
                flush=True,
            )
            for offset in range(1, len(self) if self.replace else 0):
                other = (index + offset) % len(self)
                with contextlib.suppress(ImageError):  # which gets a line of its own when its turn comes
                    return self.images[(other, *how) if how else other]
            if self.replace:
                raise ImageError(f"{error}; nor any other image") from error
            return None

    @staticmethod
    def collate_fn(batch: Sequence[tuple[Tensor, int] | None]) -> tuple[Tensor, Tensor]:
        """As `MyDataSet.collate_fn`, of those that could be read; (0, 3, 0, 0) and (0,) if there are none."""
        readable = [item for item in batch if item is not None]
        if not readable:
            return torch.empty(0, 3, 0, 0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        return MyDataSet.collate_fn(readable)


def _is_extreme(path: str | os.PathLike) -> bool:
    try:
        return aspect_ratio(path) > MAX_ASPECT_RATIO
    except ImageError:
        return False  # reported when the image is read


class EpochSampler(Sampler):
    """The order of an epoch, a seed for each image's augmentation, and its size, for `MyDataSet`.

    Yields (index, seed) or (index, seed, img_size): the order is a function of `seed` and the epoch, an image's seed
    one of `seed`, the epoch and the image's index. Neither depends on the number of workers, nor on what ran before.
    The order lives in the main process, so that workers that persist over epochs need not be told. Call `set_epoch`
    before each epoch. An epoch that was broken off goes on at an image of its order.

    Args:
        size: the number of images.
        seed: of the run.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0, img_size: int | None = None) -> None:
        """Say which epoch, from 0, the next pass is.

        Args:
            start: how many of its images it leaves out at the beginning.
            img_size: pixels of the square that its images become; None: as the transform has it.
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


class ShareSampler(Sampler):
    """The batches of one of several processes: of each step's images an even share, cut into batches.

    A step takes `world_size * accumulate * batch_size` images of the order, the last one what is left, so that all
    processes together see the same images in it, however many they are. It is for a DataLoader's `batch_sampler`.

    Args:
        order: of all images.
        batch_size: images of one process that go through the network at a time.
        rank, world_size: which process, of how many.
        accumulate: the batches of a whole step.
        drop_single: leave a last step out in which the batch of a process would be one image.
        drop_last: leave a last step out that is smaller than the others.
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
        """The images of a step, of all processes."""
        return self.batch_size * self.world_size * self.accumulate

    def steps(self) -> list[list[float]]:
        """Of each step that is left: how much the mean loss of each of its batches counts.

        So much that the mean over the processes, of their sums over a step, is the mean over all of its images. A
        process that has no image left gets one that does not count.
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


# --- transforms and normalisation ---------------------------------------------------------------------------------


class TrainTransform:
    """RGB image -> uint8 (3, img_size, img_size): a random resized crop and a horizontal flip, the tutorial's.

    Args:
        img_size: pixels.

    `min_side`: more pixels than that the image need not have on its shorter side. At 224 px it makes photographs
    the size of ImageNet's, whose smallest crops are enlarged likewise.
    """

    def __init__(self, img_size: int = 224) -> None:
        self.img_size = img_size
        self.min_side = math.ceil(1.5 * img_size)
        self.crop = v2.RandomResizedCrop(img_size, antialias=True)
        self.flip = v2.RandomHorizontalFlip()

    def __call__(self, image: Image.Image | Tensor, img_size: int | None = None) -> Tensor:
        """PIL image or uint8 (3, H, W) -> uint8 (3, img_size, img_size)."""
        self.crop.size = [img_size or self.img_size] * 2
        return self.flip(self.crop(_to_tensor(image)))


class EvalTransform:
    """RGB image -> uint8 (3, img_size, img_size): the shorter side to 256/224 of the size, then the centre.

    `min_side`: as `TrainTransform`'s.
    """

    def __init__(self, img_size: int = 224) -> None:
        self.min_side = math.ceil(1.5 * img_size)
        self.img_size = img_size
        self.shorter_side = round(img_size * 256 / 224)

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """PIL image or uint8 (3, H, W) -> uint8 (3, img_size, img_size)."""
        pixels = _to_tensor(image)
        # Only the centre is looked at: what lies far from it needs no scaling (a picture of 1 x 20,000 pixels).
        height, width = pixels.shape[-2:]
        pixels = F.center_crop(pixels, [min(height, width * MAX_ASPECT_RATIO), min(width, height * MAX_ASPECT_RATIO)])
        return F.center_crop(F.resize(pixels, [self.shorter_side], antialias=True), [self.img_size])


def _to_tensor(image: Image.Image | Tensor) -> Tensor:
    return image if isinstance(image, Tensor) else F.pil_to_tensor(image)


def stack_images(images: Sequence[Tensor]) -> Tensor:
    """Images (3, H, W) -> a batch (N, 3, H, W) of the same dtype; channels-last where they are uint8."""
    if images[0].dtype != torch.uint8:
        return torch.stack(images)
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def prepare_batch(images: Tensor, device: torch.device | str) -> Tensor:
    """A batch on its way into a network: (N, 3, H, W) -> (N, 3, H, W) float32 on `device`.

    uint8 is scaled to 0..1 and normalised there (a byte a value travels, not four); a float batch has been prepared
    by its own transform and is used as it is.
    """
    images = images.to(device, non_blocking=True)
    if images.dtype != torch.uint8:
        return images
    mean, std = _mean_and_std(images.device)
    return images.float().sub_(mean).div_(std)


@functools.cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """MEAN and STD on the scale of uint8, (3, 1, 1), kept on each device: making them there waits for it."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (MEAN, STD))
    return mean, std


def to_pixels(images: Tensor) -> np.ndarray:
    """A batch (N, 3, H, W) as it is fed to a network -> pixels (N, H, W, 3) uint8 in their true colours.

    uint8 is pixels already; a float batch is one that has been normalised with MEAN and STD.
    """
    images = images.detach().cpu()
    if images.dtype != torch.uint8:
        images = images.float() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        images = (images * 255).round().clamp(0, 255).to(torch.uint8)
    return images.permute(0, 2, 3, 1).numpy()
