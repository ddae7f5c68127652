"""Measure a trained network on labelled images, with 95% confidence intervals.

python evaluate.py                                 # the test images of the most recent run, see train.py --test-rate
python evaluate.py my_photos                       # a folder with one sub-folder per class, or a CSV table
python evaluate.py my_photos --weights runs/a/weights/best.pth --compare runs/b/weights/best.pth
python evaluate.py my_photos --json > report.json
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from calibration import reliability_curves
from class_files import normalise
from classifier import Classifier, add_classifier_flags, build_classifier
from cli_utils import MANY_FILES, DataError, FlagParser, UsageError, checked, print_note, printable, run_program
from corrections import Corrections
from evaluation_report import (
    Classified,
    Results,
    build_comparison,
    build_report,
    classify_labelled,
    format_comparison,
    format_report,
    prediction_rows,
)
from file_utils import read_json, save_png, write_csv, write_json
from image_folders import list_visible
from image_io import ImageError
from labelled_images import TEST_FILE, ErrorLog, ImageFile, find_and_report, require_outside, require_writable
from model import grad_cam
from my_dataset import prepare_batch, stack_images, to_pixels
from weights_io import newest_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUBSETS = ("new", "val", "train")  # the report covers the first one that has images
REPORT_FILE = "report.json"
WORST = 12  # images in the figure of the worst mistakes


def evaluate(args: argparse.Namespace) -> int:
    """Evaluate the weights. Returns the exit status, which is 1 if an input is unreadable."""
    output = output_folder(args.output) if args.output else None
    weights = args.weights or newest_weights()
    classifier = build_classifier(args, weights)
    print_note(str(classifier))
    other = load_other(args, classifier) if args.compare else None

    log = ErrorLog("evaluate.py")
    if args.images:
        files = find_labelled(args.images, classifier.class_names, log)
    else:
        files = find_test_images(weights, classifier.class_names)
    if args.corrections:
        files = Corrections(args.corrections).correct_files(files, classifier.class_names)
    if output:
        require_outside("--output", output, [*filter(os.path.isdir, args.images), *(file.path for file in files)])
    images = classify_labelled(classifier, files, log)
    by_subset = {subset: [image for image in images if image.subset == subset] for subset in SUBSETS}
    chosen = next(filter(None, by_subset.values()), None)
    if chosen is None:
        raise DataError(f"none of the {len(files)} images is readable")
    results = Results.collect(chosen, classifier)
    report = {"weights": str(weights), "inputs": args.images, "subset": chosen[0].subset}
    report["found"] = {subset: len(found) for subset, found in by_subset.items()}
    report["unreadable"] = len(files) - len(images)
    report |= build_report(results, args.topk)
    lines = [*describe_subsets(by_subset, classifier), *format_report(report)]
    differences = []
    if other is not None:
        report["comparison"], differences = compare(results, other, log)
        lines += ["", *format_comparison(report["comparison"], args.compare)]

    if output:
        write_files(output, report, results, differences, classifier)
        print_note(f"report, predictions and figures: {output}")
    print_line = print_note if args.json else print
    for line in lines:
        print_line(printable(line))
    if args.json:
        print(json.dumps(report))
    return 1 if log.failures else 0


# --- images -------------------------------------------------------------------------------------------------------


def find_test_images(weights: str | Path, class_names: list[str]) -> list[ImageFile]:
    """Find the test images of the run of a weights file.

    Raises:
        UsageError: the run has none.
        DataError: none of them exists, or the list does not fit the classes.
    """
    path = Path(weights).absolute().parent.parent / TEST_FILE
    labels = read_json(path)
    if not labels:
        raise UsageError(
            f"{path.parent} has no test images: name a folder of labelled images, or train with --test-rate 0.2"
        )
    if not {*map(str, labels.values())} <= {*class_names}:
        raise DataError(f"{path}: lists classes that the weights lack")
    if not any(map(os.path.lexists, labels)):
        raise DataError(f"none of the {len(labels)} images in {path} exists; if they were moved, name their folder")
    return [ImageFile(image, label, str(path)) for image, label in labels.items()]


def find_labelled(inputs: Sequence[str], class_names: list[str], log: ErrorLog) -> list[ImageFile]:
    """Find the images with labels. Reports those without.

    Raises:
        DataError: no image has a label.
    """
    files = [file for argument in inputs for file in find_and_report(argument, class_names, log)]
    labelled = list({os.path.realpath(file.path): file for file in files if file.label is not None}.values())
    if not labelled:
        layout = f"sub-folders named after the classes ({', '.join(class_names[:5])}, ...), or a CSV table"
        raise DataError(f"no labelled images in {', '.join(map(repr, inputs))}: it needs {layout}")
    if unlabelled := sum(file.label is None for file in files):
        log.warn(f"skipped {unlabelled} {'image' if unlabelled == 1 else 'images'} without a label")
    return labelled


def describe_subsets(by_subset: Mapping[str, Sequence[Classified]], classifier: Classifier) -> list[str]:
    """Describe which images the report covers, and the accuracy on the others."""
    names = {"new": "images that the run has not used", "val": "validation images", "train": "training images"}
    used, *others = [subset for subset in SUBSETS if by_subset[subset]]
    known = classifier.run_images or used != "new"
    lines = [f"{len(by_subset[used])} {names[used] if known else 'images'}"]
    if not known:
        lines[0] += "; which images the network was trained on is unknown"
    flags = read_json(Path(classifier.weights).absolute().parent.parent / "args.json").get("flags", {})
    if used == "val" and flags.get("best_metric") != "last":
        lines[0] += ": the epoch was chosen on them, so the metrics are slightly too good"
    if used == "train":
        lines[0] += ": the network was trained on them, so the metrics are far too good"
    for subset in others:
        accuracy = Results.collect(by_subset[subset], classifier).evaluation.accuracy
        lines.append(f"not included: {len(by_subset[subset])} {names[subset]} (accuracy {accuracy:.4f})")
    return [*lines, ""]


def load_other(args: argparse.Namespace, first: Classifier) -> Classifier:
    """Load the weights of --compare. If they lack class names, use those of --class-indices.

    Raises:
        UsageError: they have other classes.
    """
    names = first.class_names if args.class_indices else None
    calibrated = not args.uncalibrated
    other = Classifier(args.compare, first.device, first.amp_dtype, default_names=names, calibrated=calibrated)
    print_note(f"compared with {other}")
    if sorted(map(normalise, first.class_names)) != sorted(map(normalise, other.class_names)):
        raise UsageError(f"--compare {args.compare}: has other classes: {', '.join(other.class_names)}")
    return other


def compare(results: Results, other: Classifier, log: ErrorLog) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Compare the predictions with those of another network, on images that it was not trained on either.

    Returns:
        The comparison, see `build_comparison`, and a row for each image that only one network gets right.

    Raises:
        UsageError: the other network was trained on all images.
    """
    images = classify_labelled(other, results.files, log)
    by_path = {image.file.path: image for image in images if image.subset != "train"}
    kept = [index for index, file in enumerate(results.files) if file.path in by_path]
    if not kept:
        raise UsageError(f"--compare {other.weights}: was trained on all of these images")
    if excluded := len(results.files) - len(kept):
        log.warn(f"{excluded} images are not compared: training images of {other.weights}, or unreadable")
    other_names = [normalise(name) for name in other.class_names]
    order = [other_names.index(normalise(name)) for name in results.class_names]
    other_predicted = torch.stack([by_path[results.files[index].path].logits[order] for index in kept]).argmax(dim=1)
    predicted, labels = results.evaluation.predicted[kept], results.labels[kept]
    rows = [
        {
            "path": results.files[index].path,
            "label": results.class_names[label],
            "this": results.class_names[first],
            "other": results.class_names[second],
            "right": "this" if first == label else "other",
        }
        for index, label, first, second in zip(
            kept, labels.tolist(), predicted.tolist(), other_predicted.tolist(), strict=True
        )
        if (first == label) != (second == label)
    ]
    return build_comparison(predicted, other_predicted, labels), rows


# --- output -------------------------------------------------------------------------------------------------------


def output_folder(name: str) -> Path:
    """Return the output folder, which may hold only an earlier evaluation.

    Raises:
        UsageError: it holds anything else, or cannot be written to.
    """
    folder = Path(name)
    require_writable("--output", folder)
    report = read_json(folder / REPORT_FILE)
    is_evaluation = "confusion_matrix" in report and "folds" not in report  # not a cross-validation
    if folder.is_dir() and list_visible(folder) and not is_evaluation:
        raise UsageError(f"--output {folder}: contains other files; pass a new folder")
    return folder


def write_files(
    folder: Path,
    report: Mapping[str, Any],
    results: Results,
    differences: Sequence[Mapping[str, str]],
    classifier: Classifier,
) -> None:
    """Write the report, the predictions and the figures. Replaces an earlier evaluation."""
    import plot_utils  # imports matplotlib, which is slow to load

    folder.mkdir(parents=True, exist_ok=True)
    write_json(dict(report), folder / REPORT_FILE)
    write_csv(prediction_rows(results), folder / "predictions.csv")
    temperature = None if results.temperature == 1 else results.temperature
    figures = {
        "confusion_matrix.png": plot_utils.confusion_matrix(results.evaluation.confusion.numpy(), results.class_names),
        "reliability.png": plot_utils.reliability(reliability_curves(results.logits, results.labels, temperature)),
        "mistakes.png": draw_mistakes(results, classifier),
    }
    for name, figure in figures.items():
        (folder / name).unlink(missing_ok=True)
        if figure is not None:
            save_png(figure, folder / name)
    (folder / "differences.csv").unlink(missing_ok=True)
    if "comparison" in report:
        columns = ("path", "label", "this", "other", "right")
        write_csv(differences, folder / "differences.csv", columns)


def draw_mistakes(results: Results, classifier: Classifier) -> "Figure | None":
    """Draw the misclassified images with the highest loss, with Grad-CAM; None if there are none."""
    from plot_utils import mistakes

    if classifier.model is None:
        print_note("mistakes.png: not drawn, as Grad-CAM needs feature maps, which an ONNX file does not return")
        return None
    evaluation, names = results.evaluation, results.class_names
    positions = evaluation.worst_mistakes(WORST)
    outcomes = list(classifier.classify([results.files[position].path for position in positions]))
    shown = [
        (position, outcome.image)
        for position, outcome in zip(positions, outcomes, strict=True)
        if not isinstance(outcome, ImageError)
    ]
    if not shown:
        return None
    positions, images = [position for position, _ in shown], stack_images([image for _, image in shown])
    predicted = evaluation.predicted[positions]
    inputs = prepare_batch(images, classifier.device)
    return mistakes(
        to_pixels(images),
        grad_cam(classifier.model, inputs, predicted.to(classifier.device)).cpu().numpy(),
        [names[index] for index in predicted.tolist()],
        evaluation.probabilities[positions].amax(dim=1).tolist(),
        [results.files[position].label for position in positions],
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Exits with a one-line message if a value is invalid."""
    parser = FlagParser(prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    images_help = "a folder with one sub-folder per class, or a CSV table (default: the test images of the run)"
    add("images", nargs="*", metavar="IMAGES", help=images_help)
    corrections_help = "apply the verdicts in this table, such as label_issues.csv of cross_validate.py"
    add("--corrections", type=checked(str, bool, "the name of a table"), metavar="CSV", help=corrections_help)
    output_help = 'folder for the report, the predictions and the figures; "" for none (default: %(default)s)'
    add("--output", metavar="DIR", default="evaluation", help=output_help)
    add(
        "--compare",
        type=checked(str, bool, "a weights file"),
        metavar="WEIGHTS",
        help="compare with these weights on the same images",
    )
    positive = checked(int, lambda n: n >= 1, "at least 1")
    add("--topk", type=positive, default=3, help="k of the top-k accuracy (default: %(default)s)")
    add("--json", action="store_true", help="print the report as JSON, and the text on standard error")
    add_classifier_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program(
        "evaluate.py",
        lambda: evaluate(parse_args(argv)),
        memory_advice="close other programs, or try --device cpu",
        worker_advice=f"try at most {MANY_FILES} images at a time",
    )


if __name__ == "__main__":
    sys.exit(main())
