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
from ...factors import FactoredLayer
from ..costs import alternate, inference_macs, parameter_count
from ..data import ImageData, batches
from ..training.build import build_model, evaluate, example_batch, memory_format
from ..training.config import DENSE, RunConfig, evaluated_on
from ..training.record import check_writable, provenance, write_json
from ..training.trainer import Trainer

__all__ = ["BATCHES", "card", "latency", "markdown", "ship"]

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
    x, _ = next(
        batches(
            data.test,
            IMAGES,
            mean=data.mean,
            std=data.std,
            memory_format=memory_format(config),
        )
    )
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for suffix in formats:
        path = folder / f"model.{suffix}"
        loaded = export.FORMATS[suffix](small, x, path)
        files.append(
            {
                "name": path.name,
                "bytes": path.stat().st_size,
                "max_abs_difference": _difference(model, loaded, x),
            }
        )
    content = card(trainer, small, files)
    write_json(folder / "card.json", content)
    (folder / "card.md").write_text(markdown(content), encoding="utf-8")
    return content


def card(trainer: Trainer, small: nn.Module, files: list[dict[str, Any]]) -> dict[str, Any]:
    """What there is to know of ``small``, the compact model of ``trainer``, ready for JSON."""
    model, config, data = trainer.learner.model, trainer.config, trainer.data
    # The same network with dense weights, in the same form: batch norms folded.
    dense = export.compact(build_model(dataclasses.replace(config, **DENSE), data))
    x = example_batch(config, data)
    (loss, accuracy), (_, trained) = (evaluate(m, data, config) for m in (small, model))
    return {
        "network": config.model,
        "width": config.width,
        "input": {"shape": list(x.shape[1:]), "mean": list(data.mean), "std": list(data.std)},
        "classes": list(data.classes),
        "layers": _layers(model, small),
        "modules": str(small),
        "training": {
            "data": data.name,
            "rule": config.rule,
            "epochs": trainer.epoch,
            "seed": config.seed,
        },
        "test_accuracy": accuracy,
        "test_accuracy_of_trained_model": trained,
        "test_loss": loss,
        "parameters": _versus(parameter_count(small), parameter_count(dense)),
        "macs": _versus(inference_macs(small, x), inference_macs(dense, x)),
        "latency": latency(small, dense, config, data),
        "files": files,
        "config": dataclasses.asdict(config),
        **provenance(config.device),
    }


@torch.inference_mode()
def latency(
    small: nn.Module, dense: nn.Module, config: RunConfig, data: ImageData
) -> list[dict[str, float]]:
    """Median seconds of a batch through both, run in turns, for each size of :data:`BATCHES`.

    Both run as copies in the job's memory format: a kernel in another one would decide for all that
    comes after it.
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


#: What each file is for.
_USES = {
    "model.safetensors": "`model.safetensors` holds the weights of the modules below.",
    "model.pt2": "`model.pt2` runs with torch alone (`torch.export.load`).",
    "model.onnx": "`model.onnx` runs with onnxruntime (input `x`, output `y`).",
}


def markdown(content: dict[str, Any]) -> str:
    """The card for people."""
    shape = content["input"]["shape"]
    counts = {"parameters": "parameters", "multiply-accumulates an image": "macs"}
    versus = [
        (label, *(f"{content[key][k]:,}" for k in ("compact", "dense")), content[key]["ratio"])
        for label, key in counts.items()
    ] + [
        (f"latency, batch {row['batch']}", f"{1e3 * row['seconds']:.2f} ms",
         f"{1e3 * row['dense_seconds']:.2f} ms", row["ratio"])
        for row in content["latency"]
    ]  # fmt: skip
    training, images = content["training"], evaluated_on(content["config"]["validation"])
    machine = content["machine"]
    means, deviations = (
        ", ".join(f"{v:.4f}" for v in content["input"][key]) for key in ("mean", "std")
    )
    lines = [
        f"# {content['network']}, width {content['width']:g}",
        "",
        f"{images.capitalize()} accuracy **{content['test_accuracy']:.2%}** on "
        f"{training['data']}, trained for "
        f"{training['epochs']} epochs by rule `{training['rule']}` (seed {training['seed']}).",
        "",
        f"Input: float32, (N, {', '.join(map(str, shape))}), pixels from 0 to 1, less the mean "
        f"({means}), over the deviation ({deviations}), channel by channel. Output: logits, "
        f"(N, {len(content['classes'])}), in this order: {', '.join(content['classes'])}.",
        "",
        *_table(("", "compact", "dense", "ratio"), [(*row[:3], f"{row[3]:.2f}") for row in versus]),
        "",
        f"Dense is the same network with dense weights. Latency: {machine['cpu']}, "
        f"{machine['threads']} threads, torch {content['torch']}, medians of runs in turns.",
        "",
        "## Files",
        "",
        f"Each was loaded again and compared with the trained model on {images} images.",
        "",
        *_table(
            ("file", "bytes", "largest difference"),
            [(f"`{f['name']}`", f"{f['bytes']:,}", f"{f['max_abs_difference']:.1e}")
             for f in content["files"]],
        ),
        "",
        " ".join(_USES[f["name"]] for f in content["files"]),
        "",
        "## Layers",
        "",
        *_table(
            ("layer", "rank", "of", "form"),
            [(f"`{r['name']}`", str(r["rank"]), str(r["full_rank"]), r["form"])
             for r in content["layers"]],
        ),
        "",
        "```",
        content["modules"],
        "```",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    bars = ["|" + "|".join(["---"] + ["--:"] * (len(head) - 1)) + "|"]
    return [f"| {' | '.join(head)} |", *bars, *(f"| {' | '.join(row)} |" for row in rows)]


def _layers(model: nn.Module, small: nn.Module) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "kind": type(layer).__name__,
            "rank": layer.rank,
            "full_rank": layer.full_rank,
            "form": "factored" if isinstance(small.get_submodule(name), nn.Sequential) else "dense",
        }
        for name, layer in model.named_modules()
        if isinstance(layer, FactoredLayer)
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
