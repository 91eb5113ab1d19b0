"""Rows, groups, histograms and sizes: what inspect shows, without the command."""

import json
from pathlib import Path

import numpy as np
import pytest

import mxfp4np
from mxfp4np.cli import report
from mxfp4np.cli.names import matching
from mxfp4np.cli.report import ScaleStats, Stats, stats_of, table_lines, to_json
from mxfp4np.format import FP4_VALUES
from mxfp4np.layouts.packed import TensorInfo
from mxfp4np.summary import Row, collapse, label, rows


def row(name, shape=(2, 3), dtype="BF16", layout=None):
    return Row(name, TensorInfo(name, shape, dtype, layout, (), format=layout and "MXFP4"), None)


def packed(blocks, scales):
    return mxfp4np.MXFP4Array(np.asarray(blocks, np.uint8), np.asarray(scales, np.uint8))


@pytest.fixture
def path(tmp_path):
    tensors = {f"layer.{i}.w": packed(np.full((2, 1, 16), 0x21), [[127], [128]]) for i in range(3)}
    tensors["layer.0.bias"] = np.zeros(4, np.float32)
    tensors["broken.blocks"] = np.zeros((2, 1, 16), np.uint8)
    path = tmp_path / "m.safetensors"
    mxfp4np.save_file(tensors, path)
    return path


# Rows


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.0.b.12.c", "a.#.b.#.c"),
        ("block.7", "block.#"),
        ("0.w", "#.w"),
        ("0", "#"),
        ("1.2.3", "#.#.#"),
        ("w1", "w1"),
        ("1w", "1w"),
        ("mlp.w1.x", "mlp.w1.x"),
        ("layer_1.w", "layer_1.w"),
        ("a.-1.b", "a.-1.b"),
        ("", ""),
    ],
)
def test_numbers_in_names(name, kind):
    assert row(name).kind[0] == kind


def test_kind_is_name_shape_dtype_layout():
    assert row("a.1", (2, 32), "MXFP4", "gpt-oss").kind == ("a.#", (2, 32), "MXFP4", "gpt-oss")
    assert Row("a.1", None, "bad").kind == ("a.#", "bad")


def test_rows_in_order(path):
    with mxfp4np.Checkpoint(path) as checkpoint:
        table = rows(checkpoint)
        assert [row.name for row in table] == list(checkpoint)
        for found in table:
            if found.name == "broken":
                assert found.info is None
                assert "'broken.scales'" in found.problem
            else:
                assert found == Row(found.name, checkpoint.info(found.name), None)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*", ["broken", "layer.0.bias", "layer.0.w", "layer.1.w", "layer.2.w"]),
        ("*.w", ["layer.0.w", "layer.1.w", "layer.2.w"]),
        ("layer.[01].w", ["layer.0.w", "layer.1.w"]),
        ("layer.?.bias", ["layer.0.bias"]),
        ("broken", ["broken"]),
    ],
)
def test_rows_of_a_pattern(path, pattern, names):
    with mxfp4np.Checkpoint(path) as checkpoint:
        found = rows(checkpoint, matching(checkpoint, [pattern]))
        assert sorted(row.name for row in found) == names


@pytest.mark.parametrize("pattern", ["LAYER*", "layer", "", "*.x.[", "?"])
def test_a_pattern_of_nothing(path, pattern):
    with mxfp4np.Checkpoint(path) as checkpoint, pytest.raises(mxfp4np.TensorNotFoundError):
        matching(checkpoint, [pattern])


def test_a_half_of_rows_is_a_name_too():
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with mxfp4np.Checkpoint(Path(__file__).parent / "data" / "gpt_oss_hf") as checkpoint:
        assert matching(checkpoint, [f"{name}/gate", "*.0.*_up_proj", name]) == [f"{name}/gate", name]
        assert rows(checkpoint, [f"{name}/gate"])[0].info.shape[-2] == checkpoint.info(name).shape[-2] // 2


# Groups


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([3], "3"),
        (range(24), "0-23"),
        ([3, 4], "3-4"),
        ([7, 0, 2], "0,2,7"),
        ([*range(12), *range(13, 24)], "0-11,13-23"),
        ([0, 2, 4, 6], "0,2,4,6"),
        (range(1, 36, 2), "1,3,5,..,35"),
        ([9, 10, 100], "9-10,100"),
    ],
)
def test_label_has_ranges(numbers, text):
    assert label([row(f"layers.{i}.w") for i in numbers]) == f"layers.{text}.w"


def test_label_of_layers_and_experts():
    assert label([row(f"0.layers.{i}.experts.{j}.w") for i in (3, 4) for j in range(8)]) == "0.layers.3-4.experts.0-7.w"


def test_numbers_too_long_for_layers_are_names():
    names = [f"a.{digit * 5000}.w" for digit in "12"]
    assert [label(group) for group in collapse(map(row, names)).values()] == names


def test_collapse():
    table = [row("a.0.w"), row("a.0.b", (3,)), row("a.1.w"), row("norm"), row("a.1.b", (3,)), row("a.2.w")]
    groups = collapse(table)
    assert [[row.name for row in group] for group in groups.values()] == [
        ["a.0.w", "a.1.w", "a.2.w"],
        ["a.0.b", "a.1.b"],
        ["norm"],
    ]
    assert [kind[0] for kind in groups] == ["a.#.w", "a.#.b", "norm"]


@pytest.mark.parametrize(
    "other",
    [
        row("a.1", (2, 4)),
        row("a.1", dtype="F32"),
        row("a.1", layout="gpt-oss"),
        row("b.1"),
        Row("a.1", None, "half of it is missing"),
    ],
)
def test_collapse_keeps_apart(other):
    assert len(collapse([row("a.0"), other])) == 2


def test_collapse_of_broken_layers():
    """The same fault in all layers, the usual case when one shard is opened alone, is one line."""
    message = "m.safetensors: tensor 'a.{0}.w.blocks' is half of an MXFP4 pair: expected 'a.{0}.w.scales'"
    groups = collapse([Row(f"a.{i}.w", None, message.format(i)) for i in range(36)])
    assert len(groups) == 1


def test_collapse_of_nothing():
    assert collapse([]) == {}


# Table


def test_table(path):
    with mxfp4np.Checkpoint(path) as checkpoint:
        lines = table_lines(collapse(rows(checkpoint)))
    cells = {line.split()[0]: line.split()[1:] for line in lines[1:4]}
    assert lines[0].split() == ["NAME", "SHAPE", "DTYPE", "LAYOUT", "STORED", "DECODED"]
    assert cells["layer.0-2.w"] == ["x3", "2x32", "MXFP4", "gpt-oss", "102", "B", "384", "B"]
    assert cells["layer.0.bias"] == ["4", "F32", "-", "16", "B", "16", "B"]
    assert cells["broken"] == ["broken"]
    assert "found none" in lines[4]
    assert lines[5:] == [
        "layout gpt-oss: suffix pair, U8/U8; axes [.., out, in]",
        "5 tensors, 3 of them MXFP4: 118 B stored, 400 B with packed ones decoded to bfloat16",
    ]
    assert all(line == line.rstrip() for line in lines)


def test_table_of_scalars_and_strange_names():
    lines = table_lines(collapse([row("a\x1b[1m\n", ())]))
    assert lines[1].split() == ["a\\x1b[1m\\n", "scalar", "BF16", "-", "0", "B", "0", "B"]


def test_problems_are_printed_escaped_and_shortened(tmp_path, command):
    blocks = np.zeros((2, 1, 16), np.uint8)
    mxfp4np.save_file({"a\x1b.blocks": blocks, "b" * 10_000 + ".blocks": blocks}, tmp_path / "m.safetensors")
    status, out, _ = command("inspect", tmp_path)
    assert status == 0
    assert out.replace("\n", "").isprintable()
    assert "'a\\x1b.blocks' is half of an MXFP4 pair" in out
    assert max(map(len, out.splitlines())) <= 1000
    assert json.loads(command("inspect", tmp_path, "--json")[1])["tensors"][1]["name"] == "b" * 10_000


def test_one_long_name_widens_nothing(tmp_path, command):
    names = ["x" * 1_000_000, *(f"name.{i}.{i % 7}x{i}" for i in range(1000))]
    mxfp4np.save_file({name: np.zeros(1, np.uint8) for name in names}, tmp_path / "m.safetensors")
    for arguments in (["inspect"], ["verify"], ["convert", "--dry-run", tmp_path / "dst"]):
        status, out, err = command(arguments[0], tmp_path / "m.safetensors", *arguments[:0:-1])
        assert status == 0
        assert len(out + err) < 200 * 1000


def test_axes_of_packed_matrices():
    table = [row("a", (4, 64, 32), "MXFP4", "gpt-oss-hf"), row("b", (64, 32), "MXFP4", "mlx"), row("c", (4, 64, 32))]
    *_, hf, mlx, vector, _ = table_lines(collapse([*table, row("d", (32,), "MXFP4", "mlx")]))
    assert hf.endswith("; axes [.., out, in], [.., in, out] after convert")
    assert mlx.endswith("; axes [.., out, in]")
    assert "axes" not in vector


def test_table_of_nothing():
    assert table_lines({})[-1] == "0 tensors, 0 of them MXFP4: 0 B stored, 0 B with packed ones decoded to bfloat16"


def test_to_json(path):
    with mxfp4np.Checkpoint(path) as checkpoint:
        stats = Stats()
        stats.add(checkpoint.packed("layer.0.w"))
        result = json.loads(json.dumps(to_json(checkpoint, rows(checkpoint), {"layer.0.w": stats})))
    tensors = {tensor["name"]: tensor for tensor in result["tensors"]}
    assert result["files"] == [str(path)]
    assert result["totals"] == {"tensors": 5, "packed": 3, "nbytes": 118, "decoded_nbytes": 400}
    assert tensors["layer.0.w"]["stats"]["blocks"] == 2
    assert "stats" not in tensors["layer.1.w"]
    assert set(tensors["broken"]) == {"name", "problem"}
    assert tensors["layer.0.bias"]["stored"][0]["file"] == str(path)
    assert tensors["layer.1.w"]["shape"] == [2, 32]
    assert tensors["layer.1.w"]["axes"] == tensors["layer.1.w"]["converted_axes"] == "[.., out, in]"
    assert "axes" not in tensors["layer.0.bias"]
    assert [half["name"] for half in tensors["layer.1.w"]["stored"]] == ["layer.1.w.blocks", "layer.1.w.scales"]


# Stats


def test_counts():
    stats = Stats()
    stats.add(packed([[[0x21] * 16, [0x00] * 15 + [0x80]], [[0x08] * 16, [0xF7] * 16]], [[127, 0], [255, 127]]))
    assert stats.to_json() == {
        "blocks": 4,
        "zero_blocks": 1,
        "nan_scales": 1,
        "negative_zeros": 17,
        "codes": [31 + 16, 16, 16, 0, 0, 0, 0, 16, 17, 0, 0, 0, 0, 0, 0, 16],
        "scales": {0: 1, 127: 2, 255: 1},
    }
    assert stats.codes.sum() == 4 * 32


def test_add_and_merge():
    rng = np.random.default_rng(0)
    arrays = [packed(rng.integers(0, 256, (n, 3, 16)), rng.integers(0, 256, (n, 3))) for n in (2, 5)]
    each = [Stats() for _ in arrays]
    together = Stats()
    for stats, array in zip(each, arrays, strict=True):
        stats.add(array)
        together.add(array)
    before = each[0].to_json()
    assert Stats.merged(each).to_json() == together.to_json()
    assert each[0].to_json() == before, "merging leaves its parts alone"
    assert Stats.merged([]).to_json() == Stats().to_json()


def test_chunks_count_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    array = packed(rng.integers(0, 256, (7, 5, 3, 16)), rng.integers(0, 256, (7, 5, 3)))
    whole, parts, done = Stats(), Stats(), []
    whole.add(array, done.append)
    assert done == [array.nbytes]
    monkeypatch.setattr(report, "STATS_BYTES", 50)
    done.clear()
    parts.add(array, done.append)
    assert len(done) > 1
    assert sum(done) == array.nbytes
    assert parts.to_json() == whole.to_json()


def test_report_lines():
    stats = Stats()
    stats.add(packed([[0x21] * 16, [0x88] * 16], [125, 127]))
    lines = list(stats.lines())
    assert lines[0] == "zero blocks 50.00%, NaN scales 0.00%, -0.0 50.00%"
    assert [line.split() for line in lines[1:4]] == [
        ["scale", "2^-2", "50.00%", "#" * 25],
        ["scale", "2^-1", "0.00%"],
        ["scale", "2^0", "50.00%", "#" * 25],
    ]
    values = {line.split()[1]: line.split()[2] for line in lines[4:]}
    assert list(values) == ["0", *(f"{value:+g}" for value in FP4_VALUES[1:])]
    assert {value: share for value, share in values.items() if share != "0.00%"} == {
        "+0.5": "25.00%",
        "+1": "25.00%",
        "-0": "50.00%",
    }


def test_report_lines_of_nan():
    stats = Stats()
    stats.add(packed([[0] * 16], [255]))
    assert list(stats.lines())[1].split() == ["scale", "NaN", "100.00%", "#" * 50]


def test_report_lines_of_nothing():
    assert next(Stats().lines()) == "zero blocks 0.00%, NaN scales 0.00%, -0.0 0.00%"


def test_what_occurs_has_a_bar():
    stats = Stats()
    stats.scales[:] = [1] + [10**9] * 255
    stats.bytes_[1] = 10**9
    lines = [line for line in stats.lines() if line.startswith("scale")]
    assert len(lines) == 256
    assert lines[0].endswith("#")


def of_floats(scales, width=64, rows=1):
    scales = np.array(scales, np.float32)
    shape = scales.shape[0] * rows, scales.shape[1] * width
    return mxfp4np.ScaledArray(np.zeros(shape, np.uint8), scales, "E4M3", (rows, width))


def test_scales_by_powers_of_two():
    stats = stats_of(of_floats([[0.25, 0.3, 0], [1.5, np.nan, np.inf]]), lambda _: None)
    assert stats.to_json() == {"zero_scales": 1, "nan_scales": 2, "scales": {125: 2, 127: 1, 255: 2}}
    lines = list(stats.lines())
    assert lines[0] == "6 scales, zero 16.67%, NaN or infinite 33.33%"
    assert [line.split()[1:3] for line in lines[1:4]] == [["2^-2", "40.00%"], ["2^-1", "0.00%"], ["2^0", "20.00%"]]
    assert lines[-1].split()[1] == "NaN"
    merged = ScaleStats.merged([stats, stats]).to_json()
    assert (merged["scales"][125], merged["zero_scales"]) == (4, 2)
    assert next(ScaleStats().lines()) == "1 scale, zero 0.00%, NaN or infinite 0.00%"


@pytest.mark.parametrize(("width", "rows"), [(16, 1), (32, 1), (64, 2)])
def test_chunks_of_scales_count_the_same(monkeypatch, width, rows):
    scales = np.random.default_rng(0).normal(size=(9, 5))
    array = of_floats(scales, width, rows)
    whole = stats_of(array, lambda _: None)
    monkeypatch.setattr(report, "STATS_BYTES", 50)
    done = []
    assert stats_of(array, done.append).to_json() == whole.to_json()
    assert sum(done) == array.nbytes
    assert sum(whole.to_json()["scales"].values()) == 45
