"""How each producer names and packs MXFP4: one small entry for each, and the rules that find their tensors.

A layout turns stored tensors into logical ones: a pair of codes and scales is one name. Headers decide; where several
layouts have the same headers, what the tool wrote beside them does, and where nothing does, nobody guesses. This module
looks at headers and makes views; it reads no tensor. See docs/adding-a-layout.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError, LayoutError
from ..format import BLOCK_SIZE, BYTES_PER_BLOCK, SCALE_BIAS, TRANSPOSE
from ..storage.safetensors import StoredTensor, element

Shape = tuple[int, ...]

FLOAT8_DTYPES: Final = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
"""Dtypes of weights of one byte, which may have E8M0 scales of their own: MXFP8 and DeepSeek's FP8."""

METADATA: Final = "__metadata__"
"""In place of a file's name: what the safetensors header itself says of a tensor, as JSON under its logical name."""


class Says(NamedTuple):
    """What a file beside the checkpoint says if it was written by a certain tool."""

    source: str
    """A file's name, or `METADATA`."""
    values: Mapping[str, tuple[str | None, ...]] = {}
    """Keys, at any depth, and patterns of which one must match a value there. None: the key may be missing."""


# How the packed tensor becomes blocks: from its shape, the last axis in bytes, to [..., G, bytes of a block].


def as_blocks(shape: Shape) -> Shape | None:
    """Blocks as they are, one to a row."""
    return shape if shape[-1:] == (BYTES_PER_BLOCK,) else None


def as_rows(shape: Shape) -> Shape | None:
    """Rows of codes, cut into blocks."""
    return _cut(shape, BYTES_PER_BLOCK)


def as_inline(shape: Shape) -> Shape | None:
    """Rows of blocks that begin with their scale, one byte."""
    return _cut(shape, 1 + BYTES_PER_BLOCK)


def _cut(shape: Shape, size: int) -> Shape | None:
    return (*shape[:-1], shape[-1] // size, size) if shape and shape[-1] % size == 0 else None


@dataclass(frozen=True)
class Layout:
    """A producer's way to store a tensor.

    Attributes
    ----------
    name : str
    codes, scales : str
        What the names of the packed and the scale tensor end in; ``scales`` is None if blocks begin with their scale.
    weight : str
        What takes the place of that ending in the logical name.
    codes_dtypes, scales_dtypes : tuple of str
        As headers spell them. They are always viewed by their bits.
    blocks : callable
        `as_blocks`, `as_rows` or `as_inline`.
    swizzled : bool
        Whether scales lie in tiles of 128 rows and 4 columns.
    bias : int
        Added to a stored scale to make it E8M0.
    order : {"pairs", "halves"}
        Of the elements of a block; see `mxfp4np.format.ORDERS`.
    without : str
        Where a tensor that ends in this stands beside, the codes are not MXFP4.
    evidence : tuple of Says
        What tells the layout besides headers; any one of them.
    headers_suffice : bool
        Whether headers tell the layout without evidence.
    gate_up : tuple of str
        What the names of weights and biases end in whose rows alternate between gate and up.
    turned : bool
        Whether the model that loads these weights unpacked wants them transposed, ``[.., in, out]``.
    """

    name: str
    codes: str
    scales: str | None
    weight: str = ".weight"
    codes_dtypes: tuple[str, ...] = ("U8",)
    scales_dtypes: tuple[str, ...] = ("U8",)
    blocks: Callable[[Shape], Shape | None] = as_rows
    swizzled: bool = False
    bias: int = 0
    order: str = "pairs"
    without: str = ""
    evidence: tuple[Says, ...] = ()
    headers_suffice: bool = True
    gate_up: tuple[str, ...] = ()
    turned: bool = False

    @property
    def named_packed(self) -> bool:
        """Whether the name of the codes alone says that they are packed."""
        return self.codes != self.weight

    @property
    def has_metadata(self) -> bool:
        """Whether the header says of each tensor how it is stored."""
        return any(says.source == METADATA for says in self.evidence)

    def scales_shape(self, blocks: Shape) -> Shape:
        """Return the shape of the scale tensor that goes with blocks."""
        if not self.swizzled:
            return blocks[:-1]
        *lead, rows, groups = _at_least_2d(blocks[:-1])
        return (*lead, 32 * -(-rows // 128), 16 * -(-groups // 4))

    def view_scales(self, flat: NDArray[np.uint8], blocks: Shape) -> NDArray[np.uint8]:
        """Return ``[..., G]`` scales of blocks: a view of the bytes, or a copy where they are swizzled.

        Byte ``4 * q + c`` of row ``r`` of a tile is the scale of row ``32 * q + r``, column ``c``; tiles follow in C
        order.
        """
        if not self.swizzled:
            return flat.reshape(blocks[:-1])
        *lead, rows, groups = _at_least_2d(blocks[:-1])
        down, across = -(-rows // 128), -(-groups // 4)
        # From [.., down, across, r, q, c] to [.., down, q, r, across, c].
        tiles = flat.reshape(*lead, down, across, 32, 4, 4)
        whole = np.moveaxis(tiles, (-2, -4), (-4, -2)).reshape(*lead, 128 * down, 4 * across)
        return whole[..., :rows, :groups].reshape(blocks[:-1])


def _at_least_2d(shape: Shape) -> Shape:
    return (1, *shape) if len(shape) == 1 else shape


def _torchao(name: str, *, swizzled: bool) -> Layout:
    said: dict[str, tuple[str | None, ...]] = {"elem_dtype": ("float4_e2m1fn_x2",), "block_size": ("32",)}
    said["is_swizzled_scales"] = ("true",) if swizzled else ("false", None)
    e8m0 = ("F8_E8M0",)
    evidence = (Says(METADATA, said),)
    return Layout(name, "._weight_qdata", "._weight_scale", scales_dtypes=e8m0, swizzled=swizzled, evidence=evidence)


LAYOUTS: Final = (
    Layout("gpt-oss", ".blocks", ".scales", weight="", blocks=as_blocks, gate_up=("mlp1_weight", "mlp1_bias")),
    Layout(
        "gpt-oss-hf",
        "_blocks",
        "_scales",
        weight="",
        blocks=as_blocks,
        gate_up=("gate_up_proj", "gate_up_proj_bias"),
        turned=True,
    ),
    Layout("compressed-tensors", ".weight_packed", ".weight_scale"),
    Layout(
        "quark",
        ".weight",
        ".weight_scale",
        evidence=(Says("config.json", {"quant_method": ("quark",), "dtype": ("fp4",)}),),
        headers_suffice=False,
    ),
    Layout(
        "modelopt",
        ".weight",
        ".weight_scale",
        evidence=(
            Says("config.json", {"quant_algo": ("*mxfp4*",)}),
            Says("hf_quant_config.json", {"quant_algo": ("*mxfp4*",)}),
        ),
        headers_suffice=False,
    ),
    Layout(
        "modelslim",
        ".weight",
        ".weight_scale",
        evidence=(Says("quant_model_description.json"),),
        headers_suffice=False,
    ),
    Layout(
        "quark-mx",
        ".weight",
        None,
        blocks=as_inline,
        bias=SCALE_BIAS,
        evidence=(
            Says("config.json", {"quant_method": ("quark",), "dtype": ("mx",), "mx_element_dtype": ("fp4", None)}),
        ),
        headers_suffice=False,
    ),
    Layout(
        "deepseek",
        ".weight",
        ".scale",
        codes_dtypes=("I8", "F4"),
        scales_dtypes=("F8_E8M0",),
        evidence=(Says("config.json", {"expert_dtype": ("fp4",)}),),
    ),
    Layout(
        "mlx",
        ".weight",
        ".scales",
        codes_dtypes=("U32",),
        without=".biases",
        evidence=(Says("config.json", {"mode": ("mxfp4",)}),),
    ),
    _torchao("torchao", swizzled=False),
    _torchao("torchao-swizzled", swizzled=True),
    Layout("uqff", ".weight", ".weight.scales"),
    Layout("gguf", "", None, weight="", codes_dtypes=("MXFP4",), blocks=as_inline, order="halves"),
)


def is_turned(layout: str, shape: Shape, transpose: str) -> bool:
    """Tell whether a packed tensor of this layout and shape is to be transposed, by one word of `TRANSPOSE`."""
    if transpose not in TRANSPOSE:
        raise ValueError(f"transpose must be 'auto', 'yes' or 'no', found {transpose!r}")
    wanted = transpose == "yes" or (transpose == "auto" and any(x.turned for x in LAYOUTS if x.name == layout))
    return wanted and len(shape) > 1


NVFP4_SCALES: Final = (".weight_scale_2", ".weight_global_scale", "._weight_per_tensor_scale")
"""What the second, global scale of an NVFP4 tensor is called; MXFP4 has none."""


class Evidence:
    """What is known of a checkpoint beside one tensor's headers.

    Parameters
    ----------
    stored : mapping of str to StoredTensor
        All that the files hold.
    metadata : mapping of str to str
        Of the files.
    read : callable
        Returns the JSON object in a file beside the checkpoint, or None if there is no such file.
    forced : str, optional
        Name of the layout that the caller says it is.
    """

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        metadata: Mapping[str, str],
        read: Callable[[str], Mapping[str, Any] | None],
        forced: str | None,
    ) -> None:
        self.stored, self.forced = stored, forced
        self._metadata, self._read = metadata, read
        self._documents: dict[str, Any] = {}
        self._values: dict[tuple[str, str], set[str]] = {}
        self.problem = ""

    def about(self, layout: Layout, name: str) -> str | None:
        """Return what speaks for a layout of a logical tensor, as a sentence, or None."""
        for says in layout.evidence:
            if self._document(says.source, name) is not None:
                matches = [self._match(says.source, name, *item) for item in says.values.items()]
                if None not in matches:
                    return f"{says.source}: {', '.join(filter(None, matches)) or 'is there'}"
        return None

    def against(self, layout: Layout, name: str) -> bool:
        """Return whether the header's own metadata says of this very tensor that it is not of a layout."""
        return layout.has_metadata and self._document(METADATA, name) is not None and self.about(layout, name) is None

    def values(self, source: str, name: str, key: str) -> set[str]:
        """Return all values under a key, at any depth, as lower-case text."""
        place = (source if source != METADATA else METADATA + name, key)
        if place not in self._values:
            self._values[place] = set(_under(self._document(source, name), key))
        return self._values[place]

    def _match(self, source: str, name: str, key: str, patterns: tuple[str | None, ...]) -> str | None:
        """Return which of the values matches, an empty text if there is none and need not be, or None."""
        values = self.values(source, name, key)
        if not values:
            return "" if None in patterns else None
        return next((f"{key} {v}" for v in sorted(values) if any(p and fnmatchcase(v, p) for p in patterns)), None)

    def _document(self, source: str, name: str) -> Any:
        if source == METADATA:
            try:
                return json.loads(self._metadata[name])
            except (KeyError, ValueError, RecursionError):
                return None
        if source not in self._documents:
            try:
                self._documents[source] = self._read(source)
            except CheckpointError as error:
                self._documents[source] = None
                self.problem = f" ({error})"
        return self._documents[source]


def _under(document: Any, key: str, *, inside: bool = False) -> Iterator[str]:
    if isinstance(document, dict):
        for name, value in document.items():
            yield from _under(value, key, inside=inside or name == key)
    elif isinstance(document, list):
        for value in document:
            yield from _under(value, key, inside=inside)
    elif inside:
        yield str(document).lower()


class Packed(NamedTuple):
    """A logical tensor whose layout is known and whose parts fit each other."""

    name: str
    layout: Layout
    codes: StoredTensor
    scales: StoredTensor | None
    """None if they are in the blocks."""
    blocks: Shape
    """``[..., G, bytes of a block]``."""
    reason: str
    """Why it is this layout."""

    @property
    def shape(self) -> Shape:
        """Of the values."""
        *lead, groups, _ = self.blocks
        return (*lead, groups * BLOCK_SIZE)

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The stored tensors it consists of."""
        return (self.codes,) if self.scales is None else (self.codes, self.scales)


class Reading(NamedTuple):
    """One way to understand stored tensors: as codes and scales, of which one may be missing."""

    layouts: tuple[Layout, ...]
    """Layouts that name them so."""
    codes: StoredTensor | None
    scales: StoredTensor | None

    @property
    def halves(self) -> tuple[StoredTensor, ...]:
        """The stored tensors that are there."""
        return tuple(filter(None, (self.codes, self.scales)))


class PackedTensor(NamedTuple):
    """A logical tensor that seems to be packed, with all ways to understand it: usually one."""

    name: str
    readings: tuple[Reading, ...]

    @property
    def alternates(self) -> bool:
        """Whether its rows may alternate between gate and up."""
        return any(layout.gate_up for reading in self.readings for layout in reading.layouts)

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The stored tensors it may consist of."""
        return tuple(dict.fromkeys(half for reading in self.readings for half in reading.halves))

    def resolve(self, evidence: Evidence) -> Packed | StoredTensor:
        """Return the one way to understand the tensor, or the stored tensor if it is plain after all.

        Raises
        ------
        LayoutError
            If a half is missing, if the parts do not fit each other, or if there are several ways.
        """
        readings = [r._replace(layouts=tuple(x for x in r.layouts if x.name == evidence.forced)) for r in self.readings]
        readings = [reading for reading in readings if reading.layouts] or list(self.readings)
        pairs = [reading for reading in readings if reading.codes and reading.scales]
        inline = [reading for reading in readings if reading.codes and reading.layouts[0].scales is None]
        if pairs:
            return self._choose(pairs, evidence)
        sure = [reading for reading in inline if self._is_sure(reading.layouts[0], evidence)]
        if sure:
            return self._choose(sure, evidence)
        return self._half(readings, evidence)

    def _is_sure(self, layout: Layout, evidence: Evidence) -> bool:
        return layout.headers_suffice or layout.name == evidence.forced or bool(evidence.about(layout, self.name))

    def _choose(self, readings: list[Reading], evidence: Evidence) -> Packed:
        fits: list[Packed] = []
        errors = []
        for reading in readings:
            for layout in reading.layouts:
                try:
                    fits.append(_fit(self.name, layout, reading, evidence))
                except LayoutError as error:
                    errors.append(error)
        if not fits:
            raise errors[0]
        told = fits if len(fits) == 1 else [fit for fit in fits if evidence.about(fit.layout, self.name)]
        if len(told) != 1 or not told[0].reason:
            raise _undecided(self.name, told or fits, evidence)
        return told[0]

    def _half(self, readings: list[Reading], evidence: Evidence) -> StoredTensor:
        """Return what is a half of nothing; raise if it is half of a pair."""
        lone = readings[0].halves[0]
        layouts = [layout for reading in readings for layout in reading.layouts if layout.scales is not None]
        said = [x for x in layouts if evidence.forced == x.name or evidence.about(x, self.name)]
        is_codes = readings[0].codes is not None
        if is_codes and not said and not layouts[0].named_packed and lone.dtype != "F4":
            return lone
        stem = self.name.removesuffix(layouts[0].weight)
        missing = dict.fromkeys(repr(stem + str(x.scales if is_codes else x.codes)) for x in said or layouts)
        raise LayoutError(
            f"{lone.file.path}: tensor {lone.name!r} is half of an MXFP4 pair: expected {' or '.join(missing)} in one "
            "of the checkpoint's files, found none; open the folder that holds all shards"
        )


def _undecided(name: str, choices: list[Packed], evidence: Evidence) -> LayoutError:
    codes = choices[0].codes
    names = [packed.layout.name for packed in choices]
    methods = sorted(evidence.values("config.json", name, "quant_method"))
    found = f"config.json says quant_method {', '.join(methods)}" if methods else "no file beside it says"
    return LayoutError(
        f"{codes.file.path}: tensor {codes.name!r}: expected one layout, found that it could be {' or '.join(names)}, "
        f"and {found}{evidence.problem}: force one, as with layout={names[0]!r}"
    )


def _fit(name: str, layout: Layout, reading: Reading, evidence: Evidence) -> Packed:
    """Return a tensor in one layout, its reason empty if nothing tells that it is; raise if it cannot be."""
    codes, scales = reading.codes, reading.scales
    assert codes is not None  # readings without are half a pair
    for half, accepted in ((codes, layout.codes_dtypes), (scales, layout.scales_dtypes)):
        if half is not None and half.dtype not in accepted:
            if half is scales and half.dtype == "F8_E4M3":
                raise _other(codes, "NVFP4", f"{' or '.join(accepted)} scales", "F8_E4M3 scales")
            raise _misfit(half, f"dtype {' or '.join(accepted)}", half.dtype)
    stem = codes.name.removesuffix(layout.codes)
    for suffix in NVFP4_SCALES:
        if layout.codes and stem + suffix in evidence.stored:
            raise _other(codes, "NVFP4", "no global scale", repr(stem + suffix))
    blocks = layout.blocks(byte_shape(codes))
    if blocks is None:
        size = BYTES_PER_BLOCK + (layout.scales is None)
        rows = (
            f"[..., {size}], one block to a row" if layout.blocks is as_blocks else f"with rows of {size}-byte blocks"
        )
        raise _misfit(codes, f"shape {rows}", list(codes.shape))
    if scales is not None and (scales.shape != layout.scales_shape(blocks) or not scales.shape):
        if len(blocks) > 1 and scales.shape == (*blocks[:-2], 2 * blocks[-2]):
            raise _other(codes, "NVFP4", f"a scale for {BLOCK_SIZE} values", "one for 16")
        if len(blocks) > 1 and scales.shape == (*blocks[:-2], blocks[-2] / 2):
            raise _other(codes, "MXFP8", f"a scale for {BYTES_PER_BLOCK} bytes", "one for 32")
        expected = f"shape {list(layout.scales_shape(blocks))} to go with {list(codes.shape)} of {codes.name!r}"
        raise _misfit(scales, expected, list(scales.shape))
    if evidence.against(layout, name):
        said = ", ".join(f"{key} {' or '.join(filter(None, v))}" for key, v in layout.evidence[0].values.items())
        raise _misfit(codes, f"{METADATA} of {name!r} with {said}", "other metadata")
    return Packed(name, layout, codes, scales, blocks, _reason(name, layout, reading, evidence))


def _reason(name: str, layout: Layout, reading: Reading, evidence: Evidence) -> str:
    if layout.name == evidence.forced:
        return f"layout={layout.name!r}"
    if not layout.headers_suffice:
        return evidence.about(layout, name) or ""
    what = "suffix pair" if reading.scales else "tensor type"
    headers = f"{what}, {'/'.join(half.dtype for half in reading.halves)}"
    said = evidence.about(layout, name) if layout.has_metadata else None
    return f"{headers}, {said}" if said else headers


def _misfit(tensor: StoredTensor, expected: str, found: object) -> LayoutError:
    return LayoutError(f"{tensor.file.path}: tensor {tensor.name!r}: expected {expected}, found {found}")


def _other(codes: StoredTensor, what: str, expected: str, found: str) -> LayoutError:
    return LayoutError(
        f"{codes.file.path}: tensor {codes.name!r} is {what}, not MXFP4: expected {expected}, found {found}; its bytes "
        "are in .stored"
    )


def byte_shape(tensor: StoredTensor) -> Shape:
    """Return the shape of a tensor whose last axis counts bytes; flat where a row is no whole number of them."""
    *rows, length = tensor.shape or (1,)
    bits = length * element(tensor.dtype)[0]
    return (*rows, bits // 8) if bits % 8 == 0 else (tensor.nbytes,)


# Finding tensors

Namings = tuple[tuple[Layout, ...], ...]
"""Layouts in groups that name their tensors alike."""


def _endings(
    ending: Callable[[Layout], str | None], dtypes: Callable[[Layout], tuple[str, ...]]
) -> dict[str, list[tuple[str, Namings]]]:
    """Return what to look for: for each dtype, the endings of names, and who names tensors so."""
    alike: dict[tuple[str, str | None], list[Layout]] = {}
    for layout in LAYOUTS:
        alike.setdefault((layout.codes, layout.scales), []).append(layout)
    table: dict[str, dict[str, list[tuple[Layout, ...]]]] = {}
    for naming in alike.values():
        end = ending(naming[0])
        if end is not None:
            for dtype in {dtype for layout in naming for dtype in dtypes(layout)}:
                table.setdefault(dtype, {}).setdefault(end, []).append(tuple(naming))
    return {dtype: [(end, tuple(namings)) for end, namings in ends.items()] for dtype, ends in table.items()}


_CODES: Final = _endings(lambda layout: layout.codes, lambda layout: layout.codes_dtypes)
_SCALES: Final = _endings(lambda layout: layout.scales, lambda layout: layout.scales_dtypes)


def find_tensors(evidence: Evidence) -> dict[str, StoredTensor | PackedTensor]:
    """Return the logical tensors, in stored order: packed ones under one name, all others as they are.

    Raises
    ------
    LayoutError
        If two of them would have the same name.
    """
    stored = evidence.stored
    names: dict[str, str] = {}  # logical by stored
    packed: dict[str, PackedTensor] = {}
    for endings, understand in ((_CODES, _with_codes), (_SCALES, _with_scales)):
        for tensor in stored.values():
            if tensor.dtype in endings and tensor.name not in names:
                for name, reading in understand(tensor, evidence):
                    before = packed.get(name)
                    if before is None:
                        packed[name] = PackedTensor(name, (reading,))
                    elif set(before.stored) & set(reading.halves):
                        packed[name] = PackedTensor(name, (*before.readings, reading))
                    else:
                        raise _same_name(reading.halves, before.stored, name)
                    for half in reading.halves:
                        names[half.name] = name
    found: dict[str, StoredTensor | PackedTensor] = {}
    for name, tensor in stored.items():
        logical = names.get(name)
        value = tensor if logical is None else packed[logical]
        other = found.setdefault(value.name, value)
        if other is not value:
            raise _same_name((tensor,), other.stored if isinstance(other, PackedTensor) else (other,), value.name)
    return found


def _same_name(some: Sequence[StoredTensor], others: Sequence[StoredTensor], name: str) -> LayoutError:
    stored = " and ".join(repr(tensor.name) for tensor in (*some, *others))
    return LayoutError(
        f"{some[0].file.path}: {stored} would all be called {name!r}: a checkpoint has one tensor of a name"
    )


def _with_codes(codes: StoredTensor, evidence: Evidence) -> Iterator[tuple[str, Reading]]:
    """Yield the ways to understand a tensor as codes."""
    for ending, namings in _CODES[codes.dtype]:
        if codes.name.endswith(ending):
            stem = codes.name.removesuffix(ending)
            for naming in namings:
                layout = naming[0]
                scales = None if layout.scales is None else evidence.stored.get(stem + layout.scales)
                if scales is None:
                    packed = not layout.named_packed or layout.blocks(byte_shape(codes)) is not None
                else:
                    packed = _looks_packed(stem, layout, codes, scales, evidence)
                if packed:
                    yield stem + layout.weight, Reading(naming, codes, scales)


def _looks_packed(stem: str, layout: Layout, codes: StoredTensor, scales: StoredTensor, evidence: Evidence) -> bool:
    if layout.without and stem + layout.without in evidence.stored:
        return False
    return layout.named_packed or scales.dtype in (*layout.scales_dtypes, "F8_E4M3") or _go_together(codes, scales)


def _go_together(codes: StoredTensor, scales: StoredTensor) -> bool:
    """Tell whether there is a scale for every 16 bytes, all along the rows."""
    *rows, length = byte_shape(codes)
    return (*rows, length // BYTES_PER_BLOCK) == scales.shape and length % BYTES_PER_BLOCK == 0


def _with_scales(scales: StoredTensor, evidence: Evidence) -> Iterator[tuple[str, Reading]]:
    """Yield the ways to understand a tensor as scales, of codes that are missing or of a wrong dtype."""
    lone: dict[str, list[Reading]] = {}
    has_codes = False
    for ending, namings in _SCALES[scales.dtype]:
        if scales.name.endswith(ending):
            stem = scales.name.removesuffix(ending)
            for naming in namings:
                layout = naming[0]
                codes = evidence.stored.get(stem + layout.codes)
                if codes is None:
                    lone.setdefault(stem + layout.weight, []).append(Reading(naming, None, scales))
                    continue
                has_codes = True
                packed = (layout.named_packed and scales.dtype == "U8") or _go_together(codes, scales)
                if packed and codes.dtype not in (*layout.codes_dtypes, *FLOAT8_DTYPES):
                    yield stem + layout.weight, Reading(naming, codes, scales)
    if lone and not has_codes:
        names = list(lone)
        if len(names) > 1:
            told = [n for n in names if any(evidence.about(x, n) for reading in lone[n] for x in reading.layouts)]
            names = told or names
        for reading in lone[names[0]]:
            yield names[0], reading
