"""The folds of a cross-validation."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from conftest import write_classes

from cli_utils import DataError
from cross_validate import parse_args
from folds import draw_folds, draw_subset, find_images, require_divisible, require_listable, write_fold
from tables import read_table


def draw(counts: list[int], pairs: int, folds: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw folds of `counts[i]` images of class i; the first 2 * `pairs` images, of any class, are pairs of duplicates.

    Returns:
        The labels, the groups and the folds.
    """
    labels = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng(seed).shuffle(labels)
    groups = np.arange(len(labels))
    groups[1 : 2 * pairs : 2] = groups[0 : 2 * pairs : 2]
    return labels, groups, draw_folds(labels, groups, folds, seed)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("folds", [2, 5, 10])
def test_folds_are_stratified_and_of_equal_size(folds, seed):
    labels, _, drawn = draw([100, 57, 12, 31], 0, folds, seed)
    assert sorted(set(drawn)) == list(range(folds))
    sizes = np.bincount(drawn)
    assert sizes.max() - sizes.min() <= 4
    for label in range(4):
        counts = np.bincount(drawn[labels == label], minlength=folds)
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("seed", range(5))
def test_duplicates_share_a_fold(seed):
    labels, groups, drawn = draw([60, 60], 20, 5, seed)
    assert all(len(set(drawn[groups == group])) == 1 for group in groups)
    for label in range(2):
        counts = np.bincount(drawn[labels == label], minlength=5)
        assert counts.max() - counts.min() <= 4


def test_folds_depend_on_the_seed_only():
    first, again, other = (draw([50, 50], 5, 5, 0)[2], draw([50, 50], 5, 5, 0)[2], None)
    labels, groups, _ = draw([50, 50], 5, 5, 0)
    other = draw_folds(labels, groups, 5, seed=1)
    assert (first == again).all()
    assert (first != other).any()


def test_subsets_are_nested_and_stratified():
    labels = np.repeat([0, 1, 2], [80, 33, 3])
    subsets = [draw_subset(labels, divisor, seed=4) for divisor in (1, 2, 4, 8)]
    assert subsets[0].all()
    for larger, smaller in itertools.pairwise(subsets):
        assert (larger | ~smaller).all()
    assert [np.bincount(labels[subset]).tolist() for subset in subsets[1:]] == [[40, 17, 2], [20, 9, 1], [10, 5, 1]]
    assert (draw_subset(labels, 2, seed=5) != subsets[1]).any()


def test_tables_of_the_folds_cover_each_image_once(tmp_path):
    root = write_classes(tmp_path / "data", {"cat": 7, "dog, big": 6})
    (root / "cat" / "copy.png").write_bytes((root / "dog, big" / "dog, big 00.png").read_bytes())
    images = find_images(parse_args(["--data-path", str(root), "--workers", "0"]), tmp_path / "known.json")
    folds = draw_folds(images.labels, images.groups, 3, seed=0)
    held_out = []
    for fold in range(3):
        write_fold(images, folds, fold, tmp_path / "fold.csv")
        rows = read_table(tmp_path / "fold.csv")
        assert sorted(row.path for row in rows) == sorted(images.paths)
        assert all(row.label in row.path for row in rows if "copy" not in row.path)
        held_out.append({row.path for row in rows if row.subset == "val"})
    assert sorted(path for paths in held_out for path in paths) == sorted(images.paths)
    copies = {str(root / "cat" / "copy.png"), str(root / "dog, big" / "dog, big 00.png")}
    assert sum(copies <= paths for paths in held_out) == 1


def test_class_in_one_fold_only_is_an_error(tmp_path):
    root = write_classes(tmp_path / "data", {"cat": 5, "dog": 1})
    (root / "dog" / "copy.png").write_bytes((root / "dog" / "dog 00.png").read_bytes())
    images = find_images(parse_args(["--data-path", str(root), "--workers", "0"]), tmp_path / "known.json")
    with pytest.raises(DataError, match="class dog: needs at least two images that show different pictures"):
        require_divisible(images, draw_folds(images.labels, images.groups, 3, seed=0), 3)


@pytest.mark.parametrize("name", ["cat/a\udcff.png", "cat /a.png"])
def test_names_that_a_table_cannot_hold_are_an_error(tmp_path, name):
    root = write_classes(tmp_path / "data", {"cat": 3, "dog": 3})
    (root / "cat" / "cat 00.png").rename(root / "cat" / "a.png")
    (root / "cat").rename(root / Path(name).parent)
    (root / Path(name).parent / "a.png").rename(root / name)
    images = find_images(parse_args(["--data-path", str(root), "--workers", "0"]), tmp_path / "known.json")
    with pytest.raises(DataError, match="a table cannot list this name"):
        require_listable(images)
