"""Which runs a comparison or a search of rates is made of: methods, and changes to them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import methods
from ..methods import DEFAULT, HELP
from ..training.config import JobConfig, RunConfig, check_settings, method_config
from ..training.options import option


@dataclass(frozen=True)
class Variant:
    """A method with a change, which is "" where there are no changes.

    ``settings``: the fields of a run that differ from the job's.
    """

    method: str
    change: str
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Method and change, in the words of the config."""
        return ", ".join(filter(None, (self.method, self.change)))

    @property
    def label(self) -> str:
        """Method and change, for tables."""
        return ", ".join(filter(None, (methods.get(self.method).label, self.change)))

    @property
    def folder(self) -> str:
        """The name, as the start of a folder's."""
        return re.sub(r"[^\w.:-]+", "-", self.name)

    def config(self, job: JobConfig, *, seed: int, lr: float | None = None) -> RunConfig:
        """Its run within ``job``. A rate among the settings comes before ``lr``."""
        return method_config(self.method, job, seed=seed, lr=lr, settings=self.settings)


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
            base = method_config(
                variant.method, self, seed=0, settings=self.settings.get(variant.method)
            )
            if self.changes.get(variant.change) and own == base:
                raise ValueError(
                    f"the change {variant.change!r} changes nothing of {variant.method}; name the "
                    "methods that it is for: rules: [...] beside its fields"
                )

    @property
    def variants(self) -> list[Variant]:
        """Every method with every change that is for it."""
        found = []
        for change, fields in (self.changes or {"": {}}).items():
            own = {key: value for key, value in fields.items() if key != "rules"}
            for name in self.rules:
                if name in fields.get("rules", self.rules):
                    base = self.settings.get(name, {})
                    options = {**base.get("options", {}), **own.get("options", {})}
                    merged = {**base, **own, **({"options": options} if options else {})}
                    found.append(Variant(name, change, merged))
        return found
