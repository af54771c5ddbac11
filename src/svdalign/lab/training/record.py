"""Who may write into a folder, and what a run leaves there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

from ..._files import replace_file
from .config import MachineConfig, RunConfig
from .options import differences, from_dict

try:
    import fcntl
except ImportError:  # not a POSIX system: folders are not locked there
    fcntl = None  # type: ignore[assignment]

#: What may differ between a run and the command that goes on with it: where it runs, and where its
#: data lie now. ``epochs`` may grow, where ``--resume`` says so.
MOVABLE = {f.name for f in dataclasses.fields(MachineConfig)} | {
    "data_dir", "parallel", "parallel_timeout", "workers"
}  # fmt: skip


LOCK = ".lock"


class InUseError(OSError):
    """Another process writes into the folder."""


class Record:
    """A run folder: ``config.yaml``, ``metrics.jsonl``, ``checkpoint.safetensors``,
    ``results.json``, ``report.html``, and ``unreadable.txt`` where images could not be read.

    The first line of its config says that it is ours and of what ``kind``: ``"train"``,
    ``"compare"``, ``"profile"`` or ``"reproduce"``. Opening one writes nothing; :meth:`start` makes
    it. :meth:`state` is the one place that decides what a command may do with a folder that is
    there, and :meth:`locked` keeps other processes out while it does it.
    """

    def __init__(self, folder: str | Path, kind: str = "train") -> None:
        self.folder = Path(folder)
        self.config_path = self.folder / "config.yaml"
        self.metrics_path = self.folder / "metrics.jsonl"
        self.results_path = self.folder / "results.json"
        self.report_path = self.folder / "report.html"
        self.checkpoint_path = self.folder / "checkpoint.safetensors"
        self.unreadable_path = self.folder / "unreadable.txt"
        self._mark = f"# svdalign {kind}\n"

    def results(self) -> dict[str, Any] | None:
        """What the run measured, or None where there is no complete ``results.json``."""
        return read_json(self.results_path)

    def check(self) -> None:
        """ValueError unless the folder is new, empty, or holds a run of this kind, and can be
        written in."""
        check_writable(self.folder)
        there = self.folder.iterdir() if self.folder.exists() else ()
        if any(path.name != LOCK for path in there) and not self._is_ours():
            raise ValueError(
                f"folder {self.folder} is not empty and was not made by {self._mark[2:].strip()}"
            )

    def state(
        self, config: RunConfig, *, overwrite: bool = False, longer: bool = False
    ) -> Literal["new", "resume", "done"]:
        """What there is to do for the run ``config`` in this folder: start it, go on from its
        checkpoint, or nothing, because it is finished or has diverged. ``longer``: the run that is
        there may go on for more epochs than it was to take.

        Raises ValueError for a folder of something else, or one that holds another run, unless it
        is to be overwritten.
        """
        self.check()
        if overwrite or not self.config_path.exists():
            return "new"
        there = from_dict(RunConfig, self.config())
        more = longer and config.epochs > there.epochs
        own = dataclasses.replace(there, epochs=config.epochs) if more else there
        if changed := _changes(own, config):
            raise ValueError(
                f"{self.folder} holds a run with another config ({changed}); give another --out, "
                "or --overwrite to replace it. To go on with that run: svdalign train --resume "
                f"{self.folder}"
            )
        status = (self.results() or {}).get("status", "interrupted")
        if status == "diverged" or (status == "finished" and not more):
            return "done"
        # A run that was killed before its first checkpoint has only its config: it starts again.
        return "resume" if self.checkpoint_path.exists() else "new"

    def check_free(self) -> None:
        """:class:`InUseError` if another process has locked the folder."""
        if self.folder.is_dir():
            with self.locked():
                pass

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """While active, no other process can lock the folder; :class:`InUseError` if one has.

        The operating system lifts the lock of a process that ends, however it does.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / LOCK
        with contextlib.ExitStack() as stack:
            while True:
                file = stack.enter_context(path.open("a+", encoding="utf-8"))
                try:
                    if fcntl is not None:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    file.seek(0)
                    raise InUseError(
                        f"{self.folder} is in use by process {file.read().strip() or 'unknown'}; "
                        "wait until it ends, or give another --out"
                    ) from None
                # Its last owner may have removed the file since it was opened: then once more.
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                        break
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def start(self, config_yaml: str) -> None:
        """Begin a run: write its config, remove the files of an earlier one and no others."""
        ours = (self.metrics_path, self.results_path, self.report_path)
        for path in (*ours, self.checkpoint_path, self.unreadable_path):
            path.unlink(missing_ok=True)
        self.write_config(config_yaml)

    def write_config(self, config_yaml: str) -> None:
        """Write this config, marked as ours; other files stay."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Whole or not there: what is left after a kill is what a resumed run starts from.
        replace_file(
            self.config_path,
            lambda part: part.write_text(self._mark + config_yaml, encoding="utf-8"),
        )

    def config(self) -> dict[str, Any]:
        """What ``config.yaml`` holds; ValueError where there is none of ours."""
        if not self.folder.is_dir():
            raise ValueError(f"there is no folder {self.folder}")
        if not self._is_ours():
            raise ValueError(f"{self.folder} was not made by {self._mark[2:].strip()}")
        try:
            content = yaml.safe_load(self.config_path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"{self.config_path} cannot be read as YAML: {why}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{self.config_path} holds no options")
        return content

    def was_begun_with(self, config_yaml: str) -> bool:
        """Whether the folder holds this config, and what it asks for is not finished."""
        try:
            there = self.config_path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return False
        status = (self.results() or {}).get("status", "interrupted")
        return there == self._mark + config_yaml and status == "interrupted"

    def restart(self, history: Iterable[dict[str, Any]], config_yaml: str) -> None:
        """Prepare the folder of a run that goes on: its config, ``history`` as metrics, no
        results."""
        self.write_config(config_yaml)
        for path in (self.results_path, self.report_path):
            path.unlink(missing_ok=True)
        lines = "".join(_line(row) for row in history)
        replace_file(self.metrics_path, lambda part: part.write_text(lines, encoding="utf-8"))

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one line to ``metrics.jsonl``, complete on disk when this returns."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def write_unreadable(self, reasons: Iterable[str]) -> None:
        """Add what could not be read, and why, to ``unreadable.txt``, a line each; no file is made
        for none."""
        path = self.unreadable_path
        form = {"encoding": "utf-8", "errors": "surrogateescape"}  # as names of files are bytes
        known = path.read_text(**form).splitlines() if path.exists() else []
        lines = dict.fromkeys([*known, *(" ".join(reason.split()) for reason in reasons)])
        if len(lines) > len(known):
            text = "".join(f"{line}\n" for line in lines)
            replace_file(path, lambda part: part.write_text(text, **form))

    def write_results(self, results: dict[str, Any]) -> None:
        """Write ``results.json`` in one go: it is whole or not there."""
        write_json(self.results_path, results)

    def _is_ours(self) -> bool:
        try:
            with self.config_path.open(encoding="utf-8") as file:
                return file.readline() == self._mark
        except (OSError, UnicodeDecodeError):
            return False


def check_resumable(there: RunConfig, here: RunConfig) -> None:
    """ValueError unless a run with the config ``there`` may go on as ``here``."""
    longer = dataclasses.replace(there, epochs=max(there.epochs, here.epochs))
    if changed := _changes(longer, here):
        raise ValueError(
            f"a run goes on with its own options ({changed}); only {', '.join(sorted(MOVABLE))} "
            "may change, and epochs may grow"
        )


def _changes(there: RunConfig, here: RunConfig) -> str:
    """How two runs differ, other than by where they run."""
    first, second = (
        {k: v for k, v in dataclasses.asdict(config).items() if k not in MOVABLE}
        for config in (there, here)
    )
    return differences(first, second)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(finite(row), allow_nan=False) + "\n"


def check_writable(folder: Path) -> None:
    """ValueError unless ``folder`` can be made or, if it exists, written in. Makes nothing."""
    # For os.path a file does not exist if its folder may not be read.
    there = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not os.path.isdir(there):
        raise ValueError(f"--out {folder} cannot be made: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--out {folder} cannot be made: no permission to write in {there}")


def new_folder(parent: str | Path, stem: str) -> Path:
    """Make and return the first free of ``parent/stem-001``, ``-002``, ..."""
    parent = Path(parent)
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = parent / f"{stem}-{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def unfinished(parent: str | Path, kind: str, config_yaml: str) -> Path | None:
    """The latest folder ``parent/KIND-NNN`` that was begun with this config and is not finished;
    None where there is none that no other process is busy with."""
    for folder in sorted(Path(parent).glob(f"{kind}-*"), reverse=True):
        record = Record(folder, kind)
        if record.was_begun_with(config_yaml):
            with contextlib.suppress(InUseError):
                record.check_free()
                return folder
    return None


def write_json(path: Path, content: Any) -> None:
    """Write JSON, all or nothing; numbers that are not finite become null."""
    text = json.dumps(finite(content), indent=1, allow_nan=False) + "\n"
    replace_file(path, lambda part: part.write_text(text, "utf-8"))


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in ``path``, or None where there is no such file or no object in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def finite(value: Any) -> Any:
    """``value`` for JSON: what is not a finite number becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
