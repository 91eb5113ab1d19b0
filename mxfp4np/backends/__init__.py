"""One interface for everything that touches packed bytes, and the rule that picks who does.

A backend decodes arrays into an array, and encodes an array into arrays. It knows no file, no tensor name and no model.
To add a device, add a module with an object that follows `Backend`, and its line in `get_backend`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Backend(Protocol):
    """What every backend offers.

    Arrays are NumPy's, or CuPy's if the backend is for CUDA; packed bytes and values to encode may come from the host.
    """

    name: str

    def available(self) -> bool:
        """Return whether this backend can run in this process."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return an uninitialised C-contiguous array, aligned to 64 bytes, that the caller owns."""
        ...

    def asarray(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return an array of the host as one of this backend's."""
        ...

    def store(self, array: NDArray[Any], out: NDArray[Any]) -> None:
        """Copy an array of the host into ``out``, an array of this backend's of any dtype."""
        ...

    def check_out(self, out: Any, *inputs: NDArray[Any]) -> None:
        """Refuse an output that is no array of this backend's, cannot be written, or shares memory with an input."""
        ...

    def release(self) -> None:
        """Return memory that is kept between calls to the system."""
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


def get_backend(name: str | None = None, device: str | None = None) -> Backend:
    """Return the backend called ``name``, or the one that serves ``device``.

    Parameters
    ----------
    name : {"cpu", "numpy", "cuda"}, optional
        ``"cpu"`` is Numba on all cores, ``"numpy"`` the slow reference that defines what is right, ``"cuda"`` is CuPy.
    device : str, optional
        ``"cpu"``, or ``"cuda"`` for CuPy's current device, or ``"cuda:1"``. Without a name either, ``"cpu"``.

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
    return _get_backend(name, device)  # with one spelling for each call, which a cache needs


@functools.cache
def _get_backend(name: str | None, device: str | None) -> Backend:
    if device is None:
        device = "cuda" if name == "cuda" else "cpu"
    kind, colon, ordinal = device.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not ordinal.isdecimal())):
        raise ValueError(f"no device {device!r}: expected 'cpu', 'cuda' or 'cuda:<number>'")
    name = name or kind
    if name not in ("cpu", "numpy", "cuda"):
        raise ValueError(f"no backend {name!r}: expected 'cpu', 'numpy' or 'cuda'")
    if (name == "cuda") != (kind == "cuda"):
        raise ValueError(f"backend {name!r} does not run on device {device!r}: leave one of the two out")
    if name == "cuda":
        from .cuda.driver import CUDABackend

        return CUDABackend(int(ordinal) if ordinal else None)
    if name == "numpy":
        from .reference import ReferenceBackend

        return ReferenceBackend()
    from .cpu.driver import CPUBackend

    return CPUBackend()


def as_array(array: Any) -> NDArray[Any]:
    """Return a NumPy array, or a view as a CuPy one of what is on a CUDA device."""
    if not isinstance(array, np.ndarray) and hasattr(array, "__cuda_array_interface__"):
        from .cuda.cupy import as_cupy

        return as_cupy(array)
    return np.asarray(array)


def as_numpy(array: Any, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """Return a NumPy array: a copy of what is on a CUDA device, contiguous or in ``out``."""
    array = as_array(array)
    return array if isinstance(array, np.ndarray) else array.get(out=out)


def device_of(array: Any) -> str:
    """Return ``"cpu"``, or ``"cuda:0"`` or another where a CuPy array is."""
    return "cpu" if isinstance(array, np.ndarray) else f"cuda:{array.device.id}"


def backend_for(packed: Any, out: Any, name: str | None, device: str | None) -> Backend:
    """Return the backend for data where it is, or, if that is the host, for where it is wanted.

    Parameters
    ----------
    packed, out : array or None
        What is worked on, and where the result goes if that is given.
    name, device : str, optional
        What the caller asked for.
    """
    if isinstance(packed, np.ndarray):
        if device is None and not isinstance(out, np.ndarray) and hasattr(out, "__cuda_array_interface__"):
            device = device_of(as_array(out))
        return _get_backend(name, device)
    there = device_of(packed)
    if device not in (None, "cuda", there):
        raise ValueError(f"the data is on {there!r}, not on {device!r}: leave device out, or copy the data first")
    return _get_backend(name, there)
