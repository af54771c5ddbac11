"""What fits into a memory, by steps that are taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import svdalign as sva
from svdalign.lab.costs import step_memory


def net() -> nn.Module:
    layers: list[nn.Module] = []
    for i in range(4):
        layers += [nn.Conv2d(8 if i else 3, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 8 * 8, 4))


X, Y = torch.randn(16, 3, 8, 8), torch.arange(16) % 4


@pytest.fixture(scope="module")
def choices() -> sva.Choices:
    return sva.plan(net(), X, "100 kB", y=Y)


def test_each_peak_is_that_of_a_learner_so_set(choices: sva.Choices) -> None:
    for setting in choices.settings[::3]:
        learner = sva.Learner(
            net(), units=setting.units, horizon=setting.horizon, recompute=setting.recompute,
            example=X, optimizer=torch.optim.AdamW,
        )  # fmt: skip
        learner.step(X, Y)
        memory = step_memory(
            lambda learner=learner: learner.step(X, Y),
            [learner.model, learner.feedback], learner.optimizer, [X, Y],
        )  # fmt: skip
        assert memory.peak == setting.peak


def test_what_fits_is_what_is_no_larger(choices: sva.Choices) -> None:
    assert choices.memory == 100_000
    assert choices.fitting == tuple(s for s in choices.settings if s.peak <= 100_000)
    for setting in choices.settings:
        assert setting in sva.Choices(choices.settings, setting.peak).fitting
        assert setting not in sva.Choices(choices.settings, setting.peak - 1).fitting
    assert sva.Choices(choices.settings, None).fitting == choices.settings


def test_a_larger_horizon_holds_more(choices: sva.Choices) -> None:
    peaks = {(s.units, s.horizon): s.peak for s in choices.settings if not s.recompute}
    of_blocks = [peaks["block", horizon] for horizon in (0, 1, 2)]
    assert of_blocks == sorted(of_blocks)


def test_the_table_has_a_line_for_each(choices: sva.Choices) -> None:
    head, *lines = str(choices).splitlines()
    assert len(lines) == len(choices.settings)
    assert head.split()[0] == "units"
    assert [line.split()[-1] for line in lines] == [
        "yes" if s in choices.fitting else "no" for s in choices.settings
    ]


def test_the_model_is_left_alone() -> None:
    model = net()
    before = [p.clone() for p in model.parameters()]
    sva.plan(model, X[:2])
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
        assert p.grad is None


@pytest.mark.parametrize(
    ("text", "size"), [("64MiB", 64 * 2**20), ("2 GB", 2 * 10**9), ("1.5kib", 1536), ("7B", 7)]
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert sva.fitting._bytes(text) == size


@pytest.mark.parametrize("memory", ["much", "64", True, 1.5])
def test_no_amount_of_memory(memory: object) -> None:
    with pytest.raises(ValueError, match="memory must be a whole number of bytes or text"):
        sva.plan(net(), X, memory)  # type: ignore[arg-type]


def test_settings_whose_units_the_model_lacks_are_left_out() -> None:
    small = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    choices = sva.plan(
        small, torch.randint(0, 20, (6, 3)), loss=lambda z, y: z[:, 0].square().sum()
    )
    assert {s.units for s in choices.settings} == {"block"}


@pytest.mark.parametrize(
    "call", [sva.compact, sva.fuse, lambda m: sva.plan(m, X), lambda m: sva.alignment(m, m, X, Y)]
)
def test_what_is_no_module_is_refused(call) -> None:
    with pytest.raises(TypeError, match=r"must be a .*, got NoneType"):
        call(None)
