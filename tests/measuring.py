"""Helpers shared by the benchmarks: timed programs and passes, and ratios over several rounds."""

import argparse
import contextlib
import csv
import datetime
import itertools
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
from torch.utils.data import DataLoader

BENCH, ROOT = Path(__file__).with_name("bench.py"), Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train
from cli_utils import available_cores, available_memory, describe_device, number_of_workers, select_precision
from data_loading import DistributedBatchSampler, EpochSampler, build_val_loader, make_loader
from dataset_split import find_split
from distributed import Distributed
from image_cache import ImageCache
from inference import run_inference
from model import MODELS, to_device
from my_dataset import MyDataSet, TrainTransform
from optimization import build_optimizer
from prepare_data import find_data
from train_eval_utils import train_one_epoch


def hardware(device: torch.device) -> str:
    """Describe the machine in one line."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    bf16 = "bfloat16" if select_precision("auto", torch.device("cpu"))[0] else "no bfloat16"
    where = f", {describe_device(device)}" if device.type != "cpu" else ""
    return f"{available_cores()} cores of {name} ({bf16}){where}; torch {torch.__version__}, {platform.system()}"


class Comparison:
    """Ratio of the times of B and A over several rounds, printed and appended to the CSV file."""

    def __init__(self, args: argparse.Namespace, what: str, a: str, b: str, images: int = 0) -> None:
        self.args, self.what, self.a, self.b, self.images = args, what, a, b, images
        self.rounds: dict[str, list[tuple[float, float]]] = {}  # keyed by figure
        self.hardware = hardware(torch.device(args.device))
        names = ("model", "img_size", "batch_size", "images", "epochs", "workers", "amp", "data_path")
        self.settings = ", ".join(f"{name} {getattr(args, name)}" for name in names)
        print(f"{what}\n  {self.hardware}\n  {self.settings}", flush=True)

    def add(self, seconds_a: float, seconds_b: float, figure: str = "") -> None:
        """Record one round."""
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
        """Print the median ratio of each figure, its range, and the median times."""
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
    """Append rows to a CSV file. A new file gets a header."""
    write_header = not Path(path).exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        if write_header:
            writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file. A missing file has none."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def compare(comparison: Comparison, measure_a: Callable, measure_b: Callable) -> None:
    """Run rounds A B, B A, A B, ...; each function returns seconds, or a dict of seconds per figure."""
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
    """Time a call, including the GPU work that it leaves pending."""
    start = time.perf_counter()
    action()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def seconds_of_program(command: list, folder: str | os.PathLike) -> float:
    """Time a program from start to end."""
    return seconds_of(lambda: subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL))


def seconds_of_epochs(command: list) -> dict[str, float]:
    """Time a training program in its own folder: from start to end, and the median epoch after the first."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as complaint:
        start = time.perf_counter()
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=complaint, text=True) as run:
            ends = [time.perf_counter() for line in run.stdout if line.startswith("[epoch ")]
        if run.returncode:
            complaint.seek(0)
            sys.exit(complaint.read())
        epochs = [later - earlier for earlier, later in itertools.pairwise(ends)]
        return {"epoch": statistics.median(epochs), "start to end": time.perf_counter() - start}


def programs(args: argparse.Namespace, data: Path, baseline: str = "baseline") -> tuple[list[str], list[str]]:
    """Return the command lines of our training, with default flags except those given, and of a baseline."""
    flags = ["--data-path", str(data), "--epochs", str(args.epochs), "--device", args.device]
    flags += ["--model", args.model, "--img-size", str(args.img_size), "--batch-size", str(args.batch_size)]
    return [
        [sys.executable, str(ROOT / "train.py"), *flags, *our_flags(args)],
        [sys.executable, str(BENCH), baseline, *flags],
    ]


def our_flags(args: argparse.Namespace) -> list[str]:
    """Return the flags that the baseline does not have."""
    workers = [] if args.workers is None else ["--workers", str(args.workers)]
    return ["--amp", args.amp, *workers]


@contextlib.contextmanager
def subset(data_path: str | None, images: int):
    """Yield a folder of links to the first images of each class, `images` in total (0: all)."""
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
    """Return the built-in dataset, drawn if it is missing."""
    return Path(find_data(argparse.Namespace(download=False, data_path=None)))


class Ours:
    """The components of our training in this process, built as in train.py."""

    def __init__(self, args: argparse.Namespace, data: Path) -> None:
        flags = ["--data-path", str(data), "--device", args.device, "--model", args.model, *our_flags(args)]
        flags += ["--img-size", str(args.img_size), "--batch-size", str(args.batch_size)]
        self.args = train.parse_args(flags)
        self.device = torch.device(args.device)
        self.amp_dtype, _ = select_precision(args.amp, self.device)
        self.split, _ = find_split(data)
        self.train_set = MyDataSet(
            self.split.train_paths,
            self.split.train_labels,
            TrainTransform(args.img_size),
            cache=ImageCache(len(self.split.train_paths), available_memory() // 8),
        )
        self.train_loader = self.loader(self.train_set)
        torch.manual_seed(0)
        self.model = to_device(MODELS[args.model](num_classes=len(self.split.class_names)), self.device)
        self.optimizer = build_optimizer(self.args, self.model, self.device, self.amp_dtype)

    def loader(self, train_set: MyDataSet) -> DataLoader:
        """Return a loader of training batches in the order of the first epoch."""
        batches = DistributedBatchSampler(EpochSampler(len(train_set)), self.args.batch_size)
        return make_loader(train_set, batches, number_of_workers(self.args.workers), self.device)

    def val_loader(self, images: MyDataSet) -> DataLoader:
        """Return a loader of evaluation batches."""
        return build_val_loader(self.args, images, self.device, Distributed())

    def train(self, loader) -> float:
        """Train one epoch on `loader` and return the mean loss."""
        return train_one_epoch(self.model, self.optimizer, loader, self.device, 0, amp_dtype=self.amp_dtype)

    def evaluate(self, loader) -> torch.Tensor:
        """Return the logits."""
        return run_inference(self.model, loader, self.device, amp_dtype=self.amp_dtype).logits
