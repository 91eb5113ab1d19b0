"""The index of a checkpoint, which names the file of each tensor.

It is read here, and each tensor is taken from the file that it names. Which index is read is decided in `discover`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import NamedTuple

from ..errors import CheckpointError
from .jsonfile import read_json
from .regular import is_below
from .remote import AnyPath
from .tensorfile import StoredTensor, TensorFile


class Index(NamedTuple):
    """An index that was read."""

    path: AnyPath
    weight_map: Mapping[str, str]
    """The file of each tensor, below the folder of the index, ``./x`` as ``x``."""

    @property
    def named_files(self) -> dict[str, AnyPath]:
        """The files that it names, by these names."""
        return {name: self.path.parent / name for name in sorted(set(self.weight_map.values()))}

    @property
    def files(self) -> list[AnyPath]:
        """The files that it names."""
        return [*self.named_files.values()]


def read_index(path: AnyPath) -> Index:
    """Return an index; refuse one that names files outside its folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        found = type(weight_map).__name__ if weight_map != {} else "no name"
        raise CheckpointError(f"{path}: expected an object 'weight_map' of tensor names and files, found {found}")
    plain: dict[str, str] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise _not_below(path, name, type(file).__name__)
        if file not in plain:
            if not is_below(file):
                raise _not_below(path, name, repr(file))
            plain[file] = str(PurePosixPath(file))
        weight_map[name] = plain[file]
    return Index(path, weight_map)


def _not_below(index: AnyPath, name: str, found: str) -> CheckpointError:
    return CheckpointError(f"{index}: tensor {name!r}: expected a file below this folder, found {found}")


def merge_tensors(files: Iterable[TensorFile], index: Index | None) -> dict[str, StoredTensor]:
    """Return the tensors of all files; one that several files hold is that of the file which the index names."""
    files = list(files)
    weight_map = {} if index is None else index.weight_map
    names = {} if index is None else {file: name for name, file in index.named_files.items()}
    stored: dict[str, StoredTensor] = {}
    for file in files:
        own = names.get(file.path, "")
        for name, tensor in file.tensors.items():
            if weight_map.get(name, own) != own:
                continue
            if name in stored:
                raise CheckpointError(
                    f"tensor {name!r} is in both {stored[name].file.path} and {file.path}: open one of them, or the "
                    "index that says which"
                )
            stored[name] = tensor
    for name, expected in weight_map.items():
        if index is not None and name not in stored:
            found = next((repr(file.path.name) for file in files if name in file.tensors), "none of the files")
            raise CheckpointError(f"{index.path}: tensor {name!r}: expected in {expected!r}, found in {found}")
    return stored
