"""Write files in a background thread while training continues."""

import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

SWITCH_INTERVAL = 0.0005  # seconds; Python's default is ten times as long


class BackgroundWriter:
    """Runs functions in a background thread, in the order in which they are submitted.

    After an exception, the functions that follow are skipped until `wait` has re-raised it. At the end of a `with`
    statement, all functions have finished.

    Attributes:
        seconds: the total duration of the functions that have finished.
    """

    def __init__(self) -> None:
        # The training thread needs the GIL back after each operation of a step.
        sys.setswitchinterval(SWITCH_INTERVAL)
        self._executor = ThreadPoolExecutor(max_workers=1)
        self._error: BaseException | None = None
        self.seconds = 0.0

    def submit(self, function: Callable[..., None], *arguments: object) -> Future:
        """Queue a function. If an earlier one has failed, re-raise its exception instead.

        Returns:
            A future that is done once the function has finished. Its `result` never raises.
        """
        if self._error is not None:
            raise self._error
        return self._executor.submit(self._run, function, *arguments)

    def wait(self) -> None:
        """Wait until all functions have finished. Re-raises their exception."""
        self._executor.submit(lambda: None).result()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, function: Callable[..., None], *arguments: object) -> None:
        if self._error is not None:
            return
        start = time.perf_counter()
        try:
            function(*arguments)
        except BaseException as error:  # noqa: BLE001 - re-raised in the other thread
            self._error = error
        self.seconds += time.perf_counter() - start

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._executor.shutdown()
        if kind is None and self._error is not None:
            raise self._error
