"""Files of others: pipes, devices and files of the kernel are not waited for, and no more is read than there is."""

import os
from pathlib import Path

import pytest
from helpers import error_of, pair

import mxfp4np
from mxfp4np import CheckpointError
from mxfp4np.storage import regular

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")


@pytest.fixture
def source(tmp_path):
    (tmp_path / "src").mkdir()
    mxfp4np.save_file({"w": pair(2, 2)}, tmp_path / "src" / "model.safetensors")
    return tmp_path / "src"


def test_no_more_is_read_than_the_limit(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 50)
    with pytest.raises(CheckpointError, match="at most 49 bytes, found one of 50"):
        regular.read_regular(path, 49)
    read = regular.read_up_to

    def read_what_has_grown(file, count):
        with path.open("ab") as again:
            again.write(bytes(1000))
        return read(file, count)

    monkeypatch.setattr(regular, "read_up_to", read_what_has_grown)
    with regular.open_regular(path):
        path.write_bytes(b"x" * 50)
    monkeypatch.setattr(regular, "open_regular", lambda path: path.open("rb", buffering=0))
    assert len(regular.read_regular(path, 100)) == 100


@needs_pipes
@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json", "model.safetensors.index.json"])
def test_pipe_beside_the_weights(source, name):
    os.mkfifo(source / name)
    error = error_of(lambda: mxfp4np.Checkpoint(source) and mxfp4np.Checkpoint(source)._read_beside(name))
    assert isinstance(error, CheckpointError)
    assert f"{name}: not a regular file" in str(error)


@needs_pipes
@pytest.mark.parametrize("name", [".mxfp4np.json", "model.safetensors"])
def test_pipe_in_the_target(source, tmp_path, name):
    target = tmp_path / "dst"
    mxfp4np.convert(source, target)
    (target / name).unlink()
    os.mkfifo(target / name)
    error = error_of(lambda: mxfp4np.convert(source, target, resume=True))
    assert f"{name}: not a regular file" in str(error) or f"{name}: expected a regular file" in str(error)


@needs_pipes
def test_pipe_as_the_record_of_verify(source, tmp_path):
    mxfp4np.convert(source, tmp_path / "dst")
    (tmp_path / "dst" / ".mxfp4np.json").unlink()
    os.mkfifo(tmp_path / "dst" / ".mxfp4np.json")
    assert "not a regular file" in str(error_of(lambda: mxfp4np.verify(source, tmp_path / "dst")))


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("file", ["/proc/kmsg", "/proc/self/environ"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "other.gguf", "other.safetensors"])
def test_files_of_the_kernel_are_not_read(source, file, name):
    (source / name).symlink_to(file)
    error = error_of(
        lambda: mxfp4np.Checkpoint(source).config if name == "config.json" else mxfp4np.Checkpoint(source / name)
    )
    if isinstance(error, CheckpointError):
        assert "Expecting value" in str(error) or "is empty" in str(error) or "after 0 of" in str(error)
    else:
        assert isinstance(error, PermissionError | mxfp4np.BackendUnavailableError)  # GGUF needs its package


def test_read_up_to_ends_where_a_file_waits(tmp_path):
    class Waiting:
        def fileno(self):
            return descriptor

        def tell(self):
            return 0

        def read(self, count):
            assert count == 3
            # as a read that would wait

    (tmp_path / "x").write_bytes(b"abc")
    descriptor = os.open(tmp_path / "x", os.O_RDONLY)
    assert regular.read_up_to(Waiting(), 5) == b""
    os.close(descriptor)
