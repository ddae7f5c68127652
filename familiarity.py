"""Flag images unlike those that a network was validated on.

The confidence of a network says little about other images: it may be high for a page of text. Its first layers
respond to colours and textures, and these are often unusual for such images.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIN_IMAGES = 50
QUANTILE = 0.99  # fraction treated as familiar
RIDGE = 0.01  # added to the variances, as a fraction of them


class Familiarity(NamedTuple):
    """A normal distribution of layer1's mean activations, and the squared distance above which an image is unfamiliar.

    After Lee et al. 2018, https://arxiv.org/abs/1807.03888, with one distribution for all classes.

    Attributes:
        mean: (F,) float32.
        precision: (F, F) float32, the inverse of the covariance matrix.
        threshold: a squared Mahalanobis distance.
    """

    mean: Tensor
    precision: Tensor
    threshold: float

    def is_unfamiliar(self, features: Tensor) -> Tensor:
        """Return whether images with these features (N, F) are unfamiliar, (N,) bool."""
        difference = features - self.mean
        return ((difference @ self.precision) * difference).sum(dim=1) > self.threshold


def fit_familiarity(features: Tensor) -> Familiarity | None:
    """Fit the distribution to the features (N, F) of validation images; None if there are fewer than 50.

    The threshold is the 99th percentile of the leave-one-out distances, computed from the distances to the full
    distribution by the Sherman-Morrison formula.
    """
    images = len(features)
    if images < MIN_IMAGES:
        return None
    mean = features.double().mean(dim=0)
    difference = features.double() - mean
    scatter = difference.T @ difference
    variances = scatter.diagonal()
    scatter += torch.diag(RIDGE * variances + 1e-6 * variances.mean() + 1e-12)  # a dead channel has no variance
    inverse = torch.linalg.inv(scatter)
    leverage = ((difference @ inverse) * difference).sum(dim=1)
    ratio = images / (images - 1)
    distances = (images - 2) * ratio**2 * leverage / (1 - ratio * leverage)
    precision = (images - 1) * inverse
    return Familiarity(mean.float(), precision.float(), distances.quantile(QUANTILE).item())


def is_valid_familiarity(values: Any) -> bool:
    """Return whether these are the fields of a `Familiarity`, as read from a weights file."""
    match values:
        case {
            "mean": Tensor(ndim=1) as mean,
            "precision": Tensor() as precision,
            "threshold": float(threshold),
            **others,
        }:
            fits = not others and precision.shape == (len(mean), len(mean)) and math.isfinite(threshold)
            return fits and all(map(_is_plain, (mean, precision)))
    return False


def _is_plain(values: Tensor) -> bool:
    plain = values.dtype == torch.float32 and values.layout == torch.strided and values.device.type == "cpu"
    return plain and bool(values.isfinite().all())
