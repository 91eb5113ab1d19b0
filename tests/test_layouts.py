"""Every layout that MXFP4 is shipped in: real tools' samples, detection, look-alikes, forcing, and what errors say."""

import json
import pickle
import shutil

import ml_dtypes
import numpy as np
import pytest
from contract import assert_same_bits, oracle
from helpers import BACKENDS, CODES, DATA, FLOATS, SCALES, answers, both_io, pair_of, problem, write_tensors

import mxfp4np
from mxfp4np import LayoutError, MXFP4Array, TensorNotFoundError
from mxfp4np.cli import main
from mxfp4np.format import FP4_VALUES
from mxfp4np.storage.safetensors import write_safetensors

SAMPLES = {
    "gpt_oss_original": "gpt-oss",
    "gpt_oss_hf": "gpt-oss-hf",
    "compressed_tensors": "compressed-tensors",
    "quark": "quark",
    "modelopt": "modelopt",
    "deepseek_v4": "deepseek",
    "deepseek_v4_f4": "deepseek",
    "mlx": "mlx",
    "torchao": "torchao",
    "torchao_swizzled": "torchao-swizzled",
}
every_sample = pytest.mark.parametrize("sample", SAMPLES)


def reshard(sample, folder):
    """Write a sample again with every tensor in a file of its own."""
    with mxfp4np.Checkpoint(DATA / sample) as ckpt:
        for i, (name, raw) in enumerate(ckpt.stored.items()):
            stored = ckpt._stored[name]
            specs = {name: (stored.dtype, stored.shape)}
            write_safetensors(folder / f"{i}.safetensors", specs, [raw.reshape(-1).view(np.uint8)], ckpt.metadata)
    if (DATA / sample / "config.json").exists():
        shutil.copy(DATA / sample / "config.json", folder)
    return folder


RNG = np.random.default_rng(5)
VALUES = oracle(CODES.reshape(6, 4, 16), SCALES, "float32")


# Samples


@both_io
@every_sample
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_sample_has_the_bits_that_its_tool_gives(sample, io, backend):
    with mxfp4np.Checkpoint(DATA / sample, io=io) as ckpt:
        expected = answers(sample)
        assert {name for name in ckpt if ckpt.info(name).format == "MXFP4"} <= set(expected)
        for name, values in expected.items():
            assert_same_bits(ckpt.get(name, dtype="float32", backend=backend), values)
            assert ckpt.info(name).shape == values.shape
            assert ckpt.info(name).layout in (SAMPLES[sample], None)


@both_io
@every_sample
@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_and_chunks_of_every_sample(sample, io, backend):
    with mxfp4np.Checkpoint(DATA / sample, io=io) as ckpt:
        for name, values in answers(sample).items():
            for index in np.s_[1:3, ..., 5:77], np.s_[-1], np.s_[::-2, ..., :32], np.s_[..., 96:]:
                if values.ndim < 2:
                    continue
                actual = ckpt.get(name, dtype="float32", index=index, backend=backend)
                assert_same_bits(actual, values[index])
            whole = np.full_like(values, np.nan)
            for index, piece in ckpt.chunks(name, 4096, dtype="float32", backend=backend):
                whole[index] = piece
            assert_same_bits(whole, values)


@both_io
@every_sample
def test_pairs_split_over_shards(sample, io, tmp_path):
    with mxfp4np.Checkpoint(reshard(sample, tmp_path), io=io) as ckpt:
        assert set(ckpt) == set(mxfp4np.Checkpoint(DATA / sample))
        for name, values in answers(sample).items():
            assert_same_bits(ckpt.get(name, dtype="float32"), values)


@every_sample
def test_codes_are_read_in_place(sample):
    with mxfp4np.Checkpoint(DATA / sample) as ckpt:
        for name in ckpt:
            if (info := ckpt.info(name)).format == "MXFP4":
                array = ckpt.packed(name)
                codes, scales = (ckpt.stored[half.name] for half in info.stored)
                assert np.shares_memory(array.blocks, codes)
                assert np.shares_memory(array.scales, scales) == (sample != "torchao_swizzled")


@every_sample
def test_a_missing_half_is_an_error_and_all_else_works(sample, tmp_path):
    folder = reshard(sample, tmp_path / "all") if (tmp_path / "all").mkdir() is None else None
    with mxfp4np.Checkpoint(folder) as ckpt:
        infos = [ckpt.info(name) for name in ckpt]
        victim = next(info for info in infos if info.format == "MXFP4")
    for half, other in (victim.stored, victim.stored[::-1]):
        moved = half.file.path.rename(tmp_path / "moved")
        message = problem(folder, victim.name)
        assert half.name in message
        assert other.name in message
        assert "half of a" in message
        assert "expected" in message
        assert "open the folder" in message
        with mxfp4np.Checkpoint(folder) as ckpt:
            assert set(ckpt) == {info.name for info in infos}
            for info in infos:
                if info is not victim:
                    assert ckpt[info.name].shape == info.shape
        moved.rename(half.file.path)


@both_io
@pytest.mark.parametrize("sample", ["deepseek_v4", "deepseek_v4_f4"])
def test_deepseek_fp8_weights_have_the_same_names(sample, io):
    name = "layers.0.attn.wq.weight"
    with mxfp4np.Checkpoint(DATA / sample, io=io) as ckpt:
        info = ckpt.info(name)
        assert (info.format, info.layout, info.reason) == ("FP8", "deepseek", "suffix pair, F8_E4M3/F8_E8M0")
        assert [half.name for half in info.stored] == [name, "layers.0.attn.wq.scale"]
        scales = ckpt.stored["layers.0.attn.wq.scale"].astype(np.float32).repeat(32, 0).repeat(32, 1)
        values = (ckpt.stored[name].astype(np.float32) * scales).astype(ml_dtypes.bfloat16)
        assert_same_bits(ckpt[name], values)
        with pytest.raises(TensorNotFoundError, match=f"it is the packed half of {name!r}"):
            ckpt["layers.0.attn.wq.scale"]


# Layouts without a sample


def test_modelslim(tmp_path):
    write_tensors(tmp_path / "m.safetensors", pair_of("a.weight", "a.weight_scale"))
    (tmp_path / "quant_model_description.json").write_text('{"a.weight": "W4A8_MXFP"}')
    with mxfp4np.Checkpoint(tmp_path) as ckpt:
        assert ckpt.info("a.weight").layout == "modelslim"
        assert ckpt.info("a.weight").reason == "quant_model_description.json: is there"
        assert_same_bits(ckpt.get("a.weight", dtype="float32"), VALUES)


@both_io
def test_uqff(tmp_path, io):
    tensors = pair_of("a.weight", "a.weight.scales") | {"a.weight.format": ("U8", np.array([7], np.uint8))}
    write_tensors(tmp_path / "model.uqff", tensors)
    for path in (tmp_path, tmp_path / "model.uqff"):
        with mxfp4np.Checkpoint(path, io=io) as ckpt:
            assert set(ckpt) == {"a.weight", "a.weight.format"}
            assert ckpt.info("a.weight").layout == "uqff"
            assert_same_bits(ckpt.get("a.weight", dtype="float32"), VALUES)


def old_quark(folder, scales=SCALES, **config):
    inline = np.concatenate([(scales - np.uint8(127))[..., None], CODES.reshape(6, 4, 16)], axis=-1)
    write_tensors(folder / "m.safetensors", {"a.weight": ("U8", inline.reshape(6, -1)), "b": ("U8", CODES)})
    said = {"quantization_config": {"quant_method": "quark", "global_quant_config": {"weight": config}}}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


@both_io
@pytest.mark.parametrize("backend", BACKENDS)
def test_old_quark_blocks_begin_with_an_exponent_without_bias(tmp_path, io, backend):
    scales = np.resize(np.array([0, 1, 126, 127, 128, 254, 255], np.uint8), (6, 4))  # 255, NaN, wraps around to -128
    values = oracle(CODES.reshape(6, 4, 16), scales, "float32")
    with mxfp4np.Checkpoint(old_quark(tmp_path, scales, dtype="mx"), io=io) as ckpt:
        assert ckpt.info("a.weight").layout == "quark-mx"
        assert ckpt.info("a.weight").shape == (6, 128)
        assert ckpt.info("b").layout is None
        assert_same_bits(ckpt.get("a.weight", dtype="float32", backend=backend), values)
        part = ckpt.get("a.weight", dtype="float32", index=np.s_[::-2, 33:100], backend=backend)
        assert_same_bits(part, values[::-2, 33:100])
        assert np.array_equal(ckpt.packed("a.weight").scales, scales)
        assert np.shares_memory(ckpt.packed("a.weight").blocks, ckpt.stored["a.weight"]) == (io == "mmap")


def test_old_quark_of_another_element_is_not_decoded(tmp_path):
    with mxfp4np.Checkpoint(old_quark(tmp_path, dtype="mx", mx_element_dtype="fp6_e3m2")) as ckpt:
        assert ckpt.info("a.weight").layout is None


def test_old_quark_that_does_not_fit(tmp_path):
    (tmp_path / "config.json").write_text('{"quant_method": "quark", "dtype": "mx"}')
    path = write_tensors(tmp_path / "m.safetensors", {"a.weight": ("U8", CODES)})
    assert problem(path, "a.weight") == (
        f"{path}: tensor 'a.weight': expected shape with rows of 17-byte blocks, found [6, 64]"
    )


def test_inline_blocks_are_read_at_once_not_one_by_one(tmp_path, monkeypatch):
    reads = []
    folder = old_quark(tmp_path, dtype="mx")
    with mxfp4np.Checkpoint(folder, io="pread") as ckpt:
        file = ckpt._files[0]
        actual = type(file)._read_into
        monkeypatch.setattr(type(file), "_read_into", lambda *a: reads.append(1) or actual(*a))
        ckpt["a.weight"]
    assert len(reads) == 1


# Look-alikes: what is not MXFP4 is refused, or plain

SIXTEENS = RNG.integers(0, 127, (6, 8), np.uint8)  # a scale for 16 values
ONE = ("F32", np.ones(1, np.float32))
NVFP4 = {
    "ModelOpt": (
        "weight-scale",
        pair_of("a.weight", "a.weight_scale", "U8", "F8_E4M3", scales=SIXTEENS) | {"a.weight_scale_2": ONE},
    ),
    "compressed-tensors": (
        "compressed-tensors",
        pair_of("a.weight_packed", "a.weight_scale", "U8", "F8_E4M3", scales=SIXTEENS) | {"a.weight_global_scale": ONE},
    ),
    "MLX": ("mlx", pair_of("a.weight", "a.scales", "U32", codes=CODES.view(np.uint32), scales=SIXTEENS)),
    "torchao": ("torchao", pair_of("a._weight_qdata", "a._weight_scale", "U8", "F8_E4M3", scales=SIXTEENS)),
}


@pytest.mark.parametrize("case", NVFP4)
def test_nvfp4_is_decoded_and_never_taken_for_mxfp4(tmp_path, case):
    layout, tensors = NVFP4[case]
    path = write_tensors(tmp_path / "m.safetensors", tensors)
    with pytest.raises(LayoutError, match="forced layout 'quark'"):
        mxfp4np.Checkpoint(path, layout="quark")
    codes = np.stack([CODES & 15, CODES >> 4], -1).reshape(6, 128)
    with mxfp4np.Checkpoint(path) as ckpt:
        info = ckpt.info("a.weight")
        assert list(ckpt) == ["a.weight"]
        assert (info.format, info.layout, info.shape) == ("NVFP4", layout, (6, 128))
        assert {half.name for half in info.stored} == set(tensors)
        scales = SIXTEENS.view(ml_dtypes.float8_e4m3fn).astype(np.float32).repeat(16, 1)
        assert_same_bits(ckpt.get("a.weight", "float32"), np.array(FP4_VALUES, np.float32)[codes] * scales)


BYTES = RNG.integers(0, 120, (6, 128), np.uint8)
PLAIN = {
    "affine MLX": pair_of("a.weight", "a.scales", "U32", "F32", codes=CODES.view(np.uint32), scales=FLOATS)
    | {"a.biases": ("F32", FLOATS)},
    "int4 of compressed-tensors": pair_of(
        "a.weight_packed", "a.weight_scale", "I32", "F16", codes=CODES.view(np.int32), scales=FLOATS.astype(np.float16)
    )
    | {"a.weight_shape": ("I64", np.array([6, 128]))},
    "int8": pair_of("a.weight", "a.scale", "I8", "F32", scales=FLOATS[:, :1]),
    "int8 of ModelSlim": pair_of("a.weight", "a.weight_scale", "I8", "F32", scales=FLOATS[:, :1]),
    "int4 of ModelOpt": pair_of("a.weight", "a.weight_scale", "U8", "F32", scales=FLOATS[:3, :1]),
    "bytes": {"a.weight": ("U8", CODES), "b": ("U8", CODES), "num_blocks": ("U8", CODES[0, :3])},
    "words": {"a.weight": ("U32", CODES.view(np.uint32)), "b.weight": ("I8", CODES.view(np.int8))},
    "FP8 without scales": {"a.weight": ("F8_E4M3", BYTES)},
}


@pytest.mark.parametrize("case", PLAIN)
def test_what_is_not_packed_is_plain(tmp_path, case):
    path = write_tensors(tmp_path / "m.safetensors", PLAIN[case])
    with mxfp4np.Checkpoint(path) as ckpt:
        assert set(ckpt) == set(PLAIN[case])
        for name, (dtype, array) in PLAIN[case].items():
            info = ckpt.info(name)
            assert (info.dtype, info.layout, info.reason) == (dtype, None, None)
            assert np.array_equal(ckpt[name].view(np.uint8), array.view(np.uint8))
            with pytest.raises(LayoutError, match=f"is {info.format or 'plain ' + dtype}, not MXFP4"):
                ckpt.packed(name)


MISFITS = {
    "float32 scales": (
        pair_of("a.weight_packed", "a.weight_scale", "U8", "F32", scales=FLOATS),
        "'a.weight_scale': expected dtype U8, found F32",
    ),
    "float32 scales of a plain name": (
        pair_of("a.weight", "a.weight_scale", "U8", "F32", scales=FLOATS),
        "'a.weight_scale': expected dtype U8, found F32",
    ),
    "float32 scales of DeepSeek": (
        pair_of("a.weight", "a.scale", "I8", "F32", scales=FLOATS),
        "'a.scale': expected dtype F8_E8M0, found F32",
    ),
    "float32 scales of MLX": (
        pair_of("a.weight", "a.scales", "U32", "F32", codes=CODES.view(np.uint32), scales=FLOATS),
        "'a.scales': expected dtype U8, found F32",
    ),
    "float32 scales of torchao": (
        pair_of("a._weight_qdata", "a._weight_scale", "U8", "F32", scales=FLOATS),
        "'a._weight_scale': expected dtype F8_E8M0, found F32",
    ),
    "too few scales": (
        pair_of("a.weight_packed", "a.weight_scale", scales=SCALES[:, :3]),
        "'a.weight_scale': expected shape [6, 4] to go with [6, 64] of 'a.weight_packed', found [6, 3]",
    ),
    "other rows": (
        pair_of("a.weight", "a.scale", "I8", "F8_E8M0", scales=SCALES[:5]),
        "'a.scale': expected shape [6, 4] to go with [6, 64] of 'a.weight', found [5, 4]",
    ),
    "rows of no whole blocks": (
        pair_of("a.weight_packed", "a.weight_scale", codes=CODES[:, :60]),
        "'a.weight_packed': expected shape with rows of 16-byte blocks, found [6, 60]",
    ),
    "codes of another dtype": (
        pair_of("a.weight_packed", "a.weight_scale", "I32", codes=CODES.view(np.int32)),
        "'a.weight_packed': expected dtype U8, found I32",
    ),
    "codes of another dtype that fit": (
        pair_of("a.weight", "a.scale", "U8", "F8_E8M0"),
        "'a.weight': expected dtype I8 or F4, found U8",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_pair_that_looks_packed_and_does_not_fit_is_an_error(tmp_path, case):
    tensors, says = MISFITS[case]
    path = write_tensors(tmp_path / "m.safetensors", tensors)
    assert problem(path, "a.weight") == f"{path}: tensor {says}"


def test_f4_rows_of_no_whole_bytes_are_no_blocks(tmp_path):
    path = tmp_path / "m.safetensors"
    specs = {"a.weight": ("F4", (2, 33)), "a.scale": ("F8_E8M0", (2, 1))}
    write_safetensors(path, specs, [np.zeros(35, np.uint8)])
    assert "'a.weight': expected shape with rows of 16-byte blocks, found [2, 33]" in problem(path, "a.weight")


def test_lone_codes_whose_config_says_packed(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization": {"mode": "mxfp4"}, "expert_dtype": "fp4"}')
    tensors = {"a.weight": ("U32", CODES.view(np.uint32)), "b.weight": ("I8", CODES), "c.weight": ("U8", CODES)}
    path = write_tensors(tmp_path / "m.safetensors", tensors)
    assert "expected 'a.scales'" in problem(path, "a.weight")
    assert "expected 'b.scale'" in problem(path, "b.weight")
    with mxfp4np.Checkpoint(path) as ckpt:
        assert np.array_equal(ckpt["c.weight"], CODES)


# What could be two things


def ambiguous(folder, config=None):
    write_tensors(folder / "m.safetensors", pair_of("a.weight", "a.weight_scale") | {"b": ("F32", FLOATS)})
    if config is not None:
        (folder / "config.json").write_text(config)
    return folder


def test_headers_that_several_layouts_share_need_the_config(tmp_path):
    message = problem(ambiguous(tmp_path), "a.weight")
    assert message == (
        f"{tmp_path / 'm.safetensors'}: tensor 'a.weight': expected one layout, found that it could be quark or "
        "modelopt or modelslim, and no file beside it says: force one, as with layout='quark'"
    )


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ('{"quantization_config": {"quant_method": "awq"}}', "config.json says quant_method awq"),
        ('{"quantization_config": {"quant_method": "quark", "dtype": "int4"}}', "quant_method quark"),
        (
            '{"quantization_config": {"quant_method": "quark", "dtype": "fp4", "quant_algo": "mxfp4"}}',
            "quark or modelopt",
        ),
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
    ],
)
def test_a_config_that_does_not_tell(tmp_path, config, says):
    message = problem(ambiguous(tmp_path, config), "a.weight")
    assert says in message
    assert "force one, as with layout='quark'" in message
    with mxfp4np.Checkpoint(tmp_path) as ckpt:
        assert ckpt["b"].shape == (6, 4)


@pytest.mark.parametrize(
    ("file", "text", "layout", "reason"),
    [
        (
            "config.json",
            '{"text_config": {"quantization_config": {"quant_method": "quark", "layers": [{"dtype": "fp4"}]}}}',
            "quark",
            "config.json: quant_method quark, dtype fp4",
        ),
        ("config.json", '{"q": {"quant_algo": "MXFP4"}}', "modelopt", "config.json: quant_algo mxfp4"),
        (
            "hf_quant_config.json",
            '{"quantization": {"quant_algo": "W4A8_MXFP4_FP8"}}',
            "modelopt",
            "hf_quant_config.json: quant_algo w4a8_mxfp4_fp8",
        ),
    ],
)
def test_the_config_tells(tmp_path, file, text, layout, reason):
    (ambiguous(tmp_path) / file).write_text(text)
    with mxfp4np.Checkpoint(tmp_path) as ckpt:
        assert (ckpt.info("a.weight").layout, ckpt.info("a.weight").reason) == (layout, reason)
        assert_same_bits(ckpt.get("a.weight", dtype="float32"), VALUES)


def test_config_is_read_only_where_headers_do_not_tell(monkeypatch):
    read = []
    actual = mxfp4np.Checkpoint._read_beside
    monkeypatch.setattr(mxfp4np.Checkpoint, "_read_beside", lambda self, file: read.append(file) or actual(self, file))
    for sample in SAMPLES:
        with mxfp4np.Checkpoint(DATA / sample) as ckpt:
            assert not read
            for name in ckpt:
                ckpt.info(name)
            assert bool(read) == (sample in ("quark", "modelopt") or sample.startswith("deepseek"))  # tiles of FP8
            assert len(read) == len(set(read))
        read.clear()


@pytest.mark.parametrize("layout", ["quark", "modelopt", "modelslim"])
def test_forcing(tmp_path, layout, capsys):
    with mxfp4np.Checkpoint(ambiguous(tmp_path), layout=layout) as ckpt:
        assert ckpt.info("a.weight").layout == layout
        assert ckpt.info("a.weight").reason == f"layout={layout!r}"
        assert_same_bits(ckpt.get("a.weight", dtype="float32"), VALUES)
        again = pickle.loads(pickle.dumps(ckpt))
        assert again.info("a.weight").layout == layout
    assert main(["inspect", str(tmp_path), "--layout", layout]) == 0
    assert f"layout {layout}: layout={layout!r}" in capsys.readouterr().out
    out = tmp_path / "out.npy"
    assert main(["decode", str(tmp_path), "a.weight", "--layout", layout, "--dtype", "float32", "-o", str(out)]) == 0
    assert_same_bits(np.load(out), VALUES)


@every_sample
def test_forcing_what_it_is_changes_nothing(sample):
    with mxfp4np.Checkpoint(DATA / sample, layout=SAMPLES[sample]) as ckpt:
        for name, values in answers(sample).items():
            assert_same_bits(ckpt.get(name, dtype="float32"), values)
            assert ckpt.info(name).reason in (f"layout={SAMPLES[sample]!r}", None)


def test_forcing_leaves_other_names_alone_and_is_still_checked(tmp_path):
    mixed = pair_of("a.weight", "a.weight_scale") | pair_of("b.weight_packed", "b.weight_scale")
    with mxfp4np.Checkpoint(write_tensors(tmp_path / "mixed.safetensors", mixed), layout="quark") as ckpt:
        assert [ckpt.info(name).layout for name in ckpt] == ["quark", "compressed-tensors"]
    path = write_tensors(tmp_path / "m.safetensors", {"a.weight": ("U8", CODES)})
    assert "expected shape with rows of 17-byte blocks" in problem(path, "a.weight", layout="quark-mx")
    assert "expected 'a.weight_scale'" in problem(path, "a.weight", layout="quark")
    with pytest.raises(ValueError, match=r"layout must be one of gpt-oss, .*, found 'GPTQ'"):
        mxfp4np.Checkpoint(path, layout="GPTQ")


@pytest.mark.parametrize(
    ("sample", "detected"), [("mlx", "mlx"), ("gpt_oss_hf", "gpt-oss-hf"), (None, "no packed tensor")]
)
def test_a_forced_layout_that_nothing_has_is_refused(refused, tmp_path, sample, detected):
    plain = write_tensors(tmp_path / "m.safetensors", {"a.weight": ("F32", FLOATS)})
    path = plain if sample is None else DATA / sample
    message = f"no tensor has names and dtypes of the forced layout 'quark': leave it out, detected: {detected}"
    for call in (mxfp4np.Checkpoint, mxfp4np.load_file, mxfp4np.verify):
        with pytest.raises(LayoutError, match=message):
            call(path, layout="quark")
    with pytest.raises(LayoutError, match=message):
        mxfp4np.convert(path, tmp_path / "out", layout="quark")
    for arguments in (
        ["inspect"],
        ["verify"],
        ["bench"],
        ["convert", tmp_path / "out"],
        ["decode", "a", "-o", "a.npy"],
    ):
        command, *others = arguments
        assert message in refused(command, path, *others, "--layout", "quark")
    assert not (tmp_path / "out").exists()
    assert "expected its path" in refused("bench", "--layout", "quark")


def test_codes_with_two_scale_tensors_are_ambiguous(tmp_path):
    tensors = pair_of("a.weight", "a.weight_scale") | {"a.weight.scales": ("U8", SCALES)}
    path = write_tensors(tmp_path / "m.safetensors", tensors)
    assert "could be quark or modelopt or modelslim or uqff" in problem(path, "a.weight")
    for layout in ("quark", "uqff"):
        with mxfp4np.Checkpoint(path, layout=layout) as ckpt:
            assert ckpt.info("a.weight").layout == layout


def test_scales_with_two_tensors_of_codes_are_ambiguous(tmp_path):
    tensors = pair_of("a.weight", "a.weight_scale") | {"a.weight_packed": ("U8", CODES[::-1])}
    path = write_tensors(tmp_path / "m.safetensors", tensors)
    assert "could be quark or modelopt or modelslim or compressed-tensors" in problem(path, "a.weight")
    with mxfp4np.Checkpoint(path, layout="quark") as ckpt:
        assert_same_bits(ckpt.get("a.weight", dtype="float32"), VALUES)


# Gate and up


@both_io
@pytest.mark.parametrize(
    ("sample", "weight", "bias"),
    [
        ("gpt_oss_original", "block.0.mlp.mlp1_weight", "block.0.mlp.mlp1_bias"),
        ("gpt_oss_hf", "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.gate_up_proj_bias"),
    ],
)
def test_gate_and_up_by_name(sample, weight, bias, io):
    with mxfp4np.Checkpoint(DATA / sample, io=io) as ckpt:
        for first, half in enumerate(("gate", "up")):
            name = f"{weight}/{half}"
            expected = ckpt[weight][:, first::2]
            assert name in ckpt
            assert name not in list(ckpt)
            assert_same_bits(ckpt[name], expected)
            assert_same_bits(ckpt.get(name, index=np.s_[1, ::-1, 5:70]), expected[1, ::-1, 5:70])
            assert ckpt.info(name).shape == ckpt.packed(name).shape == expected.shape
            assert ckpt.info(name).name == name
            assert ckpt.info(name).decoded_nbytes() == expected.nbytes
            whole = np.zeros_like(expected)
            for index, piece in ckpt.chunks(name, 4096):
                whole[index] = piece
            assert_same_bits(whole, expected)
            expected = ckpt[bias][:, first::2]
            assert f"{bias}/{half}" in ckpt
            assert_same_bits(ckpt[f"{bias}/{half}"], expected)
            assert_same_bits(ckpt.get(f"{bias}/{half}", index=np.s_[1, 3:]), expected[1, 3:])
            assert ckpt.info(f"{bias}/{half}").shape == expected.shape
            assert [piece.shape for _, piece in ckpt.chunks(f"{bias}/{half}")] == [expected.shape]
            assert_same_bits(ckpt.get(f"{weight}/{half}", transpose=True), ckpt[weight][:, first::2].swapaxes(-1, -2))
        if io == "mmap":
            assert np.shares_memory(ckpt.packed(f"{weight}/gate").blocks, ckpt.packed(weight).blocks)
            assert np.shares_memory(ckpt[f"{bias}/up"], ckpt[bias])


def test_only_rows_that_alternate_have_halves():
    with mxfp4np.Checkpoint(DATA / "gpt_oss_hf") as ckpt:
        for name in ("model.layers.0.mlp.experts.down_proj/gate", "x/gate", "/up", "gate", 7):
            assert name not in ckpt
            assert ckpt.get(name, default=None) is None
            with pytest.raises(TensorNotFoundError):
                ckpt[name]
    with mxfp4np.Checkpoint(DATA / "mlx") as ckpt:
        assert "model.layers.0.mlp.switch_mlp.gate_proj.weight/gate" not in ckpt


def test_fused_weights_of_other_models_have_no_halves(tmp_path):
    tensors = {"a.gate_up_proj": ("F32", FLOATS), "a.gate_up_proj_bias": ("F32", FLOATS)}
    with mxfp4np.Checkpoint(write_tensors(tmp_path / "m.safetensors", tensors)) as ckpt:
        assert "a.gate_up_proj/gate" not in ckpt
        assert "a.gate_up_proj_bias/up" not in ckpt


# inspect


def test_inspect_lists_what_a_mixed_checkpoint_holds_and_why(tmp_path, capsys):
    tensors = (
        pair_of("a.weight_packed", "a.weight_scale")
        | pair_of("b.weight", "b.scale", "I8", "F8_E8M0")
        | pair_of("c.weight", "c.scale", "F8_E4M3", "F8_E8M0", codes=BYTES)
        | pair_of("f.weight", "f.scale", "I8", "F32", scales=FLOATS[:, :1])
        | {"d.weight": ("F32", FLOATS), "e.weight_packed": ("U8", CODES)}
    )
    path = write_tensors(tmp_path / "m.safetensors", tensors)
    assert main(["inspect", str(path), "--json"]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)["tensors"]}
    assert set(found) == {"a.weight", "b.weight", "c.weight", "d.weight", "e.weight", "f.weight", "f.scale"}
    layouts = {name: (row.get("layout"), row.get("reason")) for name, row in found.items()}
    assert layouts["a.weight"] == ("compressed-tensors", "suffix pair, U8/U8")
    assert layouts["b.weight"] == ("deepseek", "suffix pair, I8/F8_E8M0")
    assert layouts["c.weight"] == ("deepseek", "suffix pair, F8_E4M3/F8_E8M0")
    assert layouts["f.weight"] == layouts["f.scale"] == layouts["d.weight"] == (None, None)
    assert "e.weight_scale" in found["e.weight"]["problem"]
    assert main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "layout compressed-tensors: suffix pair, U8/U8; axes [.., out, in]" in lines
    assert "layout deepseek: suffix pair, I8/F8_E8M0; axes [.., out, in]" in lines
    assert "layout deepseek: suffix pair, F8_E4M3/F8_E8M0; axes [.., out, in]" in lines


def test_not_found_names_the_tensor_that_a_half_belongs_to():
    with (
        mxfp4np.Checkpoint(DATA / "compressed_tensors") as ckpt,
        pytest.raises(TensorNotFoundError, match=r"half of 'model\.layers\.0\.mlp\.experts\.0\.up_proj\.weight'"),
    ):
        ckpt["model.layers.0.mlp.experts.0.up_proj.weight_packed"]


# Arrays in halves


def test_halves_are_saved_in_pairs(tmp_path):
    blocks, scales = CODES.reshape(6, 4, 16), SCALES
    array = MXFP4Array(blocks, scales, "halves")
    mxfp4np.save_file({"w": array}, tmp_path / "m.safetensors")
    with mxfp4np.Checkpoint(tmp_path) as ckpt:
        assert_same_bits(ckpt.get("w", dtype="float32"), oracle(blocks, scales, "float32", "halves"))
    assert array.in_pairs().order == "pairs"
    assert array[2:].replace(blocks[2:], scales[2:]).order == "halves"
    part = array[1, 5:99]
    assert_same_bits(part.in_pairs().decode(), part.decode())
