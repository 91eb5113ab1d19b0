"""Text: patterns choose names, nothing steers the terminal, sizes are close and plain, columns are aligned."""

import json
import time
from fnmatch import fnmatchcase

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxfp4np.text import CELL_WIDTH, LINE_WIDTH, align, as_json, escape, format_bytes, matcher, select, shorten


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


@pytest.mark.parametrize("text", ["x" * 1_000_000, "\x1b" * 1_000_000, "\U000e0001" * 999, "a" * 1001])
def test_what_is_printed_has_a_bounded_width(text):
    assert len(escape(text)) <= LINE_WIDTH
    (line,) = align([(text, text)])
    assert len(line) <= 2 * CELL_WIDTH + 2
    assert line.isprintable()


@pytest.mark.parametrize(("width", "short"), [(10, "0123456789"), (9, "012...789"), (8, "01...89"), (7, "01...89")])
def test_shortened_in_the_middle(width, short):
    assert shorten("0123456789", width) == short


@given(st.text("ab*?[]!-", max_size=8), st.text("ab*?[]!-", max_size=8))
def test_patterns_are_those_of_fnmatch(pattern, name):
    assert matcher([pattern])(name) == fnmatchcase(name, pattern)


@pytest.mark.parametrize("pattern", ["[" * 20_000, "*a" * 10_000, "[!" * 10_000, "[]" * 10_000, "?" * 20_000])
def test_patterns_take_no_time(pattern):
    begin = time.process_time()
    assert select([pattern[::-1], "a" * 10_000], pattern) in ([], [pattern[::-1]], ["a" * 10_000])
    assert time.process_time() - begin < 3


@pytest.mark.parametrize("patterns", [["*"] * 1001, ["*" * 20_001], ["[" * 100_000]])
def test_too_many_patterns(patterns):
    with pytest.raises(ValueError, match="expected at most 1,000 patterns with wildcards, of 20,000 characters"):
        select(["x"], patterns)
    assert len(select(map(str, range(5000)), list(map(str, range(4000))))) == 4000
