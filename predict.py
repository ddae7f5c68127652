"""Predict the class of images, with the weights that train.py left.

python predict.py photo.jpg                          # the best weights of the newest run
python predict.py photo.jpg a_folder --weights runs/flower_experiment/weights/best.pth
python predict.py a_folder --json > predictions.jsonl
python predict.py photo.jpg --save-plot prediction.png
python predict.py photo.jpg --weights model-29.pth --model resnet34 --class-indices class_indices.json
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop

from data_utils import DataError, list_images_below, read_class_indices
from model import MODELS, ResNet, WeightsError, evaluation_mode, load_model
from my_dataset import ImageError, eval_transform, prepare_batch, read_image, to_pixels
from run_utils import FlagParser, UsageError, newest_weights, printable, select_device, tolerate_any_name

# Every batch has this many images, the last one filled up: kernels round differently for batches of another size,
# and so the digits printed for an image would depend on how many others were asked for.
BATCH_SIZE = 8
FIGURE_IMAGES = 24  # at most, in --save-plot
FIGURE_FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg")


def predict(args: argparse.Namespace) -> int:
    """Predict as the flags say; the exit status: 1 where something could not be read."""
    plot_path = Path(args.save_plot) if args.save_plot else None
    if plot_path and not (plot_path.suffix.lower() in FIGURE_FORMATS and plot_path.parent.is_dir()):
        raise UsageError(f"--save-plot {plot_path}: give a file in an existing folder, {' '.join(FIGURE_FORMATS)}")
    device = select_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.backends.cudnn.allow_tf32 = False  # probabilities to four digits
    weights = args.weights or newest_weights()
    class_names = read_class_indices(args.class_indices) if args.class_indices else None
    model, info = load_model(weights, device, args.model, class_names)
    class_names = info["class_names"]

    failures = []

    def fail(error: Exception) -> None:
        complain(error)
        failures.append(error)

    figure_rows = []
    hits: dict[str, list[bool]] = {}  # by labelled folder
    for argument in args.images:
        try:
            files = find_images(argument, class_names, on_error=fail)
        except (OSError, DataError) as error:
            fail(error)
            continue
        for (path, label), outcome in predict_images(model, files, info["img_size"], device):
            if isinstance(outcome, ImageError):
                fail(outcome)
                continue
            image, probabilities = outcome
            top = [
                (class_names[index], probabilities[index].item()) for index in probabilities.argsort(descending=True)
            ]
            print_prediction(path, label, top[: args.topk], args.json)
            if label is not None:
                hits.setdefault(argument, []).append(top[0][0] == label)
            if plot_path and len(figure_rows) < FIGURE_IMAGES:
                figure_rows.append((image, *top[0], label))

    for folder, right in hits.items():
        line = f"{printable(folder)}: accuracy {sum(right) / len(right):.4f} ({sum(right)} of {len(right)} images)"
        print(line, file=sys.stderr if args.json else sys.stdout)
    if figure_rows:
        save_figure(figure_rows, plot_path)
    return 1 if failures else 0


def find_images(
    argument: str, class_names: list[str], on_error: Callable[[OSError], None]
) -> list[tuple[str, str | None]]:
    """(path, class) of a file, or of each image below a folder; the class is known below a folder of that name.

    Sub-folders that cannot be read are handed to `on_error`, and left out.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: a folder without images.
    """
    root = Path(argument)
    if not root.is_dir():
        if not root.exists():
            raise FileNotFoundError(f"{argument!r}: no such file or folder")
        return [(argument, None)]
    files = []
    for path in list_images_below(root, on_error):
        first, *rest = Path(path).relative_to(root).parts
        files.append((path, first if rest and first in class_names else None))
    if not files:
        raise DataError(f"{argument!r}: no image in this folder")
    return files


def predict_images(
    model: ResNet, files: list[tuple[str, str | None]], img_size: int, device: torch.device
) -> Iterator[tuple[tuple[str, str | None], tuple[Tensor, Tensor] | ImageError]]:
    """Each of `files` with its image (3, H, W) uint8 and its probabilities (classes,), or why it cannot be read."""
    transform = eval_transform(img_size)
    for start in range(0, len(files), BATCH_SIZE):
        chunk = files[start : start + BATCH_SIZE]
        batch = torch.zeros(BATCH_SIZE, 3, img_size, img_size, dtype=torch.uint8)
        errors: dict[int, ImageError] = {}
        for slot, (path, _) in enumerate(chunk):
            try:
                image = read_image(path)
                # Only the centre is looked at: what lies beyond it needs no scaling (a picture of 1 x 20,000 pixels).
                sides = [min(image.height, image.width * 10), min(image.width, image.height * 10)]
                batch[slot] = transform(center_crop(image, sides))
            except ImageError as error:
                errors[slot] = error
        with evaluation_mode(model):
            probabilities = model(prepare_batch(batch, device)).float().softmax(dim=1).cpu()
        for slot, file in enumerate(chunk):
            yield file, errors.get(slot) or (batch[slot], probabilities[slot])


def print_prediction(path: str, label: str | None, top: list[tuple[str, float]], as_json: bool) -> None:
    """One line for an image: for people, or as JSON."""
    if as_json:
        line = {"image": path, "class": top[0][0], "probability": round(top[0][1], 6)}
        if label is not None:
            line["label"] = label
        line["top"] = [{"class": name, "probability": round(probability, 6)} for name, probability in top]
        print(json.dumps(line), flush=True)
    else:
        ranking = ", ".join(f"{printable(name)} {probability:.2%}" for name, probability in top)
        mark = "" if label in (None, top[0][0]) else f"  (label: {printable(label)})"
        print(f"{printable(path)}: {ranking}{mark}", flush=True)


def save_figure(rows: list[tuple[Tensor, str, float, str | None]], path: Path) -> None:
    """Draw (image, predicted class, probability, true class or None) and save it."""
    from plot_utils import predictions  # matplotlib, which the other predictions need not wait for

    images, guesses, probabilities, labels = zip(*rows, strict=True)
    predictions(to_pixels(torch.stack(images)), guesses, probabilities, labels).savefig(path)


def complain(error: Exception) -> None:
    """One line on standard error."""
    print(f"predict.py: {printable(str(error))}", file=sys.stderr, flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with one line where a value is out of range."""
    parser = FlagParser(prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="an image, or a folder of images")
    add("--weights", help="a weights file (default: best.pth of the newest run)")
    add("--topk", type=int, default=3, help="classes to print of each image (default: %(default)s)")
    add("--device", help="cuda, cuda:1 (or 1), mps or cpu (default: cuda where there is one)")
    add("--json", action="store_true", help="print a JSON object a line")
    add("--save-plot", metavar="OUT.png", help=f"draw the predictions (of the first {FIGURE_IMAGES} images)")
    add("--model", choices=MODELS, help="for a plain state_dict, which does not tell")
    add("--class-indices", metavar="JSON", help="for a plain state_dict: the class_indices.json of its run")
    args = parser.parse_args(argv)
    if args.topk < 1:
        parser.error(f"--topk is {args.topk}; it must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """The program; its exit status."""
    tolerate_any_name()
    args = parse_args(argv)
    try:
        return predict(args)
    except BrokenPipeError:  # `predict.py folder | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (DataError, WeightsError, UsageError, OSError) as error:
        complain(error)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
