"""Temperature scaling and the calibration error."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from calibration import fit_temperature, measure_reliability, reliability_curves


def draw(images: int, temperature: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw logits of five classes, and labels for which softmax(logits / temperature) is calibrated."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, 5, generator=generator)
    labels = torch.multinomial((logits / temperature).softmax(dim=1), 1, generator=generator).squeeze(1)
    return logits, labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_temperature_is_recovered(temperature):
    logits, labels = draw(5000, temperature)
    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(temperature, rel=0.1)
    loss = F.cross_entropy(logits / fitted, labels)
    assert all(loss <= F.cross_entropy(logits / (fitted * factor), labels) for factor in (0.9, 1.1))


def test_temperature_calibrates_other_images():
    temperature = fit_temperature(*draw(500, 0.5, seed=1))
    logits, labels = draw(2000, 0.5, seed=2)
    before, after = (measure_reliability((logits / t).softmax(dim=1), labels) for t in (1.0, temperature))
    assert before.calibration_error > 0.1
    assert after.calibration_error < 0.04


@pytest.mark.parametrize("images", [1, 5, 60])
def test_no_mistakes_do_not_make_a_network_certain(images):
    logits, _ = draw(images, 1.0)
    probabilities = (logits / fit_temperature(logits, logits.argmax(dim=1))).softmax(dim=1)
    assert probabilities.amax(dim=1).mean() < 1 - 0.5 / (images + 2)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_extreme_logits_give_a_positive_temperature(scale):
    logits, labels = draw(50, 1.0)
    assert 0.09 < fit_temperature(scale * logits, labels.roll(1)) < 11


def test_calibration_error_agrees_with_numpy():
    logits, labels = draw(700, 0.6)
    probabilities = logits.softmax(dim=1)
    confidence, right = probabilities.amax(dim=1).numpy(), (probabilities.argmax(dim=1) == labels).numpy()
    bins, error = np.minimum((confidence * 15).astype(int), 14), 0.0
    for index in range(15):
        if (chosen := bins == index).any():
            error += chosen.mean() * abs(right[chosen].mean() - confidence[chosen].mean())
    assert measure_reliability(probabilities, labels).calibration_error == pytest.approx(error, abs=1e-6)
    certain = torch.eye(3)
    assert measure_reliability(certain, torch.arange(3)).calibration_error == 0
    assert measure_reliability(certain, torch.arange(3).roll(1)).calibration_error == 1


def test_curves_of_a_reliability_diagram():
    logits, labels = draw(100, 0.5)
    legends = list(reliability_curves(logits, labels, 0.5))
    assert [legend.partition(":")[0] for legend in legends] == ["uncalibrated", "calibrated"]
    assert len(reliability_curves(logits, labels, None)) == 1
