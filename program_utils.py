"""What the programs share: their command lines, the device that they compute on, their workers and files."""

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
    """The value of a flag that cannot be used here; the message says which, why, and what to do."""


class FlagParser(argparse.ArgumentParser):
    """`argparse` that takes --both-spellings and --both_spellings, and says in one line what is wrong."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> Any:
        """As argparse's, with the underscores of flags taken for hyphens."""
        args = sys.argv[1:] if args is None else args
        return super().parse_args([re.sub(r"^--\w[\w-]*", _hyphens, arg) for arg in args], namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line; argparse's own prints the whole usage first."""
        said = f"{self.prog}: error: {printable(message)} (--help explains the flags)\n"
        self.exit(2, said if Distributed().is_main else None)


def _hyphens(flag: re.Match) -> str:
    return flag[0].replace("_", "-")


def true_or_false(text: str) -> bool:
    """The value of a flag such as `--freeze-layers False`; `bool("False")` would be True."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return values[text.lower()]


def printable(text: str) -> str:
    """A name from somewhere else, for a line of output: control characters and the like are written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def tolerate_any_name() -> None:
    """Escape what the terminal or the pipe cannot show: a file's name must not end the program."""
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


def command_line(words: list[str]) -> str:
    """For people to copy, quoted as their shell wants it."""
    return printable(subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words))


def shorten(text: str, width: int = 100) -> str:
    """`text` cut to a line's length."""
    return text if len(text) <= width else f"{text[: width - 4]} ..."


# --- device -------------------------------------------------------------------------------------------------------


def select_device(name: str, dist: Distributed | None = None) -> torch.device:
    """`cuda`, `cuda:1`, `1`, `mps` or `cpu` -> the device; the CPU, with a line that says so, where there is none.

    Args:
        dist: each of several ranks on a machine takes the GPU with the number of its local rank.

    Raises:
        UsageError: no such kind of device, or fewer of them than that.
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
    """For people: the GPU's name, or the CPU's threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def describe_processes(dist: Distributed) -> str:
    """Return ", N processes" for a status line, or "" for a single process."""
    return f", {dist.world_size} processes" if dist.world_size > 1 else ""


def select_precision(amp: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """The number format of mixed precision, None for float32 throughout; and for people: which, and why.

    Args:
        amp: "auto": where the device computes in bfloat16 or float16 itself; "on": also where it is emulated; "off".
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
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux; less than the machine has in a container or under taskset
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int:
    """The bytes of memory that a program can still take; 0 where nothing tells."""
    available = []
    with contextlib.suppress(OSError):
        for kib in re.findall(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.M):
            available.append(1024 * int(kib))
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:  # of addresses
            available.append(limit - resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0]))
    for limit, used, cached in [  # a container's, by version 2 and 1 of control groups
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ]:
        group = Path("/sys/fs/cgroup")
        with contextlib.suppress(OSError):
            limited, taken = (group / limit).read_text().strip(), int((group / used).read_text())
            statistics = (group / limit).with_name("memory.stat").read_text()
            given_back = int(re.search(rf"^{cached} (\d+)$", statistics, re.M)[1])  # copies of files, at need
            if limited != "max":
                available.append(int(limited) - taken + given_back)
    return max(0, min(available, default=0))


def peak_memory(device: torch.device) -> float | None:
    """The most memory so far, in GiB: of the GPU by tensors, else of this process (not its workers); None: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# --- workers, and what they and the machine may lack --------------------------------------------------------------


def leave_with_the_run(worker: int) -> None:
    """For a DataLoader's `worker_init_fn`: a worker leaves signals to the run, and ends with it or at its word."""
    signal.set_wakeup_fd(-1)  # it would wake the run
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A batch that finds no shared memory would be dropped, and waited for without end.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda error, batch: os._exit(1))

    def leave(told: Callable[[], None]) -> None:
        told()
        os._exit(0)

    def run_has_ended() -> None:
        connection.wait([parent_process().sentinel])

    def run_says_so() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent_process().pid:
            pass  # a signal to the whole group, for example: the run needs its workers until it has saved

    ways = [run_has_ended]
    if hasattr(signal, "sigwaitinfo"):  # not on Windows and macOS, where SIGTERM ends a worker whoever sends it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        ways.append(run_says_so)
    for told in ways:
        threading.Thread(target=leave, args=[told], daemon=True).start()


def is_out_of_memory(error: Exception) -> bool:
    """Whether the memory of a GPU, or of the machine, did not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU's allocator, CUDA and MPS, cuBLAS and cuDNN each have their own words for it, in a RuntimeError.
    said = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return any(words in str(error) for words in said) and not is_dead_worker(error)


def is_dead_worker(error: Exception) -> bool:
    """Whether a DataLoader's worker has died, by a signal for example, perhaps while it was handing over a batch."""
    said = ("DataLoader worker (pid", "received 0 items of ancdata", "got end of file during message")
    return isinstance(error, (ConnectionError, EOFError)) or str(error).startswith(said)


def what_is_lacking(error: Exception, with_little_memory: str, without_workers: str) -> str | None:
    """For people: what the machine lacks, where that is the reason of an error, and what to do about it.

    For programs that end with it: torch would report a dead worker again, anywhere, as each of the others ends.
    """
    if is_out_of_memory(error):
        return f"out of memory: {with_little_memory}"
    if is_dead_worker(error):
        if hasattr(signal, "SIGCHLD"):  # not on Windows, where torch has no such handler
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        why = f"too little memory or /dev/shm ({without_workers}), or a damaged image"
        return f"a process that reads images died: {why}"
    return None


def settle_output() -> None:
    """Write what is left of standard output, or drop it where nobody takes it: Python would complain as it exits."""
    try:
        print(end="", flush=True)  # does nothing where there is no output at all
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- files --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Another name to write a file under, which gets its own when it is finished: it is whole at any instant.

    A link stays one, to the new file; what is no file, as a pipe, is written to as it is.
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
    """Write a JSON file that is whole at any instant."""
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(content), encoding="utf-8")


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path, columns: Sequence[str] = ()) -> None:
    """Write a CSV file that is whole at any instant: these columns, and then those of other keys of the rows.

    What cannot be UTF-8, as in the name of a file, is written as an escape.
    """
    columns = list(dict.fromkeys([*columns, *(key for row in rows for key in row)]))
    with (
        whole_file(path) as unfinished,
        open(unfinished, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; empty where there is no such file, or a damaged one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
