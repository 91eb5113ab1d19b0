"""What a rewritten checkpoint consists of: tensors in shards, a task for each shard, and the small files beside them.

A plan is made from headers alone. Its tasks are independent: each may be killed and repeated, and run in any process at
the same time as all others. The index is written last. How the bytes of a tensor are made is up to its `Item`; this
module knows nothing of MXFP4.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Checkpoint
from ..layouts.packed import TensorInfo
from ..storage.safetensors import bytes_of, header_bytes
from ..storage.tensorfile import DTYPES, nbytes_of
from . import folder as files
from .folder import INDEX, RECORD

METADATA: Final = {"format": "pt"}
"""The metadata of each shard, which transformers requires."""

MAX_SHARD_SIZE: Final = 5_000_000_000
"""Bytes of a shard by default, as in huggingface_hub."""

COPY_BYTES: Final = 32 << 20
"""Bytes that a copied tensor has in memory at a time."""


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


Chunks = Generator[tuple[int, int, NDArray[Any]], None, Any]


@dataclass(frozen=True)
class Item:
    """A tensor of the source, and what it is written as: one tensor, or several in the same shard."""

    name: str
    """Name of the tensor in the source."""
    outputs: tuple[Output, ...]

    def chunks(self, checkpoint: Checkpoint) -> Chunks:
        """Yield the number of an output, the offset in its bytes, and a C-contiguous array; return a report or None."""
        raise NotImplementedError


@dataclass(frozen=True)
class Copied(Item):
    """A tensor that is copied as it is."""

    def chunks(self, checkpoint: Checkpoint) -> Chunks:
        """Yield the bytes of the tensor."""
        begin = 0
        for _, chunk in checkpoint.pieces(self.name, COPY_BYTES):
            yield 0, begin, np.ascontiguousarray(chunk)
            begin += chunk.nbytes

    @classmethod
    def of(cls, info: TensorInfo) -> Copied:
        """Return the item for a tensor; a dtype that safetensors lacks, as in GGUF, becomes bytes."""
        return cls(info.name, (Output(info.name, info.dtype if info.dtype in DTYPES else "U8", info.shape),))


@dataclass(frozen=True)
class Shard:
    """A file to be written."""

    file: str
    items: tuple[Item, ...]

    @property
    def header(self) -> bytes:
        """The first bytes of the file."""
        return header_bytes({name: (dtype, shape) for name, dtype, shape in self._outputs}, METADATA)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(output.nbytes for item in self.items for output in item.outputs)

    @property
    def offsets(self) -> dict[str, int]:
        """Where the data of each output begins, counted from the end of the header."""
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


def split_into_shards(sizes: Sequence[int], max_shard_size: int) -> list[list[int]]:
    """Divide tensors among shards, in order, as huggingface_hub does.

    Parameters
    ----------
    sizes : sequence of int
        Bytes of each.
    max_shard_size : int
        Bytes of a shard. A larger tensor has a shard of its own.

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
    """Divide items among shards, and name these as transformers expects."""
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
        """Tell whether the shard is there and complete."""
        header = self.shard.header
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                return size == len(header) + self.shard.nbytes and file.read(len(header)) == header
        except FileNotFoundError:
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
                chunks = item.chunks(self.source)
                while True:
                    try:
                        which, offset, data = next(chunks)
                    except StopIteration as stop:
                        if stop.value:
                            reports[item.name] = stop.value
                        break
                    output = item.outputs[which]
                    file.seek(len(header) + offsets[output.name] + offset)
                    file.write(bytes_of(data))
                    progress(output.name, data.nbytes)

        files.create(self.path, write)
        files.remove_leftovers(self.folder, [self.shard.file])
        return reports


@dataclass(frozen=True)
class Plan:
    """Everything that is to be written, known from headers alone.

    Attributes
    ----------
    folder : Path
        The target.
    shards : tuple of Shard
    documents : mapping of str to bytes
        Small files to be written beside the shards.
    copies : mapping of str to Path
        Files to be copied beside them, by their names in the folder.
    options : mapping
        What the plan was made with, for the record.
    source : Checkpoint
    warm_up : callable, optional
        Imports and compiles what the items need. Called before threads start; see `Workers`.
    """

    folder: Path
    shards: tuple[Shard, ...]
    documents: Mapping[str, bytes]
    copies: Mapping[str, Path]
    options: Mapping[str, Any]
    source: Checkpoint
    warm_up: Callable[[], object] | None = None

    @property
    def items(self) -> list[Item]:
        """The items of all shards."""
        return [item for shard in self.shards for item in shard.items]

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
        return json_bytes({"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(weight_map.items()))})

    @cached_property
    def record(self) -> bytes:
        """The text of the record: the options, and a digest of what is written and of the state of what is read."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(shard.file.encode() + b"\0" + shard.header)
        for name in sorted(self.documents):
            digest.update(name.encode() + b"\0" + self.documents[name])
        found = {name: path.stat() for name, path in self.copies.items()}
        copies = sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found.items())
        digest.update(json.dumps([sorted(self.options.items()), copies, self.source.stamps]).encode())
        return (json.dumps({**self.options, "plan": digest.hexdigest()}, indent=2) + "\n").encode()

    def tasks(self, part: tuple[int, int] | None = None) -> list[Task]:
        """Return a task for each shard, or every n-th from the i-th on for ``part = (i, n)``, counted from 1."""
        i, n = part or (1, 1)
        if not 1 <= i <= n:
            raise ValueError(f"task must be i/n with 1 <= i <= n, found {i}/{n}")
        return [Task(self.folder, shard, self.source) for shard in self.shards[i - 1 :: n]]

    def refuse_source(self) -> None:
        """Raise an error if a file that is read lies in the target."""
        source = self.source
        config = source.folder / "config.json"
        for path in (source.folder, source.index or config, config, *source.files, *self.copies.values()):
            if path.resolve().is_relative_to(self.folder.resolve()):
                raise ValueError(f"{self.folder}: the source is in it: choose another folder")

    def prepare(self, tasks: Sequence[Task], *, resume: bool, force: bool, shared: bool) -> list[Task]:
        """Make the folder, write everything that is not a shard or the index, and return the tasks that are not done.

        Parameters
        ----------
        tasks : sequence of Task
            What is going to be run: the disk must have room for it.
        resume : bool
            Whether to keep what an earlier run of the same plan wrote.
        force : bool
            Whether to remove an earlier run's files. Other files stay, unless they are to be written now; weights that
            no run wrote are refused.
        shared : bool
            Whether other processes may be writing to the folder.
        """
        if resume and force:
            raise ValueError("resume continues and force starts over: give one of them")
        self.folder.mkdir(parents=True, exist_ok=True)
        # Listed before the record is looked for: another process writes its record before anything else.
        found = files.entries(self.folder)
        earlier: list[Path] = []
        if force:
            earlier = files.files_of_earlier_run(self.folder, found, [*self.documents, *self.copies])
        elif (self.folder / RECORD).exists():
            if not resume:
                raise FileExistsError(
                    f"{self.folder}: holds an earlier run: continue it with --resume, or start over with --force"
                )
            files.check_record(self.folder, self.record, self.options)
        elif found:
            raise FileExistsError(
                f"{self.folder}: expected a new or empty folder, found {found[0].name!r}: with --force, files of the "
                "same names are replaced"
            )
        if not shared:
            files.remove_leftovers(self.folder, self._names)
        removed = set(earlier)
        left = [task for task in tasks if task.path in removed or not task.is_done()]
        files.check_room(self.folder, sum(task.shard.nbytes for task in left), earlier)
        for path in earlier:
            path.unlink(missing_ok=True)
        files.put(self.folder / RECORD, self.record)
        for name, text in self.documents.items():
            files.put(self.folder / name, text)
        for name, path in self.copies.items():
            files.copy(path, self.folder / name)
        return left

    def finish(self) -> list[str]:
        """Write the index if all shards are there, and return the names of those that are not."""
        there = {path.name for path in self.folder.iterdir()}
        missing = [shard.file for shard in self.shards if shard.file not in there]
        if missing:
            return missing
        index = self.index
        if index is not None:
            files.put(self.folder / INDEX, index)
        files.remove_leftovers(self.folder, self._names)
        return []

    @property
    def _names(self) -> set[str]:
        return {RECORD, INDEX, *self.documents, *self.copies, *(shard.file for shard in self.shards)}


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Return the text of a JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
