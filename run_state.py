"""The state of a training run: the model and its optimizer, the progress, and the best result so far."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from calibration import fit_temperature
from checkpoint import restore, save_best, save_last, save_plain
from cli_utils import UsageError
from distributed import Distributed
from familiarity import Familiarity, fit_familiarity
from metrics import Evaluation
from optimization import Schedule
from run_utils import RunFolder, event_sizes, truncate_event_files
from train_eval_utils import Progress
from weights_io import WeightsError

SECONDS_BETWEEN_SAVES = 60  # minimum, within an epoch


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
        finished: why training is complete, or "" if it is not; decided once per epoch.
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
        self._saved_at, self._save_seconds = time.perf_counter(), 0.0

    @property
    def weights(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "weights"

    @property
    def eval_model(self) -> nn.Module:
        """The model to validate and save as best.pth: the averaged one, if any."""
        return self.model if self.average is None else self.average.module

    # --- validation -----------------------------------------------------------------------------------------------

    def update_best(self, validation: Evaluation) -> bool:
        """Record an epoch's validation metrics, and decide whether training is complete.

        Returns:
            Whether it is the best epoch so far in `best_metric`, and if equal, in validation loss.
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
        return is_best

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
        """Write last.pth, with the state after the last step. Flush the event files first.

        Raises:
            FloatingPointError, OSError: training has diverged, or writing failed. The previous last.pth is kept.
        """
        start = time.perf_counter()
        self.progress.read()
        progress = self.progress.all_reduce(self.dist)
        if self.dist.is_main:
            save_last(self, progress.state_dict(), event_sizes(self.folder))
            self._saved_at = time.perf_counter()
            self._save_seconds = self._saved_at - start

    def save_is_due(self) -> bool:
        """Return whether the last save was over a minute, and 100 times its duration, ago; False on other ranks."""
        waiting = max(SECONDS_BETWEEN_SAVES, 100 * self._save_seconds)
        return self.dist.is_main and time.perf_counter() - self._saved_at > waiting

    def finish_epoch(self) -> None:
        """Write the weights files that are due, advance to the next epoch and write last.pth.

        Raises:
            FloatingPointError, OSError: see `save`.
        """
        if self.dist.is_main:
            if self.save_every and (self.epoch + 1) % self.save_every == 0:
                save_plain(self)
            if self.best is self.last:
                save_best(self)
        self.epoch += 1
        self.progress = Progress()
        self.images_before = 0
        self.save()

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
