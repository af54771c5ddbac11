"""Ctrl-C while the command line is still being imported: one line, no traceback.

The command imports this package, and with it torch, before any of its own code can run. A program
that uses the library is left alone.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

_INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended


def _end(*_: object) -> None:
    """End at once: an exception might be swallowed by what is being imported."""
    print("svdalign: interrupted", file=sys.stderr, flush=True)
    os._exit(_INTERRUPTED)


def imported() -> None:
    """From here on Ctrl-C is an exception again, for the command to handle."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command() -> bool:
    """Whether this process is ``svdalign`` or ``python -m svdalign``."""
    arguments = getattr(sys, "orig_argv", [])
    return Path(sys.argv[0]).stem == "svdalign" or arguments[1:3] == ["-m", "svdalign"]


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
