"""Splitting folders, class indices and pickles, and figures."""

import io
import json
import pickle
import random
import shutil
import unicodedata
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import as_another_user, write_classes, write_image
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as v1

import data_utils
from cli_utils import DataError
from data_utils import (
    plot_class_preds,
    plot_data_loader_image,
    read_class_indices,
    read_pickle,
    read_split_data,
    write_class_indices,
    write_pickle,
)
from dataset_split import find_split
from my_dataset import MEAN, STD, EvalTransform, MyDataSet
from plot_utils import class_distribution, labelled_images, predictions

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")  # class_indices.json is read and written there


@pytest.fixture
def shown(monkeypatch):
    """Collect the figures that plt.show() would display."""
    figures = []

    def show():
        figures.append(plt.gcf())
        plt.close()

    monkeypatch.setattr(plt, "show", show)
    return figures


# --- splitting --------------------------------------------------------------------------------------------------


def test_a_fifth_of_each_class_is_held_out(two_classes, capsys):
    train_paths, train_labels, val_paths, val_labels = read_split_data(str(two_classes))
    assert (train_labels.count(0), train_labels.count(1)) == (8, 12)
    assert (val_labels.count(0), val_labels.count(1)) == (2, 3)
    assert set(train_paths).isdisjoint(val_paths)
    assert sorted(train_paths + val_paths) == sorted(str(path) for path in two_classes.glob("*/*"))
    for path, label in zip(train_paths + val_paths, train_labels + val_labels, strict=True):
        assert Path(path).parent.name == ["cat", "dog"][label]
    assert capsys.readouterr().out.splitlines() == [
        "25 images were found in the dataset.",
        "20 images for training.",
        "5 images for validation.",
    ]
    assert Path("class_indices.json").read_text(encoding="utf-8") == '{\n    "0": "cat",\n    "1": "dog"\n}'


def test_split_samples_sorted_names_with_its_own_generator(two_classes):
    generator = random.Random(0)
    expected = []
    for name, count in (("cat", 2), ("dog", 3)):
        expected += sorted(generator.sample(sorted(str(path) for path in (two_classes / name).iterdir()), k=count))
    random.seed(1)
    state = random.getstate()
    assert read_split_data(two_classes)[2] == expected
    assert random.getstate() == state


def test_split_is_independent_of_directory_order(two_classes, monkeypatch):
    expected = read_split_data(two_classes)
    iterdir = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: reversed(list(iterdir(self))))
    assert read_split_data(two_classes) == expected


@pytest.mark.parametrize(("val_rate", "held_out"), [(0.5, 12), (0.1, 2), (0.0, 0), (0.99, 23)])
def test_val_rate(two_classes, val_rate, held_out):
    assert len(read_split_data(two_classes, val_rate)[2]) == held_out


def test_image_extensions_are_case_insensitive(tmp_path):
    names = ["a.jpg", "b.JPEG", "c.Png", "d.webp", "e.bmp", "f.GIF", "g.tif", "h.TIFF"]
    for name in [*names, "i.txt", "Thumbs.db", ".hidden.jpg", "._a.jpg", "nameless"]:
        (tmp_path / "data" / "x").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "x" / name).write_bytes(b"")
    write_classes(tmp_path / "data", {"y": 1})
    train_paths, *_ = read_split_data(tmp_path / "data", val_rate=0)
    assert [Path(path).name for path in train_paths if "x" in Path(path).parts[-2]] == names


def test_hidden_folders_and_macosx_are_not_classes(two_classes):
    write_classes(two_classes, {".cache": 1, "__MACOSX": 1})
    write_image(two_classes / "stray.png")
    assert set(read_split_data(two_classes)[1]) == {0, 1}
    assert read_class_indices() == ["cat", "dog"]


def test_class_names_with_special_characters(tmp_path):
    names = ["a b", "Ä", "向日葵", "$x$"]
    write_classes(tmp_path / "data", dict.fromkeys(names, 5))
    read_split_data(tmp_path / "data")
    assert read_class_indices() == sorted(names)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "needs at least two sub-folders.*found none"),
        ({"cat": 5}, "needs at least two sub-folders.*only one, cat"),
        ({"cat": 5, "dog": 0, "cow": 0}, "no image in class cow, dog; .*move that folder elsewhere"),
        ({"cat": 1, "dog": 1}, "too few images per class to hold out any for validation"),
    ],
)
def test_invalid_folders_are_rejected(tmp_path, counts, message):
    (tmp_path / "data").mkdir()
    for name in counts:
        (tmp_path / "data" / name).mkdir()
    write_classes(tmp_path / "data", counts)
    with pytest.raises(DataError, match=message) as caught:
        read_split_data(tmp_path / "data")
    assert len(str(caught.value).splitlines()) == 1
    assert not Path("class_indices.json").exists()


@pytest.mark.parametrize("val_rate", [1e-7, 0.2])
def test_one_image_of_a_small_class_is_held_out(tmp_path, val_rate):
    folder = write_classes(tmp_path / "data", {"cat": 1, "cow": 2, "dog": 4, "fox": 5})
    split, _ = find_split(folder, val_rate=val_rate)
    assert split.count() == {"cat": (1, 0, 0), "cow": (1, 1, 0), "dog": (3, 1, 0), "fox": (4, 1, 0)}


def test_invalid_path_or_val_rate(tmp_path, two_classes):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_split_data(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="a file, not a folder"):
        read_split_data(write_image(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="val_rate is 1"):
        read_split_data(two_classes, 1)


@pytest.mark.parametrize("locked", [".", "cat"])
def test_folder_without_read_permission(open_folder, locked):
    write_classes(open_folder, {"cat": 5, "dog": 5})
    (open_folder / locked).chmod(0)
    with as_another_user(), pytest.raises(PermissionError, match="no permission to read this folder"):
        read_split_data(open_folder)


def test_train_and_val_folders_are_recognised(tmp_path):
    write_classes(tmp_path / "data" / "train", {"cat": 3, "dog": 2})
    write_classes(tmp_path / "data" / "valid", {"dog": 2})  # labels follow the training folder's classes
    (tmp_path / "data" / "valid" / "cat").mkdir()
    write_image(tmp_path / "data" / "valid" / "cat" / "a.png")
    split, line = find_split(tmp_path / "data")
    assert (split.class_names, split.train_labels, split.val_labels) == (["cat", "dog"], [0, 0, 0, 1, 1], [0, 1, 1])
    assert line == f"from {tmp_path / 'data' / 'valid'}"


def test_folder_without_classes_is_not_used_for_validation(tmp_path):
    write_classes(tmp_path / "data" / "train", {"cat": 5, "dog": 5})
    write_image(tmp_path / "data" / "test" / "1.png")
    split, line = find_split(tmp_path / "data")
    assert (split.class_names, split.val_labels) == (["cat", "dog"], [0, 1])
    assert line == f"20% of each class in {tmp_path / 'data' / 'train'}, held out"


def test_classes_may_be_named_train_and_test(tmp_path):
    write_classes(tmp_path / "data", {"train": 5, "test": 5})
    assert find_split(tmp_path / "data")[0].class_names == ["test", "train"]


def test_separate_validation_folder(tmp_path, two_classes):
    write_classes(tmp_path / "val", {"cat": 1, "dog": 2})
    split, line = find_split(two_classes, tmp_path / "val")
    assert (len(split.train_paths), split.val_labels) == (25, [0, 1, 1])
    assert line == f"from {tmp_path / 'val'}"
    write_classes(tmp_path / "val", {"cow": 1})
    with pytest.raises(DataError, match=r"classes missing from .*pets: cow"):
        find_split(two_classes, tmp_path / "val")


def test_validation_folder_may_lack_a_class(tmp_path, two_classes):
    write_classes(tmp_path / "val", {"dog": 2})
    split, _ = find_split(two_classes, tmp_path / "val")
    assert split.val_labels == [1, 1]


def test_split_of_the_photographs(flower_photos):
    split, _ = find_split(flower_photos)
    assert split.class_names == ["daisy", "dandelion", "roses", "sunflowers", "tulips"]
    counts = [split.val_labels.count(label) for label in range(5)]
    assert counts == [int(len(list((flower_photos / name).iterdir())) * 0.2) for name in split.class_names]


# --- files ------------------------------------------------------------------------------------------------------


def test_class_indices_round_trip():
    names = [f"class {index}" for index in range(12)]  # "10" sorts before "2"
    write_class_indices(names)
    assert read_class_indices() == names


def test_class_indices_match_the_tutorial_format(two_classes):
    read_split_data(two_classes)
    assert json.loads(Path("class_indices.json").read_text(encoding="utf-8")) == {"0": "cat", "1": "dog"}


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", '{"1": "a"}', '{"0": 1}', '{"0": "a", "2": "b"}', "[" * 100_000])
def test_invalid_class_indices(text):
    Path("class_indices.json").write_text(text)
    with pytest.raises(DataError, match=r"class_indices\.json: not of the form"):
        read_class_indices()
    with pytest.raises(FileNotFoundError, match=r"other\.json: no such file"):
        read_class_indices("other.json")


def test_pickles_round_trip():
    value = ["a.jpg", {"b": (1, 2.5, None, True)}, ["日"]]
    write_pickle(value, "list.pkl")
    assert read_pickle("list.pkl") == value


def test_pickles_cannot_execute_code():
    class Payload:
        def __reduce__(self):
            return open, ("marker", "w")

    for value in (Payload(), [Payload()], {"a": print}):
        Path("bad.pkl").write_bytes(pickle.dumps(value))
        with pytest.raises(DataError, match=r"bad\.pkl: not a pickle of plain values"):
            read_pickle("bad.pkl")
    assert not Path("marker").exists()
    Path("bad.pkl").write_bytes(b"\x80garbage")
    with pytest.raises(DataError):
        read_pickle("bad.pkl")
    with pytest.raises(FileNotFoundError):
        read_pickle("missing.pkl")


# --- figures ----------------------------------------------------------------------------------------------------


def test_class_distribution(two_classes, shown):
    read_split_data(two_classes, plot_image=True)
    axes = shown[0].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cat", "dog"]
    assert [bar.get_height() for bar in axes.patches] == [10, 15]
    assert [text.get_text() for text in axes.texts] == ["10", "15"]


def test_class_names_are_escaped_in_figures():
    name, shown = "$x$ \x1b[31m\n\u202eé", r"$x$ \x1b[31m\n\u202eé"
    picture = np.zeros((1, 4, 4, 3), np.uint8)
    assert class_distribution([name], [1]).axes[0].get_xticklabels()[0].get_text() == shown
    assert labelled_images(picture, [name]).axes[0].get_xlabel() == shown
    assert predictions(picture, [name], [1.0], [name]).axes[0].get_title() == f"{shown}, 100.00%\n(label: {shown})"


@pytest.mark.parametrize("kind", ["uint8", "normalised"])
def test_images_of_a_loader_are_plotted(tmp_path, shown, kind):
    colours = [(200, 30, 10), (10, 90, 200), (250, 250, 250), (0, 0, 0), (9, 99, 9)]
    paths = []
    for index, colour in enumerate(colours):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{index}.png")
        paths.append(tmp_path / f"{index}.png")
    write_class_indices(["cat", "do$g$"])
    float_transform = v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD)])
    transform = EvalTransform(32) if kind == "uint8" else float_transform
    data_set = MyDataSet(paths, [0, 1, 0, 1, 1], transform)
    plot_data_loader_image(DataLoader(data_set, batch_size=5, collate_fn=data_set.collate_fn))
    assert len(shown) == 1
    assert [axes.get_xlabel() for axes in shown[0].axes] == ["cat", "do$g$", "cat", "do$g$"]
    assert [tuple(axes.images[0].get_array()[0, 0].tolist()) for axes in shown[0].axes] == colours[:4]
    shown[0].savefig(io.BytesIO())


class Brightness(torch.nn.Module):
    """Predicts "dark" (0) or "light" (1), and records whether it ran in training mode or with gradients."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout()
        self.asked_in_training = []

    def forward(self, images):
        self.asked_in_training.append(self.training or torch.is_grad_enabled())
        light = images.mean((1, 2, 3))
        return torch.stack([-light, light], 1)


@pytest.fixture
def plot_img(tmp_path):
    """Create two dark and two light images, with a wrong label for the last one."""
    folder = tmp_path / "plot_img"
    folder.mkdir()
    for index, grey in enumerate((10, 240, 30, 250)):
        Image.new("RGB", (50, 40), (grey,) * 3).save(folder / f"{index}.png")
    (folder / "label.txt").write_text("0.png dark\n1.png light\n\n2.png\t dark\n3.png dark\n", encoding="utf-8")
    write_class_indices(["dark", "light"])
    return folder


FLOAT_TRANSFORM = v1.Compose([v1.Resize(36), v1.CenterCrop(32), v1.ToTensor(), v1.Normalize(MEAN, STD)])


@pytest.mark.parametrize("transform", [FLOAT_TRANSFORM, EvalTransform(32)])
def test_prediction_figure(plot_img, transform):
    net = Brightness().train()
    net.dropout.eval()
    figure = plot_class_preds(net, str(plot_img), transform, num_plot=5, device="cpu")
    titles = [axes.get_title() for axes in figure.axes]
    assert [title.split("\n")[1] for title in titles] == [
        f"(label: {name})" for name in ("dark", "light", "dark", "dark")
    ]
    mean = (240 / 255 - sum(MEAN) / 3) / (sum(STD) / 3)
    assert titles[1].split(", ")[0] == "light"
    assert float(titles[1].split(", ")[1].split("%")[0]) == pytest.approx(100 / (1 + 2.718282 ** (-2 * mean)), abs=0.3)
    assert [axes.title.get_color() for axes in figure.axes] == ["green", "green", "green", "red"]
    marks = [axes.get_xlabel() for axes in figure.axes]
    assert marks[0] == marks[1] == marks[2] != marks[3]
    assert [int(axes.images[0].get_array()[5, 5, 0]) for axes in figure.axes] == [10, 240, 30, 250]
    assert net.asked_in_training == [False]
    assert net.training
    assert not net.dropout.training
    assert plt.fignum_exists(figure.number)  # so that plt.show() shows it
    figure.savefig(io.BytesIO())
    plt.close(figure)


def test_prediction_figure_skips_unusable_lines(plot_img, capsys):
    (plot_img / "broken.png").write_bytes(b"no image")
    lines = ["gone.png dark", "0.png purple", "alone", "broken.png dark", "1.png light", "3.png light", "2.png dark"]
    (plot_img / "label.txt").write_text("\n".join(lines), encoding="utf-8")
    figure = plot_class_preds(Brightness(), plot_img, FLOAT_TRANSFORM, num_plot=2)
    assert [axes.get_title().split("\n")[1] for axes in figure.axes] == ["(label: light)"] * 2
    printed = capsys.readouterr().out.splitlines()
    assert ["gone.png" in printed[0], "purple" in printed[1], "alone" in printed[2], "broken.png" in printed[3]] == [
        True
    ] * 4
    assert len(printed) == 4
    plt.close(figure)


def test_label_file_with_spaces_in_names(plot_img):
    write_class_indices(["dark", "very dark", "light"])
    write_image(plot_img / "a very.png")
    write_image(plot_img / "my cat.png")
    (plot_img / "0.png").rename(plot_img / "x.png very")
    write_image(plot_img / "both.png")
    shutil.copy(plot_img / "both.png", plot_img / "both.png very")  # ambiguous: the longest class name wins
    lines = ["my cat.png very dark", "a very.png dark", "x.png very dark", "both.png very dark"]
    (plot_img / "label.txt").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    labelled, problems = data_utils.read_label_file(plot_img, read_class_indices())
    assert [(Path(path).name, name) for path, name in labelled] == [
        ("my cat.png", "very dark"),
        ("a very.png", "dark"),
        ("x.png very", "dark"),
        ("both.png", "very dark"),
    ]
    assert problems == []


def test_label_file_with_accents_composed_differently(plot_img):
    composed, decomposed = (unicodedata.normalize(form, "rosé") for form in ("NFC", "NFD"))
    write_image(plot_img / f"{composed} 1.png")
    write_image(plot_img / f"{decomposed} 2.png")
    lines = [f"{decomposed} 1.png {decomposed}", f"{composed} 2.png {composed}", f"{decomposed} 2.png {composed}"]
    (plot_img / "label.txt").write_text("\n".join(lines), encoding="utf-8")
    labelled, problems = data_utils.read_label_file(plot_img, [composed])
    assert problems == []
    assert [(Path(path).is_file(), name) for path, name in labelled] == [(True, composed)] * 3


def test_missing_prediction_figure_is_explained(plot_img, tmp_path, capsys):
    def explanation(folder):
        assert plot_class_preds(Brightness(), folder, FLOAT_TRANSFORM) is None
        return capsys.readouterr().out

    assert "nowhere: no such folder" in explanation(tmp_path / "nowhere")
    assert "label.txt: no such file" in explanation(tmp_path / "here")
    (plot_img / "label.txt").write_text("0.png purple\n")
    assert "no usable line" in explanation(plot_img)
    (plot_img / "label.txt").write_bytes(b"\xff\xfe0")
    assert "UTF-8" in explanation(plot_img)
    (plot_img / "label.txt").write_text("../secret.png dark\n")
    write_image(plot_img.parent / "secret.png")
    assert "'../secret.png' is outside the folder" in explanation(plot_img)
    Path("class_indices.json").unlink()
    assert "nowhere: no such folder" in explanation(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"class_indices\.json"):
        plot_class_preds(Brightness(), plot_img, FLOAT_TRANSFORM)
