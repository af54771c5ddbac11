"""Ctrl-C while the command line is still being imported: one line, no traceback.

The command imports this package, and with it torch, before any of its own code can run. A program
that uses the library is left alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType

_INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("svdalign: interrupted", file=sys.stderr, flush=True)
    os._exit(_INTERRUPTED)


def _is_command() -> bool:
    """Whether this process is ``svdalign`` or ``python -m svdalign``."""
    arguments = getattr(sys, "orig_argv", [])
    return Path(sys.argv[0]).stem == "svdalign" or arguments[1:3] == ["-m", "svdalign"]


if _is_command():
    sys.excepthook = _report
