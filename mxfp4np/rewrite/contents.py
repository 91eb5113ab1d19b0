"""What becomes of each tensor of a checkpoint that is converted: decoded, copied as it is stored, or left out.

Conversion and verification decide it here, from headers alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..checkpoint import Checkpoint
from ..errors import LayoutError
from ..layouts.packed import TensorInfo
from ..storage.tensorfile import DTYPES
from ..text import select
from .quantization import Config, Modules, changing_tensors, module_of, several_parts, unneeded_scales


@dataclass(frozen=True)
class Contents:
    """The tensors of a converted checkpoint, by their logical names in the source."""

    decoded: Mapping[str, TensorInfo]
    copied: Mapping[str, TensorInfo]
    dropped: list[str]
    """Those that the caller leaves out, or excludes although safetensors has no name for their types."""
    unneeded: list[str]
    """Scales of activations and caches, and marks of ComfyUI, left out with the quantisation that they belong to."""
    modules: Modules

    @property
    def quantized(self) -> list[str]:
        """Names of copied tensors that are still quantised."""
        return [name for name, info in self.copied.items() if info.format is not None]

    @property
    def changing(self) -> list[str]:
        """Names of tensors without which decoded ones mean something else."""
        return changing_tensors(self.copied, self.modules)


def _excluded(checkpoint: Checkpoint, name: str) -> TensorInfo:
    """Return what is known of a tensor that is copied as it is stored, whose parts need not fit each other."""
    try:
        return checkpoint.info(name)
    except LayoutError as error:
        stored = checkpoint.stored_tensors(name)
        form = checkpoint.format_of(name)
        return TensorInfo(name, stored[0].shape, stored[0].dtype, None, stored, str(error), form)


def is_matrix(info: TensorInfo) -> bool:
    """Tell whether a tensor is the matrix of a module, by its name and shape."""
    return info.name.endswith(".weight") and len(info.shape) > 1


def may_be_quantized(info: TensorInfo) -> bool:
    """Tell whether a tensor is quantised, or a matrix of integers, which may be quantised in an unknown way."""
    return info.format is not None or (len(info.shape) > 1 and info.dtype in ("U8", "I8", "I16", "U32", "I32"))


def contents_of(
    checkpoint: Checkpoint,
    include: str | Iterable[str],
    exclude: str | Iterable[str],
    drop: str | Iterable[str] = (),
    config: Config | None = None,
) -> Contents:
    """Return what becomes of each tensor; the patterns are those of `convert`, ``config`` is its config.json."""
    chosen = set(select(checkpoint, include, exclude))
    infos: dict[str, TensorInfo] = {}
    dropped: list[str] = []
    kept = set(select(checkpoint, (), drop))
    for name in checkpoint:
        can_be_kept = name in chosen or all(tensor.dtype in DTYPES for tensor in checkpoint.stored_tensors(name))
        if name in kept and can_be_kept:
            infos[name] = checkpoint.info(name) if name in chosen else _excluded(checkpoint, name)
        else:
            dropped.append(name)
    decoded = {name: info for name, info in infos.items() if info.layout is not None and name in chosen}
    quantized = {module_of(x.name): x.format for x in infos.values() if x.format and x.name not in decoded}
    plain = {module_of(x.name) for x in infos.values() if not x.format and is_matrix(x)} - quantized.keys()
    unknown = any(may_be_quantized(info) for info in infos.values() if info.format is None)
    parts = several_parts(config or {})
    modules = Modules(frozenset(map(module_of, decoded)), quantized, frozenset(plain), parts, unknown)
    unneeded = set(unneeded_scales({name: info.shape for name, info in infos.items()}, modules))
    copied = {name: info for name, info in infos.items() if name not in decoded and name not in unneeded}
    return Contents(decoded, copied, dropped, sorted(unneeded), modules)
