"""Optimizers with parameter groups, Muon, averaged weights and learning-rate schedules."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from config import SIZE_STEP, training_sizes
from dataset_split import Count
from distributed import Distributed
from model import ResNet

WARMUP_START = 1 / 25  # of the maximum learning rate: PyTorch's default for 1cycle
MOMENTUM = 0.9
BLOCK_ROWS = 64  # rows of a kernel that are orthogonalised together
EPSILON = 1e-7  # avoids division by zero
BUDGET_END_FRACTION = 0.97  # fraction of a time budget after which no further epoch starts


def build_class_weights(args: argparse.Namespace, counts: Mapping[str, Count], device: torch.device) -> Tensor | None:
    """Compute the weights of the classes in the loss for --class-weights.

    Args:
        counts: the numbers of images per class.

    Returns:
        (classes,) float32, proportional to (training images) ** -P, with a mean of 1 over the training images; None for
        equal weights.
    """
    if args.class_weights == 0:
        return None
    images = torch.tensor([count.train for count in counts.values()], dtype=torch.float64)
    weights = images**-args.class_weights
    return (weights * images.sum() / (weights * images).sum()).float().to(device)


# --- optimizer ----------------------------------------------------------------------------------------------------


class Muon(torch.optim.SGD):
    """SGD that orthogonalises the momentum of convolution kernels: the groups with `"orthogonal": True`.

    A few directions dominate a momentum matrix; orthogonalised, it updates a layer equally in all of them (Jordan et
    al. 2024, https://kellerjordan.github.io/posts/muon/). `torch.optim.Muon` accepts matrices only. Here a kernel
    (out, in, height, width) is a matrix of `out` rows, orthogonalised in blocks of 64 rows, which takes a fraction of
    the time (Khaled et al. 2025, https://arxiv.org/abs/2510.16981). A kernel keeps its norm, which BatchNorm cancels,
    so its learning rate is the angle of an update in radians.

    The arguments are those of `torch.optim.SGD`. Each parameter group needs the key "orthogonal"; if it is true, the
    group uses Nesterov momentum of 0.9 and no weight decay, whatever its other options.
    """

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters. Gradients are left unchanged."""
        gradients: dict[Parameter, Tensor] = {}
        for group in self.param_groups:
            by_rows: dict[int, list[Parameter]] = {}
            for kernel in group["params"] if group["orthogonal"] else ():
                if kernel.grad is not None:
                    by_rows.setdefault(math.gcd(len(kernel), BLOCK_ROWS), []).append(kernel)
            for rows, kernels in by_rows.items():
                self._update(kernels, rows, group["lr"])
                for kernel in kernels:
                    gradients[kernel], kernel.grad = kernel.grad, None
        super().step()  # updates the parameters that still have a gradient
        for kernel, gradient in gradients.items():
            kernel.grad = gradient

    def _update(self, kernels: list[Parameter], rows: int, lr: float) -> None:
        """Update kernels, orthogonalised in blocks of `rows` rows."""
        for kernel in kernels:
            if "momentum_buffer" not in self.state[kernel]:
                self.state[kernel]["momentum_buffer"] = torch.zeros_like(kernel)
        gradients = [kernel.grad for kernel in kernels]
        momenta = [self.state[kernel]["momentum_buffer"] for kernel in kernels]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        nesterov = [each.movedim(1, -1) for each in torch._foreach_lerp(gradients, momenta, MOMENTUM)]
        # In the channels-last format, a row (height, width, in) is contiguous.
        blocks = orthogonalize([each.reshape(-1, rows, each[0].numel()) for each in nesterov])
        updates = [block.view(each.shape).movedim(-1, 1) for block, each in zip(blocks, nesterov, strict=True)]
        norms = torch.stack(torch._foreach_norm(kernels))
        scales = lr * norms / torch.stack(torch._foreach_norm(updates)).clamp_min(EPSILON)
        torch._foreach_mul_(updates, [*scales])
        torch._foreach_sub_(kernels, updates)
        torch._foreach_mul_(kernels, [*(norms / torch.stack(torch._foreach_norm(kernels)).clamp_min(EPSILON))])


def orthogonalize(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Approximate the nearest orthogonal matrices by five Newton-Schulz iterations (coefficients: Jordan et al. 2024).

    An iteration X <- (a + b G + c G^2) X with G = X X^T multiplies X by a matrix that depends on G only. So the
    iterations are computed on the small matrices G, for all `matrices` together, and each X is multiplied once.

    Args:
        matrices: each (N, rows, columns), with the same number of rows. They must be float32, because G has the
            squared condition number.

    Returns:
        Matrices of the same shapes, with singular values of about 0.7 to 1.2.
    """
    gram = torch.cat([each @ each.mT for each in matrices])
    squared_norms = gram.diagonal(dim1=1, dim2=2).sum(dim=1).clamp_min(EPSILON**2)[:, None, None]
    gram = gram / squared_norms
    factors = squared_norms.rsqrt()
    for _ in range(5):
        polynomials = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        polynomials.diagonal(dim1=1, dim2=2).add_(3.4445)
        factors = polynomials @ factors if factors.shape[-1] > 1 else polynomials * factors
        gram = polynomials @ gram @ polynomials
    return [factor @ each for factor, each in zip(factors.split([*map(len, matrices)]), matrices, strict=True)]


def build_optimizer(
    args: argparse.Namespace, model: ResNet, device: torch.device, amp_dtype: torch.dtype | None = None
) -> torch.optim.SGD:
    """Create the optimizer of the trainable parameters, with a parameter group per learning-rate scale and update rule.

    Args:
        amp_dtype: the dtype for mixed precision; None for float32.
    """
    recipe = args.recipe
    groups: dict[tuple[float, bool], list[Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            orthogonal = recipe.muon_lr_scale > 0 and parameter.ndim == 4
            lr_scale = 1.0 if name.startswith("fc.") else recipe.backbone_lr_scale
            lr_scale *= recipe.muon_lr_scale if orthogonal else 1.0
            groups.setdefault((lr_scale, orthogonal), []).append(parameter)
    # A fused optimizer would update its momentum even in a step that float16's gradient scaler skips.
    fused = (device.type in ("cpu", "cuda") and amp_dtype != torch.float16) or None
    optimizer = torch.optim.SGD
    if recipe.muon_lr_scale > 0:
        optimizer = Muon
    return optimizer(
        [{"params": same, "lr_scale": scale, "orthogonal": orthogonal} for (scale, orthogonal), same in groups.items()],
        lr=args.lr,
        weight_decay=args.weight_decay,
        momentum=MOMENTUM,
        nesterov=recipe.nesterov,
        fused=fused,
    )


def build_average(args: argparse.Namespace, model: ResNet) -> AveragedModel | None:
    """Create the exponential moving average of the weights, which is validated and saved as best.pth.

    While the learning rate is high the weights fluctuate from step to step, and their average is the better network
    (Polyak & Juditsky 1992, https://doi.org/10.1137/0330046).

    Returns:
        None if the recipe has no average, or if only `fc` is trained.
    """
    if args.recipe.ema_decay == 0 or args.freeze_layers:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.recipe.ema_decay))


def current_learning_rate(optimizer: Optimizer) -> float:
    """Return the learning rate without the scales of the parameter groups, as for --lr."""
    return max(group["lr"] / group.get("lr_scale", 1.0) for group in optimizer.param_groups)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group to `lr` times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


# --- schedules ----------------------------------------------------------------------------------------------------


class Schedule:
    """The learning rate, the image size and the colour jitter as functions of the training's progress from 0 to 1.

    After a linear warm-up the learning rate falls by half a cosine (Loshchilov & Hutter 2017,
    https://arxiv.org/abs/1608.03983); without the warm-up this is the tutorial's schedule. The image size grows, as
    more small images than large ones fit into the same time (Tan & Le 2021, https://arxiv.org/abs/2104.00298).

    Args:
        epochs: the number of epochs.
        steps: the number of steps per epoch.
        lr: the maximum learning rate.
        lrf: the final learning rate, as a fraction of `lr`.
        warmup: the fraction of the training in which the learning rate rises.
        per_step: update the learning rate after every step instead of every epoch.
        img_sizes: the image sizes in pixels at the start and at the end.
        color_jitter: the maximum strength of the colour jitter.
    """

    def __init__(
        self,
        epochs: int,
        steps: int,
        *,
        lr: float,
        lrf: float,
        warmup: float = 0.0,
        per_step: bool = False,
        img_sizes: tuple[int, int] = (224, 224),
        color_jitter: float = 0.0,
    ) -> None:
        self.epochs, self.steps = epochs, max(1, steps)
        self.lr, self.lrf, self.warmup, self.per_step = lr, lrf, warmup, per_step
        self.img_sizes, self.max_color_jitter = img_sizes, color_jitter

    def progress(self, epoch: int, step: int = 0) -> float:
        """Return the progress before a step of an epoch, both counted from 0."""
        return min(1.0, (epoch + step / self.steps) / self.epochs)

    def is_over(self, epoch: int) -> bool:
        """Return whether the training ends before this epoch."""
        return epoch >= self.epochs

    @property
    def end_reason(self) -> str:
        """Why the training is complete, for messages."""
        return f"{self.epochs} epochs; resume it with more --epochs"

    def learning_rate(self, epoch: int, step: int = 0) -> float:
        """Return the learning rate of a step."""
        progress = self.progress(epoch, step if self.per_step else 0)
        if progress < self.warmup:
            return self.lr * (WARMUP_START + (1 - WARMUP_START) * progress / self.warmup)
        fall = (progress - self.warmup) / (1 - self.warmup)
        return self.lr * ((1 + math.cos(math.pi * fall)) / 2 * (1 - self.lrf) + self.lrf)

    def img_size(self, epoch: int) -> int:
        """Return the image size of an epoch, which grows linearly over the first 80% of the training."""
        first, last = self.img_sizes
        grown = min(1.0, self.progress(epoch) / 0.8)
        return last if grown == 1 else first + round(grown * (last - first) / SIZE_STEP) * SIZE_STEP

    def expected_epochs(self, epoch: int) -> float:
        """Return the total number of epochs, estimated at the start of `epoch`; 0 if unknown."""
        return self.epochs

    def color_jitter(self, epoch: int) -> float:
        """Return the strength of the colour jitter in an epoch.

        Longer runs repeat each image more often and need more augmentation. The strength is 0 for up to 16 epochs, and
        grows linearly to its maximum at 48.
        """
        return self.max_color_jitter * min(1.0, max(0.0, (self.expected_epochs(epoch) - 16) / 32))

    def image_options(self, epoch: int) -> dict[str, float]:
        """Return the options of an epoch's training images, for `EpochSampler.set_epoch`."""
        return {"img_size": self.img_size(epoch), "color_jitter": self.color_jitter(epoch)}

    def reserve_time(self, seconds: float) -> None:
        """Reserve time between the last step of an epoch and the first of the next; a no-op without a time budget."""

    def state_dict(self) -> dict[str, float]:
        """Return the state to be saved."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the state."""


class TimedSchedule(Schedule):
    """A schedule whose progress is the fraction of a time budget that has been spent.

    It completes in time even if the machine slows down: budgeted training, Li, Yumer & Ramanan 2020,
    https://arxiv.org/abs/1905.04753.

    Args:
        seconds: the time budget.
        clock: returns the seconds since the start.
        options: `Schedule`'s, except `epochs` and `steps`.
    """

    def __init__(self, seconds: float, clock: Callable[[], float], **options: Any) -> None:
        super().__init__(epochs=1, steps=1, **options)
        self.seconds, self.clock = seconds, clock
        self.before = 0.0  # seconds spent before a resume
        self.reserve = 0.0

    @property
    def spent(self) -> float:
        """Seconds spent so far."""
        return self.before + self.clock()

    def progress(self, epoch: int, step: int = 0) -> float:
        """Return the current progress, whatever the epoch and the step."""
        return min(1.0, self.spent / max(self.seconds - self.reserve, self.seconds / 10))

    def is_over(self, epoch: int) -> bool:
        """Return whether the time is up, or too short for another epoch to learn anything."""
        return self.progress(epoch) >= BUDGET_END_FRACTION

    @property
    def end_reason(self) -> str:
        return "its time budget is spent"

    def expected_epochs(self, epoch: int) -> float:
        # The epochs so far had smaller images, which are faster.
        return epoch / max(self.progress(epoch), EPSILON) * self.img_size(epoch) / self.img_sizes[1]

    def reserve_time(self, seconds: float) -> None:
        """Reserve time for evaluation, figures and checkpoints after the last step."""
        self.reserve = 1.2 * seconds

    def state_dict(self) -> dict[str, float]:
        return {"spent": self.spent, "reserve": self.reserve}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.before = float(state["spent"]) - self.clock()
        self.reserve = float(state["reserve"])


def build_schedule(args: argparse.Namespace, steps: int, img_size: int, dist: Distributed) -> Schedule:
    """Create the schedule for --epochs of `steps` steps each, or for --time-budget."""
    options = {"lr": args.lr, "lrf": args.lrf, "warmup": args.warmup, "per_step": args.recipe.schedule_per_step}
    options |= {"img_sizes": training_sizes(args.recipe, img_size), "color_jitter": args.recipe.color_jitter}
    if args.time_budget:
        return TimedSchedule(60 * args.time_budget, dist.elapsed, **options)
    return Schedule(args.epochs, steps, **options)
