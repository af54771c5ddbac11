"""Ship a run: its compact model in files that need no library, and a card that describes them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import export
from ...engine.forward import evaluating
from ...factors import factored_layers
from ..costs import alternate, inference_macs, parameter_count
from ..data import ImageData
from ..reports import card_text
from ..training.build import (
    build_model,
    evaluate,
    example_batch,
    memory_format,
    plain_batches,
)
from ..training.config import RunConfig
from ..training.provenance import provenance
from ..training.record import check_writable, write_json
from ..training.run import describe
from ..training.trainer import Trainer

BATCHES = (1, 128)  #: sizes at which latency is measured
IMAGES = 64  #: real images on which files are checked
SECONDS = 20.0  #: of measuring, at most, for each size


def ship(
    trainer: Trainer, folder: str | Path, formats: Sequence[str] = tuple(export.FORMATS)
) -> dict[str, Any]:
    """Write ``model.FORMAT`` for each format, ``card.json`` and ``card.md``; return the card.

    Every file is loaded again and compared with the trained model on test images. ValueError and
    ImportError for a format that is not known or cannot be written, before any file is.
    """
    if unknown := sorted(set(formats) - export.FORMATS.keys()):
        raise ValueError(
            f"unknown format {', '.join(unknown)}; available: {', '.join(export.FORMATS)}"
        )
    for suffix in formats:
        export.check_imports(suffix)
    folder = Path(folder)
    check_writable(folder)
    model, config, data = trainer.learner.model, trainer.config, trainer.data
    small = export.compact(model)
    x, _ = next(plain_batches(config, data, data.test, IMAGES))
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for suffix in formats:
        path = folder / f"model.{suffix}"
        try:
            loaded = export.FORMATS[suffix](small, x, path)
        except ValueError as error:
            raise ValueError(f"formats must leave out {suffix}: {error}") from error
        files.append(
            {
                "name": path.name,
                "bytes": path.stat().st_size,
                "max_abs_difference": _difference(model, loaded, x),
            }
        )
    content = card(trainer, small, files)
    write_json(folder / "card.json", content)
    (folder / "card.md").write_text(card_text(content), encoding="utf-8")
    return content


def card(trainer: Trainer, small: nn.Module, files: list[dict[str, Any]]) -> dict[str, Any]:
    """The description of ``small``, the compact model of ``trainer``, ready for JSON."""
    model, config, data = trainer.learner.model, trainer.config, trainer.data
    x = example_batch(config, data)
    return {
        "network": config.model,
        "width": config.width,
        "input": {"shape": list(x.shape[1:]), "mean": list(data.mean), "std": list(data.std)},
        "classes": list(data.classes),
        "data": describe(data),
        "layers": _layers(model, small),
        "modules": str(small),
        "training": {
            "rule": config.rule,
            "epochs": trainer.epoch,
            "seed": config.seed,
        },
        **versus_dense(trainer, small),
        "files": files,
        "config": dataclasses.asdict(config),
        **provenance(config.device),
    }


def versus_dense(trainer: Trainer, small: nn.Module | None = None) -> dict[str, Any]:
    """Accuracy of ``small``, the compact model of ``trainer``, and its parameters, MACs and latency
    beside those of the same network with dense weights."""
    model, config, data = trainer.learner.model, trainer.config, trainer.data
    small = export.compact(model) if small is None else small
    dense = export.compact(build_model(config.dense(), data))  # in the same form: norms folded
    x = example_batch(config, data)
    (loss, accuracy), (_, trained) = (evaluate(m, data, config) for m in (small, model))
    return {
        "test_accuracy": accuracy,
        "test_accuracy_of_trained_model": trained,
        "test_loss": loss,
        "parameters": _versus(parameter_count(small), parameter_count(dense)),
        "macs": _versus(inference_macs(small, x), inference_macs(dense, x)),
        "latency": latency(small, dense, config, data),
    }


@torch.inference_mode()
def latency(
    small: nn.Module, dense: nn.Module, config: RunConfig, data: ImageData
) -> list[dict[str, float]]:
    """Median seconds of a batch through both, run in turns, for each size of :data:`BATCHES`.

    Both run as copies in the job's memory format: a kernel in another one would change the format
    of all maps after it.
    """
    layout = memory_format(config)
    small, dense = (copy.deepcopy(m).to(memory_format=layout) for m in (small, dense))  # type: ignore[call-overload]
    rows = []
    for size in BATCHES:
        x = _repeated(example_batch(config, data, size), size).contiguous(memory_format=layout)
        work = {"compact": lambda x=x: small(x), "dense": lambda x=x: dense(x)}
        times = alternate(work, rounds=31, warmup=3, seconds=SECONDS)
        rows.append(
            {
                "batch": size,
                "seconds": times["compact"].median,
                "dense_seconds": times["dense"].median,
                "ratio": times["compact"].ratio(times["dense"]),
            }
        )
    return rows


def _layers(model: nn.Module, small: nn.Module) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "kind": type(layer).__name__,
            "rank": layer.rank,
            "full_rank": layer.full_rank,
            "form": "factored" if isinstance(small.get_submodule(name), nn.Sequential) else "dense",
        }
        for name, layer in factored_layers(model).items()
    ]


def _versus(compact: int, dense: int) -> dict[str, float]:
    return {"compact": compact, "dense": dense, "ratio": compact / dense}


@torch.no_grad()
def _difference(model: nn.Module, loaded: export.Runner, x: Tensor) -> float:
    with evaluating(model):
        expected = model(x)
    return float((expected.cpu() - loaded(x).cpu()).abs().max())


def _repeated(x: Tensor, size: int) -> Tensor:
    """``size`` images, for a data set that has fewer."""
    return x.repeat(-(-size // len(x)), 1, 1, 1)[:size]
