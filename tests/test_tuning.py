"""Learning-rate range test and speed measurement."""

import itertools
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train_eval_utils import CPU, loader, tiny_resnet

import train
from tuning import lr_range_test, measure_speed


def test_find_learning_rate_on_a_valley():
    """The loss falls with the logarithm of the rate up to 0.1, then rises four times as fast."""
    half_lost = 0.1 * math.exp(math.log(0.1 / 1e-4) / 2 / 4)
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([{"params": [weight], "lr_scale": 1.0}], lr=1.0)

    class Valley(torch.nn.Module):
        def forward(self, images):
            beyond = math.log(optimizer.param_groups[0]["lr"]) - math.log(0.1)
            loss = 2 + max(-beyond, 4 * beyond)
            return torch.stack([torch.zeros(len(images)), torch.full((len(images),), loss)], dim=1) + 0 * weight

    rates = np.geomspace(1e-4, 100, 60)
    batches = [(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))] * 60
    found = lr_range_test(Valley(), optimizer, batches, "cpu", rates)
    assert found.losses.argmin() == pytest.approx(30, abs=1)
    assert found.suggestion == pytest.approx(half_lost, rel=0.3)


def test_measure_speed():
    model = tiny_resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    assert measure_speed(model, optimizer, loader(), CPU, seconds=0.01) > 0


def test_measured_speed_excludes_batches_that_were_loaded_before():
    """After two steps to warm up, eight prefetched batches come at once, the others after 0.1 s each."""

    class Loader:
        num_workers, prefetch_factor = 2, 4

        def __len__(self):
            return 40

        def __iter__(self):
            time.sleep(0.5)  # starting the workers
            for number, batch in enumerate(itertools.cycle(loader())):
                time.sleep(0.1 if number >= 10 else 0)
                yield batch

    model = tiny_resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    images = len(next(iter(loader()))[1])
    assert measure_speed(model, optimizer, Loader(), CPU, seconds=1.0) <= images / 0.1


def test_find_lr_suggests_a_rate_and_draws_the_curve(sample, small_network, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/flower_experiment")
    flags = [
        "--data-path",
        str(sample),
        "--model",
        "resnet18",
        "--device",
        "cpu",
        "--workers",
        "0",
        "--amp",
        "off",
        "--img-size",
        "32",
        "--find-lr",
    ]
    assert train.main(flags) == 0
    suggestion = float(re.search(r"suggestion +--lr (\S+)", capsys.readouterr().out)[1])
    assert 1e-4 < suggestion < 1
    assert (run / "find_lr.png").stat().st_size > 10_000
    events = EventAccumulator(str(run), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["learning rate finder"]
    assert list((run / "weights").iterdir()) == []
