"""Test how training survives kills, signals, full disks, and corrupt or hostile files.

python tests/faults.py kill          # SIGKILL at random instants and during checkpoint writing, then --resume
python tests/faults.py signals       # SIGTERM and SIGINT at random instants
python tests/faults.py disk          # no space left at each write of a checkpoint and of an event file in turn
python tests/faults.py files         # mutated image files
python tests/faults.py hostile       # hostile files that try to execute code or to escape from their folder
python tests/faults.py concurrent    # runs that start at the same instant
python tests/faults.py all

Each campaign prints what it tried and what went wrong, and a table follows at the end. The exit status is 1 if
anything went wrong. The runs are small (ResNet-18, 32 px, 30 drawn images, one worker). They are forks of this
process, which has already imported everything, so the program needs Linux.
"""

import argparse
import errno
import functools
import itertools
import math
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from fault_files import files, hostile
from fault_harness import (
    BATCH_SIZE,
    IMAGES,
    Campaign,
    Child,
    HopelessError,
    program,
    raw_events,
    unreadable,
)
from shortcuts import FIGURES, SmallResNet, blank_figure

import checkpoint
import plot_utils
from checkpoint import save_checkpoint
from model import MODELS
from run_state import Run
from sample_flowers import draw_sample

STEPS = IMAGES * 4 // 5 // BATCH_SIZE  # per epoch: a fifth of the images is for validation
PAUSES = ("before writing", "while writing", "before fsync", "before rename", "after rename")


def pause(moment: str, which: int, pipe: int) -> Callable[[], None]:
    """Return a hook that halts the `which`-th checkpoint at `moment`, reports it to `pipe` and waits for SIGKILL."""
    saved, due = itertools.count(), False

    def halt(here: str) -> None:
        if due and here == moment:
            os.write(pipe, b".")
            time.sleep(1000)

    def hook() -> None:
        save, replace = torch.save, Path.replace

        def slow_save(content: dict, file) -> None:
            nonlocal due
            due = next(saved) == which
            halt("before writing")
            save(content, file)
            if due and moment == "while writing":
                file.truncate(file.tell() // 2)
                halt(moment)
            file.flush()
            halt("before fsync")

        def slow_replace(self: Path, target: Path) -> Path:
            halt("before rename")
            done = replace(self, target)
            halt("after rename")
            return done

        torch.save, Path.replace = slow_save, slow_replace

    return hook


def kill(campaign: Campaign, rounds: int, generator: random.Random) -> None:
    """Send SIGKILL `rounds` times, half of them during checkpoint writing, and resume after each."""
    undisturbed, seconds = campaign.undisturbed()
    killed, numbers = 0, itertools.count(1)
    while killed < rounds:
        name, status = f"run{next(numbers)}", None
        run, arguments = Path("runs", name), campaign.flags(name)
        while status is None:
            moment = PAUSES[killed // 2 % len(PAUSES)] if killed % 2 else None
            if killed == rounds:
                child = Child(program(arguments), Path("output"))
                status = child.end()
            elif moment:
                child, status = killed_while_saving(arguments, moment, generator.randrange(6))
            else:
                child = Child(program(arguments), Path("output"))
                status = child.wait(generator.uniform(0, seconds))
                if status is None:
                    child.kill()
            if status is None:
                killed += 1
                campaign.tried[
                    f"killed {f'inside checkpoint writing, {moment}' if moment else 'at a random instant'}"
                ] += 1
            campaign.expect("no process is left", child.orphans())
            campaign.expect("every checkpoint loads", unreadable(run))
            if status:  # neither killed nor complete
                raise HopelessError(Path("output").read_text()[-500:])
            if not (run / "weights" / "last.pth").exists():
                break  # killed before its first checkpoint: nothing to resume
            arguments = ["--resume", name]
        else:
            campaign.expect("it ends as the undisturbed run", campaign.differences(run, undisturbed))
            print(f"  {killed} kills, {run} complete", flush=True)


def killed_while_saving(arguments: list[str], moment: str, which: int) -> tuple[Child, int | None]:
    """Kill a run while it saves its `which`-th checkpoint.

    Returns:
        The process, and its exit status if it ended before that checkpoint.
    """
    reader, writer = os.pipe()
    child = Child(program(arguments, pause(moment, which, writer)), Path("output"))
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], 120)
    paused = ready and os.read(reader, 1)  # a finished run sends nothing
    os.close(reader)
    if not paused:
        return child, child.end()
    child.kill()
    return child, None


def signals(campaign: Campaign, rounds: int, generator: random.Random) -> None:
    """Send SIGTERM and SIGINT at random instants, to the run or (like a terminal) its group; a third twice."""
    undisturbed, seconds = campaign.undisturbed()
    sent, runs = 0, itertools.count(1)
    while sent < rounds:
        name = f"run{next(runs)}"
        run, over, arguments = Path("runs", name), False, campaign.flags(name)
        steps_file = Path("steps").resolve()
        while not over:
            steps_file.write_bytes(b"")
            before = position(run) if run.exists() else 0
            child = Child(program(arguments, count_steps(steps_file)), Path("output"))
            child.until(functools.partial(has_begun, run))  # from now on the run handles signals
            time.sleep(generator.uniform(0, seconds / 2))
            status, twice = child.wait(0), False
            if status is None and sent < rounds:
                twice, number = sent % 3 == 1, generator.choice((signal.SIGTERM, signal.SIGINT))
                (os.kill if generator.random() < 0.5 else os.killpg)(child.pid, number)
                if twice:
                    time.sleep(generator.uniform(0, 0.2))
                    os.kill(child.pid, number)
                sent += 1
                status = child.end(10)
                campaign.tried[f"{signal.Signals(number).name} sent{' twice' if twice else ''}"] += 1
                # 0: the run ended before the signal. Negative: the (second) signal came after the last save.
                right = status in (128 + number, 0) or (status == -number and (twice or is_over(run)))
                said = Path("output").read_text()[-300:]
                campaign.expect("the exit status is 128 + the signal", right or [f"{status}, {said}"])
            elif status is None:
                status = child.end()
            campaign.expect("no process is left", child.orphans())
            campaign.expect("every checkpoint loads", unreadable(run))
            if not twice:
                lost = before + len(steps_file.read_bytes()) - position(run)
                campaign.expect("no step is lost", lost == 0 or [f"{lost} steps"])
            over = is_over(run)
            if over:
                campaign.expect("it ends as the undisturbed run", campaign.differences(run, undisturbed))
                print(f"  {sent} signals, {run} complete", flush=True)
            arguments = ["--resume", name]


def has_begun(run: Path) -> bool:
    """Return whether a run has its first checkpoint and has printed everything that precedes training."""
    return (run / "weights" / "last.pth").exists() and b"TensorBoard" in Path("output").read_bytes()


def count_steps(path: Path) -> Callable[[], None]:
    """Return a hook that appends a byte to a file for each optimizer step."""

    def hook() -> None:
        step = torch.optim.SGD.step

        def counted(self, *arguments, **keywords):
            result = step(self, *arguments, **keywords)
            with open(path, "ab", buffering=0) as file:
                file.write(b".")
            return result

        torch.optim.SGD.step = counted

    return hook


def is_over(run: Path) -> bool:
    """Return whether last.pth was saved at the end of the run."""
    return torch.load(run / "weights" / "last.pth", weights_only=True)["resume"]["finished"]


def position(run: Path) -> int:
    """Return the number of training steps behind last.pth."""
    resume = torch.load(run / "weights" / "last.pth", weights_only=True)["resume"]
    return resume["epoch"] * STEPS + resume["progress"]["steps"]


class _FullDisk:
    """A file on a disk that is full after `which` writes."""

    def __init__(self, file, which: int) -> None:
        self.file, self.left = file, which

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, content) -> int:
        if self.left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.left -= 1
        return self.file.write(content)


def disk(campaign: Campaign, rounds: int, generator: random.Random) -> None:
    """Fail each write of a checkpoint and of an event file (failing file object or tmpfs), or remove the folder."""
    old, new = {"epoch": 1, "weights": torch.zeros(1000)}, {"epoch": 2, "weights": torch.ones(1000)}
    path = Path("last.pth")
    save_checkpoint(old, path)
    for which in range(1000):  # more than the number of writes
        checkpoint.open = lambda name, mode, which=which: _FullDisk(Path(name).open(mode), which)  # noqa: SIM115
        try:
            save_checkpoint(new, path)
            break
        except OSError as error:
            said = str(error)
        finally:
            del checkpoint.open
        campaign.expect("a checkpoint's write fails: one line", "cannot save" in said and len(said.splitlines()) == 1)
        campaign.expect("a checkpoint's write fails: the one from before loads", torch.load(path)["epoch"] == 1)
        campaign.expect("a checkpoint's write fails: nothing half-written stays", not list(Path().glob("*.tmp")))

    for which in range(rounds):
        name = f"events{which}"
        child = Child(program(campaign.flags(name, epochs=2), full_events(which)), Path("output"))
        status = child.end()
        if status == 0:
            break
        campaign.expect("an event file's write fails: status 1", status == 1 or [f"{status}"])
        campaign.expect("an event file's write fails: one line", one_complaint())
        campaign.expect("an event file's write fails: every checkpoint loads", unreadable(Path("runs", name)))
        if Path("runs", name, "weights", "last.pth").exists():
            status = Child(program(["--resume", name]), Path("output")).end()
            campaign.expect("an event file's write fails: the run is resumed later", status == 0)

    for lost in (".", "weights")[:rounds]:
        run = Path("runs", f"removed {lost}")
        child = Child(program(campaign.flags(run.name), save_after_epochs_only), Path("output"))
        child.until(lambda: b"[epoch 0]" in Path("output").read_bytes())
        while (run / lost).exists():  # the run may write a file while its folder is being removed
            shutil.rmtree(run / lost, ignore_errors=True)
        status = child.end()
        campaign.expect("the run's folder is removed: status 1", status == 1 or [f"{status}"])
        campaign.expect("the run's folder is removed: one line", one_complaint())
        campaign.expect("the run's folder is removed: no process is left", child.orphans())

    # Fractions of the size of last.pth, which is twice as large as best.pth. Each fails at another point.
    undisturbed, _ = campaign.undisturbed()
    for part in (0.01, 0.7, 1.2, 1.7, 2.2)[-rounds:]:
        small_file_system(campaign, math.ceil(part * (undisturbed / "weights" / "last.pth").stat().st_size / 2**10))


def save_after_epochs_only() -> None:
    """Save only after epochs (a hook), so that the event file is the first to miss a removed folder."""
    Run.save_is_due = lambda run: False


def one_complaint() -> list[str]:
    """Return the end of the run's output, unless exactly one line of it reports an error."""
    said = Path("output").read_text()
    complaints = [line for line in said.splitlines() if "error" in line.lower() or "Traceback" in line]
    return [] if len(complaints) == 1 else [said[-500:]]


def small_file_system(campaign: Campaign, kib: int) -> None:
    """Run in a file system of `kib` KiB, which is too small, and resume in a larger one."""
    undisturbed, _ = campaign.undisturbed()
    folder = Path("small").resolve()
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder]
    if subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode != 0:
        print("  a tmpfs: not tried, as only the superuser may mount one")
        return
    try:
        status = Child(program(campaign.flags("run"), lambda: os.chdir(folder)), Path("output")).end()
        campaign.expect("a full tmpfs: status 1", status == 1 or [f"{kib} KiB: {status}"])
        campaign.expect("a full tmpfs: one line", one_complaint())
        run = folder / "runs" / "run"
        campaign.expect("a full tmpfs: every checkpoint loads", unreadable(run))
        if (run / "weights" / "last.pth").exists():
            subprocess.run(["mount", "-o", "remount,size=1g", folder], check=True)
            status = Child(program(["--resume", "run"], lambda: os.chdir(folder)), Path("output")).end()
            campaign.expect("a full tmpfs: the run is resumed once there is space", status == 0)
            campaign.expect("a full tmpfs: it ends as the undisturbed run", campaign.differences(run, undisturbed))
    finally:
        subprocess.run(["umount", folder], check=True)


def full_events(which: int) -> Callable[[], None]:
    """Return a hook that leaves no space for an event file after `which` writes."""

    def hook() -> None:
        from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

        left = [which]

        def limited(write: Callable) -> Callable:
            def checked(self, filename: str, *arguments, **keywords):
                if "tfevents" in str(filename):
                    if left[0] == 0:
                        raise OSError(errno.ENOSPC, "No space left on device")
                    left[0] -= 1
                return write(self, filename, *arguments, **keywords)

            return checked

        LocalFileSystem.write, LocalFileSystem.append = limited(LocalFileSystem.write), limited(LocalFileSystem.append)

    return hook


def concurrent(campaign: Campaign, rounds: int, generator: random.Random) -> None:
    """Start `rounds` runs of the same name at the same instant."""
    start = time.time() + 1

    def wait_for_it() -> None:
        time.sleep(max(0, start - time.time()))

    children = [
        Child(program(campaign.flags("same", epochs=1), wait_for_it), Path(f"output{index}")) for index in range(rounds)
    ]
    statuses = [child.end(600) for child in children]
    campaign.expect("every run ends well", [status for status in statuses if status != 0])
    runs = list(Path("runs").glob("same*"))
    campaign.expect(f"{rounds} runs, {rounds} folders", len(runs) == rounds)
    for run in runs:
        campaign.expect("every run has its own events", max(raw_events(run).values()) == 1)


CAMPAIGNS = {  # rounds of each campaign, and of its short version
    kill: (100, 2),
    signals: (30, 3),
    disk: (1000, 1),
    files: (10_000, 100),
    hostile: (1, 1),
    concurrent: (20, 2),
}


def main(argv: list[str] | None = None) -> int:
    """Run the campaigns and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    by_name = {campaign.__name__: campaign for campaign in CAMPAIGNS}
    parser.add_argument("campaign", choices=[*by_name, "all"])
    parser.add_argument(
        "--rounds",
        type=int,
        help="kills, signals, writes to an event file, files, or runs (default: 100, 30, all, 10,000, 20)",
    )
    parser.add_argument(
        "--short", action="store_true", help="fewer rounds, of shorter runs of a small network, with blank figures"
    )
    parser.add_argument(
        "--device", default="cpu", help="cpu or cuda; on a GPU, the weights are not compared (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random instants (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.short:  # inherited by the forks
        MODELS["resnet18"] = SmallResNet
        for name in FIGURES:
            setattr(plot_utils, name, blank_figure)
    done = []
    with tempfile.TemporaryDirectory() as folder:
        data = draw_sample(Path(folder).resolve() / "data", images_per_class=IMAGES // 5, size=64)
        for name in by_name if args.campaign == "all" else [args.campaign]:
            print(f"{name}: {by_name[name].__doc__}", flush=True)
            start = time.monotonic()
            campaign = Campaign(name, data, 2 if args.short else 4, args.device)
            (data.parent / name).mkdir()
            os.chdir(data.parent / name)
            done.append(campaign)
            try:
                by_name[name](campaign, args.rounds or CAMPAIGNS[by_name[name]][args.short], random.Random(args.seed))
            except (HopelessError, OSError) as error:  # a full disk, for example
                campaign.expect("the campaign comes to its end", [str(error)])
            print(f"  {time.monotonic() - start:.0f} s", flush=True)
        os.chdir("/")
    for campaign in done:
        print(f"\n{campaign.name}")
        for what, times in campaign.tried.items():
            bad = sum(line.startswith(f"{what}: ") for line in campaign.wrong)
            print(f"  {what:60} {times:5} times, {bad} wrong")
    return 1 if any(campaign.wrong for campaign in done) else 0


if __name__ == "__main__":
    sys.exit(main())
