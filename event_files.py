"""The event files that a run writes for TensorBoard: their sizes, truncation and write errors."""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path


def event_sizes(run: Path) -> dict[str, int]:
    """Sync a run's event files to disk, and return their sizes in bytes by file name."""
    sizes = {}
    for path in run.glob("events.out.tfevents.*"):
        with open(path, "r+b") as file:  # Windows cannot sync a file opened read-only
            os.fsync(file.fileno())
            sizes[path.name] = os.fstat(file.fileno()).st_size
    return sizes


def truncate_event_files(run: Path, sizes: dict[str, int]) -> None:
    """Truncate a run's event files to the `sizes` from `event_sizes`; remove those that were missing or empty."""
    for path in run.glob("events.out.tfevents.*"):
        size = sizes.get(path.name, 0)
        if size == 0:
            path.unlink()
        elif path.stat().st_size > size:
            os.truncate(path, size)


@contextlib.contextmanager
def event_errors(run: Path) -> Iterator[None]:
    """Raise an OSError that names the run's folder if writing its event files fails.

    Silences OSErrors in threads: the event writer's thread also raises its error in the main thread.
    """

    def report(failure: threading.ExceptHookArgs) -> None:
        if not issubclass(failure.exc_type, OSError):
            before(failure)

    before, threading.excepthook = threading.excepthook, report
    try:
        yield
    except ConnectionError:  # the output is closed, or a worker has ended
        raise
    except OSError as error:
        is_complete = error.strerror is None  # the message already names its file
        if is_complete or error.errno in (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE):
            raise
        raise OSError(f"cannot write to {run}: {error.strerror}") from error
    finally:
        threading.excepthook = before
