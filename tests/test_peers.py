"""The same bits as the real peers, from the same files. Run by ``tox -e peers``, where a missing peer is a failure."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from contract import assert_same_bits, every_pair

import mxfp4np

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

DATA = Path(__file__).parent / "data"


def bits(tensor):
    """Return the bits of a torch tensor of bfloat16."""
    import torch

    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


def test_every_tensor_of_a_checkpoint_is_what_the_reference_loader_gives():
    import torch
    from gpt_oss.torch.weights import Checkpoint

    theirs = Checkpoint(str(DATA / "gpt_oss_original"), torch.device("cpu"))
    with mxfp4np.Checkpoint(DATA / "gpt_oss_original") as ours:
        assert len(ours) == 8
        for name in ours:
            assert np.array_equal(ours[name].view(np.uint16), bits(theirs.get(name))), name


def test_every_byte_under_every_scale_but_nan_is_what_the_reference_loader_gives(tmp_path):
    import torch
    from gpt_oss.torch.weights import Checkpoint

    blocks, scales = (np.ascontiguousarray(array[:255]) for array in every_pair())
    name = "block.0.mlp.mlp1_weight"
    mxfp4np.save_file({name: mxfp4np.MXFP4Array(blocks, scales)}, tmp_path / "model.safetensors")
    theirs = bits(Checkpoint(str(tmp_path), torch.device("cpu")).get(name))
    assert np.array_equal(mxfp4np.Checkpoint(tmp_path)[name].view(np.uint16), theirs)


def test_experts_are_what_transformers_gives_transposed():
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    with mxfp4np.Checkpoint(DATA / "gpt_oss_hf") as ours:
        names = [name for name in ours if ours.info(name).layout]
        assert len(names) == 4
        for name in names:
            halves = (torch.from_numpy(ours.stored[f"{name}_{half}"].copy()) for half in ("blocks", "scales"))
            theirs = bits(convert_moe_packed_tensors(*halves))
            assert np.array_equal(ours[name].view(np.uint16).swapaxes(-1, -2), theirs), name


def test_arrays_go_to_torch_without_a_copy():
    import torch

    with mxfp4np.Checkpoint(DATA / "gpt_oss_hf") as ours:
        array = ours["model.layers.0.mlp.experts.down_proj"]
        assert array.dtype == ml_dtypes.bfloat16
        tensor = torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        assert tensor.data_ptr() == array.ctypes.data
        wide = ours.get("model.layers.0.mlp.experts.down_proj", dtype="float32")
        assert torch.equal(tensor.float(), torch.from_dlpack(wide))


def test_compressed_tensors_are_what_its_own_decompressor_gives():
    import torch
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    with mxfp4np.Checkpoint(DATA / "compressed_tensors") as ours:
        names = [name for name in ours if ours.info(name).layout]
        assert len(names) == 9
        for name in names:
            halves = {half: torch.from_numpy(ours.stored[f"{name}_{half}"].copy()) for half in ("packed", "scale")}
            state = {f"weight_{half}": tensor for half, tensor in halves.items()}
            theirs = MXFP4PackedCompressor.decompress(state, scheme)["weight"].float().numpy()
            assert_same_bits(ours.get(name, dtype="float32"), theirs)


def test_mlx_weights_are_what_mlx_gives():
    import mlx.core as mx

    with mxfp4np.Checkpoint(DATA / "mlx") as ours:
        assert len(ours) == 2
        for name in ours:
            codes, scales = (mx.array(ours.stored[half.name]) for half in ours.info(name).stored)
            theirs = mx.dequantize(codes, scales, group_size=32, bits=4, mode="mxfp4").astype(mx.float32)
            assert_same_bits(ours.get(name, dtype="float32"), np.array(theirs))


def test_gguf_weights_are_what_gguf_gives():
    import gguf

    reader = gguf.GGUFReader(DATA / "gguf" / "model.gguf")
    with mxfp4np.Checkpoint(DATA / "gguf") as ours:
        assert len(ours) == len(reader.tensors) == 3
        for tensor in reader.tensors:
            theirs = gguf.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(ours.get(tensor.name, dtype="float32"), theirs)
