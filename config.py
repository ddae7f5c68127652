"""Command-line flags of train.py and the recipes that set their defaults."""

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cli_utils import FlagParser, UsageError, checked, parse_bool
from dataset_split import VAL_RATE
from model import MODELS
from my_dataset import RESIZE_MODES

FLOWER_PHOTOS = Path(__file__).resolve().parent / "data" / "flower_photos"
SIZE_STEP = 16  # progressive resizing: training images grow in steps of this many pixels
DEFAULT_SIZE = 224
BEST_METRICS = ("accuracy", "macro_f1", "val_loss", "last")

DESCRIPTION = """
Train a ResNet on a folder of images, one sub-folder per class, and log the training to TensorBoard.

python train.py                                  # the built-in sample: nothing to download
python train.py --data-path my_photos            # my_photos/cat/*.jpg, my_photos/dog/*.jpg, ...
python train.py --data-path flower_photos --download
python train.py --data-path my_photos --recipe scratch --time-budget 25
python train.py --data-path my_photos --recipe finetune --weights imagenet
torchrun --nproc_per_node=8 train.py --data-path my_photos                # eight GPUs on one machine
tensorboard --logdir=runs                        # in another terminal; then open http://localhost:6006/
"""


@dataclass(frozen=True)
class Recipe:
    """The settings of a recipe that have no flag; the defaults are the tutorial's."""

    name: str
    schedule_per_step: bool = False  # update the learning rate after every step, not every epoch
    nesterov: bool = False
    muon_lr_scale: float = 0.0  # train convolutions with Muon, at this multiple of the learning rate; 0: with SGD
    backbone_lr_scale: float = 1.0  # learning rate of all layers but fc, as a fraction of --lr
    progressive_resize_start: float = 1.0  # size of the first training images, as a fraction of --img-size
    progressive_resize_end: float = 1.0  # below 1: objects appear smaller at test time (arXiv:1906.06423)
    feature_views: int = 0  # --freeze-layers: precompute the features of this many augmented views per image; 0: never
    color_jitter: float = 0.0  # maximum strength, which long runs reach: see `Schedule.color_jitter`
    ema_decay: float = 0.0  # moving average of the weights, which is validated and saved as best.pth; 0: none
    pca_conv1: bool = False  # initialise conv1 with the principal components of patches; needs bn_images
    bn_images: int = 0  # estimate BatchNorm statistics from this many training images; 0: use the running averages

    def __str__(self) -> str:
        return self.name


RECIPES = {
    "tutorial": Recipe("tutorial"),
    "scratch": Recipe(
        "scratch",
        schedule_per_step=True,
        nesterov=True,
        muon_lr_scale=50.0,
        progressive_resize_start=0.5,
        progressive_resize_end=0.85,
        color_jitter=0.4,
        ema_decay=0.9,
        pca_conv1=True,
        bn_images=128,
    ),
    "finetune": Recipe(
        "finetune",
        schedule_per_step=True,
        nesterov=True,
        muon_lr_scale=0.3,
        backbone_lr_scale=0.5,
        progressive_resize_start=0.85,
        progressive_resize_end=0.85,
        feature_views=2,
        ema_decay=0.9,
        bn_images=128,
    ),
}
FLAG_DEFAULTS = {  # for the flags that depend on the recipe
    "tutorial": {
        "model": "resnet34",
        "epochs": 30,
        "batch_size": 16,
        "lr": 0.001,
        "lrf": 0.1,
        "warmup": 0.0,
        "weight_decay": 0.005,
        "label_smoothing": 0.0,
    },
    "scratch": {
        "model": "resnet18",
        "epochs": 30,
        "batch_size": 64,
        "lr": 0.0003,
        "lrf": 0.0,
        "warmup": 0.2,
        "weight_decay": 0.002,
        "label_smoothing": 0.1,
    },
    "finetune": {
        "model": "resnet34",
        "epochs": 10,
        "batch_size": 32,
        "lr": 0.03,
        "lrf": 0.0,
        "warmup": 0.1,
        "weight_decay": 0.0005,
        "label_smoothing": 0.1,
    },
}

MAY_CHANGE = {  # flags that may change on resume
    *("epochs", "patience", "data_path", "val_path", "device", "workers", "save_every", "histograms"),
    *("strict", "timeout", "corrections"),
}
NOT_SAVED = {"resume", "download", "allow_changed_data"}  # flags that apply to a single launch only


# --- flags --------------------------------------------------------------------------------------------------------


def parse_args(
    argv: list[str] | None = None, saved: Mapping[str, Any] | None = None, parser: FlagParser | None = None
) -> argparse.Namespace:
    """Parse and validate the command line; exit with status 2 and a one-line message if a flag is invalid.

    Args:
        saved: flags to use as defaults instead of the recipe's.
        parser: `build_parser`'s, with additional flags.

    Returns:
        The flags; `recipe` is a `Recipe`.
    """
    parser = parser or build_parser()
    if saved is None:
        parser.set_defaults(**FLAG_DEFAULTS[parser.parse_args(argv).recipe])
    args = parser.parse_args(argv, argparse.Namespace(**saved or {}))
    args.recipe = RECIPES[args.recipe]
    if args.download:
        args.data_path = args.data_path or str(FLOWER_PHOTOS)
    if args.time_budget and args.epochs != (saved or FLAG_DEFAULTS[args.recipe.name])["epochs"]:
        parser.error("--epochs has no effect with --time-budget: pass only one of them")
    if args.time_budget and uses_cached_features(args):
        parser.error("--time-budget is not supported for a frozen backbone, whose epochs take seconds: omit it")
    if args.patience and args.best_metric == "last":
        parser.error("--patience has no effect with --best-metric last: omit it")
    if args.batch_size == 1 and needs_two_images(args):
        parser.error("--batch-size must be at least 2 for training images of 32 pixels")
    if args.find_lr and args.accumulate > 1:
        parser.error("--accumulate must be 1 with --find-lr: use a larger --batch-size")
    return args


COUNT = checked(int, lambda n: n >= 0, "at least 0")
POSITIVE_COUNT = checked(int, lambda n: n >= 1, "at least 1")
POSITIVE = checked(float, lambda x: 0 < x < math.inf, "above 0")
NON_NEGATIVE = checked(float, lambda x: 0 <= x < math.inf, "at least 0")
FRACTION = checked(float, lambda x: 0 <= x < 1, "at least 0 and below 1")
PROBABILITY = checked(float, lambda x: 0 <= x <= 1, "from 0 to 1")
FILE = checked(str, bool, "the name of a table")
FOLDER = checked(str, bool, "the name of a folder or table")


def build_parser(prog: str = "train.py", description: str = DESCRIPTION) -> FlagParser:
    """Build the parser of train.py, in groups of flags."""
    parser = FlagParser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_data_and_model_flags(parser)
    _add_training_flags(parser)
    _add_run_flags(parser)
    return parser


def _add_data_and_model_flags(parser: FlagParser) -> None:
    add = parser.add_argument_group("data").add_argument
    data_help = "folder with one sub-folder per class, or CSV table of paths and labels (default: the built-in sample)"
    add("--data-path", type=FOLDER, help=data_help)
    val_help = "folder or table of the validation images (default: a fraction of --data-path)"
    add("--val-path", type=FOLDER, help=val_help)
    val_rate_help = "fraction of each class held out for validation (default: %(default)s)"
    val_rate = checked(float, lambda x: 0 < x < 1, "above 0 and below 1")
    add("--val-rate", type=val_rate, default=VAL_RATE, help=val_rate_help)
    test_rate_help = "fraction of each class held out for a test after the training (default: %(default)g)"
    add("--test-rate", type=FRACTION, default=0.0, help=test_rate_help)
    corrections_help = "apply the verdicts in this table, such as label_issues.csv of cross_validate.py"
    add("--corrections", type=FILE, metavar="CSV", help=corrections_help)
    add("--download", action="store_true", help="first download the flower photographs (218 MB) to --data-path")
    resize_help = "how to make images square: cut off the ends, add borders, or distort (default: %(default)s)"
    add("--resize", choices=RESIZE_MODES, default="crop", help=resize_help)
    hflip_help = "probability that a training image is flipped horizontally (default: %(default)s)"
    add("--hflip", type=PROBABILITY, default=0.5, metavar="P", help=hflip_help)
    vflip_help = "probability that a training image is flipped vertically (default: %(default)s)"
    add("--vflip", type=PROBABILITY, default=0.0, metavar="P", help=vflip_help)
    two = checked(int, lambda n: n >= 2, "at least 2")
    add("--num-classes", type=two, help="expected number of classes, checked against the data")
    strict_help = "stop if an image is unreadable or unsupported, instead of skipping it"
    add("--strict", action="store_true", help=strict_help)

    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODELS, help="network " + default_help("model"))
    add("--weights", default="", help="weights file to start from, or imagenet (default: train from scratch)")
    add("--freeze-layers", nargs="?", const=True, default=False, type=parse_bool, help="train only the classifier, fc")
    size = checked(int, lambda n: n >= 32, "at least 32")
    add("--img-size", type=size, help=f"input size in pixels (default: {DEFAULT_SIZE}; --time-budget chooses it)")


def _add_training_flags(parser: FlagParser) -> None:
    add = parser.add_argument_group("training").add_argument
    recipe_help = "defaults of several flags, and the optimizer (default: %(default)s)"
    add("--recipe", choices=RECIPES, default="tutorial", help=recipe_help)
    add("--epochs", type=POSITIVE_COUNT, help="passes over the training images " + default_help("epochs"))
    add("--time-budget", type=POSITIVE, metavar="MINUTES", help="train for this long instead of --epochs")
    best_help = "metric that selects the best epoch; last: always use the last epoch (default: %(default)s)"
    add("--best-metric", choices=BEST_METRICS, default="accuracy", help=best_help)
    patience_help = "stop after N epochs without improvement in --best-metric (default: never)"
    add("--patience", type=COUNT, default=0, metavar="N", help=patience_help)
    add("--batch-size", type=POSITIVE_COUNT, help="images per batch, in each process " + default_help("batch_size"))
    add("--accumulate", type=POSITIVE_COUNT, default=1, help="batches per optimizer step (default: %(default)s)")
    decay_help = "weight decay (L2 penalty); not applied to convolutions trained by Muon "
    add("--weight-decay", type=NON_NEGATIVE, help=decay_help + default_help("weight_decay"))
    smoothing_help = "label smoothing of the training loss "
    add("--label-smoothing", type=FRACTION, help=smoothing_help + default_help("label_smoothing"))
    weights_help = "weight the loss by (images of the class) ** -P, P from 0 to 1 (default: %(default)s)"
    add("--class-weights", type=PROBABILITY, default=0.0, metavar="P", help=weights_help)
    seed = checked(int, lambda n: 0 <= n < 2**63, "at least 0 and below 2**63")
    seed_help = "random seed for weights, shuffling and augmentation (default: %(default)s)"
    add("--seed", type=seed, default=0, help=seed_help)

    add = parser.add_argument_group("schedule").add_argument
    add("--lr", type=POSITIVE, help="maximum learning rate " + default_help("lr"))
    add("--lrf", type=NON_NEGATIVE, help="final learning rate, as a fraction of --lr " + default_help("lrf"))
    add(
        "--warmup",
        type=FRACTION,
        help="fraction of the training in which the learning rate rises to --lr " + default_help("warmup"),
    )
    add("--find-lr", action="store_true", help="run a learning-rate range test, suggest a value for --lr, and exit")


def _add_run_flags(parser: FlagParser) -> None:
    add = parser.add_argument_group("logging").add_argument
    name = checked(str, lambda s: s == Path(s).name and s[:1] not in ("", "."), "a plain folder name")
    add(
        "--name",
        type=name,
        default="flower_experiment",
        help="name of the run's folder in runs/ (default: %(default)s)",
    )
    histograms_help = "log the weights of two convolutions, or the weights and gradients of all (default: %(default)s)"
    add("--histograms", choices=("first", "all"), default="first", help=histograms_help)
    add("--save-every", type=COUNT, default=0, metavar="N", help="also save a plain state_dict every N epochs")

    add = parser.add_argument_group("resuming").add_argument
    resume_help = "resume a run, given by name, folder or last.pth (default: the most recent one)"
    add("--resume", nargs="?", const="", metavar="RUN", help=resume_help)
    add("--allow-changed-data", action="store_true", help="resume even if files were added, changed or removed")

    add = parser.add_argument_group("hardware").add_argument
    add("--device", default="cuda", help="cuda, cuda:1 (or 1), mps or cpu (default: cuda if available, else cpu)")
    add("--amp", choices=("auto", "on", "off"), default="auto", help="mixed precision (default: where it is faster)")
    add("--workers", type=COUNT, help="DataLoader workers per process (default: one per core, at most 16)")
    add("--sync-bn", action="store_true", help="synchronised BatchNorm over all GPUs, under torchrun")
    timeout = checked(float, lambda x: 0 < x <= 10**7, "above 0, and at most 10,000,000 seconds")
    timeout_help = "seconds to wait for an unreachable rank (default: %(default)s)"
    add("--timeout", type=timeout, default=300, help=timeout_help)


def default_help(flag: str) -> str:
    """Describe a flag's default in each recipe, for its help text."""
    values = {name: defaults[flag] for name, defaults in FLAG_DEFAULTS.items()}
    texts = (f"{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in values.items())
    return f"(default: {', '.join(texts)})"


def training_sizes(recipe: Recipe, img_size: int) -> tuple[int, int]:
    """Return the size of the training images in pixels at the start and at the end of the training."""
    fractions = recipe.progressive_resize_start, recipe.progressive_resize_end
    start, end = (
        img_size if fraction == 1 else max(32, round(fraction * img_size / SIZE_STEP) * SIZE_STEP)
        for fraction in fractions
    )
    return start, end


def needs_two_images(args: argparse.Namespace) -> bool:
    """Return whether BatchNorm needs batches of two images, as `layer4` reduces images of 32 px to a single pixel."""
    return min(training_sizes(args.recipe, args.img_size or DEFAULT_SIZE)) <= 32 and not args.freeze_layers


def uses_cached_features(args: argparse.Namespace) -> bool:
    """Return whether only `fc` is trained, on features that are computed once, before the first epoch."""
    return args.freeze_layers and args.recipe.feature_views > 0


def describe_recipe(args: argparse.Namespace, img_size: int) -> str:
    """Describe the recipe in use for the header."""
    flags = ("batch_size", "lr", "lrf", "warmup", "weight_decay", "label_smoothing")
    values = ", ".join(f"{flag.replace('_', ' ')} {getattr(args, flag):g}" for flag in flags)
    length = f"{args.time_budget:g} minutes" if args.time_budget else f"{args.epochs} epochs"
    start, end = training_sizes(args.recipe, img_size)
    sizes = f"{start} px" if start == end else f"{start} to {end} px"
    return f"{args.recipe}, {length}, {values}, {sizes}"


def command_line(args: argparse.Namespace) -> list[str]:
    """Return the command that starts a run with these flags."""
    words = ["python", "train.py"] + ([f"--recipe={args.recipe}"] if args.recipe != RECIPES["tutorial"] else [])
    defaults = vars(parse_args([f"--recipe={args.recipe}"]))
    for flag, value in vars(args).items():
        if value != defaults[flag] and flag != "recipe":
            words.append(f"--{flag.replace('_', '-')}" + ("" if value is True else f"={value}"))
    return words


# --- resume -------------------------------------------------------------------------------------------------------


def flags_to_save(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags as plain values for a checkpoint, with absolute paths to resume from any folder."""
    flags = {flag: value for flag, value in vars(args).items() if flag not in NOT_SAVED}
    for flag in ("data_path", "val_path", "corrections"):
        flags[flag] = flags[flag] and str(Path(flags[flag]).absolute())
    return flags | {"recipe": asdict(args.recipe)}


def resume_args(argv: list[str], saved: Mapping[str, Any], run: Path) -> argparse.Namespace:
    """Combine the flags given on resume with those that the run was started with.

    Args:
        saved: the result of `flags_to_save`, from the checkpoint.
        run: the run's folder.

    Raises:
        UsageError: a flag contradicts how the run was started, or `saved` is corrupt.
    """
    defaults = flags_to_save(parse_args([]))
    is_valid = same_schema(saved, defaults) and same_schema(saved["recipe"], defaults["recipe"])
    if not is_valid or saved["recipe"]["name"] not in RECIPES or saved["model"] not in MODELS:
        raise UsageError(f"{run / 'weights' / 'last.pth'}: corrupt, or written by another version: unknown flags")
    recipe = Recipe(**saved["recipe"])
    args = parse_args(argv, {**saved, "recipe": recipe.name})
    for flag, value in saved.items():
        if flag not in MAY_CHANGE and getattr(args, flag) != value and flag != "recipe":
            raise UsageError(describe_conflict(flag, run, value, "omit the flag to resume, or start a new run"))
    if args.recipe.name != recipe.name:
        raise UsageError(describe_conflict("recipe", run, recipe, "omit the flag to resume, or start a new run"))
    if args.epochs < saved["epochs"]:
        raise UsageError(describe_conflict("epochs", run, saved["epochs"], "it can only be increased"))
    args.recipe, args.resume = recipe, str(run)
    return args


def describe_conflict(flag: str, run: Path, value: Any, advice: str) -> str:
    """Describe a flag that contradicts how a run was started."""
    start = "without it" if value is None or value is False or value == "" else f"with {value}"
    return f"--{flag.replace('_', '-')}: the run {run} was started {start}; {advice}"


def same_schema(values: Any, defaults: Mapping[str, Any]) -> bool:
    """Return whether `values` is a dict with the keys of `defaults` and values of the same types."""
    if not isinstance(values, dict) or values.keys() != defaults.keys():
        return False
    return all(_same_type(values[key], default) for key, default in defaults.items())


def _same_type(value: Any, default: Any) -> bool:
    if isinstance(default, (int, float)):
        return isinstance(value, (int, float)) and math.isfinite(value)
    return default is None or type(value) is type(default)
