"""Checkpoints of several formats, converted or encoded in part: real loaders take source and result for one model.

Run by ``tox -e peers``. Each source is a tiny model that transformers made, quantised here under a producer's names.
"""

import json
import re
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import mxfp4np

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

FP4 = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "group",
    "group_size": 32,
    "scale_dtype": "torch.uint8",
    "dynamic": False,
}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}


def save(folder, config, model):
    """Save a model as transformers does; return its tensors by the names of the file."""
    import torch

    torch.manual_seed(0)
    model(config).to(torch.bfloat16).save_pretrained(folder)
    with mxfp4np.Checkpoint(folder) as checkpoint:
        return {name: np.array(checkpoint[name]) for name in checkpoint}


def mxfp4(tensor):
    packed = mxfp4np.encode(np.ascontiguousarray(tensor))
    return packed.blocks.reshape(*tensor.shape[:-1], -1), packed.scales


def fp8(tensor, factor=256):
    return (tensor.astype(np.float32) * factor).astype(ml_dtypes.float8_e4m3fn)


def rewrite(folder, tensors, metadata=None, **config):
    (old,) = folder.glob("*.safetensors")
    old.unlink()
    mxfp4np.save_file(tensors, folder / "model.safetensors", metadata or {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def compressed(tensors, packed, scaled=()):
    """Pack the tensors whose names match by compressed-tensors' names."""
    found = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if name.endswith(".weight") and re.search(packed, name):
            found[f"{stem}.weight_packed"], found[f"{stem}.weight_scale"] = mxfp4(tensor)
        elif scaled and name.endswith(".weight") and re.search(scaled, name):
            found[name] = fp8(tensor)
            found[f"{stem}.weight_scale"] = np.full((len(tensor), 1), 1 / 256, ml_dtypes.bfloat16)
        else:
            found[name] = tensor
    return found


def load(path, model="AutoModelForCausalLM"):
    """Load a folder; nothing may be missing or unexpected. Return the model and its logits."""
    import torch
    import transformers

    loaded, info = getattr(transformers, model).from_pretrained(path, dtype="bfloat16", output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    with torch.no_grad():
        logits = loaded(input_ids=torch.arange(1, 9)[None]).logits.float().numpy()
    assert np.isfinite(logits).all()
    return SimpleNamespace(model=loaded, logits=logits)


def assert_same_model(source, target, model="AutoModelForCausalLM"):
    theirs, ours = load(source, model), load(target, model)
    assert np.array_equal(theirs.logits, ours.logits)
    return ours.model


@pytest.fixture
def llama(tmp_path):
    """A Llama with its MLP in MXFP4 and its attention in FP8."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SMALL, intermediate_size=128, num_key_value_heads=4)
    tensors = save(tmp_path / "in", config, LlamaForCausalLM)
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["re:.*self_attn.*"], "weights": FP8, "format": "float-quantized"},
            "group_1": {"targets": ["re:.*mlp.*"], "weights": FP4, "format": "mxfp4-pack-quantized"},
        },
    }
    packed = compressed(tensors, r"\.mlp\.", r"\.self_attn\.")
    return rewrite(tmp_path / "in", packed, quantization_config=quantization)


@pytest.mark.parametrize("exclude", [(), "*.layers.1.*", "*.down_proj.weight"])
def test_compressed_tensors(llama, tmp_path, exclude):
    result = mxfp4np.convert(llama, tmp_path / "out", exclude=exclude, verify=True)
    assert result.problem is None
    assert result.loader.startswith("transformers.AutoModelForCausalLM")
    assert_same_model(llama, tmp_path / "out")


def test_compressed_tensors_with_linear_layers_as_the_target_of_both_groups(llama, tmp_path):
    """The group that stays would take the decoded modules as well, were they not ignored."""
    path = llama / "config.json"
    config = json.loads(path.read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_0"]["targets"] = ["Linear"]
    path.write_text(json.dumps(config))
    mxfp4np.convert(llama, tmp_path / "out")
    load(tmp_path / "out")


@pytest.mark.parametrize("gpu", [False, True])
def test_deepseek_v4(tmp_path, gpu, monkeypatch):
    """DeepSeek's own names, FP4 experts, the rest in FP8 blocks; ``gpu`` as where FP8 runs natively."""
    import torch
    from transformers import AutoModelForCausalLM, DeepseekV4Config, DeepseekV4ForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = DeepseekV4Config(
        **sizes,
        num_key_value_heads=1,
        intermediate_size=64,
        moe_intermediate_size=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        layer_types=["sliding_attention"] * 2,
        mlp_layer_types=["moe"] * 2,
    )
    tensors = save(tmp_path / "in", config, DeepseekV4ForCausalLM)
    exponents, found = ml_dtypes.float8_e8m0fnu, {}
    for name, tensor in tensors.items():
        native = name.removeprefix("model.").replace("embed_tokens", "embed").replace("hc_head.hc_", "hc_head_")
        scale = native.replace(".weight", ".scale")
        if ".experts." in name:
            codes, scales = mxfp4(tensor)
            found[native], found[scale] = codes.view(np.int8), scales.view(exponents)
        elif re.search(r"\.w[qo]_|\.wkv\.|shared_experts", name):
            found[native] = fp8(tensor, 64)
            found[scale] = np.full([-(-n // 128) for n in tensor.shape], 127 - 6, np.uint8).view(exponents)
        else:
            found[native] = tensor
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    source = rewrite(tmp_path / "in", found, expert_dtype="fp4", quantization_config=quantization)
    assert mxfp4np.convert(source, tmp_path / "out", verify=True).problem is None
    if not gpu:
        assert_same_model(source, tmp_path / "out")
        return
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for folder, dtype in ((source, torch.int8), (tmp_path / "out", torch.bfloat16)):
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", output_loading_info=True)
        assert {key: value for key, value in info.items() if value} == {}
        assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == dtype
        assert model.model.layers[0].mlp.shared_experts.up_proj.weight.dtype == torch.float8_e4m3fn


def test_a_vision_language_model(tmp_path):
    """Its modules have other names than its files."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = SMALL | {"intermediate_size": 128, "num_key_value_heads": 4, "rope_scaling": None}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    tensors = save(tmp_path / "in", config, Qwen2VLForConditionalGeneration)
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*visual.*"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": FP8, "format": "float-quantized"},
            "group_1": {"targets": ["re:.*mlp.*"], "weights": FP4, "format": "mxfp4-pack-quantized"},
        },
    }
    assert not any("language_model" in name for name in tensors)
    packed = compressed(tensors, r"^model\.layers.*\.mlp\.", r"^model\.layers.*\.self_attn\.")
    source = rewrite(tmp_path / "in", packed, quantization_config=quantization)
    mxfp4np.convert(source, tmp_path / "out")
    load(tmp_path / "out", "AutoModelForImageTextToText")
    plain = tmp_path / "plain"
    save(plain, config, Qwen2VLForConditionalGeneration)
    mxfp4np.encode_checkpoint(plain, tmp_path / "packed", layout="compressed-tensors", exclude="*visual*")
    load(tmp_path / "packed", "AutoModelForImageTextToText")


def test_gpt_oss_with_the_experts_of_a_layer_excluded(tmp_path):
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **SMALL,
        num_local_experts=4,
        num_experts_per_tok=2,
        intermediate_size=64,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    save(tmp_path / "in", config, GptOssForCausalLM)
    mxfp4np.encode_checkpoint(tmp_path / "in", tmp_path / "packed")
    mxfp4np.convert(tmp_path / "packed", tmp_path / "half", exclude="*.layers.1.*", verify=True)
    assert_same_model(tmp_path / "packed", tmp_path / "half")
