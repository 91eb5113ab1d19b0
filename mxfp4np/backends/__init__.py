"""One interface for everything that touches packed bytes, and the rule that picks who does.

A backend decodes arrays into an array, and encodes an array into arrays. It knows no file, no tensor name and no model.
To add a device, add a module with an object that follows `Backend`, and its line in `get_backend`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import BackendUnavailableError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Backend(Protocol):
    """What every backend offers."""

    name: str

    def available(self) -> bool:
        """Return whether this backend can run in this process."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return an uninitialised C-contiguous array, aligned to 64 bytes, that the caller owns."""
        ...

    def decode(
        self,
        blocks: NDArray[np.uint8],
        scales: NDArray[np.uint8],
        out: NDArray[Any],
        *,
        start: int = 0,
        order: str = "pairs",
        fresh: bool = False,
        num_threads: int | None = None,
    ) -> None:
        """Decode packed blocks into ``out``.

        Parameters
        ----------
        blocks : (..., G, 16) uint8
            Codes, any strides.
        scales : (..., G) uint8
            E8M0 scales, any strides.
        out : (..., L) bfloat16, float16 or float32
            Written whole, any strides. Shares no memory with the inputs.
        start : int
            Elements of each row's first block to leave out, 0 to 31. ``start + L`` needs exactly ``G`` blocks.
        order : {"pairs", "halves"}
            Where the elements of a block lie; see `mxfp4np.format.ORDERS`.
        fresh : bool
            Whether ``out`` is new memory, which nothing has touched yet.
        num_threads : int, optional
            At most this many threads; as many as the process may use by default.
        """
        ...

    def encode(
        self,
        x: NDArray[Any],
        blocks: NDArray[np.uint8],
        scales: NDArray[np.uint8],
        *,
        rule: str,
        num_threads: int | None = None,
    ) -> None:
        """Encode ``x`` into packed blocks, in pairs.

        Parameters
        ----------
        x : (..., 32 * G) bfloat16, float16 or float32
            Values, any strides. Shares no memory with the outputs.
        blocks : (..., G, 16) uint8
            Codes, written whole, any strides.
        scales : (..., G) uint8
            E8M0 scales, written whole, any strides.
        rule : {"even", "floor", "rceil", "ceil"}
            How scales are chosen; see `mxfp4np.encode`.
        num_threads : int, optional
            At most this many threads; as many as the process may use by default.
        """
        ...


@functools.cache
def get_backend(name: str | None = None, device: str = "cpu") -> Backend:
    """Return the backend called ``name``, or the one that serves ``device``.

    Parameters
    ----------
    name : {"cpu", "numpy"}, optional
        ``"cpu"`` is Numba on all cores, ``"numpy"`` the slow reference that defines what is right.
    device : str
        ``"cpu"``, or ``"cuda"`` or ``"cuda:1"``.

    Raises
    ------
    BackendUnavailableError
        If what the backend needs is not installed.
    ValueError
        If there is no such backend or device.

    Examples
    --------
    >>> get_backend().name
    'cpu'
    """
    kind, _, ordinal = device.partition(":")
    if kind not in ("cpu", "cuda") or (ordinal and (kind == "cpu" or not ordinal.isdecimal())):
        raise ValueError(f"no device {device!r}: expected 'cpu', 'cuda' or 'cuda:<number>'")
    name = name or kind
    if name == "cuda":
        raise BackendUnavailableError(_no_cuda(device))
    if kind == "cuda":
        raise ValueError(f"backend {name!r} does not run on device {device!r}: leave one of the two out")
    if name == "cpu":
        from .cpu import CPUBackend

        return CPUBackend()
    if name == "numpy":
        from .reference import ReferenceBackend

        return ReferenceBackend()
    raise ValueError(f"no backend {name!r}: expected 'cpu' or 'numpy'")


def _no_cuda(device: str) -> str:
    from importlib.util import find_spec

    wanted = device if device != "cpu" else "cuda"
    if find_spec("cupy") is None:
        return (
            f"device {wanted!r} needs CuPy: python -m pip install 'mxfp4np[cuda12]' (or cuda13, to match the "
            "driver); device='cpu' works without it"
        )
    return f"device {wanted!r} is not supported by this version of mxfp4np; device='cpu' works"
