"""The command line: ``svdalign COMMAND --option value``.

A command is a function registered with :func:`command`. It is given a parser to declare its options
on only when it is the one called, and imports what it needs then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentError, ArgumentParser

if TYPE_CHECKING:
    from rich.console import Console

    from .training.interrupt import Interrupt

__all__ = ["main"]

INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended


class UsageError(Exception):
    """Something the user can put right; its text is all they need to see."""


@dataclass(frozen=True)
class Command:
    """``declare`` adds options to a parser; ``run`` takes what was parsed, returns an exit code."""

    help: str
    declare: Callable[[_Parser], None]
    run: Callable[[dict[str, Any]], int]


COMMANDS: dict[str, Command] = {}


def command(
    name: str, help: str, declare: Callable[[_Parser], None]
) -> Callable[[Callable[[dict[str, Any]], int]], Callable[[dict[str, Any]], int]]:
    """Register the decorated function as ``svdalign NAME``."""

    def register(run: Callable[[dict[str, Any]], int]) -> Callable[[dict[str, Any]], int]:
        COMMANDS[name] = Command(help, declare, run)
        return run

    return register


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that ``arguments`` (``sys.argv`` without the program) name; an exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        from .. import __version__

        print(f"svdalign {__version__}")
        return 0
    name, *rest = words
    fields: list[str] = []
    try:
        if name not in COMMANDS:
            raise UsageError(f"unknown command {name!r}; there are {', '.join(COMMANDS)}")
        options = _parse(name, rest)
        fields = list(options)
        return COMMANDS[name].run(options)
    except UsageError as error:
        prefix = f"svdalign {name}" if name in COMMANDS else "svdalign"
        print(f"{prefix}: error: {_in_flags(str(error), fields)}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, say; what was written before is whole
        print(f"svdalign {name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"svdalign {name}: interrupted", file=sys.stderr)
        return INTERRUPTED


# --- commands -----------------------------------------------------------------------------------


def _declare_train(parser: _Parser) -> None:
    from .training.config import RunConfig

    parser.add_config(RunConfig)
    parser.add_folder("train")
    parser.add_argument(
        "--resume",
        type=str | None,
        default=None,
        metavar="FOLDER",
        help="go on with the run in this folder, with its own options",
    )


@command("train", "one rule on one network and data set", _declare_train)
def _train(options: dict[str, Any]) -> int:
    from .runner import Run, Sweep
    from .training.checkpoint import resumed
    from .training.config import RunConfig, evaluated_on
    from .training.interrupt import Interrupt
    from .training.progress import progress_for

    folder, overwrite = options.pop("out"), options.pop("overwrite")
    resume, given = options.pop("resume"), options.pop("given")
    with _usage_errors():
        if resume is None:
            config = RunConfig(**options)
        elif folder is not None or overwrite:
            raise ValueError("--resume goes on in its own folder; give no --out or --overwrite")
        else:
            config = resumed(resume, {name: options[name] for name in given})
        run = Run("", config, f"Rule {config.rule}", config.rule)
        at = folder if resume is None else resume
        sweep = Sweep(at, [run], overwrite=overwrite, longer=resume is not None)
        if not sweep.pending:
            ended = "give it more --epochs" if resume else "give another --out, or --overwrite"
            raise ValueError(f"run folder {at} holds the results of a run that has ended; {ended}")
        sweep.check()
    console = _console()
    with Interrupt() as interrupt, progress_for(console) as progress:
        results = sweep.run(progress=progress, stop=lambda: interrupt.requested)[run.name]
    record = sweep.top
    so_far = results["status"] == "interrupted"
    if results["accuracy"] is not None:
        images = evaluated_on(config.validation)
        reached = f"{images} accuracy {results['accuracy']:.2%}{' so far' * so_far}"
        console.print(reached, highlight=False)
    _say(console, f"report: {record.report_path}")
    if so_far:
        _say(console, f"go on with svdalign train --resume {record.folder}")
    return _exit_code(results["status"], interrupt)


def _declare_compare(parser: _Parser) -> None:
    from .experiments.compare import CompareConfig

    parser.add_config(CompareConfig)
    parser.add_folder("compare")


@command("compare", "several rules on the same data and budget; table and report", _declare_compare)
def _compare(options: dict[str, Any]) -> int:
    from .experiments.compare import CompareConfig, Comparison
    from .reports import comparison_table
    from .training.interrupt import Interrupt
    from .training.progress import progress_for

    folder, overwrite = options.pop("out"), options.pop("overwrite")
    with _usage_errors():
        comparison = Comparison(CompareConfig(**options), folder, overwrite=overwrite)
    console = _console()
    with Interrupt() as interrupt:
        with console.status("measuring what a step costs"):
            comparison.measure_costs()
        with progress_for(console, comparison.pending) as progress:
            results = comparison.run(progress=progress, stop=lambda: interrupt.requested)
    console.print(comparison_table(results))
    _say(console, f"report: {comparison.folder / 'report.html'}")
    if results["status"] == "interrupted":
        same = f"the same command{' without --overwrite' * overwrite}"
        _say(console, f"go on with {same} and --out {comparison.folder}")
    return _exit_code(results["status"], interrupt)


def _declare_export(parser: _Parser) -> None:
    from ..export import FORMATS

    parser.add_run()
    parser.types["formats"] = list[str]
    parser.add_argument(
        "--formats",
        type=list[str],
        default=None,
        help=f"files to write, of {', '.join(FORMATS)} (all); onnx needs the extra of that name",
    )
    parser.add_argument(
        "--out", type=str | None, default=None, help="folder for the files (RUN/export)"
    )


@command("export", "compact model of a run in files that need no library", _declare_export)
def _export(options: dict[str, Any]) -> int:
    from pathlib import Path

    from ..export import FORMATS, check_imports
    from .experiments.card import ship
    from .training.checkpoint import load_run
    from .training.config import evaluated_on

    console = _console()
    out = Path(options["out"] or Path(options["run"], "export"))
    asked = options["formats"]
    formats = list(FORMATS) if asked is None else asked
    for name in list(formats):
        try:
            check_imports(name)
        except ImportError as error:
            formats.remove(name)
            if asked is not None:
                others = formats or [other for other in FORMATS if other != name]
                raise UsageError(f"{error}, or --formats {' '.join(others)}") from error
            _say(console, f"model.{name} is left out: {error}")
    with _usage_errors(), console.status("exporting"):
        card = ship(load_run(options["run"]), out, formats)
    for file in card["files"]:
        _say(
            console,
            f"{out / file['name']}: {file['bytes']:,} bytes, largest difference to the trained "
            f"model {file['max_abs_difference']:.1e}",
        )
    ratios = [
        f"{row['ratio']:.2f} of its latency at batch {row['batch']}" for row in card["latency"]
    ]
    _say(
        console,
        f"{card['parameters']['ratio']:.1%} of the dense network's parameters, "
        f"{card['macs']['ratio']:.1%} of its MACs, {', '.join(ratios)}; "
        f"{evaluated_on(card['config']['validation'])} accuracy {card['test_accuracy']:.2%}",
    )
    _say(console, f"card: {out / 'card.md'}")
    return 0


@command("inspect", "ranks, spectra and orthogonality of a run's layers", lambda p: p.add_run())
def _inspect(options: dict[str, Any]) -> int:
    from .experiments.inspection import inspect_run, table, write

    with _usage_errors():
        layers = inspect_run(options["run"])
        paths = write(options["run"], layers)
    console = _console()
    console.print(table(layers))
    for path in paths:
        _say(console, path)
    return 0


def _declare_profile(parser: _Parser) -> None:
    from .experiments.profile import ProfileConfig

    parser.add_config(ProfileConfig)
    parser.add_folder("profile")


@command("profile", "memory, arithmetic and time of a training step, by method", _declare_profile)
def _profile(options: dict[str, Any]) -> int:
    from .experiments.profile import Profile, ProfileConfig
    from .reports import break_even_table, profile_table

    folder, overwrite = options.pop("out"), options.pop("overwrite")
    with _usage_errors():
        profile = Profile(ProfileConfig(**options), folder, overwrite=overwrite)
    console = _console()
    with console.status("running a step of each method"):
        results = profile.run()
    console.print(profile_table(results))
    if results["break_even"]:
        console.print(break_even_table(results))
    report = profile.folder / "report.html"
    _say(console, f"report: {report}")
    return 0


def _declare_reproduce(parser: _Parser) -> None:
    from .experiments.paper import EXPERIMENTS, ReproduceConfig

    parser.add_argument("what", nargs="+", help=f"of all, {', '.join(EXPERIMENTS)}")
    parser.add_config(ReproduceConfig)
    parser.add_folder("reproduce-SCALE", new=False)


@command("reproduce", "the paper's figures and tables", _declare_reproduce)
def _reproduce(options: dict[str, Any]) -> int:
    from rich.table import Table

    from .experiments.paper import ReproduceConfig, Reproduction
    from .experiments.paper.draw import experiment_table
    from .training.interrupt import Interrupt
    from .training.progress import progress_for

    names, folder, overwrite = (options.pop(key) for key in ("what", "out", "overwrite"))
    with _usage_errors():
        work = Reproduction(names, ReproduceConfig(**options), folder, overwrite=overwrite)
    console = _console()
    with Interrupt() as interrupt, progress_for(console, work.pending) as progress:
        found = work.run(progress=progress, stop=lambda: interrupt.requested)
    for name, results in found.items():
        headings, rows = experiment_table(results)
        table = Table(*headings, title=f"{name}: {results['title']}", box=None, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    _say(console, f"page: {work.folder / 'index.html'}")
    finished = all(results["status"] == "finished" for results in found.values())
    if not finished:
        _say(console, f"go on with the same command{' without --overwrite' * overwrite}")
    return _exit_code("finished" if finished else "interrupted", interrupt)


def _declare_tune(parser: _Parser) -> None:
    from .experiments.tune import TuneConfig

    parser.add_config(TuneConfig)
    parser.add_folder("tune")


@command("tune", "learning rates of several rules, with the same effort for each", _declare_tune)
def _tune(options: dict[str, Any]) -> int:
    from rich.table import Table

    from .experiments.tune import TuneConfig, Tuning
    from .training.interrupt import Interrupt
    from .training.progress import progress_for

    folder, overwrite = options.pop("out"), options.pop("overwrite")
    with _usage_errors():
        work = Tuning(TuneConfig(**options), folder, overwrite=overwrite)
    console = _console()
    with Interrupt() as interrupt, progress_for(console, work.planned) as progress:
        results = work.run(progress=progress, stop=lambda: interrupt.requested)
    table = Table("method", "best rate", "held-out accuracy by rate", box=None, pad_edge=False)
    for name, found in results["accuracy"].items():
        best = max(found, key=found.__getitem__)
        tried = ", ".join(f"{rate}: {100 * reached:.2f}%" for rate, reached in found.items())
        edge = ", at the edge: give more --tries" if name in results["at_edge"] else ""
        table.add_row(results["labels"][name], f"{best}{edge}", tried)
    console.print(table)
    if results["status"] == "interrupted":
        same = f"the same command{' without --overwrite' * overwrite}"
        _say(console, f"go on with {same} and --out {work.folder}")
    return _exit_code(results["status"], interrupt)


def _declare_data(parser: _Parser) -> None:
    from .training.config import DataConfig

    parser.add_config(DataConfig)


@command("data", "load a data set and say what is in it", _declare_data)
def _data(options: dict[str, Any]) -> int:
    from rich.table import Table

    from .training.build import load_data
    from .training.config import JobConfig, evaluated_on

    with _usage_errors():
        config = JobConfig(**options)
        data = load_data(config)
    console, images = _console(), f"{evaluated_on(config.validation)} images"
    shape = " × ".join(map(str, data.train.shape))
    mean, std = (", ".join(f"{v:.4f}" for v in values) for values in (data.mean, data.std))
    console.print(
        f"{data.name}: {len(data.train):,} training and {len(data.test):,} {images}, {shape}\n"
        f"pixels from 0 to 1 have mean {mean} and deviation {std}",
        highlight=False,
    )
    table = Table("class", "training images", images)
    counts = [
        s.labels.bincount(minlength=data.num_classes).tolist() for s in (data.train, data.test)
    ]
    for row in zip(data.classes, *counts, strict=True):
        table.add_row(*map(str, row))
    console.print(table)
    return 0


# --- options ------------------------------------------------------------------------------------


class _Parser(ArgumentParser):
    """A parser that takes its options from a config dataclass.

    ``types``: of each option. Lists may be given as ``--rules bp dfa`` or ``--rules bp,dfa``.
    """

    types: dict[str, Any]

    def add_config(self, config: type[Any]) -> None:
        """An option for each field, in groups by the dataclass that declares it."""
        self.add_argument("--config", action="config", help="YAML file with any of these options")
        self.types = typing.get_type_hints(config)
        parts = [c for c in config.__mro__ if dataclasses.is_dataclass(c)]
        groups: dict[type[Any], Any] = {}
        for field in dataclasses.fields(config):
            part = next(c for c in parts if field.name in inspect.get_annotations(c))
            if part not in groups:
                groups[part] = self.add_argument_group((part.__doc__ or "").strip())
            default = field.default
            if callable(field.default_factory):
                default = field.default_factory()
            groups[part].add_argument(
                _flag(field.name),
                type=self.types[field.name],
                default=default,
                help=field.metadata["help"],
            )

    def add_run(self) -> None:
        """A run folder, as the command's one argument."""
        self.types = {}
        self.usage = f"{self.prog} RUN [--option value ...]"
        self.add_argument("run", type=str, metavar="RUN", help="folder of svdalign train")

    def add_folder(self, stem: str, *, new: bool = True) -> None:
        """Where results go. ``new``: a folder of its own each time, unless one is given."""
        default = f"a new runs/{stem}-NNN" if new else f"runs/{stem}"
        group = self.add_argument_group("results")
        group.add_argument("--out", type=str | None, default=None, help=f"run folder ({default})")
        group.add_argument(
            "--overwrite", action="store_true", help="replace the results that the folder holds"
        )

    def options(self, words: list[str]) -> dict[str, Any]:
        """Parsed ``words``; ValueError for what cannot be."""
        try:
            options = self.parse_args(self._join_lists(words)).as_dict()
        except ArgumentError as error:
            raise ValueError(self._explain(str(error))) from None
        if "resume" in options:  # which takes few others
            given = self.parse_args(self._join_lists(words), defaults=False).as_dict()
            options["given"] = set(given) - {"config", "out", "overwrite", "resume"}
        options.pop("config", None)
        return options

    def _join_lists(self, words: list[str]) -> list[str]:
        lists = {
            _flag(name): t
            for name, t in self.types.items()
            if any(kind.startswith("list") for kind in _kinds(t))
        }
        joined: list[str] = []
        rest = list(words)
        while rest:
            word = rest.pop(0)
            joined.append(word)
            values: list[str] = []
            while word in lists and rest and not rest[0].startswith("--"):
                values += [value for value in rest.pop(0).strip("[]").split(",") if value.strip()]
            if len(values) == 1 and len(_kinds(lists[word])) > 1:
                joined += values
            elif values:
                joined[-1] = f"{word}=[{', '.join(values)}]"
        return joined

    def _explain(self, message: str) -> str:
        """A message about a value's type, or a missing one, in the words of the command line."""
        if missing := re.search(r"argument (--[\w-]+)\S*: expected", message):
            names = {_flag(name): name for name in self.types}
            if missing[1] in names:
                return f"{missing[1]} takes {self._allowed(names[missing[1]])}; got nothing"
        found = re.search(r'Parser key "(\w+)".*(?:Got|Given) value: (.*)', message, re.DOTALL)
        if found is None or found[1] not in self.types:
            return message
        return f"{_flag(found[1])} takes {self._allowed(found[1])}; got {found[2]}"

    def _allowed(self, name: str) -> str:
        return ", ".join(_kinds(self.types[name]))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _in_flags(message: str, fields: Iterable[str]) -> str:
    """``message`` with the names of ``fields`` as flags. A name that is a plain word is one only
    where the message says what it must be."""
    for field in fields:
        meant = "(?![\\w/'-])" if "_" in field else "(?= must )"
        message = re.sub(rf"(?<![\w/.'-]){field}{meant}", _flag(field), message)
    return message


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
        return ["true", "false"]
    kind = origin or annotation
    return ["null" if kind is type(None) else kind.__name__]


def _parse(name: str, words: list[str]) -> dict[str, Any]:
    parser = _Parser(
        prog=f"svdalign {name}",
        usage=f"svdalign {name} [--config FILE.yaml] [--option value ...]",
        description=COMMANDS[name].help,
        exit_on_error=False,
        allow_abbrev=False,
    )
    with _usage_errors():
        COMMANDS[name].declare(parser)
        return parser.options(words)


# --- what all commands share --------------------------------------------------------------------


def _exit_code(status: str, interrupt: Interrupt) -> int:
    return {"finished": 0, "interrupted": interrupt.exit_code}.get(status, 1)


def _console() -> Console:
    from rich.console import Console

    return Console(markup=False)  # brackets in paths and names of classes are no markup


def _say(console: Console, line: object) -> None:
    """A plain line, as long as it is: paths in it can be copied."""
    console.print(line, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    """What goes wrong in here, before any training, is the user's to put right."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(_one_line(str(error))) from error


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {entry.help}" for name, entry in COMMANDS.items()]
    return "\n".join(
        [
            "svdalign: train networks without a global backward pass, in the SVD space of weights",
            "",
            "usage: svdalign COMMAND [--option value ...]",
            "",
            *lines,
            "",
            "svdalign COMMAND --help shows its options; --version, the version.",
            "Exit codes: 0 done, 1 diverged or not written, 2 a mistake in the command, 130 or 143",
            "interrupted by Ctrl-C or SIGTERM: the same command goes on.",
        ]
    )
