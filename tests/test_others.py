"""What is quantised, but not as MXFP4: each producer's names, dtypes and shapes, and the format that they are given.

FP8, MXFP8 and NVFP4 are decoded; see also test_scaled.
"""

import json
from functools import partial
from importlib.metadata import version

import numpy as np
import pytest
from helpers import assert_same, both_io

import mxfp4np
from mxfp4np import LayoutError, TensorNotFoundError
from mxfp4np.storage.safetensors import write_safetensors
from mxfp4np.storage.tensorfile import nbytes_of


def checkpoint(folder, tensors, config=None, metadata=None):
    """Write tensors of plausible values, given as text: name, dtype, shape."""
    specs = {}
    for line in tensors:
        name, dtype, *shape = line.split()
        specs[name] = (dtype, tuple(map(int, shape)))
    data = [np.full(nbytes_of(*spec), 64, np.uint8) for spec in specs.values()]
    write_safetensors(folder / "model.safetensors", specs, data, metadata)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


DECODED = {  # format, layout, codes, their scales; after an empty text what lies beside them
    "HF fp8, blocks": ("FP8", "weight-scale-inv", "a.weight F8_E4M3 256 256", "a.weight_scale_inv F32 2 2"),
    "HF fp8, per tensor": (
        "FP8",
        "weight-scale-inv",
        "a.weight F8_E4M3 64 64",
        "a.weight_scale_inv BF16",
        "",
        "a.activation_scale BF16",
    ),
    "HF fp8, fused experts": (
        "FP8",
        "weight-scale-inv",
        "e.gate_up_proj F8_E4M3 2 256 64",
        "e.gate_up_proj_scale_inv F32 2 2 1",
    ),
    "DeepSeek-V4": ("FP8", "deepseek", "a.weight F8_E4M3 256 256", "a.scale F8_E8M0 2 2"),
    "shared scale": ("FP8", "weight-scale", "n.shard_0.weight F8_E4M3 24 32", "n.weight_scale BF16 1"),
    "FP8 tensor": ("FP8", "weight-scale", "a.weight F8_E4M3 64 64", "a.weight_scale BF16 1"),
    "FP8 channel": (
        "FP8",
        "weight-scale",
        "a.weight F8_E4M3 64 64",
        "a.weight_scale F32 64 1",
        "",
        "a.input_scale F32",
    ),
    "ModelOpt channel": ("FP8", "weight-scale", "a.weight F8_E4M3 64 64", "a.weight_scale F32 64"),
    "ModelOpt blocks": ("FP8", "weight-scale", "a.weight F8_E4M3 256 256", "a.weight_scale F32 2 1 2 1"),
    "one scale for each expert": ("FP8", "weight-scale", "e.weight F8_E4M3 3 64 64", "e.weight_scale F32 3 1 1"),
    "one row": ("FP8", "weight-scale", "a.weight F8_E4M3 1 64", "a.weight_scale F32"),
    "Quark E5M2": ("FP8", "weight-scale", "a.weight F8_E5M2 64 64", "a.weight_scale BF16"),
    "FNUZ": ("FP8", "weight-scale", "a.weight F8_E4M3FNUZ 64 64", "a.weight_scale BF16"),
    "torchao Float8Tensor": ("FP8", "torchao", "a._weight_qdata F8_E4M3 3 24 64", "a._weight_scale F32 3 24 1"),
    "Mistral": ("FP8", "mistral", "a.weight F8_E4M3 64 64", "a.qscale_weight F32", "", "a.qscale_act F32"),
    "ComfyUI, old": ("FP8", "comfyui", "a.weight F8_E4M3 64 64", "a.scale_weight F32", "", "a.scale_input F32"),
    "compressed-tensors MXFP8": ("MXFP8", "weight-scale", "a.weight F8_E4M3 64 64", "a.weight_scale U8 64 2"),
    "MiniMax-M3": ("MXFP8", "weight-scale-inv", "a.weight F8_E4M3 64 64", "a.weight_scale_inv U8 64 2"),
    "Inkling 2": ("MXFP8", "weight-scale", "e.w13_weight F8_E4M3 2 64 64", "e.w13_weight_scale U8 2 64 2"),
    "torchao MXTensor": ("MXFP8", "torchao", "a._weight_qdata F8_E5M2 24 96", "a._weight_scale F8_E8M0 24 3"),
    "torchao MXTensor, swizzled": (
        "MXFP8",
        "torchao",
        "a._weight_qdata F8_E4M3 160 32",
        "a._weight_scale F8_E8M0 64 16",
    ),
    "MLX mxfp8": ("MXFP8", "mlx", "a.weight U32 64 16", "a.scales U8 64 2"),
    "ComfyUI mxfp8": (
        "MXFP8",
        "weight-scale",
        "a.weight F8_E4M3 64 96",
        "a.weight_scale F8_E8M0 128 4",
        "",
        "a.comfy_quant U8 19",
    ),
    "compressed-tensors NVFP4": (
        "NVFP4",
        "compressed-tensors",
        "a.weight_packed U8 64 32",
        "a.weight_scale F8_E4M3 64 4",
        "a.weight_global_scale F32 1",
    ),
    "ModelOpt NVFP4": (
        "NVFP4",
        "weight-scale",
        "a.weight U8 64 32",
        "a.weight_scale F8_E4M3 64 4",
        "a.weight_scale_2 F32",
    ),
    "ModelOpt NVFP4, stacked": (
        "NVFP4",
        "modelopt-experts",
        "e.down_proj U8 2 16 64",
        "e.down_proj_weight_scale F8_E4M3 2 2 64",
        "e.down_proj_weight_scale_2 F32",
    ),
    "torchao NVFP4Tensor": ("NVFP4", "torchao", "a._weight_qdata U8 160 16", "a._weight_scale F8_E4M3 64 16"),
    "MLX nvfp4": ("NVFP4", "mlx", "a.weight U32 64 8", "a.scales U8 64 4"),
    "ComfyUI nvfp4": (
        "NVFP4",
        "weight-scale",
        "a.weight U8 48 48",
        "a.weight_scale F8_E4M3 128 8",
        "a.weight_scale_2 F32",
        "",
        "a.comfy_quant U8 19",
    ),
    "F4 and E4M3": (
        "NVFP4",
        "weight-scale",
        "a.weight F4 64 64",
        "a.weight_scale F8_E4M3 64 4",
        "a.weight_scale_2 BF16 1",
    ),
}
PRODUCERS = {  # format, codes, what lies beside them; what is not decoded
    "Quark fp6": ("MXFP6", "a.weight U8 64 96", "a.weight_scale U8 64 4"),
    "F6": ("MXFP6", "a.weight F6_E2M3 64 64", "a.weight_scale F8_E8M0 64 2"),
    "F6 alone": ("FP6", "a F6_E3M2 64 64"),
    "F4 alone": ("FP4", "a F4 64 64"),
    "compressed-tensors int4": ("INT4", "a.weight_packed I32 64 8", "a.weight_scale BF16 64 2", "a.weight_shape I32 2"),
    "compressed-tensors int8": ("INT8", "a.weight I8 64 64", "a.weight_scale BF16 64 1"),
    "ModelOpt int4": ("INT4", "a.weight U8 32 128", "a.weight_scale F32 64 1", "a.pre_quant_scale F32 128"),
    "Quark int4": ("INT4", "a.weight I32 64 8", "a.weight_scale F32 64 2", "a.weight_zero_point I32 64 1"),
    "int8, few inputs": ("INT8", "a.weight I8 64 16", "a.weight_scale F32 64 1"),
    "torchao int8": ("INT8", "a._weight_qdata I8 64 64", "a._weight_scale F32 64 1"),
    "GPTQ": ("GPTQ", "a.qweight I32 8 64", "a.qzeros I32 2 8", "a.scales F16 2 64", "a.g_idx I32 64"),
    "GPTQ without g_idx": ("GPTQ", "a.qweight I32 8 64", "a.qzeros I32 2 8", "a.scales F16 2 64"),
    "AWQ": ("AWQ", "a.qweight I32 64 8", "a.qzeros I32 2 8", "a.scales F16 2 64"),
    "MLX affine": ("MLX affine", "a.weight U32 64 8", "a.scales BF16 64 1", "a.biases BF16 64 1"),
    "bitsandbytes 4-bit": (
        "bitsandbytes",
        "a.weight U8 2048 1",
        "a.weight.absmax F32 64",
        "a.weight.quant_map F32 16",
        "a.weight.quant_state.bitsandbytes__nf4 U8 90",
    ),
    "bitsandbytes in bfloat16": ("bitsandbytes", "a.weight BF16 1024 1", "a.weight.absmax F32 64"),
    "bitsandbytes int8": ("INT8", "a.weight I8 64 64", "a.SCB F32 64", "a.weight_format U8"),
    "HQQ": ("HQQ", "a.W_q U8 32 64", "a.scale F16 64 1", "a.zero F16 64 1"),
    "EXL2": ("EXL2", "a.q_weight I32 8 64", "a.q_groups I16 4", "a.q_scale I32 2 8"),
    "EXL3": ("EXL3", "a.trellis I16 4 4 64", "a.suh F16 64", "a.svh F16 64"),
}


def fields(producer):
    """Return a producer's codes and scales, and what lies beside them."""
    _, _, *tensors = DECODED[producer]
    cut = tensors.index("") if "" in tensors else len(tensors)
    return tensors[:cut], tensors[cut + 1 :]


@both_io
@pytest.mark.parametrize("producer", DECODED)
def test_codes_and_scales_of_each_producer_are_one_tensor(tmp_path, producer, io):
    if producer == "FNUZ" and version("safetensors").startswith("0.7."):
        pytest.skip("safetensors knows the FNUZ dtypes from 0.8 on")
    form, layout, *_ = DECODED[producer]
    tensors, beside = fields(producer)
    with mxfp4np.Checkpoint(checkpoint(tmp_path, [*tensors, *beside, "norm.weight BF16 64"]), io=io) as ckpt:
        stored = [line.split()[0] for line in tensors]
        name = stored[0].removesuffix("_packed").replace("._weight_qdata", ".weight")
        assert set(ckpt) == {name, "norm.weight", *(line.split()[0] for line in beside)}
        info = ckpt.info(name)
        assert (info.format, info.dtype, info.layout) == (form, form, layout)
        assert [half.name for half in info.stored] == stored
        assert info.reason == f"suffix pair, {'/'.join(line.split()[1] for line in tensors)}"
        values = ckpt[name]
        assert (values.shape, values.dtype.name) == (info.shape, "bfloat16")
        assert ckpt.packed(name).shape == info.shape
        for half in stored[1:]:
            with pytest.raises(TensorNotFoundError, match=f"it is the packed half of {name!r}"):
                ckpt.info(half)
        assert {ckpt.info(line.split()[0]).format for line in beside} <= {None}


@pytest.mark.parametrize("producer", PRODUCERS)
def test_format_of_each_producer(tmp_path, producer):
    expected, *tensors = PRODUCERS[producer]
    with mxfp4np.Checkpoint(checkpoint(tmp_path, [*tensors, "norm.weight BF16 64"])) as ckpt:
        assert [ckpt.info(line.split()[0]).format for line in tensors] == [expected, *[None] * (len(tensors) - 1)]
        for line in (*tensors, "norm.weight BF16 64"):
            name, dtype, *_ = line.split()
            assert (ckpt.info(name).dtype, ckpt.info(name).layout) == (dtype, None)
            assert ckpt[name].nbytes == ckpt.stored[name].nbytes


PLAIN = [
    ["hc_attn_base BF16 24", "hc_attn_fn BF16 24 64", "hc_attn_scale BF16 3"],
    ["q_norm.weight BF16 64", "q_norm.scale F32 64"],
    ["logit_scale F32", "router.weight BF16 8 64", "router.scale F32 8"],
    ["a.weight BF16 64 64", "a.weight_scale_inv F32 1 1"],
    ["a.weight BF16 64 64", "a.scales F32 64 2"],
    ["a.weight U8 64 64", "mask BOOL 64 64", "buffer I8 64 64", "words U32 4 4"],
    ["position_ids I64 1 64", "a.weight_shape I64 2", "table.weight I32 8 8"],
    ["a.weight F8_E4M3 64 64", "b.weight F8_E5M2 64"],
    ["steps I8 64", "steps_scale F32"],
]


@pytest.mark.parametrize("tensors", PLAIN, ids=lambda tensors: tensors[-1])
def test_plain_tensors_have_no_format(tmp_path, tensors):
    with mxfp4np.Checkpoint(checkpoint(tmp_path, tensors, {"model_type": "x"})) as ckpt:
        assert {name: ckpt.info(name).format for name in ckpt} == {line.split()[0]: None for line in tensors}


@pytest.mark.parametrize(
    ("expected", "tensors", "config"),
    [
        ("MXFP6", ["a.weight U8 64 50"], {"quant_method": "quark", "dtype": "mx", "mx_element_dtype": "fp6_e3m2"}),
        ("FP8", ["a.weight F8_E4M3 64 128", "a.weight_scale U8 2 4"], {"w": {"block_size": [32, 32]}}),
        ("FP8", ["a.weight F8_E4M3 64 96", "a.weight_scale_inv F32 3 2"], {"weight_block_size": [24, 48]}),
        ("FP8", ["a.weight F8_E4M3 64 96", "a.weight_scale_inv F32 64 3"], {"weight_block_size": [1, 32]}),
    ],
)
def test_documents_say_what_headers_do_not(tmp_path, expected, tensors, config):
    with mxfp4np.Checkpoint(checkpoint(tmp_path, tensors, config)) as ckpt:
        info = ckpt.info(tensors[0].split()[0])
        assert info.format == expected
        assert expected == "MXFP6" or ckpt[info.name].shape == info.shape == info.stored[0].shape


def test_integers_that_could_be_mxfp4_with_converted_scales(tmp_path):
    tensors = ["a.weight U8 64 32", "a.weight_scale F32 64 2"]
    with mxfp4np.Checkpoint(checkpoint(tmp_path, tensors, {"quant_algo": "INT4_AWQ"})) as ckpt:
        assert ckpt.info("a.weight").format == "INT4"


def test_bits_of_words_are_those_of_the_config(tmp_path):
    tensors = PRODUCERS["compressed-tensors int4"][1:]
    with mxfp4np.Checkpoint(checkpoint(tmp_path, tensors, {"weights": {"num_bits": 8}})) as ckpt:
        assert ckpt.info("a.weight_packed").format == "INT8"


# What is done with them


@pytest.fixture
def mixed(tmp_path):
    """GPTQ, bitsandbytes and INT8 codes beside FP8, NVFP4, MXFP4 and plain tensors."""
    tensors = [
        *DECODED["HF fp8, blocks"][2:],
        *(line.replace("a.", "b.", 1) for line in DECODED["MLX nvfp4"][2:]),
        *(line.replace("a.", "c.", 1) for line in PRODUCERS["GPTQ"][1:]),
        *(line.replace("a.", "d.", 1) for line in PRODUCERS["bitsandbytes in bfloat16"][1:]),
        *(line.replace("a.", "e.", 1) for line in PRODUCERS["compressed-tensors int8"][1:]),
        "m.weight_packed U8 4 32",
        "m.weight_scale U8 4 2",
        "n.weight BF16 4 32",
    ]
    (tmp_path / "in").mkdir()
    return checkpoint(tmp_path / "in", tensors)


CODES = {"c.qweight": "GPTQ", "d.weight": "bitsandbytes", "e.weight": "INT8"}


@both_io
@pytest.mark.parametrize("name", CODES)
def test_codes_come_as_stored_or_not_at_all(mixed, io, name):
    with mxfp4np.Checkpoint(mixed, io=io) as ckpt:
        stored = ckpt.stored[name]
        assert_same(ckpt[name], stored)
        assert_same(ckpt.get(name, stored.dtype, index=np.s_[1:3]), stored[1:3])
        assert_same(ckpt.get(name, out=np.empty_like(stored)), stored)
        assert [chunk.dtype for _, chunk in ckpt.chunks(name)] == [stored.dtype]
        calls = [
            partial(ckpt.get, name, "float32"),
            partial(ckpt.get, name, out=np.empty(stored.shape, np.float32)),
            partial(ckpt.get, name, dtype="float16", index=0),
            lambda: next(ckpt.chunks(name, dtype="float32")),
        ]
        for call in calls:
            with pytest.raises(LayoutError) as info:
                call()
            assert f"tensor {name!r} is {CODES[name]}, which is not decoded: its bytes are in .stored" in str(
                info.value
            )
        with pytest.raises(LayoutError, match=f"is {CODES[name]}, not MXFP4"):
            ckpt.packed(name)


def test_load_file_converts_no_codes(mixed):
    found = mxfp4np.load_file(mixed, dtype="float32")
    with mxfp4np.Checkpoint(mixed) as ckpt:
        plain = {name: array for name, array in found.items() if ckpt.info(name).layout is None}
        converted = {name for name, array in plain.items() if array.dtype != ckpt[name].dtype}
        assert converted == {"n.weight", "c.scales", "e.weight_scale"}
    assert {found[name].dtype.name for name in ("a.weight", "b.weight", "m.weight")} == {"float32"}


def test_commands_name_and_keep_them(mixed, tmp_path, command, refused):
    status, out, _ = command("inspect", mixed)
    assert status == 0
    for name, kind in CODES.items():
        assert any(line.startswith(f"{name} ") and f"({kind})" in line for line in out.splitlines())
    for kind in ("MXFP4", "FP8", "NVFP4", "GPTQ"):
        assert f"1 of them {kind}" in out
    assert command("verify", mixed)[0] == 0
    status, _, err = command("convert", mixed, tmp_path / "out", "--verify")
    assert status == 0
    assert "still quantised" in err
    assert "3 tensors" in err
    with mxfp4np.Checkpoint(mixed) as source, mxfp4np.Checkpoint(tmp_path / "out") as target:
        assert {name: target.info(name).format for name in CODES} == CODES
        for name in source.stored.keys() & target.stored.keys() - {"a.weight", "b.weight"}:
            assert_same(source.stored[name], target.stored[name])
        for name in ("a.weight", "b.weight", "m.weight"):
            assert_same(source[name], target[name])
    assert command("decode", mixed, "e.weight", "-o", tmp_path / "e.safetensors")[0] == 0
    message = refused("decode", mixed, "e.weight", "--dtype", "float32", "-o", tmp_path / "e.npy")
    assert "tensor 'e.weight' is INT8, which is not decoded" in message


def test_encode_refuses_codes(mixed, tmp_path):
    with pytest.raises(LayoutError, match=r"'a.weight' is quantised already, it is FP8: convert the checkpoint first"):
        mxfp4np.encode_checkpoint(mixed, tmp_path / "out", layout="mlx", include="n.weight")


# FP8, MXFP8 and NVFP4 that do not fit


SAYS_FP8 = {"quantization_config": {"quant_method": "fp8"}}
MISFITS = {
    "no scale, and config.json says that there is one": (
        ["e.0.weight F8_E4M3 64 64"],
        SAYS_FP8,
        (
            "tensor 'e.0.weight' is FP8 and has no scale: expected 'e.0.weight_scale_inv' or 'e.0.weight_scale' in "
            "one of the checkpoint's files, found none; open the folder that holds all shards"
        ),
    ),
    "no scale of stacked experts": (
        ["e.down_proj F8_E4M3 2 64 64"],
        SAYS_FP8,
        (
            "tensor 'e.down_proj' is FP8 and has no scale: expected 'e.down_proj_scale_inv' or "
            "'e.down_proj_weight_scale_inv' in"
        ),
    ),
    "no scale, and ComfyUI says that there is one": (
        ["a.weight F8_E4M3 64 64", "a.comfy_quant U8 19"],
        None,
        "tensor 'a.weight' is FP8 and has no scale: expected",
    ),
    "no scale of torchao": (
        ["a._weight_qdata F8_E4M3 64 64"],
        None,
        "tensor 'a._weight_qdata' is FP8 and has no scale: expected 'a._weight_scale'",
    ),
    "no scales, but a second one": (
        ["a.weight U8 64 32", "a.weight_scale_2 F32"],
        None,
        "tensor 'a.weight' is NVFP4 and has no scales: expected 'a.weight_scale' in",
    ),
    "no scales, but a second one, of stacked experts": (
        ["e.down_proj U8 2 16 64", "e.down_proj_weight_scale_2 F32"],
        None,
        "tensor 'e.down_proj' is NVFP4 and has no scales: expected 'e.down_proj_weight_scale' in",
    ),
    "no scales of MLX": (
        ["a.weight U32 64 8"],
        {"quantization": {"mode": "nvfp4"}},
        "tensor 'a.weight' is quantised, as config.json says, and has no scales: expected 'a.scales' in",
    ),
    "no codes": (
        ["a.weight_scale F8_E4M3 64 4", "a.weight_scale_2 F32"],
        None,
        "tensor 'a.weight_scale' holds scales and has no codes: expected 'a.weight' or 'a.weight_packed' in",
    ),
    "a scalar of a module that has a weight of its own": (
        ["a.b.weight F8_E4M3 64 64", "a.weight F8_E4M3 64 64", "a.weight_scale F32 1"],
        SAYS_FP8,
        "tensor 'a.b.weight' is FP8 and has no scale",
    ),
    "no second scale": (
        ["a.weight U8 64 32", "a.weight_scale F8_E4M3 64 4"],
        None,
        "tensor 'a.weight': expected 'a.weight_scale_2', the second scale of NVFP4, found none; open the folder",
    ),
    "no global scale": (
        ["a.weight_packed U8 64 32", "a.weight_scale U8 64 4"],
        None,
        "tensor 'a.weight_packed': expected 'a.weight_global_scale', the second scale of NVFP4, found none",
    ),
    "several second scales": (
        ["a.weight U8 64 32", "a.weight_scale F8_E4M3 64 4", "a.weight_scale_2 F32 64"],
        None,
        "tensor 'a.weight_scale_2': expected one value, or shape [], found shape [64]",
    ),
    "a second scale of integers": (
        ["a.weight U8 64 32", "a.weight_scale F8_E4M3 64 4", "a.weight_scale_2 I32"],
        None,
        "tensor 'a.weight_scale_2': expected dtype F32 or BF16 or F16, found I32",
    ),
    "groups of 32 beside a second scale": (
        ["a.weight U8 64 64", "a.weight_scale U8 64 4", "a.weight_scale_2 F32"],
        None,
        "tensor 'a.weight_scale': expected a scale for 16 values of each row of [64, 64], found [64, 4]",
    ),
    "tiles of another size": (
        ["a.weight F8_E4M3 256 256", "a.weight_scale_inv F32 4 4"],
        None,
        (
            "tensor 'a.weight_scale_inv': expected one scale for the tensor, for each row, or for 128 x 128 values of "
            "[256, 256], found [4, 4]: if a scale is for other tiles, put the config.json with their "
            "'weight_block_size' beside the file"
        ),
    ),
    "rows that do not divide": (
        ["a.weight F8_E4M3 192 256", "a.weight_scale_inv F32 3 2"],
        {"weight_block_size": [128, 128]},
        "or for 128 x 128 values, as config.json says, of [192, 256], found [3, 2]",
    ),
    "two tiles": (
        ["a.weight F8_E4M3 150 256", "a.weight_scale_inv F32 2 2"],
        {"weight_block_size": [128, 128], "x": {"block_structure": [100, 128]}},
        "of [150, 256], found [2, 2], which fits tiles of",
    ),
    "scales that could be transposed": (
        ["a.weight F8_E4M3 64 128", "a.weight_scale F32 128 1"],
        None,
        "tensor 'a.weight_scale': expected one scale for the tensor, for each row, or",
    ),
    "two tensors of scales": (
        ["a.weight F8_E4M3 64 64", "a.weight_scale F32 1", "a.weight_scale_inv F32 1"],
        None,
        (
            "tensor 'a.weight': expected one tensor of scales, found that it could be 'a.weight_scale_inv' or "
            "'a.weight_scale'"
        ),
    ),
    "scales of another dtype": (
        ["a.weight F8_E4M3 64 64", "a.weight_scale F8_E4M3 64 1"],
        None,
        "tensor 'a.weight_scale': expected dtype F32 or BF16 or F16 or F8_E8M0 or U8, for FP8, found F8_E4M3",
    ),
    "MXFP8 with too few scales": (
        ["a.weight F8_E4M3 64 128", "a.weight_scale U8 65 4"],
        None,
        "tensor 'a.weight_scale': expected a scale for 32 values of each row of [64, 128], found [65, 4]",
    ),
}


@pytest.mark.parametrize(("tensors", "config", "message"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_an_error(tmp_path, tensors, config, message, refused):
    with mxfp4np.Checkpoint(checkpoint(tmp_path, [*tensors, "norm.weight BF16 64"], config)) as ckpt:
        name = tensors[0].split()[0].removesuffix("_packed")
        name = name if name in ckpt else "a.weight"
        for call in (ckpt.info, ckpt.get, ckpt.packed):
            with pytest.raises(LayoutError) as info:
                call(name)
            assert str(info.value).startswith(f"{tmp_path / 'model.safetensors'}: tensor '")
            assert message in str(info.value)
        assert ckpt["norm.weight"].shape == (64,)
    assert message in refused("convert", tmp_path, tmp_path / "out")
    result = mxfp4np.convert(tmp_path, tmp_path / "out", exclude=name)
    assert name in result.contents.copied
    assert any(message in finding for finding in mxfp4np.verify(tmp_path).findings)


@pytest.mark.parametrize("config", [None, {"model_type": "x"}])
def test_fp8_without_scales_is_plain_unless_a_config_says_that_it_has_some(tmp_path, config):
    with mxfp4np.Checkpoint(checkpoint(tmp_path, ["a.weight F8_E4M3 64 64"], config)) as ckpt:
        assert (ckpt.info("a.weight").format, ckpt["a.weight"].dtype.name) == (None, "float8_e4m3fn")
        assert ckpt.get("a.weight", "float32")[0, 0] == ckpt["a.weight"][0, 0] == 2


def test_bfloat16_beside_a_scale_is_plain(tmp_path):
    tensors = ["a.weight BF16 64 64", "a.weight_scale_inv F32 1 1"]
    with mxfp4np.Checkpoint(checkpoint(tmp_path, tensors, SAYS_FP8)) as ckpt:
        assert [ckpt.info(name).format for name in ckpt] == [None, None]
        assert ckpt["a.weight"].dtype.name == "bfloat16"


@both_io
@pytest.mark.parametrize("evidence", ["tensor", "metadata", None])
@pytest.mark.parametrize(
    ("codes", "scales", "group"), [("U8 128 64", "F8_E4M3 128 8", 16), ("F8_E4M3 128 128", "F8_E8M0 128 4", 32)]
)
def test_scales_of_comfyui_are_swizzled_also_where_their_shape_is_that_of_others(
    tmp_path, codes, scales, group, evidence, io
):
    tensors = [f"a.weight {codes}", f"a.weight_scale {scales}", "a.weight_scale_2 F32"]
    metadata = {"_quantization_metadata": json.dumps({"layers": {"a": {"format": "x"}}})}
    if evidence == "tensor":
        tensors.append("a.comfy_quant U8 19")
    path = checkpoint(tmp_path, tensors, metadata=metadata if evidence == "metadata" else None) / "model.safetensors"
    rng = np.random.default_rng(0)
    with mxfp4np.Checkpoint(path) as ckpt:
        at = ckpt._stored["a.weight_scale"].offset, ckpt._stored["a.weight"].offset
    data = bytearray(path.read_bytes())
    stored = rng.integers(100, 120, (128, 128 // group), np.uint8)
    data[at[0] : at[0] + stored.nbytes] = stored.tobytes()
    raw = rng.integers(0, 120, (128, int(codes.split()[-1])), np.uint8)
    data[at[1] : at[1] + raw.nbytes] = raw.tobytes()
    path.write_bytes(data)
    with mxfp4np.Checkpoint(path, io=io) as ckpt:
        packed = ckpt.packed("a.weight")
        high_first = evidence is not None and group == 16
        assert np.array_equal(packed.blocks, (raw << 4) | (raw >> 4) if high_first else raw)
        found = packed.scales.view(np.uint8)
        for row, column in ((0, 0), (0, 3), (37, 2), (127, 128 // group - 1)):
            tile, within = divmod(column, 4)
            place = 512 * tile + 16 * (row % 32) + 4 * (row // 32) + within
            expected = stored[row, column] if evidence is None else stored.reshape(-1)[place]
            assert found[row, column] == expected


def test_torchao_says_whether_there_is_a_second_scale(tmp_path):
    tensors = ["a._weight_qdata U8 64 32", "a._weight_scale F8_E4M3 64 4"]
    for names, fits in ((["qdata", "scale"], True), (["per_tensor_scale", "qdata", "scale"], False)):
        metadata = {"a.weight": json.dumps({"_type": "NVFP4Tensor", "_tensor_data_names": names})}
        with mxfp4np.Checkpoint(checkpoint(tmp_path, tensors, metadata=metadata)) as ckpt:
            if fits:
                assert ckpt["a.weight"].shape == (64, 64)
            else:
                with pytest.raises(LayoutError, match=r"'a\._weight_per_tensor_scale', the second scale"):
                    ckpt.info("a.weight")


@pytest.mark.parametrize(("said", "fits"), [("false", False), ("true", True), (None, True)])
def test_torchao_says_whether_scales_are_swizzled(tmp_path, said, fits):
    metadata = {} if said is None else {"a.weight": json.dumps({"is_swizzled_scales": said == "true"})}
    tensors = ["a._weight_qdata F8_E4M3 160 32", "a._weight_scale F8_E8M0 64 16"]
    with mxfp4np.Checkpoint(checkpoint(tmp_path, tensors, metadata=metadata)) as ckpt:
        if fits:
            assert ckpt["a.weight"].shape == (160, 32)
        else:
            with pytest.raises(LayoutError, match="expected a scale for 32 values of each row"):
                ckpt.info("a.weight")
    metadata = {"a.weight": json.dumps({"is_swizzled_scales": said == "true"})}
    tensors = ["a._weight_qdata F8_E4M3 160 32", "a._weight_scale F8_E8M0 160 1"]
    (tmp_path / "plain").mkdir()
    with mxfp4np.Checkpoint(checkpoint(tmp_path / "plain", tensors, metadata=metadata)) as ckpt:
        if said == "true":
            with pytest.raises(LayoutError):
                ckpt.info("a.weight")
        else:
            assert ckpt["a.weight"].shape == (160, 32)
