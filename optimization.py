"""How a network learns: the weights it starts from, its optimizer and schedule, and what is measured to plan them."""

import argparse
import copy
import functools
import math

import numpy as np
import torch
from torch.nn import Parameter
from torch.utils.data import BatchSampler, RandomSampler

from loaders import make_loader, make_train_loader, training_sizes
from model import ResNet, freeze_backbone, load_pretrained, zero_init
from my_dataset import MyDataSet, Tolerant, TrainTransform
from ranks import Ranks
from run_utils import StopSignals
from train_eval_utils import RangeTest, Schedule, TimedSchedule, find_learning_rate, measure_speed

PLANNED_SIZES = (96, 128, 160, 192, 224)  # of --img-size, for a time budget
ENOUGH_EPOCHS = 24
PROBE_SIZES = (64, 128)  # at which speed is measured, to plan by


def prepare_weights(model: ResNet, args: argparse.Namespace, resumed: bool, ranks: Ranks) -> str:
    """Load and freeze as the flags say; a few words for the header. A run that goes on loads its own weights later."""
    words = f"weights of {args.weights}" if args.weights else "from scratch (no --weights given)"
    if args.zero_init and not args.weights:
        zero_init(model)
    if args.weights and not resumed:
        left_out = ranks.one_a_machine_first(lambda: load_pretrained(model, args.weights, args.model))
        if left_out:
            words += f" but for {', '.join(left_out)}, made for another number of classes"
    if args.freeze_layers:
        freeze_backbone(model)
        words += "; only fc learns"
        if not args.weights:
            print("warning: --freeze-layers without --weights freezes a random backbone")
    return words


def make_optimizer(
    model: ResNet, args: argparse.Namespace, device: torch.device, scaled: bool = False
) -> torch.optim.SGD:
    """For the parameters that learn, in groups of one weight decay and one part of the learning rate each.

    Args:
        scaled: a GradScaler will skip steps.
    """
    groups: dict[tuple[float, float], list[Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            weight_decay = args.weight_decay if args.decay_norms or parameter.ndim > 1 else 0.0
            part = 1.0 if name.startswith("fc.") else args.backbone_rate
            groups.setdefault((weight_decay, part), []).append(parameter)
    # One kernel for all of them, where there is one; it would take the momentum from a step that was to be skipped.
    fused = (device.type in ("cpu", "cuda") and not scaled) or None
    return torch.optim.SGD(
        [{"params": same, "weight_decay": decay, "part": part} for (decay, part), same in groups.items()],
        lr=args.lr,
        momentum=0.9,
        nesterov=args.nesterov,
        fused=fused,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """For the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["part"]


def make_schedule(args: argparse.Namespace, steps: int, ranks: Ranks) -> Schedule:
    """The learning rate and the size of the images: for epochs of so many steps, or for a time that has begun."""
    options = {"lr": args.lr, "lrf": args.lrf, "warmup": args.warmup, "by_step": args.rate_by_step}
    options |= {"img_sizes": training_sizes(args)}
    if args.time_budget:
        return TimedSchedule(60 * args.time_budget, ranks.seconds, **options)
    return Schedule(args.epochs, steps, **options)


def find_lr(
    args: argparse.Namespace,
    train_set: MyDataSet,
    model: ResNet,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    stop: StopSignals,
    ranks: Ranks,
) -> RangeTest:
    """Find a learning rate, and say which."""
    rates = np.geomspace(1e-5, 10, 120)
    train_set.transform.img_size = training_sizes(args)[1]
    images = Tolerant(train_set, replace=True)
    generator = torch.Generator().manual_seed(args.seed)
    sampler = RandomSampler(images, num_samples=len(rates) * args.batch_size, generator=generator)
    loader = make_loader(images, BatchSampler(sampler, args.batch_size, drop_last=False), args, device, ranks)
    result = find_learning_rate(
        model,
        optimizer,
        loader,
        device,
        set_rate=functools.partial(set_learning_rate, optimizer),
        rates=rates,
        amp_dtype=amp_dtype,
        scaler=scaler,
        label_smoothing=args.label_smoothing,
        after_step=stop.check,
    )
    found = f"--lr {result.suggestion:.2g}" if math.isfinite(result.suggestion) else "none: the loss falls with no rate"
    print(f"suggestion   {found}")
    return result


def plan(
    args: argparse.Namespace,
    model: ResNet,
    train_set: MyDataSet,
    val_images: int,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    ranks: Ranks,
) -> tuple[int, float]:
    """Plan for a time budget, by the speed of a few steps.

    Returns:
        The largest size of images, unless the flags say which, at which there is time for `ENOUGH_EPOCHS`; and the
        seconds that an evaluation will take.
    """
    images = copy.copy(train_set)  # which keeps no images: these are small ones
    images.transform = TrainTransform(PROBE_SIZES[-1])
    loader = make_train_loader(images, args, device, ranks)
    seconds, took = 60 * args.time_budget, []
    for size in PROBE_SIZES:
        loader.batch_sampler.order.set_epoch(0, img_size=size)
        took.append(1 / measure_speed(model, loader, device, min(4.0, seconds / 100), amp_dtype=amp_dtype))
    took = [slowest / ranks.world_size for slowest in ranks.largest(*took)]
    small, large = (size**2 for size in PROBE_SIZES)
    per_image = min(max(0.0, (took[0] * large - took[1] * small) / (large - small)), took[1])  # whatever its size is
    per_pixel = (took[1] - per_image) / large

    for img_size in [args.img_size] if args.img_size else reversed(PLANNED_SIZES):
        first, last = training_sizes(args, img_size)
        pixels = 0.8 * (first**2 + first * last + last**2) / 3 + 0.2 * last**2  # of an image, in the mean
        evaluation = val_images * (per_image + per_pixel * img_size**2) / 3  # without a backward pass
        epochs = 0.95 * seconds / (len(images) * (per_image + per_pixel * pixels) + evaluation)
        if epochs >= ENOUGH_EPOCHS:
            break
    speeds = " and ".join(f"{1 / t:.1f} images/s at {size} px" for t, size in zip(took, PROBE_SIZES, strict=True))
    print(f"planned      {img_size} px, about {epochs:.1f} epochs ({speeds})")
    return img_size, evaluation
