"""What all configs share: fields with a help text and bounds, and their way from and to YAML."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import yaml

_T = TypeVar("_T")
_C = TypeVar("_C")

_BOUNDS = {
    "least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


def option(default: _T, help: str, **bounds: float) -> _T:
    """A dataclass field with a default, the line that ``--help`` shows for it, and bounds of its
    number: ``least``, ``above``, ``most``, ``below``."""
    metadata = {"help": help, "bounds": bounds}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of the configs. Raises ValueError for a number out of bounds and a switch that is
    neither true nor false."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type in ("bool", "bool | None") and not isinstance(value, bool | None):
                raise ValueError(f"{f.name} must be true or false, got {value!r}")
            if isinstance(value, int | float):
                for name, bound in f.metadata["bounds"].items():
                    holds, words = _BOUNDS[name]
                    if not (math.isfinite(value) and holds(value, bound)):
                        raise ValueError(f"{f.name} must be {words} {bound:g}, got {value}")


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The fields in which two configs, as dicts, differ, with both values; "" where none does."""
    return ", ".join(
        f"{key} {there.get(key)} there, {here.get(key)} here"
        for key in {**there, **here}
        if there.get(key) != here.get(key)
    )


def from_dict(kind: type[_C], values: Mapping[str, Any]) -> _C:
    """``kind(**values)`` with an error that names the keys it does not have."""
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"unknown {', '.join(unknown)}; there are {', '.join(known)}")
    return kind(**values)


def fields_of(kind: type[Any], config: Any) -> dict[str, Any]:
    """The values of ``config`` for those fields of ``kind`` that it has."""
    names = (f.name for f in dataclasses.fields(kind))
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def plain(value: Any) -> Any:
    """Convert strings from the command line to the YAML scalars they spell, at any depth. Those
    that are no YAML stay strings."""
    if isinstance(value, str):
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            return value
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value


def to_yaml(config: Any) -> str:
    """The config as YAML that ``--config`` takes back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
