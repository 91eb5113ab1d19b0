"""The folder that a checkpoint is written to, perhaps by several processes at the same time.

A file that has its final name is complete and on disk. A record says which plan the folder belongs to, so that no other
plan resumes it. This module knows nothing of tensors and shards.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

from ..errors import CheckpointError
from ..storage.discover import read_json
from ..storage.safetensors import atomic_file
from ..text import format_bytes

INDEX: Final = "model.safetensors.index.json"
RECORD: Final = ".mxfp4np.json"
"""Name of the record."""

_SHARD: Final = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")
_TEMPORARY: Final = re.compile(r"\.(.+)\.\d+-[0-9a-f]{8}\.tmp")
"""Names that `atomic_file` gives to files that are not complete yet."""


def create(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file that appears when it is complete, unless another process puts the same one there meanwhile."""
    try:
        with atomic_file(path) as file:
            write(file)
    except FileNotFoundError:
        if not path.exists():
            raise


def put(path: Path, data: bytes) -> None:
    """Write a small file."""
    create(path, lambda file: file.write(data))


def copy(source: Path, target: Path) -> None:
    """Copy a file, unless it is there already."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as original:
            create(target, lambda file: shutil.copyfileobj(original, file))


def entries(folder: Path) -> list[Path]:
    """Return what is in a folder, without files that are not complete."""
    return [path for path in folder.iterdir() if not _TEMPORARY.fullmatch(path.name)]


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove the incomplete files of these names that killed processes left.

    A process that is still writing one then finds the complete file in its place; see `create`.
    """
    wanted = set(names)
    for parent in {(folder / name).parent for name in wanted}:
        for path in parent.glob(".*.tmp"):
            match = _TEMPORARY.fullmatch(path.name)
            if match and (parent / match[1]).relative_to(folder).as_posix() in wanted:
                with contextlib.suppress(OSError):
                    path.unlink()


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a folder, empty if there is none."""
    record = folder / RECORD
    return read_json(record) if record.exists() else {}


def check_record(folder: Path, expected: bytes, options: Mapping[str, Any]) -> None:
    """Refuse to resume what another plan began, and say which of its options differ from those of this plan."""
    if (folder / RECORD).read_bytes() == expected:
        return
    earlier = read_record(folder)
    changed = [
        f"{key} {earlier.get(key)!r}, not {value!r}"
        for key, value in options.items()
        if earlier.get(key) != json.loads(json.dumps(value))
    ]
    what = "; ".join(changed) or "shard size, or files that have changed since"
    raise CheckpointError(
        f"{folder}: was begun with other options or from other files ({what}): give the same ones, or start "
        "over with --force"
    )


def files_of_earlier_run(folder: Path, found: Sequence[Path], written: Iterable[str]) -> list[Path]:
    """Return the files that a run which starts over removes first, in this order, given all that are in the folder.

    The index comes first: without it the folder is no longer complete. ``written`` names the small files that are to be
    written now. Weights that no run wrote are refused.
    """
    record = folder / RECORD
    weights = [path for path in found if path.name.endswith((".safetensors", ".index.json"))]
    for path in weights:
        if record not in found or not (path.name == INDEX or _SHARD.fullmatch(path.name)):
            raise FileExistsError(f"{path}: was written by no earlier run: remove it, or choose another folder")
    weights.sort(key=lambda path: path.name != INDEX)
    return [*weights, *(folder / name for name in written), record]


def check_room(folder: Path, nbytes: int, removed: Iterable[Path]) -> None:
    """Raise an error if the disk has no room for ``nbytes`` once some files are removed."""
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in removed if path.exists())
    if nbytes > free:
        raise OSError(f"{folder}: {format_bytes(nbytes)} are to be written, but the disk has {format_bytes(free)} free")
