"""Classify images with a trained network.

python predict.py photo.jpg                              # with the best weights of the most recent run
python predict.py photo.jpg a_folder --weights runs/flower_experiment/weights/best.pth
python predict.py a_folder --json > predictions.jsonl
python predict.py photo.jpg --save-plot prediction.png   # with a Grad-CAM heat map
python predict.py a_folder --csv predictions.csv --save-plot least_certain.png
python predict.py photo.jpg --weights model-29.pth --class-indices class_indices.json
"""

import argparse
import functools
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from class_files import normalise, read_class_indices
from cli_utils import (
    FIGURE_FORMATS,
    MANY_FILES,
    DataError,
    FlagParser,
    UsageError,
    map_files,
    output_path,
    print_note,
    printable,
    run_program,
    select_device,
    select_precision,
)
from file_utils import atomic_file, write_csv
from image_folders import (
    UNREADABLE,
    UNSUPPORTED,
    Skipped,
    count_skipped,
    file_checksum,
    likely_class,
    list_images,
    read_run_checksums,
)
from image_io import ImageError, PixelRange, read_image
from inference import compute_logits
from model import MODELS, ResNet, evaluation_mode, fold_batch_norm, grad_cam
from my_dataset import EvalTransform, prepare_batch, stack_images, to_pixels
from tables import is_table, read_table
from weights_io import load_model, newest_weights

# Every batch has this size; the last one is padded. Kernels round differently for other batch sizes, so an image's
# printed probabilities would depend on the number of images.
BATCH_SIZE = 8
FIGURE_IMAGES = 24  # maximum in --save-plot: the least certain ones
SUBSETS = {"new": "images", "val": "validation images of the run", "train": "training images of the run"}
SIGNATURE = b"predict.py --save-plot"  # the comment in a JPEG figure


class ImageFile(NamedTuple):
    """An image to classify.

    Attributes:
        label: the class that a folder or a table names, if any.
        argument: the command-line argument that the image belongs to.
        unknown_label: the label in a table if it is not a class.
    """

    path: str
    label: str | None
    argument: str
    unknown_label: str = ""


class Prediction(NamedTuple):
    """A classified image (3, H, W) uint8, the index of its predicted class, and (name, probability) of the top ones."""

    file: ImageFile
    image: Tensor
    index: int
    top: list[tuple[str, float]]

    @property
    def name(self) -> str:
        """The name of the predicted class."""
        return self.top[0][0]

    @property
    def probability(self) -> float:
        """The probability of the predicted class."""
        return self.top[0][1]


class ErrorLog:
    """Prints warnings and errors to standard error, and counts the errors."""

    def __init__(self) -> None:
        self.failures = 0

    def warn(self, message: object) -> None:
        """Print a message that does not change the exit status."""
        print_note(f"predict.py: {message}")

    def fail(self, error: object) -> None:
        """Print an error, which makes the exit status 1."""
        self.warn(error)
        self.failures += 1


def predict(args: argparse.Namespace) -> int:
    """Classify the images; return the exit status, which is 1 if an input is unreadable."""
    plot_path = output_file("--save-plot", args.save_plot, args.images, FIGURE_FORMATS)
    csv_path = output_file("--csv", args.csv, args.images)
    device = select_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    amp_dtype, _ = select_precision(args.amp, device)
    torch.backends.cudnn.allow_tf32 = False  # full float32 precision: probabilities are printed to four digits
    class_names = read_class_indices(args.class_indices) if args.class_indices else None
    weights = args.weights or newest_weights()
    model, info = load_model(weights, device, args.model, class_names, img_size=args.img_size)
    class_names = info["class_names"]
    print_note(f"weights {weights}: {describe_model(info)}")

    log = ErrorLog()
    files = [file for argument in args.images for file in find_and_report(argument, class_names, log)]

    plotted: list[Prediction] = []
    rows = []
    subsets = read_run_checksums(Path(weights).absolute().parent.parent / "files.json")
    hits: dict[tuple[str, str], list[tuple[str, bool]]] = {}  # by command-line argument and subset
    read = functools.partial(
        read_or_error,
        transform=EvalTransform(info["img_size"], info["resize"]),
        pixel_range=info["pixel_range"],
        with_checksum=bool(subsets) and any(file.label is not None for file in files),
    )
    for file, outcome in predict_images(model, files, read, info["img_size"], device, amp_dtype):
        if isinstance(outcome, ImageError):
            log.fail(outcome)
            continue
        image, checksum, probabilities = outcome
        ranking = probabilities.argsort(descending=True).tolist()[: args.topk]
        top = [(class_names[index], probabilities[index].item()) for index in ranking]
        prediction = Prediction(file, image, ranking[0], top)
        print_prediction(prediction, args.json)
        if file.label is not None:
            key = file.argument, subsets.get(checksum, "new")
            hits.setdefault(key, []).append((file.label, prediction.name == file.label))
        if csv_path:
            rows.append(csv_row(prediction))
        if plot_path:
            plotted.append(prediction)
            if len(plotted) > FIGURE_IMAGES:
                del plotted[max(range(len(plotted)), key=lambda index: plotted[index].probability)]

    print_accuracies(hits, len(class_names), print_note if args.json else print)
    if csv_path:
        write_csv(rows, csv_path, columns=("image", "class", "probability", "label"))
        print_note(f"predictions: {csv_path}")
    if plotted:
        if any(Path(argument).is_dir() for argument in args.images):
            plotted.sort(key=lambda prediction: prediction.probability)
        save_figure(model, plotted, plot_path, device)
        print_note(f"figure: {plot_path}")
    return 1 if log.failures else 0


def describe_model(info: Mapping[str, Any]) -> str:
    """Describe a loaded model in one line. `info` is from `load_model`."""
    source = f" ({info['img_size_source']})" if "img_size_source" in info else ""
    line = f"{info['model']}, {len(info['class_names'])} classes, {info['img_size']} px{source}"
    if isinstance(info["epoch"], int):
        line += f", epoch {info['epoch']}"
    if isinstance(info["accuracy"], float):
        line += f", accuracy {info['accuracy']:.3f}"
    return line


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


def find_images(argument: str, class_names: list[str], skipped: list[Skipped]) -> list[ImageFile]:
    """List an image, or all images in a table or below a folder.

    In a folder, the first sub-folder named after a class labels its images.

    Args:
        skipped: receives the other files, and unreadable sub-folders.

    Raises:
        FileNotFoundError: the file or folder is missing.
        DataError: the folder has no images, or the table is invalid.
    """
    root = Path(argument)
    known = {normalise(name): name for name in class_names}
    if argument and is_table(root):
        rows = read_table(root, needs_labels=False)
        return [
            ImageFile(row.path, known.get(row.label), argument, "" if row.label in known else row.label) for row in rows
        ]
    if not argument or not root.exists():  # "" is an unset shell variable; Path("") is the current folder
        raise FileNotFoundError(f"{argument!r}: no such file or folder")
    if not root.is_dir():
        return [ImageFile(argument, None, argument)]
    files = []
    for path in list_images(root, skipped):
        folders = map(normalise, Path(path).relative_to(root).parts[:-1])
        files.append(ImageFile(path, next((known[name] for name in folders if name in known), None), argument))
    if not files:
        found = f", only {count_skipped(skipped)}" if skipped else ""
        raise DataError(f"{argument!r}: no images in this folder{found}")
    return files


def find_and_report(argument: str, class_names: list[str], log: ErrorLog) -> list[ImageFile]:
    """Call `find_images`, and report errors, skipped files and images without a label."""
    skipped: list[Skipped] = []
    try:
        files = find_images(argument, class_names, skipped)
    except (OSError, DataError) as error:
        log.fail(error)
        return []
    for line in describe_unlabelled(files, class_names):
        log.warn(line)
    for folder in skipped:
        if folder.kind == UNREADABLE:
            log.fail(folder)
    if others := [file for file in skipped if file.kind != UNREADABLE]:
        report = log.fail if any(file.kind == UNSUPPORTED for file in others) else log.warn
        report(f"{argument}: skipped {count_skipped(others)}")
    return files


def describe_unlabelled(files: list[ImageFile], class_names: list[str]) -> list[str]:
    """Describe the images outside class folders, one line per folder, or those with unknown labels in a table.

    Returns:
        The lines to print; none if no folder has the name of a class or a similar one, or no row has a class as label.
    """
    if files and is_table(files[0].argument):
        labels = Counter(file.unknown_label for file in files if file.unknown_label)
        return [_without_label(files[0].argument, labels[name], name, class_names) for name in labels]
    folders = Counter(Path(file.path).parent for file in files if file.label is None and file.path != file.argument)
    likely = {folder: likely_class(folder.name, class_names) for folder in folders if folder != Path(files[0].argument)}
    if all(file.label is None for file in files) and not any(likely.values()):
        return []
    return [
        _without_label(folder, count, folder.name if folder in likely else None, class_names)
        for folder, count in folders.items()
    ]


def _without_label(place: str | Path, count: int, name: str | None, class_names: list[str]) -> str:
    images = "1 image" if count == 1 else f"{count} images"
    if name is None:
        return f"{place}: {images} without a label: not in a class folder"
    likely = likely_class(name, class_names)
    return f"{place}: {images} without a label: {name} is not a class{f'; is it {likely}?' if likely else ''}"


def read_or_error(
    path: str, transform: EvalTransform, pixel_range: PixelRange | None, with_checksum: bool
) -> tuple[Tensor, str | None] | ImageError:
    """Read an image as uint8 (3, H, W), and its file's checksum. Returns an error instead of raising it."""
    try:
        image = transform(read_image(path, transform.min_side, pixel_range))
    except ImageError as error:
        return error
    return image, file_checksum(path) if with_checksum else None


def predict_images(
    model: ResNet,
    files: list[ImageFile],
    read: Callable[[str], tuple[Tensor, str | None] | ImageError],
    img_size: int,
    device: torch.device,
    amp_dtype: torch.dtype | None,
) -> Iterator[tuple[ImageFile, tuple[Tensor, str | None, Tensor] | ImageError]]:
    """Classify `files` in order.

    Args:
        read: see `read_or_error`.

    Yields:
        Each file with its image (3, H, W) uint8, checksum and probabilities (classes,), or with its `ImageError`.
    """
    loaded = zip(files, map_files(read, [file.path for file in files]), strict=True)
    model = fold_batch_norm(model)
    blank = torch.zeros(3, img_size, img_size, dtype=torch.uint8)
    while batch := list(itertools.islice(loaded, BATCH_SIZE)):
        images = [blank if isinstance(item, ImageError) else item[0] for _, item in batch]
        images += [blank] * (BATCH_SIZE - len(images))
        with evaluation_mode(model):
            probabilities = compute_logits(model, stack_images(images), device, amp_dtype).softmax(dim=1).cpu()
        for (file, item), row in zip(batch, probabilities, strict=False):
            yield file, item if isinstance(item, ImageError) else (*item, row)


def print_accuracies(
    hits: Mapping[tuple[str, str], list[tuple[str, bool]]], num_classes: int, print_line: Callable[[str], None]
) -> None:
    """Print the accuracy on the labelled images, one line per command-line argument and subset.

    Args:
        hits: by argument and key of `SUBSETS`, each image's label and whether its prediction is right.
    """
    for argument, subset in itertools.product(dict.fromkeys(argument for argument, _ in hits), SUBSETS):
        if images := hits.get((argument, subset)):
            right, covered = sum(hit for _, hit in images), len({label for label, _ in images})
            coverage = f", {covered} of {num_classes} classes" if covered < num_classes else ""
            counts = f"{right} of {len(images)} {SUBSETS[subset]}{coverage}"
            print_line(f"{printable(argument)}: accuracy {right / len(images):.4f} ({counts})")


def print_prediction(prediction: Prediction, as_json: bool) -> None:
    """Print a prediction in one line, as text or JSON."""
    path, label, *_ = prediction.file
    if as_json:
        line = {"image": path, "class": prediction.name, "probability": round(prediction.probability, 6)}
        if label is not None:
            line["label"] = label
        line["top"] = [{"class": name, "probability": round(value, 6)} for name, value in prediction.top]
        print(json.dumps(line), flush=True)
    else:
        ranking = ", ".join(f"{printable(name)} {value:.2%}" for name, value in prediction.top)
        mark = "" if label in (None, prediction.name) else f"  (label: {printable(label)})"
        print(f"{printable(path)}: {ranking}{mark}", flush=True)


def csv_row(prediction: Prediction) -> dict[str, str]:
    """Return the row for --csv: image, predicted class, label if known, and the other top classes."""
    (path, label, *_), (first, *others) = prediction.file, prediction.top
    row = {"image": path, "class": first[0], "probability": f"{first[1]:.6f}", "label": label or ""}
    for rank, (name, probability) in enumerate(others, start=2):
        row |= {f"class {rank}": name, f"probability {rank}": f"{probability:.6f}"}
    return row


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
    add("--weights", help="weights file (default: best.pth of the most recent run)")
    add("--topk", type=int, default=3, help="number of classes to print per image (default: %(default)s)")
    add("--device", help="cuda, cuda:1 (or 1), mps or cpu (default: cuda if available)")
    add("--amp", choices=("auto", "on", "off"), default="auto", help="mixed precision (default: if supported natively)")
    add("--json", action="store_true", help="print one JSON object per line")
    add("--csv", metavar="OUT.csv", help="also write the predictions to a CSV file")
    plot_help = f"plot the images (at most {FIGURE_IMAGES}, the least certain ones) with Grad-CAM heat maps"
    add("--save-plot", metavar="OUT.png", help=plot_help)
    add("--model", choices=MODELS, help="architecture (default: the stored one, or else by the shapes)")
    add("--class-indices", metavar="JSON", help="class_indices.json for a weights file without class names")
    add("--img-size", type=int, help="input size in pixels (default: the stored one, or else 224)")
    args = parser.parse_args(argv)
    if args.topk < 1:
        parser.error(f"--topk is {args.topk}; it must be at least 1")
    if args.img_size is not None and not 32 <= args.img_size <= 10_000:
        parser.error(f"--img-size is {args.img_size}; it must be from 32 to 10000")
    return args


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
