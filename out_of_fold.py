"""The results of a cross-validation: out-of-fold predictions, label issues and the learning curve."""

import argparse
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

import plot_utils
from calibration import Reliability, fit_temperature, measure_reliability
from classifier import Classifier
from cli_utils import DataError, printable, quote_command
from corrections import image_key
from evaluation_report import Results, build_report, classify_labelled, format_report, prediction_rows
from file_utils import read_json, save_png, write_csv, write_json
from folds import FoldRun, list_runs
from image_io import ImageError, read_image
from label_issues import LabelIssues, estimate_wrong_labels, rank_labels
from labelled_images import ErrorLog, ImageFile
from learning_curve import DIVISORS, LearningCurve, fit_learning_curve
from metrics import Evaluation
from my_dataset import EvalTransform, to_pixels
from run_utils import FOLDS_FILE
from tables import read_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ISSUES_FILE = "label_issues.csv"
WORST = 40  # label issues in the figure


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
        uncalibrated: (N, classes) float32, the probabilities before temperature scaling.
        temperatures: of each fold.
    """

    results: Results
    folds: list[list[int]]
    uncalibrated: Tensor
    temperatures: list[float]


def predict_fold(
    folder: Path, run: FoldRun, device: torch.device, amp_dtype: torch.dtype | None, workers: int | None, log: ErrorLog
) -> tuple[Fold, Classifier]:
    """Classify the images of a fold with the network that was not trained on them.

    Raises:
        DataError: no image is readable.
    """
    classifier = Classifier(folder / run.name / "weights" / "best.pth", device, amp_dtype, workers=workers)
    rows = [row for row in read_table(run.table(folder)) if row.subset == "val"]
    images = classify_labelled(classifier, [ImageFile(row.path, row.label, row.path) for row in rows], log)
    if not images:
        raise DataError(f"none of the {len(rows)} images of {run.name} is readable")
    results = Results.collect(images, classifier)
    return Fold(results.files, results.logits, results.labels), classifier


def combine(folds: Sequence[Fold], per_repeat: int, class_names: list[str]) -> OutOfFold:
    """Combine the predictions of all folds.

    The temperature of a fold is fitted to the other folds, not to the images that it is applied to.

    Args:
        per_repeat: the number of folds of a repeat.
    """
    files = [file for fold in folds for file in fold.files]
    labels = torch.cat([fold.labels for fold in folds])
    numbers = [number for number, fold in enumerate(folds) for _ in fold.files]
    calibrated, temperatures = [], []
    for number, fold in enumerate(folds):
        first = number // per_repeat * per_repeat
        others = [folds[other] for other in range(first, first + per_repeat) if other != number]
        logits, targets = (torch.cat(column) for column in zip(*(other[1:] for other in others), strict=True))
        temperatures.append(fit_temperature(logits, targets))
        calibrated.append((fold.logits / temperatures[-1]).log_softmax(dim=1))
    rows: dict[str, list[int]] = {}
    for row, file in enumerate(files):
        rows.setdefault(file.path, []).append(row)
    groups = [rows[path] for path in sorted(rows)]
    first = [group[0] for group in groups]

    def average(log_probabilities: list[Tensor]) -> Tensor:
        """Return the logarithms of the mean probabilities of each image."""
        every = torch.cat(log_probabilities)
        return torch.stack([every[group].logsumexp(dim=0) - math.log(len(group)) for group in groups])

    results = Results([files[row] for row in first], average(calibrated), labels[first], class_names)
    uncalibrated = average([fold.logits.log_softmax(dim=1) for fold in folds]).exp()
    return OutOfFold(results, [[numbers[row] for row in group] for group in groups], uncalibrated, temperatures)


def write_results(args: argparse.Namespace, folder: Path, device: torch.device, amp_dtype: torch.dtype | None) -> None:
    """Predict all images, and write and print the report and the label issues."""
    log, predicted = ErrorLog("cross_validate.py"), {}
    for run in list_runs(args):
        predicted[run], classifier = predict_fold(folder, run, device, amp_dtype, args.workers, log)
    folds = [fold for run, fold in predicted.items() if run.divisor == 1]
    predictions = combine(folds, args.folds, classifier.class_names)
    results = predictions.results
    reliability = {
        "uncalibrated": measure_reliability(predictions.uncalibrated, results.labels),
        "calibrated": measure_reliability(results.evaluation.probabilities, results.labels),
    }
    report = build_report(results) | describe_spread(folds)
    report["temperature"] = predictions.temperatures
    report["uncalibrated_calibration_error"] = reliability["uncalibrated"].calibration_error
    issues = rank_labels(results.evaluation.probabilities, results.labels)
    estimate = estimate_wrong_labels(results.evaluation.probabilities, results.labels)
    report["wrong_labels"] = estimate and [round(limit * len(results.labels)) for limit in estimate]

    figures = draw_figures(results, reliability, issues, classifier.info["pixel_range"])
    if args.learning_curve:
        report["learning_curve"], figures["learning_curve"] = extrapolate(folder, predicted, results.class_names)

    write_json(report, folder / "report.json")
    columns = ("path", "label", "predicted", "probability", "loss", "fold")
    rows = (
        row | {"fold": " ".join(map(str, numbers))}
        for row, numbers in zip(prediction_rows(results), predictions.folds, strict=True)
    )
    write_csv(rows, folder / "out_of_fold.csv", columns)
    write_figures(folder, figures)
    if not (folder / ISSUES_FILE).exists():  # it may contain verdicts
        verdicts = read_json(folder / FOLDS_FILE).get("verdicts", {})
        write_csv(issue_rows(results, issues, verdicts), folder / ISSUES_FILE)
    data_flags = {"--data-path": args.data_path, "--val-path": args.val_path}
    print_results(report, results, issues, folder, data_flags)


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


def extrapolate(
    folder: Path, predicted: dict[FoldRun, Fold], class_names: list[str]
) -> tuple[dict[str, Any], "Figure"]:
    """Extrapolate the accuracy, overall and per class, to twice as many images.

    Returns:
        Plain values for JSON, and the figure.
    """
    hits: dict[str, list[list[bool]]] = {}  # by image, for each repeat
    labels, folds = {}, {}
    for run in (run for run in predicted if run.divisor == 1):
        columns = []
        for divisor in sorted(DIVISORS, reverse=True):  # from the smallest subset to all images
            fold = predicted[FoldRun(run.fold, divisor)]
            right = (fold.logits.argmax(dim=1) == fold.labels).tolist()
            columns.append({file.path: is_right for file, is_right in zip(fold.files, right, strict=True)})
        for file in predicted[run].files:
            if all(file.path in column for column in columns):  # it is still readable
                hits.setdefault(file.path, []).append([column[file.path] for column in columns])
                labels[file.path] = class_names.index(file.label)
                folds.setdefault(file.path, run.fold)
    sizes = {}
    for run in predicted:
        rows = [row for row in read_table(run.table(folder)) if row.subset == "train"]
        sizes.setdefault(run.divisor, []).append(len(rows))
    sizes = [round(statistics.mean(sizes[divisor])) for divisor in sorted(sizes, reverse=True)]
    correct = np.array([np.mean(repeats, axis=0) for repeats in hits.values()])
    labels, folds = np.array([labels[path] for path in hits]), np.array([folds[path] for path in hits])
    curve = fit_learning_curve(sizes, correct, folds)
    content = describe_curve(curve) | {"classes": {}}
    for label, name in enumerate(class_names):
        own = labels == label
        if own.any():
            content["classes"][name] = describe_curve(fit_learning_curve(sizes, correct[own], folds[own]))
    figure = plot_utils.learning_curve(curve.sizes, curve.accuracies, curve.grid, curve.fitted, curve.interval)
    return content, figure


def describe_curve(curve: LearningCurve) -> dict[str, Any]:
    """Return a learning curve as plain values for JSON."""
    return {
        "training_images": curve.sizes.tolist(),
        "accuracies": curve.accuracies.tolist(),
        "twice_as_many": {"value": curve.expected, "interval": list(curve.interval)},
    }


def format_curves(curves: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a learning curve, overall and per class."""
    width = max(len(printable(name)) for name in [*curves["classes"], "training images"])
    sizes = "".join(f"{size:9.0f}" for size in curves["training_images"])
    yield f"{'training images':{width}}{sizes}  expected with twice as many"
    for name, curve in {"accuracy": curves, **curves["classes"]}.items():
        accuracies = "".join(f"{accuracy:9.3f}" for accuracy in curve["accuracies"])
        twice, (low, high) = curve["twice_as_many"]["value"], curve["twice_as_many"]["interval"]
        yield f"{printable(name):{width}}{accuracies}  {twice:.3f} ({low:.3f} to {high:.3f})"
    yield "Do not extrapolate beyond twice as many images."


def issue_rows(results: Results, issues: LabelIssues, verdicts: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the rows of label_issues.csv, the most suspicious label first, and then the images that were dropped.

    Args:
        verdicts: the earlier corrections, see `Corrections`.
    """
    probabilities, names, rows = results.evaluation.probabilities, results.class_names, []
    left = dict(verdicts)
    for index, suggested in zip(issues.order.tolist(), issues.suggested[issues.order].tolist(), strict=True):
        file = results.files[index]
        rows.append(
            {
                "path": file.path,
                "label": file.label,
                "suggested": names[suggested],
                "probability of label": f"{probabilities[index, results.labels[index]]:.6f}",
                "probability of suggested": f"{probabilities[index, suggested]:.6f}",
                "verdict": left.pop(image_key(file.path), ""),
            }
        )
    return rows + [{"path": path, "verdict": verdict} for path, verdict in left.items()]


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


def print_results(
    report: dict[str, Any], results: Results, issues: LabelIssues, folder: Path, data_flags: dict[str, str | None]
) -> None:
    """Print the report, the most suspicious labels, and what to do with them."""
    print("\n--- all folds ---\n")
    for line in format_report(report):
        print(printable(line))
    accuracy = report["folds"]["accuracy"]
    print(
        f"\naccuracy per fold  {min(accuracy['values']):.4f} to {max(accuracy['values']):.4f}, mean "
        f"{accuracy['mean']:.4f}, standard deviation {accuracy['standard_deviation']:.4f}"
    )
    if "learning_curve" in report:
        print("", *format_curves(report["learning_curve"]), "", sep="\n")
    if report["wrong_labels"] is None:
        estimate = "no estimate: too few images, or too many mistakes by the networks"
    else:
        low, high = report["wrong_labels"]
        estimate = f"{low} to {high} of {report['images']} (estimate)"
    print(f"wrong labels       {estimate}; most suspicious labels:")
    for index in issues.order[:10].tolist():
        file, suggested = results.files[index], results.class_names[issues.suggested[index]]
        print(printable(f"  {file.path}: labelled {file.label}, suggested {suggested}"))
    table = folder / ISSUES_FILE
    print(f"all labels         {printable(str(table))}; the first {WORST} are shown in label_issues.png")
    data = [word for flag, value in data_flags.items() if value for word in (flag, value)]
    command = quote_command(["python", "train.py", *data, "--corrections", str(table)])
    print(f"next: fill in the column verdict with a class, ok or drop, and train with the table: {command}", flush=True)
