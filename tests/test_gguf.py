"""GGUF files, read through the gguf package and compared with what it decodes."""

import sys

import ml_dtypes
import numpy as np
import pytest
from contract import assert_same_bits, oracle
from helpers import BACKENDS, DATA, answers, both_io

import mxfp4np
from mxfp4np import CheckpointError
from mxfp4np.cli import main


def test_gguf_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(mxfp4np.BackendUnavailableError, match=r"model\.gguf: GGUF files need .*'mxfp4np\[gguf\]'"):
        mxfp4np.Checkpoint(DATA / "gguf")


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
                assert ckpt.info(name).dtype == name
                assert np.array_equal(ckpt[name], quantised[name])
            assert [piece.dtype for _, piece in ckpt.chunks("Q8_0")] == [np.uint8]
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
        with pytest.raises(CheckpointError, match=r"m\.gguf: not a valid GGUF file: GGUF magic invalid"):
            mxfp4np.Checkpoint(path)

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
