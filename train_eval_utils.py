"""One epoch of training, one pass of evaluation, and the metrics that are computed from that."""

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

READ_SECONDS = 0.5  # between two looks at the loss


class EmptyLoaderError(ValueError):
    """A data loader that gives no image."""


# --- training -----------------------------------------------------------------------------------------------------


class Progress:
    """Loss and accuracy over the images of an epoch that were trained on so far.

    To read a loss is to wait for its step, so they are read in bunches. `state` (of what has been read) gives one that
    goes on from there: `Progress(**state)`.
    """

    def __init__(self, sum: float = 0.0, images: int = 0, steps: int = 0, right: int = 0) -> None:
        self.sum, self.images, self.steps, self.right = sum, images, steps, right
        self.where = ""  # for the message
        self.on_read: Callable[[int, float], None] | None = None  # is told the number of each step, and its loss
        self.unread: list[tuple[Tensor, int]] = []
        self.start = self.last_read = time.perf_counter()
        self.images_before = images

    def __str__(self) -> str:
        return f"mean loss {self.loss:.3f}, {self.speed:.1f} images/s"

    @property
    def taken(self) -> int:
        """The steps so far, those included whose losses have not been read."""
        return self.steps + len(self.unread)

    @property
    def loss(self) -> float:
        """The mean over the images; not a number before there is one."""
        return self.sum / self.images if self.images else math.nan

    @property
    def accuracy(self) -> float:
        """In 0..1; each image as it was augmented, by the weights of its own step."""
        return self.right / self.images if self.images else math.nan

    @property
    def speed(self) -> float:
        """Images a second."""
        return (self.images - self.images_before) / max(self.last_read - self.start, 1e-9)

    @property
    def state(self) -> dict[str, float | int]:
        """What `Progress` takes to go on from here."""
        return {"sum": self.sum, "images": self.images, "steps": self.steps, "right": self.right}

    def all_reduce(self, dist: Distributed) -> "Progress":
        """Sum the progress of all ranks, which must have taken the same steps and read their losses."""
        if dist.world_size == 1:
            return self
        together = copy.copy(self)
        counts = dist.all_reduce_sum(self.sum, self.images, self.right, self.images_before)
        together.sum, (together.images, together.right, together.images_before) = counts[0], map(int, counts[1:])
        return together

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """A step: its loss, its logits (N, classes) and the labels (N,)."""
        right = (logits.detach().argmax(dim=1) == labels).sum()
        self.unread.append((torch.stack([loss.detach().float(), right.float()]), len(labels)))

    def is_due(self) -> bool:
        return bool(self.unread) and time.perf_counter() - self.last_read >= READ_SECONDS

    def read(self) -> None:
        """Wait for the losses; raises FloatingPointError where one is not finite."""
        if not self.unread:
            return
        steps, counts = zip(*self.unread, strict=True)
        for (loss, right), images in zip(torch.stack(steps).tolist(), counts, strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {self.steps} {self.where}: training diverged, a lower rate may help"
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
    """Train for one pass over `data_loader`: cross-entropy, a step of `optimizer` for each batch, or for several.

    Sets train mode, but keeps every BatchNorm whose parameters are frozen in evaluation mode, so that its statistics
    stay too. On a terminal a bar shows the progress; elsewhere nothing is printed.

    Args:
        model: takes images (N, 3, H, W), float32, normalised; gives logits (N, classes).
        data_loader: gives images (N, 3, H, W), uint8 or normalised float, and labels (N,), int64.
        epoch: its number, for the bar and for messages.
        steps: per step, the weights of its batches' mean losses (see `DistributedBatchSampler`). Gradients are reduced
            over ranks once per step. None: each batch is a step.
        amp_dtype: mixed precision, see `compute_logits`.
        scaler: of the loss, which float16 needs, as its gradients vanish otherwise (https://arxiv.org/abs/1710.03740).
        label_smoothing: the part of the probability that all classes share (https://arxiv.org/abs/1512.00567).
        progress: counts the steps; one that has counted some already is that of an epoch which goes on.
        before_step: called before each step, to set its learning rate for example; False ends the epoch there.
        after_step: called after each step; what it raises ends the epoch.
        keep_bar: leave the finished bar on the terminal.

    Returns:
        The mean loss over the images seen.

    Raises:
        FloatingPointError: the loss is infinite or not a number. The losses are looked at twice a second and at the
            end, so that some more steps may have been taken; the message names the step that it happened at.
        EmptyLoaderError: a ValueError; `data_loader` gives no image.
    """
    _train_mode(model)
    scaler = scaler or GradScaler(enabled=False)
    progress = progress or Progress()
    progress.start = progress.last_read = time.perf_counter()  # what came before it was no training
    silence = getattr(model, "no_sync", contextlib.nullcontext)  # of a DistributedDataParallel
    layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
    number = operator.length_hint(data_loader if steps is None else steps)  # 0: nobody knows
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

            if progress.is_due():  # of the steps before this one: the device has work while they are read
                progress.read()
                bar.set_description_str(f"[epoch {epoch}] {progress}", refresh=False)
            progress.add(*_together(seen))
            bar.update()
            if after_step is not None:
                after_step()
        progress.read()
        if progress.steps == 0:
            raise EmptyLoaderError("there is nothing to train on: the data loader gives no image")
        bar.set_description_str(f"[epoch {epoch}] {progress}")
    return progress.loss


def _of_steps(
    data_loader: DataLoader, steps: Sequence[Sequence[float]] | None
) -> Iterator[list[tuple[Tensor, Tensor, float]]]:
    """The batches of each step, and how much their losses count."""
    batches = iter(data_loader)
    if steps is None:
        yield from ([(*batch, 1.0)] for batch in batches)
    else:
        yield from ([(*next(batches), weight) for weight in weights] for weights in steps)


def _together(seen: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss, the logits and the labels of several batches."""
    if len(seen) == 1:
        return seen[0]
    losses, logits, labels = zip(*seen, strict=True)
    counts = torch.tensor([len(batch) for batch in labels], device=losses[0].device)
    return (torch.stack(losses) * counts).sum() / counts.sum(), torch.cat(logits), torch.cat(labels)


def _no_bar() -> bool | None:
    """For tqdm's `disable`: of several processes only the first draws a bar; None: on a terminal."""
    return True if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0 else None


def _train_mode(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine and not module.weight.requires_grad:
            module.eval()


def compute_logits(
    model: nn.Module, images: Tensor, device: torch.device | str, amp_dtype: torch.dtype | None = None
) -> Tensor:
    """A batch, normalised where it is not yet, through `model`.

    Args:
        images: (N, 3, H, W), uint8 or normalised float.
        amp_dtype: bfloat16 or float16 for mixed precision by autocast (https://arxiv.org/abs/1710.03740), None for
            float32.

    Returns:
        Logits (N, classes), float32 in either case: softmax and loss need its digits.
    """
    with torch.autocast(torch.device(device).type, amp_dtype, enabled=amp_dtype is not None):
        return model(prepare_batch(images, device)).float()


def evaluate(
    model: nn.Module, data_loader: DataLoader, device: torch.device | str, *, amp_dtype: torch.dtype | None = None
) -> float:
    """The accuracy (top-1, in 0..1) of `model` over the images of `data_loader`.

    In evaluation mode, without gradients; the model gets its mode back. For `amp_dtype` see `compute_logits`.

    Raises:
        EmptyLoaderError: a ValueError; `data_loader` gives no image.
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
    """One evaluation pass: whatever is wanted of it is computed from what it returns.

    Args:
        amp_dtype: mixed precision, see `compute_logits`.
        on_features: is told what the last layer sees of each batch, (N, features) float32 on `device`, and its labels.
            For a ResNet, or the `fc` of one.
        after_step: called after each batch; what it raises ends the pass.

    Returns:
        Logits (N, classes) float32 and labels (N,) int64 in the loader's order, on the CPU.

    Raises:
        EmptyLoaderError: a ValueError; `data_loader` gives no image.
    """
    all_logits, all_labels, seen = [], [], []
    with evaluation_mode(model), contextlib.ExitStack() as stack:
        model = fold_batch_norm(model) if isinstance(model, ResNet) else model
        if on_features is not None:
            last = model.fc if isinstance(model, ResNet) else model
            hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float()))
            stack.callback(hook.remove)
        for images, labels in tqdm(data_loader, desc="evaluating", leave=False, disable=_no_bar(), dynamic_ncols=True):
            if len(images):  # not if none of them could be read
                all_logits.append(compute_logits(model, images, device, amp_dtype))
                all_labels.append(labels)
                if on_features is not None:
                    on_features(seen.pop(), labels)
            if after_step is not None:
                after_step()
    if not all_logits:
        raise EmptyLoaderError("there is nothing to evaluate: the data loader gives no image")
    return torch.cat(all_logits).cpu(), torch.cat(all_labels).cpu()


def estimate_batch_norm(
    model: nn.Module,
    images: Tensor,
    device: torch.device | str,
    *,
    batch_size: int = 64,
    amp_dtype: torch.dtype | None = None,
) -> None:
    """Replace the running statistics of every BatchNorm by averages over `images`, computed with the current weights.

    Running averages lag behind weights that change fast, and belong to the image size of the training:
    Wu & Johnson 2021, https://arxiv.org/abs/2105.07576, sections 3 and 4.

    Args:
        images: (N, 3, H, W), uint8 or normalised float. Those of one class may lie next to each other: every batch
            takes images from all over the tensor.
        batch_size: the smallest number of images in a batch, if there are that many.
        amp_dtype: mixed precision, see `compute_logits`.
    """
    number = max(1, len(images) // batch_size)
    batches = (prepare_batch(images[start::number], device) for start in range(number))
    with torch.autocast(torch.device(device).type, amp_dtype, enabled=amp_dtype is not None):
        update_bn(batches, model)


def collect_features(
    model: ResNet, data_loader: DataLoader, device: torch.device | str, **options: Any
) -> tuple[Tensor, Tensor]:
    """What `fc` sees of the images of a loader: a pass of evaluation, with the `options` of `collect_logits`.

    Returns:
        Features (N, 512 * expansion) float32 and labels (N,) int64, in the loader's order, on the CPU.

    Raises:
        EmptyLoaderError: a ValueError; `data_loader` gives no image.
    """
    features: list[Tensor] = []
    _, labels = collect_logits(
        model, data_loader, device, on_features=lambda batch, _: features.append(batch.cpu()), **options
    )
    return torch.cat(features), labels


def gather_evaluation(dist: Distributed, collect: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What `collect_logits` or `collect_features` gives each of several processes for its share, one after the other.

    Raises:
        EmptyLoaderError: a ValueError; there is no image in any of them.
    """
    if dist.world_size == 1:
        return collect()
    try:
        share = collect()
    except EmptyLoaderError:  # more processes than batches
        share = None
    shares = [share for share in dist.gather(share) if share is not None]
    if not shares:
        raise EmptyLoaderError("there is nothing to evaluate: the data loader gives no image")
    values, labels = (torch.cat(column) for column in zip(*shares, strict=True))
    return values, labels


# --- metrics ------------------------------------------------------------------------------------------------------


class Evaluation:
    """The metrics of one pass over labelled images.

    Args:
        logits: (N, classes) float32.
        labels: (N,) int64, what each image shows.

    Both, and every tensor that is computed from them, in the same order and on the CPU.
    """

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        self.labels = labels
        self.classes = logits.shape[1]
        self.probabilities = logits.softmax(dim=1)
        """(N, classes) float32"""
        self.predicted = logits.argmax(dim=1)
        """(N,) int64"""
        self.losses = F.cross_entropy(logits, labels, reduction="none")
        """(N,) float32, the cross-entropy of each image"""

    @property
    def loss(self) -> float:
        """The mean over the images."""
        return self.losses.double().mean().item()

    @property
    def accuracy(self) -> float:
        """Top-1, in 0..1."""
        return (self.predicted == self.labels).double().mean().item()

    @property
    def confusion(self) -> Tensor:
        """How many images of each class (rows) were taken for each class (columns): (classes, classes) int64."""
        pairs = self.labels * self.classes + self.predicted
        return torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)

    @property
    def recalls(self) -> Tensor:
        """The part of each class's images that was recognised: (classes,) float64, NaN for a class without images."""
        confusion = self.confusion
        return confusion.diag().double() / confusion.sum(dim=1)

    @property
    def macro_f1(self) -> float:
        """The mean of the classes' F1 scores, 2 TP / (2 TP + FP + FN), in 0..1.

        Of the classes that occur, as a label or as a prediction (as scikit-learn's `f1_score(average="macro")`).
        """
        confusion = self.confusion
        either = confusion.sum(dim=0) + confusion.sum(dim=1)
        return (2 * confusion.diag() / either)[either > 0].double().mean().item()

    def worst(self, count: int) -> list[int]:
        """The places of `count` images: the mistakes with the highest loss, then, if these are too few, others."""
        by_loss = self.losses.argsort(descending=True, stable=True).tolist()
        return sorted(by_loss, key=lambda place: bool(self.predicted[place] == self.labels[place]))[:count]
