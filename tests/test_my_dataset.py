"""The dataset, its transforms and normalisation, the sampler, and the image cache."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_image
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from test_image_io import jpeg
from torch.utils.data import DataLoader
from torchvision import transforms as v1

from data_loading import EpochSampler, SafeImages
from image_cache import HAS_CACHE, ImageCache
from image_io import ImageError, read_image
from my_dataset import (
    MEAN,
    STD,
    EvalTransform,
    MyDataSet,
    TrainTransform,
    copy_to_device,
    prepare_batch,
    to_pixels,
)


def broken_files(folder: Path) -> dict[str, Path]:
    good = write_image(folder / "good.png", (200, 200)).read_bytes()
    contents = {
        "truncated.png": good[: len(good) // 2],
        "empty.jpg": b"",
        "text.jpg": b"hello",
        "header.png": good[:40],
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in [*contents, "missing.jpg"]}


@pytest.mark.parametrize(
    ("name", "workers"),
    [("truncated.png", 0), ("empty.jpg", 0), ("text.jpg", 0), ("header.png", 0), ("missing.jpg", 0), ("text.jpg", 1)],
)
def test_unreadable_file_raises_a_one_line_error(tmp_path, name, workers):
    data_set = MyDataSet([broken_files(tmp_path)[name]], [0], EvalTransform(32))
    loader = DataLoader(data_set, num_workers=workers, collate_fn=MyDataSet.collate_fn)
    with pytest.raises(ImageError) as caught:
        next(iter(loader))
    assert str(caught.value).startswith("cannot read image ")
    assert name in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_construction_does_not_decode_images(tmp_path, monkeypatch):
    paths = [write_image(tmp_path / "a.png"), write_image(tmp_path / "b.png", (440, 40))]
    monkeypatch.setattr(PngImageFile, "load", lambda image: pytest.fail("decoded"))
    assert MyDataSet(paths, [0, 1]).images_path == paths[:1]


@pytest.mark.parametrize("orientation", [1, 6])
def test_downscaled_decoding_gives_the_same_image(tmp_path, orientation):
    path, transform = jpeg(tmp_path / "a.jpg", orientation=orientation), EvalTransform(64)
    full, scaled = read_image(path), read_image(path, transform.min_side)
    assert scaled.width == full.width / 8
    assert (transform(full).int() - transform(scaled).int()).abs().float().mean() < 2


def test_items_and_attributes(tmp_path):
    paths = [str(write_image(tmp_path / f"{i}.png", (50, 40), seed=i)) for i in range(3)]
    data_set = MyDataSet(paths, [0, 1, 1])
    assert len(data_set) == 3
    assert data_set.images_path == paths
    assert data_set.images_class == [0, 1, 1]
    image, label = data_set[2]
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size, label) == ("RGB", (50, 40), 1)
    image, _ = MyDataSet(images_path=paths, images_class=[0, 1, 1], transform=v1.ToTensor())[0]
    assert image.shape == (3, 40, 50)
    with pytest.raises(IndexError):
        data_set[3]
    with pytest.raises(ValueError, match="2 labels"):
        MyDataSet(paths, [0, 1])


def test_images_of_extreme_aspect_ratio_are_skipped(tmp_path, capsys):
    sizes = [(400, 39), (400, 40), (40, 400), (39, 400), (40, 40)]
    paths = [str(write_image(tmp_path / f"{w}x{h}.png", (w, h))) for w, h in sizes]
    labels = [0, 1, 2, 3, 4]
    data_set = MyDataSet(paths, labels)
    assert data_set.images_class == [1, 2, 4]
    assert [Path(path).name for path in data_set.images_path] == ["400x40.png", "40x400.png", "40x40.png"]
    assert len(paths) == 5
    assert labels == [0, 1, 2, 3, 4]
    output = capsys.readouterr().out
    assert "skipped 2 of 5 images with an aspect ratio above 10" in output
    assert "400x39.png" in output
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_collation(dtype):
    batch = [(torch.full((3, 4, 5), label, dtype=dtype), label) for label in (1, 0, 2)]
    images, labels = MyDataSet.collate_fn(batch)
    assert (images.shape, images.dtype) == ((3, 3, 4, 5), dtype)
    assert (labels.tolist(), labels.dtype) == ([1, 0, 2], torch.int64)
    assert images[:, 0, 0, 0].tolist() == [1, 0, 2]
    assert images.is_contiguous(memory_format=torch.channels_last if dtype == torch.uint8 else torch.contiguous_format)


# --- transforms and normalisation -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [224, 96])
def test_eval_transform_matches_the_tutorial(tmp_path, size):
    image = read_image(write_image(tmp_path / "a.png", (300, 260)))
    tutorial = v1.Compose([v1.Resize(round(size * 256 / 224)), v1.CenterCrop(size)])(image)
    ours = EvalTransform(size)(image)
    assert (ours.dtype, ours.shape) == (torch.uint8, (3, size, size))
    difference = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - np.asarray(tutorial))
    assert difference.max() <= 1  # torchvision rounds some values differently for tensors
    assert difference.mean() < 0.05


def test_normalisation_matches_the_tutorial():
    pixels = torch.randint(0, 256, (2, 3, 8, 9), dtype=torch.uint8)
    tutorial = v1.Compose([v1.ConvertImageDtype(torch.float), v1.Normalize(MEAN, STD)])
    torch.testing.assert_close(prepare_batch(pixels, "cpu"), tutorial(pixels), rtol=0, atol=1e-5)
    assert (MEAN, STD) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_train_transform_is_random(tmp_path):
    image = read_image(write_image(tmp_path / "a.png", (300, 260)))
    crops = {TrainTransform(64)(image).numpy().tobytes() for _ in range(5)}
    assert len(crops) == 5
    assert TrainTransform(64)(image).shape == (3, 64, 64)


def test_color_jitter_changes_the_colours_only(tmp_path):
    image = read_image(write_image(tmp_path / "a.png", (64, 64)))
    torch.manual_seed(0)
    plain = TrainTransform(64)(image)
    torch.manual_seed(0)
    jittered = TrainTransform(64)(image, 64, 0.4)
    assert (jittered.shape, jittered.dtype) == (plain.shape, plain.dtype)
    assert not torch.equal(jittered, plain)
    brightness = [pixels.float().mean(dim=0).flatten() for pixels in (jittered, plain)]
    assert torch.corrcoef(torch.stack(brightness))[0, 1] > 0.9


def test_flips():
    image = torch.arange(16, dtype=torch.uint8).view(1, 4, 4).expand(3, 4, 4)
    upright = TrainTransform(4, hflip=0)
    upright.crop.scale = upright.crop.ratio = (1, 1)
    assert all(torch.equal(upright(image), image) for _ in range(9))
    for flips, axis in (({"hflip": 1}, 2), ({"hflip": 0, "vflip": 1}, 1)):
        turned = TrainTransform(4, **flips)
        turned.crop.scale = turned.crop.ratio = (1, 1)
        assert torch.equal(turned(image), image.flip(axis))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    TrainTransform(4)(image)
    default = torch.get_rng_state()
    torch.set_rng_state(before)
    TrainTransform(4, vflip=0.0)(image)
    assert torch.equal(torch.get_rng_state(), default)


@pytest.mark.parametrize("size", [(200, 50), (50, 200), (300, 3), (20, 10)])
def test_nothing_is_cut_off_by_pad_and_stretch(size):
    """The red right and bottom ends of an image stay visible, in training and evaluation."""
    image = Image.new("RGB", size, "black")
    width, height = (max(1, length // 5) for length in size)
    image.paste("red", (size[0] - width, size[1] - height, *size))
    for resize in ("pad", "stretch"):
        pixels = EvalTransform(64, resize)(image).float()
        assert pixels.shape == (3, 64, 64)
        is_red = (pixels[0] > 60) & (pixels[1] < 60)
        area = max(size) ** 2 if resize == "pad" else size[0] * size[1]
        assert is_red.float().mean().item() == pytest.approx(width * height / area, abs=0.02)
        assert is_red.any()
        train = TrainTransform(64, resize=resize)
        assert train(image).shape == (3, 64, 64)
        assert train(image, 32).shape == (3, 32, 32)
    padded = EvalTransform(64, "pad")(image)
    if size == (200, 50):
        assert padded[:, 0, 0].tolist() == [124, 116, 104]
        assert padded[:, 24:40].float().std() > 0
        assert (padded[:, :24] == padded[:, :1, :1]).all()
    cropped = EvalTransform(64)(Image.new("RGB", (200, 50)))
    assert (cropped == 0).all()


def test_float_batch_is_not_normalised_again():
    batch = torch.randn(2, 3, 8, 8)
    assert torch.equal(prepare_batch(batch, "cpu"), batch)


@pytest.mark.parametrize(("device", "calls"), [("mps", [False]), ("cuda", ["pinned", True]), ("cpu", [False])])
def test_batches_are_copied_asynchronously_from_pinned_memory_only(monkeypatch, device, calls):
    """Mocks record the calls that would copy to a GPU."""
    made = []

    def to(tensor, device, non_blocking=False, memory_format=torch.preserve_format):
        made.append(non_blocking)
        return tensor.clone(memory_format=memory_format)

    batch = torch.zeros(2, 4, 4, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "to", to)
        patched.setattr(torch.Tensor, "pin_memory", lambda tensor: made.append("pinned") or tensor)
        copy = copy_to_device(batch, device)
    assert made == calls
    assert copy.is_contiguous() == (device == "mps")
    assert copy.equal(batch)


def test_to_pixels_inverts_normalisation():
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    expected = pixels.permute(0, 2, 3, 1).numpy()
    scaled = pixels.float() / 255
    normalised = (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    for batch in (pixels, normalised, prepare_batch(pixels, "cpu")):
        assert np.array_equal(to_pixels(batch), expected)


# --- randomness -------------------------------------------------------------------------------------------------


def epoch_of(paths: list[str], epoch: int, workers: int, seed: int = 3, batch_size: int = 4) -> tuple:
    data_set = MyDataSet(paths, list(range(len(paths))), TrainTransform(32))
    sampler = EpochSampler(len(data_set), seed)
    loader = DataLoader(
        data_set,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=data_set.collate_fn,
        persistent_workers=workers > 0,
    )
    if workers:
        list(loader)  # persistent workers have already seen epoch 0
    sampler.set_epoch(epoch)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_samples_depend_only_on_seed_epoch_and_index(tmp_path):
    paths = [str(write_image(tmp_path / f"{i}.png", seed=i)) for i in range(10)]
    images, labels = epoch_of(paths, epoch=2, workers=0)
    assert sorted(labels.tolist()) == list(range(10))
    for workers in (1, 2):
        others = epoch_of(paths, epoch=2, workers=workers, batch_size=3)
        assert torch.equal(others[0], images)
        assert torch.equal(others[1], labels)
    assert epoch_of(paths, epoch=1, workers=0)[1].tolist() != labels.tolist()
    assert epoch_of(paths, epoch=2, workers=0, seed=4)[1].tolist() != labels.tolist()
    other_epoch = dict(zip(*reversed(epoch_of(paths, epoch=3, workers=0)), strict=False))
    assert len(other_epoch) == 10


def test_augmentation_changes_per_epoch(tmp_path):
    path = str(write_image(tmp_path / "a.png"))
    data_set = MyDataSet([path], [0], TrainTransform(32))
    sampler = EpochSampler(1, seed=0)
    crops = set()
    for epoch in range(5):
        sampler.set_epoch(epoch)
        crops.update(data_set[item][0].numpy().tobytes() for item in sampler)
    assert len(crops) == 5


def test_image_size_can_change_per_epoch(tmp_path):
    data_set = MyDataSet([str(write_image(tmp_path / "a.png"))], [0], TrainTransform(32))
    sampler = EpochSampler(1)
    sampler.set_epoch(3, img_size=48)
    (item,) = sampler
    assert data_set[item][0].shape == (3, 48, 48)
    sampler.set_epoch(3)
    (other,) = sampler
    assert other == item[:2]
    assert data_set[other][0].shape == (3, 32, 32)
    assert SafeImages(data_set, replace=True)[item][0].shape == (3, 48, 48)


def test_global_random_state_is_unchanged(tmp_path):
    data_set = MyDataSet([str(write_image(tmp_path / "a.png"))], [0], TrainTransform(32))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for item in EpochSampler(1, seed=5):
        data_set[item]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


# --- image cache ------------------------------------------------------------------------------------------------


def large_images(folder: Path) -> list[str]:
    return [str(jpeg(folder / f"{index}.jpg", size=(1600 + 8 * index, 1200))) for index in range(6)]


def two_epochs(
    paths: list[str],
    workers: int = 0,
    method: str | None = None,
    between: Callable = lambda: None,
    cache: ImageCache | None = None,
) -> list[torch.Tensor]:
    data_set = MyDataSet(paths, range(len(paths)), TrainTransform(64), cache=cache)
    sampler = EpochSampler(len(paths))
    loader = DataLoader(
        data_set,
        1,
        sampler=sampler,
        num_workers=workers,
        multiprocessing_context=method,
        persistent_workers=workers > 0,
        collate_fn=MyDataSet.collate_fn,
    )
    images = [image for image, _ in loader]
    between()
    sampler.set_epoch(1)
    return images + [image for image, _ in loader]


@pytest.mark.skipif(not HAS_CACHE, reason="Windows has no cache")
@pytest.mark.parametrize(("workers", "method"), [(0, None), (2, "fork"), (2, "spawn"), (2, "forkserver")])
def test_cache_is_shared_by_workers_and_preserves_batches(tmp_path, workers, method):
    """Python starts workers by spawn on macOS, and by forkserver on Linux from 3.14 on."""
    paths = [*large_images(tmp_path), str(write_image(tmp_path / "small.png", (100, 90)))]
    expected = two_epochs(paths)
    cache = ImageCache(len(paths), 2**20)
    kept = two_epochs(paths, workers, method, lambda: [Path(path).unlink() for path in paths], cache)
    assert torch.equal(torch.cat(kept), torch.cat(expected))


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux")
def test_cache_memory_is_allocated_lazily(tmp_path):
    def shared() -> int:
        return int(re.search(r"Shmem:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])

    before = shared()
    data_set = MyDataSet(large_images(tmp_path), range(6), TrainTransform(64), cache=ImageCache(6, 2**32))
    data_set[0]
    assert shared() - before < 2**21  # in KiB: half the size of the cache


def test_cache_size_is_limited(tmp_path):
    paths = large_images(tmp_path)
    data_set = MyDataSet(
        paths, range(len(paths)), EvalTransform(64), cache=ImageCache(6, 200_000)
    )  # about 90,000 bytes each
    before = [data_set[index][0] for index in range(len(paths))]
    for path in paths:
        Path(path).unlink()
    assert all(torch.equal(data_set[index][0], before[index]) for index in (0, 1))
    for index in range(2, len(paths)):
        with pytest.raises(ImageError, match="No such file"):
            data_set[index]
