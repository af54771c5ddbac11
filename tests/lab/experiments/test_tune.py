from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from svdalign.lab.cli import main
from svdalign.lab.experiments import tune
from svdalign.lab.experiments.tune import TuneConfig, Tuning
from svdalign.lab.runner import Sweep

TINY: dict[str, Any] = {
    "model": "mlp", "width": 0.1, "train_limit": 96, "validation": 32, "test_limit": 20,
    "batch_size": 32, "epochs": 1, "rules": ["bp-dense", "ssa"], "rates": [0.01, 0.02], "tries": 4,
}  # fmt: skip


def test_every_method_gets_as_many_tries_and_the_same_again_runs_nothing(tmp_path: Path) -> None:
    results = Tuning(TuneConfig(**TINY), tmp_path).run()
    assert results["status"] == "finished"
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert {name: len(found) for name, found in results["accuracy"].items()} == {
        "bp-dense": 4, "ssa": 4,
    }  # fmt: skip
    runs = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    assert len(runs) == 8
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    assert Tuning(TuneConfig(**TINY), tmp_path).run()["accuracy"] == results["accuracy"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")} == before


def test_it_goes_on_past_the_edge_and_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With accuracies that are known: the higher the rate the better, up to 0.1."""
    tried: list[float] = []

    def run(self: Sweep, runs: Any, **_: Any) -> dict[str, Any]:
        rate = runs[0].config.rate
        tried.append(rate)
        right = 0.5 - abs(rate - 0.08)
        return {r.name: {"status": "finished", "accuracy": right} for r in runs}

    monkeypatch.setattr(Sweep, "run", run)
    config = TuneConfig(**{**TINY, "rules": ["bp-dense"], "tries": 5})
    results = Tuning(config, tmp_path).run()
    assert tried[:4] == [0.01, 0.02, 0.04, 0.08]
    assert tried[4] == 0.16
    assert results["at_edge"] == []
    few = TuneConfig(**{**TINY, "rules": ["bp-dense"], "tries": 3})
    assert Tuning(few, tmp_path / "few").run()["at_edge"] == ["bp-dense"]


def test_interrupted_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TuneConfig(**{**TINY, "rules": ["bp-dense"]})
    whole = Tuning(config, tmp_path / "whole").run()
    asked = iter([False] * 5)  # before each run and after each of its 2 steps
    part = Tuning(config, tmp_path / "part").run(stop=lambda: next(asked, True))
    assert part["status"] == "interrupted"
    assert Tuning(config, tmp_path / "part").run()["accuracy"] == whole["accuracy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": None}, "validation must say how many images to hold out"),
        ({"rates": [0.1]}, "rates must be at least two"),
        ({"tries": 2}, "tries must be at least 3, got 2"),
        ({"rules": []}, "rules must be at least one"),
        ({"rules": ["bpp"]}, "unknown method 'bpp'"),
        ({"settings": {"dfa": {}}}, "settings names dfa"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TuneConfig(**{**TINY, **changes})


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tune, "search", lambda measure, rates, tries: {0.01: 0.5, 0.02: 0.75})
    words = "tune --model mlp --width 0.1 --train-limit 96 --validation 32 --rules bp --epochs 1"
    assert main(words.split()) == 0
    out = capsys.readouterr().out
    assert "SVD-BP" in out
    assert "0.02, at the edge" in out
