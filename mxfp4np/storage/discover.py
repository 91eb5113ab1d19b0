"""Which files form one checkpoint: a file, a list of files, an index and the shards it names, or those of a folder.

An index decides over everything else. This module chooses the files and the reader of each; it knows nothing of
what their tensors mean.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Final, Literal, TypeGuard

from ..errors import CheckpointError
from .gguf import GGUF_MAGIC, GGUFFile
from .index import Index, read_index
from .named import named
from .regular import open_regular, read_regular, read_up_to
from .remote import AnyPath, RemotePath, is_remote
from .safetensors import SafetensorsFile
from .stores import Store, map_requests
from .tensorfile import TensorFile

PathLike = str | os.PathLike[str]
Location = PathLike | RemotePath | Store
"""A path, a URL as text, or a store of obstore."""

IO = Literal["mmap", "pread"]
"""How the bytes of files are had: mapped, or read when they are needed."""

ENDINGS: Final = (".safetensors", ".uqff", ".gguf")
"""Of files of weights, in lower case. In a folder, files of the first ending that any has are opened."""

SINGLE: Final = "model.safetensors"
"""Name of the file that transformers loads, whatever is beside it."""

_INDEX: Final = ".safetensors.index.json"
_NUMBERED: Final = re.compile(r"(.+)-(\d+)-of-(\d+)(\.\w+)")
"""Names of the parts of a numbered set: stem, number, number of parts, ending."""

_EXTRA: Final = ("adapter", "mmproj")
"""Beginnings of the names of adapters and projectors, which are opened only if there is no model."""

_REPOSITORY: Final = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class FileSet:
    """The files of one checkpoint, and what a user should know of the choice."""

    files: list[AnyPath]
    index: Index | None = None
    """What names the files."""
    beside: list[AnyPath] = field(default_factory=list)
    """Files of weights in the same folder that are not part of it."""
    missing: list[str] = field(default_factory=list)
    """Numbered sets that lack parts, a sentence each."""
    doubts: list[str] = field(default_factory=list)
    """What else is doubtful about the choice, a sentence each."""
    notes: list[str] = field(default_factory=list)
    """How the files differ from what the caller named, a sentence each."""
    named: bool = False
    """Whether the caller named each of the files, so that missing parts are no mistake."""

    @property
    def findings(self) -> list[str]:
        """What is doubtful or missing, a sentence each."""
        return [*self.doubts, *self.missing]


@named(None, "read")
def find_files(path: Location | Sequence[Location]) -> FileSet:
    """Return the files of a checkpoint; raise if a file is missing, or if there are several checkpoints."""
    if not is_one(path):
        if not isinstance(path, Iterable) or isinstance(path, bytes):
            raise TypeError(f"expected the path of a folder or file, or a list of paths, found {path!r}")
        files = [as_path(file) for file in path]
        if not files:
            raise FileNotFoundError("an empty list of files is no checkpoint")
        return FileSet(files, missing=list(_missing_parts(files)), named=True)
    hint, path = repository_hint(path), as_path(path)
    if hint:
        raise FileNotFoundError(errno.ENOENT, f"{os.strerror(errno.ENOENT)}{hint}", str(path))
    if path.is_dir():
        return _find_in_folder(path)
    if path.suffix.lower() == ".json":
        return _of_index(read_index(path))
    match = _NUMBERED.fullmatch(path.name)
    if match and match[4].lower() == ".gguf" and int(match[2]) == 1:
        # As llama.cpp, which opens a split file by the name of its first part.
        files = _sets(_weights_in(path.parent)).get(_set_of(path), [path])
        note = f"{path} is the first part of a split file: {len(files)} parts are opened, up to {files[-1].name}"
        return FileSet(files, missing=list(_missing_parts(files)), notes=[note])
    return FileSet([path], missing=list(_missing_parts([path])), named=True)


def is_one(path: object) -> TypeGuard[Location]:
    """Tell whether this is one path, URL or store, not several."""
    return isinstance(path, str | os.PathLike) or is_remote(path)


def as_path(path: Location) -> AnyPath:
    """Return the path that a caller means: on disk, or a remote one."""
    if isinstance(path, str | os.PathLike) and not is_remote(path):
        return Path(path).absolute()
    return RemotePath.of(path)


def repository_hint(path: Location) -> str:
    """Return how to download what is no folder but named like a repository of the Hub, to be added to a message."""
    name = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
    owner, _, repository = name.partition("/")
    if not _REPOSITORY.fullmatch(name) or Path(owner).exists() or name.lower().endswith((*ENDINGS, ".json")):
        return ""
    return f"; to download a repository of this name: hf download {name} --local-dir {repository}"


def is_hidden(path: AnyPath) -> bool:
    """Tell whether the name begins with a dot, as macOS's sidecars ``._NAME`` do: such files are never weights."""
    return path.name.startswith(".")


def open_files(paths: Sequence[AnyPath], io: str) -> list[TensorFile]:
    """Open the files of a checkpoint, remote ones in parallel."""
    if all(isinstance(path, RemotePath) for path in paths):
        return map_requests(lambda path: open_file(path, io), paths)
    return [open_file(path, io) for path in paths]


def open_file(path: AnyPath, io: str) -> TensorFile:
    """Open a file by the reader of its format: its ending decides or, if that is none of `ENDINGS`, its first bytes."""
    is_gguf = path.suffix.lower() == ".gguf"
    if path.suffix.lower() not in ENDINGS:
        with open_regular(path) as file:
            is_gguf = read_up_to(file, len(GGUF_MAGIC)) == GGUF_MAGIC
    return (GGUFFile if is_gguf else SafetensorsFile)(path, io)


# Folders


def _find_in_folder(folder: AnyPath) -> FileSet:
    weights = _weights_in(folder)
    if not weights and (folder / "snapshots").is_dir():
        return _find_in_folder(_snapshot_of(folder))
    found, doubts = _find_index(folder, weights)
    if found is None:
        files = _choose(folder, weights)
        found = FileSet(files, missing=list(_missing_parts(files)))
    beside = [file for file in weights if file not in found.files]
    return replace(found, beside=beside, doubts=[*doubts, *found.doubts])


def _weights_in(folder: AnyPath) -> list[AnyPath]:
    return [path for path in _inside(folder) if path.suffix.lower() in ENDINGS and not is_hidden(path)]


def _inside(folder: AnyPath) -> list[AnyPath]:
    return sorted([*folder.iterdir()], key=str)


def _snapshot_of(folder: AnyPath) -> AnyPath:
    """Return the snapshot that ``refs/main`` names in a repository's folder of the Hub's cache, or the only one."""
    there = [path for path in _inside(folder / "snapshots") if path.is_dir() and not is_hidden(path)]
    ref = folder / "refs" / "main"
    wanted = read_regular(ref, 4096).decode(errors="replace").strip() if ref.is_file() else None
    for path in there:
        if path.name == wanted or (wanted is None and len(there) == 1):
            return path
    listed = ", ".join(f"snapshots/{path.name}" for path in there) or "no folder in snapshots/"
    raise FileNotFoundError(f"{folder}: expected refs/main to name a snapshot, found {wanted!r}: open one of {listed}")


def _find_index(folder: AnyPath, weights: Sequence[AnyPath]) -> tuple[FileSet | None, list[str]]:
    """Return the files of the index that decides in a folder, if one does, and what is doubtful about it."""
    indexes = {
        path.name.lower(): path
        for path in _inside(folder)
        if path.name.lower().endswith(_INDEX) and not is_hidden(path)
    }
    single = next((file for file in weights if file.name.lower() == SINGLE and file.exists()), None)
    main = indexes.get("model" + _INDEX)
    if main is None:  # one of another name decides unless there are weights as transformers names them
        models = {file for file in weights if file.name.lower().startswith("model")}
        others = [read_index(path) for path in indexes.values()]
        if not others or models - {file for other in others for file in other.files}:
            return None, []
        if len(others) > 1:
            listed = ", ".join(path.name for path in indexes.values())
            raise CheckpointError(f"{folder}: several indexes, open one of them: {listed}")
        return _of_index(*others), []
    index = read_index(main)
    if single is None or single in index.files:
        return _of_index(index), []
    if not any(file.exists() for file in index.files):
        doubt = f"{main}: none of its {len(index.files)} files is there: {single.name} is opened instead"
        return FileSet([single]), [doubt]
    newer = ", which is newer" if single.stat().st_mtime_ns > main.stat().st_mtime_ns else ""
    doubt = (
        f"{main}: does not name {single.name}{newer}: the files of the index are opened, and transformers would load "
        f"{single.name}: remove one of them, or open {single.name} by its own name"
    )
    return _of_index(index), [doubt]


def _choose(folder: AnyPath, weights: Sequence[AnyPath]) -> list[AnyPath]:
    """Return the files of a folder without an index that are one model, as transformers chooses."""
    if not weights:
        below = [path for path in _inside(folder) if path.is_dir() and not is_hidden(path)]
        listed = ", ".join(path.name for path in below if _weights_in(path))
        hint = f"; there are some in {listed}" if listed else ""
        raise FileNotFoundError(f"{folder}: no {ENDINGS[0]} files in this folder, nor .uqff or .gguf ones{hint}")
    models = [file for file in weights if not file.name.lower().startswith(_EXTRA)] or weights
    ending = next(ending for ending in ENDINGS if any(file.suffix.lower() == ending for file in models))
    models = [file for file in models if file.suffix.lower() == ending]
    if single := [file for file in models if file.name.lower() == SINGLE]:
        return single
    named = [file for file in models if file.name.lower().startswith("model")] if ending != ".gguf" else []
    models = named or models
    sets = _sets(models)
    numbered = sum(_NUMBERED.fullmatch(file.name) is not None for file, *_ in sets.values())
    consolidated = any(file.name.lower().startswith("consolidated") for file in models)
    if len(sets) > 1 and (numbered > bool(named) or consolidated or ending == ".gguf"):
        listed = ", ".join(first.name + (" ..." if others else "") for first, *others in sets.values())
        raise CheckpointError(
            f"{folder}: expected one model, found {len(sets)}: {listed}: open one of them by its own name or as a list "
            "of its files, or move the others to another folder"
        )
    return models


def _set_of(file: AnyPath) -> tuple[str, ...]:
    match = _NUMBERED.fullmatch(file.name)
    return (match[1], str(int(match[3])), match[4].lower()) if match else (file.name,)


def _sets(files: Iterable[AnyPath]) -> dict[tuple[str, ...], list[AnyPath]]:
    """Group files by the numbered set that their names belong to; others are sets of one."""
    sets: dict[tuple[str, ...], list[AnyPath]] = {}
    for file in files:
        sets.setdefault(_set_of(file), []).append(file)
    return sets


def _missing_parts(files: Sequence[AnyPath]) -> Iterator[str]:
    """Yield a sentence for each numbered set that lacks parts."""
    for parts in _sets(files).values():
        match = _NUMBERED.fullmatch(parts[0].name)
        if match is None:
            continue
        there = {int(other[2]) for part in parts if (other := _NUMBERED.fullmatch(part.name))}
        total, start = int(match[3]), min(1, *there)
        expected = range(start, start + total)
        if lacking := total - sum(number in expected for number in there):
            first = list(islice((number for number in expected if number not in there), 3))
            names = ", ".join(f"{match[1]}-{n:0{len(match[2])}}-of-{match[3]}{match[4]}" for n in first)
            more = ", ..." if lacking > len(first) else ""
            yield (
                f"{parts[0].parent}: no {names}{more}: {lacking:,} of {total:,} files {match[1]}-* are missing, number "
                f"{first[0]} is the first"
            )


def _of_index(index: Index) -> FileSet:
    files, folder = index.files, index.path.parent
    missing = [name for name, file in index.named_files.items() if not file.exists()]
    if missing:
        listed = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        hint = f"; {SINGLE} is there, open it by its own name" if (folder / SINGLE).exists() else ""
        raise FileNotFoundError(
            f"{index.path}: {len(missing)} of the {len(files)} files it names are missing, download them: "
            f"{listed}{hint}"
        )
    return FileSet(files, index, doubts=list(_missing_parts(files)))
