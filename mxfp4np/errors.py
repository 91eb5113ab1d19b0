"""The error tree: every error and warning the library raises on purpose, apart from Python's own for wrong arguments.

A message is one sentence for a person: which file, which tensor, what was expected, what was found, what to do.
All of these can be pickled, so that they cross process pools whole.
"""

from __future__ import annotations


class MXFP4Error(Exception):
    """Base of all errors of this library."""


class CheckpointError(MXFP4Error, ValueError):
    """A file is malformed, truncated or inconsistent with its neighbours."""


class TensorNotFoundError(MXFP4Error, KeyError):
    """No tensor has this name; the message gives the closest ones."""

    def __str__(self) -> str:  # KeyError shows the repr of its argument, which would quote a whole sentence
        return Exception.__str__(self)


class LayoutError(MXFP4Error, ValueError):
    """Blocks and scales do not fit each other."""


class RemoteError(MXFP4Error, OSError):
    """A server cannot be reached, or does not answer as it should; as other errors of reading, an `OSError`."""


class BackendUnavailableError(MXFP4Error, ImportError):
    """A backend or a file format cannot be used here; the message names the extra to install."""


class CheckpointWarning(UserWarning):
    """A checkpoint lacks files, or it is doubtful which of its files belong together."""


class DeviceMemoryError(MXFP4Error, MemoryError):
    """A device has too little memory left; the message says how much is needed and free."""
