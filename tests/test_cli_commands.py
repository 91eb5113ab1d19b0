"""Arguments: what is spelled is what is meant, and anything else is refused."""

import argparse
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxfp4np.cli import commands


def spell(index):
    """Return the text a user would type for an index."""
    texts = []
    for item in index:
        if isinstance(item, slice):
            parts = ["" if part is None else str(part) for part in (item.start, item.stop, item.step)]
            texts.append(":".join(parts if item.step is not None else parts[:2]))
        else:
            texts.append("..." if item is Ellipsis else str(item))
    return ",".join(texts)


NUMBERS = st.integers(-(10**6), 10**6)
MAYBE = st.none() | NUMBERS
ITEMS = NUMBERS | st.builds(slice, MAYBE, MAYBE, MAYBE) | st.just(...)


class TestParseIndex:
    @given(st.lists(ITEMS, min_size=1, max_size=6).map(tuple), st.booleans())
    def test_returns_what_was_spelled(self, index, brackets):
        text = spell(index)
        assert repr(commands.parse_index(f"[{text}]" if brackets else text)) == repr(index)

    @given(st.lists(ITEMS, min_size=1, max_size=4).map(tuple), st.data())
    def test_spaces_mean_nothing(self, index, data):
        spaces = st.sampled_from(["", " ", "  ", "\t"])
        text = re.sub(r"[:,]", lambda m: data.draw(spaces) + m[0] + data.draw(spaces), spell(index))
        assert repr(commands.parse_index(data.draw(spaces) + text + data.draw(spaces))) == repr(index)

    @given(st.lists(ITEMS, min_size=1, max_size=4).map(tuple))
    def test_agrees_with_python(self, index):
        text = spell(index)
        python = eval(f"np.s_[{text}]", {"np": np})
        assert repr(commands.parse_index(text)) == repr(python if isinstance(python, tuple) else (python,))

    @given(st.text("0123456789-+:., x[]\n"))
    def test_gives_an_index_or_an_error(self, text):
        try:
            index = commands.parse_index(text)
        except argparse.ArgumentTypeError:
            return
        assert index
        assert all(item is Ellipsis or isinstance(item, int | slice) for item in index)

    def test_trailing_colon(self):
        assert commands.parse_index("1:2:") == (slice(1, 2, None),)


class TestParseSize:
    @pytest.mark.parametrize(
        ("text", "size"), [("1KiB", 1024), ("5GiB", 5 << 30), ("1.5 MiB", 3 << 19), ("2Ti", 2 << 40)]
    )
    def test_binary_units(self, text, size):
        assert commands.parse_size(text) == size

    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("0", 0),
            ("7", 7),
            ("10B", 10),
            ("1k", 1000),
            ("4kB", 4000),
            ("200MB", 200_000_000),
            ("5GB", 5_000_000_000),
            ("1.5 GB", 1_500_000_000),
            (" 2T ", 2_000_000_000_000),
            ("1TB", 1_000_000_000_000),
            ("0.25M", 250_000),
            ("1.001k", 1001),
        ],
    )
    def test_decimal_units(self, text, size):
        assert commands.parse_size(text) == size

    @pytest.mark.parametrize("text", ["", "MB", "-1MB", "1e9", "5PB", "1.MB", ".5MB", "1 2", "nan", "5GBs"])
    def test_others_are_refused(self, text):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
            commands.parse_size(text)

    @given(st.integers(0, 10**12), st.sampled_from([("", 0), ("k", 1), ("M", 2), ("G", 3), ("T", 4)]))
    def test_whole_numbers(self, count, unit):
        letter, power = unit
        if count * 1000**power < 2**53:
            assert commands.parse_size(f"{count}{letter}B") == count * 1000**power
