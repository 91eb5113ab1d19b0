"""Checkpoint: a mapping from logical tensor names to arrays, over one file, a folder of shards, or an index.

It opens the files that `storage.discover` finds, and gives each tensor in the layout that `layouts` finds for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from itertools import islice
from typing import Any, Final, Literal, Self, TypedDict, TypeVar, Unpack, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .array import MXFP4Array
from .backends import backend_for, device_name, get_backend
from .blocks import BlockArray
from .errors import CheckpointWarning, LayoutError, TensorNotFoundError
from .format import TorchDType, as_dtype, decoded_dtype
from .layouts.find import Documents, split_gate_up, stored_of
from .layouts.names import Names, as_names, find_named
from .layouts.others import CHECKED, Others
from .layouts.packed import PlainReader, Reader, TensorInfo
from .layouts.resolve import Resolver, Tensor
from .layouts.scaled import ScaledCandidate
from .layouts.table import LAYOUTS
from .scaled import ScaledArray
from .shapes import split_both
from .shard import CheckpointShard
from .storage.discover import IO, Location, find_files, open_files
from .storage.index import merge_tensors
from .storage.jsonfile import read_json
from .storage.named import named
from .storage.remote import AnyPath
from .storage.tensorfile import DTYPES, StoredArrays, StoredTensor, element
from .summary import table_of
from .text import count, parse_bytes

READ_BYTES: Final = 32 << 20
"""Largest chunk, in decoded bytes, that is read at a time from files that are not mapped."""

_REQUIRED: Final = object()

_Out = TypeVar("_Out", bound=NDArray[Any])
_Scalar = TypeVar("_Scalar", bound=np.generic)
_Default = TypeVar("_Default")


class _Options(TypedDict, total=False):
    """Arguments of `Checkpoint.get` that say nothing about the dtype of the result."""

    index: Any
    transpose: bool
    backend: str | None
    num_threads: int | None


class Checkpoint(Mapping[str, NDArray[Any]]):
    """An open checkpoint: headers are read, data is mapped when it is needed.

    Parameters
    ----------
    path : path, URL, store, or sequence of these
        A folder of ``.safetensors`` files, one such file, a list of them, or a ``.index.json``. In a folder, an index
        decides which files are opened, or else their names: ``model.safetensors``, or all of ``model*.safetensors``, or
        all others but adapters. Without ``.safetensors`` files, its ``.uqff`` or else its ``.gguf`` files are opened;
        the latter need the gguf extra. The first part of a split GGUF file stands for all parts, and a repository's
        folder in the Hub's cache for the snapshot that ``refs/main`` names. A URL, ``s3://``, ``gs://``, ``az://``,
        ``https://`` or ``hf://OWNER/NAME``, or a store of obstore, needs the remote extra; what is asked for is read.
    device : str, torch.device or cupy.cuda.Device
        Where arrays are returned: ``"cpu"``, or ``"cuda"`` for CuPy's current device, or ``"cuda:1"``, with the extra
        cuda12 or cuda13 installed. `get` and `chunks` then return ``cupy.ndarray``; packed bytes are copied to the
        device and decoded there.
    io : {"mmap", "pread"}
        Map the files, or read what is asked for. If a mapped file is truncated while it is in use, the operating system
        kills the process: use ``"pread"`` where that can happen, for instance on network shares.
    layout : str, optional
        The layout of all tensors whose names match it, for instance ``"quark"``; shapes and dtypes are still checked.
        By default, and for all other tensors, it is detected.
    names : mapping, or callable, optional
        For conventions that no layout knows: logical names, and for each a stored name, or a pair of them, codes and
        scales; or a function from stored to logical names. Dtypes and shapes are checked as in any layout.

    Attributes
    ----------
    device : str
        As text.
    files : list of Path or RemotePath
    index : Path, RemotePath or None
        The index that named the files.
    unlisted : list of str
        Names of stored tensors that the index does not name.
    beside : list of Path or RemotePath
        Files of weights in the same folder that are not part of the checkpoint.
    findings : list of str
        What is missing, or doubtful about the choice of files, a sentence each.
    notes : list of str
        How the files differ from what ``path`` names, a sentence each.
    incomplete : bool
        Whether the folder, or the split GGUF file, lacks parts of a numbered set.
    folder : Path or RemotePath
        Of the index, or else of the first file.
    stamps : tuple of (str, int, int, int)
        Of each file as it was opened: name, size in bytes, times of the last changes of its bytes and of its inode in
        nanoseconds; of a remote file its ETag, or on the Hub its commit, instead of the latter.
    metadata : dict of str to str
        The ``__metadata__`` of all files, merged; of values that differ, that of the first file.

    Raises
    ------
    FileNotFoundError
        If a file is missing, or a folder has none.
    CheckpointError
        If a file is malformed, or files contradict each other.
    RemoteError
        If a server cannot be reached, or does not answer as it should.
    LayoutError
        If two tensors would have the same name, or ``layout`` matches no tensor.
    BackendUnavailableError
        If the device needs a package that is not installed.

    Warns
    -----
    CheckpointWarning
        For each of the findings, if the files were not named one by one.

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
        path: Location | Sequence[Location],
        device: Any = "cpu",
        *,
        io: IO = "mmap",
        layout: str | None = None,
        names: Names | Callable[[str], str] | None = None,
    ) -> None:
        if layout is not None and layout not in (known := [x.name for x in LAYOUTS]):
            raise ValueError(f"layout must be one of {', '.join(known)}, found {layout!r}")
        if io not in ("mmap", "pread"):
            raise ValueError(f"io must be 'mmap' or 'pread', found {io!r}")
        self.device: str = "cpu" if device is None else str(device_name(device))
        # On the host it only checks and copies arrays, for which Numba need not be imported.
        self._backend = get_backend("numpy" if self.device == "cpu" else None, self.device)
        found = find_files(path)
        self.files, self.beside = found.files, found.beside
        self.index = None if found.index is None else found.index.path
        self.findings, self.notes = found.findings, found.notes
        self.incomplete = bool(found.missing) and not found.named
        self.folder = (self.index or self.files[0]).parent
        self._files = open_files(self.files, io)
        self._stored = merge_tensors(self._files, found.index)
        self.unlisted = [name for name in self._stored if found.index and name not in found.index.weight_map]
        if (parts := max(file.parts for file in self._files)) > len(self._files) and not found.missing:
            self.findings.append(
                f"{self.files[0]}: the header says that it is one of {parts:,} files, {len(self.files)} opened: open "
                "all of them as a list, or under numbered names"
            )
        self.stamps = tuple((file.path.name, *file.stamp) for file in self._files)
        self.metadata = {key: text for file in reversed(self._files) for key, text in file.metadata.items()}
        documents = Documents(self.metadata, self._read_beside)
        names = as_names({} if names is None else names, self._stored)
        self._others = Others(self._stored, documents)
        self._tensors = find_named(self._stored, documents, names, self._others, self._others.found.values())
        self._reopen = partial(Checkpoint, self.index or self.files, self.device, io=io, layout=layout, names=names)
        self._resolver = Resolver(self._others, documents, layout)
        self._resolved: dict[str, Tensor] = {}
        if layout is not None:
            self._check_forced(layout)
        for finding in self.findings if not found.named else ():
            warnings.warn(finding, CheckpointWarning, stacklevel=2)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reopen, ()

    # Mapping

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return the tensor: `get` without options."""
        return self.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors or split_gate_up(name, self._tensors) is not None

    # A mapping compares values, which would decode both checkpoints.
    __eq__, __hash__ = object.__eq__, object.__hash__

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the files, and pinned memory. Arrays that were returned stay valid."""
        for file in self._files:
            file.close()
        self._backend.release()

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)

    def _repr_html_(self) -> str:
        return table_of(self, repr(self).strip("<>"))

    def __repr__(self) -> str:
        found = f"{count(len(self), 'tensor')} in {count(len(self._files), 'file')}"
        return f"<Checkpoint of {found} at {str(self.folder)!r}>"

    # Headers

    @property
    def config(self) -> dict[str, Any]:
        """The ``config.json`` beside the files, empty if there is none.

        Raises
        ------
        CheckpointError
            If it is not a JSON object.
        """
        return self._read_beside("config.json") or {}

    @named(None, "read")
    def _read_beside(self, file: str) -> dict[str, Any] | None:
        """Return the JSON object in a file of the folder, None if there is no such file."""
        path = self.folder / file
        return read_json(path) if path.exists() else None

    @property
    def stored(self) -> Mapping[str, NDArray[Any]]:
        """The tensors as the files name and store them, codes and scales by their own names: read-only views."""
        return StoredArrays(self._stored)

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype, layout, format and place of a tensor, from the headers alone.

        Raises
        ------
        TensorNotFoundError
            If there is none of this name.
        LayoutError
            If its codes and scales do not fit each other, or if it could have several layouts.
        """
        tensor, rows = self._find(name)
        shape = list(tensor.shape)
        if rows is not None:
            axis = -1 if isinstance(tensor, StoredTensor) else -2
            shape[axis] = len(range(shape[axis])[rows])
        if not isinstance(tensor, StoredTensor):
            return TensorInfo(
                name,
                tuple(shape),
                tensor.format,
                tensor.layout.name,
                tensor.stored,
                tensor.reason,
                tensor.format,
                tensor.unit,
            )
        return TensorInfo(name, tuple(shape), tensor.dtype, None, (tensor,), format=self._others.format_of(tensor))

    def stored_tensors(self, name: str) -> tuple[StoredTensor, ...]:
        """Return the stored tensors that a logical one consists of, whether or not they fit each other.

        Raises
        ------
        TensorNotFoundError
            If there is none of this name.
        """
        if name not in self._tensors:
            raise TensorNotFoundError(self._not_found(name))
        tensor = self._tensors[name]
        return stored_of(tensor)

    def changed_files(self) -> list[AnyPath]:
        """Return the files that are no longer those that were opened."""
        return [file.path for file in self._files if not file.is_unchanged()]

    def format_of(self, name: str) -> str | None:
        """Return the format of a logical tensor, whether or not its stored ones fit each other; see `TensorInfo`."""
        found = self._tensors[name]
        if isinstance(found, StoredTensor):
            return self._others.format_of(found)
        return found.format if isinstance(found, ScaledCandidate) else "MXFP4"

    # Arrays

    @overload  # type: ignore[override]
    def get(self, name: str, dtype: Any = None, *, out: _Out, **options: Unpack[_Options]) -> _Out: ...
    @overload
    def get(self, name: str, dtype: Literal["float32"], **options: Unpack[_Options]) -> NDArray[np.float32]: ...
    @overload
    def get(self, name: str, dtype: Literal["float16"], **options: Unpack[_Options]) -> NDArray[np.float16]: ...
    @overload
    def get(
        self, name: str, dtype: type[_Scalar] | np.dtype[_Scalar], **options: Unpack[_Options]
    ) -> NDArray[_Scalar]: ...
    @overload
    def get(
        self, name: str, dtype: DTypeLike | TorchDType | None = None, *, out: None = None, **options: Unpack[_Options]
    ) -> NDArray[Any]: ...
    @overload
    def get(
        self,
        name: str,
        dtype: DTypeLike | TorchDType | None = None,
        *,
        default: _Default,
        out: NDArray[Any] | None = None,
        **options: Unpack[_Options],
    ) -> NDArray[Any] | _Default: ...
    def get(
        self,
        name: str,
        dtype: DTypeLike | TorchDType | None = None,
        *,
        default: Any = _REQUIRED,
        out: NDArray[Any] | None = None,
        index: Any = None,
        transpose: bool = False,
        backend: str | None = None,
        num_threads: int | None = None,
    ) -> Any:
        """Return a tensor, decoded if it is packed.

        Parameters
        ----------
        name : str
            Logical name, for instance ``"block.0.mlp.mlp1_weight"``. The rows of gpt-oss's ``mlp1_weight`` and
            ``gate_up_proj``, and their biases, alternate between gate and up: append ``"/gate"`` or ``"/up"`` to the
            name for one half of them.
        dtype : str, type, numpy.dtype or torch.dtype, optional
            For packed tensors bfloat16 (the default), float16 or float32. A plain tensor is returned in its stored
            dtype, or as a converted copy in another. Codes of other formats, such as INT4, are returned as stored only.
        default : optional
            Returned for an unknown name; without it, that is an error. By keyword only, unlike that of a dict's `get`.
        out : numpy.ndarray, optional
            Where to write; see `MXFP4Array.decode`.
        index : optional
            An index as from ``numpy.s_``; only what it selects is read and decoded. The leading axes also take lists
            and masks: ``[0, 2]`` are two experts. The last axis of a packed tensor takes a slice of step 1.
        transpose : bool
            Swap the last two axes of the indexed tensor.
        backend, num_threads : optional
            See `MXFP4Array.decode`.

        Returns
        -------
        numpy.ndarray or cupy.ndarray
            ``out``, or a new array. On the CPU, a plain tensor without ``dtype`` and ``out`` is a read-only view of the
            file.

        Raises
        ------
        TensorNotFoundError
            If there is no such tensor and no default.
        DeviceMemoryError
            If the device has too little memory left.
        LayoutError
            If codes and scales do not fit each other, if the tensor could have several layouts, or if another dtype is
            asked for than that of codes that are not decoded.
        CheckpointError
            If the file changed after it was opened.
        IndexError, TypeError, ValueError
            If an argument does not fit.

        Warnings
        --------
        NumPy adds bfloat16 in bfloat16: ``.sum()`` and ``.mean()`` of a real tensor are wrong by factors. Compute in
        float32: ``get(name, "float32")``, or ``.astype("float32")`` first.
        """
        if default is not _REQUIRED and name not in self:
            return default
        tensor, rows = self._find(name)
        if isinstance(tensor, StoredTensor):
            self.info(name).check_values(dtype if out is None else getattr(out, "dtype", None))
            array = self._read_plain(tensor, rows, index, None if transpose else out)
            return self._convert(array.swapaxes(-1, -2) if transpose else array, dtype, out)
        reader = tensor.reader(rows)
        where = self._where(backend, num_threads)
        if not reader.copies:
            packed = reader.array if index is None else reader.array[index]
            return reader.load(packed).decode(dtype, out=out, transpose=transpose, **where)
        shape, views = reader.views(index)
        impl = backend_for(reader.array.blocks, out, backend, where["device"])
        out, target = reader.array.prepare_out(dtype, out, transpose=transpose, impl=impl, shape=shape)
        parts = (((place, at), part) for place, view in views for at, part in view.iter_chunks(READ_BYTES, out.dtype))
        for (place, within), chunk in reader.load_each(parts):
            chunk.decode(out=target[place][within], **where)
        return out

    def packed(self, name: str) -> MXFP4Array | ScaledArray:
        """Return a tensor of MXFP4, FP8, MXFP8 or NVFP4 without decoding it: a view of the file.

        Scales are a copy if they are not stored as they are used: swizzled ones, those of FP8, which are few, and those
        of Quark's old ``mx``.

        Raises
        ------
        TensorNotFoundError
            If there is no such tensor.
        LayoutError
            If it is of no such format, if its codes and scales do not fit each other, or if it could have several
            layouts.
        """
        array = self.blocks(name) if (info := self.info(name)).layout else None
        if not isinstance(array, MXFP4Array | ScaledArray):
            found = info.format or f"plain {info.dtype}"
            raise LayoutError(
                f"{info.stored[0].file.path}: tensor {name!r} is {found}, not MXFP4, FP8, MXFP8 or NVFP4: use get()"
            )
        return array

    def reader(self, name: str) -> Reader:
        """Return what reads a tensor, or parts of it, before it is decoded."""
        tensor, rows = self._find(name)
        return PlainReader(tensor, rows) if isinstance(tensor, StoredTensor) else tensor.reader(rows)

    def blocks(self, name: str) -> Any:
        """Return a tensor that is decoded, whatever its format, before it is: an `MXFP4Array` or another `BlockArray`.

        Parameters
        ----------
        name : str
            Of a tensor with a layout.
        """
        reader = self.reader(name)
        return reader.load(reader.array)

    def chunks(
        self,
        name: str,
        max_bytes: int | str = 256 << 20,
        *,
        dtype: DTypeLike | TorchDType | None = None,
        transpose: bool = False,
        backend: str | None = None,
        num_threads: int | None = None,
    ) -> Iterator[tuple[tuple[int | slice, ...], NDArray[Any]]]:
        """Yield a tensor in chunks, for outputs larger than memory.

        Parameters
        ----------
        name : str
        max_bytes : int or str
            Of one decoded chunk, for instance ``"1GB"`` or ``"512MiB"``.
        dtype, transpose, backend, num_threads : optional
            As for `get`.

        Yields
        ------
        index : tuple of int and slice
            Where the chunk belongs: ``whole[index] = chunk`` for all chunks, in C order, fills the whole.
        chunk : numpy.ndarray or cupy.ndarray
        """
        self.info(name).check_values(dtype)
        where = self._where(backend, num_threads)
        for index, chunk in self.pieces(name, max_bytes, dtype=dtype, transpose=transpose):
            if isinstance(chunk, BlockArray):
                wanted = None if dtype is None else decoded_dtype(dtype)
                yield index, chunk.decode(wanted, transpose=transpose, **where)
            else:
                yield index, self._convert(np.asarray(chunk), dtype, None)

    def pieces(
        self, name: str, max_bytes: int | str, *, dtype: DTypeLike | TorchDType | None = None, transpose: bool = False
    ) -> Iterator[tuple[tuple[int | slice, ...], Any]]:
        """Yield a tensor in chunks as `chunks` does, but still packed, for the caller to decode.

        Parameters
        ----------
        name, max_bytes, dtype, transpose
            As for `chunks`.

        Yields
        ------
        index : tuple of int and slice
            Where the decoded chunk belongs: in the transposed array if ``transpose``.
        chunk : BlockArray or numpy.ndarray
            A packed one is not transposed yet; one of a plain tensor is, and has its stored dtype.
        """
        max_bytes = parse_bytes(max_bytes)
        tensor, rows = self._find(name)
        if isinstance(tensor, StoredTensor):
            itemsize = max(1, element(tensor.dtype)[0] // 8) if dtype is None else as_dtype(dtype).itemsize
            shape = tensor.array_shape if rows is None else self.info(name).shape
            for place, index in split_both(shape, itemsize, max_bytes, transpose=transpose):
                chunk = self._read_plain(tensor, rows, index or ...)
                yield place, chunk.swapaxes(-1, -2) if transpose else chunk
            return
        reader = tensor.reader(rows)
        shape, multiple = reader.array.shape, reader.array.multiple
        itemsize = decoded_dtype("bfloat16" if dtype is None else dtype).itemsize
        pairs = split_both(shape, itemsize, max_bytes, transpose=transpose, multiple=multiple)
        yield from reader.load_each((place, reader.array[index]) for place, index in pairs)

    def shard(self, rank: int, size: int, plan: Mapping[str, int | str], *, pad: bool = False) -> CheckpointShard:
        """Return what one rank of a parallel job needs of each tensor, as a mapping of the same names.

        Parameters
        ----------
        rank, size, plan, pad
            See `CheckpointShard`: which rank of how many, and for patterns of names how their tensors are divided.

        Raises
        ------
        ValueError
            If there is no such rank, a pattern fits no name, or the plan says something else.

        Examples
        --------
        >>> import tempfile, numpy as np, mxfp4np
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> up = mxfp4np.MXFP4Array(np.full((64, 2, 16), 0x21, np.uint8), np.full((64, 2), 127, np.uint8))
        >>> mxfp4np.save_file({"up.weight": up, "down.weight": up, "norm": np.ones(64, np.float32)}, path)
        >>> with mxfp4np.Checkpoint(path) as ckpt:
        ...     part = ckpt.shard(rank=1, size=2, plan={"up.*": "colwise", "down.*": "rowwise"})
        ...     part["up.weight"].shape, part["down.weight"].shape, part["norm"].shape
        ((32, 64), (64, 32), (64,))
        """
        return CheckpointShard(self, rank, size, plan, pad=pad)

    def _where(self, backend: str | None, num_threads: int | None) -> dict[str, Any]:
        """Return the arguments of `MXFP4Array.decode` that choose where it runs."""
        device = None if self.device == "cpu" else self.device
        return {"backend": backend, "device": device, "num_threads": num_threads}

    @staticmethod
    def _read_plain(tensor: StoredTensor, rows: slice | None, index: Any, out: Any = None) -> Any:
        """Return a plain tensor, or ``rows`` of its last axis, or what an index selects of that; see `StoredTensor`."""
        return tensor.array(index, out) if rows is None else tensor.array()[..., rows][... if index is None else index]

    def _convert(self, array: NDArray[Any], dtype: DTypeLike | TorchDType | None, out: NDArray[Any] | None) -> Any:
        """Return a plain array on this checkpoint's device, in another dtype or in ``out`` if that is asked for."""
        if out is not None:
            self._backend.check_out(out)
            if out.shape != array.shape or (dtype is not None and out.dtype != as_dtype(dtype)):
                expected = f"shape {array.shape}" + (f" and dtype {as_dtype(dtype)}" if dtype is not None else "")
                raise ValueError(f"out must have {expected}, found {out.shape} and {out.dtype}")
            dtype = out.dtype
        if dtype is None:
            return self._backend.asarray(array)
        if array.dtype.kind == "c" and as_dtype(dtype).kind != "c":
            raise ValueError(f"complex values cannot become {as_dtype(dtype)}")
        if out is None:
            return self._backend.asarray(array.astype(as_dtype(dtype), copy=False))
        if array is not out:
            self._backend.store(array, out)
        return out

    # Names

    def _check_forced(self, layout: str) -> None:
        """Refuse a forced layout that is none of any tensor's candidates."""
        candidates = [found for found in self._tensors.values() if isinstance(found, list)]
        if any(candidate.layout.name == layout for found in candidates for candidate in found):
            return
        detected = dict.fromkeys(candidate.layout.name for found in candidates for candidate in found)
        detected |= dict.fromkeys(x.layout.name for x in self._tensors.values() if isinstance(x, ScaledCandidate))
        raise LayoutError(
            f"{self.folder}: no tensor has names and dtypes of the forced layout {layout!r}: leave it out, detected: "
            f"{', '.join(detected) or 'no packed tensor'}"
        )

    def _find(self, name: str) -> tuple[Tensor, slice | None]:
        """Return a tensor, and which of its rows the name stands for, None for all."""
        rows = None
        if not isinstance(name, str) or name not in self._tensors:
            half = split_gate_up(name, self._tensors)
            if half is None:
                raise TensorNotFoundError(self._not_found(name))
            name, rows = half
        tensor = self._tensors[name]
        if isinstance(tensor, StoredTensor) and tensor.dtype in DTYPES and tensor.dtype not in CHECKED:
            return tensor, rows
        if name not in self._resolved:
            self._resolved[name] = self._resolver.resolve(name, tensor)
        return self._resolved[name], rows

    def _not_found(self, name: object) -> str:
        where = f"no tensor {name!r} in {self.folder}"
        if not isinstance(name, str):
            return f"{where}: names are strings"
        if name in self._stored:
            packed = ((whole, x) for whole, x in self._tensors.items() if not isinstance(x, StoredTensor))
            whole = next((whole for whole, found in packed if name in [half.name for half in stored_of(found)]), None)
            if whole is None:
                return f"{where}: it was given another name, and is in .stored under this one"
            return f"{where}: it is the packed half of {whole!r}; raw halves are in .stored"
        names: Sequence[str] = list(self._tensors)
        if len(names) > 5000:  # comparing is slow: compare with names of the same ending only
            ending = name.rpartition(".")[2]
            names = list(islice((other for other in names if other.endswith(ending)), 5000))
        close = get_close_matches(name, names, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"it has {len(self):,} tensors"
        return f"{where}: {hint}"
