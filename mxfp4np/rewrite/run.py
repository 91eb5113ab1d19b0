"""Write what a plan describes: the record and the small files, the shards in worker threads, and the index last.

A file that has its final name is complete and on disk. Several processes may write to the same folder: the tasks, one
for each shard, are independent, and each may be killed and repeated. This module knows nothing of what the items are.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from ..backends.threads import check_num_threads
from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..layouts.table import TRANSPOSE
from ..storage.atomic import atomic_file, is_temporary, leftovers, make_folder, remove
from ..storage.discover import is_hidden
from ..storage.jsonfile import read_json
from ..storage.named import named
from ..storage.regular import LFSPointerError, is_below, open_regular, read_up_to
from ..storage.remote import AnyPath
from ..storage.safetensors import bytes_of
from ..text import CELL_WIDTH, count, escape, format_bytes, html_table, shorten
from .cluster import Engine, pool_of
from .plan import INDEX, RECORD, Plan, Shard
from .workers import Progress


@dataclass(frozen=True)
class Task:
    """One shard to be written: can be pickled, repeated, and run in any process."""

    folder: Path
    shard: Shard
    source: Checkpoint
    record: bytes | None = None
    """The record of the folder, if it must have this one when the shard is finished."""
    leftovers: tuple[Path, ...] = ()
    """What killed processes left of the shard, to be removed when it is finished."""

    @property
    def path(self) -> Path:
        """The file to be written."""
        return self.folder / self.shard.file

    def is_done(self) -> bool:
        """Tell whether the shard is there and complete."""
        header = self.shard.header
        try:
            with named(self.path, "read"), open_regular(self.path) as file:
                size = os.fstat(file.fileno()).st_size
                return size == len(header) + self.shard.nbytes and read_up_to(file, len(header)) == header
        except (FileNotFoundError, LFSPointerError):
            return False

    def run(self, progress: Callable[[str, int], object] = lambda *_: None) -> dict[str, Any]:
        """Write the shard, if it is not there, and return the reports of its items by their names.

        ``progress`` is called with the name of a tensor and the number of bytes written since the last call.
        """
        reports: dict[str, Any] = {}
        if self.is_done():
            return reports
        header, offsets = self.shard.header, self.shard.offsets

        def write(file: BinaryIO) -> None:
            file.truncate(len(header) + self.shard.nbytes)
            file.write(header)
            # In the order of the file.
            for item in sorted(self.shard.items, key=lambda item: offsets[item.outputs[0].name]):
                for which, data in item.chunks(self.source, reports):
                    name = item.outputs[which].name
                    file.seek(len(header) + offsets[name])
                    offsets[name] += file.write(bytes_of(data))
                    progress(name, data.nbytes)
            self._check()

        _create(self.path, write)
        remove(self.leftovers)
        return reports

    def _check(self) -> None:
        """Raise an error if what was read has changed meanwhile, or if another run has started over in the folder."""
        names = (item.name for item in self.shard.items if item.name in self.source)
        for file in {tensor.file for name in names for tensor in self.source.stored_tensors(name)}:
            if not file.is_unchanged():
                raise _changed(file.path)
        if self.record is not None and _read_record(self.folder) != self.record:
            raise CheckpointError(f"{self.folder}: another run has started over here: choose another folder")


def _changed(path: AnyPath) -> CheckpointError:
    return CheckpointError(f"{path}: was replaced or changed while it was read: start over with --force")


def refuse_incomplete(source: Checkpoint) -> None:
    """Raise an error if a checkpoint that is to be rewritten lacks parts of a numbered set."""
    if source.incomplete:
        raise CheckpointError(
            f"{'; '.join(source.findings)}: download them, or give the files that are there by their names, in Python "
            "as a list"
        )


def tasks_of(plan: Plan, part: tuple[int, int] | None = None) -> list[Task]:
    """Return a task for each shard, or every n-th from the i-th on for ``part = (i, n)``, counted from 1."""
    i, n = part or (1, 1)
    if not 1 <= i <= n:
        raise ValueError(f"task must be i/n with 1 <= i <= n, found {i}/{n}")
    return [Task(plan.folder, shard, plan.source) for shard in plan.shards[i - 1 :: n]]


@named(None, "read")
def prepare(plan: Plan, tasks: Sequence[Task], *, resume: bool, force: bool, shared: bool) -> list[Task]:
    """Make the folder, write everything that is not a shard or the index, and return the tasks that are not done.

    ``resume`` keeps what an earlier run of the same plan wrote. ``force`` removes it; other files stay, unless they are
    to be written now, and weights that no run wrote are refused. ``shared``: other processes may be writing too.
    Whatever is refused is refused before anything is removed.
    """
    if resume and force:
        raise ValueError("resume continues and force starts over: give one of them")
    folder, record, _ = plan.folder, plan.record, plan.index
    make_folder(folder)
    # Listed before the record is looked for: another process writes its record before anything else.
    found = [path for path in folder.iterdir() if not is_temporary(path.name)]
    recorded: set[str] = set()
    if force:
        recorded = _recorded_files(folder)
    elif (folder / RECORD).exists():
        _check_record(plan, resume=resume)
    elif found:
        raise FileExistsError(
            f"{folder}: expected a new or empty folder, found {found[0].name!r}: with --force, files of the same "
            "names are replaced"
        )
    names = plan.files | recorded
    for name in names:
        _check_place(folder, name)
    earlier = _files_of_earlier_run(plan, found, recorded) if force else []
    removed = {path: path.lstat() for path in earlier if os.path.lexists(path)}
    left = [task for task in tasks if task.path in removed or not task.is_done()]
    nbytes = sum(task.shard.nbytes for task in left)
    free = shutil.disk_usage(folder).free + sum(file.st_size for file in removed.values())
    if nbytes > free:
        raise OSError(f"{folder}: {format_bytes(nbytes)} are to be written, but the disk has {format_bytes(free)} free")
    for path in removed:
        with named(path, "removed"):
            path.unlink(missing_ok=True)
    try:
        with atomic_file(folder / RECORD, exclusive=True) as file:
            file.write(record)
    except (FileExistsError, FileNotFoundError):  # an earlier run, or another process that was faster
        _check_record(plan, resume=resume)
    unfinished = leftovers(folder / name for name in names)
    if not shared:
        remove(chain(*unfinished.values()))
    for name, text in plan.documents.items():
        _put(folder / name, text)
    for name, original in plan.copies.items():
        _copy(original, folder / name)
    return [replace(task, record=record, leftovers=tuple(unfinished.get(task.path, ()))) for task in left]


@named(None, "read")
def finish(plan: Plan) -> list[str]:
    """Write the index if all shards are there, and return the names of those that are not."""
    there = {path.name for path in plan.folder.iterdir()}
    missing = [shard.file for shard in plan.shards if shard.file not in there]
    if not missing:
        missing = [task.shard.file for task in tasks_of(plan) if not task.is_done()]
    if not missing:
        if plan.index is not None:
            _put(plan.folder / INDEX, plan.index)
        remove(chain(*leftovers(plan.folder / name for name in plan.files).values()))
    return missing


@named(None, "read")
def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a folder, empty if there is none; refuse one whose options no run has."""
    path = folder / RECORD
    record = read_json(path) if path.exists() else {}
    for key in ("include", "exclude", "drop"):
        found = record.get(key, [])
        if not isinstance(found, list) or not all(isinstance(pattern, str) for pattern in found):
            raise CheckpointError(f"{path}: {key!r}: expected a list of patterns, found another value")
    if record.get("transpose", TRANSPOSE[0]) not in TRANSPOSE:
        raise CheckpointError(f"{path}: 'transpose': expected {' or '.join(TRANSPOSE)}, found another value")
    return record


def _read_record(folder: Path) -> bytes:
    with open_regular(folder / RECORD) as file:
        return file.read()


def _check_record(plan: Plan, *, resume: bool) -> None:
    """Refuse a folder that holds an earlier run, unless this plan ``resume``s it: say which of its options differ."""
    folder = plan.folder
    found = _read_record(folder)
    if not resume:
        raise FileExistsError(f"{folder}: holds an earlier run: continue it with --resume, or start over with --force")
    if found == plan.record:
        return
    try:
        earlier = read_record(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error}: start over with --force") from error
    ours = json.loads(plan.record)
    changed = [
        f"{key} {shorten(repr(earlier.get(key)), CELL_WIDTH)}, not {shorten(repr(value), CELL_WIDTH)}"
        for key, value in plan.options.items()
        if earlier.get(key) != ours[key]
    ]
    what = "; ".join(changed) or "shard size, or files that have changed since"
    raise CheckpointError(
        f"{folder}: was begun with other options or from other files ({what}): give the same ones, or start over with "
        "--force"
    )


def _recorded_files(folder: Path) -> set[str]:
    """Return the names of the files that an earlier run wrote, as its record says; none if there is no valid one."""
    try:
        names = read_record(folder).get("files")
    except CheckpointError:
        names = None
    return set(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else set()


def _files_of_earlier_run(plan: Plan, found: Sequence[Path], recorded: set[str]) -> list[Path]:
    """Return the files that a run which starts over removes first: those ``recorded``, and those that it replaces.

    The index comes first: without it the folder is no longer complete. The record comes last. Of those ``found`` in the
    folder, weights that no run wrote are refused.
    """
    endings = (".safetensors", ".index.json")
    for path in found:
        if path.name.lower().endswith(endings) and not is_hidden(path) and path.name not in recorded:
            raise FileExistsError(f"{path}: was written by no earlier run: remove it, or choose another folder")
    names = {*recorded, *plan.documents, *plan.copies} - {INDEX, RECORD}
    return [plan.folder / name for name in (INDEX, *sorted(names), RECORD)]


def _check_place(folder: Path, name: str) -> None:
    """Refuse to write or remove a file outside of the folder, through a link, or where something else is."""
    path = folder / name
    if not is_below(name):
        raise CheckpointError(f"{folder / RECORD}: names {name!r}, which is outside of the folder: remove the record")
    for parent in path.parents[: len(Path(name).parts) - 1]:
        if os.path.lexists(parent) and not stat.S_ISDIR(parent.lstat().st_mode):
            raise FileExistsError(f"{parent}: expected a folder, found a link or file: remove it")
    if os.path.lexists(path) and not (stat.S_ISREG(mode := path.lstat().st_mode) or stat.S_ISLNK(mode)):
        raise FileExistsError(f"{path}: expected a regular file, found something else: remove it")


def _create(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file that appears when it is complete, unless another process puts the same one there meanwhile."""
    try:
        with atomic_file(path) as file:
            write(file)
    except FileNotFoundError as error:
        if error.filename != str(path) or not path.exists():
            raise


def _put(path: Path, data: bytes) -> None:
    _create(path, lambda file: file.write(data))


def _copy(source: AnyPath, target: Path) -> None:
    if not target.is_file():
        make_folder(target.parent)
        with open_regular(source, pointers=True) as original:
            _create(target, lambda file: shutil.copyfileobj(original, file))


@dataclass(frozen=True, repr=False)
class Run:
    """What the run of a plan did, or is going to do."""

    folder: Path
    shards: Mapping[str, int]
    """Bytes of tensor data by file."""
    written: int
    """Bytes of tensor data that this run wrote."""
    seconds: float
    """Seconds that this run took, without the compilation of kernels."""
    missing: list[str]
    """Shards that are still to be written, by other tasks or by the run that is planned."""
    reports: Mapping[str, Any]
    """What the items that this run wrote reported, by tensor."""
    notes: list[str]
    """What is doubtful about the files of the source, or was decided about them."""
    left_out: list[str]
    """Files and folders of weights beside the source that are not part of the result."""
    free: int
    """Bytes that the disk of the folder has free."""

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
            "missing": self.missing,
            "free": self.free,
            "notes": self.notes,
            "left_out": self.left_out,
        }

    def __repr__(self) -> str:
        size = f"{count(len(self.shards), 'shard')}, {format_bytes(self.nbytes)}"
        done = "complete" if self.complete else f"{len(self.missing):,} still to be written"
        return f"<{type(self).__name__} to {str(self.folder)!r}: {size}, {done}>"

    def facts(self) -> list[tuple[str, str]]:
        """Return what a notebook shows: headings and texts."""
        written = f"{format_bytes(self.written)} in {self.seconds:.1f} s"
        return [("written", written), *(("note", warning) for warning in self.warnings())]

    def _repr_html_(self) -> str:
        return html_table(self.facts(), caption=repr(self).strip("<>"))

    def warnings(self) -> Iterator[str]:
        """Yield what a person should know even if nothing else is shown."""
        yield from map(escape, self.notes)

    def _left_out_lines(self) -> Iterator[str]:
        if self.left_out:
            yield f"left out, not part of the checkpoint: {escape(', '.join(self.left_out))}"

    def plan_lines(self) -> Iterator[str]:
        """Yield what is going to be written, for a person."""
        for file, nbytes in self.shards.items():
            yield f"{file}  {format_bytes(nbytes)}"
        shards = count(len(self.shards), "shard")
        yield f"{shards}, {format_bytes(self.nbytes)} of tensor data, to {escape(str(self.folder))}"
        left, done = sum(map(self.shards.__getitem__, self.missing)), len(self.shards) - len(self.missing)
        there = f"{count(done, 'shard')} there already: --resume keeps them; " if done else ""
        yield f"{there}{format_bytes(left)} to be written, {format_bytes(self.free)} free on the disk"
        yield from self._left_out_lines()

    def lines(self) -> Iterator[str]:
        """Yield a report for a person."""
        rate = f" in {self.seconds:.1f} s ({format_bytes(self.written / self.seconds)}/s)" if self.written else ""
        done = "all there" if self.complete else f"{len(self.missing):,} of them still to be written"
        yield (
            f"wrote {format_bytes(self.written)}{rate} to {escape(str(self.folder))}: "
            f"{count(len(self.shards), 'shard')}, {format_bytes(self.nbytes)}, {done}"
        )
        yield from self._left_out_lines()


def run_tasks(
    tasks: Sequence[Task],
    num_threads: int | None = None,
    progress: Callable[[Progress], object] = lambda _: None,
    engine: Engine = "threads",
) -> dict[str, Any]:
    """Run tasks in threads or on Ray, each of which writes a shard at a time; return what all `Task.run` return."""
    pool = pool_of(engine, num_threads, sum(task.shard.nbytes for task in tasks), progress)
    reports = pool.map(lambda task: task.run(partial(pool.advance, task.shard.file)), tasks)
    return {name: report for of_task in reports for name, report in of_task.items()}


def run_plan(
    plan: Plan,
    part: tuple[int, int] | None = None,
    num_threads: int | None = None,
    progress: Callable[[Progress], object] = lambda _: None,
    engine: Engine = "threads",
    *,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Run:
    """Write all shards, or those of one part; and the index, if all shards are there.

    With a part, other processes may be writing other parts, or the same. See `tasks_of`, `prepare` and `run_tasks` for
    the arguments; ``dry_run`` writes nothing.
    """
    check_num_threads(num_threads)
    tasks, shared = tasks_of(plan, part), part is not None
    if shared and force:
        raise ValueError("tasks share a folder: remove it, or give --force to a run without --task")
    _refuse_source(plan)
    reports: dict[str, Any] = {}
    written, seconds = 0, 0.0
    if dry_run:
        missing = [shard.file for shard in plan.shards] if force else _missing(plan)
    else:
        tasks = prepare(plan, tasks, resume=resume or shared, force=force, shared=shared)
        written = sum(task.shard.nbytes for task in tasks)
        if tasks and plan.warm_up is not None and engine == "threads":
            plan.warm_up()
        begin = time.perf_counter()
        reports = run_tasks(tasks, num_threads, progress, engine)
        seconds = time.perf_counter() - begin
        _check_source(plan)
        missing = finish(plan)
    shards = {shard.file: shard.nbytes for shard in plan.shards}
    notes, left_out = [*plan.source.findings, *plan.source.notes, *plan.notes], list(plan.left_out)
    return Run(plan.folder, shards, written, seconds, missing, reports, notes, left_out, _free_bytes(plan.folder))


@named(None, "read")
def _missing(plan: Plan) -> list[str]:
    """Return the shards that a run with ``resume`` would write."""
    if not (plan.folder / RECORD).is_file() or _read_record(plan.folder) != plan.record:
        return [shard.file for shard in plan.shards]
    return [task.shard.file for task in tasks_of(plan) if not task.is_done()]


def _free_bytes(folder: Path) -> int:
    """Return what the disk has free on which a folder is, or would be made."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free


def _refuse_source(plan: Plan) -> None:
    """Raise an error if a file that is read lies in the target."""
    source = plan.source
    config = source.folder / "config.json"
    for path in (source.folder, source.index or config, config, *source.files, *plan.copies.values()):
        if plan.folder.resolve() in ((resolved := path.resolve()), *resolved.parents):
            raise ValueError(f"{plan.folder}: the source is in it: choose another folder")


def _check_source(plan: Plan) -> None:
    """Raise an error if a file that was read or copied has changed since the plan was made."""
    now = plan.stamps_of_copies()
    changed = [path for name, path in plan.copies.items() if now[name] != plan.copied_stamps[name]]
    for path in (*plan.source.changed_files(), *changed):
        raise _changed(path)
