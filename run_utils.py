"""Manage a run's folder (lock, metadata, check for changed data) and the signals that stop a run."""

import argparse
import contextlib
import importlib
import os
import platform
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from checkpoint import read_checkpoint
from class_files import normalise, write_class_indices
from cli_utils import UsageError, printable, quote_command
from config import command_line
from dataset_split import Count
from distributed import Distributed
from file_utils import read_json, write_json
from image_folders import CHECK_CACHE, Skipped, file_checksum
from labelled_images import TEST_FILE
from prepare_data import Data
from train_eval_utils import Callback
from weights_io import newest_weights

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SKIPPED_FILE = "skipped_files.txt"  # in a run's folder: the files of the data folder that were not used, and why
FOLDS_FILE = "cross_validation.json"  # in the folder of a cross-validation: its flags
TEST_REPORT = "test_report.json"  # in a run's folder: the evaluation of best.pth on the test images
LISTED = 20  # how many changed files `--resume` prints
LAUNCH_FILE = ".launch"  # in a run's folder: the launch ids of its torchruns, one per line
SECONDS_TO_STOP = 10  # with several ranks, after a signal; torchrun kills them after 30

# --- folder -------------------------------------------------------------------------------------------------------


@dataclass
class RunFolder:
    """A run's folder, which the main process keeps locked against other training processes.

    Attributes:
        lock: the open lock file on the main process; closing it releases the lock.
        checkpoint: the content of last.pth when resuming a run, else None.
    """

    path: Path
    lock: TextIO | None
    checkpoint: dict[str, Any] | None = None


def create_run(name: str, dist: Distributed, root: str | os.PathLike = "runs") -> RunFolder:
    """Create and lock `root`/`name`, or the first free one of name-2, name-3, ..., with a sub-folder `weights`."""
    lock = None

    def create() -> Path:
        nonlocal lock
        path = create_run_folder(name, root)
        lock = lock_run(path)
        return path

    return RunFolder(dist.broadcast_from_main(create), lock)


def open_run(name: str, dist: Distributed) -> RunFolder:
    """Lock the run that `--resume` names, see `find_run`, and read its checkpoint.

    Raises:
        UsageError: there is no such run, or another process is training it.
        WeightsError: its last.pth is corrupt.
    """
    lock = None

    def read() -> tuple[Path, dict[str, Any]]:
        nonlocal lock
        path = find_run(name)
        lock = lock_run(path)  # before reading, because another process may be about to change it
        return path, read_checkpoint(path / "weights" / "last.pth")

    path, checkpoint = dist.broadcast_from_main(read)
    return RunFolder(path, lock, checkpoint)


def create_run_folder(name: str, root: str | os.PathLike = "runs") -> Path:
    """Create `root`/`name`, or the first free one of name-2, name-3, ..., with a sub-folder `weights`."""
    folder = create_free_folder(name, root)
    (folder / "weights").mkdir()
    return folder


def create_free_folder(name: str, root: str | os.PathLike = "runs") -> Path:
    """Create `root`/`name`, or the first free one of name-2, name-3, ..."""
    Path(root).mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = Path(root, name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()  # at most one process succeeds
        except FileExistsError:
            continue
        return folder


def remove_unstarted_run(folder: Path) -> bool:
    """Remove a run's folder if it has no checkpoint to resume from. Return whether no run is left."""
    if (folder / "weights" / "last.pth").exists():
        return False
    if folder.exists():
        shutil.rmtree(folder)
    return True


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
            raise UsageError(f"--resume {run}: it must be the last.pth in the folder weights of a run")
        return path.parents[1]
    for folder in (path, Path("runs", run)):
        if (folder / "weights" / "last.pth").is_file():
            return folder
        if (folder / FOLDS_FILE).is_file():
            raise UsageError(f"--resume {run}: is a cross-validation; use cross_validate.py --resume {run}")
    raise UsageError(f"--resume {run}: no weights/last.pth to resume from, neither there nor in {Path('runs', run)}")


def find_launched_run(
    launch_ids: set[str], root: str | os.PathLike = "runs", needed: str = "weights/last.pth"
) -> str | None:
    """Return the folder of the run that one of these launches started, or None if it lacks the file `needed`."""
    for file in Path(root).glob(f"*/{LAUNCH_FILE}") if launch_ids else ():
        started_by = file.read_text(encoding="utf-8").splitlines()
        if not launch_ids.isdisjoint(started_by) and (file.parent / needed).exists():
            return str(file.parent)
    return None


def lock_run(run: Path) -> TextIO | None:
    """Lock a run's folder against other training processes.

    Returns:
        The open lock file, to be closed to unlock; None on Windows. No effect on a file system without locks.

    Raises:
        UsageError: another process has the lock, or the folder contains a symbolic link: a run received from
            someone else could use it to overwrite files elsewhere.
    """
    for path in sorted(run.rglob("*")):
        if path.is_symlink():
            raise UsageError(f"{path}: symbolic links in the folder of a run are not supported; replace it with a copy")
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


def write_metadata(
    folder: Path, args: argparse.Namespace, data: Data, launch_ids: set[str], network: Mapping[str, Any]
) -> None:
    """Write the metadata files of a run that starts or resumes.

    Args:
        network: what prediction with a plain state_dict of this run needs to know, see `weights_io.run_network`.
    """
    if args.resume is None:
        flags = vars(args) | {"recipe": str(args.recipe)}
        content = {"flags": flags, "recipe": asdict(args.recipe), "network": network, "versions": versions()}
        write_class_indices(data.class_names, folder / "class_indices.json")
    else:
        content = read_json(folder / "args.json")
    if args.corrections:
        content["corrections_checksum"] = file_checksum(args.corrections)
    if args.corrections or args.resume is None:
        write_json(content, folder / "args.json", indent=4)
    if launch_ids:
        (folder / LAUNCH_FILE).write_text("\n".join(sorted(launch_ids)), encoding="utf-8")
    write_json(data.files, folder / "files.json")
    write_json(data.known, folder.parent / CHECK_CACHE)
    for name in (TEST_FILE, TEST_REPORT):
        (folder / name).unlink(missing_ok=True)  # from before a resume
    if data.test_images:
        write_json({str(Path(path).absolute()): label for path, label in data.test_images}, folder / TEST_FILE)
    write_skipped(data.skipped, folder)


def write_skipped(files: Sequence[Skipped], folder: Path) -> None:
    """Write the list of skipped files to a run's folder, or remove an earlier list if there are none."""
    path = folder / SKIPPED_FILE
    path.write_text("".join(f"{file}\n" for file in files), encoding="utf-8")
    if not files:
        path.unlink()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a run uses."""
    packages = ("torch", "torchvision", "tensorboard", "PIL", "matplotlib", "numpy", "tqdm")
    return {"python": platform.python_version()} | {
        package: importlib.import_module(package).__version__ for package in packages
    }


def describe_run(args: argparse.Namespace, counts: Mapping[str, Count], hardware: str) -> str:
    """Describe a run in Markdown: its command, hardware, data, flags and package versions.

    Args:
        counts: the numbers of images per class.
    """

    def table(*rows: Sequence[object]) -> list[str]:
        cells = [[printable(str(cell)).replace("|", "\\|") for cell in row] for row in rows]
        cells.insert(1, ["---"] * len(rows[0]))
        return [*(f"| {' | '.join(row)} |" for row in cells), ""]

    totals = [sum(column) for column in zip(*counts.values(), strict=True)]
    rows = [(name, *numbers) for name, numbers in counts.items()]
    lines = [f"    {quote_command(command_line(args))}", "", f"On {printable(hardware)}.", ""]
    lines += table(("class", "training", "validation", "test"), *rows, ("all", *totals))
    lines += table(("flag", "value"), *vars(args).items())
    lines += table(("package", "version"), *versions().items())
    return "\n".join(lines)


def check_same_data(folder: RunFolder, data: Data, corrections: str | None, allow_changed: bool) -> None:
    """Compare the data with those that the run was trained on, and print each difference to standard error.

    Args:
        corrections: the table of corrected labels.

    Raises:
        UsageError: the classes differ; files or corrections differ and not `allow_changed`; images that the run has
            used are now test images; or the run's files.json is corrupt.
    """
    if data.class_names != [normalise(name) for name in folder.checkpoint["class_names"]]:
        names = ", ".join(data.class_names)
        raise UsageError(f"the data has the classes {names}, but the run was trained on other classes")
    if corrections and not allow_changed:
        checksum = read_json(folder.path / "args.json").get("corrections_checksum")
        if checksum not in (None, file_checksum(corrections)):
            raise UsageError(
                f"--corrections {corrections}: the table has changed since the run started; restore it, or pass "
                f"--allow-changed-data to resume with the current one"
            )
    before, now = read_json(folder.path / "files.json"), data.files
    if not all(_is_list_of_pairs(versions) for versions in before.values()):
        raise UsageError(f"{folder.path / 'files.json'}: corrupt; remove it and pass --allow-changed-data")
    differences = {}
    for name in sorted(before.keys() | now.keys()):
        if name not in now or name not in before:
            differences[name] = "is new" if name in now else "is missing"
        elif sorted(checksum for _, checksum in before[name]) != sorted(checksum for _, checksum in now[name]):
            differences[name] = "has changed"
    if not differences:  # otherwise they may have changed the split
        moved = (name for name in now if before[name] != now[name])
        differences = dict.fromkeys(moved, "has moved to another subset")
    for name, difference in islice(differences.items(), LISTED):
        print(f"{printable(name)} {difference}", file=sys.stderr)
    if len(differences) > LISTED:
        print(f"... and {len(differences) - LISTED} more files", file=sys.stderr)
    if differences and not allow_changed:
        raise UsageError(
            f"files changed since the run started: {len(differences)}; restore them, or pass --allow-changed-data to "
            f"resume with the current files"
        )
    used = _checksums(before, "train") | _checksums(before, "val")
    if spoilt := (_checksums(now, "test") - _checksums(before, "test")) & used:
        raise UsageError(f"{len(spoilt)} images that the run has used would become test images; start a new run")


def _checksums(files: Mapping[str, Any], subset: str) -> set[str]:
    return {checksum for versions in files.values() for kind, checksum in versions if kind == subset}


def _is_list_of_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in value
    )


# --- signals ------------------------------------------------------------------------------------------------------


class StopRequest(Exception):  # noqa: N818 - a request, not an error
    """The signal `number` has asked the run to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopSignals(Callback):
    """Context manager that records SIGINT and SIGTERM, to be checked between steps.

    A second signal exits at once, except under torchrun.

    Args:
        dist: all ranks stop after the same step, see `sync`. A rank still running 10 seconds later exits.
    """

    def __init__(self, dist: Distributed | None = None) -> None:
        self.received: int | None = None
        self.dist = dist or Distributed()

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        if self.dist.world_size > 1:
            received, self._wakeup = socket.socketpair()
            self._wakeup.setblocking(False)
            # Python runs no signal handler while it waits for another rank.
            signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._exit_in_time, args=[received], daemon=True).start()
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

    def after_step(self, step: int) -> None:
        """Call `check`, for use as a callback where there is nothing to save."""
        self.check()

    def sync(self, *flags: float) -> list[float]:
        """All-reduce the maximum of each flag. Raise `StopRequest` on all ranks if one has received a signal."""
        number, *flags = self.dist.sync_max(self.received or 0, *flags)
        self._raise(int(number))
        return flags

    def _raise(self, number: int) -> None:
        if number:
            raise StopRequest(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
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

    def _exit_in_time(self, received: socket.socket) -> None:
        for number in iter(lambda: received.recv(1), b""):
            if number[0] in self._before:
                time.sleep(SECONDS_TO_STOP)
                os._exit(128 + number[0])
