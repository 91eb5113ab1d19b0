"""Swizzled scales: against a loop over rows and columns, through files, and what their metadata says."""

import json

import numpy as np
import pytest
from contract import assert_same_bits, oracle
from helpers import both_io, pair_of, problem, write_tensors
from hypothesis import given
from hypothesis import strategies as st

import mxfp4np
from mxfp4np.layouts.packed import swizzled_shape, unswizzle

RNG = np.random.default_rng(6)


@given(lead=st.lists(st.integers(1, 3), max_size=1), rows=st.integers(1, 300), groups=st.integers(1, 11))
def test_swizzled_scales_against_a_direct_loop(lead, rows, groups):
    shape = swizzled_shape((*lead, rows, groups))
    assert shape == (*lead, 32 * -(-rows // 128), 16 * -(-groups // 4))
    flat = np.random.default_rng(rows).integers(0, 256, int(np.prod(shape)), np.uint8)
    actual = unswizzle(flat, (*lead, rows, groups))
    across = -(-groups // 4)
    planes = flat.reshape(-1, int(np.prod(shape[-2:])))
    for plane, found in zip(planes, actual.reshape(-1, rows, groups), strict=True):
        for row in range(rows):
            for column in range(groups):
                tile = row // 128 * across + column // 4
                place = 512 * tile + 16 * (row % 32) + 4 * (row % 128 // 32) + column % 4
                assert found[row, column] == plane[place]


@both_io
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (127, 4), (128, 3), (129, 5), (300, 9)])
def test_swizzled_scales_of_many_tiles(tmp_path, io, rows, groups):
    codes = RNG.integers(0, 256, (rows, 16 * groups), np.uint8)
    scales = RNG.integers(0, 256, (rows, groups), np.uint8)
    down, across = -(-rows // 128), -(-groups // 4)
    padded = np.zeros((128 * down, 4 * across), np.uint8)
    padded[:rows, :groups] = scales
    tiles = padded.reshape(down, 4, 32, across, 4).transpose(0, 3, 2, 1, 4).reshape(32 * down, 16 * across)
    tensors = pair_of("a._weight_qdata", "a._weight_scale", "U8", "F8_E8M0", codes=codes, scales=tiles)
    path = write_tensors(tmp_path / "m.safetensors", tensors)  # without metadata: the shape tells
    values = oracle(codes.reshape(rows, groups, 16), scales, "float32")
    with mxfp4np.Checkpoint(path, io=io) as ckpt:
        assert ckpt.info("a.weight").layout == "torchao-swizzled"
        assert_same_bits(ckpt.get("a.weight", dtype="float32"), values)
        assert_same_bits(ckpt.get("a.weight", dtype="float32", index=np.s_[-1:, 3:]), values[-1:, 3:])


@pytest.mark.parametrize("said", [{"elem_dtype": "float8_e4m3fn"}, {"block_size": 16}, {"is_swizzled_scales": True}])
def test_metadata_that_contradicts_the_headers_is_an_error(tmp_path, said):
    metadata = {"elem_dtype": {"_data": "float4_e2m1fn_x2"}, "block_size": 32, "is_swizzled_scales": False} | said
    tensors = pair_of("a._weight_qdata", "a._weight_scale", "U8", "F8_E8M0")
    path = write_tensors(tmp_path / "m.safetensors", tensors, {"a.weight": json.dumps(metadata)})
    assert "__metadata__ of 'a.weight' with elem_dtype float4_e2m1fn_x2" in problem(path, "a.weight")
