"""The files that predict.py writes: --csv and --save-plot."""

import csv
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import needs_fork, run_in_fork
from PIL import Image
from shortcuts import describe_weights, run_predict

import plot_utils
import predict

pytestmark = pytest.mark.usefixtures("small_network")


def test_written_files_are_named(capsys, weights, sample, tmp_path):
    image, plot, table = next((sample / "roses").iterdir()), tmp_path / "plot.png", tmp_path / "out.csv"
    _, expected, _ = run_predict(capsys, image, "--weights", weights)
    status, lines, notes = run_predict(capsys, image, "--weights", weights, "--save-plot", plot, "--csv", table)
    assert (status, lines) == (0, expected)
    assert notes == [describe_weights(weights).strip(), f"predictions: {table}", f"figure: {plot}"]


@pytest.mark.parametrize("extension", ["png", "PDF"])
def test_plot_formats(capsys, weights, sample, tmp_path, extension):
    out = tmp_path / f"out.{extension}"
    status, lines, _ = run_predict(capsys, sample / "roses", sample, "--weights", weights, "--save-plot", out)
    assert (status, len(lines)) == (0, 121)
    assert out.stat().st_size > 10_000
    assert {path.name for path in tmp_path.iterdir()} == {out.name}


def test_plot_shows_the_least_certain_images_of_a_folder(capsys, weights, sample, tmp_path, monkeypatch):
    drawn = []
    explained = plot_utils.explained
    monkeypatch.setattr(plot_utils, "explained", lambda *content: drawn.append(content) or explained(*content))
    csv_path = tmp_path / "out.csv"
    flags = ["--weights", weights, "--topk", "2", "--save-plot", tmp_path / "out.png", "--csv", csv_path]
    status, lines, _ = run_predict(capsys, sample, *flags)
    assert (status, len(lines)) == (0, 101)
    with open(csv_path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "class", "probability", "label", "flags", "class 2", "probability 2"]
    for row, line in zip(rows, lines, strict=False):
        assert line.startswith(f"{row['image']}: {row['class']} ")
        printed = float(line.removeprefix(f"{row['image']}: {row['class']} ").partition("%")[0])
        assert printed == pytest.approx(100 * float(row["probability"]), abs=0.0051)  # both are rounded
        assert row["label"] == Path(row["image"]).parent.name
    images, heats, tops, titles, labels = drawn[0]
    probability = {row["image"]: float(row["probability"]) for row in rows}
    assert [probability[title] for title in titles] == sorted(probability.values())[:24]  # some are equal
    assert labels == [Path(title).parent.name for title in titles]
    assert images.shape == (24, 64, 64, 3)
    assert heats.shape == (24, 64, 64)
    assert all(len(top) == 2 for top in tops)
    with Image.open(tmp_path / "out.png") as figure:
        assert figure.height > 1500  # eight rows


def test_plot_keeps_the_order_of_named_images(capsys, weights, sample, tmp_path, monkeypatch):
    drawn = []
    explained = plot_utils.explained
    monkeypatch.setattr(plot_utils, "explained", lambda *content: drawn.append(content) or explained(*content))
    paths = [str(path) for path in sorted((sample / "tulips").iterdir())[:3]]
    assert run_predict(capsys, *paths, "--weights", weights, "--save-plot", tmp_path / "out.png")[0] == 0
    assert drawn[0][3] == paths


def test_images_are_not_overwritten(capsys, weights, sample, tmp_path):
    """The shell expands `--save-plot *.jpg` to the names of images."""
    image = next((sample / "roses").iterdir())
    photograph = Path(shutil.copy(image, tmp_path / "a.png"))
    for flag in ("--save-plot", "--csv"):
        status, lines, errors = run_predict(capsys, image, "--weights", weights, flag, photograph)
        assert (status, lines) == (1, [])
        assert str(photograph) in errors[-1]
    assert photograph.read_bytes() == image.read_bytes()
    for out in ("out.png", "out.png", "out.jpg", "out.jpg"):  # its own figures may be replaced
        assert run_predict(capsys, image, "--weights", weights, "--save-plot", tmp_path / out)[0] == 0


@needs_fork
def test_csv_can_be_a_named_pipe(weights, sample, tmp_path):
    image, pipe = str(next((sample / "roses").iterdir())), tmp_path / "pipe"
    os.mkfifo(pipe)
    with (
        open(os.devnull, "w") as null,
        subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True) as reader,
    ):
        try:
            arguments = [image, "--weights", str(weights), "--device", "cpu", "--csv", str(pipe)]
            assert run_in_fork(lambda: predict.main(arguments), null.fileno()) == (
                0,
                f"{describe_weights(weights)}predictions: {pipe}\n",
            )
            assert len(reader.communicate(timeout=10)[0].splitlines()) == 2
        finally:
            reader.kill()  # in case nothing was written
    assert pipe.is_fifo()
