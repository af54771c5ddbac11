"""``svdalign.lab.data`` under a short name, for programs that import ``svdalign.data``.

The data sets belong to the lab, an extra. Nothing of it is imported before a name is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("svdalign.lab.data"), name)


def __dir__() -> list[str]:
    return [*importlib.import_module("svdalign.lab.data").__all__]
