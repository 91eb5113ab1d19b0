"""The command line: parse, call, print.

Exit status: 0 done, 1 a check found a difference, 2 bad usage or bad input, 130 interrupted. Errors are one line on
standard error; progress shows on a terminal only.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from ..errors import MXFP4Error
from ..text import escape
from .commands import parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    status: int = 0
    try:
        try:
            args = parser().parse_args(arguments)
            status = args.run(args)
        finally:
            if sys.stdout is not None:  # None if the shell closed it
                sys.stdout.flush()
        return status
    except BrokenPipeError:  # nobody reads our output any more
        _discard_output()
        return 0
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except (MXFP4Error, ValueError, IndexError) as error:
        message, status = str(error), 2
    except MemoryError as error:
        message, status = f"out of memory: {error or 'ask for less at a time'}", 2
    except OSError as error:
        message, status = f"{error.filename}: {error.strerror}" if error.filename else str(error), 2
        _discard_output()
    print(f"mxfp4np: {escape(message)}", file=sys.stderr)
    return status


def _discard_output() -> None:
    """Keep the interpreter from complaining, when it exits, that the rest of the output cannot be written."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
