"""Several processes compute what one does: with units side by side, and with samples."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal as os_signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.oracles import keep_everything
from tests.parallel import worker
from torch import nn

import svdalign as sva
from svdalign import parallel
from svdalign.storage import ranks as ranks_of

#: Processes that start without importing torch anew.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch._dynamo", "svdalign.parallel", "svdalign.lab.cli"])


def start(job: str, folder: Path, size: int, *arguments: Any) -> list[Any]:
    """Processes that do ``job`` of the worker."""
    processes = [
        CONTEXT.Process(target=worker.main, args=(job, rank, size, folder, *arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def run(job: str, folder: Path, size: int, *arguments: Any) -> list[str]:
    """``job`` of the worker on ``size`` processes; what went wrong on each, "" for nothing."""
    processes = start(job, folder, size, *arguments)
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, "a process hangs"
    found = []
    for rank, process in enumerate(processes):
        file = folder / f"error{rank}.txt"
        found.append(file.read_text() if file.exists() else "ended" * (process.exitcode != 0))
    return found


def succeed(job: str, folder: Path, size: int, *arguments: Any) -> None:
    assert not any(errors := run(job, folder, size, *arguments)), "\n".join(errors)


def same(a: Any, b: Any, path: str = "", rounding: float = 1e-9) -> None:
    """Two states alike, to rounding."""
    if isinstance(a, dict | list | tuple):
        pairs = enumerate(a) if isinstance(a, list | tuple) else a.items()
        assert len(a) == len(b), path
        for key, value in pairs:
            same(value, b[key], f"{path}.{key}", rounding)
    elif isinstance(a, torch.Tensor):
        close = {"rtol": rounding, "atol": rounding}
        torch.testing.assert_close(a, b, **close, msg=lambda text: f"{path}: {text}")
    else:
        assert a == b, path


@pytest.mark.parametrize(("kind", "size"), [("chain", 3), ("fused", 2), ("residual", 2)])
def test_units_on_several_processes_learn_as_on_one(tmp_path: Path, kind: str, size: int) -> None:
    succeed("layers", tmp_path, size, kind, 0)
    one = worker.learner(kind)
    losses = []
    for i, (x, y) in enumerate(worker.batches(8)):
        if i == 6:
            sva.reduce_rank(one.model, one.optimizer, rank=2)
        losses.append(one.step(x, y).loss)
    one.model.eval()
    found = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(size)]
    torch.testing.assert_close(found[-1]["losses"], torch.stack(losses), rtol=1e-9, atol=1e-9)
    assert all(f["losses"].isnan().all() for f in found[:-1])
    for f in found:
        assert f["foreign"]  # each has let go of some weights
        assert sum(f["partition"]) == len(one.units)
        with torch.no_grad():
            torch.testing.assert_close(f["z"], one.model(worker.batches(1)[0][0]))
    state = sva.load(tmp_path / "state.safetensors")
    for part in ("model", "feedback", "optimizer", "steps"):
        same(state[part], dict(one.state_dict())[part])
    # Another number of processes goes on from the file, one included.
    succeed("resumed", tmp_path, 5 - size, kind, 0)
    again = worker.learner(kind)
    sva.load(tmp_path / "state.safetensors", into=again)
    for x, y in worker.batches(10)[8:]:
        again.step(x, y)
    further = sva.load(tmp_path / "further.safetensors")
    for part in ("model", "feedback", "optimizer", "steps"):
        same(further[part], dict(again.state_dict())[part])


@pytest.mark.parametrize("horizon", [0, 1, 2])
def test_a_horizon_ends_at_a_border(tmp_path: Path, horizon: int) -> None:
    succeed("gradients", tmp_path, 2, horizon)
    files = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    found = {**files[0]["gradients"], **files[1]["gradients"]}
    one = worker.learner("chain", horizon)
    matrices = []
    for unit in one.units[:-1]:
        B = one.feedback_of(unit)
        matrices.append((B.U * B.s) @ B.V.mT)
    wanted = keep_everything.gradients(
        one.model,
        *worker.batches(1)[0],
        exits=[unit.exit for unit in one.units[:-1]],
        parameters=[unit.parameters for unit in one.units],
        loss=keep_everything.local_loss(matrices, 2, one.rule.alpha),
        horizon=horizon,
        borders=files[0]["partition"][:1],
    )
    same(found, wanted)


@pytest.mark.parametrize("size", [2, 4])
def test_samples_on_several_processes_learn_as_on_one(tmp_path: Path, size: int) -> None:
    succeed("data", tmp_path, size)
    one = worker.side()
    for i, (x, y) in enumerate(worker.batches(6)):
        if i == 4:
            sva.reduce_rank(one.model, one.optimizer, energy=0.6, min_rank=1)
        one.step(x, y)
    state = sva.load(tmp_path / "state.safetensors")
    for part in ("model", "feedback", "optimizer"):
        same(state[part], dict(one.state_dict())[part])
    # Bit for bit alike on all processes, also where ranks were cut.
    first, *others = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(size))
    assert ranks_of(one.model) != ranks_of(worker.side().model)
    for other in others:
        assert other.keys() == first.keys()
        assert all(value.equal(first[name]) for name, value in other.items())


def test_what_comes_before_a_process_runs_once_for_each_shape(tmp_path: Path) -> None:
    succeed("shapes", tmp_path, 2)
    first, last = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2))
    one = worker.learner("residual")
    losses = [one.step(x, y).loss for x, y in worker.of_sizes(8, 8, 5, 5, 8)]
    torch.testing.assert_close(last["losses"], torch.stack(losses), rtol=1e-9, atol=1e-9)
    assert first["ran"] == 5
    assert last["ran"] == 2  # the first shape ran when the process was made


@pytest.mark.parametrize(("signal", "rank"), [("KILL", 0), ("KILL", 2), ("STOP", 1)])
def test_processes_end_when_one_of_them_does(tmp_path: Path, signal: str, rank: int) -> None:
    """Killed or hanging, at some moment, also of writing: the others end, the file is whole."""
    processes = start("endless", tmp_path, 3)
    file = tmp_path / "state.safetensors"
    wait_for(file.exists)
    time.sleep(random.random() / 10)
    os.kill(processes[rank].pid or 0, getattr(os_signal, f"SIG{signal}"))
    others = [process for process in processes if process is not processes[rank]]
    for process in others:
        process.join(30)
        assert process.exitcode == 1
    processes[rank].kill()
    for other in {0, 1, 2} - {rank}:
        assert "another process has ended or hangs" in (tmp_path / f"error{other}.txt").read_text()
    again = worker.side()
    state = sva.load(file, into=again)
    done = worker.side()  # what as many steps on one process make of it
    for x, y in itertools.islice(itertools.cycle(worker.batches(6)), state["steps"]):
        done.step(x, y)
    same(dict(again.state_dict())["model"], dict(done.state_dict())["model"])


def test_a_process_that_ends_is_named(tmp_path: Path) -> None:
    first, second = run("dies", tmp_path, 2)
    assert first == "ended"
    assert "process 0, which trains the units before, has ended or hangs" in second


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=8).flatmap(
        lambda costs: st.tuples(st.just(costs), st.integers(1, len(costs)))
    )
)
def test_balanced_shares_have_the_least_largest_sum(case: tuple[list[int], int]) -> None:
    costs, parts = case
    counts = parallel.balanced([float(c) for c in costs], parts)
    assert len(counts) == parts
    assert sum(counts) == len(costs)
    assert min(counts) >= 1

    def largest(ends: tuple[int, ...]) -> int:
        return max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *ends, len(costs))))

    best = min(largest(ends) for ends in itertools.combinations(range(1, len(costs)), parts - 1))
    ends = tuple(itertools.accumulate(counts))[:-1]
    assert largest(ends) == best


def test_more_processes_than_units_are_refused() -> None:
    with pytest.raises(ValueError, match="parts must be from 1 to the number of items, 2, got 3"):
        parallel.balanced([1.0, 2.0], 3)


def test_backpropagation_and_the_outputs_error_are_refused() -> None:
    x = torch.randn(4, 5)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    for options, message in (
        ({"horizon": None}, "horizon=None is backpropagation"),
        ({"error": "output"}, "the last process alone knows"),
    ):
        learner = sva.Learner(
            model, optimizer=lambda p: torch.optim.SGD(p, 0.1), example=x, **options
        )
        with pytest.raises(ValueError, match=message):
            parallel.LayerParallel(learner, (x, torch.zeros(4, dtype=torch.long)))
