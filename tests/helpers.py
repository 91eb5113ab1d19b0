"""What tests of files share: files built by hand, samples, and comparison byte by byte."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

import mxfp4np
from mxfp4np import LayoutError
from mxfp4np.cli import main
from mxfp4np.storage.safetensors import write_safetensors

DATA = Path(__file__).parent / "data"
IO = ("mmap", "pread")
BACKENDS = ["numpy", "cpu"]
both_io = pytest.mark.parametrize("io", IO)


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_bytes(header, data=b"", length=None):
    """Build a file by hand: `header` is JSON to be, or bytes as they are; `length` a lie about it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def write_raw(path, header, data=b"", length=None):
    path.write_bytes(file_bytes(header, data, length))
    return path


def error_of(call, seconds=5.0):
    """Return what `call` raises; fail if it raises nothing, or takes longer than `seconds`."""
    raised = []

    def run():
        try:
            call()
        except BaseException as error:  # noqa: BLE001  (the test looks at it)
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"still running after {seconds} s"
    assert raised, "nothing was raised"
    return raised[0]


def assert_same(left, right):
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def pair(*lead, seed=0):
    """Return packed values with scales as models have them."""
    rng = np.random.default_rng(seed)
    blocks, scales = rng.integers(0, 256, (*lead, 16), np.uint8), rng.integers(118, 126, lead, dtype=np.uint8)
    return mxfp4np.MXFP4Array(blocks, scales)


def save_raw(path, arrays, metadata=None):
    """Save arrays under exactly these names."""
    mxfp4np.save_file(arrays, path, metadata)
    return path


# Tensors of layouts

RNG = np.random.default_rng(5)
CODES = RNG.integers(0, 256, (6, 64), np.uint8)  # 6 rows of 128 values
SCALES = RNG.integers(100, 150, (6, 4), np.uint8)
FLOATS = np.ones((6, 4), np.float32)


def answers(sample):
    with np.load(DATA / sample / "expected.npz") as golden:
        return {name: golden[name] for name in golden if not name.endswith("__in_out")}


def write_tensors(path, tensors, metadata=None):
    """Write tensors given as (dtype, array), the dtype as headers spell it, whose shape counts its elements."""
    bits = {"F4": 4, "F6_E2M3": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
    specs = {}
    for name, (dtype, array) in tensors.items():
        size = bits.get(dtype, 8 * array.itemsize)
        specs[name] = (dtype, (*array.shape[:-1], array.shape[-1] * array.itemsize * 8 // size))
    write_safetensors(path, specs, [np.ascontiguousarray(array) for _, array in tensors.values()], metadata)
    return path


def write_gguf(path, tensors):
    """Write tensors given as the name of a type, and bytes, by name; of a type that is a number, which is not known."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for name, (kind, array) in tensors.items():
        known = None if kind == "F32" else gguf.GGMLQuantizationType[kind if isinstance(kind, str) else "Q8_0"]
        writer.add_tensor(name, array, raw_dtype=known)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = bytearray(path.read_bytes())
    for name, (kind, array) in tensors.items():
        if isinstance(kind, int):
            at = data.index(len(name).to_bytes(8, "little") + name.encode()) + 8 + len(name) + 4 + 8 * array.ndim
            data[at : at + 4] = kind.to_bytes(4, "little")
    path.write_bytes(data)
    return path


def pair_of(codes, scales, codes_dtype="U8", scales_dtype="U8", /, **arrays):
    return {
        codes: (codes_dtype, arrays.get("codes", CODES)),
        scales: (scales_dtype, arrays.get("scales", SCALES)),
    }


def problem(path, name, **options):
    """Return what info, get and packed all say is wrong; listing works."""
    with mxfp4np.Checkpoint(path, **options) as ckpt:
        assert name in list(ckpt)
        messages = []
        for call in (ckpt.info, ckpt.get, ckpt.packed):
            with pytest.raises(LayoutError) as info:
                call(name)
            messages.append(str(info.value))
        assert len(set(messages)) == 1
        assert main(["inspect", str(path)]) == 0
        return messages[0]
