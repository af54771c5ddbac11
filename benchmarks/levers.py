"""Changes to the recipe that take code: trainers and rules that configs name.

    svdalign compare --config benchmarks/configs/levers.yaml --data-dir DATA

Name one in the ``changes`` of a comparison, as ``trainer: benchmarks.levers:NAME`` or ``rule:
benchmarks.levers:NAME``, and run it in the folder that contains ``benchmarks``. All are built from
the library's public parts: a subclass of a rule, an optimizer, a hook. Those that helped became
part of the library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdalign import RankCut, reduce_rank
from svdalign.engine import Learner
from svdalign.engine.forward import preserved_buffers
from svdalign.factors import FactoredLayer
from svdalign.factors.stiefel import qr_retract
from svdalign.feedback import Feedback, StructuredFeedback
from svdalign.lab.data import ImageData
from svdalign.lab.training import RunConfig, Trainer, build_learner, build_model, make_rule
from svdalign.lab.training.build import example_batch
from svdalign.losses import directions, similarity_alignment, statistics_alignment
from svdalign.rules import SSA, Rule, Supervision, UnitSpec
from svdalign.rules.base import task_loss


def trained(
    *,
    rule: Callable[[Rule], Rule] = lambda rule: rule,
    weights: Callable[[nn.Module], None] = lambda model: None,
    groups: Callable[[nn.Parameter, str], dict[str, Any]] | None = None,
    prepare: Callable[[Learner, RunConfig, ImageData], None] = lambda learner, config, data: None,
) -> Callable[[RunConfig, ImageData], Trainer]:
    """A trainer that a config may name.

    ``rule``: makes another rule from the run's own. ``weights``: changes the model before training.
    ``groups``: returns the settings of a parameter, such as ``lr_scale``, from what the parameter
    is, see :func:`kinds`. ``prepare``: called with the learner before its first step.
    """

    def make(config: RunConfig, data: ImageData) -> Trainer:
        model = build_model(config, data)
        torch.manual_seed(config.seed)
        weights(model)

        def grouped(parameters: list[nn.Parameter]) -> list[Any]:
            if groups is None:
                return list(parameters)
            kind = kinds(model, parameters)
            return [{"params": [p], **groups(p, kind[p])} for p in parameters]

        own = rule(make_rule(config))
        learner = build_learner(config, data, model, rule=own, groups=grouped)
        prepare(learner, config, data)
        return Trainer(config, data, learner)

    return make


# --- groups of parameters -----------------------------------------------------------------------


def kinds(model: nn.Module, parameters: list[nn.Parameter]) -> dict[nn.Parameter, str]:
    """What each parameter is: "factor" (U or V of a layer), "s", "other", "feedback"."""
    found = dict.fromkeys(parameters, "feedback") | dict.fromkeys(model.parameters(), "other")
    for module in model.modules():
        if isinstance(module, FactoredLayer):
            found |= {module.U: "factor", module.V: "factor", module.s: "s"}
    return found


def scaled(**scales: float) -> Callable[[nn.Parameter, str], dict[str, Any]]:
    return lambda p, kind: {"lr_scale": scales.get(kind, 1.0)}


def by_angle(reference: float) -> Callable[[nn.Parameter, str], dict[str, Any]]:
    """A step of Adam turns a column of m entries by lr sqrt(m): as much for any m."""

    def group(p: nn.Parameter, kind: str) -> dict[str, Any]:
        return {"lr_scale": (reference / len(p)) ** 0.5 if kind == "factor" else 1.0}

    return group


slow_factors = trained(groups=scaled(factor=0.5))
fast_factors = trained(groups=scaled(factor=2.0))
fast_s = trained(groups=scaled(s=4.0))
slow_s = trained(groups=scaled(s=0.25))
fast_feedback = trained(groups=scaled(feedback=4.0))
slow_feedback = trained(groups=scaled(feedback=0.25))
equal_angles = trained(groups=by_angle(128.0))
quarter_angles = trained(groups=by_angle(8.0))
decay_of_s = trained(groups=lambda p, kind: {} if kind == "s" else {"weight_decay": 0.0})


# --- weights ------------------------------------------------------------------------------------


def layers(model: nn.Module) -> list[FactoredLayer]:
    return [m for m in model.modules() if isinstance(m, FactoredLayer)]


@torch.no_grad()
def flat_spectrum(model: nn.Module) -> None:
    """Random orthonormal factors, all values of ``s`` alike, the norm kept."""
    for layer in layers(model):
        norm = layer.s.norm()
        layer.s.fill_((norm / layer.rank**0.5).item())
        for X in (layer.U, layer.V):
            X.copy_(qr_retract(torch.randn_like(X)))


@torch.no_grad()
def decaying_spectrum(model: nn.Module) -> None:
    for layer in layers(model):
        s = torch.arange(1, layer.rank + 1, dtype=layer.s.dtype).rsqrt()
        layer.s.copy_(s * (layer.s.norm() / s.norm()))


def tangent_steps(learner: Learner, config: RunConfig, data: ImageData) -> None:
    """Gradients G of a factor X = U or V less ``X sym(X^T G)``: projected to the tangent space
    before the optimizer gets them."""
    factors = [X for layer in layers(learner.model) for X in (layer.U, layer.V)]

    def project(*_: object) -> None:
        for X in factors:
            if X.grad is not None:
                XtG = X.detach().mT @ X.grad
                X.grad = X.grad - X.detach() @ (0.5 * (XtG + XtG.mT))

    learner.optimizer.register_step_pre_hook(project)


flat = trained(weights=flat_spectrum)
decaying = trained(weights=decaying_spectrum)
tangent = trained(prepare=tangent_steps)


# --- feedback -----------------------------------------------------------------------------------


def features_of(learner: Learner, x: Tensor) -> dict[str, Tensor]:
    """Each unit's output for a batch, in the layout that rules get."""
    found: dict[str, Tensor] = {}

    def keep(unit: Any) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            found[unit.name] = unit.features[0].layout(output.detach())

        return hook

    handles = [
        learner.model.get_submodule(unit.exit).register_forward_hook(keep(unit))
        for unit in learner.units[:-1]
    ]
    with torch.no_grad():
        learner.model(x)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def warm_started(learner: Learner, config: RunConfig, data: ImageData) -> None:
    """``B`` from the class means of the unit's own features, before the first step."""
    assert isinstance(learner.rule, SSA)
    x, y = example_batch(config, data, 1000), data.train.labels[:1000]
    hot = F.one_hot(y, data.num_classes).float()
    for name, h in features_of(learner, x).items():
        unit = next(u for u in learner.units if u.name == name)
        feedback = learner.feedback_of(unit)
        assert isinstance(feedback, StructuredFeedback)
        p = learner.unit_spec(unit).pool(h, learner.rule.grid)
        means = (p - p.mean(0)).mT @ (hot / hot.sum(0))
        U, s, Vt = torch.linalg.svd(means - means.mean(1, keepdim=True), full_matrices=False)
        k = feedback.s.numel()
        feedback.U.copy_(U[:, :k])
        feedback.V.copy_(Vt[:k].mT)
        feedback.s.copy_(s[:k] / s[0])


class FollowingJacobian:
    """``B`` follows the Jacobian of the logits: every few steps, one forward-mode product with a
    random direction at one unit's output, and a step of least squares towards it."""

    def __init__(self, every: int = 2, rate: float = 0.5) -> None:
        self.every, self.rate = every, rate

    def __call__(self, learner: Learner, config: RunConfig, data: ImageData) -> None:
        step, generator = learner.step, torch.Generator().manual_seed(config.seed)

        def stepped(x: Tensor, y: Tensor) -> Any:
            if learner.steps % self.every == 0:
                turn = (learner.steps // self.every) % (len(learner.units) - 1)
                self.follow(learner, learner.units[turn], x[:32], generator)
            return step(x, y)

        learner.step = stepped  # type: ignore[method-assign]

    @torch.no_grad()
    def follow(self, learner: Learner, unit: Any, x: Tensor, generator: torch.Generator) -> None:
        feedback, view = learner.feedback_of(unit), learner.unit_spec(unit)
        assert isinstance(feedback, StructuredFeedback)
        assert isinstance(learner.rule, SSA)
        model, grid = learner.model, learner.rule.grid
        training = model.training
        model.eval()
        with torch.autograd.forward_ad.dual_level():
            direction: list[Tensor] = []

            def perturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                direction.append(torch.randn(output.shape, generator=generator))
                return torch.autograd.forward_ad.make_dual(output, direction[0])

            handle = model.get_submodule(unit.exit).register_forward_hook(perturb)
            z = model(x)
            handle.remove()
            Jv = torch.autograd.forward_ad.unpack_dual(z).tangent
        model.train(training)
        assert Jv is not None
        Pv = view.pool(unit.features[0].layout(direction[0]), grid)
        B = feedback.project(torch.eye(feedback.V.shape[0])).mT  # (d, C)
        error = Jv - Pv @ B
        B = B + self.rate * Pv.mT @ error / Pv.square().sum()
        U, s, Vt = torch.linalg.svd(B, full_matrices=False)
        k = feedback.s.numel()
        for X, value in ((feedback.U, U[:, :k]), (feedback.s, s[:k]), (feedback.V, Vt[:k].mT)):
            X.copy_(value)


class ByAPart:
    """The first unit learns from the network's loss on a part of the batch, by backpropagation;
    with ``both`` from its own loss as well. Only activations of these samples are saved for it."""

    def __init__(self, part: int = 4, *, both: bool = False) -> None:
        self.part, self.both = part, both

    def __call__(self, learner: Learner, config: RunConfig, data: ImageData) -> None:
        step, names, batch = learner.step, learner.units[0].parameters, list[Tensor]()

        def stepped(x: Tensor, y: Tensor) -> Any:
            batch[:] = [t[: len(t) // self.part] for t in (x, y)]
            return step(x, y)

        def backpropagate(*_: object) -> None:
            parameters = [p for p in map(learner.model.get_parameter, names) if p.requires_grad]
            with torch.enable_grad(), preserved_buffers(learner.model):
                loss = learner.loss(learner.model(batch[0]), batch[1])
                grads = torch.autograd.grad(loss, parameters)
            for p, grad in zip(parameters, grads, strict=True):
                p.grad = grad + p.grad if self.both and p.grad is not None else grad

        learner.step = stepped  # type: ignore[method-assign]
        learner.optimizer.register_step_pre_hook(backpropagate)


def keep_the_first_unit(learner: Learner, config: RunConfig, data: ImageData) -> None:
    """The first unit's weights stay as they began."""
    parameters = [learner.model.get_parameter(name) for name in learner.units[0].parameters]

    def drop(*_: object) -> None:
        for p in parameters:
            p.grad = None

    learner.optimizer.register_step_pre_hook(drop)


first_frozen = trained(prepare=keep_the_first_unit)
class_means = trained(prepare=warm_started)
by_a_quarter = trained(prepare=ByAPart())
by_both = trained(prepare=ByAPart(both=True))
follows_jacobian = trained(prepare=FollowingJacobian())


# --- rules --------------------------------------------------------------------------------------


def changed(cls: type[SSA]) -> Callable[[Rule], Rule]:
    """The run's rule as one of ``cls``, with the same settings."""
    return lambda rule: cls(**{f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)})


class _UnitGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / grad.norm().clamp_min(1e-12)


class NormalisedSSA(SSA):
    """Every unit's own teaching signal has norm 1."""

    def loss(self, unit: UnitSpec, feedback: Any, h: Tensor, supervision: Supervision) -> Tensor:
        return super().loss(unit, feedback, _UnitGradient.apply(h), supervision)  # type: ignore[no-untyped-call]


class PooledSimilaritySSA(SSA):
    """Similarity of the pooled maps in place of the channels' standard deviations."""

    def loss(self, unit: UnitSpec, feedback: Any, h: Tensor, supervision: Supervision) -> Tensor:
        pooled = unit.pool(h, self.grid)
        loss = task_loss(self.error, feedback, pooled, supervision)
        wanted = directions(supervision.target_matrix().to(pooled.dtype))
        return loss + self.alpha * statistics_alignment(pooled, wanted)


class CentredSimilaritySSA(SSA):
    """Similarity of what has no space, less its mean over the batch: units that all samples excite
    alike need not fall silent to make samples differ."""

    def loss(self, unit: UnitSpec, feedback: Any, h: Tensor, supervision: Supervision) -> Tensor:
        if h.ndim != 2:
            return super().loss(unit, feedback, h, supervision)
        task = task_loss(self.error, feedback, unit.pool(h, self.grid), supervision)
        return task + self.alpha * similarity_alignment(h - h.mean(0), supervision.target_matrix())


class FewFeaturesSSA(SSA):
    """A coarser grid for units whose pooled map would have more than 1024 numbers."""

    def coarser(self, unit: UnitSpec) -> SSA:
        grid = self.grid
        while grid is not None and grid > 1 and unit.pooled_size(grid) > 1024:
            grid -= 1
        return cast(SSA, dataclasses.replace(changed(SSA)(self), grid=grid))

    def feedback(self, unit: UnitSpec, generator: torch.Generator) -> Feedback:
        return self.coarser(unit).feedback(unit, generator)

    def loss(self, unit: UnitSpec, feedback: Any, h: Tensor, supervision: Supervision) -> Tensor:
        return self.coarser(unit).loss(unit, feedback, h, supervision)


class MixedErrorSSA(SSA):
    """Half the output's error, half the unit's own."""

    def loss(self, unit: UnitSpec, feedback: Any, h: Tensor, supervision: Supervision) -> Tensor:
        assert isinstance(feedback, Feedback)
        own = task_loss("local", feedback, unit.pool(h, self.grid), supervision)
        return super().loss(unit, feedback, h, supervision) + own


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.weight, None


class GrowingSSA(SSA):
    """A unit's loss counts ``gain`` times as much as that of the unit before, so that within a
    horizon of 1 a unit listens to its successor ``gain`` times as much as to itself."""

    gain = 2.0
    order: ClassVar[dict[str, int]] = {}

    def loss(self, unit: UnitSpec, feedback: Any, h: Tensor, supervision: Supervision) -> Tensor:
        before_the_output = len(self.order) - self.order[unit.name]
        loss = super().loss(unit, feedback, h, supervision)
        return _Weighted.apply(loss, self.gain**-before_the_output)  # type: ignore[no-untyped-call,no-any-return]


def growing(gain: float) -> Callable[[RunConfig, ImageData], Trainer]:
    cls = type(f"GrowingSSA{gain:g}", (GrowingSSA,), {"gain": gain})

    def note(learner: Learner, config: RunConfig, data: ImageData) -> None:
        cls.order = {unit.name: i for i, unit in enumerate(learner.units[:-1])}

    return trained(rule=changed(cls), prepare=note)


growing_2, growing_4, growing_16 = growing(2.0), growing(4.0), growing(16.0)


class _Auxiliary(Feedback):
    """A readout through a hidden layer of its own: the light auxiliary path."""

    def __init__(self, inner: Feedback, d: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.inner = inner
        self.A = nn.Parameter(torch.randn(d, hidden, generator=generator) * (2 / d) ** 0.5)

    def readout(self, p: Tensor) -> Tensor:
        return self.inner.readout(torch.relu(p @ self.A))


class AuxiliarySSA(SSA):
    def feedback(self, unit: UnitSpec, generator: torch.Generator) -> Feedback:
        inner = StructuredFeedback(
            128, unit.classes, rank=self.feedback_rank, learn=True, generator=generator
        )
        return _Auxiliary(inner, unit.pooled_size(self.grid), 128, generator)


# --- rank cuts ----------------------------------------------------------------------------------


class DroppingTrainer(Trainer):
    """Cuts ranks without carrying the optimizer's state."""

    def _reduce_rank(self, limits: dict[str, Any]) -> tuple[RankCut, ...]:
        model, state = self.learner.model, self.learner.optimizer.state
        cuts = reduce_rank(model, **limits)
        for cut in cuts:
            if cut.after < cut.before:
                layer = model.get_submodule(cut.name)
                assert isinstance(layer, FactoredLayer)
                for factor in (layer.U, layer.s, layer.V):
                    state.pop(factor, None)
        return cuts


def dropping(config: RunConfig, data: ImageData) -> Trainer:
    return DroppingTrainer(config, data, build_learner(config, data))
