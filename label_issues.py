"""Find labels that are probably wrong, given predictions by networks that were not trained on the images."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from metrics import Interval, wilson_interval

CONFIDENT = 0.25  # the fraction of images, the most confident ones, from which the estimate is made
MAX_FRACTION = 0.2  # largest estimate to report; above it, the network's own mistakes may dominate


class LabelIssues(NamedTuple):
    """A ranking of labels.

    Attributes:
        order: (N,) int64, the indices of the images, the most suspicious label first.
        suggested: (N,) int64, for each image the most probable class other than its label.
    """

    order: Tensor
    suggested: Tensor


def rank_labels(probabilities: Tensor, labels: Tensor) -> LabelIssues:
    """Rank labels by their probability, divided by the mean of that over the images with the same label.

    That mean is the per-class threshold of confident learning (Northcutt et al. 2021,
    https://arxiv.org/abs/1911.00068), which allows for classes that are difficult to learn.

    Args:
        probabilities: (N, classes) float32, out-of-fold.
        labels: (N,) int64.
    """
    columns = labels.unsqueeze(1)
    own = probabilities.gather(1, columns).squeeze(1)
    sums = torch.zeros(probabilities.shape[1]).index_add(0, labels, own)
    thresholds = sums / labels.bincount(minlength=probabilities.shape[1]).clamp(min=1)
    scores = own / thresholds[labels].clamp(min=1e-12)  # 0 for a class that was never learnt
    return LabelIssues(scores.argsort(stable=True), probabilities.scatter(1, columns, -1.0).argmax(dim=1))


def estimate_wrong_labels(probabilities: Tensor, labels: Tensor) -> Interval | None:
    """Estimate the fraction of wrong labels, as a range; None if it is too uncertain.

    The confidence of an out-of-fold prediction hardly depends on the image's own label. Where it is high, the network
    is nearly always right, so a label that differs is nearly always wrong. This assumes that labels are wrong there as
    often as elsewhere. If clearly more labels differ in the less confident half of these images, the network is wrong
    there too, and the range extends downwards.

    Args:
        probabilities: (N, classes) float32, out-of-fold.
        labels: (N,) int64.
    """
    confidences, predicted = probabilities.max(dim=1)
    most_confident = confidences.argsort(descending=True, stable=True)[: int(CONFIDENT * len(labels))]
    differs = (predicted != labels)[most_confident]
    first, second = differs.tensor_split(2)
    if not len(first):
        return None
    rates = [half.double().mean().item() for half in (first, second)]
    deviation = math.sqrt(sum(rate * (1 - rate) for rate in rates) / len(first))
    low = wilson_interval(int(first.sum()), len(first))[0] - max(0.0, rates[1] - rates[0] - deviation)
    high = wilson_interval(int(differs.sum()), len(differs))[1]
    return None if high > MAX_FRACTION else (max(0.0, low), high)
