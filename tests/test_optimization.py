"""Learning-rate and image-size schedules, and Muon."""

import copy
import math

import pytest
import torch

import config
from dataset_split import Count
from optimization import Muon, Schedule, TimedSchedule, build_class_weights, orthogonalize


def test_per_epoch_schedule_is_the_tutorials_cosine():
    schedule = Schedule(30, 100, lr=0.001, lrf=0.1)
    for epoch in (0, 1, 17, 29):
        expected = 0.001 * (((1 + math.cos(math.pi * epoch / 30)) / 2) * (1 - 0.1) + 0.1)
        assert schedule.learning_rate(epoch) == schedule.learning_rate(epoch, 99) == pytest.approx(expected)
        assert schedule.img_size(epoch) == 224
    assert [schedule.is_over(epoch) for epoch in (0, 29, 30)] == [False, False, True]


def test_per_step_schedule_warms_up_and_decays():
    schedule = Schedule(10, 5, lr=0.4, lrf=0.01, warmup=0.2, per_step=True)
    rates = [schedule.learning_rate(step // 5, step % 5) for step in range(50)]
    assert rates[0] == pytest.approx(0.4 / 25)
    assert rates[:11] == sorted(rates[:11])
    assert rates[5] == pytest.approx((rates[0] + 0.4) / 2)  # halfway through warm-up
    assert rates[10] == max(rates) == pytest.approx(0.4)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert schedule.learning_rate(10) == pytest.approx(0.004)


def test_image_size_grows():
    schedule = Schedule(20, 5, lr=1.0, lrf=0.0, img_sizes=(64, 136))
    sizes = [schedule.img_size(epoch) for epoch in range(20)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-4:]) == (64, [136] * 4)
    assert {size % 16 for size in sizes[:-4]} == {0}
    assert len(set(sizes)) > 4


def test_color_jitter_grows_with_the_length_of_the_training():
    options = {"lr": 1.0, "lrf": 0.0, "color_jitter": 0.4}
    strengths = [Schedule(epochs, 5, **options).color_jitter(epoch=3) for epochs in (8, 16, 32, 48, 96)]
    assert strengths == pytest.approx([0, 0, 0.2, 0.4, 0.4])


@pytest.mark.parametrize("epochs", [16, 32, 48])
def test_timed_schedule_estimates_the_number_of_epochs(epochs):
    """The images grow, so the first epochs are faster than the last ones."""
    sizes = 64, 112
    seconds = [Schedule(epochs, 1, lr=1.0, lrf=0.0, img_sizes=sizes).img_size(epoch) ** 2 for epoch in range(epochs)]
    now = [0.0]
    timed = TimedSchedule(sum(seconds), lambda: now[0], lr=1.0, lrf=0.0, img_sizes=sizes)
    assert timed.expected_epochs(0) == 0
    for epoch in range(1, epochs):
        now[0] = sum(seconds[:epoch])
        assert timed.expected_epochs(epoch) == pytest.approx(epochs, rel=0.35)


def test_timed_schedule_follows_the_clock():
    now = [10.0]
    options = {"lr": 0.4, "lrf": 0.01, "warmup": 0.2, "per_step": True, "img_sizes": (64, 128)}
    schedule = TimedSchedule(100.0, lambda: now[0], **options)
    assert schedule.progress(0) == pytest.approx(0.1)
    assert schedule.learning_rate(3, 7) == pytest.approx(0.4 * (0.04 + 0.96 / 2))
    schedule.reserve_time(20 / 1.2)  # reserves 1.2 times as much
    now[0] = 40.0
    assert schedule.progress(5) == pytest.approx(0.5)
    assert 64 < schedule.img_size(5) < 128
    state = schedule.state_dict()
    now[0] = 5.0  # interrupted, then resumed by another process
    other = TimedSchedule(100.0, lambda: now[0], **options)
    other.load_state_dict(state)
    assert other.progress(5) == pytest.approx(0.5)
    assert not other.is_over(5)
    now[0] += 40.0
    assert other.is_over(5)
    assert other.learning_rate(5) == pytest.approx(0.004)
    assert other.img_size(5) == 128


# --- Muon -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [[(4, 64, 576), (1, 64, 64), (2, 64, 9)], [(1, 1, 27)]])
@pytest.mark.parametrize("decades", [1.5, 4])
def test_orthogonalize_matches_newton_schulz_iterations(shapes, decades):
    """The singular values span up to four decades."""
    matrices = []
    for shape in shapes:
        left, _, right = torch.linalg.svd(torch.randn(shape, generator=seeded()), full_matrices=False)
        matrices.append((left * torch.logspace(0, -decades, min(shape[1:]))) @ right)
    for matrix, result in zip(matrices, orthogonalize(matrices), strict=True):
        expected = matrix.double() / torch.linalg.matrix_norm(matrix.double(), keepdim=True)
        for _ in range(5):
            gram = expected @ expected.mT
            expected = 3.4445 * expected + (-4.7750 * gram + 2.0315 * gram @ gram) @ expected
        assert (result - expected).norm() < 1e-3 * expected.norm()
        values = torch.linalg.svdvals(result)
        assert values.max() < 1.35
        assert values.min() > 0.5 or decades > 1.5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def convolution(memory_format: torch.memory_format = torch.contiguous_format) -> torch.nn.Conv2d:
    """Return a convolution of 96 kernels, which Muon splits into three blocks of 32 rows."""
    layer = torch.nn.Conv2d(8, 96, kernel_size=3, bias=False).to(memory_format=memory_format)
    torch.nn.init.normal_(layer.weight, std=0.1, generator=seeded())
    return layer


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_muon_step_rotates_a_kernel_by_the_learning_rate(memory_format):
    layer = convolution(memory_format)
    before = layer.weight.detach().clone()
    gradient = torch.randn(before.shape, generator=seeded(1))
    gradient += 10 * gradient.flatten(1)[:, :1, None, None]  # one direction dominates
    layer.weight.grad = gradient.clone(memory_format=memory_format)
    Muon([{"params": [layer.weight], "orthogonal": True}], lr=0.02, momentum=0.9).step()

    after = layer.weight.detach()
    assert torch.equal(layer.weight.grad, gradient)
    assert after.norm() == pytest.approx(before.norm())
    angle = torch.acos(torch.cosine_similarity(after.flatten().double(), before.flatten().double(), dim=0))
    assert angle == pytest.approx(0.02, rel=0.05)
    assert ((before - after) * gradient).sum() > 0  # reduces the loss
    of_step, of_gradient = (
        torch.linalg.svdvals(change.movedim(1, -1).reshape(3, 32, 72)) for change in (before - after, gradient)
    )
    assert of_gradient.amax() > 100 * of_gradient.amin()
    assert of_step.amax() < 3 * of_step.amin()


def test_muon_uses_nesterov_momentum():
    layer, momentum = convolution(), 0.0
    optimizer = Muon([{"params": [layer.weight], "orthogonal": True}], lr=0.1, momentum=0.9)
    for step in range(4):
        before = layer.weight.detach().clone()
        gradient = torch.randn(before.shape, generator=seeded(1 + step))
        layer.weight.grad = gradient
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        ahead = (0.1 * gradient + 0.9 * momentum).movedim(1, -1).reshape(3, 32, 72)
        left, _, right = torch.linalg.svd(ahead, full_matrices=False)
        expected = (left @ right).reshape(96, 3, 3, 8).movedim(-1, 1)
        moved = before - layer.weight.detach()
        moved -= before * (moved * before).sum() / before.square().sum()  # tangential: the kernel's norm is constant
        expected -= before * (expected * before).sum() / before.square().sum()
        assert torch.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.97, step


def test_muon_applies_sgd_to_other_parameters():
    layers = [torch.nn.Linear(4, 3) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    groups = [{"params": list(layers[0].parameters()), "orthogonal": False}]
    optimizers = Muon(groups, **options), torch.optim.SGD(layers[1].parameters(), **options)
    for layer, optimizer in zip(layers, optimizers, strict=True):
        for step in range(3):
            optimizer.zero_grad()
            layer(torch.full((2, 4), float(step))).square().sum().backward()
            optimizer.step()
    assert all(torch.equal(layers[0].get_parameter(name), value) for name, value in layers[1].named_parameters())


def test_muon_keeps_kernels_with_zero_or_missing_gradients():
    """Weight decay does not apply either: the norm of a kernel has no effect."""
    with_zeros, without = convolution(), convolution()
    before = with_zeros.weight.detach().clone()
    with_zeros.weight.grad = torch.zeros_like(before)
    groups = [{"params": [with_zeros.weight, without.weight], "orthogonal": True}]
    Muon(groups, lr=0.1, momentum=0.9, weight_decay=0.5).step()
    assert torch.equal(without.weight, before)
    torch.testing.assert_close(with_zeros.weight.detach(), before)


def test_muon_resumes_from_its_state():
    """The result is bit-identical, as resume requires."""
    images = torch.randn(4, 8, 6, 6, generator=seeded())

    def steps(layer: torch.nn.Conv2d, optimizer: Muon, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            layer(images).sin().sum().backward()
            optimizer.step()

    def optimizer_of(layer: torch.nn.Conv2d) -> Muon:
        return Muon([{"params": [layer.weight], "orthogonal": True}], lr=0.1, momentum=0.9)

    whole, first, second = convolution(), convolution(), convolution()
    steps(whole, optimizer_of(whole), 4)
    optimizer = optimizer_of(first)
    steps(first, optimizer, 2)
    second.load_state_dict(first.state_dict())
    other = optimizer_of(second)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(second, other, 2)
    assert torch.equal(second.weight, whole.weight)
    assert not torch.equal(second.weight, first.weight)
    second.load_state_dict(first.state_dict())
    steps(second, optimizer_of(second), 2)
    assert not torch.equal(second.weight, whole.weight)  # the state matters


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_class_weights_follow_the_counts(power):
    args = config.parse_args(["--class-weights", str(power)])
    weights = build_class_weights(
        args, {"a": Count(100, 3, 0), "b": Count(25, 9, 0), "c": Count(1, 0, 0)}, torch.device("cpu")
    )
    assert weights[1] / weights[0] == pytest.approx(4**power)
    assert weights[2] / weights[0] == pytest.approx(100**power)
    assert (weights * torch.tensor([100, 25, 1])).sum() == pytest.approx(126)
    assert (
        build_class_weights(config.parse_args([]), {"a": Count(100, 3, 0), "b": Count(25, 9, 0)}, torch.device("cpu"))
        is None
    )
