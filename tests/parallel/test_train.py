"""``svdalign train`` on several processes, as ``torchrun`` starts it."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from tests.parallel import worker
from tests.parallel.test_parallel import CONTEXT, same

from svdalign import storage
from svdalign.lab.cli import main

TINY = [
    *("--model", "mlp", "--width", "0.1", "--batch-size", "12", "--units", "layer"),
    *("--train-limit", "60", "--test-limit", "35", "--horizon", "0", "--out", "run"),
]
#: A loss that is a mean over samples: what processes with a part each add up to.
MEAN = ["--options.alpha", "0"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def svdalign(folder: Path, size: int, *words: str) -> tuple[list[int | None], list[str]]:
    """Exit codes of the processes, and what each said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=worker.command, args=(rank, size, folder, port, list(words)))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    said = [(folder / f"said{rank}.txt").read_text() for rank in range(size)]
    return [process.exitcode for process in processes], said


def measured(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("epoch", "loss", "train_accuracy", "test_loss", "test_accuracy", "ranks")
    return [{key: row[key] for key in keys} for row in rows]


@pytest.mark.parametrize(("parallel", "size", "after"), [("layers", 2, 1), ("data", 2, 3)])
def test_a_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, parallel: str, size: int, after: int
) -> None:
    words = ["train", *TINY, "--rank-energy", "0.9", "--epochs", "1", "--parallel", parallel]
    codes, said = svdalign(tmp_path, size, *words)
    assert codes == [0] * size, said
    again = ["train", "--resume", "run", "--epochs", "2"]
    if after == 1:
        assert main([*again, "--parallel", "null"]) == 0
    else:
        codes, said = svdalign(tmp_path, after, *again)
        assert codes == [0] * after, said
    assert [row["epoch"] for row in measured(Path("run"))] == [1, 2]
    assert storage.read("run/checkpoint.safetensors")["steps"] == 10


@pytest.mark.parametrize(("parallel", "size"), [("layers", 3), ("data", 2)])
def test_an_epoch_of_several_processes_is_that_of_one(
    tmp_path: Path, parallel: str, size: int
) -> None:
    options = [*TINY, *MEAN, "--epochs", "1", "--rank-energy", "0.9", "--optimizer", "sgd"]
    assert main(["train", *options, "--out", "one"]) == 0
    codes, said = svdalign(tmp_path, size, "train", *options, "--parallel", parallel)
    assert codes == [0] * size, said
    assert "test accuracy" in said[0]
    assert not any(said[1:])
    for ours, theirs in zip(measured(tmp_path / "run"), measured(tmp_path / "one"), strict=True):
        assert ours.pop("ranks") == theirs.pop("ranks")
        assert ours == pytest.approx(theirs, rel=1e-4)
    states = [storage.read(f"{name}/checkpoint.safetensors") for name in ("run", "one")]
    for part in ("model", "feedback"):
        ours, theirs = ({n: v.double() for n, v in s[part].items()} for s in states)
        same(ours, theirs, rounding=1e-4)


@pytest.mark.parametrize("parallel", ["layers", "data"])
def test_what_is_logged_does_not_depend_on_when_checkpoints_are_written(
    tmp_path: Path, parallel: str
) -> None:
    words = ["train", *TINY, "--train-limit", "600", "--epochs", "2", "--parallel", parallel]
    rows = []
    for seconds in ("0", "1000"):
        out = ["--checkpoint-seconds", seconds, "--out", seconds]
        codes, said = svdalign(tmp_path, 2, *words, *out)
        assert codes == [0, 0], said
        rows.append(measured(tmp_path / seconds))
    assert rows[0] == rows[1]


def test_what_cannot_be_split_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words, message in (
        (["--parallel", "layers", "--rule", "bp"], "backpropagation"),
        (["--parallel", "data", "--batch-size", "11"], "must be a multiple of the number of proc"),
        (["--parallel", "layers", "--lookahead", "2"], "lookahead averages all weights"),
        (["--parallel", "layers", "--model", "mpl"], "unknown model 'mpl'"),
    ):
        base = [w for w in TINY if w not in ("--horizon", "0")]
        codes, said = svdalign(tmp_path, 2, "train", *base, *words, "--overwrite")
        assert codes[0] == 2
        assert message in said[0]
        assert all(text.count("\n") <= 1 for text in said)
    assert main(["train", *TINY, "--parallel", "data"]) == 2
    assert "needs processes that torchrun starts" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", *TINY]) == 2
    assert "say --parallel layers or data" in capsys.readouterr().err
