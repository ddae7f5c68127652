"""How a network learns: the weights it starts from, its optimizer and schedule, and what is measured to plan them."""

import argparse
import copy
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from distributed import Distributed
from loaders import GRAIN, make_loader, make_train_loader, training_sizes
from model import ResNet, freeze_backbone, load_pretrained
from my_dataset import MyDataSet, Tolerant, TrainTransform
from train_eval_utils import Progress, train_one_epoch

FIRST_RATE = 1 / 25  # of the highest: PyTorch's default for 1cycle
MOMENTUM = 0.9
BLOCK, TINY = 64, 1e-7  # rows of a kernel that are made orthogonal together; what keeps 0 / 0 away
NEARLY = 0.97  # of the time: the learning rate is down by then
SMOOTHING, RISEN = 11, 2  # of the range test: steps; times the least loss
PLANNED_SIZES = (96, 128, 160, 192, 224)  # of --img-size, for a time budget
PROBE_SIZES = (64, 128)  # at which speed is measured, to plan by


# --- weights and optimizer ----------------------------------------------------------------------------------------


def prepare_weights(model: ResNet, args: argparse.Namespace, resumed: bool, dist: Distributed) -> str:
    """Load and freeze as the flags say; a few words for the header. A run that goes on loads its own weights later."""
    words = f"weights of {args.weights}" if args.weights else "from scratch (no --weights given)"
    if args.weights and not resumed:
        left_out = dist.local_rank_zero_first(lambda: load_pretrained(model, args.weights, args.model))
        if left_out:
            words += f" but for {', '.join(left_out)}, made for another number of classes"
    if args.freeze_layers:
        freeze_backbone(model)
        words += "; only fc learns"
        if not args.weights:
            print("warning: --freeze-layers without --weights freezes a random backbone")
    return words


class Muon(torch.optim.SGD):
    """Stochastic gradient descent, which in groups with "orthogonal" set first makes the momentum orthogonal.

    In a momentum few directions outweigh all others; made orthogonal, as a matrix, it moves a layer in each of them as
    far (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/). PyTorch's own Muon takes matrices alone, and
    whole ones. Here a kernel (out, in, height, width) is a matrix of `out` rows, in blocks of 64, each made orthogonal
    in itself (Khaled et al. 2025, https://arxiv.org/abs/2510.16981), for a fraction of the work. A kernel keeps its
    length, which BatchNorm makes meaningless: the learning rate is the angle of a step, about, in radians.

    Args:
        groups: of parameters, with "orthogonal" in each; those that have it hold kernels.
        dtype: to compute the orthogonal matrices in; None for that of the kernels.
        options: as those of `torch.optim.SGD`, for the other groups; kernels have momentum, Nesterov's, and no decay.
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype | None = None, **options: Any) -> None:
        super().__init__(groups, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Take one, by the gradients of the parameters, which stay as they are."""
        gradients = {}
        for group in self.param_groups:
            for kernel in group["params"] if group["orthogonal"] else ():
                if kernel.grad is not None:
                    self._turn(kernel, group["lr"])
                    gradients[kernel], kernel.grad = kernel.grad, None
        super().step()  # of all that has a gradient
        for kernel, gradient in gradients.items():
            kernel.grad = gradient

    def _turn(self, kernel: Parameter, angle: float) -> None:
        """Take its step."""
        state = self.state[kernel]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(kernel)
        momentum = state["momentum_buffer"].lerp_(kernel.grad, 1 - MOMENTUM)
        ahead = kernel.grad.lerp(momentum, MOMENTUM).movedim(1, -1)  # Nesterov's; in channels-last order, as it lies
        rows = ahead.flatten(1).to(self.dtype or kernel.dtype)
        blocks = orthogonalize(rows.unflatten(0, (-1, math.gcd(len(rows), BLOCK))))
        direction = blocks.reshape(ahead.shape).movedim(-1, 1).to(kernel.dtype)
        length = kernel.norm()
        kernel.sub_(direction.mul_(angle * length / direction.norm().clamp_min(TINY)))
        kernel.mul_(length / kernel.norm().clamp_min(TINY))


def orthogonalize(matrices: Tensor) -> Tensor:
    """The orthogonal matrices next to some (number, rows, columns), about: their singular values become 0.7 to 1.2.

    By Newton and Schulz's iteration, with the coefficients of Jordan et al. 2024; those of columns, if rows are more.
    """
    matrices = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp_min(TINY)
    for _ in range(5):
        squares = matrices @ matrices.mT
        squares = torch.baddbmm(squares, squares, squares, beta=-4.7750, alpha=2.0315)
        matrices = torch.baddbmm(matrices, squares, matrices, beta=3.4445)
    return matrices


def make_optimizer(
    model: ResNet, args: argparse.Namespace, device: torch.device, amp_dtype: torch.dtype | None = None
) -> torch.optim.SGD:
    """For the parameters that learn, in groups of one part of the learning rate each; kernels of Muon apart.

    Args:
        amp_dtype: of mixed precision, None without.
    """
    groups: dict[tuple[float, bool], list[Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            orthogonal = args.muon_rate > 0 and parameter.ndim == 4
            part = 1.0 if name.startswith("fc.") else args.backbone_rate
            part *= args.muon_rate if orthogonal else 1.0
            groups.setdefault((part, orthogonal), []).append(parameter)
    # One kernel for all of them, where there is one; it would take the momentum from a step that was to be skipped.
    fused = (device.type in ("cpu", "cuda") and amp_dtype != torch.float16) or None
    optimizer = torch.optim.SGD
    if args.muon_rate > 0:
        optimizer = functools.partial(Muon, dtype=torch.bfloat16 if amp_dtype == torch.bfloat16 else None)
    return optimizer(
        [{"params": same, "part": part, "orthogonal": orthogonal} for (part, orthogonal), same in groups.items()],
        lr=args.lr,
        weight_decay=args.weight_decay,
        momentum=MOMENTUM,
        nesterov=args.nesterov,
        fused=fused,
    )


def make_average(model: ResNet, args: argparse.Namespace) -> AveragedModel | None:
    """Create the exponential moving average of the weights, which is what is validated and saved as best.pth.

    While the learning rate is high the weights fluctuate from step to step, and their average is the better network
    (Polyak & Juditsky 1992, https://doi.org/10.1137/0330046).

    Returns:
        None if the recipe has no average, or if only `fc` is trained.
    """
    if args.ema_decay == 0 or args.freeze_layers:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """For the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["part"]


# --- schedule -----------------------------------------------------------------------------------------------------


class Schedule:
    """How far a training is, from 0 to 1, and what follows from that: its learning rate and the size of its images.

    The rate rises for a while and falls then by half a cosine (https://arxiv.org/abs/1812.01187), in all but the rise
    the tutorial's; a rise to a rate that is too high for the first steps and a long fall are the "1cycle policy" of
    Smith & Topin 2017, https://arxiv.org/abs/1708.07120. The images grow from the first to the last size, as less of
    them can be computed in the time of large ones (Tan & Le 2021, https://arxiv.org/abs/2104.00298).

    Args:
        epochs: how many there are.
        steps: of each.
        lr: the highest learning rate.
        lrf: the last one, as a part of it.
        warmup: the part of the training in which it rises.
        by_step: it changes with each step; otherwise with each epoch (a timed one's always with the clock).
        img_sizes: pixels, at the start and at the end.
    """

    def __init__(
        self,
        epochs: int,
        steps: int,
        *,
        lr: float,
        lrf: float,
        warmup: float = 0.0,
        by_step: bool = False,
        img_sizes: tuple[int, int] = (224, 224),
    ) -> None:
        self.epochs, self.steps = epochs, max(1, steps)
        self.lr, self.lrf, self.warmup, self.by_step = lr, lrf, warmup, by_step
        self.img_sizes = img_sizes

    def progress(self, epoch: int, step: int = 0) -> float:
        """From 0 to 1, before a step of an epoch (both from 0)."""
        return min(1.0, (epoch + step / self.steps) / self.epochs)

    def is_over(self, epoch: int) -> bool:
        """Whether there is no such epoch any more."""
        return epoch >= self.epochs

    def learning_rate(self, epoch: int, step: int = 0) -> float:
        """Of a step."""
        progress = self.progress(epoch, step if self.by_step else 0)
        if progress < self.warmup:
            return self.lr * (FIRST_RATE + (1 - FIRST_RATE) * progress / self.warmup)
        fall = (progress - self.warmup) / (1 - self.warmup)
        return self.lr * ((1 + math.cos(math.pi * fall)) / 2 * (1 - self.lrf) + self.lrf)

    def img_size(self, epoch: int) -> int:
        """Of the images of an epoch: it grows evenly over the first four fifths."""
        first, last = self.img_sizes
        grown = min(1.0, self.progress(epoch) / 0.8)
        return last if grown == 1 else first + round(grown * (last - first) / GRAIN) * GRAIN

    def reserve_time(self, seconds: float) -> None:
        """Note how long all that comes after the last step of an epoch has taken."""

    def state_dict(self) -> dict[str, float]:
        """What it takes to go on after an interruption."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on where `state_dict` was called."""


class TimedSchedule(Schedule):
    """A schedule that follows the clock: it is complete when the time is up, however fast the machine is by then.

    Li, Yumer, Ramanan 2020: Budgeted Training, https://arxiv.org/abs/1905.04753

    Args:
        seconds: for all of it.
        clock: tells the seconds since it began.
        options: as `Schedule`'s, without `epochs` and `steps`.
    """

    def __init__(self, seconds: float, clock: Callable[[], float], **options: Any) -> None:
        super().__init__(epochs=1, steps=1, **options)
        self.seconds, self.clock = seconds, clock
        self.before = 0.0  # seconds spent before an interruption
        self.reserve = 0.0

    @property
    def spent(self) -> float:
        """Seconds, until now."""
        return self.before + self.clock()

    def progress(self, epoch: int, step: int = 0) -> float:
        """From 0 to 1, now."""
        return min(1.0, self.spent / max(self.seconds - self.reserve, self.seconds / 10))

    def is_over(self, epoch: int) -> bool:
        """Whether the time is up, or so nearly that another epoch would learn nothing."""
        return self.progress(epoch) >= NEARLY

    def reserve_time(self, seconds: float) -> None:
        """Note how long evaluation, figures and checkpoints have taken; after the last epoch they take longer."""
        self.reserve = 2 * seconds

    def state_dict(self) -> dict[str, float]:
        return {"spent": self.spent, "reserve": self.reserve}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.before = float(state["spent"]) - self.clock()
        self.reserve = float(state["reserve"])


def make_schedule(args: argparse.Namespace, steps: int, dist: Distributed) -> Schedule:
    """The learning rate and the size of the images: for epochs of so many steps, or for a time that has begun."""
    options = {"lr": args.lr, "lrf": args.lrf, "warmup": args.warmup, "by_step": args.rate_by_step}
    options |= {"img_sizes": training_sizes(args)}
    if args.time_budget:
        return TimedSchedule(60 * args.time_budget, dist.elapsed, **options)
    return Schedule(args.epochs, steps, **options)


# --- the range test -----------------------------------------------------------------------------------------------


class RangeTest(NamedTuple):
    """Learning rates (N,), the loss of a step with each (N,), the same smoothed (N,), and the rate to train with."""

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
    """Find a learning rate, and say which. `options`: as `find_learning_rate`'s."""
    rates = np.geomspace(1e-5, 10, 120)
    train_set.transform.img_size = training_sizes(args)[1]
    images = Tolerant(train_set, replace=True)
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
    """The range test of Smith 2017, https://arxiv.org/abs/1506.01186: the rate rises step by step, until the loss does.

    `model` is of no use afterwards.

    Args:
        data_loader: gives a batch for each of `rates`.
        set_rate: sets the rate of the next step.
        rates: rising evenly in their logarithm.
        options: as `train_one_epoch`'s.

    Raises:
        FloatingPointError: the loss is not finite with one of the first rates already.

    The suggestion is the highest rate before the loss has lost half of what it had gained, a little above that of the
    least loss: for a schedule that rises to it and falls again. Not a number where the loss never falls.
    """
    losses: list[float] = []
    progress = Progress()
    progress.on_read = lambda step, loss: losses.append(loss)

    def before_step() -> bool:
        if _rise(losses) < len(losses):
            return False
        set_rate(rates[progress.taken])
        return True

    try:
        options |= {"progress": progress, "before_step": before_step, "keep_bar": False}
        train_one_epoch(model, optimizer, data_loader, device, 0, **options)
    except FloatingPointError:
        if len(losses) < SMOOTHING:
            raise
    losses = losses[: _rise(losses)]
    smoothed = np.convolve(np.pad(losses, SMOOTHING // 2, mode="edge"), np.full(SMOOTHING, 1 / SMOOTHING), mode="valid")
    tried, least = np.array(rates[: len(losses)]), int(smoothed.argmin())
    half = (np.mean(losses[:SMOOTHING]) + smoothed[least]) / 2
    lost = np.append(smoothed[least:] > half, True)
    suggestion = float(tried[least + lost.argmax() - 1]) if least > 0 else math.nan
    return RangeTest(tried, np.array(losses), smoothed, suggestion)


def _rise(losses: Sequence[float]) -> int:
    """The place in `losses` where their mean over some steps is far above what it has been; else their number."""
    means = np.convolve(losses, np.full(SMOOTHING, 1 / SMOOTHING), mode="valid") if len(losses) >= SMOOTHING else []
    risen = np.flatnonzero(means > RISEN * np.minimum.accumulate(means)) if len(means) else []
    return int(risen[0]) + SMOOTHING if len(risen) else len(losses)


# --- planning -----------------------------------------------------------------------------------------------------


def plan(
    args: argparse.Namespace,
    model: ResNet,
    train_set: MyDataSet,
    forward_images: int,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    dist: Distributed,
) -> tuple[int, float]:
    """Plan for a time budget, by the speed of a few steps.

    Args:
        forward_images: the images per epoch that only take a forward pass.

    Returns:
        The largest size of images, unless the flags say which, at which there is time for as many epochs as the recipe
        has; and the seconds that an evaluation will take.
    """
    images = copy.copy(train_set)  # which keeps no images: these are small ones
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
    per_image = min(max(0.0, (took[0] * large - took[1] * small) / (large - small)), took[1])  # whatever its size is
    per_pixel = (took[1] - per_image) / large

    for img_size in [args.img_size] if args.img_size else reversed(PLANNED_SIZES):
        first, last = training_sizes(args, img_size)
        pixels = 0.8 * (first**2 + first * last + last**2) / 3 + 0.2 * last**2  # of an image, in the mean
        evaluation = forward_images * (per_image + per_pixel * img_size**2) / 3  # without a backward pass
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
    """How many images of `data_loader` a second of training takes, reading included."""
    progress = Progress()
    counted = (0, time.perf_counter())  # images, and when that was

    def before_step() -> bool:
        nonlocal counted
        if progress.taken == 2:  # by now workers have started, and kernels are chosen
            progress.read()
            counted = (progress.images, time.perf_counter())
        return progress.taken < 3 or time.perf_counter() < counted[1] + seconds

    options = {"amp_dtype": amp_dtype, "progress": progress, "before_step": before_step, "keep_bar": False}
    train_one_epoch(model, optimizer, data_loader, device, 0, **options)
    images, start = counted if progress.images > counted[0] else (0, progress.start)
    return (progress.images - images) / (time.perf_counter() - start)
