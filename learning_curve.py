"""Extrapolate the accuracy to twice as many training images."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DIVISORS = (1, 2, 4, 8)  # train on all images, and on nested subsets: a half, a quarter and an eighth
RESAMPLES = 1000
EXPONENTS = np.linspace(0.05, 1.5, 30)
PERCENTILES = (2.5, 97.5)
SHAPES = ((True, 0), (False, 0), (False, 2))  # the fits that are averaged: `floor` and `largest` of `_extrapolate`


class LearningCurve(NamedTuple):
    """The accuracy for each number of training images, and with twice the largest number.

    Attributes:
        sizes: (S,) numbers of training images, ascending.
        accuracies: (S,) measured.
        fitted: accuracies on the fitted curve at `grid`.
        grid: numbers of training images from the smallest to twice the largest.
        expected: the accuracy with twice as many images.
        interval: its 95% range.
    """

    sizes: np.ndarray
    accuracies: np.ndarray
    grid: np.ndarray
    fitted: np.ndarray
    expected: float
    interval: tuple[float, float]


def fit_learning_curve(sizes: Sequence[int], correct: np.ndarray, folds: np.ndarray, seed: int = 0) -> LearningCurve:
    """Fit power laws, error(n) = a * n ** -b + c, to extrapolate to 2 n images.

    Power laws describe most learning curves (Viering & Loog 2022, https://arxiv.org/abs/2103.10948), but extrapolations
    far beyond the data are unreliable (Mahmood et al. 2022, https://arxiv.org/abs/2207.01725). Three fits are averaged:
    with the floor c, without it, and without it to the two largest sizes alone, as a curve may bend. The range covers
    the sampling of the predicted images (bootstrap), the variation between training runs (the spread over the folds, or
    around the curve if that is larger), and the shape of the curve.

    Args:
        sizes: (S,) numbers of training images, ascending.
        correct: (N, S) bool, or float for means of several networks: whether the network that was trained on that many
            images is right about each image.
        folds: (N,) the fold of each image.
    """
    sizes = np.asarray(sizes, dtype=float)
    generator = np.random.default_rng(seed)
    errors = 1 - correct.mean(axis=0)
    numbers = np.unique(folds)
    images, training = len(correct), 0.0
    if len(numbers) > 1:
        per_fold = np.stack([1 - correct[folds == fold].mean(axis=0) for fold in numbers])
        sampling = errors * (1 - errors) * len(numbers) / images  # the variance of a fold's error due to its images
        training = np.maximum(0.0, per_fold.var(axis=0, ddof=1) - sampling).mean() / len(numbers)
    sampling = errors * (1 - errors) / images
    if len(sizes) > 2:  # the scatter around the fitted curve may reveal a larger variation
        residuals = errors - _extrapolate(sizes, errors[None], np.sqrt(sampling) + 1 / images, sizes)[0]
        training = max(training, (residuals**2).sum() / (len(sizes) - 2) - sampling.mean())
    drawn = np.stack([1 - correct[generator.integers(0, images, images)].mean(axis=0) for _ in range(RESAMPLES)])
    drawn += generator.normal(0, np.sqrt(training), drawn.shape)
    deviations = np.sqrt(sampling + training) + 1 / images
    doubled = [_extrapolate(sizes, drawn, deviations, 2 * sizes[-1:], *shape)[:, 0] for shape in SHAPES]
    low, high = np.percentile(np.clip(np.concatenate(doubled), 0, 1), PERCENTILES)
    grid = np.geomspace(sizes[0], 2 * sizes[-1], 50)
    curves = [_extrapolate(sizes, errors[None], deviations, grid, *shape)[0] for shape in SHAPES]
    fitted = 1 - np.clip(np.mean(curves, axis=0), 0, 1)
    return LearningCurve(sizes, 1 - errors, grid, fitted, float(fitted[-1]), (float(1 - high), float(1 - low)))


def _extrapolate(
    sizes: np.ndarray,
    errors: np.ndarray,
    deviations: np.ndarray,
    targets: np.ndarray,
    floor: bool = False,
    largest: int = 0,
) -> np.ndarray:
    """Fit error(n) = a * n ** -b + c by weighted least squares, with a, c >= 0, and evaluate it.

    Args:
        errors: (R, S), one curve per row.
        deviations: (S,), the standard deviations of the errors.
        floor: fit c; otherwise it is 0.
        largest: fit only to this many of the largest sizes; 0: to all.

    Returns:
        (R, T) the errors at `targets`.
    """
    sizes, errors, deviations = sizes[-largest:], errors[:, -largest:], deviations[-largest:]
    best = np.full(len(errors), np.inf)
    values = np.zeros((len(errors), len(targets)))
    weights = 1 / deviations**2
    for exponent in EXPONENTS:
        powers, target_powers = (sizes / sizes[-1]) ** -exponent, (targets / sizes[-1]) ** -exponent
        mean, mean_power = (errors @ weights) / weights.sum(), (powers @ weights) / weights.sum()
        spread = powers - mean_power
        slope = np.maximum(0.0, ((errors * weights) @ spread) / ((weights * spread) @ spread))
        offset = mean - slope * mean_power
        through_zero = ((errors * weights) @ powers) / ((weights * powers) @ powers)
        no_floor = (offset < 0) | (not floor)
        slope, offset = np.where(no_floor, through_zero, slope), np.where(no_floor, 0.0, offset)
        loss = ((errors - slope[:, None] * powers - offset[:, None]) ** 2 * weights).sum(axis=1)
        better = loss < best
        best = np.where(better, loss, best)
        values = np.where(better[:, None], slope[:, None] * target_powers + offset[:, None], values)
    return values
