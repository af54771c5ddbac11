"""The runs of an experiment: methods, and changes to them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import methods
from ..methods import DEFAULT, HELP, Method
from ..training.config import JobConfig, RunConfig, check_settings, method_config
from ..training.options import option


@dataclass(frozen=True)
class Variant:
    """A method, and the fields of its run that differ from those of the job, ``settings``."""

    method: Method
    settings: Mapping[str, Any] = field(default_factory=dict)

    def config(self, job: JobConfig, *, seed: int, lr: float | None = None) -> RunConfig:
        """The config of its run within ``job``. A learning rate among ``settings`` overrides
        ``lr``."""
        return method_config(self.method, job, seed=seed, lr=lr, settings=self.settings)


@dataclass(frozen=True)
class Entry(Variant):
    """A variant of a :class:`MethodsConfig`. ``given``: the method's name in the config.
    ``change``: the name of the change, "" for none."""

    given: str = ""
    change: str = ""

    @property
    def name(self) -> str:
        """Method and change, by their names in the config."""
        return ", ".join(filter(None, (self.given, self.change)))

    @property
    def label(self) -> str:
        """Method and change, for tables."""
        return ", ".join(filter(None, (self.method.label, self.change)))

    @property
    def folder(self) -> str:
        """The name as the first part of a folder's name."""
        return folder_name(self.name)


def folder_name(name: str) -> str:
    """``name`` as part of a folder's name."""
    return re.sub(r"[^\w.:-]+", "-", name)


def accuracy_of(results: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """``accuracy``, the mean over these runs, and ``accuracy_std``, the standard deviation of the
    sample from two on. Runs without an accuracy are left out."""
    there = [run["accuracy"] for run in results if run["accuracy"] is not None]
    return {
        "accuracy": statistics.mean(there) if there else None,
        "accuracy_std": statistics.stdev(there) if len(there) > 1 else None,
    }


@dataclass(frozen=True, kw_only=True)
class MethodsConfig(JobConfig):
    """methods"""

    rules: list[str] = option(DEFAULT, f"the methods, of {HELP}")
    settings: dict[str, Any] = option(
        {}, "{method: {field: value}}: what differs for a method, such as units or options"
    )
    changes: dict[str, Any] = option(
        {},
        "{name: {field: value}}: run every method once with each of these changes; {} changes "
        "nothing; rules: [...] among the fields names the methods that a change is for",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rules or len(set(self.rules)) < len(self.rules):
            raise ValueError(f"rules must be at least one, each once, got {self.rules}")
        object.__setattr__(self, "settings", check_settings(self.settings, self.rules))
        changes = {}
        for name, fields in self.changes.items():
            own = dict(fields) if isinstance(fields, Mapping) else fields
            only = {"rules": own.pop("rules")} if isinstance(own, dict) and "rules" in own else {}
            changes[name] = {**only, **check_settings({name: own}, [name])[name]}
        object.__setattr__(self, "changes", changes)
        folders = [variant.folder.lower() for variant in self.variants]
        if len(set(folders)) < len(folders):
            raise ValueError(f"changes must differ in letters or digits, got {', '.join(changes)}")
        for variant in self.variants:
            own = variant.config(self, seed=0)
            base = Variant(variant.method, self.settings.get(variant.given, {}))
            if self.changes.get(variant.change) and own == base.config(self, seed=0):
                raise ValueError(
                    f"the change {variant.change!r} changes nothing of {variant.given}; name the "
                    "methods that it is for: rules: [...] beside its fields"
                )

    @property
    def variants(self) -> list[Entry]:
        """Every method with every change that applies to it."""
        found = []
        for change, fields in (self.changes or {"": {}}).items():
            own = {key: value for key, value in fields.items() if key != "rules"}
            for name in self.rules:
                if name in fields.get("rules", self.rules):
                    base = self.settings.get(name, {})
                    options = {**base.get("options", {}), **own.get("options", {})}
                    merged = {**base, **own, **({"options": options} if options else {})}
                    found.append(Entry(methods.get(name), merged, name, change))
        return found
