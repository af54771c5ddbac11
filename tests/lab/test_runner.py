"""A run never loses anything: what happens to folders when runs end in every way that they can."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.oracles.states import same, timeless

from svdalign import storage
from svdalign.lab.cli import main
from svdalign.lab.experiments import CompareConfig, Comparison
from svdalign.lab.methods import METHODS
from svdalign.lab.runner import Run, Sweep
from svdalign.lab.training import Record, RunConfig
from svdalign.lab.training import run as training
from svdalign.lab.training.trainer import Trainer

TINY: dict[str, Any] = {
    "model": "mlp", "width": 0.1, "epochs": 2, "batch_size": 16, "train_limit": 64,
    "test_limit": 20, "checkpoint_seconds": 0.0, "rank_energy": 0.9, "rank_min": 2,
}  # fmt: skip
WORDS = [
    "train",
    *(word for key, value in TINY.items() for word in (f"--{key.replace('_', '-')}", str(value))),
]


class Kill(BaseException):
    """Ends everything on the spot, as SIGKILL would."""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def runs(**changes: Any) -> list[Run]:
    configs = {name: RunConfig(rule=name, **{**TINY, **changes}) for name in ("bp", "ssa")}
    return [Run(name, config, name.upper()) for name, config in configs.items()]


def sweep(folder: str, runs: list[Run], **options: Any) -> Sweep:
    made = Sweep(folder, runs, kind="sweep", **options)
    made.top.write_config("of: a test\n")
    return made


def dying(asked: int) -> Callable[[], bool]:
    """Asked after every step and before every run."""
    left = iter(range(asked))

    def stop() -> bool:
        if next(left, None) is None:
            raise Kill
        return False

    return stop


def end(folder: str | Path) -> Any:
    return timeless(storage.read(Path(folder, "checkpoint.safetensors")))


def kill_train(words: list[str], steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """``svdalign`` with these words, dead after so many steps."""
    stop = dying(steps)
    step = Trainer.step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda self, x, y: stop() or step(self, x, y))
        with pytest.raises(Kill):
            main(words)


# --- sweeps -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    sweep(str(folder), runs()).run()
    return folder


@pytest.mark.parametrize("asked", [0, 3, 9, 14])
def test_killed_anywhere_a_sweep_goes_on_and_ends_as_the_one_that_was_not(
    asked: int, whole: Path
) -> None:
    """8 steps a run: at the start, within the first run, between them, after the second's cut."""
    with pytest.raises(Kill):
        sweep("killed", runs()).run(stop=dying(asked))
    begun = sum(Path("killed", run.name, "results.json").exists() for run in runs())
    again = sweep("killed", runs())
    assert again.pending == 2 - begun
    results = again.run()
    assert [result["status"] for result in results.values()] == ["finished", "finished"]
    for run in runs():
        assert same(end(f"killed/{run.name}"), end(whole / run.name))
        rows = Path("killed", run.name, "metrics.jsonl").read_text().splitlines()
        assert len(rows) == TINY["epochs"]
    assert sweep("killed", runs()).pending == 0


def test_a_sweep_that_is_overwritten_and_interrupted_goes_on() -> None:
    sweep("a", runs()).run()
    over = sweep("a", runs(lr=0.02), overwrite=True)
    asked = iter([False] * 5)
    results = over.run(stop=lambda: next(asked, True))
    assert [result["status"] for result in results.values()] == ["interrupted"]
    assert over.pending == 2
    with pytest.raises(ValueError, match=r"a/ssa holds a run with another config \(lr"):
        sweep("a", runs(lr=0.02))  # the second is still the old one
    results = over.run()
    assert [result["status"] for result in results.values()] == ["finished"] * 2
    assert len(results["bp"]["history"]) == 2


def test_what_may_change_between_two_halves_of_a_run() -> None:
    with pytest.raises(Kill):
        sweep("a", runs()[:1]).run(stop=dying(5))
    elsewhere = runs(threads=1, checkpoint_seconds=3.0, channels_last=False)[:1]
    assert sweep("a", elsewhere).run()["bp"]["status"] == "finished"


def test_a_comparison_goes_on_within_a_run() -> None:
    fields = {k: v for k, v in TINY.items() if k not in ("rank_energy", "rank_min")}
    config = CompareConfig(**fields, rules=["bp-dense", "ssa"], costs=False)
    whole = Comparison(config, "whole").run()
    with pytest.raises(Kill):
        Comparison(config, "killed").run(stop=dying(13))
    assert not Path("killed/results.json").exists()
    steps = []
    step = Trainer.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", lambda s, x, y: steps.append(1) or step(s, x, y))
        found = Comparison(config, "killed").run()
    assert 0 < len(steps) < 8  # what was left of the second run
    assert [run["accuracy"] for run in found["runs"]] == [r["accuracy"] for r in whole["runs"]]


# --- svdalign train -----------------------------------------------------------------------------


def test_the_same_command_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, "--out", "whole"]) == 0
    kill_train([*WORDS, "--out", "k"], 3, monkeypatch)
    before = Path("k/checkpoint.safetensors").read_bytes()
    assert main([*WORDS, "--out", "k", "--lr", "0.5"]) == 2
    error = capsys.readouterr().err
    assert f"another config (lr {METHODS['ssa'].lr} there, 0.5 here)" in error
    assert "--resume k" in error
    assert "--overwrite" in error
    assert Path("k/checkpoint.safetensors").read_bytes() == before
    kill_train([*WORDS, "--out", "k"], 2, monkeypatch)
    assert storage.read("k/checkpoint.safetensors")["extra"]["trainer"]["epoch"] == 1
    assert main([*WORDS, "--out", "k"]) == 0
    assert same(end("k"), end("whole"))
    assert main([*WORDS, "--out", "k"]) == 2
    assert "holds the results of a run that has ended" in capsys.readouterr().err
    assert main([*WORDS, "--out", "k", "--lr", "0.5", "--overwrite"]) == 0


def test_the_same_command_goes_on_without_a_folder_too(monkeypatch: pytest.MonkeyPatch) -> None:
    kill_train(WORDS, 3, monkeypatch)
    kill_train([*WORDS, "--seed", "1"], 3, monkeypatch)
    assert main(WORDS) == 0
    assert [path.name for path in sorted(Path("runs").iterdir())] == ["train-001", "train-002"]
    assert json.loads(Path("runs/train-001/results.json").read_text())["status"] == "finished"
    assert main(WORDS) == 0  # what is finished is run again, in a folder of its own
    assert Path("runs/train-003/results.json").exists()


def test_a_run_goes_on_elsewhere_and_for_longer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_train([*WORDS, "--out", "there"], 3, monkeypatch)
    Path("elsewhere").mkdir()
    shutil.move("there", "elsewhere/here")
    monkeypatch.chdir("elsewhere")
    assert main(["train", "--resume", "here", "--threads", "1", "--epochs", "3"]) == 0
    assert len(json.loads(Path("here/results.json").read_text())["history"]) == 3
    assert main(["train", "--resume", "here"]) == 2
    assert main(["train", "--resume", "here", "--epochs", "4", "--checkpoint-seconds", "9"]) == 0
    results = json.loads(Path("here/results.json").read_text())
    assert len(results["history"]) == 4
    assert results["config"]["checkpoint_seconds"] == 9
    capsys.readouterr()
    for words, message in (
        ("--epochs 2", "epochs may only grow: the run takes 4, got 2"),
        ("--epochs 5 --seed 0", "own options; only --channels-last, --checkpoint-seconds"),
    ):
        assert main(["train", "--resume", "here", *words.split()]) == 2
        assert message.split("--")[0] in capsys.readouterr().err


def test_where_the_data_lie_is_stored_for_every_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for label, grey in (("a", 40), ("b", 200)):
            Path("images", split, label).mkdir(parents=True)
            for i in range(4):
                Image.new("L", (8, 8), grey + i).save(f"images/{split}/{label}/{i}.png")
    words = ["train", "--data", "folder", "--data-dir", "images", "--model", "mlp"]
    words += ["--width", "0.1", "--batch-size", "4", "--epochs", "2", "--checkpoint-seconds", "0"]
    kill_train([*words, "--out", "run"], 2, monkeypatch)
    assert Record("run").config()["data_dir"] == str(tmp_path / "images")
    Path("other").mkdir()
    monkeypatch.chdir("other")
    kill_train(["train", "--resume", "../run"], 1, monkeypatch)
    shutil.move("../images", "images")
    assert main(["train", "--resume", "../run"]) == 2
    assert main(["train", "--resume", "../run", "--data-dir", "images"]) == 0


def test_a_run_whose_loss_explodes_has_diverged(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS[:-4], "--rule", "bp-dense", "--optimizer", "sgd", "--lr", "1e9"]
    words += ["--schedule", "constant", "--out", "run"]
    assert main(words) == 1
    results = json.loads(Path("run/results.json").read_text())
    assert results["status"] == "diverged"
    assert "diverged after" in capsys.readouterr().err


def test_a_loss_that_is_large_but_finite_has_diverged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step

    def worse(self: Trainer, x: torch.Tensor, y: torch.Tensor) -> None:
        step(self, x, y)
        if self.epoch == 1:
            self.loss_sum += 1e8

    monkeypatch.setattr(Trainer, "step", worse)
    one = sweep("a", runs(epochs=3)[:1])
    assert one.run()["bp"]["status"] == "diverged"
    assert one.pending == 0
    assert storage.read("a/bp/checkpoint.safetensors")["extra"]["trainer"]["epoch"] == 1


def test_images_per_second_are_of_real_images(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(**{**TINY, "batch_size": 100_000, "rule": "bp", "epochs": 1})
    (row,) = Sweep("a", [Run("", config, "BP")]).run()[""]["history"]
    assert row["images_per_second"] == pytest.approx(64 / row["seconds"])


def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, left = training.save_checkpoint, iter(range(5))

    def full(trainer: Trainer, path: Path) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(trainer, path)

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", full)
        assert main([*WORDS, "--out", "run"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]  # after the progress
    assert error.startswith("svdalign train: error: [Errno 28] No space left on device")
    assert storage.read("run/checkpoint.safetensors")["extra"]["trainer"]["epoch"] == 1
    assert main([*WORDS, "--out", "run"]) == 0


def test_real_signals_and_two_processes_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "--epochs", "100000", "--out", "run"]

    def start() -> subprocess.Popen[str]:
        done = Path("run/metrics.jsonl")
        rows = done.read_text().count("\n") if done.exists() else 0
        process = subprocess.Popen(
            [sys.executable, "-m", "svdalign", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 120
        while not (done.exists() and done.read_text().count("\n") > rows):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return process

    process = start()
    assert main(words) == 2
    assert f"run is in use by process {process.pid};" in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "Traceback" not in err
    assert "interrupted after" in err
    assert "go on with svdalign train --resume run\n" in out
    rows = len(json.loads(Path("run/results.json").read_text())["history"])
    process = start()
    process.kill()
    process.communicate()
    config = RunConfig(**Record("run").config())
    assert Sweep("run", [Run("", config, "a label")]).pending == 1  # the dead hold no lock
    trainer = storage.read("run/checkpoint.safetensors")["extra"]["trainer"]
    assert trainer["epoch"] >= rows
