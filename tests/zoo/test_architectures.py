"""Every architecture with default arguments: it learns real data, and no gradient takes a skip
across a unit's boundary."""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.oracles.ownership import owners
from tests.zoo.nets import GPT, NETS, UNet
from torch import Tensor, nn

import svdalign as sva
from svdalign.engine.units import OUTPUT
from svdalign.rules import Rule, Supervision, UnitSpec

Loss = Callable[[Tensor, Tensor], Tensor]


def next_token(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def zen() -> Tensor:
    """The Zen of Python, in the public domain, as numbers of characters."""
    with redirect_stdout(io.StringIO()):
        import this  # it prints itself
    text = codecs.decode(this.s, "rot13")
    letters = sorted(set(text))
    return torch.tensor([letters.index(c) for c in text])


@dataclass
class Case:
    """A network and real data for it: images with classes, text, or images with masks."""

    net: nn.Module
    x: Tensor
    y: Tensor
    loss: Loss | None = None


def case(name: str, fashion: tuple[Tensor, Tensor]) -> Case:
    images, labels = fashion
    if name in NETS:
        return Case(NETS[name](), images, labels)
    if name == "unet":
        return Case(UNet(6, 2), images[:48], (images[:48, 0] > 0).long())
    text = zen()
    windows = text[: 12 * 65].reshape(-1, 13)
    net = GPT(int(text.max()) + 1, 16, 2, 12, tied=name == "gpt-tied")
    return Case(net, windows[:, :-1], windows[:, 1:], next_token)


ALL = [*NETS, "gpt", "gpt-tied", "unet"]


@pytest.mark.parametrize("name", ALL)
def test_default_arguments_train(name: str, fashion: tuple[Tensor, Tensor]) -> None:
    c = case(name, fashion)
    model = sva.factorize(c.net)
    learner = sva.Learner(
        model, optimizer=lambda p: torch.optim.AdamW(p, 1e-2), example=c.x, loss=c.loss
    )
    assert len(learner.units) > 2
    learner.backward(c.x[:32], c.y[:32])
    for n, p in model.named_parameters():
        assert p.grad is not None, n
        assert p.grad.abs().max() > 0, n
    generator = torch.Generator().manual_seed(0)
    epochs = []
    for _ in range(8):
        order = torch.randperm(len(c.x), generator=generator)
        losses = [learner.step(c.x[i], c.y[i]).loss for i in order.split(32)]
        epochs.append(torch.stack(losses).mean())
    assert epochs[-1] < 0.93 * epochs[0]


@dataclass(frozen=True)
class Poisoned(Rule):
    """Finite losses everywhere but in one unit, named by ``unit``, whose loss is not a number."""

    name: str = field(default="poisoned", kw_only=True)
    unit: list[str] = field(default_factory=list, compare=False)

    def loss(
        self, unit: UnitSpec, feedback: nn.Module | None, h: Tensor, supervision: Supervision
    ) -> Tensor:
        return h.square().mean() * (torch.nan if unit.name in self.unit else 1.0)


@pytest.mark.parametrize("units", ["block", "layer"])
@pytest.mark.parametrize("name", ALL)
def test_no_gradient_crosses_a_boundary_beyond_the_horizon(
    name: str, units: str, fashion: tuple[Tensor, Tensor]
) -> None:
    c = case(name, fashion)
    model, x, y = sva.factorize(c.net), c.x[:4], c.y[:4]
    if name == "vit" and units == "layer":
        with pytest.raises(ValueError, match="choose larger units"):
            learner_of(model, x, Poisoned(), units)
        return
    plan = learner_of(model, x, Poisoned(), units).units
    owned = owners(model, x, [(u.exit, u.call) for u in plan[:-1]])
    for i, unit in enumerate(plan):
        assert set(unit.parameters) == {n for n, indices in owned.items() if i in indices}
    for horizon in (0, 1, 2) if units == "block" else (1,):
        rule = Poisoned(horizon=horizon)
        learner = learner_of(
            model, x, rule, units,
            lambda z, y, r=rule: z.square().mean() * (torch.nan if OUTPUT in r.unit else 1.0),
        )  # fmt: skip
        for j in range(len(plan)):
            rule.unit[:] = [plan[j].name]
            grads = learner.gradients(x, y)
            hit = {n for n, g in grads.items() if g.isnan().any()}
            allowed = {n for n, i in owned.items() if any(j - horizon <= k <= j for k in i)}
            assert hit <= allowed, f"horizon {horizon}: {plan[j].name} teaches {hit - allowed}"
            assert any(j in owned[n] for n in hit)
            if horizon and j and units == "block" and name != "unet":  # the others have branches
                assert any(j - 1 in owned[n] for n in hit), "what the horizon allows does arrive"


@pytest.mark.parametrize("units", ["block", "layer"])
@pytest.mark.parametrize("name", ALL)
def test_a_horizon_as_deep_as_the_network_is_backpropagation(
    name: str, units: str, fashion: tuple[Tensor, Tensor]
) -> None:
    """Where only the task teaches, what travels over every boundary is BP's gradient: through
    skips, concatenations, in-place changes and tied weights."""
    if name == "vit" and units == "layer":
        pytest.skip("refused, see above")
    c = case(name, fashion)
    model, x, y = sva.factorize(c.net).double(), c.x[:4], c.y[:4]
    x = x.double() if x.is_floating_point() else x

    def gradients(rule: Rule | str) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return learner_of(model, x, rule, units, c.loss).gradients(x, y)

    everything = gradients("bp")
    local = gradients(Silent(horizon=len(everything)))
    assert local.keys() == everything.keys()
    for n, gradient in everything.items():
        torch.testing.assert_close(local[n], gradient, rtol=1e-8, atol=1e-10)


@dataclass(frozen=True)
class Silent(Rule):
    """Only the task teaches."""

    name: str = field(default="silent", kw_only=True)

    def loss(
        self, unit: UnitSpec, feedback: nn.Module | None, h: Tensor, supervision: Supervision
    ) -> Tensor:
        return 0.0 * h.sum()


def learner_of(
    model: nn.Module, x: Tensor, rule: Rule | str, units: Any, loss: Loss | None = None
) -> sva.Learner:
    return sva.Learner(
        model, rule, units=units, optimizer=lambda p: torch.optim.SGD(p, 0.1), example=x, loss=loss
    )


def test_depthwise_convolutions_and_packed_attention_stay_dense_and_are_reported() -> None:
    report = {row.name: row for row in sva.factorize(NETS["mobilenet-v2"]()).factorization}
    assert "grouped convolution" in report["features.1.conv.3"].note
    assert report["features.1.conv.0"].rank is not None
    report = {row.name: row for row in sva.factorize(NETS["torch-encoder"]()).factorization}
    assert "packs its projections" in report["encoder.layers.0.self_attn"].note
    assert report["encoder.layers.0.self_attn.out_proj"].rank is None
    assert report["encoder.layers.0.linear1"].rank is not None


def test_code_that_reads_a_weight_finds_the_merged_one() -> None:
    """``nn.TransformerEncoderLayer`` in evaluation reads its linear layers' weights."""
    model = sva.factorize(NETS["torch-encoder"]()).eval()
    x = torch.randn(3, 1, 16, 16)
    expected = model(x)  # with gradients: through the layers
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
