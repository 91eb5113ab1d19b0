"""The same bits as the real peers, from the same files. Run by ``tox -e peers``, where a missing peer is a failure."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from contract import RULES, assert_same_bits, every_pair

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
        page = Path(__file__).parents[1] / "docs" / "howto" / "torch-jax.md"
        (line,) = (line for line in page.read_text().splitlines() if line.startswith("tensor = torch.from_numpy("))
        names = {"torch": torch, "np": np, "array": array}
        exec(line, names)
        tensor = names["tensor"]
        assert tensor.dtype == torch.bfloat16
        assert tensor.data_ptr() == array.ctypes.data
        wide = ours.get("model.layers.0.mlp.experts.down_proj", dtype="float32")
        assert torch.equal(tensor.float(), torch.from_dlpack(wide))


def test_read_only_arrays_go_to_torch_without_a_copy_too(tmp_path):
    import torch

    mxfp4np.save_file({"norm": np.arange(64).astype(ml_dtypes.bfloat16)}, tmp_path / "m.safetensors")
    with mxfp4np.Checkpoint(tmp_path) as ours:
        array = ours["norm"]
        assert not array.flags.writeable
        with pytest.warns(UserWarning, match="not writable"):
            tensor = torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        assert tensor.data_ptr() == array.ctypes.data
        assert torch.equal(tensor.float(), torch.arange(64.0))


def test_tensors_of_torch_on_the_cpu_are_taken_as_arrays(tmp_path):
    import torch
    from safetensors.torch import load_file

    blocks = torch.randint(0, 256, (4, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (4, 6, 3), dtype=torch.uint8)
    want = mxfp4np.decode(blocks.numpy(), scales.numpy())
    for codes in (blocks, blocks.view(torch.float4_e2m1fn_x2)):
        for e8m0 in (scales, scales.view(torch.float8_e8m0fnu)):
            packed = mxfp4np.MXFP4Array(codes, e8m0)
            assert packed.blocks.ctypes.data == blocks.data_ptr()
            assert packed.scales.ctypes.data == scales.data_ptr()
            assert_same_bits(mxfp4np.decode(codes, e8m0), want)
    assert_same_bits(packed[torch.tensor([2, 0])].decode(), want[[2, 0]])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(8, 64).to(dtype)
        for tensor in (x, torch.nn.Parameter(x), x.t().contiguous().t(), x[::2]):
            expected = mxfp4np.encode(tensor.detach().float().numpy())
            assert_same_bits(mxfp4np.encode(tensor).decode(), expected.decode())
    state = {
        "bfloat16": torch.nn.Parameter(torch.randn(3, 4).bfloat16()),
        "float8": torch.randn(3, 4).to(torch.float8_e4m3fn),
        "scales": scales.view(torch.float8_e8m0fnu),
        "strided": torch.randn(4, 3).t(),
        "scalar": torch.tensor(3, dtype=torch.bfloat16),
        "ids": torch.arange(3),
    }
    for form in (state, iter(state.items())):
        mxfp4np.save_file(form, tmp_path / "m.safetensors")
        again = load_file(tmp_path / "m.safetensors")
        for name, tensor in state.items():
            assert again[name].dtype == tensor.dtype
            assert (
                again[name]
                .detach()
                .contiguous()
                .reshape(-1)
                .view(torch.uint8)
                .equal(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
            ), name


def test_dtypes_and_devices_of_torch_are_taken(tmp_path):
    import torch

    mxfp4np.save_file({"x": np.ones(3)}, tmp_path / "m.safetensors")
    with mxfp4np.Checkpoint(DATA / "gpt_oss_original") as ours:
        for name in ours:
            for dtype in ("bfloat16", "float16", "float32"):
                assert_same_bits(ours.get(name, getattr(torch, dtype)), ours.get(name, dtype))
    for device in (torch.device("cpu"), torch.device("cpu", 0)):
        assert mxfp4np.Checkpoint(tmp_path, device).device == "cpu"
    with pytest.raises(ValueError, match="no device 'meta'"):
        mxfp4np.Checkpoint(tmp_path, torch.device("meta"))


def test_the_two_loaders_of_the_readme_side_by_side():
    import torch
    from gpt_oss.torch.weights import PARAM_NAME_MAP, Checkpoint

    path = DATA / "gpt_oss_original"
    with (
        mxfp4np.Checkpoint(path, torch.device("cpu")) as plain,
        mxfp4np.Checkpoint(path, names=PARAM_NAME_MAP) as named,
    ):
        assert sorted(named) == sorted(plain)
        for name in plain:
            assert_same_bits(named[name], plain[name])
        theirs = Checkpoint(str(path), torch.device("cpu"))
        name = "block.1.mlp.mlp2_weight"
        wide = theirs._get_mxfp4_tensor(f"{name}.blocks", f"{name}.scales", dtype=torch.float32)
        assert_same_bits(plain.get(name, "float32"), wide.numpy())
        assert_same_bits(plain.get(name, "float32", index=1), wide[1].numpy())
        assert np.array_equal(plain.stored[f"{name}.blocks"], theirs._get_tensor(f"{name}.blocks").numpy())
        assert sorted(plain.stored) == sorted(theirs.tensor_name_to_file)


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


def values_to_encode():
    """Return 10 million values in blocks: all kinds of bits, all magnitudes, all bounds of rules and roundings."""
    rng = np.random.default_rng(0)
    any_bits = rng.integers(0, 2**32, (60_000, 32), np.uint32).view(np.float32)
    magnitudes = 2.0 ** rng.integers(-150, 126, (160_000, 1))
    any_magnitude = (rng.standard_normal((160_000, 32)) * magnitudes).astype(np.float32)
    # The largest of a block, or any element of one, at a bound or next to it.
    bounds = np.multiply.outer([1, 1.25, 1.5, 1.75], 2.0 ** np.arange(-149, 128)).astype(np.float32).reshape(-1)
    bounds = (bounds.view(np.int32)[:, None] + np.arange(-30, 31, dtype=np.int32)).reshape(-1).view(np.float32)
    largest = np.repeat(bounds[:, None], 32, axis=1) * rng.uniform(-1, 1, (len(bounds), 32)).astype(np.float32)
    largest[:, 7] = bounds
    ratios = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, 0]) / 4
    elements = rng.choice(ratios, (30_000, 32)) * 2.0 ** rng.integers(-126, 126, (30_000, 1)).astype(np.float64)
    elements = elements.astype(np.float32).view(np.int32) + rng.integers(-1, 2, elements.shape, np.int32)
    elements = np.copysign(np.maximum(elements, 0).view(np.float32), rng.choice([-1, 1], elements.shape))
    x = np.concatenate([any_bits, any_magnitude, largest, elements.astype(np.float32)])
    x[:1000] = 0
    x[:500, 3:9] = -0.0
    special = rng.integers(0, x.size, 20_000)
    x.reshape(-1)[special] = rng.choice(np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0], np.float32), 20_000)
    assert x.size > 10_000_000
    return x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_encoded_values_are_what_torchao_gives(dtype):
    import torch
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    with np.errstate(all="ignore"):
        x = values_to_encode()
    source = torch.from_numpy(x)
    if dtype == "bfloat16":
        source = source.to(torch.bfloat16)
        x = source.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    with np.errstate(invalid="ignore"):
        largest = np.abs(x.astype(np.float64)).max(axis=-1)
    infinite = np.isinf(x).any(axis=-1) & ~np.isnan(largest)
    for rule in RULES:
        ours = mxfp4np.encode(x, rule)
        blocks, scales = ours.blocks[:, 0], ours.scales[:, 0]
        theirs, codes = to_mx(source, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode[rule.upper()])
        theirs, codes = theirs.view(torch.uint8).numpy()[:, 0], codes.numpy()
        # The cases in which they differ by the docstring of `encode`, and none else.
        missed = (largest >= 1.75 * 2.0**127) & np.isfinite(largest)
        assert np.all(scales[missed] == 252)
        if rule == "rceil":
            above = (scales == theirs + 1) & np.isfinite(largest) & (largest > 6 * 2.0 ** (theirs - 127.0))
            assert np.all(largest[above] / 6 < 2.0 ** (theirs[above] - 127.0) * (1 + 1e-5))
            missed |= above
        assert np.array_equal(scales[~infinite & ~missed], theirs[~infinite & ~missed])
        assert np.all(scales[infinite] == 255)
        same = ~infinite & ~missed & ~np.isnan(largest) & ((scales > 0) | (largest == 0))
        assert np.array_equal(blocks[same], codes[same])
        assert same.mean() > 0.75
