"""Patterns that choose names."""

import pytest

from mxfp4np.selection import select


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
