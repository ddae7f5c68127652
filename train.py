"""Train a ResNet on a folder of images, one sub-folder a class, and write what happens to TensorBoard.

python train.py                                  # the built-in sample: nothing to download
python train.py --data-path my_photos            # my_photos/cat/*.jpg, my_photos/dog/*.jpg, ...
python train.py --data-path flower_photos --download
python train.py --data-path my_photos --weights imagenet --freeze-layers
tensorboard --logdir=runs                        # beside it; then open http://localhost:6006/
"""

import argparse
import contextlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from data_utils import (
    DataError,
    check_images,
    describe_files,
    download_flower_photos,
    find_split,
    leave_out,
    write_class_indices,
)
from model import (
    MODELS,
    ResNet,
    WeightsError,
    freeze_backbone,
    load_pretrained,
    to_device,
)
from my_dataset import (
    EpochSampler,
    EvalTransform,
    MyDataSet,
    Numbered,
    Tolerant,
    TrainTransform,
)
from report import Report
from run_utils import (
    KNOWN_IMAGES,
    FlagParser,
    Run,
    StopRequest,
    StopSignals,
    UsageError,
    available_cores,
    available_memory,
    check_same_data,
    command_line,
    create_run_folder,
    describe_device,
    event_errors,
    find_run,
    is_dead_worker,
    is_out_of_memory,
    leave_with_the_run,
    printable,
    read_checkpoint,
    read_json,
    run_card,
    save_checkpoint,
    select_device,
    select_precision,
    shorten,
    tolerate_any_name,
    true_or_false,
    write_args,
    write_json,
)
from sample_flowers import draw_sample
from train_eval_utils import (
    EmptyLoaderError,
    Evaluation,
    collect_logits,
    train_one_epoch,
)

HERE = Path(__file__).resolve().parent
SAMPLE = HERE / "data" / "sample_flowers"
FLOWER_PHOTOS = HERE / "data" / "flower_photos"
MAY_CHANGE = {  # when a run goes on
    *("epochs", "data_path", "val_path", "device", "workers", "save_every", "histograms"),
    *("resume", "allow_changed_data", "strict"),
}


def train(args: argparse.Namespace, command: list[str]) -> None:
    """Train as the flags say.

    Args:
        args: `resume` is the folder of the run to go on with, or None.
        command: the words of the command line, for `--resume`.

    Raises:
        StopRequest: a signal came; the run has been saved.
    """
    matplotlib.use("Agg")  # figures go to files, also where there is a screen
    device = select_device(args.device)
    amp_dtype, precision = select_precision(args.amp, device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # every batch has the same shape: try the kernels once, take the fastest
        torch.set_float32_matmul_precision("high")  # TF32
    torch.manual_seed(args.seed)

    # The data: what to train on, and what to validate on.
    found, val_source = find_split(find_data(args), args.val_path, args.val_rate)
    class_names = found.class_names
    if args.num_classes not in (None, len(class_names)):
        raise UsageError(f"--num-classes is {args.num_classes}, but the data has {len(class_names)} classes")
    resumed = args.resume is not None
    runs = Path(args.resume).parent if resumed else Path("runs")
    known = read_json(runs / KNOWN_IMAGES)
    checked = check_images(found.train_paths + found.val_paths, known, number_of_workers(args))
    split, problems = leave_out(found, checked)
    if problems and args.strict:
        raise DataError(f"--strict: {len(problems)} images cannot be used; {problems[0]}")
    cache_bytes = available_memory() // 8  # for each set to keep its large images in, decoded
    train_set = MyDataSet(split.train_paths, split.train_labels, TrainTransform(args.img_size), cache_bytes=cache_bytes)
    val_set = MyDataSet(split.val_paths, split.val_labels, EvalTransform(args.img_size), cache_bytes=cache_bytes)
    if not (len(train_set) and len(val_set)):
        raise DataError("no usable image is left for training or for validation")
    sampler = EpochSampler(len(train_set), args.seed)
    train_loader = make_loader(Tolerant(train_set, replace=True), args, device, sampler)
    val_loader = make_loader(Tolerant(Numbered(val_set), replace=False), args, device)

    # The network, from scratch or from weights, and stochastic gradient descent.
    model = MODELS[args.model](num_classes=len(class_names))
    weights_line = prepare_weights(model, args, resumed)
    to_device(model, device)
    optimizer = make_optimizer(model, args, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)

    # The run. Nothing has been written up to here, in case a flag or the data was wrong.
    folder = Path(args.resume) if resumed else create_run_folder(args.name)
    files = describe_files(found, checked)
    info = {"model": args.model, "class_names": class_names, "img_size": args.img_size}
    run = Run(folder, model, optimizer, scaler, info, command)
    if resumed:
        checkpoint = read_checkpoint(run.weights / "last.pth")  # from here on no other process can change it
        check_same_data(folder, files, class_names, checkpoint, args.allow_changed_data)
        run.load(checkpoint)
    else:
        write_args(args, folder / "args.json")
        write_class_indices(class_names, folder / "class_indices.json")
    write_json(files, folder / "files.json")
    write_json(known | checked, runs / KNOWN_IMAGES)
    if problems:
        (folder / "unusable_images.txt").write_text("\n".join([*problems, ""]), encoding="utf-8")
    with event_errors(folder):
        writer = SummaryWriter(log_dir=str(folder))
    report = Report(writer, run, args, train_loader, val_loader, device, amp_dtype)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"device       {describe_device(device)}")
    print(f"precision    {precision}")
    print(f"model        {args.model}, {parameters:,} parameters, {printable(weights_line)}")
    print(f"classes      {len(class_names)}: {shorten(printable(', '.join(class_names)))}")
    print(f"images       {len(train_set)} for training, {len(val_set)} for validation ({printable(val_source)})")
    if problems:
        where = printable(str(folder / "unusable_images.txt"))
        print(f"left out     {len(problems)} images that cannot be used: {where} says why")
    where = f", on from epoch {run.epoch}, step {run.progress.steps}" if resumed else ""
    print(f"run          {printable(str(folder))}{where}")
    print("TensorBoard  tensorboard --logdir=runs, then open http://localhost:6006/", flush=True)

    def save() -> None:
        run.progress.read()
        report.flush()
        run.save()

    def after_step() -> None:
        stop.check()
        if run.save_is_due():
            save()

    with event_errors(folder), contextlib.closing(writer), report.drawing, StopSignals() as stop:
        try:
            if not resumed:
                report.start(run_card(command, args, split.count(), f"{describe_device(device)}, {precision}"))
                save()
            while run.epoch < args.epochs:
                stop.check()
                epoch, start = run.epoch, time.perf_counter()
                learning_rate = set_learning_rate(optimizer, epoch, args)
                sampler.set_epoch(epoch, start=run.progress.steps * args.batch_size)
                run.progress.on_read = report.step
                train_loss = train_one_epoch(
                    model,
                    optimizer,
                    train_loader,
                    device,
                    epoch,
                    amp_dtype=amp_dtype,
                    scaler=scaler,
                    progress=run.progress,
                    after_step=after_step,
                    keep_bar=False,
                )
                logits, numbers = collect_logits(model, val_loader, device, amp_dtype=amp_dtype, after_step=stop.check)
                if len(numbers) < len(val_set):
                    left_out = len(val_set) - len(numbers)
                    print(f"[epoch {epoch}] {left_out} of {len(val_set)} validation images left out")
                validation = Evaluation(logits, torch.tensor(val_set.images_class)[numbers])
                if not math.isfinite(validation.loss):  # before it is drawn or saved: the checkpoints are from before
                    raise FloatingPointError(
                        f"the validation loss is {validation.loss} after epoch {epoch}, with learning rate "
                        f"{learning_rate:g}: training diverged, a lower rate may help"
                    )

                report.epoch(validation, numbers, learning_rate, seconds=time.perf_counter() - start)
                if args.save_every and (epoch + 1) % args.save_every == 0:
                    save_checkpoint(run.state_dict(), run.weights / f"model-{epoch}.pth")
                is_best = run.finish_epoch(validation.accuracy)
                print(
                    f"[epoch {epoch}] train_loss {train_loss:.3f}  val_loss {validation.loss:.3f}  "
                    f"accuracy {validation.accuracy:.3f}  learning_rate {learning_rate:.5f}  "
                    f"{time.perf_counter() - start:.1f} s{'  *best' if is_best else ''}",
                    flush=True,
                )
        except StopRequest:
            save()
            where = f"epoch {run.epoch}, step {run.progress.steps}"
            again = command_line(["python", "train.py", "--resume", str(folder)])
            print(f"train.py: stopped at {where}; to go on: {again}", file=sys.stderr)
            raise

    best = str(run.weights / "best.pth")
    print(f"best accuracy {run.best['accuracy']:.3f} at epoch {run.best['epoch']}: {printable(best)}")
    print(f"next: {command_line(['python', 'predict.py', '--weights', best, val_set.images_path[0]])}")


def find_data(args: argparse.Namespace) -> str | Path:
    """The folder to train on: downloaded or drawn first, where that is asked for."""
    if args.download:
        download_flower_photos(args.data_path)
    if args.data_path:
        return args.data_path
    if not SAMPLE.exists():
        print(f"drawing the built-in sample in {SAMPLE}", flush=True)
        draw_sample(SAMPLE)
    print("no --data-path given: training on the built-in sample of drawn flowers")
    print("for your own images: --data-path FOLDER, with one sub-folder a class")
    return SAMPLE


def make_loader(
    dataset: MyDataSet, args: argparse.Namespace, device: torch.device, sampler: EpochSampler | None = None
) -> DataLoader:
    """A loader of training batches, in the sampler's order; without one of evaluation batches, in the folder's."""
    workers = number_of_workers(args)
    return DataLoader(
        dataset,
        batch_size=args.batch_size,
        sampler=sampler,
        # A last batch of one image, where it would end as a single pixel, leaves BatchNorm nothing to average over.
        drop_last=sampler is not None and args.img_size <= 32 and len(dataset) % args.batch_size == 1,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        collate_fn=dataset.collate_fn,
        worker_init_fn=leave_with_the_run,
        generator=torch.Generator(),  # its own: loading data moves no global generator
    )


def number_of_workers(args: argparse.Namespace) -> int:
    """The processes that read images."""
    return min(available_cores(), 8) if args.workers is None else args.workers


def prepare_weights(model: ResNet, args: argparse.Namespace, resumed: bool) -> str:
    """Load and freeze as the flags say; a few words for the header. A run that goes on loads its own weights later."""
    words = f"weights of {args.weights}" if args.weights else "from scratch (no --weights given)"
    if args.weights and not resumed:
        left_out = load_pretrained(model, args.weights, args.model)
        if left_out:
            words += f" but for {', '.join(left_out)}, made for another number of classes"
    if args.freeze_layers:
        freeze_backbone(model)
        words += "; only fc learns"
        if not args.weights:
            print("warning: --freeze-layers without --weights freezes a random backbone")
    return words


def make_optimizer(model: ResNet, args: argparse.Namespace, device: torch.device) -> torch.optim.SGD:
    """For the parameters that learn."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = device.type in ("cpu", "cuda") or None  # one kernel for all of them, where there is one
    return torch.optim.SGD(learning, lr=args.lr, momentum=0.9, weight_decay=0.005, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, epoch: int, args: argparse.Namespace) -> float:
    """The epoch's rate: half a cosine from lr down to lr * lrf (https://arxiv.org/abs/1812.01187)."""
    rate = args.lr * ((1 + math.cos(math.pi * epoch / args.epochs)) / 2 * (1 - args.lrf) + args.lrf)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with one line where a value is out of range."""
    parser = FlagParser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-path", help="a folder with one sub-folder a class (default: the built-in sample)")
    add("--val-path", help="a folder of the same form to validate on (default: a part of --data-path)")
    add("--val-rate", type=float, default=0.2, help="the part of each class to validate on (default: %(default)s)")
    add("--download", action="store_true", help="first fetch the real flower photographs (218 MB) into --data-path")
    add("--num-classes", type=int, help="only checked: the folder tells how many there are")
    add("--model", choices=MODELS, default="resnet34", help="default: %(default)s")
    add("--weights", default="", help="a weights file to start from, or imagenet (default: from scratch)")
    add("--freeze-layers", nargs="?", const=True, default=False, type=true_or_false, help="train fc only")
    add("--img-size", type=int, default=224, help="pixels of the square that is trained on (default: %(default)s)")
    add("--epochs", type=int, default=30, help="default: %(default)s")
    add("--batch-size", type=int, default=16, help="images a step (default: %(default)s)")
    add("--lr", type=float, default=0.001, help="learning rate at the start (default: %(default)s)")
    add("--lrf", type=float, default=0.1, help="learning rate at the end, as a part of --lr (default: %(default)s)")
    add("--device", default="cuda", help="cuda, cuda:1 (or 1), mps or cpu (default: cuda, else the CPU)")
    add("--amp", choices=("auto", "on", "off"), default="auto", help="mixed precision (default: where it is faster)")
    add("--workers", type=int, help="processes that read images (default: one a core, at most 8)")
    add("--seed", type=int, default=0, help="of weights, order and augmentation (default: %(default)s)")
    add("--name", default="flower_experiment", help="of the run's folder under runs/ (default: %(default)s)")
    add(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on with a run (default: the newest), as if never stopped",
    )
    add("--allow-changed-data", action="store_true", help="--resume: also where files have been added, changed or lost")
    add("--strict", action="store_true", help="end where an image cannot be used, instead of leaving it out")
    add("--histograms", choices=("first", "all"), default="first", help="of two convolutions, or of all and gradients")
    add("--save-every", type=int, default=0, help="also keep a plain state_dict every N epochs")
    args = parser.parse_args(argv)
    if args.download:
        args.data_path = args.data_path or str(FLOWER_PHOTOS)

    for flag, fits, need in [
        ("val_rate", 0 < args.val_rate < 1, "above 0 and below 1"),
        ("num_classes", args.num_classes is None or args.num_classes >= 2, "at least 2"),
        ("img_size", args.img_size >= 32, "at least 32"),
        ("epochs", args.epochs >= 1, "at least 1"),
        ("batch_size", args.batch_size >= 1, "at least 1"),
        ("batch_size", args.batch_size >= 2 or args.img_size > 32, "at least 2 for images of 32 pixels"),
        ("lr", 0 < args.lr < math.inf, "above 0"),
        ("lrf", 0 <= args.lrf < math.inf, "at least 0"),
        ("workers", args.workers is None or args.workers >= 0, "at least 0"),
        ("seed", 0 <= args.seed < 2**63, "at least 0 and below 2**63"),
        ("name", args.name == Path(args.name).name and args.name[:1] not in ("", "."), "a plain folder name"),
        ("save_every", args.save_every >= 0, "at least 0"),
    ]:
        if not fits:
            parser.error(f"--{flag.replace('_', '-')} is {json.dumps(getattr(args, flag))}; it must be {need}")
    return args


def resume(given: argparse.Namespace, argv: list[str]) -> tuple[argparse.Namespace, list[str], bool]:
    """The flags and the command line of the run that a command line, parsed and not, wants to go on; is it complete?

    Raises:
        UsageError: there is no such run, or a flag contradicts how it was started.
        WeightsError: its checkpoint is damaged.
    """
    folder = find_run(given.resume)
    progress = read_checkpoint(folder / "weights" / "last.pth")["resume"]
    command = progress["command"]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            before = parse_args(command)
    except SystemExit as error:
        raise WeightsError(f"{folder / 'weights' / 'last.pth'}: damaged, its command line is not train.py's") from error
    args = parse_args(command + argv)
    for flag, value in vars(before).items():
        if flag not in MAY_CHANGE and getattr(args, flag) != value:
            raise UsageError(
                f"--{flag.replace('_', '-')}: the run {folder} was started with {value}; leave the flag out to go on "
                f"with it, or start a new run"
            )
    if args.epochs < before.epochs:
        raise UsageError(f"--epochs: the run {folder} was started with {before.epochs}; it can only be more")
    args.resume, args.download = str(folder), given.download
    changed = [flag for flag in ("epochs", "data_path", "val_path") if getattr(args, flag) != getattr(before, flag)]
    return args, command + as_words(args, changed), progress["epoch"] >= args.epochs


def as_words(args: argparse.Namespace, flags: Sequence[str]) -> list[str]:
    """Flags as on a command line; paths in full, as a run may go on from another folder."""
    values = {flag: getattr(args, flag) for flag in flags if getattr(args, flag) is not None}
    return [
        f"--{flag.replace('_', '-')}={Path(value).absolute() if flag.endswith('_path') else value}"
        for flag, value in values.items()
    ]


def main(argv: list[str] | None = None) -> int:
    """The program; its exit status."""
    tolerate_any_name()
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    try:
        command = argv + as_words(args, ("data_path", "val_path"))
        if args.resume is not None:
            args, command, complete = resume(args, argv)
            if complete:
                again = f"{args.epochs} epochs; --epochs with a larger number goes on"
                print(f"{printable(args.resume)} is complete: {again}")
                return 0
        train(args, command)
    except BrokenPipeError:  # `train.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("train.py: error: the output is closed; --resume goes on", file=sys.stderr)
        return 1
    except (DataError, EmptyLoaderError, WeightsError, UsageError, FloatingPointError, OSError) as error:
        print(f"train.py: error: {printable(str(error))}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            sizes = f"--batch-size {args.batch_size} and --img-size {args.img_size}"
            reason = f"out of memory with {sizes}: lower one of them"
        elif is_dead_worker(error):
            reason = "a process that reads images died: too little memory or /dev/shm (try --workers 0), or a bad image"
        else:
            raise
        print(f"train.py: error: {reason}", file=sys.stderr)
        return 1
    except StopRequest as stop:
        return 128 + stop.number
    except KeyboardInterrupt:
        print("train.py: stopped before the first step", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
