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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from checkpoint import load_model, newest_weights
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
from data_utils import list_images_below, read_class_indices
from file_utils import atomic_file, write_csv
from image_io import ImageError, read_image
from inference import compute_logits
from model import MODELS, ResNet, evaluation_mode, fold_batch_norm, grad_cam
from my_dataset import EvalTransform, prepare_batch, stack_images, to_pixels

# Every batch has this size; the last one is padded. Kernels round differently for other batch sizes, so an image's
# printed probabilities would depend on the number of images.
BATCH_SIZE = 8
FIGURE_IMAGES = 24  # maximum in --save-plot: the least certain ones
SIGNATURE = b"predict.py --save-plot"  # the comment in a JPEG figure


class ImageFile(NamedTuple):
    """An image to classify: its path, its label if its folder is named after a class, and its command-line argument."""

    path: str
    label: str | None
    argument: str


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


def predict(args: argparse.Namespace) -> int:
    """Classify the images; return the exit status, which is 1 if an input is unreadable."""
    plot_path = output_path("--save-plot", args.save_plot, FIGURE_FORMATS)
    csv_path = output_path("--csv", args.csv)
    for flag, path in (("--save-plot", plot_path), ("--csv", csv_path)):
        if path and would_overwrite_image(path):
            raise UsageError(f"{flag} {path}: would overwrite an image; choose another name")
    device = select_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    amp_dtype, _ = select_precision(args.amp, device)
    torch.backends.cudnn.allow_tf32 = False  # full float32 precision: probabilities are printed to four digits
    class_names = read_class_indices(args.class_indices) if args.class_indices else None
    weights = args.weights or newest_weights()
    model, info = load_model(weights, device, args.model, class_names, img_size=args.img_size)
    class_names = info["class_names"]
    print_note(f"weights {weights}: {describe_model(info)}")

    failures = []

    def fail(error: Exception) -> None:
        print(f"predict.py: {printable(str(error))}", file=sys.stderr, flush=True)
        failures.append(error)

    files = []
    for argument in args.images:
        try:
            files += find_images(argument, class_names, on_error=fail)
        except (OSError, DataError) as error:
            fail(error)

    plotted: list[Prediction] = []
    rows = []
    correct: dict[str, list[bool]] = {}  # by command-line argument
    for file, outcome in predict_images(model, files, info["img_size"], device, amp_dtype):
        if isinstance(outcome, ImageError):
            fail(outcome)
            continue
        image, probabilities = outcome
        ranking = probabilities.argsort(descending=True).tolist()[: args.topk]
        top = [(class_names[index], probabilities[index].item()) for index in ranking]
        prediction = Prediction(file, image, ranking[0], top)
        print_prediction(prediction, args.json)
        if file.label is not None:
            correct.setdefault(file.argument, []).append(prediction.name == file.label)
        if csv_path:
            rows.append(csv_row(prediction))
        if plot_path:
            plotted.append(prediction)
            if len(plotted) > FIGURE_IMAGES:
                del plotted[max(range(len(plotted)), key=lambda index: plotted[index].probability)]

    for folder, hits in correct.items():
        line = f"{printable(folder)}: accuracy {sum(hits) / len(hits):.4f} ({sum(hits)} of {len(hits)} images)"
        print(line, file=sys.stderr if args.json else sys.stdout)
    if csv_path:
        write_csv(rows, csv_path, columns=("image", "class", "probability", "label"))
        print_note(f"predictions: {csv_path}")
    if plotted:
        if any(Path(argument).is_dir() for argument in args.images):
            plotted.sort(key=lambda prediction: prediction.probability)
        save_figure(model, plotted, plot_path, device)
        print_note(f"figure: {plot_path}")
    return 1 if failures else 0


def describe_model(info: Mapping[str, Any]) -> str:
    """Describe a loaded model in one line. `info` is from `load_model`."""
    source = f" ({info['img_size_source']})" if "img_size_source" in info else ""
    line = f"{info['model']}, {len(info['class_names'])} classes, {info['img_size']} px{source}"
    if isinstance(info["epoch"], int):
        line += f", epoch {info['epoch']}"
    if isinstance(info["accuracy"], float):
        line += f", accuracy {info['accuracy']:.3f}"
    return line


def would_overwrite_image(path: Path) -> bool:
    """Return whether `path` is an image but not an earlier figure: the shell may have expanded `--save-plot *.jpg`."""
    if not path.is_file():
        return False
    try:
        with Image.open(path) as image:  # matplotlib adds "Software" to a PNG
            return not (image.info.get("comment") == SIGNATURE or "Matplotlib" in str(image.info.get("Software")))
    except Image.DecompressionBombError:
        return True
    except OSError:  # not an image, or unreadable
        return False


def find_images(argument: str, class_names: list[str], on_error: Callable[[OSError], None]) -> list[ImageFile]:
    """List an image, or all images below a folder. Sub-folders named after a class label their images.

    Args:
        on_error: called with the error of each unreadable folder, which is skipped.

    Raises:
        FileNotFoundError: the file or folder is missing.
        DataError: the folder has no images.
    """
    root = Path(argument)
    if not argument or not root.exists():  # "" is an unset shell variable; Path("") is the current folder
        raise FileNotFoundError(f"{argument!r}: no such file or folder")
    if not root.is_dir():
        return [ImageFile(argument, None, argument)]
    files = []
    for path in list_images_below(root, on_error):
        first, *rest = Path(path).relative_to(root).parts
        files.append(ImageFile(path, first if rest and first in class_names else None, argument))
    if not files:
        raise DataError(f"{argument!r}: no images in this folder")
    return files


def read_or_error(path: str, transform: EvalTransform) -> Tensor | ImageError:
    """Read an image as uint8 (3, H, W). Returns an error instead of raising it."""
    try:
        return transform(read_image(path, transform.min_side))
    except ImageError as error:
        return error


def predict_images(
    model: ResNet, files: list[ImageFile], img_size: int, device: torch.device, amp_dtype: torch.dtype | None
) -> Iterator[tuple[ImageFile, tuple[Tensor, Tensor] | ImageError]]:
    """Classify `files` in order.

    Yields:
        Each file with its image (3, H, W) uint8 and probabilities (classes,), or with its `ImageError`.
    """
    read = functools.partial(read_or_error, transform=EvalTransform(img_size))
    loaded = zip(files, map_files(read, [file.path for file in files]), strict=True)
    model = fold_batch_norm(model)
    blank = torch.zeros(3, img_size, img_size, dtype=torch.uint8)
    while batch := list(itertools.islice(loaded, BATCH_SIZE)):
        images = [blank if isinstance(image, ImageError) else image for _, image in batch]
        images += [blank] * (BATCH_SIZE - len(images))
        with evaluation_mode(model):
            probabilities = compute_logits(model, stack_images(images), device, amp_dtype).softmax(dim=1).cpu()
        for (file, image), row in zip(batch, probabilities, strict=False):
            yield file, image if isinstance(image, ImageError) else (image, row)


def print_prediction(prediction: Prediction, as_json: bool) -> None:
    """Print a prediction in one line, as text or JSON."""
    path, label, _ = prediction.file
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
    (path, label, _), (first, *others) = prediction.file, prediction.top
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
    paths, labels, _ = zip(*files, strict=True)
    figure = explained(to_pixels(batch), heats, tops, list(paths), list(labels))
    is_jpeg = path.suffix.lower() in (".jpg", ".jpeg")
    with atomic_file(path) as unfinished:
        figure.savefig(unfinished, **({"pil_kwargs": {"comment": SIGNATURE}} if is_jpeg else {}))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Exits with a one-line message if a value is invalid."""
    parser = FlagParser(prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="an image, or a folder that is searched for images")
    add("--weights", help="weights file (default: best.pth of the most recent run)")
    add("--topk", type=int, default=3, help="number of classes to print per image (default: %(default)s)")
    add("--device", help="cuda, cuda:1 (or 1), mps or cpu (default: cuda if available)")
    add("--amp", choices=("auto", "on", "off"), default="auto", help="mixed precision (default: if supported natively)")
    add("--json", action="store_true", help="print one JSON object per line")
    add("--csv", metavar="OUT.csv", help="also write the predictions to a CSV file")
    plot = f"plot the images (at most {FIGURE_IMAGES}: the least certain ones) with Grad-CAM heat maps"
    add("--save-plot", metavar="OUT.png", help=plot)
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
