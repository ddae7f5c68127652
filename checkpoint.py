"""Write best.pth and last.pth, and restore a run from its last.pth."""

import contextlib
import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from event_files import event_sizes
from weights_io import INFO_KEYS, WeightsError, check_info, is_finite, read_torch_file

if TYPE_CHECKING:
    from run_state import Run

FORMAT = 5  # version of last.pth; increment it with every change: other versions cannot be resumed
COUNTS = ("images", "steps", "correct")


def save_checkpoint(content: dict[str, Any], path: str | os.PathLike) -> None:
    """Save a checkpoint atomically: write a temporary file, flush it to disk, and rename it.

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
        kept = "; the previous file is intact" if path.exists() else ""
        raise OSError(f"cannot save {path}: {reason}{kept}") from error
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            unfinished.unlink()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk (on POSIX; Windows does so by itself)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # shared folders of virtual machines
                raise
        finally:
            os.close(handle)


def finite_state_dict(model: nn.Module, epoch: int) -> dict[str, Tensor]:
    """Return a copy of a model's state_dict, on the CPU, so that it loads without a GPU.

    Raises:
        FloatingPointError: training has diverged.
    """
    state = copy_to_cpu(model.state_dict())
    if not is_finite(state):
        raise FloatingPointError(f"non-finite weights in epoch {epoch}: training diverged; try a lower learning rate")
    return state


def copy_to_cpu(value: Any) -> Any:
    """Copy the tensors in nested dicts and lists to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_cpu(item) for key, item in value.items()}
    return [copy_to_cpu(item) for item in value] if isinstance(value, list) else value


def best_content(run: "Run") -> dict[str, Any]:
    """Return the content of best.pth: the model that was validated, its metadata and metrics.

    Raises:
        FloatingPointError: training has diverged.
    """
    familiarity = {} if run.familiarity is None else {"familiarity": run.familiarity._asdict()}
    return run.info | run.last | familiarity | {"state_dict": finite_state_dict(run.eval_model, run.epoch)}


def last_content(
    run: "Run", progress: Mapping[str, float], rank_buffers: Sequence[Mapping[str, Tensor]]
) -> dict[str, Any]:
    """Return the content of last.pth: everything that resuming the run needs, except the sizes of the event files.

    Args:
        progress: the `Progress.state_dict` of the current epoch, summed over all ranks.
        rank_buffers: the model's buffers on each rank, if they differ.

    Raises:
        FloatingPointError: training has diverged.
    """
    state = finite_state_dict(run.model, run.epoch)
    average = {} if run.average is None else finite_state_dict(run.average, run.epoch)
    resume = {
        "format": FORMAT,
        "flags": run.flags,
        "global_batch": run.global_batch,
        "epoch": run.epoch,
        "progress": dict(progress),
        "rank_buffers": [*rank_buffers],
        "history": [*run.history],
        "best": run.best,
        "best_confusion": run.best_confusion,
        "improved_at": run.improved_at,
        "finished": run.finished,
        "average": average,
        "optimizer": copy_to_cpu(run.optimizer.state_dict()),
        "scaler": run.scaler.state_dict(),
        "schedule": run.schedule.state_dict(),
    }
    return run.info | run.last | {"state_dict": state, "resume": resume}


def write_checkpoints(folder: Path, contents: Mapping[str, dict[str, Any]]) -> None:
    """Write a run's checkpoints, given by file name. The event files must have been flushed.

    last.pth contains their sizes, to which they are truncated on resume.

    Raises:
        OSError: writing failed. The previous file of that name is kept.
    """
    for name, content in contents.items():
        if name == "last.pth":
            content["resume"]["events"] = event_sizes(folder)
        save_checkpoint(content, folder / "weights" / name)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a last.pth to resume from.

    Raises:
        WeightsError: it is another kind of file, corrupt, or written by a version with another format.
    """
    content = read_torch_file(path)
    resume = content.get("resume")
    if not isinstance(resume, dict):
        raise WeightsError(f"{path}: not a checkpoint to resume from; use a run's weights/last.pth")
    if resume.get("format") != FORMAT:
        raise WeightsError(
            f"{path}: written by another version, and cannot be resumed; start a new run from its weights: "
            f"--weights {path}"
        )
    checkpoint = dict.fromkeys(INFO_KEYS) | dict(content)
    check_info(path, checkpoint)
    return checkpoint


def restore(run: "Run", checkpoint: Mapping[str, Any]) -> dict[str, int]:
    """Restore the state in last.pth. Returns its `event_sizes`.

    Raises:
        WeightsError: the checkpoint is corrupt, or its model has another architecture.
    """
    try:
        resume = checkpoint["resume"]
        run.model.load_state_dict(checkpoint["state_dict"])
        if run.average is not None:
            run.average.load_state_dict(resume["average"])
        if resume["rank_buffers"]:
            own = resume["rank_buffers"][run.dist.rank]
            run.model.load_state_dict(own, strict=False)
            run.eval_model.load_state_dict(own, strict=False)
        _load_optimizer(run.optimizer, resume["optimizer"])
        if resume["scaler"]:  # empty if the run used another precision earlier
            run.scaler.load_state_dict(resume["scaler"])
        run.schedule.load_state_dict(resume["schedule"])
        run.epoch = _non_negative(resume["epoch"])
        run.restore_progress(float(resume["progress"]["loss_sum"]), *(int(resume["progress"][key]) for key in COUNTS))
        run.history = [{str(name): float(value) for name, value in row.items()} for row in resume["history"]]
        for row in run.history:
            row["epoch"] = int(row["epoch"])
        run.last = {key: checkpoint[key] for key in run.last}
        run.best = {key: resume["best"][key] for key in run.last}
        run.best_confusion = resume["best_confusion"]
        run.improved_at = resume["improved_at"]
        run.finished = str(resume["finished"])
        return dict(resume["events"])
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        path = run.weights / "last.pth"
        raise WeightsError(f"{path}: corrupt, or not a checkpoint of this program") from error


def _non_negative(epoch: int) -> int:
    if not isinstance(epoch, int) or epoch < 0:
        raise ValueError("not an epoch")
    return epoch


def _load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load the momentum buffers; the parameter groups follow from the flags."""
    optimizer.load_state_dict({"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, values in optimizer.state.items():  # load_state_dict does not check these
        momentum = values["momentum_buffer"]
        if any(getattr(momentum, kind) != getattr(parameter, kind) for kind in ("shape", "layout", "device")):
            raise ValueError("momentum buffers of another model")
