"""Names that users give: misspelt ones, and ``package.module:Name`` for networks, trainers and
loggers of their own (for rules :func:`svdalign.rules.get` imports them)."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known name closest to it, if one is close."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


def search_here() -> None:
    """Let imports find modules in the current folder, as ``python -m`` does."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)


def import_maker(name: str, *needed: str) -> Callable[..., Any]:
    """The class or function that ``package.module:Name`` names. Modules are also looked for in the
    current folder.

    Importing runs the module's code: use only names, and configs with such names, that you trust. A
    class or function without parameters of the names ``needed`` is refused, so that a config from
    elsewhere cannot call just any function.

    Raises:
        ValueError: if there is no such module, nothing of that name in it, or something that is
            refused.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"{name!r} must be package.module:Name")
    search_here()
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name} cannot be imported: {error}") from error
    try:
        known = set(inspect.signature(found).parameters)
    except (TypeError, ValueError):
        known = set()
    if missing := sorted(set(needed) - known):
        raise ValueError(
            f"{name} must be a class or function that takes {' and '.join(needed)}; "
            f"{', '.join(missing)} is not among its parameters"
        )
    made: Callable[..., Any] = found
    return made
