"""Read and write weights files and checkpoints: best.pth, last.pth, plain state_dicts, ImageNet weights."""

import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import models as torchvision_models

from model import MODELS, ResNet, to_device

# The prefixes that torch.nn.parallel and torch.compile add to the names of parameters.
WRAPPER_PREFIXES = ("module.", "_orig_mod.")


class WeightsError(ValueError):
    """An unusable weights file. The message names the file and the reason."""


# --- load weights ---------------------------------------------------------------------------------------------------


def load_pretrained(model: ResNet, weights: str | os.PathLike, model_name: str) -> list[str]:
    """Load pretrained weights into `model`.

    Args:
        weights: the path of a best.pth, a last.pth or a plain `state_dict` (the tutorial's model-N.pth, torchvision's
            files), or "imagenet": torchvision's weights for `model_name`, downloaded once and verified by their hash.

    Returns:
        The names of the parameters that were not loaded because their shape differs: those of `fc`, if the number of
        classes differs.

    Raises:
        FileNotFoundError: the file does not exist.
        WeightsError: it is not a weights file, or one of another model.
        OSError: it cannot be read, or the ImageNet weights cannot be downloaded.
    """
    state = _imagenet_state(model_name) if weights == "imagenet" else _read_weights_file(weights)["state_dict"]
    own = model.state_dict()
    left_out = [
        name
        for name, value in state.items()
        if name.startswith("fc.") and name in own and value.shape != own[name].shape
    ]
    _load_state(model, {name: value for name, value in state.items() if name not in left_out}, weights, left_out)
    return left_out


def load_model(
    path: str | os.PathLike,
    device: torch.device | str = "cpu",
    model_name: str | None = None,
    class_names: list[str] | None = None,
) -> tuple[ResNet, dict[str, Any]]:
    """Load a trained model for prediction.

    Args:
        path: a best.pth or last.pth; or a plain `state_dict`, with `model_name` (a key of MODELS) and `class_names`.

    Returns:
        The model on `device` in evaluation mode, and its metadata:
        {"model": str, "class_names": list[str], "img_size": int, "epoch": int | None, "accuracy": float | None}.

    Raises:
        FileNotFoundError: the file does not exist.
        WeightsError: it is not a weights file, does not fit the model, or lacks metadata that was not given.
    """
    checkpoint = _read_weights_file(path)
    info = {
        "model": model_name or checkpoint.get("model"),
        "class_names": class_names or checkpoint.get("class_names"),
        "img_size": checkpoint.get("img_size", 224),
        "epoch": checkpoint.get("epoch"),
        "accuracy": checkpoint.get("accuracy"),
    }
    if info["model"] is None or info["class_names"] is None:
        raise WeightsError(f"{path}: a plain state_dict; give its --model and its --class-indices as well")
    _check_info(path, info)
    model = MODELS[info["model"]](num_classes=len(info["class_names"]))
    _load_state(model, checkpoint["state_dict"], path)
    return to_device(model, device).eval(), info


def _check_info(path: str | os.PathLike, info: dict[str, Any]) -> None:
    names, size = info["class_names"], info["img_size"]
    if not isinstance(info["model"], str) or info["model"] not in MODELS:
        raise WeightsError(f"{path}: made for an unknown model {info['model']!r}; known are {', '.join(MODELS)}")
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise WeightsError(f"{path}: its class_names are not a list of names")
    if not (isinstance(size, int) and 1 <= size <= 10_000):
        raise WeightsError(f"{path}: its img_size is {size!r}, not a number of pixels")


def _read_weights_file(path: str | os.PathLike) -> dict[str, Any]:
    """Read a weights file as a dict whose "state_dict" holds the parameters, without the prefixes of wrappers."""
    content = read_torch_file(path)
    checkpoint = dict(content) if isinstance(content.get("state_dict"), Mapping) else {"state_dict": content}
    state = {_without_prefixes(str(name)): value for name, value in checkpoint["state_dict"].items()}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: holds no state_dict (names of parameters with their tensors)")
    return checkpoint | {"state_dict": state}


def read_torch_file(path: str | os.PathLike) -> Mapping[Any, Any]:
    """Load a dict of tensors and plain values to the CPU. Untrusted files are safe: no other object is unpickled.

    Raises:
        FileNotFoundError: the file does not exist.
        WeightsError: it holds anything else, or is corrupt.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    with _refusing(f"{path}: not a PyTorch weights file, or corrupt"):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not the weights of a model")
    return content


def is_finite(state: Mapping[str, Tensor]) -> bool:
    """Return whether all weights are finite. After a training that has diverged they are not."""
    return all(bool(value.isfinite().all()) for value in state.values() if value.is_floating_point())


@contextmanager
def _refusing(complaint: str) -> Iterator[None]:
    """Raise a WeightsError with this message for whatever torch raises for an invalid file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except OSError:
        raise
    except Exception as error:
        raise WeightsError(complaint) from error


def _without_prefixes(name: str) -> str:
    while name.startswith(WRAPPER_PREFIXES):
        name = name.split(".", 1)[1]
    return name


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
        with _refusing(f"{file}: not the ImageNet weights, or corrupt; remove the file and try again"):
            return weights.get_state_dict(**options)
    except OSError as error:
        raise OSError(f"cannot download {weights.url}: {error}") from error


def _load_state(
    model: ResNet, state: Mapping[str, Tensor], source: str | os.PathLike, may_miss: list[str] | None = None
) -> None:
    """Call `load_state_dict`, with errors of one line; `may_miss` are the parameters that `state` may lack."""
    own = model.state_dict()
    wrong = [
        f"{name} is {tuple(value.shape)} there, {tuple(own[name].shape)} in the model"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    if not wrong:
        # Not strict: files from before PyTorch 0.4.1 lack BatchNorm's num_batches_tracked.
        try:
            missing, unexpected = model.load_state_dict(state, strict=False)
        except RuntimeError as error:  # sparse tensors and the like
            raise WeightsError(f"{source}: does not fit this model: parameters of another kind") from error
        wrong = [f"{name} is missing" for name in missing if name not in (may_miss or [])]
        wrong += [f"{name} is unknown" for name in unexpected]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise WeightsError(f"{source}: does not fit this model: {'; '.join(wrong[:3])}{more}")
    if not is_finite(state):
        raise WeightsError(f"{source}: non-finite weights: the training has diverged")


# --- save and resume ------------------------------------------------------------------------------------------------


def save_checkpoint(content: dict[str, Any], path: str | os.PathLike) -> None:
    """Save a checkpoint atomically: write a temporary file, flush it to the disk, and rename it.

    Raises:
        OSError: it cannot be written. An earlier file of that name is unchanged.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        with open(unfinished, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it cannot be written"
        left = "; the one from before is whole" if path.exists() else ""
        raise OSError(f"cannot save {path}: {reason}{left}") from error
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            unfinished.unlink()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk (on POSIX; Windows does so by itself)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # shared folders of virtual machines
                raise
        finally:
            os.close(handle)


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Read a last.pth to resume from.

    Raises:
        WeightsError: it is another kind of file, or corrupt.
    """
    content = read_torch_file(path)
    match content.get("resume"):
        case {"command": list(words), "epoch": int(epoch), "best": {"epoch": int() | None as best}} as resume:
            resume.setdefault("improved_at", best)  # a run from before best.pth took the loss into account
            if epoch >= 0 and all(isinstance(word, str) for word in words) and _is_epoch(resume["improved_at"]):
                return content
    raise WeightsError(f"{path}: not a checkpoint to resume from; a run's weights/last.pth is one")


def _is_epoch(value: Any) -> bool:
    return value is None or isinstance(value, int)
