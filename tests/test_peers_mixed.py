"""Checkpoints of several formats, converted or encoded in part: real loaders take source and result for one model.

Run by ``tox -e peers``. Each source is a tiny model that transformers made, quantised here under a producer's names.
"""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_same

import mxfp4np

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

BLOCKS = (256, 384), (128, 128), (384, 128)
"""Shapes of whole blocks: the converter of compressed-tensors writes no columns of partial ones."""

FP4 = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "group",
    "group_size": 32,
    "scale_dtype": "torch.uint8",
    "dynamic": False,
}
NVFP4 = FP4 | {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
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


def nvfp4(tensor, seed=0):
    """Return random codes and scales of NVFP4."""
    rng, shape = np.random.default_rng(seed), (*tensor.shape[:-1], tensor.shape[-1] // 16)
    codes = rng.integers(0, 256, (*tensor.shape[:-1], tensor.shape[-1] // 2), np.uint8)
    return codes, rng.integers(0x30, 0x48, shape, np.uint8).view(ml_dtypes.float8_e4m3fn)


def compressed(tensors, packed, scaled=(), nv=()):
    """Pack the tensors whose names match by compressed-tensors' names."""
    found = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if nv and name.endswith(".weight") and re.search(nv, name):
            found[f"{stem}.weight_packed"], found[f"{stem}.weight_scale"] = nvfp4(tensor)
            found[f"{stem}.weight_global_scale"] = np.full(1, 77, np.float32)
        elif name.endswith(".weight") and re.search(packed, name):
            found[f"{stem}.weight_packed"], found[f"{stem}.weight_scale"] = mxfp4(tensor)
        elif scaled and name.endswith(".weight") and re.search(scaled, name):
            found[name] = fp8(tensor)
            found[f"{stem}.weight_scale"] = np.full((len(tensor), 1), 1 / 256, ml_dtypes.bfloat16)
        else:
            found[name] = tensor
    return found


def load(path, model="AutoModelForCausalLM"):
    """Load a folder; nothing may be missing or unexpected."""
    import transformers

    loaded, info = getattr(transformers, model).from_pretrained(path, dtype="bfloat16", output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    return loaded


def logits_of(model):
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 9)[None]).logits.float().numpy()
    assert np.isfinite(logits).all()
    return logits


def assert_same_model(source, target):
    assert np.array_equal(logits_of(load(source)), logits_of(load(target)))


@pytest.fixture
def llama(tmp_path):
    """A Llama with its MLP in MXFP4 and NVFP4, and its attention in FP8."""
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
            "group_1": {"targets": ["re:.*mlp.(up|down).*"], "weights": FP4, "format": "mxfp4-pack-quantized"},
            "group_2": {"targets": ["re:.*mlp.gate.*"], "weights": NVFP4, "format": "nvfp4-pack-quantized"},
        },
    }
    packed = compressed(tensors, r"\.mlp\.", r"\.self_attn\.", r"gate_proj")
    return rewrite(tmp_path / "in", packed, quantization_config=quantization)


@pytest.mark.parametrize("exclude", [(), "*.layers.1.*", "*.down_proj.weight", "*self_attn*", "*mlp*", "*gate_proj*"])
def test_compressed_tensors(llama, tmp_path, exclude):
    result = mxfp4np.convert(llama, tmp_path / "out", exclude=exclude, verify=True)
    assert result.problem is None
    assert result.verification.findings == []
    assert ("quantization_config" in json.loads((tmp_path / "out" / "config.json").read_text())) == bool(exclude)
    assert result.loader.startswith("transformers.AutoModelForCausalLM")
    assert_same_model(llama, tmp_path / "out")


def test_compressed_tensors_with_linear_layers_as_the_target_of_both_groups(llama, tmp_path):
    """The group that stays would take the decoded modules as well, were they not ignored."""
    path = llama / "config.json"
    config = json.loads(path.read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_0"]["targets"] = ["Linear"]
    path.write_text(json.dumps(config))
    mxfp4np.convert(llama, tmp_path / "out", exclude="*self_attn*")
    logits_of(load(tmp_path / "out"))


def test_experts_of_compressed_tensors(tmp_path):
    """transformers stacks them; see `quantization.loads_quantized` for what it does not take."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(**SMALL, **experts, intermediate_size=128, num_key_value_heads=4, head_dim=16)
    tensors = save(tmp_path / "in", config, Qwen3MoeForCausalLM)
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {
            "group_0": {"targets": ["re:.*self_attn.*"], "weights": FP8, "format": "float-quantized"},
            "group_1": {"targets": ["re:.*experts.*"], "weights": FP4, "format": "mxfp4-pack-quantized"},
        },
    }
    packed = compressed(tensors, r"\.experts\.", r"\.self_attn\.._proj")
    source = rewrite(tmp_path / "in", packed, quantization_config=quantization)
    for name, exclude in (("out", ()), ("part", "*self_attn*")):
        assert mxfp4np.convert(source, tmp_path / name, exclude=exclude).problem is None
        assert_same_model(source, tmp_path / name)
    assert mxfp4np.convert(source, tmp_path / "half", exclude="*.layers.1.*").problem is not None


def fp8_blocks(tensors, matches, block, scale_dtype):
    """Quantise matrices to FP8 by transformers' names; uint8 and E8M0 scales are exponents."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if re.search(matches, name):
            found[name] = fp8(tensor)
            shape = () if block is None else [-(-n // size) for n, size in zip(tensor.shape, block, strict=True)]
            exponents = np.random.default_rng(0).integers(-10, -7, shape, endpoint=True)
            is_e8m0 = np.dtype(scale_dtype).itemsize == 1
            scales = (exponents + 127).astype(np.uint8).view(scale_dtype) if is_e8m0 else 2.0**exponents
            found[f"{name}_scale_inv"] = np.asarray(scales).astype(scale_dtype)
    return found


def fine_grained_fp8(folder, found, block, **options):
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    return rewrite(folder, found, quantization_config=quantization | options)


def assert_same_tensors(ours, theirs):
    with mxfp4np.Checkpoint(ours) as left, mxfp4np.Checkpoint(theirs) as right:
        assert set(left) == set(right)
        assert all(ckpt.info(name).format is None for ckpt in (left, right) for name in ckpt)
        for name in left:
            assert_same(left[name], right[name])


def converted_by_compressed_tensors(source, target, converter):
    from compressed_tensors.entrypoints.convert import convert_checkpoint

    convert_checkpoint(str(source), str(target), converter, device="cpu")
    return target


def test_the_converter_of_compressed_tensors_gives_the_same(llama, tmp_path):
    from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer

    converter = CompressedTensorsDequantizer(str(llama), ignore=["lm_head"])
    theirs = converted_by_compressed_tensors(llama, tmp_path / "theirs", converter)
    mxfp4np.convert(llama, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", theirs)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_converter_of_fp8_blocks_gives_the_same(tmp_path, dtype):
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

    rng = np.random.default_rng(0)
    tensors = {f"{i}.weight": rng.normal(0, 0.1, shape).astype(np.float32) for i, shape in enumerate(BLOCKS)}
    found = fp8_blocks(tensors, "", [128, 128], dtype) | {"norm.weight": np.ones(7, ml_dtypes.bfloat16)}
    (tmp_path / "in").mkdir()
    mxfp4np.save_file(found, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    converter = FP8BlockDequantizer.from_pretrained(str(tmp_path / "in"))
    theirs = converted_by_compressed_tensors(tmp_path / "in", tmp_path / "theirs", converter)
    mxfp4np.convert(tmp_path / "in", tmp_path / "out")
    assert_same_tensors(tmp_path / "out", theirs)


def test_what_compressed_tensors_makes_of_nvfp4_by_modelopt(tmp_path):
    """Its second scale divides, ModelOpt's multiplies."""
    from compressed_tensors.entrypoints.convert import ModelOptNvfp4Converter

    source = Path(__file__).parent / "data" / "companions" / "modelopt_nvfp4_moe"
    converter = ModelOptNvfp4Converter(targets=["re:.*_proj"])
    theirs = converted_by_compressed_tensors(source, tmp_path / "theirs", converter)
    for name, folder in (("ours", source), ("again", theirs)):
        result = mxfp4np.convert(folder, tmp_path / name)
        assert len(result.contents.decoded) > 10
    assert_same_tensors(tmp_path / "ours", tmp_path / "again")


@pytest.mark.parametrize("exclude", [(), "*.layers.1.*"])
@pytest.mark.parametrize(
    ("block", "dtype"),
    [
        ([128, 128], np.float32),
        ([128, 128], ml_dtypes.bfloat16),
        (None, ml_dtypes.bfloat16),
        ([1, 32], np.uint8),
        ([1, 32], ml_dtypes.float8_e8m0fnu),
    ],
)
def test_fine_grained_fp8(tmp_path, block, dtype, exclude):
    """The last two are MXFP8, as MiniMax-M3 has it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = SMALL | {"hidden_size": 256}
    config = Qwen3Config(**sizes, intermediate_size=128, num_key_value_heads=4, head_dim=64)
    tensors = save(tmp_path / "in", config, Qwen3ForCausalLM)
    found = fp8_blocks(tensors, r"\.(mlp|self_attn)\..*_proj", block, dtype)
    form = {"scale_fmt": "ue8m0"} if block == [1, 32] else {}
    source = fine_grained_fp8(tmp_path / "in", found, block, **form)
    result = mxfp4np.convert(source, tmp_path / "out", exclude=exclude, verify=True)
    assert (result.problem, result.verification.findings) == (None, [])
    assert_same_model(source, tmp_path / "out")


@pytest.mark.parametrize("exclude", [(), "*self_attn*", "*.experts.*", "*.layers.1.*"])
def test_experts_of_fine_grained_fp8(tmp_path, exclude):
    """Files have them one by one, transformers stacks them."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = SMALL | {"hidden_size": 256}
    experts = {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(**sizes, **experts, intermediate_size=128, num_key_value_heads=4, head_dim=64)
    tensors = save(tmp_path / "in", config, Qwen3MoeForCausalLM)
    found = fp8_blocks(tensors, r"\.(experts|self_attn)\..*_proj", [128, 128], np.float32)
    source = fine_grained_fp8(tmp_path / "in", found, [128, 128])
    result = mxfp4np.convert(source, tmp_path / "out", exclude=exclude, verify=True)
    assert (result.problem, result.verification.findings) == (None, [])
    assert_same_model(source, tmp_path / "out")


@pytest.mark.parametrize("exclude", [(), "*attn*", "*.experts.*"])
@pytest.mark.parametrize("gpu", [False, True])
def test_deepseek_v4(tmp_path, gpu, exclude, monkeypatch):
    """DeepSeek's own names, FP4 experts, the rest in FP8 blocks; ``gpu`` as where FP8 runs natively."""
    import torch
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = DeepseekV4Config(
        **sizes,
        num_key_value_heads=1,
        intermediate_size=64,
        moe_intermediate_size=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        index_n_heads=4,
        index_head_dim=64,
        head_dim=64,
        q_lora_rank=64,
        o_lora_rank=64,
        o_groups=2,
        index_topk=2,
        mlp_layer_types=["hash_moe", "moe", "moe"],
    )
    tensors = save(tmp_path / "in", config, DeepseekV4ForCausalLM)
    exponents, found = ml_dtypes.float8_e8m0fnu, {}
    for name, tensor in tensors.items():
        native = name.removeprefix("model.").replace("embed_tokens", "embed").replace("hc_head.hc_", "hc_head_")
        scale = native.replace(".weight", ".scale")
        if ".experts." in name:
            codes, scales = mxfp4(tensor)
            found[native], found[scale] = codes.view(np.int8), scales.view(exponents)
        elif re.search(r"attn\.w|indexer\.wq_b|shared_experts", name):
            found[native] = fp8(tensor, 64)
            found[scale] = np.full([-(-n // 128) for n in tensor.shape], 127 - 6, np.uint8).view(exponents)
        else:
            found[native] = tensor
    found |= {name.replace("layers.2", "mtp.0"): found[name] for name in found if name.startswith("layers.2")}
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    source = rewrite(tmp_path / "in", found, expert_dtype="fp4", quantization_config=quantization)
    assert mxfp4np.convert(source, tmp_path / "out", exclude=exclude, verify=True).problem is None
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("expert_dtype" in config) == ("experts" in str(exclude))
    assert ("quantization_config" in config) == bool(exclude)
    if not gpu:
        assert_same_model(source, tmp_path / "out")
        return
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    plain, codes = torch.bfloat16, torch.float8_e4m3fn
    ours = torch.int8 if "experts" in str(exclude) else plain, codes if "attn" in str(exclude) else plain
    for folder, (fp4, fp8_) in ((source, (torch.int8, codes)), (tmp_path / "out", ours)):
        model = load(folder)
        assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == fp4
        assert model.model.layers[0].self_attn.q_a_proj.weight.dtype == fp8_


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
    for name, exclude in (("out", ()), ("part", "*self_attn*")):
        mxfp4np.convert(source, tmp_path / name, exclude=exclude)
        logits_of(load(tmp_path / name, "AutoModelForImageTextToText"))
    plain = tmp_path / "plain"
    save(plain, config, Qwen2VLForConditionalGeneration)
    mxfp4np.encode_checkpoint(plain, tmp_path / "packed", layout="compressed-tensors", exclude="*visual*")
    logits_of(load(tmp_path / "packed", "AutoModelForImageTextToText"))


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


@pytest.mark.parametrize("mode", ["affine", "mxfp8", "nvfp4"])
def test_mlx(tmp_path, mode):
    """Affine words stay; what was decoded is plain to mlx_lm."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    other = {"group_size": 16 if mode == "nvfp4" else 32, "bits": 4 if mode == "nvfp4" else 8, "mode": mode}
    fp4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    sizes = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = sizes | {"model_type": "llama", "intermediate_size": 128, "rms_norm_eps": 1e-6, "num_key_value_heads": 4}
    config |= {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    rng, tensors, others = np.random.default_rng(0), {}, {}

    def add(name, *shape):
        weight = mx.array(rng.normal(0, 0.1, shape).astype(np.float32)).astype(mx.bfloat16)
        how = fp4 if "mlp" in name else other if "self_attn" in name else None
        if how is None:
            tensors[f"{name}.weight"] = weight
            return
        if how is other:
            others[name] = other
        for key, part in zip(("weight", "scales", "biases"), mx.quantize(weight, **how), strict=False):
            tensors[f"{name}.{key}"] = part

    add("model.embed_tokens", 64, 64)
    add("lm_head", 64, 64)
    add("model.norm", 64)
    for layer in ("model.layers.0", "model.layers.1"):
        add(f"{layer}.input_layernorm", 64)
        add(f"{layer}.post_attention_layernorm", 64)
        for module in "qkvo":
            add(f"{layer}.self_attn.{module}_proj", 64, 64)
        add(f"{layer}.mlp.gate_proj", 128, 64)
        add(f"{layer}.mlp.up_proj", 128, 64)
        add(f"{layer}.mlp.down_proj", 64, 128)
    source = tmp_path / "in"
    source.mkdir()
    mx.save_safetensors(str(source / "model.safetensors"), tensors, metadata={"format": "mlx"})
    (source / "config.json").write_text(json.dumps(config | {"quantization": fp4 | others}))
    result = mxfp4np.convert(source, tmp_path / "out", verify=True)
    assert result.loader == f"mlx_lm.load({str(tmp_path / 'out')!r})"
    logits = []
    for folder in (source, tmp_path / "out"):
        model = load_model(folder)[0]
        logits.append(np.array(model(mx.arange(1, 9)[None]).astype(mx.float32)))
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear"
    kind = "QuantizedLinear" if mode == "affine" else "Linear"
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == kind
    with mxfp4np.Checkpoint(tmp_path / "out") as ckpt:
        for name in ckpt if mode != "affine" else ():
            module = name.removesuffix(".weight")
            how = fp4 if "mlp" in name else other
            if f"{module}.scales" in tensors:
                parts = tensors[name], tensors[f"{module}.scales"]
                expected = mx.dequantize(*parts, dtype=mx.bfloat16, **how).astype(mx.float32)
                assert np.array_equal(ckpt.get(name, "float32"), np.array(expected))
    assert np.allclose(*logits, atol=1e-2)  # mlx multiplies packed and plain weights by different kernels


@pytest.mark.parametrize("exclude", [(), "*self_attn*"])
@pytest.mark.parametrize("kind", ["Float8Tensor", "MXTensor", "NVFP4Tensor"])
def test_torchao(tmp_path, kind, exclude):
    """transformers reads torchao's tensors by the metadata of the file, which stays for those that stay."""
    import torch
    from safetensors.torch import save_file
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Float8Tensor
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SMALL, intermediate_size=128, num_key_value_heads=4)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    state = dict(model.state_dict())
    quantize = {
        "Float8Tensor": Float8Tensor.from_hp,
        "MXTensor": lambda tensor: MXTensor.to_mx(tensor, torch.float8_e4m3fn, 32, is_swizzled_scales=True),
        "NVFP4Tensor": lambda tensor: NVFP4Tensor.to_nvfp4(tensor, per_tensor_scale=tensor.abs().max().float() / 2688),
    }
    for name, tensor in state.items():
        if ".mlp." in name:
            state[name] = MXTensor.to_mx(tensor, torch.float4_e2m1fn_x2, 32)
        elif ".self_attn." in name:
            state[name] = quantize[kind](tensor)
    tensors, metadata = flatten_tensor_state_dict(state)
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata | {"format": "pt"})
    path = tmp_path / "in" / "config.json"
    kind = {"_type": "Float8WeightOnlyConfig", "_version": 2, "_data": {}}
    quantization = {"quant_method": "torchao", "quant_type": {"default": kind}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    result = mxfp4np.convert(tmp_path / "in", tmp_path / "out", exclude=exclude, verify=True)
    assert (len(result.contents.decoded), len(result.contents.quantized)) == ((6, 8) if exclude else (14, 0))
    theirs, ours = load(tmp_path / "in").state_dict(), load(tmp_path / "out").state_dict()

    def values(tensor):
        plain = tensor.dequantize() if hasattr(tensor, "qdata") else tensor
        return plain.view(torch.int16)

    for name, tensor in ours.items():
        assert hasattr(tensor, "qdata") == (".self_attn." in name and bool(exclude))
        assert torch.equal(values(tensor), values(theirs[name])), name
