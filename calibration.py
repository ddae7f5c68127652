"""Calibrated probabilities: temperature scaling and the calibration error."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

BINS = 15  # in the reliability diagram
MAX_LOG_TEMPERATURE = math.log(10)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Fit the temperature T, 0.1 to 10, that minimises the cross-entropy of softmax(logits / T).

    Guo et al. 2017, https://arxiv.org/abs/1706.04599. As in Platt scaling (Platt 1999), the targets are smoothed, here
    by label smoothing of 1 / (N + 2): otherwise T would approach 0 if there are no mistakes.

    Args:
        logits: (N, classes), of images that the network was not trained on.
        labels: (N,) int64.
    """
    logits = logits.float()
    smoothing = 1 / (len(labels) + 2)
    label_logits = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    target = (1 - smoothing) * label_logits + smoothing * logits.mean(dim=1)
    low, high = -MAX_LOG_TEMPERATURE, MAX_LOG_TEMPERATURE
    while high - low > 1e-4:  # bisection on d(loss) / d(log T)
        middle = (low + high) / 2
        expected = (logits * (logits / math.exp(middle)).softmax(dim=1)).sum(dim=1)
        low, high = (middle, high) if target.mean() < expected.mean() else (low, middle)
    return math.exp((low + high) / 2)


class Reliability(NamedTuple):
    """Images in confidence bins of equal width, (BINS,) each; the means of an empty bin are NaN."""

    counts: Tensor
    confidences: Tensor  # mean confidence
    accuracies: Tensor

    @property
    def calibration_error(self) -> float:
        """The expected calibration error: mean |accuracy - confidence| of the bins, weighted by their counts."""
        gaps = (self.accuracies - self.confidences).abs().nan_to_num()
        return ((gaps * self.counts).sum() / self.counts.sum()).item()


def measure_reliability(probabilities: Tensor, labels: Tensor) -> Reliability:
    """Compare the confidence with the accuracy.

    Args:
        probabilities: (N, classes) float. The confidence is the probability of the predicted class.
        labels: (N,) int64.
    """
    confidences, predicted = probabilities.double().max(dim=1)
    bins = (confidences * BINS).long().clamp(max=BINS - 1)
    counts = torch.bincount(bins, minlength=BINS)
    return Reliability(
        counts,
        torch.bincount(bins, confidences, minlength=BINS) / counts,
        torch.bincount(bins, (predicted == labels).double(), minlength=BINS) / counts,
    )


def reliability_curves(logits: Tensor, labels: Tensor, temperature: float | None) -> dict[str, Reliability]:
    """Return the reliability without and with the temperature, if any, keyed by legend label."""
    temperatures = {"uncalibrated": 1.0} | ({} if temperature is None else {"calibrated": temperature})
    curves = {}
    for name, value in temperatures.items():
        curve = measure_reliability((logits / value).softmax(dim=1), labels)
        curves[f"{name}: calibration error {curve.calibration_error:.1%}"] = curve
    return curves
