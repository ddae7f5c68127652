"""Run a network over a data loader, on one or several ranks, and compute metrics from the result."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from cli_utils import UsageError
from distributed import Distributed
from model import ResNet, evaluation_mode, fold_batch_norm
from my_dataset import prepare_batch


class EmptyLoaderError(UsageError):
    """The data loader yields no images."""


class Outputs(NamedTuple):
    """The outputs of an inference pass, on the CPU and in the loader's order.

    Attributes:
        logits: (N, classes) float32.
        labels: (N,) int64, whatever the loader yields with the images: labels, or indices into a dataset.
        features: (M, F) float32, the inputs of the last layer for every `feature_stride`-th label; else empty.
    """

    logits: Tensor
    labels: Tensor
    features: Tensor


def compute_logits(
    model: nn.Module, images: Tensor, device: torch.device | str, amp_dtype: torch.dtype | None = None
) -> Tensor:
    """Run a batch through `model`, after normalising it if it is uint8.

    Args:
        images: (N, 3, H, W), uint8 or normalised float.
        amp_dtype: bfloat16 or float16 for mixed precision by autocast (https://arxiv.org/abs/1710.03740), None for
            float32.

    Returns:
        Logits (N, classes), always float32, as softmax and the loss need its precision.
    """
    with torch.autocast(torch.device(device).type, amp_dtype, enabled=amp_dtype is not None):
        return model(prepare_batch(images, device)).float()


def run_inference(
    model: nn.Module,
    data_loader: DataLoader,
    device: torch.device | str,
    *,
    amp_dtype: torch.dtype | None = None,
    feature_stride: int = 0,
    after_batch: Callable[[], None] | None = None,
) -> Outputs:
    """Run `model` over `data_loader` in evaluation mode without gradients, then restore its mode.

    Args:
        model: a ResNet, or any classifier if `feature_stride` is 0, or a linear layer that takes features.
        amp_dtype: mixed precision, see `compute_logits`.
        feature_stride: return the features of images whose label is a multiple of it; 0: return none.
        after_batch: callback after each batch; an exception that it raises ends the pass.

    Raises:
        EmptyLoaderError: `data_loader` yields no images.
    """
    logits, labels, features, inputs = [], [], [torch.empty(0)], []
    with evaluation_mode(model), contextlib.ExitStack() as stack:
        model = fold_batch_norm(model) if isinstance(model, ResNet) else model
        if feature_stride > 0:
            last = model.fc if isinstance(model, ResNet) else model
            hook = last.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].float()))
            stack.callback(hook.remove)
        bar = tqdm(data_loader, desc="evaluating", leave=False, disable=disable_bar(), dynamic_ncols=True)
        for batch, batch_labels in bar:
            if len(batch):  # a batch without readable images is empty
                logits.append(compute_logits(model, batch, device, amp_dtype))
                labels.append(batch_labels)
            while inputs:
                kept = (batch_labels % feature_stride == 0).nonzero().flatten()
                features.append(inputs.pop()[kept.to(device, non_blocking=True)])
            if after_batch is not None:
                after_batch()
    if not logits:
        raise EmptyLoaderError("nothing to evaluate: the data loader is empty")
    features = features[1:] or features  # the empty tensor has another shape
    return Outputs(*(torch.cat(column).cpu() for column in (logits, labels, features)))


def gather_outputs(run: Callable[[], Outputs], dist: Distributed) -> Outputs:
    """Call `run` on every rank, and concatenate the outputs of all ranks in rank order.

    Args:
        run: calls `run_inference` on this rank's share of the data.

    Raises:
        EmptyLoaderError: no rank has any images.
    """
    if dist.world_size == 1:
        return run()
    try:
        share = run()
    except EmptyLoaderError:  # more ranks than batches
        share = None
    shares = [share for share in dist.gather(share) if share is not None]
    if not shares:
        raise EmptyLoaderError("nothing to evaluate: the data loader is empty")
    return Outputs(*(torch.cat(column) for column in zip(*shares, strict=True)))


def disable_bar() -> bool | None:
    """Return tqdm's `disable`: True on all ranks but 0, else None, which shows a bar only on a terminal."""
    return True if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0 else None


class Evaluation:
    """The metrics of one inference pass. All tensors are on the CPU and in the same order.

    Args:
        logits: (N, classes) float32.
        labels: (N,) int64, the true classes.
        indices: (N,) int64, the images' positions in the validation set, if known.
        features: (M, F) float32, the features of the images `indices[feature_rows]`, if computed.
        feature_rows: (M,) int64.
    """

    def __init__(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        indices: Tensor | None = None,
        features: Tensor | None = None,
        feature_rows: Tensor | None = None,
    ) -> None:
        self.labels = labels
        self.indices = indices
        self.features, self.feature_rows = features, feature_rows
        self.classes = logits.shape[1]
        self.probabilities = logits.softmax(dim=1)
        """(N, classes) float32"""
        self.predicted = logits.argmax(dim=1)
        """(N,) int64"""
        self.losses = F.cross_entropy(logits, labels, reduction="none")
        """(N,) float32, the cross-entropy per image"""

    @property
    def loss(self) -> float:
        """The mean cross-entropy over the images."""
        return self.losses.double().mean().item()

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy in 0..1."""
        return (self.predicted == self.labels).double().mean().item()

    @property
    def confusion(self) -> Tensor:
        """The confusion matrix, (classes, classes) int64: true classes in rows, predicted classes in columns."""
        pairs = self.labels * self.classes + self.predicted
        return torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)

    @property
    def recalls(self) -> Tensor:
        """The recall per class, (classes,) float64; NaN for a class without images."""
        confusion = self.confusion
        return confusion.diag().double() / confusion.sum(dim=1)

    @property
    def macro_f1(self) -> float:
        """The mean over classes of the F1 score, 2 TP / (2 TP + FP + FN), in 0..1.

        Like scikit-learn's `f1_score(average="macro")`, it covers the classes that occur as a label or a prediction.
        """
        confusion = self.confusion
        either = confusion.sum(dim=0) + confusion.sum(dim=1)
        return (2 * confusion.diag() / either)[either > 0].double().mean().item()

    def worst_mistakes(self, count: int) -> list[int]:
        """Return the positions of up to `count` misclassified images, the highest loss first."""
        by_loss = self.losses.argsort(descending=True, stable=True).tolist()
        return [position for position in by_loss if self.predicted[position] != self.labels[position]][:count]
