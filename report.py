"""What a run tells of itself: the tabs of TensorBoard, and files in its folder for those who open no browser."""

import contextlib
import copy
import functools
import itertools
import math
import os
import shutil
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

import plot_utils
from data_utils import choose_figure_images
from distributed import Distributed
from model import evaluation_mode, grad_cam, named_convolutions
from my_dataset import prepare_batch, stack_images, to_pixels
from optimization import RangeTest
from program_utils import peak_memory, printable, whole_file, write_csv
from run_utils import Run, event_errors
from train_eval_utils import Evaluation, Progress, compute_logits

PLOT_IMG = Path(__file__).resolve().parent / "plot_img"
WORST = 8  # mistakes in the figure of the worst
WITHOUT_EFFECT = (  # on what a network learns: flags that HPARAMS does not show
    *("allow_changed_data", "download", "find_lr", "histograms", "name"),
    *("num_classes", "resume", "save_every", "strict", "timeout", "workers"),
)
PROJECTED, THUMBNAIL = 1000, 32  # validation images in the projector, about; pixels of each
LOSSES_AN_EPOCH = 50  # losses of single steps that are written, at most

Painter = Callable[[], Figure]  # so that it can be drawn later, beside the training


@contextlib.contextmanager
def unless_in_use(path: Path) -> Iterator[Path]:
    """`path`, to be replaced. On Windows another program that shows it prevents that; it stays as it is then."""
    try:
        yield path
    except PermissionError:
        if os.name != "nt":
            raise
        print(f"warning: another program has {printable(str(path))} open, so it has not been brought up to date")


class Aside:
    """Work beside the training, in a thread, one piece after the other; or in its place, where `at_once`."""

    def __init__(self, at_once: bool) -> None:
        self._thread = None if at_once else ThreadPoolExecutor(max_workers=1)
        self._pending: list[Future] = []

    def do(self, work: Callable[..., None], *arguments: object) -> None:
        """Start a piece of work. What an earlier one raised is raised here."""
        if self._thread is None:
            work(*arguments)
        else:
            self.wait()
            self._pending.append(self._thread.submit(work, *arguments))

    def wait(self) -> None:
        """Until all of it is done. What it raised is raised here."""
        while self._pending:
            self._pending.pop().result()

    def __enter__(self) -> "Aside":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._thread is not None:
            self._thread.shutdown()
        if kind is None:
            self.wait()


class Silence:
    """The report of a process that is not the first: it keeps what it sees of the images, and says nothing.

    Args:
        images: of the validation set.
    """

    def __init__(self, images: int) -> None:
        self.features: list[tuple[Tensor, Tensor]] = []
        self.every = math.ceil(images / PROJECTED)

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to close."""

    def see(self, features: Tensor, numbers: Tensor) -> None:
        """Keep what `fc` sees of some validation images, (N, features), and their numbers, (N,), for this epoch.

        Class follows class in the validation set: they are spread over all of it.
        """
        places = (numbers % self.every == 0).nonzero().flatten()
        self.features.append((features[places.to(features.device, non_blocking=True)], numbers[places]))

    def gather(self, dist: Distributed) -> None:
        """Keep what all processes have seen, as if it was one's."""
        shares = dist.gather([(features.cpu(), numbers) for features, numbers in self.features])
        self.features = list(itertools.chain(*shares))

    def start(self, card: str) -> None:
        """Said by the first."""

    def step(self, step: int, loss: float) -> None:
        """Said by the first."""

    def epoch(self, *epoch: object) -> None:
        """Said by the first."""
        self.features.clear()

    def flush(self) -> None:
        """Nothing is kept back."""


class Report(Silence):
    """What a run tells of itself: in TensorBoard, and in files of its folder for those who open no browser.

    All of it is computed from what training and evaluation have found anyway. What takes long (figures with many
    images, precision-recall curves) follows the 1st, 2nd, 4th, 8th, ... epoch and the last one, the projector the last.
    """

    def __init__(
        self,
        run: Run,
        args: Namespace,
        train_loader: DataLoader,
        val_loader: DataLoader,
        device: torch.device,
        amp_dtype: torch.dtype | None,
    ) -> None:
        super().__init__(len(val_loader.dataset))
        with event_errors(run.folder):
            self.writer = SummaryWriter(log_dir=str(run.folder))
        self.run, self.args = run, args
        self.train_loader, self.val_loader = train_loader, val_loader
        self.steps = len(train_loader.batch_sampler.steps())  # of a whole epoch, now
        self.device, self.amp_dtype = device, amp_dtype
        self.class_names = run.info["class_names"]
        self.tag_names = [printable(name) for name in self.class_names]  # event files are UTF-8
        self.val_set = val_loader.dataset.images.images
        self.example_images, self.example_names = choose_figure_images(self.val_set, self.class_names, PLOT_IMG)
        self.drawing = Aside(at_once=device.type == "cpu")  # whose cores training needs itself

    def __enter__(self) -> "Report":
        with contextlib.ExitStack() as stack:
            stack.enter_context(event_errors(self.run.folder))
            stack.enter_context(contextlib.closing(self.writer))
            stack.enter_context(self.drawing)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._open.__exit__(*error)

    def start(self, card: str) -> None:
        """What is known before the first step: the graph, the layout of the curves, the flags and the run's card."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # add_graph traces, and torch.jit.trace is deprecated
            # Of a copy: tracing runs the model, which moves BatchNorm's statistics.
            self.writer.add_graph(copy.deepcopy(self.run.model).cpu(), torch.zeros(1, 3, 224, 224))
        charts = {
            "loss": ["Multiline", ["^train_loss$", "^val_loss$"]],
            "accuracy": ["Multiline", ["^train_accuracy$", "^accuracy$"]],
            "recall of each class": ["Multiline", ["^recall/"]],
        }
        self.writer.add_custom_scalars({"training and validation": charts})
        self.writer.add_text("run", card)
        flags = {flag: value for flag, value in vars(self.args).items() if flag not in WITHOUT_EFFECT}
        flags = {flag: value if type(value) in (int, float) else printable(str(value)) for flag, value in flags.items()}
        results = dict.fromkeys(("accuracy", "macro_f1", "val_loss", "train_loss", "best_accuracy"), 0)
        for summary in hparams(flags, results)[:2]:  # in this run; add_hparams would make another one of it
            self.writer.file_writer.add_summary(summary)

    def range_test(self, result: RangeTest) -> None:
        """What --find-lr has found."""
        paint = functools.partial(plot_utils.range_test, *result)
        self.drawing.do(self.draw, {"learning rate finder": paint}, {"find_lr.png": paint}, 0)
        self.flush()

    def step(self, step: int, loss: float) -> None:
        """The loss of some of the steps, of the first process's images: always the same ones, interrupted or not."""
        if step % math.ceil(self.steps / LOSSES_AN_EPOCH) == 0:
            self.writer.add_scalar("step/train_loss", loss, self.run.epoch * self.steps + step)

    def epoch(
        self,
        progress: Progress,
        validation: Evaluation,
        numbers: Tensor,
        learning_rate: float,
        seconds: float,
        is_best: bool,
        is_last: bool,
    ) -> None:
        """An epoch, before it is saved.

        Args:
            progress: of all its steps.
            numbers: (N,) int64, which images of the validation set `validation` is of.
            seconds: that training and evaluation took.
            is_best: its accuracy is the best so far.
            is_last: there is no other one after it.
        """
        epoch, model = self.run.epoch, self.run.model
        scalars = {
            "train_loss": progress.loss,
            "val_loss": validation.loss,
            "train_accuracy": progress.accuracy,
            "accuracy": validation.accuracy,
            "best_accuracy": self.run.best["accuracy"],
            "macro_f1": validation.macro_f1,
            "learning_rate": learning_rate,
            "speed/images_per_second": progress.speed,
            "speed/seconds_per_epoch": seconds,
            "memory/peak_GiB": peak_memory(self.device),
        }
        scalars |= {
            f"recall/{name}": recall for name, recall in zip(self.tag_names, validation.recalls.tolist(), strict=True)
        }
        scalars = {tag: value for tag, value in scalars.items() if value is not None and not math.isnan(value)}
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, epoch)
        for tag, convolution in named_convolutions(model).items():
            if self.args.histograms == "all" or tag in ("conv1", "layer1/block0/conv1"):
                self.writer.add_histogram(tag, convolution.weight, epoch)
            gradient = convolution.weight.grad if self.args.histograms == "all" else None
            if gradient is not None and gradient.isfinite().all():  # not if float16's scaler has skipped the step
                self.writer.add_histogram(f"gradients/{tag}", gradient, epoch)

        self.run.history.append({"epoch": epoch} | scalars)
        with unless_in_use(self.run.folder / "metrics.csv") as path:
            write_csv(self.run.history, path)
        confusion = functools.partial(plot_utils.confusion_matrix, validation.confusion.numpy(), self.class_names)
        files, figures = {}, {"predictions vs. actuals": self.predictions()}
        if is_best:
            with unless_in_use(self.run.folder / "mistakes.csv") as path:
                write_csv(self.every_image(validation, numbers), path)
            files["confusion_matrix.png"] = confusion
        if (epoch + 1).bit_count() == 1 or is_last:  # a power of two
            files["curves.png"] = functools.partial(plot_utils.curves, list(self.run.history))
            figures["confusion matrix"] = confusion
            figures |= self.mistakes(validation, numbers)
            figures["training batch"] = self.training_batch()
            for index, name in enumerate(self.tag_names):
                is_class, probability = validation.labels == index, validation.probabilities[:, index]
                self.writer.add_pr_curve(f"class/{name}", is_class, probability, epoch)
        if is_last:
            self.projector(validation, numbers)
            self.writer.file_writer.add_summary(hparams({}, {})[2])
        self.features.clear()
        self.drawing.do(self.draw, figures, files, epoch)
        self.writer.flush()

    def flush(self) -> None:
        """Let all of it be in the files."""
        self.drawing.wait()
        self.writer.flush()

    def draw(self, figures: dict[str, Painter], files: dict[str, Painter], epoch: int) -> None:
        """Draw figures for TensorBoard, by their tags, and for the run's folder, by their names."""
        drawn = {paint: paint() for paint in [*figures.values(), *files.values()]}  # some are for both
        for tag, paint in figures.items():
            self.writer.add_figure(tag, drawn[paint], epoch)
        for name, paint in files.items():
            with unless_in_use(self.run.folder / name) as path, whole_file(path) as unfinished:
                drawn[paint].savefig(unfinished)

    def predictions(self) -> Painter:
        """The tutorial's figure: what the network says to a few images, the same ones after each epoch."""
        with evaluation_mode(self.run.eval_model):
            logits = compute_logits(self.run.eval_model, self.example_images, self.device, self.amp_dtype)
        probabilities, predicted = logits.softmax(dim=1).cpu().max(dim=1)
        names = [self.class_names[index] for index in predicted.tolist()]
        pixels = to_pixels(self.example_images)
        return functools.partial(plot_utils.predictions, pixels, names, probabilities.tolist(), self.example_names)

    def mistakes(self, validation: Evaluation, numbers: Tensor) -> dict[str, Painter]:
        """The mistakes with the highest loss, and what the network looked at when it made them."""
        places = validation.worst(WORST)
        items = [self.val_loader.dataset[number] for number in numbers[places].tolist()]
        places = [place for place, item in zip(places, items, strict=True) if item is not None]
        if not places:  # their files are gone
            return {}
        images = stack_images([image for image, _ in filter(None, items)])
        predicted = validation.predicted[places]
        heats = (
            grad_cam(self.run.eval_model, prepare_batch(images, self.device), predicted.to(self.device)).cpu().numpy()
        )
        probabilities = validation.probabilities[places].amax(dim=1).tolist()
        names, labels = (
            [self.class_names[index] for index in column.tolist()] for column in (predicted, validation.labels[places])
        )
        paint = functools.partial(plot_utils.mistakes, to_pixels(images), heats, names, probabilities, labels)
        return {"worst mistakes": paint}

    def training_batch(self) -> Painter:
        """The first batch of the epoch (of a large one, a part) with its augmentation: as the network has seen it.

        But for a frozen backbone whose features were computed once: it has seen others.
        """
        train_set, sampler = self.train_loader.dataset, self.train_loader.batch_sampler.order
        sampler.set_epoch(self.run.epoch, img_size=sampler.img_size)
        items = [train_set[item] for item in itertools.islice(sampler, min(self.args.batch_size, 16))]
        images, labels = train_set.collate_fn(items)
        names = [self.class_names[label] for label in labels.tolist()]
        return functools.partial(plot_utils.training_batch, to_pixels(images), names)

    def every_image(self, validation: Evaluation, numbers: Tensor) -> list[dict[str, str | float]]:
        """The rows of mistakes.csv: the validation images, the highest loss first."""
        paths, names = self.val_set.images_path, self.class_names
        largest = validation.probabilities.amax(dim=1)
        columns = (numbers, validation.labels, validation.predicted, largest, validation.losses)
        rows = sorted(zip(*(column.tolist() for column in columns), strict=True), key=lambda row: -row[-1])
        return [
            {
                "path": paths[number],
                "true": names[label],
                "predicted": names[predicted],
                "probability": f"{probability:.6f}",
                "loss": f"{loss:.6f}",
            }
            for number, label, predicted, probability, loss in rows
        ]

    def projector(self, validation: Evaluation, numbers: Tensor) -> None:
        """For the projector: what `fc` sees of the validation images, as gathered, and the images in small."""
        names = self.tag_names
        features, rows, thumbnails = [], [], []
        place_of = {number: place for place, number in enumerate(numbers.tolist())}
        seen, seen_numbers = (torch.cat(column) for column in zip(*self.features, strict=True))
        for feature, number in zip(seen, seen_numbers.tolist(), strict=True):
            place, item = place_of[number], self.val_loader.dataset[number]
            if item is not None:  # its file is still there
                label, guess = int(validation.labels[place]), int(validation.predicted[place])
                features.append(feature)
                rows.append([names[label], names[guess], "right" if guess == label else "wrong"])
                pixels = torch.from_numpy(to_pixels(item[0][None])).permute(0, 3, 1, 2) / 255
                thumbnails.append(F.interpolate(pixels, (THUMBNAIL, THUMBNAIL), mode="area"))
        if not rows:
            return
        before = self.run.folder / f"{self.run.epoch:05d}"
        if before.exists():  # of an epoch that is done again
            shutil.rmtree(before)
        header = ["class", "predicted", "right or wrong"]
        self.writer.add_embedding(
            torch.stack(features),
            rows,
            torch.cat(thumbnails),
            self.run.epoch,
            "validation",
            metadata_header=header,
        )
