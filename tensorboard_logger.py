"""Write a run's metrics and figures to TensorBoard and, for use without a browser, to files in its folder."""

import contextlib
import copy
import functools
import io
import itertools
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

import plot_utils
from calibration import measure_reliability, reliability_curves
from cli_utils import peak_memory, printable
from data_loading import Loaders
from data_utils import choose_figure_images
from event_files import event_errors
from file_utils import atomic_file, write_csv
from inference import compute_logits
from metrics import Evaluation
from model import evaluation_mode, grad_cam, named_convolutions
from my_dataset import prepare_batch, stack_images, to_pixels
from run_state import Run
from train_eval_utils import Progress
from tuning import RangeTest

PLOT_IMG = Path(__file__).resolve().parent / "plot_img"
WORST = 8  # images in the figure of the worst mistakes
HIDDEN_FLAGS = (  # flags omitted from HPARAMS, as they do not affect what a network learns
    *("allow_changed_data", "download", "find_lr", "histograms", "name"),
    *("num_classes", "resume", "save_every", "strict", "timeout", "workers"),
)
THUMBNAIL = 32  # pixels of a validation image in the projector
STEPS_LOGGED = 50  # per epoch, at most
FIGURE_COST = 0.02  # maximum fraction of the time spent on slow figures, except those of the first and last epoch
WAIT_FOR_FIGURES = ("cpu",)  # on these devices, drawing beside the next steps would take several times as long

MakeFigure = Callable[[], Figure]  # called later, in the background


class NullLogger:
    """The logger of all ranks but the main process: a no-op."""

    def __enter__(self) -> "NullLogger":
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing."""

    def log_start(self, description: str, flags: Mapping[str, Any]) -> None:
        """Do nothing."""

    def log_step(self, step: int, loss: float) -> None:
        """Do nothing."""

    def log_epoch(self, progress: Progress, validation: Evaluation, learning_rate: float, seconds: float) -> None:
        """Do nothing."""

    def log_test(self, report: Mapping[str, Any] | None) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""


class TensorBoardLogger:
    """Write a run's metrics and figures to TensorBoard and to its folder.

    Everything is computed from the results of training and evaluation. Slow figures and precision-recall curves are
    logged after the first and the last epoch, and after 2, 4, 8, ... epochs if they take at most 2% of the time; the
    projector is logged after the last epoch only.

    Args:
        loaders: the image loaders, even if training uses cached features.
        amp_dtype: mixed precision, see `compute_logits`.
        histograms: "first" for the weights of two convolutions, "all" for the weights and gradients of all.
    """

    def __init__(
        self,
        run: Run,
        loaders: Loaders,
        device: torch.device,
        amp_dtype: torch.dtype | None,
        *,
        histograms: str = "first",
    ) -> None:
        with event_errors(run.folder):
            self.writer = SummaryWriter(log_dir=str(run.folder))
        self.run = run
        self.batches, self.train_images, self.val_images = loaders.batches, loaders.train.dataset, loaders.val.dataset
        self.steps_per_epoch = len(loaders.batches.steps())
        self.device, self.amp_dtype, self.histograms = device, amp_dtype, histograms
        self.class_names = run.info["class_names"]
        self.tag_names = [printable(name) for name in self.class_names]  # event files are UTF-8
        self.val_set = self.val_images.images
        self.drawn_at, self.draw_seconds = time.perf_counter(), 0.0
        self.example_images, self.example_names = choose_figure_images(self.val_set, self.class_names, PLOT_IMG)

    def __enter__(self) -> "TensorBoardLogger":
        with contextlib.ExitStack() as stack:
            stack.enter_context(event_errors(self.run.folder))
            stack.enter_context(contextlib.closing(self.writer))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)

    # --- what is logged, and when ---------------------------------------------------------------------------------

    def log_start(self, description: str, flags: Mapping[str, Any]) -> None:
        """Write what is known before the first step: the graph, the layout of the charts and the hyperparameters.

        Args:
            description: the run in Markdown.
            flags: train.py's flags.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # add_graph uses torch.jit.trace, which is deprecated
            # A copy, because tracing runs the model and updates BatchNorm's running statistics.
            self.writer.add_graph(copy.deepcopy(self.run.model).cpu(), torch.zeros(1, 3, 224, 224))
        charts = {
            "loss": ["Multiline", ["^train_loss$", "^val_loss$"]],
            "accuracy": ["Multiline", ["^train_accuracy$", "^accuracy$"]],
            "recall per class": ["Multiline", ["^recall/"]],
        }
        self.writer.add_custom_scalars({"training and validation": charts})
        self.writer.add_text("run", description)
        flags = {flag: value for flag, value in flags.items() if flag not in HIDDEN_FLAGS}
        flags = {flag: value if type(value) in (int, float) else printable(str(value)) for flag, value in flags.items()}
        results = dict.fromkeys(("accuracy", "macro_f1", "val_loss", "train_loss", "best_accuracy"), 0)
        for summary in hparams(flags, results)[:2]:  # add_hparams would create a run of its own
            self.writer.file_writer.add_summary(summary)

    def log_range_test(self, result: RangeTest) -> None:
        """Draw the result of --find-lr."""
        make_figure = functools.partial(plot_utils.range_test, *result)
        self.draw({"learning rate finder": make_figure}, {"find_lr.png": make_figure}, 0)

    def log_step(self, step: int, loss: float) -> None:
        """Write the main process's loss, every few steps. A resumed run logs the same steps."""
        if step % math.ceil(self.steps_per_epoch / STEPS_LOGGED) == 0:
            position = self.run.epoch * self.steps_per_epoch + step
            self.run.background.submit(self.writer.add_scalar, "step/train_loss", loss, position)

    def log_epoch(self, progress: Progress, validation: Evaluation, learning_rate: float, seconds: float) -> None:
        """Write an epoch's metrics and figures, after `Run.update_best` and before the checkpoint is saved.

        Args:
            progress: the training metrics.
            validation: with the images' indices and features.
            seconds: the time that training and evaluation took.
        """
        epoch, run = self.run.epoch, self.run
        run.wait_for_background()  # for the figures of the previous epoch
        scalars = self.scalars(progress, validation, learning_rate, seconds)
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, epoch)
        self.add_histograms(epoch)
        run.history.append({"epoch": epoch} | scalars)
        with skip_if_open_on_windows(run.folder / "metrics.csv") as path:
            write_csv(run.history, path, [*dict.fromkeys(tag for row in run.history for tag in row)])
        if run.best is run.last:
            with skip_if_open_on_windows(run.folder / "mistakes.csv") as path:
                write_csv(self.rows_by_loss(validation), path)

        files, figures = {}, {"predictions vs. actuals": self.predictions()}
        if run.finished or self.slow_figures_are_due():
            start = time.perf_counter()
            best = run.best_confusion.numpy()
            files["confusion_matrix.png"] = functools.partial(plot_utils.confusion_matrix, best, self.class_names)
            files["curves.png"] = functools.partial(plot_utils.curves, list(run.history))
            confusion = functools.partial(plot_utils.confusion_matrix, validation.confusion.numpy(), self.class_names)
            figures["confusion matrix"] = files["confusion_matrix.png"] if run.best is run.last else confusion
            figures["reliability"] = self.reliability(validation)
            figures["training batch"] = self.training_batch()
            figures |= self.worst_mistakes(validation)
            for index, name in enumerate(self.tag_names):
                is_class, probability = validation.labels == index, validation.probabilities[:, index]
                self.writer.add_pr_curve(f"class/{name}", is_class, probability, epoch)
            self.drawn_at, self.draw_seconds = start, time.perf_counter() - start
        if run.finished:
            self.add_projector(validation)
            self.writer.file_writer.add_summary(hparams({}, {})[2])
        drawing = run.background.submit(self.draw, figures, files, epoch)
        if self.device.type in WAIT_FOR_FIGURES:
            drawing.result()
        self.flush()

    def log_test(self, report: Mapping[str, Any] | None) -> None:
        """Write the metrics on the test images, if there are any; see `evaluation_report.build_report`."""
        if report is None:
            return
        self.run.background.wait()
        for metric in ("accuracy", "macro_f1"):
            self.writer.add_scalar(f"test/{metric}", report[metric]["value"], self.run.best["epoch"])

    def flush(self) -> None:
        """Flush the event files in the background, for a checkpoint."""
        self.run.background.submit(self.writer.flush)

    def slow_figures_are_due(self) -> bool:
        """Return whether the number of finished epochs is a power of two, and figures take at most 2% of the time."""
        seconds = time.perf_counter() - self.drawn_at
        return (self.run.epoch + 1).bit_count() == 1 and self.draw_seconds <= FIGURE_COST * seconds

    # --- scalars, histograms, projector ---------------------------------------------------------------------------

    def scalars(
        self, progress: Progress, validation: Evaluation, learning_rate: float, seconds: float
    ) -> dict[str, float]:
        """Return an epoch's metrics by tag, except those that are unknown."""
        scalars = {
            "train_loss": progress.loss,
            "val_loss": validation.loss,
            "train_accuracy": progress.accuracy,
            "accuracy": validation.accuracy,
            "best_accuracy": self.run.best["accuracy"],
            "macro_f1": validation.macro_f1,
            "calibration/error": measure_reliability(validation.probabilities, validation.labels).calibration_error,
            "calibration/temperature": self.run.last["temperature"],
            "learning_rate": learning_rate,
            "speed/images_per_second": progress.speed,
            "speed/seconds_per_epoch": seconds,
            "memory/peak_GiB": peak_memory(self.device),
        }
        recalls = validation.recalls.tolist()
        scalars |= {f"recall/{name}": recall for name, recall in zip(self.tag_names, recalls, strict=True)}
        return {tag: value for tag, value in scalars.items() if value is not None and not math.isnan(value)}

    def add_histograms(self, epoch: int) -> None:
        """Write the weights of two convolutions, or with `--histograms all` the weights and gradients of all."""
        for tag, convolution in named_convolutions(self.run.model).items():
            if self.histograms == "all" or tag in ("conv1", "layer1/block0/conv1"):
                self.writer.add_histogram(tag, convolution.weight, epoch)
            gradient = convolution.weight.grad if self.histograms == "all" else None
            if gradient is not None and gradient.isfinite().all():  # otherwise float16's scaler has skipped the step
                self.writer.add_histogram(f"gradients/{tag}", gradient, epoch)

    def add_projector(self, validation: Evaluation) -> None:
        """Write the features of some validation images, with their labels, predictions and thumbnails."""
        points, rows, thumbnails = [], [], []
        for feature, row in zip(validation.features, validation.feature_rows.tolist(), strict=True):
            item = self.val_images[int(validation.indices[row])]
            if item is not None:  # the file still exists
                label, predicted = int(validation.labels[row]), int(validation.predicted[row])
                points.append(feature)
                is_right = "right" if predicted == label else "wrong"
                rows.append([self.tag_names[label], self.tag_names[predicted], is_right])
                pixels = torch.from_numpy(to_pixels(item[0][None])).permute(0, 3, 1, 2) / 255
                thumbnails.append(F.interpolate(pixels, (THUMBNAIL, THUMBNAIL), mode="area"))
        if not rows:
            return
        earlier = self.run.folder / f"{self.run.epoch:05d}"
        if earlier.exists():  # from before a resume
            shutil.rmtree(earlier)
        header = ["class", "predicted", "right or wrong"]
        self.writer.add_embedding(
            torch.stack(points), rows, torch.cat(thumbnails), self.run.epoch, "validation", metadata_header=header
        )

    def rows_by_loss(self, validation: Evaluation) -> list[dict[str, str]]:
        """Return the rows of mistakes.csv: all validation images, the highest loss first."""
        paths, names = self.val_set.images_path, self.class_names
        confidence = validation.probabilities.amax(dim=1)
        columns = (validation.indices, validation.labels, validation.predicted, confidence, validation.losses)
        rows = sorted(zip(*(column.tolist() for column in columns), strict=True), key=lambda row: -row[-1])
        return [
            {
                "path": paths[index],
                "true": names[label],
                "predicted": names[predicted],
                "probability": f"{probability:.6f}",
                "loss": f"{loss:.6f}",
            }
            for index, label, predicted, probability, loss in rows
        ]

    # --- figures --------------------------------------------------------------------------------------------------

    def draw(self, figures: dict[str, MakeFigure], files: dict[str, MakeFigure], epoch: int) -> None:
        """Draw figures for TensorBoard, by tag, and for the run's folder, by file name."""
        start = time.thread_time()
        makers = {*figures.values(), *files.values()}
        drawn = {make_figure: encode(make_figure()) for make_figure in makers}
        for tag, make_figure in figures.items():
            value = Summary.Value(tag=tag, image=drawn[make_figure])
            self.writer.file_writer.add_summary(Summary(value=[value]), epoch)
        for name, make_figure in files.items():
            with skip_if_open_on_windows(self.run.folder / name) as path, atomic_file(path) as unfinished:
                unfinished.write_bytes(drawn[make_figure].encoded_image_string)
        if files:
            self.draw_seconds += time.thread_time() - start

    def predictions(self) -> MakeFigure:
        """Predict the same few images after every epoch: the tutorial's figure."""
        with evaluation_mode(self.run.eval_model):
            logits = compute_logits(self.run.eval_model, self.example_images, self.device, self.amp_dtype)
        probabilities, predicted = logits.softmax(dim=1).cpu().max(dim=1)
        names = [self.class_names[index] for index in predicted.tolist()]
        pixels = to_pixels(self.example_images)
        return functools.partial(plot_utils.predictions, pixels, names, probabilities.tolist(), self.example_names)

    def reliability(self, validation: Evaluation) -> MakeFigure:
        """Compare the confidence with the accuracy, with and without the epoch's temperature."""
        curves = reliability_curves(validation.logits, validation.labels, self.run.last["temperature"])
        return functools.partial(plot_utils.reliability, curves)

    def worst_mistakes(self, validation: Evaluation) -> dict[str, MakeFigure]:
        """Show the mistakes with the highest loss, with Grad-CAM; nothing if their files no longer exist."""
        positions = validation.worst_mistakes(WORST)
        items = [self.val_images[index] for index in validation.indices[positions].tolist()]
        positions = [position for position, item in zip(positions, items, strict=True) if item is not None]
        if not positions:
            return {}
        images = stack_images([image for image, _ in filter(None, items)])
        predicted, labels = validation.predicted[positions], validation.labels[positions]
        inputs = prepare_batch(images, self.device)
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            heats = grad_cam(self.run.eval_model, inputs, predicted.to(self.device)).cpu().numpy()
        probabilities = validation.probabilities[positions].amax(dim=1).tolist()
        names, label_names = ([self.class_names[index] for index in column.tolist()] for column in (predicted, labels))
        return {
            "worst mistakes": functools.partial(
                plot_utils.mistakes, to_pixels(images), heats, names, probabilities, label_names
            )
        }

    def training_batch(self) -> MakeFigure:
        """Show up to 16 images of the epoch's first batch, augmented as in training.

        If training uses cached features, they come from other augmentations.
        """
        order = self.batches.order
        order.set_epoch(self.run.epoch, img_size=order.img_size, color_jitter=order.color_jitter)
        items = [self.train_images[item] for item in itertools.islice(order, min(self.batches.batch_size, 16))]
        images, labels = self.train_images.collate_fn(items)
        names = [self.class_names[label] for label in labels.tolist()]
        return functools.partial(plot_utils.training_batch, to_pixels(images), names)


def encode(figure: Figure) -> Summary.Image:
    """Encode a figure as PNG with little compression; `SummaryWriter.add_figure` would take twice as long."""
    png = io.BytesIO()
    figure.savefig(png, format="png", pil_kwargs={"compress_level": 1})
    width, height = figure.canvas.get_width_height()
    return Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png.getvalue())


@contextlib.contextmanager
def skip_if_open_on_windows(path: Path) -> Iterator[Path]:
    """Yield `path` to be replaced; if another program has it open on Windows, print a warning and leave it."""
    try:
        yield path
    except PermissionError:
        if os.name != "nt":
            raise
        print(f"warning: another program has {printable(str(path))} open, so it has not been updated")
