"""Signals that end a command: the first raises an exception, so that nothing half written stays; the next ends it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

NAMES: Final = ("SIGINT", "SIGTERM", "SIGHUP")
DEFAULTS: Final = (signal.SIG_DFL, signal.default_int_handler)


class EndedError(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}")
        self.status = 128 + number


def ended_by(error: BaseException) -> tuple[str, int] | None:
    """Return the message and status for a signal that an exception comes from, or None if it comes from none.

    What a signal interrupts may raise something else on its way out: argparse an AttributeError, and Python 3.11 a
    RuntimeError out of __set_name__.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    return (str(cause), cause.status) if isinstance(cause, EndedError) else ("interrupted", 128 + signal.SIGINT)


@contextmanager
def raising_first() -> Iterator[None]:
    """Raise `EndedError` in the main thread when the first signal comes; another one then ends the process at once.

    Signals that are ignored, as with nohup, or handled by others stay so.
    """

    def handle(number: int, _: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise EndedError(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
        before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) in DEFAULTS}
    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is handle:  # otherwise the process is about to end
                signal.signal(number, handler)
