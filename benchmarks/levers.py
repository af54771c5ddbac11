"""Changes to the recipe, one at a time, for local learning and, where it makes sense, for BP too.

    python benchmarks/levers.py --config benchmarks/configs/search.yaml --data-dir FOLDER

Accuracy is that on images held out of the training set, so that settings can be chosen by it. Runs
that are finished are not run again, and those that were interrupted go on. Every lever is built on
what the library offers anyone, a rule's subclass, an optimizer, a hook; what turned out to help
became part of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
import yaml
from rich.console import Console
from torch import Tensor, nn

from svdalign.engine import Learner
from svdalign.factors import FactoredLayer
from svdalign.factors.stiefel import qr_retract, tangent_project
from svdalign.feedback import Feedback, StructuredFeedback
from svdalign.lab.data import ImageData
from svdalign.lab.methods import METHODS, Method
from svdalign.lab.runner import Run, Sweep
from svdalign.lab.training.build import build_learner, build_model, example_batch, make_rule
from svdalign.lab.training.config import JobConfig, RunConfig, from_dict, method_config, to_yaml
from svdalign.lab.training.progress import PlainProgress
from svdalign.lab.training.record import provenance, read_json, write_json
from svdalign.lab.training.trainer import Trainer
from svdalign.losses import similarity_alignment, similarity_matrix
from svdalign.rules import SSA, Rule, Supervision, UnitSpec
from svdalign.rules.base import task_loss


@dataclass(frozen=True)
class Lever:
    """One change. ``changes``: to the run's config. ``rule``: makes another rule of the run's own.
    ``weights``: changes the model before it is trained. ``groups``: splits the parameters (model's
    factors ``U``/``V``, ``s``, and others) into groups with settings of their own, ``lr_scale``
    among them. ``prepare``: is given the learner before its first step."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    rule: Callable[[Rule], Rule] = lambda rule: rule
    weights: Callable[[nn.Module], None] = lambda model: None
    groups: Callable[[nn.Parameter, str], dict[str, Any]] = lambda p, kind: {}
    prepare: Callable[[Learner, RunConfig, ImageData], None] = lambda learner, config, data: None
    bp: bool = False


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
    """Gradients of U and V projected to the tangent space before the optimizer sees them."""
    factors = [X for layer in layers(learner.model) for X in (layer.U, layer.V)]

    def project(*_: object) -> None:
        for X in factors:
            if X.grad is not None:
                X.grad = tangent_project(X.detach(), X.grad)

    learner.optimizer.register_step_pre_hook(project)


# --- feedback -----------------------------------------------------------------------------------


def features_of(learner: Learner, x: Tensor) -> dict[str, Tensor]:
    """Each unit's output for a batch, as rules see it."""
    found: dict[str, Tensor] = {}

    def keep(unit: Any) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            found[unit.name] = unit.layout(output.detach())

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
        Pv = view.pool(unit.layout(direction[0]), grid)
        B = feedback.project(torch.eye(feedback.V.shape[0])).mT  # (d, C)
        error = Jv - Pv @ B
        B = B + self.rate * Pv.mT @ error / Pv.square().sum()
        U, s, Vt = torch.linalg.svd(B, full_matrices=False)
        k = feedback.s.numel()
        for X, value in ((feedback.U, U[:, :k]), (feedback.s, s[:k]), (feedback.V, Vt[:k].mT)):
            X.copy_(value)


# --- rules --------------------------------------------------------------------------------------


def changed(cls: type[SSA]) -> Callable[[Rule], Rule]:
    """The run's rule as one of ``cls``, with the same settings."""

    def make(rule: Rule) -> Rule:
        return cls(**{f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)})

    return make


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
    """Similarity of the pooled map in place of its channels' deviations."""

    def loss(self, unit: UnitSpec, feedback: Any, h: Tensor, supervision: Supervision) -> Tensor:
        pooled = unit.pool(h, self.grid)
        loss = task_loss(self.error, feedback, pooled, supervision)
        wanted = similarity_matrix(supervision.target_matrix().to(pooled.dtype))
        return loss + self.alpha * F.mse_loss(similarity_matrix(pooled), wanted)


class CentredSimilaritySSA(SSA):
    """Similarity of what has no space, less its mean over the batch: units that all samples excite
    alike need not fall silent to make samples differ."""

    def loss(self, unit: UnitSpec, feedback: Any, h: Tensor, supervision: Supervision) -> Tensor:
        if h.ndim != 2:
            return super().loss(unit, feedback, h, supervision)
        task = task_loss(self.error, feedback, unit.pool(h, self.grid), supervision)
        return task + self.alpha * similarity_alignment(h - h.mean(0), supervision.target_matrix())


class FewFeaturesSSA(SSA):
    """A coarser raster where feedback would read more than 1024 numbers of a unit."""

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


def growing(gain: float) -> dict[str, Any]:
    cls = type(f"GrowingSSA{gain:g}", (GrowingSSA,), {"gain": gain})

    def note(learner: Learner, config: RunConfig, data: ImageData) -> None:
        cls.order = {unit.name: i for i, unit in enumerate(learner.units[:-1])}

    return {"rule": changed(cls), "prepare": note}


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
            128, unit.classes, rank=self.rank, learn=True, generator=generator
        )
        return _Auxiliary(inner, unit.pooled_size(self.grid), 128, generator)


#: Three cuts, an epoch apart, each as far as it may go.
SHRINKING = {"rank": 0.8, "rank_energy": 0.5, "rank_ratio": 0.72, "rank_min": 0.31}

#: Units of several blocks, for residual networks.
LARGE = {"units": 3, "horizon": 2}

#: Two cuts in the middle of eight epochs.
HALVED = {
    "rank": 0.8, "rank_parameters": 0.5, "rank_warmup": 3, "rank_freeze": 4, "rank_min": 1
}  # fmt: skip

LEVERS: dict[str, Lever] = {
    "as it is": Lever(bp=True),
    # weights and their steps
    "U, V at half the rate": Lever(groups=scaled(factor=0.5), bp=True),
    "U, V at twice the rate": Lever(groups=scaled(factor=2.0), bp=True),
    "s at 4 times the rate": Lever(groups=scaled(s=4.0), bp=True),
    "s at a quarter of the rate": Lever(groups=scaled(s=0.25), bp=True),
    "feedback at 4 times the rate": Lever(groups=scaled(feedback=4.0)),
    "feedback at a quarter of the rate": Lever(groups=scaled(feedback=0.25)),
    "U, V turned by equal angles": Lever(groups=by_angle(128.0), bp=True),
    "U, V turned by equal angles, a quarter": Lever(groups=by_angle(8.0), bp=True),
    "tangent-space step": Lever(prepare=tangent_steps, bp=True),
    "polar retraction": Lever({"retraction": "polar"}, bp=True),
    "decay of the product (of s) 0.05": Lever(
        {"weight_decay": 0.05},
        groups=lambda p, kind: {} if kind == "s" else {"weight_decay": 0.0}, bp=True,
    ),
    "decay of all factors 0.05": Lever({"weight_decay": 0.05}, bp=True),
    "orthogonal init, flat spectrum": Lever(weights=flat_spectrum, bp=True),
    "decaying spectrum": Lever(weights=decaying_spectrum, bp=True),
    "spatial scheme": Lever({"scheme": "spatial"}, bp=True),
    "rank 0.8": Lever({"rank": 0.8}, bp=True),
    "classifier factored": Lever({"factor_classifier": True}, bp=True),
    "rank 0.8, cut while training": Lever(
        {"rank": 0.8, "rank_energy": 0.9, "rank_freeze": 5}, bp=True
    ),
    "half the parameters by the third epoch": Lever(
        {"rank_parameters": 0.5, "rank_warmup": 1, "rank_freeze": 3, "rank_min": 1}, bp=True
    ),
    "units of three blocks, horizon 2, from rank 0.8 to half the parameters": Lever(
        {**LARGE, **HALVED}
    ),
    "from rank 0.8 to half the parameters": Lever(HALVED, bp=True),
    **{
        f"{units}from rank 0.8 to half the parameters, maps widened to {wide}": Lever(
            {**changes, **HALVED, "options": {"widen": wide}}
        )
        for units, changes in (
            ("horizon 4, ", {"horizon": 4}),
            ("units of two blocks, horizon 1, ", {"units": 2, "horizon": 1}),
            ("units of two blocks, horizon 2, ", {**LARGE, "units": 2}),
            ("units of four blocks, horizon 0, ", {"units": 4, "horizon": 0}),
            ("units of five blocks, horizon 0, ", {"units": 5, "horizon": 0}),
            ("units of six blocks, horizon 0, ", {"units": 6, "horizon": 0}),
            ("units of eight blocks, horizon 0, ", {"units": 8, "horizon": 0}),
            ("units of three blocks, horizon 1, ", {**LARGE, "horizon": 1}),
            ("units of three blocks, horizon 2, ", LARGE),
        )
        for wide in (32, 64, 96)
    },
    "units of five blocks, horizon 0, from rank 0.8 to half the parameters, "
    "maps widened to 64 on a raster of 2": Lever(
        {"units": 5, "horizon": 0, **HALVED, "options": {"widen": 64, "grid": 2}}
    ),
    "units of three blocks, horizon 2, alignment 1": Lever(
        {**LARGE, "options": {"alpha": 1.0}}
    ),
    "units of three blocks, horizon 2, rank 0.8": Lever({**LARGE, "rank": 0.8}),
    "rank 0.8, cut to 0.31 early": Lever({**SHRINKING, "rank_warmup": 1}, bp=True),
    "rank 0.8, cut to 0.31": Lever({**SHRINKING, "rank_warmup": 3}, bp=True),
    "label smoothing 0.1": Lever({"label_smoothing": 0.1}, bp=True),
    "batches of 64": Lever({"batch_size": 64}, bp=True),
    "SGD with momentum, 0.05": Lever({"optimizer": "sgd", "lr": 0.05}, bp=True),
    # feedback and losses
    "horizon 0": Lever({"horizon": 0}),
    "horizon 2": Lever({"horizon": 2}),
    "horizon 4": Lever({"horizon": 4}),
    "units of two blocks": Lever({"units": 2}),
    "units of three blocks": Lever({"units": 3}),
    "units of three blocks, horizon 2": Lever(LARGE),
    "units of two blocks, horizon 2": Lever({"units": 2, "horizon": 2}),
    "units of four blocks, horizon 2": Lever({"units": 4, "horizon": 2}),
    "raster 1": Lever({"options": {"grid": 1}}),
    "raster 2": Lever({"options": {"grid": 2}}),
    "raster 8": Lever({"options": {"grid": 8}}),
    "feedback of rank 64": Lever({"options": {"feedback_rank": 64}}),
    "feedback of rank 32": Lever({"options": {"feedback_rank": 32}}),
    "feedback of rank 16": Lever({"options": {"feedback_rank": 16}}),
    "at most 1024 features": Lever(rule=changed(FewFeaturesSSA)),
    "at most 1024 features, feedback of rank 64": Lever(
        {"options": {"feedback_rank": 64}}, rule=changed(FewFeaturesSSA)
    ),
    "maps widened to 64": Lever({"options": {"widen": 64}}),
    "no alignment": Lever({"options": {"alpha": 0.0}}),
    "alignment 1": Lever({"options": {"alpha": 1.0}}),
    "alignment 16": Lever({"options": {"alpha": 16.0}}),
    "similarity of pooled maps": Lever(rule=changed(PooledSimilaritySSA)),
    "similarity less the batch's mean where there is no space": Lever(
        rule=changed(CentredSimilaritySSA)
    ),
    "normalised teaching signals": Lever(rule=changed(NormalisedSSA)),
    "B from class means": Lever(prepare=warm_started),
    "auxiliary hidden layer": Lever(rule=changed(AuxiliarySSA)),
    "successor counts twice": Lever(**growing(2.0)),
    "successor counts 4 times": Lever(**growing(4.0)),
    "successor counts 4 times, horizon 2": Lever({"horizon": 2}, **growing(4.0)),
    "successor counts 16 times": Lever(**growing(16.0)),
    "output error, learned B": Lever({"error": "output"}),
    "output and local error mixed": Lever({"error": "output"}, rule=changed(MixedErrorSSA)),
    "output error, fixed B": Lever({"error": "output", "options": {"learn": False}}),
    "output error, B follows the Jacobian": Lever(
        {"error": "output", "options": {"learn": False}}, prepare=FollowingJacobian()
    ),
}  # fmt: skip


def applies(lever: Lever, method: Method) -> bool:
    """Whether there is something to change: BP has no feedback, dense weights have no rank."""
    of_factors = any(name.startswith(("rank", "factor")) for name in lever.changes)
    return (method.rule != "bp" or lever.bp) and (method.factored or not of_factors)


def trainer(lever: Lever, config: RunConfig, data: ImageData) -> Trainer:
    model = build_model(config, data)
    torch.manual_seed(config.seed)
    lever.weights(model)

    def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        kind = kinds(model, parameters)
        return [{"params": [p], **lever.groups(p, kind[p])} for p in parameters]

    rule = lever.rule(make_rule(config))
    learner = build_learner(config, data, model, rule=rule, groups=groups)
    lever.prepare(learner, config, data)
    return Trainer(config, data, learner)


def runs(method: str, name: str, job: JobConfig, lr: float, seeds: int) -> list[Run]:
    lever = LEVERS[name]
    folder = re.sub(r"\W+", "-", f"{method}-{lr:g}-{name}")
    return [
        Run(
            f"{folder}-seed{seed}",
            method_config(method, job, seed=seed, lr=lr, settings=lever.changes),
            f"{METHODS[method].label}, {name}",
            make=partial(trainer, lever),
        )
        for seed in range(seeds)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML of the job")
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/levers.json"))
    parser.add_argument("--runs", type=Path, default=Path("runs/levers"), help="folder of the runs")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-2])
    parser.add_argument("--methods", nargs="+", default=["ssa", "bp"])
    parser.add_argument("--levers", nargs="+", default=list(LEVERS), help="of these")
    options = parser.parse_args()
    given = yaml.safe_load(options.config.read_text())
    machine = {"data_dir": options.data_dir, "threads": options.threads}
    job = from_dict(JobConfig, {**given, **machine})
    points = {
        (method, name, lr): runs(method, name, job, lr, options.seeds)
        for lr in options.lr
        for method in options.methods
        for name in options.levers
        if applies(LEVERS[name], METHODS[method])
    }
    sweep = Sweep(options.runs, itertools.chain(*points.values()), kind="levers")
    sweep.top.write_config(to_yaml(job))
    rows = read_json(options.out)["rows"] if options.out.exists() else []
    known = {(row["method"], row["lever"], row["lr"]) for row in rows}
    with PlainProgress(Console(), sweep.pending) as progress:
        for (method, name, lr), mine in points.items():
            if (method, name, lr) in known:
                continue
            found = [r["accuracy"] for r in sweep.run(mine, progress=progress).values()]
            made = provenance("cpu")
            row = {"method": method, "label": METHODS[method].label, "lever": name, "lr": lr}
            row |= {"accuracies": found, "command": made["command"], "git": made["git"]}
            rows.append(row)
            print(f"{method:4} {lr:g} {name:40} {100 * statistics.mean(found):.2f}", flush=True)
            write_json(options.out, {"job": dataclasses.asdict(job), "rows": rows, **made})


if __name__ == "__main__":
    main()
