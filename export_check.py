"""Compare an exported file, run by a fresh process, with the network it came from."""

import contextlib
import functools
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from classifier import Classifier
from cli_utils import UsageError, map_files
from image_io import ImageError, PixelRange, read_image
from labelled_images import ImageFile
from my_dataset import EvalTransform, stack_images

TOLERANCE = 1e-3  # largest difference of a probability
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
        agreeing: those with the same predicted class, except for ties.
        difference: the largest difference of a probability.
        seconds: by batch size, the median times of the file and of the network.
    """

    images: int = 0
    agreeing: int = 0
    difference: float = 0.0
    seconds: dict[int, tuple[float, float]] = field(default_factory=dict)

    def compare(self, probabilities: Tensor, expected: Tensor) -> None:
        """Count images: compare the file's probabilities with those of the network, (N, classes)."""
        chosen = probabilities.argmax(dim=1, keepdim=True)
        gaps = expected.amax(dim=1) - expected.gather(1, chosen).squeeze(1)
        self.images += len(expected)
        self.agreeing += int((gaps < TIE).sum())
        difference = (probabilities - expected).abs().max().item()
        self.difference = max(self.difference, difference if difference == difference else float("inf"))

    def lines(self) -> Iterator[str]:
        """Yield the lines to print."""
        yield f"check     {self.agreeing} of {self.images} images get the same class, in a fresh process"
        yield f"          largest difference of a probability: {self.difference:.1e}"
        for size, (own, other) in self.seconds.items():
            if size == 1:
                yield f"speed     1 image: {1000 * own:.1f} ms, by the weights file {1000 * other:.1f} ms"
            else:
                yield f"          batches of {size}: {size / own:.1f} images/s, by the weights file {size / other:.1f}"


class ExportedProcess:
    """A fresh process that runs an exported file, see run_exported.py."""

    def __init__(self, process: subprocess.Popen, errors: "tempfile._TemporaryFileWrapper") -> None:
        self.process, self.errors = process, errors

    def predict(self, images: Tensor) -> tuple[Tensor, float]:
        """Return the probabilities of images, uint8 (N, 3, H, W) or (3, H, W), and the seconds that this took.

        Raises:
            ExportCheckError: the process has failed.
        """
        try:
            self.process.stdin.write(json.dumps({"shape": [*images.shape]}).encode() + b"\n")
            self.process.stdin.write(images.contiguous().numpy().tobytes())
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # see the answer
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            reason = self.errors.read().decode(errors="replace").strip().rpartition("\n")[-1]
            raise ExportCheckError(f"the exported file cannot be run, and was removed: {reason}")
        content = json.loads(answer)
        return torch.tensor(content["probabilities"]), content["seconds"]


@contextlib.contextmanager
def start_process(path: Path) -> Iterator[ExportedProcess]:
    """Start a process that runs an exported file."""
    program = Path(__file__).with_name("run_exported.py")
    with tempfile.TemporaryFile() as errors:
        command = [sys.executable, str(program), str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as process:
            try:
                yield ExportedProcess(process, errors)
            finally:
                process.kill()


def check_exported_file(
    path: Path, classifier: Classifier, files: Sequence[ImageFile], batch: int | None, with_resize: bool
) -> CheckResult:
    """Compare an exported file with its network on images, and measure the speed of both.

    Args:
        batch: the file's batch size; None if any.
        with_resize: whether the file takes one image of any size.

    Raises:
        ExportCheckError: the file cannot be run, or the predictions differ.
    """
    result = CheckResult()
    size = 1 if with_resize else batch or BATCH_SIZE
    backend = classifier.backend
    read = functools.partial(
        read_inputs, transform=backend.transform, pixel_range=classifier.info["pixel_range"], whole=with_resize
    )
    items = map_files(read, [file.path for file in files], None, "checking")
    with start_process(path) as process:
        pairs: list[tuple[Tensor, Tensor]] = []
        for item in items:
            if isinstance(item, ImageError):  # it has been reported
                continue
            pairs.append(item)
            if len(pairs) == size:
                compare_batch(result, process, classifier, pairs, size, with_resize)
                last, pairs = pairs, []
        if pairs:
            compare_batch(result, process, classifier, pairs, size, with_resize)
            last = pairs
        if not result.images:
            raise ExportCheckError(f"none of the {len(files)} images is readable; pass --images FOLDER")
        if result.difference > TOLERANCE or result.agreeing < result.images:
            raise ExportCheckError(
                f"the exported file disagrees with the network, and was removed: {result.images - result.agreeing} of "
                f"{result.images} images get another class, largest difference of a probability {result.difference:.1e}"
            )
        for count in (size,) if batch or with_resize else (1, BATCH_SIZE):
            chosen = list(itertools.islice(itertools.cycle(last), count))
            result.seconds[count] = measure_speed(process, classifier, chosen, with_resize)
    return result


def read_inputs(
    path: str, transform: EvalTransform, pixel_range: PixelRange | None, whole: bool
) -> tuple[Tensor, Tensor] | ImageError:
    """Return an image as the file takes it and as the network takes it, both uint8 (3, H, W)."""
    try:
        if not whole:
            image = transform(read_image(path, transform.min_side, pixel_range))
            return image, image
        image = pil_to_tensor(read_image(path, pixel_range=pixel_range))
        return image, transform(image)
    except ImageError as error:
        return error


def compare_batch(
    result: CheckResult,
    process: ExportedProcess,
    classifier: Classifier,
    pairs: Sequence[tuple[Tensor, Tensor]],
    size: int,
    with_resize: bool,
) -> None:
    """Compare the predictions for up to `size` images; fewer are padded."""
    padded = [*pairs, *[pairs[0]] * (size - len(pairs))]
    probabilities, _ = process.predict(to_input(padded, with_resize))
    expected = classifier.probabilities(classifier.backend.predict([image for _, image in padded]).logits)
    result.compare(probabilities[: len(pairs)], expected[: len(pairs)])


def to_input(pairs: Sequence[tuple[Tensor, Tensor]], with_resize: bool) -> Tensor:
    """Return the images of a batch as the exported file takes them."""
    images = [image for image, _ in pairs]
    return images[0] if with_resize else stack_images(images)


def measure_speed(
    process: ExportedProcess, classifier: Classifier, pairs: Sequence[tuple[Tensor, Tensor]], with_resize: bool
) -> tuple[float, float]:
    """Return the median seconds per batch by the exported file and by the network, measured alternately."""
    images, inputs = to_input(pairs, with_resize), [image for _, image in pairs]

    def resize_and_predict() -> None:
        classifier.backend.predict([classifier.backend.transform(images)] if with_resize else inputs)

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
