"""CuPy: import it when it is first needed, or say what is missing and what to install."""

from __future__ import annotations

import functools
from typing import Any, Final

from numpy.typing import NDArray

from ...errors import BackendUnavailableError

OLDEST_CUPY: Final = 14


def as_cupy(array: Any) -> NDArray[Any]:
    """Return a CuPy view of an array that any library has on a CUDA device."""
    view: NDArray[Any] = working_cupy()[0].asarray(array)
    return view


@functools.cache
def working_cupy() -> tuple[Any, int]:
    """Return CuPy and the number of devices.

    Raises
    ------
    BackendUnavailableError
        If CuPy, a driver or a device is missing.
    """
    instead = "device='cpu' works without it"
    try:
        import cupy
    except ImportError as error:
        raise BackendUnavailableError(
            "CUDA arrays need CuPy: python -m pip install 'mxfp4np[cuda12]' (or cuda13, to match the driver); "
            f"{instead}" + ("" if isinstance(error, ModuleNotFoundError) else f" ({first_line(error)})")
        ) from error
    if int(cupy.__version__.split(".")[0]) < OLDEST_CUPY:
        raise BackendUnavailableError(
            f"CUDA arrays need CuPy {OLDEST_CUPY} or newer, found {cupy.__version__}: python -m pip install --upgrade "
            f"'mxfp4np[cuda12]' (or cuda13); {instead}"
        )
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        raise BackendUnavailableError(
            f"CuPy {cupy.__version__} finds no NVIDIA driver or device that it can use ({first_line(error)}): install "
            "the driver, or the extra that matches it, cuda12 or cuda13; device='cpu' works without one"
        ) from error
    return cupy, count


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not empty, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
