"""From a config to the things it names: data, rule, model, optimizer, learner."""

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

from ... import rules
from ...engine import Learner
from ...engine.forward import evaluating
from ...factors import factorize
from ...factors.fuse import fuse_where_possible
from ...rules import Rule
from .. import data as datasets
from .. import models
from ..data import Augment, ImageData, batches
from .config import JobConfig, RunConfig

__all__ = [
    "augmentation",
    "build_learner",
    "build_model",
    "evaluate",
    "load_data",
    "make_rule",
    "memory_format",
    "precision",
    "prepare_machine",
]

EVAL_BATCH = 500  #: images at once where nothing is held for a backward pass


def prepare_machine(config: JobConfig) -> None:
    """Set the number of threads, and have memory kept; ValueError if the device is not there."""
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
    )
    return data if config.validation is None else datasets.hold_out(data, config.validation)


def make_rule(config: RunConfig) -> Rule:
    """The named rule with the config's horizon, error and options in it."""
    changes = dict(config.options)
    if config.horizon != "rule":
        changes["horizon"] = None if config.horizon == "all" else config.horizon
    if config.error != "rule":
        changes["error"] = config.error
    return _changed(rules.get(config.rule), changes)


def build_model(config: RunConfig, data: ImageData) -> nn.Module:
    """The network for ``data`` with its initial weights, factored unless ``rank`` is None.

    Weights are a function of the seed; methods that differ in rank alone start from the same.
    """
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        net = models.build(
            config.model,
            num_classes=data.num_classes,
            in_channels=data.in_channels,
            image_size=data.image_size,
            width=config.width,
        )
    if config.rank is not None:
        net = factorize(net, config.rank, config.scheme, classifier=config.factor_classifier)
        # A rule that sends errors back through other weights needs each layer by itself.
        if config.fuse and not isinstance(rules.get(config.rule), rules.FA):
            net = fuse_where_possible(net)
    return net.to(config.device, memory_format=memory_format(config))  # type: ignore[call-overload,no-any-return]


def build_learner(
    config: RunConfig,
    data: ImageData,
    model: nn.Module | None = None,
    *,
    rule: Rule | None = None,
    groups: Callable[[list[nn.Parameter]], Iterable[Any]] = list,
) -> Learner:
    """The learner that the config describes, ready for its first step. ``model``, ``rule``: in
    place of its own. ``groups``: makes the optimizer's parameter groups."""
    loss = partial(F.cross_entropy, label_smoothing=config.label_smoothing)
    return Learner(
        build_model(config, data) if model is None else model,
        make_rule(config) if rule is None else rule,
        units=config.units,
        retraction=config.retraction,
        recompute=config.recompute,
        optimizer=lambda parameters: _optimizer(config, groups(parameters)),
        example=example_batch(config, data),
        loss=loss if config.label_smoothing else None,
        seed=config.seed,
    )


def example_batch(config: JobConfig, data: ImageData, size: int = 2) -> Tensor:
    """The first training images, (size, C, H, W), as the network gets them."""
    return next(_plain_batches(config, data, data.train, size))[0]


@torch.no_grad()
def evaluate(model: nn.Module, data: ImageData, config: JobConfig) -> tuple[float, float]:
    """Mean cross-entropy and accuracy on the test split, in eval mode; the modes are put back."""
    device = data.test.images.device
    loss, right = torch.zeros((), device=device), torch.zeros((), device=device)
    with evaluating(model):
        for x, y in _plain_batches(config, data, data.test, EVAL_BATCH):
            with precision(config):
                z = model(x)
            loss += F.cross_entropy(z.float(), y, reduction="sum")
            right += (z.argmax(-1) == y).sum()
    return loss.item() / len(data.test), right.item() / len(data.test)


def augmentation(config: JobConfig, data: ImageData) -> Augment | None:
    """What ``augment`` names, in sizes that go with the images: 4 and 8 pixels at 32."""
    if not config.augment:
        return None
    return Augment(
        crop=data.image_size // 8 if "crop" in config.augment else 0,
        flip="flip" in config.augment,
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


def _plain_batches(
    config: JobConfig, data: ImageData, split: datasets.Split, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    return batches(split, size, mean=data.mean, std=data.std, memory_format=memory_format(config))


def _optimizer(config: RunConfig, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(
        parameters,
        config.lr,
        betas=(config.momentum, config.beta2),
        weight_decay=config.weight_decay,
    )


def _changed(rule: Rule, changes: Mapping[str, Any]) -> Rule:
    known = [f.name for f in dataclasses.fields(rule) if f.name != "name"]
    if unknown := sorted(set(changes) - set(known)):
        raise ValueError(
            f"rule {rule.name!r} has no option {', '.join(unknown)}; it has {', '.join(known)}"
        )
    return dataclasses.replace(rule, **changes)
