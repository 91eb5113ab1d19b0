"""Read the header of a GGUF file with the gguf package; see `tensorfile` for its data.

The package is imported only when such a file is opened.
"""

from __future__ import annotations

from typing import BinaryIO, Final

from ..errors import BackendUnavailableError, CheckpointError
from .tensorfile import DTYPES, StoredTensor, TensorFile

GGUF_MAGIC: Final = b"GGUF"
"""The first bytes of such a file."""


class GGUFFile(TensorFile):
    """A GGUF file. Shapes are NumPy's, outermost axis first; types that NumPy lacks are bytes."""

    def _read_header(self, file: BinaryIO) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise BackendUnavailableError(
                f"{self.path}: GGUF files need the gguf package: python -m pip install 'mxfp4np[gguf]'"
            ) from error
        size = file.seek(0, 2)
        try:
            reader = GGUFReader(self.path)
            scalars = {key: field for key, field in reader.fields.items() if len(field.types) == 1}
            self.metadata = {key: str(field.contents()) for key, field in scalars.items()}
            self.parts = int(self.metadata.get("split.count", 1))
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            raise CheckpointError(f"{self.path}: not a valid GGUF file: {error}") from error
        if reader.byte_order == "S":
            raise CheckpointError(f"{self.path}: expected a little-endian GGUF file, found a big-endian one")
        for found in reader.tensors:
            dtype = found.tensor_type.name
            shape = found.shape[::-1] if dtype in DTYPES else found.data.shape
            tensor = StoredTensor(
                found.name, dtype, tuple(map(int, shape)), self, int(found.data_offset), int(found.n_bytes)
            )
            if tensor.offset + tensor.nbytes > size:
                raise CheckpointError(
                    f"{self.path}: tensor {tensor.name!r}: expected bytes up to {tensor.offset + tensor.nbytes:,}, "
                    f"found a file of {size:,}"
                )
            self.tensors[tensor.name] = tensor
