"""How each producer names and packs MXFP4: one small entry for each, and the rules that find their tensors.

A layout turns stored tensors into logical ones: a pair of blocks and scales is one name. It looks at headers only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from .container import StoredTensor
from .errors import LayoutError
from .format import BLOCK_SIZE, BYTES_PER_BLOCK


@dataclass(frozen=True)
class Layout:
    """A producer's naming: ``{name}{blocks}`` holds U8 ``[..., G, 16]``, ``{name}{scales}`` U8 ``[..., G]``."""

    name: str
    blocks: str
    scales: str


LAYOUTS: Final = (
    Layout("gpt-oss", blocks=".blocks", scales=".scales"),
    Layout("gpt-oss-hf", blocks="_blocks", scales="_scales"),
)

_SUFFIXES: Final = tuple(suffix for layout in LAYOUTS for suffix in (layout.blocks, layout.scales))


class PackedTensor(NamedTuple):
    """A logical tensor stored as a pair, of which one half may be missing."""

    name: str
    layout: Layout
    blocks: StoredTensor | None
    scales: StoredTensor | None

    @property
    def halves(self) -> tuple[StoredTensor, ...]:
        """The stored tensors that are there."""
        return tuple(half for half in (self.blocks, self.scales) if half is not None)

    def pair(self) -> tuple[StoredTensor, StoredTensor]:
        """Return blocks and scales.

        Raises
        ------
        LayoutError
            If a half is missing, or the two do not fit each other.
        """
        blocks, scales = self.blocks, self.scales
        if blocks is None or scales is None:
            (half,) = self.halves
            missing = self.name + (self.layout.scales if blocks else self.layout.blocks)
            raise LayoutError(
                f"{half.file.path}: tensor {half.name!r} is half of an MXFP4 pair: expected {missing!r} in one of the "
                "checkpoint's files, found none; open the folder that holds all shards"
            )
        for half in (blocks, scales):
            if half.dtype != "U8":
                raise _misfit(half, "dtype U8", half.dtype)
        if not blocks.shape or blocks.shape[-1] != BYTES_PER_BLOCK:
            raise _misfit(blocks, f"shape [..., {BYTES_PER_BLOCK}], one block to a row", list(blocks.shape))
        if not scales.shape or blocks.shape[:-1] != scales.shape:
            expected = f"shape {list(blocks.shape[:-1])} to go with {list(blocks.shape)} of {blocks.name!r}"
            raise _misfit(scales, expected, list(scales.shape))
        return blocks, scales

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        scales = self.pair()[1]
        return (*scales.shape[:-1], scales.shape[-1] * BLOCK_SIZE)


def _misfit(tensor: StoredTensor, expected: str, found: object) -> LayoutError:
    return LayoutError(f"{tensor.file.path}: tensor {tensor.name!r}: expected {expected}, found {found}")


def find_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor | PackedTensor]:
    """Return the logical tensors, in stored order: packed pairs under one name, all others as they are.

    Raises
    ------
    LayoutError
        If two of them would have the same name.
    """
    found: dict[str, StoredTensor | PackedTensor] = {}
    for name, tensor in stored.items():
        logical: StoredTensor | PackedTensor = tensor
        if name.endswith(_SUFFIXES):
            logical = _packed(name, stored) or tensor
        other = found.setdefault(logical.name, logical)
        if other != logical:
            raise LayoutError(f"{tensor.file.path}: {name!r} and {_names(other)} would both be called {logical.name!r}")
    return found


def _packed(name: str, stored: Mapping[str, StoredTensor]) -> PackedTensor | None:
    for layout in LAYOUTS:
        for suffix in (layout.blocks, layout.scales):
            if name.endswith(suffix):
                stem = name.removesuffix(suffix)
                packed = PackedTensor(stem, layout, stored.get(stem + layout.blocks), stored.get(stem + layout.scales))
                return packed if _looks_packed(packed) else None
    return None


def _looks_packed(packed: PackedTensor) -> bool:
    """Tell a pair, or what is left of one, from tensors that only end in the same words, such as ``num_blocks``."""
    if packed.blocks is not None and packed.scales is not None:
        return "U8" in (packed.blocks.dtype, packed.scales.dtype)
    (half,) = packed.halves
    is_scales = packed.scales is not None
    return half.dtype == "U8" and (is_scales or half.shape[-1:] == (BYTES_PER_BLOCK,))


def _names(tensor: StoredTensor | PackedTensor) -> str:
    stored = tensor.halves if isinstance(tensor, PackedTensor) else (tensor,)
    return " and ".join(repr(half.name) for half in stored)
