"""Find probably wrong labels, given predictions by networks that were not trained on the images."""

from typing import NamedTuple

from torch import Tensor

from metrics import Interval, wilson_interval

CONFIDENT = 0.25  # the fraction of the images, those with the highest confidence, that the number of issues is based on


class LabelIssues(NamedTuple):
    """The suspicion against each label.

    Attributes:
        order: (N,) int64, the images' indices, the most suspicious first.
        suggested: (N,) int64, the most probable class other than the label.
        scores: (N,) float32 in 0..1, the lower the more suspicious.
    """

    order: Tensor
    suggested: Tensor
    scores: Tensor


def rank_labels(probabilities: Tensor, labels: Tensor) -> LabelIssues:
    """Rank labels by self-confidence.

    Args:
        probabilities: (N, classes) float32, out-of-fold.
        labels: (N,) int64.
    """
    scores = probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
    others = probabilities.scatter(1, labels.unsqueeze(1), -1.0)
    return LabelIssues(scores.argsort(stable=True), others.argmax(dim=1), scores)


def estimate_wrong_labels(probabilities: Tensor, labels: Tensor) -> Interval:
    """Estimate the fraction of wrong labels, as a 95% interval."""
    confidences, predicted = probabilities.max(dim=1)
    chosen = confidences.argsort(descending=True, stable=True)[: max(1, int(CONFIDENT * len(labels)))]
    return wilson_interval(int((predicted[chosen] != labels[chosen]).sum()), len(chosen))
