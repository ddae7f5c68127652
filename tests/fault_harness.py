"""Small training runs in separate processes, to be disturbed, and checks of what they leave behind.

The runs are forks of the calling process, which has already imported everything, so they need Linux.
"""

import collections
import contextlib
import math
import multiprocessing.util
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import run_state
import tensorboard_logger
import train
from run_state import Run

IMAGES, BATCH_SIZE = 30, 4


# --- runs in separate processes -----------------------------------------------------------------------------------


class HopelessError(Exception):
    """The campaign cannot continue, because what it waits for will not happen."""


class Child:
    """Runs `action` in its own process and session; its output goes to a file."""

    def __init__(self, action: Callable[[], int], output: Path) -> None:
        output.write_bytes(b"")
        self.output, self.status = output, None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            with open(output, "ab", buffering=0) as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            status = 99
            try:
                status = action()
            except SystemExit as stop:
                status = stop.code
            except BaseException:  # noqa: BLE001 - the child must not return to the parent's code
                traceback.print_exc()
            finally:
                multiprocessing.util._exit_function()  # as on a normal exit: ends the workers
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def wait(self, seconds: float = 120) -> int | None:
        """Return the exit status, negative for a signal, or None if the process is still running after `seconds`."""
        end = time.monotonic() + seconds
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                break
            else:
                time.sleep(0.005)
        return self.status

    def end(self, seconds: float = 120) -> int:
        """Wait for the process to end by itself, kill it after `seconds`, and return the exit status."""
        if self.wait(seconds) is None:
            self.kill()
        return self.status

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Wait until `condition` holds.

        Raises:
            HopelessError: The condition did not hold in time, or the process is over.
        """
        end = time.monotonic() + seconds
        while not condition():
            over = self.wait(0.005) is not None or time.monotonic() > end
            if over and not condition():
                raise HopelessError(self.output.read_text()[-500:])

    def kill(self) -> None:
        """Send SIGKILL to the process alone, not to its workers."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def orphans(self, seconds: float = 2) -> list[int]:
        """Return the processes of its session that still exist after `seconds`."""
        end = time.monotonic() + seconds
        while (left := list(self._session())) and time.monotonic() < end:
            time.sleep(0.01)
        return left

    def _session(self) -> Iterator[int]:
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.pid and state != "Z":
                    yield int(path.parent.name)


def program(arguments: list[str], *hooks: Callable[[], None]) -> Callable[[], int]:
    """Return a function that runs train.py on one thread and saves often, also within epochs."""

    def action() -> int:
        torch.set_num_threads(1)
        run_state.SECONDS_BETWEEN_SAVES = 0.3
        run_state.SAVE_COST = tensorboard_logger.FIGURE_COST = math.inf
        tensorboard_logger.WAIT_FOR_FIGURES = ()
        Run.save_is_due = lambda run: time.perf_counter() - run._saved_at > run_state.SECONDS_BETWEEN_SAVES
        for hook in hooks:
            hook()
        return train.main(arguments)

    return action


# --- checks of a run ------------------------------------------------------------------------------------------------


def unreadable(run: Path) -> list[str]:
    """Return the checkpoints of a run that do not load."""
    bad = []
    for path in run.glob("weights/*.pth"):
        try:
            torch.load(path, weights_only=True)
        except Exception as error:  # noqa: BLE001 - torch.load raises many kinds
            bad.append(f"{path}: {error}")
    return bad


def differences(run: Path, undisturbed: Path, exact: bool = True) -> list[str]:
    """Return the differences from an undisturbed run: epochs, events and, if `exact`, all values."""
    wrong = different_weights(run, undisturbed) if exact else []
    tables = [(folder / "metrics.csv").read_text(encoding="utf-8").splitlines() for folder in (run, undisturbed)]
    if len({tuple(line.partition(",")[0] for line in table) for table in tables}) > 1:
        wrong.append("the epochs in metrics.csv")
    if exact and accumulated(run) != accumulated(undisturbed):
        wrong.append("what EventAccumulator reads")
    raw = raw_events(run)
    if raw != raw_events(undisturbed):
        wrong.append("the tags and steps in the event files")
    wrong += [f"{tag} at step {step}: {count} times" for (tag, step), count in raw.items() if count > 1]
    return wrong


def different_weights(run: Path, undisturbed: Path) -> list[str]:
    """Return the weights and momentum buffers that differ from those of an undisturbed run."""
    wrong = []
    for name in ("last.pth", "best.pth"):
        ours, theirs = (torch.load(folder / "weights" / name, weights_only=True) for folder in (run, undisturbed))
        wrong += [
            f"{name}: {key}"
            for key, value in theirs["state_dict"].items()
            if not torch.equal(ours["state_dict"][key], value)
        ]
        if name == "last.pth":
            momentum = [content["resume"]["optimizer"]["state"] for content in (ours, theirs)]
            wrong += [
                f"momentum {index}"
                for index, state in momentum[1].items()
                if not torch.equal(momentum[0][index]["momentum_buffer"], state["momentum_buffer"])
            ]
    return wrong


def accumulated(run: Path) -> dict[str, list]:
    """Return the steps of each tag in TensorBoard, and the values of scalars that do not measure the machine."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0, "histograms": 0}).Reload()
    tags = events.Tags()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    for tag in (tag for tag in found if tag.startswith(("speed/", "memory/"))):
        found[tag] = [step for step, _ in found[tag]]
    found |= {tag: [event.step for event in events.Images(tag)] for tag in tags["images"]}
    return found | {tag: [event.step for event in events.Histograms(tag)] for tag in tags["histograms"]}


def raw_events(run: Path) -> collections.Counter:
    """Count each tag and step in the event files."""
    found: collections.Counter = collections.Counter()
    for path in run.glob("events.out.tfevents.*"):
        for event in EventFileLoader(str(path)).Load():
            found.update((value.tag, event.step) for value in event.summary.value)
            found.update([("graph", 0)] if event.graph_def else [])
    return found


class Campaign:
    """Records what was tried and what went wrong; its runs train for `epochs` on the images of `data`."""

    def __init__(self, name: str, data: Path, epochs: int, device: str = "cpu") -> None:
        self.name, self.data, self.epochs, self.device = name, data, epochs, device
        self.tried: collections.Counter = collections.Counter()
        self.wrong: list[str] = []

    def flags(self, name: str, epochs: int | None = None) -> list[str]:
        """Return the command line of a small run."""
        fixed = ["--model", "resnet18", "--img-size", "32", "--device", self.device, "--workers", "1", "--lr", "0.01"]
        fixed += ["--batch-size", str(BATCH_SIZE), "--epochs", str(epochs or self.epochs)]
        return ["--data-path", str(self.data), *fixed, "--name", name]

    def undisturbed(self) -> tuple[Path, float]:
        """Return the folder of an undisturbed run, made only once, and its duration in seconds."""
        folder = self.data.parent / "undisturbed"
        seconds = folder / "seconds"
        if not seconds.exists():
            folder.mkdir(exist_ok=True)
            start = time.monotonic()
            child = Child(program(self.flags("run"), lambda: os.chdir(folder)), folder / "output")
            if child.end() != 0:
                raise HopelessError(child.output.read_text()[-500:])
            seconds.write_text(str(time.monotonic() - start))
        return folder / "runs" / "run", float(seconds.read_text())

    def differences(self, run: Path, undisturbed: Path) -> list[str]:
        """Return the differences from an undisturbed run. On a GPU the values differ, as sums may be in any order."""
        return differences(run, undisturbed, exact=self.device == "cpu")

    def expect(self, what: str, problems: list | bool) -> None:
        """Count a check of `what`, and record its problems (or, if False, that it did not hold)."""
        self.tried[what] += 1
        problems = [] if problems is True else ["no"] if problems is False else problems
        for problem in problems:
            self.wrong.append(f"{what}: {problem}")
            print(f"  WRONG  {what}: {problem}", flush=True)
