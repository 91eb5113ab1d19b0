"""GGUF files, read through the gguf package and compared with what it decodes."""

import pickle
import struct
import sys
import time
import tracemalloc
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from contract import assert_same_bits, oracle
from helpers import BACKENDS, DATA, answers, both_io, error_of, write_gguf

import mxfp4np
from mxfp4np import CheckpointError, LayoutError
from mxfp4np.cli import main


def test_gguf_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(mxfp4np.BackendUnavailableError, match=r"model\.gguf: GGUF files need .*'mxfp4np\[gguf\]'"):
        mxfp4np.Checkpoint(DATA / "gguf")


def blocks_of(kind, rows, count):
    """Return random bytes of a type, without the exponents that make infinities in most of its fields."""
    import gguf

    if kind not in gguf.GGMLQuantizationType.__members__:
        pytest.skip(f"gguf knows {kind} from 0.19 on")
    _, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return np.random.default_rng(7).integers(0, 120, (*rows, count * nbytes), np.uint8)


KINDS = [
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
    "IQ4_NL",
    "IQ4_XS",
    "TQ1_0",
    "TQ2_0",
    "NVFP4",
]


@pytest.mark.gguf
class TestOtherTypes:
    @pytest.fixture(autouse=True)
    def package(self):
        return pytest.importorskip("gguf", reason="needs the gguf extra; tox -e peers has it")

    @both_io
    @pytest.mark.parametrize("kind", KINDS)
    def test_values_are_those_of_the_package(self, tmp_path, package, kind, io, monkeypatch):
        monkeypatch.setattr("mxfp4np.layouts.gguf.CHUNK_BYTES", 4096)
        raw = blocks_of(kind, (2, 3), 2)
        with np.errstate(all="ignore"):
            values = package.dequantize(raw, package.GGMLQuantizationType[kind])
            rounded = {name: values.astype(name) for name in ("float16", "float32", ml_dtypes.bfloat16)}
        with mxfp4np.Checkpoint(write_gguf(tmp_path / "m.gguf", {"w": (kind, raw)}), io=io) as ckpt:
            assert ckpt.info("w").shape == values.shape
            assert (ckpt.info("w").dtype, ckpt.info("w").reason) == (kind, f"tensor type, {kind}")
            assert ckpt.info("w").decoded_nbytes() == ckpt["w"].nbytes
            for name, expected in rounded.items():
                assert_same_bits(ckpt.get("w", name), expected)
            with pickle.loads(pickle.dumps(ckpt)) as again:
                assert_same_bits(again["w"], rounded[ml_dtypes.bfloat16])
            for index in np.s_[1], np.s_[..., 5:50], np.s_[::-1, [0, 2], 33:], np.s_[0, 1, 7:7]:
                assert_same_bits(ckpt.get("w", "float32", index=index), values[index])
            assert_same_bits(ckpt.get("w", "float32", transpose=True), values.swapaxes(-1, -2))
            out = np.zeros(values.shape[::-1], np.float32).T
            assert ckpt.get("w", out=out) is out
            assert_same_bits(out, values)
            for transpose in (False, True):
                whole = np.zeros_like(values.swapaxes(-1, -2) if transpose else values)
                for place, chunk in ckpt.chunks("w", 2048, dtype="float32", transpose=transpose):
                    assert chunk.nbytes <= 2048
                    whole[place] = chunk
                assert_same_bits(whole, values.swapaxes(-1, -2) if transpose else values)
            with pytest.raises(LayoutError, match=f"'w' is {kind}, not MXFP4, FP8, MXFP8 or NVFP4: use get"):
                ckpt.packed("w")
            for wrong in (np.zeros(3, np.float32), np.zeros(values.shape, np.int8)):
                with pytest.raises(ValueError, match=r"out must have|decode to"):
                    ckpt.get("w", out=wrong)

    def test_convert_decodes_and_verifies(self, tmp_path, package, command):
        x = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
        raw = {kind: package.quantize(x, package.GGMLQuantizationType[kind]) for kind in ("Q8_0", "Q4_0")}
        path = write_gguf(tmp_path / "m.gguf", {kind: (kind, array) for kind, array in raw.items()} | {"x": ("F32", x)})
        assert command("convert", path, tmp_path / "out", "--verify", "--dtype", "float16")[0] == 0
        assert command("verify", path, tmp_path / "out")[0] == 0
        with mxfp4np.Checkpoint(tmp_path / "out") as ckpt:
            for kind, array in raw.items():
                expected = package.dequantize(array, package.GGMLQuantizationType[kind])
                assert_same_bits(ckpt[kind], expected.astype(np.float16))
        assert command("verify", path)[0] == 0
        assert "Q8_0    8x64   Q8_0   gguf" in command("inspect", path, "--stats")[1]
        assert (
            command("decode", path, "Q8_0", "--index", "1,3:40", "--dtype", "float32", "-o", tmp_path / "q.npy")[0] == 0
        )
        expected = package.dequantize(raw["Q8_0"], package.GGMLQuantizationType.Q8_0)
        assert_same_bits(np.load(tmp_path / "q.npy"), expected[1, 3:40])
        found = mxfp4np.load_file(path, dtype="float32")
        assert_same_bits(found["Q8_0"], expected)

    @pytest.mark.parametrize(
        ("kind", "named"),
        [("Q8_1", "Q8_1"), ("Q8_K", "Q8_K"), (99, "GGML type 99"), ("NVFP4", "NVFP4 with a second scale")],
    )
    def test_types_that_are_not_decoded(self, tmp_path, refused, command, kind, named):
        raw = blocks_of(kind if isinstance(kind, str) else "Q8_0", (2,), 8)
        x = np.ones((2, 32), np.float32)
        path = write_gguf(
            tmp_path / "m.gguf", {"a.weight": (kind, raw), "a.scale": ("F32", x[:1, :1]), "x": ("F32", x)}
        )
        with mxfp4np.Checkpoint(path) as ckpt:
            info = ckpt.info("a.weight")
            assert (info.format, info.layout, info.shape[0]) == (named, None, 2)
            assert ckpt.stored["a.weight"].reshape(-1)[: raw.size].tobytes() == raw.tobytes()
            for call in (ckpt.get, partial(ckpt.get, dtype="float32"), lambda name: next(ckpt.chunks(name))):
                with pytest.raises(LayoutError, match=f"'a.weight' is {named}, which is not decoded"):
                    call("a.weight")
            assert_same_bits(ckpt["x"], x)
        assert f"tensor 'a.weight' is {named}, which is no dtype of safetensors" in refused(
            "convert", path, tmp_path / "out"
        )
        assert named in command("inspect", path)[1]
        assert command("verify", path)[0] == 0

    def test_rows_of_no_whole_blocks(self, tmp_path):
        path = write_gguf(tmp_path / "m.gguf", {"w": ("Q8_0", blocks_of("Q8_0", (2,), 2))})
        data = path.read_bytes()
        at = data.index(b"\x01" + bytes(7) + b"w") + 9 + 4
        path.write_bytes(data[:at] + (65).to_bytes(8, "little") + data[at + 8 :])
        with pytest.raises(CheckpointError, match=r"rows of Q8_0 have a multiple of 32 values, found shape \[2, 65\]"):
            mxfp4np.Checkpoint(path)

    def test_two_tensors_of_one_name(self, tmp_path):
        path = write_gguf(
            tmp_path / "m.gguf", {"one": ("F32", np.ones(8, np.float32)), "two": ("F32", np.ones(8, np.float32))}
        )
        path.write_bytes(path.read_bytes().replace(b"two", b"one"))
        with pytest.raises(CheckpointError, match="two tensors are called 'one'"):
            mxfp4np.Checkpoint(path)


@pytest.mark.gguf
class TestGGUF:
    @pytest.fixture(autouse=True)
    def package(self):
        return pytest.importorskip("gguf", reason="needs the gguf extra; tox -e peers has it")

    @both_io
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_sample(self, io, backend):
        expected = answers("gguf")
        with mxfp4np.Checkpoint(DATA / "gguf", io=io) as ckpt:
            assert set(ckpt) == set(expected)
            for name, values in expected.items():
                found = ckpt.get(name, dtype="float32", backend=backend)
                assert np.array_equal(found, values)
                index = np.s_[1:3, ..., 5:77]
                if values.ndim > 1:
                    assert ckpt.info(name).layout == "gguf"
                    assert ckpt.info(name).reason == "tensor type, MXFP4"
                    assert np.array_equal(ckpt.get(name, dtype="float32", backend=backend, index=index), values[index])
                    shares = np.shares_memory(ckpt.packed(name).blocks, ckpt.stored[name])
                    assert shares == (io == "mmap")
                for place, piece in ckpt.chunks(name, 4096, dtype="float32", backend=backend):
                    assert np.array_equal(piece, values[place])

    def test_every_byte_under_every_scale_but_nan_is_what_gguf_gives(self, tmp_path, package):
        memory = np.empty((255, 16, 17), np.uint8)
        memory[..., 0] = np.arange(255)[:, None]
        memory[..., 1:] = np.arange(256).reshape(16, 16)
        mxfp4 = package.GGMLQuantizationType.MXFP4
        writer = package.GGUFWriter(tmp_path / "m.gguf", "llama")
        writer.add_tensor("w", memory.reshape(255, -1), raw_dtype=mxfp4)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with mxfp4np.Checkpoint(tmp_path / "m.gguf") as ckpt:
            for dtype in ("bfloat16", "float16", "float32"):
                expected = oracle(memory[..., 1:], memory[..., 0], dtype, "halves")
                assert_same_bits(ckpt.get("w", dtype=dtype), expected)
            found = ckpt.get("w", dtype="float32")
            with np.errstate(over="ignore"):
                theirs = package.dequantize(memory.reshape(255, -1), mxfp4)
            assert np.array_equal(found, theirs)
            assert np.signbit(found).sum() > np.signbit(theirs).sum()  # -0.0 is kept here

    def test_all_other_types(self, tmp_path, package):
        rng = np.random.default_rng(0)
        arrays = {kind: rng.normal(size=(3, 64)).astype(kind) for kind in ("float16", "float32", "float64")}
        arrays |= {kind: rng.integers(-9, 9, (2, 3, 5)).astype(kind) for kind in ("int8", "int16", "int32", "int64")}
        types = package.GGMLQuantizationType
        quantised = {name: package.quantize(arrays["float32"], types[name]) for name in ("BF16", "Q8_0", "Q4_0")}
        writer = package.GGUFWriter(tmp_path / "m.gguf", "llama")
        writer.add_string("general.name", "test")
        for name, array in arrays.items():
            writer.add_tensor(name, array)
        for name, array in quantised.items():
            writer.add_tensor(name, array.view(np.uint8), raw_dtype=types[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with mxfp4np.Checkpoint(tmp_path / "m.gguf") as ckpt:
            assert ckpt.metadata["general.name"] == "test"
            for name, array in arrays.items():
                assert_same_bits(ckpt[name], array)
            assert ckpt.info("BF16").dtype == "BF16"
            assert ckpt["BF16"].dtype == ml_dtypes.bfloat16
            assert ckpt["BF16"].shape == (3, 64)
            assert np.allclose(ckpt["BF16"].astype(np.float32), arrays["float32"], rtol=2**-8)
            for name in ("Q8_0", "Q4_0"):
                assert ckpt.info(name)[:4] == (name, (3, 64), name, "gguf")
                assert ckpt.info(name).format == name
                assert np.array_equal(ckpt.stored[name], quantised[name])
            assert [piece.dtype for _, piece in ckpt.chunks("Q8_0")] == [ml_dtypes.bfloat16]
        assert main(["inspect", str(tmp_path / "m.gguf")]) == 0

    @pytest.mark.parametrize("size", [0, 3, 20, 60, 200, 20_000])
    def test_truncated(self, tmp_path, size):
        path = tmp_path / "m.gguf"
        path.write_bytes((DATA / "gguf" / "model.gguf").read_bytes()[:size])
        with pytest.raises(CheckpointError, match=r"m\.gguf: "):
            mxfp4np.Checkpoint(path)

    def test_not_gguf(self, tmp_path):
        path = tmp_path / "m.gguf"
        path.write_bytes((DATA / "mlx" / "model.safetensors").read_bytes())
        with pytest.raises(CheckpointError, match=r"m\.gguf: not a valid GGUF file: it begins with .* another kind"):
            mxfp4np.Checkpoint(path)

    @pytest.mark.parametrize("start", [b"", bytes(4096), b"<!doctype html>"])
    def test_not_gguf_says_what_it_is(self, tmp_path, start):
        (tmp_path / "m.gguf").write_bytes(start)
        with pytest.raises(CheckpointError, match=r"is empty: it is damaged|begins with zeros|<!doctyp.* another kind"):
            mxfp4np.Checkpoint(tmp_path / "m.gguf")

    @staticmethod
    def split(package, folder, count=3, ending="gguf"):
        """Write a split file, a tensor to each part."""
        for number in range(1, count + 1):
            writer = package.GGUFWriter(folder / f"m-mxfp4-{number:05}-of-{count:05}.{ending}", "gpt-oss")
            writer.add_uint16("split.no", number - 1)
            writer.add_uint16("split.count", count)
            writer.add_tensor(f"blk.{number}.norm", np.full(4, number, np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        return folder / f"m-mxfp4-00001-of-{count:05}.{ending}"

    @pytest.mark.parametrize("ending", ["gguf", "GGUF"])
    def test_first_part_opens_all(self, tmp_path, command, package, ending):
        first = self.split(package, tmp_path, ending=ending)
        (tmp_path / "._m-mxfp4-00002-of-00003.gguf").write_bytes(b"sidecar")
        (tmp_path / "mmproj-m.gguf").write_bytes(b"not looked at")
        for path in (first, tmp_path):
            with mxfp4np.Checkpoint(path) as ckpt:
                assert [int(ckpt[f"blk.{i}.norm"][0]) for i in (1, 2, 3)] == [1, 2, 3]
                assert len(ckpt) == 3
                assert ckpt.findings == []
        assert f"m-mxfp4-00003-of-00003.{ending}" in command("inspect", first)[1]
        assert command("verify", first)[0] == 0
        status, _, err = command("convert", first, tmp_path / "out")
        assert status == 0
        assert "3 parts are opened" in err
        assert len(mxfp4np.Checkpoint(tmp_path / "out")) == 3
        with mxfp4np.Checkpoint(tmp_path / "out") as ckpt:
            assert ckpt.metadata == {"format": "pt"}

    def test_first_part_of_an_incomplete_set(self, tmp_path, command, refused, package):
        first = self.split(package, tmp_path)
        (tmp_path / "m-mxfp4-00002-of-00003.gguf").unlink()
        for path in (first, tmp_path):
            assert "no m-mxfp4-00002-of-00003.gguf: 1 of 3" in refused("convert", path, tmp_path / "out")
            assert "no m-mxfp4-00002-of-00003.gguf: 1 of 3" in command("inspect", path)[1]
            assert command("verify", path)[0] == 1
        assert mxfp4np.convert([first], tmp_path / "out").complete

    def test_other_parts_are_opened_alone(self, tmp_path, command, package):
        self.split(package, tmp_path)
        second = tmp_path / "m-mxfp4-00002-of-00003.gguf"
        assert list(mxfp4np.Checkpoint(second)) == ["blk.2.norm"]
        assert command("verify", second)[0] == 1

    def test_part_under_another_name(self, tmp_path, command, package):
        blob = self.split(package, tmp_path).rename(tmp_path / "sha256-0a")
        (finding,) = mxfp4np.verify(blob).findings
        assert "sha256-0a: the header says that it is one of 3 files, 1 opened" in finding
        assert finding in command("inspect", blob)[1]
        assert f"mxfp4np: warning: {finding}\n" in command("convert", blob, tmp_path / "out")[2]
        assert mxfp4np.verify([blob, *tmp_path.glob("*.gguf")]).findings != []
        for i, path in enumerate(sorted(tmp_path.glob("*.gguf"))):
            path.rename(tmp_path / f"sha256-{i}")
        assert mxfp4np.verify(sorted(tmp_path.glob("sha256-*"))).findings == []

    @pytest.mark.parametrize("name", ["sha256-0a", "weights.bin", "M.GGUF"])
    def test_file_without_the_usual_ending(self, tmp_path, name):
        (tmp_path / name).write_bytes((DATA / "gguf" / "model.gguf").read_bytes())
        assert set(mxfp4np.Checkpoint(tmp_path / name)) == set(answers("gguf"))


# Files of strangers: numbers are bounded by the file, whatever they claim


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return len(data).to_bytes(8, "little") + data


def array(kind, count, data=b""):
    return struct.pack("<IIQ", 9, kind, count) + data


def gguf_bytes(values=(), tensors=(), data=b"", counts=None, alignment=32):
    """Build a file by hand: values are (key, type and bytes), tensors (name, dims, type, offset)."""
    counts = counts or (len(tensors), len(values))
    head = b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(text(key) + value for key, value in values)
    for name, dims, kind, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return head + bytes(-len(head) % alignment) + data


DEEP = array(9, 1)[4:] * 30_000
HOSTILE = {
    "an array of 2**60 numbers": (gguf_bytes([("a", array(4, 2**60))]), "goes on after the end"),
    "of 2**60 texts": (gguf_bytes([("a", array(8, 2**60))]), "goes on after the end"),
    "of 2**60 arrays": (gguf_bytes([("a", array(9, 2**60))]), "goes on after the end"),
    "of 2**64 - 1 arrays": (gguf_bytes([("a", array(9, 2**64 - 1, DEEP))]), "goes on after the end"),
    "text of 2**63 bytes": (gguf_bytes([("a", struct.pack("<IQ", 8, 2**63))]), "goes on after the end"),
    "a text in an array of 2**64 - 1": (gguf_bytes([("a", array(8, 2, b"\xff" * 8))]), "goes on after the end"),
    "2**62 values": (gguf_bytes(counts=(0, 2**62)), "goes on after the end"),
    "2**62 tensors": (gguf_bytes(counts=(2**62, 0)), "goes on after the end"),
    "2**31 axes": (gguf_bytes([], [("w", [1], 0, 0)]).replace(b"w\1", b"w\xff"), "at most 64 axes, found 255"),
    "an unknown type of value": (gguf_bytes([("a", struct.pack("<I", 13))]), "type of metadata, found number 13"),
    "unknown in an array": (gguf_bytes([("a", array(77, 1))]), "type of metadata, found number 77"),
    "a key twice": (gguf_bytes([("a", b"\4\0\0\0" * 2)] * 2), "two values are called 'a'"),
    "alignment 3": (gguf_bytes([("general.alignment", struct.pack("<II", 4, 3))]), "power of two"),
    "alignment of text": (gguf_bytes([("general.alignment", struct.pack("<I", 8) + text("x"))]), "found 'x'"),
    "version 4": (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "expected version 2 or 3, found 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "found a big-endian one"),
    "header as data": (gguf_bytes([], [("w", [4], 0, 2**64 - 64)], bytes(64)), "expected bytes up to"),
    "beyond the end": (gguf_bytes([], [("w", [4], 0, 64)], bytes(64)), "found a file of"),
    "an unknown type beyond the end": (gguf_bytes([], [("w", [4], 99, 2**40)], bytes(64)), "found a file of"),
    "not aligned": (gguf_bytes([], [("w", [4], 0, 8)], bytes(64)), "multiple of 32, found 8"),
    "overlap": (gguf_bytes([], [("w", [16], 0, 0), ("v", [8], 0, 32)], bytes(64)), "'w' and 'v' overlap"),
    "the same bytes": (gguf_bytes([], [("w", [8], 0, 0), ("v", [8], 0, 0)], bytes(64)), "overlap"),
    "a shape of 2**62": (gguf_bytes([], [("w", [2**31, 2**31], 0, 0)], bytes(64)), "no array can have shape"),
    "no rows of blocks": (gguf_bytes([], [("w", [32, 0], 39, 0)], bytes(64)), "rows of MXFP4"),
    "a name that is no text": (gguf_bytes([], [(b"\xff", [8], 0, 0)], bytes(64)), "codec can't decode"),
    "parts that are no number": (gguf_bytes([("split.count", struct.pack("<I", 8) + text("x"))]), "invalid literal"),
}


@pytest.mark.gguf
class TestHostile:
    @pytest.fixture(autouse=True)
    def package(self):
        return pytest.importorskip("gguf", reason="needs the gguf extra; tox -e peers has it")

    @both_io
    @pytest.mark.parametrize(("content", "says"), HOSTILE.values(), ids=HOSTILE)
    def test_hostile_file_is_refused_by_name_and_fast(self, tmp_path, content, says, io):
        (tmp_path / "m.gguf").write_bytes(content)
        error = error_of(lambda: mxfp4np.Checkpoint(tmp_path / "m.gguf", io=io))
        assert isinstance(error, CheckpointError), repr(error)
        assert str(error).startswith(f"{tmp_path}/m.gguf: not a valid GGUF file: ")
        assert says in str(error)

    def test_what_is_unusual_and_true(self, tmp_path):
        values = [
            ("deep", array(9, 1, DEEP + array(4, 2, bytes(8))[4:])),
            ("several", array(9, 2, array(8, 1, text("x"))[4:] + array(0, 3, b"abc")[4:])),
            ("general.alignment", struct.pack("<II", 4, 8)),
            ("true", struct.pack("<I?", 7, True)),
            ("half", struct.pack("<If", 6, 0.5)),
            ("large", struct.pack("<IQ", 10, 2**64 - 1)),
            ("größe", struct.pack("<I", 8) + text("中")),
        ]
        tensors = [("b", [2, 3], 0, 32), ("scalar", [], 0, 8), ("none", [0], 0, 8), ("x", [3], 99, 16)]
        data = np.arange(14, dtype=np.float32).tobytes()
        (tmp_path / "m.gguf").write_bytes(gguf_bytes(values, tensors, data, alignment=8))
        with mxfp4np.Checkpoint(tmp_path / "m.gguf") as ckpt:
            assert {key: ckpt.metadata[key] for key in ("true", "half", "large", "größe")} == {
                "true": "True",
                "half": "0.5",
                "large": str(2**64 - 1),
                "größe": "中",
            }
            assert not {"deep", "several"} & ckpt.metadata.keys()
            assert ckpt["b"].tolist() == [[8, 9], [10, 11], [12, 13]]
            assert ckpt["scalar"] == 2
            assert ckpt["none"].shape == (0,)
            assert ckpt.stored["x"].nbytes == 16

    def test_vocabulary_is_skipped(self, tmp_path):
        tokens = b"".join(text(f"token {i}") for i in range(201_088))
        merges = b"".join(text(f"one{i} two{i}") for i in range(446_189))
        values = [("tokens", array(8, 201_088, tokens)), ("types", array(5, 201_088, bytes(4 * 201_088)))]
        values += [("merges", array(8, 446_189, merges)), ("name", struct.pack("<I", 8) + text("x"))]
        (tmp_path / "m.gguf").write_bytes(gguf_bytes(values, [("w", [8], 0, 0)], bytes(32)))
        mxfp4np.Checkpoint(tmp_path / "m.gguf").close()
        tracemalloc.start()
        begin = time.process_time()
        with mxfp4np.Checkpoint(tmp_path / "m.gguf") as ckpt:
            assert ckpt.metadata["name"] == "x"
            assert list(ckpt) == ["w"]
        seconds, peak = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 << 20
        assert seconds < 5
