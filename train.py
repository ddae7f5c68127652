"""Train a ResNet on a folder of images, one sub-folder a class, and write what happens to TensorBoard.

python train.py                                  # the built-in sample: nothing to download
python train.py --data-path my_photos            # my_photos/cat/*.jpg, my_photos/dog/*.jpg, ...
python train.py --data-path flower_photos --download
python train.py --data-path my_photos --recipe scratch --time-budget 25
python train.py --data-path my_photos --recipe finetune --weights imagenet
torchrun --nproc_per_node=8 train.py --data-path my_photos                # eight GPUs; the README has many machines
tensorboard --logdir=runs                        # beside it; then open http://localhost:6006/
"""

import argparse
import contextlib
import functools
import io
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import nn

from cli_utils import (
    FlagParser,
    UsageError,
    available_memory,
    describe_device,
    describe_processes,
    escape_unprintable_output,
    explain_resource_error,
    flush_stdout,
    parse_bool,
    printable,
    quote_command,
    select_device,
    select_precision,
    shorten,
    silence_other_ranks,
)
from data_utils import KNOWN_IMAGES, DataError
from distributed import Distributed, OtherRankFailed, is_connection_lost
from loaders import (
    FLOWER_PHOTOS,
    Data,
    computes_features,
    estimates_batch_norm,
    has_single_pixels,
    head_loaders,
    load_bn_images,
    make_train_loader,
    make_val_loader,
    read_data,
    training_sizes,
)
from model import MODELS, WeightsError, to_device
from my_dataset import EvalTransform, TrainTransform
from optimization import make_average, make_optimizer, make_schedule, prepare_weights, set_learning_rate
from run_utils import (
    Run,
    StopRequest,
    StopSignals,
    check_same_data,
    create_run_folder,
    find_run,
    read_checkpoint,
    run_card,
    run_of,
    save_checkpoint,
    write_run,
)
from tensorboard_logger import NullLogger, ProjectorFeatures, TensorBoardLogger
from train_eval_utils import (
    EmptyLoaderError,
    Evaluation,
    collect_logits,
    estimate_batch_norm,
    gather_evaluation,
    train_one_epoch,
)
from tuning import PROBE_SIZES, find_lr, plan

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


def train(args: argparse.Namespace, command: list[str], dist: Distributed) -> None:
    """Train as the flags say.

    Args:
        args: `resume` is the folder of the run to go on with, or None.
        command: the words of the command line, for `--resume`.
        dist: the process group. All ranks take the same path through this function.

    Raises:
        StopRequest: a signal came; the run has been saved.
    """
    matplotlib.use("Agg")  # figures go to files, also where there is a screen
    device = select_device(args.device, dist)
    amp_dtype, precision = select_precision(args.amp, device)
    check_processes(args, device, amp_dtype, dist)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # batches have few shapes: try the kernels once, take the fastest
        torch.set_float32_matmul_precision("high")  # TF32
    torch.manual_seed(args.seed)

    # The data: what to train on, and what to validate on.
    resumed = args.resume is not None
    runs = Path(args.resume).absolute().parent if resumed else Path("runs")
    data = dist.broadcast_from_main(lambda: read_data(args, runs / KNOWN_IMAGES), no_timeout=True)
    train_set, val_set, class_names = data.train_set, data.val_set, data.class_names
    (cache_bytes,) = dist.all_reduce_min(available_memory() // 8)  # for each set to keep its large images in, decoded
    for images in (train_set, val_set):
        images.keep_images(int(cache_bytes), dist.shared_memory, dist.local_rank, dist.local_world_size)

    # The network, from scratch or from weights, and stochastic gradient descent.
    model = MODELS[args.model](num_classes=len(class_names))
    weights_line = prepare_weights(model, args, resumed, dist)
    to_device(model, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    optimizer = make_optimizer(model, args, device, amp_dtype)

    # The schedule, and the images in the sizes that it asks for.
    evaluation_seconds = 0.0
    if args.time_budget and not resumed:
        args.img_size, evaluation_seconds = plan(
            args, model, train_set, len(val_set) + args.bn_images, device, amp_dtype, dist
        )
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # its parameters stay
    average = make_average(model, args)
    train_set.transform = TrainTransform(args.img_size)
    val_set.transform = EvalTransform(args.img_size)
    train_loader = make_train_loader(train_set, args, device, dist)
    val_loader = make_val_loader(val_set, args, device, dist)
    batches = train_loader.batch_sampler
    schedule = make_schedule(args, len(batches.steps()), dist)
    schedule.reserve_time(evaluation_seconds)

    # The run. Nothing has been written up to here, in case a flag or the data was wrong.
    folder = dist.broadcast_from_main(lambda: Path(args.resume) if resumed else create_run_folder(args.name))
    info = {"model": args.model, "class_names": class_names, "img_size": args.img_size}
    recipe = {name: getattr(args, name) for name in RECIPES[args.recipe]}
    run = Run(folder, model, optimizer, scaler, schedule, info, command, recipe, batches.global_batch, dist, average)
    dist.sync_flags()  # on the time that has been spent
    if resumed:  # from here on no other process can change its last.pth
        run.load(dist.broadcast_from_main(lambda: read_checkpoint_of(run, data, args.allow_changed_data)))
        # The flags may allow more by now.
        run.over = run.over and (schedule.is_over(run.epoch) or run.has_stalled(args.patience))
    if dist.is_main:
        write_run(run, data, args, runs / KNOWN_IMAGES)
    features = ProjectorFeatures(len(val_set))
    logger = NullLogger()
    if dist.is_main:
        logger = TensorBoardLogger(run, args, train_loader, val_loader, device, amp_dtype)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"device       {describe_device(device)}{describe_processes(dist)}")
    print(f"precision    {precision}")
    print(f"model        {args.model}, {parameters:,} parameters, {printable(weights_line)}")
    print(f"recipe       {describe_recipe(args)}")
    if batches.global_batch > args.batch_size:
        print(f"global batch {batches.global_batch} images a step")
    print(f"classes      {len(class_names)}: {shorten(printable(', '.join(class_names)))}")
    print(f"images       {len(train_set)} for training, {len(val_set)} for validation ({printable(data.val_source)})")
    if data.problems:
        where = printable(str(folder / "unusable_images.txt"))
        print(f"left out     {len(data.problems)} images that cannot be used: {where} says why")
    where = f", on from epoch {run.epoch}, step {run.progress.steps}" if resumed else ""
    print(f"run          {printable(str(folder))}{where}")
    print("TensorBoard  tensorboard --logdir=runs, then open http://localhost:6006/", flush=True)

    def save() -> None:
        run.progress.read()
        logger.flush()
        run.save()

    def before_step() -> bool:
        set_learning_rate(optimizer, schedule.learning_rate(run.epoch, run.progress.taken))
        return run.progress.taken == 0 or schedule.progress(run.epoch, run.progress.taken) < 1

    def after_step() -> None:
        if average is not None:
            average.update_parameters(model)
        if dist.is_time_to_sync():
            (save_is_due,) = stop.sync(run.save_is_due())
            if save_is_due:
                save()

    with logger, StopSignals(dist) as stop:
        options = {"amp_dtype": amp_dtype, "after_step": stop.check}
        if args.find_lr:
            found = find_lr(args, train_set, model, optimizer, device, dist, scaler=scaler, **options)
            return logger.log_range_test(found)
        try:
            if not resumed:
                hardware = f"{describe_device(device)}{describe_processes(dist)}, {precision}"
                logger.log_start(run_card(command, args, data.counts, hardware))
                save()
            learner, val_learner = model, run.eval_model
            if computes_features(args):  # then all that training needs is what fc sees of each image
                learner = val_learner = model.fc
                train_loader, val_loader = head_loaders(
                    model, train_set, batches, val_loader, args, device, dist, **options
                )
            bn_images = load_bn_images(train_set, args, device, dist) if estimates_batch_norm(args) else None
            learner = dist.wrap_ddp(learner, device)
            while not run.over:
                stop.sync()
                epoch, start = run.epoch, time.perf_counter()
                batches.order.set_epoch(epoch, start=run.images_before, img_size=schedule.img_size(epoch))
                run.progress.on_read = logger.log_step
                train_one_epoch(
                    learner,
                    optimizer,
                    train_loader,
                    device,
                    epoch,
                    steps=batches.steps(),
                    amp_dtype=amp_dtype,
                    scaler=scaler,
                    label_smoothing=args.label_smoothing,
                    progress=run.progress,
                    before_step=before_step,
                    after_step=after_step,
                    keep_bar=False,
                )
                learning_rate = schedule.learning_rate(epoch, run.progress.steps - 1)  # its last step's
                trained = time.perf_counter()
                if bn_images is not None:
                    estimate_batch_norm(val_learner, bn_images, device, batch_size=args.batch_size, amp_dtype=amp_dtype)
                for each in (model,) if average is None else (model, average):
                    dist.broadcast_model(each)
                evaluate = functools.partial(collect_logits, val_learner, val_loader, device, **options)
                logits, numbers = gather_evaluation(dist, functools.partial(evaluate, on_features=features.add))
                stop.sync()
                progress = run.progress.all_reduce(dist)
                if len(numbers) < len(val_set):
                    left_out = len(val_set) - len(numbers)
                    print(f"[epoch {epoch}] {left_out} of {len(val_set)} validation images left out")
                validation = Evaluation(logits, torch.tensor(val_set.images_class)[numbers])
                if not math.isfinite(validation.loss):  # before it is drawn or saved: the checkpoints are from before
                    dist.fail(
                        FloatingPointError(
                            f"the validation loss is {validation.loss} after epoch {epoch}, with learning rate "
                            f"{learning_rate:g}: training diverged, a lower rate may help"
                        )
                    )

                is_best = run.judge(validation.accuracy, validation.loss)
                schedule.reserve_time(*dist.all_reduce_max(time.perf_counter() - trained))
                run.over = schedule.is_over(epoch + 1) or run.has_stalled(args.patience)
                if run.over:
                    features.gather(dist)
                seconds = time.perf_counter() - start
                logger.log_epoch(progress, validation, numbers, features, learning_rate, seconds, is_best, run.over)
                features.clear()
                if run.over:  # what is drawn later than this would be taken back when more epochs follow
                    logger.flush()
                if args.save_every and (epoch + 1) % args.save_every == 0 and dist.is_main:
                    save_checkpoint(run.state_dict(run.eval_model), run.weights / f"model-{epoch}.pth")
                run.finish_epoch()
                print(
                    f"[epoch {epoch}] train_loss {progress.loss:.3f}  val_loss {validation.loss:.3f}  "
                    f"accuracy {validation.accuracy:.3f}  learning_rate {learning_rate:.4g}  "
                    f"{time.perf_counter() - start:.1f} s{'  *best' if is_best else ''}",
                    flush=True,
                )
        except StopRequest:
            save()
            where = f"epoch {run.epoch}, step {run.progress.steps}"
            again = quote_command(["python", "train.py", "--resume", str(folder)])
            if dist.is_main:
                under = "under torchrun as before, " if dist.world_size > 1 else ""
                with contextlib.suppress(OSError):  # nobody may read it any more
                    print(f"train.py: stopped at {where}; to go on: {under}{again}", file=sys.stderr)
            raise

    best = str(run.weights / "best.pth")
    print(f"best accuracy {run.best['accuracy']:.3f} at epoch {run.best['epoch']}: {printable(best)}")
    print(f"next: {quote_command(['python', 'predict.py', '--weights', best, val_set.images_path[0]])}", flush=True)


def check_processes(
    args: argparse.Namespace, device: torch.device, amp_dtype: torch.dtype | None, dist: Distributed
) -> None:
    """Raise UsageError if the ranks differ, or if a flag does not fit the number of processes."""
    own = {flag: value for flag, value in vars(args).items() if flag not in ("resume", "timeout", "workers")}
    if any(other != (own, device.type, amp_dtype) for other in dist.gather((own, device.type, amp_dtype))):
        dist.fail(UsageError("the processes are not alike: they need the same flags, kind of device and precision"))
    if args.find_lr and dist.world_size > 1:
        dist.fail(UsageError("--find-lr: for one process, without torchrun"))
    if args.sync_bn and not (device.type == "cuda" and dist.is_launched):
        dist.fail(UsageError("--sync-bn: for several GPUs, under torchrun"))


def read_checkpoint_of(run: Run, data: Data, may_differ: bool) -> Mapping[str, Any]:
    """The last.pth of a run, of which the data may differ, or not."""
    checkpoint = read_checkpoint(run.weights / "last.pth")
    before = checkpoint["resume"].get("global_batch", run.global_batch)
    if before != run.global_batch:
        raise UsageError(
            f"the run was started with {before} images a step, of all processes, and now there are {run.global_batch}; "
            f"go on with as many processes as before"
        )
    check_same_data(run.folder, data.files, data.class_names, checkpoint, may_differ)
    return checkpoint


def describe_recipe(args: argparse.Namespace) -> str:
    """For people: what is in force."""
    flags = ("batch_size", "lr", "lrf", "warmup", "weight_decay", "label_smoothing")
    values = ", ".join(f"{flag.replace('_', ' ')} {getattr(args, flag):g}" for flag in flags)
    long = f"{args.time_budget:g} minutes" if args.time_budget else f"{args.epochs} epochs"
    first, last = training_sizes(args)
    sizes = f"{first} px" if first == last else f"{first} to {last} px"
    return f"{args.recipe}, {long}, {values}, {sizes}"


def parse_args(argv: list[str] | None = None, recipe: dict[str, Any] | None = None) -> argparse.Namespace:
    """The command line; exits with one line where a value is out of range.

    Args:
        recipe: the values of the one that it names, instead of those of `RECIPES`.
    """
    parser = FlagParser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    size_help = "input size in pixels (default: 224, or with --time-budget as large as the time allows)"
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


def resume(given: argparse.Namespace, argv: list[str]) -> tuple[argparse.Namespace, list[str], str]:
    """The flags and the command line of the run that a command line, parsed and not, wants to go on; why it cannot.

    The last is empty where there is something left to train.

    Raises:
        UsageError: there is no such run, or a flag contradicts how it was started.
        WeightsError: its checkpoint is damaged.
    """
    folder = find_run(given.resume)
    checkpoint = read_checkpoint(folder / "weights" / "last.pth")
    progress = checkpoint["resume"]
    command = progress["command"]
    recipe = progress.get("recipe", {})
    if not (isinstance(recipe, dict) and all(may_be(name, value) for name, value in recipe.items())):
        raise WeightsError(f"{folder / 'weights' / 'last.pth'}: damaged, its recipe is not train.py's")
    for name, fits in FORMER.items():
        if (value := recipe.pop(name, fits[0])) not in fits:
            raise UsageError(
                f"the run {folder} was begun by an older train.py, with {name} {value!r} in its recipe, which there "
                f"is no more; start a new run"
            )
    recipe = RECIPES["tutorial"] | recipe if recipe else None  # as it was then, without the ingredients that are newer
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            before = parse_args(command, recipe)
    except SystemExit as error:
        raise WeightsError(f"{folder / 'weights' / 'last.pth'}: damaged, its command line is not train.py's") from error
    args = parse_args(command + argv, recipe)
    for flag, value in vars(before).items():
        if flag not in MAY_CHANGE and getattr(args, flag) != value:
            raise UsageError(
                f"--{flag.replace('_', '-')}: the run {folder} was started with {value}; leave the flag out to go on "
                f"with it, or start a new run"
            )
    if args.epochs < before.epochs:
        raise UsageError(f"--epochs: the run {folder} was started with {before.epochs}; it can only be more")
    args.resume, args.download = str(folder), given.download
    if args.img_size is None:  # it was planned
        args.img_size = checkpoint.get("img_size")
        if not isinstance(args.img_size, int) or args.img_size < 32:
            raise WeightsError(f"{folder / 'weights' / 'last.pth'}: damaged, its img_size is {args.img_size!r}")
    changed = ("epochs", "patience", "data_path", "val_path")
    changed = [flag for flag in changed if getattr(args, flag) != getattr(before, flag)]
    over = bool(progress.get("over"))
    improved_at = progress["improved_at"]
    has_stalled = improved_at is not None and 0 < args.patience <= progress["epoch"] - 1 - improved_at
    more_patient = before.patience > 0 and not 0 < args.patience <= before.patience
    stalled = f"{args.patience} epochs without a better accuracy; --patience with a larger number goes on"
    if over and args.time_budget and not more_patient:
        complete = "its time is up" + (f", or {stalled}" if args.patience else "")
    elif over and has_stalled and args.epochs > progress["epoch"]:
        complete = stalled
    elif progress["epoch"] >= args.epochs and not args.time_budget:
        complete = f"{args.epochs} epochs; --epochs with a larger number goes on"
    else:
        complete = ""
    return args, command + as_words(args, changed), complete


def may_be(name: Any, value: Any) -> bool:
    """Whether a recipe may have this value: a finite number, or a flag, of a type that it has, or had, in a recipe."""
    types = {type(recipe[name]) for recipe in RECIPES.values() if name in recipe}
    types |= {type(fit) for fit in FORMER.get(name, ())}
    is_number = type(value) is int and float in types  # 0 may stand for 0.0
    return (type(value) in types or is_number) and -math.inf < value < math.inf


def as_words(args: argparse.Namespace, flags: Sequence[str]) -> list[str]:
    """Flags as on a command line; paths in full, as a run may go on from another folder."""
    values = {flag: getattr(args, flag) for flag in flags if getattr(args, flag) is not None}
    return [
        f"--{flag.replace('_', '-')}={Path(value).absolute() if flag.endswith('_path') else value}"
        for flag, value in values.items()
    ]


def main(argv: list[str] | None = None) -> int:
    """The program; its exit status."""
    escape_unprintable_output()
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    dist = Distributed(args.timeout)
    try:
        with dist, silence_other_ranks(dist):
            begun = dist.broadcast_from_main(lambda: run_of(dist.launch_ids))  # where torchrun has restarted it
            if begun is not None:
                args.resume, args.download = begun, False
            command = argv + as_words(args, ("data_path", "val_path"))
            if args.resume is not None:
                args, command, complete = dist.broadcast_from_main(lambda: resume(args, argv))
                if complete:
                    print(f"{printable(args.resume)} is complete: {complete}", flush=True)
                    return 0
            try:
                train(args, command, dist)
            except StopRequest as stop:
                return 128 + stop.number
    except OtherRankFailed:
        return 1
    except BrokenPipeError:  # `train.py | head`
        with contextlib.suppress(OSError):  # `2>&1 | head`
            print("train.py: error: the output is closed; --resume goes on", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError, ConnectionError, EOFError) as error:
        if dist.is_launched and is_connection_lost(error):
            who, why = f"process {dist.rank} of {dist.world_size}", printable(str(error).partition("\n")[0])
            lost = f"{who} has lost the others, which have ended or cannot be reached: {why}"
            print(f"train.py: error: {lost}", file=sys.stderr)
            return 1
        sizes = f"--batch-size, now {args.batch_size}, or --img-size, now {args.img_size or PROBE_SIZES[-1]}"
        reason = explain_resource_error(error, f"lower {sizes}", "try --workers 0")
        if reason is None:
            raise
        print(f"train.py: error: {reason}", file=sys.stderr)
        return 1
    except (DataError, EmptyLoaderError, WeightsError, UsageError, FloatingPointError, OSError) as error:
        print(f"train.py: error: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if dist.is_main:
            print("train.py: stopped before the first step", file=sys.stderr)
        return 130
    finally:
        flush_stdout()
    return 0


if __name__ == "__main__":
    sys.exit(main())
