"""The state of a training run: the model and its optimizer, the progress, and the best result so far."""

import contextlib
import math
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from background import BackgroundWriter
from calibration import fit_temperature
from checkpoint import best_content, finite_state_dict, last_content, restore, write_checkpoints
from cli_utils import UsageError
from distributed import Distributed
from event_files import truncate_event_files
from familiarity import Familiarity, fit_familiarity
from metrics import Evaluation
from optimization import Schedule
from run_utils import RunFolder
from train_eval_utils import Progress
from weights_io import WeightsError

SECONDS_BETWEEN_SAVES = 60  # minimum, within an epoch
SAVE_COST = 0.01  # maximum fraction of the training time spent on checkpoints


class Run:
    """The state of a training run, as needed to resume it.

    Args:
        folder: the run's locked folder.
        flags: the flags to save, see `config.flags_to_save`.
        info: the model's metadata in a weights file: {"model": ..., "class_names": ..., "img_size": ...}.
        average: the averaged weights, if any.
        global_batch: images per step, over all ranks.
        best_metric: what decides which epoch is the best: "accuracy", "macro_f1", "val_loss" or, always, "last".
        patience: the number of epochs without improvement in `best_metric` after which training ends; 0: never.
        save_every: the interval in epochs at which the plain state_dict is also saved; 0: never.
        dist: the process group. Every rank calls `save`, `finish_epoch` and `load`; the main process writes.

    Attributes:
        epoch: the current epoch.
        progress: the loss and accuracy of the current epoch's steps so far.
        images_before: images of the current epoch that were trained on before an interruption.
        history: the metrics of the earlier epochs.
        last, best: epoch, accuracy, macro F1, validation loss and temperature of the last and the best epoch.
        best_confusion: the confusion matrix of the best epoch.
        familiarity: of the best epoch, if it is the current one and has enough validation images.
        improved_at: the epoch of the last improvement in `best_metric`.
        validation_start: when the last step of the epoch finished.
        finished: why training is complete, or "" if it is not; decided once per epoch.
        background: writes step losses, figures and checkpoints, in the order of submission.
    """

    def __init__(
        self,
        folder: RunFolder,
        flags: Mapping[str, Any],
        info: Mapping[str, Any],
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        schedule: Schedule,
        average: AveragedModel | None = None,
        global_batch: int,
        best_metric: str = "accuracy",
        patience: int = 0,
        save_every: int = 0,
        dist: Distributed,
    ) -> None:
        self.folder, self.flags, self.info = folder.path, dict(flags), dict(info)
        self._lock = folder.lock  # held for as long as the run exists
        self.model, self.average = model, average
        self.optimizer, self.scaler, self.schedule = optimizer, scaler, schedule
        self.global_batch, self.best_metric, self.patience = global_batch, best_metric, patience
        self.save_every, self.dist = save_every, dist
        self.epoch = 0
        self.progress = Progress()
        self.images_before = 0
        self.history: list[dict[str, float]] = []
        self.last: dict[str, Any] = dict.fromkeys(("epoch", "accuracy", "macro_f1", "val_loss", "temperature"))
        self.best = self.last | {"accuracy": -1.0, "macro_f1": -1.0, "val_loss": math.inf}
        self.best_confusion: Tensor | None = None
        self.familiarity: Familiarity | None = None
        self.improved_at: int | None = None
        self.finished = ""
        self.validation_start = time.perf_counter()
        self.background = BackgroundWriter()
        self._unwritten: dict[str, dict[str, Any]] = {}  # checkpoints to be written with the next last.pth
        self._saving: Future | None = None
        self._saved_at, self._save_seconds = time.perf_counter(), 0.0
        self._seconds_before = self._background_seconds = 0.0  # the latter is the maximum over the epochs

    @property
    def weights(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "weights"

    @property
    def eval_model(self) -> nn.Module:
        """The model to validate and save as best.pth: the averaged one, if any."""
        return self.model if self.average is None else self.average.module

    # --- validation -----------------------------------------------------------------------------------------------

    def update_best(self, validation: Evaluation) -> None:
        """Record an epoch's validation metrics, and decide whether training is complete.

        The best epoch has the best `best_metric`; among equals, the lowest validation loss.
        """
        self.last = {
            "epoch": self.epoch,
            "accuracy": validation.accuracy,
            "macro_f1": validation.macro_f1,
            "val_loss": validation.loss,
            "temperature": fit_temperature(validation.logits, validation.labels),
        }
        if self._score(self.last) > self._score(self.best):
            self.improved_at = self.epoch
        is_best = (self._score(self.last), -self.last["val_loss"]) > (self._score(self.best), -self.best["val_loss"])
        if is_best:
            self.best, self.best_confusion = self.last, validation.confusion
            self.familiarity = None if validation.layer1 is None else fit_familiarity(validation.layer1)
        self.finished = self._finish_reason(self.epoch + 1)

    def _score(self, metrics: Mapping[str, Any]) -> float:
        if self.best_metric == "last":
            return -1 if metrics["epoch"] is None else metrics["epoch"]
        return -metrics["val_loss"] if self.best_metric == "val_loss" else metrics[self.best_metric]

    def _finish_reason(self, epochs: int) -> str:
        """Return why training is complete after `epochs` epochs, or "" if it is not."""
        if self.schedule.is_over(epochs):
            return self.schedule.end_reason
        if self.improved_at is not None and 0 < self.patience <= epochs - 1 - self.improved_at:
            reason = f"{self.patience} epochs without improvement in {self.best_metric}"
            return f"{reason}; resume it with a larger --patience"
        return ""

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Copy the state after the last step, and write last.pth, and best.pth if it is due, in the background.

        Call the logger's `flush` first.

        Raises:
            FloatingPointError: training has diverged. The previous last.pth is kept.
            OSError: an earlier function of `background` failed.
        """
        start = time.perf_counter()
        self.progress.read()
        progress, rank_buffers = self.progress, []
        if self.dist.world_size > 1 and progress.steps > 0:  # within an epoch the ranks differ
            progress = progress.all_reduce(self.dist)
            rank_buffers = self.dist.gather({name: buffer.cpu() for name, buffer in self.model.named_buffers()})
        if self.dist.is_main:
            if self._saving is not None:
                self._saving.result()  # so that only one last.pth is in memory
            contents = self._unwritten | {"last.pth": last_content(self, progress.state_dict(), rank_buffers)}
            self._unwritten = {}
            self._saved_at = time.perf_counter()
            self._save_seconds = self._saved_at - start
            self._saving = self.background.submit(self._write, contents)

    def _write(self, contents: Mapping[str, dict[str, Any]]) -> None:
        start = time.thread_time()
        write_checkpoints(self.folder, contents)
        self._save_seconds += time.thread_time() - start

    def save_is_due(self) -> bool:
        """Return whether to save within an epoch; always False on ranks other than 0."""
        return self._is_cheap_to_save() and time.perf_counter() - self._saved_at > SECONDS_BETWEEN_SAVES

    def _is_cheap_to_save(self) -> bool:
        seconds = time.perf_counter() - self._saved_at
        return self.dist.is_main and self._save_seconds <= SAVE_COST * seconds

    def finish_epoch(self) -> None:
        """Advance to the next epoch, and save the run.

        Saving is postponed if it would take more than 1% of the time, but not at the end or if model-N.pth is due.

        Raises:
            FloatingPointError, OSError: see `save`.
        """
        is_plain_due = self.save_every > 0 and (self.epoch + 1) % self.save_every == 0
        if self.dist.is_main:
            if is_plain_due:  # the tutorial's file: the state_dict alone
                self._unwritten[f"model-{self.epoch}.pth"] = finite_state_dict(self.eval_model, self.epoch)
            if self.best is self.last:
                self._unwritten["best.pth"] = best_content(self)
        self.epoch += 1
        self.progress = Progress()
        self.images_before = 0
        self._reserve_time()
        if self.finished or is_plain_due or self._is_cheap_to_save():
            self.save()
        if self.finished:
            self.background.wait()

    def _reserve_time(self) -> None:
        """Reserve time in the schedule for the end of the last epoch, from that of this epoch."""
        seconds = time.perf_counter() - self.validation_start
        if self.epoch == 1:
            self.wait_for_background()  # for the first slow figures, to measure them
        before, self._seconds_before = self._seconds_before, self.background.seconds
        self._background_seconds = max(self._background_seconds, self._seconds_before - before)
        self.schedule.reserve_time(*self.dist.all_reduce_max(seconds + self._background_seconds))

    def wait_for_background(self) -> None:
        """Wait until figures and checkpoints have been written. The time counts as that of the last checkpoint."""
        start = time.perf_counter()
        self.background.wait()
        self._save_seconds += time.perf_counter() - start

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: Any) -> None:
        """Write the checkpoints that were not due yet, such as best.pth, even after an error, and wait."""
        with contextlib.suppress(OSError):  # an earlier error, which is raised below
            if self._unwritten:
                self.background.submit(write_checkpoints, self.folder, self._unwritten)
        self.background.__exit__(*error)

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the state that `save` wrote, and remove later events from the event files.

        Raises:
            UsageError: the checkpoint is corrupt, or the world size has changed.
        """
        before = checkpoint["resume"].get("global_batch")
        if before != self.global_batch:
            message = f"the run was started with a global batch of {before} images, and now it is {self.global_batch}"
            self.dist.fail(UsageError(f"{message}; resume it with as many processes as before"))
        try:
            sizes = restore(self, checkpoint)
        except WeightsError as error:
            self.dist.fail(error)
        self.finished = self.finished and self._finish_reason(self.epoch)  # more epochs or patience may be allowed now
        if self.dist.is_main:
            truncate_event_files(self.folder, sizes)

    def restore_progress(self, loss_sum: float, images: int, steps: int, correct: int) -> None:
        """Restore the progress within an epoch, given the sums over all ranks."""
        self.images_before = images
        # Only rank 0 restores the sums: `Progress.all_reduce` adds up all ranks.
        self.progress = Progress(loss_sum, images, steps, correct) if self.dist.is_main else Progress(steps=steps)
