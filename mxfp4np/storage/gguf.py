"""Read the header of a GGUF file with the gguf package; see `tensorfile` for its data.

The package is imported only when such a file is opened. It refuses files that have a type it does not know. Here such
tensors are listed, so that all others can be read.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any, BinaryIO, Final

from ..errors import BackendUnavailableError, CheckpointError
from .tensorfile import StoredTensor, TensorFile, wrong_beginning

GGUF_MAGIC: Final = b"GGUF"
"""The first bytes of such a file."""


class GGUFFile(TensorFile):
    """A GGUF file. Shapes are NumPy's, outermost axis first."""

    def _read_header(self, file: BinaryIO) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise BackendUnavailableError(
                f"{self.path}: GGUF files need the gguf package: python -m pip install 'mxfp4np[gguf]'"
            ) from error

        class Reader(GGUFReader):  # type: ignore[misc]  # the package has no types
            def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
                self.entries = [(int(start_offs), *field.parts) for field in fields]

        beginning, size = file.read(8), file.seek(0, 2)
        if not beginning.startswith(GGUF_MAGIC):
            problem = wrong_beginning(beginning, repr(GGUF_MAGIC))
            raise CheckpointError(f"{self.path}: not a valid GGUF file: {problem}")
        try:
            reader = Reader(self.path)
            scalars = {key: field for key, field in reader.fields.items() if len(field.types) == 1}
            self.metadata = {key: str(field.contents()) for key, field in scalars.items()}
            self.parts = int(self.metadata.get("split.count", 1))
            entries = [
                (bytes(name).decode(), begin + int(offset[0]), *_type_of(int(kind[0]), tuple(map(int, dims[::-1]))))
                for begin, _, name, _, dims, kind, offset in reader.entries
            ]
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            raise CheckpointError(f"{self.path}: not a valid GGUF file: {error}") from error
        if reader.byte_order == "S":
            raise CheckpointError(f"{self.path}: expected a little-endian GGUF file, found a big-endian one")
        ends = sorted([offset for _, offset, *_ in entries] + [size])
        for name, offset, dtype, shape, nbytes in entries:
            if name in self.tensors:
                raise CheckpointError(f"{self.path}: not a valid GGUF file: two tensors are called {name!r}")
            following = bisect_right(ends, offset)
            if nbytes is None:  # not known: up to the next tensor
                nbytes = ends[following] - offset if following < len(ends) else 0  # noqa: PLW2901
            if offset + nbytes > size:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r}: expected bytes up to {offset + nbytes:,}, found a file of {size:,}"
                )
            self.tensors[name] = StoredTensor(name, dtype, shape, self, offset, nbytes)


def _type_of(number: int, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], int | None]:
    """Return the name of a type, the shape, and the bytes of a tensor, None if the package does not know the type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        known = GGMLQuantizationType(number)
        size, nbytes = GGML_QUANT_SIZES[known]
    except (ValueError, KeyError):
        return f"GGML type {number}", shape, None
    if (shape or (1,))[-1] % size:
        raise ValueError(f"rows of {known.name} have a multiple of {size} values, found shape {list(shape)}")
    return known.name, shape, math.prod(shape) // size * nbytes
