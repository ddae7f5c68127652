"""The schedule, the range test, and what is measured to plan by."""

import copy
import math

import numpy as np
import pytest
import torch
from test_train_eval_utils import CPU, loader, tiny_resnet

from optimization import Schedule, TimedSchedule, find_learning_rate, measure_speed


def test_the_tutorials_rate_changes_by_epoch():
    schedule = Schedule(30, 100, lr=0.001, lrf=0.1)
    for epoch in (0, 1, 17, 29):
        expected = 0.001 * (((1 + math.cos(math.pi * epoch / 30)) / 2) * (1 - 0.1) + 0.1)
        assert schedule.learning_rate(epoch) == schedule.learning_rate(epoch, 99) == pytest.approx(expected)
        assert schedule.img_size(epoch) == 224
    assert [schedule.is_over(epoch) for epoch in (0, 29, 30)] == [False, False, True]


def test_a_rate_by_step_rises_and_then_falls_to_its_end():
    schedule = Schedule(10, 5, lr=0.4, lrf=0.01, warmup=0.2, by_step=True)
    rates = [schedule.learning_rate(step // 5, step % 5) for step in range(50)]
    assert rates[0] == pytest.approx(0.4 / 25)
    assert rates[:11] == sorted(rates[:11])
    assert rates[5] == pytest.approx((rates[0] + 0.4) / 2)  # half-way up
    assert rates[10] == max(rates) == pytest.approx(0.4)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert schedule.learning_rate(10) == pytest.approx(0.004)


def test_images_grow():
    schedule = Schedule(20, 5, lr=1.0, lrf=0.0, img_sizes=(64, 136))
    sizes = [schedule.img_size(epoch) for epoch in range(20)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-4:]) == (64, [136] * 4)
    assert {size % 16 for size in sizes[:-4]} == {0}
    assert len(set(sizes)) > 4


def test_a_timed_schedule_follows_the_clock():
    now = [10.0]
    options = {"lr": 0.4, "lrf": 0.01, "warmup": 0.2, "by_step": True, "img_sizes": (64, 128)}
    schedule = TimedSchedule(100.0, lambda: now[0], **options)
    assert schedule.progress(0) == pytest.approx(0.1)
    assert schedule.learning_rate(3, 7) == pytest.approx(0.4 * (0.04 + 0.96 / 2))
    schedule.reserve_time(10.0)  # twice that is kept back
    now[0] = 40.0
    assert schedule.progress(5) == pytest.approx(0.5)
    assert 64 < schedule.img_size(5) < 128
    state = schedule.state_dict()
    now[0] = 5.0  # interrupted, and gone on later by another process
    other = TimedSchedule(100.0, lambda: now[0], **options)
    other.load_state_dict(state)
    assert other.progress(5) == pytest.approx(0.5)
    assert not other.is_over(5)
    now[0] += 40.0
    assert other.is_over(5)
    assert other.learning_rate(5) == pytest.approx(0.004)
    assert other.img_size(5) == 128


def test_a_range_test_of_a_valley():
    """The loss falls with the rate's logarithm up to 0.1, and rises four times as fast from there."""
    half_lost = 0.1 * math.exp(math.log(0.1 / 1e-4) / 2 / 4)
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)

    class Valley(torch.nn.Module):
        def forward(self, images):
            beyond = math.log(optimizer.param_groups[0]["lr"]) - math.log(0.1)
            loss = 2 + max(-beyond, 4 * beyond)
            return torch.stack([torch.zeros(len(images)), torch.full((len(images),), loss)], dim=1) + 0 * weight

    def set_rate(rate: float) -> None:
        optimizer.param_groups[0]["lr"] = rate

    rates = np.geomspace(1e-4, 100, 60)
    batches = [(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))] * 60
    found = find_learning_rate(Valley(), optimizer, batches, "cpu", set_rate, rates)
    assert found.losses.argmin() == pytest.approx(30, abs=1)
    assert found.suggestion == pytest.approx(half_lost, rel=0.3)


def test_measuring_the_speed_leaves_the_network_alone():
    model = tiny_resnet()
    before = copy.deepcopy(model.state_dict())
    assert measure_speed(model, loader(), CPU, seconds=0.01) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
