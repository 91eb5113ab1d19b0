"""What a quantiser's own configuration says after some modules were decoded, in the schema of each quantiser.

Loaders choose how to load a module by its name, and know it by another name than the files where a model has several
parts or was renamed: lists of modules then have all of its names. This module knows no file and no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..format import BLOCK_SIZE
from ..text import check_patterns, has_wildcard, matcher

Config = dict[str, Any]

KEYS: Final = ("quantization_config", "quantization", "compression_config")
"""Keys of a config.json that say how weights are quantised; the second is that of mlx, the third an old one."""

MAX_LISTED: Final = 1000
"""Experts that are listed one by one. Above, a complete list of them is named as a whole."""

_EXPERTS: Final = re.compile(r"(.*experts)\.\d+\..+")

_PARTS: Final = re.compile(r"^((model|language_model|text_model|llm|thinker)\.)+")
"""Beginnings of names that loaders add and remove."""

_PREFIXES: Final = ("", "model.", "model.language_model.", "language_model.model.")

_DEEPSEEK: Final = re.compile(r"(layers|mtp)\.\d+\.(attn|ffn)\.|(embed|head)$")

_RENAMED: Final = (
    (r"^embed$", "embed_tokens"),
    (r"^head$", "lm_head"),
    (r"\.attn(?=\.|$)", ".self_attn"),
    (r"\.ffn(?=\.|$)", ".mlp"),
    (r"\.indexer\.compressor(?=\.|$)", ".compressor.indexer"),
    (r"\.indexer\.weights_proj$", ".compressor.indexer.scorer.weights_proj"),
    (r"(?<!compressor)\.indexer\.wq_b$", ".compressor.indexer.q_b_proj"),
    (r"\.w(q_a|q_b|kv|o_a|o_b)$", r".\1_proj"),
    (r"\.wgate$", ".gate_proj"),
    (r"\.shared_experts\.w1$", ".shared_experts.gate_proj"),
    (r"\.shared_experts\.w2$", ".shared_experts.down_proj"),
    (r"\.shared_experts\.w3$", ".shared_experts.up_proj"),
)
"""Names of modules in DeepSeek's own files, and in transformers: its table for deepseek_v4."""


@dataclass(frozen=True)
class Modules:
    """The modules of a checkpoint that were quantised; see `module_of`."""

    decoded: frozenset[str]
    """Those that are plain now."""
    quantized: Mapping[str, str]
    """Those that still are quantised, and the names of their formats."""
    plain: frozenset[str] = frozenset()
    """Those with a matrix that never was quantised."""
    several_parts: bool = False
    """Whether the model has other parts beside the language model, such as a vision tower."""
    unknown: bool = False
    """Whether there are matrices of integers whose format is not known."""

    @property
    def mixed(self) -> list[str]:
        """Modules, or lists of experts, of which one part was decoded and another is still quantised."""
        decoded, quantized = ({_owner(module) for module in side} for side in (self.decoded, self.quantized))
        return sorted(decoded & quantized)

    def has(self, format: str) -> bool:
        """Tell whether any module is quantised in a format."""
        return format in self.quantized.values()

    def names(self) -> tuple[list[str], list[str]]:
        """Return the names of decoded modules, and of whole lists of experts that were decoded."""
        above = {parent for module in self.quantized for parent in _parents(module)}
        experts = {module: match[1] for module in sorted(self.decoded) if (match := _EXPERTS.fullmatch(module))}
        whole = dict.fromkeys(parent for parent in experts.values() if parent not in above)
        single = sorted(self.decoded - {module for module, parent in experts.items() if parent in whole})
        if len(self.decoded) <= MAX_LISTED:
            single = sorted(self.decoded)
        return self.spelled(single), self.spelled(whole)

    def spelled(self, modules: Iterable[str]) -> list[str]:
        """Return all names of modules; see `spellings`."""
        return [name for module in modules for name in spellings(module, several_parts=self.several_parts) if name]


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _owner(module: str) -> str:
    """Return the list of experts that a module belongs to, which loaders stack; the module itself if there is none."""
    match = _EXPERTS.fullmatch(module)
    return match[1] if match else module


def module_of(name: str) -> str:
    """Return the module that a weight belongs to.

    Examples
    --------
    >>> module_of("model.layers.0.self_attn.q_proj.weight_packed"), module_of("layers.0.mlp.experts.down_proj")
    ('model.layers.0.self_attn.q_proj', 'layers.0.mlp.experts')
    """
    return name.rpartition(".")[0]


_OF_ACTIVATIONS: Final = (
    "input_scale",
    "input_global_scale",
    "activation_scale",
    "scale_input",
    "output_scale",
    "qscale_act",
    "comfy_quant",
)
_OF_CACHE: Final = ("k_scale", "v_scale", "q_scale")
_OF_FP8: Final = "scaled_fp8"
_CHANGING: Final = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b", "weight_zero_point")
"""Ends of names: of scales of activations, and of ComfyUI's mark of a module; of scales of caches; of ComfyUI's mark of
a file with FP8; and of tensors without which weights mean something else."""


def unneeded_scales(shapes: Mapping[str, tuple[int, ...]], modules: Modules) -> list[str]:
    """Return the names of scales of activations and caches whose quantisation is gone, given all names and shapes."""
    gone = modules.decoded - modules.quantized.keys()
    cache = bool(gone) and not modules.quantized
    fp8 = bool(gone) and not modules.has("FP8")
    found: list[str] = []
    for name, shape in shapes.items():
        module, _, ending = name.rpartition(".")
        of_module = ending in _OF_ACTIVATIONS or ending.endswith("_input_scale")  # of stacked experts: NAME_input_scale
        of_all = (ending in _OF_CACHE and cache) or (ending == _OF_FP8 and fp8)
        if len(shape) < 2 and ((of_module and module in gone) or of_all):
            found.append(name)
    return found


def changing_tensors(names: Iterable[str], modules: Modules) -> list[str]:
    """Return the names of tensors that change what decoded weights mean, which no loader applies to plain weights."""
    pairs = ((name, name.rpartition(".")) for name in names)
    return [name for name, (module, _, ending) in pairs if ending in _CHANGING and module in modules.decoded]


def spellings(module: str, *, several_parts: bool = False) -> list[str]:
    """Return the names by which files and loaders know a module.

    Examples
    --------
    >>> spellings("model.layers.0.mlp.up_proj")
    ['model.layers.0.mlp.up_proj']
    >>> spellings("head")
    ['head', 'lm_head', 'model.lm_head']
    """
    renamed = module
    for pattern, replacement in _RENAMED if _DEEPSEEK.match(module) else ():
        renamed = re.sub(pattern, replacement, renamed)
    names = [module]
    if renamed != module:
        names += [renamed, f"model.{renamed}"]
    if several_parts:
        names += [prefix + _PARTS.sub("", renamed) for prefix in _PREFIXES]
    return list(dict.fromkeys(names))


def several_parts(config: Config) -> bool:
    """Tell whether a config.json describes a model with other parts beside the language model."""
    return any(isinstance(config.get(key), dict) for key in ("text_config", "vision_config"))


def change_config(config: Config, change: Callable[[Config], Config | None]) -> Config:
    """Return a config.json with all that it says of quantisation changed, also of the parts of a model.

    ``change`` returns the new object, or None if it goes.
    """
    changed: Config = {}
    for key, value in config.items():
        if key in KEYS:
            new = change(value) if isinstance(value, dict) else None
            changed |= {} if new is None else {key: new}
        else:
            changed[key] = change_config(value, change) if isinstance(value, dict) else value
    return changed


def after_decoding(quantization: Config, modules: Modules) -> Config | None:
    """Return what a quantization config says once modules were decoded, None if nothing is quantised any more.

    That of a quantiser that is not known stays while integers could be its weights.
    """
    method = quantization.get("quant_method")
    change = _mlx if method is None and "bits" in quantization else _CHANGES.get(str(method))
    if not modules.quantized:
        return quantization if modules.unknown and change is None else None
    if not modules.decoded:
        return quantization
    return quantization if change is None else change(_without_fp4_experts(quantization, modules), modules)


def _without_fp4_experts(quantization: Config, modules: Modules) -> Config:
    gone = quantization.get("expert_dtype") == "fp4" and not modules.has("MXFP4")
    return {key: value for key, value in quantization.items() if not (gone and key == "expert_dtype")}


def _added(quantization: Config, key: str, names: Iterable[str]) -> Config:
    """Return the object with names added to one of its lists."""
    there = quantization.get(key) or []
    if not isinstance(there, list) or not all(isinstance(name, str) for name in there):
        raise ValueError(f"expected a list of names as {key!r}, found another value")
    return {**quantization, key: list(dict.fromkeys([*there, *names]))}


def _compressed_tensors(quantization: Config, modules: Modules) -> Config:
    single, whole = modules.names()
    changed = _shrink_groups(quantization, modules)
    return _added(changed, "ignore", [*single, *(f"re:{re.escape(name)}\\..*" for name in whole)])


def _shrink_groups(quantization: Config, modules: Modules) -> Config:
    """Remove groups of formats that no module has any more, and decoded modules from the targets of the others."""
    if not isinstance(quantization.get("config_groups"), dict):
        return quantization
    groups: Config = {}
    for name, group in quantization["config_groups"].items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or not isinstance(group.get("targets"), list):
            groups[name] = group
            continue
        how = [weights.get(key) for key in ("type", "num_bits", "group_size")]
        form = next((known for known, value in _FORMATS.items() if how[: len(value)] == value), None)
        targets = [target for target in group["targets"] if target not in modules.decoded]
        if targets and (form is None or modules.has(form)):
            groups[name] = {**group, "targets": targets}
    return {**quantization, "config_groups": groups}


_FORMATS: Final[Mapping[str, list[Any]]] = {
    "MXFP4": ["float", 4, BLOCK_SIZE],
    "NVFP4": ["float", 4, 16],
    "MXFP8": ["float", 8, BLOCK_SIZE],
    "FP8": ["float", 8],
}
"""Type, bits and group size of compressed-tensors' groups of each format; the first that matches."""


def _wildcards(modules: Modules) -> list[str]:
    single, whole = modules.names()
    return [*single, *whole, *(f"{name}.*" for name in whole)]


def _quark(quantization: Config, modules: Modules) -> Config:
    changed = _added(quantization, "exclude", _wildcards(modules))
    return changed | _without_decoded(quantization, "layer_quant_config", modules)


def _without_decoded(quantization: Config, key: str, modules: Modules) -> Config:
    """Return one of its objects, if it has it, without the patterns and names of what was decoded."""
    layers = quantization.get(key)
    if not isinstance(layers, dict):
        return {}
    check_patterns([pattern for pattern in layers if has_wildcard(pattern)])
    return {key: {pattern: value for pattern, value in layers.items() if not _only_decoded(pattern, modules)}}


def _only_decoded(pattern: str, modules: Modules) -> bool:
    """Tell whether a pattern matches decoded modules, and none that are quantised."""
    if not has_wildcard(pattern):
        return pattern in modules.decoded and pattern not in modules.quantized
    matches = matcher([pattern])
    return any(map(matches, modules.decoded)) and not any(map(matches, modules.quantized))


def _modelopt(quantization: Config, modules: Modules) -> Config:
    """Change the object in config.json, or the one in hf_quant_config.json, whose list has another name."""
    key = "exclude_modules" if "exclude_modules" in quantization else "ignore"
    changed = _added(_shrink_groups(quantization, modules), key, _wildcards(modules))
    return changed | _without_decoded(quantization, "quantized_layers", modules)


def _transformers(quantization: Config, modules: Modules) -> Config:
    """Without a list, transformers leaves heads and embeddings alone; with one, what the list has."""
    single, whole = modules.names()
    plain = modules.spelled(sorted(modules.plain)) if quantization.get("modules_to_not_convert") is None else []
    return _added(quantization, "modules_to_not_convert", [*single, *whole, *plain])


def _mlx(quantization: Config, modules: Modules) -> Config:
    return {**quantization, **dict.fromkeys(sorted(modules.decoded), False)}


_CHANGES: Final[Mapping[str, Callable[[Config, Modules], Config]]] = {
    "compressed-tensors": _compressed_tensors,
    "quark": _quark,
    "modelopt": _modelopt,
    "fp8": _transformers,
    "mxfp8": _transformers,
    "mxfp4": _transformers,
    "torchao": _transformers,
}
"""What to do with each ``quant_method`` when a part of its modules was decoded; others stay as they are."""


def loads_quantized(config: Config, modules: Modules) -> bool:
    """Tell whether transformers, or mlx_lm, loads what is quantised as a config.json describes it.

    transformers loads ModelOpt's weights without their scales, and knows no quantiser that config.json does not name.
    Of compressed-tensors, it stacks experts only if the group that it takes for theirs has FP8, or if they are packed.
    """
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    quantization = next((part[key] for part in parts for key in KEYS if isinstance(part.get(key), dict)), None)
    if quantization is None or quantization.get("quant_method") == "modelopt":
        return False
    if quantization.get("quant_method") == "compressed-tensors" and any(map(_EXPERTS.fullmatch, modules.decoded)):
        groups = [x for x in (quantization.get("config_groups") or {}).values() if isinstance(x, dict)]
        return all((x.get("weights") or {}).get("num_bits") == 8 for x in groups)
    return True


def transforms(config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json says that weights were rotated, and activations are to be while the model runs."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and bool(quantization.get("transform_config"))


def hf_quant_config(document: Config, modules: Modules) -> Config | None:
    """Return ModelOpt's hf_quant_config.json after decoding, None if it goes."""
    if not modules.quantized or not isinstance(document.get("quantization"), dict):
        return None
    if not modules.decoded:
        return document
    quantization = {"exclude_modules": [], **document["quantization"]}
    return {**document, "quantization": _modelopt(quantization, modules)}


def quant_model_description(document: Config, modules: Modules) -> Config | None:
    """Return ModelSlim's quant_model_description.json after decoding, None if it goes."""
    if not modules.quantized:
        return None
    return {
        name: "FLOAT" if module_of(name) in modules.decoded else kind
        for name, kind in document.items()
        if module_of(name) not in modules.decoded or name.endswith(".weight")
    }
