"""Kill a training run with SIGKILL at random moments, resume it each time, and compare its end, bit
for bit, with that of the same run left in peace.

    python benchmarks/kill_resume.py --kills 20

Of the kills some come at once after a checkpoint's temporary file is seen (during a write), some at
once after ``metrics.jsonl`` says that ranks were cut (before the checkpoint after the cut is
written), the rest at any moment. A checkpoint is written after every step, so that many of these
hit a write too. Prints and writes what happened as JSON; exit code 1 if the two ends differ.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from svdalign import storage
from svdalign.lab.cli import main as svdalign
from svdalign.lab.training.provenance import provenance
from svdalign.lab.training.record import Record, write_json

MOMENTS = ("write", "cut", "any", "any")  # dealt out in turns
#: Processes that start without importing torch anew.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["__main__", "torch._dynamo"])
CLOCKS = {"seconds", "epoch_seconds", "images_per_second"}


def command(epochs: int) -> list[str]:
    """A small convolutional network on a few hundred images, with ranks that fall every epoch."""
    options = {
        "model": "smallconv", "width": 0.5, "rank": 0.6, "epochs": epochs, "batch-size": 32,
        "train-limit": 320, "test-limit": 50, "augment": "crop,flip", "checkpoint-seconds": 0,
        "rank-energy": 0.97, "rank-ratio": 0.8, "threads": 1,
    }  # fmt: skip
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def _train(words: tuple[str, ...]) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        sys.exit(svdalign(["train", *words, "--json"]))


def start(*words: str) -> BaseProcess:
    process = CONTEXT.Process(target=_train, args=(words,))
    process.start()
    return process


def finish(process: BaseProcess) -> None:
    process.join()
    if process.exitcode:
        raise SystemExit(f"training failed with exit code {process.exitcode}")


def kill(process: BaseProcess, record: Record, moment: str, delay: float) -> dict[str, Any] | None:
    """Wait for the first checkpoint, ``delay`` seconds more and then for the moment, and kill the
    run. Returns what its folder held then, or None if the run was over before."""
    part = record.folder / f".{record.checkpoint_path.name}.part"
    opened = (record.checkpoint_path.stat().st_mtime_ns) if record.checkpoint_path.exists() else 0
    if not _wait(process, lambda: _mtime(record.checkpoint_path) > opened):
        return None
    due = time.monotonic() + delay
    if not _wait(process, lambda: time.monotonic() >= due):
        return None
    if moment == "write":
        hit = _wait(process, part.exists)
    elif moment == "cut":
        rows = _rows(record)
        hit = _wait(process, lambda: _rows(record) > rows)
    else:
        hit = True
    if not hit or record.results_path.exists():
        return None
    process.kill()
    process.join()
    state = storage.read(record.checkpoint_path)  # whole, or this raises
    trainer = state["extra"]["trainer"]
    return {
        "moment": moment,
        "epoch": trainer["epoch"],
        "batch": trainer["batch"],
        "half_written": part.exists(),
        "rows_ahead": _rows(record) - trainer["epoch"],
    }


def _mtime(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _rows(record: Record) -> int:
    try:
        return record.metrics_path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _wait(process: BaseProcess, condition: Callable[[], bool]) -> bool:
    while not condition():
        if not process.is_alive():
            return False
        time.sleep(1e-4)
    return True


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two states differ, clocks aside; tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        same = same and torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b)))
        return [] if same else [path]
    if isinstance(a, dict):
        keys = [k for k in a.keys() | b.keys() if k not in CLOCKS]
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{path}.{k}")]
    if isinstance(a, list | tuple) and len(a) == len(b):
        items = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in items for d in differences(x, y, f"{path}.{i}")]
    return [] if a == b else [path]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kill_resume.json"))
    options = parser.parse_args()
    moments = random.Random(options.seed)
    words = command(options.epochs)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Record(Path(folder, "whole")), Record(Path(folder, "killed"))
        started = time.monotonic()
        finish(start(*words, "--out", str(whole.folder)))
        results = whole.results() or {}
        share = results["wall_seconds"] / (options.kills + 1)
        kills: list[dict[str, Any]] = []
        while len(kills) < options.kills:
            again = (
                ["--resume", str(killed.folder)] if kills else [*words, "--out", str(killed.folder)]
            )
            process = start(*again)
            moment = MOMENTS[len(kills) % len(MOMENTS)]
            found = kill(process, killed, moment, moments.uniform(0, share))
            if found is None:
                finish(process)
                raise SystemExit(f"the run was over after {len(kills)} kills: give more --epochs")
            kills.append(found)
            print(found, flush=True)
        finish(start("--resume", str(killed.folder)))
        different = differences(
            storage.read(whole.checkpoint_path), storage.read(killed.checkpoint_path)
        )
        left = sorted(path.name for path in killed.folder.iterdir())
    result = {
        "identical": not different,
        "different": different,
        "kills": kills,
        "ranks": [row["ranks"] for row in results["history"]],
        "files_left": left,
        "run": shlex.join(["svdalign", "train", *words]),
        "seconds": time.monotonic() - started,
        **provenance("cpu"),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, result)
    print(
        f"{'identical' if not different else 'DIFFERENT'} after {len(kills)} kills; {options.out}"
    )
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
