"""The tracker of live tensors against the process's own peak, which knows nothing of tensors.

A process holds much besides its tensors (the interpreter, libraries, thread pools), so the peaks of
two fresh processes that differ in the batch size alone are subtracted. The tracker does not see the
convolutions' workspaces, nor the process the tensors' end at once: 10 % is what is allowed.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SMALL, LARGE, TOLERANCE = 16, 64, 0.1
RULES = ["bp", "ssa"]

PROGRAM = """
import os, sys
import torch
import torch._dynamo  # an optimizer's first step would
import svdalign as sva
from svdalign.lab import models
from svdalign.lab.costs import step_memory

def measure(rule, batch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = sva.factorize(models.build("vgg8", num_classes=10, width=0.25), 0.25, "channel")
    x, y = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10
    learner = sva.Learner(net, rule, horizon=None if rule == "bp" else 0, units="layer", example=x,
                          optimizer=lambda parameters: torch.optim.SGD(parameters, 1e-3))
    step = lambda: learner.step(x, y)
    step()
    step()
    # Not ru_maxrss, which starts at the peak of the process that forked this one.
    lines = open("/proc/self/status").read().splitlines()
    resident = 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    tracked = step_memory(step, [net, learner.feedback], learner.optimizer, [x, y]).peak
    print(rule, batch, resident, tracked)

for rule in sys.argv[1].split(","):
    for batch in sys.argv[2].split(","):
        if os.fork() == 0:  # nothing is in use yet but what was imported
            measure(rule, int(batch))
            sys.exit()
        os.wait()
"""


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, int], tuple[int, int]]:
    """By rule and batch size, the process's peak and the tracker's, in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ",".join(RULES), f"{SMALL},{LARGE}"],
        # What is freed goes back to the system at once, so that the peak is one of what is in use.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    return {(rule, int(batch)): (int(a), int(b)) for rule, batch, a, b in rows}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("rule", RULES)
def test_the_tracker_agrees_with_the_process(
    rule: str, measured: dict[tuple[str, int], tuple[int, int]]
) -> None:
    small, large = measured[rule, SMALL], measured[rule, LARGE]
    resident, tracked = (b - a for a, b in zip(small, large, strict=True))
    assert tracked > 20 * 2**20
    assert tracked == pytest.approx(resident, rel=TOLERANCE)
