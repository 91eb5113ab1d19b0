"""Check a checkpoint by itself: pairs, index, scales, weights that are all zeros, and what config.json says of them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..array import MXFP4Array
from ..checkpoint import Checkpoint
from ..errors import CheckpointError, LayoutError
from ..format import BLOCK_SIZE, SCALE_BIAS, SCALE_NAN, decoded_dtype
from ..layouts.packed import TensorInfo
from ..scaled import ScaledArray
from ..summary import Row, collapse, label
from .choose import kind_of
from .cluster import Engine, pool_of
from .contents import may_be_quantized
from .findings import Verification
from .quantization import KEYS
from .workers import Progress

CHUNK_BYTES: Final = 32 << 20
"""Decoded bytes of packed tensors whose scales a thread counts at a time."""

ZERO_BYTES: Final = 1 << 20
"""Bytes of plain tensors that are read at a time, until one is not zero."""

PLAUSIBLE: Final = range(SCALE_BIAS - 64, SCALE_BIAS + 33)
"""Scales of weights. A median outside comes from scale bytes that were converted instead of viewed."""

TINY: Final = 256
"""Values that a tensor must have at least for zeros to be a finding."""

_MAY_BE_ZERO: Final = re.compile("bias|lora_b", re.IGNORECASE)
_FLOATS: Final = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_QUANTIZES: Final = ("quant_method", "bits", "mode", "quant_algo", "group_size")


def health(
    checkpoint: Checkpoint,
    names: Iterable[str],
    num_threads: int | None,
    progress: Callable[[Progress], object],
    engine: Engine,
    *,
    with_config: bool,
) -> Verification:
    """Look for broken pairs, missing shards, an index or a config.json that does not match, and implausible values."""
    result = Verification(findings=[*checkpoint.findings])
    for name in checkpoint.unlisted:
        result.findings.append(f"{checkpoint.index}: tensor {name!r} is in a file, but not in the index")
    packed: list[TensorInfo] = []
    plain: list[TensorInfo] = []
    for name in names:
        result.tensors += 1
        try:
            info = checkpoint.info(name)
        except LayoutError as error:
            result.findings.append(str(error))
        else:
            (plain if info.layout is None else packed).append(info)
    if with_config and len(plain) + len(packed) == len(checkpoint) and not checkpoint.incomplete:
        result.findings += _config_mismatch(checkpoint, plain, packed)
    scaled = [info for info in packed if info.layout != "gguf" or info.format == "MXFP4"]
    pool = pool_of(engine, num_threads, sum(info.nbytes for info in scaled), progress)

    def count_scales(info: TensorInfo) -> NDArray[np.int64]:
        """Count scales by their exponents; there are none if all values are zero."""
        counts, any_code = np.zeros(256, np.int64), False
        reader = checkpoint.reader(info.name)
        for _, chunk in reader.iter_chunks(CHUNK_BYTES):
            if isinstance(chunk, MXFP4Array):
                # A block of zeros may have any scale.
                used = chunk.scales[(chunk.blocks & 0x77).any(axis=-1) | (chunk.scales == SCALE_NAN)]
                counts += np.bincount(used.reshape(-1), minlength=256)
                any_code = True
            else:
                any_code = any_code or chunk.any_code()
                if chunk.block_size <= BLOCK_SIZE:
                    counts += np.bincount(chunk.exponents(), minlength=256)
            pool.advance(info.stored[0].file.path.name, info.name, chunk.nbytes)
        if isinstance(reader.array, ScaledArray) and reader.array.block_size > BLOCK_SIZE:  # scales are few, and loaded
            counts += np.bincount(reader.array.exponents(), minlength=256)
        return counts if any_code else np.zeros_like(counts)

    def is_zero(info: TensorInfo) -> bool:
        """Read no further than the first value that is not zero."""
        return not any(np.any(chunk) for _, chunk in checkpoint.pieces(info.name, ZERO_BYTES))

    decoded_dtype("bfloat16")  # imported before threads start: see `Workers`
    nbytes_of = attrgetter("nbytes")
    zeros = []
    for info, counts in zip(scaled, pool.map(count_scales, scaled, nbytes_of), strict=True):
        result.nan_blocks += 0 if info.format == "FP8" else int(counts[SCALE_NAN])  # whose tiles are no blocks
        result.findings += [f"tensor {info.name!r}: {problem}" for problem in _implausible(counts, info.format)]
        zeros += [] if counts.any() or not _must_have_values(info) else [info]
    matrices = [info for info in plain if info.dtype in _FLOATS and _must_have_values(info)]
    zeros += [info for info, zero in zip(matrices, pool.map(is_zero, matrices, nbytes_of), strict=True) if zero]
    for group in collapse(Row(info.name, info, None) for info in zeros).values():
        several = f"{len(group)} tensors {label(group)!r} are" if len(group) > 1 else f"tensor {group[0].name!r} is"
        result.findings.append(f"{several} all zeros")
    result.nbytes = pool.done
    return result


def _implausible(counts: NDArray[np.int64], format: str | None) -> Iterator[str]:
    """Yield what no weights have, given how often the scale's exponent has each value."""
    is_mxfp4 = format == "MXFP4"
    if counts[SCALE_NAN]:
        yield f"{counts[SCALE_NAN]:,} of its {'blocks are NaN' if is_mxfp4 else 'scales are NaN or infinite'}"
    if counts.any():
        middle = int(np.searchsorted(np.cumsum(counts), math.ceil(counts.sum() / 2)))
        if middle not in PLAUSIBLE and middle != SCALE_NAN:
            yield (
                f"half of its scales are {'below' if middle < SCALE_BIAS else 'above'} 2**{middle - SCALE_BIAS}: no "
                f"weights are{', scale bytes may have been converted instead of viewed' if is_mxfp4 else ''}"
            )


def _must_have_values(info: TensorInfo) -> bool:
    """Tell whether a tensor that is all zeros would be wrong: small ones, biases and adapters may begin as zeros."""
    return len(info.shape) > 1 and math.prod(info.shape) >= TINY and not _MAY_BE_ZERO.search(info.name)


def _config_mismatch(
    checkpoint: Checkpoint, plain: Sequence[TensorInfo], packed: Sequence[TensorInfo]
) -> Iterator[str]:
    """Yield what config.json says of the weights, and is not so."""
    try:
        config = checkpoint.config
    except CheckpointError as error:
        yield str(error)
        return
    path = checkpoint.folder / "config.json"
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    promise = next((key for part in parts for key in KEYS if _is_of_weights(part.get(key))), None)
    if promise and not packed and not any(may_be_quantized(info) for info in plain):
        yield f"{path}: {promise!r} says that weights are quantised, but no tensor is: remove it"
    promised = next((str(part[key]) for part in parts for key in ("dtype", "torch_dtype") if key in part), "")
    values: Counter[str] = Counter()
    for info in plain:  # heads, routers and norms are often float32
        is_weight = info.name.endswith(("weight", "_proj")) and len(info.shape) > 1 and kind_of(info.name) is None
        if is_weight and info.dtype in _FLOATS:
            values[_FLOATS[info.dtype]] += math.prod(info.shape)
    if promised in _FLOATS.values() and 2 * values[promised] < values.total():
        most = max(values, key=lambda dtype: values[dtype])
        yield f"{path}: says that the dtype is {promised}, but most weights are {most}"


def _is_of_weights(quantization: Any) -> bool:
    """Tell whether a part of a config.json is about weights, and not about the cache or nothing."""
    if not isinstance(quantization, dict):
        return False
    return bool(quantization.get("config_groups", True)) and any(key in quantization for key in _QUANTIZES)
