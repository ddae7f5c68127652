"""Metrics of a classifier with confidence intervals, and the comparison of two classifiers."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Z = 1.959964  # the 97.5th percentile of the normal distribution, for 95% intervals
RESAMPLES = 2000  # bootstrap samples

Interval = tuple[float, float]


class Evaluation:
    """The metrics of one inference pass. All tensors are on the CPU and in the same order.

    Args:
        logits: (N, classes) float32.
        labels: (N,) int64, the true classes.
        indices: (N,) int64, the images' positions in the validation set, if known.
        features: (M, F) float32, the features of the images `indices[feature_rows]`, if computed.
        feature_rows: (M,) int64.
        layer1: (N, C) float32, see `inference.Outputs`.
    """

    def __init__(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        indices: Tensor | None = None,
        features: Tensor | None = None,
        feature_rows: Tensor | None = None,
        layer1: Tensor | None = None,
    ) -> None:
        self.logits, self.labels = logits, labels
        self.indices = indices
        self.features, self.feature_rows, self.layer1 = features, feature_rows, layer1
        self.classes = logits.shape[1]
        self.probabilities = logits.softmax(dim=1)
        """(N, classes) float32"""
        self.predicted = logits.argmax(dim=1)
        """(N,) int64"""
        self.losses = F.cross_entropy(logits, labels, reduction="none")
        """(N,) float32, the cross-entropy per image"""

    @property
    def loss(self) -> float:
        """The mean cross-entropy over the images."""
        return self.losses.double().mean().item()

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy in 0..1."""
        return (self.predicted == self.labels).double().mean().item()

    @property
    def confusion(self) -> Tensor:
        """The confusion matrix, (classes, classes) int64: true classes in rows, predicted classes in columns."""
        pairs = self.labels * self.classes + self.predicted
        return torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)

    @property
    def recalls(self) -> Tensor:
        """The recall per class, (classes,) float64; NaN for a class without images."""
        confusion = self.confusion
        return confusion.diag().double() / confusion.sum(dim=1)

    @property
    def precisions(self) -> Tensor:
        """The precision per class, (classes,) float64; NaN for a class that is never predicted."""
        confusion = self.confusion
        return confusion.diag().double() / confusion.sum(dim=0)

    @property
    def f1_scores(self) -> Tensor:
        """The F1 score per class, 2 TP / (2 TP + FP + FN), (classes,) float64; NaN without labels and predictions."""
        confusion = self.confusion
        return 2 * confusion.diag().double() / (confusion.sum(dim=0) + confusion.sum(dim=1))

    @property
    def macro_f1(self) -> float:
        """The mean of the F1 scores, in 0..1.

        Like scikit-learn's `f1_score(average="macro")`, it covers the classes that occur as a label or a prediction.
        """
        return self.f1_scores.nanmean().item()

    def top_k_hits(self, k: int) -> Tensor:
        """Return whether the label is among the `k` classes with the highest logits, (N,) bool."""
        return (self.logits.topk(min(k, self.classes), dim=1).indices == self.labels.unsqueeze(1)).any(dim=1)

    def worst_mistakes(self, count: int) -> list[int]:
        """Return the positions of up to `count` misclassified images, the highest loss first."""
        by_loss = self.losses.argsort(descending=True, stable=True).tolist()
        return [position for position in by_loss if self.predicted[position] != self.labels[position]][:count]


# --- confidence intervals -----------------------------------------------------------------------------------------


def wilson_interval(successes: int, trials: int) -> Interval:
    """Return Wilson's 95% score interval for a proportion.

    Wilson 1927; recommended by Brown, Cai & DasGupta 2001, https://doi.org/10.1214/ss/1009213286
    """
    if trials == 0:
        return 0.0, 1.0
    rate, spread = successes / trials, Z**2 / trials
    centre = rate + spread / 2
    margin = math.sqrt(spread * (rate * (1 - rate) + spread / 4))
    low, high = ((centre + sign * margin) / (1 + spread) for sign in (-1, 1))
    return min(rate, max(0.0, low)), max(rate, min(1.0, high))  # despite rounding


def bootstrap_f1(confusion: Tensor, seed: int = 0) -> tuple[Interval, np.ndarray]:
    """Bootstrap 95% percentile intervals for the F1 scores, by resampling the images (Efron 1979).

    Args:
        confusion: (classes, classes) int64, see `Evaluation.confusion`.

    Returns:
        The interval of macro F1, and (classes, 2) the intervals of the F1 scores; NaN for a class that does not occur.
    """
    rows, columns = np.nonzero(confusion.numpy())
    counts = confusion.numpy()[rows, columns]
    generator, classes = np.random.default_rng(seed), len(confusion)
    scores = np.empty((RESAMPLES, classes))
    for resample in range(RESAMPLES):
        drawn = generator.multinomial(counts.sum(), counts / counts.sum())  # N images with replacement
        hits = np.bincount(rows, drawn * (rows == columns), classes)
        either = np.bincount(rows, drawn, classes) + np.bincount(columns, drawn, classes)
        scores[resample] = np.divide(2 * hits, either, out=np.full(classes, np.nan), where=either > 0)
    occurs = np.isfinite(scores).any(axis=0)
    intervals = np.full((classes, 2), np.nan)
    intervals[occurs] = np.nanpercentile(scores[:, occurs], [2.5, 97.5], axis=0).T
    low, high = np.percentile(np.nanmean(scores, axis=1), [2.5, 97.5]).tolist()
    return (low, high), intervals


# --- selective classification -------------------------------------------------------------------------------------


class Threshold(NamedTuple):
    """The lowest confidence to accept, the number of images at or above it, and how many of these are wrong."""

    confidence: float
    answered: int
    wrong: int


def confidence_threshold(confidences: Tensor, correct: Tensor, error_rate: float) -> Threshold | None:
    """Return the threshold that accepts the most images with an error rate up to `error_rate`, or None.

    Selective classification by the softmax response: Geifman & El-Yaniv 2017, https://arxiv.org/abs/1705.08500

    Args:
        confidences: (N,) float, the probability of the predicted class.
        correct: (N,) bool.
    """
    confidences, order = confidences.sort(descending=True, stable=True)
    wrong = (~correct[order]).cumsum(dim=0)
    answered = torch.arange(1, len(confidences) + 1)
    last_of_equals = torch.cat([confidences[1:] < confidences[:-1], torch.tensor([True])])
    valid = (last_of_equals & (wrong <= error_rate * answered)).nonzero()
    if not len(valid):
        return None
    place = int(valid[-1])
    return Threshold(confidences[place].item(), place + 1, int(wrong[place]))


# --- comparison of two classifiers --------------------------------------------------------------------------------


class Comparison:
    """Two classifiers on the same images.

    Args:
        first, second: (N,) bool, whether each one's predictions are correct.
    """

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.images = len(first)
        self.only_first = int((first & ~second).sum())
        self.only_second = int((second & ~first).sum())

    @property
    def difference(self) -> float:
        """The accuracy of the first one minus that of the second one."""
        return (self.only_first - self.only_second) / self.images

    @property
    def interval(self) -> Interval:
        """The 95% Wald interval for the difference of paired proportions, adjusted as in Agresti & Min 2005.

        https://doi.org/10.1002/sim.1781
        """
        first, second, images = self.only_first + 0.5, self.only_second + 0.5, self.images + 2
        difference = (first - second) / images
        margin = Z * math.sqrt(first + second - (first - second) ** 2 / images) / images
        return max(-1.0, difference - margin), min(1.0, difference + margin)

    @property
    def p_value(self) -> float:
        """The p-value of the exact McNemar test: two-sided binomial, on the images that only one gets right."""
        trials, fewer = self.only_first + self.only_second, min(self.only_first, self.only_second)
        return min(1.0, 2 * sum(math.comb(trials, k) for k in range(fewer + 1)) / 2**trials)
