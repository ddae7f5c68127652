"""Train for one epoch, evaluate, and estimate BatchNorm statistics."""

import contextlib
import copy
import math
import operator
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader
from tqdm import tqdm

from distributed import Distributed
from inference import EmptyLoaderError, compute_logits, disable_bar, run_inference
from metrics import Evaluation
from my_dataset import copy_to_device, prepare_batch
from optimization import current_learning_rate

READ_SECONDS = 0.5  # interval between reads of the losses


class NonFiniteLossError(FloatingPointError):
    """The training loss is not finite."""


class Callback:
    """Hooks around the optimizer steps of `train_one_epoch`, which are counted from 0 in each epoch."""

    def before_step(self, step: int) -> bool:
        """Prepare a step, e.g. set its learning rate. Return False to end the epoch."""
        return True

    def after_step(self, step: int) -> None:
        """Act after a step. An exception ends the epoch."""

    def on_loss(self, step: int, loss: float) -> None:
        """Receive the mean loss of each step, in order, during a later step or at the end of the epoch."""


class Progress:
    """Running loss and accuracy over an epoch's training images.

    Reading a loss synchronises with the device, so losses are read in groups. `state_dict` covers the steps read so
    far; `Progress(**state_dict)` restores it.
    """

    def __init__(self, loss_sum: float = 0.0, images: int = 0, steps: int = 0, correct: int = 0) -> None:
        self.loss_sum, self.images, self.steps, self.correct = loss_sum, images, steps, correct
        self.unread: list[tuple[Tensor, int]] = []
        self.start = self.last_read = time.perf_counter()
        self.images_before = images

    def __str__(self) -> str:
        return f"mean loss {self.loss:.3f}, {self.speed:.1f} images/s"

    @property
    def steps_taken(self) -> int:
        """The number of steps, including those whose losses have not been read."""
        return self.steps + len(self.unread)

    @property
    def loss(self) -> float:
        """The mean over the images; NaN before the first one."""
        return self.loss_sum / self.images if self.images else math.nan

    @property
    def accuracy(self) -> float:
        """Training accuracy in 0..1, on augmented images, with the weights at each step."""
        return self.correct / self.images if self.images else math.nan

    @property
    def speed(self) -> float:
        """Images per second."""
        return (self.images - self.images_before) / max(self.last_read - self.start, 1e-9)

    def state_dict(self) -> dict[str, float | int]:
        """Return the constructor arguments that restore this progress."""
        return {"loss_sum": self.loss_sum, "images": self.images, "steps": self.steps, "correct": self.correct}

    def all_reduce(self, dist: Distributed) -> "Progress":
        """Sum the progress over all ranks, which must have taken the same steps and read their losses."""
        if dist.world_size == 1:
            return self
        total = copy.copy(self)
        counts = dist.all_reduce_sum(self.loss_sum, self.images, self.correct, self.images_before)
        total.loss_sum, (total.images, total.correct, total.images_before) = counts[0], map(int, counts[1:])
        return total

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a step, given its scalar loss, logits (N, classes) and labels (N,)."""
        correct = (logits.detach().argmax(dim=1) == labels).sum()
        self.unread.append((torch.stack([loss.detach().float(), correct.float()]), len(labels)))

    def is_due(self) -> bool:
        """Return whether there are losses to read, and the last read was at least half a second ago."""
        return bool(self.unread) and time.perf_counter() - self.last_read >= READ_SECONDS

    def read(self, on_loss: Callable[[int, float], None] | None = None) -> None:
        """Wait for the pending losses and add them to the totals.

        Args:
            on_loss: called with each step's number and mean loss.

        Raises:
            NonFiniteLossError: a loss is not finite.
        """
        if not self.unread:
            return
        steps, counts = zip(*self.unread, strict=True)
        for (loss, correct), images in zip(torch.stack(steps).tolist(), counts, strict=True):
            if not math.isfinite(loss):
                raise NonFiniteLossError(f"training diverged: the loss is {loss} at step {self.steps}")
            if on_loss is not None:
                on_loss(self.steps, loss)
            self.loss_sum += loss * images
            self.correct += int(correct)
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
    class_weights: Tensor | None = None,
    progress: Progress | None = None,
    callback: Callback | None = None,
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
        label_smoothing: label smoothing in 0..1 (https://arxiv.org/abs/1512.00567), for the gradients only: the losses
            that are returned and logged are without it, like the validation loss.
        class_weights: (classes,) float32 on `device`; each image's loss is multiplied by the weight of its class, also
            for the gradients only.
        progress: pass a restored `Progress` to resume mid-epoch.
        callback: hooks around each step.
        keep_bar: leave the finished bar on the terminal.

    Returns:
        The mean cross-entropy over the images.

    Raises:
        NonFiniteLossError: a loss is not finite. Losses are read twice per second and at the end, so further steps may
            have been taken; the message names the step that diverged.
        EmptyLoaderError: `data_loader` yields no images.
    """
    _train_mode(model)
    scaler = scaler or GradScaler(enabled=False)
    progress = progress or Progress()
    callback = callback or Callback()
    progress.start = progress.last_read = time.perf_counter()  # the speed excludes the time before
    number = operator.length_hint(data_loader if steps is None else steps)  # 0: unknown
    bar = tqdm(
        total=progress.steps + number if number else None,
        initial=progress.steps,
        leave=keep_bar,
        disable=disable_bar(),
        dynamic_ncols=True,
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
    )
    with bar, _explain_divergence(optimizer, epoch):
        for batches in _batches_per_step(data_loader, steps):
            if not callback.before_step(progress.steps_taken):
                break
            optimizer.zero_grad()
            outputs = _accumulate_gradients(model, batches, device, amp_dtype, scaler, label_smoothing, class_weights)
            scaler.step(optimizer)
            scaler.update()

            if progress.is_due():  # read earlier steps while the device is busy with this one
                progress.read(callback.on_loss)
                bar.set_description_str(f"[epoch {epoch}] {progress}", refresh=False)
            progress.add(*outputs)
            bar.update()
            callback.after_step(progress.steps_taken - 1)
        progress.read(callback.on_loss)
        if progress.steps == 0:
            raise EmptyLoaderError("nothing to train on: the data loader is empty")
        bar.set_description_str(f"[epoch {epoch}] {progress}")
    return progress.loss


@contextlib.contextmanager
def _explain_divergence(optimizer: Optimizer, epoch: int) -> Iterator[None]:
    """Add the epoch, the learning rate and some advice to the message of a NonFiniteLossError."""
    try:
        yield
    except NonFiniteLossError as error:
        lr = current_learning_rate(optimizer)
        message = f"{error} of epoch {epoch}, with learning rate {lr:g}; try a lower learning rate"
        raise NonFiniteLossError(message) from error


def _batches_per_step(
    data_loader: DataLoader, steps: Sequence[Sequence[float]] | None
) -> Iterator[list[tuple[Tensor, Tensor, float]]]:
    """Yield the batches of each step as (images, labels, weight of the mean loss)."""
    batches = iter(data_loader)
    if steps is None:
        yield from ([(*batch, 1.0)] for batch in batches)
    else:
        yield from ([(*next(batches), weight) for weight in weights] for weights in steps)


def _accumulate_gradients(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor, float]],
    device: torch.device | str,
    amp_dtype: torch.dtype | None,
    scaler: GradScaler,
    label_smoothing: float,
    class_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward and backward passes of a step, and return its mean cross-entropy, logits and labels."""
    no_sync = getattr(model, "no_sync", contextlib.nullcontext)  # only DistributedDataParallel has no_sync
    losses, logits, labels = [], [], []
    for place, (images, batch_labels, weight) in enumerate(batches, start=1):
        with no_sync() if place < len(batches) else contextlib.nullcontext():  # all-reduce with the last batch
            batch_logits = compute_logits(model, images, device, amp_dtype)
            batch_labels = copy_to_device(batch_labels, device)
            loss = _training_loss(batch_logits, batch_labels, label_smoothing, class_weights)
            scaler.scale(loss * weight).backward()
        if label_smoothing > 0 or class_weights is not None:  # report the same quantity as for validation
            loss = F.cross_entropy(batch_logits.detach(), batch_labels)
        losses.append(loss.detach())
        logits.append(batch_logits.detach())
        labels.append(batch_labels)
    if len(batches) == 1:
        return losses[0], logits[0], labels[0]
    images = sum(map(len, labels))
    loss = sum(loss * (len(batch) / images) for loss, batch in zip(losses, labels, strict=True))
    return loss, torch.cat(logits), torch.cat(labels)


def _training_loss(logits: Tensor, labels: Tensor, label_smoothing: float, class_weights: Tensor | None) -> Tensor:
    if class_weights is None:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    losses = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    return (losses * class_weights[labels]).mean()


def _train_mode(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine and not module.weight.requires_grad:
            module.eval()


def evaluate(
    model: nn.Module, data_loader: DataLoader, device: torch.device | str, *, amp_dtype: torch.dtype | None = None
) -> float:
    """Return the top-1 accuracy in 0..1 of `model` on `data_loader`.

    Runs in evaluation mode without gradients, then restores the model's mode. For `amp_dtype` see `compute_logits`.

    Raises:
        EmptyLoaderError: `data_loader` yields no images.
    """
    outputs = run_inference(model, data_loader, device, amp_dtype=amp_dtype)
    return Evaluation(outputs.logits, outputs.labels).accuracy


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
