"""Processes find each other, whatever dead ones have left in the store."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from svdalign.parallel.meeting import name_of_round

SOON = timedelta(seconds=10)


@pytest.mark.parametrize("late", [0, 1])
def test_each_round_has_a_name_of_its_own(late: int) -> None:
    store, size = dist.HashStore(), 3

    def process(rank: int) -> str:
        time.sleep(0.1 * (rank == late))
        return name_of_round(store, rank, size, SOON)

    with ThreadPoolExecutor(size) as pool:
        rounds = [set(pool.map(process, range(size))) for _ in range(3)]
    assert all(len(names) == 1 for names in rounds)
    assert len(set.union(*rounds)) == 3


def test_a_round_that_was_not_complete_does_not_disturb_the_next() -> None:
    """One process of the round before was killed before it called, and one before it was heard."""
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        lost = pool.submit(name_of_round, store, 0, 3, timedelta(seconds=0.2))
        assert pool.submit(name_of_round, store, 1, 3, SOON).result()
        with pytest.raises(RuntimeError):
            lost.result()
    store.set("call/2", "killed before it heard")
    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(lambda rank: name_of_round(store, rank, 3, SOON), range(3)))) == 1


def test_a_process_that_does_not_come_ends_the_meeting() -> None:
    store = dist.HashStore()
    store.set("call/1", "of an earlier round")
    with pytest.raises(RuntimeError, match="process 1 did not come"):
        name_of_round(store, 0, 2, timedelta(seconds=0.1))


def test_torchrun_starts_killed_processes_again() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = Path(__file__).with_name("restarted.py")
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "--max-restarts", "1", program],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["total 3"] * 2
