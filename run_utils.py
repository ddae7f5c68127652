"""A run: its command line, device, folder and checkpoints."""

import argparse
import contextlib
import importlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import torch


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
        self.exit(2, f"{self.prog}: error: {message} (--help explains the flags)\n")


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


# --- device -------------------------------------------------------------------------------------------------------


def select_device(name: str) -> torch.device:
    """`cuda`, `cuda:1`, `1`, `mps` or `cpu` -> the device; the CPU, with a line that says so, where there is none.

    Raises:
        UsageError: no such kind of device, or fewer of them than that.
    """
    match = re.fullmatch(r"(?:(cuda):)?(\d+)|cuda|mps|cpu", name)
    if match is None:
        raise UsageError(f"--device {name}: choose cuda, cuda:1 (or just 1), mps or cpu")
    index = int(match[2] or 0)
    if name == "cpu":
        return torch.device("cpu")
    available = torch.backends.mps.is_available() if name == "mps" else torch.cuda.is_available()
    if not available:
        print(f"no {'MPS' if name == 'mps' else 'CUDA'} device is available: using the CPU", file=sys.stderr)
        return torch.device("cpu")
    if name == "mps":
        return torch.device("mps")
    if index >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return torch.device("cuda", index)


def describe_device(device: torch.device) -> str:
    """For people: the GPU's name, or the CPU's threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


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
    """The bytes of memory that a program can still take and share among its processes; 0 where nothing tells."""
    available = []
    with contextlib.suppress(OSError):
        available.append(1024 * int(re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[1]))
        available.append(shutil.disk_usage("/dev/shm").free)  # shared memory lives there, and may be limited
        limit, used = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.max", "memory.current"))
        if limit.strip() != "max":  # a container's
            available.append(int(limit) - int(used))
    return max(0, min(available, default=0))


# --- folder and checkpoints ---------------------------------------------------------------------------------------


def create_run_folder(name: str, root: str | os.PathLike = "runs") -> Path:
    """Make `root`/`name`, or the first of name-2, name-3, ... that is not there yet, with a folder `weights` in it."""
    Path(root).mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = Path(root, name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()  # at most one process succeeds
        except FileExistsError:
            continue
        (folder / "weights").mkdir()
        return folder


def newest_weights(root: str | os.PathLike = "runs") -> Path:
    """The weights/best.pth under `root` that was written last.

    Raises:
        UsageError: there is none.
    """
    found = list(Path(root).glob("*/weights/best.pth"))
    if not found:
        raise UsageError(f"no weights given, and no run in {root} has a best.pth: train first, or give --weights PATH")
    return max(found, key=lambda path: path.stat().st_mtime)


def write_args(args: argparse.Namespace, path: str | os.PathLike) -> None:
    """Write every flag's value, and the versions that the run uses, as JSON."""
    packages = ("torch", "torchvision", "tensorboard", "PIL", "matplotlib", "numpy", "tqdm")
    versions = {package: importlib.import_module(package).__version__ for package in packages}
    content = {"flags": vars(args), "versions": {"python": platform.python_version()} | versions}
    Path(path).write_text(json.dumps(content, indent=4), encoding="utf-8")


def save_checkpoint(content: dict[str, Any], path: str | os.PathLike) -> None:
    """`torch.save` under a temporary name, then a rename: a file of that name is always whole."""
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        torch.save(content, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
