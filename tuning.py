"""Tune a run before it starts: the learning-rate range test, and the plan for a time budget."""

import argparse
import bisect
import copy
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from cli_utils import number_of_workers
from config import DEFAULT_SIZE, training_sizes
from data_loading import SafeImages, build_train_loader, build_train_transform, make_loader
from distributed import Distributed
from model import ResNet
from my_dataset import MyDataSet
from optimization import build_optimizer, set_learning_rate
from prepare_data import Data
from run_utils import RunFolder
from train_eval_utils import Callback, NonFiniteLossError, Progress, train_one_epoch

WINDOW = 11  # steps over which the range test averages the loss
DIVERGENCE_FACTOR = 2  # the factor by which the averaged loss exceeds its minimum when the range test stops
PLANNED_SIZES = (96, 128, 160, 192, 224)  # values of --img-size that a time budget may choose
PROBE_SIZES = (64, 128)  # image sizes at which the speed is measured first
WARMUP_STEPS = 2  # before the speed is measured


# --- learning-rate range test -------------------------------------------------------------------------------------


class RangeTest(NamedTuple):
    """Learning rates (N,), the loss at each (N,), the averaged losses (N,), and the suggested rate (NaN: none)."""

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    suggestion: float


def find_lr(
    args: argparse.Namespace,
    train_set: MyDataSet,
    model: ResNet,
    optimizer: Optimizer,
    device: torch.device,
    callback: Callback,
    **options: Any,
) -> RangeTest:
    """Run the range test on the training set and print the suggestion.

    Args:
        callback: hooks around each step.
        options: keyword arguments for `train_one_epoch`.
    """
    rates = np.geomspace(1e-5, 10, 120)
    train_set.transform.img_size = training_sizes(args.recipe, train_set.transform.img_size)[1]
    images = SafeImages(train_set, replace=True)
    generator = torch.Generator().manual_seed(args.seed)
    sampler = RandomSampler(images, num_samples=len(rates) * args.batch_size, generator=generator)
    batches = BatchSampler(sampler, args.batch_size, drop_last=False)
    loader = make_loader(images, batches, number_of_workers(args.workers), device)
    options |= {"label_smoothing": args.label_smoothing, "callback": callback}
    result = lr_range_test(model, optimizer, loader, device, rates, **options)
    found = f"--lr {result.suggestion:.2g}" if math.isfinite(result.suggestion) else "none: no rate reduces the loss"
    print(f"suggestion   {found}")
    return result


class _RangeTestCallback(Callback):
    """Sets the next learning rate before each step, collects the losses, and ends the test when they diverge."""

    def __init__(self, optimizer: Optimizer, rates: Sequence[float], callback: Callback) -> None:
        self.optimizer, self.rates, self.callback = optimizer, rates, callback
        self.losses: list[float] = []

    def before_step(self, step: int) -> bool:
        if _divergence_index(self.losses) < len(self.losses):
            return False
        set_learning_rate(self.optimizer, self.rates[step])
        return self.callback.before_step(step)

    def after_step(self, step: int) -> None:
        self.callback.after_step(step)

    def on_loss(self, step: int, loss: float) -> None:
        self.losses.append(loss)


def lr_range_test(
    model: nn.Module,
    optimizer: Optimizer,
    data_loader: DataLoader,
    device: torch.device | str,
    rates: Sequence[float],
    callback: Callback | None = None,
    **options: Any,
) -> RangeTest:
    """Raise the learning rate step by step until the loss diverges (Smith 2017, https://arxiv.org/abs/1506.01186).

    Overwrites the model's weights. The suggestion is the highest rate before the averaged loss has given back half of
    its decrease, a little above the rate at its minimum: it suits a schedule that warms up and decays.

    Args:
        optimizer: its parameter groups have the key "lr_scale", see `set_learning_rate`.
        data_loader: yields a batch for each of `rates`.
        rates: in geometric progression.
        callback, options: those of `train_one_epoch`.

    Raises:
        FloatingPointError: the loss is not finite at one of the first rates.
    """
    test = _RangeTestCallback(optimizer, rates, callback or Callback())
    try:
        train_one_epoch(model, optimizer, data_loader, device, 0, callback=test, keep_bar=False, **options)
    except NonFiniteLossError:
        if len(test.losses) < WINDOW:
            raise
    losses = test.losses[: _divergence_index(test.losses)]
    smoothed = np.convolve(np.pad(losses, WINDOW // 2, mode="edge"), np.full(WINDOW, 1 / WINDOW), mode="valid")
    tried, minimum = np.array(rates[: len(losses)]), int(smoothed.argmin())
    half = (np.mean(losses[:WINDOW]) + smoothed[minimum]) / 2
    is_lost = np.append(smoothed[minimum:] > half, True)
    suggestion = float(tried[minimum + is_lost.argmax() - 1]) if minimum > 0 else math.nan
    return RangeTest(tried, np.array(losses), smoothed, suggestion)


def _divergence_index(losses: Sequence[float]) -> int:
    """Return the index at which the averaged loss has diverged; if it has not, the number of losses."""
    means = np.convolve(losses, np.full(WINDOW, 1 / WINDOW), mode="valid") if len(losses) >= WINDOW else []
    diverged = np.flatnonzero(means > DIVERGENCE_FACTOR * np.minimum.accumulate(means)) if len(means) else []
    return int(diverged[0]) + WINDOW if len(diverged) else len(losses)


# --- time budget --------------------------------------------------------------------------------------------------


def choose_img_size(
    args: argparse.Namespace,
    model: ResNet,
    data: Data,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    dist: Distributed,
    folder: RunFolder | None = None,
) -> tuple[int, float]:
    """Return --img-size, or by default 224 pixels or the size that fits --time-budget; on resume, the stored size.

    For a time budget, measure the speed of a few training steps, and choose the largest size that leaves time for
    the recipe's epochs.

    Returns:
        The size, and for a time budget the seconds that an evaluation will take, else 0.
    """
    if folder is not None:
        return folder.checkpoint["img_size"], 0.0
    if not args.time_budget:
        return args.img_size or DEFAULT_SIZE, 0.0
    probe = SpeedProbe(args, model, data.train_set, device, amp_dtype, dist)
    for size in PROBE_SIZES:
        probe.measure(size)
    while True:
        img_size, epochs, evaluation = plan_img_size(args, data, probe.seconds_per_image)
        end = training_sizes(args.recipe, img_size)[1]
        if end <= max(probe.measured):
            break
        probe.measure(end)  # small images say little about large ones: on a GPU, kernel launches dominate
    print(f"planned      {img_size} px, about {epochs:.1f} epochs")
    return img_size, evaluation


def plan_img_size(
    args: argparse.Namespace, data: Data, seconds_per_image: Callable[[float], float]
) -> tuple[int, float, float]:
    """Choose the largest image size at which the recipe's epochs fit into --time-budget.

    Args:
        seconds_per_image: the duration of training per image, as a function of the image size.

    Returns:
        The size, the number of epochs, and the seconds per evaluation.
    """
    forward_images = len(data.val_set) + args.recipe.bn_images  # per epoch, without a backward pass
    for img_size in [args.img_size] if args.img_size else reversed(PLANNED_SIZES):
        start, end = training_sizes(args.recipe, img_size)
        growing = np.mean([seconds_per_image(size) for size in np.linspace(start, end, 20)])
        training = len(data.train_set) * (0.8 * growing + 0.2 * seconds_per_image(end))  # see `Schedule.img_size`
        evaluation = forward_images * seconds_per_image(img_size) / 3
        epochs = 0.95 * 60 * args.time_budget / (training + evaluation)
        if epochs >= args.epochs:
            break
    return img_size, epochs, evaluation


class SpeedProbe:
    """Measures the speed of training at several image sizes, on a copy of the model.

    Attributes:
        measured: seconds per image of all ranks together, by image size.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: ResNet,
        train_set: MyDataSet,
        device: torch.device,
        amp_dtype: torch.dtype | None,
        dist: Distributed,
    ) -> None:
        images = copy.copy(train_set)
        images.transform = build_train_transform(args, PROBE_SIZES[-1])
        self.loader = build_train_loader(args, images, device, dist)
        batches = self.loader.batch_sampler
        batches.drop_last = len(images) >= batches.global_batch  # a smaller batch is slower per image
        self.model = copy.deepcopy(model)
        self.optimizer = build_optimizer(args, self.model, device, amp_dtype)
        set_learning_rate(self.optimizer, 0.0)
        self.device, self.amp_dtype, self.dist = device, amp_dtype, dist
        self.limit = min(4.0, 60 * args.time_budget / 100)
        self.measured: dict[int, float] = {}

    def measure(self, img_size: int) -> None:
        """Measure the speed at an image size and print it."""
        self.loader.batch_sampler.order.set_epoch(0, img_size=img_size)
        options = {"amp_dtype": self.amp_dtype}
        speed = measure_speed(self.model, self.optimizer, self.loader, self.device, self.limit, **options)
        (slowest,) = self.dist.all_reduce_max(1 / speed)
        self.measured[img_size] = slowest / self.dist.world_size
        print(f"measured     {1 / self.measured[img_size]:.1f} images/s at {img_size} px")

    def seconds_per_image(self, img_size: float) -> float:
        """Return the duration of training per image, interpolated or extrapolated linearly in the number of pixels."""
        sizes = sorted(self.measured)
        after = min(max(1, bisect.bisect_left(sizes, img_size)), len(sizes) - 1)
        low, high = sizes[after - 1 : after + 1]
        slope = max(0.0, (self.measured[high] - self.measured[low]) / (high**2 - low**2))
        return max(self.measured[high] + slope * (img_size**2 - high**2), 0.0)


class _SpeedCallback(Callback):
    """Ends an epoch `seconds` after kernels and workers have warmed up.

    The warm-up includes the steps on batches that were loaded meanwhile, for up to a quarter of `seconds`.
    """

    def __init__(self, progress: Progress, seconds: float, prefetched: int) -> None:
        self.progress, self.seconds, self.prefetched = progress, seconds, prefetched
        self.is_steady = False
        self.restart()

    def restart(self) -> None:
        """Start the measurement, after waiting for the steps so far."""
        self.progress.read()
        self.images, self.start = self.progress.images, time.perf_counter()

    def before_step(self, step: int) -> bool:
        if step == WARMUP_STEPS:
            self.restart()
        seconds = time.perf_counter() - self.start
        if self.is_steady:
            return seconds < self.seconds
        if step >= WARMUP_STEPS and (step >= WARMUP_STEPS + self.prefetched or seconds >= self.seconds / 4):
            self.is_steady = True
            self.restart()
        return True


def measure_speed(
    model: nn.Module,
    optimizer: Optimizer,
    data_loader: DataLoader,
    device: torch.device | str,
    seconds: float,
    *,
    amp_dtype: torch.dtype | None = None,
) -> float:
    """Return the training speed in images per second, data loading included."""
    progress = Progress()
    timer = _SpeedCallback(progress, seconds, data_loader.num_workers * (data_loader.prefetch_factor or 0))
    options = {"amp_dtype": amp_dtype, "progress": progress, "callback": timer, "keep_bar": False}
    train_one_epoch(model, optimizer, data_loader, device, 0, **options)
    images, start = (timer.images, timer.start) if progress.images > timer.images else (0, progress.start)
    return (progress.images - images) / (time.perf_counter() - start)
