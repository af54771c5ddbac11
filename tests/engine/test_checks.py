"""What a learner refuses names the cause, and what comes close to it works."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import schedulefree
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import prune

import svdalign as sva
from svdalign.rules import ErrorSource, Rule


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05)


def net(width: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, width)
    )


X, Y = torch.randn(9, 6), torch.arange(9) % 3


def learner_of(model: nn.Module | None = None, rule="ssa", **options) -> sva.Learner:
    given = {"optimizer": sgd, "example": X} | options
    return sva.Learner(net() if model is None else model, rule, **given)


# --- models that are changed after their learner was made ---------------------------------------


def replace_a_layer(model: nn.Sequential) -> None:
    model[2] = nn.Linear(8, 8)


def assign(model: nn.Module) -> None:
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("rule", ["bp", "ssa"])
@pytest.mark.parametrize("change", [replace_a_layer, assign])
def test_parameters_that_the_optimizer_does_not_know_are_refused(rule: str, change) -> None:
    learner = learner_of(rule=rule)
    learner.step(X, Y)
    change(learner.model)
    with pytest.raises(RuntimeError, match=r"2\.weight.*replaced after its learner was made"):
        learner.step(X, Y)


@pytest.mark.parametrize("rule", ["bp", "ssa"])
def test_a_layer_pruned_while_it_trains_goes_on(rule: str) -> None:
    learner = learner_of(rule=rule)
    prune.l1_unstructured(learner.model[2], "weight", 0.5)
    before = learner.model[2].weight_orig.detach().clone()
    learner.step(X, Y)
    assert not torch.equal(learner.model[2].weight_orig, before)


def test_a_learner_can_be_pickled() -> None:
    learner = learner_of()
    again = pickle.loads(pickle.dumps(learner))
    for one in (learner, again):
        one.step(X, Y)
    for p, q in zip(learner.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)


# --- models that cannot be trained in units -----------------------------------------------------


@pytest.mark.parametrize("rule", ["ssa", "bp"])
def test_parallel_wrappers_are_refused_with_the_way_to_do_it(rule: str, tmp_path) -> None:
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, init_method=f"file://{tmp_path / 'meeting'}"
    )
    try:
        for wrapped in (DistributedDataParallel(net()), DataParallel(net())):
            with pytest.raises(
                ValueError, match=r"model is a \w+Parallel.*model\.module.*svdalign\.parallel"
            ):
                learner_of(wrapped, rule)
        sharded = fully_shard(net(), mesh=init_device_mesh("cpu", (1,)))
        if rule == "ssa":
            with pytest.raises(ValueError, match=r"fully_shard.*svdalign\.parallel"):
                learner_of(sharded, rule)
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_compiled_as_a_whole_is_refused_for_units() -> None:
    with pytest.raises(ValueError, match=r"compiled as a whole.*before torch\.compile"):
        learner_of(torch.compile(net(), backend="eager"))


def test_inference_mode_is_refused() -> None:
    model = net()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"torch\.inference_mode"):
        learner_of(model)
    learner = learner_of()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"torch\.inference_mode"):
        learner.step(X, Y)
    with torch.no_grad():  # which backward undoes
        learner.step(X, Y)
    with torch.inference_mode():
        made = net()
    with pytest.raises(ValueError, match=r"'0\.weight' is made in inference mode"):
        learner_of(made)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_forward_without_gradients_is_named_as_the_cause(context) -> None:
    class Quiet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            with context():
                return self.net(x).clone()

    with pytest.raises(ValueError, match=r"output of model does not require a gradient.*no_grad"):
        learner_of(Quiet())


def test_models_without_weights_yet_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'0\.weight' is lazy: run the model on a batch first"):
        learner_of(nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3)))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"'0\.weight' is on the meta device"):
        learner_of(model)


# --- inputs -------------------------------------------------------------------------------------


def test_nested_tensors_are_refused() -> None:
    x = torch.nested.nested_tensor([torch.ones(2, 6), torch.ones(3, 6)], layout=torch.jagged)
    with pytest.raises(ValueError, match="example must hold samples of one shape"):
        learner_of(example=x)


def made_in_inference_mode(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def test_tensors_of_inference_mode_are_refused() -> None:
    learner = learner_of()
    with pytest.raises(ValueError, match="x was made in inference mode"):
        learner.step(made_in_inference_mode(X), Y)
    with pytest.raises(ValueError, match="y was made in inference mode"):
        learner.step(X, made_in_inference_mode(Y))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"example": None}, ValueError, "example must be a batch of inputs, got None"),
        ({"example": torch.tensor(3.0)}, ValueError, "example must be a batch .* one number"),
        ({"loss": nn.CrossEntropyLoss}, TypeError, r"got a class: give CrossEntropyLoss\(\)"),
        ({"seed": "one"}, TypeError, "seed must be a whole number, got 'one'"),
    ],
)
def test_arguments_of_other_kinds_are_named(options, error, message: str) -> None:
    with pytest.raises(error, match=message):
        learner_of(**options)


class ForceField(nn.Module):
    """Forces as the gradient of an energy, which its forward takes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def test_a_model_that_takes_gradients_itself_is_trained_as_a_whole() -> None:
    model, y = ForceField(), torch.randn(9, 6)
    gradients = learner_of(model, "bp", loss=nn.MSELoss()).gradients(X, y)
    nn.MSELoss()(model(X), y).backward()
    weight = model.energy[0].weight
    torch.testing.assert_close(gradients["energy.0.weight"], weight.grad)
    with pytest.raises(ValueError, match=r"forward takes gradients of its own.*horizon=None"):
        learner_of(model, "ssa", loss=nn.MSELoss())
    with pytest.raises(ValueError, match="no second derivatives"):
        learner_of(model, "fa", loss=nn.MSELoss()).step(X, y)


class Complex(nn.Module):
    """Reads the size of a complex feature."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8, dtype=torch.complex64)
        self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x.to(torch.complex64)).abs()).relu())


@pytest.mark.parametrize("rule", sva.rules.available())
def test_complex_features_are_learned_from_or_refused(rule: str) -> None:
    if rule == "bp" or sva.rules.get(rule).local:
        learner_of(Complex(), rule, units=["middle"]).step(X, Y)
    if rule == "bp":
        return
    with pytest.raises(ValueError, match=r"'first'.* complex"):
        learner_of(Complex(), rule).step(X, Y)


class Routed(nn.Module):
    """An expert that gets the samples with a positive first feature."""

    def __init__(self) -> None:
        super().__init__()
        self.expert, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        mine = x[:, 0] > 0
        out = x.clone()
        out[mine] = self.expert(x[mine])
        return self.last(out)


@pytest.mark.parametrize("rule", ["dfa", "ssa"])
def test_a_unit_of_a_part_of_the_batch_is_refused(rule: str) -> None:
    learner = learner_of(Routed(), rule, units=["expert"], example=X.abs())
    learner.step(X.abs(), Y)
    with pytest.raises(ValueError, match="unit 'expert' puts out 4 samples for a batch of 9"):
        learner.step(X.abs() * torch.where(torch.arange(9) < 4, 1, -1)[:, None], Y)


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: {"input": x}])
def test_arrays_are_refused(form) -> None:
    array = np.zeros((9, 6), np.float32)
    with pytest.raises(TypeError, match=r"example must be a tensor.*numpy\.ndarray.*from_numpy"):
        learner_of(example=form(array))
    with pytest.raises(TypeError, match=r"x must be a tensor.*numpy\.ndarray"):
        learner_of().step(form(array), Y)


# --- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (lambda h: None, "got None"),
        (lambda h: 0.5, "got float"),
        (lambda h: h.sum(1), r"got a tensor of shape \(9,\)"),
        (lambda h: h.sum().detach(), "got one that is detached"),
        (lambda h: torch.ones((), requires_grad=True) * 2, "got one that does not"),
    ],
)
def test_a_rules_loss_is_a_number_that_depends_on_h(made, found: str) -> None:
    @dataclass(frozen=True)
    class Odd(Rule):
        name: str = "odd"
        error: ErrorSource = "local"

        def loss(self, unit, feedback, h, supervision):
            return made(h)

    with pytest.raises(
        ValueError, match=rf"loss of rule 'odd' must be 0-dim and depend on h, {found}"
    ):
        learner_of(rule=Odd()).step(X, Y)


@pytest.mark.parametrize("rule", ["ssa", "bp", "dfa"])
@pytest.mark.parametrize(
    ("made", "found"),
    [
        (lambda z: None, "got None"),
        (lambda z: z.sum(1), r"got a tensor of shape \(9,\)"),
        (lambda z: z.sum().detach(), "got one that is detached"),
    ],
)
def test_the_task_loss_is_a_number_that_depends_on_the_output(rule, made, found: str) -> None:
    learner = learner_of(rule=rule, loss=lambda z, y: made(z))
    with pytest.raises(ValueError, match=found):
        learner.step(X, Y)


# --- weights of the loss ------------------------------------------------------------------------


class Head(nn.Module):
    """Classes by weights of the loss's own, as in ArcFace."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(z @ self.weight, y)


def of_loss(form: str) -> tuple[Head, object]:
    head = Head()
    return head, head if form == "module" else lambda z, y: head(z, y)


@pytest.mark.parametrize("form", ["module", "function"])
@pytest.mark.parametrize("rule", sva.rules.available())
def test_weights_of_the_loss_get_its_gradient(rule: str, form: str) -> None:
    head, loss = of_loss(form)
    model = net()
    learner = learner_of(
        model, rule, loss=loss, optimizer=lambda p: sgd([*p, *head.parameters()]),
    )  # fmt: skip
    (expected,) = torch.autograd.grad(head(model(X), Y), head.weight)
    learner.gradients(X, Y)
    assert head.weight.grad is None
    learner.backward(X, Y)
    torch.testing.assert_close(head.weight.grad, expected)


@pytest.mark.parametrize("form", ["module", "function"])
@pytest.mark.parametrize("rule", ["bp", "ssa"])
def test_weights_of_the_loss_that_nobody_trains_are_refused(rule: str, form: str) -> None:
    head, loss = of_loss(form)
    with pytest.raises(
        ValueError, match=r"loss has weights of its own.*\(3, 3\).*loss\.parameters"
    ):
        learner_of(rule=rule, loss=loss).step(X, Y)
    head.requires_grad_(False)
    learner_of(rule=rule, loss=loss).step(X, Y)


def test_weights_of_the_loss_are_saved(tmp_path) -> None:
    def make() -> tuple[Head, sva.Learner]:
        head = Head()
        learner = learner_of(loss=head, optimizer=lambda p: sgd([*p, *head.parameters()]))
        return head, learner

    (head, learner), (other, again) = make(), make()
    learner.step(X, Y)
    sva.save(learner, tmp_path / "run")
    assert not torch.equal(head.weight, other.weight)
    sva.load(tmp_path / "run", into=again)
    assert torch.equal(head.weight, other.weight)


# --- optimizers ---------------------------------------------------------------------------------


def test_an_optimizer_that_evaluates_the_loss_takes_the_steps_of_its_closure() -> None:
    def make() -> tuple[nn.Module, sva.Learner]:
        model = net()
        return model, learner_of(model, "bp", optimizer=torch.optim.LBFGS)

    (model, learner), (other, by_hand) = make(), make()

    def closure() -> Tensor:
        by_hand.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(other(X), Y)
        loss.backward()
        return loss

    first = by_hand.optimizer.step(closure)
    report = learner.step(X, Y)
    torch.testing.assert_close(report.loss, first.detach())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    with pytest.raises(TypeError, match=r"LBFGS evaluates the loss by itself.*learner\.step"):
        learner.update()


SCHEDULE_FREE = {
    "AdamW": lambda p: schedulefree.AdamWScheduleFree(p, lr=1e-2),
    "SGD": lambda p: schedulefree.SGDScheduleFree(p, lr=1.0),
    "RAdam": lambda p: schedulefree.RAdamScheduleFree(p, lr=1e-2),
    "AdamW, the mean kept": lambda p: schedulefree.AdamWScheduleFreeReference(p, lr=1e-2),
    "AdamW, closure": lambda p: schedulefree.AdamWScheduleFreeClosure(p, lr=1e-2),
}


@pytest.mark.parametrize("kind", SCHEDULE_FREE)
def test_what_schedule_free_optimizers_evaluate_stays_on_the_manifold(kind: str) -> None:
    """And is as good as what they train, as it is for dense weights: all weights are of a mean
    that gradients were never taken at."""
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    y = x[:, :3].argmax(1)
    model = sva.factorize(net(), {"0": 3, "2": 3})
    learner = learner_of(model, optimizer=SCHEDULE_FREE[kind], example=x)
    modes = [m for m in ("train", "eval") if hasattr(learner.optimizer, m)]
    for mode in modes[:1]:
        getattr(learner.optimizer, mode)()
    trained = [float(learner.step(x, y).loss) for _ in range(100)][-1]
    for mode in modes[1:]:
        getattr(learner.optimizer, mode)()
    for layer in (model[0], model[2]):
        for X in (layer.U, layer.V):
            torch.testing.assert_close(X.mT @ X, torch.eye(3), rtol=0, atol=1e-5)
    evaluated = float(nn.functional.cross_entropy(model(x), y).detach())
    assert evaluated < trained + 0.1


def test_a_state_of_the_same_name_of_other_optimizers_stays() -> None:
    class Other(torch.optim.SGD):
        pass

    model = sva.factorize(net(), {"0": 3, "2": 3})
    learner = learner_of(model, optimizer=lambda p: Other(p, 0.5))
    learner.backward(X, Y)
    learner.optimizer.state[model[0].U]["z"] = torch.ones_like(model[0].U)
    learner.update()
    assert torch.equal(learner.optimizer.state[model[0].U]["z"], torch.ones_like(model[0].U))
