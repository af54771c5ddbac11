"""What a command writes: results to standard output, progress and errors to standard error.

Neither a reader that goes away, nor a terminal without Unicode, nor a full disk behind a stream
ends a run or leaves a traceback.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.measure import Measurement

from .training.record import finite

#: What terminals without these characters get: one letter each, so that tables stay aligned.
_ASCII = {
    "×": "x", "–": "-", "—": "-", "−": "-", "→": ">", "…": ".", "·": ".", "≈": "=", "±": "~",
    "°": " ", "‖": "|", "ᵀ": "'", "σ": "s", "✓": "*", "†": "*", "’": "'",
    "━": "-", "╸": "-", "╺": "-", "│": "|", "┃": "|", "─": "-", "┏": "+", "┓": "+", "┗": "+",
    "┛": "+", "┡": "+", "┩": "+", "┳": "+", "╇": "+", "└": "+", "┘": "+", "┴": "+", "┼": "+",
}  # fmt: skip


class Terminal:
    """Where a command's results go. ``json``: they are one JSON text, and nothing else is shown."""

    def __init__(self, *, json: bool = False) -> None:
        self._json = json
        self._out = _Console(quiet=json)
        self.progress: Console = _Console(stderr=True, quiet=json)

    def say(self, line: object) -> None:
        """A plain line, as long as it is: paths in it can be copied."""
        self._out.print(line, highlight=False, soft_wrap=True)

    def warn(self, line: object) -> None:
        """A line beside the results."""
        self.progress.print(line, highlight=False, soft_wrap=True)

    def show(self, table: RenderableType) -> None:
        """A table, as wide as the terminal, or wider where its numbers would not fit."""
        anywhere = self._out.options.update(width=sys.maxsize)
        needed = Measurement.get(self._out, anywhere, table).minimum
        width = self._out.width
        self._out.width = max(width, needed)
        self._out.print(table)
        self._out.width = width

    def result(self, content: Mapping[str, Any]) -> None:
        """Print the results, if the command was asked for JSON."""
        if self._json:
            try:
                sys.stdout.write(json.dumps(finite(content), indent=2) + "\n")
                sys.stdout.flush()
            except BrokenPipeError:
                self._out.on_broken_pipe()


class _Console(Console):
    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, **options)  # brackets in paths and names are no markup

    def on_broken_pipe(self) -> None:
        """Whatever read the output has ended: the work goes on and shows nothing."""
        self.quiet = True
        _drop(self.file)


def prepare_streams() -> None:
    """Let streams replace characters that they cannot encode."""
    codecs.register_error("svdalign", _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="svdalign")


def close_streams() -> None:
    """Flush, and drop what cannot be written: else the interpreter would complain when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _drop(stream)


def _drop(stream: Any) -> None:
    """Discard all that is written to ``stream`` from now on."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):
        pass


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_ASCII.get(sign, "?") for sign in text), error.end
