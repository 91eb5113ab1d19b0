"""decode and encode: from packed arrays to arrays of values, and back.

Arguments are checked here; a backend does the work. This module knows no file and no tensor name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .array import MXFP4Array
from .backends import as_array, backend_for
from .backends.threads import check_num_threads
from .format import BLOCK_SIZE, BYTES_PER_BLOCK, DTYPES, RULES, DecodedDType, Rule, name_of

_UINT8 = np.dtype(np.uint8)


def decode(
    blocks: ArrayLike,
    scales: ArrayLike,
    dtype: DecodedDType | None = None,
    out: NDArray[Any] | None = None,
    backend: str | None = None,
    num_threads: int | None = None,
    *,
    transpose: bool = False,
    device: Any = None,
) -> NDArray[Any]:
    """Decode packed blocks and scales to an array of values.

    Parameters
    ----------
    blocks : (..., G, 16) uint8
    scales : (..., G) uint8 or float8_e8m0fnu
        Arrays of NumPy, tensors of torch on the CPU, or of CuPy or another library that has them on a CUDA device.
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
    rule: Rule = "even",
    out: MXFP4Array | None = None,
    backend: str | None = None,
    num_threads: int | None = None,
) -> MXFP4Array:
    """Encode values to packed blocks and scales.

    Parameters
    ----------
    x : (..., 32 * G) bfloat16, float16 or float32
        Any strides and alignment; also a tensor of torch on the CPU. An array of CuPy, or of another library on a CUDA
        device, is encoded there; its elements must be aligned to their size.
    rule : {"even", "floor", "rceil", "ceil"}
        How a block's scale follows from its largest magnitude; see the notes.
    out : MXFP4Array, optional
        Where to write: the shape of ``x``, order "pairs", whole blocks, any strides, no overlap with ``x``.
    backend : {"cpu", "numpy", "cuda"}, optional
        Which backend encodes; see `mxfp4np.backends.get_backend`.
    num_threads : int, optional
        At most this many threads. By default ``MXFP4NP_NUM_THREADS``, or as many as the process has CPUs.

    Returns
    -------
    MXFP4Array
        ``out``, or new C-contiguous arrays aligned to 64 bytes, in the order "pairs".

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
             one bit after the binary point: one more than "floor"   AMD Quark
             from 1.75 * 2**k on
    "floor"  floor(log2(a)) - 2                                      OCP MX v1.0 (section 6.3), torchao's
                                                                     FLOOR, microxcaling, llama.cpp
    "rceil"  ceil(log2(a / 6))                                       torchao's RCEIL, ModelOpt, DeepSeek
    "ceil"   ceil(log2(a)) - 2                                       torchao's CEIL
    ======== ======================================================= ===================================

    but at least -127, which a block of zeros gets too; and 125 from 1.75 * 2**127 on, where finite values would become
    infinite otherwise. The elements ``x / 2**e`` round to the nearest E2M1 value, ties
    to the even code, and saturate at 6. -0.0, and negative values that round to zero, become -0.0. A block with NaN or
    infinity gets scale 255, so that all of it decodes to NaN; its codes are zeros with the signs of ``x``. Nothing is
    rounded twice, and subnormal numbers are not flushed to zero.

    "even" is the default: its error is the smallest, and compressed-tensors, Quark and torchao's EVEN use it. "floor"
    saturates values from 6 * 2**e to 8 * 2**e: an error of up to a whole step, in the largest elements. "rceil" never
    saturates, but from 6 * 2**e on it doubles the steps of all 32 elements. "even" saturates only up to 7 * 2**e, to
    which 6 is as near as 8 would be, so that no error is more than half a step. On normally distributed values of all
    magnitudes, the mean squared error of "floor" is 1.06 times that of "even", of "rceil" 1.08 times, of "ceil" 1.58
    times; on Laplace's distribution 1.04, 1.14 and 1.86.

    Under "even", "floor" and "rceil", exactly decoded values encode to the same values, in all blocks whose values are
    finite (in bfloat16 and float32, all up to scale 252). If the largest magnitude of a block is 4 or 6 times its
    scale, the bytes are the same too; otherwise the scale is smaller, if it can be, and the codes are larger. "ceil"
    keeps the values of blocks that do not hold a 6 together with a 0.5 or 1.5.

    torchao 0.18 differs in four cases. Magnitudes from 1.75 * 2**127 on become infinite, but under FLOOR. An infinity
    does not make its block NaN. It divides blocks of scale 0 by 2**-126, not 2**-127, and in RCEIL not at all. RCEIL's
    logarithm, rounded to float32, can miss that ``a / 6`` is just above a power of two. In a block with NaN, its codes
    of NaN, and in RCEIL all codes, are arbitrary.

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
    check_num_threads(num_threads)
    if out is not None and not isinstance(out, MXFP4Array):
        raise TypeError(f"out must be an MXFP4Array, found {type(out).__name__}")
    impl = backend_for(values, None if out is None else out.blocks, backend, None)
    if out is None:
        shape = (*values.shape[:-1], values.shape[-1] // BLOCK_SIZE)
        out = MXFP4Array(impl.empty((*shape, BYTES_PER_BLOCK), _UINT8), impl.empty(shape, _UINT8))
    else:
        if out.shape != values.shape:
            raise ValueError(f"out must have shape {values.shape}, found {out.shape}")
        if out.order != "pairs":
            raise ValueError(f"out must have its elements in pairs, found order {out.order!r}")
        if out.start:
            raise ValueError(
                f"out must begin with a whole block, found one that begins at element {out.start} of a block"
            )
        impl.check_out(out.blocks, values)
        impl.check_out(out.scales, values)
    impl.encode(values, out.blocks, out.scales, rule=rule, num_threads=num_threads)
    return out
