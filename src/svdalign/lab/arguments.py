"""Command line options made from config dataclasses, and error messages that name these options."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from ._named import did_you_mean

#: Patterns of the messages with which the library and the lab refuse an unknown name.
_UNKNOWN = (
    r"unknown [\w ]+ '(?P<name>[^']+)'; available: (?P<known>.+)\Z",
    r"must be one of \[(?P<known>.+?)\].*got '(?P<name>[^']+)'\Z",
    r"has no option (?P<name>\w+); it has (?P<known>.+)\Z",
)


class UsageError(Exception):
    """A mistake that the user can correct; only its text is shown, no traceback."""


class Parser(ArgumentParser):
    """The parser of a command.

    ``types``: the type of each option, by name. Lists may be given as ``--rules bp dfa`` or
    ``--rules bp,dfa``, and a switch alone means true.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(exit_on_error=False, allow_abbrev=False, **options)
        self.types: dict[str, Any] = {}

    def add_config(self, config: type[Any], **defaults: Any) -> None:
        """Add an option for each field, grouped by the dataclass that declares it. ``defaults``:
        values that replace the fields' own."""
        self.add_argument("--config", action="config", help="YAML file with any of these options")
        hints = typing.get_type_hints(config)
        parts = [c for c in config.__mro__ if dataclasses.is_dataclass(c)]
        groups: dict[type[Any], Any] = {}
        for field in dataclasses.fields(config):
            part = next(c for c in parts if field.name in inspect.get_annotations(c))
            if part not in groups:
                groups[part] = self.add_argument_group((part.__doc__ or "").strip())
            default = field.default
            if callable(field.default_factory):
                default = field.default_factory()
            self.types[field.name] = hints[field.name]
            groups[part].add_argument(
                _flag(field.name),
                type=hints[field.name],
                default=defaults.get(field.name, default),
                help=field.metadata["help"],
            )

    def add_list(self, name: str, help: str) -> None:
        """Add an option that takes a list of words."""
        self.types[name] = list[str]
        self.add_argument(_flag(name), type=list[str], default=None, help=help)

    def add_run(self) -> None:
        """Add the command's one positional argument, a run folder."""
        self.usage = f"{self.prog} RUN [--option value ...]"
        self.add_argument("run", type=str, metavar="RUN", help="folder of svdalign train")

    def add_folder(self, stem: str, *, new: bool = True) -> None:
        """Add ``--out`` and ``--overwrite``. ``new``: without ``--out`` each call gets a new
        folder."""
        default = f"a new runs/{stem}-NNN" if new else f"runs/{stem}"
        group = self.add_argument_group("results")
        group.add_argument("--out", type=str | None, default=None, help=f"run folder ({default})")
        group.add_argument(
            "--overwrite", action="store_true", help="replace the results that the folder holds"
        )

    def join(self, words: Sequence[str]) -> list[str]:
        """Make one word of each list and of each switch without a value: ``--rules bp dfa`` becomes
        ``--rules=[bp, dfa]``."""
        kinds = {_flag(name): _kinds(t) for name, t in self.types.items()}
        joined: list[str] = []
        rest = list(words)
        while rest:
            word = rest.pop(0)
            joined.append(word)
            mine = kinds.get(word, [])
            if mine == _BOOLEAN and (not rest or rest[0].startswith("--")):
                joined[-1] = f"{word}=true"
            if not any(kind.startswith("list") for kind in mine):
                continue
            values: list[str] = []
            while rest and not rest[0].startswith("--"):
                values += [value for value in rest.pop(0).strip("[]").split(",") if value.strip()]
            if len(values) == 1 and len(mine) > 1:
                joined += values
            elif values:
                joined[-1] = f"{word}=[{', '.join(values)}]"
        return joined

    def explain(self, message: str) -> str:
        """Reword a message of the parser or of a config for the user of the command line."""
        flags = {_flag(name): name for name in self.types}
        missing = re.search(r"argument (--[\w-]+)\S*: expected", message)
        if missing is not None and missing[1] in flags:
            return f"{missing[1]} takes {self._allowed(flags[missing[1]])}; got nothing"
        if absent := re.search(r"arguments are required: (?:\w+\.)?(\w+)", message):
            return f"{absent[1].upper()} is missing; usage: {self.usage}"
        if unknown := re.search(r"[Uu]nrecognized arguments: (--[\w-]+)", message):
            known = [option for action in self._actions for option in action.option_strings]
            return f"{message}{did_you_mean(unknown[1], known)}"
        found = re.search(r'key "(?:\w+\.)?(\w+)".*(?:Got|Given) value: (.*)', message, re.DOTALL)
        if found is not None and found[1] in self.types:
            if part := re.match(r"NestedArg\(key='([\w.]+)'", found[2]):
                hint = f"; did you mean --options.{part[1]}?" if found[1] == "rule" else ""
                return f"unrecognized arguments: {_flag(found[1])}.{part[1]}{hint}"
            close = did_you_mean(found[2], _kinds(self.types[found[1]]))
            return f"{_flag(found[1])} takes {self._allowed(found[1])}; got {found[2]}{close}"
        return self._with_flags(message)

    def _with_flags(self, message: str) -> str:
        """``message`` with options written as flags, and a suggestion for a misspelt name. An
        option whose name is a plain word, such as ``rank``, is recognised only in front of
        "must"."""
        for name in self.types:
            meant = r"(?![\w/'-])" if "_" in name else "(?= must )"
            message = re.sub(rf"(?<![\w/.'-]){name}{meant}", _flag(name), message)
        for pattern in _UNKNOWN:
            if unknown := re.search(pattern, message, re.DOTALL):
                known = re.findall(r"[\w.-]+", unknown["known"])
                return message + did_you_mean(unknown["name"], known)
        return message

    def _allowed(self, name: str) -> str:
        return ", ".join(_kinds(self.types[name]))


def parse(parser: Parser, command: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Parse ``words``, whose first is the command's name; ``command`` is that command's parser.

    Raises UsageError for words that are not valid. For a command that can resume, ``given`` are the
    options that were given: most of them cannot be changed then.
    """
    joined = [words[0], *command.join(words[1:])]
    try:
        options = dict(parser.parse_args(joined).as_dict()[words[0]])
        if "resume" in options:
            given = parser.parse_args(joined, defaults=False).as_dict()[words[0]]
            options["given"] = set(given) - {"config", "json", "out", "overwrite", "resume"}
    except ArgumentError as error:
        raise UsageError(str(error)) from None
    options.pop("config", None)
    return options


def _flag(name: str) -> str:
    """The flag of a field: ``--batch-size`` for ``batch_size``."""
    return "--" + name.replace("_", "-")


_BOOLEAN = ["true", "false"]


def _kinds(annotation: Any) -> list[str]:
    """What a type allows, as words: ``int``, ``null``, ``list of int``, the values of a literal."""
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return [str(value) for value in typing.get_args(annotation)]
    if origin in (types.UnionType, typing.Union):
        return [kind for part in typing.get_args(annotation) for kind in _kinds(part)]
    if origin is list:
        return [f"list of {', '.join(_kinds(*typing.get_args(annotation)))}"]
    if annotation is bool:
        return _BOOLEAN
    kind = origin or annotation
    return ["null" if kind is type(None) else kind.__name__]
