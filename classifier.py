"""Classify image files with a trained network."""

import argparse
import functools
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from class_files import read_class_indices
from cli_utils import FlagParser, checked, map_files, select_device, select_precision
from familiarity import Familiarity
from image_folders import file_checksum, read_run_checksums
from image_io import ImageError, PixelRange, read_image
from inference import compute_logits, record_layer1
from model import MODELS, evaluation_mode, fold_batch_norm
from my_dataset import EvalTransform, stack_images
from weights_io import load_model

# Every batch has this size; the last one is padded. Kernels round differently for other batch sizes, so an image's
# printed probabilities would depend on the number of images.
BATCH_SIZE = 8


class Outcome(NamedTuple):
    """A classified image.

    Attributes:
        image: (3, img_size, img_size) uint8, the network's input.
        subset: "train" or "val", as the run of the weights used the image; "new" if not.
        logits: (classes,) float32.
        is_unfamiliar: whether the image is unlike the validation images, see `Familiarity`.
    """

    image: Tensor
    subset: str
    logits: Tensor
    is_unfamiliar: bool


class Classifier:
    """A trained network and what it needs to classify image files.

    Args:
        weights: a weights file, see `load_model`, which also explains the other arguments and `info`.
        amp_dtype: mixed precision, see `compute_logits`.
        calibrated: use the stored temperature for `probabilities`.
        workers: the number of worker processes that read images (None: one per core, at most 8).
    """

    def __init__(
        self,
        weights: str | os.PathLike,
        device: torch.device,
        amp_dtype: torch.dtype | None = None,
        *,
        model_name: str | None = None,
        class_names: list[str] | None = None,
        default_names: list[str] | None = None,
        img_size: int | None = None,
        calibrated: bool = True,
        workers: int | None = None,
    ) -> None:
        self.weights, self.device, self.amp_dtype, self.workers = weights, device, amp_dtype, workers
        names = {"class_names": class_names, "default_names": default_names}
        self.model, self.info = load_model(weights, device, model_name, img_size=img_size, **names)
        self.class_names: list[str] = self.info["class_names"]
        self.temperature = (calibrated and self.info["temperature"]) or 1.0
        self.familiarity = self.info["familiarity"] and Familiarity(**self.info["familiarity"])
        self.run_images = read_run_checksums(Path(weights).absolute().parent.parent / "files.json")

    def __str__(self) -> str:
        temperature = "" if self.temperature == 1 else f", temperature {self.temperature:.3f}"
        return f"weights {self.weights}: {describe_model(self.info)}{temperature}"

    def classify(
        self, paths: Sequence[str], with_subset: bool = False, description: str | None = None
    ) -> Iterator[Outcome | ImageError]:
        """Classify image files in order. An unreadable one yields its error.

        Args:
            with_subset: find out how the run of the weights used each image; otherwise `subset` is "new".
            description: the label of a progress bar on the terminal; None for no bar.
        """
        transform = EvalTransform(self.info["img_size"], self.info["resize"])
        with_checksum = with_subset and bool(self.run_images)
        options = {"transform": transform, "pixel_range": self.info["pixel_range"], "with_checksum": with_checksum}
        items = map_files(functools.partial(read_or_error, **options), paths, self.workers, description)
        model = fold_batch_norm(self.model)
        blank = torch.zeros(3, transform.img_size, transform.img_size, dtype=torch.uint8)
        while batch := list(itertools.islice(items, BATCH_SIZE)):
            images = [blank if isinstance(item, ImageError) else item[0] for item in batch]
            images += [blank] * (BATCH_SIZE - len(images))
            with evaluation_mode(model), record_layer1(model) as layer1:
                logits = compute_logits(model, stack_images(images), self.device, self.amp_dtype).cpu()
            unfamiliar = [False] * BATCH_SIZE
            if self.familiarity:
                unfamiliar = self.familiarity.is_unfamiliar(layer1[0].cpu()).tolist()
            for item, row, is_unfamiliar in zip(batch, logits, unfamiliar, strict=False):
                if isinstance(item, ImageError):
                    yield item
                else:
                    image, checksum = item
                    yield Outcome(image, self.run_images.get(checksum, "new"), row, is_unfamiliar)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the softmax of logits (..., classes) divided by the temperature."""
        return (logits / self.temperature).softmax(dim=-1)


def add_classifier_flags(parser: FlagParser) -> None:
    """Add the flags that `build_classifier` reads."""
    add = parser.add_argument_group("network").add_argument
    add("--weights", help="weights file (default: best.pth of the most recent run)")
    add("--model", choices=MODELS, help="architecture (default: stored, or inferred from the shapes)")
    add("--class-indices", metavar="JSON", help="class_indices.json for a weights file without class names")
    size = checked(int, lambda n: 32 <= n <= 10_000, "from 32 to 10000")
    add("--img-size", type=size, help="input size in pixels (default: the stored one, or else 224)")
    add("--uncalibrated", action="store_true", help="ignore the temperature in the weights file")
    add("--device", help="cuda, cuda:1 (or 1), mps or cpu (default: cuda if available)")
    add("--amp", choices=("auto", "on", "off"), default="auto", help="mixed precision (default: if supported natively)")


def build_classifier(args: argparse.Namespace, weights: str | os.PathLike) -> Classifier:
    """Build a classifier from the flags."""
    device = select_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    amp_dtype, _ = select_precision(args.amp, device)
    torch.backends.cudnn.allow_tf32 = False  # full float32 precision: probabilities are printed to four digits
    return Classifier(
        weights,
        device,
        amp_dtype,
        model_name=args.model,
        class_names=read_class_indices(args.class_indices) if args.class_indices else None,
        img_size=args.img_size,
        calibrated=not args.uncalibrated,
    )


def describe_model(info: Mapping[str, Any]) -> str:
    """Describe a loaded model in one line. `info` is from `load_model`."""
    source = f" ({info['img_size_source']})" if "img_size_source" in info else ""
    line = f"{info['model']}, {len(info['class_names'])} classes, {info['img_size']} px{source}"
    if isinstance(info["epoch"], int):
        line += f", epoch {info['epoch']}"
    if isinstance(info["accuracy"], float):
        line += f", accuracy {info['accuracy']:.3f}"
    return line


def read_or_error(
    path: str, transform: EvalTransform, pixel_range: PixelRange | None, with_checksum: bool
) -> tuple[Tensor, str | None] | ImageError:
    """Return an image as uint8 (3, H, W) and its file's checksum, or the error if it is unreadable."""
    try:
        image = transform(read_image(path, transform.min_side, pixel_range))
    except ImageError as error:
        return error
    return image, file_checksum(path) if with_checksum else None
