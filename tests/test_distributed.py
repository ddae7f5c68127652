"""Distributed training: same images and weights for any world size, errors, resume."""

import datetime
import functools
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed
from conftest import write_classes, write_image
from ranks import SMALL, run_ranks, weights_of
from torch import nn

import checkpoint
import data_loading
import train
import train_eval_utils
from cli_utils import UsageError, select_device
from data_loading import DistributedBatchSampler, EpochSampler, build_train_loader, build_val_loader
from dataset_split import find_split
from distributed import Distributed, is_connection_lost
from image_cache import ImageCache, memory_file
from inference import Outputs, gather_outputs, run_inference
from my_dataset import EvalTransform, MyDataSet, TrainTransform, prepare_batch
from optimization import build_optimizer
from run_state import Run
from train_eval_utils import train_one_epoch

pytestmark = [
    pytest.mark.usefixtures("in_an_empty_folder", "small_network", "no_figures"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here"),
]


def test_each_step_has_the_same_images_for_any_world_size():
    def steps_of(count: int, batch_size: int, accumulate: int) -> list[list[tuple[int, ...]]]:
        steps: list[list[tuple[int, ...]]] = []
        for rank in range(count):
            order = EpochSampler(48, seed=3)
            order.set_epoch(2, start=4)
            share = DistributedBatchSampler(order, batch_size, rank=rank, world_size=count, accumulate=accumulate)
            batches = iter(share)
            assert len(list(share)) == len(share)
            for number, weights in enumerate(share.steps()):
                steps += [[]] if rank == 0 else []
                for _ in weights:
                    batch = next(batches)
                    assert len(batch) <= batch_size
                    steps[number] += batch
        return [sorted(step) for step in steps]

    alone = steps_of(1, 16, 1)
    assert [len(step) for step in alone] == [16, 16, 12]
    for count, batch_size, accumulate in [(2, 8, 1), (4, 4, 1), (1, 8, 2), (2, 2, 4)]:
        assert steps_of(count, batch_size, accumulate) == alone


@pytest.mark.parametrize(("recipe", "epochs", "lr"), [("tutorial", 2, 0.004), ("scratch", 1, 0.03)])
def test_weights_are_equal_for_any_world_size(sample, monkeypatch, recipe, epochs, lr):
    """Compare in float64: in a network this small, a ReLU flipped by float32 rounding shows in the fourth digit."""
    split, _ = find_split(sample, val_rate=0.1)
    images = MyDataSet(split.train_paths[::2], split.train_labels[::2])
    assert len(images) == 45  # the last step of each epoch is smaller

    def train_epochs(name: str, batch_size: int, accumulate: int = 1) -> None:
        flags = [*SMALL, "--recipe", recipe, "--lr", str(lr)]
        flags += ["--batch-size", str(batch_size), "--accumulate", str(accumulate)]
        args, device = train.parse_args(flags), torch.device("cpu")
        images.transform = TrainTransform(32)
        model = train.MODELS["resnet18"](num_classes=5).double()
        model.load_state_dict(before)
        optimizer = build_optimizer(args, model, device)
        with Distributed() as dist:
            loader, learner = build_train_loader(args, images, device, dist), dist.wrap_ddp(model, device)
            for epoch in range(epochs):
                loader.batch_sampler.order.set_epoch(epoch)
                steps = loader.batch_sampler.steps()
                train_one_epoch(learner, optimizer, loader, device, epoch, steps=steps)
            if dist.is_main:
                torch.save(model.state_dict(), f"{name}.pth")

    flags = ["--data-path", str(sample), *SMALL, "--val-rate", "0.1", "--epochs", "2", "--lr", "0.01"]
    assert train.main(flags) == 0  # provides BatchNorm statistics
    before = weights_of(Path("runs/flower_experiment"))
    # Batch statistics differ between a rank's share and the whole batch, so BatchNorm stays in evaluation mode.
    monkeypatch.setattr(nn.BatchNorm2d, "train", lambda module, mode=True: nn.Module.train(module, False))
    monkeypatch.setattr(
        train_eval_utils,
        "compute_logits",
        lambda model, images, device, _: model(prepare_batch(images, device).double()),
    )
    train_epochs("alone", 16)  # three steps per epoch
    train_epochs("accumulated", 8, accumulate=2)
    for count in (2, 4):
        assert run_ranks(count, functools.partial(train_epochs, f"by {count}", 16 // count)) == [0] * count

    alone = torch.load("alone.pth")
    for name in ("accumulated", "by 2", "by 4"):
        for key, value in torch.load(f"{name}.pth").items():
            if value.is_floating_point() and "running" not in key:
                assert (value - alone[key]).norm() <= 1e-9 * alone[key].norm(), (name, key)
                assert (alone[key] - before[key]).norm() > 3e-4 * before[key].norm(), key


def test_sync_model_averages_statistics_and_copies_the_weights_of_rank_0():
    """Ranks on different hardware may round differently, and all-reduce covers gradients only."""

    def share() -> None:
        with Distributed() as dist:
            model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
            for value in (*model.parameters(), *model.buffers()):
                value.data.fill_(dist.rank)
            dist.sync_model(model)
            torch.save((dict(model.named_parameters()), dict(model.named_buffers())), f"{dist.rank}.pth")

    assert run_ranks(2, share) == [0, 0]
    for rank in range(2):
        parameters, buffers = torch.load(f"{rank}.pth")
        assert not any(value.any() for value in parameters.values())
        assert all((buffers[name] == 0.5).all() for name in ("1.running_mean", "1.running_var"))


def test_nccl_has_a_longer_timeout_than_gloo(monkeypatch):
    """NCCL aborts the process, whereas Gloo raises an error. A Gloo group stands in for NCCL's."""
    new_group, timeouts = torch.distributed.new_group, {}

    def record(backend: str, timeout: datetime.timedelta) -> torch.distributed.ProcessGroup:
        timeouts[backend] = timeout.total_seconds()
        return new_group(backend="gloo", timeout=timeout)

    def start() -> None:
        with Distributed(timeout=20):
            assert timeouts["nccl"] > 20

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "new_group", record)
    assert run_ranks(1, start) == [0]


def test_each_process_has_its_own_gpu_if_the_launcher_sets_no_local_world_size(monkeypatch):
    """Like `srun`, this sets RANK and WORLD_SIZE, and perhaps LOCAL_RANK."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def start(names: tuple[str, ...]) -> None:
        for name in names:
            del os.environ[name]
        with Distributed() as dist:
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            assert select_device("cuda", dist) == torch.device("cuda", dist.rank)

    for names in [("LOCAL_WORLD_SIZE",), ("LOCAL_WORLD_SIZE", "LOCAL_RANK")]:
        assert run_ranks(2, functools.partial(start, names)) == [0, 0]


def test_a_process_that_sees_one_gpu_uses_it(monkeypatch):
    """With `srun --gpus-per-task=1`, each process sees its own GPU as number 0."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def start() -> None:
        del os.environ["LOCAL_WORLD_SIZE"]
        with Distributed() as dist:
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            assert select_device("cuda", dist) == torch.device("cuda", 0)

    assert run_ranks(2, start) == [0, 0]


def test_single_images_on_a_rank_are_dropped():
    """Their BatchNorm statistics would have the same weight as those of a whole batch."""

    def sizes(images: int, rank: int, world_size: int, accumulate: int = 1) -> list[int]:
        order = EpochSampler(images)
        return [
            len(batch)
            for batch in DistributedBatchSampler(order, 4, rank=rank, world_size=world_size, accumulate=accumulate)
        ]

    assert sizes(9, 0, 1) == [4, 4, 1]  # like the tutorial
    assert sizes(11, 0, 2) == sizes(11, 1, 2) == [4]
    assert sizes(12, 0, 2) == sizes(12, 1, 2) == [4, 2]
    assert sizes(26, 0, 2, accumulate=2) == [4, 4]  # the rest is 5 images for each rank: 4 and 1


def test_too_few_images_for_one_step_are_refused(two_classes):
    """Synchronised BatchNorm needs complete steps."""
    split, _ = find_split(two_classes)
    images = MyDataSet(split.train_paths, split.train_labels, TrainTransform(32))
    args = train.parse_args([*SMALL, "--batch-size", "16"])
    args.sync_bn = True
    assert len(build_train_loader(args, images, torch.device("cpu"), Distributed())) == 1  # for 20 images
    args.accumulate = 2
    with pytest.raises(UsageError, match="too few training images for one step: 20; 32 are enough"):
        build_train_loader(args, images, torch.device("cpu"), Distributed())


@pytest.mark.parametrize("images", [587, 2])
def test_evaluation_is_bit_identical_for_any_world_size(images, tmp_path):
    half = images // 2
    folder = write_classes(tmp_path / "pets", {"cat": half, "dog": images - half})
    paths = sorted(folder.rglob("*.png"))
    labels = [path.parent.name == "dog" for path in paths]
    model = train.MODELS["resnet18"](num_classes=2)

    def evaluate_share() -> None:
        with Distributed() as dist:
            args = train.parse_args([*SMALL, "--batch-size", "16"])
            val_set = MyDataSet(paths, labels, EvalTransform(32))
            loader = build_val_loader(args, val_set, torch.device("cpu"), dist)
            found = gather_outputs(lambda: run_inference(model, loader, "cpu"), dist)
            torch.save(tuple(found), f"{dist.world_size}-{dist.rank}.pth")

    for count in (1, 2, 3):
        assert run_ranks(count, evaluate_share) == [0] * count
    logits, numbers, _, layer1 = torch.load("1-0.pth")
    assert numbers.tolist() == list(range(images))
    for name in ("2-0", "2-1", "3-0", "3-2"):
        other_logits, other_numbers, _, other_layer1 = torch.load(f"{name}.pth")
        assert other_logits.equal(logits)
        assert other_layer1.equal(layer1)
        assert other_numbers.equal(numbers)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux has memory files")
def test_image_cache_is_shared_between_ranks(tmp_path):
    paths = [write_image(tmp_path / f"{number}.png", (300, 300), seed=number) for number in range(6)]

    def read() -> None:
        with Distributed() as dist:
            images = MyDataSet(paths, range(6), EvalTransform(32))
            images.cache = ImageCache(6, 2**20, dist.share_file(memory_file))
            own = [images[index][0] for index in range(dist.rank, 6, 2)]
            dist.gather(None)
            if dist.is_main:
                for path in paths:
                    path.unlink()
            dist.gather(None)
            others = [images[index][0] for index in range(1 - dist.rank, 6, 2)]
            torch.save((own, others), f"{dist.rank}.pth")

    assert run_ranks(2, read) == [0, 0]
    (even, odd), (its_odd, its_even) = torch.load("0.pth"), torch.load("1.pth")
    assert all(map(torch.equal, even + odd, its_even + its_odd))


def test_an_error_on_one_rank_ends_all_ranks(sample, monkeypatch, capfd):
    step = train.train_one_epoch

    def fail(*arguments: object, **options: object) -> float:
        if os.environ.get("RANK") == "1":
            raise OSError("the disk of process 1 is gone")
        return step(*arguments, **options)

    monkeypatch.setattr(train, "train_one_epoch", fail)
    flags = ["--data-path", str(sample), *SMALL, "--epochs", "1"]
    start = time.monotonic()
    assert run_ranks(2, lambda: train.main(flags)) == [1, 1]
    assert time.monotonic() - start < 30
    said = capfd.readouterr().err.splitlines()
    assert "train.py: error: the disk of process 1 is gone" in said
    assert any("rank 0 has lost the connection to the other ranks" in line for line in said)
    assert not any("Traceback" in line for line in said)


def test_local_rank_zero_first_makes_other_ranks_wait():
    def download() -> None:
        if os.environ["RANK"] == "0":
            time.sleep(0.5)
            Path("weights").touch()
        assert Path("weights").exists()

    def load() -> None:
        with Distributed() as dist:
            dist.local_rank_zero_first(download)

    assert run_ranks(2, load) == [0, 0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-path", "nowhere"], "nowhere: no such"),
        (["--weights", "nowhere"], "nowhere: no such"),
        (["--allow-changed-data"], "--allow-changed-data has no effect"),
    ],
)
def test_an_error_before_training_is_printed_once(sample, capfd, flags, message):
    flags = ["--data-path", str(sample), *SMALL, *flags]
    assert run_ranks(2, lambda: train.main(flags)) == [1, 1]
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line


def test_complete_run_is_resumed_with_runs_on_one_machine_only(sample, tmp_path):
    flags = ["--data-path", str(sample), *SMALL, "--epochs", "1", "--test-rate", "0.2"]
    assert run_ranks(2, lambda: train.main(flags)) == [0, 0]
    (tmp_path / "elsewhere").mkdir()

    def resume() -> int:
        if os.environ["RANK"] == "1":
            os.chdir(tmp_path / "elsewhere")
        return train.main(["--resume", "flower_experiment"])

    assert run_ranks(2, resume) == [0, 0]


def test_resume_on_the_first_rank_decides(sample):
    flags = ["--data-path", str(sample), *SMALL, "--epochs", "1"]
    assert run_ranks(2, lambda: train.main(flags)) == [0, 0]

    def resume() -> int:
        return train.main(["--timeout", "5", *(["--resume"] if os.environ["RANK"] == "0" else flags)])

    assert run_ranks(2, resume) == [0, 0]


def test_frozen_backbone_training_does_not_depend_on_world_size(sample, monkeypatch):
    run_inference = data_loading.run_inference

    def count_features(*arguments: object, **options: object) -> Outputs:
        outputs = run_inference(*arguments, **options)
        with open(f"features by {os.environ['WORLD_SIZE']}", "a") as file:
            file.write("." * len(outputs.features))
        return outputs

    monkeypatch.setattr(data_loading, "run_inference", count_features)
    flags = ["--data-path", str(sample), *SMALL, "--recipe", "finetune", "--freeze-layers", "--epochs", "3"]
    flags += ["--amp", "off"]  # bfloat16 results depend on the batch size
    for count in (1, 2):
        own = ["--batch-size", str(16 // count), "--name", f"by {count}"]
        assert run_ranks(count, lambda own=own: train.main([*flags, *own])) == [0] * count
    assert Path("features by 1").read_text() == Path("features by 2").read_text()
    alone, together = weights_of(Path("runs/by 1")), weights_of(Path("runs/by 2"))
    for key, value in together.items():
        assert torch.allclose(value, alone[key], atol=1e-5), key


def test_time_budget_with_two_ranks(sample):
    assert run_ranks(2, lambda: train.main(["--data-path", str(sample), *SMALL, "--time-budget", "0.01"])) == [0, 0]
    assert (Path("runs/flower_experiment/weights/best.pth")).exists()


def test_resume_mid_epoch_with_two_ranks_is_bit_identical(sample, monkeypatch, capfd):
    flags = ["--data-path", str(sample), *SMALL, "--epochs", "2", "--batch-size", "4"]
    monkeypatch.setattr("distributed.SECONDS_BETWEEN_SYNCS", 0)  # after each step
    save = checkpoint.save_checkpoint

    def note(content: dict, path: Path) -> None:
        with open("saved.txt", "a") as file:
            file.write(f"{os.environ['RANK']} {path.name}\n")
        save(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", note)
        assert run_ranks(2, lambda: train.main([*flags, "--name", "undisturbed"])) == [0, 0]
    saved = Path("saved.txt").read_text().splitlines()
    assert saved.count("0 last.pth") == 3  # at the start, and after each epoch
    assert set(saved) == {"0 last.pth", "0 best.pth"}

    def die(run: Run) -> bool:
        if run.epoch == 1 and run.progress.steps_taken == 7:
            raise OSError("pulled the plug")
        return run.dist.is_main and run.progress.steps_taken == 5

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_is_due", die)
        assert run_ranks(2, lambda: train.main([*flags, "--name", "died"])) == [1, 1]
    assert run_ranks(2, lambda: train.main(["--resume", "died"])) == [0, 0]
    assert "runs/died, resumed at epoch 1, step 5" in capfd.readouterr().out
    undisturbed = weights_of(Path("runs/undisturbed"))
    assert all(value.equal(undisturbed[key]) for key, value in weights_of(Path("runs/died")).items())
    tables = [Path("runs", name, "metrics.csv").read_text().splitlines() for name in ("undisturbed", "died")]
    losses = [[float(row.split(",")[1]) for row in table[1:]] for table in tables]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    # Another world size would change the images of each step.
    assert run_ranks(1, lambda: train.main(["--resume", "died", "--epochs", "3"])) == [1]
    assert "as many processes as before" in capfd.readouterr().err


def test_each_wait_for_a_silent_rank_is_a_lost_connection():
    """The first wait to time out aborts the later ones, which raise other messages."""

    def lose_the_other() -> int:
        with Distributed(timeout=2) as dist:
            if not dist.is_main:
                time.sleep(5)
                os._exit(0)
            waits = []
            for _ in range(3):
                waits.append(torch.distributed.all_reduce(torch.ones(1), async_op=True))
                time.sleep(0.5)
            for wait in waits:
                with pytest.raises(RuntimeError) as raised:
                    wait.wait()
                assert is_connection_lost(raised.value), raised.value
            os._exit(0)  # skips destroy_process_group: no other rank is left

    assert run_ranks(2, lose_the_other) == [0, 0]


def test_ranks_with_different_flags_are_refused(sample, capfd):
    flags = ["--data-path", str(sample), *SMALL]
    assert run_ranks(2, lambda: train.main([*flags, "--lr", f"0.00{os.environ['RANK']}1"])) == [1, 1]
    (line,) = capfd.readouterr().err.splitlines()
    assert "the processes differ" in line
