"""The table of producers: one entry for each way to name and pack MXFP4.

To add one, add its entry to `LAYOUTS`; see docs/adding-a-layout.md. The table knows no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from ..format import BYTES_PER_BLOCK, SCALE_BIAS
from .swizzle import swizzled_shape

Shape = tuple[int, ...]

METADATA: Final = "__metadata__"
"""In place of a file's name: the metadata of the safetensors header, JSON under the tensor's logical name."""

ENCODED_LAYOUTS: Final = ("gpt-oss-hf", "gpt-oss", "compressed-tensors", "mlx")
"""The layouts to which whole checkpoints are encoded."""

TRANSPOSE: Final = ("auto", "yes", "no")
"""Whether a converted checkpoint has its matrices transposed; ``"auto"`` if the model that loads it expects that."""


class Evidence(NamedTuple):
    """A document that a certain tool writes beside a checkpoint, and what it says then."""

    source: str
    """A file's name, or `METADATA`."""
    values: Mapping[str, tuple[str | None, ...]] = {}
    """Keys, at any depth, and patterns of which one must match a value there. None: the key may be missing."""


# Shape of the blocks, [..., G, bytes of a block], from the shape of the packed tensor, whose last axis is in bytes.


def as_blocks(shape: Shape) -> Shape | None:
    """Return the shape of blocks that are rows of the tensor; None if it has other rows."""
    return shape if shape[-1:] == (BYTES_PER_BLOCK,) else None


def as_rows(shape: Shape) -> Shape | None:
    """Return the shape of blocks that follow each other in rows; None if rows are not whole blocks."""
    return _blocks_in_rows(shape, BYTES_PER_BLOCK)


def as_inline(shape: Shape) -> Shape | None:
    """Return the shape of blocks in rows that begin with their scale, one byte; None if rows are not whole blocks."""
    return _blocks_in_rows(shape, 1 + BYTES_PER_BLOCK)


def _blocks_in_rows(shape: Shape, size: int) -> Shape | None:
    return (*shape[:-1], shape[-1] // size, size) if shape and shape[-1] % size == 0 else None


@dataclass(frozen=True)
class Layout:
    """A producer's way to store a tensor.

    Attributes
    ----------
    name : str
    codes, scales : str
        Suffixes of the names of the packed and the scale tensor; ``scales`` is None if blocks begin with their scale.
    weight : str
        What replaces these suffixes in the logical name.
    codes_dtypes, scales_dtypes : tuple of str
        As headers spell them. Both are viewed as bytes, whatever their dtype.
    blocks : callable
        `as_blocks`, `as_rows` or `as_inline`.
    swizzled : bool
        Whether scales lie in tiles of 128 rows and 4 columns; see `swizzle`.
    bias : int
        Added to a stored scale, modulo 256, to make it E8M0.
    order : {"pairs", "halves"}
        Of the elements of a block; see `mxfp4np.format.ORDERS`.
    without : str
        Suffix of a tensor that is there if the codes are not MXFP4.
    evidence : tuple of Evidence
        Documents by which the layout is detected; any one suffices.
    headers_suffice : bool
        Whether headers alone identify the layout.
    gate_up : tuple of str
        Suffixes of the names of weights and biases whose rows alternate between gate and up.
    transposed : bool
        Whether the model that loads these weights unpacked expects them transposed, ``[.., in, out]``.
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
    evidence: tuple[Evidence, ...] = ()
    headers_suffice: bool = True
    gate_up: tuple[str, ...] = ()
    transposed: bool = False

    @property
    def named_packed(self) -> bool:
        """Whether the suffix of the codes alone shows that they are packed."""
        return self.codes != self.weight

    @property
    def has_metadata(self) -> bool:
        """Whether the header has metadata of each tensor."""
        return any(evidence.source == METADATA for evidence in self.evidence)

    def scales_shape(self, blocks: Shape) -> Shape:
        """Return the shape of the scale tensor that belongs to blocks."""
        return swizzled_shape(blocks[:-1]) if self.swizzled else blocks[:-1]


def _torchao(name: str, *, swizzled: bool) -> Layout:
    values: dict[str, tuple[str | None, ...]] = {"elem_dtype": ("float4_e2m1fn_x2",), "block_size": ("32",)}
    values["is_swizzled_scales"] = ("true",) if swizzled else ("false", None)
    evidence = (Evidence(METADATA, values),)
    scales_dtypes = ("F8_E8M0",)
    return Layout(
        name, "._weight_qdata", "._weight_scale", scales_dtypes=scales_dtypes, swizzled=swizzled, evidence=evidence
    )


LAYOUTS: Final = (
    Layout("gpt-oss", ".blocks", ".scales", weight="", blocks=as_blocks, gate_up=("mlp1_weight", "mlp1_bias")),
    Layout(
        "gpt-oss-hf",
        "_blocks",
        "_scales",
        weight="",
        blocks=as_blocks,
        gate_up=("gate_up_proj", "gate_up_proj_bias"),
        transposed=True,
    ),
    Layout("compressed-tensors", ".weight_packed", ".weight_scale"),
    Layout(
        "quark",
        ".weight",
        ".weight_scale",
        evidence=(Evidence("config.json", {"quant_method": ("quark",), "dtype": ("fp4",)}),),
        headers_suffice=False,
    ),
    Layout(
        "modelopt",
        ".weight",
        ".weight_scale",
        evidence=(
            Evidence("config.json", {"quant_algo": ("*mxfp4*",)}),
            Evidence("hf_quant_config.json", {"quant_algo": ("*mxfp4*",)}),
        ),
        headers_suffice=False,
    ),
    Layout(
        "modelslim",
        ".weight",
        ".weight_scale",
        evidence=(Evidence("quant_model_description.json"),),
        headers_suffice=False,
    ),
    Layout(
        "quark-mx",
        ".weight",
        None,
        blocks=as_inline,
        bias=SCALE_BIAS,
        evidence=(
            Evidence("config.json", {"quant_method": ("quark",), "dtype": ("mx",), "mx_element_dtype": ("fp4", None)}),
        ),
        headers_suffice=False,
    ),
    Layout(
        "deepseek",
        ".weight",
        ".scale",
        codes_dtypes=("I8", "F4"),
        scales_dtypes=("F8_E8M0",),
        evidence=(Evidence("config.json", {"expert_dtype": ("fp4",)}),),
    ),
    Layout(
        "mlx",
        ".weight",
        ".scales",
        codes_dtypes=("U32",),
        without=".biases",
        evidence=(Evidence("config.json", {"mode": ("mxfp4",)}),),
    ),
    _torchao("torchao", swizzled=False),
    _torchao("torchao-swizzled", swizzled=True),
    Layout("uqff", ".weight", ".weight.scales"),
    Layout("gguf", "", None, weight="", codes_dtypes=("MXFP4",), blocks=as_inline, order="halves"),
)


def wants_transpose(layout: str, shape: Shape, transpose: str) -> bool:
    """Return whether a packed tensor is to be transposed.

    Parameters
    ----------
    layout, shape
        Of the tensor.
    transpose : {"auto", "yes", "no"}
        See `TRANSPOSE`.
    """
    if transpose not in TRANSPOSE:
        raise ValueError(f"transpose must be 'auto', 'yes' or 'no', found {transpose!r}")
    wanted = transpose == "yes" or (transpose == "auto" and any(x.transposed for x in LAYOUTS if x.name == layout))
    return wanted and len(shape) > 1
