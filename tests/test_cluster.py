"""Runs on Ray, two nodes in this machine: the same bytes as in threads; killed processes cost their shards only."""

import contextlib
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import finish, names_in, process
from helpers import pair, save_raw
from servers import nginx

import mxfp4np
from mxfp4np import BackendUnavailableError, CheckpointError, MXFP4Error
from mxfp4np.rewrite import cluster, run
from mxfp4np.rewrite.cluster import RayWorkers
from mxfp4np.storage.atomic import is_temporary

SHARDS = 8


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of eight layers, each of which becomes a shard, and some small tensors."""
    folder = tmp_path_factory.mktemp("source")
    arrays = {"norm.weight": np.ones(6, np.float32)}
    for number in range(SHARDS):
        packed = pair(4, 256, 4, seed=number)
        name = f"model.layers.{number}.mlp.experts.gate_up_proj"
        arrays |= {f"{name}_blocks": packed.blocks, f"{name}_scales": packed.scales}
    save_raw(folder / "model.safetensors", arrays)
    return folder


OPTIONS = {"max_shard_size": 300_000}


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# Without Ray


def test_where_ray_is_missing(source, tmp_path, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendUnavailableError, match=r"needs Ray: python -m pip install 'mxfp4np\[ray\]'"):
        mxfp4np.convert(source, tmp_path / "out", engine="ray")
    for command in (["convert", source, tmp_path / "out"], ["verify", source], ["verify", source, source]):
        assert "needs Ray" in refused(*command, "--engine", "ray")
    assert not (tmp_path / "out").exists()


def test_wrong_engines(source, tmp_path, refused):
    with pytest.raises(ValueError, match="engine must be 'threads' or 'ray', found 'dask'"):
        mxfp4np.verify(source, engine="dask")
    with pytest.raises(ValueError, match="engine 'ray' decodes on CPUs, found device 'cuda'"):
        mxfp4np.convert(source, tmp_path / "out", engine="ray", device="cuda")
    assert "invalid choice: 'dask'" in refused("verify", source, "--engine", "dask")


def test_what_ray_prints_is_no_result(source, command, monkeypatch):
    def noisy(_):
        print("a worker died")
        return contextlib.nullcontext()

    monkeypatch.setattr(importlib.import_module("mxfp4np.rewrite.verify"), "running", noisy)
    status, out, err = command("verify", source, "--json")
    assert (status, err) == (0, "a worker died\n")
    assert json.loads(out)["findings"] == []


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [([], []), ([5, 5, 5], [range(2), range(2, 3)]), ([10, 1, 1], [range(1), range(1, 3)]), ([1], [range(1)])],
)
def test_small_tasks_go_together(sizes, groups, monkeypatch):
    monkeypatch.setattr(cluster, "GROUP_BYTES", 10)
    assert list(cluster._groups(sizes, lambda size: size)) == groups
    assert list(cluster._groups(sizes, None)) == [range(i, i + 1) for i in range(len(sizes))]


# With Ray


@pytest.fixture(scope="module")
def ray():
    """Ray, connected to two nodes of one CPU each, whose processes find this very package and the tests."""
    ray = pytest.importorskip("ray", reason="needs Ray: python -m pip install 'mxfp4np[ray]'")
    from ray.cluster_utils import Cluster

    paths = [str(Path(mxfp4np.__file__).parents[1]), str(Path(__file__).parent)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
        nodes = Cluster(initialize_head=True, head_node_args=node)
        nodes.add_node(num_cpus=1, object_store_memory=100 << 20)
        ray.init(nodes.address, log_to_driver=False)
        yield ray
        ray.shutdown()
        nodes.shutdown()


on_ray = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # its own warnings


def marked(function):
    for mark in on_ray:
        function = mark(function)
    return pytest.mark.usefixtures("ray")(function)


def pool(number=None, progress=lambda _: None):
    return RayWorkers(number, 10**6, progress)


@marked
def test_the_same_bytes_as_in_threads(source, tmp_path):
    seen = []
    mxfp4np.convert(source, tmp_path / "threads", **OPTIONS)
    result = mxfp4np.convert(source, tmp_path / "ray", engine="ray", verify=True, progress=seen.append, **OPTIONS)
    assert result.complete
    assert len(result.shards) == SHARDS
    assert result.verification.findings == []
    assert result.verification.tensors == SHARDS + 1
    assert contents(tmp_path / "ray") == contents(tmp_path / "threads")
    written = seen[: len({progress.shard for progress in seen})]
    assert [x.done for x in written] == sorted({x.done for x in written})
    assert written[-1].done == written[-1].total == result.nbytes

    mxfp4np.encode_checkpoint(tmp_path / "threads", tmp_path / "packed", max_shard_size=100_000)
    engine = {"engine": "ray", "verify": True, "max_shard_size": 100_000}
    again = mxfp4np.encode_checkpoint(tmp_path / "threads", tmp_path / "packed-ray", **engine)
    assert len(again.errors) == SHARDS
    assert again.verification.findings == []
    assert contents(tmp_path / "packed-ray") == contents(tmp_path / "packed")


@marked
def test_verify_finds_the_same(source, tmp_path):
    mxfp4np.convert(source, tmp_path / "out", **OPTIONS)
    for path in list((tmp_path / "out").glob("model-0000[25]*")):
        data = bytearray(path.read_bytes())
        data[-100] ^= 1
        path.write_bytes(data)
    here, there = (mxfp4np.verify(source, tmp_path / "out", engine=engine) for engine in ("threads", "ray"))
    assert len(here.findings) == 2
    assert there == here
    assert mxfp4np.verify(source, engine="ray") == mxfp4np.verify(source)


@marked
def test_results_are_in_order_and_both_nodes_work(ray):
    def work(task):
        time.sleep(0.05)
        return task, ray.get_runtime_context().get_node_id()

    found = pool().map(work, range(30))
    assert [task for task, _ in found] == list(range(30))
    assert len({node for _, node in found}) == 2
    assert pool().map(work, []) == []


@marked
@pytest.mark.parametrize("number", [1, None])
def test_no_more_tasks_at_a_time_than_asked_for(number, tmp_path):
    def work(task):
        (tmp_path / f"{task}").touch()
        count = len(list(tmp_path.iterdir()))
        time.sleep(0.2)
        (tmp_path / f"{task}").unlink()
        return count

    assert max(pool(number).map(work, range(6))) == (number or 2)


@marked
def test_a_killed_task_is_repeated_and_no_other(tmp_path):
    def work(task):
        with (tmp_path / f"{task}").open("a") as file:
            file.write("x")
        if task in (1, 4) and (tmp_path / f"{task}").stat().st_size == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    assert pool().map(work, range(6)) == list(range(6))
    assert [(tmp_path / f"{task}").read_text() for task in range(6)] == ["x", "xx", "x", "x", "xx", "x"]


@marked
def test_a_task_that_is_killed_every_time(monkeypatch):
    monkeypatch.setattr(cluster, "RETRIES", 1)

    def work(_):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(MXFP4Error, match=r"Ray lost a task 2 times \(\w+: .*\): continue with --resume"):
        pool().map(work, [1])


@marked
def test_processes_killed_in_the_middle_cost_their_shards_only(source, tmp_path, monkeypatch):
    mxfp4np.convert(source, tmp_path / "threads", **OPTIONS)
    folder, notes = tmp_path / "ray", tmp_path / "notes"
    notes.mkdir()

    def killed(tasks, number, progress, engine):
        assert engine == "ray"

        def work(task):
            note = notes / task.shard.file
            with note.open("a") as file:
                file.write("begun ")

            def advance(tensor, nbytes):
                pool.advance(task.shard.file, tensor, nbytes)
                if "00002" in note.name or "00007" in note.name:
                    half = [path for path in folder.iterdir() if is_temporary(path.name)]
                    if note.read_text() == "begun " and half:
                        os.kill(os.getpid(), signal.SIGKILL)

            return task.run(advance)

        pool = RayWorkers(number, sum(task.shard.nbytes for task in tasks), progress)
        return {name: report for reports in pool.map(work, tasks) for name, report in reports.items()}

    monkeypatch.setattr(run, "run_tasks", killed)
    assert mxfp4np.convert(source, folder, engine="ray", **OPTIONS).complete
    twice = [note.name[6:11] for note in sorted(notes.iterdir()) if note.read_text() == "begun begun "]
    assert twice == ["00002", "00007"]
    assert contents(folder) == contents(tmp_path / "threads")  # and nothing half written


@marked
def test_errors_are_those_of_threads(source, tmp_path):
    data = (source / "model.safetensors").read_bytes()
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(data)
    with mxfp4np.Checkpoint(broken, io="pread") as ckpt:
        from mxfp4np.rewrite.convert import plan_conversion
        from mxfp4np.rewrite.run import run_tasks, tasks_of

        tasks = tasks_of(plan_conversion(ckpt, tmp_path / "out", **OPTIONS))
        (tmp_path / "out").mkdir()
        os.truncate(broken, len(data) // 2)
        with pytest.raises(CheckpointError) as info:
            run_tasks(tasks, engine="ray")
    assert str(broken) in str(info.value)
    assert "Traceback" not in str(info.value)
    assert not [path for path in (tmp_path / "out").iterdir() if is_temporary(path.name)]


@marked
def test_what_progress_raises_ends_the_run(source, tmp_path):
    def raising(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mxfp4np.convert(source, tmp_path / "out", engine="ray", progress=raising, **OPTIONS)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert mxfp4np.convert(source, tmp_path / "out", engine="ray", resume=True, **OPTIONS).complete


@marked
def test_commands_join_a_cluster(source, tmp_path, ray):
    options = ["--engine", "ray", "--max-shard-size", OPTIONS["max_shard_size"]]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    status, out, err = finish(process("convert", source, tmp_path / "out", *options, env=environment))
    assert (status, err) == (0, "")
    assert f"{SHARDS} shards" in out
    mxfp4np.convert(source, tmp_path / "threads", **OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "threads")
    assert names_in(tmp_path / "out")[-1] == "model.safetensors.index.json"


@pytest.mark.ray
def test_commands_start_ray(source, tmp_path):
    pytest.importorskip("ray", reason="needs Ray: python -m pip install 'mxfp4np[ray]'")
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "local"}
    environment["PYTHONPATH"] = str(Path(mxfp4np.__file__).parents[1])
    status, out, err = finish(process("convert", source, tmp_path / "out", "--engine", "ray", env=environment))
    assert (status, err) == (0, "")
    assert "all there" in out


@marked
def test_a_remote_source(source, tmp_path):
    (tmp_path / "server").mkdir()
    mxfp4np.convert(source, tmp_path / "expected", **OPTIONS)
    with nginx(tmp_path / "server", source) as (url, _):
        result = mxfp4np.convert(url, tmp_path / "out", engine="ray", verify=True, **OPTIONS)
        assert result.verification.findings == []
        assert mxfp4np.verify(url, tmp_path / "out", engine="ray").findings == []
    expected, found = (contents(tmp_path / name) for name in ("expected", "out"))
    assert {name for name in found if found[name] != expected[name]} == {".mxfp4np.json"}  # which names the source
    assert found.keys() == expected.keys()
