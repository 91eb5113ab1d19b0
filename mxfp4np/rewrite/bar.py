"""A progress bar for what takes a `Progress`: tqdm's, in a terminal or in a notebook."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..text import escape
from .workers import Progress


def place_of(progress: Progress) -> str:
    """Return the shard and the tensor that are being worked on."""
    shard = re.sub(r"model-0*(\d+)-of-0*(\d+)\.safetensors", r"shard \1/\2", progress.shard)
    return escape(f"{shard} {progress.tensor}")


@contextmanager
def progress_bar(what: str = "", **options: Any) -> Iterator[Callable[[Progress], object]]:
    """Show shard, tensor, bytes, rate and time left of `convert`, `encode_checkpoint` or `verify`.

    In a notebook it is a widget, if ipywidgets is installed; elsewhere a line on standard error.

    Parameters
    ----------
    what : str
        What is shown before the bar.
    **options
        For ``tqdm.auto.tqdm``.

    Yields
    ------
    callable
        What these functions take as ``progress``.

    Examples
    --------
    >>> import tempfile, numpy as np, mxfp4np
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> mxfp4np.save_file({"w": mxfp4np.encode(np.ones((2, 32), np.float32))}, path)
    >>> with mxfp4np.progress_bar("verifying", disable=True) as progress:
    ...     mxfp4np.verify(path, progress=progress)
    <Verification: verified 1 tensor, 34 B read: nothing wrong>
    """
    from tqdm.auto import tqdm

    with tqdm(desc=what or None, unit="B", unit_scale=True, **options) as bar:

        def show(progress: Progress) -> None:
            if bar.disable:
                return
            if progress.done < bar.n:  # everything is written: verification begins
                bar.set_description_str("verifying", refresh=False)
            if progress.done < bar.n or progress.total != bar.total:
                bar.reset(progress.total)
            bar.set_postfix_str(place_of(progress), refresh=False)
            bar.update(progress.done - bar.n)

        yield show
