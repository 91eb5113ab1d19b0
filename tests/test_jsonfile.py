"""JSON of others: bounded in bytes, values and depth."""

import json
import time

import numpy as np
import pytest

import mxfp4np
from mxfp4np import CheckpointError
from mxfp4np.storage import jsonfile
from mxfp4np.storage.jsonfile import MAX_DEPTH, MAX_VALUES, parse_json, read_json


@pytest.mark.parametrize("value", [{"a": [1, "x", None]}, [], 5, "text", {"": {"b": {}}}])
@pytest.mark.parametrize("encode", [str, str.encode])
def test_what_json_has(value, encode):
    assert parse_json(encode(json.dumps(value))) == value


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize(("depth", "fits"), [(MAX_DEPTH, True), (MAX_DEPTH + 1, False), (900, False), (100_000, False)])
def test_depth(opening, depth, fits):
    text = opening * depth + "1" + {"[": "]"}.get(opening, "}") * depth
    if fits:
        assert parse_json(text)
    else:
        with pytest.raises(ValueError, match="nested more than 64 deep"):
            parse_json(text)


def test_number_of_values(monkeypatch):
    monkeypatch.setattr(jsonfile, "MAX_VALUES", 100)
    assert len(parse_json(b"[" + b"1," * 98 + b"1]")) == 99
    with pytest.raises(ValueError, match="at most 100 values, found about 101"):
        parse_json(b"[" + b"1," * 100 + b"1]")
    assert MAX_VALUES >= 500_000


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"", "not valid JSON: Expecting value"),
        (b"[1]", "expected a JSON object, found list"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
        (b"\xff{}", "not valid JSON: "),
    ],
)
def test_messages_name_the_file(tmp_path, text, found):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=rf"config\.json: {found}"):
        read_json(tmp_path / "config.json")


def test_deep_config_takes_no_time(tmp_path):
    """Which layout it is follows from config.json, in which 900 lists are nested in each other a hundred times."""
    mxfp4np.save_file(
        {"w.weight": np.ones((64, 32), np.uint8), "w.weight_scale": np.ones((64, 2), np.uint8)},
        tmp_path / "m.safetensors",
    )
    deep = "[" * 60 + ",".join(["1"] * 500_000) + "]" * 60
    for text in (f'{{"a": [{"[" * 900 + "1" * 1000 + "]" * 900}]}}', f'{{"quant_method": {deep}}}'):
        (tmp_path / "config.json").write_text(text)
        begin = time.process_time()
        with mxfp4np.Checkpoint(tmp_path) as ckpt, pytest.raises(mxfp4np.LayoutError):
            ckpt.info("w.weight")
        assert time.process_time() - begin < 3
