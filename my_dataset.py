"""The dataset of images and labels, with its transforms, normalisation and collation."""

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
from image_io import ImageError, PixelRange, aspect_ratio, read_image

# ImageNet's RGB mean and standard deviation on a scale of 0 to 1, as torchvision's weights expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

MAX_ASPECT_RATIO = 10
RESIZE_MODES = ("crop", "pad", "stretch")  # how an image becomes square, see `make_square`
EXTREME = f"aspect ratio above {MAX_ASPECT_RATIO}"  # the reason why such an image is skipped


class MyDataSet(Dataset):
    """Images and their labels. The image files are read on access.

    Images with an aspect ratio above 10 are skipped by default, with a message. The attributes `images_path` and
    `images_class` hold the others; the caller's lists are not modified.

    `dataset[i]` returns (image, label), or raises an ImageError if the file is unreadable. `dataset[i, seed]` seeds the
    transform without changing the global generator, so that an item depends neither on the process nor on the order.
    `dataset[i, seed, img_size]` and `dataset[i, seed, img_size, color_jitter]` pass these to the transform as well.

    Args:
        images_path: the image files.
        images_class: the labels, ints from 0.
        transform: receives a PIL RGB image. If None, items hold the image itself. A transform with an attribute
            `min_side`, like those of this module, receives a uint8 tensor (3, H, W) that is reduced as in `read_image`.
        cache: keeps decoded images, reduced to `min_side`, for later epochs.
        pixel_range: the scale of images with more than 8 bits, see `read_image`.
        skip_extreme: skip images with an aspect ratio above 10.
    """

    def __init__(
        self,
        images_path: Sequence[str | os.PathLike],
        images_class: Sequence[int],
        transform: Callable | None = None,
        *,
        cache: ImageCache | None = None,
        pixel_range: PixelRange | None = None,
        skip_extreme: bool = True,
    ) -> None:
        if len(images_path) != len(images_class):
            raise ValueError(f"{len(images_path)} images, but {len(images_class)} labels")
        usable = [not (skip_extreme and is_extreme(path)) for path in images_path]
        self.images_path = [path for path, use in zip(images_path, usable, strict=True) if use]
        self.images_class = [label for label, use in zip(images_class, usable, strict=True) if use]
        self.transform = transform
        self.cache = cache
        self.pixel_range = pixel_range
        skipped = [os.fspath(path) for path, use in zip(images_path, usable, strict=True) if not use]
        if skipped:
            names = ", ".join(map(repr, skipped[:3])) + (", ..." if len(skipped) > 3 else "")
            print(f"skipped {len(skipped)} of {len(images_path)} images with an {EXTREME}: {names}")

    def __len__(self) -> int:
        return len(self.images_path)

    def __getitem__(self, item: int | tuple[Any, ...]) -> tuple[Tensor | Image.Image, int]:
        index, seed, *options = item if isinstance(item, tuple) else (item, None)
        image = self._image(index)
        if self.transform is not None:
            with torch.random.fork_rng(devices=[], enabled=seed is not None):
                if seed is not None:
                    torch.default_generator.manual_seed(seed)
                image = self.transform(image, *options)
        return image, self.images_class[index]

    def _image(self, index: int) -> Image.Image | Tensor:
        path, min_side = self.images_path[index], getattr(self.transform, "min_side", None)
        if min_side is None:
            return read_image(path, pixel_range=self.pixel_range)
        pixels = self.cache.get(index) if self.cache else None
        if pixels is None:
            pixels = F.pil_to_tensor(read_image(path, min_side, self.pixel_range))
            if self.cache:
                self.cache.put(index, pixels)
        return pixels

    @staticmethod
    def collate_fn(batch: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """Collate (image (3, H, W), label) items to images (N, 3, H, W) of the same dtype and labels (N,) int64."""
        images, labels = zip(*batch, strict=True)
        return stack_images(images), torch.as_tensor(labels, dtype=torch.int64)


def is_extreme(path: str | os.PathLike) -> bool:
    """Return whether the image's aspect ratio is above `MAX_ASPECT_RATIO`; False if it is unreadable."""
    try:
        return aspect_ratio(path) > MAX_ASPECT_RATIO
    except ImageError:
        return False  # reported when the image is read


# --- transforms and normalisation ---------------------------------------------------------------------------------


class TrainTransform:
    """The tutorial's random resized crop and horizontal flip of an RGB image, to uint8 (3, img_size, img_size).

    Args:
        resize: how an image becomes square before it is cropped, see `make_square`.
        hflip, vflip: the probabilities of a horizontal and a vertical flip.

    Attributes:
        min_side: the minimum length of the shorter side, see `read_image`. At 224 px it reduces photographs to about
            the size of ImageNet's, so that the smallest crops are enlarged as much as in ImageNet training.
    """

    def __init__(self, img_size: int = 224, *, resize: str = "crop", hflip: float = 0.5, vflip: float = 0.0) -> None:
        self.img_size, self.resize = img_size, resize
        self.min_side = math.ceil(1.5 * img_size)
        self.crop = v2.RandomResizedCrop(img_size, antialias=True)
        self.hflip = v2.RandomHorizontalFlip(hflip)
        self.vflip = v2.RandomVerticalFlip(vflip) if vflip > 0 else v2.Identity()  # draws no random number

    def __call__(self, image: Image.Image | Tensor, img_size: int | None = None, color_jitter: float = 0.0) -> Tensor:
        """PIL image or uint8 (3, H, W) -> uint8 (3, img_size, img_size).

        Args:
            color_jitter: brightness, contrast and saturation are multiplied by random factors between
                1 - `color_jitter` and 1 + `color_jitter`.
        """
        pixels = _to_tensor(image)
        if self.resize != "crop":
            pixels = make_square(pixels, min(self.min_side, max(pixels.shape[-2:])), self.resize)
        self.crop.size = [img_size or self.img_size] * 2
        pixels = self.vflip(self.hflip(self.crop(pixels)))
        return v2.ColorJitter(color_jitter, color_jitter, color_jitter)(pixels) if color_jitter > 0 else pixels


class EvalTransform:
    """Convert an RGB image to a square, uint8 (3, img_size, img_size).

    Args:
        resize: "crop": resize the shorter side to 256/224 of `img_size` and crop the centre; otherwise see
            `make_square`.

    Attributes:
        min_side: see `TrainTransform`.
    """

    def __init__(self, img_size: int = 224, resize: str = "crop") -> None:
        self.min_side = math.ceil(1.5 * img_size)
        self.img_size, self.resize = img_size, resize
        self.shorter_side = round(img_size * 256 / 224)

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """PIL image or uint8 (3, H, W) -> uint8 (3, img_size, img_size)."""
        pixels = _to_tensor(image)
        if self.resize != "crop":
            return make_square(pixels, self.img_size, self.resize)
        # Crop extreme shapes (1 x 20,000 pixels) before they are resized.
        height, width = pixels.shape[-2:]
        pixels = F.center_crop(pixels, [min(height, width * MAX_ASPECT_RATIO), min(width, height * MAX_ASPECT_RATIO)])
        return F.center_crop(F.resize(pixels, [self.shorter_side], antialias=True), [self.img_size])


def make_square(pixels: Tensor, side: int, resize: str) -> Tensor:
    """Resize a whole image, uint8 (3, H, W), to (3, side, side).

    Args:
        resize: "pad": keep the aspect ratio, and fill the borders with ImageNet's mean colour; "stretch": distort.
    """
    if resize == "stretch":
        return F.resize(pixels, [side, side], antialias=True)
    height, width = (max(1, round(length * side / max(pixels.shape[-2:]))) for length in pixels.shape[-2:])
    left, top = (side - width) // 2, (side - height) // 2
    borders = [left, top, side - width - left, side - height - top]
    return F.pad(F.resize(pixels, [height, width], antialias=True), borders, fill=[round(255 * mean) for mean in MEAN])


def _to_tensor(image: Image.Image | Tensor) -> Tensor:
    return image if isinstance(image, Tensor) else F.pil_to_tensor(image)


def stack_images(images: Sequence[Tensor]) -> Tensor:
    """Stack images (3, H, W) to a batch (N, 3, H, W) of the same dtype.

    uint8 batches are channels-last, the memory format of decoded images, which is fast for convolutions.
    """
    if images[0].dtype != torch.uint8:
        return torch.stack(images)
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def prepare_batch(images: Tensor, device: torch.device | str) -> Tensor:
    """Move a batch (N, 3, H, W) to `device`, and normalise it there if it is uint8. Returns floats.

    This transfers one byte per value instead of four. Float batches are already normalised.
    """
    images = copy_to_device(images, device)
    if images.dtype != torch.uint8:
        return images
    mean, std = _mean_and_std(images.device)
    return images.float().sub_(mean).div_(std)


def copy_to_device(batch: Tensor, device: torch.device | str) -> Tensor:
    """Copy a batch to `device`. Copies to CUDA are asynchronous; copies to MPS are contiguous, see `to_device`.

    An asynchronous copy needs pinned memory. Without it, a copy to MPS may read memory that has been freed:
    https://github.com/pytorch/pytorch/issues/189690.
    """
    kind = torch.device(device).type
    if kind == "cuda" and batch.device.type == "cpu":
        return batch.pin_memory().to(device, non_blocking=True)
    return batch.to(device, memory_format=torch.contiguous_format if kind == "mps" else torch.preserve_format)


@functools.cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return MEAN and STD times 255, (3, 1, 1). They are cached because creating them synchronises with the device."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (MEAN, STD))
    return mean, std


def to_pixels(images: Tensor) -> np.ndarray:
    """Convert a batch of network inputs (N, 3, H, W) to pixels (N, H, W, 3) uint8. Float batches are denormalised."""
    images = images.detach().cpu()
    if images.dtype != torch.uint8:
        images = images.float() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        images = (images * 255).round().clamp(0, 255).to(torch.uint8)
    return images.permute(0, 2, 3, 1).numpy()
