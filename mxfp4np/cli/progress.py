"""Progress on standard error: a bar on a terminal, elsewhere a line now and then, as for the logs of a container."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from ..rewrite.bar import place_of, progress_bar
from ..rewrite.workers import Progress
from ..text import format_bytes

LINE_SECONDS: Final = 30.0
"""Seconds between two lines: what takes less prints none."""


class Reporter:
    """What a command shows while it works: nothing if ``quiet``, lines if ``plain`` or where there is no terminal."""

    def __init__(self, *, quiet: bool, plain: bool) -> None:
        shown = not quiet and sys.stderr is not None  # None if the shell closed it
        self._bar = shown and not plain and sys.stderr.isatty()
        self._lines = shown and not self._bar

    @contextmanager
    def bytes(self, total: int, what: str) -> Iterator[Callable[[int], object]]:
        """Show bytes, rate and time left; the result is called with the bytes done since the last call."""
        if self._bar:
            from tqdm import tqdm

            with tqdm(unit="B", unit_scale=True, leave=False, total=total, desc=what) as bar:
                yield bar.update
            return
        lines = _Lines(what, enabled=self._lines)
        yield lambda nbytes: lines.show(lines.done + nbytes, total)

    @contextmanager
    def shards(self, what: str) -> Iterator[Callable[[Progress], object]]:
        """Show shard, tensor, bytes, rate and time left; the result is what `convert` takes as ``progress``."""
        if not self._bar:
            lines = _Lines(what, enabled=self._lines)
            yield lambda now: lines.show(now.done, now.total, lambda: place_of(now))
            return
        # The bar is short, so that a narrow terminal has room for what follows it.
        form = "{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{remaining}, {rate_fmt}{postfix}]"
        with progress_bar(what, bar_format=form, leave=False) as show:
            yield show


class _Lines:
    """Prints a line every `LINE_SECONDS`, with the rate since the first bytes were done: what was compiled before."""

    def __init__(self, what: str, *, enabled: bool) -> None:
        self._what, self._enabled, self.done = what, enabled, 0
        self._first: tuple[float, int] | None = None
        self._next = time.monotonic() + LINE_SECONDS

    def show(self, done: int, total: int, place: Callable[[], str] = str) -> None:
        """Print a line, if it is time for one."""
        if done < self.done:  # everything is written: verification begins
            self._what, self._first = "verifying", None
        now, self.done = time.monotonic(), done
        begin, before = self._first = self._first or (now, done)
        if now < self._next or not self._enabled:
            return
        self._next = now + LINE_SECONDS
        parts = [f"{self._what} {done / max(total, 1):.0%}", f"{format_bytes(done)} of {format_bytes(total)}"]
        if now > begin and done > before:
            rate = (done - before) / (now - begin)
            parts += [f"{format_bytes(rate)}/s", f"{(total - done) / rate:,.0f} s left"]
        print(", ".join(filter(None, (*parts, place()))), file=sys.stderr, flush=True)
