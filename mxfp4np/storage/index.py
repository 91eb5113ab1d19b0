"""The index of a checkpoint, which names the file of each tensor.

It is read here, and each tensor is taken from the file that it names. Which index is read is decided in `discover`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError
from .named import named
from .safetensors import HEADER_LIMIT
from .tensorfile import StoredTensor, TensorFile, open_regular


def weight_map_of(index: Path) -> dict[str, str]:
    """Return the file that an index names for each tensor, ``./x`` as ``x``; refuse files outside its folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: expected an object 'weight_map' of tensor names and files, found {weight_map!r}"
        )
    plain: dict[str, str] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or PurePosixPath(file).is_absolute() or ".." in Path(file).parts:
            raise CheckpointError(f"{index}: tensor {name!r}: expected a file below this folder, found {file!r}")
        weight_map[name] = plain.get(file) or plain.setdefault(file, str(PurePosixPath(file)))
    return weight_map


def merge_tensors(files: Iterable[TensorFile], index: Path | None) -> dict[str, StoredTensor]:
    """Return the tensors of all files; one that several files hold is that of the file which the index names."""
    files = list(files)
    weight_map: Mapping[str, str] = {} if index is None else weight_map_of(index)
    stored: dict[str, StoredTensor] = {}
    for file in files:
        own = "" if index is None else file.path.relative_to(index.parent).as_posix()
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
        if name not in stored:
            found = next((repr(file.path.name) for file in files if name in file.tensors), "none of the files")
            raise CheckpointError(f"{index}: tensor {name!r}: expected in {expected!r}, found in {found}")
    return stored


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; refuse anything else, and files larger than `HEADER_LIMIT`."""
    with named(path, "read"), open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > HEADER_LIMIT:
            raise CheckpointError(f"{path}: expected a JSON file of at most {HEADER_LIMIT:,} bytes, found a larger one")
        text = file.read()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
