"""Name the format of tensors that are quantised, but not as MXFP4: FP8, NVFP4, GPTQ and others.

Headers decide: names, dtypes, and how many codes share a scale. Documents are read where headers do not tell. FP8,
MXFP8 and NVFP4 are decoded, see `scaled`; other tensors stay as they are stored, under their own names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Final, NamedTuple

from ..errors import LayoutError
from ..format import BYTES_PER_BLOCK
from ..storage.tensorfile import DTYPES, StoredTensor
from .find import Documents
from .scaled import DECODED, ScaledCandidate, is_transposed
from .table import METADATA, SCALED_LAYOUTS, ScaledLayout

_FLOAT8: Final = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_FLOAT6: Final = ("F6_E2M3", "F6_E3M2")
_PACKED: Final = ("U8", "I8", "U32", "I32", "F4", *_FLOAT6, *_FLOAT8)
"""Dtypes of codes that have scales."""

CHECKED: Final = (*_FLOAT8, "U8", "U32")
"""Dtypes of tensors that may lack what belongs to them; see `Others.check_scale`."""

_EXPONENTS: Final = ("U8", "F8_E8M0")
_FLOATS: Final = ("F64", "F32", "F16", "BF16")

_SCALED: Final = {known.codes: [x for x in SCALED_LAYOUTS if x.codes == known.codes] for known in SCALED_LAYOUTS}
_SHARED: Final = next(x for x in SCALED_LAYOUTS if x.scales == ".weight_scale")
"""The layout of one scale for several tensors, which has the name of the module that they are parts of."""

COMFYUI: Final = ("comfy_quant", "_quantization_metadata")
"""What ComfyUI writes: a tensor of each quantised module, and JSON in the metadata of the header."""

_SECOND_SCALES: Final = ("_scale_2", "_weight_scale_2", "_global_scale", "_per_tensor_scale")
"""Suffixes of NVFP4's second scale, after the name of the weight; other formats have none."""

_FORMATS_OF_BYTES: Final = {8: "NVFP4", 24: "MXFP6", 32: "MXFP8"}
"""By the bytes of codes that share a one-byte scale."""


class Signature(NamedTuple):
    """A format that names identify."""

    format: str
    codes: str
    """Suffix of the codes."""
    beside: str
    """Suffix of a tensor that is beside them."""
    kinds: str = "UI"
    """First letters of the dtypes that codes may have."""


SIGNATURES: Final = (
    Signature("MLX affine", ".weight", ".biases"),
    Signature("GPTQ", ".qweight", ".g_idx"),
    Signature("AWQ", ".qweight", ".qzeros"),
    Signature("bitsandbytes", ".weight", ".weight.absmax", "UIBF"),
    Signature("HQQ", ".W_q", ".zero"),
    Signature("EXL2", ".q_weight", ".q_groups"),
    Signature("EXL3", ".trellis", ".suh"),
    Signature("AQLM", ".codes", ".codebooks"),
)
_SIGNATURES: Final = {known.codes: [x for x in SIGNATURES if x.codes == known.codes] for known in SIGNATURES}


class Others:
    """The tensors of a checkpoint that are quantised in other ways.

    Attributes
    ----------
    scales : set of str
        Stored names of the scales that belong to the codes.
    found : dict of str to ScaledCandidate
        Codes and scales of formats that are decoded, by the names of the codes.
    """

    def __init__(self, stored: Mapping[str, StoredTensor], documents: Documents) -> None:
        self._stored, self._documents = stored, documents
        self.scales: set[str] = set()
        self._formats: dict[str, str] = {}
        self.found: dict[str, ScaledCandidate] = {}
        for tensor in stored.values():
            stem, dot, last = tensor.name.rpartition(".")
            found = self._signature(tensor, stem, dot + last)
            if found is None and tensor.dtype in _PACKED:
                found = self._scaled(tensor, stem, dot + last)
            if found:
                self._formats[tensor.name] = found

    def __contains__(self, name: object) -> bool:
        """Return whether a stored tensor is known by headers to be no part of an MXFP4 tensor."""
        return name in self._formats or name in self.scales

    def format_of(self, tensor: StoredTensor) -> str | None:
        """Return the name of the format of codes; None for plain tensors, and for all else that belongs to codes."""
        if tensor.name in self._formats or tensor.name in self.scales:
            return self._formats.get(tensor.name)
        if tensor.dtype not in DTYPES:  # of GGUF
            stem = tensor.name.removesuffix(".weight")
            scaled = tensor.dtype == "NVFP4" and {f"{stem}.scale", f"{tensor.name}.scale"} & self._stored.keys()
            return "NVFP4 with a second scale" if scaled else tensor.dtype
        if tensor.dtype in ("F4", *_FLOAT6):
            return f"FP{tensor.dtype[1]}"
        if len(tensor.shape) > 1 and tensor.dtype in _FLOAT8:
            stem, dot, last = tensor.name.rpartition(".")
            return "FP8" if self._says_quantised(stem, dot + last) else None
        if len(tensor.shape) > 1 and tensor.dtype == "U8" and tensor.name.endswith(".weight"):
            return self._mx_format
        return None

    def check_scale(self, tensor: StoredTensor) -> None:
        """Refuse codes without scales that headers or documents say they have, and E4M3 scales without codes.

        Raises
        ------
        LayoutError
        """
        known = tensor.name in self._formats or tensor.name in self.scales
        if known or len(tensor.shape) < 2 or (found := self._missing(tensor)) is None:
            return
        what, missing = found
        raise LayoutError(
            f"{tensor.file.path}: tensor {tensor.name!r} {what}: expected {' or '.join(map(repr, missing))} in one of "
            "the checkpoint's files, found none; open the folder that holds all shards"
        )

    def _missing(self, tensor: StoredTensor) -> tuple[str, list[str]] | None:
        """Return what a tensor is that lacks others, and their names; None if it lacks nothing."""
        name = tensor.name
        stem, dot, last = name.rpartition(".")
        stem, suffix = (stem, dot + last) if dot + last in _SCALED else (name, "")
        codes = [name.removesuffix(x.scales) + x.codes for x in SCALED_LAYOUTS if x.second and name.endswith(x.scales)]
        if tensor.dtype == "F8_E4M3" and codes:
            return "holds scales and has no codes", list(dict.fromkeys(codes))
        if tensor.dtype in _FLOAT8 and self._says_quantised(stem, suffix):
            return "is FP8 and has no scale", [stem + x.scales for x in _SCALED[suffix][:2]]
        if tensor.dtype == "U8" and self._has_second_scale(tensor):
            return "is NVFP4 and has no scales", [stem + x.scales for x in _SCALED[suffix] if x.second][:1]
        if tensor.dtype == "U32" and self._documents.values("config.json", "", "mode") & {"mxfp8", "nvfp4"}:
            return "is quantised, as config.json says, and has no scales", [f"{stem}.scales"]
        return None

    def _signature(self, tensor: StoredTensor, stem: str, suffix: str) -> str | None:
        for known in _SIGNATURES.get(suffix, ()):
            if tensor.dtype[0] in known.kinds and (beside := stem + known.beside) in self._stored:
                scales = self._stored.get(f"{stem}.scales")
                if known.format == "AWQ" and scales and scales.shape[-1:] == tensor.shape[-1:]:
                    return "GPTQ"  # packed along the input axis; AWQ packs along the output axis
                self.scales |= {beside, f"{stem}.scales"} & self._stored.keys()
                return known.format
        return None

    def _scaled(self, codes: StoredTensor, stem: str, suffix: str) -> str | None:
        """Return the format of codes that have scales beside them, which say what it is."""
        pairs = [
            (layout, scales, self._format_of_pair(codes, scales))
            for layout, scales in self._scales_of(codes, stem, suffix)
        ]
        pairs = [x for x in pairs if x[2] and (not x[0].transposed or is_transposed(codes, x[1]))]
        if not pairs:
            return None
        layout, scales, found = pairs[0]
        if found in DECODED:
            rivals = [x.name for _, x, _ in pairs[1:] if x is not scales and x.shape == scales.shape]
            name = codes.name.removesuffix(layout.codes) + layout.second
            second = self._stored.get(name) if found == "NVFP4" and layout.second else None
            candidate = ScaledCandidate(layout, found, codes, scales, second, self._is_comfyui(stem), rivals)
            self.found[codes.name] = candidate
        self.scales.add(scales.name)
        return found

    def _scales_of(self, codes: StoredTensor, stem: str, suffix: str) -> Iterator[tuple[ScaledLayout, StoredTensor]]:
        stem, layouts = (stem, _SCALED[suffix]) if suffix in _SCALED else (codes.name, _SCALED[""])
        for layout in layouts:
            if (scales := self._stored.get(stem + layout.scales)) is not None:
                yield layout, scales
        if suffix == ".weight" and codes.dtype in _FLOAT8:  # one scale for several tensors
            parent = stem.rpartition(".")[0]
            shared = self._stored.get(f"{parent}.weight_scale")
            if shared is not None and math.prod(shared.shape) == 1 and f"{parent}.weight" not in self._stored:
                yield _SHARED, shared

    def _format_of_pair(self, codes: StoredTensor, scales: StoredTensor) -> str | None:
        *rows, length = codes.byte_shape
        fitting = {size: (*rows, length // size) for size in (BYTES_PER_BLOCK, *_FORMATS_OF_BYTES) if not length % size}
        if codes.dtype in _FLOAT8:
            blocks = scales.dtype in _EXPONENTS and 32 * math.prod(scales.shape) >= math.prod(codes.shape)
            return "MXFP8" if blocks else "FP8"
        if codes.dtype in _FLOAT6:
            return "MXFP6"
        if scales.dtype == "F8_E4M3" or self._has_second_scale(codes):
            return "NVFP4"
        if scales.dtype in _EXPONENTS:
            return next((name for size, name in _FORMATS_OF_BYTES.items() if fitting.get(size) == scales.shape), None)
        if scales.dtype not in _FLOATS or codes.dtype not in ("U8", "I8", "I32") or len(codes.shape) < 2:
            return None
        could_be_mxfp4 = codes.dtype == "U8" or (codes.dtype == "I8" and scales.name.endswith(".scale"))
        if could_be_mxfp4 and fitting.get(BYTES_PER_BLOCK) == scales.shape and not self._says_integers:
            return None  # MXFP4, of which scales were converted
        return "INT8" if codes.dtype == "I8" else f"INT{self._bits}"

    def _has_second_scale(self, codes: StoredTensor) -> bool:
        stem = codes.name.removesuffix("_packed").removesuffix("_qdata")
        return any(stem + suffix in self._stored for suffix in _SECOND_SCALES)

    @cached_property
    def _bits(self) -> str:
        """Bits of packed integers, by config.json; 4 unless it says otherwise."""
        found = self._documents.values("config.json", "", "num_bits").intersection(map(str, range(1, 17)))
        return "4" if not found or "4" in found else min(found)

    @cached_property
    def _mx_format(self) -> str | None:
        """Format of the elements of blocks, by config.json."""
        elements = sorted(self._documents.values("config.json", "", "mx_element_dtype"))
        return next((f"MX{element[:3].upper()}" for element in elements if re.match(r"fp[468]", element)), None)

    @cached_property
    def _says_integers(self) -> bool:
        found = (self._documents.values("config.json", "", key) for key in ("type", "dtype", "quant_algo"))
        return any(value.startswith(("int", "uint")) for values in found for value in values)

    def _says_quantised(self, stem: str, suffix: str) -> bool:
        """Return whether a name or a document says that FP8 weights have scales, as those of some files have none."""
        return bool(
            suffix == "._weight_qdata"
            or self._is_comfyui(stem)
            or self._documents.values("config.json", "", "quant_method")
            or self._documents.values("hf_quant_config.json", "", "quant_algo") - {"none"}
        )

    def _is_comfyui(self, stem: str) -> bool:
        layers = self._documents.values(METADATA, COMFYUI[1], stem)
        return f"{stem}.{COMFYUI[0]}" in self._stored or bool(layers)
