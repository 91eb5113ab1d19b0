"""The commands, as a user meets them: what is printed where, what the exit status is, what is on disk afterwards."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from commands import environment, finish, names_in, process, same_bits, value_of
from contract import run_python

import mxfp4np
from mxfp4np.cli import main, progress
from mxfp4np.format import FP4_VALUES
from mxfp4np.storage.safetensors import write_safetensors

DATA = Path(__file__).parent / "data"
ORIGINAL = DATA / "gpt_oss_original"
HF = DATA / "gpt_oss_hf"
PACKED = "block.0.mlp.mlp1_weight"
PLAIN = "block.0.mlp.mlp1_bias"

ESC = "\x1b"
BITS = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}


def sparse(path, rows):
    """Write a checkpoint with one packed tensor ``w`` of zeros, [rows, 1024], that takes no room on disk."""
    specs = {"w.blocks": ("U8", (rows, 32, 16)), "w.scales": ("U8", (rows, 32))}
    header = {}
    begin = 0
    for name, (dtype, shape) in specs.items():
        end = begin + int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + begin)
    return path


def stored_bytes(files):
    """Return the bytes after the headers."""
    return sum(file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in files)


# inspect


class TestInspect:
    def test_collapses_layers(self, command):
        status, out, err = command("inspect", ORIGINAL)
        assert (status, err) == (0, "")
        *table, reason, totals = out.splitlines()
        assert reason == "layout gpt-oss: suffix pair, U8/U8; axes [.., out, in]"
        assert [line.split() for line in table] == [
            ["NAME", "SHAPE", "DTYPE", "LAYOUT", "STORED", "DECODED"],
            ["block.0-1.mlp.mlp1_weight", "x2", "3x96x128", "MXFP4", "gpt-oss", "39.2", "kB", "147", "kB"],
            ["block.0-1.mlp.mlp2_weight", "x2", "3x128x96", "MXFP4", "gpt-oss", "39.2", "kB", "147", "kB"],
            ["block.0-1.mlp.mlp1_bias", "x2", "3x96", "BF16", "-", "1.15", "kB", "1.15", "kB"],
            ["block.0-1.mlp.mlp2_bias", "x2", "3x128", "BF16", "-", "1.54", "kB", "1.54", "kB"],
        ]
        assert totals == "8 tensors, 4 of them MXFP4: 81 kB stored, 298 kB with packed ones decoded to bfloat16"
        assert round(stored_bytes(ORIGINAL.glob("*.safetensors")) / 1000) == 81
        with mxfp4np.Checkpoint(ORIGINAL) as checkpoint:
            assert round(sum(array.nbytes for array in checkpoint.values()) / 1000) == 298

    def test_columns_line_up(self, command):
        table = command("inspect", HF)[1].splitlines()[:-2]
        assert len({line.index(word) for line, word in zip(table[1:], ["3x"] * 4, strict=True)}) == 1
        assert table[0].index("SHAPE") == table[1].index("3x96")

    def test_layers_that_differ_are_not_collapsed(self, command, tmp_path):
        arrays = {f"layer.{i}.w": np.zeros(3 + (i == 2), np.float32) for i in range(4)}
        mxfp4np.save_file(arrays, tmp_path / "m.safetensors")
        lines = [line.split() for line in command("inspect", tmp_path)[1].splitlines()]
        assert lines[1][:4] == ["layer.0-1,3.w", "x3", "3", "F32"]
        assert lines[2][:3] == ["layer.2.w", "4", "F32"]

    @pytest.mark.parametrize("path", [HF, HF / "model.safetensors.index.json"])
    def test_takes_a_folder_or_an_index(self, command, path):
        assert command("inspect", path) == command("inspect", HF)

    def test_pattern(self, command):
        status, out, _ = command("inspect", ORIGINAL, "block.1.*mlp1*")
        lines = out.splitlines()
        assert status == 0
        assert [line.split()[0] for line in lines[1:-2]] == ["block.1.mlp.mlp1_weight", "block.1.mlp.mlp1_bias"]
        assert lines[-1].startswith("2 tensors, 1 of them MXFP4: ")

    @pytest.mark.parametrize(
        "arguments", [(ORIGINAL, PLAIN, "--json"), (ORIGINAL, "--json", PLAIN), ("--json", ORIGINAL, PLAIN)]
    )
    def test_options_stand_anywhere(self, command, arguments):
        status, out, err = command("inspect", *arguments)
        assert (status, err) == (0, "")
        assert [tensor["name"] for tensor in json.loads(out)["tensors"]] == [PLAIN]

    def test_patterns(self, command):
        lines = command("inspect", ORIGINAL, "*1_bias", "block.1.mlp.mlp2_weight", "block.[1].*bias")[1].splitlines()
        names = ["block.0-1.mlp.mlp1_bias", "block.1.mlp.mlp2_weight", "block.1.mlp.mlp2_bias"]
        assert [line.split()[0] for line in lines[1:-2]] == names

    @pytest.mark.parametrize(
        ("pattern", "hint"),
        [
            ("no such*", "it has 8 tensors"),
            ("*.mlp1_wieght", "did you mean '*.mlp1_weight'?"),
            ("blok.1.*", "did you mean 'block.1.*'?"),
            ("mlp2_bias", "did you mean '*mlp2_bias*'?"),
            ("block.7.*", "it has 8 tensors"),
        ],
    )
    @pytest.mark.parametrize("what", ["inspect", "decode"])
    def test_pattern_of_nothing(self, refused, tmp_path, pattern, hint, what):
        output = ("-o", tmp_path / "out.safetensors") if what == "decode" else ()
        message = f"mxfp4np: no tensor is called like {pattern!r} in {ORIGINAL}: {hint}"
        assert refused(what, ORIGINAL, "block.0.*", pattern, *output) == message

    def test_quiet_shows_only_what_is_wrong(self, command, tmp_path):
        assert command("inspect", ORIGINAL, "--stats", "--quiet") == (0, "", "")
        mxfp4np.save_file({"x.blocks": np.zeros((2, 16), np.uint8), "y": np.zeros(3)}, tmp_path / "m.safetensors")
        status, out, err = command("inspect", tmp_path, "--quiet")
        assert (status, err) == (0, "")
        assert out.count("\n") == 1
        assert "'x.scales'" in out
        assert json.loads(command("inspect", tmp_path, "--quiet", "--json")[1])["totals"]["tensors"] == 2

    @pytest.mark.parametrize("path", [ORIGINAL, HF])
    def test_json(self, command, path):
        status, out, err = command("inspect", path, "--json")
        assert (status, err) == (0, "")
        report = json.loads(out)
        with mxfp4np.Checkpoint(path) as checkpoint:
            assert report["files"] == [str(file) for file in checkpoint.files]
            assert [tensor["name"] for tensor in report["tensors"]] == list(checkpoint)
            for tensor in report["tensors"]:
                value = checkpoint[tensor["name"]]
                assert tensor["shape"] == list(value.shape)
                assert tensor["decoded_nbytes"] == value.nbytes
                assert tensor["nbytes"] == sum(half["nbytes"] for half in tensor["stored"])
                assert len(tensor["stored"]) == (2 if tensor["dtype"] == "MXFP4" else 1)
                for half in tensor["stored"]:
                    data = np.fromfile(half["file"], np.uint8, half["nbytes"], offset=half["offset"])
                    assert data.tobytes() == checkpoint.stored[half["name"]].tobytes()
                    assert np.prod(half["shape"]) * (2 if half["dtype"] == "BF16" else 1) == half["nbytes"]
            total = sum(array.nbytes for array in checkpoint.values())
            stored = stored_bytes(checkpoint.files)
        assert report["totals"] == {"tensors": 8, "packed": 4, "nbytes": stored, "decoded_nbytes": total}

    def test_json_pattern(self, command):
        report = json.loads(command("inspect", ORIGINAL, PLAIN, "--json")[1])
        assert [tensor["name"] for tensor in report["tensors"]] == [PLAIN]
        assert report["totals"]["tensors"] == 1


@pytest.fixture
def crafted(tmp_path):
    """A checkpoint of two layers whose counts are known from NumPy alone."""
    rng = np.random.default_rng(1)
    path = tmp_path / "model.safetensors"
    layers = {}
    for i in range(2):
        blocks = rng.integers(0, 256, (3, 5, 4, 16), np.uint8)
        scales = rng.integers(120, 126, (3, 5, 4), np.uint8)
        blocks[0, 0] = 0
        blocks[1, i, :3] = 0x88  # -0.0 only: a zero block, too
        blocks[2, 0, 0] = [0x80] * 8 + [0x08] * 8
        blocks[2, 1, 0] = [0] * 15 + [0x10]  # not quite a zero block
        scales[i, 2, :2] = 255
        layers[f"layer.{i}.w"] = (blocks, scales)
    tensors = {name: mxfp4np.MXFP4Array(*pair) for name, pair in layers.items()}
    mxfp4np.save_file({**tensors, "bias": np.zeros(3, np.float32)}, path)
    return path, layers


def counted(pairs):
    """Count codes, scales and the rest without the library."""
    codes, scales = np.zeros(16, int), np.zeros(256, int)
    result = {"blocks": 0, "zero_blocks": 0}
    for blocks, factors in pairs:
        nibbles = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(-1, 32)
        result["blocks"] += len(nibbles)
        result["zero_blocks"] += sum(all(code in (0, 8) for code in block) for block in nibbles.tolist())
        for code in nibbles.reshape(-1):
            codes[code] += 1
        for scale in factors.reshape(-1):
            scales[scale] += 1
    return {
        **result,
        "nan_scales": int(scales[255]),
        "negative_zeros": int(codes[8]),
        "codes": codes.tolist(),
        "scales": {str(scale): int(count) for scale, count in enumerate(scales) if count},
    }


class TestStats:
    def test_json(self, command, crafted):
        path, layers = crafted
        tensors = {t["name"]: t for t in json.loads(command("inspect", path, "--stats", "--json")[1])["tensors"]}
        for name, pair in layers.items():
            assert tensors[name]["stats"] == counted([pair])
        assert "stats" not in tensors["bias"]

    def test_text(self, command, crafted):
        path, layers = crafted
        expected = counted(layers.values())
        status, out, err = command("inspect", path, "--stats")
        assert (status, err) == (0, "")
        _, stats = out.split("\n\n")
        name, summary, *bars = stats.splitlines()
        blocks = expected["blocks"]
        assert name == "layer.0-1.w"
        assert summary.strip() == (
            f"zero blocks {expected['zero_blocks'] / blocks:.2%}, NaN scales {expected['nan_scales'] / blocks:.2%}, "
            f"-0.0 {expected['negative_zeros'] / (32 * blocks):.2%}"
        )
        shown = {}
        for line in bars:
            what, label, share, *bar = line.split()
            shown[what, label] = share
            assert set("".join(bar)) <= {"#"}
            assert bool(bar) == (float(share.rstrip("%")) > 0)
        for scale, count in expected["scales"].items():
            label = "NaN" if scale == "255" else f"2^{int(scale) - 127}"
            assert shown.pop(("scale", label)) == f"{count / blocks:.2%}"
        for code, count in enumerate(expected["codes"]):
            label = "0" if code == 0 else f"{FP4_VALUES[code]:+g}"
            assert shown.pop(("value", label)) == f"{count / (32 * blocks):.2%}"
        assert set(shown.values()) <= {"0.00%"}, "scales that do not occur"

    def test_pattern_chooses_what_is_read(self, command, crafted):
        path, layers = crafted
        out = command("inspect", path, "layer.1.*", "--stats", "--json")[1]
        (tensor,) = json.loads(out)["tensors"]
        assert tensor["stats"] == counted([layers["layer.1.w"]])

    def test_of_nothing_packed(self, command, crafted):
        assert "\n\n" not in command("inspect", crafted[0], "bias", "--stats")[1]

    def test_of_an_empty_tensor(self, command, tmp_path):
        empty = mxfp4np.MXFP4Array(np.zeros((0, 2, 16), np.uint8), np.zeros((0, 2), np.uint8))
        mxfp4np.save_file({"w": empty}, tmp_path / "m.safetensors")
        status, out, err = command("inspect", tmp_path, "--stats")
        assert (status, err) == (0, "")
        assert "0x64" in out
        assert "zero blocks 0.00%" in out


class TestBrokenPair:
    @pytest.fixture
    def path(self, tmp_path):
        mxfp4np.save_file(
            {
                "half.blocks": np.zeros((2, 1, 16), np.uint8),
                "odd.blocks": np.zeros((2, 1, 16), np.uint8),
                "odd.scales": np.zeros((3, 1), np.uint8),
                "whole": mxfp4np.MXFP4Array(np.zeros((2, 1, 16), np.uint8), np.zeros((2, 1), np.uint8)),
                "plain": np.zeros(3, np.float32),
            },
            tmp_path / "m.safetensors",
        )
        return tmp_path / "m.safetensors"

    @pytest.mark.parametrize("options", [(), ("--stats",)])
    def test_is_shown_with_the_rest(self, command, path, options):
        status, out, err = command("inspect", path, *options)
        assert (status, err) == (0, "")
        lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()[:5]}
        assert lines["half"] == lines["odd"] == ["broken"]
        assert lines["whole"][:3] == ["2x32", "MXFP4", "gpt-oss"]
        assert lines["plain"][:2] == ["3", "F32"]
        assert re.search(r"^.*'half\.blocks'.*expected 'half\.scales'.*found none", out, re.MULTILINE)
        assert re.search(r"^.*'odd\.scales'.*\[2, 1\].*found \[3, 1\]", out, re.MULTILINE)
        assert "4 tensors, 1 of them MXFP4" in out

    def test_in_json(self, command, path):
        tensors = {t["name"]: t for t in json.loads(command("inspect", path, "--json", "--stats")[1])["tensors"]}
        assert "half.scales" in tensors["half"]["problem"]
        assert "[3, 1]" in tensors["odd"]["problem"]
        assert tensors["whole"]["stats"]["blocks"] == 2
        assert "problem" not in tensors["plain"]

    def test_cannot_be_decoded_but_others_can(self, command, refused, path, tmp_path):
        output = tmp_path / "out.npy"
        assert "'half.scales'" in refused("decode", path, "half", "-o", output, "--dtype", "float32")
        assert not output.exists()
        assert command("decode", path, "whole", "-o", output, "--dtype", "float32")[0] == 0


class TestEscapes:
    """Names come from files that strangers made: they must not steer the terminal."""

    EVIL = f"a{ESC}[31m\x07\r\n\u202eb\x9b"

    @pytest.fixture
    def path(self, tmp_path):
        folder = tmp_path / f"folder{ESC}[2J"
        folder.mkdir()
        path = folder / f"m{ESC}[1m.safetensors"
        tensors = {f"{self.EVIL}.packed": mxfp4np.MXFP4Array(np.zeros((1, 16), np.uint8), np.zeros(1, np.uint8))}
        tensors[f"{self.EVIL}.broken_blocks"] = np.zeros((2, 1, 16), np.uint8)
        mxfp4np.save_file({**tensors, self.EVIL: np.zeros(3, np.float32)}, path)
        return path

    def assert_clean(self, text):
        assert all(c.isprintable() or c == "\n" for c in text), f"unprintable characters in {text!r}"

    @pytest.mark.parametrize("options", [(), ("--stats",), ("--json",), ("--json", "--stats")])
    def test_inspect(self, command, path, options):
        status, out, err = command("inspect", path, *options)
        assert (status, err) == (0, "")
        self.assert_clean(out)
        if "--json" in options:
            assert self.EVIL in {tensor["name"] for tensor in json.loads(out)["tensors"]}
        else:
            assert "a\\x1b[31m\\x07\\r\\n\\u202eb\\x9b.packed" in out

    def test_decode(self, command, path, tmp_path):
        output = tmp_path / f"o{ESC}[1m.npy"
        status, out, err = command("decode", path, self.EVIL, "-o", output)
        assert (status, err) == (0, "")
        self.assert_clean(out)
        same_bits(np.load(output), np.zeros(3, np.float32))

    @pytest.mark.parametrize(
        "name",
        ["nothing like it", EVIL + "x", EVIL + ".broken", EVIL + ".broken_blocks"],
    )
    def test_errors(self, refused, path, tmp_path, name):
        self.assert_clean(refused("decode", path, name, "-o", tmp_path / "x.safetensors"))

    def test_errors_about_files(self, refused, path, tmp_path):
        self.assert_clean(refused("inspect", path.parent / "missing"))
        path.write_bytes(b"garbage")
        self.assert_clean(refused("inspect", path))
        self.assert_clean(refused("decode", path, "w", "-o", tmp_path / f"{ESC}.npz"))

    def test_errors_about_usage(self, refused):
        self.assert_clean(refused("inspect", "a", "b", f"{ESC}[31mc"))


class TestClosedPipe:
    @pytest.fixture
    def many(self, tmp_path):
        """A checkpoint whose table is larger than the buffer of a pipe."""
        arrays = {f"{'tensor' * 10}x{i}": np.zeros(1, np.uint8) for i in range(3000)}
        mxfp4np.save_file(arrays, tmp_path / "many.safetensors")
        return tmp_path

    @pytest.mark.parametrize("options", [(), ("--json",)])
    def test_reader_that_saw_enough(self, many, options):
        running = process("inspect", many, *options)
        assert running.stdout.read(4)
        running.stdout.close()
        assert running.stderr.read() == b""
        running.stderr.close()
        assert running.wait(60) == 0

    @pytest.mark.parametrize("arguments", [("inspect", str(HF)), ("inspect", str(HF), "--stats"), ("--help",)])
    def test_reader_that_is_gone(self, arguments):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "wb") as pipe:
            running = process(*arguments, stdout=pipe)
            _, err = running.communicate(timeout=60)
        assert err == b""
        assert running.returncode == 0

    @pytest.mark.skipif(sys.platform == "win32", reason="needs a shell that can close a stream")
    def test_no_stdout_at_all(self):
        line = f"{shlex.join([sys.executable, '-m', 'mxfp4np', 'inspect', str(HF)])} >&-"
        done = subprocess.run(["/bin/sh", "-c", line], env=environment(), capture_output=True, timeout=60, check=False)
        assert b"Traceback" not in done.stderr

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_full_disk(self):
        with Path("/dev/full").open("wb") as full:
            running = process("inspect", HF, stdout=full)
            _, err = running.communicate(timeout=60)
        assert running.returncode == 2
        assert err.decode().count("\n") == 1
        assert os.strerror(errno.ENOSPC) in err.decode()


def test_names_that_the_terminal_cannot_show(tmp_path):
    mxfp4np.save_file({"gewicht.\N{LATIN SMALL LETTER U WITH DIAERESIS}": np.zeros(3)}, tmp_path / "m.safetensors")
    env = environment(PYTHONIOENCODING="ascii")
    status, out, err = finish(process("inspect", tmp_path, env=env))
    assert (status, err) == (0, "")
    assert "gewicht." in out


# decode


class TestDecodeToSafetensors:
    @pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32"])
    def test_several_tensors(self, command, tmp_path, dtype):
        output = tmp_path / "out.safetensors"
        names = ["block.1.mlp.mlp2_weight", PLAIN, PACKED, "block.1.mlp.mlp2_bias"]
        options = () if dtype is None else ("--dtype", dtype)
        status, out, err = command("decode", ORIGINAL, *names, "-o", output, *options)
        assert (status, err) == (0, "")
        loaded = mxfp4np.load_file(output)
        assert sorted(loaded) == sorted(names)
        for name in names:
            same_bits(loaded[name], value_of(ORIGINAL, name, dtype=dtype))
        assert out == f"wrote {output}: {sum(a.nbytes for a in loaded.values()) / 1000:.3g} kB of tensor data\n"
        assert names_in(tmp_path) == ["out.safetensors"]

    @pytest.mark.parametrize("path", [ORIGINAL, HF])
    def test_all_tensors(self, command, tmp_path, path):
        output = tmp_path / "out.safetensors"
        expected = mxfp4np.load_file(path)
        assert command("decode", path, *expected, "-o", output)[0] == 0
        loaded = mxfp4np.load_file(output)
        assert loaded.keys() == expected.keys()
        for name, array in expected.items():
            same_bits(loaded[name], array)

    def test_plain_tensors_stay_as_they_are(self, command, tmp_path):
        arrays = {
            "f64": np.linspace(0, 1, 7),
            "i64": np.arange(5),
            "bool": np.array([True, False]),
            "f8": np.arange(4).astype(ml_dtypes.float8_e4m3fn),
            "scalar": np.float32(3),
            "empty": np.zeros((0, 3), np.float16),
        }
        mxfp4np.save_file(arrays, tmp_path / "m.safetensors")
        output = tmp_path / "out.safetensors"
        assert command("decode", tmp_path / "m.safetensors", *arrays, "-o", output)[0] == 0
        loaded = mxfp4np.load_file(output)
        for name, array in arrays.items():
            same_bits(loaded[name], np.asarray(array))

    def test_a_part_of_each(self, command, tmp_path):
        output = tmp_path / "out.safetensors"
        names = [PACKED, PLAIN]
        assert command("decode", ORIGINAL, *names, "-o", output, "--index", "1:, 5:9", "--dtype", "float16")[0] == 0
        loaded = mxfp4np.load_file(output)
        for name in names:
            same_bits(loaded[name], value_of(ORIGINAL, name, dtype="float16", index=np.s_[1:, 5:9]))

    def test_options_stand_anywhere(self, command, tmp_path):
        output = tmp_path / "out.safetensors"
        arguments = ["--dtype", "float32", ORIGINAL, PACKED, "-o", output, PLAIN]
        status, _, err = command("decode", *arguments)
        assert (status, err) == (0, "")
        assert sorted(mxfp4np.load_file(output)) == sorted([PACKED, PLAIN])

    def test_replaces_an_older_file(self, command, tmp_path):
        output = tmp_path / "out.safetensors"
        output.write_bytes(b"old")
        assert command("decode", ORIGINAL, PACKED, "-o", output)[0] == 0
        assert list(mxfp4np.load_file(output)) == [PACKED]

    def test_quiet(self, command, tmp_path):
        assert command("decode", ORIGINAL, PACKED, "-o", tmp_path / "out.safetensors", "--quiet") == (0, "", "")

    def test_json(self, command, tmp_path):
        output = tmp_path / "out.safetensors"
        status, out, err = command("decode", ORIGINAL, PACKED, PLAIN, "-o", output, "--json")
        assert (status, err) == (0, "")
        nbytes = sum(array.nbytes for array in mxfp4np.load_file(output).values())
        assert json.loads(out) == {"file": str(output), "bytes": nbytes, "tensors": [PACKED, PLAIN]}

    @pytest.mark.parametrize("short", ["bf16", "FP16", "f16", "half", "fp32", "F32"])
    def test_short_names_of_dtypes(self, command, tmp_path, short):
        output = tmp_path / "out.safetensors"
        assert command("decode", ORIGINAL, PACKED, "-o", output, "--dtype", short)[0] == 0
        name = {"b": "bfloat16", "f": "float32" if "32" in short else "float16", "h": "float16"}[short[0].lower()]
        same_bits(mxfp4np.load_file(output)[PACKED], value_of(ORIGINAL, PACKED, dtype=name))

    def test_patterns(self, command, tmp_path):
        output = tmp_path / "out.safetensors"
        assert command("decode", ORIGINAL, "*.mlp1_*", PACKED, "block.[1].*2_bias", "-o", output)[0] == 0
        with mxfp4np.Checkpoint(ORIGINAL) as checkpoint:
            names = {name for name in checkpoint if ".mlp1_" in name} | {"block.1.mlp.mlp2_bias"}
        assert mxfp4np.load_file(output).keys() == names

    def test_format(self, command, tmp_path):
        output = tmp_path / "weights.bin"
        assert command("decode", ORIGINAL, PACKED, "-o", output, "--format", "safetensors")[0] == 0
        assert command("decode", ORIGINAL, PACKED, "-o", tmp_path / "out.safetensors")[0] == 0
        assert output.read_bytes() == (tmp_path / "out.safetensors").read_bytes()


class TestDecodeToNpy:
    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    @pytest.mark.parametrize("name", [PACKED, PLAIN])
    def test_equals(self, command, tmp_path, dtype, name):
        output = tmp_path / "out.npy"
        status, out, err = command("decode", ORIGINAL, name, "-o", output, "--dtype", dtype)
        assert (status, err) == (0, "")
        assert str(output) in out
        same_bits(np.load(output), value_of(ORIGINAL, name, dtype=dtype))
        same_bits(np.load(output, mmap_mode="r"), value_of(ORIGINAL, name, dtype=dtype))
        assert names_in(tmp_path) == ["out.npy"]

    @pytest.mark.parametrize("options", [(), ("--dtype", "bfloat16")])
    @pytest.mark.parametrize("name", [PACKED, PLAIN])
    def test_bfloat16_is_refused(self, refused, tmp_path, name, options):
        output = tmp_path / "out.npy"
        message = refused("decode", ORIGINAL, name, "-o", output, *options)
        assert "bfloat16" in message
        assert "--dtype float32" in message
        assert ".safetensors" in message
        assert names_in(tmp_path) == []

    def test_two_names_are_refused(self, refused, tmp_path):
        output = tmp_path / "out.npy"
        output.write_bytes(b"old")
        message = refused("decode", ORIGINAL, PACKED, PLAIN, "-o", output, "--dtype", "float32")
        assert "one tensor" in message
        assert ".npz or .safetensors" in message
        assert output.read_bytes() == b"old"

    def test_the_same_name_twice_is_one(self, command, tmp_path):
        output = tmp_path / "out.npy"
        assert command("decode", ORIGINAL, PLAIN, PLAIN, "-o", output, "--dtype", "float32")[0] == 0
        same_bits(np.load(output), value_of(ORIGINAL, PLAIN, dtype="float32"))

    @pytest.mark.parametrize("array", [np.arange(6).reshape(2, 3), np.float32(7), np.zeros((2, 0), np.float16)])
    def test_plain_tensors_stay_as_they_are(self, command, tmp_path, array):
        mxfp4np.save_file({"a": array}, tmp_path / "m.safetensors")
        output = tmp_path / "out.npy"
        assert command("decode", tmp_path, "a", "-o", output)[0] == 0
        same_bits(np.load(output), np.asarray(array))


class TestDecodeToNpz:
    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_equals(self, command, tmp_path, dtype):
        output = tmp_path / "out.npz"
        status, _, err = command("decode", ORIGINAL, "block.0.*", "-o", output, "--dtype", dtype, "--index", "1:")
        assert (status, err) == (0, "")
        with np.load(output) as loaded:
            assert len(loaded.files) == 4
            for name in loaded:
                same_bits(loaded[name], value_of(ORIGINAL, name, dtype=dtype, index=np.s_[1:]))

    def test_the_same_bytes_every_time(self, command, tmp_path):
        for name in ("a.npz", "b.npz"):
            assert command("decode", ORIGINAL, PACKED, "-o", tmp_path / name, "--dtype", "fp32")[0] == 0
        assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()

    def test_bfloat16_is_refused(self, refused, tmp_path):
        message = refused("decode", ORIGINAL, PACKED, "-o", tmp_path / "out.npz")
        assert message.endswith("the .npz format cannot name bfloat16: use --dtype float32, or .safetensors")

    @pytest.mark.parametrize("name", ["a\0b", "x" * 70_000])
    def test_names_that_no_archive_can_hold(self, refused, tmp_path, name):
        mxfp4np.save_file({name: np.zeros(3)}, tmp_path / "m.safetensors")
        message = refused("decode", tmp_path / "m.safetensors", "*", "-o", tmp_path / "out.npz")
        assert message.endswith("a .npz file cannot hold this name: use .safetensors")
        assert names_in(tmp_path) == ["m.safetensors"]


class TestDecodeToStandardOutput:
    @pytest.mark.parametrize("options", [(), ("--format", "npz"), ("--format", "safetensors"), ("--quiet",)])
    def test_through_a_pipe(self, tmp_path, options):
        running = process("decode", ORIGINAL, PACKED, "-o", "-", "--dtype", "fp32", *options)
        out, err = running.communicate(timeout=60)
        assert (running.returncode, err) == (0, b"")
        (tmp_path / "out").write_bytes(out)
        found = mxfp4np.load_file(tmp_path / "out") if "safetensors" in options else np.load(tmp_path / "out")
        expected = value_of(ORIGINAL, PACKED, dtype="float32")
        same_bits(found[PACKED] if "--format" in options else found, expected)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (("--json", "--dtype", "fp32"), "--json and a file"),
            ((), "standard output: tensor 'block.0.mlp.mlp1_weight': the .npy format cannot name bfloat16"),
            ((PLAIN, "--dtype", "fp32"), "standard output: the .npy format holds one tensor, not 2"),
        ],
    )
    def test_refused(self, refused, options, reason):
        assert reason in refused("decode", ORIGINAL, PACKED, "-o", "-", *options)

    def test_not_to_a_terminal(self):
        pty = pytest.importorskip("pty")
        master, slave = pty.openpty()
        running = process("decode", ORIGINAL, PACKED, "-o", "-", "--dtype", "fp32", stdout=slave)
        os.close(slave)
        _, err = running.communicate(timeout=60)
        os.close(master)
        assert running.returncode == 2
        assert err.decode().startswith("mxfp4np: standard output is a terminal")

    def test_a_reader_that_is_gone(self):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "wb") as pipe:
            running = process("decode", ORIGINAL, PACKED, "-o", "-", "--dtype", "fp32", stdout=pipe)
            assert running.communicate(timeout=60)[1] == b""
        assert running.returncode == 0


class TestDecodeIndex:
    @pytest.mark.parametrize(
        ("options", "index"),
        [
            (["--index", "2, :64"], np.s_[2, :64]),
            (["--index", "2,:64"], np.s_[2, :64]),
            (["--index", "[2, :64]"], np.s_[2, :64]),
            (["--index", "1"], np.s_[1]),
            (["--index", ":"], np.s_[:]),
            (["--index", "..."], np.s_[...]),
            (["--index", "..., 3:17"], np.s_[..., 3:17]),
            (["--index", "0, ..., 100:"], np.s_[0, ..., 100:]),
            (["--index", "2, ::-1"], np.s_[2, ::-1]),
            (["--index", "::-2, 90:10:-7, -40:-3"], np.s_[::-2, 90:10:-7, -40:-3]),
            (["--index", "1:1"], np.s_[1:1]),
            (["--index=-1,:"], np.s_[-1, :]),
            (["--index=-1, -5:, -33:"], np.s_[-1, -5:, -33:]),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_equals(self, command, tmp_path, options, index, dtype):
        output = tmp_path / ("out.npy" if dtype == "float32" else "out.safetensors")
        status, _, err = command("decode", ORIGINAL, PACKED, "-o", output, "--dtype", dtype, *options)
        assert (status, err) == (0, "")
        loaded = np.load(output) if dtype == "float32" else mxfp4np.load_file(output)[PACKED]
        whole = value_of(ORIGINAL, PACKED, dtype=dtype)
        same_bits(loaded, whole[index])
        same_bits(loaded, value_of(ORIGINAL, PACKED, dtype=dtype, index=index))

    @pytest.mark.parametrize(("text", "index"), [("2, 5", np.s_[2, 5]), ("::-1, ::3", np.s_[::-1, ::3])])
    def test_of_a_plain_tensor(self, command, tmp_path, text, index):
        output = tmp_path / "out.safetensors"
        assert command("decode", ORIGINAL, PLAIN, "-o", output, "--index", text)[0] == 0
        same_bits(mxfp4np.load_file(output)[PLAIN], np.asarray(value_of(ORIGINAL, PLAIN)[index]))

    @pytest.mark.parametrize(
        ("index", "reason"),
        [
            ("3", r"\b3\b.*out of bounds.*size 3"),
            ("=-4", r"-4.*out of bounds.*size 3"),
            ("0, 0, 0", "last axis"),
            ("0, 0, ::2", "step"),
            ("0, 0, :, 0", "3 axes"),
            ("..., ...", r"'\.\.\.'"),
            ("::0", "step"),
        ],
    )
    @pytest.mark.parametrize("suffix", ["npy", "safetensors"])
    def test_that_does_not_fit(self, refused, tmp_path, index, reason, suffix):
        options = ["--index" + index] if index.startswith("=") else ["--index", index]
        output = tmp_path / f"out.{suffix}"
        message = refused("decode", ORIGINAL, PACKED, "-o", output, "--dtype", "float32", *options)
        assert re.search(reason, message)
        assert names_in(tmp_path) == []

    @pytest.mark.parametrize("text", ["x", "1, x", "1.5", "", "1,,2", "1:2:3:4", "None", "1;2", "__import__('os')"])
    def test_that_is_none(self, refused, tmp_path, text):
        message = refused("decode", ORIGINAL, PACKED, "-o", tmp_path / "out.npy", "--dtype", "float32", "--index", text)
        assert "--index" in message
        assert "is not an integer, a slice or '...'" in message

    def test_beyond_any_axis(self, refused, tmp_path):
        output = tmp_path / "out.safetensors"
        message = refused("decode", ORIGINAL, PACKED, "-o", output, "--index", "99999999999999999999999")
        assert "99999999999999999999999" in message


class TestDecodeRefuses:
    def test_unknown_name(self, refused, tmp_path):
        message = refused("decode", ORIGINAL, "block.0.mlp.mlp1_wieght", "-o", tmp_path / "out.safetensors")
        assert "block.0.mlp.mlp1_wieght" in message
        assert f"did you mean {PACKED!r}" in message
        assert names_in(tmp_path) == []

    def test_stored_name_of_a_half(self, refused, tmp_path):
        message = refused("decode", ORIGINAL, PACKED + ".blocks", "-o", tmp_path / "out.safetensors")
        assert f"half of {PACKED!r}" in message

    @pytest.mark.parametrize("name", ["out.pt", "out", "out.safetensors.gz", ".npy"])
    def test_unknown_suffix(self, refused, tmp_path, name):
        message = refused("decode", ORIGINAL, PACKED, "-o", tmp_path / name, "--dtype", "float32")
        assert name in message
        assert ".safetensors, .npy or .npz" in message
        assert names_in(tmp_path) == []

    @pytest.mark.parametrize("suffix", ["npy", "safetensors"])
    def test_missing_folder(self, refused, tmp_path, suffix):
        output = tmp_path / "missing" / f"out.{suffix}"
        message = refused("decode", ORIGINAL, PACKED, "-o", output, "--dtype", "float32")
        assert str(output.parent) in message
        assert ".tmp" not in message, "the user never heard of the hidden file"
        assert names_in(tmp_path) == []

    @pytest.mark.parametrize("name", ["out.npy", "out.safetensors"])
    def test_folder(self, refused, tmp_path, name):
        (tmp_path / name).mkdir()
        message = refused("decode", ORIGINAL, PACKED, "-o", tmp_path / name, "--dtype", "float32")
        assert name in message
        assert "folder" in message
        assert names_in(tmp_path / name) == []

    @pytest.fixture
    def source(self, tmp_path):
        path = tmp_path / "model.safetensors"
        packed = mxfp4np.MXFP4Array(np.full((2, 1, 16), 0x21, np.uint8), np.full((2, 1), 127, np.uint8))
        mxfp4np.save_file({"w": packed}, path)
        return path

    @pytest.mark.parametrize("opened", [".", "model.safetensors"])
    def test_own_file(self, refused, source, opened):
        before = source.read_bytes()
        message = refused("decode", source.parent / opened, "w", "-o", source)
        assert str(source) in message
        assert "part of the checkpoint" in message
        assert source.read_bytes() == before
        assert names_in(source.parent) == [source.name]

    def test_own_file_by_another_name(self, refused, source, monkeypatch):
        before = source.read_bytes()
        monkeypatch.chdir(source.parent)
        assert "part of the checkpoint" in refused("decode", source, "w", "-o", "model.safetensors")
        link = source.parent / "link.safetensors"
        try:
            link.symlink_to(source)
        except OSError as error:
            pytest.skip(f"no symbolic links here: {error}")
        assert "part of the checkpoint" in refused("decode", source, "w", "-o", link)
        assert link.is_symlink()
        assert source.read_bytes() == before


# Errors


class TestErrors:
    @pytest.mark.parametrize("command_", [["inspect"], ["decode", "-o", "out.npy", "--dtype", "float32"]])
    @pytest.mark.parametrize("name", ["missing", "missing.safetensors", "missing.index.json"])
    def test_missing_path(self, refused, tmp_path, monkeypatch, command_, name):
        monkeypatch.chdir(tmp_path)
        path = tmp_path / name
        message = refused(*command_, path, *(["w"] if command_[0] == "decode" else []))
        assert str(path) in message
        assert "No such file" in message

    def test_folder_without_tensors(self, refused, tmp_path):
        assert f"{tmp_path}: no .safetensors files" in refused("inspect", tmp_path)

    @pytest.mark.parametrize("data", [b"", b"garbage", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}tail"])
    def test_malformed_file(self, refused, tmp_path, data):
        path = tmp_path / "m.safetensors"
        path.write_bytes(data)
        assert str(path) in refused("inspect", path)

    @pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": "x"}}'])
    def test_malformed_index(self, refused, tmp_path, text):
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(text)
        assert str(path) in refused("inspect", tmp_path)

    def test_truncated_file(self, refused, tmp_path):
        path = tmp_path / "m.safetensors"
        path.write_bytes(next(ORIGINAL.glob("*.safetensors")).read_bytes()[:-1])
        assert str(path) in refused("inspect", path)

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (["frobnicate"], "frobnicate"),
            (["inspect"], "PATH"),
            (["inspect", "a", "--frobnicate"], "--frobnicate"),
            (["verify", "a", "b", "c"], "unrecognized"),
            (["completion"], "shell"),
            (["completion", "cmd"], "cmd"),
            (["inspect", "a", "--progress", "loud"], "loud"),
            (["decode", "a", "-o", "x.npy"], "NAME"),
            (["decode", "a", "b"], "--output"),
            (["decode", "a", "b", "-o", "x.npy", "--dtype", "float64"], "float64"),
            (["demo", "--size", "3cows"], "3cows"),
            (["demo", "--size=-1MB"], "-1MB"),
        ],
    )
    def test_bad_usage(self, refused, arguments, reason):
        assert reason in refused(*arguments)

    def test_in_a_process(self, tmp_path):
        status, out, err = finish(process("inspect", tmp_path / "missing"))
        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        assert err.startswith("mxfp4np: ")

    def test_no_warnings(self, tmp_path):
        """Converting complex numbers to real ones drops a part: that is refused, or done, but not warned of in code."""
        mxfp4np.save_file({"c": np.zeros(2, np.complex64)}, tmp_path / "m.safetensors")
        _, _, err = finish(process("decode", tmp_path, "c", "-o", tmp_path / "c.npy", "--dtype", "float32"))
        assert err.count("\n") <= 1
        assert "decode.py" not in err

    def test_version(self, command):
        assert command("--version") == (0, f"mxfp4np {mxfp4np.__version__}\n", "")

    @pytest.mark.parametrize("option", ["--version", "--help"])
    def test_quick_answers_import_nothing_heavy(self, option):
        code = """
        import contextlib, io, sys
        from mxfp4np.cli import main
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            main(sys.argv[1:])
        print(*sorted({"numba", "llvmlite", "ml_dtypes", "safetensors", "tqdm", "cupy"} & set(sys.modules)))
        """
        assert run_python(code, option) == "\n"

    @pytest.mark.parametrize("name", [[], ["inspect"], ["decode"], ["demo"]])
    def test_help(self, command, name):
        status, out, err = command(*name, "--help")
        assert (status, err) == (0, "")
        assert out.startswith("usage: mxfp4np")

    def test_help_without_arguments(self, command, monkeypatch):
        expected = command("--help")
        assert expected[0] == 0
        assert command() == expected
        monkeypatch.setattr(sys, "argv", ["mxfp4np", "--version"])
        with pytest.raises(SystemExit):
            main()


# Progress, interruption


def on_terminal(*arguments, **options):
    """Run with standard error on a pseudo-terminal; return the process and a function that gives all it showed."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    running = process(*arguments, stderr=slave, **options)
    os.close(slave)
    shown = []

    def read():
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:  # Linux's way to say that the other end is closed
                break
            if not data:
                break
            shown.append(data)
        os.close(master)

    reader = threading.Thread(target=read)
    reader.start()

    def result():
        out, _ = running.communicate(timeout=120)
        reader.join(120)
        return running.returncode, out.decode(), b"".join(shown).decode()

    return running, result


def last_screen(text):
    """Return what the terminal shows in the end, lines that were written over left out."""
    return [line.rpartition("\r")[2].strip() for line in text.replace("\r\n", "\n").split("\n")]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return sparse(tmp_path_factory.mktemp("large") / "large.safetensors", 128 << 10)  # 268 MB of bfloat16


class TestProgress:
    def test_on_a_terminal(self, large, tmp_path):
        status, out, shown = on_terminal("decode", large, "w", "-o", tmp_path / "out.safetensors")[1]()
        assert status == 0
        assert out.startswith("wrote ")
        assert "decoding" in shown
        assert re.search(r"\d+(\.\d+)?[kMG]B/s", shown), shown
        assert re.search(r"\d+%\|", shown)
        assert last_screen(shown) == [""], "the bar goes when it is done"

    def test_of_stats(self, large):
        status, out, shown = on_terminal("inspect", large, "--stats")[1]()
        assert status == 0
        assert "reading" in shown
        assert "B/s" in shown
        assert "zero blocks 100.00%" in out

    def test_quiet(self, large, tmp_path):
        assert on_terminal("decode", large, "w", "-o", tmp_path / "out.safetensors", "--quiet")[1]() == (0, "", "")

    def test_piped(self, large, tmp_path):
        status, out, err = finish(process("decode", large, "w", "-o", tmp_path / "out.safetensors"))
        assert (status, err) == (0, "")
        assert out.count("\n") == 1

    @pytest.mark.parametrize("options", [("--progress", "plain"), ()])
    def test_lines(self, command, tmp_path, monkeypatch, options):
        """On a terminal if they are asked for, and without one."""
        monkeypatch.setattr(progress, "LINE_SECONDS", 0)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: bool(options), raising=False)
        path = sparse(tmp_path / "m.safetensors", 64 << 10)
        status, _, err = command("decode", path, "w", "-o", tmp_path / "out.safetensors", *options)
        *first, last = err.splitlines()
        assert status == 0
        assert first[0] == "decoding 25%, 33.6 MB of 134 MB"
        assert all(
            re.fullmatch(r"decoding \d+%, \d+\.?\d* MB of 134 MB, [\d.]+ [kMG]B/s, \d+ s left", x) for x in first[1:]
        )
        assert last.startswith("decoding 100%, 134 MB of 134 MB, ")
        status, _, err = command("convert", HF, tmp_path / "out", "--verify", *options)
        assert status == 0
        assert re.search(r"^converting 100%, 347 kB of 347 kB, .*, model\.safetensors model", err, re.MULTILINE)
        assert re.search(r"^verifying 100%, 347 kB of 347 kB, ", err, re.MULTILINE)
        assert "\r" not in err

    def test_lines_are_rare_and_quiet_has_none(self, monkeypatch, capsys):
        for quiet in (False, True):
            times = iter([0.0, 5.0, 20.0, 31.0, 32.0, 60.0, 65.0])
            monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda times=times: next(times)))
            with progress.Reporter(quiet=quiet, plain=True).bytes(60, "reading") as show:
                for _ in range(6):
                    show(10)
            lines = [
                "reading 50%, 30 B of 60 B, 0.769 B/s, 39 s left",
                "reading 100%, 60 B of 60 B, 0.833 B/s, 0 s left",
            ]
            assert capsys.readouterr().err.splitlines() == ([] if quiet else lines)

    def test_error_on_a_terminal_is_one_line(self, large, tmp_path):
        status, out, shown = on_terminal("decode", large, "w", "-o", tmp_path / "missing" / "out.safetensors")[1]()
        assert (status, out) == (2, "")
        lines = last_screen(shown)
        assert len(lines) == 2
        assert lines[0].startswith("mxfp4np: ")


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is another thing there")
class TestInterrupt:
    @pytest.fixture(autouse=True)
    def handled(self):
        """Where the tests themselves run in the background, they, and their children, would ignore Ctrl-C."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    @pytest.fixture
    def huge(self, tmp_path):
        return sparse(tmp_path / "huge.safetensors", 2 << 20)  # 1.1 GB sparse, 8.6 GB of float32

    def interrupt(self, running, folder):
        """Wait until the hidden file holds something, then send Ctrl-C."""
        deadline = time.monotonic() + 60
        while not any(file.stat().st_size > 1 << 20 for file in folder.iterdir()):
            assert running.poll() is None, "it was done before it could be interrupted"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        running.send_signal(signal.SIGINT)

    @pytest.mark.parametrize("name", ["out.safetensors", "out.npy"])
    def test_leaves_nothing(self, huge, tmp_path, name):
        folder = tmp_path / "outputs"
        folder.mkdir()
        running = process("decode", huge, "w", "-o", folder / name, "--dtype", "float32")
        self.interrupt(running, folder)
        status, out, err = finish(running)
        assert (status, out, err) == (130, "", "mxfp4np: interrupted\n")
        assert names_in(folder) == []

    def test_keeps_an_older_file(self, huge, tmp_path):
        folder = tmp_path / "outputs"
        folder.mkdir()
        (folder / "out.npy").write_bytes(b"old")
        running = process("decode", huge, "w", "-o", folder / "out.npy", "--dtype", "float32")
        self.interrupt(running, folder)
        assert finish(running)[0] == 130
        assert names_in(folder) == ["out.npy"]
        assert (folder / "out.npy").read_bytes() == b"old"

    def test_on_a_terminal(self, huge, tmp_path):
        folder = tmp_path / "outputs"
        folder.mkdir()
        running, result = on_terminal("decode", huge, "w", "-o", folder / "out.npy", "--dtype", "float32")
        self.interrupt(running, folder)
        status, out, shown = result()
        assert (status, out) == (130, "")
        assert last_screen(shown) == ["mxfp4np: interrupted", ""]
        assert names_in(folder) == []


def test_sample_of_this_file_is_valid(tmp_path):
    """The sparse files that stand for large checkpoints are what the writer would have written."""
    path = sparse(tmp_path / "s.safetensors", 2)
    specs = {"w.blocks": ("U8", (2, 32, 16)), "w.scales": ("U8", (2, 32))}
    write_safetensors(tmp_path / "t.safetensors", specs, [np.zeros(2 * 32 * 17, np.uint8)])
    same_bits(mxfp4np.load_file(path)["w"], mxfp4np.load_file(tmp_path / "t.safetensors")["w"])
