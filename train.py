"""Train a ResNet on a folder of images; see `python train.py --help`."""

import argparse
import functools
import math
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import nn

from classifier import Classifier
from cli_utils import (
    DataError,
    UsageError,
    describe_device,
    describe_processes,
    printable,
    run_program,
    select_device,
    select_precision,
    silence_other_ranks,
)
from config import flags_to_save, parse_args, resume_args, uses_cached_features
from data_loading import FeatureStore, Loaders, build_loaders, cache_features
from distributed import Distributed
from evaluation_report import Results, build_report, classify_labelled
from file_utils import write_json
from image_folders import CHECK_CACHE
from inference import gather_outputs, run_inference
from labelled_images import ErrorLog, ImageFile
from metrics import Evaluation
from model import MODELS, ResNet, freeze_backbone, init_conv1_with_pca, to_device
from my_dataset import prepare_batch
from optimization import (
    build_average,
    build_class_weights,
    build_optimizer,
    build_schedule,
    current_learning_rate,
    set_learning_rate,
)
from prepare_data import Data, prepare_data
from run_state import Run
from run_utils import (
    TEST_REPORT,
    RunFolder,
    StopRequest,
    StopSignals,
    check_same_data,
    create_run,
    describe_run,
    find_launched_run,
    open_run,
    write_metadata,
)
from tensorboard_logger import NullLogger, TensorBoardLogger
from train_eval_utils import Callback, estimate_batch_norm, train_one_epoch
from train_output import print_epoch, print_header, print_result, print_stop
from tuning import choose_img_size, find_lr
from weights_io import load_initial_weights

PROJECTOR_IMAGES = 1000  # approximate number of validation images in TensorBoard's projector


def train(
    args: argparse.Namespace, dist: Distributed, folder: RunFolder | None = None, store: FeatureStore | None = None
) -> None:
    """Train a model, or resume a run.

    Args:
        dist: the process group. All ranks take the same path through this function.
        folder: the run to resume, with its checkpoint; None to start a new one.
        store: shares the features of a frozen backbone with other runs.

    Raises:
        StopRequest: a signal has arrived, and the run has been saved.
    """
    device, amp_dtype, precision = setup_device(args, dist)
    torch.manual_seed(args.seed)

    # --- data, model, optimizer, loaders, schedule
    is_new = folder is None
    data = dist.broadcast_from_main(lambda: load_data(args, folder), no_timeout=True)
    model, weights_description = build_model(args, data.class_names, device, dist, load_weights=is_new)
    optimizer = build_optimizer(args, model, device, amp_dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    img_size, evaluation_seconds = choose_img_size(args, model, data, device, amp_dtype, dist, folder)
    loaders = build_loaders(args, data, img_size, device, dist)
    init_conv1(args, model, loaders)
    class_weights = build_class_weights(args, data.counts, device)
    schedule = build_schedule(args, len(loaders.batches.steps()), img_size, dist)
    schedule.reserve_time(2 * evaluation_seconds)

    # --- start or resume the run; nothing is written before this, in case a flag or the data is invalid
    state = {"model": model, "optimizer": optimizer, "scaler": scaler, "schedule": schedule}
    run = start_run(args, folder, data, img_size, loaders.batches.global_batch, state, dist)
    if run.finished and not dist.broadcast_from_main(lambda: is_test_pending(run, data)):
        print(f"{printable(str(run.folder))} is complete: {run.finished}", flush=True)
        return
    logger = NullLogger()
    if dist.is_main:
        write_metadata(run.folder, args, data, dist.launch_ids, run.info)
        logger = TensorBoardLogger(run, loaders, device, amp_dtype, histograms=args.histograms)
        print_header(args, data, run, device, precision, weights_description, class_weights, is_new)

    # --- train
    with logger, run, StopSignals(dist) as stop:
        options = {"amp_dtype": amp_dtype, "scaler": scaler, "class_weights": class_weights}
        if args.find_lr:
            return logger.log_range_test(find_lr(args, data.train_set, model, optimizer, device, stop, **options))
        callback = RunCallback(run, stop, logger)
        try:
            if is_new:
                hardware = f"{describe_device(device)}{describe_processes(dist)}, {precision}"
                logger.log_start(describe_run(args, data.counts, hardware), vars(args))
                callback.save(wait=True)
            learner, eval_model = model, run.eval_model
            if uses_cached_features(args) and not run.finished:  # train only fc, on features that are computed once
                learner = eval_model = model.fc
                loaders = cache_features(args, model, loaders, img_size, device, dist, amp_dtype, stop.check, store)
            learner = dist.wrap_ddp(learner, device, sync_bn=args.sync_bn)
            options |= {"label_smoothing": args.label_smoothing, "callback": callback, "keep_bar": False}
            while not run.finished:
                stop.sync()
                start = time.perf_counter()
                loaders.batches.order.set_epoch(run.epoch, run.images_before, **schedule.image_options(run.epoch))
                options |= {"steps": loaders.batches.steps(), "progress": run.progress}
                train_one_epoch(learner, optimizer, loaders.train, device, run.epoch, **options)
                learning_rate = schedule.learning_rate(run.epoch, run.progress.steps - 1)  # of the last step
                validation = validate(run, eval_model, loaders, data, device, amp_dtype, stop)
                progress = run.progress.all_reduce(dist)
                run.update_best(validation)
                logger.log_epoch(progress, validation, learning_rate, time.perf_counter() - start)
                run.finish_epoch()
                print_epoch(run, data, progress, learning_rate, time.perf_counter() - start)
            report = evaluate_test_set(run, data, device, amp_dtype, args.workers)
            logger.log_test(report)
        except StopRequest:
            callback.save(wait=True)
            print_stop(run)
            raise

    print_result(run, data, report)
    stop.sync()  # a signal may have arrived after the last step


class RunCallback(Callback):
    """Sets the learning rate, enforces the time budget, averages the weights, logs losses, and saves the run."""

    def __init__(self, run: Run, stop: StopSignals, logger: TensorBoardLogger | NullLogger) -> None:
        self.run, self.stop, self.logger = run, stop, logger

    def before_step(self, step: int) -> bool:
        run = self.run
        set_learning_rate(run.optimizer, run.schedule.learning_rate(run.epoch, step))
        return step == 0 or run.schedule.progress(run.epoch, step) < 1  # a time budget may end the epoch

    def after_step(self, step: int) -> None:
        if self.run.average is not None:
            self.run.average.update_parameters(self.run.model)
        if self.run.dist.is_time_to_sync():
            (save_is_due,) = self.stop.sync(self.run.save_is_due())
            if save_is_due:
                self.save()

    def on_loss(self, step: int, loss: float) -> None:
        self.logger.log_step(step, loss)

    def save(self, wait: bool = False) -> None:
        """Save the run as of the last step, after logging everything up to that step."""
        self.run.progress.read(self.on_loss)
        self.logger.flush()
        self.run.save()
        if wait:
            self.run.background.wait()


def validate(
    run: Run,
    model: nn.Module,
    loaders: Loaders,
    data: Data,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    stop: StopSignals,
) -> Evaluation:
    """Validate `model` on all ranks after an epoch. Unreadable images are skipped.

    Raises:
        FloatingPointError: the loss is not finite: training has diverged.
        StopRequest: a signal has arrived.
    """
    dist, val_set = run.dist, data.val_set
    run.validation_start = time.perf_counter()
    if loaders.bn_images is not None:
        estimate_batch_norm(model, loaders.bn_images, device, amp_dtype=amp_dtype)
    dist.sync_model(run.model)
    if run.average is not None:
        dist.sync_model(run.average)
    stride = math.ceil(len(val_set) / PROJECTOR_IMAGES)  # the validation set is sorted by class
    options = {"amp_dtype": amp_dtype, "feature_stride": stride, "after_batch": stop.check}
    outputs = gather_outputs(functools.partial(run_inference, model, loaders.val, device, **options), dist)
    stop.sync()
    indices = outputs.labels
    validation = Evaluation(
        outputs.logits,
        torch.tensor(val_set.images_class)[indices],
        indices=indices,
        features=outputs.features,
        feature_rows=(indices % stride == 0).nonzero().flatten(),
        layer1=outputs.layer1 if loaders.val_layer1 is None else loaders.val_layer1,
    )
    if len(indices) < len(val_set):
        print(f"[epoch {run.epoch}] skipped {len(val_set) - len(indices)} of {len(val_set)} validation images")
    if not math.isfinite(validation.loss):  # nothing from this epoch has been saved
        lr = current_learning_rate(run.optimizer)
        message = f"the validation loss is {validation.loss} after epoch {run.epoch}, with learning rate {lr:g}"
        dist.fail(FloatingPointError(f"training diverged: {message}; try a lower learning rate"))
    return validation


def is_test_pending(run: Run, data: Data) -> bool:
    """Return whether there are test images that the run has not been evaluated on."""
    return bool(data.test_images) and not (run.folder / TEST_REPORT).exists()


def evaluate_test_set(
    run: Run, data: Data, device: torch.device, amp_dtype: torch.dtype | None, workers: int | None
) -> dict[str, Any] | None:
    """Evaluate best.pth on the test images, if there are any, and write the report to the run's folder.

    The main process evaluates; the others wait for its report.

    Raises:
        DataError: no test image is readable.
    """
    if not data.test_images:
        return None

    def evaluate() -> dict[str, Any]:
        classifier = Classifier(run.weights / "best.pth", device, amp_dtype, workers=workers)
        files = [ImageFile(path, label, path) for path, label in data.test_images]
        images = classify_labelled(classifier, files, ErrorLog("train.py"))
        if not images:
            raise DataError(f"none of the {len(files)} test images is readable; restore them, and resume the run")
        report = build_report(Results.collect(images, classifier)) | {"unreadable": len(files) - len(images)}
        write_json(report, run.folder / TEST_REPORT)
        return report

    return run.dist.broadcast_from_main(evaluate, no_timeout=True)


def setup_device(args: argparse.Namespace, dist: Distributed) -> tuple[torch.device, torch.dtype | None, str]:
    """Select the device and the precision, and configure CUDA.

    Returns:
        The device, the dtype for mixed precision (None: float32), and a description of the precision.

    Raises:
        UsageError: the ranks have different settings, or a flag does not suit the number of processes.
    """
    matplotlib.use("Agg")  # figures go to files, even if there is a screen
    device = select_device(args.device, dist)
    amp_dtype, precision = select_precision(args.amp, device)
    flags = {flag: value for flag, value in vars(args).items() if flag not in ("resume", "timeout", "workers")}
    setup = flags, device.type, amp_dtype
    if any(other != setup for other in dist.gather(setup)):
        dist.fail(UsageError("the processes differ: they need the same flags, type of device and precision"))
    if args.find_lr and dist.world_size > 1:
        dist.fail(UsageError("--find-lr: not supported under torchrun; run it in one process"))
    if args.sync_bn and not (device.type == "cuda" and dist.is_launched):
        dist.fail(UsageError("--sync-bn: only supported on GPUs under torchrun"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # there are few batch shapes
    return device, amp_dtype, precision


def load_data(args: argparse.Namespace, folder: RunFolder | None) -> Data:
    """Find, check and split the images, with the results of earlier checks in the runs folder."""
    if folder is None:
        return prepare_data(args, Path("runs") / CHECK_CACHE)
    return prepare_data(args, folder.path.absolute().parent / CHECK_CACHE, folder.checkpoint)


def build_model(
    args: argparse.Namespace, class_names: list[str], device: torch.device, dist: Distributed, load_weights: bool
) -> tuple[ResNet, str]:
    """Build the network on `device`, load --weights, and freeze the backbone for --freeze-layers.

    Args:
        load_weights: False on resume, which loads the run's own weights later.

    Returns:
        The model, and a description of its weights for the header.
    """
    model = MODELS[args.model](num_classes=len(class_names))
    description = f"weights of {args.weights}" if args.weights else "from scratch (no --weights given)"
    if args.weights and load_weights:
        description = dist.local_rank_zero_first(
            lambda: load_initial_weights(model, args.weights, args.model, class_names)
        )
    elif args.recipe.name == "finetune" and load_weights:
        print("warning: --recipe finetune is for pretrained weights: pass --weights, or use --recipe scratch")
    if args.freeze_layers:
        freeze_backbone(model)
        description += "; only fc is trained"
        if not args.weights:
            print("warning: --freeze-layers without --weights freezes a random backbone")
    return to_device(model, device), description


def init_conv1(args: argparse.Namespace, model: ResNet, loaders: Loaders) -> None:
    """Initialise `conv1` with principal components if the recipe does, unless --weights is given.

    On resume, the checkpoint overwrites it.
    """
    if args.recipe.pca_conv1 and not args.weights and loaders.bn_images is not None:
        init_conv1_with_pca(model, (prepare_batch(images, "cpu") for images in loaders.bn_images.split(16)))


def start_run(
    args: argparse.Namespace,
    folder: RunFolder | None,
    data: Data,
    img_size: int,
    global_batch: int,
    state: dict[str, Any],
    dist: Distributed,
) -> Run:
    """Create a run, or restore the one in `folder`, after checking that the data has not changed.

    Args:
        state: model, optimizer, scaler and schedule, see `Run`.

    Raises:
        UsageError: the data or the world size has changed, or the checkpoint is corrupt.
    """
    run = Run(
        folder or create_run(args.name, dist),
        flags_to_save(args),
        {
            "model": args.model,
            "class_names": data.class_names,
            "img_size": img_size,
            "resize": args.resize,
            "pixel_range": data.pixel_range,
        },
        **state,
        average=build_average(args, state["model"]),
        global_batch=global_batch,
        best_metric=args.best_metric,
        patience=args.patience,
        save_every=args.save_every,
        dist=dist,
    )
    dist.sync_max()  # synchronises the elapsed time
    if folder is not None:
        dist.broadcast_from_main(lambda: check_same_data(folder, data, args.corrections, args.allow_changed_data))
        run.load(folder.checkpoint)
        folder.checkpoint = None  # frees its memory
    return run


def run_training(argv: list[str]) -> int:
    """Parse the flags, find the run to resume, if any, and train. Returns the exit status."""
    args = parse_args(argv)
    with Distributed(args.timeout) as dist, silence_other_ranks(dist):
        # torchrun restarts a failed launch with its original flags: resume the run that it started.
        name = dist.broadcast_from_main(lambda: find_launched_run(dist.launch_ids) or args.resume)
        folder = None if name is None else open_run(name, dist)
        if folder is not None:
            flags = folder.checkpoint["resume"].get("flags")
            args = dist.broadcast_from_main(lambda: resume_args(argv, flags, folder.path))
        elif args.allow_changed_data:
            dist.fail(UsageError("--allow-changed-data has no effect without --resume"))
        try:
            train(args, dist, folder)
        except StopRequest as stop:
            return 128 + stop.number
        except BrokenPipeError as error:  # `train.py | head`
            raise UsageError("standard output is closed") from error
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit status."""
    memory_advice, worker_advice = "try a smaller --batch-size or --img-size", "try --workers 0"
    run = functools.partial(run_training, sys.argv[1:] if argv is None else argv)
    return run_program("train.py", run, memory_advice=memory_advice, worker_advice=worker_advice)


if __name__ == "__main__":
    sys.exit(main())
