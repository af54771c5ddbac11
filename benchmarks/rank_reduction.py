"""What cutting ranks while training costs and saves: accuracy by epoch, size, arithmetic, latency.

    python benchmarks/rank_reduction.py --config benchmarks/configs/rank_cifar10.yaml --data-dir DIR

One run a variant and seed, on the config's data, network and budget:

- ``fixed``: the config without cuts, at its starting rank;
- ``cut``: with the config's cuts, optimizer state carried;
- ``cut, state dropped``: the same cuts, but the state of the layers that are cut starts over;
- ``cut, hoyer``: as ``cut``, with Hoyer sparsity of ``s`` in the loss (weight ``--gamma``).

Writes JSON with the curves, the compact model's parameters, multiply-accumulates and latency
against the dense network's (batch 1 and 128, medians of runs in turns), and the marks: parameters
<= 35 %, MACs <= 40 %, accuracy <= 0.5 point under ``fixed``, latency <= 0.6. A finished run is not
run again and a killed one goes on, so that the same command continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from svdalign import RankCut, compact, reduce_rank
from svdalign.factors import FactoredLayer
from svdalign.lab.costs import inference_macs, parameter_count
from svdalign.lab.data import ImageData
from svdalign.lab.experiments.card import latency
from svdalign.lab.runner import Run, Sweep
from svdalign.lab.training import RunConfig, Trainer, build_learner, build_model, load_run
from svdalign.lab.training.build import evaluate, example_batch
from svdalign.lab.training.config import from_dict, to_yaml
from svdalign.lab.training.progress import PlainProgress
from svdalign.lab.training.record import provenance, write_json

VARIANTS = ("fixed", "cut", "cut, state dropped", "cut, hoyer")
MARKS = {"parameters": 0.35, "macs": 0.40, "latency": 0.6, "points": 0.5}


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


def variant_config(name: str, base: RunConfig, seed: int, gamma: float) -> RunConfig:
    changes: dict[str, Any] = {"seed": seed}
    if name == "fixed":
        changes |= {"rank_energy": None, "rank_parameters": None}
    if name == "cut, hoyer":
        changes["options"] = {**base.options, "gamma": gamma}
    return dataclasses.replace(base, **changes)


def dropping(config: RunConfig, data: ImageData) -> Trainer:
    return DroppingTrainer(config, data, build_learner(config, data))


def run_of(name: str, base: RunConfig, seed: int, gamma: float) -> Run:
    run = Run(
        f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}",
        variant_config(name, base, seed, gamma),
        name,
    )
    return dataclasses.replace(run, make=dropping) if name == "cut, state dropped" else run


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--gamma", type=float, default=0.05)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--runs", type=Path, help="folder of the runs (runs/NAME-OF-THE-CONFIG)")
    parser.add_argument("--out", type=Path, help="(benchmarks/results/NAME-OF-THE-CONFIG.json)")
    options = parser.parse_args()
    runs = options.runs or Path("runs") / options.config.stem
    out = options.out or Path("benchmarks/results") / f"{options.config.stem}.json"
    given = yaml.safe_load(options.config.read_text())
    machine = {"data_dir": options.data_dir, "device": options.device, "threads": options.threads}
    base = from_dict(RunConfig, {**given, **machine})
    listed = {
        (name, seed): run_of(name, base, seed, options.gamma)
        for seed in range(options.seeds)
        for name in options.variants
    }
    sweep = Sweep(runs, listed.values(), kind="rank reduction")
    sweep.top.write_config(to_yaml(base))
    console = Console()
    with PlainProgress(console, sweep.pending) as progress:
        sweep.run(progress=progress)
    data = sweep.data(base)
    dense = compact(build_model(base.dense(), data))
    x = example_batch(base, data)
    rows = []
    for (name, seed), run in listed.items():
        trainer = load_run(sweep.record(run).folder)
        small = compact(trainer.learner.model)
        rows.append(
            {
                "variant": name,
                "seed": seed,
                "accuracy": evaluate(small, data, run.config)[1],
                "parameters": parameter_count(small) / parameter_count(dense),
                "macs": inference_macs(small, x) / inference_macs(dense, x),
                "latency": latency(small, dense, run.config, data),
                "history": trainer.history,
                "config": dataclasses.asdict(run.config),
            }
        )
    result = {
        "summary": summary(rows, options.variants),
        "marks": MARKS,
        "rows": rows,
        "gamma": options.gamma,
        **provenance(base.device),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    for row in result["summary"]:
        console.print(row, highlight=False)
    console.print(out)
    return 0


def summary(rows: list[dict[str, Any]], variants: list[str]) -> list[dict[str, Any]]:
    """Means over seeds, and whether the marks are met; dips are of test accuracy at a cut."""
    result: list[dict[str, Any]] = []
    for name in variants:
        mine = [row for row in rows if row["variant"] == name]
        fixed = [row["accuracy"] for row in rows if row["variant"] == "fixed"]
        means = {
            key: statistics.mean(row[key] for row in mine)
            for key in ("accuracy", "parameters", "macs")
        }
        ratios = {
            f"latency, batch {size}": statistics.median(row["latency"][i]["ratio"] for row in mine)
            for i, size in enumerate(entry["batch"] for entry in mine[0]["latency"])
        }
        under = 100 * (statistics.mean(fixed) - means["accuracy"]) if fixed else None
        dips = [dip for row in mine for dip in _dips(row["history"])]
        result.append(
            {
                "variant": name,
                **means,
                **ratios,
                "points_under_fixed": under,
                "worst_dip_points": max(dips, default=None),
                "meets": {
                    "parameters": means["parameters"] <= MARKS["parameters"],
                    "macs": means["macs"] <= MARKS["macs"],
                    "latency": all(ratio <= MARKS["latency"] for ratio in ratios.values()),
                    "points": under is not None and under <= MARKS["points"],
                },
            }
        )
    return result


def _dips(history: list[dict[str, Any]]) -> list[float]:
    """Points of test accuracy lost from one epoch to the next, for each epoch that ended in a cut
    and the one after it."""
    pairs = itertools.pairwise(history)
    return [
        100 * (a["test_accuracy"] - b["test_accuracy"])
        for a, b in pairs
        if a["kept_energy"] or b["kept_energy"]
    ]


if __name__ == "__main__":
    sys.exit(main())
