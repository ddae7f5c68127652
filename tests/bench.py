"""The project's ruler: how fast it is, against the tutorial's loop and against what the machine can do.

python tests/bench.py train --data-path flower_photos       # whole epochs, ours against the tutorial's loop
python tests/bench.py evaluate --data-path flower_photos    # evaluation alone, likewise
python tests/bench.py ceiling --data-path flower_photos     # our step against the same step on data in memory
python tests/bench.py ceiling --large                       # ... on drawn JPEGs of 4000 x 3000 px
python tests/bench.py loading                               # images a second for a device that takes no time, on these
python tests/bench.py logging --data-path flower_photos     # TensorBoard and checkpoints, their part of an epoch
python tests/bench.py predict --data-path flower_photos     # predict.py: one image, and 500
python tests/bench.py startup --data-path flower_photos     # train.py until its first step is done
python tests/bench.py memory --data-path flower_photos      # peak memory of training (Linux)
python tests/bench.py losses --data-path flower_photos      # the first 20 losses, ours and the tutorial's
python tests/bench.py accuracy --data-path flower_photos    # recipes, in equal time: accuracy over minutes
python tests/bench.py scaling --data-path flower_photos     # two processes of one thread against one of two

Two things are compared in rounds, A B, B A, A B, ..., as a machine's speed wanders; of each round the ratio counts.
The median ratio and its spread are printed, and the rounds added to a CSV file. Without --data-path the drawn sample
serves.
"""

import argparse
import collections
import contextlib
import copy
import csv
import datetime
import functools
import hashlib
import io
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tutorial_loop import (
    TutorialDataSet,
    baseline,
    tutorial_epoch,
    tutorial_evaluate,
    tutorial_loader,
    tutorial_optimizer,
    tutorial_transforms,
)

import predict
import report
import run_utils
import train
from data_utils import find_split
from loaders import find_data, make_loader, make_val_loader
from model import MODELS, to_device
from my_dataset import EpochSampler, EvalTransform, MyDataSet, ShareSampler, TrainTransform, prepare_batch
from optimization import make_optimizer
from program_utils import available_cores, available_memory, describe_device, select_device, select_precision
from ranks import Ranks
from sample_flowers import CLASS_NAMES, draw_flower
from train_eval_utils import collect_logits, train_one_epoch

# --- measuring ----------------------------------------------------------------------------------------------------


def hardware(device: torch.device) -> str:
    """The machine, in a line."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    bf16 = "bfloat16" if select_precision("auto", torch.device("cpu"))[0] else "no bfloat16"
    where = f", {describe_device(device)}" if device.type != "cpu" else ""
    return f"{available_cores()} cores of {name} ({bf16}){where}; torch {torch.__version__}, {platform.system()}"


class Comparison:
    """How many times as long B takes as A, over some rounds; printed, and added to the CSV file."""

    def __init__(self, args: argparse.Namespace, what: str, a: str, b: str, images: int = 0) -> None:
        self.args, self.what, self.a, self.b, self.images = args, what, a, b, images
        self.rounds: dict[str, list[tuple[float, float]]] = {}  # by figure, where a round gives several
        self.hardware = hardware(select_device(args.device))
        names = ("model", "img_size", "batch_size", "images", "epochs", "workers", "amp", "data_path")
        self.settings = ", ".join(f"{name} {getattr(args, name)}" for name in names)
        print(f"{what}\n  {self.hardware}\n  {self.settings}", flush=True)

    def add(self, seconds_a: float, seconds_b: float, figure: str = "") -> None:
        """A round."""
        self.rounds.setdefault(figure, []).append((seconds_a, seconds_b))
        number = len(self.rounds[figure])
        print(f"  round {number} {figure:12} {self.a} {seconds_a:.3f} s, {self.b} {seconds_b:.3f} s", flush=True)
        row = {
            "time": datetime.datetime.now().isoformat(timespec="seconds"),
            "hardware": self.hardware,
            "settings": self.settings,
            "what": self.what,
            "figure": figure,
            "round": number,
            "a": self.a,
            "b": self.b,
            "a_seconds": round(seconds_a, 4),
            "b_seconds": round(seconds_b, 4),
            "b_over_a": round(seconds_b / seconds_a, 4),
        }
        append_rows([row], self.args.csv)

    def report(self) -> None:
        """The median ratio of each figure, its spread, and the median times."""
        for figure, pairs in self.rounds.items():
            ratios = [seconds_b / seconds_a for seconds_a, seconds_b in pairs]
            medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
            speeds = [f" ({self.images / seconds:.1f} images/s)" if self.images else "" for seconds in medians]
            print(
                f"  {figure} {self.b}/{self.a}: {statistics.median(ratios):.3f} "
                f"({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} rounds); "
                f"medians: {self.a} {medians[0]:.3f} s{speeds[0]}, {self.b} {medians[1]:.3f} s{speeds[1]}"
            )


def append_rows(rows: list[dict], path: str | os.PathLike) -> None:
    """Add lines to a CSV file, or begin one."""
    write_header = not Path(path).exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        if write_header:
            writer.writeheader()
        writer.writerows(rows)


def compare(comparison: Comparison, measure_a: Callable, measure_b: Callable) -> None:
    """Rounds A B, B A, A B, ...; each function gives seconds, or a dict of several figures in seconds."""
    for number in range(comparison.args.rounds):
        if number % 2 == 0:
            a, b = measure_a(), measure_b()
        else:
            b, a = measure_b(), measure_a()
        if isinstance(a, dict):
            for figure in a:
                comparison.add(a[figure], b[figure], figure)
        else:
            comparison.add(a, b)
    comparison.report()


def seconds_of(action: Callable, device: torch.device | None = None) -> float:
    """How long a call takes, what it leaves to do on a GPU included."""
    start = time.perf_counter()
    action()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def seconds_of_program(command: list, folder: str | os.PathLike) -> float:
    """How long a program takes from start to end."""
    return seconds_of(lambda: subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL))


def seconds_of_epochs(command: list) -> dict[str, float]:
    """A training program in a folder of its own: the median of its epochs from the second on, and from start to end."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
            ends = [time.perf_counter() for line in run.stdout if line.startswith("[epoch ")]
            complaint = run.stderr.read()
        if run.returncode:
            sys.exit(complaint)
        epochs = [later - earlier for earlier, later in itertools.pairwise(ends)]
        return {"epoch": statistics.median(epochs), "start to end": time.perf_counter() - start}


def programs(args: argparse.Namespace, data: Path) -> tuple[list[str], list[str]]:
    """The command lines of our training, with its default flags but for those given, and of the baseline's."""
    flags = ["--data-path", str(data), "--epochs", str(args.epochs), "--device", args.device]
    flags += ["--model", args.model, "--img-size", str(args.img_size), "--batch-size", str(args.batch_size)]
    return [
        [sys.executable, str(ROOT / "train.py"), *flags, *our_flags(args)],
        [sys.executable, __file__, "baseline", *flags],
    ]


def our_flags(args: argparse.Namespace) -> list[str]:
    """Those that the baseline does not have."""
    workers = [] if args.workers is None else ["--workers", str(args.workers)]
    return ["--amp", args.amp, *workers]


@contextlib.contextmanager
def subset(data_path: str | None, images: int):
    """A folder of links to the first images of each class, so many of all classes together; 0: all of them."""
    data_path = Path(data_path or drawn_sample())
    split, _ = find_split(data_path)
    by_class = {name: [] for name in split.class_names}
    labelled = zip(split.train_paths + split.val_paths, split.train_labels + split.val_labels, strict=True)
    for path, label in sorted(labelled):
        by_class[split.class_names[label]].append(Path(path).resolve())
    total = len(split.train_paths) + len(split.val_paths)
    part = min(1.0, images / total) if images else 1.0
    with tempfile.TemporaryDirectory() as folder:
        for name, paths in by_class.items():
            Path(folder, name).mkdir()
            for path in paths[: round(len(paths) * part)]:
                Path(folder, name, path.name).symlink_to(path)
        yield Path(folder)


def drawn_sample() -> Path:
    """The built-in data set, drawn if it is not there yet."""
    return Path(find_data(argparse.Namespace(download=False, data_path=None)))


class Ours:
    """The parts of our training in this process, made as train.py makes them."""

    def __init__(self, args: argparse.Namespace, data: Path) -> None:
        flags = ["--data-path", str(data), "--device", args.device, "--model", args.model, *our_flags(args)]
        flags += ["--img-size", str(args.img_size), "--batch-size", str(args.batch_size)]
        self.args = train.parse_args(flags)
        self.device = select_device(args.device)
        self.amp_dtype, _ = select_precision(args.amp, self.device)
        self.split, _ = find_split(data)
        self.train_set = MyDataSet(
            self.split.train_paths,
            self.split.train_labels,
            TrainTransform(args.img_size),
            cache_bytes=available_memory() // 8,
        )
        self.train_loader = self.loader(self.train_set)
        torch.manual_seed(0)
        self.model = to_device(MODELS[args.model](num_classes=len(self.split.class_names)), self.device)
        self.optimizer = make_optimizer(self.model, self.args, self.device)

    def loader(self, train_set: MyDataSet) -> DataLoader:
        """Of training batches, in the order of the first epoch."""
        batches = ShareSampler(EpochSampler(len(train_set)), self.args.batch_size)
        return make_loader(train_set, batches, self.args, self.device, Ranks())

    def val_loader(self, images: MyDataSet) -> DataLoader:
        """Of evaluation batches."""
        return make_val_loader(images, self.args, self.device, Ranks())

    def train(self, loader) -> float:
        """An epoch of `loader`; the mean loss."""
        return train_one_epoch(self.model, self.optimizer, loader, self.device, 0, amp_dtype=self.amp_dtype)

    def evaluate(self, loader) -> torch.Tensor:
        """The logits."""
        return collect_logits(self.model, loader, self.device, amp_dtype=self.amp_dtype)[0]


# --- the figures --------------------------------------------------------------------------------------------------


def bench_train(args: argparse.Namespace) -> None:
    """Whole epochs, with evaluation, logging and checkpoint."""
    if args.epochs < 2:
        sys.exit("train compares epochs from the second on: --epochs 2 or more")
    with subset(args.data_path, args.images) as data:
        ours, theirs = programs(args, data)
        comparison = Comparison(args, "training", "ours", "tutorial")
        compare(comparison, lambda: seconds_of_epochs(ours), lambda: seconds_of_epochs(theirs))


def bench_evaluate(args: argparse.Namespace) -> None:
    """One pass over the images of both splits, from files to accuracy."""
    with subset(args.data_path, args.images) as data:
        ours = Ours(args, data)
        paths = ours.split.train_paths + ours.split.val_paths
        labels = ours.split.train_labels + ours.split.val_labels
        loader = ours.val_loader(MyDataSet(paths, labels, EvalTransform(args.img_size)))
        model = copy.deepcopy(ours.model).to(memory_format=torch.contiguous_format)
        tutorial_set = TutorialDataSet(paths, labels, tutorial_transforms(args.img_size)[1])
        their_loader = tutorial_loader(tutorial_set, args.batch_size, shuffle=False)
        ours.evaluate(loader)  # starts the workers, which stay
        compare(
            Comparison(args, "evaluation", "ours", "tutorial", images=len(paths)),
            lambda: seconds_of(lambda: ours.evaluate(loader)),
            lambda: seconds_of(lambda: tutorial_evaluate(model, their_loader, ours.device)),
        )


def bench_ceiling(args: argparse.Namespace) -> None:
    """Our epoch of training from files, against the same steps on a batch that is in memory already."""
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
    """Epochs of loading alone, of large images: those that are kept in memory, against all of them decoded again."""
    with drawn_large_images(args.images or 200) as data:
        ours = Ours(args, data)
        paths, labels = ours.split.train_paths, ours.split.train_labels
        again_set = MyDataSet(paths, labels, TrainTransform(args.img_size))
        again_loader = ours.loader(again_set)
        for loader in (ours.train_loader, again_loader):  # starts the workers, which stay, and fills the memory
            collections.deque(loader, maxlen=0)
        compare(
            Comparison(args, "loading large files", "kept", "decoded", len(paths)),
            lambda: seconds_of(lambda: collections.deque(ours.train_loader, maxlen=0)),
            lambda: seconds_of(lambda: collections.deque(again_loader, maxlen=0)),
        )


@contextlib.contextmanager
def drawn_large_images(images: int):
    """JPEG files of 4000 x 3000 px, two drawn flowers a class, linked as often as it takes for so many images."""
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


def bench_logging(args: argparse.Namespace) -> None:
    """The part of the epochs that the report (TensorBoard, files, figures) and the checkpoints take, in train.py.

    With --epochs 2 or less every epoch draws all figures, which longer runs do after the 1st, 2nd, 4th, 8th, ... only.
    """
    spent = []

    def timed(function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapper(*arguments, **keywords):
            start = time.perf_counter()
            result = function(*arguments, **keywords)
            spent.append(time.perf_counter() - start)
            return result

        return wrapper

    for name in ("step", "epoch", "flush"):
        setattr(report.Report, name, timed(getattr(report.Report, name)))
    for name in ("save_checkpoint", "event_sizes"):
        setattr(run_utils, name, timed(getattr(run_utils, name)))
    comparison = Comparison(args, "part of an epoch", "epochs", "logging")
    with subset(args.data_path, args.images) as data, tempfile.TemporaryDirectory() as folder:
        flags = programs(args, data)[0][2:]
        here = Path.cwd()
        for _ in range(args.rounds):
            spent.clear()
            os.chdir(folder)
            with contextlib.redirect_stdout(io.StringIO()) as said:
                status = train.main(flags)
            os.chdir(here)
            if status:
                sys.exit("train.py failed")
            epochs = [line for line in said.getvalue().splitlines() if line.startswith("[epoch ")]
            comparison.add(sum(float(line.split(" s")[0].split()[-1]) for line in epochs), sum(spent))
    comparison.report()


IMPORTS = [sys.executable, "-c", "import torch, torchvision.transforms.v2"]


def bench_predict(args: argparse.Namespace) -> None:
    """predict.py on one image against the import of PyTorch, and on 500 images against evaluation."""
    with subset(args.data_path, args.images or 500) as data, tempfile.TemporaryDirectory() as folder:
        ours = Ours(args, data)
        weights = Path(folder, "best.pth")
        content = {"model": args.model, "class_names": ours.split.class_names, "img_size": args.img_size}
        torch.save(content | {"state_dict": ours.model.state_dict()}, weights)
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
        files = [predict.ImageFile(path, None, path) for path in paths]
        predict_files = functools.partial(
            predict.predict_images, ours.model, files, args.img_size, ours.device, ours.amp_dtype
        )
        ours.evaluate(loader)
        compare(
            Comparison(args, f"prediction of {len(paths)} images", "evaluate", "predict", len(paths)),
            lambda: seconds_of(lambda: ours.evaluate(loader)),
            lambda: seconds_of(lambda: list(predict_files())),
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
    """train.py until its first step is done, against the import of PyTorch."""
    with subset(args.data_path, args.images) as data, tempfile.TemporaryDirectory() as folder:
        flags = programs(args, data)[0][2:]
        command = [sys.executable, "-c", FIRST_STEP.format(root=str(ROOT)), *flags]
        compare(
            Comparison(args, "start to first step", "import", "train.py"),
            lambda: seconds_of_program(IMPORTS, folder),
            lambda: seconds_of_program(command, folder),
        )


def bench_memory(args: argparse.Namespace) -> None:
    """Peak memory of training, all processes together, what they share counted once (Linux)."""
    with subset(args.data_path, args.images) as data:
        ours, theirs = programs(args, data)
        for number in range(args.rounds):
            for name, command in [("ours", ours), ("tutorial", theirs)]:
                print(f"round {number + 1}: {name} {peak_memory(command) / 2**20:.0f} MiB", flush=True)


def peak_memory(command: list[str]) -> int:
    """The most bytes (proportional set size) that a program and its children hold at a time."""
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
    """The losses of 20 steps from the same weights on the same batches: ours, without mixed precision, and theirs.

    Training from scratch multiplies every rounding, so each goes its own way after a while. How far the tutorial goes
    from itself when it adds up in another order (on one thread) is the measure for that; and each loss of ours is
    computed from the weights that the tutorial has at that step, too.
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


def bench_accuracy(args: argparse.Namespace) -> None:
    """Recipes side by side, each for --minutes (0: for --epochs): accuracy over time, and the last one of each seed.

    A kind is a recipe of train.py ("scratch"), perhaps with changes ("scratch:lr=0.1,nesterov=False"), or "loop": the
    baseline, for --epochs. A fifth of the images is set aside by a hash of their names: choices are made without it,
    and --set-aside validates on it. Runs that are in the CSV file are not run again.
    """
    path, picture = Path(args.csv).with_name("accuracy.csv"), Path(args.csv).with_name("accuracy.png")
    settings = {"set": "set aside" if args.set_aside else "for choices"}
    settings["length"] = f"{args.minutes:g} minutes" if args.minutes else f"{args.epochs} epochs"
    settings |= {"model": args.model, "amp": args.amp, "hardware": hardware(select_device(args.device))}
    settings |= {"img_size": str(args.img_size or "planned"), "data_path": args.data_path or "sample"}
    with divided(args.data_path, args.set_aside) as data:
        for seed, kind in itertools.product(range(args.rounds), args.kinds):
            run = settings | {"kind": kind, "values": values_of(kind, args), "seed": str(seed)}
            if not any(run.items() <= row.items() for row in read_rows(path)):
                append_rows([run | row for row in train_for_minutes(args, data, kind, seed)], path)
            last = [row for row in read_rows(path) if run.items() <= row.items()][-1]
            print(f"seed {seed}  {kind:40} {last['accuracy']} after {last['at_minute']} min", flush=True)
    wanted = [settings | {"kind": kind, "values": values_of(kind, args)} for kind in args.kinds]
    rows = [row for row in read_rows(path) if any(kind.items() <= row.items() for kind in wanted)]
    print(f"{settings['hardware']}; {args.model}, {settings['length']}, validated on images {settings['set']}")
    for kind in args.kinds:
        ends = {row["seed"]: float(row["accuracy"]) for row in rows if row["kind"] == kind}
        print(f"{kind:40} mean {statistics.fmean(ends.values()):.4f} of {sorted(ends.values())}")
    draw_accuracy(rows, args.kinds, picture)
    print(f"curves: {picture}")


def values_of(kind: str, args: argparse.Namespace) -> str:
    """What a kind is, now: a recipe may become another one under the same name."""
    if kind == "loop":
        return f"{args.epochs} epochs"
    recipe, _, changes = kind.partition(":")
    return ", ".join(f"{name} {value}" for name, value in train.RECIPES[recipe].items()) + f"; {changes}"


def bench_scaling(args: argparse.Namespace) -> None:
    """Two processes of one thread against one of two, with the same global batch; and what eight GPUs would gain.

    On CUDA: one process under torchrun against one without.
    """
    device = select_device(args.device)
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


def read_rows(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file, if there is one."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@contextlib.contextmanager
def divided(data_path: str | None, set_aside: bool):
    """A folder `train` and one `val` of links: four fifths of the images divided again; or these, and the last fifth.

    By a hash of the files' names, so that it is the same everywhere.
    """
    split, _ = find_split(data_path or drawn_sample())
    with tempfile.TemporaryDirectory() as folder:
        images = zip(split.train_paths + split.val_paths, split.train_labels + split.val_labels, strict=True)
        for number, (path, label) in enumerate(images):
            digest = int(hashlib.sha256(Path(path).name.encode()).hexdigest(), 16)
            is_aside, is_val = digest % 5 == 0, digest // 5 % 4 == 0
            if is_aside and not set_aside:
                continue
            side = "val" if (is_aside if set_aside else is_val) else "train"
            link = Path(folder, side, split.class_names[label], f"{number}_{Path(path).name}")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(path).resolve())
        yield Path(folder)


def train_for_minutes(args: argparse.Namespace, data: Path, kind: str, seed: int) -> list[dict[str, str]]:
    """A training; of each epoch its end, in minutes from the program's start, and its accuracy."""
    recipe, _, changes = kind.partition(":")
    flags = ["--data-path", str(data), "--device", args.device, "--model", args.model]
    if kind == "loop":
        flags += ["--epochs", str(args.epochs), "--img-size", str(args.img_size or 224), "--seed", str(seed)]
        command = [sys.executable, __file__, "baseline", *flags]
    else:
        flags += ["--recipe", recipe, "--seed", str(seed), *our_flags(args)]
        flags += ["--time-budget", str(args.minutes)] if args.minutes else ["--epochs", str(args.epochs)]
        flags += ["--img-size", str(args.img_size)] if args.img_size else []
        changed = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train; train.RECIPES[{recipe!r}] |= "
        changed += f"dict({changes}); sys.exit(train.main(sys.argv[1:]))"
        command = [sys.executable, "-c", changed, *flags]
    with tempfile.TemporaryDirectory() as folder:
        start, rows = time.perf_counter(), []
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as run:
            for line in run.stdout:
                if line.startswith("[epoch ") and "accuracy " in line:
                    minutes = (time.perf_counter() - start) / 60
                    accuracy = line.split(" accuracy ")[1].split()[0]
                    rows.append({"epoch": str(len(rows)), "at_minute": f"{minutes:.2f}", "accuracy": accuracy})
        if run.returncode or not rows:
            sys.exit(f"{kind} failed")
        return rows


def draw_accuracy(rows: list[dict[str, str]], kinds: list[str], path: Path) -> None:
    """Accuracy over minutes: a colour a kind, a line a seed."""
    figure = Figure(figsize=(9, 5.5), dpi=100, layout="constrained")
    axes = figure.add_subplot(xlabel="minutes", ylabel="validation accuracy")
    for number, kind in enumerate(kinds):
        for seed in sorted({row["seed"] for row in rows if row["kind"] == kind}):
            run = [row for row in rows if (row["kind"], row["seed"]) == (kind, seed)]
            points = [[float(row[key]) for row in run] for key in ("at_minute", "accuracy")]
            axes.plot(*points, color=f"C{number}", marker=".", label=kind if seed == "0" else None)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    """The command line."""
    benches = {name.removeprefix("bench_"): run for name, run in globals().items() if name.startswith("bench_")}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("bench", choices=[*benches, "baseline"], help="what to measure; baseline: the tutorial's training, by itself")
    add("--data-path", help="a folder with one sub-folder a class (default: the drawn sample)")
    add("--images", type=int, default=0, help="so many images of the folder, of all classes together (default: all)")
    add("--large", action="store_true", help="ceiling: on drawn JPEGs of 4000 x 3000 px")
    add("--rounds", type=int, default=3, help="default: %(default)s")
    add("--epochs", type=int, default=2, help="of each round of training (default: %(default)s)")
    add("--kinds", nargs="+", default=["tutorial", "scratch"], help="accuracy: recipes (default: tutorial scratch)")
    add("--minutes", type=float, default=25, help="accuracy: of each training (default: %(default)s); 0: --epochs")
    add("--set-aside", action="store_true", help="accuracy: validate on the images set aside, for final figures")
    add("--model", default="resnet34", help="default: %(default)s")
    add("--img-size", type=int, help="default: 224; accuracy: as planned for the time")
    add("--batch-size", type=int, default=16, help="default: %(default)s")
    add("--device", default="cuda", help="default: CUDA, else the CPU")
    add("--seed", type=int, default=0, help="baseline: of the weights and the order (default: %(default)s)")
    add("--workers", type=int, help="of ours (default: train.py's)")
    add("--amp", default="auto", help="of ours: auto, on, off")
    add("--gpu-step", type=float, default=20, help="scaling: milliseconds, for the estimate (default: %(default)s)")
    add("--csv", default="bench.csv", help="the rounds are added to this file (default: %(default)s)")
    args = parser.parse_args()
    if args.img_size is None and args.bench != "accuracy":
        args.img_size = 224
    (benches | {"baseline": baseline})[args.bench](args)


if __name__ == "__main__":
    main()
