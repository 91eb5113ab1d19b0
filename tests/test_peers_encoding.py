"""Real clients load encoded checkpoints and decode them as this library does. Run by ``tox -e peers``."""

import ml_dtypes
import numpy as np
import pytest
from test_peers_conversion import array, gpt_oss, llama  # noqa: F401  (fixtures)

import mxfp4np

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]


def same(tensor, values):
    """Compare a torch tensor of bfloat16 with an array, bit for bit."""
    return np.array_equal(array(tensor).view(np.uint16), np.ascontiguousarray(values).view(np.uint16))


@pytest.mark.parametrize("rule", ["even", "floor", "rceil"])
def test_transformers_loads_gpt_oss_and_nothing_is_lost_on_the_way_and_back(gpt_oss, tmp_path, rule):  # noqa: F811
    import torch
    from transformers import AutoModelForCausalLM, Mxfp4Config

    mxfp4np.convert(gpt_oss, tmp_path / "plain")
    result = mxfp4np.encode_checkpoint(tmp_path / "plain", tmp_path / "again", rule=rule, max_shard_size=20_000)
    assert len(result.packed) == 4
    assert result.relative_error == 0
    how = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again", **how).state_dict()
    first = AutoModelForCausalLM.from_pretrained(gpt_oss, **how).state_dict()
    assert model.keys() == first.keys()
    with mxfp4np.Checkpoint(tmp_path / "again") as again:
        assert set(again) == set(model)
        for name in again:
            packed = again.info(name).layout is not None
            assert packed == name.endswith(("gate_up_proj", "down_proj"))
            assert same(model[name], again.get(name, transpose=packed)), name
            assert torch.equal(model[name], first[name])


def test_transformers_loads_a_compressed_tensors_model(llama, tmp_path):  # noqa: F811
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    mxfp4np.convert(llama, tmp_path / "plain")
    rng = np.random.default_rng(0)
    with mxfp4np.Checkpoint(tmp_path / "plain") as plain:  # values that no code has
        noise = {name: rng.normal(0, 0.02, x.shape).astype(ml_dtypes.bfloat16) for name, x in plain.items()}
    mxfp4np.save_file(noise, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    result = mxfp4np.encode_checkpoint(tmp_path / "plain", tmp_path / "out", layout="compressed-tensors")
    assert len(result.packed) == 14
    assert 0.05 < result.relative_error < 0.2
    how = {"quantization_config": CompressedTensorsConfig(run_compressed=False), "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **how).state_dict()
    with mxfp4np.Checkpoint(tmp_path / "out") as ours:
        assert set(ours) == set(model)
        for name in ours:
            assert (ours.info(name).layout is not None) == name.endswith("_proj.weight")
            assert same(model[name], ours[name]), name


def test_mlx_loads_its_own_form(llama, tmp_path):  # noqa: F811
    import mlx.core as mx

    mxfp4np.convert(llama, tmp_path / "plain")
    mxfp4np.encode_checkpoint(tmp_path / "plain", tmp_path / "out", layout="mlx")
    theirs = mx.load(str(tmp_path / "out" / "model.safetensors"))
    with mxfp4np.Checkpoint(tmp_path / "out") as ours:
        names = [name for name in ours if ours.info(name).layout]
        assert len(names) == 14
        assert {ours.info(name).layout for name in names} == {"mlx"}
        for name in names:
            scales = theirs[name.removesuffix("weight") + "scales"]
            values = mx.dequantize(theirs[name], scales, group_size=32, bits=4, mode="mxfp4").astype(mx.float32)
            assert np.array_equal(np.array(values), ours.get(name, dtype="float32")), name


def test_the_original_layout_is_loaded_by_gpt_oss_itself(tmp_path):
    import torch
    from gpt_oss.torch.weights import Checkpoint

    rng = np.random.default_rng(0)
    tensors = {
        f"block.0.mlp.mlp{i}_weight": rng.normal(0, 0.02, (2, 64, 96)).astype(ml_dtypes.bfloat16) for i in (1, 2)
    }
    tensors["block.0.mlp.mlp1_bias"] = np.ones((2, 64), ml_dtypes.bfloat16)
    mxfp4np.save_file(tensors, tmp_path / "plain.safetensors")
    result = mxfp4np.encode_checkpoint(tmp_path / "plain.safetensors", tmp_path / "out", layout="gpt-oss")
    assert len(result.packed) == 2
    theirs = Checkpoint(str(tmp_path / "out"), torch.device("cpu"))
    with mxfp4np.Checkpoint(tmp_path / "out") as ours:
        assert sorted(ours) == sorted(tensors)
        for name in ours:
            assert same(theirs.get(name), ours[name]), name
