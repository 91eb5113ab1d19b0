"""Converted checkpoints are what the real clients make of the packed ones. Run by ``tox -e peers``."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import mxfp4np
from mxfp4np.rewrite.plan import split_into_shards

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

DATA = Path(__file__).parent / "data"
RNG = np.random.default_rng(0)


def random_packed(*shape):
    """Return random blocks and scales of weights of about a hundredth."""
    scales = RNG.integers(116, 122, (*shape[:-1], shape[-1] // 32), np.uint8)
    return RNG.integers(0, 256, (*scales.shape, 16), np.uint8), scales


def array(tensor):
    """Return a bfloat16 torch tensor as an array."""
    import torch

    return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def write(folder, config, tensors, quantization):
    config = {**json.loads(config.to_json_string()), "architectures": [quantization.pop("architecture")]}
    folder.mkdir()
    mxfp4np.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def gpt_oss(tmp_path):
    """A tiny gpt-oss as Hugging Face has it."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        num_hidden_layers=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        dtype="bfloat16",
    )
    tensors = {}
    for name, tensor in GptOssForCausalLM(config).to(torch.bfloat16).state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, outer = tensor.shape
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = random_packed(experts, outer, inner)
        else:
            tensors[name] = array(tensor)
    quantization = {
        "architecture": "GptOssForCausalLM",
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    return write(tmp_path / "gpt-oss", config, tensors, quantization)


@pytest.fixture
def llama(tmp_path):
    """A tiny Llama whose linear layers are packed by compressed-tensors' names."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2,
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    tensors = {}
    for name, tensor in LlamaForCausalLM(config).to(torch.bfloat16).state_dict().items():
        if name.endswith("_proj.weight"):
            stem = name.removesuffix(".weight")
            blocks, tensors[f"{stem}.weight_scale"] = random_packed(*tensor.shape)
            tensors[f"{stem}.weight_packed"] = blocks.reshape(len(blocks), -1)
        else:
            tensors[name] = array(tensor)
    quantization = json.loads((DATA / "compressed_tensors" / "config.json").read_text())["quantization_config"]
    return write(tmp_path / "llama", config, tensors, {"architecture": "LlamaForCausalLM", **quantization})


def assert_same_model(theirs, ours):
    """Compare all weights and the logits, bit for bit."""
    import torch

    expected, actual = theirs.state_dict(), ours.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(actual[name].view(torch.int16), tensor.view(torch.int16)), name
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        logits = theirs(tokens).logits
        assert torch.equal(ours(tokens).logits, logits)
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_transformers_loads_a_converted_gpt_oss_as_it_dequantizes_the_packed_one(gpt_oss, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, Mxfp4Config

    result = mxfp4np.convert(gpt_oss, tmp_path / "out", max_shard_size=50_000, verify=True)
    assert len(result.shards) > 3
    assert result.verification.findings == []
    dequantize = Mxfp4Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(gpt_oss, quantization_config=dequantize, dtype=torch.bfloat16)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "quantization_config" not in ours.config.to_dict()
    assert_same_model(theirs, ours)


def test_transformers_loads_a_converted_compressed_tensors_model(llama, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    mxfp4np.convert(llama, tmp_path / "out")
    decompress = CompressedTensorsConfig(run_compressed=False)
    theirs = AutoModelForCausalLM.from_pretrained(llama, quantization_config=decompress, dtype=torch.bfloat16)
    assert_same_model(theirs, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


def test_gpt_oss_itself_gives_the_same_tensors_by_the_same_names(tmp_path):
    import torch
    from gpt_oss.torch.weights import Checkpoint
    from safetensors.torch import load_file

    mxfp4np.convert(DATA / "gpt_oss_original", tmp_path / "out")
    theirs, ours = (
        Checkpoint(str(DATA / "gpt_oss_original"), torch.device("cpu")),
        load_file(tmp_path / "out/model.safetensors"),
    )
    assert "block.0.mlp.mlp1_weight" in ours
    for name, tensor in ours.items():
        assert torch.equal(tensor.view(torch.int16), theirs.get(name).view(torch.int16)), name


@pytest.mark.parametrize("limit", [1, 7, 10, 25, 100, 1000])
def test_shards_are_divided_as_huggingface_hub_divides_them(limit):
    from huggingface_hub.serialization import split_state_dict_into_shards_factory

    for seed in range(50):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(0, 20, rng.integers(1, 60)).tolist()
        theirs = split_state_dict_into_shards_factory(
            {str(i): size for i, size in enumerate(sizes)},
            get_storage_size=lambda size: size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=limit,
        )
        expected = [[int(name) for name in names] for names in theirs.filename_to_tensors.values()]
        assert split_into_shards(sizes, limit) == expected
