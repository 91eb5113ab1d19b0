"""The demo: what it prints and writes, and that its check can fail."""

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from commands import finish, names_in, process, same_bits, value_of

import mxfp4np
from mxfp4np.cli import demo


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Run the demo once, in a folder whose name needs quoting; return the folder and what was printed."""
    folder = tmp_path_factory.mktemp("demo") / "a folder's"
    running = process("demo", "--size", "4MB", "--out", folder)
    status, out, err = finish(running)
    assert (status, err) == (0, "")
    return folder, out


class TestDemo:
    def test_report(self, example):
        _, out = example
        lines = out.splitlines()
        assert lines[0].split() == ["NAME", "SHAPE", "DTYPE", "LAYOUT", "STORED", "DECODED"]
        assert re.search(r"^model\.layers\.0-1\.mlp\.experts\.down_proj +x2 +8x", out, re.MULTILINE)
        assert re.search(r"^\d+ tensors, \d+ of them MXFP4: ", out, re.MULTILINE)
        assert re.search(
            r"^decoded to bfloat16 with \d+ threads?: [\d,]+ million elements/s, [\d.]+ [kMG]B/s; "
            r"a plain memory copy: [\d.]+ [kMG]B/s$",
            out,
            re.MULTILINE,
        )
        assert re.search(r"^checked [\d,]+ values against the reference decoder: all equal$", out, re.MULTILINE)

    def test_size(self, example):
        with mxfp4np.Checkpoint(example[0]) as checkpoint:
            infos = [checkpoint.info(name) for name in checkpoint]
        decoded = sum(info.decoded_nbytes() for info in infos if info.layout is not None)
        assert 3e6 < decoded < 5e6

    def test_checks_every_value(self, example):
        folder, out = example
        with mxfp4np.Checkpoint(folder) as checkpoint:
            values = sum(array.size for array in checkpoint.values())
        assert f"checked {values:,} values" in out

    def test_decoded_file_is_right(self, example):
        folder, _ = example
        decoded = mxfp4np.load_file(folder / demo.DECODED)
        with mxfp4np.Checkpoint(folder) as checkpoint:
            assert decoded.keys() == set(checkpoint)
            for name in checkpoint:
                same_bits(decoded[name], checkpoint.get(name, backend="numpy"))

    def test_pairs_are_split_over_shards(self, example):
        with mxfp4np.Checkpoint(example[0]) as checkpoint:
            assert len(checkpoint.files) > 1
            pairs = [checkpoint.info(name).stored for name in checkpoint if len(checkpoint.info(name).stored) == 2]
        assert pairs
        assert all(blocks.file.path != scales.file.path for blocks, scales in pairs)

    def test_next_commands_run_as_printed(self, example, command, tmp_path, monkeypatch):
        folder, out = example
        monkeypatch.chdir(tmp_path)
        ours, _, other = out.partition("Try:\n")[2].partition("and on a real checkpoint")
        lines = [line.strip() for line in ours.splitlines()]
        assert [line.split()[:2] for line in lines] == [["mxfp4np", "inspect"], ["mxfp4np", "decode"]]
        for line in lines:
            status, printed, err = command(*shlex.split(line)[1:])
            assert (status, err) == (0, ""), line
            assert printed
        name = "model.layers.0.mlp.experts.down_proj"
        same_bits(np.load("part.npy"), value_of(folder, name, dtype="float32", index=np.s_[3, :64]))
        assert "mxfp4np inspect path/to/gpt-oss-20b" in other

    @pytest.mark.parametrize("kind", ["folder", "file"])
    def test_refuses_what_is_not_empty(self, refused, tmp_path, kind):
        out = tmp_path / "out"
        (out if kind == "file" else tmp_path / "out" / "precious").parent.mkdir(exist_ok=True)
        (out if kind == "file" else out / "precious").write_text("mine")
        message = refused("demo", "--size", "4MB", "--out", out)
        assert str(out) in message
        assert "empty" in message
        if kind == "folder":
            assert names_in(out) == ["precious"]
        assert (out if kind == "file" else out / "precious").read_text() == "mine"

    @pytest.mark.parametrize("made", [True, False])
    def test_json(self, command, tmp_path, made):
        folder = tmp_path / "new" / "out"
        if made:
            folder.mkdir(parents=True)
        status, out, err = command("demo", "--size", "100kB", "--out", folder, "--json")
        assert (status, err) == (0, "")
        report = json.loads(out)
        assert Path(report["folder"]) == folder
        assert report["differences"] == []
        assert report["elements"] > 0
        assert report["checked"] > report["elements"]
        assert report["threads"] >= 1
        for key in ("decode_elements_per_second", "decode_bytes_per_second", "copy_bytes_per_second"):
            assert report[key] > 0
        assert report["decode_bytes_per_second"] == pytest.approx(2 * report["decode_elements_per_second"])

    def test_without_out_it_says_where(self, command, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        status, out, _ = command("demo", "--size", "10kB")
        (folder,) = tmp_path.iterdir()
        assert status == 0
        assert f"The checkpoint is in {shlex.quote(str(folder))}," in out
        assert out.endswith(f"\nto remove all of it:\n  rm -r {shlex.quote(str(folder))}\n")

    def test_quiet(self, command, tmp_path):
        assert command("demo", "--size", "10kB", "--out", tmp_path / "out", "--quiet") == (0, "", "")

    @pytest.mark.parametrize("size", ["0", "1", "1kB", "1MB"])
    def test_any_size(self, command, tmp_path, size):
        status, out, err = command("demo", "--size", size, "--out", tmp_path / "out")
        assert (status, err) == (0, "")
        assert "all equal" in out

    def test_same_checkpoint_every_time(self, command, tmp_path):
        for name in "ab":
            assert command("demo", "--size", "100kB", "--out", tmp_path / name)[0] == 0
        files = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*.*")) for n in "ab"]
        assert files[0] == files[1]
        for file in files[0]:
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


class TestDemoCanFail:
    """A check that always passes is none."""

    @staticmethod
    def corrupt(path, name):
        """Flip one bit of the last value of a tensor."""
        with mxfp4np.Checkpoint(path) as decoded:
            (place,) = decoded.info(name).stored
        data = bytearray(path.read_bytes())
        data[place.offset + place.nbytes - 2] ^= 1
        path.write_bytes(data)

    @pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.gate_up_proj", "model.norm.weight"])
    def test_a_changed_byte_is_found(self, command, tmp_path, name):
        folder = tmp_path / "out"
        assert command("demo", "--size", "100kB", "--out", folder)[0] == 0
        done = []
        with mxfp4np.Checkpoint(folder) as checkpoint, mxfp4np.Checkpoint(folder / demo.DECODED) as decoded:
            whole = demo._compare(checkpoint, decoded, done.append)
            assert whole == (sum(array.size for array in checkpoint.values()), [])
            assert sum(done) == sum(array.nbytes for array in checkpoint.values())
        self.corrupt(folder / demo.DECODED, name)
        with mxfp4np.Checkpoint(folder) as checkpoint, mxfp4np.Checkpoint(folder / demo.DECODED) as decoded:
            checked, differences = demo._compare(checkpoint, decoded, lambda _: None)
        assert checked == whole[0]
        assert len(differences) == 1
        assert differences[0].startswith(name)

    @pytest.mark.parametrize("options", [(), ("--json",), ("--quiet",)])
    def test_exit_status(self, command, tmp_path, monkeypatch, options):
        folder, name = tmp_path / "out", "model.layers.0.mlp.experts.down_proj"
        measure = demo._measure

        def corrupting(checkpoint, names):
            self.corrupt(folder / demo.DECODED, name)
            return measure(checkpoint, names)

        monkeypatch.setattr(demo, "_measure", corrupting)
        status, out, err = command("demo", "--size", "100kB", "--out", folder, *options)
        assert (status, err) == (1, "")
        assert name in out.partition("DIFFERENT")[2] or name in json.loads(out)["differences"][0]
        assert "all equal" not in out


def test_plan_spreads_pairs():
    shards = demo.plan(64, 3)
    where = {name: i for i, specs in enumerate(shards) for name in specs}
    for name, shard in where.items():
        if name.endswith("_blocks"):
            assert where[name.removesuffix("_blocks") + "_scales"] == (shard + 1) % 3
    for specs in shards:
        assert list(specs.values()) == sorted(specs.values(), key=lambda spec: spec[0])


@pytest.mark.parametrize("size", [10**6, 10**7, 10**8, 10**9, 10**10])
def test_shape_for(size):
    width, layers = demo.shape_for(size)
    assert width % 32 == 0
    assert layers >= 2
    assert 2 * layers * 3 * demo.EXPERTS * width**2 == pytest.approx(size, rel=0.4)


def test_shapes_grow():
    sizes = [layers * width**2 for width, layers in map(demo.shape_for, range(10**6, 10**8, 10**6))]
    assert all(smaller <= 1.5 * larger for smaller, larger in pairwise(sizes))
