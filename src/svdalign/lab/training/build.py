"""Build what a config describes: data, rule, model, optimizer, learner."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...engine import Learner
from ...engine.forward import evaluating
from ...factors import Muon, factorize
from ...factors.fuse import fuse_where_possible, use_fastest_kernels
from ...rules import Rule
from .. import data as datasets
from .. import models
from ..data import Augment, ImageData, batches
from .checkpointing import smallest_checkpointed
from .config import JobConfig, RunConfig
from .loggers import check_logger
from .processes import Alone

_EVAL_BATCH = 500  #: images in a batch of evaluation
_WHITENING_IMAGES = 5000  #: the first training images, that :class:`models.Whitening` looks at


def prepare_machine(config: JobConfig) -> None:
    """Set the number of CPU threads and tune the allocator; ValueError for a device or a logger
    that is not there."""
    check_logger(config.logger)
    _keep_freed_memory()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {config.device!r} cannot be used: {reason}") from None


def _keep_freed_memory() -> None:
    """Have glibc keep what tensors free. By default it hands large blocks back to the system and
    faults them in again page by page: a fifth of the time of a convolutional step on CPU."""
    if platform.libc_ver()[0] != "glibc":
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest it takes
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def load_data(config: JobConfig) -> ImageData:
    """The data of a job. It does not depend on the seed: all runs of a job see the same images."""
    data = datasets.load(
        config.data,
        data_dir=config.data_dir,
        train_limit=config.train_limit,
        test_limit=config.test_limit,
        image_size=config.image_size,
        device=config.device,
        stream=config.stream,
        workers=config.workers,
        max_unreadable=config.max_unreadable,
    )
    return data if config.validation is None else datasets.hold_out(data, config.validation)


def make_rule(config: RunConfig) -> Rule:
    """The rule that the config names, with the config's horizon, error and options in it."""
    own = {"horizon": config.horizon, "error": config.error}
    changes = {name: value for name, value in own.items() if value != "rule"}
    return _changed(config.method.make_rule(), {**config.options, **changes})


def build_model(config: RunConfig, data: ImageData) -> nn.Module:
    """The network for ``data`` with its initial weights, factored unless the method is dense.

    Weights are a function of the seed; methods that differ in rank alone start from the same.
    Whitening is fitted to the first training images.
    For backpropagation with checkpointing, the network itself is checkpointed; for other rules the
    learner does it.
    """
    rule = make_rule(config)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        net = models.build(
            config.model,
            num_classes=data.num_classes,
            in_channels=data.in_channels,
            image_size=data.image_size,
            width=config.width,
        )
    for module in net.modules():
        if isinstance(module, models.Whitening):
            module.fit(example_batch(config, data, _WHITENING_IMAGES))
    if config.rank is not None:
        net = factorize(net, config.rank, config.scheme, classifier=config.factor_classifier)
        # A rule that sends errors back through other weights needs each layer by itself.
        if config.fuse and not rule.needs_affine_layers:
            try:
                net = fuse_where_possible(net)
            except ValueError as error:
                raise ValueError(f"fuse must be false for this network: {error}") from error
    net = net.to(config.device, memory_format=memory_format(config))  # type: ignore[call-overload]
    use_measured_kernels(config, data, net)
    if config.method.checkpointed and rule.horizon is None:
        size = (data.image_size, data.image_size)
        net = smallest_checkpointed(net, (config.batch_size, data.in_channels, *size))
    return net


def use_measured_kernels(config: RunConfig, data: ImageData, net: nn.Module) -> None:
    """Where the config asks for it, give each fused convolution its fastest kernel at its present
    rank."""
    if config.fuse == "measured":
        with precision(config):
            use_fastest_kernels(net, example_batch(config, data, config.batch_size))


def build_learner(
    config: RunConfig,
    data: ImageData,
    model: nn.Module | None = None,
    *,
    rule: Rule | None = None,
    groups: Callable[[list[nn.Parameter]], Iterable[Any]] | None = None,
) -> Learner:
    """The learner that the config describes, ready for its first step. ``model``, ``rule``: replace
    those of the config. ``groups``: makes the optimizer's parameter groups in place of the default
    ones.
    """
    loss = partial(F.cross_entropy, label_smoothing=config.label_smoothing)
    model = build_model(config, data) if model is None else model
    groups = partial(_groups, config, model) if groups is None else groups
    rule = make_rule(config) if rule is None else rule
    return Learner(
        model,
        rule,
        units=config.units,
        retraction=config.retraction,
        recompute=config.method.checkpointed and rule.horizon is not None,
        optimizer=lambda parameters: _optimizer(config, model, groups(parameters)),
        example=example_batch(config, data),
        loss=loss if config.label_smoothing else None,
        seed=config.seed,
    )


def example_batch(config: JobConfig, data: ImageData, size: int = 2) -> Tensor:
    """The first training images, (size, C, H, W), as the network gets them."""
    return next(plain_batches(config, data, data.train, size))[0]


def evaluate(
    model: nn.Module, data: ImageData, config: JobConfig, team: Alone | None = None
) -> tuple[float, float]:
    """Mean cross-entropy and accuracy on the test split, in eval mode; the modes are put back.
    The processes of a ``team`` share the images."""
    return _evaluate(model, data, config, lambda x: model(x), team)


def evaluate_views(
    model: nn.Module, data: ImageData, config: JobConfig, team: Alone | None = None
) -> tuple[float, float]:
    """:func:`evaluate` of the mean answer to six views of each image: not shifted, which counts
    twice, shifted by a pixel up and left, or down and right; each also mirrored (Jordan 2024)."""

    def mean(x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        padded = F.pad(x, (1,) * 4, mode="reflect")
        shifted = (padded[..., i : i + height, i : i + width] for i in (1, 0, 2))
        views = [view for v in shifted for view in (v, v.flip(3))]
        weights = (1 / 4, 1 / 4, 1 / 8, 1 / 8, 1 / 8, 1 / 8)
        form = memory_format(config)
        answers = (
            w * model(v.contiguous(memory_format=form)) for w, v in zip(weights, views, strict=True)
        )
        return sum(answers, torch.zeros(()))

    return _evaluate(model, data, config, mean, team)


@torch.no_grad()
def _evaluate(
    model: nn.Module,
    data: ImageData,
    config: JobConfig,
    answer: Callable[[Tensor], Tensor],
    team: Alone | None,
) -> tuple[float, float]:
    sums = torch.zeros(3, device=data.test.device)  # sums of losses, right answers and images
    part = (0, 1) if team is None else (team.rank, team.size)
    with evaluating(model):
        for x, y in plain_batches(config, data, data.test, _EVAL_BATCH * part[1], part):
            if not len(y):
                continue
            with precision(config):
                z = answer(x)
            loss = F.cross_entropy(z.float(), y, reduction="sum")
            right = (z.argmax(-1) == y).sum()
            # Images of a stream that cannot be decoded are left out.
            sums += torch.stack([loss, right, torch.full_like(loss, len(y))])
    loss, right, seen = (sums if team is None else team.add(sums)).tolist()
    return loss / seen, right / seen


def augmentation(config: JobConfig, data: ImageData) -> Augment | None:
    """The augmentations that the config names, sized to the images: at 32 pixels crop by 4,
    translate by 2, cutout of 8."""
    if not config.augment:
        return None
    return Augment(
        crop=data.image_size // 8 if "crop" in config.augment else 0,
        translate=data.image_size // 16 if "translate" in config.augment else 0,
        flip="flip" in config.augment,
        alternate="alternate" in config.augment,
        cutout=data.image_size // 4 if "cutout" in config.augment else 0,
    )


def memory_format(config: JobConfig) -> torch.memory_format:
    """How images and kernels lie in memory."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def precision(config: JobConfig) -> AbstractContextManager[Any]:
    """The autocast context of the config's precision."""
    if config.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(config.device).type, torch.bfloat16)


def plain_batches(
    config: JobConfig,
    data: ImageData,
    split: datasets.Images,
    size: int,
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of ``size`` of a split in its own order, not augmented, as the network gets them."""
    form = memory_format(config)
    return batches(split, size, mean=data.mean, std=data.std, memory_format=form, part=part)


def _groups(config: RunConfig, model: nn.Module, parameters: list[nn.Parameter]) -> Iterable[Any]:
    """``parameters``, with biases in a group of their own if they have a rate of their own."""
    if config.bias_lr == 1:
        return parameters
    biases = {id(getattr(module, "bias", None)) for module in model.modules()}
    return [
        {"params": [p for p in parameters if id(p) not in biases]},
        {
            "params": [p for p in parameters if id(p) in biases],
            "lr_scale": config.bias_lr,
            "weight_decay": config.weight_decay / config.bias_lr,
        },
    ]


def _optimizer(
    config: RunConfig, model: nn.Module, parameters: Iterable[Any]
) -> torch.optim.Optimizer:
    if config.optimizer == "muon":
        betas = (0.9, config.beta2)
        muon = Muon(
            parameters,
            model,
            config.rate,
            momentum=config.momentum,
            betas=betas,
            weight_decay=config.weight_decay,
        )
        for group in muon.param_groups:
            group["lr_scale"] = group["lr"] / config.rate
        return muon
    fused = torch.device(config.device).type in ("cpu", "cuda")  # all parameters in one call
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            config.rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
            fused=fused,
        )
    return torch.optim.AdamW(
        parameters,
        config.rate,
        betas=(config.momentum, config.beta2),
        weight_decay=config.weight_decay,
        fused=fused,
    )


def _changed(rule: Rule, changes: Mapping[str, Any]) -> Rule:
    known = [f.name for f in dataclasses.fields(rule) if f.name != "name"]
    if unknown := sorted(set(changes) - set(known)):
        raise ValueError(
            f"rule {rule.name!r} has no option {', '.join(unknown)}; it has {', '.join(known)}"
        )
    return dataclasses.replace(rule, **changes)
