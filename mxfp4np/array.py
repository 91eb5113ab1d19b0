"""MXFP4Array: packed blocks and scales that index and decode like one array of values.

Indexing makes smaller views and reads nothing; `MXFP4Array.decode` hands the bytes to a backend. It knows no file and
no tensor name.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from types import EllipsisType
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .backends import Backend, as_array, backend_for, device_of
from .errors import LayoutError
from .format import BLOCK_SIZE, BYTES_PER_BLOCK, DTYPES, ORDERS, RULES, blocks_in, decoded_dtype, name_of, split

BasicIndex = SupportsIndex | slice | EllipsisType
Index = BasicIndex | tuple[BasicIndex, ...]

_UINT8 = np.dtype(np.uint8)


class MXFP4Array:
    """An array of MXFP4 values, still packed.

    Parameters
    ----------
    blocks : (..., G, 16) uint8
        Codes, two to a byte, in the order that ``order`` says.
    scales : (..., G) uint8 or float8_e8m0fnu
        The block's factor is ``2**(scale - 127)``; 255 makes it NaN. A float8_e8m0fnu array is taken by its bits.
    order : {"pairs", "halves"}
        In pairs, element ``2j`` of a block is the low nibble of byte ``j``, element ``2j + 1`` the high one. In halves,
        as GGUF has them, element ``j`` is the low nibble of byte ``j``, element ``16 + j`` the high one.

    Attributes
    ----------
    blocks, scales : numpy.ndarray of uint8
        Views of the arguments, never copies.
    order : str
        As given.
    shape : tuple of int
        Of the values: ``(..., 32 * G)``.
    start : int
        Elements of each row's first block that do not belong to the array: 0 unless a range began inside a block.

    Raises
    ------
    LayoutError
        If dtypes or shapes do not fit each other.
    ValueError
        If there is no such order.

    Examples
    --------
    >>> import numpy as np
    >>> packed = MXFP4Array(np.full((2, 1, 16), 0x21, np.uint8), np.array([[127], [128]], np.uint8))
    >>> packed
    MXFP4Array(shape=(2, 32), nbytes=34)
    >>> packed[1, :4].decode("float32")
    array([1., 2., 1., 2.], dtype=float32)
    """

    __slots__ = ("blocks", "order", "scales", "shape", "start")

    blocks: NDArray[np.uint8]
    scales: NDArray[np.uint8]
    order: str
    shape: tuple[int, ...]
    start: int

    def __init__(self, blocks: ArrayLike, scales: ArrayLike, order: str = "pairs") -> None:
        blocks, scales = as_array(blocks), as_array(scales)
        if blocks.dtype != _UINT8 or scales.dtype != _UINT8:
            if scales.dtype.name == "float8_e8m0fnu":
                scales = scales.view(np.uint8)
            for what, array in (("blocks", blocks), ("scales", scales)):
                if array.dtype != _UINT8:
                    how = "view other bytes as uint8, do not convert"
                    raise LayoutError(f"{what} must be uint8, found {array.dtype}: {how}")
        if not scales.ndim or blocks.shape != (*scales.shape, BYTES_PER_BLOCK):
            raise LayoutError(
                f"blocks must be [..., G, {BYTES_PER_BLOCK}] and scales [..., G], "
                f"found {list(blocks.shape)} and {list(scales.shape)}"
            )
        if order not in ORDERS:
            raise ValueError(f"order must be {' or '.join(map(repr, ORDERS))}, found {order!r}")
        if device_of(blocks) != device_of(scales):
            raise LayoutError(
                f"blocks are on {device_of(blocks)!r} and scales on {device_of(scales)!r}: copy one of them"
            )
        self.blocks, self.scales, self.order, self.start = blocks, scales, order, 0
        self.shape = (*scales.shape[:-1], scales.shape[-1] * BLOCK_SIZE)

    @property
    def device(self) -> str:
        """Where the packed bytes are: ``"cpu"``, or ``"cuda:0"`` or another."""
        return device_of(self.blocks)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed blocks and scales."""
        return self.blocks.nbytes + self.scales.nbytes

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[MXFP4Array]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"MXFP4Array(shape={self.shape}, nbytes={self.nbytes})"

    def __getitem__(self, index: Index) -> MXFP4Array:
        """Return a view: nothing is read or decoded.

        Parameters
        ----------
        index : int, slice, Ellipsis, or a tuple of them
            As in NumPy for the leading axes. The last axis, along which values share scales, takes a range: a slice
            of step 1 from any element to any other.

        Raises
        ------
        IndexError
            If out of range, or of another kind.
        """
        lead, (begin, end) = self._resolve(index)
        begin, end = begin + self.start, end + self.start
        first, last = begin // BLOCK_SIZE, blocks_in(end)
        if begin == end:
            last = first
        span = (*lead, slice(first, last))
        part = MXFP4Array(self.blocks[span], self.scales[span], self.order)
        part.start, part.shape = begin % BLOCK_SIZE, (*part.shape[:-1], end - begin)
        return part

    def replace(self, blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> MXFP4Array:
        """Return the same view of other bytes: arrays of the same shapes."""
        part = MXFP4Array(blocks, scales, self.order)
        part.start, part.shape = self.start, self.shape
        return part

    def in_pairs(self) -> MXFP4Array:
        """Return the same values with their elements in pairs: itself if they are, a copy of the blocks if not."""
        if self.order == "pairs":
            return self
        codes = np.concatenate([self.blocks & 15, self.blocks >> 4], axis=-1)
        part = MXFP4Array(codes[..., 0::2] | codes[..., 1::2] << 4, self.scales)
        part.start, part.shape = self.start, self.shape
        return part

    def _resolve(self, index: Index) -> tuple[tuple[SupportsIndex | slice, ...], tuple[int, int]]:
        """Split an index into one item for each leading axis and the range of the last."""
        items = index if isinstance(index, tuple) else (index,)
        for item in items:
            is_integer = hasattr(item, "__index__") and not isinstance(item, bool | np.bool_ | np.ndarray)
            if not (is_integer or item is Ellipsis or isinstance(item, slice)):
                raise IndexError(f"packed arrays take integers, slices and one '...' as an index, found {item!r}")
        dots = [i for i, item in enumerate(items) if item is Ellipsis] or [len(items)]
        if len(dots) > 1:
            raise IndexError("an index can have one '...' only")
        head, tail = items[: dots[0]], items[dots[0] + 1 :]
        missing = self.ndim - len(head) - len(tail)
        if missing < 0:
            raise IndexError(f"{self.ndim} axes, but {len(head) + len(tail)} were indexed")
        full: list[Any] = [*head, *[slice(None)] * missing, *tail]
        last = full.pop()
        if not isinstance(last, slice):
            raise IndexError(f"the last axis takes a slice, found {last!r}: use [{last}:{last} + 1], or decode first")
        begin, end, step = last.indices(self.shape[-1])
        if step != 1:
            raise IndexError(f"the last axis takes slices of step 1, found step {step}: decode first, then index")
        return tuple(full), (begin, max(begin, end))

    def decode(
        self,
        dtype: DTypeLike | None = None,
        *,
        out: NDArray[Any] | None = None,
        transpose: bool = False,
        backend: str | None = None,
        device: str | None = None,
        num_threads: int | None = None,
    ) -> NDArray[Any]:
        """Return the values.

        Parameters
        ----------
        dtype : str, type or numpy.dtype, optional
            bfloat16, float16 or float32; that of ``out``, or bfloat16, by default.
        out : numpy.ndarray or cupy.ndarray, optional
            Where to write: any writable array of the right shape and dtype, of any strides and alignment, that does
            not overlap the packed data. On a device, elements lie at multiples of their size.
        transpose : bool
            Swap the last two axes: ``[.., out, in]`` becomes ``[.., in, out]``, as Hugging Face's loader gives the
            experts of gpt-oss. Done on the way, without a temporary.
        backend : {"cpu", "numpy", "cuda"}, optional
            Who decodes; see `mxfp4np.backends.get_backend`.
        device : str, optional
            Where: ``"cuda"`` or ``"cuda:1"`` takes packed bytes of the host to that device and decodes them there. By
            default where ``out`` is, or else the packed bytes.
        num_threads : int, optional
            At most this many threads of the host. By default ``MXFP4NP_NUM_THREADS``, or as many as the process has
            CPUs.

        Returns
        -------
        numpy.ndarray or cupy.ndarray
            ``out``, or a new C-contiguous array aligned to 64 bytes. Exact in bfloat16 and float32; float16 rounds to
            nearest even. Beyond the largest finite value it is infinity; where the scale is 255 it is NaN. On a device,
            it is ready for what comes later on the current stream.

        Raises
        ------
        ValueError
            If ``dtype``, ``out``, ``device`` or ``num_threads`` does not fit.
        BackendUnavailableError
            If the device needs what is not installed.
        DeviceMemoryError
            If the device has too little memory left.

        Notes
        -----
        ``value = E2M1[code] * 2**(scale - 127)``: OCP Microscaling Formats (MX) v1.0, section 6.3.
        """
        _check_num_threads(num_threads)
        worker = backend_for(self.blocks, out, backend, device)
        result, target = self.prepare_out(dtype, out, transpose=transpose, worker=worker)
        worker.decode(
            self.blocks,
            self.scales,
            target,
            start=self.start,
            order=self.order,
            fresh=out is None,
            num_threads=num_threads,
        )
        return result

    def prepare_out(
        self, dtype: DTypeLike | None, out: NDArray[Any] | None, *, transpose: bool, worker: Backend
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return where `decode` writes, checked or new, and a view of it that has the shape of the packed array."""
        shape = self.shape
        if transpose:
            if self.ndim < 2:
                raise ValueError(f"transpose needs two axes or more, found shape {shape}")
            shape = swapped(shape)
        if out is None:
            out = worker.empty(shape, decoded_dtype("bfloat16" if dtype is None else dtype))
            return out, out.swapaxes(-1, -2) if transpose else out
        worker.check_out(out, self.blocks, self.scales)
        expected = decoded_dtype(out.dtype if dtype is None else dtype)
        if out.dtype != expected:
            raise ValueError(f"out must have dtype {expected}, found {out.dtype}")
        if out.shape != shape:
            raise ValueError(f"out must have shape {shape}, found {out.shape}")
        return out, out.swapaxes(-1, -2) if transpose else out

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """Decode for NumPy: to bfloat16, or through float32 to any other dtype."""
        if self.device != "cpu":
            raise TypeError(f"packed values on {self.device!r} do not become a numpy.ndarray unasked: use decode()")
        if copy is False:
            raise ValueError("packed MXFP4 values cannot become an array without a copy")
        if dtype is None or np.dtype(dtype).name in DTYPES:
            return self.decode(dtype)
        return self.decode("float32").astype(dtype)

    def chunks(
        self, max_bytes: int, dtype: DTypeLike = "bfloat16"
    ) -> Iterator[tuple[tuple[int | slice, ...], MXFP4Array]]:
        """Split the array into views that each decode to at most ``max_bytes``.

        Parameters
        ----------
        max_bytes : int
            At least one block of the decoded dtype.
        dtype : str, type or numpy.dtype
            What the bytes are counted in.

        Yields
        ------
        index : tuple of int and slice
            The view is ``self[index]``; in C order, together they are the whole array.
        part : MXFP4Array

        Examples
        --------
        >>> import numpy as np
        >>> packed = MXFP4Array(np.zeros((3, 2, 16), np.uint8), np.zeros((3, 2), np.uint8))
        >>> [index for index, part in packed.chunks(256)]
        [(slice(0, 2, None), slice(0, 64, None)), (slice(2, 3, None), slice(0, 64, None))]
        """
        for index in split(self.shape, decoded_dtype(dtype).itemsize, max_bytes, (BLOCK_SIZE,)):
            yield index, self[index]


def swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of an array whose last two axes are swapped."""
    return (*shape[:-2], shape[-1], shape[-2])


def place_in_whole(index: tuple[int | slice, ...], within: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """Return where an element is in an array, from where it is in the part that an index of `split` cut out.

    Examples
    --------
    >>> place_in_whole((3, slice(64, 96), slice(0, 10)), (2, 5))
    (3, 66, 5)
    """
    places = iter(within)
    return tuple(k.start + operator.index(next(places)) if isinstance(k, slice) else k for k in index)


def decode(
    blocks: ArrayLike,
    scales: ArrayLike,
    dtype: DTypeLike | None = None,
    out: NDArray[Any] | None = None,
    backend: str | None = None,
    num_threads: int | None = None,
    *,
    transpose: bool = False,
    device: str | None = None,
) -> NDArray[Any]:
    """Decode packed blocks and scales to an array of values.

    Parameters
    ----------
    blocks : (..., G, 16) uint8
    scales : (..., G) uint8 or float8_e8m0fnu
        Arrays of NumPy, or of CuPy or another library that has them on a CUDA device.
    dtype, out, backend, num_threads, transpose, device
        As for `MXFP4Array.decode`.

    Returns
    -------
    (..., 32 * G) numpy.ndarray or cupy.ndarray
        bfloat16 by default. With ``transpose``, the last two axes are swapped.

    Raises
    ------
    LayoutError
        If blocks and scales do not fit each other.
    ValueError
        If another argument does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> decode(np.full((1, 16), 0xF2, np.uint8), np.array([126], np.uint8), "float32")[:4]
    array([ 0.5, -3. ,  0.5, -3. ], dtype=float32)
    """
    return MXFP4Array(blocks, scales).decode(
        dtype, out=out, transpose=transpose, backend=backend, device=device, num_threads=num_threads
    )


def encode(
    x: ArrayLike,
    rule: str = "even",
    out: MXFP4Array | None = None,
    backend: str | None = None,
    num_threads: int | None = None,
) -> MXFP4Array:
    """Encode values to packed blocks and scales.

    Parameters
    ----------
    x : (..., 32 * G) bfloat16, float16 or float32
        Any strides and alignment. An array of CuPy, or of another library on a CUDA device, is encoded there; its
        elements lie at multiples of their size.
    rule : {"even", "floor", "rceil", "ceil"}
        How a block's scale follows from its largest magnitude; see the notes.
    out : MXFP4Array, optional
        Where to write: of the shape of ``x``, in pairs, whole blocks, of any strides, that do not overlap ``x``.
    backend : {"cpu", "numpy", "cuda"}, optional
        Who encodes; see `mxfp4np.backends.get_backend`.
    num_threads : int, optional
        At most this many threads. By default ``MXFP4NP_NUM_THREADS``, or as many as the process has CPUs.

    Returns
    -------
    MXFP4Array
        ``out``, or new C-contiguous arrays aligned to 64 bytes, in pairs.

    Raises
    ------
    TypeError
        If ``out`` is not an `MXFP4Array`.
    ValueError
        If an argument does not fit.

    Notes
    -----
    A block whose largest magnitude is ``a`` gets the scale ``2**e``:

    ======== ======================================================= ===================================
    rule     e                                                       also of
    ======== ======================================================= ===================================
    "even"   floor(log2(a')) - 2, a' being ``a`` rounded half up to  torchao's EVEN, compressed-tensors,
             one bit behind the binary point: one more than "floor"  AMD Quark
             from 1.75 * 2**k on
    "floor"  floor(log2(a)) - 2                                      OCP MX v1.0 (section 6.3), torchao's
                                                                     FLOOR, microxcaling, llama.cpp
    "rceil"  ceil(log2(a / 6))                                       torchao's RCEIL, ModelOpt, DeepSeek
    "ceil"   ceil(log2(a)) - 2                                       torchao's CEIL
    ======== ======================================================= ===================================

    or -127, if that is more; a block of zeros gets -127. The elements ``x / 2**e`` round to the nearest E2M1 value,
    ties to the even code, and saturate at 6. -0.0, and what rounds to zero from below, becomes -0.0. A block with NaN
    or infinity gets scale 255, so that all of it decodes to NaN; its codes are zeros with the signs of ``x``. All this
    is exact: nothing is rounded twice, and subnormal numbers are numbers like others.

    "even" is the default: it loses least, and is what compressed-tensors, Quark and torchao's EVEN write. "floor"
    saturates all from 6 * 2**e up to 8 * 2**e: an error of up to a whole step, in the largest elements. "rceil" never
    saturates, but from 6 * 2**e on it doubles the steps of all 32 elements. "even" saturates up to 7 * 2**e only, to
    which 6 is as near as 8 would be, so that no error is more than half a step. On normally distributed values of all
    magnitudes, the mean squared error of "floor" is 1.06 times that of "even", of "rceil" 1.08 times, of "ceil" 1.58
    times; on Laplace's distribution 1.04, 1.14 and 1.86.

    Under "even", "floor" and "rceil", what was decoded exactly encodes to the same values, in all blocks whose values
    are finite (in bfloat16 and float32, all up to scale 252). Where the largest of a block is 4 or 6 times its scale,
    it is the same bytes too; otherwise the scale is smaller, if it can be, and the codes are larger. "ceil" keeps
    blocks in which no 0.5 or 1.5 stands beside a 6.

    torchao 0.18 differs in three cases. It does not let an infinity make its block NaN. It divides blocks of scale 0 by
    2**-126, not 2**-127, and in RCEIL not at all. And RCEIL's logarithm, rounded to float32, can miss that ``a / 6`` is
    just above a power of two. In NaN's block, its codes for NaN, and all of RCEIL's, are arbitrary.

    Examples
    --------
    >>> import numpy as np
    >>> packed = encode(np.arange(64, dtype=np.float32).reshape(2, 32))
    >>> packed
    MXFP4Array(shape=(2, 32), nbytes=34)
    >>> packed.scales.tolist()
    [[130], [131]]
    >>> packed[0, 8:16].decode("float32")
    array([ 8.,  8.,  8., 12., 12., 12., 16., 16.], dtype=float32)
    """
    values = as_array(x)
    if name_of(values.dtype) not in DTYPES or not values.dtype.isnative:
        raise ValueError(f"x must be {', '.join(DTYPES)}, in native byte order, found {values.dtype!r}")
    if not values.ndim or values.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"x must have a last axis of a multiple of {BLOCK_SIZE}, found shape {values.shape}")
    if rule not in RULES:
        raise ValueError(f"rule must be {', '.join(map(repr, RULES))}, found {rule!r}")
    _check_num_threads(num_threads)
    if out is not None and not isinstance(out, MXFP4Array):
        raise TypeError(f"out must be an MXFP4Array, found {type(out).__name__}")
    worker = backend_for(values, None if out is None else out.blocks, backend, None)
    if out is None:
        shape = (*values.shape[:-1], values.shape[-1] // BLOCK_SIZE)
        out = MXFP4Array(worker.empty((*shape, BYTES_PER_BLOCK), _UINT8), worker.empty(shape, _UINT8))
    else:
        _check_encoded(out, values, worker)
    worker.encode(values, out.blocks, out.scales, rule=rule, num_threads=num_threads)
    return out


def _check_encoded(out: MXFP4Array, x: NDArray[Any], worker: Backend) -> None:
    """Refuse what `encode` cannot write to."""
    if out.shape != x.shape:
        raise ValueError(f"out must have shape {x.shape}, found {out.shape}")
    if out.order != "pairs":
        raise ValueError(f"out must have its elements in pairs, found order {out.order!r}")
    if out.start:
        raise ValueError(f"out must begin with a whole block, found one that begins at element {out.start} of a block")
    worker.check_out(out.blocks, x)
    worker.check_out(out.scales, x)


def _check_num_threads(num_threads: int | None) -> None:
    if num_threads is not None and operator.index(num_threads) < 1:
        raise ValueError(f"num_threads must be at least 1, found {num_threads}")
