"""Arbitrary image folders: unusable images are skipped and reported, before and during training."""

import contextlib
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import as_another_user, write_classes, write_image
from fault_files import draw_zoo
from fault_harness import accumulated
from torch.utils.data import DataLoader

import data_loading
import prepare_data
import train
from cli_utils import DataError
from data_loading import EpochSampler, SafeImages
from dataset_split import find_split, split_folder
from image_folders import list_images
from image_io import ImageError, read_image
from my_dataset import EvalTransform, MyDataSet, TrainTransform
from prepare_data import check_images, describe_files, drop_unusable
from run_state import Run

pytestmark = pytest.mark.usefixtures("in_an_empty_folder", "small_network", "no_figures")
SMALL = ["--model", "resnet18", "--img-size", "32", "--batch-size", "4", "--device", "cpu", "--workers", "0"]


def files_in(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.rglob("*")) if not path.is_dir()]


# --- before training --------------------------------------------------------------------------------------------


def test_each_file_is_used_or_reported(open_folder):
    folder = write_classes(open_folder / "zoo", {"cat": 5, "dog": 5})
    zoo = draw_zoo(folder / "cat")
    with as_another_user():
        split = split_folder(folder)
        found = check_images(split.train_paths + split.val_paths, {})
    left = drop_unusable(split, found)
    unusable = {name for name, usable in zoo.items() if not usable}
    assert {Path(file.path).name for file in left.skipped} == unusable | {"locked", "notes.txt", "Thumbs.db"}
    for file in left.skipped:
        assert str(file).startswith(f"{file.path!r}: ")
        assert len(str(file).splitlines()) == 1
    found = len(left.train_paths + left.val_paths)
    assert found == 10 + len(zoo) - len(unusable) + 1  # nested.jpg/deeper.png


def test_class_without_usable_images_raises(tmp_path):
    folder = write_classes(tmp_path / "pets", {"cat": 5, "dog": 5})
    for path in [folder / "cat" / "cat 00.png", *(folder / "dog").iterdir()]:
        path.write_bytes(b"")
    split = split_folder(folder)
    with pytest.raises(DataError, match=r"class dog: no usable training images; .*dog 0\d\.png"):
        drop_unusable(split, check_images(split.train_paths + split.val_paths, {}))


def test_unreadable_file_is_reported(open_folder):
    folder = write_classes(open_folder / "pets", {"cat": 2, "dog": 2})
    (folder / "cat" / "cat 00.png").chmod(0)
    with as_another_user():
        found = check_images(files_in(folder), {})
    assert [str(image.skipped) for image in found.values() if image.skipped] == [
        f"{str(folder / 'cat' / 'cat 00.png')!r}: Permission denied"
    ]


def test_training_runs_inside_the_data_folder():
    """The runs folder is neither a class of the next training nor a source of images to predict."""
    write_classes(Path(), {"cat": 5, "dog": 5})
    for _ in range(2):
        assert train.main(["--data-path", ".", *SMALL, "--epochs", "1"]) == 0
    classes = [json.loads(path.read_text()) for path in Path("runs").glob("*/class_indices.json")]
    assert classes == [{"0": "cat", "1": "dog"}] * 2
    assert {Path(path).parts[0] for path in list_images(".", [])} == {"cat", "dog"}


@pytest.mark.parametrize("workers", [0, 2])
def test_only_new_and_changed_files_are_rechecked(tmp_path, monkeypatch, workers):
    paths = files_in(write_classes(tmp_path / "pets", {"cat": 60, "dog": 60}))
    Path(paths[0]).write_bytes(b"hello")
    random_state = torch.get_rng_state()
    first = check_images(paths, {}, workers)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [image.skipped is not None for image in first.values()] == [True] + [False] * 119
    read = []
    monkeypatch.setattr(prepare_data, "read_image", lambda path, **size: read.append(path) or read_image(path, **size))
    assert check_images(paths, json.loads(json.dumps(first))) == first
    assert read == paths[:1]  # failures are retried: the cause may have been a lack of memory
    read.clear()
    damaged = dict(zip(first, [None, [], [1, 2, 3, 4, 5], {}, "text"], strict=False))
    assert check_images(paths[1:5], damaged | {paths[1]: [*first[paths[1]][:4], 7]}) == {
        path: first[path] for path in paths[1:5]
    }
    assert read == paths[1:5]
    read.clear()
    Path(paths[5]).write_bytes(b"hello")
    check_images(paths, first)
    assert read == [paths[0], paths[5]]


def test_training_skips_and_lists_unusable_images(tmp_path, capsys, monkeypatch):
    folder = write_classes(tmp_path / "pets", {"cat": 12, "dog": 12})
    zoo = draw_zoo(folder / "dog")
    (folder / "dog" / "secret.png").unlink()  # root can read it
    bad = [folder / "dog" / name for name, usable in zoo.items() if not usable and name != "secret.png"]
    assert train.main(["--data-path", str(folder), *SMALL, "--epochs", "1"]) == 0
    said = capsys.readouterr().out
    assert f"skipped      {len(bad) + 2} files: {len(bad)} unreadable, 2 unknown file type" in said
    assert "[epoch 0]" in said
    listed = Path("runs/flower_experiment/skipped_files.txt").read_text(encoding="utf-8").splitlines()
    assert len(listed) == len(bad) + 2
    assert all(any(repr(str(path)) in line for line in listed) for path in bad)

    read = []
    monkeypatch.setattr(prepare_data, "read_image", lambda path, **size: read.append(path) or read_image(path, **size))
    assert train.main(["--data-path", str(folder), *SMALL, "--epochs", "1"]) == 0
    assert f"skipped      {len(bad) + 2} files: {len(bad)} unreadable" in capsys.readouterr().out
    assert {Path(path).name for path in read} == {path.name for path in bad}  # the others are cached

    assert train.main(["--data-path", str(folder), *SMALL, "--epochs", "1", "--strict"]) == 1
    said = capsys.readouterr().err
    assert "--strict" in said
    assert len(said.splitlines()) == 1
    assert not Path("runs/flower_experiment-3").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="names are UTF-8 there")
def test_class_name_that_is_not_valid_unicode(tmp_path):
    folder = write_classes(tmp_path / "pets", {os.fsdecode("狗".encode("gbk")): 5, "cat": 5})
    assert train.main(["--data-path", str(folder), *SMALL, "--epochs", "1"]) == 0
    assert train.main(["--resume", "--epochs", "2"]) == 0
    assert {"recall/\\udcb9\\udcb7", "recall/cat"} <= accumulated(Path("runs/flower_experiment")).keys()


def damage(path: Path) -> None:
    path.write_bytes(b"hello")


def stretch(path: Path) -> None:
    write_image(path, size=(330, 30))


@pytest.mark.parametrize("spoil", [damage, stretch])
def test_training_fails_if_a_class_has_no_usable_image(spoil, tmp_path, capsys):
    folder = write_classes(tmp_path / "pets", {"cat": 12, "dog": 12})
    for path in (folder / "cat").iterdir():
        spoil(path)
    assert train.main(["--data-path", str(folder), *SMALL]) == 1
    said = capsys.readouterr().err
    assert "class cat" in said
    assert len(said.splitlines()) == 1
    assert not Path("runs").exists()


def test_files_are_identified_by_content(tmp_path):
    split = split_folder(write_classes(tmp_path / "pets", {"cat": 3, "dog": 3}), val_rate=0)

    def describe() -> dict[str, list]:
        return describe_files(split, check_images(split.train_paths, {}))

    before = describe()
    assert len({checksum for [[_, checksum]] in before.values()}) == 6
    os.utime(split.train_paths[0], (1, 1))
    assert describe() == before
    content = bytearray(Path(split.train_paths[1]).read_bytes())
    content[-1] ^= 1
    Path(split.train_paths[1]).write_bytes(content)
    assert [name for name, checksums in describe().items() if checksums != before[name]] == ["cat/cat 01.png"]


# --- during training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_replaced_by_the_next(tmp_path, capfd, workers):
    paths = files_in(write_classes(tmp_path / "pets", {"cat": 3, "dog": 3}))
    images = SafeImages(MyDataSet(paths, range(6), TrainTransform(32)), replace=True)
    for index in (1, 2, 5):
        Path(paths[index]).unlink()
    loader = DataLoader(images, 2, sampler=EpochSampler(6), collate_fn=images.collate_fn, num_workers=workers)
    labels = torch.cat([labels for _, labels in loader])
    assert sorted(labels.tolist()) == [0, 0, 3, 3, 3, 4]
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 3
    assert all(any(repr(paths[index]) in line for line in said) for index in (1, 2, 5))
    for path in paths:
        Path(path).unlink(missing_ok=True)
    with pytest.raises(ImageError, match="no other image is readable"):
        images[0]


def test_evaluation_skips_unreadable_images(tmp_path, capsys):
    paths = files_in(write_classes(tmp_path / "pets", {"cat": 3, "dog": 3}))
    images = SafeImages(MyDataSet(paths, range(6), EvalTransform(32)), replace=False)
    for index in (0, 1, 5):
        Path(paths[index]).unlink()
    batches = list(DataLoader(images, 2, collate_fn=images.collate_fn))
    assert [labels.tolist() for _, labels in batches] == [[], [2, 3], [4]]
    assert [len(pixels) for pixels, _ in batches] == [0, 2, 1]
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_training_continues_when_files_vanish(tmp_path, capsys, monkeypatch):
    folder = write_classes(tmp_path / "pets", {"cat": 12, "dog": 12})
    split = split_folder(folder)
    due = Run.save_is_due

    def vanish(run: Run) -> bool:
        for path in (split.train_paths[0], *split.val_paths[:2]):
            with contextlib.suppress(FileNotFoundError):
                Path(path).unlink()
        return due(run)

    monkeypatch.setattr(Run, "save_is_due", vanish)
    monkeypatch.setattr(data_loading, "HAS_CACHE", False)
    assert train.main(["--data-path", str(folder), *SMALL, "--epochs", "2"]) == 0
    said = capsys.readouterr()
    assert "[epoch 1] skipped 2 of 4 validation images" in said.out
    assert f"{split.train_paths[0]!r}: No such file or directory; replaced by the next image" in said.err


def test_vanished_validation_set_is_a_one_line_error(two_classes, capsys, monkeypatch):
    split, _ = find_split(two_classes)
    monkeypatch.setattr(data_loading, "HAS_CACHE", False)
    monkeypatch.setattr(Run, "save_is_due", lambda run: [Path(path).unlink(True) for path in split.val_paths] and False)
    assert train.main(["--data-path", str(two_classes), *SMALL, "--epochs", "2"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(split.val_paths) + 1  # one per image, and the final error
    assert "nothing to evaluate" in said[-1]


def test_dead_worker_is_a_one_line_error(two_classes, capsys, monkeypatch):
    late = iter(DataLoader(range(9), num_workers=1))  # killed after the program has reported its error
    others = multiprocessing.active_children()

    def kill_a_worker(run: Run) -> bool:
        next(worker for worker in multiprocessing.active_children() if worker not in others).kill()
        time.sleep(10)  # interrupted when the worker's death is reported
        return False

    monkeypatch.setattr(Run, "save_is_due", kill_a_worker)
    flags = [*SMALL[:-1], "1", "--epochs", "2"]
    assert train.main(["--data-path", str(two_classes), *flags]) == 1
    said = capsys.readouterr().err
    assert "a DataLoader worker died" in said
    assert len(said.splitlines()) == 1
    late._workers[0].kill()
    time.sleep(1)  # not interrupted by a second report
    del late
    assert torch.load("runs/flower_experiment/weights/last.pth", weights_only=True)["resume"]["epoch"] == 0
