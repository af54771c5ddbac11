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

PROGRAM = """
import sys
import torch
import svdalign as sva
from svdalign.lab import models
from svdalign.lab.costs import step_memory

rule, batch, track = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "track"
torch.set_num_threads(1)
torch.manual_seed(0)
net = sva.factorize(models.build("vgg8", num_classes=10, width=0.5), 0.25, "channel")
x, y = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10
learner = sva.Learner(net, rule, horizon=None if rule == "bp" else 0, units="layer", example=x,
                      optimizer=lambda parameters: torch.optim.SGD(parameters, 1e-3))
learner.step(x, y)
if track:
    step = lambda: learner.step(x, y)
    print(step_memory(step, [net, learner.feedback], learner.optimizer, [x, y]).peak)
else:
    learner.step(x, y)
    # Not ru_maxrss, which starts at the peak of the process that forked this one.
    lines = open("/proc/self/status").read().splitlines()
    print(1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))))
"""


def run(*words: str) -> int:
    # What is freed goes back to the system at once, so that the peak is one of what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("rule", ["bp", "ssa"])
def test_the_tracker_agrees_with_the_process(rule: str) -> None:
    def difference(how: str) -> int:
        return run(rule, str(LARGE), how) - run(rule, str(SMALL), how)

    tracked, resident = difference("track"), difference("process")
    assert tracked > 20 * 2**20
    assert tracked == pytest.approx(resident, rel=TOLERANCE)
