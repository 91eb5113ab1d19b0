"""Parsers of arguments: each takes the text of one, and raises the error that argparse expects."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentTypeError
from decimal import Decimal
from typing import Any, Final

_INDEX_ITEM: Final = re.compile(r"\s*(?:(\.\.\.)|([+-]?\d+)|([+-]?\d+)?\s*:\s*([+-]?\d+)?\s*(?::\s*([+-]?\d+)?)?)\s*")


def parse_index(text: str) -> tuple[Any, ...]:
    """Return the NumPy index for a text such as ``"7, :128"``."""
    items: list[Any] = []
    for item in text.strip().removeprefix("[").removesuffix("]").removesuffix(",").split(","):
        match = _INDEX_ITEM.fullmatch(item)
        if match is None:
            raise ArgumentTypeError(f"{item.strip()!r} is not an integer, a slice or '...'")
        dots, integer, *bounds = match.groups()
        if any(bound and abs(int(bound)) > sys.maxsize for bound in (integer, *bounds)):
            raise ArgumentTypeError(f"{item.strip()!r} is larger than any axis")
        slices = slice(*(None if bound is None else int(bound) for bound in bounds))
        items.append(Ellipsis if dots else int(integer) if integer else slices)
    return tuple(items)


def parse_size(text: str) -> int:
    """Return the bytes for a text such as ``"200MB"``, in decimal units."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    if match is None:
        raise ArgumentTypeError(f"{text!r} is not a size: expected for instance 200MB or 5GB")
    return int(Decimal(match[1]) * 1000 ** " kmgt".index(match[2] or " "))


def parse_task(text: str) -> tuple[int, int]:
    """Return the two numbers of a text such as ``"2/8"``."""
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
    if match is None:
        raise ArgumentTypeError(f"{text!r} is not a task: expected for instance 2/8")
    return int(match[1]), int(match[2])


def parse_count(text: str) -> int:
    """Return a positive integer."""
    if not re.fullmatch(r"0*[1-9]\d{0,5}", text.strip(), re.ASCII):
        raise ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)
