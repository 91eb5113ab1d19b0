"""Find logical tensors: which stored tensors are codes and scales of one weight, by their names and dtypes.

One pass over the headers. A tensor that several layouts explain keeps all of them as candidates; `resolve` decides
between them when the tensor is asked for, by the documents that say which tool wrote the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cached_property, partial
from typing import Any, Final, NamedTuple, Protocol

from ..errors import CheckpointError, LayoutError
from ..format import BYTES_PER_BLOCK
from ..storage.jsonfile import parse_json
from ..storage.tensorfile import StoredTensor
from ..text import CELL_WIDTH, shorten
from .table import LAYOUTS, METADATA, Layout

TILE_KEYS: Final = ("weight_block_size", "block_structure", "block_size")
"""Keys of documents that say which values share a scale of FP8: rows and columns."""

GATE_UP: Final = {"/gate": slice(0, None, 2), "/up": slice(1, None, 2)}
"""Suffixes of a name for one half of its rows, if gate and up alternate."""


class Documents:
    """JSON files beside a checkpoint, and the metadata of its headers: read when needed, matched with evidence.

    ``read`` returns the JSON object in a file beside the checkpoint, or None if there is no such file.

    Attributes
    ----------
    problem : str
        What was wrong with a file that could not be read, empty if nothing was.
    """

    def __init__(self, metadata: Mapping[str, str], read: Callable[[str], Mapping[str, Any] | None]) -> None:
        self._metadata, self._read = metadata, read
        self._files: dict[str, Any] = {}
        self._values: dict[tuple[str, str], set[str]] = {}
        self._matches: dict[tuple[str, str, tuple[str | None, ...]], str | None] = {}
        self.problem = ""

    def support(self, layout: Layout, name: str) -> str | None:
        """Return the evidence for a layout of a logical tensor, in words, or None if there is none."""
        for evidence in layout.evidence:
            if self._document(evidence.source, name) is not None:
                matches = [self._match(evidence.source, name, *item) for item in evidence.values.items()]
                if None not in matches:
                    return f"{evidence.source}: {', '.join(filter(None, matches)) or 'is there'}"
        return None

    @cached_property
    def tiles(self) -> list[tuple[int, int]]:
        """The rows and columns of values that share a scale, by config.json and hf_quant_config.json."""
        found: dict[tuple[int, int], None] = {}
        left = [self._document(name, "") for name in ("config.json", "hf_quant_config.json")]
        while left:
            value = left.pop()
            if isinstance(value, dict):
                for key in TILE_KEYS:
                    match value.get(key):
                        case [int(rows), int(columns)] if rows > 0 and columns > 0:
                            found[rows, columns] = None
                left += value.values()
            elif isinstance(value, list):
                left += value
        return list(found)

    def is_swizzled(self, name: str) -> bool | None:
        """Return whether the scales of a logical tensor are swizzled, None if the header does not say."""
        found = self.values(METADATA, name, "is_swizzled_scales")
        return "true" in found if found else None

    def contradict(self, layout: Layout, name: str) -> bool:
        """Return whether the header has metadata of this tensor that does not match a layout."""
        return layout.has_metadata and self._document(METADATA, name) is not None and self.support(layout, name) is None

    def values(self, source: str, name: str, key: str) -> set[str]:
        """Return all values under a key of a document, at any depth, as lower-case text."""
        place = _place(source, name), key
        if place not in self._values:
            self._values[place] = set(_values_under(self._document(source, name), key))
        return self._values[place]

    def _match(self, source: str, name: str, key: str, patterns: tuple[str | None, ...]) -> str | None:
        """Return which value matches; if the key is missing, empty text if it may be; otherwise None."""
        place = _place(source, name), key, patterns
        if place not in self._matches:
            values = self.values(source, name, key)
            matching = (v for v in values if any(p and fnmatchcase(v, p) for p in patterns))
            value = min(matching, default=None)
            missing = "" if not values and None in patterns else None
            self._matches[place] = missing if value is None else f"{key} {shorten(value, CELL_WIDTH)}"
        return self._matches[place]

    def _document(self, source: str, name: str) -> Any:
        if source == METADATA:
            try:
                return parse_json(self._metadata[name])
            except (KeyError, ValueError):
                return None
        if source not in self._files:
            try:
                self._files[source] = self._read(source)
            except CheckpointError as error:
                self._files[source] = None
                self.problem = f" ({error})"
        return self._files[source]


def _place(source: str, name: str) -> str:
    return METADATA + name if source == METADATA else source


def _values_under(document: Any, key: str) -> Iterator[str]:
    """Yield all values under a key, at any depth, as lower-case text."""
    left = [(document, False)]
    while left:
        value, inside = left.pop()
        if isinstance(value, dict):
            left += [(inner, inside or name == key) for name, inner in value.items()]
        elif isinstance(value, list):
            left += [(inner, inside) for inner in value]
        elif inside:
            yield str(value).lower()


class Candidate(NamedTuple):
    """One interpretation of stored tensors: as codes and scales, of which one may be missing."""

    layout: Layout
    codes: StoredTensor | None
    scales: StoredTensor | None

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The stored tensors that exist."""
        return tuple(filter(None, (self.codes, self.scales)))


class Several(Protocol):
    """Stored tensors that are known to be one tensor."""

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The stored tensors."""
        ...

    @property
    def logical(self) -> str:
        """The logical name."""
        ...


Found = StoredTensor | list[Candidate] | Several
"""What is found for a logical name."""


def stored_of(found: Found) -> tuple[StoredTensor, ...]:
    """Return all stored tensors of what is found for a name."""
    if isinstance(found, StoredTensor):
        return (found,)
    if isinstance(found, list):
        return tuple(dict.fromkeys(tensor for candidate in found for tensor in candidate.stored))
    return found.stored


_CODES: Final = {dtype: [x for x in LAYOUTS if dtype in x.codes_dtypes] for y in LAYOUTS for dtype in y.codes_dtypes}
_SCALES: Final = {
    dtype: [x for x in LAYOUTS if x.scales and dtype in x.scales_dtypes] for y in LAYOUTS for dtype in y.scales_dtypes
}


def find_tensors(
    stored: Mapping[str, StoredTensor],
    documents: Documents,
    others: Container[str] = (),
    several: Iterable[Several] = (),
) -> dict[str, Found]:
    """Return the logical tensors, in stored order: the candidates of those that seem packed, all others as they are.

    ``others`` are the names of stored tensors that are not MXFP4; ``several`` are known to be one tensor.

    Raises
    ------
    LayoutError
        If two of them would have the same name.
    """
    names: dict[str, str] = {}  # stored to logical
    packed: dict[str, list[Candidate]] = {}
    for layouts, interpret in ((_CODES, _as_codes), (_SCALES, partial(_as_scales, documents=documents))):
        for tensor in stored.values():
            if tensor.dtype in layouts and tensor.name not in names and tensor.name not in others:
                for name, candidate in interpret(tensor, stored):
                    candidates = packed.setdefault(name, [])
                    if candidates and not any(part in x.stored for x in candidates for part in candidate.stored):
                        raise _same_name(candidate.stored, stored_of(candidates), name)
                    candidates.append(candidate)
                    for part in candidate.stored:
                        names[part.name] = name
    whole: dict[str, Found] = dict(packed)
    for tensors in several:
        names |= dict.fromkeys((part.name for part in tensors.stored), tensors.logical)
        if whole.setdefault(tensors.logical, tensors) is not tensors:
            raise _same_name(tensors.stored, stored_of(whole[tensors.logical]), tensors.logical)
    found: dict[str, Found] = {}
    for tensor in stored.values():
        name = names.get(tensor.name, tensor.name)
        value = whole[name] if tensor.name in names else tensor
        other = found.setdefault(name, value)
        if other is not value:
            raise _same_name((tensor,), stored_of(other), name)
    return found


def _same_name(some: tuple[StoredTensor, ...], others: tuple[StoredTensor, ...], name: str) -> LayoutError:
    stored = " and ".join(repr(tensor.name) for tensor in (*some, *others))
    return LayoutError(
        f"{some[0].file.path}: {stored} would all be called {name!r}: a checkpoint has one tensor of a name"
    )


def _as_codes(codes: StoredTensor, stored: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Candidate]]:
    """Yield the logical names and candidates in which a tensor is codes."""
    for layout in _CODES[codes.dtype]:
        if not codes.name.endswith(layout.codes):
            continue
        stem = codes.name.removesuffix(layout.codes)
        scales = None if layout.scales is None else stored.get(stem + layout.scales)
        if scales is None:
            packed = not layout.named_packed or layout.blocks_shape(codes.byte_shape) is not None
        else:
            packed = layout.named_packed or scales.dtype in layout.scales_dtypes or _one_scale_per_block(codes, scales)
        if packed:
            yield stem + layout.weight, Candidate(layout, codes, scales)


def _as_scales(
    scales: StoredTensor, stored: Mapping[str, StoredTensor], documents: Documents
) -> Iterator[tuple[str, Candidate]]:
    """Yield the logical names and candidates in which a tensor is scales, its codes missing or of a wrong dtype."""
    lone: dict[str, list[Candidate]] = {}  # by logical name
    has_codes = False
    for layout in _SCALES[scales.dtype]:
        if not layout.scales or not scales.name.endswith(layout.scales):
            continue
        stem = scales.name.removesuffix(layout.scales)
        codes = stored.get(stem + layout.codes)
        if codes is None:
            lone.setdefault(stem + layout.weight, []).append(Candidate(layout, None, scales))
            continue
        has_codes = True
        packed = (layout.named_packed and scales.dtype == "U8") or _one_scale_per_block(codes, scales)
        if packed and codes.dtype not in layout.codes_dtypes:
            yield stem + layout.weight, Candidate(layout, codes, scales)
    if lone and not has_codes:
        name = next(iter(lone))
        if len(lone) > 1:  # documents are read only if they are needed
            supported = (
                name for name, candidates in lone.items() if any(documents.support(x.layout, name) for x in candidates)
            )
            name = next(supported, name)
        yield from ((name, candidate) for candidate in lone[name])


def _one_scale_per_block(codes: StoredTensor, scales: StoredTensor) -> bool:
    *rows, length = codes.byte_shape
    return (*rows, length // BYTES_PER_BLOCK) == scales.shape and length % BYTES_PER_BLOCK == 0


def split_gate_up(name: object, tensors: Mapping[str, Found]) -> tuple[str, slice] | None:
    """Return the tensor and the rows that a name such as ``"x.mlp1_weight/gate"`` stands for; None if it is not one."""
    if not isinstance(name, str):
        return None
    for ending, rows in GATE_UP.items():
        whole = name.removesuffix(ending)
        if whole != name and whole in tensors and _has_rows(tensors[whole]):
            for weight, bias in (layout.gate_up for layout in LAYOUTS if layout.gate_up):
                other = whole.removesuffix(bias) + weight if whole.endswith(bias) else whole
                found = tensors.get(other) if other.endswith(weight) else None
                if isinstance(found, list) and any(candidate.layout.gate_up for candidate in found):
                    return whole, rows
    return None


def _has_rows(tensor: Found) -> bool:
    """Return whether a tensor has the axis of rows: of plain ones, which are biases, it is the last."""
    if isinstance(tensor, StoredTensor):
        return len(tensor.shape) > 0
    if not isinstance(tensor, list):
        return True
    return all(len(x.codes.shape) - x.layout.blocks_axis > 1 for x in tensor if x.codes is not None)
