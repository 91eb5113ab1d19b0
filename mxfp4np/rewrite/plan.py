"""What a rewritten checkpoint consists of: tensors in shards, the small files beside them, the index and the record.

A plan is made from headers alone. How the bytes of a tensor are made is up to its `Item`; this module knows nothing of
MXFP4, and writes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Checkpoint
from ..errors import LayoutError
from ..layouts.packed import TensorInfo
from ..shapes import split
from ..storage.named import named
from ..storage.remote import AnyPath
from ..storage.safetensors import HEADER_LIMIT, entry_size, header_bytes, header_room
from ..storage.tensorfile import DTYPES, Stamp, element, nbytes_of, stamp_of
from ..text import parse_bytes

INDEX: Final = "model.safetensors.index.json"
RECORD: Final = ".mxfp4np.json"
"""Name of the record: it says which plan the folder belongs to, so that no other plan resumes it."""

METADATA: Final = {"format": "pt"}
"""What transformers requires in the metadata of each shard."""

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


Chunks = Iterator[tuple[int, NDArray[Any]]]


@dataclass(frozen=True)
class Item:
    """A tensor of the source, and what it is written as: one tensor, or several in the same shard."""

    name: str
    """Name of the tensor in the source."""
    outputs: tuple[Output, ...]

    def chunks(self, checkpoint: Checkpoint, reports: dict[str, Any]) -> Chunks:
        """Yield the bytes of the outputs, each from its beginning: the number of an output, and a C-contiguous array.

        What there is to report is put into ``reports`` by the name of the item.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Copied(Item):
    """A tensor that is copied as it is stored; of a packed one codes and scales."""

    def chunks(self, checkpoint: Checkpoint, reports: dict[str, Any]) -> Chunks:  # noqa: ARG002
        """Yield the bytes of the stored tensors."""
        stored = {tensor.name: tensor for tensor in checkpoint.stored_tensors(self.name)}
        for which, output in enumerate(self.outputs):
            tensor = stored[output.name]
            for index in split(tensor.array_shape, max(1, element(tensor.dtype)[0] // 8), COPY_BYTES):
                yield which, np.ascontiguousarray(tensor.array(index))

    @classmethod
    def of(cls, info: TensorInfo) -> Copied:
        """Return the item for a tensor.

        Raises
        ------
        LayoutError
            If safetensors has no name for its type, as for the types of GGUF.
        """
        for tensor in info.stored:
            if tensor.dtype not in DTYPES:
                raise LayoutError(
                    f"{tensor.file.path}: tensor {info.name!r} is {info.format}, which is no dtype of safetensors, and "
                    "cannot be copied: leave it out, with --drop"
                )
        return cls(info.name, tuple(Output(tensor.name, tensor.dtype, tensor.shape) for tensor in info.stored))


@dataclass(frozen=True)
class Shard:
    """A file to be written."""

    file: str
    items: tuple[Item, ...]
    metadata: Mapping[str, str] = field(default_factory=lambda: METADATA)

    @property
    def outputs(self) -> list[Output]:
        """The tensors in the order of the file: widest elements first, so that every tensor is aligned."""
        outputs = (output for item in self.items for output in item.outputs)
        return sorted(outputs, key=lambda output: (-DTYPES[output.dtype][0], output.name))

    @property
    def header(self) -> bytes:
        """The first bytes of the file."""
        return header_bytes({name: (dtype, shape) for name, dtype, shape in self.outputs}, self.metadata, self.file)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(output.nbytes for output in self.outputs)

    @property
    def offsets(self) -> dict[str, int]:
        """Where the data of each output begins, counted from the end of the header."""
        names, sizes = [output.name for output in self.outputs], [output.nbytes for output in self.outputs]
        return dict(zip(names, accumulate(sizes, initial=0), strict=False))


def split_into_shards(
    sizes: Sequence[int], max_shard_size: int, entries: Sequence[int] = (), header_room: int = HEADER_LIMIT
) -> list[list[int]]:
    """Divide tensors of these sizes in bytes among shards, in order, as huggingface_hub does.

    A tensor larger than ``max_shard_size`` has a shard of its own. The ``entries`` of the tensors in the header of a
    shard, in bytes, have no more than ``header_room``.

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
    filled, header = 0, 0
    for number, (size, entry) in enumerate(zip(sizes, entries or [0] * len(sizes), strict=True)):
        if size > max_shard_size:
            shards.append([number])
            continue
        if current and (filled + size > max_shard_size or header + entry > header_room):
            shards.append(current)
            current, filled, header = [], 0, 0
        current.append(number)
        filled += size
        header += entry
    return [*shards, current] if current else shards


def make_shards(
    items: Sequence[Item], max_shard_size: int | str, metadata: Mapping[str, str] = METADATA
) -> tuple[Shard, ...]:
    """Divide items among shards, and name these as transformers expects."""
    max_shard_size = parse_bytes(max_shard_size)
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size must be at least 1, found {max_shard_size}")
    sizes = [sum(output.nbytes for output in item.outputs) for item in items]
    total = sum(sizes)
    entries = [sum(entry_size(name, (dtype, shape), total) for name, dtype, shape in item.outputs) for item in items]
    groups = split_into_shards(sizes, max_shard_size, entries, header_room(metadata))
    if len(groups) == 1:
        return (Shard("model.safetensors", tuple(items), metadata),)
    return tuple(
        Shard(f"model-{number:05}-of-{len(groups):05}.safetensors", tuple(items[i] for i in group), metadata)
        for number, group in enumerate(groups, 1)
    )


@dataclass(frozen=True)
class Plan:
    """Everything that is to be written, known from headers alone."""

    folder: Path
    """The target."""
    shards: tuple[Shard, ...]
    documents: Mapping[str, bytes]
    """Small files to be written beside the shards."""
    copies: Mapping[str, AnyPath]
    """Files to be copied beside them, by their names in the folder."""
    options: Mapping[str, Any]
    """What the plan was made with, for the record."""
    source: Checkpoint
    warm_up: Callable[[], object] | None = None
    """Imports and compiles what the items need. Called before threads start; see `Workers`."""
    left_out: Sequence[str] = ()
    """Files and folders of weights beside the source that are not part of the plan."""
    notes: Sequence[str] = ()
    """What is doubtful about files that are copied, a sentence each."""

    @property
    def items(self) -> list[Item]:
        """The items of all shards."""
        return [item for shard in self.shards for item in shard.items]

    @property
    def files(self) -> set[str]:
        """The names of all files."""
        index = {INDEX} if len(self.shards) > 1 else set()
        return {RECORD, *index, *self.documents, *self.copies, *(shard.file for shard in self.shards)}

    @cached_property
    def index(self) -> bytes | None:
        """The text of the index; one shard has none."""
        if len(self.shards) == 1:
            return None
        weight_map = {output.name: shard.file for shard in self.shards for output in shard.outputs}
        total = sum(shard.nbytes for shard in self.shards)
        text = json_bytes({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
        if len(text) > HEADER_LIMIT:
            raise ValueError(
                f"{self.folder / INDEX}: would have {len(text):,} bytes, more than the {HEADER_LIMIT:,} that are read "
                "again: choose fewer tensors, with --drop"
            )
        return text

    @cached_property
    def copied_stamps(self) -> dict[str, Stamp]:
        """The state of the files to be copied, when it was first asked for; see `stamp_of`."""
        return self.stamps_of_copies()

    def stamps_of_copies(self) -> dict[str, Stamp]:
        """Return the state of the files to be copied, by their names in the folder."""
        stamps: dict[str, Stamp] = {}
        for name, path in sorted(self.copies.items()):
            with named(path, "read"):
                stamps[name] = stamp_of(path.stat())
        return stamps

    @cached_property
    def record(self) -> bytes:
        """The text of the record: options, names of the files, and a digest of what is written and what is read."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(shard.file.encode() + b"\0" + shard.header)
        for name in sorted(self.documents):
            digest.update(name.encode() + b"\0" + self.documents[name])
        state = [sorted(self.options.items()), sorted(self.copied_stamps.items()), self.source.stamps]
        digest.update(json.dumps(state).encode())
        record = {**self.options, "files": sorted(self.files - {RECORD}), "plan": digest.hexdigest()}
        return (json.dumps(record, indent=2) + "\n").encode()


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Return the text of a JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
