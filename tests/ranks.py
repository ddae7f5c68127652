"""Ranks as forks of this process, which has already imported all modules."""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch

SMALL = ["--model", "resnet18", "--img-size", "32", "--device", "cpu", "--workers", "0", "--timeout", "60"]


def free_port() -> int:
    """Return a port that no other process uses."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def run_ranks(count: int, program: Callable[[], int | None]) -> list[int]:
    """Run `program` in `count` forked ranks, with the variables that torchrun sets, and return their exit statuses."""
    port = free_port()

    def one(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os._exit(program() or 0)  # skips pytest's own shutdown

    processes = [multiprocessing.get_context("fork").Process(target=one, args=[rank]) for rank in range(count)]
    end = time.monotonic() + 120
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights in a run's last checkpoint."""
    return torch.load(run / "weights" / "last.pth", weights_only=True)["state_dict"]
