"""What train.py prints: the header, a line per epoch, and the result."""

import argparse
import contextlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cli_utils import describe_device, describe_processes, printable, quote_command, shorten
from config import describe_recipe
from image_folders import count_skipped
from prepare_data import Data
from run_state import Run
from run_utils import FOLDS_FILE, SKIPPED_FILE
from train_eval_utils import Progress

UNEQUAL = 5  # advise on rare classes from this ratio of the largest class to the smallest
MIRRORED = (("left", "right"), ("links", "rechts"), ("gauche", "droite"), ("左", "右"))  # 左, 右: Chinese, Japanese


def print_header(
    args: argparse.Namespace,
    data: Data,
    run: Run,
    device: torch.device,
    precision: str,
    weights_description: str,
    class_weights: Tensor | None,
    is_new: bool,
) -> None:
    """Print the device, the model, the data, and where the results go."""
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    names, folder = data.class_names, printable(str(run.folder))
    print(f"device       {describe_device(device)}{describe_processes(run.dist)}")
    print(f"precision    {precision}")
    print(f"model        {args.model}, {parameters:,} parameters, {printable(weights_description)}")
    print(f"recipe       {describe_recipe(args, run.info['img_size'])}")
    if run.global_batch > args.batch_size:
        print(f"global batch {run.global_batch} images per step")
    print(f"classes      {len(names)}: {shorten(printable(', '.join(names)))}")
    counts = f"{len(data.train_set)} for training, {len(data.val_set)} for validation"
    test = f", {len(data.test_images)} for testing" if data.test_images else ""
    print(f"images       {counts} ({printable(data.val_source)}){test}")
    for warning in describe_risks(args, data):
        print(f"warning      {printable(warning)}")
    if class_weights is not None:
        weights = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(names, class_weights.tolist(), strict=True))
        print(f"loss weights {shorten(printable(weights))}")
    if data.skipped:
        listed = printable(str(run.folder / SKIPPED_FILE))
        print(f"skipped      {printable(count_skipped(data.skipped))}; listed in {listed}")
    if data.pixel_range:
        low, high = data.pixel_range
        print(f"pixel range  {low:g} to {high:g}, scaled to 8 bits")
    print(f"run          {folder}{'' if is_new else f', resumed at epoch {run.epoch}, step {run.progress.steps}'}")
    command = quote_command(["tensorboard", f"--logdir={run.folder.parent}"])
    print(f"TensorBoard  {printable(command)}, then open http://localhost:6006/", flush=True)


def describe_risks(args: argparse.Namespace, data: Data) -> list[str]:
    """Describe each property of the data that may spoil the training or its metrics in one line."""
    risks = []
    if unvalidated := [name for name, count in data.counts.items() if not count.val]:
        risks.append(f"no validation images of {shorten(', '.join(unvalidated))}")
    untested = [name for name, count in data.counts.items() if not count.test]
    if data.test_images and untested:
        risks.append(f"no test images of {shorten(', '.join(untested))}")
    pairs = {"val": "validation images that are identical to training images"}
    pairs["test"] = "test images that are identical to training or validation images"
    risks += [f"{pairs[subset]}: {leaked}; run check_data.py" for subset, leaked in data.leaked.items() if leaked]
    train = {name: count.train for name, count in data.counts.items()}
    most, least = max(train, key=train.get), min(train, key=train.get)
    if args.best_metric == "accuracy" and train[most] > UNEQUAL * train[least]:
        risks.append(
            f"{train[most]} images of {shorten(most, 40)}, but {train[least]} of {shorten(least, 40)}: accuracy hides "
            f"rare classes; consider --best-metric macro_f1 and --class-weights 0.5"
        )
    if args.hflip > 0 and (pair := mirrored_words(data.class_names)):
        risks.append(f"a horizontal flip may turn {pair[0]} into {pair[1]}: pass --hflip 0 if it does")
    return risks


def mirrored_words(class_names: Sequence[str]) -> tuple[str, str] | None:
    """Return a pair of words for left and right that both occur in the names of classes, or None."""
    words = {word for name in class_names for word in re.findall(r"[a-z]+|[\u4e00-\u9fff]", name.lower())}
    return next((pair for pair in MIRRORED if words.issuperset(pair)), None)


def describe_coverage(data: Data) -> str:
    """Return how many classes the accuracy covers, if some have no validation images."""
    covered = sum(count.val > 0 for count in data.counts.values())
    return f" ({covered} of {len(data.counts)} classes)" if covered < len(data.counts) else ""


def print_epoch(run: Run, data: Data, progress: Progress, learning_rate: float, seconds: float) -> None:
    """Print the metrics of the epoch that has just finished."""
    macro_f1 = f"  macro_f1 {run.last['macro_f1']:.3f}" if run.best_metric == "macro_f1" else ""
    mark = "  *best" if run.best is run.last and run.best_metric != "last" else ""
    print(
        f"[epoch {run.last['epoch']}] train_loss {progress.loss:.3f}  val_loss {run.last['val_loss']:.3f}  "
        f"accuracy {run.last['accuracy']:.3f}{describe_coverage(data)}{macro_f1}  learning_rate {learning_rate:.4g}  "
        f"{seconds:.1f} s{mark}",
        flush=True,
    )


def print_result(run: Run, data: Data, report: Mapping[str, Any] | None) -> None:
    """Print the best accuracy, and the command that predicts a validation image.

    Args:
        report: on the test images, if any, see `evaluation_report.build_report`.
    """
    best = str(run.weights / "best.pth")
    result = f"accuracy {run.best['accuracy']:.3f}{describe_coverage(data)}"
    if run.best_metric not in ("accuracy", "last"):
        result = f"{run.best_metric} {run.best[run.best_metric]:.3f}, {result},"
    which = "last" if run.best_metric == "last" else "best"
    print(f"{which} {result} at epoch {run.best['epoch']}: {printable(best)}")
    if report is not None:
        low, high = report["accuracy"]["interval"]
        accuracy = f"{report['accuracy']['value']:.3f} (95% interval {low:.3f} to {high:.3f})"
        print(f"test accuracy {accuracy} on {report['images']} of {len(data.test_images)} images")
    example = data.val_set.images_path[0]
    print(f"next: {quote_command(['python', 'predict.py', '--weights', best, example])}", flush=True)


def print_stop(run: Run) -> None:
    """Print where the run has stopped, and how to resume it."""
    if run.dist.is_main:
        launcher = "under torchrun as before, " if run.dist.world_size > 1 else ""
        is_fold = (run.folder.parent / FOLDS_FILE).exists()
        program, folder = ("cross_validate.py", run.folder.parent) if is_fold else ("train.py", run.folder)
        command = quote_command(["python", program, "--resume", str(folder)])
        where = f"epoch {run.epoch}, step {run.progress.steps}"
        with contextlib.suppress(OSError):  # standard error may be closed
            print(f"train.py: stopped at {where}; to resume: {launcher}{command}", file=sys.stderr)
