"""Compare an exported file, run by a fresh process, with the network it came from."""

import contextlib
import functools
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from classifier import Classifier
from cli_utils import UsageError, map_files
from image_io import ImageError, PixelRange, read_image
from labelled_images import ErrorLog, ImageFile
from my_dataset import EXTREME, MAX_ASPECT_RATIO, EvalTransform, stack_images

TOLERANCE = 1e-3  # largest difference of a probability
MAX_ACCURACY_DROP = 0.01  # with --int8
TIE = 1e-4  # two classes whose probabilities differ by less are equally probable
BATCH_SIZE = 8
ROUNDS = 5  # of the speed measurement


class ExportCheckError(UsageError):
    """The exported file does not work, or disagrees with the network."""


@dataclass
class CheckResult:
    """The agreement of a file with its network, and the speed of both.

    Attributes:
        images: the number of compared images.
        agreeing: the number of images with the same predicted class; ties count as agreement.
        difference: the maximum absolute difference in probability.
        correct: the numbers of labelled images that the file and the network classify correctly.
        labelled: the number of labelled images.
        seconds: batch size -> median seconds per batch of the file and of the network.
    """

    images: int = 0
    agreeing: int = 0
    difference: float = 0.0
    correct: tuple[int, int] = (0, 0)
    labelled: int = 0
    seconds: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def accuracy_drop(self) -> float:
        """The accuracy of the network minus that of the file, on the labelled images."""
        return (self.correct[1] - self.correct[0]) / max(1, self.labelled)

    def compare(self, probabilities: Tensor, expected: Tensor, labels: Tensor) -> None:
        """Compare one batch, and add it to the totals.

        Args:
            probabilities: (N, classes), of the file.
            expected: (N, classes), of the network.
            labels: (N,) int64, -1 if unknown.
        """
        self.correct = tuple(
            hits + int((each.argmax(dim=1) == labels).sum())
            for hits, each in zip(self.correct, (probabilities, expected), strict=True)
        )
        self.labelled += int((labels >= 0).sum())
        chosen = probabilities.argmax(dim=1, keepdim=True)
        gaps = expected.amax(dim=1) - expected.gather(1, chosen).squeeze(1)
        self.images += len(expected)
        self.agreeing += int((gaps < TIE).sum())
        difference = (probabilities - expected).abs().max().item()
        self.difference = max(self.difference, math.inf if math.isnan(difference) else difference)

    def format_lines(self) -> Iterator[str]:
        """Yield the lines to print."""
        yield f"check     {self.agreeing} of {self.images} images are predicted as the same class, in a fresh process"
        yield f"          maximum difference in probability {self.difference:.1e}"
        if self.labelled:
            own, other = (f"{hits / self.labelled:.4f}" for hits in self.correct)
            yield f"          accuracy {own}, original network {other}"
        for size, (own, other) in self.seconds.items():
            if size == 1:
                yield f"speed     1 image: {1000 * own:.1f} ms, original network {1000 * other:.1f} ms"
            else:
                yield f"          batches of {size}: {size / own:.1f} images/s, original network {size / other:.1f}"


class ExportedProcess:
    """A fresh process that runs an exported file, see run_exported.py.

    Attributes:
        whole: the file takes one whole image instead of a batch.
    """

    def __init__(self, process: subprocess.Popen, errors: BinaryIO, whole: bool) -> None:
        self.process, self.errors, self.whole = process, errors, whole

    def predict(self, images: Sequence[Tensor]) -> tuple[Tensor, float]:
        """Return the probabilities of images, each uint8 (3, H, W), and the seconds that this took.

        Raises:
            ExportCheckError: the process has failed.
        """
        batch = images[0] if self.whole else stack_images(images)
        try:
            self.process.stdin.write(json.dumps({"shape": [*batch.shape]}).encode() + b"\n")
            self.process.stdin.write(batch.contiguous().numpy().tobytes())
            self.process.stdin.flush()
        except OSError:  # BrokenPipeError, or EINVAL on Windows
            pass  # reported below, as there is no answer
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            reason = self.errors.read().decode(errors="replace").strip().rpartition("\n")[-1]
            raise ExportCheckError(f"the exported file cannot be run, and was not saved: {reason}")
        content = json.loads(answer)
        return torch.tensor(content["probabilities"]), content["seconds"]


@contextlib.contextmanager
def start_process(path: Path, whole: bool) -> Iterator[ExportedProcess]:
    """Start a process that runs an exported file."""
    program = Path(__file__).with_name("run_exported.py")
    with tempfile.TemporaryFile() as errors:
        command = [sys.executable, str(program), str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as process:
            try:
                yield ExportedProcess(process, errors, whole)
            finally:
                process.kill()
                with contextlib.suppress(OSError):  # the pipe of a process that has ended cannot be flushed
                    process.stdin.close()


def check_exported_file(
    path: Path,
    classifier: Classifier,
    files: Sequence[ImageFile],
    log: ErrorLog,
    *,
    batch: int | None,
    with_resize: bool,
    int8: bool,
) -> CheckResult:
    """Compare an exported file with its network on images, and measure the speed of both.

    Args:
        batch: the file's batch size; None if any.
        with_resize: whether the file takes one image of any size.
        int8: accept different predictions, provided that the accuracy is at most one percentage point lower.

    Raises:
        ExportCheckError: the file cannot be run, or the predictions differ.
    """
    result = CheckResult()
    size = 1 if with_resize else batch or BATCH_SIZE
    backend = classifier.backend
    read = functools.partial(
        read_inputs, transform=backend.transform, pixel_range=classifier.info["pixel_range"], whole=with_resize
    )
    indices = {name: index for index, name in enumerate(classifier.class_names)}
    labels = [indices.get(file.label, -1) for file in files]
    workers = 0 if with_resize else None  # whole images would take gigabytes in the queues of the workers
    items = zip(map_files(read, [file.path for file in files], workers, "checking"), labels, strict=True)
    with start_process(path, with_resize) as process:
        while chosen := [*itertools.islice(readable(items, log), size)]:
            pairs = [pair for pair, _ in chosen]
            compare_batch(result, process, classifier, pairs, torch.tensor([label for _, label in chosen]), size)
        if not result.images:
            raise ExportCheckError(f"none of the {len(files)} images is readable; pass --images FOLDER")
        if int8 and not result.labelled:
            raise ExportCheckError("--int8: the check needs labelled images; pass --images with class folders")
        if int8 and result.accuracy_drop > MAX_ACCURACY_DROP:
            raise ExportCheckError(
                f"--int8 lowers the accuracy on {result.labelled} images by {100 * result.accuracy_drop:.2f} "
                f"percentage points; the file was not saved, as at most {100 * MAX_ACCURACY_DROP:.0f} is accepted"
            )
        if not int8 and (result.difference > TOLERANCE or result.agreeing < result.images):
            others = result.images - result.agreeing
            raise ExportCheckError(
                f"the exported file disagrees with the network, and was not saved: {others} of {result.images} images "
                f"are predicted as another class; maximum difference in probability {result.difference:.1e}"
            )
        for count in (size,) if batch or with_resize else (1, BATCH_SIZE):
            images = itertools.islice(itertools.cycle(image for image, _ in pairs), count)
            result.seconds[count] = measure_speed(process, classifier, [*images])
    return result


def readable(items: Iterator[tuple[Any, int]], log: ErrorLog) -> Iterator[tuple[tuple[Tensor, Tensor], int]]:
    """Yield the items that are not errors, and report the others."""
    for item, label in items:
        if isinstance(item, ImageError):
            log.fail(item)
        else:
            yield item, label


def read_inputs(
    path: str, transform: EvalTransform, pixel_range: PixelRange | None, whole: bool
) -> tuple[Tensor, Tensor] | ImageError:
    """Return an image as the file takes it and as the network takes it, both uint8 (3, H, W)."""
    try:
        if not whole:
            image = transform(read_image(path, transform.min_side, pixel_range))
            return image, image
        image = pil_to_tensor(read_image(path, pixel_range=pixel_range))
        if max(image.shape[1:]) > MAX_ASPECT_RATIO * min(image.shape[1:]):
            raise ImageError(f"{path}: {EXTREME}, which --with-resize does not support")
        return image, transform(image)
    except ImageError as error:
        return error


def compare_batch(
    result: CheckResult,
    process: ExportedProcess,
    classifier: Classifier,
    pairs: Sequence[tuple[Tensor, Tensor]],
    labels: Tensor,
    size: int,
) -> None:
    """Compare the predictions for up to `size` images; fewer are padded."""
    padded = [*pairs, *[pairs[0]] * (size - len(pairs))]
    probabilities, _ = process.predict([image for image, _ in padded])
    expected = classifier.probabilities(classifier.backend.predict([image for _, image in padded]).logits)
    result.compare(probabilities[: len(pairs)], expected[: len(pairs)], labels)


def measure_speed(process: ExportedProcess, classifier: Classifier, images: Sequence[Tensor]) -> tuple[float, float]:
    """Return the median seconds per batch by the exported file and by the network, measured alternately.

    Args:
        images: as the file takes them.
    """
    backend = classifier.backend

    def resize_and_predict() -> None:
        backend.predict([backend.transform(image) for image in images] if process.whole else images)

    own, other = [], []
    for _ in range(ROUNDS + 1):
        own += [process.predict(images)[1] for _ in range(2)]
        other += [timed(resize_and_predict) for _ in range(2)]
    return statistics.median(own[2:]), statistics.median(other[2:])


def timed(function: Callable[[], None]) -> float:
    """Return the seconds that a call takes."""
    started_at = time.perf_counter()
    function()
    return time.perf_counter() - started_at
