"""Command-line flags of train.py, their validation, recipes, and the merge with a run's saved flags on resume."""

import argparse
import contextlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint import WeightsError
from cli_utils import FlagParser, UsageError, parse_bool
from model import MODELS

FLOWER_PHOTOS = Path(__file__).resolve().parent / "data" / "flower_photos"
GRAIN = 16  # the image size grows in multiples of this many pixels

DESCRIPTION = """
Train a ResNet on a folder of images, one sub-folder per class, and log the training to TensorBoard.

python train.py                                  # the built-in sample: nothing to download
python train.py --data-path my_photos            # my_photos/cat/*.jpg, my_photos/dog/*.jpg, ...
python train.py --data-path flower_photos --download
python train.py --data-path my_photos --recipe scratch --time-budget 25
python train.py --data-path my_photos --recipe finetune --weights imagenet
torchrun --nproc_per_node=8 train.py --data-path my_photos                # eight GPUs; the README has many machines
tensorboard --logdir=runs                        # beside it; then open http://localhost:6006/
"""

# The recipes. Each gives the defaults of some flags, and below the line the values that have no flag.
RECIPES = {
    "tutorial": {
        "epochs": 30,
        "batch_size": 16,
        "lr": 0.001,
        "lrf": 0.1,  # final learning rate, as a fraction of lr
        "warmup": 0.0,  # fraction of the training
        "weight_decay": 0.005,
        "label_smoothing": 0.0,
        # ---
        "rate_by_step": False,  # update the learning rate after every step, not epoch
        "nesterov": False,
        "muon_rate": 0.0,  # train convolutions with Muon, at this multiple of the learning rate; 0: with SGD
        "first_size": 1.0,  # size of the training images at the start and at the end, as fractions of --img-size
        "last_size": 1.0,
        "backbone_rate": 1.0,  # learning rate of all layers but fc, as a fraction of lr
        "feature_views": 0,  # --freeze-layers: compute features of so many views per image in advance; 0: never
        "ema_decay": 0.0,  # moving average of the weights, validated and saved as best.pth; 0: no average
        "bn_images": 0,  # training images for estimating BatchNorm statistics before validation; 0: running averages
    },
    "scratch": {
        "epochs": 30,
        "batch_size": 64,
        "lr": 0.0003,
        "lrf": 0.0,
        "warmup": 0.2,
        "weight_decay": 0.002,
        "label_smoothing": 0.1,
        # ---
        "rate_by_step": True,
        "nesterov": True,
        "muon_rate": 50.0,
        "first_size": 0.5,
        "last_size": 0.85,  # objects appear smaller at test time (Touvron et al. 2019, https://arxiv.org/abs/1906.06423)
        "backbone_rate": 1.0,
        "feature_views": 0,
        "ema_decay": 0.9,
        "bn_images": 128,
    },
    "finetune": {
        "epochs": 10,
        "batch_size": 32,
        "lr": 0.03,
        "lrf": 0.0,
        "warmup": 0.1,
        "weight_decay": 0.0005,
        "label_smoothing": 0.1,
        # ---
        "rate_by_step": True,
        "nesterov": True,
        "muon_rate": 0.3,
        "first_size": 0.85,
        "last_size": 0.85,
        "backbone_rate": 0.5,
        "feature_views": 2,
        "ema_decay": 0.9,
        "bn_images": 128,
    },
}

# Recipe values that no longer exist, and the settings with which a run can be resumed without them.
FORMER = {"zero_init": (False, True), "decay_norms": (True,), "least_area": (0.08,)}

MAY_CHANGE = {  # flags that may change on resume
    *("epochs", "patience", "data_path", "val_path", "device", "workers", "save_every", "histograms"),
    *("resume", "allow_changed_data", "strict", "timeout"),
}


# --- flags --------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None, recipe: dict[str, Any] | None = None) -> argparse.Namespace:
    """Parse and validate the command line; exit with status 2 and one line if a flag is invalid.

    Args:
        recipe: values to use instead of those of the recipe that `argv` names.
    """
    parser = FlagParser(prog="train.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-path", help="folder with one sub-folder per class (default: the built-in sample)")
    add("--val-path", help="validation folder of the same form (default: a fraction of --data-path)")
    add(
        "--val-rate",
        type=float,
        default=0.2,
        help="fraction of each class held out for validation (default: %(default)s)",
    )
    add("--download", action="store_true", help="first download the flower photographs (218 MB) to --data-path")
    add("--num-classes", type=int, help="expected number of classes, checked against the data")
    add("--model", choices=MODELS, default="resnet34", help="network (default: %(default)s)")
    add("--weights", default="", help="weights file to start from, or imagenet (default: train from scratch)")
    add("--freeze-layers", nargs="?", const=True, default=False, type=parse_bool, help="train the classifier fc only")
    size_help = "input size in pixels (default: 224; --time-budget chooses it)"
    add("--img-size", type=int, help=size_help)
    add("--recipe", choices=RECIPES, default="tutorial", help="defaults of the next seven flags (default: %(default)s)")
    add("--epochs", type=int, help="number of passes over the training images")
    add("--batch-size", type=int, help="images per batch, in each process")
    add("--lr", type=float, help="maximum learning rate")
    add("--lrf", type=float, help="final learning rate, as a fraction of --lr")
    add("--warmup", type=float, help="fraction of the training in which the learning rate rises to --lr")
    add("--weight-decay", type=float, help="weight decay (L2 penalty); not applied to convolutions trained by Muon")
    add("--label-smoothing", type=float, help="label smoothing of the training loss")
    add("--accumulate", type=int, default=1, help="batches per optimizer step (default: %(default)s)")
    add("--time-budget", type=float, metavar="MINUTES", help="train for this long instead of --epochs")
    add("--find-lr", action="store_true", help="run a learning-rate range test, suggest a value for --lr, and exit")
    add(
        "--patience",
        type=int,
        default=0,
        help="stop after N epochs without a better accuracy (default: never)",
        metavar="N",
    )
    add("--device", default="cuda", help="cuda, cuda:1 (or 1), mps or cpu (default: cuda, or else the CPU)")
    add("--sync-bn", action="store_true", help="synchronised BatchNorm over all GPUs, under torchrun")
    add("--timeout", type=float, default=300, help="seconds to wait for an unreachable rank (default: %(default)s)")
    add("--amp", choices=("auto", "on", "off"), default="auto", help="mixed precision (default: where it is faster)")
    add("--workers", type=int, help="DataLoader workers per process (default: one per core, at most 8)")
    add("--seed", type=int, default=0, help="random seed for weights, shuffling, augmentation (default: %(default)s)")
    add("--name", default="flower_experiment", help="name of the run's folder in runs/ (default: %(default)s)")
    resume_help = "resume a run, given by name, folder or last.pth (default: the most recent one)"
    add("--resume", nargs="?", const="", metavar="RUN", help=resume_help)
    add("--allow-changed-data", action="store_true", help="resume even if files were added, changed or removed")
    add("--strict", action="store_true", help="stop if an image cannot be read, instead of skipping it")
    histograms_help = "log the weights of two convolutions, or the weights and gradients of all (default: %(default)s)"
    add("--histograms", choices=("first", "all"), default="first", help=histograms_help)
    add("--save-every", type=int, default=0, metavar="N", help="also save a plain state_dict every N epochs")
    parser.set_defaults(**RECIPES["tutorial"])
    recipe = recipe or RECIPES[parser.parse_args(argv).recipe]
    parser.set_defaults(**recipe)
    args = parser.parse_args(argv)
    if args.img_size is None and not args.time_budget:
        args.img_size = 224
    if args.download:
        args.data_path = args.data_path or str(FLOWER_PHOTOS)

    for flag, fits, need in [
        ("epochs", not args.time_budget or args.epochs == recipe["epochs"], "left out: --time-budget takes its place"),
        (
            "time_budget",
            not (args.time_budget and computes_features(args)),
            "left out: the epochs of a frozen backbone take seconds",
        ),
        ("data_path", args.data_path != "", "a folder; without it the built-in sample is trained on"),
        ("val_path", args.val_path != "", "a folder"),
        ("val_rate", 0 < args.val_rate < 1, "above 0 and below 1"),
        ("num_classes", args.num_classes is None or args.num_classes >= 2, "at least 2"),
        ("img_size", args.img_size is None or args.img_size >= 32, "at least 32"),
        ("epochs", args.epochs >= 1, "at least 1"),
        ("batch_size", args.batch_size >= 1, "at least 1"),
        ("batch_size", args.batch_size >= 2 or not has_single_pixels(args), "at least 2 for images of 32 pixels"),
        ("lr", 0 < args.lr < math.inf, "above 0"),
        ("lrf", 0 <= args.lrf < math.inf, "at least 0"),
        ("warmup", 0 <= args.warmup < 1, "at least 0 and below 1"),
        ("weight_decay", 0 <= args.weight_decay < math.inf, "at least 0"),
        ("label_smoothing", 0 <= args.label_smoothing < 1, "at least 0 and below 1"),
        ("time_budget", args.time_budget is None or 0 < args.time_budget < math.inf, "above 0"),
        ("patience", args.patience >= 0, "at least 0"),
        ("accumulate", args.accumulate >= 1, "at least 1"),
        (
            "accumulate",
            args.accumulate == 1 or not args.find_lr,
            "1 with --find-lr: give all images of a step in --batch-size",
        ),
        ("timeout", 0 < args.timeout <= 10**7, "above 0, and at most 10,000,000 seconds"),
        ("workers", args.workers is None or args.workers >= 0, "at least 0"),
        ("seed", 0 <= args.seed < 2**63, "at least 0 and below 2**63"),
        ("name", args.name == Path(args.name).name and args.name[:1] not in ("", "."), "a plain folder name"),
        ("save_every", args.save_every >= 0, "at least 0"),
    ]:
        if not fits:
            parser.error(f"--{flag.replace('_', '-')} is {json.dumps(getattr(args, flag))}; it must be {need}")
    return args


def as_words(args: argparse.Namespace, flags: Sequence[str]) -> list[str]:
    """Format flags as command-line words, with absolute paths, as a run may be resumed from another folder."""
    values = {flag: getattr(args, flag) for flag in flags if getattr(args, flag) is not None}
    return [
        f"--{flag.replace('_', '-')}={Path(value).absolute() if flag.endswith('_path') else value}"
        for flag, value in values.items()
    ]


def training_sizes(args: argparse.Namespace, img_size: int | None = None) -> tuple[int, int]:
    """Return the size of the training images in pixels at the start and at the end, for an --img-size."""
    img_size = img_size or args.img_size
    parts = (args.first_size, args.last_size)
    first, last = (img_size if part == 1 else max(32, round(part * img_size / GRAIN) * GRAIN) for part in parts)
    return first, last


def has_single_pixels(args: argparse.Namespace) -> bool:
    """Return whether the smallest training images end as a single pixel in the network."""
    return args.img_size is not None and min(training_sizes(args)) <= 32


def computes_features(args: argparse.Namespace) -> bool:
    """Return whether the features of a frozen backbone are computed once, before the first epoch."""
    return args.freeze_layers and args.feature_views > 0


def estimates_batch_norm(args: argparse.Namespace) -> bool:
    """Return whether BatchNorm statistics are estimated before each validation; a frozen backbone keeps its own."""
    return args.bn_images > 0 and not args.freeze_layers


def describe_recipe(args: argparse.Namespace) -> str:
    """Describe the recipe in use for the header."""
    flags = ("batch_size", "lr", "lrf", "warmup", "weight_decay", "label_smoothing")
    values = ", ".join(f"{flag.replace('_', ' ')} {getattr(args, flag):g}" for flag in flags)
    long = f"{args.time_budget:g} minutes" if args.time_budget else f"{args.epochs} epochs"
    first, last = training_sizes(args)
    sizes = f"{first} px" if first == last else f"{first} to {last} px"
    return f"{args.recipe}, {long}, {values}, {sizes}"


# --- resume -------------------------------------------------------------------------------------------------------


def merge_resumed_args(
    given: argparse.Namespace, argv: list[str], folder: Path, checkpoint: Mapping[str, Any]
) -> tuple[argparse.Namespace, list[str], str]:
    """Merge the flags given on resume with those that the run was started with.

    Args:
        given: the parsed `argv`.
        folder: the run's.
        checkpoint: its last.pth.

    Returns:
        The flags, the command line that reproduces them, and a reason if there is nothing left to train, else "".

    Raises:
        UsageError: a flag contradicts how the run was started.
        WeightsError: the checkpoint is corrupt.
    """
    progress = checkpoint["resume"]
    command = progress["command"]
    recipe = progress.get("recipe", {})
    if not (isinstance(recipe, dict) and all(may_be(name, value) for name, value in recipe.items())):
        raise WeightsError(f"{folder / 'weights' / 'last.pth'}: corrupt: its recipe is not train.py's")
    for name, fits in FORMER.items():
        if (value := recipe.pop(name, fits[0])) not in fits:
            raise UsageError(
                f"the run {folder} was started by an older version, with {name} {value!r} in its recipe, which is no "
                f"longer supported; start a new run"
            )
    recipe = RECIPES["tutorial"] | recipe if recipe else None  # as it was then, without the ingredients that are newer
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            before = parse_args(command, recipe)
    except SystemExit as error:
        raise WeightsError(f"{folder / 'weights' / 'last.pth'}: corrupt: its command line is not train.py's") from error
    args = parse_args(command + argv, recipe)
    for flag, value in vars(before).items():
        if flag not in MAY_CHANGE and getattr(args, flag) != value:
            raise UsageError(
                f"--{flag.replace('_', '-')}: the run {folder} was started with {value}; omit the flag to "
                f"resume it, or start a new run"
            )
    if args.epochs < before.epochs:
        raise UsageError(f"--epochs: the run {folder} was started with {before.epochs}; it can only be more")
    args.resume, args.download = str(folder), given.download
    if args.img_size is None:  # it was planned
        args.img_size = checkpoint.get("img_size")
        if not isinstance(args.img_size, int) or args.img_size < 32:
            raise WeightsError(f"{folder / 'weights' / 'last.pth'}: corrupt: its img_size is {args.img_size!r}")
    changed = ("epochs", "patience", "data_path", "val_path")
    changed = [flag for flag in changed if getattr(args, flag) != getattr(before, flag)]
    over = bool(progress.get("over"))
    improved_at = progress["improved_at"]
    has_stalled = improved_at is not None and 0 < args.patience <= progress["epoch"] - 1 - improved_at
    more_patient = before.patience > 0 and not 0 < args.patience <= before.patience
    stalled = f"{args.patience} epochs without a better accuracy; resume it with a larger --patience"
    if over and args.time_budget and not more_patient:
        complete = "its time is up" + (f", or {stalled}" if args.patience else "")
    elif over and has_stalled and args.epochs > progress["epoch"]:
        complete = stalled
    elif progress["epoch"] >= args.epochs and not args.time_budget:
        complete = f"{args.epochs} epochs; resume it with more --epochs"
    else:
        complete = ""
    return args, command + as_words(args, changed), complete


def may_be(name: Any, value: Any) -> bool:
    """Return whether a recipe may have this value: finite, and of a type that it has in some recipe."""
    types = {type(recipe[name]) for recipe in RECIPES.values() if name in recipe}
    types |= {type(fit) for fit in FORMER.get(name, ())}
    is_number = type(value) is int and float in types  # 0 may stand for 0.0
    return (type(value) in types or is_number) and -math.inf < value < math.inf
