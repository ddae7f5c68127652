"""Export a trained network to a single file that runs without this project, and check the file.

python export.py                                         # the best weights of the most recent run, to best.pt2
python export.py --weights runs/flowers/weights/best.pth --format onnx --output flowers.onnx
python export.py --with-resize                           # takes an image of any size instead of a resized batch
"""

import argparse
import functools
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from class_files import read_class_indices
from classifier import Classifier, add_weights_flags, read_or_error
from cli_utils import (
    FlagParser,
    UsageError,
    checked,
    exit_on_signals,
    map_files,
    print_note,
    printable,
    quote_command,
    run_program,
)
from evaluation_report import Classified, Results, build_report
from export_check import CheckResult, check_exported_file
from exported_file import ONNX, PT2, is_exported, is_onnx, require_packages, write_exported
from exported_network import ExportedNetwork
from familiarity import Familiarity
from file_utils import atomic_file, output_path, read_json
from image_folders import file_checksum, list_images, read_run_files
from image_io import ImageError
from labelled_images import ErrorLog, ImageFile, find_and_report
from metrics import wilson_interval
from my_dataset import MEAN, STD, EvalTransform, stack_images
from sample_flowers import SAMPLE
from tables import is_table, read_table
from weights_io import newest_weights

VERSION = "1.0"  # of this project
MAX_IMAGES = 1000  # in the check
CALIBRATION_IMAGES = 200  # for --int8
FORMATS = {"pt2": PT2, "onnx": ONNX}


def export(args: argparse.Namespace) -> int:
    """Export the network and check the file. Returns the exit status."""
    weights = args.weights or newest_weights()
    output = output_file(args, Path(weights))
    if is_onnx(output):
        needs_runtime = args.int8 or not args.skip_check
        require_packages(ONNX, ("onnx", "onnxscript", *(["onnxruntime"] if needs_runtime else [])))
    elif args.int8:
        raise UsageError("--int8: only for --format onnx")
    classifier = build_classifier(args, weights)
    print(printable(f"network   {classifier}"), flush=True)
    log = ErrorLog("export.py")
    files = [] if args.skip_check else find_images(args.images, weights, classifier.class_names, log)
    metadata = describe_network(classifier, args.batch, args.with_resize)
    metadata |= {"unsure_thresholds": measure_thresholds(classifier, files)}
    calibration = read_calibration_images(classifier, args.batch or 8) if args.int8 else []
    network = build_network(classifier, args.with_resize, with_unfamiliarity=is_onnx(output))
    with exit_on_signals(), atomic_file(output) as unfinished:
        write_exported(network, classifier.info["img_size"], args.batch, metadata, unfinished, calibration)
        options = {"batch": args.batch, "with_resize": args.with_resize, "int8": args.int8}
        result = check_exported_file(unfinished, classifier, files, log, **options) if files else None
        size = unfinished.stat().st_size
    print_result(output, size, metadata, result)
    return 1 if log.failures else 0


def build_classifier(args: argparse.Namespace, weights: str | Path) -> Classifier:
    """Build the classifier to export, on the CPU and in float32.

    Raises:
        UsageError: the weights file is an exported file.
    """
    if is_exported(weights):
        raise UsageError(f"--weights {weights}: an exported file cannot be exported again; pass best.pth")
    return Classifier(
        weights,
        torch.device("cpu"),
        model_name=args.model,
        class_names=read_class_indices(args.class_indices) if args.class_indices else None,
        img_size=args.img_size,
        calibrated=not args.uncalibrated,
    )


def build_network(classifier: Classifier, with_resize: bool, with_unfamiliarity: bool) -> ExportedNetwork:
    """Build the network to export; see `ExportedNetwork`."""
    info = classifier.info
    familiarity = info["familiarity"] and Familiarity(**info["familiarity"])
    return ExportedNetwork(
        classifier.model,
        classifier.temperature,
        resize=EvalTransform(info["img_size"], info["resize"]) if with_resize else None,
        familiarity=familiarity or None,
        with_unfamiliarity=bool(familiarity) and with_unfamiliarity,
    )


def output_file(args: argparse.Namespace, weights: Path) -> Path:
    """Return the file to write; by default beside the weights file.

    Raises:
        UsageError: its extension is neither .pt2 nor .onnx, or differs from --format.
    """
    suffix = FORMATS.get(args.format)
    form = "_with_resize" if args.with_resize else "_int8" if args.int8 else ""
    output = args.output or str(weights.with_name(f"{weights.stem}{form}{suffix or PT2}"))
    return output_path("--output", output, [suffix] if suffix else [*FORMATS.values()])


# --- images to check the file with --------------------------------------------------------------------------------


def find_images(folders: list[str], weights: str | Path, class_names: list[str], log: ErrorLog) -> list[ImageFile]:
    """Find the images to check with: those in `folders`, or else the validation images of the run; at most 1,000.

    Raises:
        UsageError: there are none.
    """
    if folders:
        files = [file for folder in folders for file in find_and_report(folder, class_names, log)]
    else:
        files = find_run_images(Path(weights).absolute().parent.parent, "val", class_names)
    if not files and folders:
        raise UsageError("--images: there are no images to check the file with")
    if not files:
        raise UsageError(
            f"{weights}: the validation images of its run are unknown, or were moved; pass --images FOLDER to check "
            f"the file with other images, or --skip-check"
        )
    return evenly_spaced(files, MAX_IMAGES)


def evenly_spaced(files: list[ImageFile], most: int) -> list[ImageFile]:
    """Return at most that many of the files, evenly spaced."""
    return files[:: max(1, -(-len(files) // most))]


def find_run_images(run: Path, wanted: str, class_names: list[str]) -> list[ImageFile]:
    """Find the images of a run by their names and checksums; see `prepare_data.describe_files`.

    Args:
        wanted: the subset, "train" or "val".
    """
    wanted_files = [file for file in read_run_files(run / "files.json") if file.subset == wanted]
    names = {file.name.rpartition("/")[2] for file in wanted_files}
    labels = {file.checksum: file.name.rpartition("/")[0] for file in wanted_files}
    flags = read_json(run / "args.json").get("flags", {})
    files: dict[str, ImageFile] = {}
    for source in filter(None, (flags.get("data_path") or str(SAMPLE), flags.get("val_path"))):
        found = [path for path in (Path(source), *(parent / source for parent in run.parents)) if path.exists()]
        if not found:
            continue
        if is_table(found[0]):
            paths = [row.path for row in read_table(found[0], needs_labels=False)]
        else:
            paths = list_images(found[0], [])
        for path in paths:
            if Path(path).name in names and (label := labels.get(file_checksum(path))) is not None:
                files[path] = ImageFile(path, label if label in class_names else None, source)
    if files and len(files) < len(wanted_files):
        name = {"train": "training", "val": "validation"}[wanted]
        print_note(f"export.py: found only {len(files)} of the {len(wanted_files)} {name} images of the run")
    return [*files.values()]


def read_calibration_images(classifier: Classifier, batch: int) -> list[Tensor]:
    """Read batches of training images of the run, to calibrate the quantisation with.

    Raises:
        UsageError: none of them is found or readable.
    """
    run = Path(classifier.weights).absolute().parent.parent
    files = evenly_spaced(find_run_images(run, "train", classifier.class_names), CALIBRATION_IMAGES)
    options = {"transform": classifier.backend.transform, "pixel_range": classifier.info["pixel_range"]}
    read = functools.partial(read_or_error, with_checksum=False, **options)
    items = map_files(read, [file.path for file in files], None, "calibrating")
    images = [item[0] for item in items if not isinstance(item, ImageError)]
    if not images:
        raise UsageError("--int8: no training images of the run were found to calibrate with; omit --int8")
    images = [*itertools.islice(itertools.cycle(images), max(batch, len(images)))]  # at least one full batch
    return [stack_images(images[start : start + batch]) for start in range(0, len(images) - batch + 1, batch)]


def measure_thresholds(classifier: Classifier, files: list[ImageFile]) -> list[dict[str, Any]] | None:
    """Return the lowest probabilities to accept for given error rates on labelled images; None if there are none.

    Unreadable images are left to the check to report.
    """
    labelled = [file for file in files if file.label is not None]
    outcomes = classifier.classify([file.path for file in labelled], description="evaluating")
    pairs = [pair for pair in zip(labelled, outcomes, strict=True) if not isinstance(pair[1], ImageError)]
    images = [Classified(file, outcome.logits, outcome.subset) for file, outcome in pairs]
    return build_report(Results.collect(images, classifier))["thresholds"] if images else None


# --- metadata -----------------------------------------------------------------------------------------------------


def describe_network(classifier: Classifier, batch: int | None, with_resize: bool) -> dict[str, Any]:
    """Return the metadata to store, as plain values for JSON."""
    info, size, classes = classifier.info, classifier.info["img_size"], len(classifier.class_names)
    run = Path(classifier.weights).absolute().parent.parent
    images = sum(file.subset == "val" for file in read_run_files(run / "files.json"))
    accuracy = None if "img_size_source" in info else info["accuracy"]  # it is for the stored size
    interval = wilson_interval(round(accuracy * images), images) if images and isinstance(accuracy, float) else None
    transform = EvalTransform(size, info["resize"])
    number = 1 if with_resize else batch or "N"
    images_in = "one RGB image (3, H, W)" if with_resize else f"RGB images ({number}, 3, {size}, {size})"
    return {
        "version": VERSION,
        "torch": str(torch.__version__),
        "weights_checksum": file_checksum(classifier.weights),
        "model": info["model"],
        "class_names": classifier.class_names,
        "img_size": size,
        "resize": info["resize"],
        "pixel_range": info["pixel_range"],
        "epoch": info["epoch"],
        "accuracy": accuracy,
        "accuracy_interval": interval,
        "accuracy_images": images or None,
        "temperature": None if classifier.temperature == 1 else classifier.temperature,
        "mean": MEAN,
        "std": STD,
        "batch": 1 if with_resize else batch or "dynamic",
        "input": f"{images_in} uint8, values 0 to 255",
        "output": f"probabilities ({number}, {classes}) float32, in the order of class_names",
        "min_side": transform.min_side,
        "shorter_side": transform.shorter_side,
        "preprocessing": describe_decoding(info["pixel_range"]) + ([] if with_resize else describe_resize(transform)),
    }


def describe_decoding(pixel_range: tuple[float, float] | None) -> list[str]:
    """Describe how an image file becomes RGB, step by step."""
    low, high = pixel_range or ("the image's minimum", "maximum")
    return [
        f"If the image is greyscale with more than 8 bits, scale {low} and {high} linearly to 0 and 255, and clip.",
        "Composite transparent images onto white, and convert to RGB.",
        "Apply the EXIF orientation.",
    ]


def describe_resize(transform: EvalTransform) -> list[str]:
    """Describe how an RGB image becomes the input of the network, step by step."""
    side, least = transform.img_size, transform.min_side
    reduce = (
        f"Let f = floor(shorter side / {least}). If f > 1, reduce the image to 1/f of its size by averaging blocks of "
        f"f x f pixels (Pillow: reduce; JPEG files are first reduced by powers of 2 while decoding, Pillow: draft)."
    )
    resize = {
        "crop": f"Resize the shorter side to {transform.shorter_side} px (antialiased bilinear), and crop the central "
        f"{side} x {side} px.",
        "pad": f"Resize the longer side to {side} px (antialiased bilinear), and pad to {side} x {side} px with the "
        f"colour {[round(255 * mean) for mean in MEAN]}.",
        "stretch": f"Resize to {side} x {side} px (antialiased bilinear), without keeping the aspect ratio.",
    }
    return [reduce, resize[transform.resize]]


# --- program ------------------------------------------------------------------------------------------------------


def print_result(output: Path, size: int, metadata: dict[str, Any], result: CheckResult | None) -> None:
    """Print what has been written, and the results of the check."""
    print(printable(f"file      {output} ({size / 1e6:.1f} MB)"))
    print(f"input     {metadata['input']}")
    print(f"output    {metadata['output']}")
    if result is None:
        print_note("export.py: --skip-check: the file has not been compared with the network")
    else:
        print(*result.format_lines(), sep="\n")
    print(f"next: {quote_command(['python', 'predict.py', 'photo.jpg', '--weights', str(output)])}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Exits with a one-line message if a value is invalid."""
    parser = FlagParser(prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--format", choices=FORMATS, help="format of the file (default: from the extension of --output, or else pt2)")
    add(
        "--output",
        type=checked(str, bool, "the name of a file"),
        metavar="FILE",
        help="file to write (default: beside the weights file, with the same name)",
    )
    batch_help = 'number of images in a batch, or "dynamic" for any number (default: dynamic)'
    add("--batch", type=batch_size, metavar="N", help=batch_help)
    add("--with-resize", action="store_true", help="take one image of any size, and resize it in the graph")
    int8_help = "quantise an ONNX file to 8-bit integers: smaller and faster, but less accurate"
    add("--int8", action="store_true", help=int8_help)
    images_help = "images to check the file with (default: the validation images of the run)"
    add("--images", nargs="+", default=[], metavar="FOLDER", help=images_help)
    add("--skip-check", action="store_true", help="do not compare the file with the network")
    add_weights_flags(parser)
    args = parser.parse_args(argv)
    if args.int8 and args.with_resize:
        parser.error("--int8 cannot be combined with --with-resize")
    if args.with_resize and args.batch:
        parser.error("--batch has no effect with --with-resize, which takes one image at a time")
    if args.skip_check and args.images:
        parser.error("--images has no effect with --skip-check")
    return args


def batch_size(text: str) -> int | None:
    """Parse --batch."""
    return None if text == "dynamic" else checked(int, lambda n: n >= 1, 'at least 1, or "dynamic"')(text)


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program(
        "export.py",
        lambda: export(parse_args(argv)),
        memory_advice="close other programs",
        worker_advice="try fewer --images",
    )


if __name__ == "__main__":
    sys.exit(main())
