"""Images and labels as a data set: transforms, normalisation, collation, and the order of an epoch."""

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from image_cache import ImageCache
from image_io import ImageError, aspect_ratio, decode, read_image

# Of the images of ImageNet, in RGB, on a scale of 0 to 1: what torchvision's weights expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

MAX_ASPECT_RATIO = 10


class MyDataSet(Dataset):
    """Images and their labels, read on access.

    Args:
        images_path: the image files.
        images_class: their labels, ints from 0.
        transform: receives a PIL RGB image; without one the item is the PIL image. A transform with an attribute
            `min_side`, like this module's, receives a uint8 tensor (3, H, W), reduced as by `read_image`.
        cache: keeps the decoded images that `min_side` has reduced, for the epochs to come.

    Images with an aspect ratio above 10 are skipped, with a message. `images_path` and `images_class` hold the others;
    the caller's lists are not modified.

    `dataset[i]` is (image, label). `dataset[i, seed]` seeds the transform and restores the global generator, so that an
    item depends neither on the process nor on the order; `dataset[i, seed, img_size]` also changes the size.

    Raises (from `dataset[i]`):
        ImageError: the file cannot be read.
    """

    def __init__(
        self,
        images_path: Sequence[str | os.PathLike],
        images_class: Sequence[int],
        transform: Callable | None = None,
        *,
        cache: ImageCache | None = None,
    ) -> None:
        if len(images_path) != len(images_class):
            raise ValueError(f"{len(images_path)} images, but {len(images_class)} labels")
        usable = [not _is_extreme(path) for path in images_path]
        self.images_path = [path for path, use in zip(images_path, usable, strict=True) if use]
        self.images_class = [label for label, use in zip(images_class, usable, strict=True) if use]
        self.transform = transform
        self.cache = cache
        skipped = [os.fspath(path) for path, use in zip(images_path, usable, strict=True) if not use]
        if skipped:
            names = ", ".join(map(repr, skipped[:3])) + (", ..." if len(skipped) > 3 else "")
            print(
                f"skipped {len(skipped)} of {len(images_path)} images with an aspect ratio above {MAX_ASPECT_RATIO}: "
                f"{names}"
            )

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
        return self.__dict__ | {"cache": None}  # forked workers inherit its memory, spawned ones do without

    def _image(self, index: int) -> Image.Image | Tensor:
        path, min_side = self.images_path[index], getattr(self.transform, "min_side", None)
        if min_side is None:
            return read_image(path)
        pixels = self.cache.get(index) if self.cache else None
        if pixels is None:
            image, is_reduced = decode(path, min_side)
            pixels = F.pil_to_tensor(image)
            if self.cache and is_reduced:
                self.cache.put(index, pixels)
        return pixels

    @staticmethod
    def collate_fn(batch: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """[(image (3, H, W), label)] -> images (N, 3, H, W) of the same dtype, labels (N,) int64.

        uint8 images come in channels-last order, in which a decoded image lies in memory and convolutions are fast.
        """
        images, labels = zip(*batch, strict=True)
        return stack_images(images), torch.as_tensor(labels, dtype=torch.int64)


def _is_extreme(path: str | os.PathLike) -> bool:
    try:
        return aspect_ratio(path) > MAX_ASPECT_RATIO
    except ImageError:
        return False  # reported when the image is read


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
