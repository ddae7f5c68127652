"""Tune a run before it starts: the learning-rate range test, and the plan for a time budget."""

import argparse
import copy
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from config import training_sizes
from data_loading import SafeImages, make_loader, make_train_loader
from distributed import Distributed
from model import ResNet
from my_dataset import MyDataSet, TrainTransform
from optimization import make_optimizer, set_learning_rate
from train_eval_utils import Progress, train_one_epoch

WINDOW = 11  # steps over which the range test averages the loss
DIVERGED = 2  # the factor by which the averaged loss exceeds its minimum when the range test stops
PLANNED_SIZES = (96, 128, 160, 192, 224)  # values of --img-size that a time budget may choose
PROBE_SIZES = (64, 128)  # image sizes at which the speed is measured


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
    dist: Distributed,
    **options: Any,
) -> RangeTest:
    """Run the range test on the training set and print the suggestion. `options`: those of `train_one_epoch`."""
    rates = np.geomspace(1e-5, 10, 120)
    train_set.transform.img_size = training_sizes(args)[1]
    images = SafeImages(train_set, replace=True)
    generator = torch.Generator().manual_seed(args.seed)
    sampler = RandomSampler(images, num_samples=len(rates) * args.batch_size, generator=generator)
    loader = make_loader(images, BatchSampler(sampler, args.batch_size, drop_last=False), args, device, dist)
    result = find_learning_rate(
        model,
        optimizer,
        loader,
        device,
        set_rate=functools.partial(set_learning_rate, optimizer),
        rates=rates,
        label_smoothing=args.label_smoothing,
        **options,
    )
    found = f"--lr {result.suggestion:.2g}" if math.isfinite(result.suggestion) else "none: the loss falls with no rate"
    print(f"suggestion   {found}")
    return result


def find_learning_rate(
    model: nn.Module,
    optimizer: Optimizer,
    data_loader: DataLoader,
    device: torch.device | str,
    set_rate: Callable[[float], None],
    rates: Sequence[float],
    **options: Any,
) -> RangeTest:
    """Raise the learning rate step by step until the loss diverges (Smith 2017, https://arxiv.org/abs/1506.01186).

    Overwrites the model's weights. The suggestion is the highest rate before the averaged loss has lost half of what it
    had gained, a little above the rate of the minimum: it suits a schedule that warms up and decays.

    Args:
        data_loader: yields a batch for each of `rates`.
        set_rate: sets the learning rate of the next step.
        rates: in geometric progression.
        options: those of `train_one_epoch`.

    Raises:
        FloatingPointError: the loss is not finite at one of the first rates already.
    """
    losses: list[float] = []
    progress = Progress()
    progress.on_read = lambda step, loss: losses.append(loss)

    def before_step() -> bool:
        if _divergence(losses) < len(losses):
            return False
        set_rate(rates[progress.taken])
        return True

    try:
        options |= {"progress": progress, "before_step": before_step, "keep_bar": False}
        train_one_epoch(model, optimizer, data_loader, device, 0, **options)
    except FloatingPointError:
        if len(losses) < WINDOW:
            raise
    losses = losses[: _divergence(losses)]
    smoothed = np.convolve(np.pad(losses, WINDOW // 2, mode="edge"), np.full(WINDOW, 1 / WINDOW), mode="valid")
    tried, minimum = np.array(rates[: len(losses)]), int(smoothed.argmin())
    half = (np.mean(losses[:WINDOW]) + smoothed[minimum]) / 2
    is_lost = np.append(smoothed[minimum:] > half, True)
    suggestion = float(tried[minimum + is_lost.argmax() - 1]) if minimum > 0 else math.nan
    return RangeTest(tried, np.array(losses), smoothed, suggestion)


def _divergence(losses: Sequence[float]) -> int:
    """Return the index at which the averaged loss has diverged; if it has not, the number of losses."""
    means = np.convolve(losses, np.full(WINDOW, 1 / WINDOW), mode="valid") if len(losses) >= WINDOW else []
    diverged = np.flatnonzero(means > DIVERGED * np.minimum.accumulate(means)) if len(means) else []
    return int(diverged[0]) + WINDOW if len(diverged) else len(losses)


# --- time budget --------------------------------------------------------------------------------------------------


def plan(
    args: argparse.Namespace,
    model: ResNet,
    train_set: MyDataSet,
    forward_images: int,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    dist: Distributed,
) -> tuple[int, float]:
    """Choose the image size for --time-budget by measuring the speed of a few steps.

    Args:
        forward_images: the number of images per epoch that take a forward pass only.

    Returns:
        --img-size, or the largest size at which there is time for the recipe's epochs; and the seconds that an
        evaluation will take.
    """
    images = copy.copy(train_set)  # without its cache
    images.transform = TrainTransform(PROBE_SIZES[-1])
    loader = make_train_loader(images, args, device, dist)
    model = copy.deepcopy(model)
    optimizer = make_optimizer(model, args, device, amp_dtype)
    set_learning_rate(optimizer, 0.0)
    seconds, took = 60 * args.time_budget, []
    for size in PROBE_SIZES:
        loader.batch_sampler.order.set_epoch(0, img_size=size)
        took.append(1 / measure_speed(model, optimizer, loader, device, min(4.0, seconds / 100), amp_dtype=amp_dtype))
    took = [slowest / dist.world_size for slowest in dist.all_reduce_max(*took)]
    small, large = (size**2 for size in PROBE_SIZES)
    per_image = min(max(0.0, (took[0] * large - took[1] * small) / (large - small)), took[1])  # whatever its size
    per_pixel = (took[1] - per_image) / large

    for img_size in [args.img_size] if args.img_size else reversed(PLANNED_SIZES):
        first, last = training_sizes(args, img_size)
        pixels = 0.8 * (first**2 + first * last + last**2) / 3 + 0.2 * last**2  # per image, on average
        evaluation = forward_images * (per_image + per_pixel * img_size**2) / 3  # there is no backward pass
        epochs = 0.95 * seconds / (len(images) * (per_image + per_pixel * pixels) + evaluation)
        if epochs >= args.epochs:
            break
    speeds = " and ".join(f"{1 / t:.1f} images/s at {size} px" for t, size in zip(took, PROBE_SIZES, strict=True))
    print(f"planned      {img_size} px, about {epochs:.1f} epochs ({speeds})")
    return img_size, evaluation


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
    counted = (0, time.perf_counter())  # images so far, and when they were counted

    def before_step() -> bool:
        nonlocal counted
        if progress.taken == 2:  # after the start of the workers and the choice of kernels
            progress.read()
            counted = (progress.images, time.perf_counter())
        return progress.taken < 3 or time.perf_counter() < counted[1] + seconds

    options = {"amp_dtype": amp_dtype, "progress": progress, "before_step": before_step, "keep_bar": False}
    train_one_epoch(model, optimizer, data_loader, device, 0, **options)
    images, start = counted if progress.images > counted[0] else (0, progress.start)
    return (progress.images - images) / (time.perf_counter() - start)
