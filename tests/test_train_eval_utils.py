"""Training for one epoch, evaluation, metrics and feature collection."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import train_eval_utils
from inference import run_inference
from metrics import Evaluation
from model import BasicBlock, ResNet, freeze_backbone, resnet18
from my_dataset import EvalTransform, MyDataSet, prepare_batch
from train_eval_utils import Callback, Progress, estimate_batch_norm, evaluate, train_one_epoch

CPU = torch.device("cpu")


def tiny_resnet() -> ResNet:
    torch.manual_seed(0)
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=2)


def loader(count: int = 10, batch_size: int = 4, seed: int = 0) -> DataLoader:
    """Return a loader of uint8 images, dark in class 0 and light in class 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=generator)
    images = torch.randint(0, 128, (count, 3, 40, 40), generator=generator) + 120 * labels.view(-1, 1, 1, 1)
    return DataLoader(TensorDataset(images.to(torch.uint8), labels), batch_size=batch_size)


class Stream(IterableDataset):
    """Iterable version of a dataset, without a length."""

    def __init__(self, images: TensorDataset) -> None:
        self.images = images

    def __iter__(self):
        return iter(self.images)


# --- training -----------------------------------------------------------------------------------------------------


def test_mean_loss_is_per_image():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 40 * 40, 2))
    data = loader(count=10, batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    images, labels = data.dataset.tensors
    expected = F.cross_entropy(model(prepare_batch(images, CPU)), labels).item()
    assert train_one_epoch(model, optimizer, data, CPU, 0) == pytest.approx(expected, rel=1e-5)


def test_training_on_a_loader_without_length():
    losses = []
    for images in (loader().dataset, Stream(loader().dataset)):
        model = tiny_resnet()
        losses.append(train_one_epoch(model, torch.optim.SGD(model.parameters(), 0.1), DataLoader(images, 4), CPU, 0))
    assert losses[0] == losses[1]


def test_training_matches_a_plain_torch_loop():
    data = loader(count=8, batch_size=4)
    ours, plain = tiny_resnet(), tiny_resnet()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.01, momentum=0.9)
    ours.conv1.weight.grad = torch.ones_like(ours.conv1.weight)  # a stale gradient must be cleared
    train_one_epoch(model=ours, optimizer=optimizer, data_loader=data, device=CPU, epoch=0)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
    plain.train()
    for images, labels in data:
        optimizer.zero_grad()
        F.cross_entropy(plain(prepare_batch(images, CPU)), labels).backward()
        optimizer.step()
    for our, expected in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(our, expected)


def test_label_smoothing_changes_the_gradients_but_not_the_reported_loss():
    ours = nn.Sequential(nn.Flatten(), nn.Linear(3 * 40 * 40, 2))
    plain = copy.deepcopy(ours)
    data = loader(count=8, batch_size=8)
    images, labels = data.dataset.tensors
    logits = plain(prepare_batch(images, CPU))
    F.cross_entropy(logits, labels, label_smoothing=0.2).backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    loss = train_one_epoch(ours, optimizer, data, CPU, 0, label_smoothing=0.2)
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    for our, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(our, expected)


def test_callback_sets_the_rate_or_ends_the_epoch():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 40 * 40, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    weights, after, progress = [], [], Progress()

    class TwoSteps(Callback):
        def before_step(self, step: int) -> bool:
            weights.append(model[1].weight.clone())
            optimizer.param_groups[0]["lr"] = 0.0 if step == 0 else 0.01
            return step < 2

        def after_step(self, step: int) -> None:
            after.append(step)

    train_one_epoch(model, optimizer, loader(), CPU, 0, progress=progress, callback=TwoSteps())
    assert (progress.steps, progress.steps_taken, progress.images) == (2, 2, 8)
    assert after == [0, 1]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert torch.equal(weights[2], model[1].weight)


def test_training_reduces_the_loss():
    model = tiny_resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = [train_one_epoch(model, optimizer, loader(32, 8), CPU, epoch) for epoch in range(4)]
    assert losses[-1] < losses[0] / 2
    assert evaluate(model, loader(32, 8, seed=1), CPU) > 0.9


def test_frozen_batchnorm_is_unchanged():
    model = tiny_resnet().eval()
    freeze_backbone(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    train_one_epoch(model, optimizer, loader(), CPU, 0)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"fc.weight", "fc.bias"}
    assert model.training
    assert not model.bn1.training


def test_trainable_batchnorm_updates_its_statistics():
    model = tiny_resnet().eval()
    freeze_backbone(model)
    model.bn1.requires_grad_(True)
    train_one_epoch(model, torch.optim.SGD(model.parameters(), lr=0.1), loader(), CPU, 0)
    assert model.bn1.training
    assert model.bn1.running_mean.abs().sum() > 0
    assert not model.layer1[0].bn1.training


def test_batchnorm_without_parameters_updates_its_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Flatten(), nn.Linear(3 * 40 * 40, 2))
    train_one_epoch(model, torch.optim.SGD(model.parameters(), lr=1e-4), loader(), CPU, 0)
    assert model[0].running_mean.abs().sum() > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_loss_ends_the_epoch(value):
    model = tiny_resnet()
    with torch.no_grad():
        model.fc.bias.fill_(value)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    with pytest.raises(FloatingPointError, match=r"step 0 of epoch 3, with learning rate 0\.25"):
        train_one_epoch(model, optimizer, loader(), CPU, 3)


def test_divergence_error_names_the_step():
    images, labels = next(iter(loader(10, batch_size=10)))
    images = prepare_batch(images, CPU)
    images[5] = math.nan
    data = DataLoader(TensorDataset(images, labels), batch_size=2)
    model = tiny_resnet()
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2 of epoch 0"):
        train_one_epoch(model, torch.optim.SGD(model.parameters(), lr=1e-3), data, CPU, 0)


def test_loss_read_interval_does_not_change_results(monkeypatch):
    results = []
    for seconds in (0, math.inf):
        monkeypatch.setattr(train_eval_utils, "READ_SECONDS", seconds)
        model = tiny_resnet()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        results.append((train_one_epoch(model, optimizer, loader(), CPU, 0), model.conv1.weight))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_mixed_precision_is_close_to_float32():
    losses, logits = [], []
    for amp_dtype in (None, torch.bfloat16):
        model = tiny_resnet()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        losses.append(train_one_epoch(model, optimizer, loader(), CPU, 0, amp_dtype=amp_dtype))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        model = tiny_resnet()
        logits.append(run_inference(model, loader(), CPU, amp_dtype=amp_dtype)[0])
        assert logits[-1].dtype == torch.float32
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert not torch.equal(*logits)
    torch.testing.assert_close(*logits, rtol=0.05, atol=0.05)


def test_a_step_skipped_by_the_scaler_is_not_divergence():
    model = tiny_resnet()
    with torch.no_grad():
        model.fc.weight *= 1000
    before = model.conv1.weight.clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # gradients above 2 overflow
    data = loader(4, batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert math.isfinite(train_one_epoch(model, optimizer, data, CPU, 0, scaler=scaler))
    assert torch.equal(model.conv1.weight, before)
    assert scaler.get_scale() < 2.0**127


def test_accuracy_is_per_image():
    class FirstPixel(nn.Module):
        def forward(self, images):
            return torch.stack([-images[:, 0, 0, 0], images[:, 0, 0, 0]], 1)

    images = torch.zeros(5, 3, 2, 2, dtype=torch.uint8)
    images[:3] = 255
    labels = torch.tensor([1, 1, 0, 0, 1])
    data = DataLoader(TensorDataset(images, labels), batch_size=2)
    assert evaluate(model=FirstPixel(), data_loader=data, device=CPU) == pytest.approx(3 / 5)
    logits, seen, _, layer1 = run_inference(FirstPixel(), data, CPU)
    assert layer1.numel() == 0
    assert (logits.shape, logits.dtype) == ((5, 2), torch.float32)
    assert torch.equal(seen, labels)
    assert Evaluation(logits, seen).accuracy == pytest.approx(3 / 5)


def test_evaluation_has_no_gradients_and_restores_the_mode():
    model = tiny_resnet().train()
    statistics = model.bn1.running_mean.clone()
    result = evaluate(model, loader(), CPU)
    assert isinstance(result, float)
    assert torch.equal(model.bn1.running_mean, statistics)
    assert model.training
    assert not run_inference(model, loader(), CPU)[0].requires_grad


@pytest.mark.parametrize("device", ["cpu", CPU])
def test_normalised_float_batches_give_equal_logits(device):
    data = loader()
    images, labels = data.dataset.tensors
    prepared = DataLoader(TensorDataset(prepare_batch(images, CPU), labels), batch_size=4)
    model = tiny_resnet()
    assert torch.equal(run_inference(model, data, device)[0], run_inference(model, prepared, device)[0])


def test_empty_loader_is_an_error():
    empty = DataLoader(TensorDataset(torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64)))
    model = tiny_resnet()
    with pytest.raises(ValueError, match="nothing to"):
        train_one_epoch(model, torch.optim.SGD(model.parameters(), lr=0.1), empty, CPU, 0)
    with pytest.raises(ValueError, match="nothing to"):
        evaluate(model, empty, CPU)


def test_no_progress_bar_without_a_terminal(capsys):
    model = tiny_resnet()
    train_one_epoch(model, torch.optim.SGD(model.parameters(), lr=0.01), loader(), CPU, 0)
    evaluate(model, loader(), CPU)
    assert capsys.readouterr() == ("", "")


def test_progress_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    model = tiny_resnet()
    train_one_epoch(model, torch.optim.SGD(model.parameters(), lr=0.01), loader(), CPU, 7)
    shown = capsys.readouterr().err
    assert "[epoch 7] mean loss 0." in shown
    assert "images/s" in shown


# --- metrics ------------------------------------------------------------------------------------------------------


def test_metrics_match_their_definitions():
    #          label, predicted, probability of the predicted class
    rows = [(0, 0, 0.9), (0, 0, 0.6), (0, 1, 0.5), (1, 1, 0.7), (1, 2, 0.8), (2, 2, 0.4)]
    probabilities = torch.tensor([[p if k == guess else (1 - p) / 3 for k in range(4)] for _, guess, p in rows])
    found = Evaluation(probabilities.log(), torch.tensor([label for label, *_ in rows]))
    assert found.accuracy == pytest.approx(4 / 6)
    assert found.confusion.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert found.recalls.tolist()[:3] == pytest.approx([2 / 3, 1 / 2, 1])
    assert math.isnan(found.recalls[3])  # the class has no images
    f1 = [2 * 2 / (2 * 2 + 0 + 1), 2 * 1 / (2 * 1 + 1 + 1), 2 * 1 / (2 * 1 + 1 + 0)]  # 2 TP / (2 TP + FP + FN)
    assert found.macro_f1 == pytest.approx(sum(f1) / 3)
    losses = [-math.log(0.9), -math.log(0.6), -math.log(0.5 / 3), -math.log(0.7), -math.log(0.2 / 3), -math.log(0.4)]
    assert found.losses.tolist() == pytest.approx(losses, rel=1e-5)
    assert found.loss == pytest.approx(sum(losses) / 6)
    assert torch.allclose(found.probabilities, probabilities)
    assert found.worst_mistakes(4) == [4, 2]
    assert found.worst_mistakes(1) == [4]


def test_batch_norm_statistics_match_the_current_weights():
    model = tiny_resnet()
    with torch.no_grad():  # makes the running averages lag, as very large steps do
        model.conv1.weight *= 100
        model.layer2[0].conv1.weight *= 10
    images = torch.cat([batch for batch, _ in loader(count=64, batch_size=64)])
    prepared = prepare_batch(images, CPU)
    with torch.no_grad():
        expected = copy.deepcopy(model).train()(prepared)  # normalised by batch statistics
    lagging = run_inference(model.eval(), DataLoader(TensorDataset(images, torch.zeros(64)), 64), CPU).logits
    estimate_batch_norm(model, images, CPU, batch_size=64)
    assert not any(module.training for module in model.modules())
    assert {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.1}
    estimated = run_inference(model, DataLoader(TensorDataset(images, torch.zeros(64)), 64), CPU).logits
    assert (estimated - expected).abs().max() < 0.1 * (lagging - expected).abs().max()


def test_batch_norm_statistics_use_batches_of_mixed_classes():
    model = tiny_resnet()
    images, labels = loader(count=64).dataset.tensors
    by_class = images[labels.argsort(stable=True)]
    estimate_batch_norm(model, by_class, CPU, batch_size=64)
    together = model.bn1.running_var.clone()
    estimate_batch_norm(model, by_class, CPU, batch_size=24)  # two batches of 32 images
    assert model.bn1.num_batches_tracked == 2
    torch.testing.assert_close(model.bn1.running_var, together, rtol=0.1, atol=0)


def test_features_are_the_inputs_of_the_classifier(sample):
    model = resnet18(num_classes=5).eval()
    paths = sorted(map(str, sample.rglob("*.jpg")))[::10]
    loader = DataLoader(MyDataSet(paths, list(range(10)), EvalTransform(32)), 4, collate_fn=MyDataSet.collate_fn)
    logits, labels, features, layer1 = run_inference(model, loader, "cpu", feature_stride=1)
    assert (layer1.shape, layer1.dtype) == ((10, 64), torch.float32)
    assert labels.tolist() == list(range(10))
    assert features.shape == (10, 512)
    with torch.no_grad():
        assert torch.allclose(model.fc(features), logits, atol=1e-4)
    batches = DataLoader(TensorDataset(features, labels), 4)
    head = run_inference(model.fc, batches, "cpu", feature_stride=3)  # labels 0, 3, 6 and 9
    assert torch.equal(head.features, features[::3])
    assert torch.equal(head.labels, labels)
    assert run_inference(model, loader, "cpu").features.numel() == 0
    assert not model.fc._forward_pre_hooks
    assert not model.layer1._forward_hooks


def test_progress_counts_images_steps_and_correct_predictions():
    images = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    labels = torch.tensor([0, 1] * 5)
    model = resnet18(num_classes=2)
    progress, read = Progress(), []
    callback = Callback()
    callback.on_loss = lambda step, loss: read.append((step, loss))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batches = [(images[:6], labels[:6]), (images[6:], labels[6:])]
    expected = []
    with torch.no_grad():
        for batch, _ in batches:
            expected.append(copy.deepcopy(model).train()(prepare_batch(batch, "cpu")))
    progress.start -= 1000  # created long before training
    mean = train_one_epoch(model, optimizer, batches, "cpu", 0, progress=progress, callback=callback)
    assert progress.speed > 0.1
    right = sum(int((a.argmax(1) == b).sum()) for a, (_, b) in zip(expected, batches, strict=True))
    losses = [F.cross_entropy(a, b).item() for a, (_, b) in zip(expected, batches, strict=True)]
    assert (progress.images, progress.steps, progress.correct) == (10, 2, right)
    assert progress.accuracy == right / 10
    assert [step for step, _ in read] == [0, 1]
    assert [loss for _, loss in read] == pytest.approx(losses, rel=1e-4)
    assert mean == progress.loss == pytest.approx((6 * losses[0] + 4 * losses[1]) / 10, rel=1e-4)


def test_class_weights_multiply_the_loss_of_each_image():
    ours = nn.Sequential(nn.Flatten(), nn.Linear(3 * 40 * 40, 2))
    plain = copy.deepcopy(ours)
    data, weights = loader(count=8, batch_size=8), torch.tensor([0.5, 2.0])
    images, labels = data.dataset.tensors
    logits = plain(prepare_batch(images, CPU))
    (F.cross_entropy(logits, labels, reduction="none") * weights[labels]).sum().div(8).backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    loss = train_one_epoch(ours, optimizer, data, CPU, 0, class_weights=weights)
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    for our, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(our, expected)
