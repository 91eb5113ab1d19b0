"""The interface of backends, and the rule that selects one.

A backend decodes packed arrays and encodes values. Nothing else does, and backends know no file, no tensor name and no
model. To add a device, add a folder with a class that implements `Backend`, and a branch to `_get_backend`.
"""

from __future__ import annotations

import functools
import sys
import warnings
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..errors import BackendUnavailableError
from ..format import FLOAT8, dtype_named
from .cpu.compiler import BuilderBusyError, check_numba
from .cpu.driver import CPUBackend
from .reference import ReferenceBackend

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Backend(Protocol):
    """What every backend implements.

    Arrays are NumPy's or, for the CUDA backend, CuPy's. That backend also takes packed bytes and values of the host.
    """

    name: str

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return an uninitialised C-contiguous array, aligned to 64 bytes, that the caller owns."""
        ...

    def asarray(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return an array of the host as an array of this backend."""
        ...

    def store(self, array: NDArray[Any], out: NDArray[Any]) -> None:
        """Copy an array of the host into ``out``, an array of this backend of any dtype."""
        ...

    def check_out(self, out: Any, *inputs: NDArray[Any]) -> None:
        """Refuse an output that is not an array of this backend, cannot be written, or shares memory with an input."""
        ...

    def release(self) -> None:
        """Return to the system the memory that is kept between calls."""
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
            All of it is written. Any strides. Shares no memory with the inputs.
        start : int
            Elements of each row's first block to skip, 0 to 31. ``start + L`` elements need exactly ``G`` blocks.
        order : {"pairs", "halves"}
            Order of the elements in a block; see `mxfp4np.format.ORDERS`.
        fresh : bool
            Whether ``out`` is new memory that has not been written yet.
        num_threads : int, optional
            At most this many threads; as many as the process may use by default.
        """
        ...

    def decode_scaled(
        self,
        codes: NDArray[np.uint8],
        scales: NDArray[Any],
        out: NDArray[Any],
        *,
        element: str,
        width: int,
        tile_rows: int = 1,
        first_row: int = 0,
        table: NDArray[np.float32] | None = None,
        start: int = 0,
        fresh: bool = False,
        num_threads: int | None = None,
    ) -> None:
        """Decode elements that are multiplied by scales, in float32, and rounded once into ``out``.

        Parameters
        ----------
        codes : (..., B) uint8
            Rows of codes, a byte each or, of E2M1, two to a byte, the low one first. Any strides.
        scales : (..., G) float32 or uint8
            Factors, or bytes for which ``table`` has them. Any strides, 0 included.
        out : (..., L) bfloat16, float16 or float32
            All of it is written. Any strides. Shares no memory with the inputs.
        element : str
            One of `mxfp4np.format.ELEMENTS`.
        width : int
            Elements of a row that share a scale.
        tile_rows, first_row : int
            Rows that share a scale, and how many of the first scales' rows are left out: row ``n`` has the scales
            ``scales[..., (first_row + n) // tile_rows, :]``.
        table : (256,) float32, optional
            The factors of scales that are bytes.
        start : int
            Elements of each row's first group to skip. ``start + L`` elements need exactly ``G`` scales.
        fresh, num_threads
            As in `decode`.
        """
        ...

    @property
    def tile_bytes(self) -> int:
        """Bytes of rows, decoded to float32, that are multiplied at a time beyond `most_vectors`."""
        ...

    @property
    def most_vectors(self) -> int:
        """The largest M for which `matmul` is to be used: beyond it, products of decoded weights are as fast."""
        ...

    def matmul(
        self,
        blocks: NDArray[np.uint8],
        scales: NDArray[np.uint8],
        x: NDArray[np.float32],
        out: NDArray[np.float32],
        *,
        order: str = "pairs",
        activations: str = "float32",
        num_threads: int | None = None,
    ) -> None:
        """Multiply packed rows by vectors: ``out[n, m]`` is the sum over k of ``values[n, k] * x[k, m]``.

        Parameters
        ----------
        blocks : (N, G, 16) uint8
            Codes, any strides.
        scales : (N, G) uint8
            E8M0 scales, any strides.
        x : (32 * G, M) float32
            Any strides.
        out : (N, M) float32
            All of it is written. Any strides. Shares no memory with the inputs. No axis is empty.
        order : {"pairs", "halves"}
            As in `decode`.
        activations : {"float32", "int16"}
            How x may be rounded; see `mxfp4np.linear`.
        num_threads : int, optional
            As in `decode`.
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
        """Encode ``x`` into packed blocks, in the order "pairs".

        Parameters
        ----------
        x : (..., 32 * G) bfloat16, float16 or float32
            Values, any strides. Shares no memory with the outputs.
        blocks : (..., G, 16) uint8
            Codes, all written. Any strides.
        scales : (..., G) uint8
            E8M0 scales, all written. Any strides.
        rule : {"even", "floor", "rceil", "ceil"}
            How scales are chosen; see `mxfp4np.encode`.
        num_threads : int, optional
            At most this many threads; as many as the process may use by default.
        """
        ...


def get_backend(name: str | None = None, device: Any = None) -> Backend:
    """Return the backend called ``name``, or the default one for ``device``.

    Parameters
    ----------
    name : {"cpu", "numpy", "cuda"}, optional
        ``"cpu"`` is Numba on all cores, ``"numpy"`` the slow reference for correct results, ``"cuda"`` is CuPy. Where
        Numba cannot be imported, the default on the CPU is ``"numpy"``, with a warning.
    device : str, torch.device or cupy.cuda.Device, optional
        ``"cpu"``, or ``"cuda"`` for CuPy's current device, or ``"cuda:1"``. By default, the device of ``name``, or
        ``"cpu"`` without one.

    Raises
    ------
    BackendUnavailableError
        If a package that the backend needs is not installed, or a driver or device is missing.
    ValueError
        If there is no such backend or device.

    Examples
    --------
    >>> get_backend().name
    'cpu'
    """
    return _get_backend(name, device_name(device))  # cached by position: keyword arguments would be another key


def device_name(device: Any) -> str | None:
    """Return a device as text: of torch.device and cupy.cuda.Device by their attributes; text and None as they are.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> device_name("cpu"), device_name(SimpleNamespace(type="cuda", index=1)), device_name(SimpleNamespace(id=0))
    ('cpu', 'cuda:1', 'cuda:0')
    """
    if device is None or isinstance(device, str):
        return device
    kind, index = getattr(device, "type", None), getattr(device, "index", None)
    if isinstance(kind, str):  # torch's
        return kind if index is None or kind == "cpu" else f"{kind}:{index}"
    if isinstance(getattr(device, "id", None), int) and not hasattr(device, "platform"):  # CuPy's, not JAX's
        return f"cuda:{device.id}"
    raise TypeError(f"device must be text such as 'cuda:0', a torch.device or a cupy.cuda.Device, found {device!r}")


@functools.cache
def _get_backend(name: str | None, device: str | None) -> Backend:
    if device is None:
        device = "cuda" if name == "cuda" else "cpu"
    kind, colon, ordinal = device.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not ordinal.isdecimal())):
        raise ValueError(f"no device {device!r}: expected 'cpu', 'cuda' or 'cuda:<number>'")
    if name is None and kind == "cpu":
        return _default_on_host()
    name = name or kind
    if name not in ("cpu", "numpy", "cuda"):
        raise ValueError(f"no backend {name!r}: expected 'cpu', 'numpy' or 'cuda'")
    if (name == "cuda") != (kind == "cuda"):
        raise ValueError(f"backend {name!r} does not run on device {device!r}: leave one of the two out")
    if name == "cuda":
        from .cuda.driver import CUDABackend

        return CUDABackend(int(ordinal) if ordinal else None)
    return ReferenceBackend() if name == "numpy" else CPUBackend()


@functools.cache
def _default_on_host() -> Backend:
    """Return the CPU backend, or with a warning, once, the reference where Numba cannot be imported."""
    try:
        check_numba()
    except BuilderBusyError:
        pass  # it uses the reference until that has changed
    except BackendUnavailableError as error:
        warnings.warn(f"{error}, and is used now, at about a hundredth of the speed", stacklevel=5)
        return _get_backend("numpy", "cpu")
    return _get_backend("cpu", "cpu")


def as_array(array: Any) -> NDArray[Any]:
    """Return a NumPy array, or a CuPy view of an array on a CUDA device; of torch's tensors a view, of any dtype."""
    if isinstance(array, np.ndarray):
        return np.asarray(array)
    if hasattr(array, "__cuda_array_interface__"):
        from .cuda.cupy import as_cupy

        return as_cupy(array)
    if hasattr(array, "detach") and hasattr(array, "numpy"):
        return _of_torch(array.detach())
    return np.asarray(array)


def _of_torch(tensor: Any) -> NDArray[Any]:
    """Return a view of a torch tensor on the CPU. Its dtypes that NumPy lacks become those of ml_dtypes."""
    name = str(tensor.dtype).rpartition(".")[2]
    if name not in ("bfloat16", "float4_e2m1fn_x2", *FLOAT8):
        view: NDArray[Any] = tensor.numpy()
        return view
    torch = sys.modules[type(tensor.dtype).__module__]  # loaded, since there is a tensor
    view = tensor.view(torch.int16 if name == "bfloat16" else torch.uint8).numpy()
    return view.view(np.uint8 if name == "float4_e2m1fn_x2" else dtype_named(name))


def as_numpy(array: Any, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """Return a NumPy array: ``array`` itself, or a copy of an array on a CUDA device, in ``out`` if that is given."""
    array = as_array(array)
    return array if isinstance(array, np.ndarray) else array.get(out=out)


def device_of(array: Any) -> str:
    """Return the device of an array: ``"cpu"``, or ``"cuda:0"`` or another for CuPy's."""
    return "cpu" if isinstance(array, np.ndarray) else f"cuda:{array.device.id}"


def backend_for(packed: Any, out: Any, name: str | None, device: Any) -> Backend:
    """Return the backend for the device that holds the data or, if the host holds it, for the device of the result.

    Parameters
    ----------
    packed, out : array or None
        The data, and the array that the result is written to, if there is one.
    name, device : optional
        Arguments of the caller, as for `get_backend`.
    """
    device = device_name(device)
    if isinstance(packed, np.ndarray):
        if device is None and not isinstance(out, np.ndarray) and hasattr(out, "__cuda_array_interface__"):
            device = device_of(as_array(out))
        return _get_backend(name, device)
    there = device_of(packed)
    if device not in (None, "cuda", there):
        raise ValueError(f"the data is on {there!r}, not on {device!r}: leave device out, or copy the data first")
    return _get_backend(name, there)
