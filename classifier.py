"""Classify image files with a trained network."""

import argparse
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from backends import load_backend
from class_files import read_class_indices
from cli_utils import FlagParser, UsageError, checked, map_files, select_device, select_precision
from exported_file import is_onnx
from image_folders import file_checksum, read_run_checksums
from image_io import ImageError, PixelRange, read_image
from model import MODELS
from my_dataset import EvalTransform


class Outcome(NamedTuple):
    """A classified image.

    Attributes:
        image: (3, img_size, img_size) uint8, the network's input; the whole image if an ONNX graph resizes it.
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
        weights: a weights file, see `load_model`, which also explains the other arguments and `info`; or an .onnx file
            written by export.py, for which `model` is None.
        amp_dtype: mixed precision, see `compute_logits`.
        calibrated: use the stored temperature for `probabilities`.
        workers: the number of worker processes that read images (None: one per core, at most 16).
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
        options = {"model_name": model_name, "class_names": class_names, "default_names": default_names}
        options["img_size"] = img_size
        self.backend = load_backend(weights, device, amp_dtype, **options)
        self.model, self.info = self.backend.model, self.backend.info
        self.class_names: list[str] = self.info["class_names"]
        self.temperature = (calibrated and self.info["temperature"]) or 1.0
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
        options = {"transform": self.backend.transform, "pixel_range": self.info["pixel_range"]}
        options["with_checksum"] = with_subset and bool(self.run_images)
        items = map_files(functools.partial(read_or_error, **options), paths, self.workers, description)
        blank = torch.zeros(3, self.info["img_size"], self.info["img_size"], dtype=torch.uint8)
        while batch := list(itertools.islice(items, self.backend.batch_size)):
            images = [blank if isinstance(item, ImageError) else item[0] for item in batch]
            images += [blank] * (self.backend.batch_size - len(images))
            for item, row, is_unfamiliar in zip(batch, *self.backend.predict(images), strict=False):
                if isinstance(item, ImageError):
                    yield item
                else:
                    image, checksum = item
                    yield Outcome(image, self.run_images.get(checksum, "new"), row, is_unfamiliar)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the softmax of logits (..., classes) divided by the temperature."""
        return (logits / self.temperature).softmax(dim=-1)


def add_weights_flags(parser: FlagParser) -> Callable[..., argparse.Action]:
    """Add the flags for the weights file and for metadata that it may lack. Returns the group's `add_argument`."""
    add = parser.add_argument_group("network").add_argument
    add("--weights", help="weights file (default: best.pth of the most recent run)")
    add("--model", choices=MODELS, help="architecture (default: stored, or inferred from the shapes)")
    add("--class-indices", metavar="JSON", help="class_indices.json for a weights file without class names")
    size = checked(int, lambda n: 32 <= n <= 10_000, "from 32 to 10000")
    add("--img-size", type=size, help="input size in pixels (default: the stored one, or else 224)")
    add("--uncalibrated", action="store_true", help="ignore the temperature in the weights file")
    return add


def add_classifier_flags(parser: FlagParser) -> None:
    """Add the flags that `build_classifier` reads."""
    add = add_weights_flags(parser)
    add("--device", help="cuda, cuda:1 (or 1), mps or cpu (default: cuda if available)")
    add("--amp", choices=("auto", "on", "off"), default="auto", help="mixed precision (default: if supported natively)")


def build_classifier(args: argparse.Namespace, weights: str | os.PathLike) -> Classifier:
    """Build a classifier from the flags."""
    if is_onnx(weights) and (args.device not in (None, "cpu") or args.amp == "on"):
        raise UsageError(f"{weights}: ONNX files run on the CPU, without mixed precision; omit --device and --amp")
    device = select_device(args.device or ("cuda" if torch.cuda.is_available() and not is_onnx(weights) else "cpu"))
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
    path: str, transform: EvalTransform | None, pixel_range: PixelRange | None, with_checksum: bool
) -> tuple[Tensor, str | None] | ImageError:
    """Return an image as uint8 (3, H, W) and its file's checksum, or the error if it is unreadable.

    Args:
        transform: None for the whole image.
    """
    try:
        if transform is None:
            image = pil_to_tensor(read_image(path, pixel_range=pixel_range))
        else:
            image = transform(read_image(path, transform.min_side, pixel_range))
    except ImageError as error:
        return error
    return image, file_checksum(path) if with_checksum else None
