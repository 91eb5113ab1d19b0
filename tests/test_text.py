"""Text: patterns choose names, nothing steers the terminal, sizes are close and plain, columns are aligned."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxfp4np.text import align, as_json, escape, format_bytes, select


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain name.0", "plain name.0"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb\r\tc\0", "a\\nb\\r\\tc\\x00"),
        ("\x7f\x9b", "\\x7f\\x9b"),
        ("\u202e", "\\u202e"),
        ("\udcff", "\\udcff"),
        ("\U000e0001", "\\U000e0001"),
        ("größe 中", "größe 中"),
        ("", ""),
    ],
)
def test_escape(text, shown):
    assert escape(text) == shown


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.floats().map(np.float64) | st.text(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
)


@given(anything)
def test_json_is_strict(value):
    def refuse(constant):
        pytest.fail(f"{constant} is not JSON")

    text = as_json(value)
    again = json.loads(text, parse_constant=refuse)
    if not any(word in json.dumps(value) for word in ("NaN", "Infinity")):
        assert text == json.dumps(value)
        assert again == json.loads(json.dumps(value))


def test_numbers_that_json_lacks_are_null():
    assert as_json({"a": (np.nan, [-np.inf, 1.5])}) == '{"a": [null, [null, 1.5]]}'


@given(st.text())
def test_escaped_text_is_printable(text):
    assert escape(text).isprintable()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1536, "1.54 kB"),
        (12_345, "12.3 kB"),
        (999_499, "999 kB"),
        (999_999, "1 MB"),
        (13_761_264_768, "13.8 GB"),
        (1_560_000_000_000, "1.56 TB"),
        (0.5, "0.5 B"),
    ],
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text


@given(
    st.integers(0, 999 * 10**12)
    | st.builds(lambda power, less: 1000**power - less, st.integers(1, 4), st.integers(1, 9))
)
def test_sizes_are_close_and_plain(count):
    number, unit = format_bytes(count).split()
    assert "e" not in number
    assert float(number) * 1000 ** ["B", "kB", "MB", "GB", "TB"].index(unit) == pytest.approx(count, rel=0.006)


def test_columns_are_aligned():
    rows = [("NAME", "BYTES"), ("w", "17"), ("", "")]
    assert align(rows) == ["NAME  BYTES", "w     17", ""]
    assert align(rows, left=1) == ["NAME  BYTES", "w        17", ""]


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        ((), (), ["a.w", "a.b", "c.w"]),
        (["a.*", "c.w"], ["*.b"], ["a.w", "c.w"]),
        ("*.w", "c*", ["a.w"]),
        (["A.W"], (), []),
    ],
)
def test_patterns_select_names_in_order(include, exclude, chosen):
    assert select(["a.w", "a.b", "c.w"], include, exclude) == chosen
