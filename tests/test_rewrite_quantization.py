"""What quantisers' configurations, and the files beside weights, say after a part of a checkpoint was decoded."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import pair, save_raw

import mxfp4np
from mxfp4np.rewrite import quantization
from mxfp4np.rewrite.quantization import Modules, after_decoding, spellings

DATA = Path(__file__).parent / "data"
MLP, ATTENTION, HEAD = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj", "lm_head"
PART = Modules(frozenset([MLP]), {ATTENTION: "FP8"}, frozenset([HEAD]))
"""MLP was decoded, ATTENTION is still quantised."""
KEPT = Modules(frozenset([MLP]), {ATTENTION: "MXFP4"})
WEIGHTS = {"num_bits": 4, "type": "float", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float"}
NVFP4, MXFP8 = WEIGHTS | {"group_size": 16}, FP8 | {"group_size": 32}
INT4 = {"num_bits": 4, "type": "int", "group_size": 32}


def groups(*members):
    return {"config_groups": {f"group_{n}": {"targets": targets, "weights": x} for n, (targets, x) in members}}


CHANGES = {
    "compressed-tensors: the group goes": (
        {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}
        | groups((0, (["re:.*mlp.*"], WEIGHTS)), (1, (["Linear"], FP8))),
        PART,
        {"quant_method": "compressed-tensors", "ignore": ["lm_head", MLP]} | groups((1, (["Linear"], FP8))),
    ),
    "compressed-tensors: the group shrinks": (
        {"quant_method": "compressed-tensors"} | groups((0, ([MLP, ATTENTION], WEIGHTS))),
        KEPT,
        {"quant_method": "compressed-tensors", "ignore": [MLP]} | groups((0, ([ATTENTION], WEIGHTS))),
    ),
    **{
        f"compressed-tensors: {left} stays": (
            {"quant_method": "compressed-tensors"}
            | groups(*enumerate((["Linear"], x) for x in (WEIGHTS, FP8, NVFP4, MXFP8, INT4))),
            Modules(frozenset([MLP]), {ATTENTION: left}),
            {"quant_method": "compressed-tensors", "ignore": [MLP]}
            | groups(*((n, (["Linear"], x)) for n, x in sorted({number: weights, 4: INT4}.items()))),
        )
        for number, (left, weights) in enumerate(
            {"MXFP4": WEIGHTS, "FP8": FP8, "NVFP4": NVFP4, "MXFP8": MXFP8, "INT4": INT4}.items()
        )
    },
    "compressed-tensors: other kinds of groups": (
        {"quant_method": "compressed-tensors", "ignore": None, "config_groups": {"MXFP4": ["Linear"], "x": 1}},
        PART,
        {"quant_method": "compressed-tensors", "ignore": [MLP], "config_groups": {"MXFP4": ["Linear"], "x": 1}},
    ),
    "quark": (
        {
            "quant_method": "quark",
            "global_quant_config": {"weight": {"dtype": "fp4"}},
            "layer_quant_config": {MLP: 1, "*mlp*": 2, "*self_attn*": 3, "*layers.0*": 4},
            "exclude": ["lm_head"],
        },
        PART,
        {
            "quant_method": "quark",
            "global_quant_config": {"weight": {"dtype": "fp4"}},
            "layer_quant_config": {"*self_attn*": 3, "*layers.0*": 4},
            "exclude": ["lm_head", MLP],
        },
    ),
    "modelopt": (
        {"quant_method": "modelopt", "quantized_layers": {MLP: 1, ATTENTION: 2}, "ignore": ["lm_head"]},
        PART,
        {"quant_method": "modelopt", "quantized_layers": {ATTENTION: 2}, "ignore": ["lm_head", MLP]},
    ),
    "fp8 without a list": (
        {"quant_method": "fp8", "expert_dtype": "fp4"},
        PART,
        {"quant_method": "fp8", "modules_to_not_convert": [MLP, HEAD]},
    ),
    "fp8 with a list": (
        {"quant_method": "fp8", "modules_to_not_convert": [HEAD], "expert_dtype": "fp8"},
        PART,
        {"quant_method": "fp8", "modules_to_not_convert": [HEAD, MLP], "expert_dtype": "fp8"},
    ),
    "modelopt with groups": (
        {"quant_method": "modelopt", "ignore": []} | groups((0, ([MLP], NVFP4)), (1, ([ATTENTION], FP8))),
        PART,
        {"quant_method": "modelopt", "ignore": [MLP]} | groups((1, ([ATTENTION], FP8))),
    ),
    "fp4 experts that stay": (
        {"quant_method": "fp8", "expert_dtype": "fp4", "modules_to_not_convert": []},
        KEPT,
        {"quant_method": "fp8", "expert_dtype": "fp4", "modules_to_not_convert": [MLP]},
    ),
    "mlx": (
        {"bits": 4, "mode": "mxfp4", ATTENTION: {"bits": 8}},
        PART,
        {"bits": 4, "mode": "mxfp4", ATTENTION: {"bits": 8}, MLP: False},
    ),
    "another": ({"quant_method": "gptq", "bits": 4}, PART, {"quant_method": "gptq", "bits": 4}),
    "not a name": ({"quant_method": ["fp8"]}, PART, {"quant_method": ["fp8"]}),
    "nothing decoded": ({"quant_method": "fp8"}, Modules(frozenset(), {ATTENTION: "FP8"}), {"quant_method": "fp8"}),
    "integers of an unknown quantiser": (
        {"quant_method": "new"},
        Modules(frozenset([MLP]), {}, unknown=True),
        {"quant_method": "new"},
    ),
    "integers, but of a known one": ({"quant_method": "mxfp4"}, Modules(frozenset([MLP]), {}, unknown=True), None),
    "nothing left": ({"quant_method": "fp8"}, Modules(frozenset([MLP]), {}), None),
}


@pytest.mark.parametrize(("before", "modules", "after"), CHANGES.values(), ids=CHANGES)
def test_after_decoding(before, modules, after):
    original = json.dumps(before)
    assert after_decoding(before, modules) == after
    assert json.dumps(before) == original


def experts(layer, count=3):
    return {f"model.layers.{layer}.mlp.experts.{n}.{w}_proj" for n in range(count) for w in ("up", "down")}


def test_complete_lists_of_experts_are_named_as_a_whole(monkeypatch):
    """Models that stack their experts have one module for all; long lists of single ones are slow to match."""
    decoded = experts(0) | experts(1) - {"model.layers.1.mlp.experts.0.up_proj"} | {MLP}
    modules = Modules(frozenset(decoded), {"model.layers.1.mlp.experts.0.up_proj": "MXFP4"})
    whole = "model.layers.0.mlp.experts"
    assert modules.names() == (sorted(decoded), [whole])
    monkeypatch.setattr(quantization, "MAX_LISTED", 5)
    assert modules.names() == (sorted(decoded - experts(0)), [whole])
    ignore = after_decoding({"quant_method": "compressed-tensors"}, modules)["ignore"]
    assert ignore[-1] == r"re:model\.layers\.0\.mlp\.experts\..*"
    exclude = after_decoding({"quant_method": "quark"}, modules)["exclude"]
    assert exclude[-2:] == [whole, f"{whole}.*"]
    assert after_decoding({"quant_method": "fp8"}, modules)["modules_to_not_convert"][-1] == whole


def test_parts_of_one_module_and_experts_of_one_list():
    decoded = {"layers.0.mlp.experts", "layers.1.mlp.experts.0.up_proj", "layers.2.mlp.experts.0.up_proj"}
    quantized = ["layers.0.mlp.experts", "layers.1.mlp.experts.1.up_proj", "layers.3.mlp.experts.0.up_proj"]
    modules = Modules(frozenset(decoded), dict.fromkeys(quantized, "MXFP4"))
    assert modules.mixed == ["layers.0.mlp.experts", "layers.1.mlp.experts"]


@pytest.mark.parametrize(
    ("module", "several_parts", "expected"),
    [
        ("model.layers.0.mlp.up_proj", False, []),
        ("model.layers.0.mlp.up_proj", True, ["model.language_model.layers.0.mlp.up_proj"]),
        ("language_model.model.layers.0.mlp.up_proj", True, ["model.language_model.layers.0.mlp.up_proj"]),
        ("visual.blocks.0.attn.qkv", True, ["model.visual.blocks.0.attn.qkv"]),
        ("language_model.lm_head", True, ["lm_head"]),
        ("head", False, ["lm_head"]),
        ("embed", False, ["model.embed_tokens"]),
        ("layers.0.ffn.experts", False, ["model.layers.0.mlp.experts"]),
        ("layers.3.ffn.shared_experts.w2", False, ["model.layers.3.mlp.shared_experts.down_proj"]),
        ("layers.3.attn.wq_b", False, ["model.layers.3.self_attn.q_b_proj"]),
        ("layers.3.attn.indexer.wq_b", False, ["model.layers.3.self_attn.compressor.indexer.q_b_proj"]),
        ("layers.3.attn.indexer.compressor.wkv", False, ["model.layers.3.self_attn.compressor.indexer.kv_proj"]),
    ],
)
def test_loaders_know_modules_by_other_names(module, several_parts, expected):
    names = spellings(module, several_parts=several_parts)
    assert names[0] == module
    assert set(expected) <= set(names)
    assert several_parts or len(names) <= 3


# Whole checkpoints


def checkpoint(folder, config, fp8=True, **more):
    """MLP in MXFP4, and ATTENTION in FP8."""
    packed = pair(64, 2)
    tensors = {
        f"{MLP}.weight_packed": packed.blocks.reshape(64, -1),
        f"{MLP}.weight_scale": packed.scales,
        f"{HEAD}.weight": np.ones((4, 64), ml_dtypes.bfloat16),
    }
    if fp8:
        tensors[f"{ATTENTION}.weight"] = np.ones((64, 64), ml_dtypes.float8_e4m3fn)
        tensors[f"{ATTENTION}.weight_scale"] = np.ones((64, 1), np.float32)
    folder.mkdir()
    save_raw(folder / "model.safetensors", tensors | more)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


GROUPS = groups((0, (["re:.*mlp.*"], WEIGHTS)), (1, (["Linear"], FP8)))
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "float32",
    "quantization_config": {"quant_method": "compressed-tensors"}
    | groups((0, (["re:.*mlp.*"], WEIGHTS)), (1, (["Linear"], FP8))),
}


def written(folder, name="config.json"):
    path = folder / name
    return json.loads(path.read_text()) if path.exists() else None


def test_config_describes_what_was_decoded_and_what_stays(tmp_path):
    source = checkpoint(tmp_path / "in", CONFIG)
    result = mxfp4np.convert(source, tmp_path / "all")
    assert (result.contents.quantized, result.problem) == ([], None)
    assert "quantization_config" not in written(tmp_path / "all")
    result = mxfp4np.convert(source, tmp_path / "out", exclude=f"{ATTENTION}*")
    assert result.contents.quantized == [f"{ATTENTION}.weight"]
    assert result.problem is None
    config = written(tmp_path / "out")
    assert config["torch_dtype"] == "bfloat16"
    assert config["quantization_config"]["ignore"] == [MLP]
    assert list(config["quantization_config"]["config_groups"]) == ["group_1"]
    assert any("still quantised" in line and "which is FP8" in line for line in result.warnings())
    mxfp4np.convert(source, tmp_path / "copy", exclude="*")
    assert written(tmp_path / "copy") == CONFIG
    mxfp4np.convert(source, tmp_path / "mlp", drop=f"{ATTENTION}*")
    assert "quantization_config" not in written(tmp_path / "mlp")


def test_configs_of_parts_of_a_model(tmp_path):
    config = {"text_config": CONFIG, "vision_config": {"expert_dtype": "fp4"}, "compression_config": {"a": 1}}
    mxfp4np.convert(checkpoint(tmp_path / "in", config), tmp_path / "out", exclude=f"{ATTENTION}*")
    ignore = written(tmp_path / "out")["text_config"]["quantization_config"]["ignore"]
    assert ignore[0] == MLP
    assert "model.language_model.layers.0.mlp.up_proj" in ignore
    mxfp4np.convert(checkpoint(tmp_path / "plain", config, fp8=False), tmp_path / "none")
    config = written(tmp_path / "none")
    assert "quantization_config" not in config["text_config"]
    assert "compression_config" not in config


def test_an_unknown_quantiser_keeps_its_config_with_its_integers(tmp_path):
    config = {"quantization_config": {"quant_method": "new"}}
    words = {"x.words": np.ones((4, 4), np.int32)}
    mxfp4np.convert(checkpoint(tmp_path / "in", config, fp8=False, **words), tmp_path / "out")
    assert written(tmp_path / "out") == config
    mxfp4np.convert(tmp_path / "in", tmp_path / "without", drop="x.*")
    assert written(tmp_path / "without") == {}


QUANTIZERS_FILES = {
    "hf_quant_config.json": (
        {"quantization": {"quantized_layers": {MLP: {}, ATTENTION: {}}}},
        {"quantization": {"quantized_layers": {ATTENTION: {}}, "exclude_modules": [MLP]}},
    ),
    "quant_model_description.json": (
        {f"{MLP}.weight": "W4A8", f"{MLP}.weight_scale": "W4A8", f"{ATTENTION}.weight": "W8A8", "version": "1"},
        {f"{MLP}.weight": "FLOAT", f"{ATTENTION}.weight": "W8A8", "version": "1"},
    ),
    "dtypes.json": ({"x": "FP4"}, None),
}


@pytest.mark.parametrize(
    ("name", "before", "after"), [(x, *y) for x, y in QUANTIZERS_FILES.items()], ids=QUANTIZERS_FILES
)
def test_files_of_quantizers(tmp_path, name, before, after):
    for fp8 in (True, False):
        source = checkpoint(tmp_path / f"in {fp8}", CONFIG, fp8=fp8)
        (source / name).write_text(json.dumps(before))
        mxfp4np.convert(source, tmp_path / f"out {fp8}", exclude=f"{ATTENTION}*")
        assert written(tmp_path / f"out {fp8}", name) == (after if fp8 else None)
    mxfp4np.convert(source, tmp_path / "copy", exclude=f"{MLP}*")
    assert written(tmp_path / "copy", name) == before


def test_scales_go_with_their_quantisation(tmp_path):
    scalar = np.ones((), np.float32)
    cache = "model.layers.0.self_attn.k_scale"
    scales = {f"{MLP}.input_scale": scalar, f"{ATTENTION}.input_scale": scalar, cache: scalar}
    others = {f"{MLP}.output_scale.x": scalar, "model.logit_scale": scalar, f"{HEAD}.input_scale": scalar}
    source = checkpoint(tmp_path / "in", CONFIG, **scales, **others)
    result = mxfp4np.convert(source, tmp_path / "out", exclude=f"{ATTENTION}*", verify=True)
    assert result.contents.unneeded == [f"{MLP}.input_scale"]
    assert result.verification.findings == []
    assert any("left out with the quantisation" in line for line in result.warnings())
    result = mxfp4np.convert(source, tmp_path / "all")
    assert result.contents.unneeded == sorted(scales)
    plain = checkpoint(tmp_path / "plain", CONFIG, fp8=False, **scales, **others)
    result = mxfp4np.convert(plain, tmp_path / "none")
    assert result.contents.unneeded == [f"{MLP}.input_scale", cache]
    assert mxfp4np.verify(plain, tmp_path / "none").findings == []
    assert mxfp4np.Checkpoint(tmp_path / "none").keys() >= others.keys()
    mxfp4np.convert(plain, tmp_path / "copy", exclude="*mlp*")
    assert mxfp4np.Checkpoint(tmp_path / "copy").keys() >= scales.keys()


ROTATED = CONFIG | {"quantization_config": CONFIG["quantization_config"] | {"transform_config": {"a": 1}}}
MODELOPT = CONFIG | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "MIXED"}}
NOTHING = {key: value for key, value in CONFIG.items() if key != "quantization_config"}
EXPERTS = CONFIG | {"quantization_config": {"quant_method": "compressed-tensors"} | groups((0, (["Linear"], WEIGHTS)))}
EXPERT = "model.layers.0.mlp.experts.0.up_proj"
PROBLEMS = {
    "a drop": (CONFIG, {}, {"drop": "*mlp*"}, "1 tensor dropped"),
    "another orientation": (CONFIG, {}, {"transpose": "yes"}, "not as the model expects it"),
    "a rotation": (ROTATED, {}, {}, "transform_config"),
    "scaled inputs": (CONFIG, {f"{MLP}.pre_quant_scale": np.ones(64, np.float32)}, {}, "changes what the weights mean"),
    "modelopt": (MODELOPT, {}, {"exclude": f"{ATTENTION}*"}, "transformers does not load"),
    "experts of compressed-tensors beside packed weights": (
        EXPERTS,
        {
            f"{EXPERT}.weight_packed": np.zeros((64, 32), np.uint8),
            f"{EXPERT}.weight_scale": np.zeros((64, 2), np.uint8),
        },
        {"exclude": f"{MLP}*"},
        "transformers does not load",
    ),
    "no word of it": (NOTHING, {}, {"exclude": f"{ATTENTION}*"}, "transformers does not load"),
}


@pytest.mark.parametrize(("config", "more", "options", "problem"), PROBLEMS.values(), ids=PROBLEMS)
def test_what_no_loader_takes_is_not_offered_to_one(tmp_path, config, more, options, problem):
    result = mxfp4np.convert(checkpoint(tmp_path / "in", config, **more), tmp_path / "out", **options)
    assert problem in result.problem
    assert any(line.endswith(result.problem) for line in result.warnings())
    assert result.loader == f"mxfp4np.Checkpoint({str(tmp_path / 'out')!r})"


# ComfyUI, torchao, and scales that several tensors share


def comfyui(folder, **more):
    """Two modules in FP8 as ComfyUI has them, with more tensors."""
    folder.mkdir()
    tensors = {"scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn), "norm.weight": np.ones(64, np.float32)}
    for module in ("a", "b"):
        tensors |= {
            f"{module}.weight": np.ones((64, 64), ml_dtypes.float8_e4m3fn),
            f"{module}.weight_scale": np.ones((), np.float32),
            f"{module}.comfy_quant": np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8),
        }
    layers = {module: {"format": "float8_e4m3fn"} for module in "ab"}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_raw(folder / "model.safetensors", tensors | more, metadata | {"other": "kept"})
    return folder


def test_marks_of_comfyui_go_with_what_they_describe(tmp_path):
    source = comfyui(tmp_path / "in")
    result = mxfp4np.convert(source, tmp_path / "out", verify=True)
    assert result.contents.unneeded == ["a.comfy_quant", "b.comfy_quant", "scaled_fp8"]
    with mxfp4np.Checkpoint(tmp_path / "out") as ckpt:
        assert (set(ckpt), ckpt.metadata) == (
            {"a.weight", "b.weight", "norm.weight"},
            {"format": "pt", "other": "kept"},
        )
    assert mxfp4np.verify(source, tmp_path / "out").findings == []
    mxfp4np.convert(source, tmp_path / "part", exclude="b.*", verify=True)
    with mxfp4np.Checkpoint(tmp_path / "part") as ckpt:
        assert set(ckpt.stored) == {
            "a.weight",
            "b.weight",
            "b.weight_scale",
            "b.comfy_quant",
            "scaled_fp8",
            "norm.weight",
        }
        assert list(json.loads(ckpt.metadata["_quantization_metadata"])["layers"]) == ["b"]
        assert ckpt.info("b.weight").format == "FP8"


def test_metadata_of_comfyui_that_cannot_be_read_stays(tmp_path):
    save_raw(tmp_path / "model.safetensors", {"w": pair(2, 1)}, {"_quantization_metadata": "[]"})
    mxfp4np.convert(tmp_path, tmp_path / "out")
    with mxfp4np.Checkpoint(tmp_path / "out") as ckpt:
        assert ckpt.metadata["_quantization_metadata"] == "[]"


def test_metadata_of_torchao_goes_when_nothing_is_quantised_any_more(tmp_path):
    tensors = {"plain.weight": np.ones((2, 32), np.float32)}
    metadata = {"plain.weight": '{"_type": "Tensor"}', "tensor_names": '["a.weight", "b.weight", "plain.weight"]'}
    for module in "ab":
        tensors[f"{module}._weight_qdata"] = np.ones((2, 32), ml_dtypes.float8_e4m3fn)
        tensors[f"{module}._weight_scale"] = np.ones((2, 1), np.float32)
        metadata[f"{module}.weight"] = '{"_type": "Float8Tensor"}'
    save_raw(tmp_path / "model.safetensors", tensors, metadata)
    mxfp4np.convert(tmp_path, tmp_path / "out")
    assert mxfp4np.Checkpoint(tmp_path / "out").metadata == {"format": "pt"}
    mxfp4np.convert(tmp_path, tmp_path / "part", exclude="b.*")
    left = mxfp4np.Checkpoint(tmp_path / "part").metadata
    assert left == {
        "format": "pt",
        "tensor_names": '["b.weight", "plain.weight"]',
        "b.weight": metadata["b.weight"],
        "plain.weight": metadata["plain.weight"],
    }


@pytest.mark.parametrize(("exclude", "left"), [((), 0), ("*shard_1*", 1), ("*shard*", 3)])
def test_a_scale_that_tensors_share_stays_as_long_as_one_of_them_does(tmp_path, exclude, left):
    rng = np.random.default_rng(0)
    tensors = {f"n.shard_{i}.weight": rng.normal(size=(8, 32)).astype(ml_dtypes.float8_e4m3fn) for i in range(3)}
    tensors["n.weight_scale"] = np.full(1, 0.3, np.float32)
    save_raw(tmp_path / "model.safetensors", tensors)
    result = mxfp4np.convert(tmp_path, tmp_path / "out", exclude=exclude, verify=True)
    assert (len(result.contents.quantized), result.verification.findings) == (left, [])
    assert mxfp4np.verify(tmp_path, tmp_path / "out").findings == []
    with mxfp4np.Checkpoint(tmp_path) as source, mxfp4np.Checkpoint(tmp_path / "out") as target:
        assert ("n.weight_scale" in target.stored) == bool(left)
        for name in source:
            assert np.array_equal(source[name], target[name])


def test_scales_of_stacked_experts_go_with_their_quantisation(tmp_path):
    experts = "model.layers.0.mlp.experts"
    scales = {f"{experts}.{name}_proj_input_scale": np.ones((), np.float32) for name in ("down", "gate_up")}
    tensors = {
        f"{experts}.{name}_proj{ending}": value
        for name in ("down", "gate_up")
        for ending, value in (
            ("", np.full((2, 16, 64), 0x21, np.uint8)),
            ("_weight_scale", np.ones((2, 2, 64), ml_dtypes.float8_e4m3fn)),
            ("_weight_scale_2", np.ones((), np.float32)),
        )
    }
    save_raw(tmp_path / "model.safetensors", tensors | scales)
    result = mxfp4np.convert(tmp_path, tmp_path / "out", verify=True)
    assert result.contents.unneeded == sorted(scales)
    with mxfp4np.Checkpoint(tmp_path) as source, mxfp4np.Checkpoint(tmp_path / "out") as target:
        name = f"{experts}.down_proj"
        assert source.info(name).shape == (2, 64, 32)
        assert target.info(name).shape == (2, 32, 64)  # as transformers holds it
        assert np.array_equal(source.get(name, transpose=True), target[name])
    result = mxfp4np.convert(tmp_path, tmp_path / "no", transpose="no")
    assert "not as the model expects it" in result.problem
    part = mxfp4np.convert(tmp_path, tmp_path / "part", exclude="*.down_proj")
    assert part.contents.unneeded == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "transformers.AutoModelForCausalLM.from_pretrained({}, dtype='bfloat16')"),
        (
            {"auto_map": {}},
            "transformers.AutoModelForCausalLM.from_pretrained({}, dtype='bfloat16', trust_remote_code=True)",
        ),
        ({"architectures": ["XForVision"]}, "transformers.XForVision.from_pretrained({}, dtype='bfloat16')"),
        ({"architectures": ["os.system('x')"]}, "mxfp4np.Checkpoint({})"),
        ({"architectures": []}, "mxfp4np.Checkpoint({})"),
        ({"architectures": "X"}, "mxfp4np.Checkpoint({})"),
        ({"model_type": None}, "mxfp4np.Checkpoint({})"),
    ],
)
def test_the_line_that_loads_it(tmp_path, change, expected):
    result = mxfp4np.convert(checkpoint(tmp_path / "in", CONFIG | change), tmp_path / "out")
    assert result.loader == expected.format(repr(str(tmp_path / "out")))
    mlx = mxfp4np.convert(DATA / "mlx", tmp_path / "mlx")
    assert mlx.loader.startswith("mxfp4np.Checkpoint")  # its config.json names no architecture


@pytest.mark.parametrize("method", ["compressed-tensors", "quark", "modelopt", "fp8", "torchao"])
@pytest.mark.parametrize("value", [5, "text", {"a": 1}, [["a"]], [5]])
def test_lists_that_are_none_are_refused(method, value):
    keys = ("ignore", "exclude", "exclude_modules", "modules_to_not_convert")
    with pytest.raises(ValueError, match="expected a list of names as"):
        after_decoding({"quant_method": method} | dict.fromkeys(keys, value), PART)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "compressed-tensors", "ignore": 5}, "expected a list of names as 'ignore'"),
        (
            {"quant_method": "quark", "layer_quant_config": dict.fromkeys([f"{i}*" for i in range(2000)])},
            "expected at most 1,000 patterns with wildcards",
        ),
    ],
)
def test_config_that_cannot_be_changed_is_named(tmp_path, refused, config, says):
    halves = {"weight_packed": np.zeros((2, 32), np.uint8), "weight_scale": np.zeros((2, 2), np.uint8)}
    arrays = {f"{module}.{half}": array for module in "ab" for half, array in halves.items()}
    save_raw(tmp_path / "model.safetensors", arrays)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    message = refused("convert", tmp_path, tmp_path / "out", "--exclude", "b.*", "--dry-run")
    assert f"config.json: cannot be written again: {says}" in message
