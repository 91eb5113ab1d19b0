"""The benchmarks' rows and reports: that they are complete and up to date, never how fast anything was."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

import mxfp4np
from benchmarks import converters, encode, ggml, limits, model, peers, report, scaling, startup
from benchmarks.timing import amount

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "results.json"
TINY = Namespace(experts=1, rounds=1, threads=2)


def rows_of(markdown):
    return [line for line in markdown.splitlines() if line.startswith("|")][2:]


def test_the_table_of_the_page_on_speed_is_that_of_the_results():
    results, text = json.loads(RESULTS.read_text()), (ROOT / "docs" / "speed.md").read_text()
    assert report.with_table(text, results) == text
    rows = rows_of(text.partition(report.BEGIN)[2].partition(report.END)[0])
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [
        subject.name for group in peers.GROUPS for subject in group
    ]
    assert RESULTS.with_suffix(".md").read_text() == report.markdown(results)


@pytest.mark.parametrize("old", ["", "\n", "\n| old | table |\n|---|---|\n\nand its caption\n"])
def test_the_table_is_written_whatever_was_there(old):
    results = json.loads(RESULTS.read_text())
    text = report.with_table(f"before\n{report.BEGIN}{old}{report.END}\nafter\n", results)
    assert len(rows_of(text)) == len(results["peers"]["rows"]) > 0
    assert text.startswith(f"before\n{report.BEGIN}\n|")
    assert text.endswith(f".\n{report.END}\nafter\n")
    assert "old" not in text
    assert report.with_table(text, results) == text


@pytest.mark.parametrize("text", ["", f"{report.BEGIN}\n", f"{report.END}\n{report.BEGIN}\n"])
def test_a_text_without_markers_is_refused(text):
    with pytest.raises(ValueError, match="expected '<!-- table -->'"):
        report.with_table(text, json.loads(RESULTS.read_text()))


def test_every_subject_has_a_row_whether_it_ran_or_not(monkeypatch):
    def not_there(_):
        import a_package_that_is_not_there  # noqa: F401

    def broken(_):
        raise ValueError("one\ntwo")

    named = peers.OURS[0]
    others = [peers.Subject("a", "bfloat16", not_there), peers.Subject("b", "float32", broken)]
    others.append(peers.Subject(peers.REFERENCE, "bfloat16", not_there))
    monkeypatch.setattr(peers, "GROUPS", ([named], others))
    monkeypatch.setattr(peers, "ROW", (64, 90))
    rows = peers.measure(TINY)
    assert [row["missing"] for row in rows] == [None, "not installed", "ValueError: one", "not installed"]
    assert [len(row["rates"]) for row in rows] == [1, 0, 0, 0]
    first, second, third, _ = rows_of(report.table("peers", rows))
    assert first.startswith(f"| {named.name} | bfloat16 | ")
    assert second == "| a | bfloat16 | not installed |  |  |"
    assert third == "| b | float32 | ValueError: one |  |  |"


def ratio(case, threads, ratio, floor):
    rates = {"rate": 1000 * ratio, "other": 1000.0, "ratio": ratio, "lowest": 0.5, "highest": 1.0}
    return {"case": case, "variant": "float16", "threads": threads, "floor": floor, **rates}


def test_a_ratio_has_its_row_and_the_device_is_named():
    rows = [ratio("a : b", 2, 0.949, 0.95), ratio("a : b", 1, 0.94, 0.95), ratio("c : d", 1, 0.5, None)]
    assert rows_of(report.table("cuda", rows)) == [
        "| a : b | float16 | 2 | 949.0 | 1,000.0 | 0.95 | 0.50 to 1.00 | 0.95 met |",
        "| a : b | float16 | 1 | 940.0 | 1,000.0 | 0.94 | 0.50 to 1.00 | 0.95 below |",
        "| c : d | float16 | 1 | 500.0 | 1,000.0 | 0.50 | 0.50 to 1.00 |  |",
    ]
    section = json.loads(RESULTS.read_text())["peers"]
    assert "interleaved rounds; A device; " in report.caption({**section, "device": "A device"})


def test_floors_are_gathered_by_case_and_threads():
    rows = [ratio("a : b", 2, 0.97, 0.6), ratio("a : b", 1, 0.4, 0.5), ratio("a : b", 1, 0.7, 0.6)]
    rows += [ratio("c : d", 1, 0.5, None), amount("e", "", 1, [1, 13, 20], "us", 12), amount("f", "", 1, [1], "s")]
    assert report.floors(rows).splitlines() == [
        "| what : compared with | floor | 1 thread | 2 threads |",
        "|---|---:|---:|---:|",
        "| a : b | 0.5, 0.6 | 0.40 to 0.70 below | 0.97 met |",
        "| e | 12 us | 13.0 above |  |",
    ]
    assert report.floors([]) == ""


@pytest.mark.parametrize(
    ("section", "measure", "count"),
    [
        ("latency", limits.latency, 1),
        ("sizes", scaling.sizes, 4 * 6),
        ("threads", scaling.threads, 4),
        ("limits", limits.measure, 32),
        ("encode", encode.measure, 18),
        ("startup", startup.startup, 5),
        ("model", model.measure, 5),
    ],
)
def test_sections_give_rows(section, measure, count, monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "usable_cpus", lambda: 1)
    monkeypatch.setattr(encode, "torchao", lambda *_: [])
    monkeypatch.setattr(model, "transformers", lambda *_: {})
    monkeypatch.setitem(model.CONFIG, "hidden_size", 64)
    monkeypatch.setitem(model.CONFIG, "intermediate_size", 64)
    rows = rows_of(report.table(section, measure(Namespace(**vars(TINY), folder=tmp_path))))
    assert len(rows) == count
    assert {row.count("|") for row in rows} == {len(report.SECTIONS[section][1]) + 1}


@pytest.fixture
def small_layer(monkeypatch):
    for name in ("EXPERT", "FP8", "BFLOAT16", "FLOAT32"):
        shapes = getattr(converters, name)
        monkeypatch.setattr(converters, name, {key: tuple(min(n, 128) for n in shapes[key]) for key in shapes})
    monkeypatch.setattr(converters, "ALL_EXPERTS", 2)
    monkeypatch.setattr(converters, "find_spec", lambda _: None)


@pytest.mark.usefixtures("small_layer")
@pytest.mark.parametrize("form", converters.FORMS)
def test_every_form_of_a_layer_is_decoded(form, tmp_path):
    mxfp4np.save_file(converters.layer(converters.FORMS[form], 2), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(converters.FORMS[form].config))
    result = mxfp4np.convert(tmp_path, tmp_path / "out", verify=True)
    assert (len(result.contents.decoded), result.contents.quantized) == (2 * 3 + 9, [])
    assert result.verification.findings == []
    mxfp4np.convert(tmp_path / "out", tmp_path / "again", max_shard_size=50_000)
    converters.compare(tmp_path / "out", tmp_path / "again")
    mxfp4np.convert(tmp_path, tmp_path / "other", dtype="float16")
    with pytest.raises(ValueError, match=r"indexer\.wq_b\.weight' differs"):
        converters.compare(tmp_path / "out", tmp_path / "other")


@pytest.mark.usefixtures("small_layer")
def test_a_layer_gives_a_row_with_the_memory_of_its_process(tmp_path):
    (row,) = converters.whole_layer(Namespace(**vars(TINY), folder=tmp_path))
    assert 10e6 < row["anonymous"] < row["resident"]
    assert row["stored"] < row["bytes"]
    (line,) = rows_of(report.table("layer", [row]))
    assert line.startswith("| DeepSeek's own: MXFP4, FP8 | 2 | `convert` | 0.0, 0.0 | ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("order", ["pairs", "halves"])
def test_ggml_is_given_the_same_weights(order):
    quants = pytest.importorskip("gguf.quants", reason="needs the gguf extra; tox -e peers has it")
    rng = np.random.default_rng(0)
    packed = mxfp4np.MXFP4Array(
        rng.integers(0, 256, (2, 3, 16), np.uint8), rng.integers(2, 250, (2, 3), np.uint8), order
    )
    found = quants.dequantize(ggml.rows_of(packed).reshape(2, -1), quants.GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(found, packed.decode("float32"))


def test_ggml_is_left_out_where_it_is_not_built(monkeypatch):
    monkeypatch.delenv("GGML_LIBRARY", raising=False)
    with pytest.raises(ImportError, match="GGML_LIBRARY is not set"):
        ggml.Product([], np.empty((1, 32), np.float32), threads=1)
