"""One epoch of training, one pass of evaluation, and the metrics that are computed from it."""

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

from model import ResNet, evaluation_mode, fold_batch_norm
from my_dataset import prepare_batch

READ_SECONDS = 0.5  # between two looks at the loss


class EmptyLoaderError(ValueError):
    """A data loader that gives no image."""


class MeanLoss:
    """The mean loss over the images seen. To read a loss is to wait for its step, so they are read in bunches.

    `state` (of what has been read) gives one that goes on from there: `MeanLoss(**state)`.
    """

    def __init__(self, sum: float = 0.0, images: int = 0, steps: int = 0) -> None:
        self.sum, self.images, self.steps = sum, images, steps
        self.where = ""  # for the message
        self.unread: list[tuple[Tensor, int]] = []
        self.start = self.last_read = time.perf_counter()
        self.images_before = images

    def __str__(self) -> str:
        speed = (self.images - self.images_before) / max(self.last_read - self.start, 1e-9)
        return f"mean loss {self.value:.3f}, {speed:.1f} images/s"

    @property
    def value(self) -> float:
        return self.sum / self.images

    @property
    def state(self) -> dict[str, float | int]:
        return {"sum": self.sum, "images": self.images, "steps": self.steps}

    def add(self, loss: Tensor, images: int) -> None:
        self.unread.append((loss.detach(), images))

    def is_due(self) -> bool:
        return bool(self.unread) and time.perf_counter() - self.last_read >= READ_SECONDS

    def read(self) -> None:
        """Wait for the losses; raises FloatingPointError where one is not finite."""
        if not self.unread:
            return
        losses, counts = zip(*self.unread, strict=True)
        for loss, images in zip(torch.stack(losses).tolist(), counts, strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {self.steps} {self.where}: training diverged, a lower rate may help"
                )
            self.sum += loss * images
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
    amp_dtype: torch.dtype | None = None,
    scaler: GradScaler | None = None,
    mean_loss: MeanLoss | None = None,
    after_step: Callable[[], None] | None = None,
    keep_bar: bool = True,
) -> float:
    """Train for one pass over `data_loader`: cross-entropy, a step of `optimizer` for each batch.

    Sets train mode, but keeps every BatchNorm whose parameters are frozen in evaluation mode, so that its statistics
    stay too. On a terminal a bar shows the progress; elsewhere nothing is printed.

    Args:
        model: takes images (N, 3, H, W), float32, normalised; gives logits (N, classes).
        data_loader: gives images (N, 3, H, W), uint8 or normalised float, and labels (N,), int64.
        epoch: its number, for the bar and for messages.
        amp_dtype: mixed precision, see `compute_logits`.
        scaler: of the loss, which float16 needs, as its gradients vanish otherwise (https://arxiv.org/abs/1710.03740).
        mean_loss: of the steps that were taken before an interruption, for an epoch that goes on.
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
    mean_loss = mean_loss or MeanLoss()
    mean_loss.where = f"of epoch {epoch}, with learning rate {optimizer.param_groups[0]['lr']:g}"
    layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
    steps = mean_loss.steps + len(data_loader)
    with tqdm(
        total=steps, initial=mean_loss.steps, leave=keep_bar, disable=None, dynamic_ncols=True, bar_format=layout
    ) as bar:
        for images, labels in data_loader:
            optimizer.zero_grad()
            logits = compute_logits(model, images, device, amp_dtype)
            loss = F.cross_entropy(logits, labels.to(device, non_blocking=True))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

            if mean_loss.is_due():  # of the steps before this one: the device has work while they are read
                mean_loss.read()
                bar.set_description_str(f"[epoch {epoch}] {mean_loss}", refresh=False)
            mean_loss.add(loss, len(images))
            bar.update()
            if after_step is not None:
                after_step()
        mean_loss.read()
        if mean_loss.images == 0:
            raise EmptyLoaderError("there is nothing to train on: the data loader gives no image")
        bar.set_description_str(f"[epoch {epoch}] {mean_loss}")
    return mean_loss.value


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
    return accuracy(*collect_logits(model, data_loader, device, amp_dtype=amp_dtype))


def collect_logits(
    model: nn.Module,
    data_loader: DataLoader,
    device: torch.device | str,
    *,
    amp_dtype: torch.dtype | None = None,
    after_step: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """One evaluation pass: whatever is wanted of it is computed from what it returns.

    Args:
        amp_dtype: mixed precision, see `compute_logits`.
        after_step: called after each batch; what it raises ends the pass.

    Returns:
        Logits (N, classes) float32 and labels (N,) int64 in the loader's order, on the CPU.

    Raises:
        EmptyLoaderError: a ValueError; `data_loader` gives no image.
    """
    all_logits, all_labels = [], []
    with evaluation_mode(model):
        model = fold_batch_norm(model) if isinstance(model, ResNet) else model
        for images, labels in tqdm(data_loader, desc="evaluating", leave=False, disable=None, dynamic_ncols=True):
            if len(images):  # not if none of them could be read
                all_logits.append(compute_logits(model, images, device, amp_dtype))
                all_labels.append(labels)
            if after_step is not None:
                after_step()
    if not all_logits:
        raise EmptyLoaderError("there is nothing to evaluate: the data loader gives no image")
    return torch.cat(all_logits).cpu(), torch.cat(all_labels).cpu()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The part of the rows of `logits` (N, classes) whose largest value is at `labels` (N,), in 0..1."""
    return (logits.argmax(dim=1) == labels).double().mean().item()
