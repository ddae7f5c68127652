"""Run folders, metadata and checkpoint writing."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest
import torch

from checkpoint import save_checkpoint
from cli_utils import UsageError
from run_utils import create_run_folder
from weights_io import newest_weights


def test_concurrent_runs_get_separate_folders(tmp_path):
    made = []
    threads = [threading.Thread(target=lambda: made.append(create_run_folder("run", tmp_path))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == sorted([tmp_path / "run"] + [tmp_path / f"run-{number}" for number in range(2, 21)])
    assert all((folder / "weights").is_dir() for folder in made)


def test_run_folder_inside_a_file_is_an_error(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(OSError, match="runs"):
        create_run_folder("run", tmp_path / "runs")


def test_newest_weights(tmp_path):
    with pytest.raises(UsageError, match="train a model first"):
        newest_weights(tmp_path)
    for name, age in (("a", 10), ("b", 5), ("c", 20)):
        path = tmp_path / name / "weights" / "best.pth"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1_000_000 - age,) * 2)
    create_run_folder("d", tmp_path)
    assert newest_weights(tmp_path) == tmp_path / "b" / "weights" / "best.pth"


def test_checkpoint_without_folder_fsync_support(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    save_checkpoint({"epoch": 1}, tmp_path / "best.pth")
    assert torch.load(tmp_path / "best.pth", weights_only=True) == {"epoch": 1}


def test_failed_save_keeps_the_previous_checkpoint(tmp_path):
    path = tmp_path / "best.pth"
    save_checkpoint({"epoch": 1}, path)
    with pytest.raises((AttributeError, TypeError)):
        save_checkpoint({"epoch": 2, "cannot be pickled": threading.Lock()}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert list(Path(tmp_path).iterdir()) == [path]
