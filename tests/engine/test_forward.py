"""Running a model without a trace: its buffers, its modes and the random state."""

from __future__ import annotations

import pytest
from torch import nn

from svdalign.engine.forward import evaluating


def test_evaluating_puts_back_the_mode_of_every_module() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    net[1][0].eval()
    before = [module.training for module in net.modules()]
    with evaluating(net):
        assert not any(module.training for module in net.modules())
    assert [module.training for module in net.modules()] == before
    with pytest.raises(KeyError), evaluating(net):
        raise KeyError
    assert [module.training for module in net.modules()] == before
