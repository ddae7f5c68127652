"""Classify images with a trained network.

python predict.py photo.jpg                              # with the best weights of the most recent run
python predict.py photo.jpg a_folder --weights runs/flower_experiment/weights/best.pth
python predict.py a_folder --json > predictions.jsonl
python predict.py a_folder --sort-into sorted --min-confidence 0.9
python predict.py photo.jpg --save-plot prediction.png   # with a Grad-CAM heat map
python predict.py a_folder --csv predictions.csv --save-plot least_certain.png
python predict.py photo.jpg --weights model-29.pth --class-indices class_indices.json
"""

import argparse
import itertools
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from classifier import Classifier, Outcome, add_classifier_flags, build_classifier
from cli_utils import (
    FIGURE_FORMATS,
    MANY_FILES,
    FlagParser,
    UsageError,
    checked,
    print_note,
    printable,
    run_program,
    shorten,
)
from file_utils import atomic_file, output_path, write_csv
from image_folders import file_checksum
from image_io import ImageError
from labelled_images import ErrorLog, ImageFile, find_and_report, require_outside, require_writable
from model import ResNet, grad_cam
from my_dataset import prepare_batch, stack_images, to_pixels
from weights_io import newest_weights

FIGURE_IMAGES = 24  # maximum in --save-plot: the least certain ones
SUBSETS = {"new": "images", "val": "validation images of the run", "train": "training images of the run"}
SIGNATURE = b"predict.py --save-plot"  # the comment in a JPEG figure


class Prediction(NamedTuple):
    """A classified image.

    Attributes:
        image: (3, H, W) uint8.
        index: the index of the predicted class.
        top: (name, probability) of the most probable classes, in descending order.
        is_unsure: whether the probability is below --min-confidence.
        is_unfamiliar: see `Outcome`.
    """

    file: ImageFile
    image: Tensor
    index: int
    top: list[tuple[str, float]]
    is_unsure: bool
    is_unfamiliar: bool

    @property
    def name(self) -> str:
        """The name of the predicted class."""
        return self.top[0][0]

    @property
    def probability(self) -> float:
        """The probability of the predicted class."""
        return self.top[0][1]

    @property
    def flags(self) -> list[str]:
        """What is doubtful about the prediction."""
        return ["unsure"] * self.is_unsure + ["unfamiliar"] * self.is_unfamiliar


def predict(args: argparse.Namespace) -> int:
    """Classify the images; return the exit status, which is 1 if an input is unreadable."""
    plot_path = output_file("--save-plot", args.save_plot, args.images, FIGURE_FORMATS)
    csv_path = output_file("--csv", args.csv, args.images)
    classifier = build_classifier(args, args.weights or newest_weights())
    class_names = classifier.class_names
    if plot_path and classifier.model is None:
        raise UsageError(
            "--save-plot: Grad-CAM needs feature maps, which an ONNX file does not return; pass best.pth or a .pt2 file"
        )
    print_note(str(classifier))

    log = ErrorLog("predict.py")
    files = [file for argument in args.images for file in find_and_report(argument, class_names, log)]
    sorter = Sorter(args.sort_into, args.images, files, class_names) if args.sort_into else None

    plotted: list[Prediction] = []
    rows = []
    hits: dict[tuple[str, str], list[Hit]] = {}  # by command-line argument and subset
    outcomes = classifier.classify([file.path for file in files], any(file.label is not None for file in files))
    for file, outcome in zip(files, outcomes, strict=True):
        if isinstance(outcome, ImageError):
            log.fail(outcome)
            continue
        prediction = make_prediction(file, outcome, classifier, args.topk, args.min_confidence)
        print_prediction(prediction, args.json)
        if file.label is not None:
            hit = Hit(file.label, prediction.name == file.label, prediction.is_unsure)
            hits.setdefault((file.argument, outcome.subset), []).append(hit)
        if sorter:
            sorter.copy(prediction)
        if csv_path:
            rows.append(csv_row(prediction))
        if plot_path:
            plotted.append(prediction)
            if len(plotted) > FIGURE_IMAGES:
                del plotted[max(range(len(plotted)), key=lambda index: plotted[index].probability)]

    print_accuracies(hits, len(class_names), print_note if args.json else print)
    if sorter:
        print_note(str(sorter))
    if rows:
        write_csv(rows, csv_path, columns=("image", "class", "probability", "label", "flags"))
        print_note(f"predictions: {csv_path}")
    if plotted:
        if any(Path(argument).is_dir() for argument in args.images):
            plotted.sort(key=lambda prediction: prediction.probability)
        save_figure(classifier.model, plotted, plot_path, classifier.device)
        print_note(f"figure: {plot_path}")
    return 1 if log.failures else 0


def make_prediction(
    file: ImageFile, outcome: Outcome, classifier: Classifier, topk: int, min_confidence: float
) -> Prediction:
    """Rank the classes of an image."""
    probabilities = classifier.probabilities(outcome.logits)
    ranking = probabilities.argsort(descending=True).tolist()[:topk]
    top = [(classifier.class_names[index], probabilities[index].item()) for index in ranking]
    return Prediction(file, outcome.image, ranking[0], top, top[0][1] < min_confidence, outcome.is_unfamiliar)


def output_file(flag: str, name: str | None, inputs: Sequence[str], formats: Sequence[str] = ()) -> Path | None:
    """Call `output_path`, and refuse to overwrite an input or an image: the shell may expand `--save-plot *.jpg`.

    Raises:
        UsageError: the file is one of `inputs`, or an image. For other errors, see `output_path`.
    """
    path = output_path(flag, name, formats)
    if path is not None and (is_foreign_image(path) or path.resolve() in [Path(other).resolve() for other in inputs]):
        raise UsageError(f"{flag} {path}: would overwrite an image or a table; choose another name")
    return path


def is_foreign_image(path: Path) -> bool:
    """Return whether `path` is an image that --save-plot did not write."""
    if not path.is_file():
        return False
    try:
        with Image.open(path) as image:  # matplotlib adds "Software" to a PNG
            return not (image.info.get("comment") == SIGNATURE or "Matplotlib" in str(image.info.get("Software")))
    except Image.DecompressionBombError:
        return True
    except OSError:  # not an image, or unreadable
        return False


class Hit(NamedTuple):
    """The result for a labelled image."""

    label: str
    is_right: bool
    is_unsure: bool


def print_accuracies(
    hits: Mapping[tuple[str, str], list[Hit]], num_classes: int, print_line: Callable[[str], None]
) -> None:
    """Print the accuracy on the labelled images, one line per command-line argument and subset.

    Args:
        hits: by argument and key of `SUBSETS`.
    """
    for argument, subset in itertools.product(dict.fromkeys(argument for argument, _ in hits), SUBSETS):
        if images := hits.get((argument, subset)):
            covered = len({hit.label for hit in images})
            coverage = f", {covered} of {num_classes} classes" if covered < num_classes else ""
            line = f"{printable(argument)}: accuracy {_accuracy(images, f' {SUBSETS[subset]}{coverage}')}"
            sure = [hit for hit in images if not hit.is_unsure]
            print_line(line if len(sure) == len(images) else f"{line}; without unsure images {_accuracy(sure)}")


def _accuracy(hits: Sequence[Hit], images: str = "") -> str:
    right = sum(hit.is_right for hit in hits)
    return f"{right / len(hits):.4f} ({right} of {len(hits)}{images})" if hits else "unknown (0 images)"


def print_prediction(prediction: Prediction, as_json: bool) -> None:
    """Print a prediction in one line, as text or JSON."""
    path, label, *_ = prediction.file
    if as_json:
        line = {"image": path, "class": prediction.name, "probability": round(prediction.probability, 6)}
        if label is not None:
            line["label"] = label
        line["flags"] = prediction.flags
        line["top"] = [{"class": name, "probability": round(value, 6)} for name, value in prediction.top]
        print(json.dumps(line), flush=True)
    else:
        ranking = ", ".join(f"{printable(name)} {value:.2%}" for name, value in prediction.top)
        flags = f"{', '.join(prediction.flags)}: " if prediction.flags else ""
        mark = "" if label in (None, prediction.name) else f"  (label: {printable(label)})"
        print(f"{printable(path)}: {flags}{ranking}{mark}", flush=True)


def csv_row(prediction: Prediction) -> dict[str, str]:
    """Return the --csv row: image, class, probability, label if known, flags, and the other top classes."""
    (path, label, *_), (first, *others) = prediction.file, prediction.top
    row = {"image": path, "class": first[0], "probability": f"{first[1]:.6f}", "label": label or ""}
    row["flags"] = " ".join(prediction.flags)
    for rank, (name, probability) in enumerate(others, start=2):
        row |= {f"class {rank}": name, f"probability {rank}": f"{probability:.6f}"}
    return row


class Sorter:
    """Copies images into folders named after their predicted classes, for --sort-into. Overwrites nothing.

    Args:
        folder: created if it is missing.
        inputs: the command-line arguments that name `files`.

    Raises:
        UsageError: the folder contains images to sort, is inside a folder that is searched, or cannot be written to; or
            a class name cannot be the name of its sub-folder.
    """

    def __init__(
        self, folder: str, inputs: Sequence[str], files: Sequence[ImageFile], class_names: Sequence[str]
    ) -> None:
        self.folder = Path(folder)
        self.copied: Counter[str] = Counter()
        self.existing = 0
        require_writable("--sort-into", self.folder)
        require_outside("--sort-into", self.folder, [*filter(os.path.isdir, inputs), *(file.path for file in files)])
        for name in class_names:
            is_reserved = name in ("", ".", "..", "unsure", "unfamiliar")
            if is_reserved or len(os.fsencode(name)) > 255 or any(character in name for character in "/\\:\0"):
                raise UsageError(f"--sort-into: the class name {shorten(repr(name))} cannot be the name of a folder")

    def copy(self, prediction: Prediction) -> None:
        """Copy an image, adding a number if the name is taken. Skip it if an identical copy exists."""
        source, name = Path(prediction.file.path), (prediction.flags or [prediction.name])[-1]
        target = self.folder / name / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(2):
            if not os.path.lexists(target):
                break
            if file_checksum(str(target)) == file_checksum(str(source)):
                self.existing += 1
                return
            target = target.with_name(f"{source.stem}-{number}{source.suffix}")
        with atomic_file(target) as unfinished:
            shutil.copy2(source, unfinished)
        self.copied[name] += 1

    def __str__(self) -> str:
        copied = ", ".join(f"{name} {count}" for name, count in self.copied.items())
        existing = f"; {self.existing} were there already" if self.existing else ""
        return f"copied {self.copied.total()} images into {self.folder}{f' ({copied})' if copied else ''}{existing}"


def save_figure(model: ResNet, predictions: list[Prediction], path: Path, device: torch.device) -> None:
    """Plot each image beside its Grad-CAM heat map and a bar for each of its top classes."""
    from plot_utils import explained  # imports matplotlib, which is slow to load

    batch = stack_images([prediction.image for prediction in predictions])
    classes = torch.tensor([prediction.index for prediction in predictions], device=device)
    heats = grad_cam(model, prepare_batch(batch, device), classes).cpu().numpy()
    tops, files = [prediction.top for prediction in predictions], [prediction.file for prediction in predictions]
    paths, labels, *_ = zip(*files, strict=True)
    figure = explained(to_pixels(batch), heats, tops, list(paths), list(labels))
    is_jpeg = path.suffix.lower() in (".jpg", ".jpeg")
    with atomic_file(path) as unfinished:
        figure.savefig(unfinished, **({"pil_kwargs": {"comment": SIGNATURE}} if is_jpeg else {}))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Exits with a one-line message if a value is invalid."""
    parser = FlagParser(prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="an image, a folder that is searched for images, or a CSV table")
    positive = checked(int, lambda n: n >= 1, "at least 1")
    add("--topk", type=positive, default=3, help="number of classes to print per image (default: %(default)s)")
    unsure_help = "mark an image as unsure if its highest probability is below P (default: %(default)g)"
    probability = checked(float, lambda x: 0 <= x <= 1, "from 0 to 1")
    add("--min-confidence", type=probability, default=0.0, metavar="P", help=unsure_help)
    sort_help = "copy each image into DIR/CLASS, DIR/unsure or DIR/unfamiliar"
    add("--sort-into", type=checked(str, bool, "the name of a folder"), metavar="DIR", help=sort_help)
    add("--json", action="store_true", help="print one JSON object per line")
    add("--csv", metavar="OUT.csv", help="also write the predictions to a CSV file")
    plot_help = f"plot the images (at most {FIGURE_IMAGES}, the least certain ones) with Grad-CAM heat maps"
    add("--save-plot", metavar="OUT.png", help=plot_help)
    add_classifier_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program(
        "predict.py",
        lambda: predict(parse_args(argv)),
        memory_advice="close other programs, or try --device cpu",
        worker_advice=f"try at most {MANY_FILES} images at a time",
    )


if __name__ == "__main__":
    sys.exit(main())
