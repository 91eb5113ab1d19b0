"""Which tensors `encode` packs, by what they are in a model, and along which axis: that of their inputs.

Names and shapes decide, as they are in the checkpoints of transformers, of the models' own repositories, of MLX and of
llama.cpp. No tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from ..checkpoint import Checkpoint
from ..format import BLOCK_SIZE
from ..format import DTYPES as FLOATS
from ..layouts.packed import TensorInfo
from ..layouts.table import LAYOUTS, Shape, wants_transpose
from ..shapes import swapped
from ..storage.tensorfile import element
from ..text import select


class Form(NamedTuple):
    """Which tensors a layout packs."""

    include: tuple[str, ...]
    """Patterns of their names, unless the caller gives some."""
    axes: tuple[int, ...] = (2, 3)
    """Numbers of axes that a packed tensor can have."""
    exact: bool = False
    """Whether models of this layout pack all of the included tensors and no others: stacked experts."""


FORMS: Final = {
    "gpt-oss-hf": Form(("*.experts.gate_up_proj", "*.experts.down_proj"), axes=(3,), exact=True),
    "gpt-oss": Form(("*.mlp1_weight", "*.mlp2_weight"), axes=(3,), exact=True),
    "compressed-tensors": Form(("*.weight",), axes=(2,)),
    "mlx": Form(("*.weight",)),
}
"""The layouts that checkpoints are encoded to."""

LAYOUT_NAMED: Final = {layout.name: layout for layout in LAYOUTS}


class Kind(NamedTuple):
    """A kind of tensors that quantisers leave alone. The patterns match whole components of a name."""

    what: str
    inside: str
    """Matches any component after the last number."""
    last: str = ""
    """Matches the last component."""
    outside: str = ""
    """Matches the last component of what is in no numbered layer."""


KINDS: Final = (
    Kind(
        "a router or gate",
        r".*rout(er|ing).*|gates?|(.*_)?gating(_.*)?|(.*_)?(experts?|moe)_gate|(ffn_)?gate_inp(_.*)?",
    ),
    Kind(
        "a head",
        r"(?![qkv]_)(.*_)?heads?|classifier|cls|.*predictions|unembed.*|embed_out|score|qa_outputs|output_layer"
        r"|.*logits.*|vocab_.*",
        outside="output|proj_out|decoder|ff_out",
    ),
    Kind("an embedding", r".*embed.*|(.*_)?embd?s?(_.*)?|wte|wpe", outside="shared"),
    Kind("a norm", r".*norm.*|ln(_.*|\d+)?|.*_ln"),
    Kind("a position or bias", r"(.*_)?pos(ition.*)?(_.*)?|rel(ative)?_.*|.*_bias(es)?(_.*)?|rotary.*"),
    Kind("a convolution", "", last=r".*conv.*|patch.*"),
    Kind("a low-rank adapter", r"lora(_.*)?|.*_lora(_.*)?"),
)
"""The first that matches is what a tensor is."""

_EXPERTS: Final = (("gate_up_proj", "down_proj"), ("mlp1_weight", "mlp2_weight"), ("input_linear", "output_linear"))
"""The two matrices of stacked experts: the first has twice as many outputs as the second has inputs."""

_OUT_IN: Final = r"(.*\.)?(switch_mlp\..*|input_linear|output_linear)"
"""Stacked experts that are ``[expert, out, in]`` wherever they have these names: MLX's, Granite's."""

_EITHER: Final = r"(.*\.)?(c_attn|c_proj|c_fc|q_attn)"
"""Matrices that are ``[in, out]`` in GPT-2, where they are no linear layers, and ``[out, in]`` in other models."""


def kind_of(name: str) -> str | None:
    """Return what a tensor is if quantisers leave it alone, None if they pack it.

    Examples
    --------
    >>> kind_of("model.layers.3.mlp.shared_expert_gate.weight"), kind_of("model.layers.3.mlp.gate_proj.weight")
    ('a router or gate', None)
    """
    module = re.sub(r"(\.\d+)+$", "", name.removesuffix(".weight"))
    *numbered, inner = re.split(r"\.\d+\.", module)
    components = inner.split(".")
    for kind in KINDS:
        if (
            any(re.fullmatch(kind.inside, component) for component in components)
            or re.fullmatch(kind.last, components[-1])
            or (not numbered and re.fullmatch(kind.outside, components[-1]))
        ):
            return kind.what
    return None


class Inputs(NamedTuple):
    """Which axis of a weight its inputs are."""

    axis: int | None
    """-1 or -2, None if nothing says."""
    evidence: str = ""
    """The tensor whose shape shows it; empty if it follows from the name."""


def inputs_of(name: str, shapes: Mapping[str, Shape]) -> Inputs:
    """Return which axis the inputs are, given the shapes of all tensors.

    A matrix has as many outputs as its bias has values. The two matrices of stacked experts fit each other in one way
    only. Without such evidence, matrices of two axes are those of linear layers, ``[out, in]``.

    Examples
    --------
    >>> shapes = {"experts.gate_up_proj": (8, 64, 96), "experts.down_proj": (8, 48, 64)}
    >>> inputs_of("experts.gate_up_proj", shapes)
    Inputs(axis=-2, evidence='experts.down_proj')
    """
    shape, module = shapes[name], name.removesuffix(".weight")
    if len(shape) == 2:
        bias = f"{module}.bias"
        for axis, outputs in ((-1, shape[0]), (-2, shape[1])):
            if shapes.get(bias) == (outputs,) and shape[0] != shape[1]:
                return Inputs(axis, bias)
        return Inputs(None if re.fullmatch(_EITHER, module) else -1)
    for first, second in _EXPERTS:
        if module.endswith((first, second)):
            one, other = (_renamed(name, module, (first, second), which) for which in (first, second))
            proven = _axis(shapes.get(one, ()), shapes.get(other, ()))
            if proven is not None:
                return Inputs(proven, other if name == one else one)
    return Inputs(-1 if re.fullmatch(_OUT_IN, module) else None)


def _renamed(name: str, module: str, endings: tuple[str, str], ending: str) -> str:
    stem = next(module.removesuffix(x) for x in endings if module.endswith(x))
    return stem + ending + name.removeprefix(module)


def _axis(first: Shape, second: Shape) -> int | None:
    """Return the axis of the inputs of stacked experts: ``[.., 2 * n, m]`` and ``[.., m, n]``, or both transposed."""
    if len(first) < 2 or len(second) < 2:
        return None
    if (first[-2], first[-1]) == (2 * second[-1], second[-2]):
        return -1
    return -2 if (first[-1], first[-2]) == (2 * second[-2], second[-1]) else None


def is_transposed(info: TensorInfo, shapes: Mapping[str, Shape], layout: str, transpose: str) -> bool:
    """Return whether a tensor is transposed before it is packed in a layout: with "auto", so that its inputs come last.

    ``shapes`` are those of all tensors.
    """
    transposed = wants_transpose(layout, info.shape, transpose)
    if transpose != "auto" or layout not in FORMS or not FORMS[layout].exact:
        return transposed
    axis = inputs_of(info.name, shapes).axis
    return transposed if axis is None else axis == -2


class Left(NamedTuple):
    """A matrix of floats that is not packed, and why."""

    name: str
    nbytes: int
    reason: str


class Choice:
    """Which tensors of a checkpoint are packed in a layout: those that patterns choose, or by what they are.

    Attributes
    ----------
    infos : dict of str to TensorInfo
        All tensors.
    chosen : set of str
        Names of those to pack. Among them can be some that cannot be packed, if the patterns say so: see `obstacle`.
    """

    def __init__(
        self, checkpoint: Checkpoint, layout: str, transpose: str, include: Sequence[str], exclude: Sequence[str]
    ) -> None:
        self._layout, self._form, self._transpose = layout, FORMS[layout], transpose
        self._exclude = exclude
        self.infos = {name: checkpoint.info(name) for name in checkpoint}
        self._shapes = {name: info.shape for name, info in self.infos.items()}
        self.chosen = set(select(self.infos, include or self._form.include, exclude))
        if not include and not self._form.exact:
            self.chosen = {name for name in self.chosen if self._reason(self.infos[name]) is None}

    @property
    def left(self) -> list[Left]:
        """The matrices of floats that are neither chosen nor excluded, largest first."""
        names = (name for name in select(self.infos, (), self._exclude) if name not in self.chosen)
        infos = [info for info in map(self.infos.__getitem__, names) if len(info.shape) > 1 and _is_float(info)]
        infos.sort(key=lambda info: -info.nbytes)
        return [Left(info.name, info.nbytes, self._reason(info) or "was not included") for info in infos]

    def is_transposed(self, info: TensorInfo) -> bool:
        """Return whether a tensor is transposed before it is packed."""
        return is_transposed(info, self._shapes, self._layout, self._transpose)

    def _reason(self, info: TensorInfo) -> str | None:
        """Return why a tensor is not packed by default, or None."""
        kind = None if self._form.exact else kind_of(info.name)
        return self.obstacle(info, asked=False) if kind is None else f"is {kind}"

    def obstacle(self, info: TensorInfo, *, asked: bool = True) -> str | None:
        """Return why a tensor cannot be packed in this layout, or None.

        What the caller ``asked`` for is believed over a name, not over the shapes.
        """
        layout, form = self._layout, self._form
        known, transposed = LAYOUT_NAMED[layout], self.is_transposed(info)
        shape = swapped(info.shape) if transposed else info.shape
        if info.layout is None and not _is_float(info):
            return f"is {info.dtype}: expected BF16, F16 or F32"
        if form.exact and not select([info.name], form.include, ()):
            return f"is none that {layout} packs: those are {' and '.join(form.include)}"
        if len(shape) not in form.axes:
            return f"has shape {list(info.shape)}: expected {' or '.join(map(str, form.axes))} axes"
        if not info.name.endswith(known.weight):
            return f"cannot be named as {layout} names packed ones: expected a name that ends in {known.weight!r}"
        axis, evidence = inputs_of(info.name, self._shapes)
        if axis is None and self._transpose == "auto" and not form.exact:
            return (
                f"has shape {list(info.shape)}, and nothing says which axis its inputs are: give --transpose no if "
                "that is the last one, or yes"
            )
        if axis is not None and (evidence or not asked) and transposed != (axis == -2):
            return (
                f"has shape {list(info.shape)}, of which axis {axis} is its inputs, as {evidence or 'its name'} shows, "
                f"and would be packed along its outputs: give --transpose {'no' if transposed else 'yes'}"
            )
        if shape[-1] % BLOCK_SIZE:
            return f"has shape {list(info.shape)}: expected a multiple of {BLOCK_SIZE} inputs, found {shape[-1]}"
        return None


def _is_float(info: TensorInfo) -> bool:
    return element(info.dtype)[1] in FLOATS
