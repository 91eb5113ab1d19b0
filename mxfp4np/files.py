"""load_file and save_file: whole files as arrays by name, as safetensors' own functions of these names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, overload

import numpy as np
from numpy.typing import NDArray

from .array import MXFP4Array
from .backends import as_numpy
from .blocks import BlockArray
from .checkpoint import Checkpoint
from .format import BLOCK_SIZE, DecodedDType, decoded_dtype
from .layouts.table import LAYOUTS
from .shapes import split
from .storage.discover import IO, Location, PathLike
from .storage.safetensors import stream_safetensors, write_safetensors
from .storage.tensorfile import SAFETENSORS_DTYPES

WRITE_BYTES: Final = 16 << 20
"""Largest chunk of an array that is made contiguous and written at a time, in bytes."""


def load_file(
    path: Location | Sequence[Location],
    device: Any = "cpu",
    *,
    dtype: DecodedDType | None = None,
    layout: str | None = None,
    io: IO = "mmap",
) -> dict[str, NDArray[Any]]:
    """Return all tensors of a checkpoint, packed ones decoded.

    Parameters
    ----------
    path, device, layout, io
        As for `Checkpoint`.
    dtype : str, type or numpy.dtype, optional
        bfloat16, float16 or float32, for packed tensors and for plain ones of these dtypes. By default packed tensors
        become bfloat16, and plain ones keep their dtype, as all others do: integers, and codes of formats that are not
        decoded, such as INT4.

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
    if dtype is not None:
        dtype = decoded_dtype(dtype)
    with Checkpoint(path, device, io=io, layout=layout) as checkpoint:
        found = {}
        for info in map(checkpoint.info, checkpoint):
            converted = info.layout is not None or (info.format is None and info.dtype in ("BF16", "F16", "F32"))
            found[info.name] = checkpoint.get(info.name, dtype if converted else None)
        return found


@overload
def save_file(
    tensors: Mapping[str, NDArray[Any] | BlockArray], path: PathLike, metadata: Mapping[str, str] | None = None
) -> None: ...
@overload
def save_file(
    tensors: Iterable[tuple[str, NDArray[Any] | BlockArray]], path: PathLike, metadata: Mapping[str, str] | None = None
) -> None: ...
def save_file(
    tensors: Mapping[str, NDArray[Any] | BlockArray] | Iterable[tuple[str, NDArray[Any] | BlockArray]],
    path: PathLike,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file.

    Parameters
    ----------
    tensors : mapping of str to numpy.ndarray or MXFP4Array, or iterable of such pairs
        Arrays of any strides and byte order, tensors of torch included; those of CuPy are copied to the host. An
        `MXFP4Array` becomes the pair ``name.blocks`` and ``name.scales``, a `ScaledArray` its bfloat16 values. Tensors
        of an iterable are written in its order, one at a time, and released; of a mapping, those with the widest
        elements come first, so that every tensor is aligned.
    path : path
        The file appears, or replaces an older one, only when it is complete.
    metadata : mapping of str to str, optional

    Raises
    ------
    ValueError
        If the format has no name for a dtype, a packed array has incomplete blocks, or two names are the same.

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
        pairs = (pair for name, tensor in tensors for pair in _stored_form(name, tensor))
        streamed = ((name, (SAFETENSORS_DTYPES[x.dtype.name], x.shape), _chunks_of(x)) for name, x in pairs)
        stream_safetensors(Path(path), streamed, metadata)
        return
    arrays: dict[str, NDArray[Any]] = {}
    for name, tensor in tensors.items():
        for key, array in _stored_form(name, tensor):
            if key in arrays:
                raise ValueError(f"two tensors would both be called {key!r}")
            arrays[key] = array
    # Widest elements first, so that every tensor is aligned.
    arrays = dict(sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])))
    specs = {name: (SAFETENSORS_DTYPES[array.dtype.name], array.shape) for name, array in arrays.items()}
    chunks = (chunk for array in arrays.values() for chunk in _chunks_of(array))
    write_safetensors(Path(path), specs, chunks, metadata)


def _stored_form(name: str, tensor: NDArray[Any] | BlockArray) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the names and arrays that a tensor is stored as."""
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


def _chunks_of(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for index in split(array.shape, array.itemsize, WRITE_BYTES):
        yield np.ascontiguousarray(array[index], dtype=array.dtype.newbyteorder("="))
