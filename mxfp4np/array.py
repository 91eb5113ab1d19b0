"""MXFP4Array: packed blocks and scales that index and decode like one array of values.

Indexing makes views and reads nothing, see `blocks`; `MXFP4Array.decode` passes them to a backend. This module knows no
file and no tensor name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .backends import Backend, as_array, backend_for, device_of
from .backends.threads import check_num_threads
from .blocks import BlockArray
from .errors import LayoutError
from .format import BLOCK_SIZE, BYTES_PER_BLOCK, ORDERS, DecodedDType, Order

_UINT8 = np.dtype(np.uint8)


class MXFP4Array(BlockArray):
    """An array of MXFP4 values, still packed.

    Parameters
    ----------
    blocks : (..., G, 16) uint8
        Codes, two to a byte, in the order ``order``.
    scales : (..., G) uint8 or float8_e8m0fnu
        The block's factor is ``2**(scale - 127)``; 255 makes it NaN. A float8_e8m0fnu array is viewed as uint8. Both
        may be tensors of torch on the CPU, of which the array is a view.
    order : {"pairs", "halves"}
        Of a block's elements; see `mxfp4np.format.ORDERS`. ``"halves"`` is GGUF's.

    Attributes
    ----------
    blocks, scales : numpy.ndarray of uint8
        Views of the arguments, never copies.
    order : str
        As given.
    shape : tuple of int
        Of the values: ``(..., 32 * G)``.
    start : int
        Elements of each row's first block that are not part of the array: 0 unless a slice began inside a block.

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

    __slots__ = ("_order", "_scales")

    def __init__(self, blocks: ArrayLike, scales: ArrayLike, order: Order = "pairs") -> None:
        blocks, scales = as_array(blocks), as_array(scales)
        if scales.dtype != _UINT8 and scales.dtype.name == "float8_e8m0fnu":
            scales = scales.view(np.uint8)
        for what, array in (("blocks", blocks), ("scales", scales)):
            if array.dtype != _UINT8:
                raise LayoutError(
                    f"{what} must be uint8, found {array.dtype}: view other bytes as uint8, do not convert"
                )
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
        self._blocks: NDArray[np.uint8] = blocks
        self._scales: NDArray[np.uint8] = scales
        self._order: Order = order
        self._start = 0
        self._shape = (*scales.shape[:-1], scales.shape[-1] * BLOCK_SIZE)

    @property
    def scales(self) -> NDArray[np.uint8]:
        """The scales, uint8."""
        return self._scales

    @property
    def order(self) -> Order:
        """Order of the elements of a block."""
        return self._order

    @property
    def block_size(self) -> int:
        """Values of a block: 32."""
        return BLOCK_SIZE

    @property
    def inputs(self) -> tuple[NDArray[np.uint8], ...]:
        """The arrays that are decoded."""
        return self.blocks, self.scales

    @property
    def format(self) -> str:
        """``"MXFP4"``."""
        return "MXFP4"

    def __repr__(self) -> str:
        return f"MXFP4Array(shape={self.shape}, nbytes={self.nbytes})"

    def _of_blocks(self, span: tuple[Any, ...]) -> MXFP4Array:
        return MXFP4Array(self.blocks[span], self.scales[span], self.order)

    def replace(self, blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> MXFP4Array:
        """Return the same view of other arrays, which have the same shapes."""
        return self._cut(MXFP4Array(blocks, scales, self.order), self.start, self.shape)

    def in_pairs(self) -> MXFP4Array:
        """Return the same values in the order "pairs": the array itself, or a copy of its blocks from "halves"."""
        if self.order == "pairs":
            return self
        codes = np.concatenate([self.blocks & 15, self.blocks >> 4], axis=-1)
        return self._cut(MXFP4Array(codes[..., 0::2] | codes[..., 1::2] << 4, self.scales), self.start, self.shape)

    def multiply(
        self,
        x: NDArray[np.float32],
        out: NDArray[np.float32],
        *,
        activations: str,
        num_threads: int | None,
        impl: Backend,
    ) -> None:
        whole = self.start == 0 and self.shape[-1] == BLOCK_SIZE * self.scales.shape[-1]
        if not whole or x.shape[1] > impl.most_vectors:
            super().multiply(x, out, activations=activations, num_threads=num_threads, impl=impl)
        else:
            order, threads = self.order, num_threads
            impl.matmul(self.blocks, self.scales, x, out, order=order, activations=activations, num_threads=threads)

    def decode(
        self,
        dtype: DecodedDType | None = None,
        *,
        out: NDArray[Any] | None = None,
        transpose: bool = False,
        backend: str | None = None,
        device: Any = None,
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
            Swap the last two axes: ``[.., out, in]`` becomes ``[.., in, out]``, as Hugging Face's loader returns the
            experts of gpt-oss. No temporary array is needed.
        backend : {"cpu", "numpy", "cuda"}, optional
            Which backend decodes; see `mxfp4np.backends.get_backend`.
        device : str, torch.device or cupy.cuda.Device, optional
            Where to decode: ``"cuda"`` or ``"cuda:1"`` copies packed bytes of the host to that device. By default the
            device of ``out``, or else of the packed bytes.
        num_threads : int, optional
            At most this many threads of the host. By default ``MXFP4NP_NUM_THREADS``, or as many as the process has
            CPUs.

        Returns
        -------
        numpy.ndarray or cupy.ndarray
            ``out``, or a new C-contiguous array aligned to 64 bytes. Values are exact in bfloat16 and float32, and
            rounded to nearest even in float16. Beyond the largest finite value they are infinity; where the scale is
            255 they are NaN. On a device, the array is ready for later work on the current stream.

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
        check_num_threads(num_threads)
        impl = backend_for(self.blocks, out, backend, device)
        fresh = out is None
        out, target = self.prepare_out(dtype, out, transpose=transpose, impl=impl)
        impl.decode(
            self.blocks, self.scales, target, start=self.start, order=self.order, fresh=fresh, num_threads=num_threads
        )
        return out
