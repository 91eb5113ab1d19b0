"""Which files form one checkpoint: a file, a list of files, an index and the shards it names, or those of a folder.

An index decides over everything else. This module opens the files and checks them against the index; it knows nothing
of what their tensors mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError
from .gguf import GGUFFile
from .safetensors import HEADER_LIMIT, SafetensorsFile
from .tensorfile import StoredTensor, TensorFile, open_regular

PathLike = str | os.PathLike[str]


def find_files(path: PathLike | Sequence[PathLike]) -> tuple[list[Path], Path | None]:
    """Return the files of a checkpoint, and the index that names them if there is one; raise if a file is missing."""
    if not isinstance(path, str | os.PathLike):
        if not isinstance(path, Iterable) or isinstance(path, bytes):
            raise TypeError(f"expected the path of a folder or file, or a list of paths, found {path!r}")
        files = [Path(file).absolute() for file in path]
        if not files:
            raise FileNotFoundError("an empty list of files is no checkpoint")
        return files, None
    path = Path(path).absolute()
    if path.is_dir():
        index = _find_index(path)
        if index is None:
            for ending in (".safetensors", ".uqff", ".gguf"):
                files = sorted(path.glob(f"*{ending}"))
                if files:
                    return files, None
            raise FileNotFoundError(f"{path}: no .safetensors files in this folder, nor .uqff or .gguf ones")
        path = index
    if path.suffix == ".json":
        return _shards_of(path), path
    return [path], None


def open_file(path: Path, io: str) -> TensorFile:
    """Open a file by the reader of its format."""
    return (GGUFFile if path.suffix == ".gguf" else SafetensorsFile)(path, io)


def _find_index(folder: Path) -> Path | None:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    preferred = folder / "model.safetensors.index.json"
    if len(indexes) > 1 and preferred not in indexes:
        raise CheckpointError(f"{folder}: several indexes, open one of them: {', '.join(i.name for i in indexes)}")
    return preferred if preferred in indexes else next(iter(indexes), None)


def weight_map_of(index: Path) -> dict[str, str]:
    """Return the file that an index names for each tensor; refuse files outside its folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: expected an object 'weight_map' of tensor names and files, found {weight_map!r}"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or PurePosixPath(file).is_absolute() or ".." in Path(file).parts:
            raise CheckpointError(f"{index}: tensor {name!r}: expected a file below this folder, found {file!r}")
    return weight_map


def _shards_of(index: Path) -> list[Path]:
    names = sorted(set(weight_map_of(index).values()))
    files = [index.parent / name for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if not file.exists()]
    if missing:
        listed = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise FileNotFoundError(f"{index}: {len(missing)} of the {len(files)} files it names are missing: {listed}")
    return files


def check_index(index: Path, stored: Mapping[str, StoredTensor]) -> None:
    """Raise `CheckpointError` if a tensor is not in the file that the index names."""
    for name, file in weight_map_of(index).items():
        if name not in stored:
            raise CheckpointError(f"{index}: tensor {name!r}: expected in {file!r}, found in none of the files")
        found = stored[name].file.path
        if found != index.parent / file:
            raise CheckpointError(f"{index}: tensor {name!r}: expected in {file!r}, found in {found.name!r}")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; refuse anything else, and files larger than `HEADER_LIMIT`."""
    with open_regular(path) as file:
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
