"""The command line: parse, call, print."""

from .commands import main as main
