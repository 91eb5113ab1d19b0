"""Run a plan: its tasks in worker threads, then the index; and say what was done.

It knows nothing of what the items of a plan are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..text import count, escape, format_bytes
from .plan import Plan, Task
from .workers import Progress, Workers


@dataclass(frozen=True)
class Run:
    """What the run of a plan did, or is going to do."""

    folder: Path
    shards: Mapping[str, int]
    """Bytes of tensor data by file."""
    written: int
    """Bytes of tensor data that this run wrote."""
    seconds: float
    missing: list[str]
    """Shards that other tasks have yet to write."""
    reports: Mapping[str, Any]
    """What the items that this run wrote reported, by tensor."""

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in all shards."""
        return sum(self.shards.values())

    @property
    def complete(self) -> bool:
        """Whether all shards are there."""
        return not self.missing

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {
            "folder": str(self.folder),
            "bytes": self.nbytes,
            "shards": dict(self.shards),
            "written": self.written,
            "seconds": self.seconds,
            "complete": self.complete,
        }

    def plan_lines(self) -> Iterator[str]:
        """Yield what is going to be written, for a person."""
        for file, nbytes in self.shards.items():
            yield f"{file}  {format_bytes(nbytes)}"
        shards = count(len(self.shards), "shard")
        yield f"{shards}, {format_bytes(self.nbytes)} of tensor data, to {escape(str(self.folder))}"

    def warnings(self) -> Iterator[str]:
        """Yield what a person should know even if nothing else is shown."""
        yield from ()

    def lines(self) -> Iterator[str]:
        """Yield a report for a person."""
        rate = f" in {self.seconds:.1f} s ({format_bytes(self.written / self.seconds)}/s)" if self.written else ""
        done = "all there" if self.complete else f"{len(self.missing):,} of them still to be written"
        yield (
            f"wrote {format_bytes(self.written)}{rate} to {escape(str(self.folder))}: "
            f"{count(len(self.shards), 'shard')}, {format_bytes(self.nbytes)}, {done}"
        )


def run_plan(
    plan: Plan,
    part: tuple[int, int] | None = None,
    workers: int | None = None,
    progress: Callable[[Progress], object] = lambda _: None,
    *,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Run:
    """Write all shards, or those of one part; and the index, if all shards are there.

    With a part, other processes may be writing other parts, or the same. See `Plan.tasks`, `Plan.prepare` and
    `run_tasks` for the arguments; ``dry_run`` writes nothing.
    """
    tasks, shared = plan.tasks(part), part is not None
    if shared and force:
        raise ValueError("tasks share a folder: remove it, or give --force to a run without --task")
    plan.refuse_source()
    written, missing, begin = 0, [shard.file for shard in plan.shards], time.perf_counter()
    reports: dict[str, Any] = {}
    if not dry_run:
        tasks = plan.prepare(tasks, resume=resume or shared, force=force, shared=shared)
        written = sum(task.shard.nbytes for task in tasks)
        if tasks and plan.warm_up is not None:
            plan.warm_up()
        reports = run_tasks(tasks, workers, progress)
        missing = plan.finish()
    shards = {shard.file: shard.nbytes for shard in plan.shards}
    return Run(plan.folder, shards, written, time.perf_counter() - begin, missing, reports)


def run_tasks(
    tasks: Sequence[Task],
    workers: int | None = None,
    progress: Callable[[Progress], object] = lambda _: None,
) -> dict[str, Any]:
    """Run tasks in several threads, each of which writes a shard at a time; return what all `Task.run` return."""
    tasks = [task for task in tasks if not task.is_done()]
    pool = Workers(workers, sum(task.shard.nbytes for task in tasks), progress)
    reports: dict[str, Any] = {}
    for found in pool.map(lambda task: task.run(partial(pool.advance, task.shard.file)), tasks):
        reports.update(found)
    return reports
