"""What a logger is told: every epoch once, whatever happens to the run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from svdalign.lab.cli import main
from svdalign.lab.runner import Run, Sweep
from svdalign.lab.training import RunConfig
from svdalign.lab.training.loggers import numbers

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TINY: dict[str, Any] = {
    "model": "mlp", "width": 0.1, "epochs": 3, "batch_size": 16, "train_limit": 32, "test_limit": 20
}  # fmt: skip
OWN = f"{__name__.rpartition('.')[2]}:Own"
told: list[Any] = []


class Own:
    """A logger as a user writes one."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        told.append((folder, name, config["lr"]))

    def log(self, epoch: int, numbers: Mapping[str, float]) -> None:
        told.append((epoch, numbers["loss"]))

    def close(self, status: str) -> None:
        told.append(status)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setitem(sys.modules, OWN.partition(":")[0], sys.modules[__name__])
    told.clear()
    return told


def train(folder: Path, steps: int | None = None, **changes: Any) -> dict[str, Any]:
    """Train for so many steps, or to the end."""
    asked = iter(range(10**6))
    config = RunConfig(rule="ssa", **{**TINY, **changes})
    sweep = Sweep(folder, [Run("", config, "a run")])
    sweep.check()
    return sweep.run(stop=lambda: steps is not None and next(asked) >= steps)[""]


def test_tensorboard_shows_each_epoch_of_a_run_that_went_on_once(tmp_path: Path) -> None:
    train(tmp_path, steps=3, logger="tensorboard")  # two steps an epoch
    results = train(tmp_path, logger="tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for key in ("loss", "test_accuracy"):
        shown = [(event.step, event.value) for event in events.Scalars(key)]
        assert shown == [(row["epoch"], pytest.approx(row[key])) for row in results["history"]]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


def test_wandb_is_called_as_its_documentation_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []
    run = SimpleNamespace(
        log=lambda data, step: calls.append(("log", (step, data["loss"]))),
        finish=lambda exit_code: calls.append(("finish", exit_code)),
    )

    def init(*, project: str, name: str, dir: str, config: dict[str, Any]) -> SimpleNamespace:
        calls.append(("init", (project, name, dir, config["rule"])))
        return run

    fake = SimpleNamespace(init=init, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    results = train(tmp_path, logger="wandb")
    epochs = [("log", (row["epoch"], row["loss"])) for row in results["history"]]
    first = ("init", ("svdalign", "a run", str(tmp_path), "ssa"))
    assert calls == [first, *epochs, ("finish", 0)]


def test_a_logger_of_ones_own(tmp_path: Path, own: list[Any]) -> None:
    results = train(tmp_path, logger=OWN, lr=0.02)
    epochs = [(row["epoch"], row["loss"]) for row in results["history"]]
    assert own == [(tmp_path, "a run", 0.02), *epochs, "finished"]


def test_it_hears_of_a_run_that_fails(
    tmp_path: Path, own: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("svdalign.lab.training.run.save_checkpoint", full)
    with pytest.raises(OSError, match="disk full"):
        train(tmp_path, logger=OWN)
    assert own[-1] == "failed"


@pytest.mark.parametrize(
    ("logger", "message"),
    [
        ("tensorbord", "logger must be tensorboard, wandb or package.module:Class"),
        ("nowhere.at_all:Own", "nowhere.at_all:Own cannot be imported"),
    ],
)
def test_what_is_no_logger_is_refused_before_training(
    tmp_path: Path, logger: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [w for key, value in TINY.items() for w in (f"--{key.replace('_', '-')}", str(value))]
    assert main(["train", *words, "--logger", logger, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_one_that_is_not_installed_says_how_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdalign.lab.training.loggers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'svdalign\[loggers\]'"):
        train(Path("unused"), logger="tensorboard")


def test_numbers_of_a_row() -> None:
    row = {"epoch": 2, "loss": 0.5, "test_loss": math.nan, "ranks": {"fc": 3},
           "spectra": {"fc": [1.0]}, "alignment": {"layers": {"fc": 80.0}}}  # fmt: skip
    expected = {"loss": 0.5, "ranks/fc": 3, "alignment/layers/fc": 80.0}
    assert numbers(row) == expected
