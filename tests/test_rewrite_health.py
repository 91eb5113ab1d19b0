"""A checkpoint by itself: weights that are all zeros, and what config.json says of weights and is not so."""

import json

import ml_dtypes
import numpy as np
import pytest
from helpers import pair

import mxfp4np


def save(path, tensors):
    mxfp4np.save_file(tensors, path)
    return path


def test_weights_that_are_all_zeros(tmp_path):
    zeros = mxfp4np.MXFP4Array(np.full((64, 2, 16), 0x80, np.uint8), np.full((64, 2), 120, np.uint8))
    tensors = {f"layers.{i}.up.weight": np.zeros((64, 64), ml_dtypes.bfloat16) for i in range(3)}
    tensors |= {"w": zeros, "negative.weight": np.full((64, 64), -0.0, np.float32), "good.weight": np.eye(64)}
    fine = {
        "a.bias": np.zeros((4, 64)),
        "norm.weight": np.zeros(4096),
        "b.lora_B.weight": np.zeros((64, 8)),
        "ids": np.zeros((64, 64), int),
    }
    findings = mxfp4np.verify(
        save(tmp_path / "m.safetensors", tensors | fine | {"tiny.weight": np.zeros((4, 4))})
    ).findings
    assert sorted(findings) == [
        "3 tensors 'layers.0-2.up.weight' are all zeros",
        "tensor 'negative.weight' is all zeros",
        "tensor 'w' is all zeros",
    ]


QUANTIZED = {"quantization_config": {"quant_method": "mxfp4"}}


FLOAT32 = {"a.weight": np.float32}


@pytest.mark.parametrize(
    ("config", "tensors", "expected"),
    [
        ({"dtype": "bfloat16"}, FLOAT32, "says that the dtype is bfloat16, but most weights are float32"),
        ({"torch_dtype": "float16"}, FLOAT32, "says that the dtype is float16, but most weights are float32"),
        ({"text_config": {"dtype": "float16"}}, FLOAT32, "says that the dtype is float16"),
        ({"dtype": "float32"}, FLOAT32, None),
        ({"dtype": "float16"}, {"b.weight": np.float16, **FLOAT32}, None),
        (
            {"dtype": "float16"},
            {"b.weight": np.float16, "lm_head.weight": np.float32, "router.weight": np.float32},
            None,
        ),
        ({"dtype": "float16"}, {"lm_head.weight": np.float32, "a.weight_scale_inv": np.float32}, None),
        ({"dtype": "auto"}, FLOAT32, None),
        (QUANTIZED, FLOAT32, "'quantization_config' says that weights are quantised, but no tensor is: remove it"),
        ({"text_config": QUANTIZED}, FLOAT32, "'quantization_config' says that"),
        ({"quantization": {"bits": 4}}, FLOAT32, "'quantization' says that"),
        (QUANTIZED, {"w": None, **FLOAT32}, None),
        (QUANTIZED, {"b.weight": np.uint8, **FLOAT32}, None),
        ({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}}, FLOAT32, None),
        ({"quantization_config": None}, FLOAT32, None),
    ],
)
def test_config_says_what_is_not_so(tmp_path, config, tensors, expected):
    values = np.random.default_rng(0).uniform(1, 2, (32, 32))
    arrays = {name: pair(2, 1) if dtype is None else values.astype(dtype) for name, dtype in tensors.items()}
    path = save(tmp_path / "model.safetensors", arrays)
    (tmp_path / "config.json").write_text(json.dumps(config))
    findings = mxfp4np.verify(tmp_path).findings
    assert len(findings) == (expected is not None)
    if expected:
        assert f"{tmp_path / 'config.json'}: " in findings[0]
        assert expected in findings[0]
    assert mxfp4np.verify(path).findings == []  # a file by its own name may be a part of what config.json is about
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in mxfp4np.verify(tmp_path).findings[0]


def scaled(folder, codes, scales, **more):
    tensors = {"a.weight": codes.view(ml_dtypes.float8_e4m3fn), "a.weight_scale": scales}
    return save(folder / "model.safetensors", tensors | more)


@pytest.mark.parametrize(
    ("code", "scales", "finding"),
    [
        (0x38, np.full((64, 1), 0.01, np.float32), None),
        (0x80, np.full((64, 1), 0.01, np.float32), "tensor 'a.weight' is all zeros"),
        (0x38, np.zeros((64, 1), np.float32), "tensor 'a.weight' is all zeros"),
        (0x38, np.full((), np.nan, np.float32), "tensor 'a.weight': 1 of its scales are NaN or infinite"),
        (0x38, np.array([[np.inf]] + [[1]] * 63, np.float32), "'a.weight': 1 of its scales are NaN or infinite"),
        (0x38, np.full((64, 1), 1e30, np.float32), "half of its scales are above 2**99: no weights are"),
        (0x38, np.full((64, 2), 120, np.uint8), None),
        (0x38, np.full((64, 2), 255, np.uint8), "tensor 'a.weight': 128 of its scales are NaN or infinite"),
        (0x38, np.full((64, 2), 10, np.uint8), "half of its scales are below 2**-117: no weights are"),
    ],
)
def test_scales_and_zeros_of_fp8(tmp_path, code, scales, finding):
    result = mxfp4np.verify(scaled(tmp_path, np.full((64, 64), code, np.uint8), scales))
    assert len(result.findings) == (finding is not None)
    if finding:
        assert finding in result.findings[0]
    is_nan = scales.dtype == np.uint8 and scales.max() == 255
    assert result.nan_blocks == (128 if is_nan else 0)


def test_scales_of_nvfp4(tmp_path):
    tensors = {
        "a.weight_packed": np.full((64, 32), 0x21, np.uint8),
        "a.weight_scale": np.full((64, 4), 0x38, np.uint8).view(ml_dtypes.float8_e4m3fn),
        "a.weight_global_scale": np.full(1, 1000, np.float32),
    }
    assert mxfp4np.verify(save(tmp_path / "model.safetensors", tensors)).findings == []
    tensors["a.weight_global_scale"][:] = 1e-30
    (finding,) = mxfp4np.verify(save(tmp_path / "model.safetensors", tensors)).findings
    assert "half of its scales are above 2**99" in finding
