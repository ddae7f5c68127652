"""The processes that train together, as torchrun starts them: which of them this is, and what they tell one another."""

import mmap
import os
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

SECONDS_BETWEEN_AGREEMENTS = 1.0


class OtherRankFailed(Exception):  # noqa: N818 - the error itself is told where it happened
    """The first process cannot go on, and says why."""


class Ranks:
    """The processes of a run, this one being number `rank` of `world_size`; or one alone, without torchrun.

    https://docs.pytorch.org/docs/stable/elastic/run.html says what torchrun tells them. While it is entered they are
    connected: tensors on GPUs by NCCL, everything else by Gloo. All its methods are to be called by all of them.
    `launches` says then which torchruns started them, one a machine: what these start again has one in common with it.

    Args:
        timeout: seconds that they wait for one another. One whose process has ended is noticed at once.

    Raises (from every method):
        RuntimeError: another process has ended, or cannot be reached; `is_lost` tells that from other errors.
    """

    def __init__(self, timeout: float = 300.0) -> None:
        self.timeout = timedelta(seconds=timeout)
        told = os.environ if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() else {}
        self.are_launched = bool(told)
        self.rank, self.world_size = int(told.get("RANK", 0)), int(told.get("WORLD_SIZE", 1))
        self.local_rank, self.local_world_size = int(told.get("LOCAL_RANK", 0)), int(told.get("LOCAL_WORLD_SIZE", 1))
        self.launches: set[str] = set()
        self._began = time.perf_counter()
        self._steps, self._interval, self._agreed_at = 0, 1, 0.0

    @property
    def is_first(self) -> bool:
        """Whether it is this one that writes."""
        return self.rank == 0

    @staticmethod
    def _launch() -> str:
        """What a torchrun, and what it starts again, have in common on this machine; "" without one."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return ""
        torchrun = os.getppid()
        try:
            began = Path(f"/proc/{torchrun}/stat").read_text().rpartition(")")[2].split()[19]
        except OSError:  # not Linux
            began = ""
        return f"{os.environ['TORCHELASTIC_RUN_ID']} {socket.gethostname()} {torchrun} {began}"

    def __enter__(self) -> "Ranks":
        if self.are_launched:
            nccl = torch.cuda.is_available() and dist.is_nccl_available()
            options = {"backend": "cpu:gloo,cuda:nccl" if nccl else "gloo", "timeout": self.timeout}
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                options |= {"store": self._meet(), "rank": self.rank, "world_size": self.world_size}
            dist.init_process_group(**options)
            self._patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
            self.launches = set(self.gather(self._launch())) - {""}
        return self

    def _meet(self) -> dist.Store:
        """A store of the first's own: torchrun's still tells of the processes from before a restart.

        https://github.com/pytorch/pytorch/issues/135712
        """
        host, key = os.environ["MASTER_ADDR"], "port of the first process"
        shared = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), timeout=self.timeout)
        if self.is_first:
            own = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=self.timeout)
            shared.set(key, str(own.port))
            return own
        give_up = time.monotonic() + self.timeout.total_seconds()
        while True:
            try:
                store = dist.TCPStore(host, int(shared.get(key)), timeout=timedelta(seconds=2))
            except dist.DistNetworkError:  # the port may be from before the restart, too
                if time.monotonic() > give_up:
                    raise
            else:
                store.set_timeout(self.timeout)
                return store

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self.are_launched and kind is None:  # otherwise it would wait for those that are gone
            dist.destroy_process_group()

    def from_first(self, work: Callable[[], T], takes_long: bool = False) -> T:
        """What `work` gives the first.

        Args:
            takes_long: the others wait for it without limit.

        Raises:
            OtherRankFailed: in the others, when the first has an error.
        """
        if not self.are_launched:
            return work()
        told = [(False, None)]
        try:
            if self.is_first:
                told = [(True, work())]
        finally:
            dist.broadcast_object_list(told, src=0, group=self._patient if takes_long else None)
        succeeded, result = told[0]
        if not succeeded:
            raise OtherRankFailed
        return result

    def one_a_machine_first(self, work: Callable[[], T]) -> T:
        """What `work` gives. One process of each machine does it before the others, which find what it downloads.

        Raises:
            OtherRankFailed: one of these has an error; who else would have it, too, need not tell it again.
        """
        is_early, result, succeeded = self.local_rank == 0, None, False
        try:
            if is_early:
                result = work()
            succeeded = True
        finally:
            all_succeeded = all(self.gather(succeeded, patient=True))
        if not all_succeeded:
            raise OtherRankFailed
        return result if is_early else work()

    def fail(self, error: Exception) -> NoReturn:
        """Raise an error that all of them have found: in the first, and `OtherRankFailed` in the others."""
        raise error if self.is_first else OtherRankFailed

    def gather(self, value: T, patient: bool = False) -> list[T]:
        """The values of all of them, in their order; `patient`: it waits for the others without limit."""
        values: list[T | None] = [None] * self.world_size
        if self.are_launched:
            dist.all_gather_object(values, value, group=self._patient if patient else None)
        else:
            values = [value]
        return values

    def add_up(self, *values: float) -> list[float]:
        """The sums over all of them."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def largest(self, *values: float) -> list[float]:
        """The largest of all of them."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def smallest(self, *values: float) -> list[float]:
        """The smallest of all of them."""
        return self._reduce(values, dist.ReduceOp.MIN)

    def _reduce(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if not self.are_launched:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, operation)
        return tensor.tolist()

    def map_memory(self, size: int) -> mmap.mmap:
        """So many bytes of memory, the same for all on one machine (on Linux; elsewhere each has its own)."""
        if not (self.are_launched and hasattr(os, "memfd_create")):
            return mmap.mmap(-1, size)
        node, place, file = os.environ.get("GROUP_RANK", ""), None, None
        if self.local_rank == 0:
            file = os.memfd_create("images")
            os.ftruncate(file, size)
            place = (node, f"/proc/{os.getpid()}/fd/{file}")
        path = next(path for its_node, path in filter(None, self.gather(place)) if its_node == node)
        with open(path, "r+b") as shared:
            memory = mmap.mmap(shared.fileno(), size)
        self.gather(None)  # all have opened it
        if file is not None:
            os.close(file)
        return memory

    def parallel(self, model: nn.Module, device: torch.device) -> nn.Module:
        """`model`, whose backward pass leaves the same gradients in all of them: the mean.

        Li et al. 2020: PyTorch Distributed, https://arxiv.org/abs/2006.15704. The statistics of BatchNorm stay each
        process's own, until `share_weights`.
        """
        if not (self.are_launched and any(parameter.requires_grad for parameter in model.parameters())):
            return model
        device_ids = [device] if device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 has another name for broadcast_buffers
            return DistributedDataParallel(
                model, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def share_weights(self, model: nn.Module) -> None:
        """Let all have the first's statistics of BatchNorm, and what it learned, where machines round differently."""
        if self.are_launched:
            for value in (*model.buffers(), *(each.data for each in model.parameters() if each.requires_grad)):
                dist.broadcast(value, src=0)

    def seconds(self) -> float:
        """Since the beginning: the same in all of them, where it stands still from one `agree` to the next."""
        return self._agreed_at if self.are_launched else time.perf_counter() - self._began

    def is_time_to_agree(self) -> bool:
        """Whether it is, after this step: the same ones in all of them, about every second. One alone: always."""
        self._steps += 1
        return not self.are_launched or self._steps % self._interval == 0

    def agree(self, *wishes: float) -> list[float]:
        """The largest of each wish of all of them. Call it when `is_time_to_agree`."""
        *wishes, now = self.largest(*wishes, time.perf_counter() - self._began)
        took = max(now - self._agreed_at, 1e-3)
        self._interval = min(1000, max(1, round(self._steps * SECONDS_BETWEEN_AGREEMENTS / took)))
        self._steps, self._agreed_at = 0, now
        return wishes


def is_lost(error: Exception) -> bool:
    """Whether an error says that another process has ended, or cannot be reached."""
    # Gloo's are plain RuntimeErrors; they name it, but for what a wait that is out of time leaves to the others.
    words = ("gloo", "application timeout caused pair closure")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)
