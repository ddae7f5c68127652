"""Train a ResNet on a folder of images: `python train.py --help` shows how."""

import argparse
import contextlib
import functools
import math
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import nn

from checkpoint import WeightsError, read_checkpoint, save_checkpoint
from cli_utils import (
    UsageError,
    available_memory,
    describe_device,
    describe_processes,
    escape_unprintable_output,
    explain_resource_error,
    flush_stdout,
    printable,
    quote_command,
    select_device,
    select_precision,
    shorten,
    silence_other_ranks,
)
from config import (
    RECIPES,
    as_words,
    computes_features,
    describe_recipe,
    estimates_batch_norm,
    merge_resumed_args,
    parse_args,
)
from data_loading import head_loaders, load_bn_images, make_train_loader, make_val_loader
from data_utils import KNOWN_IMAGES, DataError
from distributed import Distributed, OtherRankFailed, is_connection_lost
from image_cache import ImageCache
from model import MODELS, to_device
from my_dataset import EvalTransform, MyDataSet, TrainTransform
from optimization import make_average, make_optimizer, make_schedule, prepare_weights, set_learning_rate
from prepare_data import Data, prepare_data
from run_utils import (
    Run,
    StopRequest,
    StopSignals,
    check_same_data,
    create_run_folder,
    find_run,
    run_card,
    run_of,
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


def train(args: argparse.Namespace, command: list[str], dist: Distributed) -> None:
    """Train, or resume a run.

    Args:
        args: the flags, with `resume` as the folder of the run to resume, or None.
        command: the command line that reproduces the run.
        dist: the process group. All ranks take the same path through this function.

    Raises:
        StopRequest: a signal has arrived, and the run has been saved.
    """
    matplotlib.use("Agg")  # figures go to files, even if there is a screen
    device, amp_dtype, precision = setup_device(args, dist)
    torch.manual_seed(args.seed)

    # --- data, model, optimizer, schedule
    resumed = args.resume is not None
    runs = Path(args.resume).absolute().parent if resumed else Path("runs")
    data = dist.broadcast_from_main(lambda: prepare_data(args, runs / KNOWN_IMAGES), no_timeout=True)
    train_set, val_set, class_names = data.train_set, data.val_set, data.class_names
    cache_images((train_set, val_set), dist)
    model = MODELS[args.model](num_classes=len(class_names))
    weights_line = prepare_weights(model, args, resumed, dist)
    to_device(model, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    optimizer = make_optimizer(model, args, device, amp_dtype)

    evaluation_seconds = 0.0
    if args.time_budget and not resumed:
        args.img_size, evaluation_seconds = plan(
            args, model, train_set, len(val_set) + args.bn_images, device, amp_dtype, dist
        )
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # the parameters stay the same objects
    average = make_average(model, args)
    train_set.transform = TrainTransform(args.img_size)
    val_set.transform = EvalTransform(args.img_size)
    train_loader = make_train_loader(train_set, args, device, dist)
    val_loader = make_val_loader(val_set, args, device, dist)
    batches = train_loader.batch_sampler
    schedule = make_schedule(args, len(batches.steps()), dist)
    schedule.reserve_time(evaluation_seconds)

    # --- start or resume the run; nothing has been written so far, in case a flag or the data is invalid
    folder = dist.broadcast_from_main(lambda: Path(args.resume) if resumed else create_run_folder(args.name))
    info = {"model": args.model, "class_names": class_names, "img_size": args.img_size}
    recipe = {name: getattr(args, name) for name in RECIPES[args.recipe]}
    run = Run(folder, model, optimizer, scaler, schedule, info, command, recipe, batches.global_batch, dist, average)
    dist.sync_flags()  # the time that has been spent
    if resumed:  # the run is locked, so that no other process can change its last.pth
        run.load(dist.broadcast_from_main(lambda: read_checkpoint_of(run, data, args.allow_changed_data)))
        # The flags may allow more epochs now.
        run.over = run.over and (schedule.is_over(run.epoch) or run.has_stalled(args.patience))
    if dist.is_main:
        write_run(run, data, args, runs / KNOWN_IMAGES)
    features = ProjectorFeatures(len(val_set))
    logger = NullLogger()
    if dist.is_main:
        logger = TensorBoardLogger(run, args, train_loader, val_loader, device, amp_dtype)

    if dist.is_main:
        print_header(args, data, run, device, precision, weights_line, dist)

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
            if computes_features(args):  # then only fc is trained, on features computed here
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
                learning_rate = schedule.learning_rate(epoch, run.progress.steps - 1)  # of the last step
                trained = time.perf_counter()
                if bn_images is not None:
                    estimate_batch_norm(val_learner, bn_images, device, batch_size=args.batch_size, amp_dtype=amp_dtype)
                for each in (model,) if average is None else (model, average):
                    dist.broadcast_model(each)
                collect = functools.partial(collect_logits, val_learner, val_loader, device, **options)
                logits, numbers = gather_evaluation(dist, functools.partial(collect, on_features=features.add))
                stop.sync()
                progress = run.progress.all_reduce(dist)
                validation = Evaluation(logits, torch.tensor(val_set.images_class)[numbers])
                if len(numbers) < len(val_set):
                    print(f"[epoch {epoch}] skipped {len(val_set) - len(numbers)} of {len(val_set)} validation images")
                if not math.isfinite(validation.loss):  # nothing of this epoch has been saved
                    dist.fail(diverged(validation.loss, epoch, learning_rate))

                is_best = run.judge(validation.accuracy, validation.loss)
                schedule.reserve_time(*dist.all_reduce_max(time.perf_counter() - trained))
                run.over = schedule.is_over(epoch + 1) or run.has_stalled(args.patience)
                if run.over:
                    features.gather(dist)
                seconds = time.perf_counter() - start
                logger.log_epoch(progress, validation, numbers, features, learning_rate, seconds, is_best, run.over)
                features.clear()
                if run.over:  # figures drawn after the checkpoint would be lost on a resume with more epochs
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
                    print(f"train.py: stopped at {where}; to resume: {under}{again}", file=sys.stderr)
            raise

    best = str(run.weights / "best.pth")
    print(f"best accuracy {run.best['accuracy']:.3f} at epoch {run.best['epoch']}: {printable(best)}")
    print(f"next: {quote_command(['python', 'predict.py', '--weights', best, val_set.images_path[0]])}", flush=True)


def setup_device(args: argparse.Namespace, dist: Distributed) -> tuple[torch.device, torch.dtype | None, str]:
    """Select the device and the precision, and configure CUDA.

    Returns:
        The device, the dtype of mixed precision (None: float32), and a description of the precision.
    """
    device = select_device(args.device, dist)
    amp_dtype, precision = select_precision(args.amp, device)
    check_processes(args, device, amp_dtype, dist)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # there are few batch shapes
        torch.set_float32_matmul_precision("high")  # TF32
    return device, amp_dtype, precision


def cache_images(data_sets: Iterable[MyDataSet], dist: Distributed) -> None:
    """Give each data set an eighth of the available memory to cache decoded images in."""
    (cache_bytes,) = dist.all_reduce_min(available_memory() // 8)
    for images in data_sets:
        if cache_bytes > 0:
            share = dist.shared_memory, dist.local_rank, dist.local_world_size
            images.cache = ImageCache(len(images), int(cache_bytes), *share)


def print_header(
    args: argparse.Namespace,
    data: Data,
    run: Run,
    device: torch.device,
    precision: str,
    weights_line: str,
    dist: Distributed,
) -> None:
    """Print what is trained, on what, and where the results go."""
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    names, folder = data.class_names, printable(str(run.folder))
    print(f"device       {describe_device(device)}{describe_processes(dist)}")
    print(f"precision    {precision}")
    print(f"model        {args.model}, {parameters:,} parameters, {printable(weights_line)}")
    print(f"recipe       {describe_recipe(args)}")
    if run.global_batch > args.batch_size:
        print(f"global batch {run.global_batch} images per step")
    print(f"classes      {len(names)}: {shorten(printable(', '.join(names)))}")
    counts = f"{len(data.train_set)} for training, {len(data.val_set)} for validation"
    print(f"images       {counts} ({printable(data.val_source)})")
    if data.problems:
        reasons = printable(str(run.folder / "unusable_images.txt"))
        print(f"skipped      {len(data.problems)} unusable images (reasons in {reasons})")
    resumed_at = f", resumed at epoch {run.epoch}, step {run.progress.steps}" if args.resume is not None else ""
    print(f"run          {folder}{resumed_at}")
    print("TensorBoard  tensorboard --logdir=runs, then open http://localhost:6006/", flush=True)


def diverged(loss: float, epoch: int, learning_rate: float) -> FloatingPointError:
    """Return the error for a validation loss that is not finite."""
    return FloatingPointError(
        f"the validation loss is {loss} after epoch {epoch}, with learning rate {learning_rate:g}: training diverged; "
        f"try a lower learning rate"
    )


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
    """Read a run's last.pth, and check that the world size and the data are the same as before."""
    checkpoint = read_checkpoint(run.weights / "last.pth")
    before = checkpoint["resume"].get("global_batch", run.global_batch)
    if before != run.global_batch:
        raise UsageError(
            f"the run was started with a global batch of {before} images, and now it is {run.global_batch}; resume it "
            f"with as many processes as before"
        )
    check_same_data(run.folder, data.files, data.class_names, checkpoint, may_differ)
    return checkpoint


def resume(given: argparse.Namespace, argv: list[str]) -> tuple[argparse.Namespace, list[str], str]:
    """Find the run to resume, and merge its flags: see `merge_resumed_args`."""
    folder = find_run(given.resume)
    return merge_resumed_args(given, argv, folder, read_checkpoint(folder / "weights" / "last.pth"))


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
            print("train.py: error: the output is closed; resume with --resume", file=sys.stderr)
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
