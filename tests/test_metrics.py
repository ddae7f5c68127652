"""Metrics against plain numpy, coverage of the confidence intervals, and the comparison of two classifiers."""

import math

import numpy as np
import pytest
import torch

from metrics import Comparison, Evaluation, bootstrap_f1, confidence_threshold, wilson_interval


def draw(generator: np.random.Generator, images: int, classes: int = 4, accuracy: float = 0.7) -> Evaluation:
    """Draw labels and logits whose highest one is the label with probability `accuracy`."""
    labels = generator.integers(classes, size=images)
    logits = generator.normal(size=(images, classes))
    right = generator.random(images) < accuracy
    other = (labels + generator.integers(1, classes, size=images)) % classes
    logits[np.arange(images), np.where(right, labels, other)] += 9
    return Evaluation(torch.from_numpy(logits), torch.from_numpy(labels))


def test_metrics_agree_with_numpy():
    evaluation = draw(np.random.default_rng(0), 200)
    labels, logits = evaluation.labels.numpy(), evaluation.logits.numpy()
    predicted, ranks = logits.argmax(axis=1), (-logits).argsort(axis=1)
    scores = []
    for index in range(4):
        hits = np.sum((predicted == index) & (labels == index))
        precision, recall = hits / np.sum(predicted == index), hits / np.sum(labels == index)
        scores.append(2 * precision * recall / (precision + recall))
        assert evaluation.precisions[index].item() == pytest.approx(precision)
        assert evaluation.recalls[index].item() == pytest.approx(recall)
        assert evaluation.f1_scores[index].item() == pytest.approx(scores[index])
    assert evaluation.macro_f1 == pytest.approx(np.mean(scores))
    for k in (1, 2, 4, 9):
        hits = (ranks[:, :k] == labels[:, None]).any(axis=1)
        np.testing.assert_array_equal(evaluation.top_k_hits(k).numpy(), hits)


@pytest.mark.parametrize("images", [50, 734])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_wilson_intervals_cover_the_true_accuracy(images, seed):
    generator = np.random.default_rng(seed)
    accuracies = generator.uniform(0.4, 0.98, size=2000)  # for a single one, the coverage is a step function
    hits = generator.binomial(images, accuracies)
    intervals = np.array([wilson_interval(int(successes), images) for successes in hits])
    assert 0.93 <= np.mean((intervals[:, 0] <= accuracies) & (accuracies <= intervals[:, 1])) <= 0.97


def test_wilson_interval_at_the_ends():
    # Newcombe 1998, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E, table I
    for (hits, trials), expected in {
        (81, 263): (0.2553, 0.3662),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson_interval(hits, trials) == pytest.approx(expected, abs=5e-5)
    assert wilson_interval(20, 20)[1] == 1
    assert wilson_interval(0, 0) == (0, 1)


def test_bootstrap_intervals_cover_the_true_f1(monkeypatch):
    monkeypatch.setattr("metrics.RESAMPLES", 200)
    generator = np.random.default_rng(0)
    true = 0.8  # with balanced classes and errors, each F1 score is the accuracy
    covered = []
    for _ in range(200):
        (low, high), of_classes = bootstrap_f1(draw(generator, 300, accuracy=true).confusion)
        covered.append([low <= true <= high, *((of_classes[:, 0] <= true) & (true <= of_classes[:, 1]))])
    macro, *of_classes = np.mean(covered, axis=0)
    assert 0.89 <= macro <= 0.99
    assert all(0.87 <= value <= 0.99 for value in of_classes)


def test_bootstrap_ignores_classes_that_do_not_occur():
    labels, logits = torch.tensor([0, 0, 1, 1]), torch.eye(3)[[0, 1, 1, 1]]
    evaluation = Evaluation(logits, labels)
    (low, high), of_classes = bootstrap_f1(evaluation.confusion)
    assert np.isnan(of_classes[2]).all()
    assert np.isfinite(of_classes[:2]).all()
    assert evaluation.macro_f1 == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert low <= evaluation.macro_f1 <= high
    assert (low, high) == bootstrap_f1(evaluation.confusion)[0]  # seeded


def test_confidence_threshold_answers_as_many_images_as_possible():
    confidences = torch.tensor([0.5, 0.9, 0.8, 0.8, 0.7, 0.99])
    correct = torch.tensor([False, True, True, False, True, True])
    assert confidence_threshold(confidences, correct, 0.0) == (pytest.approx(0.9), 2, 0)
    assert confidence_threshold(confidences, correct, 0.2) == (pytest.approx(0.7), 5, 1)
    assert confidence_threshold(confidences, correct, 0.25) == (pytest.approx(0.7), 5, 1)
    assert confidence_threshold(confidences, correct, 0.4) == (pytest.approx(0.5), 6, 2)
    assert confidence_threshold(confidences, ~correct, 0.1) is None


def test_comparison_of_two_classifiers():
    first = torch.tensor([True] * 8 + [False] * 2 + [True] * 10)
    second = torch.tensor([False] * 8 + [True] * 2 + [True] * 10)
    comparison = Comparison(first, second)
    assert (comparison.only_first, comparison.only_second, comparison.images) == (8, 2, 20)
    assert comparison.difference == pytest.approx(0.3)
    assert comparison.p_value == pytest.approx(2 * (1 + 10 + 45) / 1024)
    low, high = comparison.interval
    assert -0.05 < low < 0.3 < high < 0.65
    assert Comparison(second, first).interval == pytest.approx((-high, -low))
    assert Comparison(first, first).p_value == 1


def test_equal_classifiers_rarely_differ_significantly():
    generator = np.random.default_rng(0)
    p_values, covered = [], []
    for _ in range(2000):
        kinds = generator.choice(4, size=300, p=[0.8, 0.07, 0.07, 0.06])  # both, only first, only second, none
        comparison = Comparison(torch.from_numpy(kinds <= 1), torch.from_numpy((kinds == 0) | (kinds == 2)))
        p_values.append(comparison.p_value)
        covered.append(comparison.interval[0] <= 0 <= comparison.interval[1])
    assert 0.01 <= np.mean(np.array(p_values) < 0.05) <= 0.05  # the exact test is conservative
    assert 0.93 <= np.mean(covered) <= 0.97


def test_p_value_of_many_images_is_finite():
    kinds = torch.arange(20_000) % 2 == 0
    assert Comparison(kinds, ~kinds).p_value == 1
    assert math.isfinite(Comparison(torch.ones(20_000, dtype=torch.bool), ~kinds).p_value)
