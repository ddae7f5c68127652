"""What the programs share: argument parsing, device and precision, DataLoader workers, error messages and files."""

import argparse
import contextlib
import csv
import json
import multiprocessing.queues
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any, NoReturn

import torch

from distributed import Distributed

try:
    import resource
except ImportError:  # Windows
    resource = None


class UsageError(ValueError):
    """A flag with an unsupported value. The message says which flag, why, and what to do."""


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that accepts --both-spellings and --both_spellings, and reports errors in one line."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> Any:
        """Parse arguments, with underscores in the names of flags replaced by hyphens."""
        args = sys.argv[1:] if args is None else args
        return super().parse_args([re.sub(r"^--\w[\w-]*", _hyphens, arg) for arg in args], namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line, without argparse's usage message."""
        said = f"{self.prog}: error: {printable(message)} (--help explains the flags)\n"
        self.exit(2, said if Distributed().is_main else None)


def _hyphens(flag: re.Match) -> str:
    return flag[0].replace("_", "-")


def parse_bool(text: str) -> bool:
    """Parse the value of a flag such as `--freeze-layers False`: `bool("False")` would be True."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return values[text.lower()]


def printable(text: str) -> str:
    """Escape unprintable characters, such as control characters in a file name, for output on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def escape_unprintable_output() -> None:
    """Let standard output and error escape the characters that their encoding lacks, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def silence_other_ranks(dist: Distributed) -> Iterator[None]:
    """Discard the standard output of all ranks but the main process."""
    with contextlib.ExitStack() as stack:
        if not dist.is_main:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


def quote_command(words: list[str]) -> str:
    """Quote a command for the user's shell."""
    return printable(subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words))


def shorten(text: str, width: int = 100) -> str:
    """Truncate `text` to `width` characters."""
    return text if len(text) <= width else f"{text[: width - 4]} ..."


# --- device -------------------------------------------------------------------------------------------------------


def select_device(name: str, dist: Distributed | None = None) -> torch.device:
    """Return the device for `cuda`, `cuda:1`, `1`, `mps` or `cpu`; fall back to the CPU, with a message.

    Args:
        dist: each of several ranks on a machine takes the GPU with the number of its local rank.

    Raises:
        UsageError: an unknown device, or an index that does not exist.
    """
    match = re.fullmatch(r"(?:(cuda):)?(\d+)|cuda|mps|cpu", name)
    if match is None:
        raise UsageError(f"--device {name}: choose cuda, cuda:1 (or just 1), mps or cpu")
    index = int(match[2] or 0)
    if dist is not None and dist.local_world_size > 1 and name != "cpu":
        if name != "cuda":
            raise UsageError(f"--device {name}: with several processes on a machine choose cuda or cpu")
        index = dist.local_rank
    if name == "cpu":
        return torch.device("cpu")
    available = torch.backends.mps.is_available() if name == "mps" else torch.cuda.is_available()
    if not available:
        if dist is None or dist.is_main:
            print(f"no {'MPS' if name == 'mps' else 'CUDA'} device is available: using the CPU", file=sys.stderr)
        return torch.device("cpu")
    if name == "mps":
        return torch.device("mps")
    if index >= torch.cuda.device_count():
        where = f"--device {name}" if match[2] else f"{dist.local_world_size} processes on this machine"
        raise UsageError(f"{where}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return torch.device("cuda", index)


def describe_device(device: torch.device) -> str:
    """Describe a device for the header: the GPU's name, or the number of CPU threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def describe_processes(dist: Distributed) -> str:
    """Return ", N processes" for a status line, or "" for a single process."""
    return f", {dist.world_size} processes" if dist.world_size > 1 else ""


def select_precision(amp: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """Choose the dtype of mixed precision.

    Args:
        amp: "auto" (if the device supports bfloat16 or float16 natively), "on" (also where it is emulated) or "off".

    Returns:
        The dtype, None for float32, and a description of the choice for the header.
    """
    if amp == "off":
        return None, "float32 (--amp off)"
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return torch.bfloat16, "bfloat16 (mixed; this GPU computes in it)"
            if amp == "on" or torch.cuda.get_device_capability() >= (7, 0):  # tensor cores
                return torch.float16, "float16 (mixed, the loss scaled; this GPU has no bfloat16)"
            return None, "float32 (this GPU gains nothing from less)"
    if device.type == "cpu":
        if _cpu_has_bfloat16():
            return torch.bfloat16, "bfloat16 (mixed; this CPU computes in it)"
        if amp == "on":
            return torch.bfloat16, "bfloat16 (mixed; emulated, as --amp on asks for)"
        return None, "float32 (this CPU does not compute in bfloat16)"
    if amp == "on":
        raise UsageError(f"--amp on: not for {device.type} devices")
    return None, f"float32 (no mixed precision on {device.type} devices)"


def _cpu_has_bfloat16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # before torch 2.12


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux; less than the machine has in a container or under taskset
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def number_of_workers(workers: int | None, processes: int = 1) -> int:
    """Return --workers, or by default one worker per core, at most 8, divided among the processes on this machine."""
    return min(max(1, available_cores() // processes), 8) if workers is None else workers


def available_memory() -> int:
    """Return the available memory in bytes; 0 if it is unknown."""
    available = []
    with contextlib.suppress(OSError):
        for kib in re.findall(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.M):
            available.append(1024 * int(kib))
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:  # ulimit -v
            available.append(limit - resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0]))
    for limit, used, cached in [  # a container's, cgroup versions 2 and 1
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ]:
        group = Path("/sys/fs/cgroup")
        with contextlib.suppress(OSError):
            limited, taken = (group / limit).read_text().strip(), int((group / used).read_text())
            statistics = (group / limit).with_name("memory.stat").read_text()
            reclaimable = int(re.search(rf"^{cached} (\d+)$", statistics, re.M)[1])  # page cache
            if limited != "max":
                available.append(int(limited) - taken + reclaimable)
    return max(0, min(available, default=0))


def peak_memory(device: torch.device) -> float | None:
    """Return the peak memory in GiB: of tensors on the GPU, else of this process without workers; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# --- DataLoader workers and resource errors ----------------------------------------------------------------------


def worker_init(worker: int) -> None:
    """Initialise a DataLoader worker: it ignores signals from the terminal, and ends with the main process."""
    signal.set_wakeup_fd(-1)  # inherited from the main process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Without shared memory for a batch, the worker must end: the main process would wait for the batch forever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda error, batch: os._exit(1))

    def exit_after(wait: Callable[[], None]) -> None:
        wait()
        os._exit(0)

    def main_process_has_ended() -> None:
        connection.wait([parent_process().sentinel])

    def main_process_sends_sigterm() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent_process().pid:
            pass  # a signal to the whole process group: the main process needs its workers until it has saved

    conditions = [main_process_has_ended]
    if hasattr(signal, "sigwaitinfo"):  # not on Windows and macOS, where any SIGTERM ends a worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        conditions.append(main_process_sends_sigterm)
    for wait in conditions:
        threading.Thread(target=exit_after, args=[wait], daemon=True).start()


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that the GPU or the machine is out of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU's allocator, CUDA, MPS, cuBLAS and cuDNN raise RuntimeErrors with different messages.
    said = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return any(words in str(error) for words in said) and not is_dead_worker(error)


def is_dead_worker(error: Exception) -> bool:
    """Return whether an error means that a DataLoader worker has died."""
    said = ("DataLoader worker (pid", "received 0 items of ancdata", "got end of file during message")
    return isinstance(error, (ConnectionError, EOFError)) or str(error).startswith(said)


def explain_resource_error(error: Exception, memory_advice: str, worker_advice: str) -> str | None:
    """Return a message for an error that means too little memory or a dead worker; None for any other error.

    The program must end with it, as it disables torch's handler of dead workers, which would report each again.
    """
    if is_out_of_memory(error):
        return f"out of memory: {memory_advice}"
    if is_dead_worker(error):
        if hasattr(signal, "SIGCHLD"):  # not on Windows, where torch has no such handler
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        why = f"too little memory or /dev/shm ({worker_advice}), or a damaged image"
        return f"a process that reads images died: {why}"
    return None


def flush_stdout() -> None:
    """Flush standard output, and discard what cannot be written: Python would print an error at exit."""
    try:
        print(end="", flush=True)  # does nothing where there is no output at all
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- files --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which then replaces `path`: a reader never sees half a file.

    A symbolic link is kept, and its target replaced. A pipe or a device is written to directly.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()
    unfinished = path.with_name(f".{os.getpid()}.tmp.{path.name}")  # with its extension, which tells the format
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file atomically."""
    with atomic_file(path) as unfinished:
        unfinished.write_text(json.dumps(content), encoding="utf-8")


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path, columns: Sequence[str] = ()) -> None:
    """Write a CSV file atomically, with these columns first and then the other keys of the rows.

    Characters that UTF-8 cannot encode, as in file names, are escaped.
    """
    columns = list(dict.fromkeys([*columns, *(key for row in rows for key in row)]))
    with (
        atomic_file(path) as unfinished,
        open(unfinished, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if the file is missing or corrupt."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
