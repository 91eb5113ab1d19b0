"""Time runs in interleaved rounds and compare their rates with a reference, with a floor for the ratio.

Whatever else the machine does falls on all runs of a round alike, so ratios are taken within a round. It knows nothing
of what is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

from mxfp4np.cli.timing import Run, in_turn

Row = dict[str, Any]


class Subject(NamedTuple):
    """A case ("what : compared with"), its variant, what is run, the bytes that one run moves, and the floor."""

    case: str
    variant: str
    run: Run
    nbytes: float
    floor: float | None = None
    """The lowest ratio that is good enough."""


def repeated(run: Run, times: int) -> Run:
    """Return a run that makes another several times, so that a clock can time it."""

    def runs() -> None:
        for _ in range(times):
            run()

    return runs


def compare(
    reference: tuple[Run, float], subjects: Sequence[Subject], rounds: int, threads: int, **options: Any
) -> Iterator[Row]:
    """Yield a row for each subject: its rate, and its ratio to that of the reference (a run and its bytes)."""
    seconds = in_turn([reference[0], *(subject.run for subject in subjects)], rounds, **options)
    sizes = [reference[1], *(subject.nbytes for subject in subjects)]
    other, *rates = ([nbytes / s / 1e9 for s in taken] for nbytes, taken in zip(sizes, seconds, strict=True))
    for subject, rate in zip(subjects, rates, strict=True):
        ratios = sorted(a / b for a, b in zip(rate, other, strict=True))
        yield {
            "case": subject.case,
            "variant": subject.variant,
            "threads": threads,
            "rate": median(rate),
            "other": median(other),
            "ratio": median(ratios),
            "lowest": ratios[0],
            "highest": ratios[-1],
            "floor": subject.floor,
        }


def amount(
    case: str, variant: str, threads: int, values: Sequence[float], unit: str, ceiling: float | None = None
) -> Row:
    """Return a row for what is better the smaller it is, with the highest median that is good enough."""
    return {
        "case": case,
        "variant": variant,
        "threads": threads,
        "value": median(values),
        "lowest": min(values),
        "highest": max(values),
        "unit": unit,
        "ceiling": ceiling,
    }
