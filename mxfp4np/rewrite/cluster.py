"""Tasks on a Ray cluster: the same interface as `Workers`, with processes on many machines in place of threads.

What the tasks share is put into Ray's store once, and unpacked once by each process. A task whose process is killed is
repeated elsewhere. This module knows nothing of tensors and files; Ray is imported when it is needed.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal

from ..backends.threads import check_num_threads
from ..errors import BackendUnavailableError, MXFP4Error
from .workers import PATIENCE_SECONDS, POLL_SECONDS, Progress, Result, Task, Workers

Engine = Literal["threads", "ray"]

ENGINES: Final = ("threads", "ray")
"""What runs tasks: threads of this process, or processes of a Ray cluster."""

RETRIES: Final = 5
"""How often a task is repeated whose process or machine was lost."""

GROUP_BYTES: Final = 256 << 20
"""Small tasks that are alike are sent together, up to this size."""

MOST_TASKS: Final = 1000
"""Sent at a time: Ray looks at all of them when one is done."""


@contextlib.contextmanager
def running(engine: Engine) -> Iterator[None]:
    """Connect to Ray if that is the engine and nobody has yet, and disconnect afterwards.

    It is the cluster that ``RAY_ADDRESS`` names, or one that runs on this machine, or else one that is started here.

    Raises
    ------
    ValueError
        If there is no such engine.
    BackendUnavailableError
        If Ray is not installed.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be {' or '.join(map(repr, ENGINES))}, found {engine!r}")
    if engine == "threads" or (ray := working_ray()).is_initialized():
        yield
        return
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        if main and handler is not None:  # Ray has set its own, which ends the process
            signal.signal(signal.SIGTERM, handler)
        yield
    finally:
        ray.shutdown()


def working_ray() -> Any:
    """Return Ray.

    Raises
    ------
    BackendUnavailableError
        If it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise BackendUnavailableError(
            "engine 'ray' needs Ray: python -m pip install 'mxfp4np[ray]'; without it, threads work, and --task in job "
            "arrays"
        ) from error
    return ray


def pool_of(
    engine: Engine, number: int | None, total: int, progress: Callable[[Progress], object]
) -> Workers | RayWorkers:
    """Return what runs tasks; see `Workers`."""
    return (RayWorkers if engine == "ray" else Workers)(number, total, progress)


class RayWorkers:
    """As `Workers`, with a connection to Ray: at most ``number`` tasks at a time, by default all that it has CPUs for.

    ``progress`` is called when a task is done, with the last of what it reported.
    """

    def __init__(self, number: int | None, total: int, progress: Callable[[Progress], object]) -> None:
        check_num_threads(number)
        self.done, self._total, self._progress = 0, total, progress
        self._number = min(number or MOST_TASKS, MOST_TASKS)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Counter, ()

    def advance(self, shard: str, tensor: str, nbytes: int) -> None:
        """Report that ``nbytes`` more are done: of a task, which has a `_Counter` instead of this object."""
        raise NotImplementedError

    def map(
        self, work: Callable[[Task], Result], tasks: Sequence[Task], nbytes: Callable[[Task], int] | None = None
    ) -> list[Result]:
        """Call ``work`` with each task in other processes, and return the results in the order of the tasks.

        ``work`` and what it refers to are pickled. With ``nbytes``, the sizes of tasks, small ones are sent together.

        Raises
        ------
        MXFP4Error
            If a task was lost too often.
        BaseException
            What the first task that failed raised. The others are cancelled then, and by an interrupt.
        """
        ray = working_ray()
        shared = ray.put(ray.cloudpickle.dumps((work, list(tasks), self)))
        run = ray.remote(_run).options(num_cpus=1, max_retries=RETRIES, scheduling_strategy="SPREAD")
        left = iter(_groups(tasks, nbytes))
        pending: dict[Any, range] = {}
        results: dict[int, Result] = {}
        try:
            while True:
                while len(pending) < self._number and (group := next(left, None)) is not None:
                    pending[run.remote([shared], group)] = group
                if not pending:
                    break
                for reference in ray.wait(list(pending), timeout=POLL_SECONDS)[0]:
                    found, done, (shard, tensor) = ray.get(reference)
                    results.update(zip(pending.pop(reference), found, strict=True))
                    self.done += done
                    if done:
                        self._progress(Progress(shard, tensor, self.done, self._total))
        except BaseException as error:
            for reference in pending:
                ray.cancel(reference)
            if pending:
                ray.wait(list(pending), num_returns=len(pending), timeout=PATIENCE_SECONDS)
            if isinstance(error, ray.exceptions.RayTaskError):
                raise error.cause from None
            if isinstance(error, ray.exceptions.RayError):
                reason = str(error).strip().partition("\n")[0]
                raise MXFP4Error(
                    f"Ray lost a task {RETRIES + 1} times ({type(error).__name__}: {reason}): continue with --resume"
                ) from error
            raise
        return [results[number] for number in range(len(tasks))]


class _Counter:
    """What a `RayWorkers` is in another process: it adds up what tasks report."""

    def __init__(self) -> None:
        self.done, self.place = 0, ("", "")

    def advance(self, shard: str, tensor: str, nbytes: int) -> None:
        self.done += nbytes
        self.place = shard, tensor


def _groups(tasks: Sequence[Task], nbytes: Callable[[Task], int] | None) -> Iterator[range]:
    """Yield the numbers of tasks that are sent together."""
    begin, size = 0, 0
    for number, task in enumerate(tasks):
        size += GROUP_BYTES if nbytes is None else nbytes(task)
        if size >= GROUP_BYTES or number == len(tasks) - 1:
            yield range(begin, number + 1)
            begin, size = number + 1, 0


def _run(shared: list[Any], numbers: range) -> tuple[list[Any], int, tuple[str, str]]:
    """Run some tasks; return their results, the bytes that are done, and the last of what was reported."""
    work, tasks, counter = _unpacked(shared[0])
    counter.done = 0
    return [work(tasks[number]) for number in numbers], counter.done, counter.place


@functools.lru_cache(maxsize=1)
def _unpacked(reference: Any) -> tuple[Callable[[Any], Any], list[Any], _Counter]:
    # Not by Ray, which makes errors of its own of those that opening a checkpoint raises.
    found: tuple[Callable[[Any], Any], list[Any], _Counter] = pickle.loads(working_ray().get(reference))  # noqa: S301
    return found
