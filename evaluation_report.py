"""Evaluate a classifier on labelled images: the report, with 95% confidence intervals, as plain values and as text."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calibration import measure_reliability
from classifier import Classifier
from cli_utils import printable
from image_io import ImageError
from labelled_images import ErrorLog, ImageFile
from metrics import Comparison, Evaluation, bootstrap_f1, confidence_threshold, wilson_interval

ERROR_RATES = (0.01, 0.02, 0.05)
INTERVALS = "95% intervals: Wilson for proportions, bootstrap over the images for F1"


class Classified(NamedTuple):
    """A labelled image, its logits (classes,), and its subset, see `classifier.Outcome`."""

    file: ImageFile
    logits: Tensor
    subset: str


def classify_labelled(classifier: Classifier, files: Sequence[ImageFile], log: ErrorLog) -> list[Classified]:
    """Classify the readable images, and report the others."""
    classified = []
    outcomes = classifier.classify([file.path for file in files], with_subset=True, description="evaluating")
    for file, outcome in zip(files, outcomes, strict=True):
        if isinstance(outcome, ImageError):
            log.fail(outcome)
        else:
            classified.append(Classified(file, outcome.logits, outcome.subset))
    return classified


@dataclass
class Results:
    """The results of a classifier on labelled images.

    Attributes:
        logits: (N, classes) float32.
        labels: (N,) int64.
        temperature: divides the logits.
    """

    files: list[ImageFile]
    logits: Tensor
    labels: Tensor
    class_names: list[str]
    temperature: float = 1.0

    @classmethod
    def collect(cls, images: Sequence[Classified], classifier: Classifier) -> "Results":
        """Collect the results of `classify_labelled`; not empty."""
        files, logits, _ = zip(*images, strict=True)
        labels = torch.tensor([classifier.class_names.index(file.label) for file in files])
        return cls(list(files), torch.stack(logits), labels, classifier.class_names, classifier.temperature)

    @functools.cached_property
    def evaluation(self) -> Evaluation:
        """The metrics, with calibrated probabilities."""
        return Evaluation(self.logits / self.temperature, self.labels)


# --- metrics ------------------------------------------------------------------------------------------------------


def build_report(results: Results, topk: int = 3) -> dict[str, Any]:
    """Compute the metrics of an evaluation.

    Args:
        topk: the k of the top-k accuracy.

    Returns:
        Plain values for JSON. A metric with an interval is {"value": ..., "interval": [low, high]}. An undefined metric
        is None, such as the precision of a class that is never predicted.
    """
    evaluation, labels = results.evaluation, results.labels
    correct, confidences = evaluation.predicted == labels, evaluation.probabilities.amax(dim=1)
    macro_f1_interval, f1_intervals = bootstrap_f1(evaluation.confusion)
    hits, predicted = evaluation.confusion.diag().tolist(), evaluation.confusion.sum(dim=0).tolist()
    images = evaluation.confusion.sum(dim=1).tolist()
    classes = {}
    for index, (name, f1) in enumerate(zip(results.class_names, evaluation.f1_scores.tolist(), strict=True)):
        classes[name] = {
            "images": images[index],
            "precision": _proportion(hits[index], predicted[index]),
            "recall": _proportion(hits[index], images[index]),
            "f1": None if math.isnan(f1) else {"value": f1, "interval": f1_intervals[index].tolist()},
        }
    return {
        "images": len(labels),
        "accuracy": _proportion(int(correct.sum()), len(labels)),
        "macro_f1": {"value": evaluation.macro_f1, "interval": list(macro_f1_interval)},
        f"top_{topk}_accuracy": _proportion(int(evaluation.top_k_hits(topk).sum()), len(labels)),
        "loss": evaluation.loss,
        "mean_confidence": confidences.double().mean().item(),
        "calibration_error": measure_reliability(evaluation.probabilities, labels).calibration_error,
        "temperature": results.temperature,
        "uncalibrated_calibration_error": measure_reliability(results.logits.softmax(dim=1), labels).calibration_error,
        "classes": classes,
        "confusion_matrix": evaluation.confusion.tolist(),
        "thresholds": [_describe_threshold(confidences, correct, rate) for rate in ERROR_RATES],
    }


def _proportion(successes: int, trials: int) -> dict[str, Any] | None:
    return {"value": successes / trials, "interval": list(wilson_interval(successes, trials))} if trials else None


def _describe_threshold(confidences: Tensor, correct: Tensor, error_rate: float) -> dict[str, Any]:
    threshold = confidence_threshold(confidences, correct, error_rate)
    if threshold is None:
        return {"error_rate": error_rate, "confidence": None, "answered": 0.0, "errors": None}
    return {
        "error_rate": error_rate,
        "confidence": threshold.confidence,
        "answered": threshold.answered / len(correct),
        "errors": _proportion(threshold.wrong, threshold.answered),
    }


def build_comparison(predicted: Tensor, other_predicted: Tensor, labels: Tensor) -> dict[str, Any]:
    """Compare the predictions (N,) int64 of two classifiers on the same images. Returns plain values for JSON."""
    correct, other_correct = predicted == labels, other_predicted == labels
    comparison = Comparison(correct, other_correct)
    return {
        "images": len(labels),
        "accuracy": correct.double().mean().item(),
        "other_accuracy": other_correct.double().mean().item(),
        "difference": {"value": comparison.difference, "interval": list(comparison.interval)},
        "only_this_right": comparison.only_first,
        "only_other_right": comparison.only_second,
        "p_value": comparison.p_value,
    }


# --- text ---------------------------------------------------------------------------------------------------------


def format_report(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a report."""
    width = max(len(printable(name)) for name in [*report["classes"], "class"])
    yield f"{'class':{width}}  images  {'precision':22}  {'recall':22}  F1"
    for name, row in report["classes"].items():
        cells = "  ".join(f"{_format_metric(row[key], 3):22}" for key in ("precision", "recall", "f1"))
        yield f"{printable(name):{width}}  {row['images']:6}  {cells}".rstrip()
    yield ""
    top_k = next(key for key in report if key.startswith("top_"))
    for key in ("accuracy", "macro_f1", top_k):
        yield f"{key.replace('_', ' ').replace('f1', 'F1'):18}  {_format_metric(report[key])}"
    yield f"{'mean loss':18}  {report['loss']:.4f}"
    raw = f" ({report['uncalibrated_calibration_error']:.4f} uncalibrated)" if report["temperature"] != 1 else ""
    yield f"{'calibration error':18}  {report['calibration_error']:.4f}{raw}"
    yield f"{'mean confidence':18}  {report['mean_confidence']:.4f}"
    yield INTERVALS
    yield ""
    yield "at most    --min-confidence        answered"
    for row in report["thresholds"]:
        if row["errors"] is None:
            yield f"{row['error_rate']:.0%} errors  not reached at any confidence"
        else:
            answered = f"{row['answered']:.1%} of the images, errors {_format_metric(row['errors'], 3)}"
            yield f"{row['error_rate']:.0%} errors  {row['confidence']:.4f}{'':18}{answered}"


def format_comparison(comparison: Mapping[str, Any], other: object) -> Iterator[str]:
    """Yield the lines of a comparison with the weights `other`."""
    low, high = (100 * limit for limit in comparison["difference"]["interval"])
    significance = "not significant at 5%" if comparison["p_value"] >= 0.05 else "significant at 5%"
    yield f"compared with {printable(str(other))} on {comparison['images']} images:"
    yield f"{'accuracy':18}  {comparison['accuracy']:.4f}, the other {comparison['other_accuracy']:.4f}"
    yield f"{'difference':18}  {100 * comparison['difference']['value']:+.2f} points ({low:+.2f} to {high:+.2f})"
    yield f"{'only one right':18}  this {comparison['only_this_right']}, the other {comparison['only_other_right']}"
    yield f"{'exact McNemar test':18}  p = {comparison['p_value']:.4g}: {significance}"


def _format_metric(metric: Mapping[str, Any] | None, digits: int = 4) -> str:
    if metric is None:
        return "undefined"
    low, high = metric["interval"]
    return f"{metric['value']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


# --- table ------------------------------------------------------------------------------------------------------------


def prediction_rows(results: Results) -> Iterator[dict[str, str]]:
    """Yield the rows of predictions.csv, with the probability of each class."""
    evaluation, names = results.evaluation, results.class_names
    columns = [f"probability of {name}" for name in names]
    pairs = zip(evaluation.predicted.tolist(), evaluation.losses.tolist(), strict=True)
    for file, (predicted, loss), probabilities in zip(results.files, pairs, evaluation.probabilities, strict=True):
        yield {
            "path": file.path,
            "label": file.label,
            "predicted": names[predicted],
            "probability": f"{probabilities.max():.6f}",
            "loss": f"{loss:.6f}",
        } | {column: f"{value:.6f}" for column, value in zip(columns, probabilities.tolist(), strict=True)}
