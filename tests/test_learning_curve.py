"""The extrapolation of learning curves, on simulated networks."""

import numpy as np
import pytest

from learning_curve import fit_learning_curve

SIZES = [150, 300, 600, 1200]
FOLDS = 5


def simulate(scale: float, exponent: float, floor: float, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Draw whether networks with error(n) = scale * (n / 1200) ** -exponent + floor are right about 1,500 images.

    Returns:
        (N, S) bool, (N,) folds, and the accuracy of a network with twice as many images.
    """
    generator = np.random.default_rng(seed)
    errors = scale * (np.array(SIZES) / SIZES[-1]) ** -exponent + floor
    folds = np.arange(1500) % FOLDS
    varied = errors + generator.normal(0, 0.01, (FOLDS, len(SIZES)))
    correct = generator.random((1500, len(SIZES))) > varied[folds]
    return correct, folds, 1 - scale * 2**-exponent - floor


@pytest.mark.parametrize(("scale", "exponent", "floor"), [(0.2, 0.4, 0.0), (0.15, 0.6, 0.05), (0.3, 0.2, 0.0)])
def test_range_contains_the_accuracy_with_twice_as_many_images(scale, exponent, floor):
    covered = []
    for seed in range(12):
        correct, folds, twice = simulate(scale, exponent, floor, seed)
        curve = fit_learning_curve(SIZES, correct, folds)
        covered.append(curve.interval[0] <= twice <= curve.interval[1])
        assert curve.interval[0] <= curve.expected <= curve.interval[1]
        assert curve.interval[1] - curve.interval[0] < 0.14
        assert curve.expected == pytest.approx(twice, abs=0.05)
    assert sum(covered) >= 9


def test_scatter_around_the_curve_widens_the_range():
    widths = []
    for third in (0.58, 0.72):  # on and off the curve
        columns = [np.arange(200) < round(200 * accuracy) for accuracy in (0.30, 0.45, third, 0.67)]
        curve = fit_learning_curve(
            SIZES, np.stack(columns, axis=1)[np.argsort(np.arange(200) * 7 % 200)], np.zeros(200)
        )
        widths.append(curve.interval[1] - curve.interval[0])
    assert widths[1] > 1.3 * widths[0]


def test_curve_ends_at_twice_the_images():
    correct, folds, _ = simulate(0.2, 0.4, 0.0, 0)
    curve = fit_learning_curve(SIZES, correct, folds)
    assert curve.sizes.tolist() == SIZES
    assert curve.accuracies == pytest.approx(correct.mean(axis=0))
    assert (curve.grid[0], curve.grid[-1]) == pytest.approx((150, 2400))
    assert curve.fitted[-1] == curve.expected
    assert (np.diff(curve.fitted) >= -1e-12).all()


@pytest.mark.parametrize("value", [True, False])
def test_networks_that_are_always_right_or_wrong(value):
    curve = fit_learning_curve(SIZES, np.full((40, 4), value), np.arange(40) % 2)
    assert curve.expected == pytest.approx(float(value), abs=0.06)
    assert 0 <= curve.interval[0] <= curve.interval[1] <= 1


def test_few_images_of_one_fold():
    curve = fit_learning_curve(SIZES, np.array([[False, False, True, True]]), np.array([0]))
    assert 0 <= curve.interval[0] <= curve.interval[1] <= 1
