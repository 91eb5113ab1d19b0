"""The small files beside rewritten weights: what config.json says afterwards, and which other files are copied."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Final, NamedTuple

from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..format import BLOCK_SIZE
from ..layouts.others import COMFYUI
from ..storage.discover import Location, as_path, is_hidden, is_one
from ..storage.jsonfile import parse_json, read_json
from ..storage.named import named
from ..storage.regular import LFSPointerError, open_regular
from ..storage.remote import AnyPath
from .plan import METADATA as PT_METADATA
from .plan import RECORD, Copied, Item, json_bytes
from .quantization import (
    Modules,
    after_decoding,
    change_config,
    hf_quant_config,
    quant_model_description,
    several_parts,
)

Source = Location | Sequence[Location] | None

WEIGHTS: Final = (".safetensors", ".uqff", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")
"""Endings of files that hold weights, which are not copied."""

QUANTIZERS_FILES: Final = {
    "hf_quant_config.json": hf_quant_config,
    "quant_model_description.json": quant_model_description,
    "dtypes.json": lambda document, modules: document if modules.has("MXFP4") else None,
}
"""Files that describe quantised tensors, and what becomes of them when some were decoded."""

MAX_FOLDERS: Final = 32
"""Deepest nesting of folders beside the weights."""

Change = Callable[[dict[str, Any]], dict[str, Any] | None]
"""Returns a JSON object of the target, given that of the source; None if it goes."""


def decoded_config(config: dict[str, Any], dtype: str, modules: Modules) -> dict[str, Any]:
    """Return the config.json of the source changed for weights of which some were decoded to ``dtype``."""
    plain = change_config(config, lambda quantization: after_decoding(quantization, modules))
    for part in (plain, plain.get("text_config")):
        if isinstance(part, dict):
            if not modules.quantized or (part.get("expert_dtype") == "fp4" and not modules.has("MXFP4")):
                part.pop("expert_dtype", None)
            if modules.decoded:
                part.update({key: dtype for key in ("dtype", "torch_dtype") if key in part})
    if modules.decoded and "model_type" in plain and "torch_dtype" not in plain:
        plain["dtype"] = dtype
    return plain


def encoded_config(config: dict[str, Any], layout: str, plain: Sequence[str]) -> dict[str, Any]:
    """Return the config.json of the source changed for encoded weights; ``plain`` are the modules not encoded.

    What it says of quantisation is stale, as no weight of the source is quantised.
    """
    modules = Modules(frozenset(), {}, frozenset(plain), several_parts(config))
    return {**change_config(config, lambda _: None), **_quantization(layout, modules)}


def _quantization(layout: str, modules: Modules) -> dict[str, Any]:
    """Return what is added to a config.json, as the tool that the layout is named after writes it."""
    plain = modules.spelled(sorted(modules.plain))
    if layout == "gpt-oss-hf":
        others = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        left = [module for module in plain if module.endswith(".experts")]
        return {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": others + left}}
    if layout == "compressed-tensors":
        weights = {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "strategy": "group",
            "group_size": BLOCK_SIZE,
            "scale_dtype": "torch.uint8",
        }
        return {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "mxfp4-pack-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
                "ignore": plain,
                "quantization_status": "compressed",
            }
        }
    if layout == "mlx":
        how = {"group_size": BLOCK_SIZE, "bits": 4, "mode": "mxfp4"}
        return {"quantization": how, "quantization_config": how}
    return {}


def kept_metadata(checkpoint: Checkpoint, items: Iterable[Item]) -> dict[str, str]:
    """Return the metadata of the shards: that of the source, without what it says of tensors that are not copied."""
    copied = {item.name for item in items if isinstance(item, Copied)}
    gone = checkpoint.keys() - copied
    kept = {} if "GGUF.version" in checkpoint.metadata else {**checkpoint.metadata}
    if "tensor_names" in kept and gone & kept.keys():  # torchao's list of the tensors that its metadata describes
        try:
            names = [name for name in parse_json(kept.pop("tensor_names")) if name not in gone]
        except (ValueError, TypeError):
            names = []
        if checkpoint.stored.keys() >= set(names):  # all of them are plain
            gone |= set(names)
        else:
            kept["tensor_names"] = json.dumps(names)
    if (text := kept.pop(COMFYUI[1], None)) is not None:
        left = _of_layers(text, lambda layer: f"{layer}.weight" not in gone)
        kept |= {} if left is None else {COMFYUI[1]: left}
    return {key: text for key, text in kept.items() if key not in gone} | PT_METADATA


def _of_layers(text: str, stays: Callable[[str], bool]) -> str | None:
    """Return ComfyUI's metadata with the layers that stay, None if there are none."""
    try:
        document = json.loads(text)
        document["layers"] = {layer: how for layer, how in document["layers"].items() if stays(layer)}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return text
    return json.dumps(document) if document["layers"] else None


def config_of(checkpoint: Checkpoint, source: Source) -> dict[str, Any]:
    """Return the config.json that goes with rewritten weights; see `small_files`."""
    return checkpoint.config if is_folder(checkpoint, source) else {}


@named(None, "read")
def is_folder(checkpoint: Checkpoint, source: Source) -> bool:
    """Whether a source is a folder, or the index of one, so that the config.json there speaks of its tensors."""
    return is_one(source) and (checkpoint.index is not None or as_path(source).is_dir())


class SmallFiles(NamedTuple):
    """The files beside rewritten weights, by their names in the folder."""

    written: dict[str, bytes]
    copied: dict[str, AnyPath]
    left_out: list[str]
    """Other weights, and folders that hold some, which do not go along."""
    notes: list[str]
    """What is doubtful about files that are copied, a sentence each."""


@named(None, "read")
def small_files(checkpoint: Checkpoint, source: Source, target: Path, changes: Mapping[str, Change]) -> SmallFiles:
    """Return the files that go with rewritten weights; ``changes`` are those of JSON files, by their names.

    There are none if the checkpoint was opened by the names of its weights: ``source`` is what it was opened by.
    """
    if not is_folder(checkpoint, source):
        return SmallFiles({}, {}, [], [])
    weights = {*checkpoint.files, checkpoint.index}
    copies, left_out = _files_beside(checkpoint.folder, target.resolve(), weights)
    notes: list[str] = []
    for name, path in list(copies.items()):
        if _leads_out(path, checkpoint.folder.resolve()):
            link = f"{path}: is a link to {path.resolve()}, which is outside of its folder"
            if name in changes:
                raise CheckpointError(f"{link}: replace it by the file itself if it belongs to the checkpoint")
            notes.append(f"{link}, and is not copied: replace it by the file itself if it belongs to the checkpoint")
            del copies[name]
            continue
        try:
            open_regular(path).close()
        except LFSPointerError as error:
            if name in changes:
                raise
            notes.append(f"{error}; it is copied as it is")
    written: dict[str, bytes] = {}
    for name, change in changes.items():
        if name in copies:
            path = copies.pop(name)
            document = read_json(path)
            try:
                changed = change(document)
                written |= {} if changed is None else {name: json_bytes(changed)}
            except ValueError as error:
                raise CheckpointError(f"{path}: cannot be written again: {error}") from error
    return SmallFiles(written, copies, left_out, notes)


def _leads_out(path: AnyPath, folder: AnyPath) -> bool:
    """Tell whether a file is a link out of the folder, or of its repository in the Hub's cache, which links to blobs.

    Whoever made a folder must not decide which other files of this machine go into the result.
    """
    if not isinstance(path, Path) or not isinstance(folder, Path):  # no other has links
        return False
    repository = next((parent.parent for parent in folder.parents if parent.name == "snapshots"), None)
    places = [folder] if repository is None else [folder, repository / "blobs"]
    return path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in places)


def _files_beside(
    folder: AnyPath, target: Path, weights: AbstractSet[AnyPath | None]
) -> tuple[dict[str, AnyPath], list[str]]:
    """Return the files that go with ``weights``, for instance tokenizers, and the names of other weights.

    A folder that holds weights is named as a whole.
    """
    found: dict[str, AnyPath] = {}
    left_out: list[str] = []
    for path in sorted([*folder.iterdir()], key=str):
        if is_hidden(path):
            continue
        if path.is_dir():
            if path.resolve() == target:
                continue
            if path.is_symlink() or _is_other(path.resolve(), target):
                if not any(file and path in file.parents for file in weights):
                    left_out.append(f"{path.name}/")
            else:
                inside, others = _files_beside(path, target, weights)
                found.update((f"{path.name}/{name}", inner) for name, inner in inside.items())
                left_out += [f"{path.name}/{name}" for name in others]
        elif _is_weights(path):
            if path not in weights:
                left_out.append(path.name)
        elif not isinstance(path, Path) or stat.S_ISREG(path.stat().st_mode):  # a link to nothing is an error
            found[path.name] = path
    return found, left_out


def _is_other(folder: AnyPath, target: Path) -> bool:
    """Tell whether a folder holds another checkpoint, or one that is being written, besides the target."""
    inside = (path for path in _below(folder) if target not in (path, *path.parents))
    return any(_is_weights(path) or path.name == RECORD for path in inside)


def _below(folder: AnyPath) -> Iterator[AnyPath]:
    """Yield everything below a folder, without following links; refuse very deep ones."""
    level = [folder]
    for _ in range(MAX_FOLDERS):
        inside: list[AnyPath] = [path for parent in level for path in parent.iterdir()]
        yield from inside
        level = [path for path in inside if path.is_dir() and not path.is_symlink()]
    if level:
        raise CheckpointError(f"{folder}: folders are nested more than {MAX_FOLDERS} deep: move it elsewhere")


def _is_weights(path: AnyPath) -> bool:
    return path.name.lower().endswith((*WEIGHTS, ".index.json")) and not is_hidden(path)
