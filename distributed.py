"""Distributed training under torchrun: the process group, its collectives, and DistributedDataParallel.

Without torchrun there is one process, and every method is a no-op or returns its input.
"""

import os
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

SECONDS_BETWEEN_SYNCS = 1.0


class OtherRankFailed(Exception):  # noqa: N818 - the rank that failed reports the error itself
    """Another rank has raised an error, and reports it."""


class Distributed:
    """The process group of a run. As a context manager it initialises the group and destroys it.

    Tensors on GPUs are communicated by NCCL, everything else by Gloo. NCCL's timeout aborts the process; it is twice
    as long as Gloo's, which raises an error. The methods that communicate are collective: every rank must call them, in
    the same order. The environment variables are those of torchrun,
    https://docs.pytorch.org/docs/stable/elastic/run.html.

    Args:
        timeout: seconds to wait for an unreachable rank. A rank that has ended is detected at once.

    Attributes:
        is_launched: whether a launcher such as torchrun has started this process.
        launch_ids: one identifier per torchrun process (one per machine), set on entry and unchanged by restarts.

    Raises:
        RuntimeError: from every method, if another rank has ended or cannot be reached; see `is_connection_lost`.
    """

    def __init__(self, timeout: float = 300.0) -> None:
        self.timeout = timedelta(seconds=timeout)
        env = os.environ if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() else {}
        self.is_launched = bool(env)
        self.rank, self.world_size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        self.local_rank, self.local_world_size = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
        self._gpu_group: dist.ProcessGroup | None = None
        self.launch_ids: set[str] = set()
        self._start = time.perf_counter()
        self._steps, self._interval, self._synced_at = 0, 1, 0.0

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, rank 0, the only one that prints and writes files."""
        return self.rank == 0

    @staticmethod
    def _launch_id() -> str:
        """Identify the torchrun that started or restarted this process; return "" without torchrun."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return ""
        torchrun = os.getppid()
        try:
            started = Path(f"/proc/{torchrun}/stat").read_text().rpartition(")")[2].split()[19]
        except OSError:  # not Linux
            started = ""
        return f"{os.environ['TORCHELASTIC_RUN_ID']} {socket.gethostname()} {torchrun} {started}"

    def __enter__(self) -> "Distributed":
        if self.is_launched:
            options = {"backend": "gloo", "timeout": self.timeout}
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                options |= {"store": self._connect_store(), "rank": self.rank, "world_size": self.world_size}
            dist.init_process_group(**options)
            self._no_timeout_group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
            if torch.cuda.is_available() and dist.is_nccl_available():
                self._gpu_group = dist.new_group(backend="nccl", timeout=2 * self.timeout)
            if "LOCAL_WORLD_SIZE" not in os.environ:  # launchers other than torchrun may not set it
                hosts = self.gather(socket.gethostname())
                self.local_world_size = hosts.count(hosts[self.rank])
                self.local_rank = int(os.environ.get("LOCAL_RANK", hosts[: self.rank].count(hosts[self.rank])))
            self.launch_ids = set(self.gather(self._launch_id())) - {""}
        return self

    def _connect_store(self) -> dist.Store:
        """Create a store on rank 0, because torchrun's own still holds the keys from before a restart.

        https://github.com/pytorch/pytorch/issues/135712
        """
        host, key = os.environ["MASTER_ADDR"], "port of rank 0"  # after a restart, it holds the old port at first
        shared = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), timeout=self.timeout)
        if self.is_main:
            own = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=self.timeout)
            shared.set(key, str(own.port))
            return own
        deadline = time.monotonic() + self.timeout.total_seconds()
        while True:
            port = int(shared.get(key))
            try:
                socket.create_connection((host, port), timeout=2).close()  # TCPStore would print a stack trace
                store = dist.TCPStore(host, port, timeout=timedelta(seconds=2))
                store.set_timeout(self.timeout)
                return store
            except (OSError, dist.DistNetworkError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self.is_launched and kind is None:  # after an error, it would wait for ranks that have ended
            dist.destroy_process_group()

    # --- collectives ----------------------------------------------------------------------------------------------

    def broadcast_from_main(self, function: Callable[[], T], no_timeout: bool = False) -> T:
        """Call `function` on the main process and broadcast its result.

        Args:
            no_timeout: the other ranks wait for as long as it takes.

        Raises:
            OtherRankFailed: on the other ranks, if `function` raises.
        """
        if not self.is_launched:
            return function()
        message = [(False, None)]
        try:
            if self.is_main:
                message = [(True, function())]
        finally:
            dist.broadcast_object_list(message, src=0, group=self._no_timeout_group if no_timeout else None)
        succeeded, result = message[0]
        if not succeeded:
            raise OtherRankFailed
        return result

    def local_rank_zero_first(self, function: Callable[[], T]) -> T:
        """Call `function` on one rank per machine first, then on the others, which find what it has downloaded.

        Raises:
            OtherRankFailed: on the other ranks, if it raises on a local rank 0.
        """
        goes_first, result, succeeded = self.local_rank == 0, None, False
        try:
            if goes_first:
                result = function()
            succeeded = True
        finally:
            all_succeeded = all(self.gather(succeeded, no_timeout=True))
        if not all_succeeded:
            raise OtherRankFailed
        return result if goes_first else function()

    def fail(self, error: Exception) -> NoReturn:
        """Raise an error that all ranks have detected: `error` on the main process, `OtherRankFailed` on the others."""
        raise error if self.is_main else OtherRankFailed

    def gather(self, value: T, no_timeout: bool = False) -> list[T]:
        """All-gather a picklable value: one per rank, in rank order."""
        if not self.is_launched:
            return [value]
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._no_timeout_group if no_timeout else None)
        return values

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Sum each value over all ranks."""
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def all_reduce_max(self, *values: float) -> list[float]:
        """Take the maximum of each value over all ranks."""
        return self._all_reduce(values, dist.ReduceOp.MAX)

    def all_reduce_min(self, *values: float) -> list[float]:
        """Take the minimum of each value over all ranks."""
        return self._all_reduce(values, dist.ReduceOp.MIN)

    def _all_reduce(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if not self.is_launched:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, operation)
        return tensor.tolist()

    # --- model and memory -----------------------------------------------------------------------------------------

    def wrap_ddp(self, model: nn.Module, device: torch.device, sync_bn: bool = False) -> nn.Module:
        """Wrap `model` in DistributedDataParallel (Li et al. 2020, https://arxiv.org/abs/2006.15704).

        BatchNorm's running statistics differ between ranks until `sync_model` is called.

        Args:
            sync_bn: convert BatchNorm layers in place, to normalise over the batches of all ranks.
        """
        if not (self.is_launched and any(parameter.requires_grad for parameter in model.parameters())):
            return model
        group = self._group(device)
        if sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
        device_ids = [device] if device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 renames broadcast_buffers
            return DistributedDataParallel(
                model,
                device_ids=device_ids,
                process_group=group,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    def _group(self, device: torch.device) -> dist.ProcessGroup | None:
        return self._gpu_group if device.type == "cuda" else None

    def sync_model(self, model: nn.Module) -> None:
        """Average BatchNorm's statistics over all ranks, and broadcast rank 0's parameters.

        The parameters may differ, because different machines may round differently.
        """
        if not self.is_launched:
            return
        for module in model.modules():
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):  # not frozen
                for buffer in filter(torch.is_floating_point, module.buffers(recurse=False)):
                    dist.all_reduce(buffer, group=self._group(buffer.device))
                    buffer /= self.world_size
        for parameter in model.parameters():
            if parameter.requires_grad:
                dist.broadcast(parameter.data, src=0, group=self._group(parameter.device))

    def share_file(self, create: Callable[[], BinaryIO]) -> BinaryIO:
        """Open the file in memory that one rank on each machine creates (on Linux; elsewhere each rank has its own)."""
        if not (self.is_launched and hasattr(os, "memfd_create")):
            return create()
        node, location = (socket.gethostname(), os.environ.get("GROUP_RANK")), None
        if self.local_rank == 0:
            file = create()
            location = (node, f"/proc/{os.getpid()}/fd/{file.fileno()}")
        path = next(path for its_node, path in filter(None, self.gather(location)) if its_node == node)
        shared = open(path, "r+b", buffering=0)  # noqa: SIM115 - stays open as long as the cache
        self.gather(None)  # a barrier: every rank has opened it
        return shared

    # --- periodic synchronisation ---------------------------------------------------------------------------------

    def restart_clock(self) -> None:
        """Measure `elapsed` from now on, for a further run in the same processes."""
        self._start = time.perf_counter()
        self.sync_max()

    def elapsed(self) -> float:
        """Return the seconds since the start; under torchrun those at the last `sync_max`, equal on all ranks."""
        return self._synced_at if self.is_launched else time.perf_counter() - self._start

    def is_time_to_sync(self) -> bool:
        """Count a step, and return whether to call `sync_max` now: about once per second, on all ranks at once."""
        self._steps += 1
        return not self.is_launched or self._steps % self._interval == 0

    def sync_max(self, *flags: float) -> list[float]:
        """Take the maximum of each flag over all ranks, and synchronise `elapsed`."""
        *flags, now = self.all_reduce_max(*flags, time.perf_counter() - self._start)
        interval = max(now - self._synced_at, 1e-3)
        self._interval = min(1000, max(1, round(self._steps * SECONDS_BETWEEN_SYNCS / interval)))
        self._steps, self._synced_at = 0, now
        return flags


def is_connection_lost(error: Exception) -> bool:
    """Return whether an error means that another rank has ended or cannot be reached."""
    # Gloo raises plain RuntimeErrors; all mention Gloo, except those that follow another operation's timeout.
    messages = ("gloo", "application timeout caused pair closure")
    return isinstance(error, dist.DistError) or any(message in str(error).lower() for message in messages)
