"""A run: its folder, checkpoints, event files and signals."""

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

LAUNCH = ".launch"  # in the folder of a run: by which torchruns it was begun, a line each
SECONDS_BETWEEN_SAVES = 60  # at least, within an epoch
SECONDS_TO_STOP = 10  # of several processes, after a signal; torchrun kills them after 30

# --- folder -------------------------------------------------------------------------------------------------------


def create_run_folder(name: str, root: str | os.PathLike = "runs") -> Path:
    """Make `root`/`name`, or the first of name-2, name-3, ... that is not there yet, with a folder `weights` in it."""
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
    """The weights/best.pth, or another `file_name`, under `root` that was written last.

    Raises:
        UsageError: there is none.
    """
    found = list(Path(root).glob(f"*/weights/{file_name}"))
    if not found:
        raise UsageError(f"no run in {root} has a {file_name}: train first, or say which")
    return max(found, key=lambda path: path.stat().st_mtime)


def run_of(launch_ids: set[str], root: str | os.PathLike = "runs") -> str | None:
    """Return the folder of the run that one of these launches started, if it has a last.pth to resume from."""
    for mark in Path(root).glob(f"*/{LAUNCH}") if launch_ids else ():
        begun = mark.read_text(encoding="utf-8").splitlines()
        if not launch_ids.isdisjoint(begun) and (mark.parent / "weights" / "last.pth").exists():
            return str(mark.parent)
    return None


def lock_run(run: Path) -> TextIO | None:
    """Keep other processes from writing to this run as well, until what is returned is closed or the process ends.

    Raises:
        UsageError: another process has the lock.
    """
    if fcntl is None:
        return None
    file = open(run / ".lock", "w")  # noqa: SIM115 - held open for as long as the run takes
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise UsageError(f"{run}: another process is training this run") from error
    except OSError:  # a file system without locks
        pass
    return file


def write_args(args: argparse.Namespace, path: str | os.PathLike) -> None:
    """Write every flag's value, and the versions that the run uses, as JSON."""
    content = {"flags": vars(args), "versions": versions()}
    Path(path).write_text(json.dumps(content, indent=4), encoding="utf-8")


def versions() -> dict[str, str]:
    """Of Python, and of the packages that a run uses."""
    packages = ("torch", "torchvision", "tensorboard", "PIL", "matplotlib", "numpy", "tqdm")
    return {"python": platform.python_version()} | {
        package: importlib.import_module(package).__version__ for package in packages
    }


def run_card(command: list[str], args: argparse.Namespace, data: Mapping[str, tuple[int, int]], hardware: str) -> str:
    """A run in Markdown: its command, data, machine, versions, and every flag's value.

    Args:
        data: of each class, how many images there are for training and for validation.
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
    """Compare the data with what a run was trained on before, and name each file that differs on standard error.

    Args:
        files: what `describe_files` gives; the run's folder holds what it gave then.

    Raises:
        UsageError: other classes; other files, unless they may differ.
    """
    if class_names != checkpoint.get("class_names"):
        raise UsageError(f"the data has the classes {', '.join(class_names)}, and the run was trained on others")
    before = read_json(folder / "files.json")
    if not all(_is_list_of_pairs(versions) for versions in before.values()):
        raise UsageError(f"{folder / 'files.json'}: damaged; remove it, and give --allow-changed-data")
    differences = {}
    for name in sorted(before.keys() | files.keys()):
        if name not in files or name not in before:
            differences[name] = "is new" if name in files else "is gone"
        elif sorted(content for _, content in before[name]) != sorted(content for _, content in files[name]):
            differences[name] = "has changed"
    if not differences:  # otherwise others may be held out because of them
        for name in files:
            if before[name] != files[name]:
                differences[name] = "has moved between training and validation"
    for name, what in differences.items():
        print(f"{printable(name)} {what}", file=sys.stderr)
    if differences and not may_differ:
        raise UsageError(
            f"{len(differences)} files are not as they were when the run began; put them back, or give "
            f"--allow-changed-data to go on with what is there"
        )


def _is_list_of_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in value
    )


# --- checkpoints --------------------------------------------------------------------------------------------------


def find_run(run: str) -> Path:
    """The folder that `--resume` means: by a run's name, its folder or its last.pth, or ("") the newest run.

    Raises:
        UsageError: there is no last.pth to go on from.
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
    raise UsageError(f"--resume {run}: no weights/last.pth to go on from, neither there nor in {Path('runs', run)}")


class Run:
    """The progress of a training run, and everything that it takes to go on after an interruption.

    No other process can have one of the same folder: see `lock_run`.

    Args:
        folder: the run's.
        info: what a weights file tells of its model: {"model": ..., "class_names": ..., "img_size": ...}.
        command: the words of its command line.
        recipe: the values of its recipe, which may have others in another version of the program.
        global_batch: the images of a step.
        average: the averaged weights, if there are any.
        dist: the process group. Every rank calls `save`, `finish_epoch` and `load`; the main process writes.

    `epoch` is the one under way, `progress` that of its steps so far, `images_before` how many of its images had been
    taken before an interruption, `history` the metrics of those before it; `over`
    says that there is none after them, which is decided at the end of each.
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
        self.improved_at: int | None = None  # the epoch in which the accuracy last rose, for --patience
        self._saved_at, self._saving_takes = 0.0, 0.0

    @property
    def weights(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / "weights"

    @property
    def eval_model(self) -> nn.Module:
        """The network that is validated and saved as best.pth: the averaged one, if there is one."""
        return self.model if self.average is None else self.average.module

    def save(self) -> None:
        """Write last.pth: the epoch under way, after the steps that `progress` counts.

        The event files must have been flushed.

        Raises:
            FloatingPointError: training has diverged; last.pth stays the one from before.
            OSError: it cannot be written, likewise.
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
        """Whether, for the first process, a minute has passed since it wrote last.pth, and 100 times what that took."""
        waiting = max(SECONDS_BETWEEN_SAVES, 100 * self._saving_takes)
        return self.dist.is_main and time.perf_counter() - self._saved_at > waiting

    def judge(self, accuracy: float, val_loss: float) -> bool:
        """Record the validation metrics of the current epoch.

        Returns:
            Whether it is the best epoch so far: the highest accuracy, and among equals the lowest loss.
        """
        self.last = {"epoch": self.epoch, "accuracy": accuracy, "val_loss": val_loss}
        if accuracy > self.best["accuracy"]:
            self.improved_at = self.epoch
        if (accuracy, -val_loss) > (self.best["accuracy"], -self.best["val_loss"]):
            self.best = self.last
        return self.best is self.last

    def has_stalled(self, patience: int) -> bool:
        """Whether the accuracy has not risen for `patience` epochs or more; 0: never."""
        return patience > 0 and self.last["epoch"] is not None and self.last["epoch"] - self.improved_at >= patience

    def finish_epoch(self) -> None:
        """Go to the next epoch: write best.pth if the one under way was judged the best so far, and last.pth.

        Raises as `save`.
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
        """Return a model's state_dict on the CPU, so that the files load on a machine without a GPU.

        Raises:
            FloatingPointError: training has diverged.
        """
        state = {name: value.cpu() for name, value in model.state_dict().items()}
        if not is_finite(state):
            raise FloatingPointError(
                f"weights are infinite or not a number in epoch {self.epoch}: training diverged, a lower rate may help"
            )
        return state

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on where `save` was called; what was written to the event files since then is taken back.

        Raises:
            UsageError: the checkpoint is damaged, or of another kind of model.
        """
        try:
            resume = checkpoint["resume"]
            self.model.load_state_dict(checkpoint["state_dict"])
            if self.average is not None:
                self.average.load_state_dict(resume["average"])
            self._load_optimizer(resume["optimizer"])
            if resume["scaler"]:  # not where the run computed in another number format before
                self.scaler.load_state_dict(resume["scaler"])
            self.schedule.load_state_dict(resume.get("schedule", {}))
            self.over = bool(resume.get("over"))
            counted = resume["progress"]
            self.epoch = resume["epoch"]
            total, *counts = float(counted["sum"]), *(int(counted[key]) for key in ("images", "steps", "right"))
            self.images_before = counts[0]
            # What has been counted is the first's: later the processes' are added up.
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
            raise UsageError(f"{self.weights / 'last.pth'}: damaged, or not a checkpoint of this program") from error

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """The momentum; the rest, the flags tell."""
        own = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": state["state"], "param_groups": own["param_groups"]})
        for parameter, values in self.optimizer.state.items():  # which it leaves to the next step to find out
            momentum = values["momentum_buffer"]
            if (momentum.shape, momentum.layout, momentum.device) != (
                parameter.shape,
                parameter.layout,
                parameter.device,
            ):
                raise ValueError("momentum of another kind")


def write_run(run: Run, data: Data, args: argparse.Namespace, known_images: Path) -> None:
    """The files that a run begins with, or goes on with."""
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
    """The name and the size in bytes of each event file of a run, which are forced to the disk."""
    sizes = {}
    for path in run.glob("events.out.tfevents.*"):
        with open(path, "r+b") as file:  # Windows syncs no file that is open for reading alone
            os.fsync(file.fileno())
            sizes[path.name] = os.fstat(file.fileno()).st_size
    return sizes


def cut_events(run: Path, sizes: dict[str, int]) -> None:
    """Take back what was written to a run's event files after `event_sizes`: it is going to be written again."""
    for path in run.glob("events.out.tfevents.*"):
        size = sizes.get(path.name, 0)
        if size == 0:
            path.unlink()
        elif path.stat().st_size > size:
            os.truncate(path, size)


@contextlib.contextmanager
def event_errors(run: Path) -> Iterator[None]:
    """Let what goes wrong with a run's event file end the program with one line, which says so.

    The event writer's own thread hands its error to the main thread as well: once is enough.
    """

    def report(failure: threading.ExceptHookArgs) -> None:
        if not issubclass(failure.exc_type, OSError):
            before(failure)

    before, threading.excepthook = threading.excepthook, report
    try:
        yield
    except ConnectionError:  # the output is closed, or a worker is gone
        raise
    except OSError as error:
        has_said = error.strerror is None  # what it is about
        if has_said or error.errno in (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE):
            raise
        raise OSError(f"cannot write in {run}: {error.strerror}") from error
    finally:
        threading.excepthook = before


# --- signals ------------------------------------------------------------------------------------------------------


class StopRequest(Exception):  # noqa: N818 - a request, not an error
    """The run has been asked to stop, by the signal `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopSignals:
    """While it is entered, SIGINT and SIGTERM are noted, to be looked at between steps.

    A second one exits at once, but not under torchrun.

    Args:
        dist: all ranks stop after the same step, see `sync`. A rank that has not ended after 10 seconds exits.
    """

    def __init__(self, dist: Distributed | None = None) -> None:
        self.received: int | None = None
        self.dist = dist or Distributed()

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        if self.dist.world_size > 1:
            noted, self._wakeup = socket.socketpair()
            self._wakeup.setblocking(False)
            # The signal itself is not seen by Python while it waits for another process.
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
        """Raise `StopRequest` if a signal has arrived; several ranks do so in `sync` only."""
        if self.dist.world_size == 1:
            self._raise(self.received or 0)

    def sync(self, *flags: float) -> list[float]:
        """Take the maximum of each flag over all ranks; raise `StopRequest` on all if one has received a signal."""
        number, *flags = self.dist.sync_flags(self.received or 0, *flags)
        self._raise(int(number))
        return flags

    def _raise(self, number: int) -> None:
        if number:
            raise StopRequest(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.dist.is_launched:  # each gets it from torchrun, and perhaps from others too
            self.received = self.received or number
            return
        if self.received is not None:
            os._exit(128 + number)  # workers notice; see `worker_init`
        self.received = number
        with contextlib.suppress(OSError):  # nobody may read it any more: `train.py 2>&1 | tee log`
            os.write(2, b"\nstopping after this step; once more to stop at once\n")  # print is not for signal handlers

    def _exit_in_time(self, noted: socket.socket) -> None:
        for number in iter(lambda: noted.recv(1), b""):
            if number[0] in self._before:
                time.sleep(SECONDS_TO_STOP)
                os._exit(128 + number[0])
