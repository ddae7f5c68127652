"""The comparison of recipes, for `bench.py accuracy`."""

import argparse
import contextlib
import hashlib
import itertools
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from measuring import BENCH, append_rows, drawn_sample, hardware, our_flags, read_rows

from config import FLAG_DEFAULTS, RECIPES
from dataset_split import find_split

METRICS = ("accuracy", "val_loss")


def compare_recipes(args: argparse.Namespace) -> None:
    """Train each recipe for --minutes (0: --epochs), and compare accuracy over time and the final value per seed.

    A kind is a recipe of train.py ("scratch"), optionally with changes ("scratch:lr=0.1,nesterov=False"), or "loop",
    which is the baseline for --epochs. A hash of the file names holds out a fifth of the images as a test set. Choices
    are made without it, and --set-aside evaluates on it. Runs already in the CSV file are not repeated.
    """
    path, picture = Path(args.csv), Path(args.csv).with_suffix(".png")
    settings = {"set": "test" if args.set_aside else "validation"}
    settings["length"] = f"{args.minutes:g} minutes" if args.minutes else f"{args.epochs} epochs"
    settings |= {"model": args.model or "recipe", "amp": args.amp, "hardware": hardware(torch.device(args.device))}
    settings |= {"img_size": str(args.img_size or "planned"), "data_path": args.data_path or "sample"}
    with divided(args.data_path, args.set_aside) as data:
        for seed, kind in itertools.product(range(args.rounds), args.kinds):
            run = settings | {"kind": kind, "values": values_of(kind, args), "seed": str(seed)}
            if not any(run.items() <= row.items() for row in read_rows(path)):
                append_rows([run | row for row in train_for_minutes(args, data, kind, seed)], path)
            last = [row for row in read_rows(path) if run.items() <= row.items()][-1]
            accuracy, loss = (last[metric] for metric in METRICS)
            print(f"seed {seed}  {kind:40} {accuracy} (loss {loss}) after {last['at_minute']} min", flush=True)
    wanted = [settings | {"kind": kind, "values": values_of(kind, args)} for kind in args.kinds]
    rows = [row for row in read_rows(path) if any(kind.items() <= row.items() for kind in wanted)]
    print(f"{settings['hardware']}; {settings['length']}, evaluated on the {settings['set']} images")
    for kind in args.kinds:
        ends = {row["seed"]: float(row["accuracy"]) for row in rows if row["kind"] == kind}
        print(f"{kind:40} mean {statistics.fmean(ends.values()):.4f} of {sorted(ends.values())}")
    draw_accuracy(rows, args.kinds, picture)
    print(f"curves: {picture}")


def values_of(kind: str, args: argparse.Namespace) -> str:
    """Describe the current values of a kind, because a recipe may change under the same name."""
    if kind == "loop":
        return f"{args.epochs} epochs"
    recipe, _, changes = kind.partition(":")
    values = FLAG_DEFAULTS[recipe] | asdict(RECIPES[recipe])
    return ", ".join(f"{name} {value}" for name, value in values.items()) + f"; {changes}"


def change_recipe(recipe: str, **changes: float) -> None:
    """Change the flags' defaults and the settings of a recipe in this process."""
    flags = {name: value for name, value in changes.items() if name in FLAG_DEFAULTS[recipe]}
    FLAG_DEFAULTS[recipe] |= flags
    settings = {name: value for name, value in changes.items() if name not in flags}
    RECIPES[recipe] = replace(RECIPES[recipe], **settings)


@contextlib.contextmanager
def divided(data_path: str | None, set_aside: bool):
    """Yield a folder of links with sub-folders `train` and `val`, divided by a hash of the file names.

    If `set_aside` is true, `val` is the held-out fifth. Otherwise that fifth is omitted, and a quarter of the rest is
    `val`. The hash makes the division the same on every machine.
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
    """Run one training; return the minutes since its start, accuracy and validation loss of each epoch."""
    recipe, _, changes = kind.partition(":")
    flags = ["--data-path", str(data), "--device", args.device]
    if kind == "loop":
        flags += ["--model", args.model or "resnet34"]
        flags += ["--epochs", str(args.epochs), "--img-size", str(args.img_size or 224), "--seed", str(seed)]
        command = [sys.executable, str(BENCH), "baseline", *flags]
    else:
        flags += ["--recipe", recipe, "--seed", str(seed), *our_flags(args)]
        flags += ["--model", args.model] if args.model else []
        flags += ["--time-budget", str(args.minutes)] if args.minutes else ["--epochs", str(args.epochs)]
        flags += ["--img-size", str(args.img_size)] if args.img_size else []
        code = f"import sys; sys.path.insert(0, {str(BENCH.parent)!r}); import accuracy, train; "
        code += f"accuracy.change_recipe({recipe!r}, {changes}); sys.exit(train.main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, *flags]
    with tempfile.TemporaryDirectory() as folder:
        start, rows = time.perf_counter(), []
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as run:
            for line in run.stdout:
                if line.startswith("[epoch ") and "accuracy " in line:
                    minutes = f"{(time.perf_counter() - start) / 60:.2f}"
                    found = dict.fromkeys(METRICS, "") | dict(re.findall(r"(\w+) (\S+)", line))
                    rows.append({"epoch": str(len(rows)), "at_minute": minutes} | {key: found[key] for key in METRICS})
        if run.returncode or not rows:
            sys.exit(f"{kind} failed")
        return rows


def draw_accuracy(rows: list[dict[str, str]], kinds: list[str], path: Path) -> None:
    """Plot accuracy over minutes, one colour per kind and one line per seed."""
    figure = Figure(figsize=(9, 5.5), dpi=100, layout="constrained")
    axes = figure.add_subplot(xlabel="minutes", ylabel="validation accuracy")
    for number, kind in enumerate(kinds):
        seeds = sorted({row["seed"] for row in rows if row["kind"] == kind})
        for seed in seeds:
            run = [row for row in rows if (row["kind"], row["seed"]) == (kind, seed)]
            points = [[float(row[key]) for row in run] for key in ("at_minute", "accuracy")]
            axes.plot(*points, color=f"C{number}", marker=".", label=kind if seed == seeds[0] else None)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
