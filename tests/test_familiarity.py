"""Images unlike the validation images are flagged, and few of those like them."""

import pytest
import torch

from familiarity import fit_familiarity, is_valid_familiarity


def draw(images: int, seed: int, channels: int = 16) -> torch.Tensor:
    """Draw correlated, positive features, one of which is always 0."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=torch.Generator().manual_seed(99))
    features = (torch.randn(images, channels, generator=generator) @ mixing + 3).relu()
    features[:, 0] = 0
    return features


@pytest.mark.parametrize("images", [200, 2000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_about_one_percent_of_other_images_is_flagged(images, seed):
    familiarity = fit_familiarity(draw(images, seed))
    assert 0.001 < familiarity.is_unfamiliar(draw(20_000, seed + 10)).float().mean() < 0.04


def test_strange_images_are_flagged():
    familiarity = fit_familiarity(draw(300, 0))
    others = draw(300, 1)
    for strange in (others + 10, others.flip(1), 50 * torch.rand(300, 16, generator=torch.Generator().manual_seed(0))):
        assert familiarity.is_unfamiliar(strange).float().mean() > 0.5


def test_threshold_is_that_of_leaving_each_image_out():
    features, distances = draw(60, 0)[:, 1:], []
    for index in range(60):
        others = torch.cat([features[:index], features[index + 1 :]]).double()
        difference = features[index].double() - others.mean(dim=0)
        covariance = torch.cov(others.T)
        distances.append(
            difference @ torch.linalg.inv(covariance + 0.01 * torch.diag(covariance.diagonal())) @ difference
        )
    expected = torch.stack(distances).quantile(0.99).item()
    assert fit_familiarity(features).threshold == pytest.approx(expected, rel=0.02)


def test_few_images_are_not_enough():
    assert fit_familiarity(draw(49, 0)) is None
    assert torch.isfinite(fit_familiarity(draw(50, 0, channels=256)).precision).all()


def test_values_of_a_weights_file_are_checked():
    valid = fit_familiarity(draw(60, 0))._asdict()
    assert is_valid_familiarity(valid)
    for changes in (
        {"mean": valid["mean"][:-1]},
        {"mean": [0.0] * 16},
        {"precision": valid["precision"][0]},
        {"precision": valid["precision"].double()},
        {"threshold": "high"},
        {"threshold": float("nan")},
        {"mean": valid["mean"] / 0},
        {"mean": valid["mean"].to("meta")},
        {"precision": valid["precision"].to_sparse()},
        {"more": 1},
    ):
        assert not is_valid_familiarity(valid | changes)
    assert not is_valid_familiarity([valid])
    assert not is_valid_familiarity({"mean": valid["mean"]})
