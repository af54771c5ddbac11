"""What each figure and table is: methods, networks, data and budgets, nothing about how it is run.

Source: arXiv 2510.25594. Its figures and tables were not available to us: what they show is taken
from its abstract and from what its method implies, and ``shows`` says what ours do.

Scales: ``smoke`` takes under a minute each on the embedded images, ``cpu`` up to two hours on two
cores, ``full`` the whole of the data sets for as long as such networks are usually trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..methods import METHODS, Method
from ..profile import ProfileConfig

__all__ = ["EXPERIMENTS", "SCALES", "Drawing", "Experiment", "Scale", "Variant"]

Scale = Literal["smoke", "cpu", "full"]
SCALES: tuple[Scale, ...] = ("smoke", "cpu", "full")
Drawing = Literal["layers", "units", "ranks", "costs", "table", "maps"]


@dataclass(frozen=True)
class Variant:
    """A method with changes to the job: one line of a figure, one row of a table.

    ``setting``: which network on which data, where an experiment has several, or which map.
    ``curve``, ``x``, ``y``: line, abscissa and ordinate, where it is a point of a figure.
    ``smoke``: whether it is part of that scale.
    """

    method: Method
    changes: Mapping[str, Any] = field(default_factory=dict)
    setting: str = ""
    curve: str = ""
    x: float | None = None
    y: float | None = None
    smoke: bool = True

    def label(self, experiment: Experiment) -> str:
        """What tells it from the others of ``experiment``: setting, method and rank, or the point
        of a map, whose axes change the one method that it is of."""
        axes = experiment.axes.get(self.setting, ("rank", ""))
        point = [
            f"{axis} {value:g}"
            for axis, value in zip(axes, (self.x, self.y), strict=True)
            if value is not None
        ]
        method = [self.method.label] if self.y is None else []
        return ", ".join([*[self.setting] * bool(self.setting), *method, *point])


@dataclass(frozen=True)
class Experiment:
    """``shows``: what is to be seen, in plain words. ``job``: by scale, what all variants share.

    ``group``: experiments of one group share their runs. ``angles``: measure them at epoch ends.
    ``seeds``: how many, by scale. ``costs``: profiles in place of runs, by scale. ``axes``: names
    of x and y, by setting.
    """

    title: str
    shows: str
    drawing: Drawing
    job: Mapping[Scale, Mapping[str, Any]] = field(default_factory=dict)
    variants: Mapping[str, Variant] = field(default_factory=dict)
    group: str = ""
    angles: bool = False
    seeds: Mapping[Scale, int] = field(default_factory=lambda: {"smoke": 1, "cpu": 2, "full": 3})
    costs: Mapping[Scale, Mapping[str, ProfileConfig]] = field(default_factory=dict)
    axes: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def _method(name: str, label: str | None = None, **options: Any) -> Method:
    """A named method with other options of its rule."""
    method = METHODS[name]
    return dataclasses.replace(
        method, label=label or method.label, options={**method.options, **options}
    )


def _job(smoke: Mapping[str, Any], **larger: Any) -> dict[Scale, Mapping[str, Any]]:
    """``smoke`` sizes on a few embedded images; ``larger`` holds for both of the others."""
    few = {"train_limit": 256, "test_limit": 200, "epochs": 2, "batch_size": 64}
    cifar = {"data": "cifar10", "augment": ["crop", "flip"], **larger}
    return {
        "smoke": {**few, **smoke},
        "cpu": {**cifar, "train_limit": 10_000, "image_size": 16, "epochs": 8},
        "full": {**cifar, "epochs": 100},
    }


SMALLCONV = _job({"model": "smallconv", "width": 0.25}, model="smallconv")
VGG8 = _job({"model": "vgg8", "width": 0.06, "image_size": 16}, model="vgg8", width=0.25)
RESNET = _job(
    {"model": "resnet20", "width": 0.25, "image_size": 12}, model="resnet20", precision="bf16"
)

# --- figures ------------------------------------------------------------------------------------

ANGLES = {
    name: Variant(METHODS[name])
    for name in ("dfa", "ssa-reconstruction", "ssa-output", "ssa-local", "ssa-1", "ssa")
}

_SHRINKING = {"rank_energy": 0.95, "rank_ratio": 0.8, "rank_min": 4}


def _ranks() -> dict[str, Variant]:
    variants = {
        f"{name}-{rank:g}": Variant(
            METHODS[name], {"rank": rank}, curve=METHODS[name].label, x=rank
        )
        for name in ("bp", "dfa", "ssa")
        for rank in (0.1, 0.2, 0.35, 0.5, 0.75)
    }
    shrinking = _method("ssa", f"{METHODS['ssa'].label}, rank reduced while training")
    return {**variants, "ssa-shrinking": Variant(shrinking, _SHRINKING, curve=shrinking.label)}


def _costs(size: Mapping[str, Any], large: Mapping[str, str]) -> dict[str, ProfileConfig]:
    """One network measured, others worked out."""
    configs = {"VGG-13": ProfileConfig(model="vgg13", rank=0.25, units="layer", **size)}
    for label, model in large.items():
        configs[label] = ProfileConfig(
            model=model, rank=0.25, image_size=224, classes=1000, batch_size=256, estimate=True
        )
    return configs


_LARGE = {
    "ResNet-50": "resnet50", "ResNet-101": "resnet101", "ViT-B/16": "vit_b16", "ViT-L/16": "vit_l16"
}  # fmt: skip

# --- tables -------------------------------------------------------------------------------------


def _deeper() -> dict[str, Variant]:
    data: dict[str, dict[str, Any]] = {
        "CIFAR-10": {},
        "CIFAR-100": {"data": "cifar100"},
        "image folder": {"data": "folder", "image_size": 32},
    }
    names = ("bp-dense", "bp", "dfa", "ssa-local", "ssa-1", "ssa")
    methods: dict[str, tuple[Method, dict[str, Any]]] = {
        name: (METHODS[name], {}) for name in names
    }
    # Early blocks of a residual network are too narrow to be taught one by one.
    larger = _method("ssa", f"{METHODS['ssa'].label}, units of 3 blocks")
    return {
        f"{model}-{changes.get('data', 'cifar10')}-{name}": Variant(
            method, {"model": model, **changes, **units}, f"{label}, {where}", smoke=not changes
        )
        for where, changes in data.items()
        for label, model, rows in (
            ("VGG-13", "vgg13", methods),
            ("ResNet-32", "resnet32", {**methods, "ssa-larger": (larger, {"units": 3})}),
        )
        for name, (method, units) in rows.items()
    }


# The terms that SSA adds to an error brought by feedback, one by one, for DFA and BP too: a
# comparison of SSA with DFA as such is one of feedback and of loss at once. Where factors are kept
# orthonormal by a retraction, as they are elsewhere, a penalty on them has nothing to do.
def _ablation() -> dict[str, Variant]:
    loose = {"retraction": None}
    fixed: dict[str, Any] = {"error": "output", "learn": False, "horizon": 0}
    # At the raster and the rate that DFA was tuned to; a search for it found the same.
    similarity = dataclasses.replace(
        _method("ssa-output", "task + similarity", **fixed, **METHODS["dfa"].options),
        lr=METHODS["dfa"].lr,
    )
    ssa: dict[str, tuple[str, dict[str, Any]]] = {
        "task": ("task", {"alpha": 0.0}),
        "similarity": ("task + similarity", {}),
        "coarse": ("task, raster 1", {"alpha": 0.0, "grid": 1}),
        # Its share is constant on a finer raster, where the feedback spans all channels.
        "share": (
            "task, raster 1 + subspace share",
            {"alignment": "share", "alpha": 1.0, "grid": 1},
        ),
        "cosine": ("task + cosine", {"alignment": "cosine", "alpha": 1.0}),
        "hoyer": ("task + similarity + Hoyer sparsity", {"gamma": 1e-3}),
    }
    methods = {
        **{f"ssa-{key}": _method("ssa", label, **options) for key, (label, options) in ssa.items()},
        "dfa-task": _method("dfa", "task"),
        "dfa-similarity": similarity,
        "bp-task": _method("bp", "task"),
    }
    settings = {name: METHODS[name].label for name in ("ssa", "dfa", "bp")}
    variants = {
        key: Variant(method, setting=settings[key.partition("-")[0]])
        for key, method in methods.items()
    }
    for key in ("ssa-similarity", "dfa-similarity", "bp-task"):
        variant = variants[key]
        for name, label, beta in (
            ("loose", ", no retraction", 0.0),
            ("ortho", " + orthogonality, no retraction", 0.1),
        ):
            method = dataclasses.replace(
                variant.method,
                label=variant.method.label + label,
                options={**variant.method.options, "beta": beta},
            )
            variants[f"{key}-{name}"] = Variant(method, loose, variant.setting)
    return dict(
        sorted(variants.items(), key=lambda item: list(settings).index(item[0].partition("-")[0]))
    )


def _feedback() -> dict[str, Variant]:
    methods = {
        "bp": METHODS["bp"],
        "fa": METHODS["fa"],
        "sign": Method("Sign-symmetric", "sign-symmetric", lr=METHODS["fa"].lr),
        "dfa": METHODS["dfa"],
        "drtp": METHODS["drtp"],
    }
    for error, learns in (("output", (False,)), ("target", (False,)), ("local", (False, True))):
        for learn in learns:
            label = f"SSA, {error} error, {'learned' if learn else 'fixed'} B, horizon 0"
            key = f"ssa-{error}-{'learned' if learn else 'fixed'}"
            methods[key] = _method("ssa", label, error=error, learn=learn, horizon=0)
    for horizon in (1, 2, 4):
        label = f"SSA, local error, learned B, horizon {horizon}"
        methods[f"ssa-horizon-{horizon}"] = _method("ssa", label, horizon=horizon)
    return {name: Variant(method) for name, method in methods.items()}


# --- sensitivity --------------------------------------------------------------------------------

_AXES = {
    "learning rate and alignment": ("learning rate", "α"),
    "horizon and alignment": ("horizon", "α"),
    "raster and rank of the feedback": ("grid", "k"),
    "orthogonality by penalty alone": ("learning rate", "β"),
}


def _sensitivity() -> dict[str, Variant]:
    """A decade around each default of ``ssa``, two settings at a time."""
    rates, alphas = (3e-3, 1e-2, 3e-2), (1.25, 4.0, 12.5)
    grids: dict[str, list[tuple[float, float, Method, dict[str, Any]]]] = {
        "learning rate and alignment": [
            (lr, alpha, dataclasses.replace(_method("ssa", alpha=alpha), lr=lr), {})
            for lr in rates
            for alpha in alphas
        ],
        "horizon and alignment": [
            (horizon, alpha, _method("ssa", alpha=alpha, horizon=horizon), {})
            for horizon in (0, 1, 2, 3)
            for alpha in alphas
        ],
        "raster and rank of the feedback": [
            (grid, k, _method("ssa", grid=grid, feedback_rank=k), {})
            for grid in (1, 2, 4, 8)
            for k in (1, 3, 10)
        ],
        "orthogonality by penalty alone": [
            (lr, beta, dataclasses.replace(_method("ssa", beta=beta), lr=lr), {"retraction": None})
            for lr in rates
            for beta in (0.01, 0.03, 0.1)
        ],
    }
    return {
        f"{_AXES[setting][0]}-{x:g}-{_AXES[setting][1]}-{y:g}".replace(" ", "-"): Variant(
            method, changes, setting, x=x, y=y, smoke=i % 5 == 0
        )
        for setting, points in grids.items()
        for i, (x, y, method, changes) in enumerate(points)
    }


EXPERIMENTS: dict[str, Experiment] = {
    "fig2": Experiment(
        "Angle between the rule's gradient and backpropagation's",
        "Per layer, in the tangent space of the weight, over training. Below 90° an update goes "
        "downhill on the global loss as far as that layer is concerned; 90° is chance.",
        "layers", VGG8, ANGLES, group="alignment", angles=True,
    ),
    "fig3": Experiment(
        "Angle between the feedback and the forward path",
        "Per unit, between the matrix that brings errors back and the transposed Jacobian of the "
        "logits, over training. 90° is chance; feedback that is learned can turn towards the path.",
        "units", VGG8, ANGLES, group="alignment", angles=True,
    ),
    "fig4": Experiment(
        "Accuracy against rank",
        "Test accuracy at fixed ranks, and the ranks of a run that cuts them while it trains.",
        "ranks", SMALLCONV, _ranks(),
    ),
    "fig5": Experiment(
        "Memory, arithmetic and time of a training step",
        "A VGG on 32 pixels is measured (128 images a step); the others, which take 224 pixels, "
        "1000 classes and 256 images a step, are worked out without running them.",
        "costs",
        costs={
            "smoke": {
                "VGG-8": ProfileConfig(
                    model="vgg8", width=0.125, image_size=16, batch_size=16, units="layer",
                    rank=1 / 3, seconds=2.0,
                )
            },
            "cpu": _costs({"seconds": 120.0}, _LARGE),
            "full": _costs({"seconds": 120.0}, _LARGE),
        },
    ),
    "table1": Experiment(
        "Methods on SmallConv",
        "All methods on one small network, data and budget.",
        "table", SMALLCONV, {name: Variant(method) for name, method in METHODS.items()},
        seeds={"smoke": 1, "cpu": 3, "full": 5},
    ),
    "table2": Experiment(
        "Deeper networks",
        "VGG-13 and ResNet-32 on CIFAR-10, on CIFAR-100 and on a folder of images; at scale cpu "
        "half as wide.",
        "table",
        {
            **(deeper := _job({}, precision="bf16")),
            "cpu": {**deeper["cpu"], "width": 0.5},
            "smoke": {
                "width": 0.06, "image_size": 12, "train_limit": 128, "test_limit": 100,
                "epochs": 1, "batch_size": 64,
            },
        },
        _deeper(), seeds={"smoke": 1, "cpu": 1, "full": 3},
    ),
    "table3": Experiment(
        "Loss terms",
        "Each term of the composite loss on its own and together, for SSA; the same terms given to "
        "DFA and to backpropagation.",
        "table", SMALLCONV, _ablation(), seeds={"smoke": 1, "cpu": 3, "full": 5},
    ),
    "table4": Experiment(
        "Feedback",
        "How errors come back: rules, sources of the error, fixed or learned feedback, horizons.",
        "table", RESNET, _feedback(),
    ),
    "sensitivity": Experiment(
        "Sensitivity to the settings",
        "Test accuracy of SSA on SmallConv over a decade of each setting, two at a time, the "
        "others at their defaults: learning rate 0.01, α 4, horizon 2, grid 4, k 10, retraction.",
        "maps", SMALLCONV, _sensitivity(), axes=_AXES,
        seeds={"smoke": 1, "cpu": 1, "full": 3},
    ),
}  # fmt: skip
