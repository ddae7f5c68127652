"""Shared fixtures and helpers: small image folders, a drawn sample, and the real photographs where available."""

import functools
import http.server
import math
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from shortcuts import FIGURES, NAMES, SmallResNet, blank_figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter

import plot_utils
import run_state
import tensorboard_logger
from image_folders import list_images
from model import MODELS
from my_dataset import EvalTransform, prepare_batch
from sample_flowers import draw_sample
from tensorboard_logger import TensorBoardLogger

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

matplotlib.use("Agg")
# Tests, and the programs that they start, run in parallel. One thread each avoids oversubscribing the cores.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# Save after each epoch, and draw figures after the 1st, 2nd, 4th, ... one, however short the epochs are.
run_state.SAVE_COST = tensorboard_logger.FIGURE_COST = math.inf


def pytest_xdist_auto_num_workers() -> int:
    """Return one worker more than there are cores, because some tests wait for other processes."""
    return (os.cpu_count() or 1) + 1


LONGEST = ("torchrun", "faults", "browser", "run", "bench", "train", "distributed", "model", "resume", "recipes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files that take longest first, so that no process works on one of them while the others are idle."""
    order = {f"test_{name}.py": index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def write_image(path: Path, size: tuple[int, int] = (40, 40), seed: int = 0) -> Path:
    """Write an image of random noise. `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_classes(root: Path, counts: dict[str, int]) -> Path:
    """Create a folder with `counts[name]` images in the sub-folder of each class."""
    for label, (name, count) in enumerate(counts.items()):
        for index in range(count):
            write_image(root / name / f"{name} {index:02d}.png", seed=1000 * label + index)
    return root


def read_events(run: Path) -> EventAccumulator:
    """Load all events of a run."""
    events = EventAccumulator(str(run), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    events.Reload()
    return events


@pytest.fixture(scope="module")
def small_network() -> Iterator[None]:
    """Shrink ResNet-18, for tests that don't depend on the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "resnet18", SmallResNet)
        yield


@pytest.fixture(scope="module")
def weights(small_network: None, tmp_path_factory: pytest.TempPathFactory, sample: Path) -> Path:
    """Save a best.pth of a network whose predictions differ between images."""
    torch.manual_seed(0)
    model = MODELS["resnet18"](num_classes=5)
    images = [EvalTransform(64)(Image.open(path)) for path in list_images(sample, [])[::10]]
    model(prepare_batch(torch.stack(images), "cpu"))  # sets the BatchNorm statistics
    path = tmp_path_factory.mktemp("runs") / "runs" / "first" / "weights" / "best.pth"
    path.parent.mkdir(parents=True)
    content = {"model": "resnet18", "class_names": NAMES, "img_size": 64, "epoch": 0, "accuracy": 0.2}
    content["temperature"] = 0.8
    torch.save(content | {"state_dict": model.state_dict()}, path)
    return path


@pytest.fixture(autouse=True)
def ordered_event_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the event files that a test writes within a second sort by name in the order in which they were written.

    Their names end with a counter of the process, and "10" would sort before "9".
    """
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(1000))


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to an empty folder, as programs write to the current one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the figures and the graph, which take most of the time of a small run."""
    monkeypatch.setattr(TensorBoardLogger, "draw", lambda *arguments: None)
    monkeypatch.setattr(SummaryWriter, "add_graph", lambda *arguments: None)


@pytest.fixture(scope="module")
def blank_figures() -> Iterator[None]:
    """Draw blank figures, for tests that depend on when figures are drawn, but not on their content."""
    with pytest.MonkeyPatch.context() as patch:
        for name in FIGURES:
            patch.setattr(plot_utils, name, blank_figure)
        yield


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Serve a folder over HTTP on loopback; yield the folder and its address."""
    folder = tmp_path / "www"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Yield a folder that other users may enter. pytest's tmp_path is private to its owner."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")


def run_in_fork(main: Callable[[], int], stdout: int | None) -> tuple[int, str]:
    """Run a program's `main` in a fork of this process, which has already imported all modules.

    Args:
        stdout: The file descriptor for its standard output, or None to close it.

    Returns:
        The exit status and the standard error.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            os.dup2(writer, 2)
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            if stdout is None:
                os.close(1)
                sys.stdout = None
            else:
                os.dup2(stdout, 1)
                sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            status = main()
            if sys.stdout is not None:
                sys.stdout.flush()  # as the interpreter does on exit
        except BaseException:  # noqa: BLE001 - the child must not return to pytest
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    with open(reader) as complaints:
        said = complaints.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


@contextmanager
def as_another_user() -> Iterator[None]:
    """Switch to the user nobody, because root ignores permissions."""
    if not hasattr(os, "geteuid"):
        pytest.skip("permissions are those of Unix")
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def two_classes(tmp_path: Path) -> Path:
    """Create a folder with 10 images of cats and 15 of dogs."""
    return write_classes(tmp_path / "pets", {"cat": 10, "dog": 15})


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw 100 flowers of 64 px, 20 per class."""
    return draw_sample(tmp_path_factory.mktemp("data") / "sample", images_per_class=20, size=64)


@pytest.fixture(scope="session")
def flower_photos() -> Path:
    """Return the folder of the real photographs, or skip the test if FLOWER_PHOTOS is not set."""
    if not os.environ.get("FLOWER_PHOTOS"):
        pytest.skip("FLOWER_PHOTOS does not name the folder of the flower photographs")
    return Path(os.environ["FLOWER_PHOTOS"])
