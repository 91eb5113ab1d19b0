"""Which files form a checkpoint: files, lists, folders and indexes, and what is refused."""

import errno
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from contract import run_python
from helpers import assert_same, both_io, pair, save_raw

import mxfp4np
from mxfp4np import CheckpointError, LayoutError


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def write_index(folder, weight_map=None, name="model.safetensors.index.json", **more):
    if weight_map is None:
        weight_map = {"w.blocks": "a.safetensors", "one": "a.safetensors"}
        weight_map |= {"w.scales": "b.safetensors", "two": "b.safetensors"}
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map, **more}))
    return folder / name


# Opening


@both_io
@pytest.mark.parametrize("as_type", [str, Path])
def test_open_by_folder_list_and_index(shards, io, as_type):
    files = [shards / "a.safetensors", shards / "b.safetensors"]
    index = write_index(shards)
    index.rename(shards / "kept")
    ways = [as_type(shards), [as_type(file) for file in files], tuple(files)]
    found = []
    for way in ways:
        with mxfp4np.Checkpoint(way, io=io) as ckpt:
            assert ckpt.files == files
            found.append({name: bits(ckpt[name]).tobytes() for name in ckpt})
    (shards / "kept").rename(index)
    for way in (as_type(index), as_type(shards)):
        with mxfp4np.Checkpoint(way, io=io) as ckpt:
            assert ckpt.files == files
            found.append({name: bits(ckpt[name]).tobytes() for name in ckpt})
    assert set(found[0]) == {"w", "one", "two"}
    assert all(other == found[0] for other in found)


@both_io
def test_open_one_file(shards, io):
    with mxfp4np.Checkpoint(shards / "a.safetensors", io=io) as ckpt:
        assert set(ckpt) == {"w", "one"}
        assert ckpt["one"].tolist() == [[0, 1, 2], [3, 4, 5]]
        with pytest.raises(LayoutError, match=r"a\.safetensors.*'w\.blocks'.*'w\.scales'"):
            ckpt["w"]


def test_file_without_the_usual_ending(tmp_path):
    path = save_raw(tmp_path / "weights.bin", {"x": np.ones(3)})
    assert mxfp4np.load_file(path)["x"].sum() == 3


def test_load_file(shards):
    loaded = mxfp4np.load_file(shards)
    assert set(loaded) == {"w", "one", "two"}
    assert_same(loaded["w"], pair(2, 3, 4).decode("bfloat16"))
    assert loaded["two"].tolist() == [1, 2, 3]  # the files are closed, the views live


def test_folder_with_index_ignores_other_files(shards):
    write_index(shards)
    save_raw(shards / "consolidated.safetensors", {"one": np.zeros(1), "three": np.zeros(1)})
    (shards / "broken.safetensors").write_bytes(b"broken")
    with mxfp4np.Checkpoint(shards) as ckpt:
        assert set(ckpt) == {"w", "one", "two"}


def test_folder_without_index_ignores_other_kinds_of_files(shards):
    (shards / "pytorch_model.bin.index.json").write_text("not JSON")
    (shards / "tokenizer.json").write_text("not JSON")
    (shards / "a.safetensors.tmp").write_text("nothing")
    assert set(mxfp4np.Checkpoint(shards)) == {"w", "one", "two"}


def test_name_in_two_files_names_both(shards):
    save_raw(shards / "c.safetensors", {"two": np.zeros(1)})
    with pytest.raises(CheckpointError, match=r"'two'.*b\.safetensors.*c\.safetensors"):
        mxfp4np.Checkpoint(shards)
    with pytest.raises(CheckpointError, match=r"'two'.*c\.safetensors.*b\.safetensors"):
        mxfp4np.Checkpoint([shards / "c.safetensors", shards / "b.safetensors"])


def test_folder_without_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        mxfp4np.Checkpoint(tmp_path)


@pytest.mark.parametrize("path", [[], ()])
def test_empty_list(path):
    with pytest.raises(FileNotFoundError, match="empty"):
        mxfp4np.Checkpoint(path)


@pytest.mark.parametrize("name", ["absent", "absent.safetensors", "absent.safetensors.index.json", "no/such/folder"])
def test_missing_path(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        mxfp4np.Checkpoint(tmp_path / name)


# Indexes


def test_index_that_names_a_missing_file(shards):
    index = write_index(shards)
    (shards / "b.safetensors").unlink()
    for path in (shards, index):
        with pytest.raises(FileNotFoundError, match=r"index\.json.*b\.safetensors"):
            mxfp4np.Checkpoint(path)


def test_index_that_names_many_missing_files(tmp_path):
    write_index(tmp_path, {f"t{i}": f"model-{i:05}.safetensors" for i in range(1000)})
    with pytest.raises(FileNotFoundError, match=r"1000 of the 1000.*model-00000\.safetensors") as info:
        mxfp4np.Checkpoint(tmp_path)
    assert len(str(info.value)) < 500


def test_index_with_the_wrong_shard(shards):
    write_index(shards, {"one": "b.safetensors", "w.blocks": "a.safetensors"})
    with pytest.raises(CheckpointError, match=r"index\.json.*'one'.*'b\.safetensors'.*'a\.safetensors'"):
        mxfp4np.Checkpoint(shards)


def test_index_with_an_absent_tensor(shards):
    write_index(shards, {"one": "a.safetensors", "three": "a.safetensors"})
    with pytest.raises(CheckpointError, match=r"index\.json.*'three'.*'a\.safetensors'"):
        mxfp4np.Checkpoint(shards)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "JSON"),
        (b"not JSON", "JSON"),
        (b'{"weight_map": {', "JSON"),
        (b"[]", "list"),
        (b"null", "NoneType"),
        (b'"text"', "str"),
        (b"\xff\xfe\xfd", "JSON"),
        (b"[" * 200_000, "JSON"),
        (b'{"a":' * 200_000, "JSON"),
        (b'{"weight_map": ' + b"1" * 10_000 + b"}", "JSON"),
        (b"{}", "weight_map"),
        (b'{"weight_map": null}', "weight_map"),
        (b'{"weight_map": {}}', "weight_map"),
        (b'{"weight_map": ["a.safetensors"]}', "weight_map"),
        (b'{"weight_map": "a.safetensors"}', "weight_map"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_malformed_index(shards, text, says):
    index = shards / "model.safetensors.index.json"
    index.write_bytes(text)
    for path in (shards, index):
        with pytest.raises(CheckpointError, match=says) as info:
            mxfp4np.Checkpoint(path)
        assert str(index) in str(info.value)


@pytest.mark.parametrize(
    "file",
    [None, 1, ["a.safetensors"], {}, "", "/etc/passwd", "../a.safetensors", "x/../../a.safetensors", ".."],
    ids=repr,
)
def test_index_may_not_name_files_elsewhere(shards, file):
    write_index(shards, {"w.blocks": "a.safetensors", "one": file})
    with pytest.raises(CheckpointError, match=r"index\.json: tensor 'one'.*found"):
        mxfp4np.Checkpoint(shards)


@pytest.mark.parametrize(
    "file", [".", "a\0.safetensors", "\ud800.safetensors", "x" * 5000], ids=lambda name: repr(name[:20])
)
def test_index_with_names_no_file_can_have(shards, file):
    write_index(shards, {"one": file})
    with pytest.raises((CheckpointError, OSError)):
        mxfp4np.Checkpoint(shards)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
def test_named_pipe_as_json_is_refused_and_does_not_hang(shards, name):
    os.mkfifo(shards / name)
    code = """
        import sys
        import mxfp4np

        try:
            mxfp4np.Checkpoint(sys.argv[1]).config
        except (mxfp4np.CheckpointError, OSError) as error:
            print(error)
    """
    try:
        output = run_python(code, shards, timeout=10)
    except subprocess.TimeoutExpired:
        pytest.fail("waits for ever")
    assert name in output


def test_several_indexes(shards):
    write_index(shards, name="first.safetensors.index.json")
    write_index(shards, name="second.safetensors.index.json")
    with pytest.raises(CheckpointError, match=r"first\.safetensors\.index\.json.*second\.safetensors\.index\.json"):
        mxfp4np.Checkpoint(shards)
    assert len(mxfp4np.Checkpoint(shards / "second.safetensors.index.json")) == 3
    write_index(shards, {"one": "a.safetensors"})
    assert mxfp4np.Checkpoint(shards).files == [shards / "a.safetensors"]


def test_one_index_of_another_name(shards):
    write_index(shards, {"one": "a.safetensors"}, name="consolidated.safetensors.index.json")
    assert mxfp4np.Checkpoint(shards).files == [shards / "a.safetensors"]


def test_index_of_files_in_a_folder_below(tmp_path):
    (tmp_path / "part").mkdir()
    save_raw(tmp_path / "part" / "x.safetensors", {"x": np.ones(3)})
    write_index(tmp_path, {"x": "part/x.safetensors"})
    assert mxfp4np.Checkpoint(tmp_path)["x"].sum() == 3


def test_symlink_loop_in_a_folder(shards):
    (shards / "loop.safetensors").symlink_to("loop.safetensors")
    with pytest.raises(OSError, match=r"loop\.safetensors") as info:
        mxfp4np.Checkpoint(shards)
    assert info.value.errno == errno.ELOOP
