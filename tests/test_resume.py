"""Resume after a stop signal, a crash or a full disk, and the checkpoints that this needs."""

import errno
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import needs_fork, run_in_fork, write_classes, write_image
from fault_harness import accumulated, differences

import checkpoint
import config
import prepare_data
import run_state
import run_utils
import train
from checkpoint import save_checkpoint
from run_state import Run
from run_utils import lock_run
from tensorboard_logger import TensorBoardLogger

pytestmark = pytest.mark.usefixtures("small_network", "blank_figures")
ROOT = Path(train.__file__).parent
EPOCHS, STEPS = 3, 5  # steps per epoch: 20 images, batches of 4


@pytest.fixture(scope="module")
def pets(tmp_path_factory) -> Path:
    return write_classes(tmp_path_factory.mktemp("data") / "pets", {"cat": 12, "dog": 13})


def flags(data: Path, *more: str) -> list[str]:
    fixed = ["--model", "resnet18", "--img-size", "32", "--batch-size", "4", "--device", "cpu", "--workers", "0"]
    return ["--data-path", str(data), *fixed, "--epochs", str(EPOCHS), *more]


@pytest.fixture(scope="module")
def undisturbed(small_network, blank_figures, pets, tmp_path_factory) -> Path:
    """Return the folder of a run that was never interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("undisturbed"))
        assert train.main(flags(pets)) == 0
        return Path("runs/flower_experiment").resolve()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@contextmanager
def after_steps(number: int, action: Callable[[Run], object]) -> Iterator[None]:
    """Call `action` after training step `number`, counted from the start of the process."""
    taken, due = itertools.count(1), Run.save_is_due
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save_is_due", lambda run: bool(next(taken) == number and action(run)) or due(run))
        yield


def send(number: int) -> Callable[[Run], None]:
    return lambda run: os.kill(os.getpid(), number)


def fail(run: Run) -> None:
    raise OSError("pulled the plug")


def draw_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw figures slowly and as on a GPU, so that the next epoch starts before they are finished."""
    monkeypatch.setattr("tensorboard_logger.WAIT_FOR_FIGURES", ())
    draw = TensorBoardLogger.draw
    monkeypatch.setattr(TensorBoardLogger, "draw", lambda *figures: time.sleep(0.5) or draw(*figures))


# --- resume -------------------------------------------------------------------------------------------------------


def test_resume_keeps_figures_of_the_background_writer(pets, monkeypatch):
    draw_late(monkeypatch)
    assert train.main(flags(pets, "--epochs", "1")) == 0
    assert train.main(["--resume", "--epochs", "2"]) == 0
    assert accumulated(Path("runs/flower_experiment"))["confusion matrix"] == [0, 1]


@needs_fork
def test_figures_are_not_lost_if_a_run_is_killed_after_an_epoch(pets, undisturbed, monkeypatch):
    """The checkpoint of an epoch is written after its figures, and records the size of the event file after them."""
    last = Path("runs/flower_experiment/weights/last.pth")

    def die_once_saved(run: Run) -> None:
        while torch.load(last, weights_only=True)["resume"]["epoch"] < 2:
            time.sleep(0.01)
        os._exit(9)

    with monkeypatch.context() as patch, after_steps(2 * STEPS + 1, die_once_saved):
        draw_late(patch)
        assert run_in_fork(lambda: train.main(flags(pets)), stdout=1)[0] == 9
    assert train.main(["--resume"]) == 0
    assert differences(Path("runs/flower_experiment"), undisturbed) == []


@pytest.mark.parametrize("name", ["metrics.csv", "events.out.tfevents.1", "weights/last.pth.tmp", ".lock", "weights"])
def test_symbolic_links_in_a_run_are_refused(pets, capsys, name):
    """A run from someone else could overwrite other files through them."""
    assert train.main(flags(pets, "--epochs", "1")) == 0
    run, precious = Path("runs/flower_experiment"), Path("precious")
    if name == "weights":
        (run / name).rename(precious)
    else:
        precious.write_text("precious")
        (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(precious.absolute())
    capsys.readouterr()
    assert train.main(["--resume", "--epochs", "2"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{Path('flower_experiment', name)}: symbolic links in the folder of a run are not supported" in line
    assert name == "weights" or precious.read_text() == "precious"


@pytest.mark.parametrize(
    ("steps", "number", "where"),
    [
        (1, signal.SIGTERM, "epoch 0, step 1"),
        (STEPS, signal.SIGINT, "epoch 0, step 5"),  # during evaluation
        (STEPS + 2, signal.SIGTERM, "epoch 1, step 2"),
    ],
)
def test_resume_after_a_signal_is_bit_identical(pets, undisturbed, capsys, steps, number, where):
    with after_steps(steps, send(number)):
        assert train.main(flags(pets)) == 128 + number
    said = capsys.readouterr().err
    assert f"stopped at {where}" in said
    assert "python train.py --resume runs" in said
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train.main(["--resume", "flower_experiment"]) == 0
    assert f"resumed at {where}" in capsys.readouterr().out
    assert differences(Path("runs/flower_experiment"), undisturbed) == []


def test_resume_after_crashes_is_bit_identical(pets, undisturbed, monkeypatch, capsys):
    monkeypatch.setattr(run_state, "SECONDS_BETWEEN_SAVES", 0)
    monkeypatch.setattr(Run, "save_is_due", lambda run: run.progress.steps + len(run.progress.unread) == 3)
    for steps in (1, 4, 4, 6):  # unsaved steps are repeated
        with after_steps(steps, fail):
            status = train.main(["--resume"] if Path("runs").exists() else flags(pets))
            assert status == 1
    assert train.main(["--resume"]) == 0
    assert "resumed at epoch" in capsys.readouterr().out
    assert differences(Path("runs/flower_experiment"), undisturbed) == []


@pytest.mark.parametrize("moment", [("best.pth", 1), ("last.pth", 3)])
def test_resume_after_a_failed_save_logs_each_epoch_once(pets, undisturbed, monkeypatch, moment):
    save, saved = save_checkpoint, []

    def save_or_die(content: dict, path: Path) -> None:
        saved.append(path.name)
        if (path.name, saved.count(path.name)) == moment:
            raise OSError("pulled the plug")
        save(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", save_or_die)
        assert train.main(flags(pets)) == 1
    assert train.main(["--resume", "runs/flower_experiment/weights/last.pth"]) == 0
    assert differences(Path("runs/flower_experiment"), undisturbed) == []


def test_best_weights_are_saved_after_an_error_even_if_no_checkpoint_was_due(pets, monkeypatch):
    monkeypatch.setattr(run_state, "SAVE_COST", 0)
    with after_steps(STEPS + 1, fail):
        assert train.main(flags(pets)) == 1
    weights = Path("runs/flower_experiment/weights")
    assert torch.load(weights / "best.pth", weights_only=True)["epoch"] == 0
    assert torch.load(weights / "last.pth", weights_only=True)["resume"]["epoch"] == 0
    assert train.main(["--resume"]) == 0


def test_checkpoints_that_take_long_to_write_are_saved_less_often(pets, monkeypatch):
    """Each epoch here takes a moment, and writing each checkpoint, by a false clock, 1,000 s."""
    saved, clock = [], itertools.count(step=1000)
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda content, path: saved.append(path.name))
    monkeypatch.setattr(time, "thread_time", lambda: next(clock))
    monkeypatch.setattr(run_state, "SAVE_COST", 1)
    assert train.main(flags(pets)) == 0
    assert saved.count("last.pth") == 2  # at the start and at the end


def test_resume_accepts_more_epochs_but_not_fewer(pets, undisturbed, capsys):
    shutil.copytree(undisturbed, "runs/a")
    assert train.main(["--resume", "a"]) == 0
    assert "is complete" in capsys.readouterr().out
    assert train.main(["--resume", "a", "--epochs", "2"]) == 1
    assert "--epochs" in capsys.readouterr().err
    assert train.main(["--resume", "a", "--epochs", "4"]) == 0
    rates = accumulated(Path("runs/a"))["learning_rate"]
    assert [step for step, _ in rates] == [0, 1, 2, 3]
    assert rates[3][1] == pytest.approx(0.001 * ((1 + math.cos(math.pi * 3 / 4)) / 2 * 0.9 + 0.1))
    assert train.main(["--resume", "a"]) == 0  # the new number of epochs is stored
    assert "4 epochs" in capsys.readouterr().out


def test_resume_with_another_precision(pets, undisturbed, monkeypatch):
    shutil.copytree(undisturbed, "runs/a")
    monkeypatch.setattr(train, "select_precision", lambda *arguments: (torch.float16, "float16"))
    assert train.main(["--resume", "a", "--epochs", "4"]) == 0
    assert torch.load("runs/a/weights/last.pth", weights_only=True)["resume"]["scaler"]["scale"] > 0


def test_resume_reads_the_checkpoint_after_locking_the_run(pets, undisturbed, monkeypatch, capsys):
    """Another process may finish the run while this one starts."""
    with after_steps(STEPS + 1, send(signal.SIGTERM)):
        assert train.main(flags(pets)) == 143
    lock = run_utils.lock_run

    def finish_before(folder: Path):
        shutil.rmtree(folder)
        shutil.copytree(undisturbed, folder)
        return lock(folder)

    monkeypatch.setattr(run_utils, "lock_run", finish_before)
    assert train.main(["--resume"]) == 0
    assert "is complete" in capsys.readouterr().out
    assert differences(Path("runs/flower_experiment"), undisturbed) == []


def test_resume_defaults_to_the_most_recent_run(pets, undisturbed, capsys):
    assert train.main(["--resume"]) == 1
    assert "no run in runs" in capsys.readouterr().err
    shutil.copytree(undisturbed, "runs/old")
    shutil.copytree(undisturbed, "runs/new")
    os.utime("runs/old/weights/last.pth", (1, 1))
    assert train.main(["--resume"]) == 0
    assert "new is complete" in capsys.readouterr().out


def test_resume_does_not_download_again(pets, undisturbed, monkeypatch):
    downloads = []
    monkeypatch.setattr(config, "FLOWER_PHOTOS", pets)
    monkeypatch.setattr(prepare_data, "download_flower_photos", downloads.append)
    with after_steps(2, send(signal.SIGTERM)):
        assert train.main([*flags(pets)[2:], "--download"]) == 143
    assert train.main(["--resume"]) == 0
    assert downloads == [str(pets)]
    assert differences(Path("runs/flower_experiment"), undisturbed) == []


# --- refused resumes and other errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (["--model", "resnet34"], "with resnet18"),
        (["--batch-size", "8"], "with "),
        (["--lr", "0.1"], "with "),
        (["--seed", "1"], "with 0"),
        (["--weights", "w.pth"], "without it"),
    ],
)
def test_resume_with_a_conflicting_flag_is_a_one_line_error(undisturbed, capsys, words, start):
    assert train.main(["--resume", str(undisturbed), *words, "--epochs", "9"]) == 1
    said = capsys.readouterr().err
    assert f"{words[0]}: the run {undisturbed} was started {start}" in said
    assert len(said.splitlines()) == 1


def test_changed_data_is_listed_file_by_file(pets, undisturbed, tmp_path, capsys):
    shutil.copytree(undisturbed, "runs/a")
    shutil.copytree(pets, "pets", copy_function=shutil.copyfile)  # does not keep modification times
    assert train.main(["--resume", "a", "--data-path", "pets"]) == 0
    resume = ["--resume", "a", "--epochs", "4", "--data-path", "pets"]
    Path("pets/cat/cat 03.png").unlink()
    write_image(Path("pets/dog/another.png"))
    with open("pets/dog/dog 01.png", "ab") as file:
        file.write(b"more")
    assert train.main(resume) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[:-1] == [
        "cat/cat 03.png is missing",
        "dog/another.png is new",
        "dog/dog 01.png has changed",
    ]
    assert "files changed since the run started: 3; restore them, or pass --allow-changed-data" in said[-1]
    for number in range(40):
        write_image(Path(f"pets/dog/new {number}.png"))
    assert train.main(resume) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-2] == "... and 23 more files"
    assert len(said) == 22
    assert train.main([*resume, "--allow-changed-data"]) == 0
    shutil.copytree("pets/dog", "pets/fox")
    assert train.main(["--resume", "a", "--epochs", "5", "--allow-changed-data"]) == 1
    assert "cat, dog, fox" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1}', '{"a": [[1, 2]]}', '{"a": [["train"]]}'])
def test_corrupt_files_json_is_a_one_line_error(pets, undisturbed, capsys, text):
    shutil.copytree(undisturbed, "runs/a")
    Path("runs/a/files.json").write_text(text)
    assert train.main(["--resume", "a", "--epochs", "4"]) == 1
    assert "--allow-changed-data" in capsys.readouterr().err.splitlines()[-1]


def test_files_moved_between_training_and_validation_are_listed(pets, tmp_path, capsys):
    for side in ("train", "val"):
        shutil.copytree(pets, tmp_path / "sides" / side)
    (tmp_path / "sides/val/cat/cat 00.png").unlink()
    assert train.main([*flags(tmp_path / "sides"), "--epochs", "1"]) == 0
    (tmp_path / "sides/train/cat/cat 00.png").rename(tmp_path / "sides/val/cat/cat 00.png")
    assert train.main(["--resume", "--epochs", "2"]) == 1
    assert "cat/cat 00.png has moved to another subset" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the other process is forked")
def test_a_locked_run_is_refused(undisturbed, capsys):
    shutil.copytree(undisturbed, "runs/a")
    fork = multiprocessing.get_context("fork")
    is_locked = fork.Event()

    def hold() -> None:
        lock = lock_run(Path("runs/a"))
        is_locked.set()
        time.sleep(60)
        lock.close()

    holder = fork.Process(target=hold)
    holder.start()
    try:
        assert is_locked.wait(30)
        assert train.main(["--resume", "a", "--epochs", "4"]) == 1
        assert "another process" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.join()
    lock_run(Path("runs/a")).close()


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.clear(),
        lambda content: content["resume"].clear(),
        lambda content: content["resume"].pop("optimizer"),
        lambda content: content["resume"].update(epoch="1"),
        lambda content: content["resume"].update(epoch=-1),
        lambda content: content["resume"]["optimizer"]["state"][3].update(momentum_buffer=torch.zeros(7)),
        lambda content: content["resume"].update(format=1),
        lambda content: content["resume"].update(flags=["--help"]),
        lambda content: content["resume"]["flags"].update(no_such_flag=True),
        lambda content: content["resume"]["flags"].update(model="\x1b]0;title\x07\nanother line"),
        lambda content: content["resume"]["flags"].update(lr="high"),
        lambda content: content["resume"]["flags"].update(recipe="scratch"),
        lambda content: content["resume"]["flags"]["recipe"].update(progressive_resize_start=math.inf),
        lambda content: content["resume"]["flags"]["recipe"].update(no_such_setting=None),
        lambda content: content["resume"]["flags"]["recipe"].update(muon_lr_scale=torch.ones(2)),
        lambda content: content["resume"].update(progress={"os": "system"}),
        lambda content: content["resume"].update(events=[1, 2]),
        lambda content: content["state_dict"].pop("fc.weight"),
        lambda content: content.update(class_names="cat"),
    ],
)
def test_corrupt_checkpoint_is_a_one_line_error_and_changes_nothing(undisturbed, capsys, damage):
    shutil.copytree(undisturbed, "runs/a")
    path = Path("runs/a/weights/last.pth")
    content = torch.load(path, weights_only=True)
    damage(content)
    torch.save(content, path)
    before = contents(Path("runs/a"))
    try:
        status = train.main(["--resume", "a", "--epochs", "4"])
    except SystemExit as stop:  # argparse rejects the stored command line
        status = stop.code
    assert status != 0
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert contents(Path("runs/a")) == before


def test_resume_from_a_checkpoint_outside_a_run_is_refused(undisturbed, tmp_path, capsys):
    (tmp_path / "downloads").mkdir()
    shutil.copy(undisturbed / "weights" / "last.pth", tmp_path / "downloads" / "last.pth")
    (tmp_path / "events.out.tfevents.1.another").write_bytes(b"somebody's")
    assert train.main(["--resume", str(tmp_path / "downloads" / "last.pth"), "--epochs", "4"]) == 1
    said = capsys.readouterr().err
    assert "folder weights" in said
    assert len(said.splitlines()) == 1
    assert (tmp_path / "events.out.tfevents.1.another").exists()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_is_a_one_line_error(pets, monkeypatch, capsys, error):
    def run_out(*arguments: object, **keywords: object) -> None:
        raise error

    monkeypatch.setattr(train, "train_one_epoch", run_out)
    assert train.main(flags(pets)) == 1
    said = capsys.readouterr().err
    assert "out of memory: try a smaller --batch-size or --img-size" in said
    assert len(said.splitlines()) == 1


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "write", "replace"])
def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch, call):
    save_checkpoint({"epoch": 1}, tmp_path / "last.pth")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        target = {"fsync": (os, "fsync"), "write": (torch, "save"), "replace": (Path, "replace")}[call]
        patch.setattr(*target, full)
        with pytest.raises(OSError, match=r"cannot save .*last.pth: No space left on device"):
            save_checkpoint({"epoch": 2}, tmp_path / "last.pth")
    assert torch.load(tmp_path / "last.pth") == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth"]


def test_non_finite_weights_are_not_saved(pets, capsys):
    def spoil(run: Run) -> None:
        run.model.fc.weight.data.fill_(float("nan"))
        os.kill(os.getpid(), signal.SIGTERM)

    with after_steps(STEPS, spoil):  # the signal requests a save during the first evaluation
        assert train.main(flags(pets)) == 1
    assert "non-finite weights in epoch 0" in capsys.readouterr().err
    saved = torch.load("runs/flower_experiment/weights/last.pth")
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
