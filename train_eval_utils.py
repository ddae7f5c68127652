"""One epoch of training, one pass of evaluation, and the metrics that are computed from it."""

import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

from model import evaluation_mode
from my_dataset import prepare_batch


def train_one_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    data_loader: DataLoader,
    device: torch.device | str,
    epoch: int,
    *,
    keep_bar: bool = True,
) -> float:
    """Train for one pass over `data_loader`: cross-entropy, a step of `optimizer` for each batch.

    Sets train mode, but keeps every BatchNorm whose parameters are frozen in evaluation mode, so that its statistics
    stay too. On a terminal a bar shows the progress; elsewhere nothing is printed.

    Args:
        model: takes images (N, 3, H, W), float32, normalised; gives logits (N, classes).
        data_loader: gives images (N, 3, H, W), uint8 or normalised float, and labels (N,), int64.
        epoch: its number, for the bar and for messages.
        keep_bar: leave the finished bar on the terminal.

    Returns:
        The mean loss over the images seen.

    Raises:
        FloatingPointError: the loss is infinite or not a number; the step that would follow is not taken.
        ValueError: `data_loader` is empty.
    """
    _train_mode(model)
    loss_sum, seen, start = 0.0, 0, time.perf_counter()
    layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    with tqdm(total=len(data_loader), leave=keep_bar, disable=None, dynamic_ncols=True, bar_format=layout) as bar:
        for step, (images, labels) in enumerate(data_loader):
            optimizer.zero_grad()
            logits = model(prepare_batch(images, device))
            loss = F.cross_entropy(logits, labels.to(device, non_blocking=True))
            value = loss.item()
            if not math.isfinite(value):
                rate = optimizer.param_groups[0]["lr"]
                raise FloatingPointError(
                    f"the loss is {value} at step {step} of epoch {epoch}, with learning rate {rate:g}: "
                    f"training diverged, a lower rate may help"
                )
            loss.backward()
            optimizer.step()

            loss_sum += value * len(images)
            seen += len(images)
            bar.set_description_str(f"[epoch {epoch}] mean loss {loss_sum / seen:.3f}", refresh=False)
            bar.set_postfix_str(f"{seen / (time.perf_counter() - start):.1f} images/s", refresh=False)
            bar.update()
    if seen == 0:
        raise ValueError("the data loader is empty: there is nothing to train on")
    return loss_sum / seen


def _train_mode(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine and not module.weight.requires_grad:
            module.eval()


def evaluate(model: nn.Module, data_loader: DataLoader, device: torch.device | str) -> float:
    """The accuracy (top-1, in 0..1) of `model` over the images of `data_loader`.

    In evaluation mode, without gradients; the model gets its mode back.

    Raises:
        ValueError: `data_loader` is empty.
    """
    return accuracy(*collect_logits(model, data_loader, device))


def collect_logits(model: nn.Module, data_loader: DataLoader, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """One evaluation pass: whatever is wanted of it is computed from what it returns.

    Returns:
        Logits (N, classes) float32 and labels (N,) int64 in the loader's order, on the CPU.

    Raises:
        ValueError: `data_loader` is empty.
    """
    all_logits, all_labels = [], []
    with evaluation_mode(model):
        for images, labels in tqdm(data_loader, desc="evaluating", leave=False, disable=None, dynamic_ncols=True):
            all_logits.append(model(prepare_batch(images, device)).float())
            all_labels.append(labels)
    if not all_logits:
        raise ValueError("the data loader is empty: there is nothing to evaluate")
    return torch.cat(all_logits).cpu(), torch.cat(all_labels).cpu()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The part of the rows of `logits` (N, classes) whose largest value is at `labels` (N,), in 0..1."""
    return (logits.argmax(dim=1) == labels).double().mean().item()
