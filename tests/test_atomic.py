"""Files that appear when they are complete, under names of any length, and errors that name them."""

import errno
import os
import pickle
import re
from contextlib import nullcontext

import pytest

from mxfp4np.storage import atomic
from mxfp4np.storage.atomic import atomic_file, is_temporary, leftovers, make_folder, temporary_path
from mxfp4np.storage.named import NamedFile, named


def fail(number):
    def call(*_, **__):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("name", ["x", "n" * 255, "\N{SNOWMAN}" * 85, ".mxfp4np.json", "odd\nname"])
def test_any_name(tmp_path, name):
    path = tmp_path / name
    temporary = temporary_path(path)
    assert is_temporary(temporary.name)
    assert not is_temporary(name)
    assert len(temporary.name) < 64
    temporary.write_text("left")
    temporary_path(tmp_path / "other").write_text("left")
    assert leftovers([path, tmp_path / "missing" / "x"]) == {path: [temporary]}
    with atomic_file(path) as file:
        file.write(b"text")
        assert not path.exists()
        assert len(leftovers([path])[path]) == 2
    assert path.read_bytes() == b"text"


def test_exclusive(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(FileExistsError) as error, atomic_file(path, exclusive=True):
        path.write_bytes(b"theirs")
    assert error.value.filename == str(path)
    assert path.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_errors_name_the_file_and_not_the_temporary_one(tmp_path, monkeypatch, call, number):
    path = tmp_path / "x"
    monkeypatch.setattr(os, call, fail(number))
    with pytest.raises(OSError, match="cannot be written") as error, atomic_file(path) as file:
        file.write(b"text")
    assert (error.value.errno, error.value.filename) == (number, str(path))
    assert error.value.strerror == f"cannot be written: {os.strerror(number)}"
    assert type(error.value) is type(OSError(number, ""))
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    there = tmp_path / "there"
    with pytest.raises(OSError, match="be read") as error, atomic_file(tmp_path / "x"), named(there, "read"):
        fail(errno.EIO)()
    assert error.value.filename == str(there)
    with pytest.raises(OSError, match=r"^a sentence$"), named(tmp_path, "read"):
        raise OSError("a sentence")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "told"), [(errno.EIO, True), (errno.EINVAL, False), (errno.EACCES, False)])
def test_folders_that_cannot_be_synced(tmp_path, monkeypatch, number, told):
    """Some systems cannot do it at all; an error of the disk is one."""
    real, folder = os.fsync, tmp_path.stat().st_ino
    monkeypatch.setattr(os, "fsync", lambda fd: fail(number)() if os.fstat(fd).st_ino == folder else real(fd))
    with pytest.raises(OSError, match=str(tmp_path)) if told else nullcontext(), atomic_file(tmp_path / "x") as file:
        file.write(b"text")
    assert (tmp_path / "x").read_bytes() == b"text", "complete"


def test_new_folders_are_on_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(atomic, "_sync_folder", synced.append)
    make_folder(tmp_path / "a" / "b" / "c")
    assert synced == [tmp_path / "a" / "b", tmp_path / "a", tmp_path]
    synced.clear()
    make_folder(tmp_path / "a" / "b" / "c")
    assert synced == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(OSError, match=f"cannot be written: .*{re.escape(str(path))}"):
            make_folder(path)


def test_reads_go_on_until_they_have_everything(tmp_path):
    """The operating system may give less than was asked for."""
    reader, writer = os.pipe()
    with NamedFile(reader, "rb", tmp_path, "read") as file, os.fdopen(writer, "wb", buffering=0) as pipe:
        pipe.write(b"abc")
        pipe.write(b"defgh")
        assert file.read(2) == b"ab"
        pipe.close()
        assert file.read(5) == b"cdefg"
        assert file.read(5) == b"h"
        assert file.read(0) == file.read(1) == file.read() == b""
