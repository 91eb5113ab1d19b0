"""What becomes of each tensor of a checkpoint that is converted: decoded, copied as it is stored, or left out.

Conversion and verification decide it here, from headers alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..checkpoint import Checkpoint
from ..layouts.packed import TensorInfo
from ..text import select
from .quantization import Modules, changing_tensors, module_of, several_parts, unneeded_scales


@dataclass(frozen=True)
class Contents:
    """The tensors of a converted checkpoint, by their logical names in the source."""

    decoded: Mapping[str, TensorInfo]
    copied: Mapping[str, TensorInfo]
    dropped: list[str]
    """Those that the caller leaves out."""
    unneeded: list[str]
    """Scales of activations and caches, left out with the quantisation that they belong to."""
    modules: Modules

    @property
    def quantized(self) -> list[str]:
        """Names of copied tensors that are still quantised."""
        return [name for name, info in self.copied.items() if info.format is not None]

    @property
    def changing(self) -> list[str]:
        """Names of tensors without which decoded ones mean something else."""
        return changing_tensors(self.copied, self.modules)


def is_matrix(info: TensorInfo) -> bool:
    """Tell whether a tensor is the matrix of a module, by its name and shape."""
    return info.name.endswith(".weight") and len(info.shape) > 1


def choose(
    checkpoint: Checkpoint, include: str | Iterable[str], exclude: str | Iterable[str], drop: str | Iterable[str]
) -> Contents:
    """Return what becomes of each tensor; the patterns are those of `convert`."""
    kept = dict.fromkeys(select(checkpoint, (), drop))
    infos = {name: checkpoint.info(name) for name in kept}
    chosen = set(select(infos, include, exclude))
    decoded = {name: info for name, info in infos.items() if info.layout is not None and name in chosen}
    quantized = {module_of(x.name): x.format for x in infos.values() if x.format and x.name not in decoded}
    plain = {module_of(x.name) for x in infos.values() if not x.format and is_matrix(x)} - quantized.keys()
    modules = Modules(
        frozenset(map(module_of, decoded)) - {""}, quantized, frozenset(plain), several_parts(checkpoint.config)
    )
    unneeded = set(unneeded_scales({name: info.shape for name, info in infos.items()}, modules))
    copied = {name: info for name, info in infos.items() if name not in decoded and name not in unneeded}
    return Contents(decoded, copied, [name for name in checkpoint if name not in kept], sorted(unneeded), modules)
