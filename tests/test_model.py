"""The networks compared with torchvision's, and loading of weights files."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torchvision import models as torchvision_models

from model import (
    MODELS,
    BasicBlock,
    Bottleneck,
    ResNet,
    evaluation_mode,
    fold_batch_norm,
    freeze_backbone,
    grad_cam,
    init_conv1_with_pca,
    named_convolutions,
    resnet18,
    resnet34,
    resnet101,
    to_device,
)
from my_dataset import prepare_batch
from weights_io import WeightsError, load_model, load_pretrained

NAMES = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


def pair(name: str, num_classes: int = 7) -> tuple[ResNet, torch.nn.Module]:
    """Return our network and torchvision's with the same weights and non-initial BatchNorm statistics."""
    torch.manual_seed(0)
    theirs = getattr(torchvision_models, name)(num_classes=num_classes)
    theirs.train()(torch.randn(4, 3, 64, 64))
    with torch.device("meta"):  # without initial weights
        ours = MODELS[name](num_classes=num_classes)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()), assign=True)
    return ours, theirs


@pytest.mark.parametrize(
    ("name", "training"), [*((name, True) for name in NAMES), ("resnet18", False), ("resnet50", False)]
)
def test_logits_and_gradients_match_torchvision(name, training):
    ours, theirs = pair(name)
    images = torch.randn(2, 3, 50, 70)
    our_logits, their_logits = (network.train(training)(images) for network in (ours, theirs))
    torch.testing.assert_close(our_logits, their_logits)
    for logits in (our_logits, their_logits):
        logits.square().sum().backward()
    for (our_name, our), (their_name, their) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert our_name == their_name
        if not torch.equal(our.grad, their.grad):  # the faster comparison
            torch.testing.assert_close(our.grad, their.grad, rtol=1e-3, atol=1e-3 * their.grad.abs().max().item())
    for key, value in theirs.state_dict().items():  # running statistics included
        if not torch.equal(value, ours.state_dict()[key]):
            torch.testing.assert_close(ours.state_dict()[key], value)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_feature_map_without_top(name):
    ours, theirs = pair(name)
    headless = MODELS[name](include_top=False).eval()
    headless.load_state_dict({key: value for key, value in ours.state_dict().items() if not key.startswith("fc.")})
    features = headless(torch.randn(2, 3, 64, 96))
    assert features.shape == (2, 512 * (1 if name in ("resnet18", "resnet34") else 4), 2, 3)
    assert not hasattr(headless, "fc")
    torch.testing.assert_close(ours.eval().fc(features.mean((2, 3))), theirs.eval().fc(features.mean((2, 3))))


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_loads_our_weights(name):
    with torch.device("meta"):  # names and shapes only
        ours, theirs = MODELS[name](num_classes=3), getattr(torchvision_models, name)(num_classes=3)
    assert [child for child, _ in ours.named_children()] == [
        *("conv1", "bn1", "relu", "maxpool"),
        *("layer1", "layer2", "layer3", "layer4", "avgpool", "fc"),
    ]
    theirs.load_state_dict(ours.state_dict())


def test_tutorial_interface():
    assert (BasicBlock.expansion, Bottleneck.expansion) == (1, 4)
    assert resnet34().fc.out_features == resnet101().fc.out_features == 1000
    assert resnet34(num_classes=5, include_top=True).fc.out_features == 5
    assert ResNet(BasicBlock, [1, 1, 1, 1], 3)(torch.zeros(2, 3, 40, 40)).shape == (2, 3)
    block = Bottleneck(in_channel=64, out_channel=64, stride=2, downsample=torch.nn.Conv2d(64, 256, 1, 2))
    assert block(torch.zeros(1, 64, 8, 8)).shape == (1, 256, 4, 4)
    assert block.conv2.stride == (2, 2)
    assert block.conv1.stride == (1, 1)


def test_convolutions_use_kaiming_normal_fan_out():
    weight = resnet18().layer3[0].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    assert weight.mean().item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("size", [32, 96])
def test_conv1_responses_to_patches_are_uncorrelated(size):
    model = to_device(resnet18(num_classes=5), "cpu")
    norm = model.conv1.weight.norm()
    images = F.interpolate(torch.randn(20, 3, 12, 12), size=(size, size), mode="bilinear")
    init_conv1_with_pca(model, images.split(8))
    torch.testing.assert_close(model.conv1.weight.norm(), norm)
    positive, negative = model.conv1.weight.detach().chunk(2)
    assert torch.equal(positive, -negative)
    patches = F.unfold(images, 7, stride=size // 16).movedim(1, 0).flatten(1)
    covariance = torch.cov(positive.flatten(1) @ patches)
    variances = covariance.diagonal()
    assert (covariance - variances.diag()).abs().max() < 1e-3 * variances.max()
    total = torch.cov(patches).trace() * positive.square().sum() / 32
    assert variances.sum() > 0.9 * total  # smooth images have few components


def test_conv1_stays_finite_on_a_single_colour():
    model = resnet18(num_classes=5)
    init_conv1_with_pca(model, [torch.ones(2, 3, 32, 32)])
    assert model.conv1.weight.isfinite().all()


def test_evaluation_mode_restores_the_mode_of_each_module():
    model = resnet18().train()
    model.bn1.eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        assert not model(torch.zeros(1, 3, 32, 32)).requires_grad
    assert model.training
    assert model.layer1.training
    assert not model.bn1.training


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_folding_batch_norm_preserves_logits(name):
    model, _ = pair(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold_batch_norm(model)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    images = torch.randn(2, 3, 64, 64)
    with evaluation_mode(model), evaluation_mode(folded):
        assert torch.allclose(folded(images), model(images), rtol=1e-3, atol=1e-4)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_folding_synchronised_batch_norm_preserves_logits():
    images = torch.randn(2, 3, 64, 64)
    model, _ = pair("resnet18")
    expected = fold_batch_norm(model)(images)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model, torch.distributed.group.WORLD)
        assert torch.equal(fold_batch_norm(synchronised)(images), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_freezing_leaves_fc_trainable():
    model = resnet18(num_classes=2)
    freeze_backbone(model)
    assert [name for name, value in model.named_parameters() if value.requires_grad] == ["fc.weight", "fc.bias"]


# --- loading weights into a model -------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_pretrained_weights_of_wrapped_models_load(tmp_path, prefix):
    source, target = resnet18(num_classes=3), resnet18(num_classes=3)
    torch.save({prefix + name: value for name, value in source.state_dict().items()}, tmp_path / "w.pth")
    assert load_pretrained(target, tmp_path / "w.pth", "resnet18") == []
    for ours, theirs in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_fc_with_another_number_of_classes_is_skipped(tmp_path):
    source, target = resnet18(num_classes=1000), resnet18(num_classes=5)
    fc = target.fc.weight.clone()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    assert load_pretrained(target, tmp_path / "w.pth", "resnet18") == ["fc.weight", "fc.bias"]
    assert torch.equal(target.fc.weight, fc)
    assert torch.equal(target.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


def test_weights_without_num_batches_tracked_load(tmp_path):
    source, target = resnet18(num_classes=2), resnet18(num_classes=2)
    old = {name: value for name, value in source.state_dict().items() if "num_batches_tracked" not in name}
    torch.save(old, tmp_path / "w.pth")
    assert load_pretrained(target, tmp_path / "w.pth", "resnet18") == []


def test_mismatch_outside_fc_is_an_error(tmp_path):
    state = resnet18(num_classes=2).state_dict()
    path = tmp_path / "w.pth"
    torch.save(resnet34(num_classes=2).state_dict(), path)
    with pytest.raises(WeightsError, match=r"w\.pth.*does not fit.*unknown"):
        load_pretrained(resnet18(num_classes=2), path, "resnet18")
    torch.save({name: value for name, value in state.items() if name != "bn1.weight"}, path)
    with pytest.raises(WeightsError, match=r"bn1\.weight is missing"):
        load_pretrained(resnet18(num_classes=2), path, "resnet18")
    torch.save(state | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, path)
    with pytest.raises(WeightsError, match=r"conv1\.weight is \(64, 1, 7, 7\) in the file, \(64, 3, 7, 7\) in"):
        load_pretrained(resnet18(num_classes=2), path, "resnet18")


def test_imagenet_uses_torchvision_default_weights(monkeypatch):
    state = torchvision_models.resnet18().state_dict()
    asked = []

    def get_state_dict(weights, **options):
        asked.append((weights, options))
        return state

    monkeypatch.setattr(torchvision_models.ResNet18_Weights, "get_state_dict", get_state_dict)
    model = resnet18(num_classes=5)
    assert load_pretrained(model, "imagenet", "resnet18") == ["fc.weight", "fc.bias"]
    options = {"progress": False, "check_hash": True, "weights_only": True, "map_location": "cpu"}
    assert asked == [(torchvision_models.ResNet18_Weights.DEFAULT, options)]
    assert torch.equal(model.conv1.weight, state["conv1.weight"])


def test_imagenet_download_failure_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(OSError, match=r"cannot download https://.*resnet18.*: no route"):
        load_pretrained(resnet18(), "imagenet", "resnet18")


class Payload:
    """Creates a file when unpickled without restrictions."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps({"a": 1})])
def test_invalid_weights_file_is_an_error(tmp_path, content):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"w\.pth"):
        load_model(path)


def test_missing_weights_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such weights file"):
        load_pretrained(resnet18(), tmp_path / "resNet34.pth", "resnet18")


def test_checkpoints_cannot_execute_code(tmp_path):
    torch.save({"state_dict": Payload(tmp_path / "marker")}, tmp_path / "w.pth")
    with pytest.raises(WeightsError):
        load_model(tmp_path / "w.pth")
    assert not (tmp_path / "marker").exists()
    torch.load(tmp_path / "w.pth", weights_only=False)["state_dict"].close()
    assert (tmp_path / "marker").exists()  # control: the payload works


# --- loading a model from a weights file ------------------------------------------------------------------------


def checkpoint(**changes) -> dict:
    """Return a checkpoint like those of train.py."""
    state = resnet18(num_classes=2).state_dict()
    content = {
        "model": "resnet18",
        "class_names": ["cat", "dog"],
        "img_size": 96,
        "resize": "pad",
        "pixel_range": (0, 9),
    }
    familiarity = {"mean": torch.zeros(64), "precision": torch.eye(64), "threshold": 9.0}
    content |= {"epoch": 3, "accuracy": 0.75, "temperature": 0.7, "familiarity": familiarity}
    return content | {"state_dict": state} | changes


def test_channels_last_is_not_used_on_mps(monkeypatch):
    to = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device, **options: to(module, "cpu", **options))
    assert not to_device(resnet18(num_classes=2), "cuda").conv1.weight.is_contiguous()
    assert to_device(resnet18(num_classes=2), "mps").conv1.weight.is_contiguous()


def test_checkpoint_restores_model_and_metadata(tmp_path):
    content = checkpoint()
    torch.save(content, tmp_path / "best.pth")
    model, info = load_model(tmp_path / "best.pth", "cpu")
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.training
    torch.testing.assert_close(info.pop("familiarity"), content["familiarity"])
    assert info == {key: value for key, value in content.items() if key not in ("familiarity", "state_dict")}
    assert torch.equal(model.fc.weight, content["state_dict"]["fc.weight"])


def test_plain_state_dict_needs_class_names(tmp_path):
    path = tmp_path / "model-29.pth"
    torch.save(resnet18(num_classes=2).state_dict(), path)
    with pytest.raises(WeightsError, match=r"a resnet18 without class names; also pass --class-indices"):
        load_model(path)
    model, info = load_model(path, model_name="resnet18", class_names=["cat", "dog"])
    assert model.fc.out_features == 2
    assert info["img_size"] == 224
    with pytest.raises(WeightsError, match="fc"):
        load_model(path, model_name="resnet18", class_names=["cat", "dog", "cow"])


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "vgg16"},
        {"model": ["resnet18"]},
        {"class_names": {"0": "cat"}},
        {"class_names": []},
        {"class_names": ["cat", 3]},
        {"img_size": "big"},
        {"img_size": 10**9},
        {"pixel_range": (0, float("nan"))},
        {"pixel_range": (0, float("inf"))},
        {"pixel_range": (9, 0)},
        {"pixel_range": "0, 9"},
        {"state_dict": {"conv1.weight": "zeros"}},
        {"state_dict": {}},
        {"state_dict": resnet18(num_classes=2).state_dict() | {"bn1.running_var": torch.full([64], torch.inf)}},
    ],
)
def test_invalid_checkpoint_content_is_an_error(tmp_path, changes):
    torch.save(checkpoint(**changes), tmp_path / "best.pth")
    with pytest.raises(WeightsError, match=r"best\.pth"):
        load_model(tmp_path / "best.pth")


# --- Grad-CAM -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_grad_cam_matches_its_definition(name):
    torch.manual_seed(0)
    model = MODELS[name](num_classes=3).train()
    images = torch.randn(2, 3, 96, 64)
    classes = torch.tensor([2, 0])
    heat = grad_cam(model, images, classes)
    assert heat.shape == (2, 96, 64)
    assert model.training
    model.eval()
    features = model.feature_map(images).detach().requires_grad_()
    logits = model.fc(features.mean(dim=(2, 3)))
    (gradients,) = torch.autograd.grad(logits[[0, 1], classes].sum(), features)
    expected = (gradients.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1).relu()  # the paper's formula
    expected = expected / expected.amax(dim=(1, 2), keepdim=True)
    expected = F.interpolate(expected.unsqueeze(1), (96, 64), mode="bilinear").squeeze(1)
    assert torch.allclose(heat, expected.detach(), atol=1e-4)


def coloured_squares(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw a red (class 0) or blue square on noise: images (N, 3, 128, 128), labels (N,), squares (N, 128, 128)."""
    size, side = 128, 48
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(88, 168, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 2
    squares = torch.zeros(count, size, size, dtype=torch.bool)
    corners = torch.randint(0, size - side + 1, (count, 2), generator=generator).tolist()
    for index, (top, left) in enumerate(corners):
        rows, columns = slice(top, top + side), slice(left, left + side)
        squares[index, rows, columns] = True
        images[index, :, rows, columns] = 40
        images[index, 2 * int(labels[index]), rows, columns] = 220
    return prepare_batch(images, "cpu"), labels, squares


def test_grad_cam_highlights_the_discriminative_region():
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, labels, _ = coloured_squares(64, seed=0)
    for _ in range(3):
        for chosen in torch.randperm(len(images)).split(8):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    images, labels, squares = coloured_squares(20, seed=1)
    with torch.no_grad():
        predicted = model.eval()(images).argmax(dim=1)
    assert (predicted == labels).float().mean() > 0.9
    heat = grad_cam(model, images, predicted)
    assert heat[squares].mean() > 2 * heat[~squares].mean()


def test_convolutions_have_the_tutorial_names():
    names = list(named_convolutions(MODELS["resnet34"](num_classes=2)))
    assert len(names) == 36
    assert names[:3] == ["conv1", "layer1/block0/conv1", "layer1/block0/conv2"]
    assert {"layer2/block0/downsample", "layer3/block5/conv2"} < set(names)
