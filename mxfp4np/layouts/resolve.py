"""Decide the layout of a tensor that seems to be packed: dtypes, shapes and evidence, checked against each other.

What fits no layout is refused with the reason, and so is what fits several without evidence for one. Tensors of
GGUF's own types have that layout if the gguf package decodes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

from ..errors import LayoutError
from ..storage.tensorfile import DTYPES, StoredTensor
from ..text import CELL_WIDTH, shorten
from .find import Candidate, Documents, Found
from .gguf import block_of
from .others import Others
from .packed import PackedTensor, swizzled_shape
from .scaled import ScaledCandidate, ScaledTensor
from .table import LAYOUTS, METADATA, Layout, Shape

Tensor: TypeAlias = PackedTensor | ScaledTensor | StoredTensor
"""A logical tensor of a known layout, or a stored one that is plain or not decoded."""

_GGUF: Final = next(layout for layout in LAYOUTS if layout.name == "gguf")


class Resolver:
    """Decides the layouts of the tensors of one checkpoint; takes the ``forced`` one where it is a candidate."""

    def __init__(self, others: Others, documents: Documents, forced: str | None) -> None:
        self._others, self._documents, self._forced = others, documents, forced

    def resolve(self, name: str, found: Found) -> Tensor:
        """Return a logical tensor in its layout, or the stored tensor if it is plain, or not decoded.

        Raises
        ------
        LayoutError
            If codes or scales are missing or inconsistent, or if there are several layouts.
        """
        if isinstance(found, StoredTensor):
            self._others.check_scale(found)
            return self._of_gguf(found)
        if isinstance(found, ScaledCandidate):
            return found.resolve(self._documents)
        assert isinstance(found, list)  # no others are found
        candidates = [x for x in found if x.layout.name == self._forced] or found
        complete = [x for x in candidates if x.codes and x.scales]
        if not complete:  # scales may be in the blocks
            inline = [x for x in candidates if x.layout.scales is None]
            complete = [x for x in inline if x.layout.headers_suffice or self._supported(x.layout, name)]
        return self._choose(name, complete) if complete else self._lone(name, candidates)

    def _of_gguf(self, tensor: StoredTensor) -> PackedTensor | StoredTensor:
        """Return a tensor of GGUF's own types as a packed one if the gguf package decodes it."""
        kind = tensor.dtype
        block = None if kind in DTYPES or self._others.format_of(tensor) != kind else block_of(kind)
        if block is None:
            return tensor
        *rows, length = tensor.shape
        blocks = (*rows, length // block[0], block[1])
        return PackedTensor(_GGUF, tensor, None, blocks, f"tensor type, {kind}", kind)

    def _supported(self, layout: Layout, name: str) -> bool:
        return layout.name == self._forced or self._documents.support(layout, name) is not None

    def _choose(self, name: str, candidates: Sequence[Candidate]) -> PackedTensor:
        """Return the one candidate that fits, or of several the one that has evidence."""
        fitting: list[PackedTensor] = []
        errors: list[LayoutError] = []
        for candidate in candidates:
            try:
                fitting.append(self._fit(name, candidate))
            except LayoutError as error:
                errors.append(error)
        if not fitting:
            raise errors[0]
        chosen = fitting if len(fitting) == 1 else [x for x in fitting if self._documents.support(x.layout, name)]
        if len(chosen) != 1 or not chosen[0].reason:
            raise self._undecided(name, chosen or fitting)
        return chosen[0]

    def _lone(self, name: str, candidates: Sequence[Candidate]) -> StoredTensor:
        """Return a tensor that is plain; raise if its codes or its scales are missing."""
        lone = candidates[0].stored[0]
        layouts = [x.layout for x in candidates if x.layout.scales is not None]
        supported = [layout for layout in layouts if self._supported(layout, name)]
        is_codes = candidates[0].codes is not None
        if is_codes and not supported and not layouts[0].named_packed and lone.dtype != "F4":
            self._others.check_scale(lone)
            return lone
        stem = name.removesuffix(layouts[0].weight)
        missing = dict.fromkeys(repr(f"{stem}{x.scales if is_codes else x.codes}") for x in supported or layouts)
        raise LayoutError(
            f"{lone.file.path}: tensor {lone.name!r} is half of {'an MXFP4 pair' if is_codes else 'a pair'}: expected "
            f"{' or '.join(missing)} in one of the checkpoint's files, found none; open the folder that holds all "
            "shards"
        )

    def _undecided(self, name: str, choices: Sequence[PackedTensor]) -> LayoutError:
        codes = choices[0].codes
        names = [packed.layout.name for packed in choices]
        methods = sorted(self._documents.values("config.json", name, "quant_method"))
        said = shorten(", ".join(methods[:3]), CELL_WIDTH)
        found = f"config.json says quant_method {said}" if methods else "no file beside it says"
        return LayoutError(
            f"{codes.file.path}: tensor {codes.name!r}: expected one layout, found that it could be "
            f"{' or '.join(names)}, and {found}{self._documents.problem}: force one, as with layout={names[0]!r}"
        )

    def _fit(self, name: str, candidate: Candidate) -> PackedTensor:
        """Return a candidate in its layout; raise if dtypes, shapes or metadata do not match it."""
        layout, codes, scales = candidate
        assert codes is not None  # candidates without are not complete
        if codes.dtype not in layout.codes_dtypes:
            raise _mismatch(codes, f"dtype {' or '.join(layout.codes_dtypes)}", codes.dtype)
        if scales is not None and scales.dtype not in layout.scales_dtypes:
            expected = " or ".join(layout.scales_dtypes)
            raise _mismatch(scales, f"dtype {expected}", scales.dtype)
        blocks = layout.blocks_shape(codes.byte_shape)
        if blocks is None:
            size = layout.block_bytes
            rows = f"[..., {size}], one block to a row" if layout.blocks_axis else f"with rows of {size}-byte blocks"
            raise _mismatch(codes, f"shape {rows}", list(codes.shape))
        if scales is not None:
            _check_scales(layout, codes, scales, blocks)
        if self._documents.contradict(layout, name):
            values = layout.evidence[0].values
            expected = ", ".join(f"{key} {' or '.join(filter(None, patterns))}" for key, patterns in values.items())
            raise _mismatch(codes, f"{METADATA} of {name!r} with {expected}", "other metadata")
        return PackedTensor(layout, codes, scales, blocks, self._reason(name, candidate))

    def _reason(self, name: str, candidate: Candidate) -> str:
        layout = candidate.layout
        if layout.name == self._forced:
            return f"layout={layout.name!r}"
        if not layout.headers_suffice:
            return self._documents.support(layout, name) or ""
        kind = "tensor type" if candidate.scales is None else "suffix pair" if layout.scales else "named pair"
        headers = f"{kind}, {'/'.join(tensor.dtype for tensor in candidate.stored)}"
        support = self._documents.support(layout, name) if layout.has_metadata else None
        return f"{headers}, {support}" if support else headers


def _check_scales(layout: Layout, codes: StoredTensor, scales: StoredTensor, blocks: Shape) -> None:
    expected = swizzled_shape(blocks[:-1]) if layout.swizzled else blocks[:-1]
    if scales.shape == expected and scales.shape:
        return
    raise _mismatch(
        scales, f"shape {list(expected)} to go with {list(codes.shape)} of {codes.name!r}", list(scales.shape)
    )


def _mismatch(tensor: StoredTensor, expected: str, found: object) -> LayoutError:
    return LayoutError(f"{tensor.file.path}: tensor {tensor.name!r}: expected {expected}, found {found}")
