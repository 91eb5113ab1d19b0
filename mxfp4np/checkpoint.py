"""Checkpoint: a mapping from logical tensor name to array, over one file, a folder of shards, or an index.

Finds the files, checks them against each other, and ties `container`, `layouts` and `array` together.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .array import MXFP4Array, swapped
from .backends import Backend, as_numpy, backend_for, get_backend
from .errors import CheckpointError, LayoutError, TensorNotFoundError
from .format import BLOCK_SIZE, BYTES_PER_BLOCK, as_dtype, decoded_dtype, split
from .layouts import LAYOUTS, Evidence, Packed, PackedTensor, find_tensors
from .storage.safetensors import (
    SAFETENSORS_DTYPES,
    SafetensorsFile,
    StoredTensor,
    TensorFile,
    array_shape,
    as_array,
    element,
    open_regular,
    stream_safetensors,
    write_safetensors,
)

PathLike = str | os.PathLike[str]

READ_BYTES: Final = 32 << 20
"""Decoded bytes at a time where tensors are read instead of mapped."""

PREFETCH_BYTES: Final = 256 << 10, 16 << 20
"""Packed bytes from which and up to which all pages of a map are asked for at once. The system reads ahead of fewer."""

WRITE_BYTES: Final = 16 << 20
"""Bytes at a time that are gathered from an array to be saved."""

JSON_LIMIT: Final = 100_000_000
"""Bytes of an index or config that are read; the format's own limit for a header."""

HALVES: Final = {"/gate": slice(0, None, 2), "/up": slice(1, None, 2)}
"""What is added to a name for one half of its rows, where gate and up alternate."""

_REQUIRED: Final = object()


class TensorInfo(NamedTuple):
    """What is known of a logical tensor without reading it."""

    name: str
    shape: tuple[int, ...]
    """Of the values."""
    dtype: str
    """``"MXFP4"``, or as the file's header spells it."""
    layout: str | None
    """Name of the layout of a packed tensor, None for a plain one."""
    stored: tuple[StoredTensor, ...]
    """The tensors in the files that hold it."""
    reason: str | None = None
    """Why a packed tensor has this layout."""

    @property
    def nbytes(self) -> int:
        """Bytes in the files; those of the whole tensor where the name stands for half of its rows."""
        return sum(tensor.nbytes for tensor in self.stored)

    def decoded_nbytes(self, dtype: DTypeLike = "bfloat16") -> int:
        """Return the bytes of the decoded array; those in the files for a plain tensor."""
        return self.nbytes if self.layout is None else math.prod(self.shape) * decoded_dtype(dtype).itemsize


class Checkpoint(Mapping[str, Any]):
    """A checkpoint, opened: headers read, data mapped on demand.

    Parameters
    ----------
    path : path, or sequence of paths
        A folder of ``.safetensors`` files, one such file, a list of them, or a ``.index.json``. A folder that has an
        index is opened by it; one without ``.safetensors`` files by its ``.uqff`` or else its ``.gguf`` files, which
        need the gguf extra.
    device : str
        Where arrays are wanted: ``"cpu"``, or ``"cuda"`` for CuPy's current device, or ``"cuda:1"``, with the extra
        cuda12 or cuda13 installed. What `get` and `chunks` return is a ``cupy.ndarray`` there; packed bytes cross the
        bus, and are decoded there.
    io : {"mmap", "pread"}
        Map the files, or read what is asked for. A mapped file must not be truncated while it is in use, or the
        operating system ends the process: use ``"pread"`` where that can happen, for instance on network shares.
    layout : str, optional
        The layout of all tensors that could have it by their names, for instance ``"quark"``; whether it fits is still
        checked. By default, and for all other tensors, it is found out.

    Raises
    ------
    FileNotFoundError
        If a file is missing, or a folder has none.
    CheckpointError
        If a file is malformed, or files contradict each other.
    BackendUnavailableError
        If the device needs a package that is not installed.

    Examples
    --------
    >>> import tempfile, numpy as np, mxfp4np
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> packed = mxfp4np.MXFP4Array(np.full((2, 1, 16), 0x21, np.uint8), np.array([[127], [128]], np.uint8))
    >>> mxfp4np.save_file({"w": packed, "bias": np.zeros(2, np.float32)}, path)
    >>> with mxfp4np.Checkpoint(path) as ckpt:
    ...     sorted(ckpt), ckpt.get("w", dtype="float32", index=np.s_[1, :4])
    (['bias', 'w'], array([1., 2., 1., 2.], dtype=float32))
    """

    def __init__(
        self,
        path: PathLike | Sequence[PathLike],
        device: str = "cpu",
        *,
        io: str = "mmap",
        layout: str | None = None,
    ) -> None:
        if layout is not None and layout not in (names := [known.name for known in LAYOUTS]):
            raise ValueError(f"layout must be one of {', '.join(names)}, found {layout!r}")
        if io not in ("mmap", "pread"):
            raise ValueError(f"io must be 'mmap' or 'pread', found {io!r}")
        self.device, self._backend = device, get_backend(device=device)
        files, index = _find_files(path)
        self._arguments = (index or files, device, io, layout)
        self._index, self._folder = index, (index or files[0]).parent
        self._files: list[TensorFile] = []
        self._stored: dict[str, StoredTensor] = {}
        for file in files:
            self._add(_open_file(file, io))
        if index is not None:
            _check_index(index, self._stored)
        self._evidence = Evidence(self._stored, self.metadata, self._beside, layout)
        self._tensors = find_tensors(self._evidence)
        self._resolved: dict[str, Packed | StoredTensor] = {}

    def _add(self, file: TensorFile) -> None:
        for name in file.tensors.keys() & self._stored.keys():
            raise CheckpointError(
                f"tensor {name!r} is in both {self._stored[name].file.path} and {file.path}: open one of them, or the "
                "index that says which"
            )
        self._files.append(file)
        self._stored.update(file.tensors)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, self._arguments

    @property
    def _device(self) -> str | None:
        """Where to decode, if that is not up to the output."""
        return None if self.device == "cpu" else self.device

    # Mapping

    def __getitem__(self, name: str) -> Any:
        """Return the tensor: `get` without options."""
        return self.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors or self._split(name) is not None

    # Context manager

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files, and of pinned memory. Arrays that were handed out stay valid."""
        for file in self._files:
            file.close()
        self._backend.release()

    def __repr__(self) -> str:
        return f"<Checkpoint of {len(self)} tensors in {len(self._files)} files at {str(self._folder)!r}>"

    # What is there

    @property
    def files(self) -> list[Path]:
        """The files it consists of."""
        return [file.path for file in self._files]

    @property
    def index(self) -> Path | None:
        """The index that it was opened by, if there is one."""
        return self._index

    @property
    def folder(self) -> Path:
        """Where they are: the place of the index if there is one, or of the first file."""
        return self._folder

    @property
    def stamps(self) -> tuple[tuple[str, int, int], ...]:
        """Name, size and time of change in nanoseconds of each file, when it was opened."""
        return tuple((file.path.name, *file.stamp) for file in self._files)

    @property
    def metadata(self) -> dict[str, str]:
        """The ``__metadata__`` of all files, merged; where files differ, the first one's."""
        merged: dict[str, str] = {}
        for file in reversed(self._files):
            merged.update(file.metadata)
        return merged

    @property
    def config(self) -> dict[str, Any]:
        """The ``config.json`` beside the files, empty if there is none.

        Raises
        ------
        CheckpointError
            If it is not a JSON object.
        """
        return self._beside("config.json") or {}

    def _beside(self, file: str) -> dict[str, Any] | None:
        """Return the JSON object in a file beside the tensors, if there is such a file."""
        path = self._folder / file
        return read_json(path) if path.exists() else None

    @property
    def stored(self) -> Mapping[str, NDArray[Any]]:
        """The tensors as the files name them, raw: read-only views, packed halves as they are."""
        return _Stored(self._stored)

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype, layout and place of a tensor, from the headers alone.

        Raises
        ------
        TensorNotFoundError
            If there is none of this name.
        LayoutError
            If it is a broken pair, or could be in several layouts.
        """
        tensor, rows = self._find(name)
        shape = list(tensor.shape)
        if rows is not None:
            axis = -2 if isinstance(tensor, Packed) else -1
            shape[axis] = len(range(shape[axis])[rows])
        if isinstance(tensor, Packed):
            return TensorInfo(name, tuple(shape), "MXFP4", tensor.layout.name, tensor.stored, tensor.reason)
        return TensorInfo(name, tuple(shape), tensor.dtype, None, (tensor,))

    # Arrays

    def get(
        self,
        name: str,
        default: Any = _REQUIRED,
        *,
        dtype: DTypeLike | None = None,
        out: NDArray[Any] | None = None,
        index: Any = None,
        transpose: bool = False,
        backend: str | None = None,
        num_threads: int | None = None,
    ) -> Any:
        """Return a tensor, packed ones decoded.

        Parameters
        ----------
        name : str
            Logical name, for instance ``"block.0.mlp.mlp1_weight"``. The rows of gpt-oss's ``mlp1_weight`` and
            ``gate_up_proj``, and their biases, alternate between gate and up: ``"/gate"`` or ``"/up"`` behind the name
            is one half of them.
        default : optional
            Returned for an unknown name; without it, that is an error.
        dtype : str, type or numpy.dtype, optional
            Of packed tensors bfloat16, float16 or float32, bfloat16 by default. A plain tensor comes in its stored
            dtype, or as a converted copy if another is asked for.
        out : numpy.ndarray, optional
            Where to write; see `MXFP4Array.decode`.
        index : optional
            A basic index, as from ``numpy.s_``: nothing else is read or decoded. The last axis of a packed tensor
            takes a slice of step 1.
        transpose : bool
            Swap the last two axes of what the index leaves.
        backend, num_threads : optional
            See `MXFP4Array.decode`.

        Returns
        -------
        numpy.ndarray or cupy.ndarray
            A new array or ``out``. On the CPU, for a plain tensor with neither ``dtype`` nor ``out``, a read-only view
            of the file.

        Raises
        ------
        TensorNotFoundError
            If there is no such tensor and no default.
        DeviceMemoryError
            If the device has too little memory left.
        LayoutError
            If the tensor is a broken pair, or could be in several layouts.
        CheckpointError
            If the file changed after it was opened.
        IndexError, ValueError
            If an argument does not fit.
        """
        if default is not _REQUIRED and name not in self:
            return default
        tensor, rows = self._find(name)
        if isinstance(tensor, StoredTensor):
            stored = _stored_array(tensor, index, rows)
            return _plain(stored.swapaxes(-1, -2) if transpose else stored, dtype, out, self._backend)
        source = _PackedSource(tensor, rows)
        array = source.array if index is None else source.array[index]
        where: dict[str, Any] = {"backend": backend, "device": self._device, "num_threads": num_threads}
        if not source.copies:
            source.prefetch(array)
            return source.load(array).decode(dtype, out=out, transpose=transpose, **where)
        worker = backend_for(array.blocks, out, backend, self._device)
        out, target = array.prepare_out(dtype, out, transpose=transpose, worker=worker)
        for place, part in array.chunks(READ_BYTES, out.dtype):
            source.load(part).decode(out=target[place], **where)
        return out

    def packed(self, name: str) -> MXFP4Array:
        """Return a packed tensor without decoding it: a view of the file.

        Scales are a copy where no view of them is E8M0: those that torchao swizzled, and those of Quark's old ``mx``.

        Raises
        ------
        TensorNotFoundError
            If there is no such tensor.
        LayoutError
            If it is not packed, a broken pair, or could be in several layouts.
        """
        tensor, rows = self._find(name)
        if isinstance(tensor, StoredTensor):
            raise LayoutError(f"{tensor.file.path}: tensor {name!r} is plain {tensor.dtype}, not MXFP4: use get()")
        source = _PackedSource(tensor, rows)
        return source.load(source.array)

    def chunks(
        self,
        name: str,
        max_bytes: int = 256 << 20,
        *,
        dtype: DTypeLike | None = None,
        transpose: bool = False,
        backend: str | None = None,
        num_threads: int | None = None,
    ) -> Iterator[tuple[tuple[int | slice, ...], NDArray[Any]]]:
        """Yield a tensor piece by piece, for outputs larger than memory.

        Parameters
        ----------
        name : str
        max_bytes : int
            Of one piece, decoded.
        dtype, transpose, backend, num_threads : optional
            As for `get`.

        Yields
        ------
        index : tuple of int and slice
            Where the piece belongs: ``whole[index] = piece`` for every piece, in C order, fills the whole.
        piece : numpy.ndarray or cupy.ndarray
        """
        where: dict[str, Any] = {"backend": backend, "device": self._device, "num_threads": num_threads}
        for index, piece in self.pieces(name, max_bytes, dtype=dtype, transpose=transpose):
            if isinstance(piece, MXFP4Array):
                yield index, piece.decode(dtype, transpose=transpose, **where)
            else:
                yield index, _plain(np.asarray(piece), dtype, None, self._backend)

    def pieces(
        self, name: str, max_bytes: int, *, dtype: DTypeLike | None = None, transpose: bool = False
    ) -> Iterator[tuple[tuple[int | slice, ...], Any]]:
        """Yield a tensor as `chunks` does, but still packed, for the caller to decode.

        Parameters
        ----------
        name, max_bytes, dtype, transpose
            As for `chunks`.

        Yields
        ------
        index : tuple of int and slice
            Where the decoded piece belongs: in the transposed array if ``transpose``.
        piece : MXFP4Array or numpy.ndarray
            Packed ones as they are stored, not yet transposed; those of a plain tensor are, and have its dtype.
        """
        tensor, rows = self._find(name)
        if isinstance(tensor, StoredTensor):
            itemsize = max(1, element(tensor.dtype)[0] // 8) if dtype is None else as_dtype(dtype).itemsize
            shape = array_shape(tensor) if rows is None else self.info(name).shape
            for place, index in _cuts(shape, itemsize, max_bytes, transpose=transpose):
                part = _stored_array(tensor, index or ..., rows)
                yield place, part.swapaxes(-1, -2) if transpose else part
            return
        source = _PackedSource(tensor, rows)
        itemsize = decoded_dtype("bfloat16" if dtype is None else dtype).itemsize
        cuts = _cuts(source.array.shape, itemsize, max_bytes, transpose=transpose, unit=BLOCK_SIZE)
        ready = None
        for cut in chain(cuts, [None]):  # a piece is read ahead while the caller has the one before
            if cut is not None:
                source.prefetch(part := source.array[cut[1]])
            if ready is not None:
                yield ready[0], source.load(ready[1])
            ready = cut and (cut[0], part)

    def _find(self, name: str) -> tuple[StoredTensor | Packed, slice | None]:
        """Return a tensor, and which of its rows the name stands for if not for all."""
        rows = None
        try:
            tensor = self._tensors[name]
        except (KeyError, TypeError):
            split = self._split(name)
            if split is None:
                raise TensorNotFoundError(self._not_found(name)) from None
            whole, rows = split
            tensor = self._tensors[whole]
        if not isinstance(tensor, PackedTensor):
            return tensor, rows
        if tensor.name not in self._resolved:
            self._resolved[tensor.name] = tensor.resolve(self._evidence)
        return self._resolved[tensor.name], rows

    def _split(self, name: object) -> tuple[str, slice] | None:
        """Return the whole tensor and the rows that the name of a half stands for."""
        for ending, rows in HALVES.items():
            if (
                isinstance(name, str)
                and name.endswith(ending)
                and (whole := name.removesuffix(ending)) in self._tensors
            ):
                for weight, bias in (layout.gate_up for layout in LAYOUTS if layout.gate_up):
                    weights = self._tensors.get(whole.removesuffix(bias) + weight if whole.endswith(bias) else whole)
                    if isinstance(weights, PackedTensor) and weights.name.endswith(weight) and weights.alternates:
                        return whole, rows
        return None

    def _not_found(self, name: object) -> str:
        where = f"no tensor {name!r} in {self._folder}"
        if not isinstance(name, str):
            return f"{where}: names are strings"
        if name in self._stored:
            tensors = (tensor for tensor in self._tensors.values() if isinstance(tensor, PackedTensor))
            stem = next(tensor.name for tensor in tensors if name in [half.name for half in tensor.stored])
            return f"{where}: it is the packed half of {stem!r}; raw halves are in .stored"
        from difflib import get_close_matches

        # Comparing is slow: of a large checkpoint, look at names that end alike.
        names: Sequence[str] = list(self._tensors)
        if len(names) > 5000:
            ending = name.rpartition(".")[2]
            names = list(islice((other for other in names if other.endswith(ending)), 5000))
        close = get_close_matches(name, names, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"it has {len(self):,} tensors"
        return f"{where}: {hint}"


def _cuts(
    shape: tuple[int, ...], itemsize: int, max_bytes: int, *, transpose: bool, unit: int = 1
) -> Iterator[tuple[tuple[int | slice, ...], tuple[int | slice, ...]]]:
    """Cut an array that is wanted transposed or not; yield indices of the wanted and of the stored array.

    What is stored as the last axis is cut at multiples of ``unit``.
    """
    if not transpose:
        yield from ((index, index) for index in split(shape, itemsize, max_bytes, (unit,)))
        return
    if len(shape) < 2:
        raise ValueError(f"transpose needs two axes or more, found shape {shape}")
    for index in split(swapped(shape), itemsize, max_bytes, (unit, 1)):
        *lead, i, j = (
            k if n < len(shape) - 2 or isinstance(k, slice) else slice(k, k + 1) for n, k in enumerate(index)
        )
        yield (*lead, i, j), (*lead, j, i)


class _Stored(Mapping[str, Any]):
    """Raw arrays by stored name."""

    def __init__(self, tensors: dict[str, StoredTensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Any:
        return _stored_array(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _PackedSource:
    """A packed tensor, to be indexed first and loaded after."""

    def __init__(self, tensor: Packed, rows: slice | None) -> None:
        codes, scales, layout = tensor.codes, tensor.scales, tensor.layout
        self._codes, self._scales, self._layout = codes, scales, layout
        self._base = codes.file.view(codes)
        blocks = self._base.reshape(tensor.blocks)
        if scales is None:
            self._scales_base = self._base
            self.array = MXFP4Array(blocks[..., 1:], blocks[..., 0], layout.order)
        else:
            self._scales_base = scales.file.view(scales)
            if layout.swizzled:  # a copy of scales that lie scattered
                self._scales_base = scales.file.read(scales, self._scales_base, self._scales_base)
            self.array = MXFP4Array(blocks, layout.view_scales(self._scales_base, tensor.blocks), layout.order)
        if rows is not None:
            self.array = self.array[..., rows, :]
        self.copies = codes.file.io == "pread"

    def prefetch(self, part: MXFP4Array) -> None:
        """Announce that ``part``, any view of ``array``, is going to be decoded, unless it is read by large pieces."""
        fewest, most = PREFETCH_BYTES
        if not fewest <= part.nbytes <= most:
            return
        if self._scales is not None:
            self._scales.file.prefetch(part.scales)
        self._codes.file.prefetch(part.blocks)

    def load(self, part: MXFP4Array) -> MXFP4Array:
        """Return ``part``, any view of ``array``, with its bytes in reach."""
        codes, blocks, scales = self._codes, part.blocks, part.scales
        if self._scales is None:
            if codes.file.io == "pread":  # block by block, scale and codes at once
                shape, strides = (*scales.shape, 1 + BYTES_PER_BLOCK), (*scales.strides, 1)
                whole = np.lib.stride_tricks.as_strided(scales, shape, strides)
                whole = codes.file.read(codes, self._base, whole)
                blocks, scales = whole[..., 1:], whole[..., 0]
        else:
            if not self._layout.swizzled:
                scales = self._scales.file.read(self._scales, self._scales_base, scales)
            blocks = codes.file.read(codes, self._base, blocks)
        if self._layout.bias:
            scales = scales + np.uint8(self._layout.bias)  # modulo 256: what is stored is signed
        return part.replace(blocks, scales)


def _stored_array(tensor: StoredTensor, index: Any = None, rows: slice | None = None) -> Any:
    base = tensor.file.view(tensor)
    array = as_array(base, tensor)
    if rows is not None:
        array = tensor.file.read(tensor, base, array)[..., rows]
        return array if index is None else array[index]
    if index is None:
        return tensor.file.read(tensor, base, array)
    part = array[index]
    if isinstance(part, np.ndarray) and np.may_share_memory(part, base):
        return tensor.file.read(tensor, base, part)
    return tensor.file.read(tensor, base, array)[index]  # a scalar, or a copy by an advanced index


def _plain(array: Any, dtype: DTypeLike | None, out: NDArray[Any] | None, worker: Backend) -> Any:
    if out is not None:
        worker.check_out(out)
        if out.shape != array.shape or (dtype is not None and out.dtype != as_dtype(dtype)):
            expected = f"shape {array.shape}" + (f" and dtype {as_dtype(dtype)}" if dtype is not None else "")
            raise ValueError(f"out must have {expected}, found {out.shape} and {out.dtype}")
        dtype = out.dtype
    if dtype is None:
        return worker.asarray(array)
    if array.dtype.kind == "c" and as_dtype(dtype).kind != "c":
        raise ValueError(f"complex values cannot become {as_dtype(dtype)}")
    if out is None:
        return worker.asarray(array.astype(as_dtype(dtype), copy=False))
    worker.store(array, out)
    return out


def _reopen(path: PathLike | Sequence[PathLike], device: str, io: str, layout: str | None) -> Checkpoint:
    return Checkpoint(path, device, io=io, layout=layout)


# Finding files


def _open_file(path: Path, io: str) -> TensorFile:
    if path.suffix == ".gguf":
        from .storage.gguf import GGUFFile

        return GGUFFile(path, io)
    return SafetensorsFile(path, io)


def _find_files(path: PathLike | Sequence[PathLike]) -> tuple[list[Path], Path | None]:
    """Return the files of a checkpoint, and its index if it has one."""
    if not isinstance(path, str | os.PathLike):
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
        return _index_files(path), path
    return [path], None


def _find_index(folder: Path) -> Path | None:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    preferred = folder / "model.safetensors.index.json"
    if len(indexes) > 1 and preferred not in indexes:
        raise CheckpointError(f"{folder}: several indexes, open one of them: {', '.join(i.name for i in indexes)}")
    return preferred if preferred in indexes else next(iter(indexes), None)


def weight_map_of(index: Path) -> dict[str, str]:
    """Return which file an index says each tensor is in."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: expected an object 'weight_map' of tensor names and files, found {weight_map!r}"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or PurePosixPath(file).is_absolute() or ".." in Path(file).parts:
            raise CheckpointError(f"{index}: tensor {name!r}: expected a file below this folder, found {file!r}")
    return weight_map


def _index_files(index: Path) -> list[Path]:
    names = sorted(set(weight_map_of(index).values()))
    files = [index.parent / name for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if not file.exists()]
    if missing:
        listed = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise FileNotFoundError(f"{index}: {len(missing)} of the {len(files)} files it names are missing: {listed}")
    return files


def _check_index(index: Path, stored: Mapping[str, StoredTensor]) -> None:
    for name, file in weight_map_of(index).items():
        if name not in stored:
            raise CheckpointError(f"{index}: tensor {name!r}: expected in {file!r}, found in none of the files")
        found = stored[name].file.path
        if found != index.parent / file:
            raise CheckpointError(f"{index}: tensor {name!r}: expected in {file!r}, found in {found.name!r}")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, refusing anything else."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > JSON_LIMIT:
            raise CheckpointError(f"{path}: expected a JSON file of at most {JSON_LIMIT:,} bytes, found a larger one")
        text = file.read()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


# Whole files


def load_file(path: PathLike | Sequence[PathLike], device: str = "cpu") -> dict[str, NDArray[Any]]:
    """Return all tensors of a checkpoint, packed ones decoded to bfloat16.

    Parameters
    ----------
    path, device
        As for `Checkpoint`.

    Returns
    -------
    dict of str to numpy.ndarray or cupy.ndarray
        On the CPU, plain tensors are read-only views of the files.

    Examples
    --------
    >>> import tempfile, numpy as np, mxfp4np
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> mxfp4np.save_file({"bias": np.arange(3, dtype=np.int16)}, path)
    >>> mxfp4np.load_file(path)
    {'bias': array([0, 1, 2], dtype=int16)}
    """
    with Checkpoint(path, device) as checkpoint:
        return dict(checkpoint)


def save_file(
    tensors: Mapping[str, NDArray[Any] | MXFP4Array] | Iterable[tuple[str, NDArray[Any] | MXFP4Array]],
    path: PathLike,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file.

    Parameters
    ----------
    tensors : mapping of str to numpy.ndarray or MXFP4Array, or iterable of such pairs
        Arrays of any strides and byte order; those of CuPy are copied to the host. An `MXFP4Array` becomes the pair
        ``name.blocks`` and ``name.scales``. Those of an iterable lie in the file as they come, and each is let go of
        when the next has come; of a mapping, those with the widest elements come first, so that every tensor is
        aligned.
    path : path
        The file appears, or replaces an older one, only when it is complete.
    metadata : mapping of str to str, optional

    Raises
    ------
    ValueError
        If the format has no name for a dtype, a packed array begins or ends mid-block, or two names are the same.

    Examples
    --------
    >>> import tempfile, numpy as np, mxfp4np
    >>> packed = mxfp4np.MXFP4Array(np.zeros((2, 16), np.uint8), np.zeros(2, np.uint8))
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> mxfp4np.save_file({"w": packed, "bias": np.ones(3)}, path)
    >>> mxfp4np.Checkpoint(path)["bias"]
    array([1., 1., 1.])
    >>> mxfp4np.save_file(((f"layer.{i}", np.full(2, i)) for i in range(3)), path)
    >>> mxfp4np.Checkpoint(path)["layer.2"]
    array([2, 2])
    """
    if not isinstance(tensors, Mapping):
        pairs = (part for name, tensor in tensors for part in _to_store(name, tensor))
        streamed = ((name, SAFETENSORS_DTYPES[x.dtype.name], x.shape, _pieces_of(x)) for name, x in pairs)
        stream_safetensors(Path(path), streamed, metadata)
        return
    arrays: dict[str, NDArray[Any]] = {}
    for name, tensor in tensors.items():
        for key, array in _to_store(name, tensor):
            if key in arrays:
                raise ValueError(f"two tensors would both be called {key!r}")
            arrays[key] = array
    # Widest elements first, so that every tensor is aligned.
    arrays = dict(sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])))
    specs = {name: (SAFETENSORS_DTYPES[array.dtype.name], array.shape) for name, array in arrays.items()}
    pieces = (piece for array in arrays.values() for piece in _pieces_of(array))
    write_safetensors(Path(path), specs, pieces, metadata)


def _to_store(name: str, tensor: NDArray[Any] | MXFP4Array) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield what a tensor is stored as."""
    if isinstance(tensor, MXFP4Array):
        if tensor.start or tensor.shape[-1] % BLOCK_SIZE:
            raise ValueError(f"tensor {name!r}: packed arrays are saved in whole blocks, found {tensor!r}")
        layout = LAYOUTS[0]
        yield f"{name}{layout.codes}", as_numpy(tensor.in_pairs().blocks)
        yield f"{name}{layout.scales}", as_numpy(tensor.scales)
        return
    array = as_numpy(tensor)
    if array.dtype.name not in SAFETENSORS_DTYPES:
        raise ValueError(f"tensor {name!r}: safetensors has no dtype for {array.dtype}")
    yield name, array


def _pieces_of(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for index in split(array.shape, array.itemsize, WRITE_BYTES):
        yield np.ascontiguousarray(array[index], dtype=array.dtype.newbyteorder("="))
