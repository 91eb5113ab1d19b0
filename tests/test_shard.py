"""Parts for ranks: together they are the whole, each is read alone, and what does not divide says what does."""

import os
import pickle
import re

import ml_dtypes
import numpy as np
import pytest
from helpers import IO, assert_same, pair

import mxfp4np
from mxfp4np import Checkpoint, LayoutError, ScaledArray, TensorNotFoundError
from mxfp4np.storage import tensorfile

RNG = np.random.default_rng(24)
E4M3 = ml_dtypes.float8_e4m3fn
ALTERNATING, BELOW, DOWN = "block.0.mlp.mlp1_weight", "layers.0.mlp.w13", "block.0.mlp.mlp2_weight"
INPUTS, EXPERTS = 96, 4  # of gate and up: 3 blocks of inputs of DOWN


def fp8(*shape):
    return RNG.integers(0, 120, shape, np.uint8).view(E4M3)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("shard") / "model.safetensors"
    arrays = {
        ALTERNATING: pair(EXPERTS, 2 * INPUTS, 2, seed=1),
        "block.0.mlp.mlp1_bias": np.arange(EXPERTS * 2 * INPUTS, dtype=np.float32).reshape(EXPERTS, -1),
        DOWN: pair(EXPERTS, 64, INPUTS // 32, seed=2),
        "block.0.mlp.mlp2_bias": np.ones((EXPERTS, 64), np.float32),
        BELOW: pair(EXPERTS, 2 * INPUTS, 2, seed=3),
        "tiles.weight": fp8(384, 384),
        "tiles.weight_scale_inv": RNG.random((3, 3), np.float32),
        "rows.weight": fp8(96, 96),
        "rows.weight_scale": RNG.random((96, 1), np.float32),
        "nv.weight": RNG.integers(0, 256, (8, 48), np.uint8),
        "nv.weight_scale": fp8(8, 6),
        "nv.weight_scale_2": np.float32(0.5),
        "plain.weight": np.arange(12 * 6, dtype=np.float32).reshape(12, 6),
        "norm.weight": np.ones(6, np.float32),
        "step": np.int64(3),
        "router.qweight": np.zeros((4, 8), np.int32),
        "router.qzeros": np.zeros((1, 1), np.int32),
        "router.scales": np.zeros((1, 8), np.float16),
    }
    for expert in range(6):
        arrays[f"layers.1.experts.{expert}.up.weight"] = np.full((2, 2), expert, np.float32)
    mxfp4np.save_file(arrays, path)
    return path


@pytest.fixture(params=[*IO, "remote"])
def opened(request, path):
    """A checkpoint that is mapped, read or remote, and the bytes of tensors that were read from the latter two."""
    read = []
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "remote":
            obstore = pytest.importorskip(
                "obstore.store", reason="needs obstore: python -m pip install 'mxfp4np[remote]'"
            )
            from mxfp4np.storage.remote import RemotePath

            fetch = RemotePath.read_spans

            def count(self, stat, spans):
                spans = list(spans)
                read.append(sum(target.nbytes for _, target in spans))
                fetch(self, stat, spans)

            patch.setattr(RemotePath, "read_spans", count)
            checkpoint = Checkpoint(obstore.LocalStore(path.parent))
        else:

            def preadv(descriptor, buffers, offset):
                read.append(original(descriptor, buffers, offset))
                return read[-1]

            if request.param == "pread":
                original = os.preadv
                patch.setattr(tensorfile.os, "preadv", preadv)
            checkpoint = Checkpoint(path, io=request.param)
        with checkpoint:
            yield checkpoint, read


def padded(array, axis, length):
    """Return an array with zeros after it."""
    missing = np.zeros([length - n if i == axis % array.ndim else n for i, n in enumerate(array.shape)], array.dtype)
    return np.concatenate([array, missing], axis)


CASES = [  # name, style, its axis, sizes without padding, sizes with it and the length of a part
    (ALTERNATING, "experts", 0, (1, 2, 4), {3: 2, 5: 1}),
    (ALTERNATING, "colwise", 1, (1, 2, 3, 96), {2: 128, 5: 64}),
    (ALTERNATING, "gate_up", 1, (3, 96), {2: 128}),
    (ALTERNATING, -2, 1, (3, 96), {5: 40}),
    (ALTERNATING + "/up", "colwise", 1, (1, 2, 3, 96), {2: 64, 5: 32}),
    ("block.0.mlp.mlp1_bias", "colwise", 1, (3, 96), {2: 128}),
    ("block.0.mlp.mlp1_bias/gate", "gate_up", 1, (3, 96), {2: 64}),
    ("block.0.mlp.mlp1_bias", "experts", 0, (4,), {3: 2}),
    (DOWN, "rowwise", 2, (1, 3), {2: 64, 5: 32}),
    (DOWN, 0, 0, (2, 4), {3: 2}),
    (BELOW, "colwise", 1, (2, 96), {5: 64}),
    ("tiles.weight", "colwise", 0, (3,), {2: 256}),
    ("tiles.weight", "rowwise", 1, (3,), {2: 256, 5: 128}),
    ("rows.weight", "colwise", 0, (3, 96), {2: 64}),
    ("rows.weight", "rowwise", 1, (3,), {2: 64, 4: 32}),
    ("nv.weight", "colwise", 0, (2, 8), {3: 32}),
    ("nv.weight", "rowwise", 1, (2, 3, 6), {2: 64, 3: 32}),
    ("plain.weight", "colwise", 0, (2, 12), {5: 32}),
    ("plain.weight", "rowwise", 1, (2, 3), {}),
    ("plain.weight", 1, 1, (2, 3), {4: 2}),
    ("norm.weight", 0, 0, (2, 6), {4: 2}),
]


@pytest.mark.parametrize(("name", "style", "axis", "sizes", "pads"), CASES)
def test_parts_of_all_ranks_are_the_whole(opened, name, style, axis, sizes, pads):
    ckpt, read = opened
    whole, packed = ckpt.get(name), ckpt.info(name).layout is not None
    pattern = name.removesuffix("/up").removesuffix("/gate")
    for size, length in [*((size, whole.shape[axis] // size) for size in sizes), *pads.items()]:
        pad = (size, length) in pads.items()
        shards = [ckpt.shard(rank, size, {pattern: style}, pad=pad) for rank in range(size)]
        read.clear()
        parts = [shard[name] for shard in shards]
        counts = sum(read)
        assert {part.shape[axis] for part in parts} == {length}
        assert [shard.info(name).shape for shard in shards] == [part.shape for part in parts]
        assert_same(np.concatenate(parts, axis), padded(whole, axis, size * length) if pad else whole)
        if read and name in (ALTERNATING, ALTERNATING + "/up", DOWN, BELOW, "plain.weight"):
            assert counts == ckpt.info(name).nbytes // (2 if name.endswith("/up") else 1)
        if packed:
            for shard, part in zip(shards, parts, strict=True):
                found = shard.packed(name)
                assert found.shape == part.shape
                assert_same(found.decode(), part)
                out = np.full(part.shape[:-2] + part.shape[:-3:-1], 7, np.float32)
                assert shard.get(name, "float32", out=out, transpose=True) is out
                assert_same(out.swapaxes(-1, -2).astype(part.dtype), part)


@pytest.mark.parametrize(("size", "pad", "length"), [(2, False, 48), (3, False, 32), (2, True, 64), (5, True, 32)])
def test_gate_and_up_below_each_other_are_divided_alike(opened, size, pad, length):
    ckpt, read = opened
    gate, up = np.split(ckpt.get(BELOW, "float32"), 2, axis=1)
    shards = [ckpt.shard(rank, size, {"*.w13": "gate_up"}, pad=pad) for rank in range(size)]
    read.clear()
    parts = [shard.get(BELOW, "float32") for shard in shards]
    assert sum(read) == (ckpt.info(BELOW).nbytes if read else 0)
    for number, half in enumerate((gate, up)):
        joined = np.concatenate([part[:, number * length : (number + 1) * length] for part in parts], 1)
        assert_same(joined, padded(half, 1, size * length))
    for shard, part in zip(shards, parts, strict=True):
        assert shard.info(BELOW).shape == part.shape == (EXPERTS, 2 * length, 64)
        assert_same(shard.packed(BELOW).decode("float32"), part)


@pytest.mark.parametrize("size", [2, 4, 5])
def test_outputs_of_gate_up_are_the_inputs_of_down(path, size):
    plan = {"*mlp1*": "colwise", "*.w13": "gate_up", "*mlp2*": "rowwise"}
    with Checkpoint(path) as ckpt:
        for rank in range(size):
            part = ckpt.shard(rank, size, plan, pad=True)
            shapes = {part.info(name).shape[1] for name in (ALTERNATING, "block.0.mlp.mlp1_bias", BELOW)}
            assert shapes == {2 * part.info(DOWN).shape[2]}
            assert_same(part["block.0.mlp.mlp2_bias"], ckpt["block.0.mlp.mlp2_bias"])  # to be added once
            assert part["norm.weight"].shape == (6,)


def test_experts_of_their_own(path):
    name = "layers.1.experts.{}.up.weight".format
    with Checkpoint(path) as ckpt:
        for rank in range(3):
            part = ckpt.shard(rank, 3, {"*.experts.*": "experts"})
            mine = [name(2 * rank), name(2 * rank + 1)]
            assert [x for x in part if "experts" in x] == mine
            assert set(part) | {name(x) for x in range(6)} == set(ckpt)
            assert len(part) == len(ckpt) - 4
            assert part[mine[1]][0, 0] == 2 * rank + 1
            other = name((2 * rank + 2) % 6)
            assert other not in part
            assert part.get(other, default=None) is None
            with pytest.raises(TensorNotFoundError, match=f"rank {rank} of 3: it belongs to an expert of another rank"):
                part[other]
        with pytest.raises(LayoutError, match=r"6 experts, which 4 ranks do not divide: 3 or 6 do, or give pad=True"):
            list(ckpt.shard(0, 4, {"*.experts.*": "experts"}))
        last = ckpt.shard(3, 4, {"*.experts.*": "experts"}, pad=True)
        assert not [x for x in last if "experts" in x]


@pytest.mark.parametrize(
    ("name", "style", "size", "message"),
    [
        (DOWN, "rowwise", 2, "96 columns in units of 32, which 2 ranks do not divide: 1 or 3 do, or give pad=True"),
        (DOWN, "rowwise", 4, "96 columns in units of 32, which 4 ranks do not divide: 3 do, or give pad=True"),
        (ALTERNATING, "colwise", 5, "96 rows of gate, which 5 ranks do not divide: 4 or 6 do, or give pad=True"),
        ("tiles.weight", "rowwise", 2, "384 columns in units of 128, which 2 ranks do not divide: 1 or 3 do"),
        ("norm.weight", "colwise", 2, "expected a shape that 'colwise' can divide, found [6]"),
        ("norm.weight", "rowwise", 2, "expected a shape that 'rowwise' can divide, found [6]"),
        ("plain.weight", "experts", 2, "expected a shape that 'experts' can divide, found [12, 6]"),
        ("plain.weight", 2, 2, "expected a shape that 2 can divide, found [12, 6]"),
        ("tiles.weight", "gate_up", 2, "expected gate and up of a multiple of 128 rows each, found 384 rows"),
        ("router.qweight", "rowwise", 2, "is GPTQ, which is not decoded, and cannot be divided: see .stored"),
    ],
)
def test_what_does_not_divide(path, name, style, size, message):
    with Checkpoint(path) as ckpt:
        part = ckpt.shard(0, size, {name: style})
        for call in (part.info, part.get, part.packed):
            with pytest.raises(LayoutError, match=re.escape(message)) as info:
                call(name)
            assert str(path) in str(info.value)
            assert repr(name) in str(info.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 2, {}), "rank must be from 0 to size - 1, found rank 2 of 2"),
        ((-1, 2, {}), "rank must be from 0 to size - 1"),
        ((0, 0, {}), "rank must be from 0 to size - 1"),
        ((0, 2, {"*": "columns"}), "expected an axis or experts, colwise, rowwise, gate_up, found 'columns'"),
        ((0, 2, {"*": True}), "expected an axis or"),
        ((0, 2, {"*.q_proj": "colwise"}), "'*.q_proj': no tensor in"),
    ],
)
def test_wrong_arguments(path, arguments, message):
    with Checkpoint(path) as ckpt, pytest.raises(ValueError, match=re.escape(message)):
        ckpt.shard(*arguments)


def test_the_first_pattern_decides_and_one_rank_has_all(path):
    with Checkpoint(path) as ckpt:
        assert ckpt.shard(0, 2, {"plain.*": 1, "*": 0}).info("plain.weight").shape == (12, 3)
        for name, array in ckpt.shard(0, 1, {"*": "gate_up"}).items():
            assert_same(array, ckpt[name])
        part = ckpt.shard(1, 2, {"step": 0, "plain.weight": "colwise"})
        assert part["step"] == 3
        assert np.shares_memory(part["plain.weight"], ckpt["plain.weight"])
        assert repr(part).startswith("<rank 1 of 2 of <Checkpoint of ")
        assert_same(pickle.loads(pickle.dumps(part))["plain.weight"], part["plain.weight"])
        with pytest.raises(ValueError, match=r"out must have shape \(6, 6\)"):
            part.get("plain.weight", out=np.zeros((12, 6), np.float32))
        with pytest.raises(ValueError, match=r"out must have shape \(4, 128, 64\)"):
            ckpt.shard(1, 2, {BELOW: "gate_up"}, pad=True).get(BELOW, out=np.zeros((4, 96, 64), np.float32))


@pytest.mark.parametrize("second", [np.float32(0.5), np.full((3, 1, 1), 0.5, np.float32)])
@pytest.mark.parametrize(("style", "shape"), [("experts", (2, 8, 96)), ("rowwise", (3, 8, 64))])
def test_scales_above_the_scales(tmp_path, second, style, shape):
    codes, scales = RNG.integers(0, 256, (3, 8, 48), np.uint8), fp8(3, 8, 6)
    arrays = {"w.weight": codes, "w.weight_scale": scales, "w.weight_scale_2": second}
    mxfp4np.save_file(arrays, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as ckpt:
        whole = ckpt.get("w.weight", "float32")
        assert isinstance(ckpt.packed("w.weight"), ScaledArray)
        parts = [ckpt.shard(rank, 2, {"*": style}, pad=True).packed("w.weight") for rank in range(2)]
        assert {part.shape for part in parts} == {shape}
        axis = 0 if style == "experts" else 2
        joined = np.concatenate([part.decode("float32") for part in parts], axis)
        assert_same(joined, padded(whole, axis, 2 * shape[axis]))
