"""Predict the class of images, with the weights that train.py left.

python predict.py photo.jpg                          # the best weights of the newest run
python predict.py photo.jpg a_folder --weights runs/flower_experiment/weights/best.pth
python predict.py a_folder --json > predictions.jsonl
python predict.py photo.jpg --save-plot prediction.png   # with what the network looked at
python predict.py a_folder --csv predictions.csv --save-plot least_certain.png
python predict.py photo.jpg --weights model-29.pth --model resnet34 --class-indices class_indices.json
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from checkpoint import WeightsError, load_model, newest_weights
from cli_utils import (
    FlagParser,
    UsageError,
    atomic_file,
    available_cores,
    escape_unprintable_output,
    explain_resource_error,
    flush_stdout,
    printable,
    select_device,
    select_precision,
    worker_init,
    write_csv,
)
from data_utils import DataError, list_images_below, read_class_indices
from image_io import ImageError, read_image
from inference import compute_logits
from model import MODELS, ResNet, evaluation_mode, fold_batch_norm, grad_cam
from my_dataset import EvalTransform, prepare_batch, stack_images, to_pixels

# Every batch has this size; the last one is padded. Kernels round differently for other batch sizes, so an image's
# printed probabilities would depend on the number of images.
BATCH_SIZE = 8
MANY_IMAGES = 100  # above this, use workers, which take a while to start
FIGURE_IMAGES = 24  # maximum in --save-plot: the least certain ones
SIGNATURE = b"predict.py --save-plot"  # the comment in a JPEG figure
FIGURE_FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg")


def predict(args: argparse.Namespace) -> int:
    """Run the predictions. Returns the exit status: 1 if an input could not be read."""
    plot_path = Path(args.save_plot) if args.save_plot else None
    if plot_path and not (plot_path.suffix.lower() in FIGURE_FORMATS and plot_path.parent.is_dir()):
        raise UsageError(f"--save-plot {plot_path}: give a file in an existing folder, {' '.join(FIGURE_FORMATS)}")
    if plot_path and is_picture(plot_path):
        raise UsageError(f"--save-plot {plot_path}: there is a picture of that name; give another one")
    csv_path = Path(args.csv) if args.csv else None
    if csv_path and (not csv_path.parent.is_dir() or is_picture(csv_path)):
        raise UsageError(f"--csv {csv_path}: give a file in an existing folder, and no picture")
    device = select_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    amp_dtype, _ = select_precision(args.amp, device)
    torch.backends.cudnn.allow_tf32 = False  # full float32 precision: probabilities are printed to four digits
    weights = args.weights or newest_weights()
    class_names = read_class_indices(args.class_indices) if args.class_indices else None
    model, info = load_model(weights, device, args.model, class_names)
    class_names = info["class_names"]

    failures = []

    def fail(error: Exception) -> None:
        complain(error)
        failures.append(error)

    files = []
    for argument in args.images:
        try:
            files += find_images(argument, class_names, on_error=fail)
        except (OSError, DataError) as error:
            fail(error)

    shown: list[Shown] = []
    rows = []
    hits: dict[str, list[bool]] = {}  # by folder argument
    for file, outcome in predict_images(model, files, info["img_size"], device, amp_dtype):
        if isinstance(outcome, ImageError):
            fail(outcome)
            continue
        image, probabilities = outcome
        ranking = probabilities.argsort(descending=True).tolist()
        top = [(class_names[index], probabilities[index].item()) for index in ranking]
        print_prediction(file, top[: args.topk], args.json)
        if file.label is not None:
            hits.setdefault(file.argument, []).append(top[0][0] == file.label)
        if csv_path:
            rows.append(csv_row(file, top[: args.topk]))
        if plot_path:
            shown.append(Shown(file, image, ranking[0], top[: args.topk]))
            if len(shown) > FIGURE_IMAGES:
                del shown[max(range(len(shown)), key=lambda place: shown[place].certainty())]

    for folder, right in hits.items():
        line = f"{printable(folder)}: accuracy {sum(right) / len(right):.4f} ({sum(right)} of {len(right)} images)"
        print(line, file=sys.stderr if args.json else sys.stdout)
    if csv_path:
        write_csv(rows, csv_path, columns=("image", "class", "probability", "label"))
    if shown:
        if any(Path(argument).is_dir() for argument in args.images):
            shown.sort(key=Shown.certainty)
        save_figure(model, shown, plot_path, device)
    return 1 if failures else 0


def is_picture(path: Path) -> bool:
    """Return whether `path` is an image but not our figure, such as the first of `--save-plot *.jpg`."""
    if not path.is_file():
        return False
    try:
        with Image.open(path) as image:  # matplotlib adds "Software" to a PNG
            return not (image.info.get("comment") == SIGNATURE or "Matplotlib" in str(image.info.get("Software")))
    except Image.DecompressionBombError:
        return True
    except OSError:  # not an image, or unreadable
        return False


class ImageFile(NamedTuple):
    """An image to predict: its path, its label if the folder gives one, and its command-line argument."""

    path: str
    label: str | None
    argument: str


class Shown(NamedTuple):
    """A prediction to draw: image (3, H, W) uint8, predicted class index, (name, probability) of the top classes."""

    file: ImageFile
    image: Tensor
    predicted: int
    top: list[tuple[str, float]]

    def certainty(self) -> float:
        """Return the probability of the predicted class."""
        return self.top[0][1]


def find_images(argument: str, class_names: list[str], on_error: Callable[[OSError], None]) -> list[ImageFile]:
    """List a file, or all images below a folder. Sub-folders named after a class label their images.

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
        raise DataError(f"{argument!r}: no image in this folder")
    return files


class _Images(Dataset):
    """Images (3, H, W) uint8, or the `ImageError` of an unreadable one."""

    def __init__(self, files: list[ImageFile], img_size: int) -> None:
        self.files = files
        self.transform = EvalTransform(img_size)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor | ImageError:
        try:
            return self.transform(read_image(self.files[index].path, self.transform.min_side))
        except ImageError as error:
            return error


def predict_images(
    model: ResNet, files: list[ImageFile], img_size: int, device: torch.device, amp_dtype: torch.dtype | None
) -> Iterator[tuple[ImageFile, tuple[Tensor, Tensor] | ImageError]]:
    """Predict `files` in order.

    Yields:
        Each file with its image (3, H, W) uint8 and probabilities (classes,), or with the `ImageError` if unreadable.
    """
    workers = min(available_cores(), 8) if len(files) > MANY_IMAGES else 0
    images = _Images(files, img_size)
    loader = DataLoader(images, BATCH_SIZE, num_workers=workers, collate_fn=list, worker_init_fn=worker_init)
    model = fold_batch_norm(model)
    blank = torch.zeros(3, img_size, img_size, dtype=torch.uint8)
    waiting = iter(files)
    for outcomes in loader:
        images = [blank if isinstance(outcome, ImageError) else outcome for outcome in outcomes]
        batch = stack_images(images + [blank] * (BATCH_SIZE - len(images)))
        with evaluation_mode(model):
            probabilities = compute_logits(model, batch, device, amp_dtype).softmax(dim=1).cpu()
        for outcome, row in zip(outcomes, probabilities, strict=False):  # the last batch is padded
            yield next(waiting), outcome if isinstance(outcome, ImageError) else (outcome, row)


def print_prediction(file: ImageFile, top: list[tuple[str, float]], as_json: bool) -> None:
    """Print a prediction in one line, as text or JSON."""
    if as_json:
        line = {"image": file.path, "class": top[0][0], "probability": round(top[0][1], 6)}
        if file.label is not None:
            line["label"] = file.label
        line["top"] = [{"class": name, "probability": round(probability, 6)} for name, probability in top]
        print(json.dumps(line), flush=True)
    else:
        ranking = ", ".join(f"{printable(name)} {probability:.2%}" for name, probability in top)
        mark = "" if file.label in (None, top[0][0]) else f"  (label: {printable(file.label)})"
        print(f"{printable(file.path)}: {ranking}{mark}", flush=True)


def csv_row(file: ImageFile, top: list[tuple[str, float]]) -> dict[str, str]:
    """Return a row of --csv: image, predicted class, label if known, and the next classes."""
    row = {"image": file.path, "class": top[0][0], "probability": f"{top[0][1]:.6f}", "label": file.label or ""}
    for place, (name, probability) in enumerate(top[1:], start=2):
        row |= {f"class {place}": name, f"probability {place}": f"{probability:.6f}"}
    return row


def save_figure(model: ResNet, shown: list[Shown], path: Path, device: torch.device) -> None:
    """Draw each image with its Grad-CAM heat map and a bar for each of its top classes."""
    from plot_utils import explained  # imports matplotlib, which is slow to load

    batch = stack_images([prediction.image for prediction in shown])
    classes = torch.tensor([prediction.predicted for prediction in shown], device=device)
    heats = grad_cam(model, prepare_batch(batch, device), classes).cpu().numpy()
    figure = explained(
        to_pixels(batch),
        heats,
        [prediction.top for prediction in shown],
        [prediction.file.path for prediction in shown],
        [prediction.file.label for prediction in shown],
    )
    is_jpeg = path.suffix.lower() in (".jpg", ".jpeg")
    with atomic_file(path) as unfinished:
        figure.savefig(unfinished, **({"pil_kwargs": {"comment": SIGNATURE}} if is_jpeg else {}))


def complain(error: Exception) -> None:
    """Print an error in one line to standard error."""
    print(f"predict.py: {printable(str(error))}", file=sys.stderr, flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Exits with a one-line message if a value is invalid."""
    parser = FlagParser(prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="an image, or a folder of images")
    add("--weights", help="a weights file (default: best.pth of the newest run)")
    add("--topk", type=int, default=3, help="classes to print of each image (default: %(default)s)")
    add("--device", help="cuda, cuda:1 (or 1), mps or cpu (default: cuda where there is one)")
    add("--amp", choices=("auto", "on", "off"), default="auto", help="mixed precision (default: where it is faster)")
    add("--json", action="store_true", help="print a JSON object a line")
    add("--csv", metavar="OUT.csv", help="write the predictions to a file, too")
    plot = f"draw the images (of many, the {FIGURE_IMAGES} least certain) with what the network looked at"
    add("--save-plot", metavar="OUT.png", help=plot)
    add("--model", choices=MODELS, help="for a plain state_dict, which does not tell")
    add("--class-indices", metavar="JSON", help="for a plain state_dict: the class_indices.json of its run")
    args = parser.parse_args(argv)
    if args.topk < 1:
        parser.error(f"--topk is {args.topk}; it must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit status."""
    escape_unprintable_output()
    args = parse_args(argv)
    try:
        status = predict(args)
        print(end="", flush=True)
        return status
    except BrokenPipeError:  # `predict.py folder | head`
        return 1
    except (MemoryError, RuntimeError, ConnectionError, EOFError) as error:
        reason = explain_resource_error(
            error, "free some, or try --device cpu", f"try at most {MANY_IMAGES} images at a time"
        )
        if reason is None:
            raise
        complain(UsageError(reason))
        return 1
    except (DataError, WeightsError, UsageError, OSError) as error:
        complain(error)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        flush_stdout()


if __name__ == "__main__":
    sys.exit(main())
