"""What notebooks show of checkpoints, tensors, arrays and results: tables of plain HTML, and short texts."""

import re

import numpy as np
import pytest
from helpers import pair, save_raw

import mxfp4np
from mxfp4np.text import TABLE_ROWS, html_table

HOSTILE = "<script>alert(1)</script>\u202e\x1b[1m&\"'"


def save_plain(folder, name):
    folder.mkdir()
    return save_raw(folder / "model.safetensors", {name: np.ones((2, 64), np.float32)})


@pytest.fixture
def things(tmp_path):
    """Return what has a table, by the text that it has to begin with; names and folders are hostile where they can."""
    save_raw(tmp_path / "packed.safetensors", {HOSTILE: pair(2, 3, 4), "b": np.zeros(3, np.float32)})
    checkpoint = mxfp4np.Checkpoint(tmp_path / "packed.safetensors")
    plain = save_plain(tmp_path / "plain", f"{HOSTILE}.weight")
    encoding = mxfp4np.encode_checkpoint(
        plain, tmp_path / "again", layout="compressed-tensors", include="*", verify=True
    )
    conversion = mxfp4np.convert(tmp_path / "packed.safetensors", tmp_path / HOSTILE.replace("/", ""), verify=True)
    scaled = mxfp4np.ScaledArray(np.zeros((2, 4), np.uint8), np.ones((2, 1), np.float32), "E4M3", (1, 4))
    return {
        "<Checkpoint of 2 tensors in 1 file at": checkpoint,
        "<TensorInfo of '<script>": checkpoint.info(HOSTILE),
        "<TensorInfo of 'b': 3 F32, 12 B in": checkpoint.info("b"),
        "MXFP4Array(shape=(2, 3, 128), nbytes=408)": checkpoint.packed(HOSTILE),
        "ScaledArray(shape=(2, 4)": scaled,
        "<Encoding to": encoding,
        "<Conversion to": conversion,
        "<Verification: verified 1 tensor, 0 B read: 1 finding>": mxfp4np.Verification(1, findings=[HOSTILE]),
    }


def test_texts_are_short(things):
    for begin, thing in things.items():
        assert repr(thing).startswith(begin)
        assert len(repr(thing)) < 400


def test_tables_have_neither_scripts_nor_characters_that_reorder(things):
    for thing in things.values():
        table = thing._repr_html_()
        assert set(re.findall(r"<(\w+)", table)) <= {"table", "caption", "tr", "th", "td"}
        assert re.fullmatch(r"(<[^<>]*>|[^<>])*", table)
        assert table.isprintable()


def test_tables_say_what_it_is(things):
    checkpoint, info, plain, packed, scaled, encoding, conversion, _ = (x._repr_html_() for x in things.values())
    assert "<td>2x3x128</td><td>MXFP4</td><td>gpt-oss</td><td>408 B</td>" in checkpoint
    assert "<th>because</th><td>suffix pair, U8/U8</td>" in info
    assert "<th>b</th><td>3 F32 in packed.safetensors</td>" in plain
    assert "<th>format</th><td>MXFP4, blocks of 32</td>" in packed
    assert "<th>format</th><td>E4M3, blocks of 4</td>" in scaled
    assert "<th>relative error</th><td>0.0000; the largest:</td>" in encoding
    assert "nothing wrong" in encoding
    assert "<th>decoded</th><td>1 tensor; 1 copied</td>" in conversion
    assert "nothing wrong" in conversion


def test_a_table_of_many_rows_ends():
    table = html_table([(str(number),) for number in range(100_000)], ("n",))
    assert table.count("<tr>") == TABLE_ROWS + 2
    assert "and 99,800 more" in table


def test_names_of_stored_tensors_complete(things):
    checkpoint = next(iter(things.values()))
    assert checkpoint.stored._ipython_key_completions_() == list(checkpoint.stored)


def test_a_bar_shows_where_it_is(things, tmp_path, capsys):
    source = things["<TensorInfo of 'b': 3 F32, 12 B in"].stored[0].file.path
    with mxfp4np.progress_bar("converting", mininterval=0, miniters=0, ncols=200) as progress:
        mxfp4np.convert(source, tmp_path / "bar", verify=True, progress=progress)
    shown = capsys.readouterr().err
    assert "converting: 100%" in shown
    assert "verifying: 100%" in shown
    assert "model.safetensors" in shown
    assert "\\u202e" in shown
    assert "\u202e" not in shown
    with mxfp4np.progress_bar(disable=True) as progress:
        progress(mxfp4np.Progress("f", "t", 1, 2))
    assert capsys.readouterr().err == ""
