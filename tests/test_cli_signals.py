"""The first signal that ends a command raises, a second one ends the process, and what others set stays."""

import signal
import subprocess
import sys
import threading

import pytest
from commands import environment

from mxfp4np.cli import commands, main

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are another thing there")

SCRIPT = """
import signal, sys, time
from mxfp4np.cli import commands, main

def command(args):
    try:
        signal.raise_signal(getattr(signal, sys.argv[1]))
        time.sleep(10)
    finally:
        print("cleaned up", flush=True)
        for name in sys.argv[2:]:
            signal.raise_signal(getattr(signal, name))
            print("still there", flush=True)

commands._verify = command
sys.exit(main(["verify", "x"]))
"""


@pytest.mark.parametrize(
    ("signals", "status", "message"),
    [
        (["SIGINT"], 130, "interrupted"),
        (["SIGTERM"], 143, "ended by SIGTERM"),
        (["SIGHUP"], 129, "ended by SIGHUP"),
        (["SIGINT", "SIGINT"], -signal.SIGINT, None),
        (["SIGTERM", "SIGINT"], -signal.SIGINT, None),
        (["SIGINT", "SIGTERM"], -signal.SIGTERM, None),
    ],
)
def test_the_first_signal_cleans_up_and_the_second_ends_at_once(signals, status, message):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # children would ignore what is ignored here
    command = [sys.executable, "-c", SCRIPT, *signals]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    signal.signal(signal.SIGINT, before)
    assert (result.returncode, result.stdout) == (status, "cleaned up\n")
    assert result.stderr == (f"mxfp4np: {message}\n" if message else "")


@pytest.fixture
def hangup():
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize(
    "handler", [signal.SIG_IGN, signal.SIG_DFL, lambda *_: None], ids=["ignored", "default", "own"]
)
def test_handlers_are_as_before_and_those_of_others_stay(monkeypatch, handler):
    found = []

    def command(_):
        found.append(signal.getsignal(signal.SIGHUP))
        return 0

    monkeypatch.setattr(commands, "_verify", command)
    signal.signal(signal.SIGHUP, handler)
    interrupt = signal.getsignal(signal.SIGINT)
    assert main(["verify", "x"]) == 0
    assert (found == [handler]) == (handler is not signal.SIG_DFL)
    assert (signal.getsignal(signal.SIGHUP), signal.getsignal(signal.SIGINT)) == (handler, interrupt)


def test_another_thread_may_run_a_command():
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(main(["verify", "/no/such/folder"])))
    thread.start()
    thread.join()
    assert statuses == [2]


@pytest.mark.parametrize("how", ["during", "because"])
def test_an_error_of_what_was_interrupted_is_an_interrupt(monkeypatch, capsys, how):
    def command(_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise AttributeError("what an interrupt left half done") from (error if how == "because" else None)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(commands, "_verify", command)
    assert main(["verify", "x"]) == 130
    assert capsys.readouterr().err == "mxfp4np: interrupted\n"
    signal.signal(signal.SIGINT, before)


def test_an_error_that_nothing_interrupted_is_raised(monkeypatch):
    def command(_):
        raise AttributeError("a mistake of ours")

    monkeypatch.setattr(commands, "_verify", command)
    with pytest.raises(AttributeError, match="ours"):
        main(["verify", "x"])
