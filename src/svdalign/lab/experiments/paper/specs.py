"""What each figure and table is: methods, networks, data and budgets, nothing about how it is run.

Source: arXiv 2510.25594. Of its figures the captions are known, of its tables what its abstract
says of them; ``shows`` says what ours do. Experiments by other names are this project's own.

Scales: ``smoke`` takes under a minute each on the embedded images, ``cpu`` up to two hours on two
cores, ``full`` the whole of the data sets for as long as such networks are usually trained.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...methods import METHODS, Method
from ..profile import ProfileConfig
from ..variants import Variant

Scale = Literal["smoke", "cpu", "full"]
SCALES: tuple[Scale, ...] = ("smoke", "cpu", "full")
Drawing = Literal["angles", "layers", "units", "errors", "drift", "ranks", "costs", "table", "maps"]


@dataclass(frozen=True)
class Row(Variant):
    """A variant as one row of a table, or one line or point of a figure.

    ``setting``: the network and the data, if an experiment has several, or the name of a map.
    ``curve``, ``x``, ``y``: line, abscissa and ordinate, where it is a point of a figure.
    ``smoke``: whether it is part of that scale.
    """

    setting: str = ""
    curve: str = ""
    x: float | None = None
    y: float | None = None
    smoke: bool = True

    def label_in(self, experiment: Experiment) -> str:
        """A label that no other row of ``experiment`` has: setting, method and rank, or the point
        of a map, which shows one method."""
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
    """``shows``: what the figure or table shows, in plain words. ``job``: the settings that all
    variants share, by scale.

    ``group``: experiments of one group share their runs. ``angles``: measure angles to
    backpropagation at the ends of epochs. ``seeds``: how many, by scale. ``costs``: profiles in
    place of runs, by scale. ``axes``: names of x and y, by setting.
    """

    title: str
    shows: str
    drawing: Drawing
    job: Mapping[Scale, Mapping[str, Any]] = field(default_factory=dict)
    variants: Mapping[str, Row] = field(default_factory=dict)
    group: str = ""
    angles: bool = False
    seeds: Mapping[Scale, int] = field(default_factory=lambda: {"smoke": 1, "cpu": 2, "full": 3})
    costs: Mapping[Scale, Mapping[str, ProfileConfig]] = field(default_factory=dict)
    axes: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def _method(name: str, label: str = "", lr: float = 0.0, **options: Any) -> Method:
    """A named method under another label, at another rate, with other options of its rule."""
    method = METHODS[name]
    return dataclasses.replace(
        method,
        label=label or method.label,
        lr=lr or method.lr,
        options={**method.options, **options},
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


def _short(jobs: Mapping[Scale, Mapping[str, Any]], **cpu: Any) -> dict[Scale, Mapping[str, Any]]:
    """``jobs`` with half as many images at scale cpu, and with other smaller settings there."""
    half = {"train_limit": 5_000, "test_limit": 5_000, **cpu}
    return {**jobs, "cpu": {**jobs["cpu"], **half}}


_SMALLCONV = _job({"model": "smallconv", "width": 0.25}, model="smallconv")
MLP = _short(_job({"model": "mlp", "width": 0.25, "rank": 0.25}, model="mlp", rank=0.25), width=0.5)
_LOW_RANK_JOB = _short({**_SMALLCONV, "smoke": MLP["smoke"]}, width=0.5)
_VGG8 = _job({"model": "vgg8", "width": 0.06, "image_size": 16}, model="vgg8", width=0.25)
_RESNET32 = _short(
    _job(
        {"model": "resnet32", "width": 0.25, "image_size": 12, "train_limit": 128,
         "test_limit": 100, "rank": 1 / 3},
        model="resnet32", rank=1 / 3,
    ),
    width=0.25, epochs=6,
)  # fmt: skip

#: How the paper seems to run its method, beside the rule itself.
_RECONSTRUCTION: Mapping[str, Any] = {"scheme": "spatial", "units": "layer", "retraction": None}

# --- figures ------------------------------------------------------------------------------------

# Of each method the best of five, by benchmarks/configs/perceptron_search.yaml.
_MLP_RATES = {"bp-dense": 1.7e-3, "dfa-dense": 1.7e-3, "ssa-reconstruction": 3e-3, "ssa-2": 1e-2}
# Of each method the best of six, by benchmarks/configs/resnet32_search.yaml.
_RESNET32_RATES = {"ssa-reconstruction": 5.7e-3, "dfa-dense": 0.03, "bp-dense": 1.7e-2}


#: What a method changes of the job.
_OWN: Mapping[str, Mapping[str, Any]] = {
    "ssa-reconstruction": _RECONSTRUCTION,
    "dfa-dense": {"units": "layer"},
}


def _searched(rates: Mapping[str, float]) -> dict[str, Row]:
    return {name: Row(_method(name, lr=lr), _OWN.get(name, {})) for name, lr in rates.items()}


PERCEPTRON, DEEP = _searched(_MLP_RATES), _searched(_RESNET32_RATES)

_ANGLES = {name: Row(METHODS[name]) for name in ("dfa", "ssa-output", "ssa", "ssa-1", "ssa-2")}


def _drift() -> dict[str, Row]:
    """The reconstruction with each way to keep its factors orthonormal."""
    name, retractions = "ssa-reconstruction", ("qr", "polar", "newton-schulz")
    labels = ("QR retraction", "polar retraction", "Newton–Schulz retraction")
    ways: list[tuple[str, str, float, str | None]] = [
        ("penalty-0", "nothing", 0.0, None),
        *((f"penalty-{beta:g}", f"penalty, β = {beta:g}", beta, None) for beta in (0.1, 1.0)),
        *((how, label, 0.0, how) for how, label in zip(retractions, labels, strict=True)),
    ]
    return {
        key: Row(
            _method(name, label, _MLP_RATES[name], beta=beta),
            {**_RECONSTRUCTION, "retraction": retraction},
        )
        for key, label, beta, retraction in ways
    }


_SHRINKING = {"rank_energy": 0.95, "rank_ratio": 0.8, "rank_min": 4}


def _ranks() -> dict[str, Row]:
    variants = {
        f"{name}-{rank:g}": Row(METHODS[name], {"rank": rank}, curve=METHODS[name].label, x=rank)
        for name in ("bp", "dfa", "ssa-2")
        for rank in (0.1, 0.2, 0.35, 0.5, 0.75)
    }
    shrinking = _method("ssa-2", f"{METHODS['ssa-2'].label}, rank reduced while training")
    return {**variants, "ssa-shrinking": Row(shrinking, _SHRINKING, curve=shrinking.label)}


_COSTS = ["bp-dense", "bp-dense-checkpointed", "bp", "dfa-dense", "ssa-reconstruction", "ssa-2"]

#: The skips of a transformer start inside its first layer, so that its layers cannot be units.
_UNITS = {"ViT-B/16, 224 px": {"units": "block"}}


def _costs(networks: Mapping[str, Mapping[str, Any]]) -> dict[str, ProfileConfig]:
    """All computed without running: memory and arithmetic of a step do not depend on the
    machine."""
    return {
        label: ProfileConfig(
            rank=0.25, estimate=True, methods=_COSTS,
            settings={"ssa-reconstruction": {**_RECONSTRUCTION, **_UNITS.get(label, {})}},
            **network,
        )
        for label, network in networks.items()
    }  # fmt: skip


_LARGE: dict[str, Any] = {"image_size": 224, "classes": 1000, "batch_size": 256}
_NETWORKS: dict[str, dict[str, Any]] = {
    "3-layer MLP": {"model": "mlp"},
    "SmallConv": {"model": "smallconv"},
    "VGG-13": {"model": "vgg13"},
    "ResNet-32": {"model": "resnet32"},
    "MobileNetV1": {"model": "mobilenet_v1"},
    "MobileNetV1, 224 px": {"model": "mobilenet_v1", **_LARGE},
    "ResNet-50, 224 px": {"model": "resnet50", **_LARGE},
    "ResNet-101, 224 px": {"model": "resnet101", **_LARGE},
    "ViT-B/16, 224 px": {"model": "vit_b16", **_LARGE},
}


# --- tables -------------------------------------------------------------------------------------


def _deeper() -> dict[str, Row]:
    data: dict[str, dict[str, Any]] = {
        "CIFAR-10": {},
        "CIFAR-100": {"data": "cifar100"},
        "image folder": {"data": "folder", "image_size": 32},
    }
    names = ("bp-dense", "bp", "dfa", "ssa", "ssa-1", "ssa-2")
    methods: dict[str, tuple[Method, dict[str, Any]]] = {
        name: (METHODS[name], {}) for name in names
    }
    # Early blocks of a residual network are too narrow to be taught one by one.
    larger = _method("ssa-2", f"{METHODS['ssa-2'].label}, units of 3 blocks")
    return {
        f"{model}-{changes.get('data', 'cifar10')}-{name}": Row(
            method, {"model": model, **changes, **units}, f"{label}, {where}", smoke=not changes
        )
        for where, changes in data.items()
        for label, model, rows in (
            ("VGG-13", "vgg13", methods),
            ("ResNet-32", "resnet32", {**methods, "ssa-larger": (larger, {"units": 3})}),
        )
        for name, (method, units) in rows.items()
    }


#: Low enough for the spatial scheme's factors not to reach all channels of a convolution.
_LOW_RANK = 0.2

_CUT = {"rank_energy": 0.95, "rank_ratio": 0.8, "rank_min": 2}
_WEIGHTS = (0.3, 1.0, 3.0)
_NAMES = {
    "against-error": "against the error", "with-error": "with the error",
    "target": "with the target", "subspace": "of subspaces",
}  # fmt: skip


#: By network, what the search below found best of each form: its rate and its weight.
_FOUND: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "mlp": {
        "against-error": (3e-3, 1.0), "with-error": (3e-3, 0.3), "target": (3e-3, 0.3),
        "subspace": (3e-3, 1.0), "none": (3e-3, 0.1), "loose": (1e-3, 3.0), "cut": (3e-3, 1e-4),
        "ours": (1e-2, 4.0),
    },
    "smallconv": {
        "against-error": (5e-3, 1.0), "with-error": (5e-3, 0.3), "target": (5e-3, 0.3),
        "subspace": (5e-3, 3.0), "none": (5e-3, 0.01), "loose": (5e-3, 0.3), "cut": (5e-3, 1e-2),
        "ours": (3e-2, 1.25),
    },
}  # fmt: skip


def _ablation() -> dict[str, Row]:
    """Each term removed, alone, and in its other forms; of the reconstruction and of our recipe."""
    return {
        f"{model}-{name}-{key}": Row(
            _method(name, label, rate, **options),
            {**_OWN.get(name, {}), "model": model, "rank": _LOW_RANK, **changes},
            f"{network}, {'our recipe' if name == 'ssa-2' else 'our reconstruction'}",
            smoke=model == "mlp",
        )
        for network, model in (("3-layer MLP", "mlp"), ("SmallConv", "smallconv"))
        for key, name, label, rate, options, changes in _terms_of(_FOUND[model])
    }


def _terms_of(
    found: Mapping[str, tuple[float, float]],
) -> list[tuple[str, str, str, float, dict[str, Any], dict[str, Any]]]:
    """Key, method, label, rate, options and changes of the job of each row of table 3. What has no
    search of its own runs at the rate of the whole loss; without orthogonality, at that of this."""
    theirs, ours = "ssa-reconstruction", "ssa-2"
    (rate, alpha), (own, weight) = found["against-error"], found["ours"]
    none, loose, cut = found["none"], found["loose"], found["cut"]
    whole = {"alpha": alpha}
    return [
        ("all", theirs, f"all terms, alignment {_NAMES['against-error']}", rate, whole, {}),
        ("no-alignment", theirs, "without alignment", none[0], {"alpha": 0.0, "beta": none[1]}, {}),
        ("no-orthogonality", theirs, "without orthogonality", loose[0],
         {"alpha": loose[1], "beta": 0.0}, {}),
        ("no-task", theirs, "without task", rate, {**whole, "task": 0.0}, {}),
        ("task", theirs, "task alone", loose[0], {"alpha": 0.0, "beta": 0.0}, {}),
        ("alignment", theirs, "alignment alone", loose[0],
         {"alpha": loose[1], "task": 0.0, "beta": 0.0}, {}),
        ("orthogonality", theirs, "orthogonality alone", rate, {"task": 0.0, "alpha": 0.0}, {}),
        ("qr", theirs, "QR in place of the penalty", rate, {**whole, "beta": 0.0},
         {"retraction": "qr"}),
        *(
            (form, theirs, f"all terms, alignment {name}", found[form][0],
             {"alignment": form, "alpha": found[form][1]}, {})
            for form, name in _NAMES.items()
            if form != "against-error"
        ),
        ("cut", theirs, "all terms + Hoyer, ranks cut by epoch and energy", cut[0],
         {"gamma": cut[1]}, _CUT),
        ("all", ours, "all terms: similarity, QR", own, {"alpha": weight}, {}),
        ("no-alignment", ours, "without alignment", own, {"alpha": 0.0}, {}),
        ("no-orthogonality", ours, "without orthogonality", own, {"alpha": weight},
         {"retraction": None}),
        ("task", ours, "task alone", own, {"alpha": 0.0}, {"retraction": None}),
        ("penalty", ours, "a penalty in place of QR", own, {"alpha": weight, "beta": 0.1},
         {"retraction": None}),
        ("fixed", ours, "fixed feedback", own, {"alpha": weight, "learn": False}, {}),
        ("local", ours, "horizon 0", own, {"alpha": weight, "horizon": 0}, {}),
        ("cut", ours, "all terms + Hoyer, ranks cut by epoch and energy", own,
         {"alpha": weight, "gamma": 1e-3}, _CUT),
    ]  # fmt: skip


# The terms that SSA adds to an error brought by feedback, one by one, for DFA and BP too: a
# comparison of SSA with DFA as such is one of feedback and of loss at once. Where factors are kept
# orthonormal by a retraction, as they are elsewhere, a penalty on them has nothing to do.
def _terms() -> dict[str, Row]:
    ssa: dict[str, tuple[str, dict[str, Any]]] = {
        "task": ("task", {"alpha": 0.0}),
        "similarity": ("task + similarity", {}),
        "coarse": ("task, grid 1", {"alpha": 0.0, "grid": 1}),
        # Its share is constant on a finer grid, where the feedback spans all channels.
        "share": (
            "task, grid 1 + subspace share",
            {"alignment": "share", "alpha": 1.0, "grid": 1},
        ),
        "cosine": ("task + cosine", {"alignment": "cosine", "alpha": 1.0}),
        "hoyer": ("task + similarity + Hoyer sparsity", {"gamma": 1e-3}),
    }
    # At the grid and the rate that DFA was tuned to; a search for it found the same.
    as_dfa: dict[str, Any] = {"error": "output", "learn": False, "horizon": 0}
    as_dfa |= METHODS["dfa"].options
    methods = {
        "ssa-2": {key: _method("ssa-2", label, **options) for key, (label, options) in ssa.items()},
        "dfa": {
            "task": _method("dfa", "task"),
            "similarity": _method("ssa-output", "task + similarity", METHODS["dfa"].lr, **as_dfa),
        },
        "bp": {"task": _method("bp", "task")},
    }
    rows: dict[str, Row] = {}
    for name, mine in methods.items():
        setting = METHODS[name].label
        rows |= {f"{name}-{key}": Row(method, setting=setting) for key, method in mine.items()}
        key = "similarity" if "similarity" in mine else "task"
        for way, label, beta in (
            ("loose", ", no retraction", 0.0),
            ("ortho", " + orthogonality, no retraction", 0.1),
        ):
            method = mine[key]
            options = {**method.options, "beta": beta}
            method = dataclasses.replace(method, label=method.label + label, options=options)
            rows[f"{name}-{key}-{way}"] = Row(method, {"retraction": None}, setting=setting)
    return rows


def _methods() -> dict[str, Row]:
    """Every method on SmallConv, at the best of the rates that benchmarks/configs/search.yaml tried
    for it."""
    return {name: Row(method, _OWN.get(name, {})) for name, method in METHODS.items()}


def _feedback() -> dict[str, Row]:
    """What brings errors back: transposed weights or their signs, fixed matrices, learned ones."""
    fixed = {"horizon": 0, "learn": False}
    rows = {
        "ssa-output-fixed": _method("ssa-output", "SSA, output error, fixed B", 5e-3, **fixed),
        "ssa-target": _method(
            "ssa", "SSA, target error, fixed B", 5e-3, error="target", learn=False
        ),
        "ssa-fixed": _method("ssa", "SSA, local error, fixed B", 1e-2, learn=False),
    }
    methods = _methods()
    whole = ("bp", "fa", "sign-symmetric", "brsf", "dfa", "drtp")
    return {
        **{name: methods[name] for name in whole},
        **{name: Row(method) for name, method in rows.items()},
        **{name: methods[name] for name in ("ssa", "ssa-1", "ssa-2")},
    }


# --- sensitivity --------------------------------------------------------------------------------

_RATES, _ALPHAS = (3e-3, 1e-2, 3e-2), (1.25, 4.0, 12.5)

#: By map: two settings of ``ssa-2``, each with the values that it takes, a decade around its
#: default; the method of a point; what else the map changes of the job.
_MAPS: dict[
    str,
    tuple[
        tuple[str, Sequence[float]],
        tuple[str, Sequence[float]],
        Callable[[Any, Any], Method],
        dict[str, Any],
    ],
] = {
    "learning rate and alignment": (
        ("learning rate", _RATES), ("α", _ALPHAS),
        lambda x, y: _method("ssa-2", lr=x, alpha=y), {},
    ),
    "horizon and alignment": (
        ("horizon", (0, 1, 2, 3)), ("α", _ALPHAS),
        lambda x, y: _method("ssa-2", horizon=x, alpha=y), {},
    ),
    "grid and rank of the feedback": (
        ("grid", (1, 2, 4, 8)), ("k", (1, 3, 10)),
        lambda x, y: _method("ssa-2", grid=x, feedback_rank=y), {},
    ),
    "orthogonality by penalty alone": (
        ("learning rate", _RATES), ("β", (0.01, 0.03, 0.1)),
        lambda x, y: _method("ssa-2", lr=x, beta=y), {"retraction": None},
    ),
}  # fmt: skip


def _sensitivity() -> dict[str, Row]:
    return {
        f"{x_name}-{x:g}-{y_name}-{y:g}".replace(" ", "-"): Row(
            method(x, y), changes, setting=setting, x=x, y=y, smoke=i % 5 == 0
        )
        for setting, ((x_name, xs), (y_name, ys), method, changes) in _MAPS.items()
        for i, (x, y) in enumerate(itertools.product(xs, ys))
    }


# --- search -------------------------------------------------------------------------------------


#: By network, around which rate the search of a form goes: others' best lay at the edge there.
_AROUND: Mapping[str, Mapping[str, float]] = {
    "mlp": {"": 3e-3, "no orthogonality": 1e-3, "our recipe": 1e-2},
    "smallconv": {"": 5e-3, "our recipe": 3e-2},
}


def _search() -> dict[str, Row]:
    """Five points for each form of the loss on each of two networks, a cross: a weight's three
    values at the middle rate, and the rates a third and three times of it at the middle weight."""
    forms: list[tuple[str, str, dict[str, Any], dict[str, Any], str, tuple[float, ...]]] = [
        *(
            (f"alignment {name}", "ssa-reconstruction", {"alignment": form}, {}, "alpha", _WEIGHTS)
            for form, name in _NAMES.items()
        ),
        ("no alignment", "ssa-reconstruction", {"alpha": 0.0}, {}, "beta", (0.01, 0.1, 1.0)),
        ("no orthogonality", "ssa-reconstruction", {"beta": 0.0}, {}, "alpha", _WEIGHTS),
        ("Hoyer, ranks cut", "ssa-reconstruction", {}, _CUT, "gamma", (1e-4, 1e-3, 1e-2)),
        ("our recipe", "ssa-2", {}, {}, "alpha", (1.25, 4.0, 12.5)),
    ]
    variants = {}
    for label, model in (("MLP", "mlp"), ("SmallConv", "smallconv")):
        for setting, name, options, changes, weight, (low, middle, high) in forms:
            rate = _AROUND[model].get(setting, _AROUND[model][""])
            cross = [(rate, low), (rate, middle), (rate, high)]
            cross += [(float(f"{rate / 3:.2g}"), middle), (3 * rate, middle)]
            for lr, y in cross:
                variants[f"{model}-{setting}-{lr:g}-{y:g}".replace(",", "").replace(" ", "-")] = (
                    Row(
                        _method(name, lr=lr, **{**options, weight: y}),
                        {**_OWN.get(name, {}), "model": model, "rank": _LOW_RANK, **changes},
                        f"{label}, {setting}", x=lr, y=y, smoke=y == middle and model == "mlp",
                    )
                )  # fmt: skip
    return variants


_SYMBOLS = {"no alignment": "β", "Hoyer, ranks cut": "γ"}
_SEARCH_AXES = {
    variant.setting: ("learning rate", _SYMBOLS.get(variant.setting.partition(", ")[2], "α"))
    for variant in _search().values()
}


EXPERIMENTS: dict[str, Experiment] = {
    "fig2": Experiment(
        "Angle of a rule's gradient to backpropagation's, 3-layer MLP",
        "Of the gradient as a whole, and of the hidden layers' alone, over training; 90° is "
        "chance. The output's layer is taught by the task itself under every rule. "
        "Backpropagation's own angle, which must be 0°, checks the measurement.",
        "angles", MLP, PERCEPTRON, group="perceptron", angles=True,
        seeds={"smoke": 1, "cpu": 3, "full": 5},
    ),
    "fig3": Experiment(
        "Angle to backpropagation's gradient in every layer of a ResNet-32",
        "In the tangent space of each weight, over training; 90°, where an update neither helps "
        "nor hurts, is grey. Layers are units. At scale cpu a quarter as wide, "
        "5,000 images.",
        "layers", _RESNET32, DEEP, angles=True, seeds={"smoke": 1, "cpu": 3, "full": 3},
    ),
    "fig4": Experiment(
        "Top-1 error over epochs, 3-layer MLP",
        "On test images; and the first epoch at which the mean over seeds is no more than what DFA "
        "on dense weights ends at.",
        "errors", MLP, PERCEPTRON, group="perceptron", angles=True,
        seeds={"smoke": 1, "cpu": 3, "full": 5},
    ),
    "fig5": Experiment(
        "Memory and arithmetic, of training and of inference, across networks",
        "Worked out without running, 128 images of 32 pixels a step, 256 of 224 pixels and 1000 "
        "classes for the large ones; rank 1/4. Inference is of one image, by what training leaves "
        "once it is merged into plain layers.",
        "costs",
        costs={
            "smoke": _costs({"3-layer MLP": {"model": "mlp", "width": 0.25, "image_size": 16},
                             "VGG-8": {"model": "vgg8", "width": 0.125, "image_size": 16}}),
            "cpu": _costs(_NETWORKS),
            "full": _costs(_NETWORKS),
        },
    ),
    "table1": Experiment(
        "Methods on SmallConv",
        "All methods on one small network, data and budget.",
        "table", _SMALLCONV, _methods(), group="smallconv",
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
        "Loss terms, at low rank",
        "Each term of the composite loss removed, alone, and in its other forms: of our "
        "reconstruction of the paper's method, which keeps factors orthonormal by the penalty, and "
        "of our recipe; at a fifth of full rank, at scale cpu half as wide, on 5,000 images.",
        "table", _LOW_RANK_JOB, _ablation(),
    ),
    "table4": Experiment(
        "Feedback",
        "How errors come back: rules, sources of the error, fixed or learned feedback, horizons. "
        "Runs of table 1, where they are the same.",
        "table", _SMALLCONV, _feedback(), group="smallconv",
        seeds={"smoke": 1, "cpu": 3, "full": 5},
    ),
    "drift": Experiment(
        "How far factors leave the Stiefel manifold",
        "The largest ‖XᵀX − I‖ of any factor X of a 3-layer MLP, over a whole run of our "
        "reconstruction, by what is to hold it; and the share of steps, and of their hidden "
        "layers, whose gradient has a positive inner product with backpropagation's.",
        "drift", MLP, _drift(), angles=True,
        seeds={"smoke": 1, "cpu": 3, "full": 5},
    ),
    "reconstruction": Experiment(
        "Search of rates and weights for table 3",
        "Five points for each form of the loss; accuracy on held-out training images, the test "
        "images are not looked at.",
        "maps",
        {
            "smoke": {**_LOW_RANK_JOB["smoke"], "validation": 128},
            "cpu": {**_LOW_RANK_JOB["cpu"], "train_limit": 10_000, "validation": 5_000},
            "full": {**_LOW_RANK_JOB["full"], "validation": 10_000},
        },
        _search(), axes=_SEARCH_AXES, seeds={"smoke": 1, "cpu": 1, "full": 1},
    ),
    "vgg8-angles": Experiment(
        "Angle between the rule's gradient and backpropagation's, VGG-8",
        "Per layer, in the tangent space of the weight, over training. Below 90° an update goes "
        "downhill on the global loss as far as that layer is concerned; 90° is chance.",
        "layers", _VGG8, _ANGLES, group="alignment", angles=True,
    ),
    "vgg8-feedback": Experiment(
        "Angle between the feedback and the forward path, VGG-8",
        "Per unit, between the matrix that brings errors back and the transposed Jacobian of the "
        "logits, over training. 90° is chance; feedback that is learned can turn towards the path.",
        "units", _VGG8, _ANGLES, group="alignment", angles=True,
    ),
    "ranks": Experiment(
        "Accuracy against rank",
        "Test accuracy at fixed ranks, and the ranks of a run that cuts them while it trains.",
        "ranks", _SMALLCONV, _ranks(),
    ),
    "terms": Experiment(
        "Loss terms, at half of full rank",
        "Each term of the composite loss on its own and together, for SSA; the same terms given to "
        "DFA and to backpropagation.",
        "table", _SMALLCONV, _terms(), seeds={"smoke": 1, "cpu": 3, "full": 5},
    ),
    "sensitivity": Experiment(
        "Sensitivity to the settings",
        "Test accuracy of SSA on SmallConv over a decade of each setting, two at a time, the "
        "others at their defaults: learning rate 0.01, α 4, horizon 2, grid 4, k 10, retraction.",
        "maps", _SMALLCONV, _sensitivity(),
        axes={setting: (x[0], y[0]) for setting, (x, y, *_) in _MAPS.items()},
        seeds={"smoke": 1, "cpu": 1, "full": 3},
    ),
}  # fmt: skip
