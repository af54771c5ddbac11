"""The command line as users meet it: exit codes, messages, and what is left in folders."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from svdalign import rules
from svdalign.lab.cli import COMMANDS, main
from svdalign.lab.reports.tables import terminal_table
from svdalign.lab.terminal import Terminal

TINY = [
    *("--model", "mlp", "--width", "0.1", "--epochs", "2", "--batch-size", "32"),
    *("--train-limit", "64", "--test-limit", "30"),
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(f"\n    {name} " in overview for name in COMMANDS)
    assert "exit codes: 0 done; 1 " in overview
    assert main([]) == 0
    assert capsys.readouterr().out == overview


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: svdalign {name}" in shown
    assert "exit codes: 0 done; 1 " in shown
    assert "--json" in shown
    if name == "reproduce":
        assert "usage: svdalign reproduce WHAT" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "svdalign: error: unknown command 'trian'; there are train, compare, export,"),
        ("train --epochs -3", "svdalign train: error: --epochs must be at least 1, got -3"),
        ("train --epochs x", "svdalign train: error: --epochs takes int; got x"),
        ("train --epoch 3", "svdalign train: error: unrecognized arguments: --epoch 3"),
        ("train --rule ssb", "svdalign train: error: unknown method 'ssb'; did you mean ssa?"),
        ("train --horizon -1", "svdalign train: error: --horizon must be at least 0, got -1"),
        (
            "train --horizon x",
            "horizon must be a whole number of at least 0, or rule for",
        ),
        ("train --horizon all", "backpropagation, rule bp"),
        ("train --rule bp --rank null", "for dense weights say rule bp-dense"),
        ("compare --rank null", "for dense weights say rule bp-dense"),
        ("train --options.horizon 1", "an option itself"),
        ("train --rank 1.5", "rank must be a fraction in (0, 1]"),
        ("train --model vgg99", "unknown model 'vgg99'; did you mean"),
        ("train --data mnist", "unknown data set 'mnist'; available: cifar10,"),
        ("train --data cifar10 --data-dir nowhere", "--data-dir is not a folder: nowhere"),
        (
            "train --augment rotate",
            "--augment takes list of crop, translate, flip, alternate, cutout; got rotate",
        ),
        ("train --options.alhpa 1", "rule 'ssa' has no option alhpa; it has"),
        ("train --options.alpha abc", "alpha must be a number of at least 0, got 'abc'"),
        (
            "train --rule.alpha 3",
            "unrecognized arguments: --rule.alpha; did you mean --options.alpha?",
        ),
        ("train --options.alpha [1", "alpha must be a number of at least 0, got '[1'"),
        ("train --options.learn maybe", "learn must be true or false, got 'maybe'"),
        ("train --rule bp --error local", "error must be 'output' for rule 'bp'"),
        ("train --config nowhere.yaml", "nowhere.yaml"),
        ("trian", "; did you mean train?"),
        ("train --epoch 3", "; did you mean --epochs?"),
        ("train --schedule cosin", "got cosin; did you mean cosine?"),
        ("train --options.alhpa 1", "; did you mean alpha?"),
        ("reproduce", "error: WHAT is missing; usage: svdalign reproduce WHAT"),
        ("profile --estimate maybe", "--estimate takes true, false; got maybe"),
        ("train --epochs", "--epochs takes int; got nothing"),
        ("train --resume nowhere", "there is no folder nowhere"),
        ("compare --rules bp ssb", "svdalign compare: error: unknown method 'ssb'"),
        ("compare --seeds 0", "seeds must be at least one"),
        ("compare --train-limit 0", "--train-limit must be at least 1, got 0"),
        ("data --data mnist", "svdalign data: error: unknown data set 'mnist'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("words", ["train", "compare", "profile", "reproduce table1"])
def test_a_folder_that_cannot_be_made_is_one_line(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("notes.txt").touch()
    assert main([*words.split(), "--out", "notes.txt/run"]) == 2
    error = capsys.readouterr().err
    assert "--out notes.txt/run cannot be made: " in error
    assert error.count("\n") == 1


def test_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--rule", "ssa", "--horizon", "2"]) == 0
    out, progress = capsys.readouterr()
    assert "ssa  epoch 2/2" in progress
    assert "report: runs/train-001/report.html" in out
    results = json.loads(Path("runs/train-001/results.json").read_text())
    assert results["config"]["horizon"] == 2
    assert f"test accuracy {results['accuracy']:.2%}" in out
    assert Path("runs/train-001/report.html").read_text().count("<svg") == 3


def test_a_run_again_from_its_own_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--out", "a", "--options.alpha", "0.5"]) == 0
    assert main(["train", "--config", "a/config.yaml", "--out", "b"]) == 0
    a, b = (json.loads(Path(x, "results.json").read_text()) for x in "ab")
    assert a["config"] == b["config"]
    assert a["config"]["options"] == {"alpha": 0.5}
    assert a["accuracy"] == b["accuracy"]
    assert main(["train", "--config", "a/config.yaml", "--out", "a"]) == 2
    assert "holds the results of a run" in capsys.readouterr().err
    assert main(["train", "--config", "a/config.yaml", "--out", "a", "--overwrite"]) == 0


def test_accuracy_on_held_out_images_is_called_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--rule", "bp", "--validation", "16", "--out", "run"]) == 0
    out, progress = capsys.readouterr()
    assert progress.count("  held-out ") == 2  # a line an epoch
    assert out.startswith("held-out accuracy ")
    page = Path("run/report.html").read_text()
    assert "Held-out accuracy" in page
    assert "test" not in (out + progress + page.partition("Where these numbers")[0]).lower()


def test_compare(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *TINY, "--rules", "bp", "ssa", "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    for part in ("SVD-BP", "SSA, horizon 0", "±", "MiB", "report: runs/compare-001/report.html"):
        assert part in out
    results = json.loads(Path("runs/compare-001/results.json").read_text())
    assert len(results["runs"]) == 4
    assert all(len(line) <= 80 for line in out.splitlines() if "MiB" in line)


@pytest.mark.parametrize("words", [["bp", "dfa"], ["bp,dfa"], ["bp,", "dfa"], ["[bp,dfa]"]])
def test_lists_can_be_written_in_several_ways(words: list[str]) -> None:
    tiny = ["--estimate", "--model", "mlp", "--width", "0.1", "--batch-size", "8", "--out", "run"]
    assert main(["profile", *tiny, "--methods", *words, "--devices", "1,4"]) == 0
    config = json.loads(Path("run/results.json").read_text())["config"]
    assert config["methods"] == ["bp", "dfa"]
    assert config["devices"] == [1, 4]


def test_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data"]) == 0
    out = capsys.readouterr().out
    assert "embedded: 10,000 training and 2,000 test images, 1 × 28 × 28" in out
    assert "Ankle boot" in out
    assert main(["data", "--train-limit", "100", "--validation", "30"]) == 0
    out = capsys.readouterr().out
    assert "70 of 10,000 training and 30 of 10,000 held-out images" in out


def test_json_is_all_that_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--out", "run", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out) == json.loads(Path("run/results.json").read_text())
    assert main(["inspect", "run", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert layers == json.loads(Path("run/inspect.json").read_text())["layers"]
    assert main(["data", "--json", "--test-limit", "50"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["test"], data["test_of"], sum(data["images_by_class"]["test"])) == (50, 2000, 50)


def test_rules_lists_what_each_can_be_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules"]) == 0
    out = capsys.readouterr().out
    for name in rules.available():
        (line,) = (line for line in out.splitlines() if line.startswith(f"{name}: "))
        for field in dataclasses.fields(rules.get(name)):
            assert field.name == "name" or f" {field.name} " in line
    assert main(["rules", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dfa"]["grid"] is None


def test_a_completion_script_knows_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="completion scripts need shtab")
    assert main(["--print_completion=shtab-bash"]) == 0
    script = capsys.readouterr().out
    for word in ("profile", "--horizon", "--estimate", "--seeds"):
        assert word in script


def test_a_switch_alone_is_on() -> None:
    words = ["--model", "mlp", "--width", "0.1", "--batch-size", "8", "--methods", "bp", "dfa"]
    assert main(["profile", "--estimate", *words, "--out", "a"]) == 0
    assert json.loads(Path("a/results.json").read_text())["config"]["estimate"] is True


@pytest.mark.parametrize("width", [20, 80])
def test_tables_never_cut_a_number(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    numbers = [f"{10**n}.5" for n in range(3, 9)]
    Terminal().show(terminal_table(["a long name of a method", *"bcdefg"], [["x y z", *numbers]]))
    assert set(numbers) <= set(capsys.readouterr().out.split())


def test_a_folder_that_can_only_be_read_is_looked_into(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", *TINY, "--out", "run"]) == 0
    Path("run/inspect.json").mkdir()  # cannot be written, by root neither
    capsys.readouterr()
    assert main(["inspect", "run"]) == 0
    out, err = capsys.readouterr()
    assert "‖XᵀX−I‖" in out
    assert err.count("\n") == 1
    assert "inspect.json and the plots are not written: " in err


# --- in processes of their own, for streams and signals are real --------------------------------


def start(*words: str, environment: dict[str, str] | None = None, **streams: Any) -> Any:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-m", "svdalign", *words],
        env={**os.environ, **(environment or {})},
        **{**pipes, **streams},
    )


def test_a_reader_that_goes_away_ends_nothing() -> None:
    with start("train", *TINY, "--out", "run") as process:
        process.stdout.close()
        err = process.stderr.read().decode()
    assert process.returncode == 0
    assert "Traceback" not in err
    assert "Error" not in err
    assert json.loads(Path("run/results.json").read_text())["status"] == "finished"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_a_stream_is_one_line() -> None:
    with (
        open("/dev/full", "w") as full,
        start("data", "--train-limit", "20", stdout=full) as process,
    ):
        err = process.stderr.read().decode()
    assert process.returncode == 1
    assert err == "svdalign data: error: [Errno 28] No space left on device\n"


def test_a_full_disk_in_a_run_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Any, row: dict[str, Any]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl")

    monkeypatch.setattr("svdalign.lab.training.record.Record.append_metrics", full)
    assert main(["train", *TINY, "--out", "run"]) == 1
    err = capsys.readouterr().err
    assert err == "svdalign train: error: [Errno 28] No space left on device: 'run/metrics.jsonl'\n"


def test_a_terminal_without_unicode_is_told_all_the_same() -> None:
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": ""}
    process = start("data", "--train-limit", "20", environment=plain)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, b"")
    assert b"1 x 28 x 28" in out
    assert out.isascii()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_ctrl_c_in_the_first_second_is_one_line() -> None:
    """While torch is being imported, before the command has begun."""
    with start("data", "--train-limit", "20") as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while "libtorch" not in maps.read_text():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
    assert err == b"svdalign: interrupted\n"
    assert process.returncode == 130


def test_ctrl_c_leaves_what_was_measured() -> None:
    """In a process of its own, for the signal is real."""
    words = ["train", *TINY, "--epochs", "100000", "--out", "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "svdalign", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = Path("run/metrics.jsonl")
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted after" in err
    assert "Traceback" not in err
    assert re.search(r"^test accuracy .*% so far$", out, re.MULTILINE)
    assert "go on with svdalign train --resume run\n" in out
    results = json.loads(Path("run/results.json").read_text())
    assert results["status"] == "interrupted"
    assert len(results["history"]) >= 2
    assert Path("run/report.html").exists()
