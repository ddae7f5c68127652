"""Weights files of runs and of other programs: which are loaded, which are refused, and what the messages say."""

import argparse
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

from model import MODELS
from weights_io import WeightsError, load_initial_weights, load_model, load_pretrained

pytestmark = pytest.mark.usefixtures("small_network")
NAMES = ["cat", "café"]


@pytest.fixture(scope="module")
def state(small_network) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return MODELS["resnet18"](num_classes=2).state_dict()


def outline(name: str, num_classes: int = 2) -> dict[str, torch.Tensor]:
    """Return a state_dict of zeros with the shapes of a network, which takes little space in a file."""
    with torch.device("meta"):
        state = MODELS[name](num_classes=num_classes).state_dict()
    return {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in state.items()}


def save(path: Path, content: object, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, **options)
    return path


# --- forms of a file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["model", "model_state_dict", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "model.", "net.", "backbone.", "module._orig_mod.", "model.net.layer1."])
def test_checkpoints_of_other_programs_load(state, tmp_path, capsys, key, prefix):
    named = {prefix + name: value for name, value in state.items()}
    path = save(tmp_path / "w.pth", {key: named, "epoch": 3, "lr_schedulers": []} if key else named)
    model, info = load_model(path, class_names=NAMES)
    assert (info["model"], info["class_names"], info["img_size"]) == ("resnet18", NAMES, 224)
    other = MODELS["resnet18"](num_classes=2)
    assert load_pretrained(other, path, "resnet18") == []
    for name, value in state.items():
        assert torch.equal(model.state_dict()[name], value)
        assert torch.equal(other.state_dict()[name], value)
    assert capsys.readouterr() == ("", "")


def test_entries_outside_the_network_are_reported(state, tmp_path, capsys):
    network = {f"model.{name}": value for name, value in state.items()}
    others = {"loss.weight": torch.ones(2), "metric\n": torch.ones(1)}
    path = save(tmp_path / "w.ckpt", {"state_dict": network | others})
    model, _ = load_model(path, class_names=NAMES)
    assert torch.equal(model.fc.weight, state["fc.weight"])
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == f"{path}: ignored 2 entries outside the network: loss.weight, metric\\n\n"


def test_unknown_entries_in_the_network_are_an_error(tmp_path):
    path = save(tmp_path / "w.ckpt", {f"model.{name}": value for name, value in outline("resnet18").items()})
    content = torch.load(path, weights_only=True)
    save(path, content | {"model.layer9.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"does not fit resnet18: layer9\.weight is unknown"):
        load_model(path, model_name="resnet18", class_names=NAMES)


def test_several_networks_in_a_file_are_an_error(tmp_path):
    networks = ({prefix + name: value for name, value in outline("resnet18").items()} for prefix in ("", "ema."))
    path = save(tmp_path / "w.ckpt", {"state_dict": {k: v for network in networks for k, v in network.items()}})
    with pytest.raises(WeightsError, match=r"w\.ckpt: holds several networks \(no prefix, ema\.\)"):
        load_model(path, class_names=NAMES)


# --- refused files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({"state_dict": {}, "args": argparse.Namespace(lr=0.1)}, "argparse.Namespace"),
        ({"state_dict": {}, "path": Path("a")}, "pathlib."),
        ({"state_dict": {}, "accuracy": np.float64(0.9)}, "numpy."),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ],
    ids=["namespace", "path", "numpy", "module"],
)
def test_python_objects_are_refused_as_such(tmp_path, content, kind, zipped):
    path = save(tmp_path / "w.pth", content, _use_new_zipfile_serialization=zipped)
    for load in (load_model, lambda path: load_pretrained(MODELS["resnet18"](2), path, "resnet18")):
        with pytest.raises(WeightsError) as caught:
            load(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: holds Python objects ({kind}")
        assert message.endswith(f"save the state_dict alone: torch.save(model.state_dict(), {str(path)!r})")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_archive_is_refused_as_such(tmp_path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "w.pt"))
    with pytest.raises(WeightsError, match=r"w\.pt: a TorchScript archive, which is not loaded; save the state_dict"):
        load_model(tmp_path / "w.pt")


@pytest.mark.parametrize("fraction", [0, 0.3, 0.9, 0.999])
def test_truncated_file_is_corrupt(tmp_path, fraction):
    path = save(tmp_path / "w.pth", outline("resnet18") | {"args": argparse.Namespace()})
    path.write_bytes(path.read_bytes()[: int(fraction * path.stat().st_size)])
    with pytest.raises(WeightsError, match=r"w\.pth: not a PyTorch weights file, or corrupt$"):
        load_model(path)


# --- model and classes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_recognised_by_its_shapes(tmp_path, name):
    state = {key: value for key, value in outline(name, 3).items() if "num_batches_tracked" not in key}
    path = save(tmp_path / "w.pth", state)
    with pytest.raises(WeightsError, match=rf"w\.pth: a {name} without class names; also pass --class-indices$"):
        load_model(path)
    other = "resnet34" if name == "resnet50" else "resnet50"
    message = rf"w\.pth: does not fit {other}: the file is a {name}; pass --model {name} \("
    with pytest.raises(WeightsError, match=message):
        load_model(path, model_name=other, class_names=["a", "b", "c"])


def test_weights_to_start_from_of_another_model_name_it(tmp_path):
    path = save(tmp_path / "w.pth", outline("resnet50"))
    with pytest.raises(
        WeightsError, match=r"w\.pth: does not fit resnet18: the file is a resnet50; pass --model resnet50"
    ):
        load_pretrained(MODELS["resnet18"](num_classes=2), path, "resnet18")


def test_other_networks_are_not_recognised(tmp_path):
    path = save(tmp_path / "w.pth", {"features.0.weight": torch.zeros(64, 3, 3, 3)})
    with pytest.raises(WeightsError, match=r"w\.pth: fits none of resnet18, .*resnet152"):
        load_model(path, class_names=NAMES)
    with pytest.raises(WeightsError, match=r"does not fit resnet18: conv1\.weight is missing"):
        load_model(path, model_name="resnet18", class_names=NAMES)


def test_number_of_class_names_must_match_fc(tmp_path):
    path = save(tmp_path / "w.pth", outline("resnet18", 5))
    with pytest.raises(WeightsError, match=r"w\.pth: fc\.weight has 5 rows, but there are 2 class names$"):
        load_model(path, class_names=NAMES)


def test_metadata_of_the_run_is_passed_through(tmp_path):
    path = save(tmp_path / "run" / "weights" / "model-1.pth", outline("resnet18"))
    network = {"model": "resnet18", "class_names": NAMES, "img_size": 64, "resize": "pad", "pixel_range": [0.0, 1.0]}
    (tmp_path / "run" / "args.json").write_text(json.dumps({"network": network}), encoding="utf-8")
    assert load_model(path)[1] == network | dict.fromkeys(("epoch", "accuracy", "temperature", "familiarity"))
    elsewhere = save(tmp_path / "run" / "other" / "model-1.pth", outline("resnet18"))
    with pytest.raises(WeightsError, match="--class-indices"):
        load_model(elsewhere)


# --- fine-tuning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["checkpoint", "run"])
@pytest.mark.parametrize(
    ("stored", "skipped"),
    [
        (["cat", "café"], ""),
        ([unicodedata.normalize("NFD", name) for name in NAMES], ""),
        (["café", "cat"], " except fc.weight, fc.bias, which have other classes"),
        (["cat", "dog"], " except fc.weight, fc.bias, which have other classes"),
        (["cat", "café", "dog"], " except fc.weight, fc.bias, which have a different number of classes"),
    ],
    ids=["same", "decomposed", "order", "other", "more"],
)
def test_fc_starts_afresh_for_other_classes(state, tmp_path, place, stored, skipped):
    path = tmp_path / "run" / "weights" / "w.pth"
    fc = {"fc.weight": torch.ones(len(stored), state["fc.weight"].shape[1]), "fc.bias": torch.ones(len(stored))}
    metadata = {"model": "resnet18", "class_names": stored, "img_size": 64}
    if place == "checkpoint":
        save(path, metadata | {"state_dict": state | fc})
    else:
        save(path, state | fc)
        (tmp_path / "run" / "args.json").write_text(json.dumps({"network": metadata}), encoding="utf-8")
    model = MODELS["resnet18"](num_classes=2)
    before = model.fc.weight.clone()
    assert load_initial_weights(model, path, "resnet18", NAMES) == f"weights of {path}{skipped}"
    assert torch.equal(model.conv1.weight, state["conv1.weight"])
    assert torch.equal(model.fc.weight, before if skipped else torch.ones_like(before))
    if len(stored) == 2:  # the tutorial's function compares shapes only
        assert load_pretrained(model, path, "resnet18") == []
        assert torch.equal(model.fc.weight, torch.ones_like(before))


def test_fc_may_be_missing_from_initial_weights(state, tmp_path):
    backbone = {f"backbone.{name}": value for name, value in state.items() if not name.startswith("fc.")}
    path = save(tmp_path / "w.pth", {"state_dict": backbone | {"head.weight": torch.ones(2, 2)}})
    model = MODELS["resnet18"](num_classes=2)
    before = model.fc.weight.clone()
    description = load_initial_weights(model, path, "resnet18", NAMES)
    assert description == f"weights of {path}, which has no fc"
    assert torch.equal(model.conv1.weight, state["conv1.weight"])
    assert torch.equal(model.fc.weight, before)
    save(path, {name: value for name, value in state.items() if name != "fc.bias"})
    with pytest.raises(WeightsError, match=r"fc\.bias is missing"):
        load_initial_weights(model, path, "resnet18", NAMES)


def test_fc_is_kept_if_its_class_names_are_unknown(state, tmp_path):
    path = save(tmp_path / "w.pth", state)
    model = MODELS["resnet18"](num_classes=2)
    description = load_initial_weights(model, path, "resnet18", NAMES)
    assert description == f"weights of {path}, whose class names are unknown"
    assert torch.equal(model.fc.weight, state["fc.weight"])
