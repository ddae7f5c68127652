"""The folder, lock, checkpoints, event files and signals of a training run."""

import argparse
import contextlib
import errno
import importlib
import json
import math
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from checkpoint import is_finite, save_checkpoint
from cli_utils import UsageError, printable, quote_command, read_json, write_json
from data_utils import write_class_indices
from distributed import Distributed
from optimization import Schedule
from prepare_data import Data, Files
from train_eval_utils import Progress

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LAUNCH = ".launch"  # in a run's folder: the launch ids of its torchruns, one per line
SECONDS_BETWEEN_SAVES = 60  # minimum, within an epoch
SECONDS_TO_STOP = 10  # with several ranks, after a signal; torchrun kills them after 30

# --- folder -------------------------------------------------------------------------------------------------------


def create_run_folder(name: str, root: str | os.PathLike = "runs") -> Path:
    """Create `root`/`name`, or the first free one of name-2, name-3, ..., with a sub-folder `weights`."""
    Path(root).mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = Path(root, name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()  # at most one process succeeds
        except FileExistsError:
            continue
        (folder / "weights").mkdir()
        return folder


def newest_weights(root: str | os.PathLike = "runs", file_name: str = "best.pth") -> Path:
    """Return the most recent weights/`file_name` of the runs in `root`.

    Raises:
        UsageError: no run has one.
    """
    found = list(Path(root).glob(f"*/weights/{file_name}"))
    if not found:
        raise UsageError(f"no run in {root} has a {file_name}: train a model first, or name one")
    return max(found, key=lambda path: path.stat().st_mtime)


def run_of(launch_ids: set[str], root: str | os.PathLike = "runs") -> str | None:
    """Return the folder of the run that one of these launches started, or None without a last.pth to resume from."""
    for mark in Path(root).glob(f"*/{LAUNCH}") if launch_ids else ():
        begun = mark.read_text(encoding="utf-8").splitlines()
        if not launch_ids.isdisjoint(begun) and (mark.parent / "weights" / "last.pth").exists():
            return str(mark.parent)
    return None


def lock_run(run: Path) -> TextIO | None:
    """Lock a run's folder against other training processes.

    Returns:
        The open lock file, to be closed to unlock; None on Windows. No effect on a file system without locks.

    Raises:
        UsageError: another process has the lock.
    """
    if fcntl is None:
        return None
    file = open(run / ".lock", "w")  # noqa: SIM115 - held open until the run ends
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise UsageError(f"{run}: another process is training this run") from error
    except OSError:  # a file system without locks
        pass
    return file


def write_args(args: argparse.Namespace, path: str | os.PathLike) -> None:
    """Write all flags and the package versions as JSON."""
    content = {"flags": vars(args), "versions": versions()}
    Path(path).write_text(json.dumps(content, indent=4), encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a run uses."""
    packages = ("torch", "torchvision", "tensorboard", "PIL", "matplotlib", "numpy", "tqdm")
    return {"python": platform.python_version()} | {
        package: importlib.import_module(package).__version__ for package in packages
    }


def run_card(command: list[str], args: argparse.Namespace, data: Mapping[str, tuple[int, int]], hardware: str) -> str:
    """Describe a run in Markdown: its command, hardware, data, flags and package versions.

    Args:
        data: the numbers of training and validation images per class.
    """

    def table(*rows: Sequence[object]) -> list[str]:
        cells = [[printable(str(cell)).replace("|", "\\|") for cell in row] for row in rows]
        cells.insert(1, ["---"] * len(rows[0]))
        return [*(f"| {' | '.join(row)} |" for row in cells), ""]

    sums = [sum(column) for column in zip(*data.values(), strict=True)]
    counts = [(name, *numbers) for name, numbers in data.items()]
    lines = [f"    {quote_command(['python', 'train.py', *command])}", "", f"On {printable(hardware)}.", ""]
    lines += table(("class", "training", "validation"), *counts, ("all", *sums))
    lines += table(("flag", "value"), *vars(args).items())
    lines += table(("package", "version"), *versions().items())
    return "\n".join(lines)


def check_same_data(
    folder: Path, files: Files, class_names: list[str], checkpoint: Mapping[str, Any], may_differ: bool
) -> None:
    """Compare the data with the run's earlier data, and print each difference to standard error.

    Args:
        files: the result of `describe_files`; files.json in `folder` has the earlier one.

    Raises:
        UsageError: the classes differ; files differ and not `may_differ`; or files.json is corrupt.
    """
    if class_names != checkpoint.get("class_names"):
        raise UsageError(f"the data has the classes {', '.join(class_names)}, but the run was trained on others")
    before = read_json(folder / "files.json")
    if not all(_is_list_of_pairs(versions) for versions in before.values()):
        raise UsageError(f"{folder / 'files.json'}: corrupt; remove it and pass --allow-changed-data")
    differences = {}
    for name in sorted(before.keys() | files.keys()):
        if name not in files or name not in before:
            differences[name] = "is new" if name in files else "is missing"
        elif sorted(content for _, content in before[name]) != sorted(content for _, content in files[name]):
            differences[name] = "has changed"
    if not differences:  # otherwise they may have changed the split
        for name in files:
            if before[name] != files[name]:
                differences[name] = "has moved between training and validation"
    for name, what in differences.items():
        print(f"{printable(name)} {what}", file=sys.stderr)
    if differences and not may_differ:
        raise UsageError(
            f"{len(differences)} files are not as they were when the run began; put them back, or give "
            f"--allow-changed-data to resume with the current files"
        )


def _is_list_of_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in value
    )


# --- checkpoints --------------------------------------------------------------------------------------------------


def find_run(run: str) -> Path:
    """Return the folder that `--resume` names.

    Args:
        run: a run's name, its folder, its last.pth, or "" for the most recent run.

    Raises:
        UsageError: there is no valid last.pth.
    """
    if not run:
        return newest_weights(file_name="last.pth").parents[1]
    path = Path(run)
    if path.is_file():
        path = path.absolute()
        if (path.parent.name, path.name) != ("weights", "last.pth"):
            raise UsageError(f"--resume {run}: it must be the last.pth in the folder weights of its run")
        return path.parents[1]
    for folder in (path, Path("runs", run)):
        if (folder / "weights" / "last.pth").is_file():
            return folder
    raise UsageError(f"--resume {run}: no weights/last.pth to resume from, neither there nor in {Path('runs', run)}")


class Run:
    """The state of a training run, as needed to resume it. The main process locks its folder, see `lock_run`.

    Args:
        info: the model's metadata in a weights file: {"model": ..., "class_names": ..., "img_size": ...}.
        command: the command-line arguments.
        recipe: the recipe's values, which may change in later versions of the program.
        global_batch: images per step, over all ranks.
        dist: the process group. Every rank calls `save`, `finish_epoch` and `load`; the main process writes.
        average: the averaged weights, if any.

    Attributes:
        epoch: the current epoch.
        progress: the loss and accuracy of the current epoch's steps so far.
        images_before: images of the current epoch that were trained on before an interruption.
        history: the metrics of the earlier epochs.
        over: whether training is complete, decided at the end of each epoch.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        schedule: Schedule,
        info: dict[str, Any],
        command: list[str],
        recipe: Mapping[str, float],
        global_batch: int,
        dist: Distributed,
        average: AveragedModel | None = None,
    ) -> None:
        self.folder, self.global_batch, self.dist = folder, global_batch, dist
        self._lock = lock_run(folder) if dist.is_main else None
        self.average = average
        self.model, self.optimizer, self.scaler, self.schedule = model, optimizer, scaler, schedule
        self.info, self.command, self.recipe = info, command, recipe
        self.epoch = 0
        self.progress = Progress()
        self.images_before = 0
        self.over = False
        self.history: list[dict[str, float]] = []
        self.last: dict[str, Any] = {"epoch": None, "accuracy": None, "val_loss": None}
        self.best: dict[str, Any] = {"epoch": None, "accuracy": -1.0, "val_loss": math.inf}
        self.improved_at: int | None = None  # epoch of the last rise in accuracy, for --patience
        self._saved_at, self._saving_takes = 0.0, 0.0

    @property
    def weights(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "weights"

    @property
    def eval_model(self) -> nn.Module:
        """The model to validate and save as best.pth: the averaged one, if any."""
        return self.model if self.average is None else self.average.module

    def save(self) -> None:
        """Write last.pth, after the steps that `progress` counts. Flush the event files first.

        Raises:
            FloatingPointError, OSError: training has diverged, or writing failed. The previous last.pth is kept.
        """
        start = time.perf_counter()
        self.progress.read()
        progress = self.progress.all_reduce(self.dist)
        if not self.dist.is_main:
            return
        state = self.state_dict(self.model)
        average = {} if self.average is None else self.state_dict(self.average)
        resume = {
            "command": self.command,
            "recipe": dict(self.recipe),
            "global_batch": self.global_batch,
            "epoch": self.epoch,
            "progress": progress.state,
            "history": self.history,
            "best": self.best,
            "improved_at": self.improved_at,
            "average": average,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "schedule": self.schedule.state_dict(),
            "over": self.over,
            "events": event_sizes(self.folder),
        }
        save_checkpoint(self.info | self.last | {"state_dict": state, "resume": resume}, self.weights / "last.pth")
        self._saved_at = time.perf_counter()
        self._saving_takes = self._saved_at - start

    def save_is_due(self) -> bool:
        """Return whether, on the main process, a minute and 100 times a save's duration have passed since the last."""
        waiting = max(SECONDS_BETWEEN_SAVES, 100 * self._saving_takes)
        return self.dist.is_main and time.perf_counter() - self._saved_at > waiting

    def judge(self, accuracy: float, val_loss: float) -> bool:
        """Record the validation metrics of the current epoch.

        Returns:
            Whether it is the best epoch so far: highest accuracy, then lowest loss.
        """
        self.last = {"epoch": self.epoch, "accuracy": accuracy, "val_loss": val_loss}
        if accuracy > self.best["accuracy"]:
            self.improved_at = self.epoch
        if (accuracy, -val_loss) > (self.best["accuracy"], -self.best["val_loss"]):
            self.best = self.last
        return self.best is self.last

    def has_stalled(self, patience: int) -> bool:
        """Return whether the accuracy has not risen for at least `patience` epochs (0: always False)."""
        return patience > 0 and self.last["epoch"] is not None and self.last["epoch"] - self.improved_at >= patience

    def finish_epoch(self) -> None:
        """Write best.pth if this epoch is the best so far, advance to the next epoch and write last.pth.

        Raises:
            FloatingPointError, OSError: see `save`.
        """
        if self.best is self.last and self.dist.is_main:
            save_checkpoint(
                self.info | self.last | {"state_dict": self.state_dict(self.eval_model)}, self.weights / "best.pth"
            )
        self.epoch += 1
        self.progress = Progress()
        self.images_before = 0
        self.save()

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a model's state_dict on the CPU, to load without a GPU.

        Raises:
            FloatingPointError: training has diverged.
        """
        state = {name: value.cpu() for name, value in model.state_dict().items()}
        if not is_finite(state):
            raise FloatingPointError(
                f"non-finite weights in epoch {self.epoch}: training diverged; try a lower learning rate"
            )
        return state

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the state that `save` wrote, and remove later events from the event files.

        Raises:
            UsageError: the checkpoint is corrupt, or its model has another architecture.
        """
        try:
            resume = checkpoint["resume"]
            self.model.load_state_dict(checkpoint["state_dict"])
            if self.average is not None:
                self.average.load_state_dict(resume["average"])
            self._load_optimizer(resume["optimizer"])
            if resume["scaler"]:  # empty if the run used another precision before
                self.scaler.load_state_dict(resume["scaler"])
            self.schedule.load_state_dict(resume.get("schedule", {}))
            self.over = bool(resume.get("over"))
            counted = resume["progress"]
            self.epoch = resume["epoch"]
            total, *counts = float(counted["sum"]), *(int(counted[key]) for key in ("images", "steps", "right"))
            self.images_before = counts[0]
            # Only rank 0 restores the sums: `Progress.all_reduce` adds up all ranks.
            self.progress = Progress(total, *counts) if self.dist.is_main else Progress(steps=counts[1])
            self.history = [
                {str(name): float(value) for name, value in row.items()} | {"epoch": int(row["epoch"])}
                for row in resume["history"]
            ]
            best = resume["best"]
            self.best = {
                "epoch": best["epoch"],
                "accuracy": float(best["accuracy"]),
                "val_loss": float(best.get("val_loss", math.inf)),
            }
            self.improved_at = resume["improved_at"]
            self.last = {key: checkpoint[key] for key in ("epoch", "accuracy")}
            self.last["val_loss"] = checkpoint.get("val_loss")
            if self.dist.is_main:
                cut_events(self.folder, dict(resume["events"]))
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UsageError(f"{self.weights / 'last.pth'}: corrupt, or not a checkpoint of this program") from error

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Load the momentum buffers; the parameter groups follow from the flags."""
        own = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": state["state"], "param_groups": own["param_groups"]})
        for parameter, values in self.optimizer.state.items():  # load_state_dict does not check these
            momentum = values["momentum_buffer"]
            if (momentum.shape, momentum.layout, momentum.device) != (
                parameter.shape,
                parameter.layout,
                parameter.device,
            ):
                raise ValueError("momentum of another kind")


def write_run(run: Run, data: Data, args: argparse.Namespace, known_images: Path) -> None:
    """Write the run's metadata files when it starts or resumes."""
    if args.resume is None:
        write_args(args, run.folder / "args.json")
        write_class_indices(data.class_names, run.folder / "class_indices.json")
    if run.dist.launch_ids:
        (run.folder / LAUNCH).write_text("\n".join(sorted(run.dist.launch_ids)), encoding="utf-8")
    write_json(data.files, run.folder / "files.json")
    write_json(data.known, known_images)
    if data.problems:
        (run.folder / "unusable_images.txt").write_text("\n".join([*data.problems, ""]), encoding="utf-8")


# --- event files --------------------------------------------------------------------------------------------------


def event_sizes(run: Path) -> dict[str, int]:
    """Sync a run's event files to disk, and return their sizes in bytes by file name."""
    sizes = {}
    for path in run.glob("events.out.tfevents.*"):
        with open(path, "r+b") as file:  # Windows cannot sync a file opened read-only
            os.fsync(file.fileno())
            sizes[path.name] = os.fstat(file.fileno()).st_size
    return sizes


def cut_events(run: Path, sizes: dict[str, int]) -> None:
    """Truncate a run's event files to the `sizes` from `event_sizes`; remove those that were missing or empty."""
    for path in run.glob("events.out.tfevents.*"):
        size = sizes.get(path.name, 0)
        if size == 0:
            path.unlink()
        elif path.stat().st_size > size:
            os.truncate(path, size)


@contextlib.contextmanager
def event_errors(run: Path) -> Iterator[None]:
    """Raise an OSError that names the run's folder if writing its event files fails.

    Silences OSErrors in threads: the event writer's thread also raises its error in the main thread.
    """

    def report(failure: threading.ExceptHookArgs) -> None:
        if not issubclass(failure.exc_type, OSError):
            before(failure)

    before, threading.excepthook = threading.excepthook, report
    try:
        yield
    except ConnectionError:  # the output is closed, or a worker has ended
        raise
    except OSError as error:
        has_said = error.strerror is None  # the message is already complete
        if has_said or error.errno in (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE):
            raise
        raise OSError(f"cannot write to {run}: {error.strerror}") from error
    finally:
        threading.excepthook = before


# --- signals ------------------------------------------------------------------------------------------------------


class StopRequest(Exception):  # noqa: N818 - a request, not an error
    """The signal `number` has asked the run to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopSignals:
    """Context manager that records SIGINT and SIGTERM, to be checked between steps.

    A second signal exits at once, except under torchrun.

    Args:
        dist: all ranks stop after the same step, see `sync`. A rank still running 10 seconds later exits.
    """

    def __init__(self, dist: Distributed | None = None) -> None:
        self.received: int | None = None
        self.dist = dist or Distributed()

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        if self.dist.world_size > 1:
            noted, self._wakeup = socket.socketpair()
            self._wakeup.setblocking(False)
            # Python runs no signal handler while it waits for another rank.
            signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._exit_in_time, args=[noted], daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.dist.world_size > 1:
            signal.set_wakeup_fd(-1)
            self._wakeup.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise `StopRequest` if a signal has arrived. With several ranks, only `sync` does."""
        if self.dist.world_size == 1:
            self._raise(self.received or 0)

    def sync(self, *flags: float) -> list[float]:
        """All-reduce the maximum of each flag. Raise `StopRequest` on all ranks if one has received a signal."""
        number, *flags = self.dist.sync_flags(self.received or 0, *flags)
        self._raise(int(number))
        return flags

    def _raise(self, number: int) -> None:
        if number:
            raise StopRequest(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.dist.is_launched:  # each rank may receive it more than once: from torchrun and from the terminal
            self.received = self.received or number
            return
        if self.received is not None:
            os._exit(128 + number)  # the workers then end too, see `worker_init`
        self.received = number
        with contextlib.suppress(OSError):  # stderr may be closed: `train.py 2>&1 | tee log`
            os.write(
                2, b"\nstopping after this step; press Ctrl-C again to stop immediately\n"
            )  # not print: unsafe in a handler

    def _exit_in_time(self, noted: socket.socket) -> None:
        for number in iter(lambda: noted.recv(1), b""):
            if number[0] in self._before:
                time.sleep(SECONDS_TO_STOP)
                os._exit(128 + number[0])
