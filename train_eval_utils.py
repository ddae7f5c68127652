"""Train for one epoch, evaluate, and compute metrics."""

import contextlib
import copy
import math
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader
from tqdm import tqdm

from distributed import Distributed
from model import ResNet, evaluation_mode, fold_batch_norm
from my_dataset import prepare_batch

READ_SECONDS = 0.5  # interval between reads of the losses


class EmptyLoaderError(ValueError):
    """The data loader yields no images."""


# --- training -----------------------------------------------------------------------------------------------------


class Progress:
    """Running loss and accuracy over an epoch's training images.

    Reading a loss synchronises with the device, so losses are read in groups. `state` covers the steps read so far;
    `Progress(**state)` restores it.
    """

    def __init__(self, sum: float = 0.0, images: int = 0, steps: int = 0, right: int = 0) -> None:
        self.sum, self.images, self.steps, self.right = sum, images, steps, right
        self.where = ""  # for the message
        self.on_read: Callable[[int, float], None] | None = None  # called with each step's number and loss
        self.unread: list[tuple[Tensor, int]] = []
        self.start = self.last_read = time.perf_counter()
        self.images_before = images

    def __str__(self) -> str:
        return f"mean loss {self.loss:.3f}, {self.speed:.1f} images/s"

    @property
    def taken(self) -> int:
        """The number of steps taken, including those whose losses have not been read."""
        return self.steps + len(self.unread)

    @property
    def loss(self) -> float:
        """The mean over the images; NaN before the first one."""
        return self.sum / self.images if self.images else math.nan

    @property
    def accuracy(self) -> float:
        """In 0..1, on augmented images, with the weights of each step."""
        return self.right / self.images if self.images else math.nan

    @property
    def speed(self) -> float:
        """Images per second."""
        return (self.images - self.images_before) / max(self.last_read - self.start, 1e-9)

    @property
    def state(self) -> dict[str, float | int]:
        """The constructor arguments that restore this progress."""
        return {"sum": self.sum, "images": self.images, "steps": self.steps, "right": self.right}

    def all_reduce(self, dist: Distributed) -> "Progress":
        """Sum the progress over all ranks, which must have taken the same steps and read their losses."""
        if dist.world_size == 1:
            return self
        together = copy.copy(self)
        counts = dist.all_reduce_sum(self.sum, self.images, self.right, self.images_before)
        together.sum, (together.images, together.right, together.images_before) = counts[0], map(int, counts[1:])
        return together

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a step, given its scalar loss, logits (N, classes) and labels (N,)."""
        right = (logits.detach().argmax(dim=1) == labels).sum()
        self.unread.append((torch.stack([loss.detach().float(), right.float()]), len(labels)))

    def is_due(self) -> bool:
        return bool(self.unread) and time.perf_counter() - self.last_read >= READ_SECONDS

    def read(self) -> None:
        """Wait for the pending losses and add them to the totals.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        if not self.unread:
            return
        steps, counts = zip(*self.unread, strict=True)
        for (loss, right), images in zip(torch.stack(steps).tolist(), counts, strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {self.steps} {self.where}: training diverged; "
                    f"try a lower learning rate"
                )
            if self.on_read is not None:
                self.on_read(self.steps, loss)
            self.sum += loss * images
            self.right += int(right)
            self.images += images
            self.steps += 1
        self.unread.clear()
        self.last_read = time.perf_counter()


def train_one_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    data_loader: DataLoader,
    device: torch.device | str,
    epoch: int,
    *,
    steps: Sequence[Sequence[float]] | None = None,
    amp_dtype: torch.dtype | None = None,
    scaler: GradScaler | None = None,
    label_smoothing: float = 0.0,
    progress: Progress | None = None,
    before_step: Callable[[], bool] | None = None,
    after_step: Callable[[], None] | None = None,
    keep_bar: bool = True,
) -> float:
    """Train with cross-entropy for one pass over `data_loader`.

    BatchNorm layers with frozen parameters stay in evaluation mode, which freezes their running statistics too. The
    progress bar appears only on a terminal.

    Args:
        model: maps normalised float32 images (N, 3, H, W) to logits (N, classes).
        data_loader: yields images (N, 3, H, W), uint8 or normalised float, and labels (N,) int64.
        epoch: the epoch number, for the progress bar and messages.
        steps: per optimizer step, the weights of its batches' mean losses (see `DistributedBatchSampler`). Gradients
            are all-reduced once per step. None: each batch is a step.
        amp_dtype: mixed precision, see `compute_logits`.
        scaler: scales the loss, so that float16 gradients do not underflow (https://arxiv.org/abs/1710.03740).
        label_smoothing: label smoothing in 0..1 (https://arxiv.org/abs/1512.00567).
        progress: pass a restored `Progress` to resume mid-epoch.
        before_step: callback before each step, e.g. to set the learning rate; returning False ends the epoch.
        after_step: callback after each step; an exception that it raises ends the epoch.
        keep_bar: leave the finished bar on the terminal.

    Returns:
        The mean loss over the images.

    Raises:
        FloatingPointError: a loss is not finite. Losses are read twice per second and at the end, so further steps may
            have been taken; the message names the step that diverged.
        EmptyLoaderError: `data_loader` yields no images.
    """
    _train_mode(model)
    scaler = scaler or GradScaler(enabled=False)
    progress = progress or Progress()
    progress.start = progress.last_read = time.perf_counter()  # the speed excludes the time before
    silence = getattr(model, "no_sync", contextlib.nullcontext)  # only DistributedDataParallel has no_sync
    layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
    number = operator.length_hint(data_loader if steps is None else steps)  # 0: unknown
    with tqdm(
        total=progress.steps + number if number else None,
        initial=progress.steps,
        leave=keep_bar,
        disable=_no_bar(),
        dynamic_ncols=True,
        bar_format=layout,
    ) as bar:
        for batches in _of_steps(data_loader, steps):
            if before_step is not None and not before_step():
                break
            rate = max(group["lr"] for group in optimizer.param_groups)
            progress.where = f"of epoch {epoch}, with learning rate {rate:g}"
            optimizer.zero_grad()
            seen = []
            for place, (images, labels, weight) in enumerate(batches, start=1):
                with silence() if place < len(batches) else contextlib.nullcontext():
                    logits = compute_logits(model, images, device, amp_dtype)
                    labels = labels.to(device, non_blocking=True)
                    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
                    scaler.scale(loss * weight).backward()
                counted = len(labels) if weight else 0
                seen.append((loss.detach(), logits.detach()[:counted], labels[:counted]))
            scaler.step(optimizer)
            scaler.update()

            if progress.is_due():  # read earlier steps while the device is busy with this one
                progress.read()
                bar.set_description_str(f"[epoch {epoch}] {progress}", refresh=False)
            progress.add(*_together(seen))
            bar.update()
            if after_step is not None:
                after_step()
        progress.read()
        if progress.steps == 0:
            raise EmptyLoaderError("nothing to train on: the data loader is empty")
        bar.set_description_str(f"[epoch {epoch}] {progress}")
    return progress.loss


def _of_steps(
    data_loader: DataLoader, steps: Sequence[Sequence[float]] | None
) -> Iterator[list[tuple[Tensor, Tensor, float]]]:
    """Yield the batches of each step as (images, labels, weight of the mean loss)."""
    batches = iter(data_loader)
    if steps is None:
        yield from ([(*batch, 1.0)] for batch in batches)
    else:
        yield from ([(*next(batches), weight) for weight in weights] for weights in steps)


def _together(seen: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Combine (loss, logits, labels) of several batches; the loss is the mean over images."""
    if len(seen) == 1:
        return seen[0]
    losses, logits, labels = zip(*seen, strict=True)
    counts = torch.tensor([len(batch) for batch in labels], device=losses[0].device)
    return (torch.stack(losses) * counts).sum() / counts.sum(), torch.cat(logits), torch.cat(labels)


def _no_bar() -> bool | None:
    """Return tqdm's `disable`: True on all ranks but 0, else None (a bar only on a terminal)."""
    return True if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0 else None


def _train_mode(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine and not module.weight.requires_grad:
            module.eval()


def compute_logits(
    model: nn.Module, images: Tensor, device: torch.device | str, amp_dtype: torch.dtype | None = None
) -> Tensor:
    """Run a batch through `model`, after normalising it if it is uint8.

    Args:
        images: (N, 3, H, W), uint8 or normalised float.
        amp_dtype: bfloat16 or float16 for mixed precision by autocast (https://arxiv.org/abs/1710.03740), None for
            float32.

    Returns:
        Logits (N, classes), always float32, whose precision softmax and loss need.
    """
    with torch.autocast(torch.device(device).type, amp_dtype, enabled=amp_dtype is not None):
        return model(prepare_batch(images, device)).float()


def evaluate(
    model: nn.Module, data_loader: DataLoader, device: torch.device | str, *, amp_dtype: torch.dtype | None = None
) -> float:
    """Return the top-1 accuracy in 0..1 of `model` on `data_loader`.

    Runs in evaluation mode without gradients, then restores the model's mode. For `amp_dtype` see `compute_logits`.

    Raises:
        EmptyLoaderError: `data_loader` yields no images.
    """
    return Evaluation(*collect_logits(model, data_loader, device, amp_dtype=amp_dtype)).accuracy


def collect_logits(
    model: nn.Module,
    data_loader: DataLoader,
    device: torch.device | str,
    *,
    amp_dtype: torch.dtype | None = None,
    on_features: Callable[[Tensor, Tensor], None] | None = None,
    after_step: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one evaluation pass, from whose result all metrics are computed.

    Args:
        amp_dtype: mixed precision, see `compute_logits`.
        on_features: callback that receives the inputs of the last layer for each batch, (N, features) float32 on
            `device`, and the labels. Requires `model` to be a ResNet or its `fc`.
        after_step: callback after each batch; an exception that it raises ends the pass.

    Returns:
        Logits (N, classes) float32 and labels (N,) int64 in the loader's order, on the CPU.

    Raises:
        EmptyLoaderError: `data_loader` yields no images.
    """
    all_logits, all_labels, seen = [], [], []
    with evaluation_mode(model), contextlib.ExitStack() as stack:
        model = fold_batch_norm(model) if isinstance(model, ResNet) else model
        if on_features is not None:
            last = model.fc if isinstance(model, ResNet) else model
            hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float()))
            stack.callback(hook.remove)
        for images, labels in tqdm(data_loader, desc="evaluating", leave=False, disable=_no_bar(), dynamic_ncols=True):
            if len(images):  # empty if no image of the batch is readable
                all_logits.append(compute_logits(model, images, device, amp_dtype))
                all_labels.append(labels)
                if on_features is not None:
                    on_features(seen.pop(), labels)
            if after_step is not None:
                after_step()
    if not all_logits:
        raise EmptyLoaderError("nothing to evaluate: the data loader is empty")
    return torch.cat(all_logits).cpu(), torch.cat(all_labels).cpu()


def estimate_batch_norm(
    model: nn.Module,
    images: Tensor,
    device: torch.device | str,
    *,
    batch_size: int = 64,
    amp_dtype: torch.dtype | None = None,
) -> None:
    """Recompute every BatchNorm's running statistics over `images` with the current weights.

    Running averages lag behind fast-changing weights, and depend on the training image size: Wu & Johnson 2021,
    https://arxiv.org/abs/2105.07576, sections 3 and 4.

    Args:
        images: (N, 3, H, W), uint8 or normalised float. They may be sorted by class: each batch is a strided sample.
        batch_size: the minimum number of images per batch, if there are that many.
        amp_dtype: mixed precision, see `compute_logits`.
    """
    number = max(1, len(images) // batch_size)
    batches = (prepare_batch(images[start::number], device) for start in range(number))
    with torch.autocast(torch.device(device).type, amp_dtype, enabled=amp_dtype is not None):
        update_bn(batches, model)


def collect_features(
    model: ResNet, data_loader: DataLoader, device: torch.device | str, **options: Any
) -> tuple[Tensor, Tensor]:
    """Run an evaluation pass with the `options` of `collect_logits`, and return the inputs of `fc`.

    Returns:
        Features (N, 512 * expansion) float32 and labels (N,) int64, in the loader's order, on the CPU.

    Raises:
        EmptyLoaderError: `data_loader` yields no images.
    """
    features: list[Tensor] = []
    _, labels = collect_logits(
        model, data_loader, device, on_features=lambda batch, _: features.append(batch.cpu()), **options
    )
    return torch.cat(features), labels


def gather_evaluation(dist: Distributed, collect: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Gather the results of `collect` from all ranks, concatenated in rank order.

    Args:
        collect: calls `collect_logits` or `collect_features` on this rank's share.

    Raises:
        EmptyLoaderError: no rank has any images.
    """
    if dist.world_size == 1:
        return collect()
    try:
        share = collect()
    except EmptyLoaderError:  # more ranks than batches
        share = None
    shares = [share for share in dist.gather(share) if share is not None]
    if not shares:
        raise EmptyLoaderError("nothing to evaluate: the data loader is empty")
    values, labels = (torch.cat(column) for column in zip(*shares, strict=True))
    return values, labels


# --- metrics ------------------------------------------------------------------------------------------------------


class Evaluation:
    """The metrics of one evaluation pass. All tensors are on the CPU and in the same order.

    Args:
        logits: (N, classes) float32.
        labels: (N,) int64, the true classes.
    """

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        self.labels = labels
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

    def worst(self, count: int) -> list[int]:
        """Return the indices of `count` images by descending loss, misclassified ones first."""
        by_loss = self.losses.argsort(descending=True, stable=True).tolist()
        return sorted(by_loss, key=lambda place: bool(self.predicted[place] == self.labels[place]))[:count]
