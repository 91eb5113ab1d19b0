"""Progress bars on a terminal; nothing is shown where standard error is none."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from ..text import escape

if TYPE_CHECKING:
    from ..rewrite.workers import Progress

ProgressBar = Callable[[int, str], AbstractContextManager[Callable[[int], object]]]
"""`byte_bar` without ``quiet``."""


def _tqdm(*, quiet: bool, **options: Any) -> Any:
    from tqdm import tqdm

    return tqdm(unit="B", unit_scale=True, leave=False, disable=quiet or not sys.stderr.isatty(), **options)


@contextmanager
def byte_bar(total: int, what: str, *, quiet: bool) -> Iterator[Callable[[int], object]]:
    """Show bytes, rate and time left; the result is called with the bytes done since the last call."""
    with _tqdm(quiet=quiet, total=total, desc=what) as bar:
        yield bar.update


@contextmanager
def shard_bar(what: str, *, quiet: bool) -> Iterator[Callable[[Progress], object]]:
    """Show shard, tensor, bytes, rate and time left; the result is what `convert` takes as ``progress``."""
    # The bar is short, so that a narrow terminal has room for what follows it.
    form = "{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{remaining}, {rate_fmt}{postfix}]"
    with _tqdm(quiet=quiet, desc=what, bar_format=form) as bar:

        def show(progress: Progress) -> None:
            if bar.disable:
                return
            if progress.done < bar.n:  # everything is written: verification begins
                bar.reset()
                bar.set_description_str("verifying", refresh=False)
            bar.total = progress.total
            shard = re.sub(r"model-0*(\d+)-of-0*(\d+)\.safetensors", r"shard \1/\2", progress.shard)
            bar.set_postfix_str(escape(f"{shard} {progress.tensor}"), refresh=False)
            bar.update(progress.done - bar.n)

        yield show
