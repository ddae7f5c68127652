"""What the program survives: campaigns of kills, signals, full disks, bad and hostile files, with a table at the end.

python tests/faults.py kill          # SIGKILL at random instants and inside checkpoint writing, then --resume
python tests/faults.py signals       # SIGTERM and SIGINT at random instants
python tests/faults.py disk          # no space left, at each write of a checkpoint and of an event file in turn
python tests/faults.py files         # mutated image files
python tests/faults.py hostile       # files from a stranger that would run code, or climb out of their folder
python tests/faults.py concurrent    # runs that start at the same instant
python tests/faults.py all

Each prints what it tried and what went wrong; the exit status is 1 if anything did. The runs are small (ResNet-18,
32 px, 50 drawn images, a worker), and forks of this process, which has imported everything already: Linux only.
"""

import argparse
import collections
import contextlib
import errno
import functools
import hashlib
import http.server
import io
import itertools
import os
import pickle
import random
import resource
import signal
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import run_utils
import train
from data_utils import DataError, download_flower_photos, read_class_indices, read_label_file, read_pickle
from model import WeightsError, load_model, load_pretrained, resnet18
from my_dataset import ImageError, read_image
from run_utils import Run, save_checkpoint
from sample_flowers import draw_flower, draw_sample

EPOCHS, IMAGES, BATCH_SIZE = 4, 50, 4
STEPS = IMAGES * 4 // 5 // BATCH_SIZE  # an epoch: a fifth of the images are for validation
PAUSES = ("before writing", "while writing", "before fsync", "before rename", "after rename")


# --- runs in processes of their own -------------------------------------------------------------------------------


class Child:
    """`action` in a process, and a session, of its own; its output goes to a file."""

    def __init__(self, action: Callable[[], int], output: Path) -> None:
        output.write_bytes(b"")
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
            except BaseException:  # noqa: BLE001 - nothing of the parent must run in the child
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def wait(self, seconds: float = 120) -> int | None:
        """The exit status, negative for a signal, or None if it has not ended in that time."""
        end = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                return None
            time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL to the process alone: its workers are left to themselves."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def orphans(self, seconds: float = 2) -> list[int]:
        """The processes of its session that are still there after so long."""
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


def flags(data: Path, name: str = "run", epochs: int = EPOCHS) -> list[str]:
    """The command line of a small run."""
    fixed = ["--model", "resnet18", "--img-size", "32", "--device", "cpu", "--workers", "1", "--lr", "0.01"]
    return ["--data-path", str(data), *fixed, "--batch-size", str(BATCH_SIZE), "--epochs", str(epochs), "--name", name]


def program(arguments: list[str], *hooks: Callable[[], None]) -> Callable[[], int]:
    """train.py with these arguments, on one thread; it saves within epochs, too, which runs of seconds would not."""

    def action() -> int:
        torch.set_num_threads(1)
        run_utils.SECONDS_BETWEEN_SAVES = 0.3
        Run.save_is_due = lambda run: time.perf_counter() - run._saved_at > run_utils.SECONDS_BETWEEN_SAVES
        for hook in hooks:
            hook()
        return train.main(arguments)

    return action


# --- looking at what is left ----------------------------------------------------------------------------------------


def unreadable(run: Path) -> list[str]:
    """The checkpoints of a run that do not load."""
    bad = []
    for path in run.glob("weights/*.pth"):
        try:
            torch.load(path, weights_only=True)
        except Exception as error:  # noqa: BLE001 - it raises many kinds
            bad.append(f"{path}: {error}")
    return bad


def differences(run: Path, undisturbed: Path) -> list[str]:
    """Where a run has ended differently: weights, momentum, curves."""
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
    if accumulated(run) != accumulated(undisturbed):
        wrong.append("what EventAccumulator reads")
    raw = raw_events(run)
    if raw != raw_events(undisturbed):
        wrong.append("the tags and steps in the event files")
    wrong += [f"{tag} at step {step}: {count} times" for (tag, step), count in raw.items() if count > 1]
    return wrong


def accumulated(run: Path) -> dict[str, list]:
    """What TensorBoard shows: each scalar's steps and values, the steps of the rest."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0, "histograms": 0}).Reload()
    tags = events.Tags()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    found |= {tag: [event.step for event in events.Images(tag)] for tag in tags["images"]}
    return found | {tag: [event.step for event in events.Histograms(tag)] for tag in tags["histograms"]}


def raw_events(run: Path) -> collections.Counter:
    """How often each tag and step is in the event files themselves."""
    found: collections.Counter = collections.Counter()
    for path in run.glob("events.out.tfevents.*"):
        for event in EventFileLoader(str(path)).Load():
            found.update((value.tag, event.step) for value in event.summary.value)
            found.update([("graph", 0)] if event.graph_def else [])
    return found


# --- the campaigns --------------------------------------------------------------------------------------------------


class Campaign:
    """What has been tried, and what went wrong."""

    def __init__(self, name: str, data: Path) -> None:
        self.name, self.data = name, data
        self.tried: collections.Counter = collections.Counter()
        self.wrong: list[str] = []

    def expect(self, what: str, problems: list | bool) -> None:
        """Count that `what` was looked at, and the problems (or, False, that it did not hold)."""
        self.tried[what] += 1
        problems = [] if problems is True else ["no"] if problems is False else problems
        for problem in problems:
            self.wrong.append(f"{what}: {problem}")
            print(f"  WRONG  {what}: {problem}", flush=True)


def pause(moment: str, which: int, pipe: int) -> Callable[[], None]:
    """A hook that halts the `which`-th checkpoint at `moment`, says so through `pipe`, and waits to be killed."""
    saved = itertools.count()
    due = [False]

    def halt(here: str) -> None:
        if due[0] and here == moment:
            os.write(pipe, b".")
            time.sleep(1000)

    def hook() -> None:
        save, fsync, replace = torch.save, os.fsync, Path.replace

        def slow_save(content: dict, file) -> None:
            due[0] = next(saved) == which
            halt("before writing")
            save(content, file)
            if due[0] and moment == "while writing":
                file.truncate(file.tell() // 2)
                halt(moment)
            file.flush()
            halt("before fsync")

        def slow_replace(self: Path, target: Path) -> Path:
            halt("before rename")
            done = replace(self, target)
            halt("after rename")
            return done

        torch.save, os.fsync, Path.replace = slow_save, fsync, slow_replace

    return hook


def kill(campaign: Campaign, rounds: int, generator: random.Random) -> None:
    """SIGKILL `rounds` times, half of them inside checkpoint writing; after each the run goes on."""
    undisturbed, seconds = measure(campaign)
    killed, numbers = 0, itertools.count(1)
    while killed < rounds:
        name, status = f"run{next(numbers)}", None
        run, arguments = Path("runs", name), flags(campaign.data, name)
        while status is None:
            moment = PAUSES[killed // 2 % len(PAUSES)] if killed % 2 else None
            if killed == rounds:
                child = Child(program(arguments), Path("output"))
                status = child.wait()
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
            if not (run / "weights" / "last.pth").exists():
                break  # killed before its first checkpoint: there is nothing to go on with
            arguments = ["--resume", name]
        else:
            campaign.expect("the run goes on to its end", status == 0 or [Path("output").read_text()[-300:]])
            campaign.expect("it ends as the undisturbed run", differences(run, undisturbed))
            print(f"  {killed} kills, {run} complete", flush=True)


def killed_while_saving(arguments: list[str], moment: str, which: int) -> tuple[Child, int | None]:
    """A run that is killed while it saves its `which`-th checkpoint; its exit status if it is over before."""
    reader, writer = os.pipe()
    child = Child(program(arguments, pause(moment, which, writer)), Path("output"))
    os.close(writer)
    paused = os.read(reader, 1)  # nothing comes from a run that is over
    os.close(reader)
    if not paused:
        return child, child.wait()
    child.kill()
    return child, None


def measure(campaign: Campaign) -> tuple[Path, float]:
    """The folder of a run that nothing happens to, and how long it takes."""
    start = time.monotonic()
    child = Child(program(flags(campaign.data, "undisturbed")), Path("output"))
    campaign.expect("a run that is left alone ends well", child.wait() == 0)
    return Path("runs/undisturbed"), time.monotonic() - start


def signals(campaign: Campaign, rounds: int, generator: random.Random) -> None:
    """SIGTERM and SIGINT at random instants, to the run alone or to its whole group, as a terminal does."""
    undisturbed, seconds = measure(campaign)
    sent, runs = 0, itertools.count(1)
    while sent < rounds:
        name = f"run{next(runs)}"
        run, status, arguments = Path("runs", name), None, flags(campaign.data, name)
        steps_file = Path("steps").resolve()
        while status != 0:
            steps_file.write_bytes(b"")
            before = position(run) if run.exists() else 0
            child = Child(program(arguments, count_steps(steps_file)), Path("output"))
            while not (run / "weights" / "last.pth").exists() or b"TensorBoard" not in Path("output").read_bytes():
                time.sleep(0.005)  # from then on signals are the run's own
            time.sleep(generator.uniform(0, seconds / 2))
            number = generator.choice((signal.SIGTERM, signal.SIGINT))
            status = child.wait(0)
            if status is None and sent < rounds:
                (os.kill if generator.random() < 0.5 else os.killpg)(child.pid, number)
                sent += 1
                status = child.wait(10)
                campaign.tried[f"{signal.Signals(number).name} sent"] += 1
                # 0: it was over before it was asked.
                said = Path("output").read_text()[-300:]
                right = status in (128 + number, 0)
                campaign.expect("the exit status is 128 + the signal", right or [f"{status}, {said}"])
            elif status is None:
                status = child.wait()
            campaign.expect("no process is left", child.orphans())
            campaign.expect("every checkpoint loads", unreadable(run))
            lost = before + len(steps_file.read_bytes()) - position(run)
            campaign.expect("no step is lost", lost == 0 or [f"{lost} steps"])
            if status == 0:
                campaign.expect("it ends as the undisturbed run", differences(run, undisturbed))
                print(f"  {sent} signals, {run} complete", flush=True)
            arguments = ["--resume", name]


def count_steps(path: Path) -> Callable[[], None]:
    """A hook that adds a byte to a file for each step of the optimizer."""

    def hook() -> None:
        step = torch.optim.SGD.step

        def counted(self, *arguments, **keywords):
            result = step(self, *arguments, **keywords)
            with open(path, "ab", buffering=0) as file:
                file.write(b".")
            return result

        torch.optim.SGD.step = counted

    return hook


def position(run: Path) -> int:
    """The steps of training that last.pth stands for."""
    resume = torch.load(run / "weights" / "last.pth", weights_only=True)["resume"]
    return resume["epoch"] * STEPS + resume["mean_loss"]["steps"]


class _FullDisk:
    """A file on a disk that is full from the `which`-th write on."""

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
    """ENOSPC from a failing file object at each write of a checkpoint, and at each of an event file, in turn."""
    old, new = {"epoch": 1, "weights": torch.zeros(1000)}, {"epoch": 2, "weights": torch.ones(1000)}
    path = Path("last.pth")
    save_checkpoint(old, path)
    for which in itertools.count():
        run_utils.open = lambda name, mode, which=which: _FullDisk(Path(name).open(mode), which)  # noqa: SIM115
        try:
            save_checkpoint(new, path)
            break
        except OSError as error:
            said = str(error)
        finally:
            del run_utils.open
        campaign.expect("a checkpoint's write fails: one line", "cannot save" in said and len(said.splitlines()) == 1)
        campaign.expect("a checkpoint's write fails: the one from before loads", torch.load(path)["epoch"] == 1)
        campaign.expect("a checkpoint's write fails: nothing half-written stays", not list(Path().glob("*.tmp")))

    for which in range(rounds):
        name = f"events{which}"
        child = Child(program(flags(campaign.data, name, epochs=2), full_events(which)), Path("output"))
        status = child.wait()
        if status == 0:
            break
        said = Path("output").read_text()
        campaign.expect("an event file's write fails: status 1", status == 1 or [f"{status}"])
        complaints = [line for line in said.splitlines() if "error" in line.lower() or "Traceback" in line]
        campaign.expect("an event file's write fails: one line", len(complaints) == 1 or [said[-500:]])
        campaign.expect("an event file's write fails: every checkpoint loads", unreadable(Path("runs", name)))
        if Path("runs", name, "weights", "last.pth").exists():
            status = Child(program(["--resume", name]), Path("output")).wait()
            campaign.expect("an event file's write fails: the run goes on later", status == 0)


def full_events(which: int) -> Callable[[], None]:
    """A hook: no space is left for an event file from its `which`-th write on."""

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
    """`rounds` runs of one name that start at the same instant."""
    start = time.time() + 1

    def wait_for_it() -> None:
        time.sleep(max(0, start - time.time()))

    children = [
        Child(program(flags(campaign.data, "same", epochs=1), wait_for_it), Path(f"output{index}"))
        for index in range(rounds)
    ]
    statuses = [child.wait(600) for child in children]
    campaign.expect("every run ends well", [status for status in statuses if status != 0])
    runs = list(Path("runs").glob("same*"))
    campaign.expect(f"{rounds} runs, {rounds} folders", len(runs) == rounds)
    for run in runs:
        campaign.expect("every run has its own events", max(raw_events(run).values()) == 1)


def files(campaign: Campaign, rounds: int, generator: random.Random) -> None:
    """`rounds` mutated image files of seven formats: bytes changed, cut off, moved; and the sound ones."""
    originals = draw_originals()
    for name, content in originals.items():
        Path(name).write_bytes(content)
        campaign.expect("a sound file is used", outcome(Path(name)) == "used")
    batch = 100
    for start in range(0, rounds, batch):
        mutants = []
        for _ in range(min(batch, rounds - start)):
            name = generator.choice(list(originals))
            mutants.append((name, mutate(originals[name], generator)))
        child = Child(read_all(mutants), Path("output"))
        status = child.wait(10 * batch)
        lines = Path("results").read_text().splitlines()
        campaign.expect("no crash and no hang, in a batch of 100", status == 0 or [f"{status}, after {lines[-1:]}"])
        for line in lines:
            name, said, pillow, seconds = line.split("|")
            campaign.tried[f"a mutant was {said.split()[0]}"] += 1
            campaign.expect("it is used if Pillow decodes it", pillow != "decodes" or said == "used" or [line])
            campaign.expect("it takes less than 10 s", float(seconds) < 10 or [line])
            campaign.expect("it is used or reported", said in ("used", "reported") or [line])
        mib = int(Path("memory").read_text()) // 1024
        campaign.expect("memory stays below 1 GiB, in a batch of 100", mib < 1024 or [f"{mib} MiB"])


def draw_originals() -> dict[str, bytes]:
    """The content of small image files of each format, in several modes."""
    picture = draw_flower("roses", 1, size=96)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        "a.jpg": (picture, {"exif": exif}),
        "progressive.jpg": (picture, {"progressive": True}),
        "cmyk.jpg": (picture.convert("CMYK"), {}),
        "a.png": (picture, {}),
        "alpha.png": (picture.convert("RGBA"), {}),
        "palette.png": (picture.convert("P"), {}),
        "a.gif": (picture.convert("P"), {"save_all": True, "append_images": [picture.rotate(90).convert("P")]}),
        "a.bmp": (picture, {}),
        "a.webp": (picture, {}),
        "lossless.webp": (picture.convert("RGBA"), {"lossless": True}),
        "a.tif": (picture, {"compression": "tiff_lzw"}),
        "plain.tif": (picture.convert("L"), {}),
        "several.mpo": (picture, {"save_all": True, "append_images": [picture.rotate(90)]}),
    }
    originals = {}
    for name, (image, options) in kinds.items():
        image.save(name, **options)
        originals[name] = Path(name).read_bytes()
    return originals


def mutate(content: bytes, generator: random.Random) -> bytes:
    """Bytes changed, the end cut off, or a piece moved to another place."""
    mutant = bytearray(content)
    kind = generator.randrange(3)
    if kind == 0:
        for _ in range(generator.choice((1, 2, 5, 20))):
            mutant[int(len(mutant) * generator.random() ** 2)] = generator.randrange(256)  # headers more often
    elif kind == 1:
        del mutant[generator.randrange(len(mutant)) :]
    else:
        start, length, to = (generator.randrange(len(mutant)) for _ in range(3))
        piece = mutant[start : start + length // 8]
        if generator.random() < 0.5:
            del mutant[start : start + length // 8]
        mutant[to:to] = piece
    return bytes(mutant)


def outcome(path: Path) -> str:
    """What reading it comes to: "used", "reported" in one line, or what it should not have been."""
    try:
        image = read_image(path, least_side=48)
    except ImageError as error:
        return (
            "reported" if len(str(error).splitlines()) == 1 and repr(str(path)) in str(error) else f"unclear: {error}"
        )
    except Exception as error:  # noqa: BLE001 - any other is what is looked for
        return f"raised {error!r}"
    return "used" if image.mode == "RGB" else f"of mode {image.mode}"


def read_all(mutants: list[tuple[str, bytes]]) -> Callable[[], int]:
    """Read each, and print what came of it, whether Pillow itself decodes it, and how long it took."""

    def action() -> int:
        warnings.simplefilter("ignore")
        results = open("results", "w", buffering=1)  # noqa: SIM115 - libraries write to the output
        for name, content in mutants:
            path = Path(f"mutant{Path(name).suffix.replace('mpo', 'jpg')}")
            path.write_bytes(content)
            start = time.monotonic()
            said = outcome(path)
            seconds = time.monotonic() - start
            try:
                with Image.open(path) as image:
                    image.load()
                pillow = "decodes"
            except Exception:  # noqa: BLE001 - it raises many kinds
                pillow = "fails"
            print("|".join((name, said.replace("|", "/").replace("\n", " "), pillow, f"{seconds:.2f}")), file=results)
        Path("memory").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
        return 0

    return action


class SilentHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files, and says nothing."""

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


class _Payload:
    """Unpickled without restrictions, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple:
        return open, (self.marker, "w")


def hostile(campaign: Campaign, rounds: int, generator: random.Random) -> None:
    """Files from a stranger, each with a payload that would make a file `marker`, inside or outside the folder."""
    box = Path("box").resolve()
    marker = box / "marker"
    (box / "run" / "weights").mkdir(parents=True)
    payload = _Payload(marker)
    checkpoint = box / "run" / "weights" / "last.pth"
    pickled = box / "list.pkl"
    pickled.write_bytes(pickle.dumps([payload]))

    pickle.loads(pickled.read_bytes())[0].close()
    campaign.expect("control: an unrestricted pickle reader makes the marker", marker.exists())
    marker.unlink()
    torch.save({"state_dict": payload}, checkpoint)
    torch.load(checkpoint, weights_only=False)
    campaign.expect("control: an unrestricted torch.load makes the marker", marker.exists())
    marker.unlink()

    def refuses(what: str, kinds: tuple, action: Callable[[], object]) -> None:
        try:
            action()
            problems = ["accepted"]
        except kinds as error:
            problems = [] if len(str(error).splitlines()) == 1 else [f"more than a line: {error}"]
        except Exception as error:  # noqa: BLE001 - any other is what is looked for
            problems = [f"raised {error!r}"]
        campaign.expect(f"refused: {what}", problems)
        campaign.expect("no marker", not marker.exists() and not list(box.parent.glob("marker*")))

    refuses("a pickle", (DataError,), lambda: read_pickle(pickled))
    for content in (payload, {"state_dict": payload}, {"model": payload, "state_dict": {}}, {"resume": payload}):
        torch.save(content, checkpoint)
        refuses("a checkpoint to predict with", (WeightsError,), lambda: load_model(checkpoint))
        refuses("weights to start from", (WeightsError,), lambda: load_pretrained(resnet18(5), checkpoint, "resnet18"))
        refuses("a checkpoint to resume from", (run_utils.UsageError,), lambda: run_utils.read_checkpoint(checkpoint))
    for text in ("[]", "{", '{"0": 5}', '{"0": "a", "7": "b"}', "[" * 100_000, "\xff", '{"0": {"a": "b"}}'):
        (box / "class_indices.json").write_text(text, encoding="latin-1")
        refuses("class_indices.json", (DataError,), lambda: read_class_indices(box / "class_indices.json"))

    outside = box.parent / "outside.png"
    outside.write_bytes(draw_originals()["a.png"])
    lines = [f"../{outside.name} roses", f"{outside} roses", f"run/../../{outside.name} roses"]
    (box / "label.txt").write_text("\n".join(lines), encoding="utf-8")
    labelled, problems = read_label_file(box, ["roses"])
    campaign.expect("label.txt that climbs out of its folder is not followed", not labelled and len(problems) == 3)

    handler = functools.partial(SilentHandler, directory=str(box))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/a.tgz"
    archive = box / "a.tgz"
    for name, link in (("../marker", ""), (str(marker), ""), ("flower_photos/a", "../../marker"), ("marker", "device")):
        with tarfile.open(archive, "w:gz") as tar:
            member = tarfile.TarInfo(name)
            member.type = tarfile.CHRTYPE if link == "device" else tarfile.SYMTYPE if link else tarfile.REGTYPE
            member.linkname = "" if link == "device" else link
            tar.addfile(member, io.BytesIO())
        checksum = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
        kinds = (DataError, OSError)
        refuses("an archive", kinds, functools.partial(download_flower_photos, box / "new", url, checksum))
        refuses("a download of another checksum", kinds, lambda: download_flower_photos(box / "new", url))
    server.shutdown()


CAMPAIGNS = {kill: 100, signals: 30, disk: 1000, files: 10_000, hostile: 1, concurrent: 20}


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    by_name = {campaign.__name__: campaign for campaign in CAMPAIGNS}
    parser.add_argument("campaign", choices=[*by_name, "all"])
    parser.add_argument(
        "--rounds",
        type=int,
        help="kills, signals, writes to an event file, files, or runs (default: 100, 30, all, 10,000, 20)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random instants (default: %(default)s)")
    args = parser.parse_args(argv)
    done = []
    for name in by_name if args.campaign == "all" else [args.campaign]:
        print(f"{name}: {by_name[name].__doc__}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            campaign = Campaign(name, draw_sample(Path("data").resolve(), images_per_class=IMAGES // 5, size=64))
            by_name[name](campaign, args.rounds or CAMPAIGNS[by_name[name]], random.Random(args.seed))
            done.append(campaign)
            os.chdir("/")
    for campaign in done:
        print(f"\n{campaign.name}")
        for what, times in campaign.tried.items():
            bad = sum(line.startswith(f"{what}: ") for line in campaign.wrong)
            print(f"  {what:60} {times:5} times, {bad} wrong")
    return 1 if any(campaign.wrong for campaign in done) else 0


if __name__ == "__main__":
    sys.exit(main())
