"""Windows and macOS, by imitation: what Linux has and they lack is taken away, and what they refuse is refused."""

import json
import sys
from pathlib import PureWindowsPath

import pytest
from contract import run_python

import mxfp4np
from mxfp4np.backends import threads
from mxfp4np.storage import regular
from mxfp4np.storage.index import read_index

LACKING = """
import concurrent.futures, ctypes, errno, importlib, mmap, os, signal, sys, tempfile
import numpy as np, numba  # before anything is taken away
from pathlib import Path

LACKING = {
    os: "preadv pread sched_getaffinity sched_setaffinity fork register_at_fork O_NONBLOCK memfd_create",
    mmap: "MAP_PRIVATE MAP_ANONYMOUS PROT_READ MADV_DONTNEED MADV_SEQUENTIAL MADV_WILLNEED",
    signal: "SIGHUP SIGKILL",
}
for module, names in LACKING.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)

real = {name: getattr(os, name) for name in ("open", "replace", "rename", "unlink")}
read_text = Path.read_text

def held(path):
    '''Tell whether this process has a file open or mapped.'''
    path = os.path.realpath(path)
    links = [os.path.join("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    with open("/proc/self/maps") as maps:
        mapped = {line.split(maxsplit=5)[-1].strip() for line in maps}
    return path in mapped or any(os.path.realpath(link) == path for link in links)

def of_free_files(name):
    def call(*paths, **options):
        for path in paths:
            if held(path):
                raise PermissionError(errno.EACCES, "Access is denied", str(path))
        return real[name](*paths, **options)
    return call

def open_files_only(path, flags, *args, **options):
    if not isinstance(path, int) and os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return real["open"](path, flags, *args, **options)

def no_links(*_, **__):
    raise PermissionError(errno.EPERM, "Operation not permitted")

def of_no_kernel(self, *args, **options):
    if str(self).startswith(("/proc", "/sys")):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self))
    return read_text(self, *args, **options)

os.open, os.link, Path.read_text = open_files_only, no_links, of_no_kernel
os.replace, os.rename, os.unlink = (of_free_files(name) for name in ("replace", "rename", "unlink"))
import mxfp4np
from mxfp4np.cli import main
"""

needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at its open files in /proc")

COMMANDS = """
folder = Path(sys.argv[1], "C: drive", "my models")
folder.mkdir(parents=True)
os.chdir(folder)
name = "model.layers.0.mlp.experts.down_proj"
for words in (
    ["demo", "--size", "300kB", "--out", "a demo", "--quiet"],
    ["inspect", "a demo", "--stats", "--quiet"],
    ["bench", "a demo", "--size", "10kB", "--quiet"],
    ["decode", "a demo", name, "-o", "part.safetensors", "--quiet"],
    ["decode", "a demo", "*.0.*", "-o", "part.safetensors", "--quiet"],  # over the older one
    ["decode", "a demo", name, "-o", "part.npy", "--dtype", "fp32", "--quiet"],
    ["decode", "a demo", name, "-o", "part.npz", "--dtype", "fp32", "--quiet"],
    ["convert", "a demo", "bf16", "--verify", "--max-shard-size", "200kB", "--quiet"],
    ["convert", "a demo", "bf16", "--resume", "--max-shard-size", "200kB", "--quiet"],
    ["convert", "a demo", "bf16", "--force", "--io", "pread", "--quiet"],
    ["convert", "a demo", "tasks", "--task", "2/2", "--max-shard-size", "200kB", "--quiet"],
    ["convert", "a demo", "tasks", "--task", "1/2", "--max-shard-size", "200kB", "--quiet"],
    ["encode", "bf16", "again", "--verify", "--quiet"],
    ["verify", "a demo", "tasks", "--quiet"],
    ["verify", "again", "--quiet"],
):
    assert main(words) == 0, words
assert not [path for path in folder.rglob("*.tmp")]
with mxfp4np.Checkpoint("a demo") as mapped, mxfp4np.Checkpoint(folder / "a demo", io="pread") as read:
    for name in mapped:
        assert mapped[name].tobytes() == read[name].tobytes()
        assert mapped.get(name, index=np.s_[1:, ...]).tobytes() == read.get(name, index=np.s_[1:, ...]).tobytes()
"""


@needs_proc
def test_every_command_works_without_what_only_linux_has(tmp_path):
    assert run_python(LACKING + COMMANDS, tmp_path) == ""


@needs_proc
def test_a_file_that_is_mapped_cannot_be_replaced_there_and_stays_as_it_is(tmp_path):
    script = """
    path = Path(sys.argv[1], "m.safetensors")
    mxfp4np.save_file({"a": np.arange(3)}, path)
    with mxfp4np.Checkpoint(path) as ckpt:
        array = ckpt["a"]
        try:
            mxfp4np.save_file({"a": array + 1}, path)
        except OSError as error:
            assert str(error) == f"[Errno 13] cannot be written: Access is denied: {str(path)!r}", error
        else:
            raise AssertionError
        assert array.tolist() == mxfp4np.load_file(path)["a"].tolist() == [0, 1, 2]
    assert os.listdir(path.parent) == ["m.safetensors"]
    del array, ckpt
    mxfp4np.save_file({"a": np.arange(4)}, path)
    assert mxfp4np.Checkpoint(path, io="pread")["a"].tolist() == [0, 1, 2, 3]
    """
    run_python(LACKING + "\n".join(line[4:] for line in script.splitlines()), tmp_path)


@pytest.mark.parametrize(("cpus", "expected"), [(6, 6), (None, 1)])
def test_cpus_where_there_is_no_affinity(monkeypatch, cpus, expected):
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: cpus)
    monkeypatch.setattr(threads, "cgroup_cpus", lambda: float("inf"))
    assert threads.usable_cpus() == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x.safetensors", True),
        ("a/x.safetensors", True),
        (r"a\my x.safetensors", True),
        ("C:/x", False),
        (r"C:\x", False),
        ("C:x", False),
        (r"\x", False),
        (r"\\server\share\x", False),
        (r"a\..\..\x", False),
        ("", False),
    ],
)
def test_names_with_a_drive_lead_out_of_a_folder(tmp_path, monkeypatch, name, expected):
    monkeypatch.setattr(regular, "PurePath", PureWindowsPath)
    assert regular.is_below(name) == expected
    if not expected:
        (tmp_path / "i.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(mxfp4np.CheckpointError, match="expected a file below this folder"):
            read_index(tmp_path / "i.index.json")
