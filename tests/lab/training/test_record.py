from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from svdalign.lab.training.interrupt import Interrupt
from svdalign.lab.training.provenance import provenance
from svdalign.lab.training.record import (
    LOCK,
    InUseError,
    Record,
    new_folder,
    write_json,
)


def test_a_folder_of_ours_may_be_used_again(tmp_path: Path) -> None:
    record = Record(tmp_path / "run")
    record.check()
    record.start("epochs: 1\n")
    record.append_metrics({"epoch": 1})
    record.write_results({"status": "finished"})
    record.check()
    assert record.results() == {"status": "finished"}
    record.start("epochs: 2\n")
    assert record.results() is None
    assert not record.metrics_path.exists()


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and was not made by svdalign train"):
        Record(tmp_path).check()
    file = tmp_path / "thesis.tex"
    with pytest.raises(ValueError, match="is not a folder"):
        Record(file).check()
    config = tmp_path / "config.yaml"
    config.write_text("somebody: else's\n")
    with pytest.raises(ValueError, match="was not made by"):
        Record(tmp_path).check()


@pytest.mark.parametrize(
    "content", ["x: !!python/object/apply:os.system [touch pwned]\n", "rank: [1\n", "a: b: c\n"]
)
def test_a_config_that_is_no_plain_yaml_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.chdir(tmp_path)
    record = Record(tmp_path / "run")
    record.start(content)
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read as YAML: "):
        record.config()
    assert not (tmp_path / "pwned").exists()


def test_folders_that_cannot_be_made_are_refused_at_once(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--out .*run cannot be made: .*file is not a folder"):
        Record(tmp_path / "file" / "deep" / "run").check()
    # Said rather than done: to an administrator every folder is open.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ValueError, match="cannot be made: no permission to write in"):
        Record(tmp_path / "run").check()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_kinds_of_run_do_not_mix(tmp_path: Path) -> None:
    Record(tmp_path, "compare").start("")
    with pytest.raises(ValueError, match="was not made by svdalign train"):
        Record(tmp_path, "train").check()


def test_start_removes_files_of_ours_only(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.start("")
    (tmp_path / "notes.txt").write_text("mine")
    record.start("")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_new_folders_are_numbered(tmp_path: Path) -> None:
    names = [new_folder(tmp_path / "runs", "train").name for _ in range(3)]
    assert names == ["train-001", "train-002", "train-003"]


def test_json_has_no_numbers_that_are_not_finite(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [float("nan"), 1.5], "b": float("inf")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, 1.5], "b": None}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_provenance_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance("cpu")["git"] is None


def test_broken_results_are_no_results(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.start("")
    record.results_path.write_text('{"status": "fini')
    assert record.results() is None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_asks_and_the_second_insists(number: int, code: int) -> None:
    before = [signal.getsignal(s) for s in Interrupt.SIGNALS]
    with Interrupt() as interrupt:
        os.kill(os.getpid(), number)
        assert interrupt.requested
        assert interrupt.exit_code == code
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(s) for s in Interrupt.SIGNALS] == before


def test_a_locked_folder_is_in_use_until_its_owner_ends(tmp_path: Path) -> None:
    record = Record(tmp_path / "run")
    with record.locked():
        with pytest.raises(InUseError, match=f"in use by process {os.getpid()};"):
            record.check_free()
        record.check()  # a lock alone makes no folder somebody else's
    record.check_free()
    assert list(record.folder.iterdir()) == []
    (record.folder / LOCK).write_text("123456")  # what a process that was killed leaves
    record.check_free()


@pytest.mark.parametrize(
    ("program", "named"),
    [
        ("/somewhere/bin/svdalign", "svdalign"),
        ("/there/svdalign/__main__.py", "python -m svdalign"),
        ("benchmarks/step.py", "python benchmarks/step.py"),
        ("/there/benchmarks/step.py", "python step.py"),
    ],
)
def test_provenance_names_the_command_but_not_where_it_lies(
    program: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [program, "train", "--model", "my model"])
    assert provenance("cpu")["command"] == f"{named} train --model 'my model'"
