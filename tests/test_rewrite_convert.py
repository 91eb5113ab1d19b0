"""Converting whole checkpoints: every value, every file beside them, and whatever can go wrong on the way."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from contract import DTYPES, assert_same_bits, oracle, run_python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mxfp4np
from mxfp4np import CheckpointError, cli
from mxfp4np.rewrite import convert as conversion
from mxfp4np.rewrite.convert import convert
from mxfp4np.rewrite.plan import INDEX, RECORD
from mxfp4np.storage.safetensors import SafetensorsFile, header_bytes, write_safetensors
from mxfp4np.storage.tensorfile import nbytes_of

DATA = Path(__file__).parent / "data"
ORIGINAL, HF, DEEPSEEK = DATA / "gpt_oss_original", DATA / "gpt_oss_hf", DATA / "deepseek_v4"
FOLDERS = sorted({path.parent for path in DATA.glob("*/*.safetensors")})
PLAIN = {"x": np.arange(6, dtype=np.float32)}

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def identity(folder):
    """Return what changes when a file is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.safetensors")}


def packed(*shape, seed=0, low=110, high=140):
    rng = np.random.default_rng(seed)
    scales = rng.integers(low, high, (*shape[:-1], shape[-1] // 32), np.uint8)
    return mxfp4np.MXFP4Array(rng.integers(0, 256, (*scales.shape, 16), np.uint8), scales)


def build(folder, tensors, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    mxfp4np.save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_converted(source, target, dtype="bfloat16", **options):
    """Compare with what `Checkpoint.get` gives, by raw bytes."""
    with mxfp4np.Checkpoint(source, **options) as theirs, mxfp4np.Checkpoint(target) as ours:
        assert ours.keys() == theirs.keys()
        for name in theirs:
            info, found = theirs.info(name), ours.info(name)
            assert found.layout is None
            if info.layout is None:
                assert (found.dtype, found.shape) == (info.dtype, info.shape)
                assert ours.stored[name].tobytes() == theirs.stored[name].tobytes()
            else:
                turned = info.layout == "gpt-oss-hf"
                assert_same_bits(ours[name], theirs.get(name, dtype=dtype, transpose=turned, backend="numpy"))


# Values


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout(folder, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "CHUNK_BYTES", 1000)
    result = convert(folder, tmp_path / "out", dtype=dtype, max_shard_size=40_000, verify=True)
    assert result.complete
    assert result.verification.findings == []
    assert result.verification.nbytes == result.nbytes == result.written == sum(result.shards.values())
    assert_converted(folder, tmp_path / "out", dtype)
    if dtype == "float32":  # what the producers' own code decodes to
        with mxfp4np.Checkpoint(tmp_path / "out") as ours, np.load(folder / "expected.npz") as expected:
            for name in (name for name in expected if not name.endswith("__in_out")):
                as_loaded = f"{name}__in_out"
                assert_same_bits(ours[name].astype(np.float32), expected[as_loaded if as_loaded in expected else name])


@pytest.mark.gguf
def test_gguf(tmp_path):
    pytest.importorskip("gguf", reason="needs the gguf extra; tox -e peers has it")
    result = convert(DATA / "gguf", tmp_path / "out", verify=True)
    assert result.verification.findings == []
    with mxfp4np.Checkpoint(DATA / "gguf") as theirs, mxfp4np.Checkpoint(tmp_path / "out") as ours:
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert ours[name].tobytes() == theirs[name].tobytes()


@pytest.mark.parametrize("transpose", ["auto", "yes", "no"])
@pytest.mark.parametrize("piece_bytes", [128, 5000, 32 << 20])
def test_transpose(tmp_path, monkeypatch, transpose, piece_bytes):
    monkeypatch.setattr(conversion, "CHUNK_BYTES", piece_bytes)
    arrays = {"w": packed(3, 40, 96), "m": packed(7, 64), "v": packed(64), "e": packed(0, 64), "f": packed(5, 0)}
    source = build(tmp_path / "in", {**arrays, "plain": np.arange(6).reshape(2, 3)})
    result = convert(source, tmp_path / "out", transpose=transpose, verify=True)
    assert result.verification.findings == []
    with mxfp4np.Checkpoint(tmp_path / "out") as ours:
        for name, array in arrays.items():
            expected = oracle(array.blocks, array.scales, "bfloat16")
            turned = transpose == "yes" and expected.ndim > 1
            assert_same_bits(ours[name], expected.swapaxes(-1, -2) if turned else expected)
        assert np.array_equal(ours["plain"], np.arange(6).reshape(2, 3))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_tensors(tmp_path_factory, monkeypatch, data):
    folder = tmp_path_factory.mktemp("random")
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    dtypes = st.sampled_from(["float32", "int64", "bool", "complex64", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    tensors = {}
    for i, is_packed in enumerate(data.draw(st.lists(st.booleans(), min_size=1, max_size=6))):
        shape = data.draw(shapes)
        if is_packed:
            groups = data.draw(st.integers(0, 3))
            tensors[f"t{i}"] = packed(*shape, 32 * groups, seed=i, low=0, high=256)
        else:
            dtype = np.dtype(data.draw(dtypes))
            tensors[f"t{i}"] = rng.integers(0, 2, shape).astype(dtype)
    source = build(folder / "in", tensors)
    monkeypatch.setattr(conversion, "CHUNK_BYTES", data.draw(st.sampled_from([128, 500, 1 << 20])))
    options = {
        "max_shard_size": data.draw(st.integers(1, 1000)),
        "transpose": data.draw(st.sampled_from(["auto", "yes", "no"])),
        "dtype": data.draw(st.sampled_from(sorted(DTYPES))),
    }
    result = convert(source, folder / "out", verify=True, **options)
    assert result.verification.findings == []
    files = [SafetensorsFile(folder / "out" / name) for name in result.shards]
    assert [sum(t.nbytes for t in file.tensors.values()) for file in files] == list(result.shards.values())
    with mxfp4np.Checkpoint(folder / "out") as ours:
        assert ours.keys() == tensors.keys()
        for name, tensor in tensors.items():
            if isinstance(tensor, mxfp4np.MXFP4Array):
                expected = oracle(tensor.blocks, tensor.scales, options["dtype"])
                turned = options["transpose"] == "yes" and expected.ndim > 1
                assert_same_bits(ours[name], expected.swapaxes(-1, -2) if turned else expected)
            else:
                assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
                assert ours[name].tobytes() == tensor.tobytes()
    again = convert(source, folder / "again", num_threads=data.draw(st.integers(1, 5)), **options)
    assert again.shards == result.shards
    assert tree(folder / "again") == tree(folder / "out")


NAMES = ["", " ", "a/b", "..", "a\nb", "\N{BELL}\x1b[2J", "gewicht\N{LATIN SMALL LETTER U WITH DIAERESIS}", "{}", "%s",
         "\N{RIGHT-TO-LEFT OVERRIDE}x", "\N{GRINNING FACE}", "model.safetensors", "x" * 300]  # fmt: skip


def test_names_and_dtypes_of_every_kind(tmp_path):
    rng = np.random.default_rng(0)
    specs = {
        "f4": ("F4", (3, 6)),
        "f4.odd": ("F4", (2, 3)),
        "f6": ("F6_E2M3", (4, 4)),
        "f6.flat": ("F6_E3M2", (2, 2)),
        "bool": ("BOOL", (3,)),
        "scalar": ("I64", ()),
        "complex": ("C64", (2, 2)),
        "scale": ("F8_E8M0", (5,)),
        "f8": ("F8_E5M2", (2, 1)),
        "empty": ("F64", (0, 3)),
        "empty.f4": ("F4", (2, 0)),
        **{name: ("U16", (i + 1,)) for i, name in enumerate(NAMES)},
    }
    data = [rng.integers(0, 2, nbytes_of(*spec), np.uint8) for spec in specs.values()]
    (tmp_path / "in").mkdir()
    write_safetensors(tmp_path / "in" / "m.safetensors", specs, data)
    for limit in (1, 20, 10**9):
        result = convert(tmp_path / "in", tmp_path / f"{limit}", max_shard_size=limit, verify=True)
        assert result.verification.findings == []
        assert_converted(tmp_path / "in", tmp_path / f"{limit}")
        if limit == 1:
            assert len(result.shards) == sum(nbytes_of(*spec) > 1 for spec in specs.values()) + 1
            assert all(path.parent == tmp_path / "1" for path in (tmp_path / "1").iterdir())


def test_a_reserved_name_is_refused(tmp_path):
    source = build(tmp_path / "in", {"__metadata__": packed(2, 32)})
    with pytest.raises(ValueError, match="reserves the name"):
        convert(source, tmp_path / "out")


def test_what_is_excluded_is_copied_and_what_is_dropped_is_not(tmp_path):
    result = convert(ORIGINAL, tmp_path / "out", include="*mlp?_weight", exclude="*mlp2*", drop="*bias", verify=True)
    weights = {"block.0.mlp.mlp1_weight", "block.1.mlp.mlp1_weight"}
    assert result.contents.decoded.keys() == weights
    assert result.verification.findings == []
    with mxfp4np.Checkpoint(ORIGINAL) as theirs, mxfp4np.Checkpoint(tmp_path / "out") as ours:
        biases = {name for name in theirs if name.endswith("bias")}
        assert ours.keys() == theirs.keys() - biases
        kept = ours.stored.keys() - weights
        assert kept >= {"block.0.mlp.mlp2_weight.blocks", "block.1.mlp.mlp2_weight.scales"}
        for name in kept:
            assert ours.stored[name].tobytes() == theirs.stored[name].tobytes()
    findings = mxfp4np.verify(ORIGINAL, tmp_path / "out").findings
    assert len(findings) == len(biases) > 0
    assert all(re.fullmatch("no tensor '.*bias' in .*", finding) for finding in findings)
    with pytest.raises(ValueError, match="no tensor is left"):
        convert(ORIGINAL, tmp_path / "none", drop=["*"])
    assert not (tmp_path / "none").exists()


def test_a_broken_pair_is_refused_unless_excluded_or_dropped(tmp_path):
    source = build(tmp_path / "in", {"half.blocks": np.zeros((2, 1, 16), np.uint8), **PLAIN})
    with pytest.raises(mxfp4np.LayoutError, match=r"half\.scales"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert convert(source, tmp_path / "out", exclude=["half*"], verify=True).complete
    assert mxfp4np.Checkpoint(tmp_path / "out").stored.keys() == {"half.blocks", "x"}
    assert convert(source, tmp_path / "dropped", drop=["half*"]).contents.dropped == ["half"]


def test_overflow_is_counted(tmp_path):
    blocks = np.zeros((4, 1, 16), np.uint8)
    blocks[:, 0, 0] = 0x77, 0x7F, 0x07, 0x77  # 6, -6
    scales = np.array([[140], [141], [200], [255]], np.uint8)
    source = build(tmp_path / "in", {"w": mxfp4np.MXFP4Array(blocks, scales), "v": packed(2, 32), **PLAIN})
    result = convert(source, tmp_path / "f16", dtype="float16", verify=True)
    assert result.overflow == {"w": 3}
    assert (result.verification.overflow, result.verification.nan_blocks) == (3, 1)
    assert any("3 values in 1 tensor, w first" in line for line in result.warnings())
    result = convert(source, tmp_path / "bf16", verify=True)
    assert (result.overflow, result.verification.overflow) == ({}, 0)
    assert not any("warning" in line for line in result.lines())


# Sources


@pytest.mark.parametrize("kind", ["folder", "index", "list", "text"])
def test_kinds_of_sources(tmp_path, kind):
    expected = convert(HF, tmp_path / "expected")
    source = {
        "folder": HF,
        "index": HF / "model.safetensors.index.json",
        "list": sorted(HF.glob("*.safetensors")),
        "text": str(HF),
    }[kind]
    target = str(tmp_path / "out") if kind == "text" else tmp_path / "out"
    result = convert(source, target, verify=True)
    assert result.verification.findings == []
    assert result.shards == expected.shards
    assert_converted(HF, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists() == (kind != "list")
    assert mxfp4np.verify(source).findings == []
    assert mxfp4np.verify(source, target).findings == []


def test_a_single_file_comes_alone(tmp_path):
    source = build(tmp_path / "in", {"w": packed(2, 64)}, {"model_type": "x"})
    (source / "tokenizer.json").write_text("{}")
    result = convert(source / "model.safetensors", tmp_path / "out")
    assert sorted(tree(tmp_path / "out")) == [RECORD, "model.safetensors"]
    assert result.loader == f"mxfp4np.Checkpoint({str(tmp_path / 'out')!r})"
    assert len(mxfp4np.load_file(tmp_path / "out")) == 1


def test_relative_paths(tmp_path, monkeypatch):
    build(tmp_path / "in", {"w": packed(2, 64)}, {"model_type": "x"})
    monkeypatch.chdir(tmp_path)
    result = convert("in", "out", verify=True)
    assert result.folder == tmp_path / "out"
    monkeypatch.chdir(tmp_path / "in")
    convert(".", "../again")
    assert tree(tmp_path / "out") == tree(tmp_path / "again")


def test_a_cache_of_links(tmp_path):
    """As huggingface_hub has it: snapshots of links to blobs."""
    source = build(tmp_path / "plain", {"w": packed(2, 64)}, {"model_type": "x", "quantization_config": {}})
    (source / "tokenizer.json").write_text('{"a": 1}')
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(source.iterdir()):
        (blobs / str(i)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(i)))
    convert(source, tmp_path / "expected")
    convert(snapshot, tmp_path / "out", verify=True)
    for folder in ("expected", "out"):
        (tmp_path / folder / RECORD).unlink()  # knows the times of the files
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match="the source is in it"):
        convert(snapshot, blobs, force=True)
    assert len(list(blobs.iterdir())) == 3


@pytest.mark.parametrize("how", ["file", "above", "two links", "blobs of others", "link in blobs"])
@pytest.mark.parametrize("name", ["notes.txt", "below/notes.txt", "config.json"])
def test_links_out_of_the_source_are_not_followed(tmp_path, command, name, how):
    """Whoever made the source does not decide which other files of the machine go into the result."""
    secret = tmp_path / "hub" / "secret"
    source = build(tmp_path / "hub" / "snapshots" / "abc", {"w": packed(2, 64)})
    blobs, link = source.parents[1] / "blobs", source / name
    (tmp_path / "blobs").mkdir()
    blobs.mkdir()
    link.parent.mkdir(exist_ok=True)
    secret.write_text('{"secret": 1}')
    if how == "two links":
        (source / ".hidden").symlink_to(secret)
        link.symlink_to(source / ".hidden")
    elif how == "blobs of others":
        (tmp_path / "blobs" / "secret").write_text('{"secret": 1}')
        link.symlink_to(tmp_path / "blobs" / "secret")
    elif how == "link in blobs":
        (blobs / "1").symlink_to(secret)
        link.symlink_to(blobs / "1")
    else:
        link.symlink_to(os.path.relpath(secret, link.parent) if how == "above" else secret)
    (source / "inside.txt").symlink_to("model.safetensors")
    if name == "config.json":
        with pytest.raises(CheckpointError, match=r"config\.json: is a link to .*secret, which is outside of"):
            convert(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    status, _, err = command("convert", source, tmp_path / "out")
    assert (status, err.count("is a link to")) == (0, 1)
    assert f"{link}: is a link to {link.resolve()}, which is outside of its folder, and is not copied" in err
    files = tree(tmp_path / "out")
    assert set(files) == {"model.safetensors", "inside.txt", RECORD}
    assert not any(b"secret" in data for data in files.values())


@pytest.mark.parametrize("name", ["n" * 240 + ".txt", "\N{SNOWMAN}" * 80, "n" * 120 + "/" + "m" * 255])
def test_long_names_beside_the_weights(tmp_path, name):
    source = build(tmp_path / "in", {"w": packed(2, 64)})
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text("text")
    convert(source, tmp_path / "out")
    assert tree(tmp_path / "out")[name] == b"text"


@pytest.mark.parametrize("at", [1, 12, 40])
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_a_source_that_is_overwritten_meanwhile(wide, tmp_path, monkeypatch, io, at):
    """In place, with the same size and the same time: nothing is called complete that is half of one and half of it."""
    monkeypatch.setattr(conversion, "CHUNK_BYTES", 20_000)
    path, steps = wide / "model.safetensors", []
    times, other = path.stat(), build(tmp_path / "other", {f"w{i}": packed(64, 8192, seed=9 + i) for i in range(2)})

    def progress(step):
        steps.append(step)
        if len(steps) == at:
            path.write_bytes((other / "model.safetensors").read_bytes())
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    with pytest.raises(CheckpointError, match=r"model\.safetensors: was replaced or changed"):
        convert(wide, tmp_path / "out", io=io, num_threads=1, max_shard_size=1, progress=progress)
    assert len(steps) >= at
    assert not (tmp_path / "out" / INDEX).exists()
    with pytest.raises(CheckpointError, match="files that have changed since"):
        convert(wide, tmp_path / "out", max_shard_size=1, resume=True)
    assert convert(wide, tmp_path / "out", max_shard_size=1, force=True, verify=True).verification.findings == []


@pytest.mark.parametrize("inner", ["bf16", "converted/bf16", "a/b/c"])
def test_a_target_inside_the_source(tmp_path, inner):
    source = build(tmp_path / "in", {"w": packed(2, 64), "v": packed(2, 64)}, {"model_type": "x"})
    outer = source / inner.split("/")[0]
    if outer != source / inner:
        outer.mkdir()
        (outer / "notes.txt").write_text("mine")
    for options in ({}, {"resume": True}, {"force": True}):
        convert(source, source / inner, max_shard_size=1, **options)
        files = tree(source / inner)
        assert {name for name in files if name.endswith(".safetensors")} == {
            f"model-0000{i}-of-00002.safetensors" for i in (1, 2)
        }
        assert (f"{outer.name}/notes.txt" in files) == (outer != source / inner)
    convert(source, tmp_path / "other")
    assert not [name for name in tree(tmp_path / "other") if name.endswith("notes.txt")], "belongs to a checkpoint"


@pytest.mark.parametrize("how", ["same", "around", "linked", "list", "shard"])
def test_a_target_around_the_source_is_refused(tmp_path, how):
    source = build(tmp_path / "around" / "in", {"w": packed(2, 64)}, {"model_type": "x"})
    target = {"same": source, "around": source.parent}.get(how, tmp_path / "out")
    argument = source
    if how == "linked":
        target.symlink_to(source.parent, target_is_directory=True)
    elif how == "list":
        mxfp4np.save_file(PLAIN, build(target, PLAIN) / "model.safetensors")
        argument = [source / "model.safetensors", target / "model.safetensors"]
    elif how not in ("same", "around"):
        target.mkdir()
        (source / "model.safetensors").rename(target / "model.safetensors")
        (source / "model.safetensors").symlink_to(target / "model.safetensors")
    before = tree(tmp_path)
    for options in ({}, {"force": True}, {"resume": True}, {"dry_run": True}):
        with pytest.raises(ValueError, match="the source is in it"):
            convert(argument, target, **options)
    assert tree(tmp_path) == before


# What is beside the weights

CONFIGS = [
    ({"model_type": "m", "quantization_config": {"a": 1}}, {"model_type": "m", "dtype": "float16"}),
    ({"model_type": "m", "torch_dtype": "float32"}, {"model_type": "m", "torch_dtype": "float16"}),
    (
        {"model_type": "m", "dtype": "bfloat16", "torch_dtype": "bfloat16"},
        {"model_type": "m", "dtype": "float16", "torch_dtype": "float16"},
    ),
    ({"quantization_config": {}}, {}),
    ({"dtype": "x"}, {"dtype": "float16"}),
    (
        {
            "text_config": {"quantization_config": {}, "torch_dtype": "y", "z": [1]},
            "vision_config": {"torch_dtype": "y"},
        },
        {"text_config": {"torch_dtype": "float16", "z": [1]}, "vision_config": {"torch_dtype": "y"}},
    ),
    ({"text_config": None, "quantization_config": None}, {"text_config": None}),
    ({"quantization": {"bits": 4}, "n": 1e-05, "big": 10**30}, {"n": 1e-05, "big": 10**30}),
    ({"name": "\N{SNOWMAN}", "text_config": [1]}, {"name": "\N{SNOWMAN}", "text_config": [1]}),
    ({}, {}),
]


@pytest.mark.parametrize(("config", "expected"), CONFIGS)
def test_config(tmp_path, config, expected):
    source = build(tmp_path / "in", {"w": packed(2, 64)}, config)
    result = convert(source, tmp_path / "out", dtype="float16")
    assert result.contents.quantized == []
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8")) == expected


@pytest.mark.parametrize(
    "text",
    ["[]", "null", "{", "\xff", "{" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, r'{"a": "\ud800"}'],
    ids=["list", "null", "broken", "no text", "endless", "deep", "half a character"],
)
def test_config_that_is_no_object_is_refused(tmp_path, text):
    source = build(tmp_path / "in", {"w": packed(2, 64)})
    (source / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(mxfp4np.CheckpointError, match=r"config\.json"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert convert(source / "model.safetensors", tmp_path / "out").complete


def test_files_beside(tmp_path):
    source = build(tmp_path / "in", {"w": packed(2, 64)})
    copied = [
        "tokenizer.json",
        "tokenizer.model",
        "special name %s\N{SNOWMAN}.txt",
        "modeling.py",
        "sub/a.json",
        "sub/deep/b.txt",
        "empty",
    ]
    left = [
        ".hidden",
        ".cache/x.txt",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "other.safetensors.index.json",
        "original/params.json",
        "original/consolidated.safetensors",
        "metal/deep/model.bin",
        "metal/readme.md",
        "hf_quant_config.json",
        "quant_model_description.json",
        "sub/.hidden",
        "begun/config.json",
        f"begun/{RECORD}",
    ]
    for name in copied + left:
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if name == "empty" else "{}")
    (source / "other.safetensors.index.json").unlink()
    (source / "linked.txt").symlink_to("tokenizer.json")
    (source / "linked").symlink_to(tmp_path, target_is_directory=True)
    (source / "nothing.bin").symlink_to("is there")
    result = convert(source, tmp_path / "out")
    files = tree(tmp_path / "out")
    assert set(files) == {*copied, "linked.txt", "model.safetensors", RECORD}
    for name in (*copied, "linked.txt"):
        assert files[name] == (source / name).read_bytes()
    assert not (tmp_path / "out" / "linked.txt").is_symlink()
    others = [
        "begun/",
        "linked/",
        "metal/",
        "nothing.bin",
        "original/",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ]
    assert result.left_out == others


def test_summary_says_what_is_left_out(tmp_path, command):
    source = build(tmp_path / "in", {"w": packed(2, 64)})
    for name in ("sub/voice.pt", "sub/voice.json", "deep/er/x.ONNX", "deep/er/y.txt", "deep/z.txt", "plain/a.txt"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}")
    mxfp4np.save_file({"a": np.ones(3)}, source / "adapter_model.safetensors")
    left = ["adapter_model.safetensors", "deep/", "sub/"]
    for arguments in (["--dry-run"], ["--json"], ["--force"]):
        status, out, err = command("convert", source, source / "out", *arguments)
        assert (status, err) == (0, "")
        if arguments == ["--json"]:
            assert json.loads(out)["left_out"] == left
        else:
            assert f"left out, not part of the checkpoint: {', '.join(left)}\n" in out
    assert convert(source / "model.safetensors", tmp_path / "one").left_out == []
    assert "left out" not in command("convert", source / "out", tmp_path / "again")[1]


def test_weights_of_an_index_in_a_folder_below_are_not_left_out(tmp_path):
    source = build(tmp_path / "in", {"w": packed(2, 64)})
    (source / "part").mkdir()
    (source / "model.safetensors").rename(source / "part" / "x.safetensors")
    weight_map = {"w.blocks": "./part/x.safetensors", "w.scales": "part/x.safetensors"}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert convert(source, tmp_path / "out").left_out == []


def test_metadata_of_the_source_is_kept(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    mxfp4np.save_file(
        {"w": packed(2, 64)},
        source / "model-1-of-2.safetensors",
        {"format": "mlx", "w": "{}", "licence": "é", "both": "1"},
    )
    mxfp4np.save_file(
        {"x": np.ones((4, 32), np.float32)}, source / "model-2-of-2.safetensors", {"x": "kept", "both": "2"}
    )
    convert(source, tmp_path / "out", max_shard_size=1)
    expected = {"format": "pt", "licence": "é", "both": "1", "x": "kept"}
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert mxfp4np.Checkpoint(file).metadata == expected
    mxfp4np.save_file(
        {"m.weight": np.ones((4, 32), np.float32)}, tmp_path / "m.safetensors", {"m.weight": "", "by": "me"}
    )
    mxfp4np.encode_checkpoint(tmp_path / "m.safetensors", tmp_path / "mlx", layout="mlx")
    assert mxfp4np.Checkpoint(tmp_path / "mlx").metadata == {"format": "pt", "by": "me"}


@pytest.mark.parametrize("names", [["w"], ["w", "x"], ["broken"]])
def test_metadata_of_decoded_tensors_goes(tmp_path, names):
    shutil.copytree(DATA / "torchao", tmp_path / "in")
    with mxfp4np.Checkpoint(tmp_path / "in") as source:
        assert "tensor_names" in source.metadata
        metadata = {**source.metadata, "tensor_names": json.dumps([*source, *names[1:]]), "x": '{"_type": "Tensor"}'}
        arrays = {**source.stored, "x": np.ones(3, np.float32)}
        if names == ["broken"]:
            metadata["tensor_names"] = "[" * 100_000
        mxfp4np.save_file(arrays, tmp_path / "in" / "model.safetensors", metadata)
    convert(tmp_path / "in", tmp_path / "out")
    expected = {"format": "pt"} | ({} if names[1:] else {"x": '{"_type": "Tensor"}'})
    assert mxfp4np.Checkpoint(tmp_path / "out").metadata == expected


@pytest.mark.parametrize("loop", [False, True])
def test_a_link_to_nothing_is_named_before_anything_is_written(tmp_path, loop):
    source = build(tmp_path / "in", {"w": packed(2, 64)})
    (source / "tokenizer.json").symlink_to("tokenizer.json" if loop else "gone")
    with pytest.raises(OSError) as error:  # noqa: PT011
        convert(source, tmp_path / "out")
    assert error.value.filename == str(source / "tokenizer.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_file_is_not_copied(tmp_path, monkeypatch):
    source = build(tmp_path / "in", {"w": packed(2, 64)})
    os.mkfifo(source / "pipe")
    monkeypatch.chdir(source)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        code = "import sys, mxfp4np; mxfp4np.convert(*sys.argv[1:])"
        run_python(code, source, tmp_path / "out", timeout=60)  # nobody writes to the pipe
    assert sorted(tree(tmp_path / "out")) == [RECORD, "model.safetensors"]


# Runs


@pytest.mark.parametrize("num_threads", [1, 2, 7, 10**6])
def test_same_bytes_for_any_number_of_threads(tmp_path, num_threads):
    for folder, options in (("one", {"num_threads": 1}), ("out", {"num_threads": num_threads})):
        convert(HF, tmp_path / folder, max_shard_size=50_000, **options)
    assert tree(tmp_path / "one") == tree(tmp_path / "out")
    convert(HF, tmp_path / "read", max_shard_size=50_000, io="pread", num_threads=num_threads)
    assert tree(tmp_path / "one") == tree(tmp_path / "read")


def test_an_error_before_anything_has_begun_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("MXFP4NP_NUM_THREADS", "x")
    with pytest.raises(ValueError, match="must be a positive integer, found 'x'"):
        convert(HF, tmp_path / "out", max_shard_size=50_000, num_threads=2)


def test_dry_run_writes_nothing(tmp_path):
    plan = convert(HF, tmp_path / "out", max_shard_size=50_000, dry_run=True, verify=True)
    assert not (tmp_path / "out").exists()
    assert (plan.written, plan.complete, plan.verification) == (0, False, None)
    result = convert(HF, tmp_path / "out", max_shard_size=50_000)
    assert plan.shards == result.shards
    assert (
        plan.nbytes
        == result.written
        == sum(file.stat().st_size - len(_header(file)) for file in (tmp_path / "out").glob("*.safetensors"))
    )
    *lines, where, left = plan.plan_lines()
    assert len(lines) == len(plan.shards)
    assert str(tmp_path / "out") in where
    assert re.fullmatch(r"347 kB to be written, [\d.]+ [kMGT]B free on the disk", left)
    assert plan.to_json()["free"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.5)
    before = tree(tmp_path / "out")
    convert(HF, tmp_path / "out", dry_run=True)
    convert(HF, tmp_path / "out", dry_run=True, force=True)
    assert tree(tmp_path / "out") == before


def test_a_dry_run_says_what_is_done_already(tmp_path):
    options = {"max_shard_size": 50_000, "dry_run": True}
    first = next(iter(convert(HF, tmp_path / "out", max_shard_size=50_000).shards))
    assert convert(HF, tmp_path / "out", **options).missing == []
    (tmp_path / "out" / first).unlink()
    plan = convert(HF, tmp_path / "out", **options)
    assert plan.missing == plan.to_json()["missing"] == [first]
    left = list(plan.plan_lines())[-1]
    assert left.startswith(f"{len(plan.shards) - 1} shards there already: --resume keeps them; ")
    for other in ({"force": True}, {"dtype": "float16"}):  # nothing that is there would be kept
        assert len(convert(HF, tmp_path / "out", **options, **other).missing) == len(plan.shards)


def _header(path):
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def test_summary_says_how_to_load_it(tmp_path):
    config = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}
    source = build(tmp_path / "in", {"w": packed(2, 64)}, config)
    result = convert(source, tmp_path / "out", dtype="float16")
    first, *_, last = result.lines()
    assert first.startswith("wrote 256 B in ")
    assert first.endswith(f"to {tmp_path / 'out'}: 1 shard, 256 B, all there")
    assert last == (
        f"load it: transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}, dtype='float16')"
    )
    json.dumps(result.to_json())


def test_progress(tmp_path):
    steps = []
    result = convert(HF, tmp_path / "out", max_shard_size=50_000, progress=steps.append)
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert (steps[-1].done, steps[-1].total) == (result.nbytes, result.nbytes)
    assert {step.shard for step in steps} == set(result.shards)
    with mxfp4np.Checkpoint(HF) as checkpoint:
        assert {step.tensor for step in steps} == set(checkpoint)
    steps.clear()
    mxfp4np.verify(HF, tmp_path / "out", progress=steps.append)
    assert (steps[-1].done, steps[-1].total) == (result.nbytes, result.nbytes)


def test_resume(tmp_path):
    options = {"max_shard_size": 50_000}
    expected = convert(HF, tmp_path / "whole", **options)
    calls = []

    def stop(step):
        calls.append(step)
        if len(calls) == 6:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        convert(HF, tmp_path / "out", num_threads=1, progress=stop, **options)
    before = identity(tmp_path / "out")
    assert 0 < len(before) < len(expected.shards)
    assert not (tmp_path / "out" / INDEX).exists()
    with pytest.raises(FileExistsError, match="--resume"):
        convert(HF, tmp_path / "out", **options)
    result = convert(HF, tmp_path / "out", resume=True, verify=True, **options)
    assert result.written == expected.nbytes - sum(expected.shards[name] for name in before)
    assert result.verification.findings == []
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert before.items() <= identity(tmp_path / "out").items()
    assert convert(HF, tmp_path / "out", resume=True, **options).written == 0


def test_resume_of_nothing(tmp_path):
    assert convert(HF, tmp_path / "out", resume=True).complete


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float16"},
        {"transpose": "no"},
        {"max_shard_size": 1000},
        {"include": ["*"]},
        {"exclude": ["*bias*"]},
    ],
    ids=str,
)
def test_resume_with_other_options_is_refused(tmp_path, change):
    convert(HF, tmp_path / "out")
    before = tree(tmp_path / "out")
    for options in ({"resume": True}, {"task": (1, 1)}):
        with pytest.raises(mxfp4np.CheckpointError, match="begun with other options"):
            convert(HF, tmp_path / "out", **options, **change)
    assert tree(tmp_path / "out") == before
    assert convert(HF, tmp_path / "out", force=True, **change).complete


def test_resume_with_another_layout_is_refused(tmp_path):
    """Same names, same shapes, other values."""
    weight = {
        "a.weight": np.arange(64, dtype=np.uint8).reshape(4, 16),
        "a.weight_scale": np.full((4, 1), 127, np.uint8),
    }
    source = build(tmp_path / "in", weight)
    convert(source, tmp_path / "out", layout="quark")
    with pytest.raises(mxfp4np.CheckpointError, match="begun with other options"):
        convert(source, tmp_path / "out", layout="modelopt", resume=True)


@pytest.mark.parametrize("what", ["model.safetensors", "config.json", "tokenizer.json", "new.json"])
def test_resume_with_another_source_is_refused(tmp_path, what):
    source = build(tmp_path / "in", {"w": packed(2, 64)}, {"model_type": "x"})
    (source / "tokenizer.json").write_text("{}")
    convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", resume=True)
    if what == "model.safetensors":
        build(source, {"w": packed(2, 64, seed=1)})
    else:
        (source / what).write_text('{"model_type": "y"}')
    with pytest.raises(mxfp4np.CheckpointError, match="from other files"):
        convert(source, tmp_path / "out", resume=True)
    convert(source, tmp_path / "out", force=True)
    convert(source, tmp_path / "new")
    assert tree(tmp_path / "out") == tree(tmp_path / "new")


def test_force_leaves_what_is_not_its_own(tmp_path):
    target = build(tmp_path / "out", PLAIN, {"old": 1})
    (target / "mine.txt").write_text("{}")
    for options in ({}, {"task": (1, 1)}):
        with pytest.raises(FileExistsError, match="expected a new or empty folder, found"):
            convert(HF, target, **options)
    with pytest.raises(FileExistsError, match=r"model.safetensors: was written by no earlier run"):
        convert(HF, target, force=True)
    (target / "model.safetensors").unlink()
    for shard_size in (50_000, 10**9):  # the second time over what the first left, though there is no index then
        result = convert(HF, target, force=True, max_shard_size=shard_size)
        index = {INDEX} if len(result.shards) > 1 else set()
        assert set(tree(target)) == {*result.shards, *index, "mine.txt", "config.json", RECORD, "expected.npz"}
        assert_converted(HF, target)
    (target / "my.safetensors").write_text("")
    before = tree(target)
    with pytest.raises(FileExistsError, match=r"my.safetensors: was written by no earlier run"):
        convert(HF, target, force=True)
    assert tree(target) == before


def test_force_removes_nothing_where_there_is_no_room(tmp_path, monkeypatch):
    convert(HF, tmp_path / "out", max_shard_size=50_000)
    before = tree(tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=-(10**9)))
    with pytest.raises(OSError, match="are to be written, but the disk has"):
        convert(HF, tmp_path / "out", force=True)
    assert tree(tmp_path / "out") == before


def test_resume_or_force_but_not_both(tmp_path):
    with pytest.raises(ValueError, match="give one of them"):
        convert(HF, tmp_path / "out", resume=True, force=True)


def test_resume_says_what_is_other(tmp_path):
    convert(HF, tmp_path / "out", transpose="no")
    with pytest.raises(CheckpointError, match=r"\(dtype 'bfloat16', not 'float32'; transpose 'no', not 'auto'\)"):
        convert(HF, tmp_path / "out", resume=True, dtype="float32")
    with pytest.raises(CheckpointError, match=r"\(shard size, or files that have changed since\)"):
        convert(HF, tmp_path / "out", resume=True, transpose="no", max_shard_size=50_000)


def test_nothing_packed_is_worth_a_word(tmp_path):
    source = build(tmp_path / "in", PLAIN)
    assert list(convert(source, tmp_path / "out").warnings()) == [
        "no tensor of the source is decoded: all of them are copied"
    ]


@pytest.mark.parametrize("kind", ["file", "below a file", "dangling"])
def test_a_target_that_is_no_folder(tmp_path, kind):
    target = tmp_path / "out"
    if kind == "dangling":
        target.symlink_to("gone")
    else:
        target.write_text("mine")
    with pytest.raises(OSError):  # noqa: PT011
        convert(HF, target / "deeper" if kind == "below a file" else target)
    assert target.is_symlink() or target.read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_target_that_must_not_be_written(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError):
        convert(HF, tmp_path / "out")
    tmp_path.chmod(0o755)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": (0, 1)}, "task must be i/n"),
        ({"task": (3, 2)}, "task must be i/n"),
        ({"task": (1, 2), "force": True}, "remove it"),
        ({"max_shard_size": 0}, "max_shard_size"),
        ({"num_threads": 0}, "num_threads must be at least 1"),
        ({"dtype": "int8"}, "values decode to"),
        ({"transpose": "maybe"}, "transpose must be"),
        ({"layout": "none"}, "layout must be"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        convert(HF, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# Tasks


@pytest.mark.parametrize("order", [[1, 2, 3], [3, 1, 2, 2], [2, 3, 3, 1, 1]])
def test_tasks_in_any_order(tmp_path, order):
    convert(HF, tmp_path / "whole", max_shard_size=50_000)
    done = set()
    for i in order:
        result = convert(HF, tmp_path / "out", max_shard_size=50_000, task=(i, 3), verify=True)
        assert result.verification.findings == []
        done.add(i)
        assert result.complete == (len(done) == 3) == (tmp_path / "out" / INDEX).exists()
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_more_tasks_than_shards(tmp_path):
    results = [convert(HF, tmp_path / "out", task=(i, 5), verify=True) for i in range(1, 6)]
    assert [result.complete for result in results] == [True] * 5
    assert [result.written > 0 for result in results] == [True, False, False, False, False]
    huge = convert(HF, tmp_path / "out", task=(10**30, 10**30))
    assert huge.complete


# In a process of its own: nothing but the system calls themselves counts events. Children are forks of a process that
# has compiled everything and has no threads.
DRIVER = """
    import itertools, os, random, shutil, signal, sys
    from pathlib import Path
    from mxfp4np.rewrite import convert as conversion
    from mxfp4np.rewrite.plan import INDEX

    source, root = map(Path, sys.argv[1:3])
    watched, numbers, last, at, act = None, None, 0, None, None
    WATCHED = ("open", "os.rename", "os.mkdir", "os.remove")

    def tick():
        global last
        last = number = next(numbers)  # at once, whatever the threads
        if number == at:
            act()

    def hook(event, arguments):
        if watched is not None and event in WATCHED and str(arguments[0]).startswith(watched):
            tick()

    real = os.fsync

    def fsync(descriptor):
        tick()
        real(descriptor)

    def convert(target, num_threads=1, **options):
        global watched, numbers
        watched, numbers = str(target), itertools.count(1)
        try:
            return conversion.convert(
                source, target, num_threads=num_threads, max_shard_size=50_000, progress=lambda _: tick(), **options
            )
        finally:
            watched = None

    def tree(folder):
        return {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }

    def identity(folder):
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.safetensors")}

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def fork(target, when=None, **options):
        global at, act
        child = os.fork()
        if child:
            return child
        at, act = when, kill
        try:
            convert(target, **options)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)

    def check(target):
        # What has its final name is whole, and the index comes last.
        left = {name: data for name, data in tree(target).items() if not name.endswith(".tmp")}
        assert left.items() <= expected.items(), sorted(left)
        assert INDEX not in left or left == expected

    conversion.CHUNK_BYTES = 20_000
    os.fsync = fsync
    sys.addaudithook(hook)
    convert(root / "expected")
    expected, events = tree(root / "expected"), last
    assert events > 60 and len(identity(root / "expected")) > 4
    random.seed(0)
"""


@pytest.fixture
def several(tmp_path):
    """A source with files beside the weights, one in a folder below."""
    source = tmp_path / "in"
    (source / "below").mkdir(parents=True)
    for path in HF.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "below" / "template.txt").write_text("text")
    return source


@needs_fork
def test_killed_at_any_moment(several, tmp_path):
    code = """
    moments = [1, 2, 3, events, *random.sample(range(4, events), 20)]
    for moment in moments:
        target = root / f"killed {moment}"
        status = os.waitpid(fork(target, moment, num_threads=random.choice([1, 2])), 0)[1]
        assert os.WIFSIGNALED(status), (moment, status)
        finished = {}
        if target.exists():
            check(target)
            finished = identity(target)
        result = convert(target, resume=True)
        assert result.complete
        assert tree(target) == expected, sorted(tree(target))
        assert finished.items() <= identity(target).items(), "wrote a finished shard again"
        assert result.written == result.nbytes - sum(result.shards[name] for name in finished)
        shutil.rmtree(target)
    """
    run_python(DRIVER + code, several, tmp_path)


@needs_fork
def test_killed_again_and_again(several, tmp_path):
    code = """
    for round in range(3):
        target = root / f"round {round}"
        while True:
            status = os.waitpid(fork(target, random.randrange(20, 2 * events), num_threads=2, resume=True), 0)[1]
            assert os.WIFSIGNALED(status) or status == 0, status
            if target.exists():
                check(target)
            if status == 0:
                break
        assert tree(target) == expected
    """
    run_python(DRIVER + code, several, tmp_path)


@needs_fork
def test_the_disk_is_full_at_any_moment(several, tmp_path):
    code = """
    def act():
        raise OSError(28, "No space left on device")

    WATCHED = ("open", "os.rename", "os.mkdir")
    convert(root / "counted")
    for moment in random.sample(range(1, last + 1), 25):
        target, at = root / f"full {moment}", moment
        try:
            convert(target)
        except OSError as error:
            assert error.errno == 28
        else:
            assert tree(target) == expected, "not even a note of it"
        at = None
        if target.exists():
            check(target)
            assert tree(target).items() <= expected.items(), "nothing temporary"
        convert(target, resume=True)
        assert tree(target) == expected
        shutil.rmtree(target)
    """
    run_python(DRIVER + code, several, tmp_path)


@needs_fork
def test_four_machines_two_of_which_are_killed(several, tmp_path):
    code = """
    for round in range(5):
        target = root / f"round {round}"
        when = [None, random.randrange(1, 17), None, random.randrange(1, 17)]  # from the first file to its own shard
        children = [fork(target, when[i], task=(i + 1, 4)) for i in range(4)]
        codes = [os.waitpid(child, 0)[1] for child in children]
        assert codes[0] == codes[2] == 0, codes
        check(target)
        again = [i for i in range(4) if codes[i]]
        assert all(os.WIFSIGNALED(codes[i]) for i in again), codes
        assert again
        assert [os.waitpid(fork(target, task=(i + 1, 4)), 0)[1] for i in again] == [0] * len(again)
        assert tree(target) == expected, sorted(tree(target))
    """
    run_python(DRIVER + code, several, tmp_path)


@needs_fork
@pytest.mark.parametrize("tasks", ["[(1, 1)] * 6", "[(1, 2), (2, 2)] * 3", "[(i, 8) for i in range(1, 9)]"])
def test_many_machines_at_the_same_time(several, tmp_path, tasks):
    code = f"""
    for round in range(4):
        target = root / f"round {{round}}"
        children = [fork(target, task=task) for task in {tasks}]
        codes = [os.waitpid(child, 0)[1] for child in children]
        assert codes == [0] * len(codes), codes
        assert tree(target) == expected, sorted(tree(target))
    """
    run_python(DRIVER + code, several, tmp_path)


# Sources and disks that fail


@pytest.fixture
def wide(tmp_path):
    """Two packed tensors, many pages each, and the right times to put them back."""
    return build(tmp_path / "in", {f"w{i}": packed(64, 8192, seed=i) for i in range(2)})


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_a_source_that_is_truncated_meanwhile(wide, tmp_path, io):
    code = """
    import os, resource, sys
    from mxfp4np import CheckpointError
    from mxfp4np.rewrite import convert as conversion

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    conversion.CHUNK_BYTES = 200_000
    source, target, io = sys.argv[1:]

    def progress(step):
        if step.done > step.total // 2:
            os.truncate(source + "/model.safetensors", 4096)

    child = os.fork()
    if not child:
        try:
            conversion.convert(source, target, io=io, num_threads=1, max_shard_size=1, progress=progress)
        except CheckpointError as error:
            print(error, flush=True)
            os._exit(2)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    whole, times = (wide / "model.safetensors").read_bytes(), (wide / "model.safetensors").stat()
    convert(wide, tmp_path / "expected", max_shard_size=1)
    *said, status = run_python(code, wide, tmp_path / "out", io).splitlines()
    if io == "pread":
        assert (status, len(said)) == ("2", 1)
        assert "truncated after it was opened: tensor 'w1" in said[0]
        assert not list((tmp_path / "out").glob(".*.tmp"))
    else:
        assert int(status) < 0  # the operating system ends it
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model-00001-of-00002.safetensors"]
    with pytest.raises(mxfp4np.CheckpointError):
        convert(wide, tmp_path / "out", max_shard_size=1, resume=True)
    (wide / "model.safetensors").write_bytes(whole)
    os.utime(wide / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(mxfp4np.CheckpointError, match="files that have changed since"):
        convert(wide, tmp_path / "out", max_shard_size=1, resume=True)
    convert(wide, tmp_path / "out", max_shard_size=1, force=True)
    found, expected = tree(tmp_path / "out"), tree(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(found[name] == expected[name] for name in found if name != RECORD)


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_a_source_that_vanishes_meanwhile(tmp_path, io):
    source = tmp_path / "in"
    for i in (1, 2):
        build(source, {f"w{i}": packed(4, 64, seed=i)})
        (source / "model.safetensors").rename(source / f"model-0000{i}-of-00002.safetensors")

    def progress(_):
        (source / "model-00002-of-00002.safetensors").unlink(missing_ok=True)

    with pytest.raises(FileNotFoundError) as error:
        convert(source, tmp_path / "out", io=io, num_threads=1, max_shard_size=1, progress=progress)
    assert error.value.filename == str(source / "model-00002-of-00002.safetensors")
    assert sorted(tree(tmp_path / "out")) == [RECORD, "model-00001-of-00002.safetensors"]


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("at", [1, 4, 8])
def test_an_exception_in_progress(tmp_path, kind, at):
    calls = []

    def progress(step):
        calls.append(step)
        if len(calls) == at:
            raise kind

    with pytest.raises(kind):
        convert(HF, tmp_path / "out", num_threads=2, max_shard_size=50_000, progress=progress)
    assert len(calls) == at, "called again"
    convert(HF, tmp_path / "whole", max_shard_size=50_000)
    assert tree(tmp_path / "out").items() < tree(tmp_path / "whole").items()
    assert not (tmp_path / "out" / INDEX).exists()


# Memory

MEASURE = """
    import sys, threading
    from pathlib import Path
    from mxfp4np.rewrite import convert as conversion
    from mxfp4np.rewrite import verify as verification

    def anonymous():
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return sum(int(fields[kind].split()[0]) << 10 for kind in ("RssAnon", "RssShmem"))

    done, most = threading.Event(), 0

    def watch():
        global most
        while not done.wait(0.001):
            most = max(most, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        source, target, io, verify = sys.argv[1:]
        options = dict(num_threads=2, io=io, transpose="yes", dtype="float32", verify=bool(verify), max_shard_size=1)
        result = conversion.convert(source, target, **options)
    finally:
        done.set()
        thread.join()
    assert result.complete
    print(most)
"""


def hollow(folder, rows):
    """Write two packed tensors and a plain one, all zeros that take no room on the disk."""
    specs = {
        **{f"w{i}.blocks": ("U8", (rows, 256, 16)) for i in range(2)},
        **{f"w{i}.scales": ("U8", (rows, 256)) for i in range(2)},
        "plain": ("F32", (rows, 8192)),
    }
    header = header_bytes(specs, None)
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + rows * (2 * 256 * 17 + 8192 * 4))
    return folder


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_memory_is_bounded(tmp_path, io):
    """Each tensor is larger, decoded, than the bound."""
    rows = 20_000
    assert rows * 8192 * 4 > 512 << 20
    source = hollow(tmp_path / "in", rows)
    try:
        assert int(run_python(MEASURE, source, tmp_path / "out", io, "", timeout=300)) < 512 << 20
    finally:
        for path in (tmp_path / "out").glob("*.safetensors"):
            path.unlink()


@needs_proc
def test_memory_of_verification_is_bounded(tmp_path):
    source = hollow(tmp_path / "in", 1000)
    assert int(run_python(MEASURE, source, tmp_path / "out", "mmap", "verify")) < 512 << 20


# The command


class TestCommand:
    def test_converts(self, command, tmp_path):
        status, out, err = command("convert", HF, tmp_path / "out", "--max-shard-size", "50kB", "--verify")
        assert (status, err) == (0, "")
        wrote, verified, load = out.splitlines()
        assert wrote.startswith("wrote 347 kB in ")
        assert wrote.endswith(" shards, 347 kB, all there")
        assert verified == "verified 8 tensors, 347 kB read: nothing wrong"
        assert load == f"load it: mxfp4np.Checkpoint({str(tmp_path / 'out')!r})"
        assert_converted(HF, tmp_path / "out")

    def test_options(self, command, tmp_path):
        options = ["--dtype", "float16", "--transpose", "no", "--threads", "3", "--include", "*_proj", "--io", "pread"]
        patterns = ["--exclude", "*.1.*", "--drop", "*bias"]
        assert command("convert", HF, tmp_path / "out", *options, *patterns, "--quiet")[:2] == (0, "")
        keywords = {"include": ["*_proj"], "exclude": ["*.1.*"], "drop": ["*bias"]}
        expected = convert(HF, tmp_path / "same", dtype="float16", transpose="no", **keywords)
        assert expected.nbytes > 0
        assert tree(tmp_path / "out") == tree(tmp_path / "same")

    def test_json(self, command, tmp_path):
        status, out, err = command("convert", HF, tmp_path / "out", "--json", "--verify")
        assert (status, err) == (0, "")
        report = json.loads(out)
        assert report["shards"] == {"model.safetensors": report["bytes"]}
        assert report["written"] == report["bytes"] == report["verification"]["bytes"]
        assert report["complete"] is True
        assert report["verification"]["findings"] == []
        status, out, _ = command("convert", HF, tmp_path / "plan", "--json", "--dry-run")
        assert json.loads(out)["shards"] == report["shards"]
        assert not (tmp_path / "plan").exists()

    def test_dry_run(self, command, tmp_path):
        status, out, err = command("convert", HF, tmp_path / "out", "--dry-run")
        assert (status, err) == (0, "")
        *plan, left = out.splitlines()
        assert plan == ["model.safetensors  347 kB", f"1 shard, 347 kB of tensor data, to {tmp_path / 'out'}"]
        assert left.startswith("347 kB to be written, ")

    def test_tasks(self, command, tmp_path):
        for i, end in ((2, "2 of them still to be written"), (1, "all there")):
            status, out, _ = command("convert", HF, tmp_path / "out", "--task", f"{i}/2", "--max-shard-size", "100kB")
            assert status == 0
            assert out.splitlines()[0].endswith(end)
            assert ("load it" in out) == (i == 1)

    def test_warnings(self, command, tmp_path):
        for option in ("--dry-run", "--quiet"):
            err = command("convert", DEEPSEEK, tmp_path / "a", option, "--exclude", "*attn*")[2]
            assert err.startswith("mxfp4np: warning: still quantised")
            assert err.count("\n") == 1
        source = build(tmp_path / "in", {"w": packed(2, 64, low=200, high=201)})
        err = command("convert", source, tmp_path / "b", "--dtype", "float16")[2]
        assert "warning: too large for the dtype, and infinite now: " in err

    def test_a_difference(self, command, tmp_path):
        convert(HF, tmp_path / "out")
        path = tmp_path / "out" / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        status, out, err = command("convert", HF, tmp_path / "out", "--resume", "--verify")
        assert (status, err) == (1, "")
        assert "1 finding" in out
        status, quiet, err = command("convert", HF, tmp_path / "out", "--resume", "--verify", "--quiet")
        assert (status, err) == (1, "")
        assert quiet
        assert quiet in out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["gone", "out"], "gone"),
            (["in", "in"], "the source is in it"),
            (["in", "."], "the source is in it"),
            (["in", "full"], "--force"),
            (["in", "done"], "--resume"),
            (["in", "done", "--resume", "--dtype", "float16"], "--force"),
            (["in", "file"], "file: cannot be written: File exists"),
            (["in", "file/x"], "file/x: cannot be written: Not a directory"),
            (["in", "out", "--task", "0/2"], "i/n"),
            (["in", "out", "--task", "x"], "'x' is not a task"),
            (["in", "out", "--task", "1/2", "--force"], "remove it"),
            (["in", "out", "--max-shard-size", "0"], "at least 1"),
            (["in", "out", "--max-shard-size", "big"], "'big' is not a size"),
            (["in", "out", "--threads", "0"], "not a positive number"),
            (["in", "out", "--threads", "9" * 5000], "--threads"),
            (["in", "out", "--dtype", "int4"], "invalid choice"),
            (["in", "out", "--layout", "x"], "layout must be one of"),
            (["in", "out", "--device", "tpu"], "tpu"),
            (["in", "out", "--drop", "*"], "no tensor is left"),
            (["in"], "DST"),
            (["garbage", "out"], "not a valid safetensors file"),
        ],
        ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
    )
    def test_refusals(self, refused, tmp_path, monkeypatch, arguments, message):
        build(tmp_path / "in", {"w": packed(2, 64)})
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine").write_text("mine")
        (tmp_path / "garbage").mkdir()
        (tmp_path / "garbage" / "x.safetensors").write_text("garbage")
        (tmp_path / "file").write_text("mine")
        convert(tmp_path / "in", tmp_path / "done")
        before = tree(tmp_path)
        monkeypatch.chdir(tmp_path)
        assert message in refused("convert", *arguments)
        assert tree(tmp_path) == before

    def test_any_size_and_number_of_threads(self, command, tmp_path):
        for size, threads in (("1", "999999"), ("999999999999999999999TB", "1")):
            target = tmp_path / size[:3]
            arguments = ("--max-shard-size", size, "--threads", threads, "--verify")
            assert command("convert", HF, target, *arguments)[0] == 0
            assert_converted(HF, target)

    def test_names_do_not_steer_the_terminal(self, command, tmp_path):
        source = build(
            tmp_path / "in",
            {
                "\x1b[2J": packed(2, 64, low=250, high=251),
                "\x1b[3J.weight": np.zeros((2, 2), np.uint8),
                "\x1b[3J.weight.absmax": np.zeros(1),
            },
        )
        target = tmp_path / "o\x1b[1mut"
        status, out, err = command("convert", source, target, "--dtype", "float16", "--verify")
        assert status == 0
        assert err.count("warning") == err.count("\n") == 2
        assert "\x1b" not in out + err
        assert "\x1b" not in command("convert", source, tmp_path / "\x1b[4m", "--dry-run")[1]

    def test_names_do_not_steer_the_terminal_while_it_works(self, tmp_path, monkeypatch, capsys):
        from tqdm import auto

        monkeypatch.setattr(auto, "tqdm", partial(auto.tqdm, mininterval=0))
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        source = build(tmp_path / "in", {"evil\x1b[2J": packed(2, 64)})
        assert cli.main(["convert", str(source), str(tmp_path / "out"), "--verify"]) == 0
        assert "evil" in (err := capsys.readouterr().err)
        assert "\x1b[2J" not in err

    @pytest.mark.parametrize("when", [1, 3, 5, 7])
    def test_interrupted(self, tmp_path, when):
        code = """
        import os, signal, sys
        from mxfp4np import cli

        real, count = os.fsync, 0

        def fsync(descriptor):
            global count
            count += 1
            if count == int(sys.argv[3]):
                os.kill(os.getpid(), signal.SIGINT)
            real(descriptor)

        os.fsync, sys.stderr = fsync, sys.stdout
        print(cli.main(["convert", *sys.argv[1:3], "--max-shard-size", "50kB", "--threads", "2", "--quiet"]))
        """
        begun = ": continue with --resume" if when > 1 else ""
        assert run_python(code, HF, tmp_path / "out", when) == f"mxfp4np: interrupted{begun}\n130\n"
        assert not list((tmp_path / "out").glob(".*.tmp"))

    @pytest.mark.skipif(sys.platform == "win32", reason="needs limits of resources")
    @pytest.mark.parametrize("limit", [100, 5_000, 60_000])
    def test_full_disk(self, tmp_path, limit):
        code = """
        import resource, sys
        from mxfp4np import cli

        sys.stderr = sys.stdout
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
        status = cli.main(["convert", *sys.argv[1:3], "--max-shard-size", "50kB", "--threads", "2"])
        print(status)
        """
        error, status = run_python(code, HF, tmp_path / "out", limit).splitlines()
        assert status == "2"
        assert error.startswith(f"mxfp4np: {tmp_path / 'out'}")
        assert error.endswith(": File too large")
        convert(HF, tmp_path / "whole", max_shard_size=50_000)
        assert tree(tmp_path / "out").items() < tree(tmp_path / "whole").items()
        assert not (tmp_path / "out" / INDEX).exists()
        convert(HF, tmp_path / "out", max_shard_size=50_000, resume=True)
        assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("depth", [33, 1200])
def test_folders_nested_very_deep(tmp_path, refused, depth):
    (tmp_path / "in").mkdir()
    mxfp4np.save_file({"w": np.zeros(3)}, tmp_path / "in" / "model.safetensors")
    folder = os.open(tmp_path / "in", os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=folder)
        below = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    assert "in/d: folders are nested more than 32 deep" in refused("convert", tmp_path / "in", tmp_path / "out")
    subprocess.run(["rm", "-rf", tmp_path / "in"], check=True)  # pytest cannot
