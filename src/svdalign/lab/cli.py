"""The command line: ``svdalign COMMAND --option value``.

A command is a function registered with :func:`command`. It declares its options only when it is the
one called, and imports what it needs then.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from jsonargparse import set_parsing_settings

from .. import _interrupt
from ._named import did_you_mean
from .arguments import Parser, UsageError, parse
from .terminal import Terminal, close_streams, prepare_streams

if TYPE_CHECKING:
    from pathlib import Path

    from .training.config import RunConfig
    from .training.interrupt import Interrupt
    from .training.progress import Progress

_COMPLETION = "--print_completion"  #: ``=shtab-bash`` and others
_FAILED, _MISUSED = 1, 2
_INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended
_EXIT_CODES = (
    "exit codes: 0 done; 1 diverged, or failed while running; 2 options that are not valid, "
    "nothing was run; 130 or 143 interrupted by Ctrl-C or SIGTERM, the same command goes on"
)

Options = dict[str, Any]


@dataclass(frozen=True)
class Command:
    """``declare`` adds options to a parser; ``run`` takes what was parsed, returns an exit code."""

    help: str
    declare: Callable[[Parser], None]
    run: Callable[[Options, Terminal], int]


COMMANDS: dict[str, Command] = {}


def command(
    name: str, help: str, declare: Callable[[Parser], None] = lambda parser: None
) -> Callable[[Callable[[Options, Terminal], int]], Callable[[Options, Terminal], int]]:
    """Register the decorated function as ``svdalign NAME``."""

    def register(
        run: Callable[[Options, Terminal], int],
    ) -> Callable[[Options, Terminal], int]:
        COMMANDS[name] = Command(help, declare, run)
        return run

    return register


def _options_of(config: str, folder: str = "", *, new: bool = True) -> Callable[[Parser], None]:
    """A function that gives a parser an option for each field of ``config``, a ``module:Class`` of
    the lab, and ``--out`` if ``folder`` is the first part of its run folders' names."""

    def declare(parser: Parser) -> None:
        module, _, name = config.partition(":")
        kind = getattr(import_module(f"{__package__}.{module}"), name)
        parser.add_config(kind, device=_device())
        if folder:
            parser.add_folder(folder, new=new)

    return declare


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that ``arguments`` name, by default those of ``sys.argv``. Returns an exit
    code."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    prepare_streams()
    parser, commands = _parsers(words)
    called = commands.get(words[0])
    program = called.prog if called else "svdalign"
    _interrupt.imported()
    try:
        return _run(words, parser, called)
    except UsageError as error:
        message = _one_line(called.explain(str(error)) if called else str(error))
        print(f"{program}: error: {message}", file=sys.stderr)
        return _MISUSED
    except _failures() as error:
        print(f"{program}: error: {_one_line(str(error))}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except SystemExit as done:  # after --help and the like
        return int(done.code or 0)
    finally:
        close_streams()


def _run(words: Sequence[str], parser: Parser, called: Parser | None) -> int:
    if called is None:
        if not words[0].startswith("-"):
            close = did_you_mean(words[0], COMMANDS)
            raise UsageError(
                f"unknown command {words[0]!r}; there are {', '.join(COMMANDS)}{close}"
            )
        parse(parser, parser, words)
        return 0
    options = parse(parser, called, words)
    return COMMANDS[words[0]].run(options, Terminal(json=options.pop("json")))


def _parsers(words: Sequence[str]) -> tuple[Parser, dict[str, Parser]]:
    """The parser of the command line, and those of its commands by name. Options are declared only
    for the command that is called, or for all if a completion script is asked for."""
    from .. import __version__

    set_parsing_settings(add_print_completion_argument=True)
    parser = Parser(
        prog="svdalign",
        usage="svdalign COMMAND [--option value ...]",
        description="Train networks without a global backward pass, in the SVD space of weights.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"svdalign {__version__}")
    group = parser.add_subcommands(metavar="COMMAND", dest="command", required=False)
    commands = {}
    for name, entry in COMMANDS.items():
        commands[name] = Parser(
            prog=f"svdalign {name}",
            usage=f"svdalign {name} [--config FILE.yaml] [--option value ...]",
            description=entry.help,
            epilog=_EXIT_CODES,
        )
        if name in words[:1] or any(word.startswith(_COMPLETION) for word in words):
            entry.declare(commands[name])
            commands[name].add_argument(
                "--json", action="store_true", help="write results as JSON and nothing else"
            )
        group.add_subcommand(name, commands[name], help=entry.help)
        commands[name].prog = f"svdalign {name}"  # argparse put the program's usage here
    return parser, commands


# --- commands -----------------------------------------------------------------------------------


def _declare_train(parser: Parser) -> None:
    _options_of("training.config:RunConfig", "train")(parser)
    parser.add_argument(
        "--resume",
        type=str | None,
        default=None,
        metavar="FOLDER",
        help="go on with the run in this folder, with its own options",
    )


@command("train", "one rule on one network and data set", _declare_train)
def _train(options: Options, terminal: Terminal) -> int:
    from .runner import follow
    from .training.checkpoint import resumed
    from .training.config import RunConfig
    from .training.interrupt import Interrupt
    from .training.processes import RefusedError, leads, meeting

    folder, overwrite = options.pop("out"), options.pop("overwrite")
    resume, given = options.pop("resume"), options.pop("given")
    with _usage_errors():
        if resume is None:
            config = RunConfig(**options)
        elif folder is not None or overwrite:
            raise ValueError("--resume goes on in its own folder; give no --out or --overwrite")
        else:
            config = resumed(resume, {name: options[name] for name in given})
    with contextlib.ExitStack() as stack:
        with _usage_errors():
            config = stack.enter_context(meeting(config))
        try:
            if leads():
                return _lead(config, folder, resume, overwrite, terminal)
            with Interrupt() as interrupt:
                status = follow(config, stop=lambda: interrupt.requested)
            return _exit_code(status, interrupt)
        except RefusedError as error:
            raise UsageError(str(error)) from error


def _lead(
    config: RunConfig,
    folder: str | None,
    resume: str | None,
    overwrite: bool,
    terminal: Terminal,
) -> int:
    """Train as the only process, or the first of several."""
    from .runner import Run, Sweep
    from .training.config import evaluated_on
    from .training.interrupt import Interrupt
    from .training.options import to_yaml
    from .training.processes import refusing
    from .training.progress import PlainProgress, progress_for
    from .training.run import absolute

    with _usage_errors(), refusing():
        run = Run("", config, f"Rule {config.rule}", config.rule)
        at = folder if resume is None else resume
        sweep = Sweep(
            at,
            [run],
            config=to_yaml(absolute(config)),
            overwrite=overwrite,
            longer=resume is not None,
        )
        if not sweep.pending:
            ended = "give it more --epochs" if resume else "give another --out, or --overwrite"
            raise ValueError(f"run folder {at} holds the results of a run that has ended; {ended}")
        sweep.check()
    # Of several processes only the last one has the running loss that a live display shows.
    shown = progress_for if config.parallel is None else PlainProgress
    with Interrupt() as interrupt, shown(terminal.progress) as progress:
        results = sweep.run(progress=progress, stop=lambda: interrupt.requested)[run.name]
    record = sweep.top
    so_far = results["status"] == "interrupted"
    if results["accuracy"] is not None:
        images = evaluated_on(config.validation)
        reached = f"{images} accuracy {results['accuracy']:.2%}{' so far' * so_far}"
        terminal.say(reached)
    terminal.say(f"report: {record.report_path}")
    if so_far:
        terminal.say(f"go on with svdalign train --resume {record.folder}")
    terminal.result(results)
    return _exit_code(results["status"], interrupt)


@command(
    "compare",
    "several rules, or changes to them, on the same data and budget; table and report",
    _options_of("experiments.compare:CompareConfig", "compare"),
)
def _compare(options: Options, terminal: Terminal) -> int:
    from .experiments.compare import CompareConfig, Comparison
    from .reports import comparison_table

    def show(work: _Work, results: Options) -> None:
        terminal.show(comparison_table(results))
        terminal.say(f"report: {work.folder / 'report.html'}")

    return _carry_out(options, terminal, CompareConfig, Comparison, show)


def _declare_export(parser: Parser) -> None:
    from ..export import FORMATS

    parser.add_run()
    parser.add_list(
        "formats",
        f"files to write, of {', '.join(FORMATS)} (all); onnx needs the extra of that name",
    )
    parser.add_argument(
        "--out", type=str | None, default=None, help="folder for the files (RUN/export)"
    )


@command("export", "compact model of a run in files that need no library", _declare_export)
def _export(options: Options, terminal: Terminal) -> int:
    from pathlib import Path

    from ..export import FORMATS, check_imports
    from .experiments.card import ship
    from .reports.tables import evaluated, images
    from .training.checkpoint import load_run

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
            terminal.warn(f"model.{name} is left out: {error}")
    with _usage_errors(), terminal.progress.status("exporting"):
        card = ship(load_run(options["run"]), out, formats)
    for file in card["files"]:
        terminal.say(
            f"{out / file['name']}: {file['bytes']:,} bytes, largest difference to the trained "
            f"model {file['max_abs_difference']:.1e}"
        )
    ratios = [
        f"{row['ratio']:.2f} of its latency at batch {row['batch']}" for row in card["latency"]
    ]
    terminal.say(
        f"{card['parameters']['ratio']:.1%} of the dense network's parameters, "
        f"{card['macs']['ratio']:.1%} of its MACs, {', '.join(ratios)}; "
        f"{images(card)} accuracy {card['test_accuracy']:.2%} on {evaluated(card)}"
    )
    terminal.say(f"card: {out / 'card.md'}")
    terminal.result(card)
    return 0


@command("inspect", "ranks, spectra and orthogonality of a run's layers", lambda p: p.add_run())
def _inspect(options: Options, terminal: Terminal) -> int:
    from .experiments.inspection import inspect_run, table, write

    with _usage_errors():
        layers = inspect_run(options["run"])
    terminal.show(table(layers))
    try:
        for path in write(options["run"], layers):
            terminal.say(path)
    except OSError as error:  # a folder that can be read only
        terminal.warn(f"inspect.json and the plots are not written: {error}")
    terminal.result({"layers": [vars(layer) for layer in layers]})
    return 0


@command(
    "profile",
    "memory, arithmetic and time of a training step, by method",
    _options_of("experiments.profile:ProfileConfig", "profile"),
)
def _profile(options: Options, terminal: Terminal) -> int:
    from .experiments.profile import Profile, ProfileConfig
    from .reports import break_even_table, epoch_table, profile_table

    def show(work: _Work, results: Options) -> None:
        if results["status"] == "finished":
            terminal.show(profile_table(results))
            if results["config"]["epoch_images"] is not None:
                terminal.show(epoch_table(results))
            if results["break_even"]:
                terminal.show(break_even_table(results))
            terminal.say(f"report: {work.folder / 'report.html'}")

    work = partial(Profile, say=terminal.warn)
    return _carry_out(options, terminal, ProfileConfig, work, show)


def _declare_reproduce(parser: Parser) -> None:
    from .experiments.paper import EXPERIMENTS

    parser.usage = f"{parser.prog} WHAT [WHAT ...] [--config FILE.yaml] [--option value ...]"
    parser.add_argument("what", nargs="+", metavar="WHAT", help=f"of all, {', '.join(EXPERIMENTS)}")
    _options_of("experiments.paper:ReproduceConfig", "reproduce-SCALE", new=False)(parser)


@command("reproduce", "the paper's figures and tables", _declare_reproduce)
def _reproduce(options: Options, terminal: Terminal) -> int:
    from .experiments.paper import ReproduceConfig, Reproduction
    from .experiments.paper.draw import experiment_table
    from .reports.tables import terminal_table

    def show(work: _Work, found: Options) -> None:
        for name, results in found.items():
            title = f"{name}: {results['title']}"
            terminal.show(terminal_table(*experiment_table(results), title=title))
        terminal.say(f"page: {work.folder / 'index.html'}")

    work = partial(Reproduction, options.pop("what"))
    return _carry_out(options, terminal, ReproduceConfig, work, show)


@command(
    "tune",
    "learning rates of several rules, with the same effort for each",
    _options_of("experiments.tune:TuneConfig", "tune"),
)
def _tune(options: Options, terminal: Terminal) -> int:
    from .experiments.tune import TuneConfig, Tuning
    from .reports.tables import search_table

    def show(work: _Work, results: Options) -> None:
        terminal.show(search_table(results))

    return _carry_out(options, terminal, TuneConfig, Tuning, show)


@command("data", "load a data set and say what is in it", _options_of("training.config:DataConfig"))
def _data(options: Options, terminal: Terminal) -> int:
    from .reports.tables import counts, terminal_table
    from .training.build import load_data
    from .training.config import JobConfig, evaluated_on
    from .training.run import describe

    with _usage_errors():
        config = JobConfig(**options)
        data = load_data(config)
    images = f"{evaluated_on(config.validation)} images"
    shape = " × ".join(map(str, data.train.shape))
    mean, std = (", ".join(f"{v:.4f}" for v in values) for values in (data.mean, data.std))
    terminal.say(f"{data.name}: {counts(describe(data), evaluated_on(config.validation))}, {shape}")
    terminal.say(f"pixels from 0 to 1 have mean {mean} and deviation {std}")
    splits = {
        key: split.labels.bincount(minlength=data.num_classes).tolist()
        for key, split in (("train", data.train), ("test", data.test))
    }
    rows = [list(map(str, row)) for row in zip(data.classes, *splits.values(), strict=True)]
    terminal.show(terminal_table(("class", "training images", images), rows))
    terminal.result(
        {
            **describe(data),
            "classes": list(data.classes),
            "images_by_class": splits,
            "mean": data.mean,
            "std": data.std,
        }
    )
    return 0


@command("rules", "the learning rules and their options")
def _rules(options: Options, terminal: Terminal) -> int:
    from .. import rules

    found = {
        name: {key: value for key, value in vars(rules.get(name)).items() if key != "name"}
        for name in rules.available()
    }
    for name, own in found.items():
        options_of = ", ".join(f"{key} {json.dumps(value)}" for key, value in own.items())
        terminal.say(f"{name}: {options_of}")
    terminal.say("Change one by --options.NAME VALUE. Horizon and error have flags of their own.")
    terminal.result(found)
    return 0


# --- what all commands share --------------------------------------------------------------------


class _Work(Protocol):
    """The work of compare, tune, profile or reproduce: it fills a folder and can be resumed."""

    @property
    def folder(self) -> Path: ...
    @property
    def pending(self) -> int: ...
    def run(self, *, progress: Progress | None, stop: Callable[[], bool]) -> Options: ...


def _carry_out(
    options: Options,
    terminal: Terminal,
    config: Callable[..., Any],
    make: Callable[..., _Work],
    show: Callable[[_Work, Options], None],
) -> int:
    """Do the work that ``options`` describe until it is done or interrupted, and show its results.
    Returns an exit code."""
    from .training.interrupt import Interrupt
    from .training.progress import progress_for

    folder, overwrite = options.pop("out"), options.pop("overwrite")
    with _usage_errors(), terminal.progress.status("looking at what is to be done"):
        work = make(config(**options), folder, overwrite=overwrite)
    with Interrupt() as interrupt, progress_for(terminal.progress, work.pending) as progress:
        results = work.run(progress=progress, stop=lambda: interrupt.requested)
    show(work, results)
    parts = [results] if "status" in results else results.values()
    stopped = any(part["status"] == "interrupted" for part in parts)
    if stopped:
        same = f"the same command{' without --overwrite' * overwrite}"
        terminal.say(f"go on with {same} and --out {work.folder}")
    terminal.result(results)
    return _exit_code("interrupted" if stopped else "finished", interrupt)


def _exit_code(status: str, interrupt: Interrupt) -> int:
    return {"finished": 0, "interrupted": interrupt.exit_code}.get(status, _FAILED)


def _device() -> str:
    """The default device: CUDA where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    """Turn errors that are raised in here, before any training, into :class:`UsageError`."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error


def _failures() -> tuple[type[Exception], ...]:
    """Errors that end a run from outside, such as a full disk."""
    from safetensors import SafetensorError

    from ..parallel import PeerError

    return OSError, SafetensorError, PeerError


def _one_line(message: str) -> str:
    return " ".join(message.split())
