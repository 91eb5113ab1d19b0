"""Write a checkpoint's tensors, changed on the way, into the shards of a new folder.

Headers make a plan, the plan has a task for each shard, and an index comes last. What has its final name is complete
and on disk: a task may be killed and repeated, run in any process and beside all others. What happens to a tensor on
its way is for an `Item` to say; this module knows nothing of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..backends.memory import aligned_empty
from ..backends.threads import default_num_threads, parallel_for
from ..checkpoint import Checkpoint
from ..cli.report import count, escape, format_bytes
from ..errors import CheckpointError
from ..storage.discover import read_json
from ..storage.dtypes import DTYPES, nbytes_of
from ..storage.writer import atomic_file, bytes_of, header_bytes

INDEX: Final = "model.safetensors.index.json"
RECORD: Final = ".mxfp4np.json"
"""Says which plan a folder is written by, so that no other goes on with it."""

METADATA: Final = {"format": "pt"}
"""Of each shard, as transformers wants it."""

MAX_SHARD_SIZE: Final = 5_000_000_000
"""Bytes of a file, unless the caller says otherwise; as huggingface_hub has it."""

_SHARD: Final = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")
_TEMPORARY: Final = re.compile(r"\.(.+)\.\d+-[0-9a-f]{8}\.tmp")


class Output(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str
    """As the safetensors format spells it."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return nbytes_of(self.dtype, self.shape)


class Progress(NamedTuple):
    """How far the writing of shards has come."""

    shard: str
    """Name of the file."""
    tensor: str
    done: int
    """Bytes written, of all shards."""
    total: int


class Scratch:
    """Memory that the pieces of a task pass through, one after the other."""

    def __init__(self) -> None:
        self._memory = aligned_empty((0,), np.dtype(np.uint8))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return an array in the same memory as the last one."""
        size = math.prod(shape) * dtype.itemsize
        if size > self._memory.nbytes:
            self._memory = aligned_empty((size,), np.dtype(np.uint8))
        return self._memory[:size].view(dtype).reshape(shape)


Pieces = Generator[tuple[int, int, NDArray[Any]], None, Any]


class Item(Protocol):
    """A tensor of the source on its way into a shard, as one tensor or several that stay together."""

    @property
    def name(self) -> str:
        """Of the tensor in the source."""

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What becomes of it."""

    def pieces(self, checkpoint: Checkpoint, scratch: Scratch) -> Pieces:
        """Yield which output, from which of its bytes on, and a C-contiguous array; return what is to be reported."""


@dataclass(frozen=True)
class Shard:
    """A file to be written."""

    file: str
    items: tuple[Item, ...]

    @property
    def header(self) -> bytes:
        """The beginning of the file."""
        return header_bytes({name: (dtype, shape) for name, dtype, shape in self._outputs}, METADATA)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(output.nbytes for item in self.items for output in item.outputs)

    @property
    def offsets(self) -> dict[str, int]:
        """Where the data of each output begins, behind the header."""
        found, offset = {}, 0
        for output in self._outputs:
            found[output.name] = offset
            offset += output.nbytes
        return found

    @property
    def _outputs(self) -> list[Output]:
        # Widest elements first, so that every tensor is aligned.
        outputs = (output for item in self.items for output in item.outputs)
        return sorted(outputs, key=lambda output: (-DTYPES[output.dtype][0], output.name))


@dataclass(frozen=True)
class Task:
    """One shard to be written: can be pickled, repeated, and run in any process."""

    folder: Path
    shard: Shard
    source: Checkpoint

    @property
    def path(self) -> Path:
        """The file to be written."""
        return self.folder / self.shard.file

    def is_done(self) -> bool:
        """Tell whether the shard is there, whole."""
        header = self.shard.header
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                return size == len(header) + self.shard.nbytes and file.read(len(header)) == header
        except FileNotFoundError:
            return False

    def run(self, progress: Callable[[str, int], object] = lambda *_: None) -> dict[str, Any]:
        """Write the shard, if it is not there.

        Parameters
        ----------
        progress : callable
            Called with the name of a tensor and the number of bytes written since the last call.

        Returns
        -------
        dict
            What the items report, by their names; of those that report anything.
        """
        reports: dict[str, Any] = {}
        if self.is_done():
            return reports
        scratch, header, offsets = Scratch(), self.shard.header, self.shard.offsets

        def write(file: BinaryIO) -> None:
            file.truncate(len(header) + self.shard.nbytes)
            file.write(header)
            # In the order of the file.
            for item in sorted(self.shard.items, key=lambda item: offsets[item.outputs[0].name]):
                pieces = item.pieces(self.source, scratch)
                while True:
                    try:
                        which, offset, data = next(pieces)
                    except StopIteration as stop:
                        if stop.value:
                            reports[item.name] = stop.value
                        break
                    output = item.outputs[which]
                    file.seek(len(header) + offsets[output.name] + offset)
                    file.write(bytes_of(data))
                    progress(output.name, data.nbytes)

        _create(self.path, write)
        _clear(self.folder, {self.shard.file})
        return reports


def _create(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file that appears when it is complete, unless another process puts the same one there meanwhile."""
    try:
        with atomic_file(path) as file:
            write(file)
    except FileNotFoundError:
        if not path.exists():
            raise


def _put(path: Path, text: bytes) -> None:
    _create(path, lambda file: file.write(text))


def _copy(source: Path, target: Path) -> None:
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as original:
            _create(target, lambda file: shutil.copyfileobj(original, file))


def _clear(folder: Path, files: set[str]) -> None:
    """Remove what killed processes left of these files; whoever is still at work on one will find it there."""
    for parent in {(folder / name).parent for name in files}:
        for path in parent.glob(".*.tmp"):
            match = _TEMPORARY.fullmatch(path.name)
            if match and (parent / match[1]).relative_to(folder).as_posix() in files:
                with contextlib.suppress(OSError):
                    path.unlink()


@dataclass(frozen=True)
class Plan:
    """All that is to be written, known from headers alone.

    Attributes
    ----------
    folder : Path
        The target.
    shards : tuple of Shard
    documents : mapping of str to bytes
        Small files to be written beside the shards.
    copies : mapping of str to Path
        Files to be copied beside them, by their names in the folder.
    about : mapping
        What was asked for, for the record.
    source : Checkpoint
    """

    folder: Path
    shards: tuple[Shard, ...]
    documents: Mapping[str, bytes]
    copies: Mapping[str, Path]
    about: Mapping[str, Any]
    source: Checkpoint

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def index(self) -> bytes | None:
        """The text of the index; one shard has none."""
        if len(self.shards) == 1:
            return None
        weight_map = {
            output.name: shard.file for shard in self.shards for item in shard.items for output in item.outputs
        }
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()

    @cached_property
    def record(self) -> bytes:
        """What tells this plan from others: all it will write, and the state of the files it reads."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(shard.file.encode() + b"\0" + shard.header)
        for name in sorted(self.documents):
            digest.update(name.encode() + b"\0" + self.documents[name])
        found = {name: path.stat() for name, path in self.copies.items()}
        copies = sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found.items())
        digest.update(json.dumps([sorted(self.about.items()), copies, self.source.stamps]).encode())
        return (json.dumps({**self.about, "plan": digest.hexdigest()}, indent=2) + "\n").encode()

    def run(
        self,
        *,
        part: tuple[int, int] | None = None,
        resume: bool = False,
        force: bool = False,
        dry_run: bool = False,
        workers: int | None = None,
        progress: Callable[[Progress], object] = lambda _: None,
    ) -> Run:
        """Write all shards, or those of one part that others do not write; and the index, if it is time.

        Parameters
        ----------
        part : (int, int), optional
            As for `tasks`. Other processes may be at work on other parts, or the same.
        resume, force : bool
            As for `prepare`.
        dry_run : bool
            Write nothing.
        workers, progress
            As for `run_tasks`.
        """
        tasks = self.tasks(part or (1, 1))
        if part is not None and force:
            raise ValueError("tasks share a folder: remove it, or give --force to a run without --task")
        self._refuse_source()
        written, missing, begin = 0, [shard.file for shard in self.shards], time.perf_counter()
        reports: dict[str, Any] = {}
        if not dry_run:
            shared = part is not None
            tasks = self.prepare(tasks, resume=resume or shared, force=force, shared=shared)
            written = sum(task.shard.nbytes for task in tasks)
            reports = run_tasks(tasks, workers, progress)
            missing = self.finish()
        shards = {shard.file: shard.nbytes for shard in self.shards}
        return Run(self.folder, shards, written, time.perf_counter() - begin, missing, reports)

    def tasks(self, part: tuple[int, int] = (1, 1)) -> list[Task]:
        """Return a task for each shard, or every n-th from the i-th on for ``part = (i, n)``, counted from 1."""
        i, n = part
        if not 1 <= i <= n:
            raise ValueError(f"task must be i/n with 1 <= i <= n, found {i}/{n}")
        return [Task(self.folder, shard, self.source) for shard in self.shards[i - 1 :: n]]

    def prepare(self, tasks: Sequence[Task], *, resume: bool, force: bool, shared: bool) -> list[Task]:
        """Make the folder ready for tasks, put everything there that is not a shard, and return what is left to do.

        Parameters
        ----------
        tasks : sequence of Task
            What is going to be run: there must be room on the disk for it.
        resume : bool
            Whether to go on with what an earlier run of the same plan left.
        force : bool
            Whether to do away with an earlier run's files. Others stay, unless they are to be written now; weights of
            others are refused.
        shared : bool
            Whether other processes may be at work in the folder.
        """
        if resume and force:
            raise ValueError("resume goes on and force starts over: give one of them")
        self.folder.mkdir(parents=True, exist_ok=True)
        record = self.folder / RECORD
        # Looked for before the record is: what another process puts here comes after its record.
        others = [path for path in self.folder.iterdir() if not _TEMPORARY.fullmatch(path.name)]
        earlier: list[Path] = []
        if force:
            earlier = self._earlier(others)
        elif record.exists():
            if not resume:
                raise FileExistsError(
                    f"{self.folder}: holds an earlier run: go on with --resume, or start over with --force"
                )
            self._compare(record)
        elif others:
            raise FileExistsError(
                f"{self.folder}: expected a new or empty folder, found {others[0].name!r}: with --force, files of the "
                "same names are replaced"
            )
        if not shared:
            _clear(self.folder, self._names)
        removed = set(earlier)
        left = [task for task in tasks if task.path in removed or not task.is_done()]
        self._check_room(left, earlier)
        for path in earlier:
            path.unlink(missing_ok=True)
        _put(record, self.record)
        for name, text in self.documents.items():
            _put(self.folder / name, text)
        for name, path in self.copies.items():
            _copy(path, self.folder / name)
        return left

    def finish(self) -> list[str]:
        """Write the index if all shards are there, and return the names of those that are not."""
        there = {path.name for path in self.folder.iterdir()}
        missing = [shard.file for shard in self.shards if shard.file not in there]
        if missing:
            return missing
        index = self.index
        if index is not None:
            _put(self.folder / INDEX, index)
        _clear(self.folder, self._names)
        return []

    @property
    def _names(self) -> set[str]:
        return {RECORD, INDEX, *self.documents, *self.copies, *(shard.file for shard in self.shards)}

    def _refuse_source(self) -> None:
        source = self.source
        config = source.folder / "config.json"
        for path in (source.folder, source.index or config, config, *source.files, *self.copies.values()):
            if path.resolve().is_relative_to(self.folder.resolve()):
                raise ValueError(f"{self.folder}: the source is in it: choose another folder")

    def _compare(self, record: Path) -> None:
        """Refuse the record of another plan, and say what is other."""
        if record.read_bytes() == self.record:
            return
        earlier = read_json(record)
        changed = [
            f"{key} {earlier.get(key)!r}, not {value!r}"
            for key, value in self.about.items()
            if earlier.get(key) != json.loads(json.dumps(value))
        ]
        what = "; ".join(changed) or "shard size, or files that have changed since"
        raise CheckpointError(
            f"{self.folder}: was begun with other options or from other files ({what}): give the same ones, or start "
            "over with --force"
        )

    def _earlier(self, others: Sequence[Path]) -> list[Path]:
        """Return what this run does away with, in this order: with its index, a folder is no longer complete."""
        record = self.folder / RECORD
        weights = [path for path in others if path.name.endswith((".safetensors", ".index.json"))]
        began = record in others
        for path in weights:
            if not began or not (path.name == INDEX or _SHARD.fullmatch(path.name)):
                raise FileExistsError(f"{path}: was written by no earlier run: remove it, or choose another folder")
        weights.sort(key=lambda path: path.name != INDEX)
        return [*weights, *(self.folder / name for name in (*self.documents, *self.copies)), record]

    def _check_room(self, tasks: Sequence[Task], earlier: Sequence[Path]) -> None:
        needed = sum(task.shard.nbytes for task in tasks)
        free = shutil.disk_usage(self.folder).free + sum(path.stat().st_size for path in earlier if path.exists())
        if needed > free:
            raise OSError(
                f"{self.folder}: {format_bytes(needed)} are to be written, but the disk has {format_bytes(free)} free"
            )


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
    """Shards that are still to be written, by other tasks."""
    reports: Mapping[str, Any]
    """What was noticed on the way, by tensor, in what this run wrote."""

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
        """Yield what a person should know even if nothing else is to be shown."""
        yield from ()

    def lines(self) -> Iterator[str]:
        """Yield a report for a person."""
        rate = f" in {self.seconds:.1f} s ({format_bytes(self.written / self.seconds)}/s)" if self.written else ""
        done = "all there" if self.complete else f"{len(self.missing):,} of them still to be written"
        yield (
            f"wrote {format_bytes(self.written)}{rate} to {escape(str(self.folder))}: "
            f"{count(len(self.shards), 'shard')}, {format_bytes(self.nbytes)}, {done}"
        )


def split_into_shards(sizes: Sequence[int], max_shard_size: int) -> list[list[int]]:
    """Divide tensors among shards, in order, as huggingface_hub does.

    Parameters
    ----------
    sizes : sequence of int
        Bytes of each.
    max_shard_size : int
        Bytes of a shard. What is larger by itself has a shard of its own.

    Returns
    -------
    list of list of int
        The numbers of the tensors in each shard.

    Examples
    --------
    >>> split_into_shards([6, 6, 2, 6, 2, 2], 10)
    [[0], [1, 2], [3, 4, 5]]
    """
    shards: list[list[int]] = []
    current: list[int] = []
    filled = 0
    for number, size in enumerate(sizes):
        if size > max_shard_size:
            shards.append([number])
            continue
        if filled + size > max_shard_size:
            shards.append(current)
            current, filled = [], 0
        current.append(number)
        filled += size
    return [*shards, current] if current else shards


def make_shards(items: Sequence[Item], max_shard_size: int) -> tuple[Shard, ...]:
    """Divide items among shards, and name these."""
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size must be at least 1, found {max_shard_size}")
    sizes = [sum(output.nbytes for output in item.outputs) for item in items]
    groups = split_into_shards(sizes, max_shard_size)
    if len(groups) == 1:
        return (Shard("model.safetensors", tuple(items)),)
    return tuple(
        Shard(f"model-{number:05}-of-{len(groups):05}.safetensors", tuple(items[i] for i in group))
        for number, group in enumerate(groups, 1)
    )


class _StoppedError(Exception):
    """Another thread failed."""


class Crew:
    """Threads that count together what they have done, and stop together when one of them fails.

    Parameters
    ----------
    total : int
        Bytes to be done.
    progress : callable
        Called by one thread at a time, and never again once it has raised.

    Attributes
    ----------
    done : int
        Bytes that are done.
    """

    def __init__(self, total: int, progress: Callable[[Progress], object]) -> None:
        self.done, self._total, self._progress = 0, total, progress
        self._lock = threading.Lock()
        self._errors: list[BaseException] = []

    def advance(self, shard: str, tensor: str, nbytes: int) -> None:
        """Report that many more bytes, or end the thread if another one failed."""
        with self._lock:
            if self._errors:
                raise _StoppedError
            self.done += nbytes
            try:
                self._progress(Progress(shard, tensor, self.done, self._total))
            except BaseException as error:
                self._errors.append(error)
                raise

    def run(self, work: Callable[[int], object], number: int, workers: int | None) -> None:
        """Call ``work`` with each number below ``number``, in several threads, as many as decoding uses by default."""

        def several(begin: int, end: int) -> None:
            for i in range(begin, end):
                work(i)

        try:
            parallel_for(several, number, 1, workers or default_num_threads(), failed=self._errors.append)
        except BaseException as error:
            if not self._errors or error is self._errors[0]:
                raise
            raise self._errors[0] from None


def run_tasks(
    tasks: Sequence[Task],
    workers: int | None = None,
    progress: Callable[[Progress], object] = lambda _: None,
) -> dict[str, Any]:
    """Run tasks in several threads, each of which writes one shard at a time.

    Parameters
    ----------
    tasks : sequence of Task
    workers : int, optional
        Threads; by default as many as decoding uses.
    progress : callable
        Called by one thread at a time.

    Returns
    -------
    dict
        What `Task.run` returns, of all tasks.
    """
    tasks = [task for task in tasks if not task.is_done()]
    crew = Crew(sum(task.shard.nbytes for task in tasks), progress)
    reports: dict[str, Any] = {}

    def run(number: int) -> None:
        task = tasks[number]
        reports.update(task.run(partial(crew.advance, task.shard.file)))

    crew.run(run, len(tasks), workers)
    return reports
