"""Run a trained network on batches of images, with PyTorch or ONNX Runtime."""

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from exported_file import is_onnx, read_onnx
from familiarity import Familiarity
from inference import compute_logits, record_layer1
from model import ResNet, evaluation_mode, fold_batch_norm
from my_dataset import EvalTransform, stack_images
from weights_io import INFO_KEYS, WeightsError, WeightsFile, complete_info, load_model

# All batches have the same size; the last one is padded. Kernels round differently for other batch sizes, so an image's
# printed probabilities would depend on the number of images.
BATCH_SIZE = 8


class Predictions(NamedTuple):
    """The predictions for a batch.

    Attributes:
        logits: (N, classes) float32 on the CPU, up to a constant per image.
        unfamiliar: whether each image is unfamiliar, see `Familiarity`.
    """

    logits: Tensor
    unfamiliar: list[bool]


class TorchBackend:
    """A network in PyTorch, loaded from any weights file except .onnx.

    Attributes:
        model: the network.
        info: see `load_model`.
        batch_size: the number of images that `predict` expects.
        transform: prepares an image for `predict`; None if it takes whole images.
    """

    def __init__(
        self, weights: str | os.PathLike, device: torch.device, amp_dtype: torch.dtype | None, **options: Any
    ) -> None:
        self.device, self.amp_dtype, self.batch_size = device, amp_dtype, BATCH_SIZE
        self.model: ResNet | None
        self.model, self.info = load_model(weights, device, **options)
        self.transform = EvalTransform(self.info["img_size"], self.info["resize"])
        if device.type == "cuda":
            self.batch_size = max(BATCH_SIZE, 64 * 224**2 // self.info["img_size"] ** 2)
        self.folded = fold_batch_norm(self.model)
        self.familiarity = self.info["familiarity"] and Familiarity(**self.info["familiarity"])

    def predict(self, images: list[Tensor]) -> Predictions:
        """Predict images, each (3, img_size, img_size) uint8."""
        with evaluation_mode(self.folded), record_layer1(self.folded) as layer1:
            logits = compute_logits(self.folded, stack_images(images), self.device, self.amp_dtype).cpu()
        unfamiliar = [False] * len(images)
        if self.familiarity:
            unfamiliar = self.familiarity.is_unfamiliar(layer1[0].cpu()).tolist()
        return Predictions(logits, unfamiliar)


class OnnxBackend:
    """An .onnx file written by export.py, run by ONNX Runtime on the CPU. See `TorchBackend`; there is no `model`.

    Raises:
        UsageError: onnxruntime is not installed.
        ExportedFileError, WeightsError: the file is invalid.
    """

    def __init__(self, weights: str | os.PathLike, **options: Any) -> None:
        self.model, self.device = None, torch.device("cpu")
        self.session, metadata = read_onnx(weights)
        stored = {name: metadata[name] for name in INFO_KEYS if name in metadata}
        self.info = complete_info(weights, WeightsFile({}, stored, weights, is_exported=True), **options)
        shape, names = self.session.get_inputs()[0].shape, self.info["class_names"]
        if self.session.get_outputs()[0].shape[1:] != [len(names)]:
            raise WeightsError(
                f"{weights}: has {len(names)} class names, but its graph has a different number of classes"
            )
        self.resizes = len(shape) == 3
        self.batch_size = shape[0] if len(shape) == 4 and isinstance(shape[0], int) else BATCH_SIZE
        self.transform = None if self.resizes else EvalTransform(self.info["img_size"], self.info["resize"])

    def predict(self, images: list[Tensor]) -> Predictions:
        """Predict images, each (3, img_size, img_size) uint8, or (3, H, W) if the graph resizes them."""
        batches = images if self.resizes else [stack_images(images)]
        outputs = [self.session.run(None, {"images": batch.contiguous().numpy()}) for batch in batches]
        columns = zip(*outputs, strict=True)
        probabilities, *unfamiliarity = (torch.cat([*map(torch.from_numpy, column)]) for column in columns)
        unfamiliar = (unfamiliarity[0] > 1).tolist() if unfamiliarity else [False] * len(images)
        smallest = torch.finfo(torch.float32).tiny
        return Predictions(probabilities.clamp(min=smallest).log() * (self.info["temperature"] or 1.0), unfamiliar)


def load_backend(
    weights: str | os.PathLike, device: torch.device, amp_dtype: torch.dtype | None = None, **options: Any
) -> TorchBackend | OnnxBackend:
    """Load a weights file; see `load_model` for `options`. An .onnx file ignores `device` and `amp_dtype`."""
    return OnnxBackend(weights, **options) if is_onnx(weights) else TorchBackend(weights, device, amp_dtype, **options)
