"""A cache of decoded images that DataLoader workers and ranks share."""

import functools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor


class ImageCache:
    """Decoded images, uint8 (3, H, W), in memory that is shared with forked processes such as DataLoader workers.

    Args:
        num_images: the number of images, which are addressed by index.
        num_bytes: the capacity. Memory is allocated as the cache fills.
        shared_memory: maps the given number of bytes, shared by several processes. Each process writes to its own part
            and reads all parts.
        rank: the number of this process, from 0.
        world_size: the number of processes.
    """

    def __init__(
        self,
        num_images: int,
        num_bytes: int,
        shared_memory: Callable[[int], mmap.mmap] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        # torch's shared tensors would allocate everything at once.
        memory = (shared_memory or functools.partial(mmap.mmap, -1))(24 * num_images + num_bytes)
        places = torch.frombuffer(memory, dtype=torch.int64, count=3 * num_images)
        self._places = places.view(num_images, 3)  # start, height, width
        self._pixels = torch.frombuffer(memory, dtype=torch.uint8, offset=24 * num_images)
        self._used = torch.multiprocessing.get_context().Value("q", num_bytes * rank // world_size)
        self._end = num_bytes * (rank + 1) // world_size

    def get(self, index: int) -> Tensor | None:
        """Return an image, or None if it is not in the cache."""
        start, height, width = self._places[index].tolist()
        if width == 0:
            return None
        return self._pixels[start : start + 3 * height * width].view(height, width, 3).permute(2, 0, 1)

    def put(self, index: int, image: Tensor) -> None:
        """Store an image if there is still room for it."""
        pixels = image.permute(1, 2, 0).flatten()
        with self._used.get_lock():
            start = self._used.value
            if start + len(pixels) > self._end:
                return
            self._used.value += len(pixels)
        self._pixels[start : start + len(pixels)] = pixels
        self._places[index] = torch.tensor([start, *image.shape[1:]])
