"""Shared utilities: argument parsing, error messages, device and precision, DataLoader workers, and files."""

import argparse
import contextlib
import itertools
import multiprocessing.queues
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, parent_process
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from distributed import Distributed, OtherRankFailed, is_connection_lost

try:
    import resource
except ImportError:  # Windows
    resource = None


T = TypeVar("T")

MANY_FILES = 100  # above this, `map_files` uses workers, which take a while to start
FIGURE_FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg")


class UsageError(ValueError):
    """Invalid input, such as an unsupported value of a flag. The message is one line: what is wrong, and what to do."""


class DataError(UsageError):
    """Invalid data: a folder of images, or a file that describes one."""


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that accepts both --some-flag and --some_flag, and reports errors in one line.

    Abbreviations of flags are errors: `--save` could mean another flag in the next version.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **options)

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> Any:
        """Parse arguments after replacing underscores in the names of flags by hyphens."""
        args = sys.argv[1:] if args is None else args
        hyphenated = [re.sub(r"^--\w[\w-]*", lambda flag: flag[0].replace("_", "-"), arg) for arg in args]
        return super().parse_args(hyphenated, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line, without argparse's usage message."""
        line = f"{self.prog}: error: {printable(message)} (see --help)\n"
        self.exit(2, line if Distributed().is_main else None)


def parse_bool(text: str) -> bool:
    """Parse the value of a flag such as `--freeze-layers False`, because `bool("False")` is True."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return values[text.lower()]


def checked(kind: type, is_valid: Callable[[Any], bool], requirement: str) -> Callable[[str], Any]:
    """Return a `type=` function for argparse that converts to `kind` and checks the value."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text!r} is invalid; it must be {requirement}")
        return value

    parse.__name__ = kind.__name__  # argparse's message: "invalid int value"
    return parse


def printable(text: str) -> str:
    """Escape control characters and other unprintable ones, such as those in file names, to print on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def print_note(note: str) -> None:
    """Print a line to standard error, apart from the results on standard output."""
    if sys.stderr is not None:  # if it is closed, `print` would use standard output
        print(printable(note), file=sys.stderr, flush=True)


def escape_unprintable_output() -> None:
    """Make standard output and standard error escape characters that they cannot encode."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def silence_other_ranks(dist: Distributed) -> Iterator[None]:
    """Discard the standard output of all ranks but the main process."""
    with contextlib.ExitStack() as stack:
        if not dist.is_main:
            null = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(null))
        yield


def quote_command(words: list[str]) -> str:
    """Quote a command for the user's shell."""
    return printable(subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words))


def shorten(text: str, width: int = 100) -> str:
    """Truncate `text` to `width` characters."""
    return text if len(text) <= width else f"{text[: width - 4]} ..."


# --- programs and their errors ------------------------------------------------------------------------------------


def run_program(
    name: str,
    program: Callable[[], int],
    *,
    memory_advice: str,
    worker_advice: str,
    error_status: int = 1,
) -> int:
    """Run a program and report expected errors in one line on standard error. Unexpected errors propagate.

    Args:
        program: returns an exit status.
        memory_advice: what to do when memory runs out.
        worker_advice: what to do when a DataLoader worker has died.
        error_status: the exit status after an expected error.

    Returns:
        The exit status of `program`; or `error_status`, or 130 after Ctrl-C.
    """

    def report(message: str) -> None:
        with contextlib.suppress(OSError):  # standard error is closed
            print(f"{name}: {message}", file=sys.stderr, flush=True)

    escape_unprintable_output()
    try:
        status = program()
        print(end="", flush=True)  # raises OSError if the output cannot be written
        return status
    except (BrokenPipeError, OtherRankFailed):  # `predict.py folder | head`; the other rank reports its error
        return error_status
    except KeyboardInterrupt:
        if Distributed().is_main:
            report("interrupted")
        return 130
    except Exception as error:
        message = _explain_error(error, memory_advice, worker_advice)
        if message is None:
            raise
        report(f"error: {message}")
        return error_status
    finally:
        flush_stdout()


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit, so that temporary files are removed."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _explain_error(error: Exception, memory_advice: str, worker_advice: str) -> str | None:
    """Return a one-line message for an expected error, None for any other."""
    if isinstance(error, (MemoryError, RuntimeError, ConnectionError, EOFError)):
        dist = Distributed()
        if dist.is_launched and is_connection_lost(error):
            lost = f"rank {dist.rank} has lost the connection to the other ranks, which have ended or are unreachable"
            reason = printable(str(error).partition("\n")[0])
            return f"{lost}: {reason}"
        return explain_resource_error(error, memory_advice, worker_advice)
    return printable(str(error)) if isinstance(error, (UsageError, OSError, FloatingPointError)) else None


def explain_resource_error(error: Exception, memory_advice: str, worker_advice: str) -> str | None:
    """Return a message for an error caused by too little memory or a dead worker, None for any other error.

    Disables torch's handler for dead workers, which would report each one again; the program must then exit.
    """
    if is_out_of_memory(error):
        return f"out of memory: {memory_advice}"
    if is_dead_worker(error):
        if hasattr(signal, "SIGCHLD"):  # not on Windows, where torch has no such handler
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return f"a DataLoader worker died: too little memory or space in /dev/shm ({worker_advice}), or a corrupt image"
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that the GPU or the machine is out of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU's allocator, CUDA, MPS, cuBLAS and cuDNN raise RuntimeErrors with different messages.
    messages = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return any(message in str(error) for message in messages) and not is_dead_worker(error)


def is_dead_worker(error: Exception) -> bool:
    """Return whether an error means that a DataLoader worker, or the thread that pins its batches, has died."""
    messages = ("DataLoader worker (pid", "Pin memory thread exited")
    messages += ("received 0 items of ancdata", "got end of file during message")
    return isinstance(error, (ConnectionError, EOFError)) or str(error).startswith(messages)


def flush_stdout() -> None:
    """Flush standard output, and discard what cannot be written; otherwise Python would print an error at exit."""
    try:
        print(end="", flush=True)  # does nothing if there is no standard output
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- device -------------------------------------------------------------------------------------------------------


def select_device(name: str, dist: Distributed | None = None) -> torch.device:
    """Return the device named `cuda`, `cuda:1`, `1`, `mps` or `cpu`; if it is unavailable, the CPU, with a message.

    If several ranks of `dist` run on this machine, each takes the GPU of its local rank.

    Raises:
        UsageError: the name is invalid, or there is no GPU with that index.
    """
    match = re.fullmatch(r"(?:(cuda):)?(\d+)|cuda|mps|cpu", name)
    if match is None:
        raise UsageError(f"--device {name}: choose cuda, cuda:1 (or just 1), mps or cpu")
    index = int(match[2] or 0)
    if dist is not None and dist.local_world_size > 1 and name != "cpu":
        if name != "cuda":
            raise UsageError(f"--device {name}: with several processes per machine, choose cuda or cpu")
        index = dist.local_rank
        if "LOCAL_WORLD_SIZE" not in os.environ and torch.cuda.device_count() == 1:
            index = 0  # each process sees its own GPU: `srun --gpus-per-task=1`
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
        raise UsageError(f"{where}: only {torch.cuda.device_count()} CUDA devices are available, counted from 0")
    return torch.device("cuda", index)


def describe_device(device: torch.device) -> str:
    """Describe a device by the GPU's name or the number of CPU threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def describe_processes(dist: Distributed) -> str:
    """Return ", N processes" for a status line, or "" for a single process."""
    return f", {dist.world_size} processes" if dist.world_size > 1 else ""


def select_precision(amp: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """Choose the dtype of mixed precision.

    Args:
        amp: "auto" (use it if the device supports it natively), "on" (even if it is emulated) or "off".

    Returns:
        The dtype (None for float32), and a description of the choice.
    """
    if amp == "off":
        has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        uses_tf32 = has_tf32 and torch.backends.cudnn.allow_tf32  # PyTorch's default
        return None, f"float32 (--amp off{'; convolutions in TF32' if uses_tf32 else ''})"
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return torch.bfloat16, "bfloat16 (mixed precision, native on this GPU)"
            if amp == "on" or torch.cuda.get_device_capability() >= (7, 0):  # tensor cores
                return torch.float16, "float16 (mixed precision with loss scaling; this GPU has no bfloat16)"
            return None, "float32 (mixed precision is no faster on this GPU)"
    if device.type == "cpu":
        if _cpu_has_bfloat16():
            return torch.bfloat16, "bfloat16 (mixed precision, native on this CPU)"
        if amp == "on":
            return torch.bfloat16, "bfloat16 (mixed precision, emulated because of --amp on)"
        return None, "float32 (this CPU has no native bfloat16)"
    if amp == "on":
        raise UsageError(f"--amp on: unsupported on {device.type} devices")
    return None, f"float32 (mixed precision is unsupported on {device.type} devices)"


def _cpu_has_bfloat16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # before torch 2.12


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux; respects containers and taskset
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def number_of_workers(workers: int | None, processes: int = 1) -> int:
    """Return `workers`, or by default one per core, at most 16, divided among the `processes` on this machine."""
    return min(max(1, available_cores() // processes), 16) if workers is None else workers


def available_memory() -> int:
    """Return the available memory in bytes, or 0 if it is unknown; on macOS, half of the memory."""
    available = []
    if sys.platform == "darwin":
        available.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    with contextlib.suppress(OSError):
        for kib in re.findall(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.M):
            available.append(1024 * int(kib))
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:  # ulimit -v
            available.append(limit - resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0]))
    for limit, used, cached in [  # of a container: cgroup versions 2 and 1
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
    """Return the peak memory in GiB: of tensors on a GPU, else of this process; None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# --- DataLoader workers -------------------------------------------------------------------------------------------


def worker_init(worker: int) -> None:
    """Make a DataLoader worker ignore signals from the terminal, and exit when the main process does."""
    signal.set_wakeup_fd(-1)  # inherited from the main process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # If there is no shared memory for a batch, exit; otherwise the main process would wait for it forever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda error, batch: os._exit(1))

    def exit_after(wait: Callable[[], None]) -> None:
        wait()
        os._exit(0)

    def main_process_has_ended() -> None:
        connection.wait([parent_process().sentinel])

    def main_process_sends_sigterm() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent_process().pid:
            pass  # sent to the whole process group: the main process needs its workers until it has saved

    conditions = [main_process_has_ended]
    if hasattr(signal, "sigwaitinfo"):  # not on Windows and macOS, where any SIGTERM ends a worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        conditions.append(main_process_sends_sigterm)
    for wait in conditions:
        threading.Thread(target=exit_after, args=[wait], daemon=True).start()


def map_files(
    function: Callable[[Any], T], paths: Sequence[Any], workers: int | None = None, description: str | None = None
) -> Iterator[T]:
    """Apply `function` to each path (or list of paths), in order; to more than `MANY_FILES` in worker processes.

    Args:
        function: must be picklable.
        workers: the number of worker processes (None: one per core, at most 16).
        description: the label of a progress bar on the terminal; None for no bar.
    """
    loader = DataLoader(
        _MappedFiles(function, paths),
        batch_size=8,
        num_workers=number_of_workers(workers) if len(paths) > MANY_FILES else 0,
        collate_fn=list,
        worker_init_fn=worker_init,
        generator=torch.Generator(),  # leaves the global generator alone
    )
    results = itertools.chain.from_iterable(loader)
    disable = None if description else True  # None: if there is no terminal
    yield from tqdm(results, description, len(paths), leave=False, disable=disable, dynamic_ncols=True)


class _MappedFiles(Dataset):
    def __init__(self, function: Callable[[Any], Any], paths: Sequence[Any]) -> None:
        self.function, self.paths = function, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        return self.function(self.paths[index])
