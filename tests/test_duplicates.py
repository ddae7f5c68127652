"""The search for near-identical images, by thumbnails and in detail, alone and through check_data.py."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from test_check_data import groups_of, run

import cli_utils
import duplicates
from duplicates import (
    MAX_COMPARED,
    MAX_LUMA,
    MAX_SPREAD,
    group_near_identical,
    near_hash_pairs,
    nearest_thumbnails,
    perceptual_hashes,
)
from sample_flowers import draw_flower

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def digit(number: int, random: np.random.Generator) -> Image.Image:
    """Draw a digit in a random hand, 28 x 28 px, black on white."""
    corners = {
        0: "30 01 03 36 63 61 30",
        2: "11 30 51 53 16 66",
        3: "10 51 53 33 55 46 06",
        4: "30 04 64 44 42 47",
        5: "60 10 03 43 55 36 06",
        6: "50 13 05 36 55 33 14",
        7: "00 60 33 27",
        8: "33 11 30 51 33 05 36 65 33",
        9: "52 33 21 40 52 46",
    }[number]
    points = np.array([[int(c) for c in corner] for corner in corners.split()]) + random.normal(0, 0.3, (1, 2))
    points = (points + random.normal(0, 0.25, points.shape)) * 12 + 20
    image = Image.new("L", (112, 112), 255)
    ImageDraw.Draw(image).line([tuple(point) for point in points.tolist()], 0, int(random.integers(7, 13)), "curve")
    return image.resize((28, 28), Image.Resampling.BOX)


def test_only_copied_digits_match(capsys, tmp_path):
    random = np.random.default_rng(0)
    for number in (0, 2, 3, 4, 5, 6, 7, 8, 9):
        (tmp_path / "digits" / str(number)).mkdir(parents=True)
        for index in range(30):
            digit(number, random).save(tmp_path / "digits" / str(number) / f"{index}.png")
    assert groups_of(capsys, tmp_path / "digits") == {}
    Image.open(tmp_path / "digits/3/7.png").save(tmp_path / "digits/8/copy.jpg", quality=50)
    expected = {frozenset({"3/7.png", "8/copy.jpg"}): ("near-identical", "1", "0")}
    assert groups_of(capsys, tmp_path / "digits", "--val-rate", "0") == expected


def test_blank_images_match_by_colour(capsys, tmp_path):
    colours = {"white": (255,) * 3, "grey": (128,) * 3, "black": (0,) * 3, "red": (200, 0, 0), "blue": (0, 0, 255)}
    for name, colour in colours.items():
        (tmp_path / "blank" / name).mkdir(parents=True)
        for size in (30, 40, 50):
            Image.new("RGB", (size, 40), colour).save(tmp_path / "blank" / name / f"{size}.jpg", quality=size)
    expected = {
        frozenset(f"{name}/{size}.jpg" for size in (30, 40, 50)): ("near-identical", "0", "0") for name in colours
    }
    assert groups_of(capsys, tmp_path / "blank", "--val-rate", "0") == expected


def test_colour_distinguishes_images(capsys, tmp_path):
    for name, colour in {"red": (200, 60, 60), "blue": (60, 95, 246)}.items():  # equally bright
        image = Image.new("RGB", (100, 80), (180, 180, 180))
        ImageDraw.Draw(image).rounded_rectangle((20, 25, 80, 55), 10, colour)
        (tmp_path / "cars" / name).mkdir(parents=True)
        image.save(tmp_path / "cars" / name / "car.png")
    assert groups_of(capsys, tmp_path / "cars", "--val-rate", "0") == {}


def page(random: np.random.Generator) -> Image.Image:
    """Draw a page of random words, 240 x 320 px."""
    image = Image.new("L", (240, 320), 255)
    draw = ImageDraw.Draw(image)
    for row in range(16):
        words = ["".join(chr(97 + letter) for letter in random.integers(0, 26, length)) for length in [3, 7, 5, 4, 6]]
        draw.text((20, 16 + 18 * row), " ".join(random.permutation(words)), fill=0)
    return image


@pytest.fixture
def pages(tmp_path) -> Path:
    """Draw 20 different pages in 2 classes."""
    random = np.random.default_rng(0)
    for kind in ("invoices", "letters"):
        (tmp_path / "pages" / kind).mkdir(parents=True)
        for number in range(10):
            page(random).save(tmp_path / "pages" / kind / f"{number:02d}.png")
    return tmp_path / "pages"


def test_different_pages_are_no_duplicates(capsys, pages):
    status, output, errors = run(capsys, pages)
    assert (status, errors) == (0, "")
    assert " 0 duplicated in total; 0 of 20 files skipped" in output.splitlines()[-1]
    (line,) = [line for line in output.splitlines() if line.startswith("LOOK-ALIKES")]
    assert "reliably in invoices (10 of 10 images), letters (10 of 10 images); " in line


@pytest.mark.parametrize("workers", [0, 2])
def test_copies_are_found_among_look_alikes(capsys, pages, monkeypatch, workers):
    monkeypatch.setattr(cli_utils, "MANY_FILES", 10)  # above this, workers are used
    image = Image.open(pages / "invoices/03.png")
    image.save(pages / "letters/copy.jpg", quality=30)
    image.resize((120, 160), Image.Resampling.BICUBIC).save(pages / "invoices/small.png")
    shutil.copy(pages / "letters/07.png", pages / "letters/same.png")
    Image.open(pages / "letters/07.png").save(pages / "invoices/twice.webp", quality=80)
    assert groups_of(capsys, pages, "--val-rate", "0", "--workers", workers) == {
        frozenset({"invoices/03.png", "letters/copy.jpg", "invoices/small.png"}): ("near-identical", "1", "0"),
        frozenset({"letters/07.png", "letters/same.png", "invoices/twice.webp"}): ("near-identical", "1", "0"),
    }


def test_frames_of_a_fixed_camera_match_only_their_copies(capsys, tmp_path):
    random = np.random.default_rng(0)
    background = draw_flower("daisy", size=240)
    colours = {"red": (200, 60, 60), "blue": (60, 95, 246)}  # equally bright
    for name in colours:
        (tmp_path / "frames" / name).mkdir(parents=True)
    for number in range(6):
        x, y = random.integers(0, 216, 2).tolist()
        for name, colour in colours.items():
            frame = background.copy()
            ImageDraw.Draw(frame).ellipse((x, y, x + 24, y + 24), colour)
            noisy = np.asarray(frame) + random.normal(0, 2, (240, 240, 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(tmp_path / "frames" / name / f"{number}.png")
    Image.open(tmp_path / "frames/red/5.png").save(tmp_path / "frames/red/copy.jpg", quality=30)
    assert groups_of(capsys, tmp_path / "frames", "--val-rate", "0") == {
        frozenset({"red/5.png", "red/copy.jpg"}): ("near-identical", "0", "0")
    }


def test_identical_files_are_not_compared(capsys, pages, monkeypatch):
    monkeypatch.setattr(duplicates, "same_in_detail", pytest.fail)
    for path in pages.glob("*/*"):
        path.write_bytes((pages / "letters/03.png").read_bytes())
    _, output, _ = run(capsys, pages)
    assert "LABEL CONFLICT: the same picture in several classes: 1\n  identical, also a LEAK:" in output
    assert "LOOK-ALIKES" not in output


def test_nearest_thumbnails_match_brute_force():
    thumbnails = np.random.default_rng(0).integers(0, 256, (600, 16, 16, 3), dtype=np.uint8)
    nearest = nearest_thumbnails(thumbnails)
    luma = thumbnails[..., 0].astype(int)
    assert nearest[0] == []
    for i in range(1, 600):
        expected = np.argsort(np.square(luma[:i] - luma[i]).sum((1, 2)))[:MAX_COMPARED]
        assert sorted(nearest[i]) == sorted(expected.tolist())


def test_image_removed_before_it_is_compared(capsys, pages, monkeypatch):
    def remove(*args) -> np.ndarray:
        (pages / "letters/03.png").unlink()
        return group_near_identical(*args)

    monkeypatch.setattr(duplicates, "group_near_identical", remove)
    status, _, errors = run(capsys, pages)
    assert (status, errors.count("\n")) == (2, 1)
    assert errors.startswith(f"check_data.py: error: cannot read image {str(pages / 'letters/03.png')!r}: No such file")


def blank(shades: np.ndarray) -> np.ndarray:
    """Return thumbnails (N, 16, 16, 3), each of a single grey."""
    return np.full((len(shades), 16, 16, 3), 128, dtype=np.uint8) * [0, 1, 1] + shades[:, None, None, None] * [1, 0, 0]


def test_gradual_shades_are_not_chained_into_one_group():
    thumbnails = blank(np.arange(256)).astype(np.uint8)
    groups = group_near_identical(perceptual_hashes(thumbnails), thumbnails)
    assert np.ptp(np.flatnonzero(groups == groups[0])) <= MAX_SPREAD * MAX_LUMA
    assert (np.unique(groups, return_counts=True)[1] > 5).sum() > 10


def test_many_blank_images_form_one_group():
    random = np.random.default_rng(0)
    thumbnails = np.concatenate([blank(np.full(20000, 255)), 255 - random.integers(0, 3, (2000, 16, 16, 3))])
    thumbnails = thumbnails.astype(np.uint8)
    thumbnails[-2000:, ..., 1:] = 128
    groups = group_near_identical(perceptual_hashes(thumbnails), thumbnails)
    assert (groups == 0).all()


def test_search_matches_brute_force():
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**63, 20000, dtype=np.uint64)
    brightness = random.uniform(0, 255, 20000)
    for number in range(1100):  # 100 pairs per Hamming distance from 0 to 10 (limit: 8), of varying brightness
        flips = random.choice(63, number % 11, replace=False)
        if number % 11 == 8:  # one flip in all but one chunk of the hash
            flips = np.delete(np.arange(9) * 7 + random.integers(0, 7, 9), number // 11 % 9)
        hashes[2 * number + 1] = hashes[2 * number] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64))
        brightness[2 * number + 1] = brightness[2 * number] + random.uniform(-6, 6)
    pieces = list(near_hash_pairs(hashes, brightness))
    found = [tuple(sorted(pair)) for left, right in pieces for pair in zip(left.tolist(), right.tolist(), strict=True)]

    expected = set()
    for start in range(0, 20000, 1000):
        left, right = np.nonzero(abs(brightness[start : start + 1000, None] - brightness) <= 5)
        left += start
        differing = hashes[left] ^ hashes[right]
        bits = np.unpackbits(differing.view(np.uint8).reshape(-1, 8), axis=1).sum(1, dtype=np.uint8)
        near = (bits <= 8) & (left < right)
        expected |= set(zip(left[near].tolist(), right[near].tolist(), strict=True))
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert len(expected) > 700
