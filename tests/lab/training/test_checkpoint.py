"""A run that is stopped anywhere and goes on ends as the one that was not."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.oracles.states import same, timeless
from torch import nn

import svdalign
from svdalign import storage
from svdalign.factors import FactoredLayer
from svdalign.factors._choice import kernels_of
from svdalign.lab.cli import main
from svdalign.lab.data import ImageData
from svdalign.lab.training import (
    Record,
    RunConfig,
    Trainer,
    build_learner,
    load_checkpoint,
    save_checkpoint,
    train,
)

TINY: dict[str, Any] = {
    "model": "smallconv",
    "width": 0.25,
    "batch_size": 16,
    "epochs": 4,
    "lr": 1e-2,
    "rank": 0.6,
    "rank_energy": 0.8,
    "rank_min": 2,
    "augment": ["crop", "flip"],
    "checkpoint_seconds": 0.0,
}


def make(data: ImageData, **changes: Any) -> Trainer:
    config = RunConfig(**{**TINY, **changes})
    return Trainer(config, data, build_learner(config, data))


def end(record: Record) -> Any:
    """All that the last checkpoint holds; the clock aside."""
    return timeless(storage.read(record.checkpoint_path))


class Kill(BaseException):
    """Ends a run on the spot, as a signal would."""


def killed_at(step: int, trainer: Trainer) -> Callable[[], bool]:
    def stop() -> bool:
        if trainer.global_step == step:
            raise Kill
        return False

    return stop


@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [*itertools.product(["adamw"], ["bp", "fa", "dfa", "ssa"]), ("sgd", "ssa"), ("muon", "ssa")],
)
def test_killed_and_resumed_is_the_run_that_was_not(
    stripes: ImageData, tmp_path: Path, optimizer: str, rule: str
) -> None:
    """Killed in the first epoch, at its last step, and after a cut; every time in a new trainer."""
    options = {"rule": rule, "optimizer": optimizer}
    whole = Record(tmp_path / "whole")
    torch.manual_seed(0)
    train(make(stripes, **options), whole)
    record = Record(tmp_path / "killed")
    resume = False
    for step in (2, 4, 9, 15):
        trainer = make(stripes, **options)
        torch.manual_seed(step if resume else 0)  # a new process has another random state
        if resume:
            load_checkpoint(trainer, record.checkpoint_path)
        with pytest.raises(Kill):
            train(trainer, record, stop=killed_at(step, trainer), resume=resume)
        resume = True
    trainer = make(stripes, **options)
    load_checkpoint(trainer, record.checkpoint_path)
    results = train(trainer, record, resume=True)
    assert same(end(record), end(whole))
    assert results["status"] == "finished"
    assert timeless(results["history"]) == timeless((whole.results() or {})["history"])
    rows = [json.loads(line) for line in record.metrics_path.read_text().splitlines()]
    assert rows == results["history"]
    ranks = [row["ranks"] for row in rows]
    assert all(b[name] <= a[name] for a, b in itertools.pairwise(ranks) for name in a)
    assert ranks[-1] != ranks[0]


def test_ranks_shrink_by_schedule(stripes: ImageData) -> None:
    schedule = {"rank_warmup": 2, "rank_period": 2, "rank_freeze": 4, "rank_ratio": 0.5}
    trainer = make(stripes, epochs=6, rank_energy=1e-6, **schedule)
    before = storage.ranks(trainer.learner.model)
    trainer.run()
    rows = trainer.history
    assert [bool(row["kept_energy"]) for row in rows] == [False, True, False, True, False, False]
    assert rows[0]["ranks"] == before
    half = {name: max(-(-r // 2), 2) for name, r in before.items()}
    assert rows[1]["ranks"] == rows[2]["ranks"] == half
    quarter = {name: max(-(-r // 2), 2) for name, r in half.items()}
    assert rows[3]["ranks"] == rows[5]["ranks"] == quarter
    for name, module in trainer.learner.model.named_modules():
        if isinstance(module, FactoredLayer):
            assert module.U.shape[1] == quarter[name]
            state = trainer.learner.optimizer.state[module.U]
            assert state["exp_avg"].shape == module.U.shape


def test_ranks_shrink_to_a_number_of_parameters_by_equal_ratios(stripes: ImageData) -> None:
    schedule = {"rank_warmup": 1, "rank_period": 2, "rank_freeze": 5}
    options = {"epochs": 6, "rank_energy": None, "rank_min": 1, **schedule}
    trainer = make(stripes, rank_parameters=2000, **options)
    counts = [sum(p.numel() for p in trainer.learner.model.parameters())]

    def count(learner: svdalign.Learner) -> dict[str, Any]:
        counts.append(sum(p.numel() for p in learner.model.parameters()))
        return {}

    trainer.measure = count
    trainer.run()
    factored = [m for m in trainer.learner.model.modules() if isinstance(m, FactoredLayer)]
    cost = max(len(m.U) + 1 + len(m.V) for m in factored)  # of one direction
    assert 2000 - cost < counts[-1] <= 2000
    first, second, third = counts[1], counts[3], counts[5]
    assert [counts[i] for i in (2, 4, 6)] == [first, second, third]
    ratio = (2000 / counts[0]) ** (1 / 3)
    assert counts[0] * ratio - cost < first <= counts[0] * ratio
    assert math.sqrt(first * 2000) - cost < second <= math.sqrt(first * 2000)


def test_initial_weights_can_be_cut(stripes: ImageData, tmp_path: Path) -> None:
    options = {"rank_energy": None, "rank_min": 1, "rank_warmup": 0, "rank_freeze": 0}
    trainer = make(stripes, rank_parameters=2000, **options)
    count = sum(p.numel() for p in trainer.learner.model.parameters())
    assert count <= 2000
    train(trainer, Record(tmp_path))
    assert sum(p.numel() for p in trainer.learner.model.parameters()) == count
    again = make(stripes, rank_parameters=2000, **options)
    load_checkpoint(again, tmp_path / "checkpoint.safetensors")
    assert same(again.learner.state_dict(), trainer.learner.state_dict())


def test_a_number_of_parameters_out_of_reach_is_refused_at_the_start(stripes: ImageData) -> None:
    with pytest.raises(ValueError, match=r"rank_parameters=0.01 asks for"):
        make(stripes, rank_energy=None, rank_parameters=0.01, rank_freeze=2)


def test_a_checkpoint_can_be_loaded_into_a_learner(stripes: ImageData, tmp_path: Path) -> None:
    trainer = make(stripes)
    train(trainer, Record(tmp_path))
    learner = build_learner(trainer.config, stripes)
    svdalign.load(tmp_path / "checkpoint.safetensors", into=learner)
    assert same(learner.state_dict(), trainer.learner.state_dict())


def test_interrupted_run_has_a_checkpoint_of_where_it_was(
    stripes: ImageData, tmp_path: Path
) -> None:
    trainer = make(stripes, checkpoint_seconds=1e6)
    train(trainer, Record(tmp_path), stop=lambda: trainer.global_step == 6)
    again = make(stripes, checkpoint_seconds=1e6)
    load_checkpoint(again, tmp_path / "checkpoint.safetensors")
    assert (again.epoch, again.batch) == (1, 2)


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(
    stripes: ImageData, tmp_path: Path
) -> None:
    trainer = make(stripes, checkpoint_seconds=1e6, rule="bp", rank_energy=None)
    record = Record(tmp_path)

    def spoil() -> bool:
        if trainer.global_step == 7:
            next(iter(trainer.learner.model.parameters())).data.fill_(float("nan"))
        return False

    assert train(trainer, record, stop=spoil)["status"] == "diverged"
    state = storage.load(record.checkpoint_path)
    assert state["extra"]["trainer"]["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_another_config_is_refused(stripes: ImageData, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(make(stripes), path)
    other = make(stripes, lr=0.5)
    with pytest.raises(ValueError, match=r"another config: .*\(lr 0.01 there, 0.5 here\)"):
        load_checkpoint(other, path)
    storage.save(make(stripes).learner, path)
    with pytest.raises(ValueError, match="not of a training run"):
        load_checkpoint(other, path)


def changed(data: ImageData, **changes: Any) -> ImageData:
    """``data`` with these changes, of the training split where they are its own."""
    own = {name: changes.pop(name) for name in ("images", "labels") if name in changes}
    return replace(data, train=replace(data.train, **own), **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: changed(d, classes=("a", "b", "d")), r"its classes was .*'c'\], here .*'d'\]"),
        (lambda d: changed(d, test=d.train), "its number of test images was 30, here it is 70"),
        (lambda d: changed(d, labels=d.train.labels.flip(0)), "labels of its train images differ"),
        (lambda d: changed(d, images=d.train.images.flip(0)), "its train images differ"),
    ],
)
def test_other_data_are_refused(stripes: ImageData, tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(make(stripes), path)
    with pytest.raises(ValueError, match=f"run on other data: .*{message}.*--data-dir"):
        load_checkpoint(make(change(stripes)), path)
    # Decoders differ by a grey level.
    load_checkpoint(make(changed(stripes, images=stripes.train.images ^ 1)), path)


# --- the command line ---------------------------------------------------------------------------

WORDS = [
    *("train", "--model", "mlp", "--width", "0.1", "--epochs", "2", "--batch-size", "32"),
    *("--train-limit", "64", "--test-limit", "30", "--out", "run"),
]


def test_measured_kernels_are_part_of_a_checkpoint(
    stripes: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured again, another might be the fastest, which rounds in another way."""
    measured: list[dict[str, int]] = []

    def choose(model: nn.Module, run: Callable[[], object], memory: int | None) -> dict[str, str]:
        assert len(run()) == TINY["batch_size"]  # type: ignore[arg-type]
        measured.append(storage.ranks(model))
        fastest = "merged" if len(measured) == 1 else "factored"
        return dict.fromkeys(kernels_of(model), fastest)

    fuse = importlib.import_module(
        "svdalign.factors.fuse"
    )  # the package has a function of that name
    monkeypatch.setattr(fuse, "choose_kernels", choose)
    first = make(stripes, fuse="measured", rank_energy=None)
    kernels = kernels_of(first.learner.model)
    assert set(kernels.values()) == {"merged"}
    save_checkpoint(first, tmp_path / "checkpoint.safetensors")
    second = make(stripes, fuse="measured", rank_energy=None)
    assert kernels_of(second.learner.model) != kernels
    load_checkpoint(second, tmp_path / "checkpoint.safetensors")
    assert kernels_of(second.learner.model) == kernels
    measured.clear()
    trainer = make(stripes, fuse="measured")
    train(trainer, Record(tmp_path / "cut"))
    assert len(measured) == 1 + TINY["epochs"]  # and again after each cut
    assert measured[-1] == storage.ranks(trainer.learner.model) != measured[0]


def test_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*WORDS]) == 0
    whole = end(Record("run"))
    # As a kill before the first checkpoint leaves it.
    for name in ("checkpoint.safetensors", "results.json", "metrics.jsonl", "report.html"):
        Path("run", name).unlink()
    assert main(["train", "--resume", "run"]) == 0
    assert same(end(Record("run")), whole)
    assert Path("run/report.html").exists()
    assert main(["train", "--resume", "run"]) == 2
    assert "holds the results of a run that has ended" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "damage", "message"),
    [
        ("--resume nowhere", None, "there is no folder nowhere"),
        ("--resume run --lr 3", None, "--resume goes on with the run's own options; only"),
        ("--resume run --out b", None, "--resume goes on in its own folder"),
        ("--resume run", "checkpoint.safetensors", "truncated or no safetensors file"),
        ("--resume run", "config.yaml", "was not made by svdalign train"),
    ],
)
def test_refusals_leave_the_folder_as_it_was(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    damage: str | None,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*WORDS]) == 0
    Path("run/results.json").unlink()
    if damage:
        path = Path("run", damage)
        path.write_bytes(path.read_bytes()[3:-20])
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    assert main(["train", *words.split()]) == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before
    shutil.rmtree("run")


@pytest.mark.slow
def test_sigkill(tmp_path: Path) -> None:
    """The stress benchmark, small: real processes, real SIGKILL, long before the run is over."""
    script = Path(__file__).parents[3] / "benchmarks" / "kill_resume.py"
    out = tmp_path / "result.json"
    subprocess.run(
        [sys.executable, script, "--kills", "2", "--epochs", "4", "--seed", "7", "--out", out],
        check=True,
        capture_output=True,
        timeout=300,
    )
    result = json.loads(out.read_text())
    assert [kill["moment"] for kill in result["kills"]] == ["write", "cut"]
    assert result["identical"] is True
