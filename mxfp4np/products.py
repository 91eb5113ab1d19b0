"""Products with packed arrays: `linear`, and what ``@`` and `numpy.matmul` do.

Shapes and dtypes are decided here; `BlockArray.multiply` multiplies one matrix by some vectors. This module knows no
file and no tensor name.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .backends import Backend, as_array, backend_for
from .backends.threads import check_num_threads
from .shapes import swapped as swapped_shape

if TYPE_CHECKING:
    from .blocks import BlockArray

Activations = Literal["float32", "int16"]

ACTIVATIONS: Final[tuple[Activations, ...]] = get_args(Activations)
"""What the other factor of a product may be rounded to."""

_FLOAT32 = np.dtype(np.float32)


def linear(
    x: ArrayLike,
    packed: BlockArray,
    bias: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    activations: Activations | None = None,
    num_threads: int | None = None,
) -> NDArray[Any]:
    """Apply a linear layer whose weights stay packed: ``x @ packed.T + bias``.

    Parameters
    ----------
    x : (..., K) array of float32, or of what becomes it
        Of NumPy, or of CuPy for a product on its device.
    packed : (N, K) MXFP4Array or ScaledArray
        The weights, such as ``checkpoint.packed(name)[expert]``.
    bias : (N,) array, optional
    out : (..., N) array, optional
        Where to write, of any strides and any dtype of real numbers.
    activations : {"float32", "int16"}, optional
        What ``x`` is rounded to. ``"float32"``, the default, rounds no product. ``"int16"`` rounds a single vector to
        integers of 16 bits with a factor for each 32 elements; it is an offer that is used on the CPU, for MXFP4 in
        whole blocks, where vector and result are finite.
    num_threads : int, optional
        At most this many threads. By default ``MXFP4NP_NUM_THREADS``, or as many as the process has CPUs. The result
        does not depend on it.

    Returns
    -------
    (..., N) array
        ``out``, or a new array of float32.

    Raises
    ------
    TypeError
        If ``packed`` is not packed, or ``x`` or ``out`` are no arrays of real numbers.
    ValueError
        If shapes or another argument do not fit.

    Notes
    -----
    Values are decoded in registers, exactly, and products are added up in float32, at least 8 sums for each row, which
    begin anew after 1024 elements. On normally distributed data, the relative error (root mean square) is 2e-7. With
    ``"int16"`` it is 2.3e-5. Beyond 16 vectors on a GPU, and for parts of blocks, FP8, MXFP8 and NVFP4, tiles of rows
    are decoded, and multiplied by NumPy's or CuPy's own product of float32.

    Float32 is the default everywhere, since its results are as exact as those of decoded weights, and since it is
    nearly as fast where many threads share a memory. For one vector, a thread reads so many GB of packed bytes a
    second with float32 and with ``"int16"``: 10 and 16 with AVX2, 12 and 17 with AVX-512 (both EPYC, Zen 4); 16 threads
    104 and 107 (Sapphire Rapids).

    Examples
    --------
    >>> import numpy as np
    >>> from mxfp4np import encode
    >>> packed = encode(np.eye(32, dtype=np.float32))
    >>> linear(np.arange(32.0), packed, bias=np.full(32, 0.5))[:4]
    array([0.5, 1.5, 2.5, 3.5], dtype=float32)
    """
    check_num_threads(num_threads)
    if activations not in (None, *ACTIVATIONS):
        raise ValueError(f"activations must be {' or '.join(map(repr, ACTIVATIONS))}, found {activations!r}")
    if not hasattr(packed, "multiply"):
        raise TypeError(f"packed must be an MXFP4Array or a ScaledArray, found {type(packed).__name__}")
    if packed.ndim != 2:
        raise ValueError(f"packed must have two axes, found shape {packed.shape}: select one matrix, or use @")
    impl, vectors = _prepared(packed, x, "x", out)
    if vectors.shape[-1] != packed.shape[1]:
        raise ValueError(f"x must have a last axis of {packed.shape[1]}, found shape {vectors.shape}")
    offsets = None if bias is None else _prepared(packed, bias, "bias", out)[1]
    if offsets is not None and offsets.shape != packed.shape[:1]:
        raise ValueError(f"bias must have shape {packed.shape[:1]}, found {offsets.shape}")
    shape = (*vectors.shape[:-1], len(packed))
    flat = vectors.reshape(math.prod(shape[:-1]), packed.shape[1])
    result = impl.empty((len(flat), len(packed)), _FLOAT32)
    _multiply(packed, flat.T, result.T, impl, activations or "float32", num_threads)
    if offsets is not None:
        result += offsets
    return _stored(result.reshape(shape), out, impl, packed)


def matmul(packed: BlockArray, x: Any, *, swapped: bool = False) -> NDArray[Any]:
    """Return ``packed @ x``, or with ``swapped`` ``x @ packed.mT``: as float32, of `numpy.matmul`'s shape."""
    impl, vectors = _prepared(packed, x, "the other factor")
    if packed.ndim == 1:
        product: NDArray[Any] = _values(packed, impl) @ vectors
        return product
    columns = vectors.swapaxes(-1, -2) if swapped and vectors.ndim > 1 else vectors
    columns = columns[:, None] if columns.ndim == 1 else columns
    if columns.shape[-2] != packed.shape[-1]:
        raise _misfit(vectors.shape, swapped_shape(packed.shape)) if swapped else _misfit(packed.shape, vectors.shape)
    lead = np.broadcast_shapes(packed.shape[:-2], columns.shape[:-2])
    sizes = packed.shape[-2], columns.shape[-1]
    result = impl.empty((*lead, *(sizes[::-1] if swapped else sizes)), _FLOAT32)
    target = result.swapaxes(-1, -2) if swapped else result
    for index in np.ndindex(lead):
        _multiply(_at(packed, index), _at(columns, index), target[index], impl)
    return result.reshape(*lead, sizes[0]) if vectors.ndim == 1 else result


def left_matmul(x: Any, packed: BlockArray, *, swapped: bool = False) -> NDArray[Any]:
    """Return ``x @ packed``, or with ``swapped`` ``packed.mT @ x``: as float32, of `numpy.matmul`'s shape."""
    impl, vectors = _prepared(packed, x, "the other factor")
    if packed.ndim == 1:
        product: NDArray[Any] = vectors @ _values(packed, impl)
        return product
    rows = vectors.swapaxes(-1, -2) if swapped and vectors.ndim > 1 else vectors
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.shape[-1] != packed.shape[-2]:
        raise _misfit(swapped_shape(packed.shape), vectors.shape) if swapped else _misfit(vectors.shape, packed.shape)
    lead = np.broadcast_shapes(packed.shape[:-2], rows.shape[:-2])
    result = impl.empty((*lead, rows.shape[-2], packed.shape[-1]), _FLOAT32)
    result[...] = 0
    with np.errstate(over="ignore", invalid="ignore"):
        for index in np.ndindex(lead):
            factors, sums = _at(rows, index), result[index]
            for begin, tile in _at(packed, index).tiles(impl):
                sums += factors[:, begin : begin + len(tile)] @ tile
    if vectors.ndim == 1:
        return result.reshape(*lead, packed.shape[-1])
    return result.swapaxes(-1, -2).copy() if swapped else result


class Factor:
    """A packed array, or one transposed, as NumPy sees it: a factor of products, and values for everything else."""

    __slots__ = ()

    def __matmul__(self, x: Any) -> NDArray[Any]:
        raise NotImplementedError

    def __rmatmul__(self, x: Any) -> NDArray[Any]:
        raise NotImplementedError

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = (), **options: Any) -> Any:
        """Multiply for `numpy.matmul`; decode to bfloat16 for other functions of NumPy."""
        if any(isinstance(array, Factor) for array in out):
            raise TypeError("out must be a numpy.ndarray, found a packed array")
        if ufunc is np.matmul and method == "__call__" and not options:
            first, second = inputs
            result = first @ second if isinstance(first, Factor) else second.__rmatmul__(first)
            return _copied(result, out[0]) if out else result
        arrays = [np.asarray(array) if isinstance(array, Factor) else array for array in inputs]
        return getattr(ufunc, method)(*arrays, **({"out": out} if out else {}), **options)


def _prepared(packed: BlockArray, x: Any, what: str, out: Any = None) -> tuple[Backend, NDArray[Any]]:
    """Return the backend that multiplies, and x as float32 for it."""
    array = as_array(x)
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise TypeError(f"{what} must be real numbers, found dtype {array.dtype}")
    if not array.ndim or not packed.ndim:
        raise ValueError(f"{what} and the packed array need at least one axis, found {array.shape} and {packed.shape}")
    impl = backend_for(packed.blocks, array if out is None else out, None, None)
    converted = array.astype(_FLOAT32, copy=False)
    return impl, impl.asarray(converted) if isinstance(array, np.ndarray) else converted


def _values(packed: BlockArray, impl: Backend) -> NDArray[Any]:
    """Return the values of a packed array as float32, on the device of a backend."""
    return packed.decode(out=impl.empty(packed.shape, _FLOAT32))


def _misfit(first: tuple[int, ...], second: tuple[int, ...]) -> ValueError:
    return ValueError(f"shapes do not fit each other: {first} @ {second}")


def _at(array: Any, index: tuple[int, ...]) -> Any:
    """Return the matrix at an index of the leading axes, which an array may lack or have once for all."""
    axes = array.shape[:-2]
    own = index[len(index) - len(axes) :]
    return array[tuple(i if n > 1 else 0 for i, n in zip(own, axes, strict=True))]


def _multiply(
    packed: BlockArray,
    x: NDArray[np.float32],
    out: NDArray[np.float32],
    impl: Backend,
    activations: str = "float32",
    num_threads: int | None = None,
) -> None:
    if not x.size:
        out[...] = 0
    elif out.size:
        packed.multiply(x, out, activations=activations, num_threads=num_threads, impl=impl)


def _stored(result: NDArray[Any], out: NDArray[Any] | None, impl: Backend, packed: BlockArray) -> NDArray[Any]:
    """Return a result, or ``out`` with its values."""
    if out is None:
        return result
    impl.check_out(out, *packed.inputs)
    return _copied(result, out)


def _copied(result: NDArray[Any], out: NDArray[Any]) -> NDArray[Any]:
    """Return ``out`` with the values of a result, of whatever dtype."""
    if out.shape != result.shape:
        raise ValueError(f"out must have shape {result.shape}, found {out.shape}")
    out[...] = result.astype(out.dtype)
    return out
