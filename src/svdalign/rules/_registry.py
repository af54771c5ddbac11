"""Rules by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TypeVar

from .base import Rule

_rules: dict[str, Rule] = {}

_R = TypeVar("_R", Rule, type[Rule])


def register(rule: _R) -> _R:
    """Make a rule known by its name, and return it. ``rule``: a :class:`Rule`, or a subclass (this
    is a decorator), which is registered with its default fields.

    Raises ValueError if another rule has this name.
    """
    made = rule if isinstance(rule, Rule) else _with_default_fields(rule)
    known = _rules.get(made.name)
    if known is not None and _origin(known) != _origin(made):
        raise ValueError(f"there is another rule with the name {made.name!r}: {known!r}")
    _rules[made.name] = made
    return rule


def _with_default_fields(rule: type[Rule]) -> Rule:
    made: Callable[[], Rule] = rule
    try:
        return made()
    except TypeError as error:
        raise TypeError(f"rule {rule.__name__} needs a default for every field: {error}") from None


def _origin(rule: Rule) -> tuple[str, str]:
    """Module and name of the rule's class: the same after the module has been run again."""
    return type(rule).__module__, type(rule).__qualname__


def available() -> list[str]:
    """Names of the registered rules."""
    return sorted(_rules)


def get(rule: str | Rule | type[Rule]) -> Rule:
    """The rule of a registered name, or of ``"package.module:Class"`` for a rule of your own. A
    :class:`Rule` is returned as it is; a class gives the rule with its default fields.

    Raises ValueError for a name that is not known or cannot be imported, TypeError for anything
    that is no rule."""
    if isinstance(rule, str):
        if rule in _rules:
            return _rules[rule]
        if ":" in rule:
            return get(_imported(rule))
        raise ValueError(
            f"rule must be one of {available()}, 'package.module:Class' or a svdalign.rules.Rule, "
            f"got {rule!r}"
        )
    if isinstance(rule, type) and issubclass(rule, Rule):
        return _with_default_fields(rule)
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be a svdalign.rules.Rule or a name, got {rule!r}")
    return rule


def _imported(path: str) -> Rule | type[Rule]:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, ValueError) as error:
        # If the module exists, but imports one that does not, show that error.
        if isinstance(error, ModuleNotFoundError) and not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"rule {path!r}: there is no module {module!r}") from None
    except AttributeError:
        raise ValueError(f"rule {path!r}: module {module!r} has no {name!r}") from None
    if isinstance(found, Rule) or (isinstance(found, type) and issubclass(found, Rule)):
        return found
    raise ValueError(f"rule {path!r} must be a subclass of svdalign.rules.Rule, got {found!r}")
