"""Files of FP8, MXFP8 and NVFP4 by the tools that write them, and the bits that these tools decode them to.

data/companions has a folder for each layout. ``expected.npz`` holds the tool's answers for some tensors: float32,
or the upper halves of float32 numbers whose lower halves are zeros. ``NAME__float32`` is what the tool gives if it is
asked for float32, and ``NAME__in_out`` the tensor as transformers holds it.
"""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from contract import assert_same_bits
from helpers import BACKENDS, DATA, IO, both_io
from test_layouts import reshard

import mxfp4np
from mxfp4np import ScaledArray

FOLDER = DATA / "companions"
SAMPLES = sorted(path.name for path in FOLDER.iterdir())
every_sample = pytest.mark.parametrize("sample", SAMPLES)


def answers(sample, ending=""):
    """Return float32 answers by name, and whether they are of bfloat16."""
    with np.load(FOLDER / sample / "expected.npz") as golden:
        for name in golden:
            stem, _, kind = name.partition("__")
            if kind != ending:
                continue
            bits = golden[name]
            is_short = bits.dtype == np.uint16
            yield stem, (bits.astype(np.uint32) << 16).view(np.float32) if is_short else bits, is_short


def widened(checkpoint, name, *, short, **options):
    return checkpoint.get(name, "bfloat16" if short else "float32", **options).astype(np.float32)


def of_infinite_scales(packed, values):
    """E8M0 255 is infinity there, and NaN here."""
    is_nan = (packed.scales == 255).repeat(32, -1)
    assert np.isnan(values[is_nan]).all()
    signs = np.where(packed.blocks & 0x80, -np.inf, np.inf)
    is_number = (packed.blocks & 0x7F != 0) & (packed.blocks & 0x7F != 0x7F)
    return np.where(is_nan & is_number, signs, values).astype(np.float32)


def of_negative_zeros(packed, values):
    """Code 8 is +0 there."""
    codes = np.stack([packed.blocks & 15, packed.blocks >> 4], -1).reshape(values.shape)
    return np.where((codes == 8) & ~np.isnan(values), np.float32(0), values)


def of_rounded_scales(packed, _):
    """The scale is rounded to bfloat16 before it meets the code, so that values are up to a step off."""
    tile, scales = (packed.tile_rows, packed.block_size), packed.scales.astype(ml_dtypes.bfloat16)
    return ScaledArray(packed.blocks, scales, packed.element, tile).decode().astype(np.float32)


MX, NV, FP8 = {"MXFP8": of_infinite_scales}, {"NVFP4": of_negative_zeros}, {"FP8": of_rounded_scales}
DIFFERENCES = {
    "ct_mxfp8": MX,
    "mlx_mxfp8": MX,
    "modelopt_mxfp8": MX,
    "modelopt_nvfp4": NV,
    "modelopt_nvfp4_fused": NV,
    "modelopt_nvfp4_moe": NV,
    "modelopt_fp8": FP8,
    "modelopt_fp8_block": FP8,
    "modelopt_fp8_channel": FP8,
    "modelopt_mixed": NV | FP8,
}
"""Where tools break the rule of one rounding in float32, and only there."""


@both_io
@every_sample
@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_are_those_of_the_tool(sample, io, backend):
    different = set()
    with mxfp4np.Checkpoint(FOLDER / sample, io=io) as ckpt:
        for ending in ("", "float32"):
            for name, theirs, short in answers(sample, ending):
                ours = widened(ckpt, name, short=short, backend=backend)
                info = ckpt.info(name)
                assert info.shape == ours.shape == theirs.shape
                explain = DIFFERENCES.get(sample, {}).get(info.format)
                if explain is not None and not same(ours, theirs):
                    different.add(info.format)
                    ours = explain(ckpt.packed(name), ours)
                assert_same_bits(ours, theirs)
    assert different == set(DIFFERENCES.get(sample, {}))


def same(ours, theirs):
    nan = np.isnan(ours) & np.isnan(theirs)
    return bool(((ours.view(np.uint32) == theirs.view(np.uint32)) | nan).all())


@both_io
@every_sample
def test_nothing_else_is_listed(sample, io):
    """Codes and all their scales are one name; what else there is belongs to activations, caches and ComfyUI."""
    with mxfp4np.Checkpoint(FOLDER / sample, io=io) as ckpt:
        infos = [ckpt.info(name) for name in ckpt]
        used = {half.name for info in infos for half in info.stored}
        assert used == set(ckpt.stored)
        left = [info.name for info in infos if info.layout is None and "scale" in info.name]
        beside = ("input_scale", "k_scale", "v_scale", "activation_scale", "input_global_scale")
        assert all(name.endswith(beside) or ".hc_" in f".{name}" for name in left)
        assert {name.rpartition(".")[2] for name, *_ in answers(sample)} <= {"weight", "gate_up_proj", "down_proj"}
        assert any(info.format in ("FP8", "MXFP8", "NVFP4") for info in infos)
        for info in infos:
            if info.format == "NVFP4":
                assert ckpt.packed(info.name).element == "E2M1"


@both_io
@every_sample
def test_parts_and_chunks(sample, io):
    with mxfp4np.Checkpoint(FOLDER / sample, io=io) as ckpt:
        for name, theirs, _ in answers(sample):
            whole = ckpt.get(name, "float32")
            lead = len(theirs.shape) - 2
            for index in (
                np.s_[..., 3:9, 5:30],
                np.s_[..., ::-2, :],
                np.s_[..., -1, 16:],
                (0,) * lead + np.s_[[5, 1, 5], 2:],
                np.s_[..., 1:1, :],
            ):
                assert_same_bits(ckpt.get(name, "float32", index=index), whole[index])
                assert_same_bits(ckpt.packed(name)[index].decode("float32"), whole[index])
            for transpose in (False, True):
                expected = whole.swapaxes(-1, -2) if transpose else whole
                again = np.zeros_like(expected)
                for place, chunk in ckpt.chunks(name, 1000, dtype="float32", transpose=transpose):
                    assert chunk.nbytes <= 1000
                    again[place] = chunk
                assert_same_bits(again, expected)
                assert_same_bits(ckpt.get(name, "float32", transpose=transpose), expected)


@both_io
@every_sample
def test_codes_and_scales_in_files_of_their_own(sample, io, tmp_path):
    source = FOLDER / sample
    (tmp_path / "hf_quant_config.json").write_text("{}")
    if (source / "hf_quant_config.json").exists():
        shutil.copy(source / "hf_quant_config.json", tmp_path)
    with (
        mxfp4np.Checkpoint(source) as whole,
        mxfp4np.Checkpoint(reshard(f"companions/{sample}", tmp_path), io=io) as ckpt,
    ):
        assert set(ckpt) == set(whole)
        for name, *_ in answers(sample):
            assert ckpt.info(name)[1:4] == whole.info(name)[1:4]
            assert_same_bits(ckpt[name], whole[name])


@pytest.mark.parametrize("io", IO)
@every_sample
def test_conversion(sample, io, tmp_path):
    result = mxfp4np.convert(FOLDER / sample, tmp_path / "out", io=io, verify=True, max_shard_size=9000)
    assert (result.verification.findings, result.contents.quantized, result.problem) == ([], [], None)
    assert mxfp4np.verify(FOLDER / sample, tmp_path / "out").findings == []
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantization_config", "quantization", "expert_dtype"} & config.keys()
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    as_loaded = {name: values for name, values, _ in answers(sample, "in_out")}
    with mxfp4np.Checkpoint(FOLDER / sample) as source, mxfp4np.Checkpoint(tmp_path / "out") as target:
        assert target.metadata == {"format": "pt"}
        assert set(target) == set(source) - set(result.contents.unneeded)
        assert all(target.info(name).format is None for name in target)
        for name in target:
            expected = source[name]
            is_turned = source.info(name).layout == "modelopt-experts"
            assert_same_bits(target[name], expected.swapaxes(-1, -2) if is_turned else expected)
        for name, values in as_loaded.items():
            assert np.array_equal(target.get(name, "float32"), values, equal_nan=True)


def test_parts_of_a_conversion_by_several_processes(tmp_path):
    source = FOLDER / "ct_mixed"
    for i in (1, 2, 3):
        result = mxfp4np.convert(source, tmp_path / "parts", task=(i, 3), max_shard_size=3000)
    assert result.complete
    mxfp4np.convert(source, tmp_path / "whole", max_shard_size=3000)
    for path in (tmp_path / "whole").glob("model*"):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()


def test_a_scale_that_another_task_writes_is_no_finding(tmp_path):
    source = FOLDER / "hf_fp8_shared_scale"
    for i in (2, 1, 3):
        options = {"exclude": "*", "max_shard_size": 800, "verify": True}
        result = mxfp4np.convert(source, tmp_path / "out", task=(i, 3), **options)
        assert (result.verification.findings, result.verification.tensors) == ([], 1)
        later = mxfp4np.verify(source, tmp_path / "out").findings
        assert [finding for finding in later if "finish with --resume" not in finding] == []
    assert result.complete
    assert mxfp4np.verify(source, tmp_path / "out").findings == []


def test_commands(command, tmp_path):
    source, name = FOLDER / "ct_mixed", "model.layers.0.self_attn.q_proj.weight"
    status, out, _ = command("inspect", source, "--stats")
    assert status == 0
    assert f"{name}            32x32  FP8    weight-scale" in out
    assert "3 of them MXFP4, 1 of them NVFP4, 3 of them FP8" in out
    assert "32 scales, zero 0.00%, NaN or infinite 0.00%" in out
    found = json.loads(command("inspect", source, "--stats", "--json")[1])
    stats = {row["name"]: row["stats"] for row in found["tensors"] if "stats" in row}
    assert len(stats) == 7
    assert sum(stats[name]["scales"].values()) == 32
    for transpose in ("no", "yes"):
        output = tmp_path / f"{transpose}.npy"
        arguments = ("--dtype", "float32", "--transpose", transpose, "--index", "3:, 5:30", "-o", output)
        assert command("decode", source, name, *arguments)[0] == 0
        with mxfp4np.Checkpoint(source) as ckpt:
            values = ckpt.get(name, "float32", index=np.s_[3:, 5:30])
        assert_same_bits(np.load(output), np.ascontiguousarray(values.T if transpose == "yes" else values))
    assert command("verify", source)[:2] == (0, "verified 12 tensors, 7.1 kB read: nothing wrong\n")
    assert {array.dtype.name for array in mxfp4np.load_file(source, dtype="float16").values()} == {"float16"}
