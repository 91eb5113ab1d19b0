"""Checkpoints that lie elsewhere: the same tensors and errors as on disk, few requests, and servers that misbehave."""

import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import urllib.request
from datetime import timedelta
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_same, error_of, pair, save_raw, write_gguf
from hypothesis import given
from hypothesis import strategies as st
from servers import STALL_SECONDS, Server, hub, misbehave, nginx, range_of, send_file, serve_files

import mxfp4np
from mxfp4np import BackendUnavailableError, Checkpoint, CheckpointError, MXFP4Error, RemoteError
from mxfp4np.storage import remote, stores
from mxfp4np.storage.discover import find_files
from mxfp4np.storage.remote import RemotePath
from mxfp4np.storage.stores import TIMEOUT, mask
from mxfp4np.storage.tensorfile import AHEAD

obstore = pytest.importorskip("obstore", reason="needs obstore: python -m pip install 'mxfp4np[remote]'")

COMMITS = ("0" * 39 + "1", "0" * 39 + "2")
NAME = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of two shards with an index, config.json and a tokenizer, as `convert` knows them."""
    folder = tmp_path_factory.mktemp("model")
    packed, bias = pair(4, 6, 2), np.arange(24, dtype=np.float32).reshape(4, 6).astype(ml_dtypes.bfloat16)
    one = {f"{NAME}_blocks": packed.blocks, f"{NAME}_bias": bias, "empty": np.zeros((0, 3), np.int32)}
    two = {f"{NAME}_scales": packed.scales, "norm": np.arange(5.0), "scalar": np.float32(3)}
    parts = {"model-00001-of-00002.safetensors": one, "model-00002-of-00002.safetensors": two}
    for file, arrays in parts.items():
        save_raw(folder / file, {name: np.asarray(array) for name, array in arrays.items()}, {"format": "pt"})
    weight_map = {name: file for file, arrays in parts.items() for name in arrays}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    quantization = {"quantization_config": {"quant_method": "mxfp4"}, "model_type": "gpt_oss"}
    (folder / "config.json").write_text(json.dumps(quantization))
    (folder / "tokenizer.json").write_text('{"tokens": []}')
    return folder


@pytest.fixture(scope="module")
def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    """Wait less than usual, and find no credentials of the user."""
    monkeypatch.setenv(TIMEOUT, "1")
    monkeypatch.setattr(stores, "RETRIES", 2)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "nothing"))
    for name in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_ENDPOINT", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def s3(files):
    """The URL of the checkpoint in a bucket of moto's server, which is set as the endpoint."""
    server = pytest.importorskip("moto.server", reason="needs moto: python -m pip install 'moto[server]'")
    moto = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    url = "http://{}:{}".format(*moto.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "KEY",
            "AWS_SECRET_ACCESS_KEY": "SECRET",
            "AWS_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
        bucket = obstore.store.S3Store("bucket", client_options={"allow_http": True})
        for name, data in files.items():
            bucket.put(f"a/model/{name}", data)
        bucket.put("a/model/original/model.safetensors", b"another one")
        yield "s3://bucket/a/model/"
    moto.stop()


PLACES = ("memory", "local", "web", "index", "list", "hub", "s3")


@pytest.fixture(params=PLACES)
def place(request, folder, files, monkeypatch):
    """The checkpoint, by each way to reach it."""
    if request.param == "memory":
        store = obstore.store.MemoryStore()
        for name, data in files.items():
            store.put(name, data)
        yield store
    elif request.param == "local":
        yield obstore.store.LocalStore(folder)
    elif request.param == "s3":
        yield request.getfixturevalue("s3")
    elif request.param == "hub":
        with hub({("org/name", "main"): (COMMITS[0], files)}) as (server, _):
            monkeypatch.setenv("HF_ENDPOINT", server.url)
            yield "hf://org/name"
    else:
        with serve_files({f"model/{name}": data for name, data in files.items()}) as server:
            url = f"{server.url}/model"
            shards = [f"{url}/{name}" for name in sorted(files) if name.endswith(".safetensors")]
            yield {"web": url, "index": f"{url}/model.safetensors.index.json", "list": shards}[request.param]


INDICES = (None, 1, -1, np.s_[1:3], np.s_[::2], np.s_[::-1], np.s_[..., 3:40], np.s_[1, 2:4], [0, 2], np.s_[1:1])


def test_same_as_on_disk(place, folder):
    with Checkpoint(folder) as ours, Checkpoint(place) as theirs:
        assert list(theirs) == list(ours)
        assert theirs.metadata == ours.metadata
        assert theirs.config == (ours.config if not isinstance(place, list) else theirs.config)
        assert [file.name for file in theirs.files] == [file.name for file in ours.files]
        for name in ours:
            assert_same(theirs[name], ours[name])
            assert theirs.info(name)[:4] == ours.info(name)[:4]
        for name in ours.stored:
            assert_same(theirs.stored[name], ours.stored[name])
        for index in INDICES:
            assert_same(theirs.get(NAME, index=index), ours.get(NAME, index=index))
            assert_same(theirs.get(f"{NAME}_bias", index=index), ours.get(f"{NAME}_bias", index=index))
        out = np.empty((4, 6, 64), np.float16)
        theirs.get(NAME, out=out)
        assert_same(out, ours.get(NAME, "float16"))
        assert_same(theirs[f"{NAME}/gate"], ours[f"{NAME}/gate"])
        assert_same(theirs.packed(NAME)[3].decode(), ours.packed(NAME)[3].decode())
        for index, chunk in theirs.chunks(NAME, 500):
            assert_same(chunk, ours[NAME][index])
        assert not theirs.changed_files()
    with pytest.raises(CheckpointError, match="closed"):
        theirs.get("norm")


@pytest.mark.parametrize("place", [place for place in PLACES if place != "memory"], indirect=True)
def test_pickled(place):
    with Checkpoint(place) as ckpt:
        stored = pickle.loads(pickle.dumps(ckpt.info("norm").stored[0]))
        again = pickle.loads(pickle.dumps(ckpt))
        assert stored.file == ckpt.info("norm").stored[0].file
        assert_same(stored.array(), ckpt["norm"])
        assert_same(again["norm"], ckpt["norm"])


def test_commands(place, folder, command, tmp_path):
    if not isinstance(place, str):
        pytest.skip("the command line has no stores")
    for what in ("inspect", "verify"):
        ours, theirs = (command(what, "--json", source) for source in (folder, place))
        assert theirs[::2] == ours[::2] == (0, "")
        ours, theirs = (json.loads(printed) for _, printed, _ in (ours, theirs))
        assert theirs.get("totals") == ours.get("totals")
        assert theirs.get("findings") == ours.get("findings") == []
    for source, target in ((folder, "ours"), (place, "theirs")):
        part = tmp_path / f"{target}.npy"
        assert command("decode", source, NAME, "--index", "1, :, 3:40", "--dtype", "float32", "-o", part)[0] == 0
        assert command("convert", source, tmp_path / target, "--verify")[0] == 0
    assert (tmp_path / "theirs.npy").read_bytes() == (tmp_path / "ours.npy").read_bytes()
    names = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == names
    assert "tokenizer.json" in names
    for name in names:
        if name != ".mxfp4np.json":  # has a digest of the states of the source's files
            assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes(), name
    assert command("convert", place, tmp_path / "theirs", "--resume")[0] == 0
    assert command("verify", place, tmp_path / "theirs")[0] == 0


def test_gguf(tmp_path):
    pytest.importorskip("gguf")
    array = np.arange(64, dtype=np.float32).reshape(2, 32)
    path = write_gguf(tmp_path / "model.gguf", {"w": ("F32", array)})
    with serve_files({"x/model.gguf": path.read_bytes()}) as server, Checkpoint(f"{server.url}/x/model.gguf") as ckpt:
        assert_same(ckpt["w"], array)


# Requests and bytes


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Eight experts of 144 kB of codes and 9 kB of scales, and a tensor of 20 MB."""
    folder = tmp_path_factory.mktemp("large")
    save_raw(folder / "model.safetensors", {"w.blocks": (w := pair(8, 96, 96)).blocks, "w.scales": w.scales})
    with Checkpoint(folder / "model.safetensors") as ckpt:
        save_raw(folder / "model.safetensors", {**ckpt.stored, "plain": np.arange(5_000_000, dtype=np.float32)})
    return folder


def test_fetches_what_is_asked_for(large, tmp_path):
    """Counted by nginx, which sends what is asked for."""
    part = 96 * 96 * 17  # bytes of an expert
    cases = [(3, part), (np.s_[2:4], 2 * part), ([0, 5], 2 * part), (np.s_[1, :48], part // 2), (None, 8 * part)]
    with nginx(tmp_path, large) as (url, sent):
        ours, ckpt = Checkpoint(large / "model.safetensors"), Checkpoint(f"{url}/model.safetensors")
        assert sent() == (remote.FIRST_BYTES, 1)
        for name, index, asked in (*(("w", *case) for case in cases), ("plain", None, 20_000_000)):
            before = sent()
            assert_same(ckpt.get(name, index=index), ours.get(name, index=index))
            nbytes, requests = np.subtract(sent(), before)
            assert asked <= nbytes <= 1.02 * asked
            assert requests <= 4


@pytest.mark.parametrize("tensors", [5, 3000])
def test_two_requests_for_a_header(tmp_path, tensors):
    arrays = {f"{'x' * 40}.{i}": np.zeros(1, np.uint8) for i in range(tensors)}
    data = save_raw(tmp_path / "model.safetensors", arrays).read_bytes()
    assert (len(data) > 2 * remote.FIRST_BYTES) == (tensors > 5)
    with serve_files({"model.safetensors": data}) as server, Checkpoint(f"{server.url}/model.safetensors") as ckpt:
        assert len(ckpt) == tensors
        assert len(server.requests) == (2 if tensors > 5 else 1)
        assert server.sent <= len(data)


def test_headers_in_parallel(tmp_path):
    """As many files as Kimi-K3 has; each header takes a while."""
    files = {}
    for i in range(96):
        path = save_raw(tmp_path / "x.safetensors", {f"x.{i}": np.full(2, i)})
        files[f"model-{i + 1:05}-of-00096.safetensors"] = path.read_bytes()
    names = {f"x.{i}": f"model-{i + 1:05}-of-00096.safetensors" for i in range(96)}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": names}).encode()

    def answer(handler):
        time.sleep(0.02)
        data = files.get(handler.path.lstrip("/"))
        return handler.reply(404) if data is None else send_file(handler, data)

    with Server(answer) as server, Checkpoint(server.url) as ckpt:
        assert len(ckpt) == 96
        assert_same(ckpt["x.95"], np.full(2, 95))
        of_shards = [path for _, path, _ in server.requests if path.endswith("-of-00096.safetensors")]
        assert len(of_shards) == 97


def test_reads_ahead(tmp_path):
    """A few chunks, and no more of them than that when the rest is not wanted."""
    data = save_raw(
        tmp_path / "x.safetensors", {"w.blocks": (w := pair(50, 4)).blocks, "w.scales": w.scales}
    ).read_bytes()
    with serve_files({"x.safetensors": data}) as server, Checkpoint(f"{server.url}/x.safetensors") as ckpt:
        chunks = ckpt.chunks("w", 256)
        assert_same(next(chunks)[1], next(w.iter_chunks(256))[1].decode())
        chunks.close()
        time.sleep(0.2)
        assert 4 < len(server.requests) <= 1 + 2 * (AHEAD + 1)  # codes and scales of each


@given(st.data())
def test_spans(data):
    """Whatever is asked for, in whatever chunks it comes, it ends where it belongs; gaps are small, ranges too."""
    source = np.random.default_rng(0).integers(0, 256, 400, np.uint8)
    sizes = data.draw(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 40)), min_size=1, max_size=8))
    spans, at = [], 0
    for gap, size in sizes:
        spans.append((at + gap, np.zeros(size, np.uint8)))
        at += gap + size
    spans = data.draw(st.permutations(spans))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "GAP_BYTES", 8)
        patch.setattr(remote, "RANGE_BYTES", 50)
        for request in remote._requests(spans):
            begin, end = request[0][0], request[-1][0] + request[-1][1].size
            assert end - begin <= 50
            assert all(b[0] - a[0] - a[1].size <= 8 for a, b in pairwise(request))
            cuts = sorted(data.draw(st.lists(st.integers(begin, end))))
            chunks = [source[a:b].tobytes() for a, b in zip([begin, *cuts], [*cuts, end], strict=True)]
            assert remote._scatter(chunks, begin, request) == end
    for offset, memory in spans:
        assert np.array_equal(memory, source[offset : offset + memory.size])


@given(st.lists(st.tuples(st.sampled_from(["read", "seek"]), st.integers(0, 1100)), max_size=20))
def test_stream(steps):
    """A remote file reads as one in memory, of which no more is kept than it should be."""
    data = np.random.default_rng(0).integers(0, 256, 1000, np.uint8).tobytes()
    store = obstore.store.MemoryStore()
    store.put("x", data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "FIRST_BYTES", 16)
        patch.setattr(remote, "AHEAD_BYTES", 64)
        ours, theirs = io.BytesIO(data), RemotePath.of(store).__truediv__("x").open()
        for what, count in steps:
            assert getattr(theirs, what)(count) == getattr(ours, what)(count)
            assert theirs.tell() == ours.tell()
            assert theirs._data.size <= 1000 + 64
    assert theirs.size() == 1000


# Faults

RETRIED = ("closed", "reset", "stall", "silence", 500, 503, 429)
FINAL = ("short", "long", "other range", "no range", "endless", "loop", "garbage", "other ETag", "other size", 416, 403)
WORDS = {
    "no range": "does not send parts",
    "endless": "does not send parts",
    "other ETag": "changed after it was opened",
    "other size": "changed after it was opened",
    403: "credentials are missing, or not sufficient",
    "silence": "Timeout",
}


class Faulty:
    """A server of one file, some of whose answers are as a fault says: those from ``first`` on, ``times`` of them."""

    def __init__(self, tmp_path, fault, first, times=10**9):
        path = save_raw(tmp_path / "model.safetensors", {"a": np.arange(100_000.0), "b": np.arange(7)})
        data, self.asked = path.read_bytes(), 0

        def answer(handler):
            if handler.command == "HEAD" or not handler.path.startswith("/model.safetensors"):
                return handler.reply(404)
            self.asked += 1
            bad = first <= self.asked < first + times
            return misbehave(handler, data, fault) if bad else send_file(handler, data)

        self.server = Server(answer)
        self.url = f"{self.server.url}/model.safetensors"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.__exit__()


@pytest.mark.parametrize("fault", [*RETRIED, *FINAL])
def test_faults_in_data(tmp_path, fault):
    """An error that says which file, soon; never other bytes."""
    with Faulty(tmp_path, fault, 2) as faulty, Checkpoint(faulty.url) as ckpt:
        error = error_of(lambda: ckpt.get("a"), 8 * STALL_SECONDS)
        assert isinstance(error, MXFP4Error)
        assert str(error).startswith(faulty.url)
        assert WORDS.get(fault, "") in str(error)
        assert "\n" not in str(error)
        assert isinstance(pickle.loads(pickle.dumps(error)), type(error))


@pytest.mark.parametrize("fault", [*RETRIED, *FINAL])
def test_faults_in_headers(tmp_path, fault, refused):
    if fault in ("other ETag", "other size"):
        pytest.skip("the first answer says what a file is")
    with Faulty(tmp_path, fault, 1) as faulty:
        begin = time.monotonic()
        if fault == "no range":  # small, and sent whole
            Checkpoint(faulty.url).close()
        else:
            assert faulty.url in refused("inspect", faulty.url)
        assert time.monotonic() - begin < 8 * STALL_SECONDS


@pytest.mark.parametrize("fault", RETRIED)
def test_faults_that_pass(tmp_path, fault):
    with Faulty(tmp_path, fault, 2, times=1) as faulty, Checkpoint(faulty.url) as ckpt:
        assert_same(ckpt["a"], np.arange(100_000.0))
        assert faulty.asked == 3


@pytest.mark.parametrize("known", [{}, {"e_tag": 'W/"1"'}, {"e_tag": None}, {"e_tag": None, "modified": None}])
def test_changed_after_it_was_opened(tmp_path, known):
    """Found by its ETag, strong or weak, by its time, or at least by its size."""
    files = {"x.safetensors": save_raw(tmp_path / "x.safetensors", {"a": np.arange(1000)}).read_bytes()}
    states = {"e_tag": '"1"', "modified": 10**9, **known}

    def answer(handler):
        return send_file(handler, files["x.safetensors"], **states)

    with Server(answer) as server, Checkpoint(f"{server.url}/x.safetensors") as ckpt:
        assert_same(ckpt["a"], np.arange(1000))
        assert not ckpt.changed_files()
        more = 8 if states["modified"] is None else 0
        files["x.safetensors"] = files["x.safetensors"][:-8] + bytes(8 + more)
        states["modified"] = states["modified"] and states["modified"] + 5
        states["e_tag"] = states["e_tag"] and states["e_tag"].replace("1", "2")
        assert [path.name for path in ckpt.changed_files()] == ["x.safetensors"]
        with pytest.raises(CheckpointError, match=r"x\.safetensors: was replaced or changed after it was opened"):
            ckpt.get("a")


def test_changed_between_two_parts_of_an_answer(tmp_path):
    """A body breaks off, and the rest is that of another object."""
    with Faulty(tmp_path, "closed", 2, times=1) as faulty, Checkpoint(faulty.url) as ckpt:
        good = faulty.server.answer

        def answer(handler):
            if faulty.asked < 2:
                return good(handler)
            return send_file(handler, bytes(10**6), e_tag='"2"')

        faulty.server.answer = answer
        with pytest.raises(MXFP4Error, match=re.escape(faulty.url)):
            ckpt.get("a")


def test_changed_during_a_conversion(files, tmp_path):
    states = {"e_tag": '"1"'}

    def answer(handler):
        data = files.get(handler.path.lstrip("/"))
        if data is None:
            return handler.reply(404)
        send_file(handler, data, **states)
        if (asked := range_of(handler, len(data))) and asked[0]:  # the headers are read
            states["e_tag"] = '"2"'

    with Server(answer) as server, pytest.raises(CheckpointError, match="changed"):
        mxfp4np.convert(server.url, tmp_path / "out")
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("model")]


@pytest.mark.usefixtures("s3")
def test_not_there(files):
    with serve_files({"model/config.json": b"{}"}) as server:
        for url in (f"{server.url}/model", f"{server.url}/nothing/", "s3://bucket/nothing/"):
            with pytest.raises(FileNotFoundError, match=r"no \.safetensors files in this folder"):
                Checkpoint(url)
        for url in (f"{server.url}/x.safetensors", f"{server.url}/x.index.json", "s3://bucket/x.safetensors"):
            with pytest.raises(FileNotFoundError) as info:
                Checkpoint(url)
            assert info.value.filename == url
    some = {name: data for name, data in files.items() if "00002-of" not in name}
    with serve_files(some) as server, pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        Checkpoint(server.url)
    with pytest.raises(RemoteError, match="Connect"):
        Checkpoint("http://127.0.0.1:9/model/")
    with pytest.raises(ValueError, match=re.escape("expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION")):
        Checkpoint("hf://name")
    with pytest.raises(RemoteError, match="az://container"):
        Checkpoint("az://container/model")  # which account is not known


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf", "1e99"])
def test_timeout(monkeypatch, value):
    monkeypatch.setenv(TIMEOUT, value)
    with pytest.raises(RemoteError, match=f"{TIMEOUT} must be a number of seconds, found '{value}'"):
        Checkpoint("https://127.0.0.1:9/model.safetensors")


def test_empty_and_truncated(tmp_path):
    data = save_raw(tmp_path / "x.safetensors", {"a": np.arange(1000)}).read_bytes()
    files = {"empty.safetensors": b"", "cut.safetensors": data[:-8], "other.safetensors": b"<html>" * 9}
    with serve_files(files) as server:
        for name, words in (
            ("empty", "it ends after 0 of at least 8 bytes"),
            ("cut", "download or copy it again"),
            ("other", "b'<html><h'"),
        ):
            with pytest.raises(CheckpointError, match=re.escape(words)):
                Checkpoint(f"{server.url}/{name}.safetensors")


# What may be secret


def test_secrets(files, capsys):
    """Passwords and signatures reach the server, and are in no message."""

    def answer(handler):
        path, _, query = handler.path.partition("?")
        known = handler.headers.get("Authorization") == "Basic bWU6cGFzcw==" and query == "sig=SECRET"
        data = files.get(path.removeprefix("/model/"))
        return send_file(handler, data) if data and known else handler.reply(404 if known else 403)

    with Server(answer) as server:
        host = server.url.removeprefix("http://")
        url = f"http://me:pass@{host}/model/?sig=SECRET"
        said = []
        with Checkpoint(url) as ckpt:
            ckpt.get(NAME)
            said += [repr(ckpt), str(ckpt.files), repr(ckpt.info("norm")), str(ckpt.folder), repr(ckpt.index)]
            server.answer = lambda handler: handler.reply(403)
            said.append(str(error_of(lambda: ckpt.get("norm"))))
        for source in (url, url.replace("SECRET", "wrong"), "http://me:pass@127.0.0.1:9/x.safetensors?sig=SECRET"):
            assert mxfp4np.cli.main(["inspect", source]) == 2
        said.append(capsys.readouterr().err)
        text = "\n".join(said)
        assert f"http://{host}/model" in text
        assert not [word for word in ("SECRET", "pass", "bWU6", "wrong") if word in text]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("no URL? none: a@b", "no URL? none: a@b"),
        ("GET https://u:p/@w@host/a?x=1&y=2 in 3 ms", "GET https://u:p/@w@host/a?*** in 3 ms"),
        ("(https://host/a?x=(1)): b", "(https://host/a?***)): b"),
        ('HTTPStore("https://u@host:80/a?b\'")', 'HTTPStore("https://***@host:80/a?***\'")'),
        ("s3://a/b c://d?e c://?f", "s3://a/b c://d?*** c://?***"),
    ],
)
def test_mask(text, masked):
    assert mask(text) == masked


# The Hub


@pytest.fixture
def repository(files, monkeypatch):
    """Imitate the Hub with a token; the revision ``main`` can move."""
    repositories = {("org/name", "main"): (COMMITS[0], files), ("org/name", "refs%2Fpr%2F1"): (COMMITS[1], files)}
    with hub(repositories, token="TOKEN") as servers:
        monkeypatch.setenv("HF_ENDPOINT", servers[0].url + "/")
        yield repositories, *servers


@pytest.mark.parametrize("way", ["variable", "file", "bare"])
def test_hub_token(repository, monkeypatch, tmp_path, way):
    """It is found where huggingface_hub finds it, installed or not, and is not sent to where files are."""
    *_, cdn = repository
    if way == "bare":
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    if way == "variable":
        monkeypatch.setenv("HF_TOKEN", "TOKEN")
    else:
        (tmp_path / "token").write_text("TOKEN\n")
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
        if way == "file":
            constants = pytest.importorskip("huggingface_hub.constants")
            monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with Checkpoint("hf://org/name") as ckpt:
        assert ckpt[NAME].shape == (4, 6, 64)
        assert str(ckpt.files[0]) == "hf://org/name@main/model-00001-of-00002.safetensors"
    assert cdn.requests
    assert all("Authorization" not in headers for *_, headers in cdn.requests)


def test_hub_revisions(repository, monkeypatch):
    repositories, *_ = repository
    monkeypatch.setenv("HF_TOKEN", "TOKEN")
    with Checkpoint("hf://org/name@refs/pr/1") as ckpt:
        assert {stamp[-1] for stamp in ckpt.stamps} == {COMMITS[1]}
    with Checkpoint("hf://org/name@main/model-00002-of-00002.safetensors") as ckpt:
        assert ckpt["scalar"] == 3
    with Checkpoint("hf://org/name") as ckpt:
        repositories["org/name", "old"] = repositories["org/name", "main"]
        repositories["org/name", "main"] = (COMMITS[1], {"model.safetensors": b"something else"})
        assert ckpt["scalar"] == 3  # of the commit that was opened
        assert pickle.loads(pickle.dumps(ckpt))["scalar"] == 3
    for name, token in (("org/name@nothing", "TOKEN"), ("org/nothing", "TOKEN"), ("org/name", "another")):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(FileNotFoundError, match="no such repository or revision"):
            Checkpoint(f"hf://{name}")


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b'{"sha": "x", "siblings": [1]}', b"[" * 10**5, 500, "close"])
def test_hub_answers_nonsense(monkeypatch, answer):
    def reply(handler):
        if answer == "close":
            handler.close_connection = True
        elif isinstance(answer, int):
            handler.reply(answer)
        else:
            handler.reply(200, answer)

    with Server(reply) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        with pytest.raises(RemoteError, match=r"^hf://org/name@main: "):
            Checkpoint("hf://org/name")


# Processes


def test_forked(files):
    """Calls of obstore would never return there."""
    with (
        serve_files({f"m/{name}": data for name, data in files.items()}) as server,
        Checkpoint(f"{server.url}/m") as ckpt,
    ):
        ckpt.get("norm")
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                ckpt.get("norm")
            except RemoteError as error:
                os.write(write, str(error).encode())
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read) as said:
            assert "cannot be read in a process that was forked" in said.read()
        os.waitpid(child, 0)


def test_interrupted():
    """The main thread does not wait for a server that says nothing."""

    def answer(handler):
        if len(server.requests) == 1:  # a second interrupt would end it at once
            os.kill(process.pid, signal.SIGINT)
        time.sleep(STALL_SECONDS)
        handler.close_connection = True

    with Server(answer) as server:
        command = [sys.executable, "-m", "mxfp4np", "inspect", f"{server.url}/x.safetensors"]
        environment = {**os.environ, TIMEOUT: "1"}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "mxfp4np: interrupted\n")


def test_without_obstore(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(BackendUnavailableError, match=re.escape("python -m pip install 'mxfp4np[remote]'")):
        Checkpoint("s3://bucket/model/")


def test_what_is_remote():
    store = obstore.store.MemoryStore()
    assert all(map(remote.is_remote, ["s3://a", "https://host/a", "hf://a/b", store, RemotePath.of(store)]))
    assert not any(map(remote.is_remote, ["a", "C:\\x", "ftp://host/a", "models/hf:", b"s3://a", 3, None, ["s3://a"]]))
    with pytest.raises(TypeError, match="expected the path of a folder or file, or a list of paths"):
        find_files(3)


def test_options_of_a_store():
    """Whoever makes the store sets its timeouts."""
    with Server(lambda _: time.sleep(STALL_SECONDS)) as server:
        options = {"allow_http": True, "read_timeout": "200ms"}
        retry = {"max_retries": 1, "retry_timeout": timedelta(seconds=1)}
        store = obstore.store.HTTPStore(server.url, client_options=options, retry_config=retry)
        with pytest.raises(RemoteError, match="Timeout"):
            Checkpoint(store)
