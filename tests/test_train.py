"""`train.main` in this process: reproducibility, data, initial weights and user errors."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import read_events, write_classes, write_image
from PIL import Image

import predict
import prepare_data
import tensorboard_logger
import train
from data_loading import build_train_loader
from data_utils import choose_figure_images
from dataset_split import find_split
from distributed import Distributed
from image_io import read_image
from inference import run_inference
from model import MODELS, named_convolutions
from my_dataset import EvalTransform, MyDataSet, TrainTransform
from sample_flowers import draw_sample
from weights_io import load_model

pytestmark = pytest.mark.usefixtures("in_an_empty_folder", "small_network", "blank_figures")
PROGRAM = Path(train.__file__)
TINY = ["--model", "resnet18", "--img-size", "32", "--device", "cpu", "--workers", "0"]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "weights" / "last.pth", weights_only=True)["state_dict"]


def assert_same_weights(one: Path, other: Path) -> None:
    for (name, a), b in zip(weights_of(one).items(), weights_of(other).values(), strict=True):
        assert torch.equal(a, b), name


def test_histograms_all_covers_every_convolution(no_figures, two_classes):
    assert train.main(["--data-path", str(two_classes), *TINY, "--epochs", "1", "--histograms", "all"]) == 0
    tags = read_events(Path("runs/flower_experiment")).Tags()["histograms"]
    names = set(named_convolutions(MODELS["resnet18"](num_classes=2)))
    assert set(tags) == names | {f"gradients/{name}" for name in names}


def test_a_small_network_learns_the_sample(no_figures, tmp_path):
    """The accuracy of guessing is 0.2."""
    data = draw_sample(tmp_path / "sample", images_per_class=40, size=72)
    flags = [
        "--data-path",
        str(data),
        *TINY,
        "--recipe",
        "scratch",
        "--img-size",
        "48",
        "--batch-size",
        "16",
        "--amp",
        "off",
    ]
    assert train.main([*flags, "--epochs", "10"]) == 0
    last = torch.load("runs/flower_experiment/weights/last.pth", weights_only=True)
    assert last["accuracy"] >= 0.4


# --- reproducibility --------------------------------------------------------------------------------------------


def test_weights_depend_on_the_flags_only(no_figures, two_classes):
    flags = ["--data-path", str(two_classes), *TINY, "--batch-size", "4", "--epochs", "2", "--seed", "7"]
    assert train.main(flags) == 0
    torch.rand(3)  # the global random state must not matter
    assert train.main([*flags, "--workers", "2"]) == 0
    assert_same_weights(Path("runs/flower_experiment"), Path("runs/flower_experiment-2"))
    assert train.main([*flags, "--seed", "8", "--epochs", "1", "--name", "other"]) == 0
    one, other = (weights_of(Path("runs", name))["conv1.weight"] for name in ("flower_experiment", "other"))
    assert not torch.equal(one, other)


def test_batches_do_not_depend_on_how_workers_start(sample):
    args = train.parse_args(["--data-path", str(sample), *TINY[:-1], "1"])
    split, _ = find_split(sample)
    images = MyDataSet(split.train_paths, split.train_labels, TrainTransform(32))
    batches = []
    for context in ("fork", "spawn") if os.name == "posix" else ("spawn",):
        loader = build_train_loader(args, images, torch.device("cpu"), Distributed())
        loader.multiprocessing_context = context
        batches.append(list(loader))
    args.workers = 0
    batches.append(list(build_train_loader(args, images, torch.device("cpu"), Distributed())))
    for others in batches[1:]:
        for (pixels, labels), (others_pixels, others_labels) in zip(batches[0], others, strict=True):
            assert torch.equal(pixels, others_pixels)
            assert torch.equal(labels, others_labels)


@pytest.mark.parametrize("amp", ["on", "off"])
def test_mixed_precision_is_reproducible(no_figures, two_classes, capsys, amp):
    flags = ["--data-path", str(two_classes), *TINY, "--batch-size", "4", "--epochs", "1", "--amp", amp]
    assert train.main(flags) == 0
    assert f"precision    {'bfloat16' if amp == 'on' else 'float32 (--amp off)'}" in capsys.readouterr().out
    assert train.main([*flags, "--workers", "1"]) == 0
    assert_same_weights(Path("runs/flower_experiment"), Path("runs/flower_experiment-2"))


def test_a_last_batch_of_one_image_is_dropped(tmp_path):
    data = write_classes(tmp_path / "data", {"cat": 3, "dog": 6})
    assert train.main(["--data-path", str(data), *TINY, "--epochs", "1", "--batch-size", "7"]) == 0


# --- data -------------------------------------------------------------------------------------------------------


def test_header_names_risks(no_figures, tmp_path, capsys):
    data = write_classes(tmp_path / "arrows", {"to the left": 12, "right arrow": 2})
    assert train.main(["--data-path", str(data), *TINY, "--epochs", "1", "--class-weights", "1"]) == 0
    output = capsys.readouterr().out
    assert "a horizontal flip may turn left into right: pass --hflip 0" in output
    assert "10 images of to the left, but 1 of right arrow: accuracy hides rare classes" in output
    assert "consider --best-metric macro_f1 and --class-weights 0.5\n" in output
    assert "loss weights right arrow 5.5, to the left 0.55" in output
    quiet = ["--hflip", "0", "--best-metric", "macro_f1"]
    assert train.main(["--data-path", str(data), *TINY, "--epochs", "1", *quiet]) == 0
    output = capsys.readouterr().out
    assert "flip" not in output
    assert "rare" not in output
    assert "loss weights" not in output


def test_resize_is_kept_for_prediction(no_figures, tmp_path, capsys):
    """What tells the classes apart lies at the ends of wide images, which a centre crop cuts off."""
    for label, (name, colour) in enumerate((("blue", "blue"), ("red", "red"))):
        (tmp_path / "ends" / name).mkdir(parents=True)
        for index in range(6):
            image = Image.effect_noise((200, 40), 40 + 10 * index + label).convert("RGB")
            image.paste(colour, (0, 0, 20, 40))
            image.save(tmp_path / "ends" / name / f"{index}.png")
    flags = ["--data-path", str(tmp_path / "ends"), *TINY, "--epochs", "1", "--resize", "stretch"]
    assert train.main(flags) == 0
    best = torch.load("runs/flower_experiment/weights/best.pth", weights_only=True)
    assert best["resize"] == "stretch"
    path = tmp_path / "ends" / "red" / "0.png"
    assert predict.main([str(path), "--json", "--amp", "off", "--uncalibrated"]) == 0
    top = json.loads(capsys.readouterr().out.splitlines()[-1])["top"]
    model, _ = load_model("runs/flower_experiment/weights/best.pth")
    pixels = EvalTransform(best["img_size"], "stretch")(read_image(path))
    expected = run_inference(model, [(pixels[None], torch.tensor([1]))], "cpu").logits.softmax(1)[0]
    assert {entry["class"]: entry["probability"] for entry in top} == pytest.approx(
        dict(zip(["blue", "red"], expected.tolist(), strict=True)), abs=1e-4
    )


def test_sample_data_is_drawn_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(prepare_data, "SAMPLE", tmp_path / "data" / "sample")
    drawn = []

    def draw(folder):
        drawn.append(folder)
        return write_classes(folder, {"daisy": 5, "roses": 5})

    monkeypatch.setattr(prepare_data, "draw_sample", draw)
    for _ in range(2):
        assert train.main([*TINY, "--epochs", "1"]) == 0
        assert "--data-path FOLDER" in capsys.readouterr().out
    assert drawn == [tmp_path / "data" / "sample"]


def test_separate_validation_folders(tmp_path, capsys):
    data = write_classes(tmp_path / "pets" / "train", {"cat": 4, "a dog": 3}).parent
    write_classes(data / "val", {"cat": 1, "a dog": 2})
    assert train.main(["--data-path", str(data), *TINY, "--epochs", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"7 for training, 3 for validation (from {data / 'val'})" in printed
    assert len(read_events(Path("runs/flower_experiment")).Images("predictions vs. actuals")) == 1
    write_classes(tmp_path / "mine", {"cat": 2})
    assert train.main(["--data-path", str(data), "--val-path", str(tmp_path / "mine"), *TINY, "--epochs", "1"]) == 0
    assert f"7 for training, 2 for validation (from {tmp_path / 'mine'})" in capsys.readouterr().out


def test_figure_images_are_plot_img_or_one_per_class(two_classes, sample):
    split, _ = find_split(sample)
    data_set = MyDataSet(split.val_paths, split.val_labels, EvalTransform(32))
    images, names = choose_figure_images(data_set, split.class_names, tensorboard_logger.PLOT_IMG)
    assert images.shape == (5, 3, 32, 32)
    assert sorted(names) == split.class_names
    split, _ = find_split(two_classes)
    data_set = MyDataSet(split.val_paths, split.val_labels, EvalTransform(32))
    images, names = choose_figure_images(data_set, split.class_names, tensorboard_logger.PLOT_IMG)
    assert images.shape == (2, 3, 32, 32)
    assert names == ["cat", "dog"]


@pytest.mark.parametrize("damage", ["label.txt", "photograph"])
def test_corrupt_file_in_plot_img_does_not_stop_training(two_classes, tmp_path, monkeypatch, capsys, damage):
    picture = write_image(tmp_path / "plot_img" / "a.png")
    (tmp_path / "plot_img" / "label.txt").write_text("a.png cat", encoding="utf-16" if damage == "label.txt" else None)
    if damage == "photograph":
        picture.write_bytes(b"")
    monkeypatch.setattr(tensorboard_logger, "PLOT_IMG", tmp_path / "plot_img")
    assert train.main(["--data-path", str(two_classes), *TINY, "--epochs", "1"]) == 0
    assert "shows validation images instead" in capsys.readouterr().out
    assert len(read_events(Path("runs/flower_experiment")).Images("predictions vs. actuals")) == 1


def test_download_runs_before_training(no_figures, two_classes, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "download_flower_photos", lambda root: two_classes.rename(root))
    assert train.main(["--download", "--data-path", str(tmp_path / "new"), *TINY, "--epochs", "1"]) == 0
    assert (tmp_path / "new" / "cat").is_dir()


# --- weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["tutorial", "scratch"])  # finetune caches features and has its own test
def test_frozen_backbone_keeps_its_initial_weights(no_figures, two_classes, tmp_path, recipe, capsys):
    source = MODELS["resnet18"](num_classes=9)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    flags = ["--data-path", str(two_classes), *TINY, "--epochs", "1", "--weights", str(tmp_path / "w.pth")]
    assert train.main([*flags, "--freeze-layers", "--recipe", recipe]) == 0
    printed = capsys.readouterr().out
    assert "w.pth except fc.weight, fc.bias, which have a different number of classes; only fc is trained" in printed
    assert "warning" not in printed
    for name, value in weights_of(Path("runs/flower_experiment")).items():
        if not name.startswith("fc."):
            assert torch.equal(value, source.state_dict()[name]), name
    assert train.main([*flags, "--freeze-layers", "False", "--recipe", recipe]) == 0
    moved = weights_of(Path("runs/flower_experiment-2"))
    assert not torch.equal(moved["conv1.weight"], source.state_dict()["conv1.weight"])


def test_frozen_random_backbone_prints_a_warning(no_figures, two_classes, capsys):
    assert (
        train.main(["--data-path", str(two_classes), *TINY, "--epochs", "1", "--freeze-layers", "--weights", ""]) == 0
    )
    assert "warning: --freeze-layers without --weights freezes a random backbone" in capsys.readouterr().out


def test_plain_weights_of_a_run(no_figures, two_classes, capsys):
    """A model-N.pth is predicted like best.pth, and `fc` starts afresh for classes with other names."""
    flags = ["--data-path", str(two_classes), *TINY, "--epochs", "1"]
    assert train.main([*flags, "--save-every", "1"]) == 0
    folder = Path("runs/flower_experiment")
    network = json.loads((folder / "args.json").read_text(encoding="utf-8"))["network"]
    expected = {"model": "resnet18", "class_names": ["cat", "dog"], "img_size": 32, "resize": "crop"}
    assert network == expected | {"pixel_range": None}
    capsys.readouterr()
    outputs = []
    for name in ("best.pth", "model-0.pth"):
        weights = str(folder / "weights" / name)
        assert predict.main([str(two_classes), "--weights", weights, "--device", "cpu", "--uncalibrated"]) == 0
        outputs.append(capsys.readouterr())
        assert outputs[-1].err.startswith(f"weights {folder / 'weights' / name}: resnet18, 2 classes, 32 px")
    assert outputs[0].out == outputs[1].out

    (two_classes / "cat").rename(two_classes / "zebra")
    plain = str(folder / "weights" / "model-0.pth")
    assert train.main([*flags, "--weights", plain]) == 0
    assert f"weights of {plain} except fc.weight, fc.bias, which have other classes" in capsys.readouterr().out


# --- user errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["--epochs", "0"],
        ["--epochs", "-1"],
        ["--epochs", "many"],
        ["--batch-size", "0"],
        ["--batch_size", "-3"],
        ["--batch-size", "1", "--img-size", "32"],
        ["--lr", "-0.1"],
        ["--lr", "0"],
        ["--lr", "nan"],
        ["--lr", "inf"],
        ["--lrf", "-1"],
        ["--data-path", ""],
        ["--val-path", ""],
        ["--val-rate", "0"],
        ["--val-rate", "1"],
        ["--workers", "-1"],
        ["--seed", "-1"],
        ["--img-size", "8"],
        ["--num-classes", "1"],
        ["--save-every", "-1"],
        ["--name", "../elsewhere"],
        ["--name", ""],
        ["--model", "vgg16"],
        ["--freeze-layers", "perhaps"],
        ["--no-such-flag"],
    ],
)
def test_invalid_flags_are_one_line_errors(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        train.main(flags)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("train.py: error: ")
    assert flags[0].replace("_", "-") in said
    assert len(said.splitlines()) == 1
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-path", "nowhere"], "nowhere: no such folder"),
        (["--data-path", "a.png"], "a.png: a file, not a folder"),
        (["--data-path", "loop"], "loop: no such folder"),
        (["--data-path", "empty"], "needs at least two sub-folders"),
        (["--data-path", "hollow"], "no image in class dog; if it is not a class, move that folder elsewhere"),
        (["--data-path", "few"], "too few images per class"),
        (["--val-path", "nowhere"], "nowhere: no such folder"),
        (["--num-classes", "3"], "--num-classes is 3, but the data has 2 classes"),
        (["--weights", "resNet34.pth"], "resNet34.pth: no such weights file"),
        (["--weights", "a.png"], "a.png: not a PyTorch weights file"),
        (["--device", "gpu"], "--device gpu"),
        (["--download"], "not an empty folder"),
        (["--allow-changed-data"], "--allow-changed-data has no effect without --resume"),
    ],
)
def test_user_errors_are_one_line_and_write_nothing(two_classes, flags, message, capsys):
    Path("empty").mkdir()
    Path("loop").symlink_to("loop")
    write_image(Path("a.png"))
    write_classes(Path("hollow"), {"cat": 1})
    Path("hollow/dog").mkdir()
    write_classes(Path("few"), {"cat": 1, "dog": 1})
    before = sorted(Path().rglob("*"))
    assert train.main(["--data-path", str(two_classes), *TINY, *flags]) == 1
    said = capsys.readouterr().err
    assert said.startswith("train.py: error: ")
    assert message in said
    assert len(said.splitlines()) == 1
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("batch_size", ["4", "32"])  # fails in a later step, or in evaluation after the only step
def test_divergence_is_a_one_line_error_and_not_saved(two_classes, capsys, batch_size):
    flags = ["--data-path", str(two_classes), *TINY, "--epochs", "30", "--lr", "1e25", "--batch-size", batch_size]
    assert train.main(flags) == 1
    assert [path.name for path in Path("runs/flower_experiment/weights").iterdir()] == ["last.pth"]
    assert all(value.isfinite().all() for value in weights_of(Path("runs/flower_experiment")).values())
    said = capsys.readouterr().err
    assert "training diverged" in said
    assert "learning rate 1e+25" in said
    assert len(said.splitlines()) == 1


def test_a_file_named_runs_is_an_error(two_classes, capsys):
    Path("runs").write_text("a file")
    assert train.main(["--data-path", str(two_classes), *TINY, "--epochs", "1"]) == 1
    assert "runs" in capsys.readouterr().err
