"""Worker threads for Python tasks that read and write files: the one place of the package that starts Python threads.

The calling thread only waits, for a bounded time at a time, so that an interrupt always reaches it. Whatever the tasks
import or compile is to be imported and compiled before they start: a worker that waits for the lock of an import
cannot be stopped. This module knows nothing of tensors and files.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final, NamedTuple, TypeVar

from ..backends.threads import check_num_threads, default_num_threads, starting_threads, usable_cpus

POLL_SECONDS: Final = 0.2
"""The longest single wait: on some systems a wait without a timeout cannot be interrupted."""

PATIENCE_SECONDS: Final = 2.0
"""How long an interrupted call waits for its workers to stop."""

Task = TypeVar("Task")
Result = TypeVar("Result")


class Progress(NamedTuple):
    """How far the work has come."""

    shard: str
    """Name of the file."""
    tensor: str
    done: int
    """Bytes that are done, of all files."""
    total: int


class _StoppedError(Exception):
    """Ends a task because another one failed."""


class Workers:
    """Threads that add up the bytes they have ``done`` out of ``total``, and stop together at the first error.

    Their ``number`` is by default that of decoding, and never above that of CPUs unless the environment variable says
    so. ``progress`` is called by one thread at a time, and never again once it has raised.
    """

    def __init__(self, number: int | None, total: int, progress: Callable[[Progress], object]) -> None:
        check_num_threads(number)
        self.done, self._total, self._progress = 0, total, progress
        most = default_num_threads()
        self._number = min(number or most, max(most, usable_cpus()))
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def advance(self, shard: str, tensor: str, nbytes: int) -> None:
        """Report that ``nbytes`` more are done, or end the task if another one failed. Tasks call it often."""
        with self._lock:
            if self._error is not None:
                raise _StoppedError
            self.done += nbytes
            try:
                self._progress(Progress(shard, tensor, self.done, self._total))
            except BaseException as error:
                self._error = error
                raise

    def map(
        self,
        work: Callable[[Task], Result],
        tasks: Sequence[Task],
        nbytes: Callable[[Task], int] | None = None,  # noqa: ARG002
    ) -> list[Result]:
        """Call ``work`` with each task, and return the results in the order of the tasks.

        ``nbytes``, the sizes of tasks, matters to `RayWorkers` only.

        Raises
        ------
        BaseException
            What the first task that failed raised, once no task runs any more. An interrupt of the calling thread is
            raised after `PATIENCE_SECONDS` at most, a second one at once; tasks then still end at their next `advance`.
        """
        numbers = iter(range(len(tasks)))
        results: dict[int, Result] = {}

        def claim() -> int | None:
            with self._lock:
                return None if self._error is not None else next(numbers, None)

        def run() -> None:
            try:
                while (number := claim()) is not None:
                    results[number] = work(tasks[number])
            except BaseException as error:
                self._error = self._error or error
                raise

        threads = min(self._number, len(tasks))
        executor = ThreadPoolExecutor(max(threads, 1), "mxfp4np-rewrite")
        futures: list[Future[None]] = []
        try:
            if threads > 1:
                with (
                    contextlib.suppress(RuntimeError),
                    starting_threads(),
                ):  # the interpreter is shutting down, or no thread can start
                    for _ in range(threads):
                        futures.append(executor.submit(run))  # noqa: PERF401 - so that an interrupt loses none
            if not futures:
                run()
            while wait(futures, timeout=POLL_SECONDS).not_done:
                pass
            executor.shutdown()
        except BaseException as error:
            self._error = self._error or error
            wait(futures, timeout=PATIENCE_SECONDS)
            raise
        finally:
            # Also wakes a thread that an interrupted `submit` started without registering it.
            executor.shutdown(wait=False)
        if self._error is not None:
            raise self._error
        return [results[number] for number in range(len(tasks))]
