"""A cache of decoded images that DataLoader workers and ranks share."""

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import reduction
from typing import Any, BinaryIO

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HAS_CACHE = fcntl is not None  # it needs the file locks and descriptors of POSIX


def memory_file() -> BinaryIO:
    """Create a file in memory (on Linux; on macOS a temporary file), which exists for as long as it is open."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("images"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


class ImageCache:
    """Decoded images, uint8 (3, H, W), in a file that other processes can also map, see `memory_file`.

    Forked processes share it. A spawned process, such as a DataLoader worker on macOS, receives it by pickling.

    Args:
        num_images: the number of images, which are addressed by index.
        num_bytes: the capacity. Memory is allocated as the cache fills.
        file: the file, possibly that of another process with the same arguments; None for a new one.
    """

    def __init__(self, num_images: int, num_bytes: int, file: BinaryIO | None = None) -> None:
        self.num_images, self.num_bytes, self.file = num_images, num_bytes, file or memory_file()
        pixels = 8 + 24 * num_images  # the offset of the pixels
        self.file.truncate(pixels + num_bytes)
        memory = mmap.mmap(self.file.fileno(), pixels + num_bytes)
        self._used = torch.frombuffer(memory, dtype=torch.int64, count=1)
        places = torch.frombuffer(memory, dtype=torch.int64, offset=8, count=3 * num_images)
        self._places = places.view(num_images, 3)  # start, height, width
        self._pixels = torch.frombuffer(memory, dtype=torch.uint8, offset=pixels)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_cache, (self.num_images, self.num_bytes, reduction.DupFd(self.file.fileno()))

    def get(self, index: int) -> Tensor | None:
        """Return an image, or None if it is not in the cache."""
        start, height, width = self._places[index].tolist()
        if width == 0:
            return None
        return self._pixels[start : start + 3 * height * width].view(height, width, 3).permute(2, 0, 1)

    def put(self, index: int, image: Tensor) -> None:
        """Store an image if there is still room for it."""
        pixels = image.permute(1, 2, 0).flatten()
        with self._lock():
            start = int(self._used)
            if start + len(pixels) > self.num_bytes:
                return
            self._used += len(pixels)
        self._pixels[start : start + len(pixels)] = pixels
        self._places[index] = torch.tensor([start, *image.shape[1:]])

    @contextmanager
    def _lock(self) -> Iterator[None]:
        fcntl.lockf(self.file, fcntl.LOCK_EX)  # excludes other processes
        try:
            yield
        finally:
            fcntl.lockf(self.file, fcntl.LOCK_UN)


def _open_cache(num_images: int, num_bytes: int, file: Any) -> ImageCache:
    return ImageCache(num_images, num_bytes, os.fdopen(file.detach(), "r+b", buffering=0))
