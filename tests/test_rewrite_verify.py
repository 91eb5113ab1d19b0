"""Verifying: every difference is found, named by tensor and index, and nothing else is."""

import json
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mxfp4np
from mxfp4np.rewrite import verify as verification
from mxfp4np.rewrite.plan import INDEX, RECORD
from mxfp4np.storage.safetensors import SafetensorsFile, write_safetensors

DATA = Path(__file__).parent / "data"
HF, ORIGINAL = DATA / "gpt_oss_hf", DATA / "gpt_oss_original"
FOLDERS = sorted({path.parent for path in DATA.glob("*/*.safetensors")})


def packed(*shape, seed=0, low=110, high=140):
    rng = np.random.default_rng(seed)
    scales = rng.integers(low, high, (*shape[:-1], shape[-1] // 32), np.uint8)
    return mxfp4np.MXFP4Array(rng.integers(0, 256, (*scales.shape, 16), np.uint8), scales)


def save(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    mxfp4np.save_file(tensors, path)
    return path


def decoded(path):
    """Return what a converted checkpoint holds, to be changed and saved elsewhere."""
    return {name: np.array(value) for name, value in mxfp4np.load_file(path).items()}


def flip(path, name, element, byte=0):
    """Change one byte of an element in a file."""
    file = SafetensorsFile(path)
    tensor = file.tensors[name]
    itemsize = tensor.nbytes // int(np.prod(tensor.shape))
    at = tensor.offset + element * itemsize + byte
    with path.open("r+b") as stream:
        stream.seek(at)
        old = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([old ^ 1]))


@pytest.fixture
def source(tmp_path):
    return save(tmp_path / "in" / "model.safetensors", {"w": packed(3, 40, 96), "plain": np.arange(12).reshape(3, 4)})


@pytest.fixture
def target(source, tmp_path):
    mxfp4np.convert(source, tmp_path / "out")
    return tmp_path / "out" / "model.safetensors"


# Against the source


@pytest.mark.parametrize("num_threads", [1, 2, 50])
@pytest.mark.parametrize("piece_bytes", [256, 5000, 4 << 20])
def test_nothing_wrong(source, target, monkeypatch, num_threads, piece_bytes):
    monkeypatch.setattr(verification, "CHUNK_BYTES", piece_bytes)
    steps = []
    result = mxfp4np.verify(source, target.parent, num_threads=num_threads, progress=steps.append)
    assert result.findings == []
    assert result.tensors == 2
    assert result.nbytes == 3 * 40 * 96 * 2 + 12 * 8
    assert (steps[-1].done, steps[-1].total) == (result.nbytes, result.nbytes)
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert mxfp4np.verify(source, target).findings == [], "a file, too"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_byte_is_compared(tmp_path_factory, monkeypatch, data):
    folder = tmp_path_factory.mktemp("flip")
    path = save(folder / "in" / "m.safetensors", {"w": packed(3, 5, 64), "plain": np.arange(12).reshape(3, 4)})
    dtype = data.draw(st.sampled_from(["bfloat16", "float16", "float32"]))
    transpose = data.draw(st.sampled_from(["yes", "no"]))
    mxfp4np.convert(path, folder / "out", dtype=dtype, transpose=transpose)
    written = folder / "out" / "model.safetensors"
    name = data.draw(st.sampled_from(["w", "plain"]))
    shape = {"w": (3, 64, 5) if transpose == "yes" else (3, 5, 64), "plain": (3, 4)}[name]
    itemsize = {"w": 4 if dtype == "float32" else 2, "plain": 8}[name]
    elements = data.draw(st.lists(st.integers(0, int(np.prod(shape)) - 1), min_size=1, max_size=3, unique=True))
    for element in elements:
        flip(written, name, element, data.draw(st.integers(0, itemsize - 1)))
    monkeypatch.setattr(verification, "CHUNK_BYTES", data.draw(st.sampled_from([256, 1000, 4 << 20])))
    (finding,) = mxfp4np.verify(path, folder / "out").findings
    place = ", ".join(str(int(i)) for i in np.unravel_index(min(elements), shape))
    assert f"model.safetensors: tensor {name!r}[{place}]: expected " in finding


def test_a_difference_that_floats_do_not_show(tmp_path):
    """-0.0 is not 0.0, and one NaN not another."""
    blocks, scales = np.full((1, 1, 16), 0x88, np.uint8), np.full((1, 1), 127, np.uint8)
    path = save(tmp_path / "zero" / "m.safetensors", {"w": mxfp4np.MXFP4Array(blocks, scales)})
    (tmp_path / "out").mkdir()
    save(tmp_path / "out" / "m.safetensors", {"w": np.zeros((1, 32), np.float32)})
    (finding,) = mxfp4np.verify(path, tmp_path / "out").findings
    assert finding.endswith("tensor 'w'[0, 0]: expected -0.0, found 0.0")
    path = save(tmp_path / "nan" / "m.safetensors", {"f": np.array([1.0, np.nan])})
    other = np.array([1.0, np.nan])
    other.view(np.uint64)[1] ^= 1
    save(tmp_path / "out" / "m.safetensors", {"f": other})
    (finding,) = mxfp4np.verify(path, tmp_path / "out").findings
    assert finding.endswith("tensor 'f'[1]: expected nan, found nan")


def test_findings_are_in_the_order_of_the_source(tmp_path):
    tensors = {f"t{i:02}": np.arange(2, dtype=np.uint16) for i in range(30)}
    path = save(tmp_path / "in" / "m.safetensors", tensors)
    save(tmp_path / "out" / "m.safetensors", {name: array + 1 for name, array in tensors.items()})
    result = mxfp4np.verify(path, tmp_path / "out", num_threads=3)
    assert [finding.partition("tensor ")[2][1:4] for finding in result.findings] == sorted(tensors)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("w"), r"no tensor 'w' in"),
        (lambda t: t.update(new=np.zeros(1)), r"tensor 'new': in .*out, but not in .*in"),
        (lambda t: t.update(w=t["w"][:, :39]), r"tensor 'w': expected shape \[3, 40, 96\], found \[3, 39, 96\]"),
        (lambda t: t.update(w=t["w"].swapaxes(1, 2)), r"tensor 'w': expected shape \[3, 40, 96\], found \[3, 96, 40\]"),
        (
            lambda t: t.update(w=t["w"].astype(np.float64)),
            r"tensor 'w': expected bfloat16, float16, float32, found F64",
        ),
        (
            lambda t: t.update(w=packed(3, 40, 96)),
            r"tensor 'w': is packed, as gpt-oss: expected it decoded, unless it was excluded",
        ),
        (
            lambda t: t.update(plain=t["plain"].astype(np.int32)),
            r"I64 \[3, 4\] as in the source, found plain I32 \[3, 4\]",
        ),
        (
            lambda t: t.update(plain=t["plain"].reshape(4, 3)),
            r"I64 \[3, 4\] as in the source, found plain I64 \[4, 3\]",
        ),
        (lambda t: t.update(w=t["w"].astype(np.float16)), None),
        (lambda t: t.update(w=t["w"].astype(np.float32)), None),
    ],
    ids=["missing", "new", "shape", "turned", "float64", "packed", "plain dtype", "plain shape", "float16", "float32"],
)
def test_what_does_not_agree(tmp_path, change, expected):
    path = save(tmp_path / "in" / "m.safetensors", {"w": packed(3, 40, 96, high=120), "plain": np.ones((3, 4), int)})
    mxfp4np.convert(path, tmp_path / "converted")
    tensors = decoded(tmp_path / "converted")
    change(tensors)
    save(tmp_path / "out" / "model.safetensors", tensors)
    result = mxfp4np.verify(path, tmp_path / "out")
    assert len(result.findings) == (expected is not None)
    if expected:
        assert re.search(expected, result.findings[0]), result.findings


def test_empty_and_scalar_tensors(tmp_path):
    tensors = {"s": np.float32(3), "e": np.zeros((0, 3)), "w": packed(0, 64), "v": packed(32)}
    path = save(tmp_path / "in" / "m.safetensors", tensors)
    mxfp4np.convert(path, tmp_path / "out")
    assert mxfp4np.verify(path, tmp_path / "out").findings == []
    flip(tmp_path / "out" / "model.safetensors", "s", 0)
    (finding,) = mxfp4np.verify(path, tmp_path / "out").findings
    assert "tensor 's'[]: expected 3.0, found " in finding


def test_counts(tmp_path):
    blocks = np.zeros((4, 1, 16), np.uint8)
    blocks[:, 0, 0] = 0x77
    scales = np.array([[140], [141], [255], [255]], np.uint8)
    path = save(tmp_path / "m.safetensors", {"w": mxfp4np.MXFP4Array(blocks, scales)})
    for dtype, overflow in (("float16", 2), ("bfloat16", 0)):
        mxfp4np.convert(path, tmp_path / dtype, dtype=dtype)
        result = mxfp4np.verify(path, tmp_path / dtype)
        assert (result.findings, result.nan_blocks, result.overflow) == ([], 2, overflow)
        text = "\n".join(result.lines())
        assert "2 NaN blocks" in text
        assert ("2 values too large for the dtype" in text) == bool(overflow)
        assert result.to_json()["overflow"] == overflow


def test_elements_with_scales(tmp_path):
    """NaN of any bits is NaN; infinite codes are not too large."""
    codes = np.arange(256, dtype=np.uint8).repeat(2).reshape(8, 64)
    tensors = {
        "a.weight": codes.view(ml_dtypes.float8_e5m2),
        "a.weight_scale": np.full((8, 1), 2e34, np.float32),
        "b.weight": codes.view(ml_dtypes.float8_e4m3fn),
        "b.weight_scale": np.array([[127, 255]] * 8, np.uint8),
        "c.weight_packed": codes,
        "c.weight_scale": np.arange(64, dtype=np.uint8).reshape(8, 8).view(ml_dtypes.float8_e4m3fn),
        "c.weight_global_scale": np.ones(1, np.float32),
    }
    path = save(tmp_path / "m.safetensors", tensors)
    result = mxfp4np.convert(path, tmp_path / "out", verify=True)
    assert result.overflow == {"a.weight": 28}
    assert (result.verification.findings, result.verification.nan_blocks) == ([], 8)
    result = mxfp4np.verify(path, tmp_path / "out")
    assert (result.findings, result.nan_blocks, result.overflow) == ([], 8, 28)
    written = tmp_path / "out" / "model.safetensors"
    flip(written, "b.weight", 63)
    assert mxfp4np.verify(path, tmp_path / "out").findings == []
    for name in ("a.weight", "b.weight", "c.weight"):
        flip(written, name, 9)
        (finding,) = mxfp4np.verify(path, tmp_path / "out", include=name).findings
        assert f"tensor {name!r}[0, 9]: expected " in finding


def test_remembers_how_it_was_converted(tmp_path):
    mxfp4np.convert(HF, tmp_path / "out", transpose="no", include=["*down_proj"], exclude=["*.0.*"])
    assert mxfp4np.verify(HF, tmp_path / "out").findings == []
    findings = mxfp4np.verify(HF, tmp_path / "out", transpose="yes").findings
    assert findings
    assert all("'model.layers.1.mlp.experts.down_proj'" in finding for finding in findings)
    (tmp_path / "out" / RECORD).unlink()
    findings = mxfp4np.verify(HF, tmp_path / "out", transpose="no").findings
    assert findings
    assert any("expected it decoded, unless it was excluded" in finding for finding in findings)


def test_patterns_choose_what_is_compared(source, target):
    flip(target, "plain", 3)
    result = mxfp4np.verify(source, target.parent, include=["w"])
    assert (result.findings, result.tensors) == ([], 1)
    assert mxfp4np.verify(source, target.parent, exclude=["plain"]).findings == []
    assert len(mxfp4np.verify(source, target.parent, include=["p*"]).findings) == 1


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "\x00"])
def test_a_record_that_is_none(source, target, text):
    (target.parent / RECORD).write_text(text)
    with pytest.raises(mxfp4np.CheckpointError, match=RECORD):
        mxfp4np.verify(source, target.parent)


def test_what_is_not_all_there(tmp_path):
    result = mxfp4np.convert(HF, tmp_path / "out", max_shard_size=50_000, task=(1, 2))
    assert not result.complete
    total = len(result.shards)
    (finding,) = mxfp4np.verify(HF, tmp_path / "out").findings
    assert f"{len(result.missing)} of {total} files model-* are missing" in finding
    assert finding.endswith(": finish with --resume")
    mxfp4np.convert(HF, tmp_path / "out", max_shard_size=50_000, resume=True)
    assert mxfp4np.verify(HF, tmp_path / "out").findings == []
    (tmp_path / "out" / f"model-00002-of-{total:05}.safetensors").unlink()
    (finding,) = mxfp4np.verify(HF, tmp_path / "out").findings
    assert f"finish with --resume: {tmp_path / 'out' / INDEX}: 1 of the {total} files it names are missing" in finding
    mxfp4np.convert(HF, tmp_path / "out", max_shard_size=50_000, resume=True)
    (tmp_path / "out" / INDEX).unlink()
    (finding,) = mxfp4np.verify(HF, tmp_path / "out").findings
    assert f"all {total} files are there, but no index: finish with --resume" in finding
    for path in (tmp_path / "out").glob("model-*"):
        path.unlink()
    (finding,) = mxfp4np.verify(HF, tmp_path / "out").findings
    assert "finish with --resume: " in finding
    (tmp_path / "out" / RECORD).unlink()
    with pytest.raises(FileNotFoundError):
        mxfp4np.verify(HF, tmp_path / "out")


@pytest.mark.gguf
def test_against_gguf(tmp_path):
    pytest.importorskip("gguf", reason="needs the gguf extra; tox -e peers has it")
    mxfp4np.convert(DATA / "gguf", tmp_path / "out")
    findings = mxfp4np.verify(tmp_path / "out", DATA / "gguf").findings
    assert all("expected" in finding or "is packed, as gguf" in finding for finding in findings)
    assert mxfp4np.verify(DATA / "gguf").findings == []


@pytest.mark.parametrize("against", [True, False])
@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_in_progress_stops_all(tmp_path, monkeypatch, against, kind):
    monkeypatch.setattr(verification, "CHUNK_BYTES", 256)
    path = save(tmp_path / "in" / "m.safetensors", {f"w{i}": packed(400, 64, seed=i) for i in range(3)})
    mxfp4np.convert(path, tmp_path / "out")
    seen = []

    def progress(step):
        seen.append(step.tensor)
        if len(set(seen)) == 2:
            raise kind

    with pytest.raises(kind):
        mxfp4np.verify(path, tmp_path / "out" if against else None, num_threads=2, progress=progress)
    assert len(set(seen[:-1])) == 1, "called again"


# Alone


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_healthy(folder):
    result = mxfp4np.verify(folder)
    with mxfp4np.Checkpoint(folder) as checkpoint:
        assert result.tensors == len(checkpoint)
    assert all("blocks are NaN" in finding for finding in result.findings)
    assert (result.nan_blocks > 0) == bool(result.findings)


def test_healthy_after_conversion(source, target):
    assert mxfp4np.verify(source).findings == []
    assert mxfp4np.verify(target.parent).findings == []
    assert mxfp4np.verify(target).tensors == 2


def test_pairs_that_are_not_whole(tmp_path):
    tensors = {
        "half.blocks": np.zeros((2, 1, 16), np.uint8),
        "odd.blocks": np.zeros((2, 1, 16), np.uint8),
        "odd.scales": np.zeros((3, 1), np.uint8),
        "whole": packed(2, 32),
    }
    result = mxfp4np.verify(save(tmp_path / "m.safetensors", tensors))
    assert result.tensors == 3
    assert sorted("half" in finding for finding in result.findings) == [False, True]
    assert any("odd" in finding for finding in result.findings)
    assert mxfp4np.verify(tmp_path / "m.safetensors", exclude=["half*", "odd*"]).findings == []
    assert len(mxfp4np.verify(tmp_path / "m.safetensors", include=["half*"]).findings) == 1


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (110, 125, None),
        (63, 64, None),
        (62, 63, r"half of its scales are below 2\*\*-65"),
        (159, 160, None),
        (160, 161, r"half of its scales are above 2\*\*33"),
        (255, 256, "2 of its blocks are NaN"),
        (0, 1, "below"),
    ],
)
def test_scales_are_plausible(tmp_path, low, high, expected):
    array = packed(2, 32, low=low, high=high)
    path = save(tmp_path / "m.safetensors", {"w": array})
    findings = mxfp4np.verify(path).findings
    assert len(findings) == (expected is not None)
    if expected:
        assert findings[0].startswith("tensor 'w': ")
        assert re.search(expected, findings[0])


def test_a_block_of_zeros_may_have_any_scale(tmp_path):
    blocks, scales = np.full((4, 1, 16), 0x80, np.uint8), np.array([[0], [254], [0], [120]], np.uint8)
    blocks[3] = 0x11
    assert mxfp4np.verify(save(tmp_path / "m.safetensors", {"w": mxfp4np.MXFP4Array(blocks, scales)})).findings == []
    all_zero = mxfp4np.MXFP4Array(blocks[:3] & 0x88, scales[:3])
    assert mxfp4np.verify(save(tmp_path / "z.safetensors", {"w": all_zero, "e": packed(0, 32)})).findings == []


def test_scales_that_were_converted_instead_of_viewed(tmp_path):
    """What goes wrong where float8_e8m0fnu values become uint8 ones."""
    good = packed(8, 64, low=118, high=124)
    converted = good.scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32).astype(np.uint8)
    path = save(tmp_path / "m.safetensors", {"w": mxfp4np.MXFP4Array(good.blocks, converted)})
    (finding,) = mxfp4np.verify(path).findings
    assert "converted instead of viewed" in finding


def broken(folder, how):
    """Damage a copy of a checkpoint with an index."""
    index = folder / INDEX
    said = json.loads(index.read_text())
    name, file = next(iter(said["weight_map"].items()))
    if how == "not in the index":
        del said["weight_map"][name]
    elif how == "in no file":
        said["weight_map"]["ghost"] = file
    elif how == "in another file":
        said["weight_map"][name] = next(other for other in said["weight_map"].values() if other != file)
    elif how == "a missing file":
        (folder / file).unlink()
    elif how == "a truncated file":
        (folder / file).write_bytes((folder / file).read_bytes()[:-1])
    elif how == "no map":
        said = {}
    index.write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("not in the index", "is in a file, but not in the index"),
        ("in no file", "'ghost': expected in"),
        ("in another file", "expected in"),
        ("a missing file", "are missing"),
        ("a truncated file", "not a valid safetensors file"),
        ("no map", "expected an object 'weight_map'"),
    ],
)
def test_index_and_files_that_do_not_agree(tmp_path, command, how, message):
    shutil.copytree(HF, tmp_path / "in")
    broken(tmp_path / "in", how)
    findings = mxfp4np.verify(tmp_path / "in").findings
    assert len(findings) == 1
    assert message in findings[0]
    status, out, err = command("verify", tmp_path / "in")
    assert (status, err) == (1, "")
    assert message in out


def test_two_of_one_name(tmp_path):
    tensors = {"w.blocks": np.zeros((2, 1, 16), np.uint8), "w.scales": np.zeros((2, 1), np.uint8), "w": np.zeros(1)}
    (finding,) = mxfp4np.verify(save(tmp_path / "m.safetensors", tensors)).findings
    assert "would all be called 'w'" in finding


def test_sub_byte_and_odd_dtypes(tmp_path):
    specs = {"f4": ("F4", (2, 3)), "f6": ("F6_E2M3", (4,)), "c": ("C64", ()), "b": ("BOOL", (0,))}
    data = [np.zeros(n, np.uint8) for n in (3, 3, 8, 0)]
    write_safetensors(tmp_path / "m.safetensors", specs, data)
    assert mxfp4np.verify(tmp_path).findings == []
    assert mxfp4np.verify(tmp_path, tmp_path).findings == []


def test_same_checkpoint_twice(source):
    """Packed tensors that were not converted are findings."""
    (finding,) = mxfp4np.verify(source, source).findings
    assert "is packed, as " in finding


# The command


class TestCommand:
    def test_nothing_wrong(self, command, source, target):
        status, out, err = command("verify", source, target.parent)
        assert (status, err) == (0, "")
        assert out == "verified 2 tensors, 23.1 kB read: nothing wrong\n"
        assert command("verify", source)[:2] == (0, "verified 2 tensors, 6.12 kB read: nothing wrong\n")

    def test_a_difference(self, command, source, target):
        flip(target, "w", 5)
        flip(target, "plain", 11)
        status, out, err = command("verify", source, target.parent, "--threads", "2")
        assert (status, err) == (1, "")
        *findings, summary = out.splitlines()
        assert [finding.partition("tensor ")[2].partition(":")[0] for finding in findings] == [
            "'plain'[2, 3]",
            "'w'[0, 0, 5]",
        ]
        assert summary.endswith(": 2 findings")
        status, out, _ = command("verify", source, target.parent, "--json")
        assert status == 1
        assert json.loads(out)["findings"] == findings

    def test_options(self, command, source, target):
        flip(target, "plain", 11)
        assert command("verify", source, target.parent, "--exclude", "plain")[0] == 0
        assert command("verify", source, target.parent, "--include", "w")[0] == 0
        assert command("verify", source, target.parent, "--transpose", "yes")[0] == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["gone"], "gone: no such file"),
            (["in", "gone"], "gone"),
            (["gone", "out"], "gone"),
            (["in", "empty"], "no .safetensors files"),
            (["in", "garbage"], "not a valid safetensors file"),
            (["in", "out", "--layout", "x"], "layout must be one of"),
            (["in", "damaged"], RECORD),
            (["broken", "out"], "half.scales"),
            ([], "SRC"),
        ],
        ids=" ".join,
    )
    def test_refusals(self, refused, tmp_path, monkeypatch, target, arguments, message):
        (tmp_path / "empty").mkdir()
        (tmp_path / "garbage").write_text("garbage")
        save(tmp_path / "broken" / "m.safetensors", {"half.blocks": np.zeros((2, 1, 16), np.uint8)})
        shutil.copytree(target.parent, tmp_path / "damaged")
        (tmp_path / "damaged" / RECORD).write_text("[1]")
        monkeypatch.chdir(tmp_path)
        assert message in refused("verify", *arguments)

    def test_names_do_not_steer_the_terminal(self, command, tmp_path):
        path = save(tmp_path / "in" / "m.safetensors", {"\x1b[2J": packed(2, 32, low=0, high=1), "\x1b[3J": np.ones(3)})
        save(tmp_path / "out" / "m.safetensors", {"\x1b[2J": np.ones((2, 32), np.float32)})
        status, out, _ = command("verify", path)
        assert status == 1
        assert "\x1b" not in out
        status, out, _ = command("verify", path, tmp_path / "out")
        assert status == 1
        assert out.count("\n") == 3
        assert "\x1b" not in out


def test_nan_blocks_of_zeros_and_missing_shards(tmp_path):
    """As `encode` writes them, and as tasks that were killed leave a folder."""
    values = np.zeros((4, 64), np.float32)
    values[1, 3] = np.nan
    mxfp4np.save_file({"w": mxfp4np.encode(values)}, tmp_path / "model-00002-of-00003.safetensors")
    result = mxfp4np.verify(tmp_path)
    assert result.nan_blocks == 1
    missing, nan = result.findings
    assert missing.endswith("2 of 3 files model-* are missing, number 1 is the first")
    assert nan == "tensor 'w': 1 of its blocks are NaN"


# What was encoded


FUSED = "model.layers.0.mlp.experts."
ENCODED = {  # sources of each layout; the last of them transposed
    "compressed-tensors": {"a.q_proj.weight": (64, 96), "lm_head.weight": (40, 64), "a.bias": (64,)},
    "mlx": {"a.switch_mlp.up_proj.weight": (3, 40, 96), "norm.weight": (64,)},
    "gpt-oss": {"block.0.mlp.mlp1_weight": (2, 192, 64), "block.0.mlp.mlp2_weight": (2, 64, 96), "x": (3, 5)},
    "gpt-oss-hf": {f"{FUSED}gate_up_proj": (2, 64, 192), f"{FUSED}down_proj": (2, 96, 64), "x": (3, 5)},
}


@pytest.fixture(params=ENCODED)
def encoded(request, tmp_path):
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in ENCODED[request.param].items()}
    save(tmp_path / "in" / "model.safetensors", tensors)
    mxfp4np.encode_checkpoint(
        tmp_path / "in", tmp_path / "out", layout=request.param, rule="floor", max_shard_size=9000
    )
    return tmp_path / "in", tmp_path / "out"


def packed_name(folder):
    with mxfp4np.Checkpoint(folder) as checkpoint:
        return next(info for info in map(checkpoint.info, checkpoint) if info.layout)


@pytest.mark.parametrize("piece_bytes", [256, 4 << 20])
def test_what_was_encoded_is_encoded_again(encoded, command, monkeypatch, piece_bytes):
    """By the rule and the axes that the record says; one byte of a code or scale is found, and where."""
    monkeypatch.setattr(verification, "CHUNK_BYTES", piece_bytes)
    source, target = encoded
    result = mxfp4np.verify(source, target, num_threads=2)
    with mxfp4np.Checkpoint(source) as plain:
        assert (result.findings, result.tensors) == ([], len(plain))
    info = packed_name(target)
    codes, scales = info.stored
    last = int(np.prod(scales.shape)) - 1
    flip(scales.file.path, scales.name, last)
    (finding,) = mxfp4np.verify(source, target).findings
    place = [size - 1 for size in info.shape[:-1]] + [info.shape[-1] // 32 - 1]
    assert f"tensor {info.name!r} block {place}: expected scale " in finding
    assert command("verify", source, target)[0] == 1
    flip(scales.file.path, scales.name, last)
    flip(codes.file.path, codes.name, 0)
    (finding,) = mxfp4np.verify(source, target).findings
    assert f"tensor {info.name!r} block {[0] * len(info.shape)}: expected scale " in finding
    assert mxfp4np.verify(source, target, exclude=info.name).findings == []


def test_what_was_encoded_otherwise(encoded):
    source, target = encoded
    assert mxfp4np.verify(source, target, rule="rceil").findings
    record = target / RECORD
    said = json.loads(record.read_text())
    record.unlink()  # of another tool: what is packed there is compared, by the default rule
    assert all("block" in finding for finding in mxfp4np.verify(source, target).findings)
    assert mxfp4np.verify(source, target, rule="floor").findings == []
    record.write_text(json.dumps({**said, "exclude": ["*"]}))
    assert all("as in the source" in finding for finding in mxfp4np.verify(source, target).findings)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t, name: t.pop(name), "no tensor"),
        (lambda t, name: t.update({name: np.zeros((64, 96), np.float32)}), "expected it packed, found F32"),
        (lambda t, name: t.update({name: packed(64, 64)}), r"expected shape \[64, 96\], found \[64, 64\]"),
        (lambda t, _: t.update(more=np.zeros(3)), "tensor 'more': in .*, but not in"),
        (lambda t, _: t.update(plain=np.zeros(3)), r"'plain'\[0\]: expected 1.0, found 0.0"),
    ],
)
def test_what_does_not_fit_what_was_encoded(tmp_path, change, expected):
    values = np.random.default_rng(0).normal(0, 1, (64, 96)).astype(np.float32)
    save(tmp_path / "in" / "model.safetensors", {"a.weight": values, "plain": np.ones(3)})
    mxfp4np.encode_checkpoint(tmp_path / "in", tmp_path / "out", layout="mlx")
    tensors = {"a.weight": mxfp4np.encode(values), "plain": np.ones(3)}
    change(tensors, "a.weight")
    save(tmp_path / "out" / "model.safetensors", tensors)
    (finding,) = mxfp4np.verify(tmp_path / "in", tmp_path / "out").findings
    assert re.search(expected, finding)


def test_encode_verifies_what_it_wrote(encoded, command, tmp_path):
    source, target = encoded
    options = ("--layout", json.loads((target / RECORD).read_text())["layout"], "--rule", "floor", "--verify")
    status, out, _ = command("encode", source, tmp_path / "again", *options)
    assert status == 0
    assert "nothing wrong" in out
    info = packed_name(target)
    flip(info.stored[0].file.path, info.stored[0].name, 0)
    status, out, _ = command(
        "encode", source, target, *options, "--resume", "--rule", "floor", "--max-shard-size", "9000"
    )
    assert status == 1
    assert "1 finding" in out
    status, out, _ = command("encode", source, target, *options, "--force", "--json")
    assert (status, json.loads(out)["verification"]["findings"]) == (0, [])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"include": 5}, "'include': expected a list of patterns"),
        ({"exclude": [["*"]]}, "'exclude': expected a list of patterns"),
        ({"drop": "*"}, "'drop': expected a list of patterns"),
        ({"transpose": ["auto"]}, "'transpose': expected auto or yes or no"),
        ({"include": ["[" * 100_000]}, "expected at most 1,000 patterns"),
        ({"include": ["?*"] * 2000}, "expected at most 1,000 patterns"),
        ({"include": json.loads("[" * 500 + "]" * 500)}, "nested more than 64 deep"),
    ],
)
def test_a_record_of_options_that_no_run_has(source, target, refused, options, says):
    folder = target.parent
    record = json.loads((folder / RECORD).read_text()) | options
    (folder / RECORD).write_text(json.dumps(record))
    assert says in refused("verify", source, folder)
    if "at most" not in says:
        message = refused("convert", source, folder, "--resume")
        assert says in message
        assert RECORD in message
