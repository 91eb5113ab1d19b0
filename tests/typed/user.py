"""What a type checker says of a user's script: `tox -e types` runs mypy and pyright over this file, strictly.

Lines that must be refused say so twice; an error that no longer occurs is an error itself.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

import mxfp4np
from mxfp4np import Checkpoint, Conversion, Encoding, MXFP4Array, Progress, ScaledArray, TensorInfo, Verification
from mxfp4np import Chekpoint  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType, reportUnusedImport]

mxfp4np.decod  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]

# Reading

with Checkpoint(Path("model"), io="pread") as ckpt:
    assert_type(ckpt, Checkpoint)
    assert_type(ckpt["w"], NDArray[Any])
    assert_type(ckpt.get("w"), NDArray[Any])
    assert_type(ckpt.get("w", "float32"), NDArray[np.float32])
    assert_type(ckpt.get("w", dtype="float16", index=np.s_[7, :128], transpose=True), NDArray[np.float16])
    assert_type(ckpt.get("w", np.int32), NDArray[np.int32])
    assert_type(ckpt.get("w", "bfloat16"), NDArray[Any])
    assert_type(ckpt.get("w", out=np.empty(3, np.float16)), np.ndarray[tuple[int], np.dtype[np.float16]])
    assert_type(ckpt.get("w", default=None), NDArray[Any] | None)
    assert_type(ckpt.packed("w"), MXFP4Array | ScaledArray)
    assert_type(ckpt.info("w"), TensorInfo)
    assert_type(ckpt.stored, Mapping[str, NDArray[Any]])
    assert_type(list(ckpt), list[str])
    for array in ckpt.values():
        assert_type(array, NDArray[Any])
    for index, chunk in ckpt.chunks("w", "1GB", dtype="float32"):
        assert_type(index, tuple[int | slice, ...])
        assert_type(chunk, NDArray[Any])
    ckpt.get("w", indx=3)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    ckpt.get("w", transpose="yes")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
Checkpoint("model", io="map")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
assert_type(mxfp4np.load_file("model", dtype="float32"), dict[str, NDArray[Any]])
mxfp4np.load_file("model", dtype="float64")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

# Arrays

blocks, scales = np.zeros((2, 1, 16), np.uint8), np.zeros((2, 1), np.uint8)
packed = MXFP4Array(blocks, scales, order="halves")
MXFP4Array(blocks, scales, order="half")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
assert_type(packed[0, :32], MXFP4Array)
assert_type(packed.decode("float16"), NDArray[Any])
assert_type(packed.decode(np.float32, transpose=True), NDArray[Any])
packed.decode("float8")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
packed.decode(transpose="auto")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
assert_type(mxfp4np.decode(blocks, scales, "bfloat16"), NDArray[Any])
assert_type(mxfp4np.decode(blocks, scales, "bf16"), NDArray[Any])
mxfp4np.decode(blocks, scales, "bf8")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
assert_type(mxfp4np.encode(np.ones((2, 32), np.float32), rule="rceil"), MXFP4Array)
assert_type(mxfp4np.linear(np.ones(32), packed, activations="int16"), NDArray[Any])
mxfp4np.linear(np.ones(32), packed, activations="int8")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
assert_type(packed @ np.ones(32, np.float32), NDArray[Any])
mxfp4np.encode(np.ones(32), rule="round")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
mxfp4np.save_file({"w": packed, "bias": np.ones(3)}, "model.safetensors", {"format": "pt"})
mxfp4np.save_file((("w", packed) for _ in range(1)), "model.safetensors")

# Whole checkpoints


def show(progress: Progress) -> None:
    """Print how far the work has come."""
    print(f"{progress.shard}: {progress.done / progress.total:.0%}")


converted = mxfp4np.convert("model", "bf16", dtype="float16", transpose="no", progress=show)
with mxfp4np.progress_bar("converting", leave=False) as bar:
    assert_type(mxfp4np.convert("model", "bf16", progress=bar), Conversion)
assert_type(converted, Conversion)
assert_type(converted.verification, Verification | None)
assert_type(dict(converted.overflow), dict[str, int])
mxfp4np.convert("model", "bf16", transpose=True)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
mxfp4np.convert("model", "bf16", dtype="int8")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
encoded = mxfp4np.encode_checkpoint("bf16", "mxfp4", rule="floor", layout="mlx")
assert_type(encoded, Encoding)
assert_type(encoded.errors["w"].relative, float)
mxfp4np.encode_checkpoint("bf16", "mxfp4", layout="gguf")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
assert_type(mxfp4np.verify("model", "bf16", rule="ceil").findings, list[str])
mxfp4np.verify("model", "bf16", rule="up")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
