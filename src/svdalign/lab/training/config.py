"""The settings of a training run, as frozen dataclasses. Each field is a command line flag and a
YAML key."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ...factors.layers import check_rank
from .. import methods, models
from ..methods import Method
from .options import Options, fields_of, option, plain

Augmentation = Literal["crop", "translate", "flip", "alternate", "cutout"]

#: Fields that every rule has and that are fields of a run as well.
_SHARED = ("horizon", "error")

#: Fields that need factored weights, with their values for dense ones.
_DENSE: Mapping[str, Any] = {
    "rank_energy": None, "rank_parameters": None, "factor_classifier": False
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataConfig(Options):
    """data"""

    data: str = option(
        "embedded",
        "embedded, fashion_mnist, cifar10, cifar100, folder, parquet, webdataset, or OWNER/NAME of "
        "the Hugging Face hub",
    )
    data_dir: str | None = option(
        None, "folder of Parquet or tar files, or of images with one folder a class"
    )
    train_limit: int | None = option(None, "use only this many training images", least=1)
    test_limit: int | None = option(None, "use only this many test images", least=1)
    validation: int | None = option(
        None,
        "hold out this many training images and evaluate on them instead of the test images",
        least=1,
    )
    image_size: int | None = option(
        None, "resize images to this height and width in pixels", least=1
    )
    stream: bool | None = option(
        None,
        "have worker processes decode images whenever they are needed, not once into memory; null: "
        "only if their pixels would take more than 4 GiB",
    )
    workers: int | None = option(
        None, "processes that decode a stream (one a core, at most 8)", least=0
    )
    max_unreadable: float = option(
        0.01, "share of a stream's images that may be unreadable: they are left out and listed"
    )
    augment: list[Augmentation] = option(
        [],
        "any of crop, translate, flip, alternate, cutout, on training batches; crop of a stream "
        "takes a window of random area and proportions; translate shifts by fewer pixels than crop "
        "and mirrors the border; alternate flips every other epoch",
    )
    tta: bool = option(
        False, "after the last epoch also evaluate the mean answer to mirrored and shifted copies"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.augment:
            if name not in get_args(Augmentation):
                raise ValueError(
                    f"augment must be any of {', '.join(get_args(Augmentation))}, got {name!r}"
                )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Options):
    """model"""

    model: str = option(
        "smallconv",
        f"of {', '.join(models.available())}, or a network of your own as package.module:Net, a "
        "class or function that takes in_channels and num_classes",
    )
    width: float = option(1.0, "factor on the number of channels of every hidden layer", above=0)
    rank: int | float | None = option(
        0.5, "rank of the factors: a fraction of full rank in (0, 1], or a whole number"
    )
    scheme: Literal["channel", "spatial"] = option(
        "channel",
        "how a kernel is reshaped into a matrix: channel (more accurate and faster) or spatial",
    )
    factor_classifier: bool = option(
        False, "factor the classifier as well: where there are many classes it is a large layer"
    )
    retraction: Literal["qr", "polar", "newton-schulz"] | None = option(
        "qr",
        "how factors are made orthonormal again after each step; null: only the loss keeps them so",
    )
    fuse: bool | Literal["measured"] = option(
        True,
        "fuse factored convolutions with the norm, activation and pooling after them; measured: "
        "and give each the kernel that is the fastest here, which takes more memory",
    )
    units: int | str | list[str] = option(
        "block",
        "what learns on its own: layer, block, stage, balanced (two units that save about the same "
        "memory; balanced-3: three), a number of blocks, or a list of modules that units end with",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.fuse, bool) and self.fuse != "measured":
            raise ValueError(f"fuse must be true, false or measured, got {self.fuse!r}")
        if self.rank is not None:
            check_rank("rank", self.rank)


@dataclass(frozen=True, kw_only=True)
class RankConfig(Options):
    """rank reduction"""

    rank_energy: float | None = option(
        None,
        "a cut keeps this share, in (0, 1], of each layer's squared singular values; null: no cuts",
        above=0,
        most=1,
    )
    rank_parameters: int | float | None = option(
        None,
        "parameters of the whole model after the last cut: a number, or a share of the dense "
        "model's; earlier cuts shrink the model by equal ratios",
    )
    rank_warmup: int = option(1, "epochs before the first cut; 0 cuts the initial weights", least=0)
    rank_period: int = option(1, "epochs between two cuts", least=1)
    rank_freeze: int | None = option(None, "no cut after this many epochs")
    rank_ratio: float = option(
        0.5, "a cut by energy leaves at least this share of a rank", least=0, most=1
    )
    rank_min: int | float = option(
        4, "no cut goes below this rank: a whole number, or a fraction of full rank"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank("rank_min", self.rank_min)
        if self.rank_parameters is not None:
            check_rank("rank_parameters", self.rank_parameters)
            if self.rank_energy is not None:
                raise ValueError("give either rank_energy or rank_parameters, not both")
            if self.rank_freeze is None:
                raise ValueError("rank_parameters needs rank_freeze, the epoch of the last cut")
        if self.rank_freeze is not None and self.rank_freeze < self.rank_warmup:
            raise ValueError(
                f"rank_freeze must be at least rank_warmup, {self.rank_warmup}, "
                f"got {self.rank_freeze}"
            )

    def cuts_rank_after(self, epoch: int) -> bool:
        """Whether ranks are to be cut once ``epoch`` epochs are done."""
        since = epoch - self.rank_warmup
        frozen = self.rank_freeze is not None and epoch > self.rank_freeze
        return (
            (self.rank_energy is not None or self.rank_parameters is not None)
            and since >= 0
            and since % self.rank_period == 0
            and not frozen
        )

    def cuts_left_after(self, epoch: int) -> int:
        """How many cuts follow the one after ``epoch`` epochs; needs ``rank_freeze``."""
        assert self.rank_freeze is not None
        return (self.rank_freeze - epoch) // self.rank_period


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Options):
    """training"""

    epochs: int = option(4, "passes over the training images", least=1)
    batch_size: int = option(128, "training images per step", least=1)
    optimizer: Literal["adamw", "sgd", "muon"] = option(
        "adamw",
        "the optimizer; muon trains all but hidden weights by adamw, at a tenth of its rate",
    )
    weight_decay: float = option(
        0.0, "decoupled for adamw (and so for muon), an L2 term for sgd", least=0
    )
    momentum: float = option(
        0.9, "of sgd and muon; the first of adamw's two betas", least=0, below=1
    )
    nesterov: bool = option(False, "use Nesterov momentum; sgd only")
    bias_lr: float = option(
        1.0,
        "factor on the learning rate of biases; their weight decay a step stays as it is",
        above=0,
    )
    beta2: float = option(0.999, "the second of adamw's two betas", least=0, below=1)
    schedule: Literal["one-cycle", "cosine", "constant"] = option(
        "one-cycle",
        "learning rate over the steps: linear up, then linear to 0, cosine to 0, or flat",
    )
    warmup: float = option(
        0.2, "share of all steps in which the learning rate rises", least=0, most=1
    )
    label_smoothing: float = option(
        0.0,
        "label smoothing, in [0, 1): this share of each label goes to all classes alike",
        least=0,
        below=1,
    )
    lookahead: int | None = option(
        None,
        "set weights to their moving average every so many steps, and at the end; the average "
        "follows more slowly as training goes on (Jordan 2024)",
        least=1,
    )
    precision: Literal["fp32", "bf16"] = option("fp32", "fp32, or bf16 under autocast")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer == "muon" and self.bias_lr != 1:
            raise ValueError(f"bias_lr must be 1 with optimizer muon, got {self.bias_lr}")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ValueError("nesterov needs optimizer sgd and a momentum above 0")


@dataclass(frozen=True, kw_only=True)
class MachineConfig(Options):
    """machine"""

    device: str = option("cpu", "where to train: cpu, cuda, cuda:1, ...")
    threads: int | None = option(None, "number of CPU threads (default: torch decides)", least=1)
    channels_last: bool = option(
        True, "keep images and kernels in channels-last memory format, which is faster"
    )
    checkpoint_seconds: float = option(60.0, "seconds between checkpoints within an epoch", least=0)
    logger: str | None = option(
        None,
        "log each epoch to tensorboard or wandb as well (extra: loggers), or to a logger of your "
        "own as package.module:Class",
    )


@dataclass(frozen=True, kw_only=True)
class JobConfig(DataConfig, ModelConfig, RankConfig, OptimConfig, MachineConfig):
    """What all methods of a comparison share: data, network, budget, machine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank_parameters is not None and (self.rank_freeze or 0) > self.epochs:
            raise ValueError(
                "rank_freeze, the epoch of the last cut, must be at most the number of epochs, "
                f"{self.epochs}, got {self.rank_freeze}"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig(JobConfig):
    """method"""

    rule: str = option("ssa", f"the method, how the network learns: {methods.HELP}")
    horizon: int | str = option(
        "rule",
        "how many units upstream a unit's task gradient travels; rule: the rule's own",
        least=0,
    )
    error: Literal["rule", "output", "local", "target"] = option(
        "rule", "where a unit's error comes from; rule: the rule's own"
    )
    options: dict[str, Any] = option(
        {}, "other fields of the rule to change, one by one: --options.alpha 0.5"
    )
    lr: float | None = option(None, "peak learning rate (what the method was tuned to)", above=0)
    seed: int = option(0, "of the initial weights, the feedback and the order of the data", least=0)
    trainer: str | None = option(
        None,
        "a trainer of your own as package.module:function, which takes config and data and returns "
        "a svdalign.lab.training.Trainer: for what no other option can do",
    )
    parallel: Literal["layers", "data"] | None = option(
        None,
        "under torchrun, how its processes divide the work: layers, by units of the network; data, "
        "by images of every batch",
    )
    parallel_timeout: float = option(
        1800.0,
        "seconds after which a process that hears nothing from another one gives up",
        above=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.horizon, str) and self.horizon != "rule":
            raise ValueError(
                "horizon must be a whole number of at least 0, or rule for the rule's own (what "
                f"has no limit is backpropagation, rule bp), got {self.horizon!r}"
            )
        self._take_from(methods.get(self.rule))

    @property
    def rate(self) -> float:
        """The peak learning rate: ``lr``, which is a number once the config is made."""
        assert self.lr is not None
        return self.lr

    @property
    def method(self) -> Method:
        """The method that ``rule`` names."""
        return methods.get(self.rule)

    def dense(self) -> RunConfig:
        """This run with dense weights."""
        method = dataclasses.replace(self.method, factored=False)
        return dataclasses.replace(self, rule=method.name, rank=None, **_DENSE)

    def _take_from(self, method: Method) -> None:
        """Fill in the method's own settings, so that a stored config is complete."""
        given = plain(self.options)
        options = {**method.options, **given}
        fields: dict[str, Any] = {"rule": method.name, "options": options}
        if self.lr is None:
            fields["lr"] = method.lr
        for name in _SHARED:
            if name in given:
                raise ValueError(f"options must not hold {name}, an option itself: --{name}")
            if name in options and getattr(self, name) == "rule":
                fields[name] = options[name]
            options.pop(name, None)
        if not method.factored:
            for name, dense in _DENSE.items():
                if getattr(self, name) != dense:
                    raise ValueError(f"{name} needs factored weights, {method.name} has dense ones")
            fields["rank"] = None
        elif self.rank is None:
            raise ValueError(
                "rank must be a fraction or a whole number, got null; for dense weights say rule "
                f"{dataclasses.replace(method, factored=False).name}"
            )
        for name, value in fields.items():
            object.__setattr__(self, name, value)


def method_config(
    method: str | Method,
    job: JobConfig,
    *,
    seed: int,
    lr: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The run of ``method`` within ``job``.

    Args:
        method: a method or its name.
        job: the settings that all methods share. Those of factored weights are left out for dense
            ones.
        seed: of the run.
        lr: peak learning rate, in place of the one that the method was tuned to.
        settings: fields of the run that differ from the job's; ``options`` are added to the
            method's.
    """
    method = methods.get(method) if isinstance(method, str) else method
    fields = fields_of(JobConfig, job)
    if not method.factored:
        fields |= _DENSE
    fields |= {"rule": method.name, "lr": method.lr if lr is None else lr, "seed": seed}
    options, own = dict(method.options), dict(settings or {})
    fields |= {name: options.pop(name) for name in _SHARED if name in options}
    fields["options"] = {**options, **own.pop("options", {})}
    return RunConfig(**{**fields, **own})


def check_settings(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """``settings`` by method, with strings of the command line as the values they stand for.

    Raises ValueError for a method that is not among ``names`` and for what is no field of a run.
    """
    if unknown := sorted(set(settings) - set(names)):
        raise ValueError(
            f"settings names {', '.join(unknown)}, but the methods are {', '.join(names)}"
        )
    known = [f.name for f in dataclasses.fields(RunConfig)]
    for name, fields in settings.items():
        if not isinstance(fields, Mapping):
            raise ValueError(f"settings of {name} must be {{field: value}}, got {fields!r}")
        if wrong := sorted(set(fields) - set(known)):
            raise ValueError(
                f"settings of {name} name {', '.join(wrong)}; a run has {', '.join(known)}"
            )
    return {name: plain(fields) for name, fields in settings.items()}


def evaluated_on(validation: int | None) -> str:
    """The name of the images that accuracy is measured on: "test" or "held-out"."""
    return "test" if validation is None else "held-out"
