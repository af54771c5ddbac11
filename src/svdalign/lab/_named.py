"""What users name as ``package.module:Name``: networks of their own; rules as well, which
:func:`svdalign.rules.get` imports."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

__all__ = ["import_named", "search_here"]


def search_here() -> None:
    """Have modules looked for in the current folder too, as ``python -m`` does."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)


def import_named(name: str) -> Any:
    """The object that ``package.module:Name`` names. Modules are also looked for in the current
    folder.

    Importing runs the module's code: use only names, and configs with such names, that you trust.

    Raises:
        ValueError: where there is no such module or nothing of that name in it.
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
    return found
