"""Names that the caller gives: logical names of stored tensors, and of pairs of them that no layout of the table finds.

A pair is checked as that of any layout; what is not named is found by the table.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from ..errors import LayoutError
from ..storage.tensorfile import StoredTensor
from .find import Candidate, Documents, Found, Several, find_tensors
from .table import Layout

Names = Mapping[str, str | Sequence[str]]
"""Logical names, and for each the stored name, or those of codes and scales."""

_PAIR: Final = Layout("names", "", "", "", ("U8", "I8", "U32", "F4"), ("U8", "F8_E8M0"))


def as_names(names: Names | Callable[[str], str], stored: Mapping[str, StoredTensor]) -> Names:
    """Return names as a mapping. Two stored names of one logical name are a pair, of which the larger is the codes."""
    if isinstance(names, Mapping):
        return names
    groups: dict[str, list[StoredTensor]] = {}
    for tensor in stored.values():
        groups.setdefault(names(tensor.name), []).append(tensor)
    found = {name: [x.name for x in sorted(group, key=lambda x: -x.nbytes)] for name, group in groups.items()}
    return {name: halves if len(halves) > 1 else halves[0] for name, halves in found.items() if halves != [name]}


def find_named(
    stored: Mapping[str, StoredTensor],
    documents: Documents,
    names: Names,
    others: Container[str] = (),
    several: Iterable[Several] = (),
) -> dict[str, Found]:
    """Return the logical tensors, as `find_tensors`. Names of which nothing is stored are left out."""
    pairs: dict[str, list[Candidate]] = {}
    renamed: dict[str, str] = {}
    several = list(several)
    known = {half.name: x for x in several for half in x.stored}
    for name, given in names.items():
        halves = [given] if isinstance(given, str) else list(given) if isinstance(given, list | tuple) else []
        halves = halves if all(isinstance(half, str) for half in halves) else []
        missing = [half for half in halves if half not in stored]
        if len(halves) > 1 and halves[0] in known and set(halves) <= {half.name for half in known[halves[0]].stored}:
            renamed[known[halves[0]].logical] = name
            continue
        if len(halves) not in (1, 2) or (len(halves) == 2 and len(missing) == 1):
            problem = f"no tensor {missing[0]!r} is stored" if missing else f"found {given!r}"
            raise LayoutError(f"names: {name!r}: expected a stored name, or those of codes and scales: {problem}")
        if len(halves) == 1:
            renamed[halves[0]] = name
        elif not missing:
            codes, scales = (stored[half] for half in halves)
            layout = replace(_PAIR, blocks_axis=len(codes.shape) > len(scales.shape))
            pairs[name] = [Candidate(layout, codes, scales)]
    taken = {half.name for pair in pairs.values() for half in pair[0].stored}
    several = [x for x in several if not any(half.name in taken for half in x.stored)]
    left = {name: tensor for name, tensor in stored.items() if name not in taken}
    rest = find_tensors(left, documents, others, several)
    found = [(renamed.get(name, name), tensor) for name, tensor in rest.items()]
    for half in (renamed.keys() & stored.keys()) - rest.keys():
        raise LayoutError(f"names: {renamed[half]!r}: {half!r} is half of a pair: name both, codes and scales")
    result: dict[str, Found] = {**pairs, **dict(found)}
    if len(result) < len(pairs) + len(found):
        raise LayoutError("names: two tensors would have the same name")
    if names and not pairs and not renamed.keys() & rest.keys():
        raise LayoutError(f"names: expected names of stored tensors, found no {next(iter(names.values()))!r}")
    return result
