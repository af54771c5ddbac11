"""Blocks that run again for their gradients: the same step within less memory, and no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.oracles.saved import peak_saved_bytes
from torch import nn

import svdalign as sva
from svdalign.lab import models


class Noisy(nn.Module):
    """A residual block with all that running twice could disturb: statistics and dropout."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(0.3)
        self.b = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return torch.relu(x + scale * self.b(self.drop(torch.relu(self.bn(self.a(x))))))


def noisy(blocks: int = 5) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), *(Noisy(6) for _ in range(blocks)),
        nn.Flatten(), nn.Linear(6 * 64, 4),
    )  # fmt: skip


def learner(model: nn.Module, rule: str, horizon: int | None, recompute: bool) -> sva.Learner:
    horizons = {} if horizon is None else {"horizon": horizon}
    return sva.Learner(
        model, rule, units=2, optimizer=lambda p: torch.optim.SGD(p, 0.05),
        example=torch.randn(4, 3, 8, 8), recompute=recompute, **horizons,
    )  # fmt: skip


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 3, 8, 8), torch.randint(4, (4,))


@pytest.mark.parametrize(
    ("rule", "horizon"), [("bp", None), ("dfa", 0), ("ssa", 0), ("ssa", 1), ("ssa", 2), ("ssa", 9)]
)
@pytest.mark.parametrize("fused", [False, True])
def test_steps_are_those_of_blocks_that_hold_everything(rule: str, horizon, fused: bool) -> None:
    model = sva.factorize(noisy(), 0.5, scheme="channel")
    held, again = (copy.deepcopy(sva.fuse(model) if fused else model) for _ in range(2))
    learners = [learner(held, rule, horizon, False), learner(again, rule, horizon, True)]
    for i in range(3):
        torch.manual_seed(i)
        x, y = batch()
        state = torch.get_rng_state()
        reports = []
        for L in learners:
            torch.set_rng_state(state)  # both drop the same
            reports.append(L.step(x, y))
            L.end = torch.get_rng_state()
        assert torch.equal(learners[0].end, learners[1].end)
        torch.testing.assert_close(reports[1].loss, reports[0].loss)
    expected, found = held.state_dict(), again.state_dict()
    assert list(found) == list(expected)  # statistics and their counts are in it
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.GELU])
def test_units_that_end_within_a_block_go_backward_while_it_runs(activation) -> None:
    """A fused convolution is the end of its unit and of the block that runs again."""
    torch.manual_seed(2)
    blocks = [
        nn.Sequential(nn.Conv2d(i, 6, 3, padding=1), nn.BatchNorm2d(6), activation())
        for i in (3, 6)
    ]
    model = sva.fuse(sva.factorize(nn.Sequential(*blocks, nn.Flatten(), nn.Linear(384, 4)), 0.5))
    held, again = (copy.deepcopy(model) for _ in range(2))
    x, y = batch()
    for net, recompute in ((held, False), (again, True)):
        L = sva.Learner(
            net, "ssa", horizon=0, units="block", recompute=recompute, example=x,
            optimizer=lambda p: torch.optim.SGD(p, 0.05),
        )  # fmt: skip
        L.step(x, y)
    torch.testing.assert_close(again.state_dict(), held.state_dict(), rtol=1e-5, atol=1e-6)


def test_blocks_hold_their_inputs_alone() -> None:
    net = models.build("resnet20", num_classes=10, in_channels=3, image_size=16, width=0.5)
    x, y = torch.randn(16, 3, 16, 16), torch.randint(10, (16,))

    def peak(recompute: bool) -> int:
        model = copy.deepcopy(net)
        L = sva.Learner(
            model, "ssa", horizon=1, units=3, optimizer=lambda p: torch.optim.SGD(p, 0.05),
            example=x, recompute=recompute,
        )  # fmt: skip
        return peak_saved_bytes(lambda: L.backward(x, y), model.parameters())

    assert peak(True) < 0.5 * peak(False)


def test_the_model_is_left_as_it_was() -> None:
    model = noisy()

    def own(x: torch.Tensor) -> torch.Tensor:
        return Noisy.forward(model[2], x, scale=0.5)

    model[2].forward = own
    L = learner(model, "ssa", 1, True)
    L.step(*batch())
    assert model[2].forward is own
    assert all("forward" not in m.__dict__ for m in model if m is not model[2])
    model[3].forward = broken
    with pytest.raises(RuntimeError, match="broken"):
        L.step(*batch())
    assert model[3].forward is broken
    assert model[2].forward is own


def broken(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("broken")


def test_blocks_are_found_whatever_the_units_are() -> None:
    for units in ("layer", "block", "stage", 3, lambda name, module: name == "stage1"):
        net = models.build("resnet20", num_classes=10, in_channels=3, image_size=16, width=0.25)
        L = sva.Learner(
            net, "ssa", units=units, optimizer=lambda p: torch.optim.SGD(p, 0.05),
            example=torch.randn(2, 3, 16, 16),
        )  # fmt: skip
        stages = [f"stage{i}.{j}" for i in (1, 2, 3) for j in range(3)]
        # The stem's norm and activation belong to its one layer; the last goes backward at once.
        assert L.plan.blocks == ("stem", *stages)


def small(net: nn.Module, **options) -> sva.Learner:
    options = {"units": "layer", "horizon": 1, "recompute": True, **options}
    return sva.Learner(
        net, "ssa", optimizer=lambda p: torch.optim.SGD(p, 0.05), example=torch.randn(4, 6),
        **options,
    )  # fmt: skip


def test_parameters_that_are_others_when_a_block_runs_again_are_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
            self.last = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            twice = {name: 2 * p for name, p in self.body.named_parameters()}
            return self.last(torch.func.functional_call(self.body, twice, (x,)))

    x, y = torch.randn(4, 6), torch.randint(3, (4,))
    with pytest.raises(ValueError, match=r"recompute must be False, .* runs again with other"):
        small(Scaled()).backward(x, y)
    small(Scaled(), recompute=False).backward(x, y)


def test_early_updates_refuse_units_within_a_block_that_runs_again() -> None:
    """The second unit's gradient would be taken at weights that the first one's has changed."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.b(self.a(x).relu())

    learner = small(nn.Sequential(Block(), nn.Linear(6, 3)), update_early=True)
    with pytest.raises(ValueError, match=r"update_early .* ends at '0\.a', which runs again"):
        learner.step(torch.randn(4, 6), torch.randint(3, (4,)))
    assert not any(m._forward_pre_hooks for m in learner.model.modules())
