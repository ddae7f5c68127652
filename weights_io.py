"""Read weights files: best.pth, plain state_dicts, checkpoints of other programs, ImageNet weights."""

import errno
import math
import os
import pickle
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision import models as torchvision_models

from class_files import normalise
from cli_utils import UsageError, print_note, shorten
from distributed import Distributed
from exported_file import is_exported, is_onnx, read_pt2
from familiarity import is_valid_familiarity
from file_utils import read_json
from model import MODELS, ResNet, fold_batch_norm, to_device
from my_dataset import RESIZE_MODES

STATE_KEYS = ("state_dict", "model_state_dict", "model")  # where checkpoints store the state_dict
INFO_KEYS = ("model", "class_names", "img_size", "resize", "pixel_range")
INFO_KEYS += ("epoch", "accuracy", "temperature", "familiarity")
DEFAULTS = {
    "img_size": 224,
    "resize": "crop",
    "pixel_range": None,
    "epoch": None,
    "accuracy": None,
    "temperature": None,
    "familiarity": None,
}
ANCHOR = "layer1.0.conv1.weight"  # a parameter of every ResNet, which reveals the prefix of the names


class WeightsError(UsageError):
    """An unusable weights file. The message names the file and the reason."""


class WeightsFile(NamedTuple):
    """The parameters in a weights file, by their names in `ResNet`, and what is known about them.

    Attributes:
        info: those of INFO_KEYS that the file stores; if it states no model, also the entries of its run, see
            `run_network`.
        source: the file that `info` comes from, for messages.
        is_exported: whether export.py has written it, with BatchNorm folded into the convolutions.
    """

    state: dict[str, Tensor]
    info: dict[str, Any]
    source: str | os.PathLike
    is_exported: bool = False


def load_pretrained(model: ResNet, weights: str | os.PathLike, model_name: str) -> list[str]:
    """Load pretrained weights into `model`.

    Args:
        weights: the path of a best.pth, a last.pth, a plain `state_dict` (the tutorial's model-N.pth, torchvision's
            files) or another program's checkpoint of a ResNet; or "imagenet": torchvision's weights for `model_name`,
            downloaded once and verified by their hash.

    Returns:
        The names of the parameters that were not loaded: those of `fc`, if the number of classes differs or the file
        has none.

    Raises:
        FileNotFoundError: the file does not exist.
        WeightsError: it is not a weights file, or is for another model.
        OSError: it cannot be read, or the ImageNet weights cannot be downloaded.
    """
    return _load_pretrained(model, _read_pretrained(weights, model_name), weights, model_name)


def load_initial_weights(model: ResNet, weights: str | os.PathLike, model_name: str, class_names: Sequence[str]) -> str:
    """Load pretrained weights like `load_pretrained`, but skip `fc` if the file's class names differ.

    Args:
        class_names: the classes of `model`, in the order of its logits.

    Returns:
        A description of the weights for the header.
    """
    file = _read_pretrained(weights, model_name)
    stored = file.info.get("class_names")
    known = _is_list_of_names(stored)
    same_classes = not known or [*map(normalise, stored)] == [*map(normalise, class_names)]
    skipped = _load_pretrained(model, file, weights, model_name, load_fc=same_classes)
    description = f"weights of {weights}"
    if skipped and not {*skipped} & file.state.keys():
        return f"{description}, which has no fc"
    if skipped:
        same_number = known and len(stored) == len(class_names)
        classes = "other classes" if same_number else "a different number of classes"
        return f"{description} except {', '.join(skipped)}, which have {classes}"
    return description if known else f"{description}, whose class names are unknown"


def _read_pretrained(weights: str | os.PathLike, model_name: str) -> WeightsFile:
    if weights == "imagenet":
        return WeightsFile(_imagenet_state(model_name), {}, weights)
    if is_exported(weights):
        raise WeightsError(f"{weights}: exported files are only for inference; pass the best.pth of its run")
    return _read_weights_file(weights)


def _load_pretrained(
    model: ResNet, file: WeightsFile, weights: str | os.PathLike, model_name: str, load_fc: bool = True
) -> list[str]:
    """Load all parameters except those of `fc` that have another shape, or all of `fc`. Returns the skipped names.

    If the file has no `fc`, like a backbone from self-supervised training, the model keeps its own.
    """
    own = model.state_dict()
    skipped = [
        name
        for name, value in file.state.items()
        if name.startswith("fc.") and name in own and (value.shape != own[name].shape or not load_fc)
    ]
    state = {name: value for name, value in file.state.items() if name not in skipped}
    if not any(name.startswith("fc.") for name in file.state):
        skipped = [name for name in own if name.startswith("fc.")]
    _load_state(model, state, weights, model_name, skipped)
    return skipped


def load_model(
    path: str | os.PathLike,
    device: torch.device | str = "cpu",
    model_name: str | None = None,
    class_names: list[str] | None = None,
    *,
    img_size: int | None = None,
    default_names: list[str] | None = None,
) -> tuple[ResNet, dict[str, Any]]:
    """Load a trained model for prediction.

    Args:
        path: a best.pth or last.pth, a model-N.pth in its run's folder, a `state_dict` from elsewhere, or a .pt2 file
            written by export.py, whose model has no BatchNorm, as it is folded into the convolutions.
        model_name: a key of MODELS; by default the stored one, or else the one that the shapes fit.
        class_names: by default the stored ones, or else `default_names`.
        img_size: by default the stored one, or else 224.

    Returns:
        The model on `device` in evaluation mode, and its metadata:
        {"model": str, "class_names": list[str], "img_size": int, "resize": str, "pixel_range": two floats or None,
        "epoch": int | None, "accuracy": float | None, "temperature": float | None, "familiarity": dict | None}, and
        "img_size_source": str if the size is not the stored one.

    Raises:
        FileNotFoundError: the file does not exist.
        WeightsError: it is not a weights file, does not fit the model, or lacks class names that were not given.
    """
    file = _read_weights_file(path)
    info = complete_info(path, file, model_name, class_names, img_size=img_size, default_names=default_names)
    fc, names = file.state.get("fc.weight"), info["class_names"]
    if fc is not None and fc.ndim == 2 and len(fc) != len(names):
        raise WeightsError(f"{path}: fc.weight has {len(fc)} rows, but there are {len(names)} class names")
    model = MODELS[info["model"]](num_classes=len(names))
    if file.is_exported:
        model = fold_batch_norm(model)
    _load_state(model, file.state, path, info["model"])
    if info["familiarity"] and len(info["familiarity"]["mean"]) != model.layer2[0].conv1.in_channels:
        raise WeightsError(f"{path}: its familiarity is for another network than {info['model']}")
    return to_device(model, device).eval(), info


def complete_info(
    path: str | os.PathLike,
    file: WeightsFile,
    model_name: str | None = None,
    class_names: list[str] | None = None,
    *,
    img_size: int | None = None,
    default_names: list[str] | None = None,
) -> dict[str, Any]:
    """Return the metadata of a weights file, with defaults, overridden by the arguments; see `load_model`."""
    stored, source = file.info, file.source
    stated = stored.get("model")
    if model_name and model_name != stated and isinstance(stated, str) and stated in MODELS:
        raise WeightsError(f"{path}: --model is {model_name}, but {source} states {stated}; omit --model")
    info = DEFAULTS | stored
    info["model"] = model_name or stated or _fitting_model(file.state)
    info["class_names"] = class_names or stored.get("class_names") or default_names
    if stored.get("class_names") not in (None, info["class_names"]):
        print_note(f"{path}: --class-indices replaces its class names: {shorten(str(stored['class_names']))}")
    if file.is_exported and img_size not in (None, info["img_size"]):
        raise WeightsError(f"{path}: is for images of {info['img_size']} px; omit --img-size, or export another file")
    if img_size is not None:
        info |= {"img_size": img_size, "img_size_source": "--img-size"}
    elif "img_size" not in stored:
        info["img_size_source"] = "the default, as no size is stored; change it with --img-size"
    if info["model"] is None:
        supported = ", ".join(MODELS)
        raise WeightsError(f"{path}: fits none of {supported}; pass --model to see how it differs from that one")
    if info["class_names"] is None:
        raise WeightsError(f"{path}: a {info['model']} without class names; also pass --class-indices")
    check_info(source, info)
    return info


def run_network(path: str | os.PathLike) -> tuple[dict[str, Any], Path]:
    """Return the "network" entry in the args.json of a weights file's run, and the path of this args.json.

    The entry is the run's `Run.info`; empty if the file is outside a run, or args.json is missing or corrupt.
    """
    folder = Path(path).resolve().parent
    args_file = folder.parent / "args.json"
    network = read_json(args_file).get("network") if folder.name == "weights" else None
    return (network if isinstance(network, dict) else {}), args_file


def check_info(path: str | os.PathLike, info: Mapping[str, Any]) -> None:
    """Raise a WeightsError if the metadata of a network is invalid, see `load_model`."""
    if not isinstance(info["model"], str) or info["model"] not in MODELS:
        raise WeightsError(f"{path}: unknown model {info['model']!r}; supported are {', '.join(MODELS)}")
    if not _is_list_of_names(info["class_names"]):
        raise WeightsError(f"{path}: its class_names are not a list of distinct names")
    if not (isinstance(info["img_size"], int) and 32 <= info["img_size"] <= 10_000):
        raise WeightsError(f"{path}: its img_size is {info['img_size']!r}, not a number of pixels from 32 to 10,000")
    if info["resize"] not in RESIZE_MODES:
        raise WeightsError(f"{path}: its resize is {info['resize']!r}; supported are {', '.join(RESIZE_MODES)}")
    match info["temperature"]:
        case None:
            pass
        case int() | float() as temperature if 0.01 <= temperature <= 100:
            pass
        case invalid:
            raise WeightsError(f"{path}: its temperature is {shorten(repr(invalid))}, not a number from 0.01 to 100")
    if info["familiarity"] is not None and not is_valid_familiarity(info["familiarity"]):
        raise WeightsError(f"{path}: its familiarity is corrupt")
    match info["pixel_range"]:
        case None:
            pass
        case [int() | float() as low, int() | float() as high] if -math.inf < low <= high < math.inf:
            pass
        case invalid:
            raise WeightsError(f"{path}: its pixel_range is {invalid!r}, not a pair of ascending numbers")


def _is_list_of_names(names: Any) -> bool:
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return False
    return len({*map(normalise, names)}) == len(names)


def _read_weights_file(path: str | os.PathLike) -> WeightsFile:
    if is_exported(path):
        return _read_exported(path)
    content = read_torch_file(path)
    key = next((key for key in STATE_KEYS if isinstance(content.get(key), Mapping)), None)
    state_dict, metadata = (content, {}) if key is None else (content[key], content)
    state = _without_prefix(path, state_dict)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: holds no state_dict (a dict of parameter names and tensors)")
    info = {name: metadata[name] for name in INFO_KEYS if name in metadata and name != key}
    if "model" in info:
        return WeightsFile(state, info, path)
    network, args_file = run_network(path)
    return WeightsFile(state, network | info, args_file if network else path)


def _read_exported(path: str | os.PathLike) -> WeightsFile:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    if is_onnx(path):
        raise WeightsError(f"{path}: ONNX files can only be used by predict.py and evaluate.py")
    state, info = read_pt2(path)
    tensors = {name.removeprefix("familiarity_"): value for name, value in state.items() if "familiarity_" in name}
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].item()
    info = {name: info[name] for name in INFO_KEYS if name in info} | {"familiarity": tensors or None}
    prefix = "network."
    network = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return WeightsFile(network, info, path, is_exported=True)


def _without_prefix(path: str | os.PathLike, state: Mapping[Any, Any]) -> dict[str, Any]:
    """Remove the prefix of the parameters' names, such as DDP's "module." or Lightning's "model.".

    Entries without the prefix don't belong to the network. They are ignored, and reported on standard error.

    Raises:
        WeightsError: there are several networks.
    """
    named = {str(name): value for name, value in state.items()}
    prefixes = [name.removesuffix(ANCHOR) for name in named if f".{name}".endswith(f".{ANCHOR}")]
    if len(prefixes) > 1:
        names = ", ".join(prefix or "no prefix" for prefix in prefixes)
        raise WeightsError(f"{path}: holds several networks ({names}); save the state_dict of one")
    prefix = prefixes[0] if prefixes else ""
    ignored = [name for name in named if not name.startswith(prefix)]
    if ignored and Distributed().is_main:
        what = f"ignored {len(ignored)} {'entry' if len(ignored) == 1 else 'entries'} outside the network"
        print_note(f"{path}: {what}: {shorten(', '.join(ignored))}")
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def newest_weights(root: str | os.PathLike = "runs", file_name: str = "best.pth") -> Path:
    """Return the most recent weights/`file_name` of the runs in `root`.

    Raises:
        UsageError: no run has one.
    """
    found = list(Path(root).glob(f"*/weights/{file_name}"))
    if not found:
        raise UsageError(f"no run in {root} has a {file_name}: train a model first, or name a file")
    return max(found, key=lambda path: path.stat().st_mtime)


def read_torch_file(path: str | os.PathLike) -> Mapping[Any, Any]:
    """Load a dict of tensors and plain values to the CPU. Safe for untrusted files: nothing else is unpickled.

    Raises:
        FileNotFoundError: the file does not exist.
        WeightsError: it holds anything else, or is corrupt.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    with _as_weights_error(f"{path}: not a PyTorch weights file, or corrupt"):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            alone = f"save the state_dict alone: torch.save(model.state_dict(), {str(path)!r})"
            if found := re.search(r"GLOBAL (\S+)", str(error)):
                what = f"holds Python objects ({found[1]}), which are not loaded for safety"
                raise WeightsError(f"{path}: {what}; {alone}") from error
            if "TorchScript" in str(error):
                raise WeightsError(f"{path}: a TorchScript archive, which is not loaded; {alone}") from error
            raise
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not the weights of a model")
    return content


def is_finite(state: Mapping[str, Tensor]) -> bool:
    """Return whether all weights are finite. If training has diverged, they are not."""
    # aminmax propagates NaN, and is several times as fast as isfinite.
    extremes = [torch.stack(torch.aminmax(value)) for value in state.values() if value.is_floating_point()]
    return all(bool(pair.isfinite().all()) for pair in extremes)


@contextmanager
def _as_weights_error(complaint: str) -> Iterator[None]:
    """Convert whatever torch raises for an invalid file, but not failures to read it, to a WeightsError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        is_truncated = isinstance(error, OSError) and error.errno == errno.EINVAL  # torch seeks to before the start
        if isinstance(error, (OSError, WeightsError)) and not is_truncated:
            raise
        raise WeightsError(complaint) from error


def _imagenet_state(model_name: str) -> dict[str, Tensor]:
    weights = torchvision_models.get_model_weights(model_name).DEFAULT
    options = {
        "progress": bool(sys.stderr and sys.stderr.isatty()),
        "check_hash": True,
        "weights_only": True,
        "map_location": "cpu",
    }
    file = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        with _as_weights_error(f"{file}: not the ImageNet weights, or corrupt; remove the file and try again"):
            return weights.get_state_dict(**options)
    except OSError as error:
        raise OSError(f"cannot download {weights.url}: {error}") from error


def _fitting_model(state: Mapping[str, Tensor]) -> str | None:
    """Return the key of MODELS that has the names and shapes of `state`, apart from `fc`, or None."""

    def shapes(values: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        ignored = re.compile(r"fc\.|.*num_batches_tracked$")  # the latter is missing before PyTorch 0.4.1
        return {name: value.shape for name, value in values.items() if not ignored.match(name)}

    for name, build in MODELS.items():
        with torch.device("meta"):  # allocates no memory
            if shapes(build().state_dict()) == shapes(state):
                return name
    return None


def _load_state(
    model: ResNet,
    state: Mapping[str, Tensor],
    source: str | os.PathLike,
    model_name: str,
    allowed_missing: Sequence[str] = (),
) -> None:
    """Call `load_state_dict` with one-line errors; `state` may lack the parameters in `allowed_missing` only."""
    own = model.state_dict()
    wrong = [
        f"{name} is {tuple(value.shape)} in the file, {tuple(own[name].shape)} in the model"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    if not wrong:
        # Not strict: files from before PyTorch 0.4.1 lack BatchNorm's num_batches_tracked.
        try:
            missing, unexpected = model.load_state_dict(state, strict=False)
        except RuntimeError as error:  # such as sparse tensors
            raise WeightsError(f"{source}: does not fit {model_name}: unsupported kind of tensor") from error
        wrong = [f"{name} is missing" for name in missing if name not in allowed_missing]
        wrong += [f"{name} is unknown" for name in unexpected]
    if wrong:
        details = "; ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        fitting = _fitting_model(state)
        if fitting not in (None, model_name):
            details = f"the file is a {fitting}; pass --model {fitting} ({details})"
        raise WeightsError(f"{source}: does not fit {model_name}: {details}")
    if not is_finite(state):
        raise WeightsError(f"{source}: non-finite weights: training has diverged")
