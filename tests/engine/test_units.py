"""Where units end, and what belongs to them: all that their output has come to depend on."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.oracles.nets import TOYS, ResNet, Tokens
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import svdalign as sva
from svdalign.engine import make_plan
from svdalign.engine.units import OUTPUT


def plan_of(model: nn.Module, units, example: Tensor):
    return make_plan(model, units, example)


def owned(plan) -> list[set[str]]:
    """Modules with parameters in each unit."""
    return [{name.rpartition(".")[0] for name in unit.parameters} for unit in plan.units]


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 16), nn.LayerNorm(16), nn.GELU(),
        nn.Linear(16, 4),
    )  # fmt: skip


EXAMPLE = torch.randn(3, 3, 8, 8)


@pytest.mark.parametrize("units", ["layer", "block"])
def test_a_layer_takes_the_norm_activation_and_pooling_that_follow_it(units: str) -> None:
    plan = plan_of(sequential(), units, EXAMPLE)
    assert [unit.exit for unit in plan.units] == ["3", "6", "10", ""]
    assert owned(plan) == [{"0", "1"}, {"4"}, {"8", "9"}, {"11"}]
    assert [unit.features[0].shape[1:] for unit in plan.units] == [
        (8, 8, 8),
        (8, 4, 4),
        (16,),
        (4,),
    ]


@pytest.mark.parametrize(
    ("size", "pool", "taken"),
    [
        (8, nn.MaxPool2d(2), True), (7, nn.MaxPool2d(2), True), (7, nn.AvgPool2d(2), True),
        (8, nn.MaxPool2d(3, 2), False), (8, nn.MaxPool2d(4), False),
        (8, nn.AdaptiveAvgPool2d(1), False),
    ],
)  # fmt: skip
def test_a_layer_takes_pooling_that_shrinks_at_most_like_two_by_two(size, pool, taken) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), pool, nn.Conv2d(8, 2, 1))
    plan = plan_of(model, "layer", torch.randn(2, 3, size, size))
    assert plan.units[0].exit == ("2" if taken else "1")


@pytest.mark.parametrize("pieces", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_balanced_units_have_the_smallest_largest(pieces: int, seed: int) -> None:
    """A linear layer holds its input: of all ways to cut a chain of them into so many units none
    has a largest unit that holds less."""
    widths = np.random.default_rng(seed).integers(1, 60, size=6).tolist()
    net = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise([*widths, 2])))
    plan = plan_of(
        net, "balanced" if pieces == 2 else f"balanced-{pieces}", torch.randn(3, widths[0])
    )
    assert len(plan.units) == pieces

    def largest(sizes: list[int]) -> int:
        ends = [0, *itertools.accumulate(sizes)]
        return max(sum(widths[a:b]) for a, b in itertools.pairwise(ends))

    ways = (w for w in itertools.product(range(1, 6), repeat=pieces) if sum(w) == len(widths))
    assert largest([len(modules) for modules in owned(plan)]) == min(map(largest, ways))


def test_the_classifier_belongs_to_the_last_balanced_unit() -> None:
    plan = plan_of(sequential(), "balanced", EXAMPLE)
    assert "11" in owned(plan)[-1]
    assert len(owned(plan)[-1]) > 1


def test_balanced_leaves_no_trace() -> None:
    model = sequential()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random_state = torch.get_rng_state()
    plan_of(model, "balanced-3", EXAMPLE)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("units", ["balanced-1", "balanced-", "balanced3"])
def test_balanced_wants_a_number_of_units(units: str) -> None:
    with pytest.raises(ValueError, match=r"units must be .*'balanced-3'"):
        plan_of(sequential(), units, EXAMPLE)


def test_activations_in_place_change_no_unit() -> None:
    model = sequential()
    names = [unit.exit for unit in plan_of(model, "layer", EXAMPLE).units]
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    assert [unit.exit for unit in plan_of(model, "layer", EXAMPLE).units] == names


def test_factored_layers_are_layers() -> None:
    model = sva.factorize(sequential(), {"0": 4, "8": 3})
    plan = plan_of(model, "layer", EXAMPLE)
    assert owned(plan) == [{"0", "1"}, {"4"}, {"8", "9"}, {"11"}]
    assert {name for name in plan.units[0].parameters if name.startswith("0.")} == {
        "0.U", "0.s", "0.V", "0.bias"
    }  # fmt: skip


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("units", ["layer", "block", "stage", 1, 2, 3])
def test_every_parameter_belongs_to_one_unit_and_the_last_is_the_outputs(name: str, units) -> None:
    toy = TOYS[name]
    model = toy.model()
    plan = plan_of(model, units, toy.batch()[0])
    everything = [n for unit in plan.units for n in unit.parameters]
    assert sorted(everything) == sorted(n for n, _ in model.named_parameters())
    assert plan.unreached == ()
    assert plan.units[-1].name == OUTPUT
    assert plan.units[-1].parameters
    assert len({unit.name for unit in plan.units}) == len(plan.units)


@pytest.mark.parametrize("name", TOYS)
def test_a_callable_decides(name: str) -> None:
    toy = TOYS[name]
    model = toy.model()
    plan = plan_of(model, toy.units, toy.batch()[0])
    assert tuple(unit.exit for unit in plan.units[:-1]) == toy.exits
    expected = [set(names) for names in toy.parameters(model)]
    assert [set(unit.parameters) for unit in plan.units] == expected


def test_embeddings_norms_and_free_parameters_belong_to_the_unit_that_uses_them() -> None:
    model, x = Tokens(), torch.randint(0, 11, (3, 5))
    plan = plan_of(model, lambda name, module: name in ("norm1", "norm2"), x)
    assert owned(plan) == [{"embed", "", "norm0", "fc1", "norm1"}, {"fc2", "norm2"}, {"head"}]
    assert "position" in plan.units[0].parameters
    by_layer = plan_of(model, "layer", x)  # the activation is a function: fc1's chain is fc1
    assert owned(by_layer) == [{"embed", "", "norm0", "fc1"}, {"norm1", "fc2"}, {"norm2", "head"}]


def test_a_block_is_a_unit_with_its_skip() -> None:
    plan = plan_of(ResNet(), "block", torch.randn(2, 2, 5, 5))
    blocks = [
        {f"blocks.{i}.{layer}" for layer in ("conv1", "norm1", "conv2", "norm2")} for i in range(3)
    ]  # fmt: skip
    assert owned(plan) == [{"stem.0", "stem.1"}, *blocks, {"head"}]


def test_an_int_joins_so_many_blocks() -> None:
    plan = plan_of(ResNet(), 2, torch.randn(2, 2, 5, 5))  # stem and block, two blocks, head
    assert [unit.exit for unit in plan.units] == ["blocks.0", "blocks.2", ""]


def test_names_say_where_units_end() -> None:
    plan = plan_of(ResNet(), ["blocks.1"], torch.randn(2, 2, 5, 5))
    assert [unit.exit for unit in plan.units] == ["blocks.1", ""]
    assert {"head.weight"} < set(plan.units[-1].parameters)


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (
            ["blocks.1", "blocks.9"],
            r"units must name modules of the model, got no module 'blocks.9'",
        ),
        ([], "units must name modules of the model, got an empty list"),
    ],
)
def test_names_that_are_none_are_refused(units: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(ResNet(), units, torch.randn(2, 2, 5, 5))


class Stages(nn.Module):
    """Blocks at two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(*(self.block(4) for _ in range(2)))
        self.pool = nn.MaxPool2d(2)
        self.high = nn.Sequential(*(self.block(4) for _ in range(3)))
        self.head = nn.Linear(4, 3)

    @staticmethod
    def block(channels: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.high(self.pool(self.low(x))).mean((2, 3)))


def test_a_stage_is_a_run_of_blocks_of_one_shape() -> None:
    plan = plan_of(Stages(), "stage", torch.randn(2, 4, 6, 6))
    assert [{n.split(".")[0] for n in unit.parameters} for unit in plan.units] == [
        {"low"}, {"high"}, {"head"}
    ]  # fmt: skip


def test_a_single_layer_is_the_outputs_own_unit() -> None:
    plan = plan_of(nn.Sequential(nn.Linear(4, 3)), "layer", torch.randn(2, 4))
    assert [unit.name for unit in plan.units] == [OUTPUT]


def test_unused_parameters_are_unreached() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    model.spare = nn.Linear(4, 4)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    plan = plan_of(model, "layer", torch.randn(2, 4))
    assert plan.unreached == ("spare.weight", "spare.bias")


@pytest.mark.parametrize("horizon", [0, 1])
def test_models_with_functional_activations_learn(horizon: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3, padding=1)
            self.fc1, self.fc2 = nn.Linear(8 * 16, 24), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1)
            return self.fc2(F.relu(self.fc1(x)))

    torch.manual_seed(0)
    model = sva.factorize(Net(), 0.3)
    y = torch.arange(24) % 3
    x = torch.randn(24, 1, 8, 8) + torch.randn(3, 1, 8, 8)[y]
    learner = sva.Learner(
        model, horizon=horizon, optimizer=lambda p: torch.optim.AdamW(p, 5e-3), example=x
    )  # fmt: skip
    losses = [float(learner.step(x, y).loss) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    assert len(learner.units) == 3


class Named(nn.Module):
    """Three layers, the one in the middle at a path of choice."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name, self.first = name, nn.Linear(6, 12)
        self.add_module(name, nn.Linear(12, 12))
        self.last = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.get_submodule(self.name)(F.relu(self.first(x))))
        return self.last(h)


@pytest.mark.parametrize("rule", ["ssa", "dfa"])
def test_a_hidden_module_called_output_is_taught_as_by_any_other_name(rule: str) -> None:
    x, y = torch.randn(5, 6), torch.arange(5) % 4
    taught = []
    for name in ("middle", "output"):
        learner = sva.Learner(
            Named(name), rule, units="layer", horizon=0, example=x,
            optimizer=lambda p: torch.optim.SGD(p, 0.1),
        )  # fmt: skip
        assert [unit.exit for unit in learner.units] == ["first", name, ""]
        assert [learner.feedback_of(unit) is None for unit in learner.units] == [False, False, True]
        taught.append((learner.gradients(x, y).values(), learner.step(x, y)))
    (wanted, report), (gradients, named_output) = taught
    for one, other in zip(wanted, gradients, strict=True):
        assert torch.equal(one, other)
    assert list(named_output.unit_losses.values()) == list(report.unit_losses.values())
    assert named_output.unit_losses["output"] == named_output.loss


@pytest.mark.parametrize("name", ["output", "first#1", "output#0"])
def test_names_of_units_are_unique_whatever_modules_are_called(name: str) -> None:
    class Again(Named):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.first(x))

    model = Again(name)
    model.first = nn.Linear(6, 6)
    model.add_module(name, nn.Linear(6, 12))
    plan = plan_of(model, "layer", torch.randn(3, 6))
    assert [unit.exit for unit in plan.units] == ["first", "first", name, ""]
    assert len({unit.name for unit in plan.units}) == 4


def plain(layers: int) -> nn.Module:
    """Layers of one width, so that all are of one stage."""
    modules = [m for _ in range(layers - 1) for m in (nn.Linear(6, 6), nn.ReLU())]
    return nn.Sequential(*modules, nn.Linear(6, 6))


@pytest.mark.parametrize("units", [3, 4, 50, "stage", lambda name, module: name == "4"])
def test_units_that_leave_several_layers_in_one_piece_are_refused(units) -> None:
    x = torch.randn(2, 6)
    with pytest.raises(ValueError, match=r"units=.* 3 layers, 3 blocks, in one piece"):
        plan_of(plain(3), units, x)
    options = {"units": units, "optimizer": lambda p: torch.optim.SGD(p, 0.1), "example": x}
    with pytest.raises(ValueError, match=r"units=.* 3 layers, 3 blocks, in one piece"):
        sva.Learner(plain(3), "ssa", **options)
    assert len(sva.Learner(plain(3), "bp", **options).units) == 1  # there it is asked for


def test_where_packed_sequences_are_handed_on_the_refusal_says_so() -> None:
    class Text(nn.Module):
        def __init__(self, *, all_tokens: bool) -> None:
            super().__init__()
            self.all_tokens = all_tokens
            self.first, self.second = nn.GRU(3, 4, batch_first=True), nn.GRU(4, 4, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(
                x, lengths, batch_first=True, enforce_sorted=False
            )
            packed, last = self.second(self.first(packed)[0])
            if not self.all_tokens:
                return self.head(last[-1])
            return self.head(nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)[0][:, 0])

    example = (torch.randn(3, 5, 3), torch.tensor([5, 2, 4]))
    with pytest.raises(ValueError, match="no unit can end at a module that returns a Packed"):
        make_plan(Text(all_tokens=True), "layer", example)
    with_samples = make_plan(Text(all_tokens=False), "layer", example)  # the last states have them
    assert len(with_samples.units) == 2


@pytest.mark.parametrize("units", ["layer", "block", "stage", 1, 50])
def test_a_single_layer_may_be_in_one_piece(units) -> None:
    assert [unit.name for unit in plan_of(plain(1), units, torch.randn(2, 6)).units] == [OUTPUT]


def test_as_many_units_as_fit_are_made() -> None:
    assert [unit.exit for unit in plan_of(plain(3), 2, torch.randn(2, 6)).units] == ["3", ""]


# --- every layer is taught ----------------------------------------------------------------------


class Levels(nn.Module):
    """Three maps of a backbone, the deepest last."""

    def __init__(self, order: slice = slice(None)) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 4, 3, 2, 1) for i in (1, 4, 4))
        self.order = order

    def forward(self, x: Tensor) -> list[Tensor]:
        a = self.a(x).relu()
        b = self.b(a).relu()
        return [a, b, self.c(b).relu()][self.order]


class Pyramid(nn.Module):
    def __init__(self, order: slice = slice(None)) -> None:
        super().__init__()
        self.backbone, self.neck = Levels(order), nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in "abc")
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        levels = zip(self.neck, self.backbone(x), strict=True)
        return self.head(torch.cat([neck(level).relu().mean((2, 3)) for neck, level in levels], 1))


class Down(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.keep, self.down = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.keep(x).relu()
        return x, self.down(x).relu()


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outside, self.inside = Down(), nn.Conv2d(4, 4, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(4, 4, 2, 2), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip, x = self.outside(x)
        return self.out(self.up(self.inside(x).relu()) + skip)


class Branches(nn.Module):
    """Two outputs of which neither depends on the other's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": self.a(x).relu(), "b": self.b(x).relu()}


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branches, self.head = nn.Linear(4, 4), Branches(), nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = self.branches(self.stem(x).relu())
        return self.head(torch.cat([both["a"], both["b"]], 1))


SEVERAL = {
    "levels": (Pyramid, (4, 1, 16, 16), (4,)),
    "levels, deepest first": (lambda: Pyramid(slice(None, None, -1)), (4, 1, 16, 16), (4,)),
    "skip": (Skipping, (4, 1, 8, 8), (4, 8, 8)),
    "branches": (TwoBranches, (4, 4), (4,)),
}


@pytest.mark.parametrize("horizon", [0, 1, 2])
@pytest.mark.parametrize("rule", ["ssa", "dfa", "drtp"])
@pytest.mark.parametrize("name", SEVERAL)
def test_modules_of_several_outputs_leave_no_layer_without_gradient(
    name: str, rule: str, horizon: int
) -> None:
    make, x_shape, y_shape = SEVERAL[name]
    torch.manual_seed(0)
    model = make()
    x, y = torch.randn(x_shape), torch.randint(3, y_shape)
    learner = sva.Learner(
        model, rule, horizon=horizon, optimizer=lambda p: torch.optim.SGD(p, 0.1), example=x
    )
    found = learner.gradients(x, y)
    assert {n for n, g in found.items() if g.any()} == {n for n, _ in model.named_parameters()}


def test_each_of_several_features_has_its_own_teacher() -> None:
    """The gradient of a branch is that of the error its own feedback brings: ``B_b e``."""
    torch.manual_seed(0)
    model = TwoBranches()
    x, y = torch.randn(4, 4), torch.arange(4) % 3
    learner = sva.Learner(
        model, "dfa", optimizer=lambda p: torch.optim.SGD(p, 0.1), example=x,
    )  # fmt: skip
    unit = next(unit for unit in learner.units if unit.exit == "branches")
    assert [feature.shape[1] for feature in unit.features] == [5, 6]
    z = model(x).detach().requires_grad_()
    (e,) = torch.autograd.grad(torch.nn.functional.cross_entropy(z, y), z)
    h = model.stem(x).relu().detach()
    found = learner.gradients(x, y)
    for i, layer in enumerate("ab"):
        weight = getattr(model.branches, layer).weight
        delta = e @ learner.feedback_of(unit, i).B.T
        active = (h @ weight.T + getattr(model.branches, layer).bias > 0).float()
        torch.testing.assert_close(found[f"branches.{layer}.weight"], (delta * active).T @ h)


# --- what the example does not show -------------------------------------------------------------


class Dropped(nn.Module):
    """Blocks are left out at random in training, by whose random numbers ``draw`` says."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(5)
        )
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            if not (self.training and self.draw() < 0.5):
                x = x + block(x)
        return self.last(x)


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), np.random.uniform, random.random])
def test_layers_dropped_at_random_have_their_units(draw) -> None:
    torch.manual_seed(0)
    model = Dropped(draw)
    expected = [u.name for u in make_plan(Dropped(lambda: 1.0), "block", torch.randn(4, 4)).units]
    for seed in range(10):
        for seeded in (torch.manual_seed, np.random.seed, random.seed):
            seeded(seed)
        assert [u.name for u in make_plan(model, "block", torch.randn(4, 4)).units] == expected
        assert all(module.training for module in model.modules())
    learner = sva.Learner(
        model, optimizer=lambda p: torch.optim.SGD(p, 0.1), example=torch.randn(4, 4)
    )
    for _ in range(5):
        learner.step(torch.randn(4, 4), torch.arange(4) % 3)


def test_a_model_that_only_trains_is_planned_as_it_trains() -> None:
    """An auxiliary head runs in training alone, and what evaluation needs may be missing."""

    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise RuntimeError("no evaluation here")
            return self.last(self.second(self.first(x).relu()).relu())

    plan = make_plan(Auxiliary(), "layer", torch.randn(4, 4))
    assert [unit.name for unit in plan.units] == ["first", "second", OUTPUT]


def test_a_model_of_one_batch_size_is_planned_on_the_whole_example() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("A", torch.rand(7, 7).softmax(1))
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.A @ self.a(self.A @ x).relu())

    x, y = torch.randn(7, 4), torch.arange(7) % 3
    learner = sva.Learner(Graph(), optimizer=lambda p: torch.optim.SGD(p, 0.1), example=x)
    learner.step(x, y)
    with pytest.raises(ValueError, match="each of the 7 samples"):
        learner.step(x, y[:-1])


@pytest.mark.parametrize("units", ["layer", "block"])
def test_no_unit_ends_at_a_parametrized_weight(units: str) -> None:
    def net(wrap) -> nn.Sequential:
        torch.manual_seed(0)
        layers = [nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(2, 8)]
        body = [m for layer in layers for m in (wrap(layer), nn.ReLU())]
        return nn.Sequential(*body, nn.Linear(8, 3))

    x, y = torch.randn(8, 6), torch.arange(8) % 3
    plain = make_plan(net(lambda layer: layer), units, x)
    for wrap in (parametrizations.spectral_norm, parametrizations.weight_norm):
        model = net(wrap)
        learner = sva.Learner(
            model, units=units, optimizer=lambda p: torch.optim.SGD(p, 0.1), example=x
        )
        assert [unit.name for unit in learner.units] == [unit.name for unit in plain.units]
        found = learner.gradients(x, y)
        assert {n for n, g in found.items() if g.any()} == {n for n, _ in model.named_parameters()}


class Block(nn.Module):
    """A residual block that adds its skip in place or not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv1, self.norm1, self.relu1 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.relu2 = nn.ReLU(inplace)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        if self.inplace:
            h += x
        else:
            h = h + x
        out: Tensor = self.relu2(h)
        return out


@pytest.mark.parametrize("units", ["layer", "block"])
@pytest.mark.parametrize("horizon", [0, 1, 2])
def test_a_skip_that_is_added_in_place_changes_neither_units_nor_gradients(
    units: str, horizon: int
) -> None:
    torch.manual_seed(0)
    nets = [
        nn.Sequential(
            nn.Conv2d(3, 4, 1), Block(inplace), Block(inplace), nn.Flatten(), nn.Linear(64, 3)
        ).double()
        for inplace in (False, True)
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    x, y = torch.randn(5, 3, 4, 4, dtype=torch.float64), torch.arange(5) % 3
    learners = [
        sva.Learner(
            net, sva.rules.SSA(horizon=horizon), units=units, example=x,
            optimizer=lambda p: torch.optim.SGD(p, 0.1),
        )
        for net in nets
    ]  # fmt: skip
    assert [u.name for u in learners[0].units] == [u.name for u in learners[1].units]
    found = [learner.gradients(x, y) for learner in learners]
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-10, atol=1e-12)
