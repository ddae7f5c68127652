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
from my_dataset import prepare_batch, to_pixels

READ_SECONDS = 0.5  # between two looks at the loss


class EmptyLoaderError(ValueError):
    """A data loader that gives no image."""


class Progress:
    """Loss and accuracy over the images of an epoch that were trained on so far.

    To read a loss is to wait for its step, so they are read in bunches. `state` (of what has been read) gives one that
    goes on from there: `Progress(**state)`.
    """

    def __init__(self, sum: float = 0.0, images: int = 0, steps: int = 0, right: int = 0) -> None:
        self.sum, self.images, self.steps, self.right = sum, images, steps, right
        self.where = ""  # for the message
        self.on_read: Callable[[int, float], None] | None = (
            None  # is told the number of each step, from 0, and its loss
        )
        self.unread: list[tuple[Tensor, int]] = []
        self.start = self.last_read = time.perf_counter()
        self.images_before = images

    def __str__(self) -> str:
        return f"mean loss {self.loss:.3f}, {self.speed:.1f} images/s"

    @property
    def loss(self) -> float:
        """The mean over the images."""
        return self.sum / self.images

    @property
    def accuracy(self) -> float:
        """In 0..1; each image as it was augmented, by the weights of its own step."""
        return self.right / self.images

    @property
    def speed(self) -> float:
        """Images a second."""
        return (self.images - self.images_before) / max(self.last_read - self.start, 1e-9)

    @property
    def state(self) -> dict[str, float | int]:
        """What `Progress` takes to go on from here."""
        return {"sum": self.sum, "images": self.images, "steps": self.steps, "right": self.right}

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
    amp_dtype: torch.dtype | None = None,
    scaler: GradScaler | None = None,
    progress: Progress | None = None,
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
        progress: counts the steps; one that has counted some already is that of an epoch which goes on.
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
    progress.where = f"of epoch {epoch}, with learning rate {optimizer.param_groups[0]['lr']:g}"
    layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
    steps = progress.steps + len(data_loader)
    with tqdm(
        total=steps, initial=progress.steps, leave=keep_bar, disable=None, dynamic_ncols=True, bar_format=layout
    ) as bar:
        for images, labels in data_loader:
            optimizer.zero_grad()
            logits = compute_logits(model, images, device, amp_dtype)
            labels = labels.to(device, non_blocking=True)
            loss = F.cross_entropy(logits, labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

            if progress.is_due():  # of the steps before this one: the device has work while they are read
                progress.read()
                bar.set_description_str(f"[epoch {epoch}] {progress}", refresh=False)
            progress.add(loss, logits, labels)
            bar.update()
            if after_step is not None:
                after_step()
        progress.read()
        if progress.images == 0:
            raise EmptyLoaderError("there is nothing to train on: the data loader gives no image")
        bar.set_description_str(f"[epoch {epoch}] {progress}")
    return progress.loss


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


def collect_features(
    model: ResNet,
    data_loader: DataLoader,
    device: torch.device | str,
    limit: int,
    *,
    amp_dtype: torch.dtype | None = None,
    thumbnail_size: int = 32,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `fc` sees of the first images of a loader, at least `limit` of them where there are so many.

    Returns:
        Features (N, 512 * expansion) float32, labels (N,) int64, and the images in small, (N, 3, thumbnail_size,
        thumbnail_size) float32 in 0..1; on the CPU.
    """
    features, labels, thumbnails = [], [], []
    with evaluation_mode(model):
        backbone = fold_batch_norm(model)
        backbone.fc = nn.Identity()
        for images, batch_labels in data_loader:
            if len(images):
                features.append(compute_logits(backbone, images, device, amp_dtype).cpu())
                labels.append(batch_labels)
                pixels = torch.from_numpy(to_pixels(images)).permute(0, 3, 1, 2) / 255
                thumbnails.append(F.interpolate(pixels, (thumbnail_size, thumbnail_size), mode="area"))
            if sum(map(len, labels)) >= limit:
                break
    return torch.cat(features), torch.cat(labels), torch.cat(thumbnails)


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
