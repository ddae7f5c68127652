"""Cross-validate: predict each image with a network that was not trained on it, measure accuracy, find wrong labels.

python cross_validate.py --data-path my_photos --recipe scratch --time-budget 60    # five folds in an hour
python cross_validate.py --data-path my_photos --folds 10 --name ten_folds          # takes the flags of train.py
python cross_validate.py --resume                                                   # after an interruption
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

import config
import plot_utils
from calibration import Reliability, fit_temperature, measure_reliability
from classifier import Classifier
from cli_utils import DataError, UsageError, checked, printable, quote_command, run_program, silence_other_ranks
from distributed import Distributed
from evaluation_report import Results, build_report, classify_labelled, format_report, prediction_rows
from file_utils import read_json, save_png, write_csv, write_json
from folds import Images, draw_folds, find_images, require_divisible, write_fold
from image_folders import CHECK_CACHE, read_run_checksums
from image_io import ImageError, read_image
from label_issues import LabelIssues, estimate_wrong_labels, rank_labels
from labelled_images import ErrorLog, ImageFile
from metrics import Evaluation
from my_dataset import EvalTransform, to_pixels
from run_utils import (
    FOLDS_FILE,
    LAUNCH_FILE,
    StopRequest,
    create_free_folder,
    find_launched_run,
    lock_run,
    open_run,
    remove_unstarted_run,
    write_skipped,
)
from tables import read_table
from train import setup_device, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ISSUES_FILE = "label_issues.csv"
WORST = 40  # label issues in the figure
REPORT_FRACTION = 0.03  # of a time budget, kept for the final predictions
MAY_CHANGE = {"resume", "device", "workers", "timeout"}  # flags that may change on resume


def cross_validate(args: argparse.Namespace, folder: Path, dist: Distributed) -> None:
    """Train a network per fold, and report on its predictions for the images of the fold.

    Args:
        args: the flags.
        folder: contains the tables of the folds, and receives their runs and the results.
        dist: the process group. All ranks take the same path through this function.

    Raises:
        StopRequest: a signal has arrived, and the run of the fold has been saved.
    """
    start = time.perf_counter()
    for fold in range(args.folds * args.repeats):
        spent = time.perf_counter() - start
        build = functools.partial(build_fold_args, args, folder, fold, spent)
        fold_args, is_new = dist.broadcast_from_main(build)
        run = None if is_new else open_run(str(fold_folder(folder, fold)), dist)
        if run is not None:
            if run.checkpoint["resume"].get("finished"):
                continue
            saved = config.resume_args([], run.checkpoint["resume"].get("flags"), run.path)
            changed = {flag: getattr(args, flag) for flag in MAY_CHANGE - {"resume"}}
            fold_args = argparse.Namespace(**vars(saved) | changed)
        print(f"\n--- fold {fold} ---\n")
        dist.restart_clock()
        train(fold_args, dist, run)
    device, amp_dtype, _ = setup_device(args, dist)
    dist.broadcast_from_main(lambda: write_results(args, folder, device, amp_dtype), no_timeout=True)


# --- folds --------------------------------------------------------------------------------------------------------


def fold_folder(folder: Path, fold: int) -> Path:
    """Return the folder of the run of a fold."""
    return folder / f"fold-{fold}"


def fold_table(folder: Path, fold: int) -> Path:
    """Return the table of the training and validation images of a fold."""
    return folder / f"fold-{fold}.csv"


def build_fold_args(args: argparse.Namespace, folder: Path, fold: int, spent: float) -> tuple[argparse.Namespace, bool]:
    """Build the flags of train.py for a fold.

    Args:
        spent: seconds spent since the start or the resume.

    Returns:
        The flags, and whether the run of the fold still has to be created.
    """
    is_new = remove_unstarted_run(fold_folder(folder, fold))
    train_flags = vars(config.parse_args([])).keys()
    flags = {flag: value for flag, value in vars(args).items() if flag in train_flags}
    flags |= {"data_path": str(fold_table(folder, fold)), "name": f"{folder.name}/fold-{fold}", "resume": None}
    flags |= {
        "val_path": None,
        "test_rate": 0.0,
        "download": False,
        "corrections": None,
        "seed": args.seed + fold // args.folds,
    }
    if args.time_budget:
        earlier = [read_json(fold_folder(folder, number) / "args.json") for number in range(fold)]
        shares = sum(run.get("flags", {}).get("time_budget", 0.0) for run in earlier)
        left = (1 - REPORT_FRACTION) * args.time_budget - max(spent / 60, shares)
        flags["time_budget"] = max(left, args.time_budget / 100) / (args.folds * args.repeats - fold)
        if earlier and not args.img_size:  # the size that the first fold has chosen
            flags["img_size"] = earlier[0].get("network", {}).get("img_size")
    return argparse.Namespace(**flags), is_new


class Prepared(NamedTuple):
    """A cross-validation that has been started or reopened, and its lock."""

    args: argparse.Namespace
    folder: Path
    lock: TextIO | None


def start(args: argparse.Namespace, launch_ids: set[str]) -> Prepared:
    """Find the images, draw the folds, and write their tables to a new folder in runs/.

    Raises:
        DataError: there are too few images of a class.
        UsageError: --weights were trained on these images.
    """
    known = Path("runs") / CHECK_CACHE
    images = find_images(args, known)
    require_unused(args.weights, images)
    drawn = [draw_folds(images.labels, images.groups, args.folds, args.seed + repeat) for repeat in range(args.repeats)]
    for folds in drawn:
        require_divisible(images, folds)
    folder = create_free_folder(args.name)
    lock = lock_run(folder)
    for fold in range(args.folds * args.repeats):
        write_fold(images, drawn[fold // args.folds], fold % args.folds, fold_table(folder, fold))
    write_json(images.data.known, known)
    write_skipped(images.data.skipped, folder)
    if launch_ids:
        (folder / LAUNCH_FILE).write_text("\n".join(sorted(launch_ids)), encoding="utf-8")
    flags = vars(args) | {"recipe": args.recipe.name}
    flags |= {flag: str(Path(flags[flag]).absolute()) for flag in ("weights",) if Path(flags[flag]).is_file()}
    write_json({"flags": flags}, folder / FOLDS_FILE)
    describe_folds(args, images, folder)
    return Prepared(args, folder, lock)


def describe_folds(args: argparse.Namespace, images: Images, folder: Path) -> None:
    """Print the number of images, and what happens to them."""
    grouped = len(images.paths) - len(set(images.groups.tolist()))
    print(f"images       {len(images.paths)} in {len(images.class_names)} classes, {args.folds} folds")
    if grouped:
        print(f"duplicates   {grouped} images are in the same fold as another one that shows the same picture")
    if images.data.test_images:
        print(f"test images  {len(images.data.test_images)}, which no fold contains")
    print(f"results      {printable(str(folder))}")


def require_unused(weights: str, images: Images) -> None:
    """Raise UsageError if the run of a weights file has used some of the images."""
    if not weights:
        return
    used = read_run_checksums(Path(weights).absolute().parent.parent / "files.json")
    checksums = {checksum for versions in images.data.files.values() for _, checksum in versions}
    if known := len(checksums & used.keys()):
        raise UsageError(
            f"--weights {weights}: were trained on {known} of these images, so their predictions would be too good; "
            f"use other weights, or train from scratch"
        )


def reopen(argv: list[str], name: str) -> Prepared:
    """Open the cross-validation that --resume names, with its flags.

    Raises:
        UsageError: there is none, another process is running it, or a flag differs.
    """
    if name:
        found = [folder for folder in (Path(name), Path("runs", name)) if (folder / FOLDS_FILE).is_file()]
    else:
        found = sorted(Path("runs").glob(f"*/{FOLDS_FILE}"), key=lambda path: -path.stat().st_mtime)
        found = [path.parent for path in found]
    if not found:
        raise UsageError(f"--resume {name}: no {FOLDS_FILE} to resume from".replace("  ", " "))
    folder = found[0]
    lock = lock_run(folder)
    saved = read_json(folder / FOLDS_FILE).get("flags", {})
    if saved.keys() != vars(parse_args([])).keys():
        raise UsageError(f"{folder / FOLDS_FILE}: corrupt, or written by another version")
    before, args = parse_args([], saved), parse_args(argv, saved)
    for flag, value in vars(before).items():
        if flag not in MAY_CHANGE and getattr(args, flag) != value:
            name = f"--{flag.replace('_', '-')}"
            raise UsageError(f"{name}: {folder} was started with {value}; omit the flag to resume it")
    return Prepared(args, folder, lock)


# --- results ------------------------------------------------------------------------------------------------------


class Fold(NamedTuple):
    """The predictions for the images of a fold: (N, classes) float32 logits, and (N,) int64 labels."""

    files: list[ImageFile]
    logits: Tensor
    labels: Tensor


class OutOfFold(NamedTuple):
    """The predictions for all images, in the order of their paths.

    Attributes:
        results: the probabilities are calibrated; with --repeats, they are averaged.
        folds: (N,) the folds that contain each image.
        uncalibrated: (N, classes) float32, the probabilities without temperatures.
    """

    results: Results
    folds: list[list[int]]
    uncalibrated: Tensor


def predict_fold(
    folder: Path, fold: int, device: torch.device, amp_dtype: torch.dtype | None, workers: int | None, log: ErrorLog
) -> tuple[Fold, Classifier]:
    """Classify the images of a fold with the network that was not trained on them.

    Raises:
        DataError: no image is readable.
    """
    classifier = Classifier(fold_folder(folder, fold) / "weights" / "best.pth", device, amp_dtype, workers=workers)
    rows = [row for row in read_table(fold_table(folder, fold)) if row.subset == "val"]
    images = classify_labelled(classifier, [ImageFile(row.path, row.label, row.path) for row in rows], log)
    if not images:
        raise DataError(f"none of the {len(rows)} images of fold {fold} is readable")
    results = Results.collect(images, classifier)
    return Fold(results.files, results.logits, results.labels), classifier


def combine(folds: Sequence[Fold], per_repeat: int, class_names: list[str]) -> OutOfFold:
    """Combine the predictions of all folds.

    The temperature of a fold is fitted to the other folds, so that no image influences its own probabilities.

    Args:
        per_repeat: the number of folds of a repeat.
    """
    calibrated: dict[str, list[Tensor]] = {}
    raw: dict[str, list[Tensor]] = {}
    numbers: dict[str, list[int]] = {}
    found: dict[str, tuple[ImageFile, int]] = {}
    for number, fold in enumerate(folds):
        first = number // per_repeat * per_repeat
        others = [folds[other] for other in range(first, first + per_repeat) if other != number]
        temperature = fit_temperature(
            torch.cat([other.logits for other in others]), torch.cat([other.labels for other in others])
        )
        for file, logits, label in zip(fold.files, fold.logits, fold.labels.tolist(), strict=True):
            found[file.path] = file, label
            calibrated.setdefault(file.path, []).append((logits / temperature).softmax(dim=0))
            raw.setdefault(file.path, []).append(logits.softmax(dim=0))
            numbers.setdefault(file.path, []).append(number)
    paths = sorted(found)
    logits = torch.stack([torch.stack(calibrated[path]).mean(dim=0) for path in paths]).log()
    labels = torch.tensor([found[path][1] for path in paths])
    results = Results([found[path][0] for path in paths], logits, labels, class_names)
    uncalibrated = torch.stack([torch.stack(raw[path]).mean(dim=0) for path in paths])
    return OutOfFold(results, [numbers[path] for path in paths], uncalibrated)


def write_results(args: argparse.Namespace, folder: Path, device: torch.device, amp_dtype: torch.dtype | None) -> None:
    """Predict all images, and write and print the report and the label issues."""
    log, folds = ErrorLog("cross_validate.py"), []
    for number in range(args.folds * args.repeats):
        fold, classifier = predict_fold(folder, number, device, amp_dtype, args.workers, log)
        folds.append(fold)
    predictions = combine(folds, args.folds, classifier.class_names)
    results = predictions.results
    reliability = {
        "uncalibrated": measure_reliability(predictions.uncalibrated, results.labels),
        "calibrated": measure_reliability(results.evaluation.probabilities, results.labels),
    }
    report = build_report(results) | describe_spread(folds)
    report["uncalibrated_calibration_error"] = reliability["uncalibrated"].calibration_error
    issues = rank_labels(results.evaluation.probabilities, results.labels)
    estimate = estimate_wrong_labels(results.evaluation.probabilities, results.labels)
    report["wrong_labels"] = estimate and [round(limit * len(results.labels)) for limit in estimate]

    write_json(report, folder / "report.json")
    columns = ("path", "label", "predicted", "probability", "loss", "fold")
    rows = [
        row | {"fold": " ".join(map(str, numbers))}
        for row, numbers in zip(prediction_rows(results), predictions.folds, strict=True)
    ]
    write_csv(rows, folder / "out_of_fold.csv", columns)
    write_figures(folder, draw_figures(results, reliability, issues, classifier.info["pixel_range"]))
    if not (folder / ISSUES_FILE).exists():  # it may contain verdicts
        write_csv(issue_rows(results, issues), folder / ISSUES_FILE)
    print_results(report, results, issues, folder)


def describe_spread(folds: Sequence[Fold]) -> dict[str, Any]:
    """Return the accuracy and the macro F1 of each fold, and their means and standard deviations."""
    evaluations = [Evaluation(fold.logits, fold.labels) for fold in folds]
    metrics = {
        "accuracy": [evaluation.accuracy for evaluation in evaluations],
        "macro_f1": [evaluation.macro_f1 for evaluation in evaluations],
    }
    return {
        "folds": {
            name: {"values": values, "mean": statistics.mean(values), "standard_deviation": statistics.stdev(values)}
            for name, values in metrics.items()
        }
    }


def issue_rows(results: Results, issues: LabelIssues) -> list[dict[str, str]]:
    """Return the rows of label_issues.csv, the most suspicious label first."""
    probabilities, names = results.evaluation.probabilities, results.class_names
    return [
        {
            "path": results.files[index].path,
            "label": results.files[index].label,
            "suggested": names[suggested],
            "probability of label": f"{probabilities[index, results.labels[index]]:.6f}",
            "probability of suggested": f"{probabilities[index, suggested]:.6f}",
            "verdict": "",
        }
        for index, suggested in zip(issues.order.tolist(), issues.suggested[issues.order].tolist(), strict=True)
    ]


def draw_figures(
    results: Results,
    reliability: dict[str, Reliability],
    issues: LabelIssues,
    pixel_range: tuple[float, float] | None,
) -> dict[str, "Figure"]:
    """Draw the figures, by name."""
    transform = EvalTransform(160, "pad")
    names, probabilities = results.class_names, results.evaluation.probabilities
    images, titles = [], []
    for index in issues.order[:WORST].tolist():
        try:
            image = transform(read_image(results.files[index].path, transform.min_side, pixel_range))
        except ImageError:  # it has been reported
            continue
        suggested = int(issues.suggested[index])
        images.append(image)
        titles.append((names[suggested], probabilities[index, suggested].item(), results.files[index].label))
    curves = {f"{name}: calibration error {curve.calibration_error:.1%}": curve for name, curve in reliability.items()}
    figures = {
        "confusion_matrix": plot_utils.confusion_matrix(results.evaluation.confusion.numpy(), names),
        "reliability": plot_utils.reliability(curves),
    }
    if images:
        columns = map(list, zip(*titles, strict=True))
        figures["label_issues"] = plot_utils.predictions(to_pixels(torch.stack(images)), *columns)
    return figures


def write_figures(folder: Path, figures: dict[str, "Figure"]) -> None:
    """Write figures to the folder, and to TensorBoard."""
    for earlier in folder.glob("events.out.tfevents.*"):
        earlier.unlink()
    with SummaryWriter(folder) as writer:
        for name, figure in figures.items():
            save_png(figure, folder / f"{name}.png")
            writer.add_figure(name.replace("_", " "), figure)


def print_results(report: dict[str, Any], results: Results, issues: LabelIssues, folder: Path) -> None:
    """Print the report, the most suspicious labels, and what to do with them."""
    print("\n--- all folds ---\n")
    for line in format_report(report):
        print(printable(line))
    accuracy = report["folds"]["accuracy"]
    print(
        f"\naccuracy per fold  {min(accuracy['values']):.4f} to {max(accuracy['values']):.4f}, mean "
        f"{accuracy['mean']:.4f}, standard deviation {accuracy['standard_deviation']:.4f}"
    )
    if report["wrong_labels"] is None:
        estimate = "no estimate, as the networks are too often wrong themselves"
    else:
        low, high = report["wrong_labels"]
        estimate = f"{low} to {high} of {report['images']} (estimate)"
    print(f"wrong labels       {estimate}; the most suspicious ones:")
    for index in issues.order[:10].tolist():
        suggested = results.class_names[issues.suggested[index]]
        print(printable(f"  {results.files[index].path}: {suggested}?"))
    table = folder / ISSUES_FILE
    print(f"all labels         {printable(str(table))}; the first {WORST} are drawn in label_issues.png")
    command = quote_command(["python", "train.py", "--corrections", str(table)])
    print(f"next: fill in the column verdict with a class, ok or drop, and train with it: {command}", flush=True)


# --- program ------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None, saved: dict[str, Any] | None = None) -> argparse.Namespace:
    """Parse and validate the command line; see `config.parse_args`."""
    parser = config.build_parser("cross_validate.py", __doc__)
    add = parser.add_argument_group("cross-validation").add_argument
    two, positive = checked(int, lambda n: n >= 2, "at least 2"), checked(int, lambda n: n >= 1, "at least 1")
    add("--folds", type=two, default=5, help="parts of the data, each predicted by another network (default: 5)")
    add("--repeats", type=positive, default=1, help="repeat with other folds, and average (default: %(default)s)")
    parser.set_defaults(name="cross_validation", best_metric="last")
    args = config.parse_args(argv, saved, parser)
    for flag in ("find_lr", "allow_changed_data"):
        if getattr(args, flag):
            parser.error(f"--{flag.replace('_', '-')}: not supported for cross-validation")
    if args.val_rate != parser.get_default("val_rate"):
        parser.error("--val-rate has no effect: the images of a fold are its validation images; use --folds")
    return args


def run_cross_validation(argv: list[str]) -> int:
    """Parse the flags, start or resume, and cross-validate. Returns the exit status."""
    args = parse_args(argv)
    with Distributed(args.timeout) as dist, silence_other_ranks(dist):
        lock = None

        def prepare() -> tuple[argparse.Namespace, Path]:
            nonlocal lock
            name = find_launched_run(dist.launch_ids, needed=FOLDS_FILE) or args.resume
            prepared = start(args, dist.launch_ids) if name is None else reopen(argv, name)
            lock = prepared.lock  # held until the end
            return prepared.args, prepared.folder

        args, folder = dist.broadcast_from_main(prepare, no_timeout=True)
        if (folder / ISSUES_FILE).exists():
            print(f"{printable(str(folder))} is complete")
            return 0
        try:
            cross_validate(args, folder, dist)
        except StopRequest as stop:
            return 128 + stop.number
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit status."""
    memory_advice, worker_advice = "try a smaller --batch-size or --img-size", "try --workers 0"
    run = functools.partial(run_cross_validation, sys.argv[1:] if argv is None else argv)
    return run_program("cross_validate.py", run, memory_advice=memory_advice, worker_advice=worker_advice)


if __name__ == "__main__":
    sys.exit(main())
