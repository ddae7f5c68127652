"""Cross-validate: predict each image with a network that was not trained on it, measure accuracy and find wrong labels.

python cross_validate.py --data-path my_photos --recipe scratch --time-budget 60    # five folds in an hour
python cross_validate.py --data-path my_photos --folds 10 --name ten_folds          # takes the flags of train.py
python cross_validate.py --resume                                                   # after an interruption
"""

import argparse
import functools
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import config
from cli_utils import UsageError, checked, printable, run_program, shorten, silence_other_ranks
from corrections import Corrections
from data_loading import FeatureStore
from distributed import Distributed
from file_utils import read_json, write_json
from folds import (
    FoldRun,
    Images,
    draw_folds,
    find_images,
    list_runs,
    require_divisible,
    require_listable,
    require_subsets,
    write_fold,
)
from image_folders import CHECK_CACHE, count_skipped, file_checksum, read_run_checksums
from model import MODELS
from out_of_fold import ISSUES_FILE, write_results
from run_utils import (
    FOLDS_FILE,
    LAUNCH_FILE,
    SKIPPED_FILE,
    StopRequest,
    create_free_folder,
    find_launched_run,
    lock_run,
    open_run,
    remove_unstarted_run,
    write_skipped,
)
from tables import read_table
from train import setup_device, train
from weights_io import load_initial_weights

REPORT_FRACTION = 0.03  # fraction of a time budget kept for the final predictions
MAY_CHANGE = {"resume", "device", "workers", "timeout"}  # flags that may change on resume


def cross_validate(args: argparse.Namespace, folder: Path, dist: Distributed) -> None:
    """Train a network per fold, and report on its predictions for the images of the fold.

    Args:
        args: the flags.
        folder: contains the tables of the folds, and receives their runs and the results.
        dist: the process group. All ranks take the same path through this function.

    Raises:
        StopRequest: a signal has arrived, and the run of the fold has been saved.
    """
    started_at, stores = time.perf_counter(), {}
    for fold_run in list_runs(args):
        spent = time.perf_counter() - started_at
        build = functools.partial(build_run_args, args, folder, fold_run, spent)
        run_args, is_new = dist.broadcast_from_main(build)
        run = None if is_new else open_run(str(folder / fold_run.name), dist)
        if run is not None:
            if run.checkpoint["resume"].get("finished"):
                dist.broadcast_from_main(functools.partial(require_weights, run.path))
                continue
            saved = config.resume_args([], run.checkpoint["resume"].get("flags"), run.path)
            changed = {flag: getattr(args, flag) for flag in MAY_CHANGE - {"resume"}}
            run_args = argparse.Namespace(**vars(saved) | changed)
        print(f"\n--- {fold_run} ---\n")
        dist.restart_clock()
        repeat = fold_run.fold // args.folds  # its seed initialises the backbone, if there are no weights
        if repeat not in stores:
            stores = {repeat: dist.broadcast_from_main(lambda: build_feature_store(folder))}
        train(run_args, dist, run, stores[repeat])
    device, amp_dtype, _ = setup_device(args, dist)
    dist.broadcast_from_main(lambda: write_results(args, folder, device, amp_dtype), no_timeout=True)


# --- folds --------------------------------------------------------------------------------------------------------


def build_feature_store(folder: Path) -> FeatureStore:
    """Create a store for the features of all images, for --freeze-layers."""
    rows = read_table(FoldRun(0).table(folder))
    names = sorted({row.label for row in rows})
    return FeatureStore([row.path for row in rows], [names.index(row.label) for row in rows])


def build_run_args(
    args: argparse.Namespace, folder: Path, fold_run: FoldRun, spent: float
) -> tuple[argparse.Namespace, bool]:
    """Build the flags of train.py for a training run.

    Args:
        spent: seconds since the start or the resume.

    Returns:
        The flags, and whether its run still has to be created.
    """
    is_new = remove_unstarted_run(folder / fold_run.name)
    train_flags = vars(config.parse_args([])).keys()
    flags = {flag: value for flag, value in vars(args).items() if flag in train_flags}
    flags |= {
        "data_path": str(fold_run.table(folder)),
        "name": os.path.relpath(folder / fold_run.name, "runs"),
        "seed": args.seed + fold_run.fold // args.folds,
    }
    flags |= {"resume": None, "val_path": None, "corrections": None, "test_rate": 0.0, "download": False}
    if args.time_budget:
        runs = list_runs(args)
        before = runs[: runs.index(fold_run)]
        earlier = [read_json(folder / each.name / "args.json") for each in before]
        used = sum(run.get("flags", {}).get("time_budget", 0.0) for run in earlier)
        left = (1 - REPORT_FRACTION) * args.time_budget - max(spent / 60, used)
        share = 1 / fold_run.divisor / sum(1 / each.divisor for each in runs[len(before) :])
        flags["time_budget"] = max(left, args.time_budget / 100) * share
        if earlier and not args.img_size:  # the size that the first run chose
            flags["img_size"] = earlier[0].get("network", {}).get("img_size")
    return argparse.Namespace(**flags), is_new


def require_weights(run: Path) -> None:
    """Raise UsageError if the weights of a finished run are missing."""
    weights = run / "weights" / "best.pth"
    if not weights.is_file() or not weights.stat().st_size:
        raise UsageError(f"{weights}: missing or empty; remove the folder {run} to train this fold again")


class Prepared(NamedTuple):
    """A cross-validation that has been started or reopened, and its lock."""

    args: argparse.Namespace
    folder: Path
    lock: TextIO | None
    is_complete: bool = False


def start(args: argparse.Namespace, launch_ids: set[str]) -> Prepared:
    """Find the images, draw the folds, and write their tables to a new folder in runs/.

    Raises:
        DataError: there are too few images of a class, or a table cannot list an image.
        UsageError: --weights were trained on these images.
    """
    known = Path("runs") / CHECK_CACHE
    images = find_images(args, known)
    require_unused(args.weights, images)
    if args.weights:  # reject invalid weights before anything is written
        model = MODELS[args.model](num_classes=len(images.class_names))
        load_initial_weights(model, args.weights, args.model, images.class_names)
    drawn = [draw_folds(images.labels, images.groups, args.folds, args.seed + repeat) for repeat in range(args.repeats)]
    for folds in drawn:
        require_divisible(images, folds, args.folds)
        if args.learning_curve:
            require_subsets(images, folds)
    require_listable(images)
    folder = create_free_folder(args.name)
    lock = lock_run(folder)
    for run in list_runs(args):
        folds, fold = drawn[run.fold // args.folds], run.fold % args.folds
        write_fold(images, folds, fold, run.table(folder), run.divisor, seed=args.seed + run.fold)
    write_json(images.data.known, known)
    write_skipped(images.data.skipped, folder)
    if launch_ids:
        (folder / LAUNCH_FILE).write_text("\n".join(sorted(launch_ids)), encoding="utf-8")
    flags = vars(args) | {"recipe": args.recipe.name, "weights": absolute_weights(args.weights)}
    verdicts = Corrections(args.corrections).verdicts if args.corrections else {}
    content = {
        "flags": flags,
        "verdicts": {path: verdict.text for path, verdict in verdicts.items()},
        "checksums": {str(Path(path).absolute()): file_checksum(path) for path in images.paths},
    }
    write_json(content, folder / FOLDS_FILE)
    describe_folds(args, images, folder)
    return Prepared(args, folder, lock)


def absolute_weights(weights: str) -> str:
    """Return --weights as an absolute path if it is a file."""
    return str(Path(weights).absolute()) if Path(weights).is_file() else weights


def require_same_images(folder: Path, checksums: dict[str, str]) -> None:
    """Raise UsageError if images have changed since the cross-validation was started."""
    changed = [path for path, checksum in checksums.items() if file_checksum(path) != checksum]
    if changed:
        names = shorten(", ".join(changed))
        raise UsageError(
            f"{folder}: {len(changed)} images were changed or removed since the start; restore them, or start a new "
            f"cross-validation: {names}"
        )


def describe_folds(args: argparse.Namespace, images: Images, folder: Path) -> None:
    """Print the number of images, and what happens to them."""
    grouped = len(images.paths) - len(set(images.groups.tolist()))
    print(f"images       {len(images.paths)} in {len(images.class_names)} classes, {args.folds} folds")
    if grouped:
        print(f"duplicates   {grouped} images show the same picture as another one, and are in its fold")
    if images.data.test_images:
        print(f"test images  {len(images.data.test_images)}, in no fold")
    if skipped := images.data.skipped:
        print(f"skipped      {printable(count_skipped(skipped))}; listed in {printable(str(folder / SKIPPED_FILE))}")
    print(f"results      {printable(str(folder))}", flush=True)


def require_unused(weights: str, images: Images) -> None:
    """Raise UsageError if the run of a weights file has used some of the images."""
    if not weights:
        return
    used = read_run_checksums(Path(weights).absolute().parent.parent / "files.json")
    checksums = {checksum for versions in images.data.files.values() for _, checksum in versions}
    if known := len(checksums & used.keys()):
        raise UsageError(
            f"--weights {weights}: their run used {known} of these images, so the results would be too good; "
            f"use other weights, or train from scratch"
        )


def reopen(argv: list[str], name: str) -> Prepared:
    """Open the cross-validation that --resume names, with its flags.

    Raises:
        UsageError: there is none, another process is running it, a flag differs, or an image has changed.
    """
    if name:
        found = [folder for folder in (Path(name), Path("runs", name)) if (folder / FOLDS_FILE).is_file()]
    else:
        found = sorted(Path("runs").glob(f"*/{FOLDS_FILE}"), key=lambda path: -path.stat().st_mtime)
        found = [path.parent for path in found]
    if not found:
        raise UsageError(f"{f'--resume {name}'.rstrip()}: no {FOLDS_FILE} to resume from; start a new cross-validation")
    folder = found[0]
    lock = lock_run(folder)
    content = read_json(folder / FOLDS_FILE)
    saved, defaults = content.get("flags"), vars(parse_args([]))
    is_valid = config.same_schema(saved, defaults | {"recipe": ""}) and saved["recipe"] in config.RECIPES
    if not is_valid or saved["model"] not in MODELS or not isinstance(content.get("checksums"), dict):
        raise UsageError(f"{folder / FOLDS_FILE}: corrupt, or written by another version")
    before, args = parse_args([], saved), parse_args(argv, saved)
    args.weights = absolute_weights(args.weights)
    for flag, value in vars(before).items():
        if flag not in MAY_CHANGE and getattr(args, flag) != value:
            raise UsageError(config.describe_conflict(flag, folder, value, "omit the flag to resume"))
    is_complete = (folder / ISSUES_FILE).exists()
    if not is_complete:
        require_same_images(folder, content["checksums"])
    return Prepared(args, folder, lock, is_complete)


# --- program ------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None, saved: dict[str, Any] | None = None) -> argparse.Namespace:
    """Parse and validate the command line; see `config.parse_args`."""
    parser = config.build_parser("cross_validate.py", __doc__)
    parser.epilog = "Not supported: --find-lr, --val-rate and --allow-changed-data. --resume takes a name or a folder."
    add = parser.add_argument_group("cross-validation").add_argument
    two, positive = checked(int, lambda n: n >= 2, "at least 2"), checked(int, lambda n: n >= 1, "at least 1")
    add("--folds", type=two, default=5, help="number of folds (default: %(default)s)")
    add(
        "--repeats", type=positive, default=1, help="draw the folds this many times, and average (default: %(default)s)"
    )
    curve_help = "also train on subsets of the data, to predict the accuracy with twice as many images"
    add("--learning-curve", action="store_true", help=curve_help)
    parser.set_defaults(name="cross_validation", best_metric="last")
    args = config.parse_args(argv, saved, parser)
    for flag in ("find_lr", "allow_changed_data"):
        if getattr(args, flag):
            parser.error(f"--{flag.replace('_', '-')}: not supported for cross-validation")
    if args.val_rate != parser.get_default("val_rate"):
        parser.error("--val-rate has no effect: the images of a fold are its validation images; use --folds")
    return args


def run_cross_validation(argv: list[str]) -> int:
    """Parse the flags, start or resume, and cross-validate. Returns the exit status."""
    args = parse_args(argv)
    with Distributed(args.timeout) as dist, silence_other_ranks(dist):
        lock = None

        def prepare() -> Prepared:
            nonlocal lock
            name = find_launched_run(dist.launch_ids, needed=FOLDS_FILE) or args.resume
            prepared = start(args, dist.launch_ids) if name is None else reopen(argv, name)
            lock = prepared.lock  # held until the end; cannot be sent to other ranks
            return prepared._replace(lock=None)

        args, folder, _, is_complete = dist.broadcast_from_main(prepare, no_timeout=True)
        if is_complete:
            print(f"{printable(str(folder))} is complete")
            return 0
        try:
            cross_validate(args, folder, dist)
        except StopRequest as stop:
            return 128 + stop.number
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit status."""
    memory_advice, worker_advice = "try a smaller --batch-size or --img-size", "try --workers 0"
    run = functools.partial(run_cross_validation, sys.argv[1:] if argv is None else argv)
    return run_program("cross_validate.py", run, memory_advice=memory_advice, worker_advice=worker_advice)


if __name__ == "__main__":
    sys.exit(main())
