"""Find logical tensors: which stored tensors are codes and scales of one weight, by their names and dtypes.

One pass over the headers. A tensor that several layouts explain keeps all of them as candidates; `resolve` decides
between them when the tensor is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple

from ..errors import LayoutError
from ..format import BYTES_PER_BLOCK
from ..storage.tensorfile import StoredTensor
from .evidence import Documents
from .table import LAYOUTS, Layout

FLOAT8_DTYPES: Final = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
"""Dtypes of one-byte weights, which may have E8M0 scales of their own: MXFP8 and DeepSeek's FP8."""

GATE_UP: Final = {"/gate": slice(0, None, 2), "/up": slice(1, None, 2)}
"""Suffixes of a name for one half of its rows, if gate and up alternate."""

Group = tuple[Layout, ...]
"""Layouts that give their tensors the same suffixes."""


class Candidate(NamedTuple):
    """One interpretation of stored tensors: as codes and scales, of which one may be missing."""

    layouts: Group
    codes: StoredTensor | None
    scales: StoredTensor | None

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The stored tensors that exist."""
        return tuple(filter(None, (self.codes, self.scales)))


class UnresolvedTensor(NamedTuple):
    """A logical tensor that seems to be packed, with all its candidates: usually one."""

    name: str
    candidates: tuple[Candidate, ...]

    @property
    def alternates(self) -> bool:
        """Whether its rows may alternate between gate and up."""
        return any(layout.gate_up for candidate in self.candidates for layout in candidate.layouts)

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The stored tensors of all candidates."""
        return tuple(dict.fromkeys(tensor for candidate in self.candidates for tensor in candidate.stored))


def _suffixes(part: str) -> dict[str, list[tuple[str, Group]]]:
    """Return for each dtype the suffixes of names of codes or scales, and the layouts that use them."""
    groups: dict[tuple[str, str | None], list[Layout]] = {}
    for layout in LAYOUTS:
        groups.setdefault((layout.codes, layout.scales), []).append(layout)
    found: dict[str, list[tuple[str, Group]]] = {}
    for group in groups.values():
        suffix = getattr(group[0], part)
        if suffix is not None:
            for dtype in {dtype for layout in group for dtype in getattr(layout, f"{part}_dtypes")}:
                found.setdefault(dtype, []).append((suffix, tuple(group)))
    return found


_CODES: Final = _suffixes("codes")
_SCALES: Final = _suffixes("scales")


def find_tensors(
    stored: Mapping[str, StoredTensor], documents: Documents
) -> dict[str, StoredTensor | UnresolvedTensor]:
    """Return the logical tensors, in stored order: codes and scales under one name, all others as they are.

    Parameters
    ----------
    stored : mapping of str to StoredTensor
        All tensors of the files.
    documents : Documents

    Raises
    ------
    LayoutError
        If two of them would have the same name.
    """
    names: dict[str, str] = {}  # stored to logical
    packed: dict[str, UnresolvedTensor] = {}
    for suffixes, interpret in ((_CODES, _as_codes), (_SCALES, partial(_as_scales, documents=documents))):
        for tensor in stored.values():
            if tensor.dtype in suffixes and tensor.name not in names:
                for name, candidate in interpret(tensor, stored):
                    before = packed.get(name)
                    if before is None:
                        packed[name] = UnresolvedTensor(name, (candidate,))
                    elif set(before.stored) & set(candidate.stored):
                        packed[name] = UnresolvedTensor(name, (*before.candidates, candidate))
                    else:
                        raise _same_name(candidate.stored, before.stored, name)
                    for part in candidate.stored:
                        names[part.name] = name
    found: dict[str, StoredTensor | UnresolvedTensor] = {}
    for name, tensor in stored.items():
        value = packed[names[name]] if name in names else tensor
        other = found.setdefault(value.name, value)
        if other is not value:
            raise _same_name((tensor,), other.stored if isinstance(other, UnresolvedTensor) else (other,), value.name)
    return found


def _same_name(some: Sequence[StoredTensor], others: Sequence[StoredTensor], name: str) -> LayoutError:
    stored = " and ".join(repr(tensor.name) for tensor in (*some, *others))
    return LayoutError(
        f"{some[0].file.path}: {stored} would all be called {name!r}: a checkpoint has one tensor of a name"
    )


def _as_codes(codes: StoredTensor, stored: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Candidate]]:
    """Yield the logical names and candidates in which a tensor is codes."""
    for suffix, group in _CODES[codes.dtype]:
        if not codes.name.endswith(suffix):
            continue
        stem, layout = codes.name.removesuffix(suffix), group[0]
        scales = None if layout.scales is None else stored.get(stem + layout.scales)
        if scales is None:
            packed = not layout.named_packed or layout.blocks_shape(codes.byte_shape) is not None
        elif layout.without and stem + layout.without in stored:
            packed = False
        else:
            packed = (
                layout.named_packed
                or scales.dtype in (*layout.scales_dtypes, "F8_E4M3")
                or _one_scale_per_block(codes, scales)
            )
        if packed:
            yield stem + layout.weight, Candidate(group, codes, scales)


def _as_scales(
    scales: StoredTensor, stored: Mapping[str, StoredTensor], documents: Documents
) -> Iterator[tuple[str, Candidate]]:
    """Yield the logical names and candidates in which a tensor is scales, its codes missing or of a wrong dtype."""
    lone: dict[str, list[Candidate]] = {}  # by logical name
    has_codes = False
    for suffix, group in _SCALES[scales.dtype]:
        if not scales.name.endswith(suffix):
            continue
        stem, layout = scales.name.removesuffix(suffix), group[0]
        codes = stored.get(stem + layout.codes)
        if codes is None:
            lone.setdefault(stem + layout.weight, []).append(Candidate(group, None, scales))
            continue
        has_codes = True
        packed = (layout.named_packed and scales.dtype == "U8") or _one_scale_per_block(codes, scales)
        if packed and codes.dtype not in (*layout.codes_dtypes, *FLOAT8_DTYPES):
            yield stem + layout.weight, Candidate(group, codes, scales)
    if lone and not has_codes:
        name = next(iter(lone))
        if len(lone) > 1:  # documents are read only if they are needed
            supported = (
                name
                for name, candidates in lone.items()
                if any(documents.support(layout, name) for one in candidates for layout in one.layouts)
            )
            name = next(supported, name)
        yield from ((name, candidate) for candidate in lone[name])


def _one_scale_per_block(codes: StoredTensor, scales: StoredTensor) -> bool:
    *rows, length = codes.byte_shape
    return (*rows, length // BYTES_PER_BLOCK) == scales.shape and length % BYTES_PER_BLOCK == 0


def split_gate_up(name: object, tensors: Mapping[str, StoredTensor | UnresolvedTensor]) -> tuple[str, slice] | None:
    """Return the tensor and the rows that a name such as ``"x.mlp1_weight/gate"`` stands for; None if it is not one."""
    if not isinstance(name, str):
        return None
    for ending, rows in GATE_UP.items():
        whole = name.removesuffix(ending)
        if whole != name and whole in tensors:
            for weight, bias in (layout.gate_up for layout in LAYOUTS if layout.gate_up):
                weights = tensors.get(whole.removesuffix(bias) + weight if whole.endswith(bias) else whole)
                if isinstance(weights, UnresolvedTensor) and weights.name.endswith(weight) and weights.alternates:
                    return whole, rows
    return None
