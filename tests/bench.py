"""Benchmark the project against the tutorial's loop and against the limits of the machine.

python tests/bench.py train --data-path flower_photos       # whole epochs, ours against the tutorial's loop
python tests/bench.py plain --data-path flower_photos       # the same against a plain loop in bfloat16
python tests/bench.py evaluate --data-path flower_photos    # evaluation alone, ours against the tutorial's
python tests/bench.py ceiling --data-path flower_photos     # our step against the same step on data in memory
python tests/bench.py ceiling --large                       # the same on drawn JPEGs of 4000 x 3000 px
python tests/bench.py loading                               # loading alone of these JPEGs, cached against decoded
python tests/bench.py logging --data-path flower_photos     # epochs with TensorBoard and checkpoints, and without
python tests/bench.py predict --data-path flower_photos     # predict.py on one image, and on 500
python tests/bench.py export                                # exported files against the network, batches of 1 and 8
python tests/bench.py startup --data-path flower_photos     # train.py up to the end of its first step
python tests/bench.py memory --data-path flower_photos      # peak memory of training (Linux)
python tests/bench.py losses --data-path flower_photos      # the first 20 losses, ours and the tutorial's
python tests/bench.py accuracy --data-path flower_photos    # recipes in equal time: accuracy over minutes
python tests/bench.py scaling --data-path flower_photos     # two processes of one thread against one of two

Comparisons run in rounds A B, B A, A B, ..., because a machine's speed drifts. Each round gives one ratio. The median
ratio and its range are printed, and the rounds are appended to a CSV file. The default dataset is the drawn sample.
"""

import argparse
import collections
import contextlib
import copy
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accuracy import compare_recipes
from exported_speed import compare_exported, save_network
from measuring import (
    ROOT,
    Comparison,
    Ours,
    compare,
    hardware,
    programs,
    seconds_of,
    seconds_of_epochs,
    seconds_of_program,
    subset,
)
from plain_loop import plain_baseline
from tutorial_loop import (
    TutorialDataSet,
    baseline,
    tutorial_epoch,
    tutorial_evaluate,
    tutorial_loader,
    tutorial_optimizer,
    tutorial_transforms,
)

from classifier import Classifier
from cli_utils import select_device
from model import MODELS
from my_dataset import EvalTransform, MyDataSet, TrainTransform, prepare_batch
from sample_flowers import CLASS_NAMES, draw_flower


def bench_train(args: argparse.Namespace) -> None:
    """Compare whole epochs with the tutorial's, including evaluation, logging and checkpoints."""
    compare_epochs(args, "baseline", "tutorial")


def bench_plain(args: argparse.Namespace) -> None:
    """Compare whole epochs with those of a plain loop in bfloat16, without figures."""
    compare_epochs(args, "plain-baseline", "plain")


def compare_epochs(args: argparse.Namespace, baseline: str, name: str) -> None:
    """Compare our epochs, from the second on, with those of a baseline."""
    if args.epochs < 2:
        sys.exit("train and plain compare epochs from the second on: --epochs 2 or more")
    with subset(args.data_path, args.images) as data:
        ours, theirs = programs(args, data, baseline)
        comparison = Comparison(args, "training", "ours", name)
        compare(comparison, lambda: seconds_of_epochs(ours), lambda: seconds_of_epochs(theirs))


def bench_evaluate(args: argparse.Namespace) -> None:
    """Compare one pass over the images of both splits, from files to accuracy."""
    with subset(args.data_path, args.images) as data:
        ours = Ours(args, data)
        paths = ours.split.train_paths + ours.split.val_paths
        labels = ours.split.train_labels + ours.split.val_labels
        loader = ours.val_loader(MyDataSet(paths, labels, EvalTransform(args.img_size)))
        model = copy.deepcopy(ours.model).to(memory_format=torch.contiguous_format)
        tutorial_set = TutorialDataSet(paths, labels, tutorial_transforms(args.img_size)[1])
        their_loader = tutorial_loader(tutorial_set, args.batch_size, shuffle=False)
        ours.evaluate(loader)  # starts the persistent workers
        compare(
            Comparison(args, "evaluation", "ours", "tutorial", images=len(paths)),
            lambda: seconds_of(lambda: ours.evaluate(loader)),
            lambda: seconds_of(lambda: tutorial_evaluate(model, their_loader, ours.device)),
        )


def bench_ceiling(args: argparse.Namespace) -> None:
    """Compare our training epoch from files with the same steps on a batch that is already in memory."""
    with drawn_large_images(args.images or 200) if args.large else subset(args.data_path, args.images) as data:
        ours = Ours(args, data)
        batch = next(iter(ours.train_loader))
        if ours.device.type == "cuda":
            batch = [tensor.pin_memory() for tensor in batch]
        in_memory = [batch] * len(ours.train_loader)
        ours.train(ours.train_loader)
        compare(
            Comparison(args, "large files" if args.large else "files", "files", "memory", len(ours.train_set)),
            lambda: seconds_of(lambda: ours.train(ours.train_loader), ours.device),
            lambda: seconds_of(lambda: ours.train(in_memory), ours.device),
        )


def bench_loading(args: argparse.Namespace) -> None:
    """Compare loading large images from the cache with decoding all of them again."""
    with drawn_large_images(args.images or 200) as data:
        ours = Ours(args, data)
        paths, labels = ours.split.train_paths, ours.split.train_labels
        again_set = MyDataSet(paths, labels, TrainTransform(args.img_size))
        again_loader = ours.loader(again_set)
        for loader in (ours.train_loader, again_loader):  # starts the persistent workers and fills the cache
            collections.deque(loader, maxlen=0)
        compare(
            Comparison(args, "loading large files", "kept", "decoded", len(paths)),
            lambda: seconds_of(lambda: collections.deque(ours.train_loader, maxlen=0)),
            lambda: seconds_of(lambda: collections.deque(again_loader, maxlen=0)),
        )


@contextlib.contextmanager
def drawn_large_images(images: int):
    """Yield a folder of `images` JPEG files of 4000 x 3000 px, links to two drawn flowers per class."""
    with tempfile.TemporaryDirectory() as folder:
        for kind in CLASS_NAMES:
            Path(folder, kind).mkdir()
            for index in range(math.ceil(images / len(CLASS_NAMES))):
                path = Path(folder, kind, f"{index:04d}.jpg")
                if index < 2:
                    draw_flower(kind, index, size=4000).crop((0, 500, 4000, 3500)).save(path, quality=90)
                else:
                    path.symlink_to(path.with_name(f"{index % 2:04d}.jpg"))
        yield Path(folder)


WITHOUT_LOGGING = """
import sys
sys.path.insert(0, {root!r})
import run_state, train
train.TensorBoardLogger = lambda *arguments, **keywords: train.NullLogger()
train.Run.save = lambda run: None
run_state.best_content = lambda run: {{}}
sys.exit(train.main(sys.argv[1:]))
"""


def bench_logging(args: argparse.Namespace) -> None:
    """Compare train.py's epochs with the same epochs without TensorBoard, figures, files and checkpoints."""
    with subset(args.data_path, args.images) as data:
        ours, _ = programs(args, data)
        without = [sys.executable, "-c", WITHOUT_LOGGING.format(root=str(ROOT)), *ours[2:]]
        compare(
            Comparison(args, "logging and checkpoints", "without", "with"),
            lambda: printed_seconds_of_epochs(without),
            lambda: printed_seconds_of_epochs(ours),
        )


def printed_seconds_of_epochs(command: list[str]) -> float:
    """Run train.py in its own folder, and add up the seconds that it prints for each epoch."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    epochs = [line for line in done.stdout.splitlines() if line.startswith("[epoch ")]
    return sum(float(line.split(" s")[0].split()[-1]) for line in epochs)


IMPORTS = [sys.executable, "-c", "import torch, torchvision.transforms.v2"]


def bench_predict(args: argparse.Namespace) -> None:
    """Compare predict.py on one image with the import of PyTorch, and on 500 images with evaluation."""
    with subset(args.data_path, args.images or 500) as data, tempfile.TemporaryDirectory() as folder:
        ours = Ours(args, data)
        weights = save_network(args, ours.split.class_names, folder)
        paths = ours.split.train_paths + ours.split.val_paths
        command = [sys.executable, str(ROOT / "predict.py"), paths[0], "--weights", str(weights)]
        command += ["--device", args.device, "--amp", args.amp]
        compare(
            Comparison(args, "predict.py on one image", "import", "predict"),
            lambda: seconds_of_program(IMPORTS, folder),
            lambda: seconds_of_program(command, folder),
        )
        command[2] = str(data)
        dataset = MyDataSet(paths, [0] * len(paths), EvalTransform(args.img_size))
        loader = ours.val_loader(dataset)
        classifier = Classifier(weights, ours.device, ours.amp_dtype)
        ours.evaluate(loader)
        compare(
            Comparison(args, f"prediction of {len(paths)} images", "evaluate", "predict", len(paths)),
            lambda: seconds_of(lambda: ours.evaluate(loader)),
            lambda: seconds_of(lambda: list(classifier.classify(paths))),
        )
        compare(
            Comparison(args, f"predict.py on {len(paths)} images, as a program", "evaluate", "predict", len(paths)),
            lambda: seconds_of(lambda: ours.evaluate(loader)),
            lambda: seconds_of_program(command, folder),
        )


FIRST_STEP = """
import os, sys, time
sys.path.insert(0, {root!r})
import train
step = train.train_one_epoch
def first_step(model, optimizer, loader, *arguments, steps, **keywords):
    print("first batch", time.time(), flush=True)
    step(model, optimizer, [next(iter(loader))], *arguments, steps=steps[:1], **keywords)
    print("first step", time.time(), flush=True)
    os._exit(0)
train.train_one_epoch = first_step
sys.exit(train.main(sys.argv[1:]))
"""


def bench_startup(args: argparse.Namespace) -> None:
    """Compare train.py up to the end of its first step with the import of PyTorch."""
    with subset(args.data_path, args.images) as data, tempfile.TemporaryDirectory() as folder:
        flags = programs(args, data)[0][2:]
        command = [sys.executable, "-c", FIRST_STEP.format(root=str(ROOT)), *flags]
        compare(
            Comparison(args, "start to first step", "import", "train.py"),
            lambda: seconds_of_program(IMPORTS, folder),
            lambda: seconds_of_program(command, folder),
        )


def bench_memory(args: argparse.Namespace) -> None:
    """Measure the peak memory of training over all processes, counting shared memory once (Linux)."""
    with subset(args.data_path, args.images) as data:
        ours, theirs = programs(args, data)
        for number in range(args.rounds):
            for name, command in [("ours", ours), ("tutorial", theirs)]:
                print(f"round {number + 1}: {name} {peak_memory(command) / 2**20:.0f} MiB", flush=True)


def peak_memory(command: list[str]) -> int:
    """Return the peak proportional set size of a program and its children, in bytes."""
    peak = 0
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, start_new_session=True)
        while run.poll() is None:
            held = 0
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if os.getsid(int(process.name)) == run.pid:
                        rollup = (process / "smaps_rollup").read_text(encoding="ascii")
                        held += 1024 * int(rollup.partition("\nPss:")[2].split()[0])
            peak = max(peak, held)
            time.sleep(0.1)
        if run.returncode:
            sys.exit(f"{command[1]} failed")
    return peak


def bench_losses(args: argparse.Namespace) -> None:
    """Compare 20 losses from the same weights on the same batches: ours, without mixed precision, and the tutorial's.

    Training from scratch amplifies every rounding error, so the losses diverge. Two controls put this into perspective:
    the tutorial on one thread, which sums in another order, and our loss at the tutorial's weights of each step.
    """
    args.amp, args.device = "off", "cpu"
    with subset(args.data_path, args.images) as data:
        ours, in_step = Ours(args, data), Ours(args, data)
        batches = [(prepare_batch(images, "cpu"), labels) for images, labels in itertools.islice(ours.train_loader, 20)]
    initial = copy.deepcopy(ours.model.state_dict())
    losses: dict[str, list[float]] = {name: [] for name in ("ours", "tutorial", "one thread", "same weights")}

    def start(threads: int) -> tuple[torch.nn.Module, torch.optim.Optimizer, int]:
        model = MODELS[args.model](num_classes=len(ours.split.class_names))
        model.load_state_dict(initial)
        return model, tutorial_optimizer(model), threads

    tutorial, single = start(torch.get_num_threads()), start(1)
    for images, labels in batches:
        in_step.model.load_state_dict(tutorial[0].state_dict())
        losses["same weights"].append(in_step.train([(images, labels)]))
        losses["ours"].append(ours.train([(images, labels)]))
        for name, (model, optimizer, threads) in [("one thread", single), ("tutorial", tutorial)]:
            torch.set_num_threads(threads)
            losses[name] += tutorial_epoch(model, optimizer, [(images.contiguous(), labels)], "cpu", 0)
    print(f"{hardware(ours.device)}\nstep  {'  '.join(f'{name:>12}' for name in losses)}")
    for step, row in enumerate(zip(*losses.values(), strict=True)):
        print(f"{step:4}  {'  '.join(f'{loss:12.7f}' for loss in row)}")
    for name in ("same weights", "ours", "one thread"):
        differences = [abs(a - b) / b for a, b in zip(losses[name], losses["tutorial"], strict=True)]
        print(f"largest relative difference from the tutorial, {name}: {max(differences):.1e}")


def bench_scaling(args: argparse.Namespace) -> None:
    """Compare two processes of one thread with one of two at the same global batch, and estimate the speed-up on GPUs.

    On CUDA, compare one process under torchrun with one without.
    """
    device = torch.device(args.device)
    processes, threads = (1, torch.get_num_threads()) if device.type == "cuda" else (2, 1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    whole = args.batch_size
    with subset(args.data_path, args.images) as data:
        alone, _ = programs(args, data)
        args.batch_size = whole // processes
        together, _ = programs(args, data)
        args.batch_size = whole
        comparison = Comparison(args, "scaling", "one process", f"torchrun, {processes} of {threads} threads")
        compare(
            comparison,
            lambda: seconds_of_epochs(["env", f"OMP_NUM_THREADS={processes * threads}", *alone]),
            lambda: seconds_of_epochs(["env", f"OMP_NUM_THREADS={threads}", *torchrun, *together[1:]]),
        )
    if device.type == "cuda":
        return
    sizes = ["--model", args.model, "--img-size", str(args.img_size), "--batch-size", str(whole // processes)]
    command = ["env", "OMP_NUM_THREADS=1", *torchrun, str(Path(__file__).with_name("communication.py")), *sizes]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    found = json.loads(said.splitlines()[-1])
    waiting, reducing = 1 - found["without"] / found["step"], found["all-reduce"] / found["profiled step"]
    print(
        f"  a step of {found['step']:.3f} s, {found['without']:.3f} s without communication: {waiting:.1%} is waiting"
    )
    print(f"  the profiler: all-reduce runs during {reducing:.1%} of a step")
    print(
        f"  estimate for {found['bytes'] / 1e6:.1f} MB of gradients and {args.gpu_step:g} ms a step of one GPU, by ring"
    )
    print("  all-reduce, none of it hidden by the backward pass:")
    for where, count, gigabytes in [("8 GPUs, NVLink, 200 GB/s", 8, 200), ("2 x 8, InfiniBand, 25 GB/s", 16, 25)]:
        reduce = 2 * (count - 1) / count * found["bytes"] / gigabytes / 1e6  # milliseconds
        speed = count * args.gpu_step / (args.gpu_step + reduce)
        print(f"    {where}: {reduce:.1f} ms of all-reduce, {speed:.1f} times one GPU ({speed / count:.0%})")


def main() -> None:
    """Parse the command line and run the benchmark."""
    benches = {name.removeprefix("bench_"): run for name, run in globals().items() if name.startswith("bench_")}
    benches |= {"accuracy": compare_recipes, "export": compare_exported}
    baselines = {"baseline": baseline, "plain-baseline": plain_baseline}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("bench", choices=[*benches, *baselines], help="what to measure, or a baseline alone")
    add("--data-path", help="folder with one sub-folder per class (default: the drawn sample)")
    add("--images", type=int, default=0, help="number of images to use, over all classes (default: all)")
    add("--large", action="store_true", help="ceiling: use drawn JPEGs of 4000 x 3000 px")
    add("--rounds", type=int, default=3, help="number of rounds (default: %(default)s)")
    add("--epochs", type=int, default=2, help="epochs per training (default: %(default)s)")
    add("--kinds", nargs="+", default=["tutorial", "scratch"], help="accuracy: recipes (default: tutorial scratch)")
    add("--minutes", type=float, default=25, help="accuracy: minutes per training (default: %(default)s); 0: --epochs")
    add("--set-aside", action="store_true", help="accuracy: evaluate on the held-out test images, for final figures")
    add("--model", help="network (default: resnet34; accuracy: the recipe's)")
    add("--img-size", type=int, help="input size in pixels (default: 224; accuracy: chosen for the time)")
    add("--batch-size", type=int, default=16, help="images per batch (default: %(default)s)")
    add("--device", default="cuda", help="cuda or cpu (default: cuda if available)")
    add("--seed", type=int, default=0, help="baseline: random seed for weights and order (default: %(default)s)")
    add("--workers", type=int, help="DataLoader workers of train.py (default: its own)")
    add("--amp", default="auto", help="mixed precision of train.py: auto, on or off (default: %(default)s)")
    add(
        "--gpu-step",
        type=float,
        default=20,
        help="scaling: milliseconds per step on a GPU, for the estimate (default: %(default)s)",
    )
    add(
        "--csv",
        help="file to append the rounds to (default: bench.csv; accuracy: accuracy.csv, with its curves in a PNG)",
    )
    args = parser.parse_args()
    if args.bench == "accuracy" and (args.images or args.batch_size != parser.get_default("batch_size")):
        parser.error("accuracy uses all images and the recipe's batch size (--kinds scratch:batch_size=64 changes it)")
    if args.bench != "accuracy":
        args.model, args.img_size = args.model or "resnet34", args.img_size or 224
    args.csv = args.csv or ("accuracy.csv" if args.bench == "accuracy" else "bench.csv")
    args.device = str(select_device(args.device))  # reports a missing GPU only once
    (benches | baselines)[args.bench](args)


if __name__ == "__main__":
    main()
