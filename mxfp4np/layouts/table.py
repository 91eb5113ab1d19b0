"""The table of producers: one entry for each way to name and pack MXFP4.

To add one, add its entry to `LAYOUTS`; see docs/howto/adding-a-layout.md. The table knows no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, get_args

from ..format import BYTES_PER_BLOCK, SCALE_BIAS, Order

Shape = tuple[int, ...]

METADATA: Final = "__metadata__"
"""In place of a file's name: the metadata of the safetensors header, JSON under the tensor's logical name."""

EncodedLayout = Literal["gpt-oss-hf", "gpt-oss", "compressed-tensors", "mlx"]

ENCODED_LAYOUTS: Final[tuple[EncodedLayout, ...]] = get_args(EncodedLayout)
"""The layouts to which whole checkpoints are encoded."""

Transpose = Literal["auto", "yes", "no"]

TRANSPOSE: Final[tuple[Transpose, ...]] = get_args(Transpose)
"""Whether a converted checkpoint has its matrices transposed; ``"auto"`` if the model that loads it expects that."""


class Evidence(NamedTuple):
    """A document that a certain tool writes beside a checkpoint, and what it says then."""

    source: str
    """A file's name, or `METADATA`."""
    values: Mapping[str, tuple[str | None, ...]] = {}
    """Keys, at any depth, and patterns of which one must match a value there. None: the key may be missing."""


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
    blocks_axis : bool
        Whether codes have an axis for the bytes of a block, ``[.., G, 16]``, not rows of blocks, ``[.., 16 * G]``.
    swizzled : bool
        Whether scales lie in tiles of 128 rows and 4 columns; see `packed`.
    bias : int
        Added to a stored scale, modulo 256, to make it E8M0.
    order : {"pairs", "halves"}
        Of the elements of a block; see `mxfp4np.format.ORDERS`.
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
    blocks_axis: bool = False
    swizzled: bool = False
    bias: int = 0
    order: Order = "pairs"
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

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in the packed tensor: of its codes, and of its scale if that is among them."""
        return BYTES_PER_BLOCK + (self.scales is None)

    def blocks_shape(self, shape: Shape) -> Shape | None:
        """Return ``[..., G, block_bytes]`` for a packed tensor of this shape in bytes; None if its rows do not fit."""
        *lead, length = shape
        if self.blocks_axis:
            return shape if length == self.block_bytes else None
        return (*lead, length // self.block_bytes, self.block_bytes) if length % self.block_bytes == 0 else None


_QUARK = Evidence("config.json", {"quant_method": ("quark",), "dtype": ("fp4",)})
_QUARK_MX = Evidence("config.json", {"quant_method": ("quark",), "dtype": ("mx",), "mx_element_dtype": ("fp4", None)})
_MODELOPT = Evidence("config.json", {"quant_algo": ("*mxfp4*",)})
_MODELSLIM = Evidence("quant_model_description.json")
_DEEPSEEK = Evidence("config.json", {"expert_dtype": ("fp4",)})
_MLX = Evidence("config.json", {"mode": ("mxfp4",)})
_TORCHAO = Evidence(
    METADATA, {"elem_dtype": ("float4_e2m1fn_x2",), "block_size": ("32",), "is_swizzled_scales": ("false", None)}
)
_SWIZZLED = Evidence(METADATA, {**_TORCHAO.values, "is_swizzled_scales": ("true",)})
_E8M0 = ("F8_E8M0",)

LAYOUTS: Final = (
    Layout("gpt-oss", ".blocks", ".scales", "", blocks_axis=True, gate_up=("mlp1_weight", "mlp1_bias")),
    Layout(
        "gpt-oss-hf",
        "_blocks",
        "_scales",
        "",
        blocks_axis=True,
        gate_up=("gate_up_proj", "gate_up_proj_bias"),
        transposed=True,
    ),
    Layout("compressed-tensors", ".weight_packed", ".weight_scale"),
    Layout("quark", ".weight", ".weight_scale", evidence=(_QUARK,), headers_suffice=False),
    Layout(
        "modelopt",
        ".weight",
        ".weight_scale",
        evidence=(_MODELOPT, _MODELOPT._replace(source="hf_quant_config.json")),
        headers_suffice=False,
    ),
    Layout("modelslim", ".weight", ".weight_scale", evidence=(_MODELSLIM,), headers_suffice=False),
    Layout("quark-mx", ".weight", None, bias=SCALE_BIAS, evidence=(_QUARK_MX,), headers_suffice=False),
    Layout("deepseek", ".weight", ".scale", codes_dtypes=("I8", "F4"), scales_dtypes=_E8M0, evidence=(_DEEPSEEK,)),
    Layout("mlx", ".weight", ".scales", codes_dtypes=("U32",), evidence=(_MLX,)),
    Layout("torchao", "._weight_qdata", "._weight_scale", scales_dtypes=_E8M0, evidence=(_TORCHAO,)),
    Layout(
        "torchao-swizzled",
        "._weight_qdata",
        "._weight_scale",
        scales_dtypes=_E8M0,
        swizzled=True,
        evidence=(_SWIZZLED,),
    ),
    Layout("uqff", ".weight", ".weight.scales"),
    Layout("gguf", "", None, "", codes_dtypes=("MXFP4",), order="halves"),
)


class ScaledLayout(NamedTuple):
    """A way to name codes of FP8, MXFP8, NVFP4 and others, and their scales. Several producers have the first two."""

    name: str
    codes: str
    """Suffixes of the names of codes and scales, as in `Layout`."""
    scales: str
    weight: str = ".weight"
    second: str = ""
    """Suffix of the name of NVFP4's second scale."""
    needs_second: bool = False
    divide: bool = False
    """Whether scales are divided by the second one."""
    transposed: bool = False
    """Whether codes and scales are stored as ``[.., in, out]``, as the model that loads the weights expects them."""


SCALED_LAYOUTS: Final = (
    ScaledLayout("weight-scale-inv", ".weight", ".weight_scale_inv"),
    ScaledLayout("weight-scale", ".weight", ".weight_scale", second=".weight_scale_2", needs_second=True),
    ScaledLayout("deepseek", ".weight", ".scale"),
    ScaledLayout("mlx", ".weight", ".scales"),
    ScaledLayout("mistral", ".weight", ".qscale_weight"),
    ScaledLayout("comfyui", ".weight", ".scale_weight"),
    ScaledLayout("bitsandbytes", ".weight", ".SCB"),
    ScaledLayout(
        "compressed-tensors",
        ".weight_packed",
        ".weight_scale",
        second=".weight_global_scale",
        needs_second=True,
        divide=True,
    ),
    ScaledLayout("torchao", "._weight_qdata", "._weight_scale", second="._weight_per_tensor_scale"),
    ScaledLayout("torchao", "._weight_qdata", "._weight_scale_and_zero"),
    ScaledLayout("weight-scale-inv", "", "_scale_inv", ""),
    ScaledLayout("weight-scale-inv", "", "_weight_scale_inv", ""),
    ScaledLayout(
        "modelopt-experts",
        "",
        "_weight_scale",
        "",
        second="_weight_scale_2",
        needs_second=True,
        transposed=True,
    ),
    ScaledLayout("weight-scale", "", "_weight_scale", "", second="_weight_scale_2", needs_second=True),
    ScaledLayout("weight-scale", "", "_scale", ""),
)
"""In the order in which they are tried; the last five are of weights without a suffix, such as stacked experts."""


def wants_transpose(layout: str | None, shape: Shape, transpose: str) -> bool:
    """Return whether a tensor of this layout, None if it is plain, and shape is to be transposed, by `TRANSPOSE`."""
    if transpose not in TRANSPOSE:
        raise ValueError(f"transpose must be 'auto', 'yes' or 'no', found {transpose!r}")
    known = (*LAYOUTS, *SCALED_LAYOUTS)
    wanted = transpose == "yes" or (transpose == "auto" and any(x.transposed for x in known if x.name == layout))
    return wanted and layout is not None and len(shape) > 1
