from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# Machines that run the tests are slow and shared at times: no deadline. Examples are the same
# in every run.
settings.register_profile("svdalign", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("svdalign")

# One thread a process: pytest-xdist runs a process a core.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same state of torch's global generator."""
    torch.manual_seed(0)
