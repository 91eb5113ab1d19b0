"""Plans and tasks: what is in which shard, what a task leaves on disk, and who may do what at the same time."""

import errno
import json
import os
import pickle
import threading
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from contract import run_python
from helpers import error_of
from hypothesis import given
from hypothesis import strategies as st

import mxfp4np
from mxfp4np.rewrite import plan as planning
from mxfp4np.rewrite import run
from mxfp4np.rewrite.convert import plan_conversion
from mxfp4np.rewrite.plan import INDEX, RECORD, Copied, Output, Plan, Shard, make_shards, split_into_shards
from mxfp4np.rewrite.run import Task, finish, run_tasks, tasks_of
from mxfp4np.storage import safetensors as writer
from mxfp4np.storage.atomic import temporary_path
from mxfp4np.storage.safetensors import SafetensorsFile, header_bytes
from mxfp4np.storage.tensorfile import DTYPES, nbytes_of

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Together:
    """An item of several outputs, the last of which comes first."""

    outputs: tuple[Output, ...]
    name: str = "source's"
    cut: int = 5

    def data(self, output):
        return np.resize(np.frombuffer(f"{output.name}|".encode(), np.uint8), output.nbytes)

    def chunks(self, checkpoint, reports):  # noqa: ARG002
        for which in reversed(range(len(self.outputs))):
            data = self.data(self.outputs[which])
            for begin in range(0, len(data), self.cut):
                yield which, data[begin : begin + self.cut]
        if len(self.outputs) > 1:
            reports[self.name] = f"report of {self.outputs[0].name}"


def items_of(*sizes):
    return [Together((Output(f"t{i}", "U8", (size,)),)) for i, size in enumerate(sizes)]


@pytest.fixture
def source(tmp_path):
    mxfp4np.save_file({"x": np.arange(10)}, tmp_path / "source.safetensors")
    with mxfp4np.Checkpoint(tmp_path / "source.safetensors") as checkpoint:
        yield checkpoint


@pytest.fixture
def plan(source, tmp_path):
    """A plan of three shards, a document and a copy in a folder below."""
    (tmp_path / "original.txt").write_text("copied")
    copies = {"below/copy.txt": tmp_path / "original.txt"}
    return Plan(
        tmp_path / "out", make_shards(items_of(30, 20, 50, 40), 60), {"config.json": b"{}"}, copies, {"a": 1}, source
    )


def prepare(plan, **options):
    options = {"resume": False, "force": False, "shared": False, **options}
    return run.prepare(plan, tasks_of(plan), **options)


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def write(plan, **options):
    prepare(plan, **options)
    run_tasks(tasks_of(plan), 1)
    assert finish(plan) == []
    return tree(plan.folder)


# Dividing


@given(st.lists(st.integers(0, 20)), st.integers(1, 30))
def test_shards_are_filled_in_order(sizes, limit):
    groups = split_into_shards(sizes, limit)
    assert sorted(number for group in groups for number in group) == list(range(len(sizes)))
    assert all(group == sorted(group) and group for group in groups)
    small = [group for group in groups if sizes[group[0]] <= limit]
    assert [number for group in small for number in group] == [i for i, size in enumerate(sizes) if size <= limit]
    assert all(len(group) == 1 for group in groups if group not in small)
    for group, following in pairwise(small):
        filled = sum(sizes[i] for i in group)
        assert filled <= limit < filled + sizes[following[0]]


def test_shards_are_named_as_transformers_wants_them():
    assert [shard.file for shard in make_shards(items_of(1, 2, 3), 6)] == ["model.safetensors"]
    assert [shard.file for shard in make_shards(items_of(1, 2, 3), 3)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert len(make_shards(items_of(*[1] * 123), 1)) == 123


def test_what_stays_together_is_in_one_shard():
    pair = Together((Output("a", "U8", (4,)), Output("b", "F32", (1,))))
    assert [len(shard.items) for shard in make_shards([pair, *items_of(3, 3)], 10)] == [1, 2]
    assert [len(shard.items) for shard in make_shards([*items_of(3), pair], 7)] == [1, 1]


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3).map(lambda s: (*s, 8))),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 200),
)
def test_plan_agrees_with_itself(specs, limit):
    items = [Together((Output(f"t{i}", dtype, shape),)) for i, (dtype, shape) in enumerate(specs)]
    planned = make_shards(items, limit)
    assert sum(shard.nbytes for shard in planned) == sum(nbytes_of(*spec) for spec in specs)
    for shard in planned:
        header = json.loads(shard.header[8:])
        assert header.pop("__metadata__") == {"format": "pt"}
        assert {name: tuple(entry["data_offsets"]) for name, entry in header.items()} == {
            output.name: (shard.offsets[output.name], shard.offsets[output.name] + output.nbytes)
            for item in shard.items
            for output in item.outputs
        }
        for output in (output for item in shard.items for output in item.outputs):
            assert header[output.name]["dtype"] == output.dtype
            assert header[output.name]["shape"] == list(output.shape)
            itemsize = max(1, DTYPES[output.dtype][0] // 8)
            assert (len(shard.header) + shard.offsets[output.name]) % itemsize == 0, "aligned"


def test_shards_are_divided_by_their_headers(tmp_path, source, monkeypatch):
    """The format has a limit, and so has what reads the index."""
    monkeypatch.setattr(writer, "HEADER_LIMIT", 1000)
    items = items_of(*[1] * 40)
    planned = make_shards(items, 10**6, {"format": "pt", "more": "x" * 300})
    assert [item for shard in planned for item in shard.items] == items
    sizes = [len(shard.header) - 8 for shard in planned]
    assert max(sizes) <= 1000
    assert min(sizes[:-1]) > 900, "as few as it takes"
    for task in tasks_of(Plan(tmp_path, planned, {}, {}, {}, source)):
        task.run()
        assert SafetensorsFile(task.path).tensors.keys() == {output.name for output in task.shard.outputs}
    (shard,) = make_shards([Together((Output("x" * 1000, "U8", (1,)),))], 10**6)
    with pytest.raises(ValueError, match=r"model\.safetensors: the header would have 1,\d+ bytes, .* allows 1,000"):
        prepare(Plan(tmp_path / "out", (shard,), {}, {}, {}, source))
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    monkeypatch.setattr(planning, "HEADER_LIMIT", 1000)
    with pytest.raises(ValueError, match=r"index\.json: would have [\d,]+ bytes, more than the 1,000 that are read"):
        prepare(Plan(tmp_path / "out", planned, {}, {}, {}, source))
    assert not (tmp_path / "out").exists()


# Tasks


def test_a_task_writes_its_shard(source, tmp_path):
    outputs = (Output("b.u8", "U8", (7, 3)), Output("a.f32", "F32", (2, 2)), Output("c", "I64", ()))
    item, single = Together(outputs), Together((Output("d", "F16", (0, 3)),))
    shard = Shard("model.safetensors", (single, item))
    calls = []
    task = Task(tmp_path, shard, source)
    assert not task.is_done()
    assert task.run(lambda name, count: calls.append((name, count))) == {"source's": "report of b.u8"}
    assert task.is_done()
    file = SafetensorsFile(task.path)
    assert file.metadata == {"format": "pt"}
    assert list(file.tensors) == ["c", "a.f32", "d", "b.u8"], "widest first"
    for output in outputs:
        assert file.view(file.tensors[output.name]).tobytes() == item.data(output).tobytes()
        assert sum(count for name, count in calls if name == output.name) == output.nbytes
    assert max(count for _, count in calls) <= 5


def test_a_task_that_is_done_is_not_repeated(plan):
    prepare(plan)
    task, *_ = tasks_of(plan)
    task.run()
    before = task.path.stat()
    assert task.run(lambda *_: pytest.fail("wrote again")) == {}
    assert (task.path.stat().st_ino, task.path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("damage", ["shorter", "longer", "header", "empty"])
def test_a_shard_that_is_not_the_one_is_written_again(plan, damage):
    prepare(plan)
    task, *_ = tasks_of(plan)
    task.run()
    whole = task.path.read_bytes()
    damaged = {"shorter": whole[:-1], "longer": whole + b"x", "header": b"x" + whole[1:], "empty": b""}[damage]
    task.path.write_bytes(damaged)
    assert not task.is_done()
    task.run()
    assert task.path.read_bytes() == whole


def test_tasks_run_in_other_processes(tmp_path):
    with mxfp4np.Checkpoint(DATA / "gpt_oss_hf") as checkpoint:
        plan = plan_conversion(checkpoint, tmp_path / "out", max_shard_size=100_000)
        assert len(tasks_of(plan)) > 2
        plan.folder.mkdir()
        (tmp_path / "tasks").write_bytes(pickle.dumps(tasks_of(plan)[1:]))
        code = """
        import pickle, sys
        from pathlib import Path
        for task in pickle.loads(Path(sys.argv[1]).read_bytes()):
            task.run()
        """
        run_python(code, tmp_path / "tasks")
        assert [task.is_done() for task in tasks_of(plan)] == [False] + [True] * (len(plan.shards) - 1)
        assert finish(plan)
        assert not (plan.folder / INDEX).exists()
        pickle.loads(pickle.dumps(tasks_of(plan)[0])).run()
        assert finish(plan) == []
    expected = mxfp4np.load_file(DATA / "gpt_oss_hf")
    with mxfp4np.Checkpoint(plan.folder) as written:
        assert written.keys() == expected.keys()


def test_tasks_divide_a_plan(plan):
    everything = [task.shard.file for task in tasks_of(plan)]
    for n in range(1, 6):
        parts = [[task.shard.file for task in tasks_of(plan, (i, n))] for i in range(1, n + 1)]
        assert sorted(chain(*parts)) == everything
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("workers", [1, 2, 100])
def test_progress_reaches_the_total(plan, workers):
    prepare(plan)
    seen, busy = [], threading.Lock()

    def progress(step):
        assert busy.acquire(blocking=False), "one thread at a time"
        seen.append(step)
        busy.release()

    assert run_tasks(tasks_of(plan), workers, progress) == {}
    assert {step.total for step in seen} == {140}
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    assert seen[-1].done == 140
    assert {(step.shard, step.tensor) for step in seen} == {
        (shard.file, item.outputs[0].name) for shard in plan.shards for item in shard.items
    }
    seen.clear()
    run_tasks(tasks_of(plan), workers, progress)
    assert seen == [], "nothing is left"


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, FileNotFoundError])
@pytest.mark.parametrize("at", [1, 5, 12, 27])
def test_an_exception_in_progress_stops_all(plan, workers, kind, at):
    expected = write(replace(plan, folder=plan.folder.parent / "whole"))
    prepare(plan)
    calls = 0

    def progress(_):
        nonlocal calls
        calls += 1
        if calls == at:
            raise kind("from progress")

    with pytest.raises(kind, match="from progress"):
        run_tasks(tasks_of(plan), workers, progress)
    assert calls == at, "called again"
    assert finish(plan)
    left = tree(plan.folder)
    assert left.items() <= expected.items(), "nothing temporary, nothing unfinished"
    run_tasks(tasks_of(plan), workers)
    assert finish(plan) == []
    assert tree(plan.folder) == expected


# The folder


def test_everything_is_in_the_folder(plan):
    files = write(plan)
    assert sorted(files) == sorted(
        ["below/copy.txt", "config.json", RECORD, INDEX, *(shard.file for shard in plan.shards)]
    )
    index = json.loads(files[INDEX])
    assert index["metadata"] == {"total_size": 140}
    assert index["weight_map"] == {item.outputs[0].name: shard.file for shard in plan.shards for item in shard.items}
    assert files["below/copy.txt"] == b"copied"
    assert files["config.json"] == b"{}"


def test_one_shard_has_no_index(plan):
    plan = replace(plan, shards=make_shards(items_of(3, 4), 10))
    assert plan.index is None
    assert sorted(write(plan)) == sorted(["below/copy.txt", "config.json", RECORD, "model.safetensors"])


def test_the_index_comes_last(plan):
    prepare(plan)
    for task in tasks_of(plan):
        assert finish(plan)
        assert not (plan.folder / INDEX).exists()
        task.run()
    assert finish(plan) == []
    assert (plan.folder / INDEX).exists()


def test_a_folder_that_holds_something_is_refused(plan):
    plan.folder.mkdir()
    (plan.folder / "mine.txt").write_text("keep")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="expected a new or empty folder"):
            prepare(plan, resume=resume)
        assert tree(plan.folder) == {"mine.txt": b"keep"}
    write(plan, force=True)
    assert (plan.folder / "mine.txt").read_text() == "keep"


def test_an_earlier_run_is_gone_on_with_or_removed(plan):
    expected = write(plan)
    with pytest.raises(FileExistsError, match="--resume"):
        prepare(plan)
    before = {path: path.stat().st_ino for path in plan.folder.glob("model-*")}
    assert write(plan, resume=True) == expected
    assert {path: path.stat().st_ino for path in plan.folder.glob("model-*")} == before
    smaller = replace(plan, shards=make_shards(items_of(3, 4), 10))
    with pytest.raises(mxfp4np.CheckpointError, match="other options"):
        prepare(smaller, resume=True)
    assert tree(plan.folder) == expected
    assert sorted(write(smaller, force=True)) == sorted(["below/copy.txt", "config.json", RECORD, "model.safetensors"])


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: replace(plan, options={"a": 2}),
        lambda plan: replace(plan, documents={"config.json": b"{ }"}),
        lambda plan: replace(plan, copies={}),
        lambda plan: replace(plan, shards=make_shards(items_of(30, 20, 50, 40), 40)),
        lambda plan: (plan.copies["below/copy.txt"].write_text("changed"), replace(plan))[1],
    ],
    ids=["options", "documents", "copies", "shards", "what is copied"],
)
def test_another_plan_is_refused(plan, change):
    prepare(plan)
    with pytest.raises(mxfp4np.CheckpointError, match="other options"):
        prepare(change(plan), resume=True)
    with pytest.raises(mxfp4np.CheckpointError, match="other options"):
        prepare(change(plan), resume=True, shared=True)


@pytest.mark.parametrize("resume", [False, True])
def test_what_killed_processes_left_is_removed(plan, resume):
    expected = write(replace(plan, folder=plan.folder.parent / "whole"))
    plan.folder.mkdir()
    if resume:
        prepare(plan)
        temporary_path(plan.folder / "below" / "copy.txt").write_text("left")
    for name in (RECORD, INDEX, "config.json", plan.shards[1].file):
        temporary_path(plan.folder / name).write_text("left")
    prepare(plan, resume=resume)
    assert not [name for name in tree(plan.folder) if name.endswith(".tmp")]
    assert write(plan, resume=True) == expected


def test_a_task_removes_what_was_left_of_its_shard(plan):
    """Room on the disk, long before all shards are there."""
    plan.folder.mkdir()
    left = [temporary_path(plan.folder / shard.file) for shard in plan.shards]
    for path in left:
        path.write_text("left")
    first, *_ = prepare(plan, shared=True)
    first.run()
    assert sorted(plan.folder.glob(".*.tmp")) == sorted(left[1:])


def test_leftovers_of_others_are_left_alone(plan):
    write(plan)
    other = temporary_path(plan.folder / "other.txt")
    other.write_text("not ours")
    write(plan, resume=True)
    assert other.exists()


def test_a_full_disk_is_noticed_before_the_start(plan, monkeypatch):
    room = run.shutil.disk_usage(plan.folder.parent)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: room._replace(free=139))
    with pytest.raises(OSError, match="140 B are to be written, but the disk has 139 B free"):
        prepare(plan)
    assert tree(plan.folder) == {}
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: room._replace(free=140))
    prepare(plan)
    tasks_of(plan)[0].run()
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: room._replace(free=90))
    prepare(plan, resume=True)  # what is there already needs no room


def test_a_file_is_at_its_final_size_from_the_beginning(plan):
    prepare(plan)
    task, *_ = tasks_of(plan)
    sizes = set()
    task.run(lambda *_: sizes.update(path.stat().st_size for path in plan.folder.glob(".*.tmp")))
    assert sizes == {task.path.stat().st_size}


def test_what_has_its_name_is_on_disk(plan, monkeypatch):
    plan = replace(plan, folder=plan.folder / "new" / "folder")
    synced, named, fsync = {}, [], os.fsync

    def sync(descriptor):
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size
        fsync(descriptor)

    def naming(call):
        def name(source, target):
            found = Path(source).stat()
            assert synced[found.st_ino] == found.st_size
            named.append(Path(target).name)
            call(source, target)

        return name

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", naming(os.replace))
    monkeypatch.setattr(os, "link", naming(os.link))
    write(plan)
    assert named == [RECORD, "config.json", "copy.txt", *(shard.file for shard in plan.shards), INDEX]
    for folder in (plan.folder, plan.folder.parent, plan.folder.parent.parent, plan.folder / "below"):
        assert folder.stat().st_ino in synced, "folders are on disk too"


# What is not ours


@pytest.fixture
def elsewhere(tmp_path):
    """A folder of somebody else."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "copy.txt").write_text("theirs")
    return folder


@pytest.mark.parametrize("how", ["new", "force", "resume"])
def test_nothing_is_written_or_removed_through_a_link(plan, elsewhere, how):
    if how == "resume":
        prepare(plan)
        (plan.folder / "below" / "copy.txt").unlink()
        (plan.folder / "below").rmdir()
    plan.folder.mkdir(exist_ok=True)
    (plan.folder / "below").symlink_to(elsewhere, target_is_directory=True)
    before = tree(plan.folder)
    with pytest.raises(FileExistsError, match=r"expected a new or empty folder|below: expected a folder, found a link"):
        prepare(plan, force=how == "force", resume=how == "resume")
    assert tree(plan.folder) == before
    assert tree(elsewhere) == {"copy.txt": b"theirs"}


def test_links_that_are_replaced_leave_their_files_alone(plan, elsewhere):
    plan.folder.mkdir()
    for name in ("config.json", INDEX):
        (plan.folder / name).symlink_to(elsewhere / "copy.txt")
    (plan.folder / RECORD).write_text(json.dumps({"files": [INDEX]}))
    write(plan, force=True)
    assert not [path for path in plan.folder.iterdir() if path.is_symlink()]
    assert tree(elsewhere) == {"copy.txt": b"theirs"}


@pytest.mark.parametrize("name", ["model-00007-of-00009.safetensors", INDEX, "model.safetensors", "x.SAFETENSORS"])
@pytest.mark.parametrize("record", ["other", "invalid", "list", "none"])
def test_weights_that_no_run_wrote_are_not_removed(plan, name, record):
    single = replace(plan, shards=make_shards(items_of(3), 10))
    prepare(replace(plan, shards=make_shards(items_of(3, 4), 4)) if record == "other" else single)
    texts = {"invalid": "[", "list": '{"files": [1]}'}
    if record in texts:
        (plan.folder / RECORD).write_text(texts[record])
    elif record == "none":
        (plan.folder / RECORD).unlink()
    if record == "other" and name == INDEX:
        pytest.skip("the run would have written it")
    (plan.folder / name).write_text("theirs")
    before = tree(plan.folder)
    with pytest.raises(FileExistsError, match=rf"{name}: was written by no earlier run: remove it"):
        prepare(single, force=True)
    assert tree(plan.folder) == before


@pytest.mark.parametrize("name", ["../elsewhere/copy.txt", "/copy.txt"])
def test_a_record_names_no_files_outside(plan, elsewhere, name):
    prepare(plan)
    name = name if name.startswith("..") else str(elsewhere / "copy.txt")
    (plan.folder / RECORD).write_text(json.dumps({"files": [name]}))
    before = tree(plan.folder)
    with pytest.raises(mxfp4np.CheckpointError, match="which is outside of the folder: remove the record"):
        prepare(plan, force=True)
    assert tree(plan.folder) == before
    assert tree(elsewhere) == {"copy.txt": b"theirs"}


def test_force_removes_what_the_earlier_run_wrote(plan):
    write(plan)
    left = temporary_path(plan.folder / plan.shards[0].file)
    left.write_text("left")
    (plan.folder / "mine.txt").write_text("mine")
    other = replace(plan, shards=make_shards(items_of(3), 10), copies={})
    assert set(write(other, force=True)) == {"model.safetensors", "config.json", RECORD, "mine.txt"}
    assert not left.exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("kind", ["folder", "pipe"])
@pytest.mark.parametrize("how", ["resume", "force"])
@pytest.mark.parametrize("which", ["document", "copy", "shard", "index", "record"])
def test_something_else_is_in_the_place_of_a_file(plan, which, how, kind):
    """Refused before anything is removed, and never waited for."""
    write(plan)
    names = {"document": "config.json", "copy": "below/copy.txt", "index": INDEX, "record": RECORD}
    path = plan.folder / names.get(which, plan.shards[1].file)
    path.unlink()
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    before = tree(plan.folder)
    error = error_of(partial(prepare, plan, **{how: True}))
    assert isinstance(error, FileExistsError | mxfp4np.CheckpointError), error
    assert str(path) in str(error)
    assert "regular file" in str(error)
    assert tree(plan.folder) == before


@pytest.mark.parametrize("kind", ["folder", "pointer", "dangling"])
def test_what_is_called_like_a_shard_and_is_none(plan, kind):
    """The index is not written before all shards are there."""
    prepare(plan, shared=True)
    *others, last = tasks_of(plan)
    for task in others:
        task.run()
    if kind == "folder":
        last.path.mkdir()
        with pytest.raises(mxfp4np.CheckpointError, match="not a regular file"):
            finish(plan)
        last.path.rmdir()
    elif kind == "pointer":
        last.path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    else:
        last.path.symlink_to("gone")
    if kind != "folder":
        assert finish(plan) == [last.shard.file]
    assert not (plan.folder / INDEX).exists()
    last.run()
    assert finish(plan) == []


# Sources that change


@pytest.mark.parametrize("same_time", [False, True])
@pytest.mark.parametrize("at", [1, 3])
def test_a_source_that_changes_under_a_task(plan, tmp_path, at, same_time):
    plan = replace(plan, shards=make_shards([Copied.of(plan.source.info("x"))], 100))
    (task,) = prepare(plan)
    file = tmp_path / "source.safetensors"
    before, calls = file.stat(), []

    def progress(*_):
        calls.append(_)
        if len(calls) == at:
            change(file, same_time=same_time)

    if at == 1:
        with pytest.raises(mxfp4np.CheckpointError, match=r"source\.safetensors: was replaced or changed while"):
            task.run(progress)
        assert not task.path.exists()
    else:
        task.run(progress)
        change(file, same_time=same_time)
        with pytest.raises(mxfp4np.CheckpointError, match=r"source\.safetensors: was replaced or changed while"):
            run.run_plan(plan, resume=True)
    assert (file.stat().st_size, file.stat().st_ino) == (before.st_size, before.st_ino)
    with mxfp4np.Checkpoint(file) as source, pytest.raises(mxfp4np.CheckpointError, match="have changed since"):
        prepare(replace(plan, source=source), resume=True)


def change(file, *, same_time):
    """Overwrite a file in place, with the same size and, if asked for, the time that it had."""
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    with file.open("r+b") as opened:
        opened.write(data)
    if same_time:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_source_that_vanishes_under_a_damaged_shard(plan, tmp_path):
    """What is missing is the source: nobody else has written the shard."""
    plan = replace(plan, shards=make_shards([Copied.of(plan.source.info("x"))], 100))
    (task,) = prepare(plan)
    task.path.write_bytes(b"damaged")
    with pytest.raises(FileNotFoundError) as error:
        task.run(lambda *_: (tmp_path / "source.safetensors").unlink())
    assert error.value.filename == str(tmp_path / "source.safetensors")
    assert task.path.read_bytes() == b"damaged"


def test_a_copied_file_that_changes(plan, monkeypatch):
    real = run.run_tasks

    def then_change(*arguments):
        plan.copies["below/copy.txt"].write_text("changed")
        return real(*arguments)

    monkeypatch.setattr(run, "run_tasks", then_change)
    with pytest.raises(mxfp4np.CheckpointError, match=r"original\.txt: was replaced or changed while"):
        run.run_plan(plan)
    assert not (plan.folder / INDEX).exists()


# Many at once


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"resume": True, "shared": True}], ids=str)
@pytest.mark.parametrize("moment", ["record", "link", "no links"])
def test_two_runs_with_different_options_begin_at_once(plan, monkeypatch, options, moment):
    """The other one is faster, after the first has seen that the folder is empty: one of them has it."""
    other, real, link = replace(plan, options={"a": 2}), run.atomic_file, os.link
    prepared = []

    def overtake():
        if not prepared:
            prepared.append(None)
            prepared.append(prepare(other, **options))

    def atomic_file(path, **options):
        if moment != "link":
            overtake()
        return real(path, **options)

    def linked(source, target):
        if moment == "no links":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        overtake()
        link(source, target)

    monkeypatch.setattr(run, "atomic_file", atomic_file)
    monkeypatch.setattr(os, "link", linked)
    with pytest.raises((FileExistsError, mxfp4np.CheckpointError), match=r"holds an earlier run|with other options"):
        prepare(plan, **options)
    assert len(prepared[1]) == 3
    assert (plan.folder / RECORD).read_bytes() == other.record
    assert not list(plan.folder.glob(".*.tmp"))


def test_a_run_that_is_started_over_by_another(plan):
    tasks = prepare(plan)
    other = replace(plan, options={"a": 2})
    expected = write(other, force=True)
    with pytest.raises(mxfp4np.CheckpointError, match="another run has started over here"):
        replace(tasks[0], folder=plan.folder, shard=replace(tasks[0].shard, file="other.safetensors")).run()
    assert tree(plan.folder) == expected


def test_a_folder_is_listed_once(plan, monkeypatch):
    """Not once for each shard."""
    plan = replace(plan, shards=make_shards(items_of(*[1] * 30), 1))
    listed, scan, names = [], os.scandir, os.listdir
    monkeypatch.setattr(os, "scandir", lambda *path: listed.append(path) or scan(*path))
    monkeypatch.setattr(os, "listdir", lambda *path: listed.append(path) or names(*path))
    assert run.run_plan(plan, num_threads=1).complete
    assert 0 < len(listed) < 10


def test_two_that_begin_at_once(plan, monkeypatch):
    """Another process puts everything there between two looks at the folder."""
    look, looked = Path.exists, []

    def exists(path):
        found = look(path)
        if path.name == RECORD and not looked:
            looked.append(path)
            write(plan, resume=True, shared=True)
        return found

    monkeypatch.setattr(Path, "exists", exists)
    prepare(plan, resume=True, shared=True)
    assert looked
    assert finish(plan) == []


@pytest.mark.parametrize("at", [1, 2, 8])
def test_another_process_is_faster(plan, at):
    """All is finished and cleared while a task is still at work: it has nothing more to do."""
    expected = write(replace(plan, folder=plan.folder.parent / "whole"))
    prepare(plan, shared=True)
    calls = 0

    def progress(*_):
        nonlocal calls
        calls += 1
        if calls == at:
            write(plan, resume=True, shared=True)
            assert not list(plan.folder.glob(".*.tmp"))

    tasks_of(plan)[-1].run(progress)
    assert finish(plan) == []
    assert tree(plan.folder) == expected


def test_a_folder_that_vanishes_is_an_error(plan):
    prepare(plan)
    task, *_ = tasks_of(plan)

    def progress(*_):
        for path in plan.folder.glob(".*.tmp"):
            path.unlink()

    with pytest.raises(FileNotFoundError):
        task.run(progress)
    assert not task.is_done()


def test_header_is_that_of_save_file(source, tmp_path):
    """The same bytes, whoever writes them."""
    items = [Copied("x", (Output("x", "I64", (10,)),))]
    Task(tmp_path, Shard("model.safetensors", tuple(items)), source).run()
    mxfp4np.save_file({"x": np.arange(10)}, tmp_path / "expected.safetensors", {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    assert (
        (tmp_path / "model.safetensors").read_bytes().startswith(header_bytes({"x": ("I64", (10,))}, {"format": "pt"}))
    )
