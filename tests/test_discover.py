"""Which files form a checkpoint: files, lists, folders and indexes, and what is refused."""

import errno
import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from contract import run_python
from helpers import assert_same, both_io, pair, save_raw

import mxfp4np
from mxfp4np import CheckpointError, LayoutError
from mxfp4np.storage.jsonfile import read_json


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


# What is in a folder

DOT = bytes.fromhex("0005160700020000") + b"Mac OS X        " + bytes(4072)


def save_all(folder, *names, **metadata):
    """Save a file for each name, which holds one tensor of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        save_raw(folder / name, {name.partition(".")[0]: np.full(4, len(name), np.uint8)}, metadata or None)
    return folder


def opened(path, **options):
    with mxfp4np.Checkpoint(path, **options) as ckpt:
        return [file.name for file in ckpt.files]


@pytest.mark.parametrize("indexed", [False, True])
def test_names_that_begin_with_a_dot_are_never_weights(shards, command, indexed):
    if indexed:
        write_index(shards)
    for name in ("a.safetensors", "b.safetensors", "model.safetensors", "m.gguf", "model.safetensors.index.json"):
        (shards / f"._{name}").write_bytes(DOT)
    (shards / "sub").mkdir()
    (shards / "sub" / "._x.safetensors").write_bytes(DOT)
    (shards / "sub" / "x.txt").write_text("kept")
    assert opened(shards) == ["a.safetensors", "b.safetensors"]
    assert command("verify", shards)[0] == 0
    assert command("convert", shards, shards / "out")[0] == 0
    assert (shards / "out" / "sub" / "x.txt").exists()
    (shards / "out" / "._model.safetensors").write_bytes(DOT)
    assert command("convert", shards, shards / "out", "--force")[0] == 0
    assert not list((shards / "out").glob("sub/._*"))


def test_only_names_that_begin_with_a_dot(tmp_path):
    (tmp_path / "._model.safetensors").write_bytes(DOT)
    (tmp_path / "._model.safetensors.index.json").write_bytes(DOT)
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors files"):
        mxfp4np.Checkpoint(tmp_path)


def test_endings_in_any_case(shards):
    (shards / "a.safetensors").rename(shards / "A.SAFETENSORS")
    (shards / "b.safetensors").rename(shards / "b.SafeTensors")
    assert set(mxfp4np.Checkpoint(shards)) == {"w", "one", "two"}
    write_index(shards, {"one": "A.SAFETENSORS"}, "MODEL.safetensors.INDEX.json")
    assert opened(shards) == ["A.SAFETENSORS"]
    assert opened(shards / "MODEL.safetensors.INDEX.json") == ["A.SAFETENSORS"]
    (shards / "Weights.PT").write_bytes(b"")
    assert "Weights.PT" in mxfp4np.convert(shards, shards / "out", exclude="w").left_out


def test_folder_below_holds_the_weights(tmp_path):
    save_all(tmp_path / "original", "m.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors files.*there are some in original"):
        mxfp4np.Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "consolidated.safetensors", "adapter_model.safetensors", "other.safetensors"], 1),
        (["model.safetensors", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], 1),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "consolidated.safetensors"], 2),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model_mtp.safetensors", "x.gguf"],
            3,
        ),
        (["model-1-of-2.safetensors", "model-2-of-2.safetensors", "adapter_model.safetensors", "draft.safetensors"], 2),
        (["x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors", "adapter_model.safetensors"], 2),
        (["model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"], 2),
        (["consolidated.safetensors", "adapter_model.safetensors"], 1),
        (["adapter_model.safetensors"], 1),
        (["w.uqff", "adapter_model.safetensors"], 1),
    ],
    ids=lambda value: value if isinstance(value, int) else " ".join(value),
)
def test_choice_without_an_index(tmp_path, command, names, chosen):
    save_all(tmp_path / "in", *names)
    with mxfp4np.Checkpoint(tmp_path / "in") as ckpt:
        assert [file.name for file in ckpt.files] == names[:chosen]
        assert sorted(file.name for file in ckpt.beside) == sorted(names[chosen:])
        assert ckpt.findings == []
    status, out, _ = command("inspect", tmp_path / "in")
    assert status == 0
    assert all((name in out) for name in names[chosen:])
    assert mxfp4np.convert(tmp_path / "in", tmp_path / "out").left_out == sorted(names[chosen:])


@pytest.mark.parametrize(
    "names",
    [
        ["consolidated.safetensors", "other.safetensors"],
        ["a-00001-of-00001.safetensors", "b-00001-of-00001.safetensors"],
        ["a-00001-of-00001.safetensors", "b.safetensors"],
        ["model-00001-of-00001.safetensors", "model.fp16-00001-of-00001.safetensors"],
        ["model-00001-of-00001.safetensors", "model-00001-of-00002.safetensors"],
        ["a.gguf", "b.gguf"],
    ],
    ids=" ".join,
)
def test_several_models_in_a_folder(tmp_path, refused, names):
    save_all(tmp_path, *names)
    with pytest.raises(CheckpointError, match="expected one model, found 2: ") as info:
        mxfp4np.Checkpoint(tmp_path)
    assert all(name in str(info.value) for name in names)
    assert "open one of them" in refused("inspect", tmp_path)


# An index decides


def test_index_decides_between_files_that_hold_the_same_tensor(shards):
    save_raw(shards / "c.safetensors", {"two": np.zeros(1), "three": np.ones(1)})
    weight_map = {"w.blocks": "a.safetensors", "one": "a.safetensors", "w.scales": "b.safetensors"}
    write_index(shards, {**weight_map, "two": "b.safetensors", "three": "c.safetensors"})
    with mxfp4np.Checkpoint(shards) as ckpt:
        assert ckpt["two"].tolist() == [1, 2, 3]
        assert set(ckpt) == {"w", "one", "two", "three"}
    write_index(shards, {**weight_map, "two": "./c.safetensors", "three": "c.safetensors"})
    with mxfp4np.Checkpoint(shards) as ckpt:
        assert ckpt["two"].tolist() == [0]
    assert mxfp4np.verify(shards).findings == []


def test_two_names_of_one_file_in_an_index(shards, command):
    weight_map = {"w.blocks": "a.safetensors", "one": "./a.safetensors", "w.scales": ".//b.safetensors"}
    write_index(shards, {**weight_map, "two": "././b.safetensors"})
    assert opened(shards) == ["a.safetensors", "b.safetensors"]
    assert command("verify", shards)[0] == 0


@pytest.mark.parametrize("age", [-1000, 1000])
def test_index_beside_a_file_that_it_does_not_name(shards, command, age):
    index = write_index(shards)
    assert mxfp4np.Checkpoint(shards).findings == []
    save_raw(shards / "model.safetensors", {"one": np.zeros(1)})
    time = index.stat().st_mtime + age
    os.utime(shards / "model.safetensors", (time, time))
    with pytest.warns(mxfp4np.CheckpointWarning, match=r"index\.json: does not name model\.safetensors") as caught:
        assert len(mxfp4np.Checkpoint(shards)["one"]) == 2
    assert ("newer" in str(caught[0].message)) == (age > 0)
    assert caught[0].filename == __file__
    (finding,) = mxfp4np.verify(shards).findings
    assert finding == str(caught[0].message)
    assert command("verify", shards)[0] == 1
    assert finding in command("inspect", shards)[1]
    assert json.loads(command("inspect", shards, "--json")[1])["findings"] == [finding]
    status, _, err = command("convert", shards, shards / "out")
    assert (status, err) == (0, f"mxfp4np: warning: {finding}\n")
    status, _, err = command("decode", shards, "w", "-o", shards / "out" / "w.safetensors")
    assert (status, err) == (0, f"mxfp4np: warning: {finding}\n")
    assert opened(shards / "model.safetensors") == ["model.safetensors"]


def test_index_whose_files_are_all_gone_beside_another_model(shards):
    write_index(shards, {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"})
    save_raw(shards / "model.safetensors", {"one": np.zeros(1)})
    with pytest.warns(mxfp4np.CheckpointWarning, match=r"none of its 2 files .* model\.safetensors is opened instead"):
        assert opened(shards) == ["model.safetensors"]
    write_index(shards, {"x": "model-00001-of-00002.safetensors", "one": "a.safetensors"})
    with pytest.raises(
        FileNotFoundError, match=r"1 of the 2 files.*model\.safetensors is there, open it by its own name"
    ):
        mxfp4np.Checkpoint(shards)


def test_index_of_another_name_yields_to_a_model(shards):
    write_index(shards, {"one": "a.safetensors"}, "consolidated.safetensors.index.json")
    save_raw(shards / "model.safetensors", {"one": np.zeros(1)})
    assert opened(shards) == ["model.safetensors"]
    write_index(shards, {"one": "model.safetensors"}, "consolidated.safetensors.index.json")
    assert mxfp4np.Checkpoint(shards).index is not None


# Numbered sets


def test_missing_parts(tmp_path, command, refused):
    source = save_all(tmp_path / "in", "model-00001-of-00005.safetensors", "model-00004-of-00005.safetensors")
    names = [f"model-0000{i}-of-00005.safetensors" for i in (2, 3, 5)]
    with pytest.warns(mxfp4np.CheckpointWarning, match=", ".join(names)):
        assert mxfp4np.Checkpoint(source).incomplete
    (finding,) = mxfp4np.verify(source).findings
    assert finding == (f"{source}: no {', '.join(names)}: 3 of 5 files model-* are missing, number 2 is the first")
    status, out, err = command("inspect", source)
    assert (status, err) == (0, "")
    assert finding in out
    for name in ("convert", "encode"):
        message = refused(name, source, tmp_path / "out")
        assert finding in message
        assert "download them, or give the files that are there" in message
    assert not (tmp_path / "out").exists()
    files = sorted(source.iterdir())
    assert mxfp4np.convert(files, tmp_path / "list").notes == [finding]
    (note,) = mxfp4np.convert(files[1], tmp_path / "one").notes
    assert "4 of 5 files" in note
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model-00001-of-00005": files[0].name}})
    )
    with pytest.warns(mxfp4np.CheckpointWarning, match="4 of 5 files"):
        assert mxfp4np.convert(source, tmp_path / "indexed").complete


def test_very_many_missing_parts(tmp_path):
    source = save_all(tmp_path / "in", "x-1-of-999999999.safetensors")
    with pytest.warns(mxfp4np.CheckpointWarning, match=r"no x-2-of-999999999\.safetensors, .*, \.\.\.: 999,999,998 of"):
        assert opened(source) == ["x-1-of-999999999.safetensors"]


# Folders of the Hub


@pytest.fixture
def cache(shards):
    """A repository's folder in the Hub's cache, of two revisions."""
    folder = shards / "models--org--model"
    save_all(folder / "snapshots" / "0123", "old.safetensors")
    (folder / "snapshots" / "4567").mkdir()
    (folder / "blobs").mkdir()
    (shards / "a.safetensors").rename(folder / "blobs" / "00aa")
    (folder / "snapshots" / "4567" / "model.safetensors").symlink_to("../../blobs/00aa")
    (folder / "snapshots" / "4567" / "tokenizer.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("4567\n")
    return folder


def test_folder_of_the_cache(cache):
    with mxfp4np.Checkpoint(cache) as ckpt:
        assert ckpt.files == [cache / "snapshots" / "4567" / "model.safetensors"]
        assert ckpt.folder == cache / "snapshots" / "4567"
    result = mxfp4np.convert(cache, cache / "out", exclude="w")
    assert (result.folder / "tokenizer.json").exists()


@pytest.mark.parametrize("ref", ["89ab", "../snapshots/0123", "", None])
def test_folder_of_the_cache_without_the_snapshot(cache, ref):
    (cache / "refs" / "main").write_text(ref) if ref is not None else (cache / "refs" / "main").unlink()
    with pytest.raises(FileNotFoundError, match=r"refs/main.*open one of snapshots/0123, snapshots/4567"):
        mxfp4np.Checkpoint(cache)


def test_folder_of_the_cache_with_one_snapshot_and_no_ref(cache):
    (cache / "refs" / "main").unlink()
    (cache / "snapshots" / "4567").rename(cache.parent / "away")
    assert opened(cache) == ["old.safetensors"]


@pytest.mark.parametrize("name", ["inspect", "verify", "convert"])
def test_repository_that_is_no_folder(refused, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    message = refused(name, "openai/gpt-oss-20b", *(["out"] if name == "convert" else []))
    assert "openai/gpt-oss-20b: " in message
    assert "hf download openai/gpt-oss-20b --local-dir gpt-oss-20b" in message
    (tmp_path / "openai").mkdir()
    assert "hf download" not in refused("inspect", "openai/gpt-oss-20b")
    assert "hf download" not in refused("inspect", "org/model.safetensors")
    assert "hf download" not in refused("inspect", tmp_path / "gpt-oss-20b")


# Pointers of Git LFS


@pytest.mark.parametrize(
    "name",
    ["m.gguf", "b.safetensors", "blob", "model.safetensors.index.json", "config.json"],
)
def test_pointers_of_git_lfs_are_refused(shards, refused, name):
    path = shards / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    source = path if name in ("m.gguf", "blob") else shards
    message = refused("convert", source, shards / "out")
    assert f"{path}: it is a pointer of Git LFS: get the file itself with git lfs pull" in message
    assert not (shards / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "sub/x.txt"])
def test_pointers_of_git_lfs_beside_weights_are_said(shards, command, name):
    path = shards / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    status, _, err = command("convert", shards, shards / "out")
    assert status == 0
    assert f"{path}: it is a pointer of Git LFS: get the file itself with git lfs pull; it is copied as it is" in err
    assert (shards / "out" / name).read_bytes() == path.read_bytes()


def test_index_is_parsed_once_and_fast(tmp_path, monkeypatch):
    save_raw(tmp_path / "a.safetensors", {"w": np.zeros(1)})
    names = {f"model.layers.{i}.weight": "gone.safetensors" for i in range(500_000)}
    write_index(tmp_path, {"w": "./a.safetensors"} | names)
    reads = []
    monkeypatch.setattr("mxfp4np.storage.index.read_json", lambda path: reads.append(path) or read_json(path))
    begin = time.process_time()
    with pytest.raises(FileNotFoundError, match="1 of the 2 files it names are missing"):
        mxfp4np.Checkpoint(tmp_path)
    assert len(reads) == 1
    assert time.process_time() - begin < 6
    write_index(tmp_path, {"w": "./a.safetensors"})
    assert mxfp4np.verify(tmp_path).findings == []
    assert len(reads) == 2


@pytest.mark.parametrize(
    ("weight_map", "found"),
    [
        (5, "found int"),
        ({}, "found no name"),
        (None, "found NoneType"),
        ({"w": 5}, "tensor 'w': expected a file below this folder, found int"),
        ({"w": ["a"]}, "found list"),
        ({"w": "x" * 5000 + "/../y"}, "expected a file below this folder"),
    ],
)
def test_index_of_other_values(shards, weight_map, found):
    write_index(shards, weight_map or {})
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=found):
        mxfp4np.Checkpoint(shards)


def test_set_of_very_many_parts(tmp_path):
    name = f"model-00001-of-{10**30}.safetensors"
    save_raw(tmp_path / name, {"w": np.zeros(1)})
    (finding,) = mxfp4np.verify(tmp_path).findings
    assert f"{10**30 - 1:,} of {10**30:,} files model-* are missing" in finding
