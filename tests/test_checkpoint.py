"""The mapping: the golden files, names, arguments of get, broken pairs, zero-copy, memory, chunks."""

import hashlib
import importlib.util
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from contract import run_python
from helpers import DATA, assert_same, both_io, pair, save_raw

import mxfp4np
from mxfp4np import CheckpointError, LayoutError, TensorNotFoundError
from mxfp4np.storage.safetensors import header_bytes, write_safetensors

needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc/self/smaps_rollup")


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


# The golden files

ORIGINAL_SHAPES = {
    "mlp1_weight": (3, 96, 128),
    "mlp2_weight": (3, 128, 96),
    "mlp1_bias": (3, 96),
    "mlp2_bias": (3, 128),
}
HF_SHAPES = {
    "gate_up_proj": (3, 96, 128),
    "down_proj": (3, 128, 128),
    "gate_up_proj_bias": (3, 96),
    "down_proj_bias": (3, 128),
}
GOLDEN = {
    "gpt_oss_original": ("gpt-oss", {f"block.{i}.mlp.{key}": v for i in (0, 1) for key, v in ORIGINAL_SHAPES.items()}),
    "gpt_oss_hf": (
        "gpt-oss-hf",
        {f"model.layers.{i}.mlp.experts.{key}": v for i in (0, 1) for key, v in HF_SHAPES.items()},
    ),
}
golden = pytest.mark.parametrize("sample", GOLDEN)


def expected_of(sample):
    with np.load(DATA / sample / "expected.npz") as arrays:
        return {name: arrays[name] for name in arrays if not name.endswith("__in_out")}


@golden
@both_io
@pytest.mark.parametrize("backend", ["cpu", "numpy"])
def test_golden_values(sample, io, backend):
    expected = expected_of(sample)
    packed = {name for name, shape in GOLDEN[sample][1].items() if len(shape) == 3}
    assert packed <= set(expected)
    with mxfp4np.Checkpoint(DATA / sample, io=io) as ckpt:
        for name, values in expected.items():
            assert_same(ckpt.get(name, dtype="float32", backend=backend), values)
            assert_same(ckpt.get(name, dtype="bfloat16", backend=backend), values.astype(ml_dtypes.bfloat16))
            out = np.empty(values.shape, np.float32)
            assert ckpt.get(name, out=out, backend=backend) is out
            assert_same(out, values)


@golden
@both_io
def test_golden_names_and_info(sample, io):
    layout, shapes = GOLDEN[sample]
    with mxfp4np.Checkpoint(DATA / sample, io=io) as ckpt:
        assert len(ckpt) == len(shapes)
        assert sorted(ckpt) == sorted(shapes)
        for name, shape in shapes.items():
            info = ckpt.info(name)
            assert (info.name, info.shape) == (name, shape)
            size = int(np.prod(shape))
            if name.endswith("bias"):
                assert (info.dtype, info.layout, len(info.stored)) == ("BF16", None, 1)
                assert info.nbytes == info.decoded_nbytes() == info.decoded_nbytes("float32") == 2 * size
            else:
                assert (info.dtype, info.layout) == ("MXFP4", layout)
                assert info.nbytes == size // 2 + size // 32
                assert (info.decoded_nbytes(), info.decoded_nbytes("float32")) == (2 * size, 4 * size)
                assert [half.shape for half in info.stored] == [
                    (*shape[:-1], shape[-1] // 32, 16),
                    (*shape[:-1], shape[-1] // 32),
                ]
            array = ckpt[name]
            assert (array.shape, array.dtype) == (shape, ml_dtypes.bfloat16)


@golden
def test_golden_metadata_and_config(sample):
    with mxfp4np.Checkpoint(DATA / sample) as ckpt:
        assert ckpt.metadata == {"format": "pt"}
        assert ckpt.config.get("model_type") == ("gpt_oss" if sample == "gpt_oss_hf" else None)
        assert ckpt.files == sorted((DATA / sample).glob("*.safetensors"))


@golden
@both_io
def test_golden_gate_and_up_rows_alternate(sample, io):
    name = "block.1.mlp.mlp1_weight" if sample == "gpt_oss_original" else "model.layers.1.mlp.experts.gate_up_proj"
    values = expected_of(sample)[name]
    with mxfp4np.Checkpoint(DATA / sample, io=io) as ckpt:
        for index in (np.s_[:, 0::2], np.s_[:, 1::2], np.s_[2, 1::2], np.s_[1], np.s_[0, :5, 32:64], np.s_[..., 7:9]):
            assert_same(ckpt.get(name, index=index, dtype="float32"), values[index])


@golden
def test_golden_plain_tensors_are_views(sample):
    with mxfp4np.Checkpoint(DATA / sample) as ckpt:
        for name in (name for name in ckpt if name.endswith("bias")):
            assert not ckpt[name].flags.writeable
            assert np.shares_memory(ckpt[name], ckpt.stored[name])
            assert ckpt.get(name, dtype="float32").dtype == np.float32


# The mapping


def test_mapping_protocol(shards):
    with mxfp4np.Checkpoint(shards) as ckpt:
        assert isinstance(ckpt, Mapping)
        assert len(ckpt) == 3
        assert set(ckpt) == set(ckpt.keys()) == {"w", "one", "two"}
        assert all(name in ckpt for name in ckpt)
        assert "w.blocks" not in ckpt
        assert 3 not in ckpt
        assert {name: array.shape for name, array in ckpt.items()} == {"w": (2, 3, 128), "one": (2, 3), "two": (3,)}
        assert len(list(ckpt.values())) == 3
        assert "3 tensors" in repr(ckpt)
        assert str(shards) in repr(ckpt)


def test_default(shards):
    with mxfp4np.Checkpoint(shards) as ckpt:
        assert ckpt.get("absent", default=None) is None
        assert ckpt.get("absent", default=3) == 3
        assert ckpt.get("one", default=None).shape == (2, 3)
        with pytest.raises(TensorNotFoundError):
            ckpt.get("absent")


def test_the_second_argument_of_get_is_the_dtype_and_never_a_default(shards):
    with mxfp4np.Checkpoint(shards) as ckpt:
        for name in ("w", "one", "two"):
            for dtype in ("float32", np.float32, np.dtype("f4")):
                assert_same(ckpt.get(name, dtype), ckpt.get(name, dtype=dtype))
                assert ckpt.get(name, dtype).dtype == np.float32
            assert_same(ckpt.get(name, None), ckpt[name])
        for second in ("float32", None, 0, np.zeros(3)):
            with pytest.raises(TensorNotFoundError):
                ckpt.get("absent", second)
        for second in ("", np.zeros(3), "no dtype"):
            with pytest.raises((TypeError, ValueError)):
                ckpt.get("w", second)


def test_unknown_name_gives_close_matches(shards):
    with mxfp4np.Checkpoint(DATA / "gpt_oss_original") as ckpt:
        for call in (ckpt.get, ckpt.__getitem__, ckpt.packed, ckpt.info, lambda name: list(ckpt.chunks(name))):
            with pytest.raises(TensorNotFoundError, match=r"did you mean.*'block\.0\.mlp\.mlp1_weight'") as info:
                call("block.0.mlp.mlp1.weight")
            assert isinstance(info.value, KeyError)
            assert str(info.value).startswith("no tensor 'block.0.mlp.mlp1.weight' in ")
    with mxfp4np.Checkpoint(shards) as ckpt, pytest.raises(TensorNotFoundError, match="3 tensors"):
        ckpt["something else entirely"]


def test_unknown_name_in_a_large_checkpoint(tmp_path):
    tensors = {f"layers.{i}.experts.{j}.weight": ("U8", (1,)) for i in range(60) for j in range(100)}
    write_safetensors(tmp_path / "x.safetensors", tensors, [np.zeros(6000, np.uint8)])
    with mxfp4np.Checkpoint(tmp_path) as ckpt:
        with pytest.raises(TensorNotFoundError, match=r"did you mean.*'layers\.1\.experts\."):
            ckpt["layers.1.experts.100.weight"]
        with pytest.raises(TensorNotFoundError, match="6,000 tensors"):
            ckpt["zzz"]


@pytest.mark.parametrize("name", [3, None, b"one", ("one",), [], {}], ids=repr)
def test_names_that_are_no_strings(shards, name):
    with mxfp4np.Checkpoint(shards) as ckpt, pytest.raises(TensorNotFoundError, match="names are strings"):
        ckpt[name]


@pytest.mark.parametrize("name", ["w.blocks", "w.scales"])
def test_name_of_a_packed_half(shards, name):
    with mxfp4np.Checkpoint(shards) as ckpt:
        with pytest.raises(TensorNotFoundError, match=rf"'{name}'.*packed half of 'w'.*\.stored"):
            ckpt[name]
        assert ckpt.stored[name].dtype == np.uint8


def test_packed_of_a_plain_tensor(shards):
    with mxfp4np.Checkpoint(shards) as ckpt, pytest.raises(LayoutError, match=r"a\.safetensors.*'one'.*F32.*get"):
        ckpt.packed("one")


def test_stored(shards):
    packed = pair(2, 3, 4)
    with mxfp4np.Checkpoint(shards) as ckpt:
        stored = ckpt.stored
        assert isinstance(stored, Mapping)
        assert len(stored) == 4
        assert set(stored) == {"w.blocks", "w.scales", "one", "two"}
        assert_same(stored["w.blocks"], packed.blocks)
        assert_same(stored["w.scales"], packed.scales)
        assert stored["two"].dtype == ml_dtypes.bfloat16
        assert "w" not in stored
        with pytest.raises(KeyError, match="absent"):
            stored["absent"]


def test_metadata_of_several_files(shards):
    assert mxfp4np.Checkpoint(shards).metadata == {"format": "pt", "other": "yes", "both": "first"}
    files = [shards / "b.safetensors", shards / "a.safetensors"]
    assert mxfp4np.Checkpoint(files).metadata == {"format": "pt", "other": "yes", "both": "second"}


def test_config(shards):
    ckpt = mxfp4np.Checkpoint(shards)
    assert ckpt.config == {}
    (shards / "config.json").write_text('{"model_type": "gpt_oss"}')
    assert ckpt.config == {"model_type": "gpt_oss"}
    assert mxfp4np.Checkpoint(shards / "a.safetensors").config == {"model_type": "gpt_oss"}


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 200_000], ids=lambda text: repr(text[:5]))
def test_malformed_config(shards, text):
    (shards / "config.json").write_bytes(text)
    ckpt = mxfp4np.Checkpoint(shards)
    assert ckpt["one"].shape == (2, 3)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        _ = ckpt.config


@both_io
def test_checkpoint_can_be_pickled(shards, io):
    for path in (shards, str(shards), [shards / "a.safetensors", shards / "b.safetensors"]):
        with mxfp4np.Checkpoint(path, io=io) as ckpt:
            ckpt["one"]
            with pickle.loads(pickle.dumps(ckpt)) as copy:
                assert list(copy) == list(ckpt)
                assert_same(copy["w"], ckpt["w"])
                assert copy._files[0].io == io


@pytest.mark.parametrize(
    "error",
    [
        mxfp4np.MXFP4Error,
        mxfp4np.CheckpointError,
        mxfp4np.TensorNotFoundError,
        mxfp4np.LayoutError,
        mxfp4np.BackendUnavailableError,
    ],
)
def test_errors_can_be_pickled(error):
    copy = pickle.loads(pickle.dumps(error("x.safetensors: what is 'wrong'")))
    assert type(copy) is error
    assert str(copy) == "x.safetensors: what is 'wrong'"
    assert isinstance(copy, mxfp4np.MXFP4Error)


def test_errors_as_raised_can_be_pickled(shards):
    (shards / "bad").write_bytes(b"bad")
    for call in (
        lambda: mxfp4np.Checkpoint(shards)["absent"],
        lambda: mxfp4np.Checkpoint(shards).packed("one"),
        lambda: mxfp4np.Checkpoint(shards / "bad"),
    ):
        with pytest.raises(mxfp4np.MXFP4Error) as info:
            call()
        copy = pickle.loads(pickle.dumps(info.value))
        assert (type(copy), str(copy)) == (type(info.value), str(info.value))


def test_error_tree():
    assert issubclass(CheckpointError, ValueError)
    assert issubclass(LayoutError, ValueError)
    assert issubclass(TensorNotFoundError, KeyError)
    assert issubclass(mxfp4np.BackendUnavailableError, ImportError)


@both_io
def test_views_outlive_close(shards, io):
    with mxfp4np.Checkpoint(shards, io=io) as ckpt:
        plain, packed, stored = ckpt["one"], ckpt.packed("w"), ckpt.stored["w.scales"]
    assert plain.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert_same(packed.decode("float32"), pair(2, 3, 4).decode("float32"))
    assert_same(stored, pair(2, 3, 4).scales)
    with pytest.raises(CheckpointError, match="closed"):
        ckpt["one"]


def test_context_manager_closes_after_an_error(shards):
    with pytest.raises(RuntimeError), mxfp4np.Checkpoint(shards) as ckpt:
        raise RuntimeError
    with pytest.raises(CheckpointError, match="closed"):
        ckpt["one"]


# Arguments of get


@both_io
def test_plain_tensor_in_another_dtype(shards, io):
    with mxfp4np.Checkpoint(shards, io=io) as ckpt:
        for dtype in ("float64", np.float16, np.dtype("int32"), ml_dtypes.bfloat16, "bfloat16", "float8_e4m3fn"):
            array = ckpt.get("one", dtype=dtype)
            assert array.dtype == np.dtype(getattr(ml_dtypes, dtype, dtype) if isinstance(dtype, str) else dtype)
            assert array.astype(int).tolist() == [[0, 1, 2], [3, 4, 5]]
            assert array.flags.writeable
        assert ckpt.get("two", dtype="float32", index=np.s_[1:]).tolist() == [2, 3]


@both_io
def test_plain_tensor_into_out(shards, io):
    with mxfp4np.Checkpoint(shards, io=io) as ckpt:
        for out in (
            np.empty((2, 3), np.float32),
            np.empty((3, 2), np.float64).T,
            np.empty((4, 6), ml_dtypes.bfloat16)[::2, ::-2],
        ):
            assert ckpt.get("one", out=out) is out
            assert out.astype(int).tolist() == [[0, 1, 2], [3, 4, 5]]
        out = np.empty(3, np.float32)
        assert ckpt.get("one", out=out, index=1, dtype="float32") is out
        assert out.tolist() == [3, 4, 5]


@both_io
@pytest.mark.parametrize("name", ["one", "w"])
def test_out_that_does_not_fit(shards, io, name):
    with mxfp4np.Checkpoint(shards, io=io) as ckpt:
        shape = ckpt.info(name).shape
        with pytest.raises(ValueError, match=r"out must have.*shape"):
            ckpt.get(name, out=np.empty((*shape, 1), np.float32))
        with pytest.raises(ValueError, match=r"out must have.*shape"):
            ckpt.get(name, out=np.empty(shape, np.float32), index=0)
        with pytest.raises(ValueError, match=r"out must have.*dtype"):
            ckpt.get(name, out=np.empty(shape, np.float32), dtype="bfloat16")
        with pytest.raises(ValueError, match=r"read-only|writable"):
            ckpt.get(name, out=np.broadcast_to(np.float32(0), shape))
        with pytest.raises((TypeError, ValueError), match="out must be"):
            ckpt.get(name, out=[0.0])


@both_io
@pytest.mark.parametrize("out_dtype", ["int32", "float64", ">f4"])
def test_out_of_a_dtype_that_is_not_decoded_to(shards, io, out_dtype):
    with mxfp4np.Checkpoint(shards, io=io) as ckpt, pytest.raises(ValueError, match="values decode to"):
        ckpt.get("w", out=np.empty((2, 3, 128), out_dtype))


@both_io
def test_packed_into_a_strided_out(shards, io):
    with mxfp4np.Checkpoint(shards, io=io) as ckpt:
        whole = pair(2, 3, 4).decode("float16")
        out = np.zeros((128, 3, 4), np.float16).T[::2]
        assert ckpt.get("w", out=out) is out
        np.testing.assert_array_equal(out, whole)


@both_io
@pytest.mark.parametrize(
    "index",
    [
        2,
        np.s_[:, 3],
        np.s_[0, 0, 0],
        np.s_[0, 0, ::2],
        np.s_[..., 5],
        np.s_[0, 0, 0, 0],
        [0, 2],
        [0.5],
        np.s_[..., [0, 1]],
        True,
        "w",
    ],
    ids=str,
)
def test_index_that_does_not_fit_a_packed_tensor(shards, io, index):
    with mxfp4np.Checkpoint(shards, io=io) as ckpt, pytest.raises(IndexError):
        ckpt.get("w", index=index)


@pytest.mark.parametrize("name", ["one", "w"])
@pytest.mark.parametrize("dtype", ["nonsense", "bfloat17", "float8_nonsense"])
def test_dtype_that_does_not_exist(shards, name, dtype):
    with mxfp4np.Checkpoint(shards) as ckpt:
        with pytest.raises((TypeError, ValueError), match=dtype):
            ckpt.get(name, dtype=dtype)
        with pytest.raises((TypeError, ValueError), match=dtype):
            list(ckpt.chunks(name, dtype=dtype))


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_without_cupy(shards, device):
    with pytest.raises(mxfp4np.BackendUnavailableError, match=r"mxfp4np\[cuda12\].*device='cpu'"):
        mxfp4np.Checkpoint(shards, device=device)
    with mxfp4np.Checkpoint(shards) as ckpt, pytest.raises(mxfp4np.BackendUnavailableError, match="cuda12"):
        ckpt.get("w", backend="cuda")


@pytest.mark.parametrize("device", ["", "gpu", "cpu:0", "cpu:", "cuda:", "cuda:x", "cuda:-1", "CPU"])
def test_device_that_does_not_exist(shards, device):
    with pytest.raises(ValueError, match="device"):
        mxfp4np.Checkpoint(shards, device=device)


@pytest.mark.parametrize("io", ["", "read", "MMAP", None, 0, ["mmap"]], ids=repr)
def test_io_that_does_not_exist(shards, io):
    with pytest.raises(ValueError, match="io must be 'mmap' or 'pread'"):
        mxfp4np.Checkpoint(shards, io=io)


@pytest.mark.parametrize("backend", ["gpu", "numba", 3])
def test_backend_that_does_not_exist(shards, backend):
    with mxfp4np.Checkpoint(shards) as ckpt, pytest.raises(ValueError, match="backend"):
        ckpt.get("w", backend=backend)


@both_io
@pytest.mark.parametrize("num_threads", [0, -1])
def test_num_threads_that_does_not_fit(shards, num_threads, io):
    with mxfp4np.Checkpoint(shards, io=io) as ckpt, pytest.raises(ValueError, match="num_threads"):
        ckpt.get("w", num_threads=num_threads)


# Broken pairs

BLOCKS = np.zeros((2, 3, 16), np.uint8)
SCALES = np.full((2, 3), 127, np.uint8)

BROKEN = {
    "missing blocks": (None, SCALES, ["SCALES", "BLOCKS"]),
    "missing scales": (BLOCKS, None, ["BLOCKS", "SCALES"]),
    "scales F32": (BLOCKS, SCALES.astype("f4"), ["SCALES", "U8", "F32"]),
    "scales I8": (BLOCKS, SCALES.view("i1"), ["SCALES", "U8", "I8"]),
    "blocks I8": (BLOCKS.view("i1"), SCALES, ["BLOCKS", "U8", "I8"]),
    "blocks of 8": (BLOCKS[..., :8], SCALES, ["BLOCKS", "16", "[2, 3, 8]"]),
    "blocks without axes": (np.array(1, np.uint8), SCALES, ["BLOCKS", "16", "[]"]),
    "other rows": (BLOCKS[:1], SCALES, ["SCALES", "[1, 3]", "[2, 3]"]),
    "other groups": (BLOCKS, SCALES[:, :2], ["SCALES", "[2, 3]", "[2, 2]"]),
    "scales flat": (BLOCKS, SCALES.reshape(-1), ["SCALES", "[2, 3]", "[6]"]),
    "scales with an axis more": (BLOCKS, SCALES[..., None], ["SCALES", "[2, 3]", "[2, 3, 1]"]),
    "scales without axes": (BLOCKS, np.array(127, np.uint8), ["SCALES", "[2, 3]", "[]"]),
    "one block, scales without axes": (BLOCKS[0, 0], np.array(127, np.uint8), ["SCALES"]),
}


@both_io
@pytest.mark.parametrize(("blocks", "scales"), [(".blocks", ".scales"), ("_blocks", "_scales")])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_pair_is_an_error_and_all_others_work(tmp_path, case, blocks, scales, io):
    left, right, says = BROKEN[case]
    good = pair(2, 3)
    arrays = {"bad" + blocks: left, "bad" + scales: right}
    arrays |= {"good" + blocks: good.blocks, "good" + scales: good.scales, "plain": np.ones(3)}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    path = save_raw(tmp_path / "x.safetensors", arrays)
    with mxfp4np.Checkpoint(path, io=io) as ckpt:
        assert set(ckpt) == {"bad", "good", "plain"}
        for call in (
            lambda: ckpt["bad"],
            lambda: ckpt.get("bad", default=None),
            lambda: ckpt.packed("bad"),
            lambda: ckpt.info("bad"),
            lambda: list(ckpt.chunks("bad")),
        ):
            with pytest.raises(LayoutError) as info:
                call()
            message = str(info.value)
            assert message.startswith(f"{path}: tensor ")
            assert "expected" in message
            assert "found" in message
            for word in says:
                assert word.replace("SCALES", f"'bad{scales}'").replace("BLOCKS", f"'bad{blocks}'") in message
        assert_same(ckpt["good"], good.decode())
        assert ckpt["plain"].sum() == 3
        assert set(ckpt.stored) == set(arrays)
        for name, array in arrays.items():
            assert_same(ckpt.stored[name], np.ascontiguousarray(array).reshape(array.shape))


def test_names_that_only_end_alike_are_plain(tmp_path):
    arrays = {
        "num_blocks": np.array([12]),
        "attention.blocks": np.ones((3, 4), np.float32),
        "tiles.blocks": np.ones((2, 2, 16), np.float32),
        "tiles.scales": np.ones((2, 2), np.float32),
        "mask_blocks": np.ones((3, 8), np.uint8),
        "kv_scales": np.ones(4, np.float32),
        "blocks": np.ones((2, 16), np.uint8),
    }
    with mxfp4np.Checkpoint(save_raw(tmp_path / "x.safetensors", arrays)) as ckpt:
        assert set(ckpt) == set(arrays)
        for name, array in arrays.items():
            assert ckpt.info(name).layout is None
            assert_same(ckpt[name], array)


@pytest.mark.parametrize("others", [["x_blocks", "x_scales"], ["x_blocks"], ["x_scales"], ["x"]], ids=str)
def test_two_tensors_of_one_logical_name(tmp_path, others):
    arrays = {"x.blocks": BLOCKS, "x.scales": SCALES}
    arrays |= {name: BLOCKS if name.endswith("blocks") else SCALES for name in others}
    path = save_raw(tmp_path / "x.safetensors", arrays)
    with pytest.raises(LayoutError, match=r"'x[._].*'x'") as info:
        mxfp4np.Checkpoint(path)
    assert str(path) in str(info.value)
    assert any(name in str(info.value) for name in others)


@both_io
def test_pair_of_one_row(tmp_path, io):
    packed = pair(3)
    mxfp4np.save_file({"x": packed}, tmp_path / "x.safetensors")
    with mxfp4np.Checkpoint(tmp_path, io=io) as ckpt:
        assert ckpt.info("x").shape == (96,)
        assert_same(ckpt["x"], packed.decode())


# Zero-copy


def test_packed_and_plain_are_read_only_views_of_the_map(shards):
    with mxfp4np.Checkpoint(shards) as ckpt:
        packed = ckpt.packed("w")
        expert = ckpt.packed("w")[1]
        for array, name in (
            (packed.blocks, "w.blocks"),
            (packed.scales, "w.scales"),
            (expert.blocks, "w.blocks"),
            (expert.scales, "w.scales"),
            (ckpt["one"], "one"),
            (ckpt["two"], "two"),
            (ckpt.get("one", index=np.s_[1, ::2]), "one"),
            (ckpt.get("one", dtype="float32"), "one"),
            (ckpt.stored["one"], "one"),
        ):
            assert np.shares_memory(array, ckpt.stored[name])
            assert not array.flags.writeable
            assert not array.flags.owndata
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0
            with pytest.raises(ValueError, match="WRITEABLE"):
                array.flags.writeable = True
        assert not np.shares_memory(ckpt.get("one", dtype="float64"), ckpt.stored["one"])


@both_io
def test_decoded_arrays_are_new_contiguous_and_aligned(shards, io):
    with mxfp4np.Checkpoint(shards, io=io) as ckpt:
        for index in (None, 1, np.s_[:, ::2], np.s_[..., 7:50]):
            array = ckpt.get("w", index=index)
            assert array.flags.c_contiguous
            assert array.flags.writeable
            assert array.ctypes.data % 64 == 0
            assert not np.shares_memory(array, ckpt["w"])


# Memory


MEASURE = """
    import sys, threading
    from pathlib import Path
    import numpy as np
    import mxfp4np

    small, large, io = sys.argv[1:]
    status = Path("/proc/self/status")

    def resident(*kinds):
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return sum(int(fields[kind].split()[0]) << 10 for kind in kinds)

    def total():
        return resident("VmRSS")

    class Peak:
        # The most that is resident of these kinds, beyond what was at first.
        def __init__(self, *kinds):
            self.kinds = kinds

        def watch(self):
            while not self.done.is_set():
                self.most = max(self.most, resident(*self.kinds))

        def __enter__(self):
            self.done = threading.Event()
            self.first = self.most = resident(*self.kinds)
            self.thread = threading.Thread(target=self.watch)
            self.thread.start()
            return self

        def __exit__(self, *exc):
            self.done.set()
            self.thread.join()
            self.bytes = max(self.most, resident(*self.kinds)) - self.first

    with mxfp4np.Checkpoint(small, io=io) as ckpt:  # imports and compiles everything
        ckpt["v"], ckpt.get("v", dtype="float32"), ckpt.packed("v"), list(ckpt.chunks("v", 1 << 20))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A pair of 32 experts, 256 MiB of blocks, another of 68 MiB, and a file that is small."""
    folder = tmp_path_factory.mktemp("large")
    mxfp4np.save_file({"v": pair(4, 1024, 32)}, folder / "small.safetensors")
    codes = np.random.default_rng(0).integers(0, 256, 8 << 20, np.uint8)
    scales = np.full(512 << 10, 120, np.uint8)
    specs = {
        "w.blocks": ("U8", (32, 16384, 32, 16)),
        "w.scales": ("U8", (32, 16384, 32)),
        "v.blocks": ("U8", (8, 16384, 32, 16)),
        "v.scales": ("U8", (8, 16384, 32)),
    }
    pieces = [codes] * 32 + [scales] * 32 + [codes] * 8 + [scales] * 8
    write_safetensors(folder / "large.safetensors", specs, pieces)
    yield folder / "small.safetensors", folder / "large.safetensors"
    (folder / "large.safetensors").unlink()


@needs_proc
def test_opening_and_packed_read_nothing(large):
    code = """
    before = total()
    with mxfp4np.Checkpoint(large, io=io) as ckpt:
        packed = ckpt.packed("w")
        expert = packed[7, ::2]
        assert packed.nbytes == 272 << 20
        print(total() - before)
    """
    assert int(run_python(MEASURE + code, *large, "mmap")) < 16 << 20


@needs_proc
@both_io
def test_decoding_an_expert_reads_an_expert(large, io):
    code = """
    with mxfp4np.Checkpoint(large, io=io) as ckpt:
        out = np.empty((16384, 1024), "float16")
        out.fill(0)
        with Peak("RssAnon", "RssShmem") as peak:
            before = resident("RssFile")
            ckpt.get("w", index=7, out=out)
            print(resident("RssFile") - before)
        print(peak.bytes)
    """
    in_file, anonymous = map(int, run_python(MEASURE + code, *large, io).split())
    pages = 272 << 20
    assert in_file <= pages * 2 // 32 + (4 << 20)
    assert anonymous <= 64 << 20
    if io == "mmap":
        assert in_file >= pages // 64  # it is the map that was read
    else:
        assert in_file <= 4 << 20


@needs_proc
@both_io
@pytest.mark.parametrize("how", ["get", "index", "chunks"])
def test_get_takes_the_output_and_little_more(large, io, how):
    code = """
    with mxfp4np.Checkpoint(large, io=io) as ckpt:
        with Peak("RssAnon", "RssShmem") as peak:
            if HOW == "get":
                size = ckpt.get("v").nbytes
            elif HOW == "index":
                size = ckpt.get("w", index=np.s_[::4, 5:, 3:1000]).nbytes
            else:
                size = max(piece.nbytes for _, piece in ckpt.chunks("w", 32 << 20))
        print(size, peak.bytes)
    """
    size, anonymous = map(int, run_python(MEASURE + code.replace("HOW", repr(how)), *large, io).split())
    # A piece of `chunks` may still be alive while the next one is made.
    assert anonymous <= (2 * size if how == "chunks" else size) + (64 << 20)


# Chunks


@both_io
@pytest.mark.parametrize("max_bytes", [128, 200, 1000, 4096, 12_345, 1 << 20])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("backend", ["cpu", "numpy"])
@pytest.mark.parametrize("transpose", [False, True])
def test_chunks_of_a_packed_tensor_fill_the_whole(tmp_path, io, max_bytes, dtype, backend, transpose):
    packed = pair(3, 5, 7)
    mxfp4np.save_file({"w": packed}, tmp_path / "x.safetensors")
    whole = packed.decode(dtype, transpose=transpose)
    filled = np.zeros(whole.shape, whole.dtype)
    times = np.zeros(whole.shape, np.uint8)
    with mxfp4np.Checkpoint(tmp_path, io=io) as ckpt:
        for index, piece in ckpt.chunks("w", max_bytes, dtype=dtype, transpose=transpose, backend=backend):
            assert piece.dtype == whole.dtype
            assert 0 < piece.nbytes <= max_bytes
            filled[index] = piece
            times[index] += 1
    assert (times == 1).all()
    assert_same(filled, whole)


@both_io
@pytest.mark.parametrize("max_bytes", [8, 9, 24, 100, 1000, 1 << 20])
@pytest.mark.parametrize("dtype", [None, "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("shape", [(4, 5, 6), (17,), (), (1, 1), (0, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("transpose", [False, True])
def test_chunks_of_a_plain_tensor_fill_the_whole(tmp_path, io, max_bytes, dtype, shape, transpose):
    array = np.asarray(np.random.default_rng(0).standard_normal(shape), np.float32)
    mxfp4np.save_file({"x": array}, tmp_path / "x.safetensors")
    with mxfp4np.Checkpoint(tmp_path, io=io) as ckpt:
        if transpose and len(shape) < 2:
            with pytest.raises(ValueError, match="transpose needs two axes or more"):
                list(ckpt.chunks("x", max_bytes, dtype=dtype, transpose=True))
            return
        whole = ckpt.get("x", dtype=dtype, transpose=transpose)
        filled = np.zeros(whole.shape, whole.dtype)
        times = np.zeros(whole.shape, np.uint8)
        for index, piece in ckpt.chunks("x", max_bytes, dtype=dtype, transpose=transpose):
            assert piece.dtype == whole.dtype
            assert 0 < piece.nbytes <= max_bytes
            filled[index] = piece
            times[index] += 1
    assert (times == 1).all()
    assert_same(filled, whole)


@both_io
def test_chunks_are_arrays(tmp_path, io):
    mxfp4np.save_file({"x": np.array(2.5)}, tmp_path / "x.safetensors")
    with mxfp4np.Checkpoint(tmp_path, io=io) as ckpt:
        assert all(isinstance(piece, np.ndarray) for _, piece in ckpt.chunks("x"))


@both_io
def test_chunks_too_small(shards, io):
    with mxfp4np.Checkpoint(shards, io=io) as ckpt:
        for name, dtype, least in (("w", None, 64), ("w", "float32", 128), ("one", None, 4), ("two", "float64", 8)):
            with pytest.raises(ValueError, match=rf"max_bytes must be at least {least}, found {least - 1}"):
                list(ckpt.chunks(name, least - 1, dtype=dtype))
            assert list(ckpt.chunks(name, least, dtype=dtype))
        for max_bytes in (0, -1):
            with pytest.raises(ValueError, match="max_bytes"):
                list(ckpt.chunks("w", max_bytes))


def test_chunks_come_in_c_order(shards):
    with mxfp4np.Checkpoint(shards) as ckpt:
        pieces = [bits(piece) for _, piece in ckpt.chunks("w", 128)]
        assert len(pieces) > 1
        np.testing.assert_array_equal(np.concatenate(pieces), bits(ckpt["w"]))


# Large checkpoints


@both_io
def test_opening_looks_at_headers_only(tmp_path, io):
    """4 files of 5,180 tensors, hundreds of gigabytes that are not there."""
    experts = 32
    for shard in range(4):
        specs = {}
        for i in range(2590):
            specs[f"layers.{shard}.experts.{i}.w.blocks"] = ("U8", (experts, 1024, 90, 16))
            specs[f"layers.{shard}.experts.{i}.w.scales"] = ("U8", (experts, 1024, 90))
        path = tmp_path / f"model-{shard:05}-of-00004.safetensors"
        header = header_bytes(specs, {"format": "pt"})
        path.write_bytes(header)
        try:
            os.truncate(path, len(header) + 2590 * experts * 1024 * 90 * 17)
        except OSError as error:
            pytest.skip(f"no sparse files of this size here: {error}")
    with mxfp4np.Checkpoint(tmp_path, io=io) as ckpt:
        assert len(ckpt) == 4 * 2590
        assert sum(ckpt.info(name).nbytes for name in ckpt) > 400e9
        assert ckpt.info("layers.3.experts.2589.w").shape == (experts, 1024, 2880)
        assert not ckpt.get("layers.3.experts.2589.w", index=np.s_[-1, -1:]).any()


# True shapes

TRUE_SHAPES = {"block.0.mlp.mlp1_weight": (32, 5760, 90), "block.0.mlp.mlp2_weight": (32, 2880, 90)}


@pytest.fixture(scope="module")
def true_layer(tmp_path_factory):
    """One layer of gpt-oss-20b, with random codes and scales."""
    path = tmp_path_factory.mktemp("layer") / "layer.safetensors"
    rng = np.random.default_rng(20)
    specs = {}
    for name, shape in TRUE_SHAPES.items():
        specs |= {f"{name}.blocks": ("U8", (*shape, 16)), f"{name}.scales": ("U8", shape)}

    def pieces():
        for experts, rows, groups in TRUE_SHAPES.values():
            for _ in range(experts):
                yield rng.integers(0, 256, (rows, groups, 16), np.uint8)
            for _ in range(experts):
                yield rng.integers(118, 126, (rows, groups), np.uint8)

    write_safetensors(path, specs, pieces())
    yield path
    path.unlink()


@pytest.mark.slow
@both_io
@pytest.mark.parametrize("name", TRUE_SHAPES)
def test_layer_of_true_shape_whole_by_expert_and_in_chunks(true_layer, name, io):
    experts, rows, groups = TRUE_SHAPES[name]
    with mxfp4np.Checkpoint(true_layer, io=io) as ckpt:
        assert ckpt.info(name).shape == (experts, rows, groups * 32)
        whole = ckpt[name]
        assert whole.shape == (experts, rows, groups * 32)
        by_whole, by_expert, by_chunk = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        for expert in whole:
            by_whole.update(bits(expert))
        del whole, expert
        for i in range(experts):
            by_expert.update(bits(ckpt.get(name, index=i)))
        for _, piece in ckpt.chunks(name, 50_000_000):
            by_chunk.update(bits(piece))
        assert by_whole.digest() == by_expert.digest() == by_chunk.digest()
        for dtype in ("bfloat16", "float32"):
            assert_same(ckpt.get(name, index=17, dtype=dtype), ckpt.get(name, index=17, dtype=dtype, backend="numpy"))


@both_io
@pytest.mark.parametrize("ending", ["/gate", "/up"])
def test_halves_of_what_has_no_rows(tmp_path, io, ending):
    arrays = {"a.mlp1_weight": pair(2), "a.mlp1_bias": np.float32(1), "b.mlp1_weight": pair(6, 2)}
    mxfp4np.save_file(arrays | {"b.mlp1_bias": np.ones(6)}, tmp_path / "m.safetensors")
    with mxfp4np.Checkpoint(tmp_path, io=io) as ckpt:
        for name in ("a.mlp1_weight", "a.mlp1_bias"):
            assert name + ending not in ckpt
            for call in (ckpt.info, ckpt.get, ckpt.packed):
                with pytest.raises(mxfp4np.TensorNotFoundError):
                    call(name + ending)
        for name, shape in (("b.mlp1_weight", (3, 64)), ("b.mlp1_bias", (3,))):
            assert name + ending in ckpt
            assert ckpt[name + ending].shape == ckpt.info(name + ending).shape == shape
