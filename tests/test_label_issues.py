"""The ranking of labels, and the estimated number of wrong ones, on simulated networks."""

import pytest
import torch

from label_issues import estimate_wrong_labels, rank_labels


def simulate(rate: float, classes: int, margin: float, seed: int, images: int = 2000) -> tuple[torch.Tensor, ...]:
    """Draw out-of-fold probabilities, labels of which the fraction `rate` is wrong, and the true labels."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randint(classes, (images,), generator=generator)
    logits = 1.3 * torch.randn(images, classes, generator=generator)
    logits[torch.arange(images), true] += margin + margin / 2 * torch.randn(images, generator=generator)
    wrong = torch.rand(images, generator=generator) < rate
    other = (true + torch.randint(1, classes, (images,), generator=generator)) % classes
    return logits.softmax(dim=1), torch.where(wrong, other, true), true


@pytest.mark.parametrize("seed", range(3))
def test_wrong_labels_come_first_with_the_true_class_as_suggestion(seed):
    probabilities, labels, true = simulate(0.05, 5, 5.0, seed)
    issues = rank_labels(probabilities, labels)
    wrong = labels != true
    first = issues.order[: int(wrong.sum())]
    assert wrong[first].double().mean() > 0.6
    found = first[wrong[first]]
    assert (issues.suggested[found] == true[found]).double().mean() > 0.9
    assert (issues.suggested != labels).all()
    assert sorted(issues.order.tolist()) == list(range(len(labels)))


@pytest.mark.parametrize("margin", [2.5, 4.0, 6.0])  # accuracies from 52 to 96%
@pytest.mark.parametrize("classes", [2, 5, 20])
@pytest.mark.parametrize("rate", [0.0, 0.02, 0.1])
def test_range_contains_the_fraction_of_wrong_labels(rate, classes, margin):
    covered, widths = [], []
    for seed in range(40):
        probabilities, labels, true = simulate(rate, classes, margin, seed)
        estimate = estimate_wrong_labels(probabilities, labels)
        if estimate is not None:
            low, high = estimate
            covered.append(low - 0.005 <= (labels != true).double().mean() <= high)
            widths.append(high - low)
    if margin >= 4:
        assert len(covered) == 40
        assert sum(widths) / 40 < 0.07
    assert sum(covered) >= 0.85 * len(covered)


def test_no_estimate_by_a_weak_network():
    probabilities, labels, _ = simulate(0.05, 20, 1.0, 0)
    assert estimate_wrong_labels(probabilities, labels) is None
    assert estimate_wrong_labels(probabilities[:3], labels[:3]) is None


def test_label_with_the_lowest_probability_comes_first():
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    issues = rank_labels(probabilities, torch.tensor([0, 0, 0]))
    assert issues.order.tolist() == [2, 1, 0]
    assert issues.suggested.tolist() == [1, 1, 1]


def test_probability_is_relative_to_that_of_the_class():
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.5, 0.5], [0.55, 0.45], [0.55, 0.45]])
    issues = rank_labels(probabilities, torch.tensor([0, 0, 0, 1, 1]))  # class 1 is difficult
    assert issues.order.tolist()[0] == 2


def test_class_that_was_never_learnt_comes_first():
    probabilities = torch.tensor([[0.1, 0.9, 0.0], [0.2, 0.8, 0.0], [0.3, 0.7, 0.0], [0.0, 1.0, 0.0]])
    issues = rank_labels(probabilities, torch.tensor([1, 0, 1, 2]))
    assert issues.order[0] == 3
