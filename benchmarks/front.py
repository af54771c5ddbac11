"""How to choose units and horizon: accuracy, memory and time of a few choices on one network.

    python benchmarks/front.py --net smallconv --data-dir DATA [--seeds 0 1] [--seconds 280]
        [--out benchmarks/results/front_smallconv.json]
    python benchmarks/front.py --picture benchmarks/results/front_*.json --svg docs/front.svg

Each choice trains for the same number of epochs and, where a step costs another time than one of
backpropagation on the same factors, for as many epochs as take the same time. The file holds what
has been measured; started again, the script goes on with what is missing and ends when ``seconds``
are over. Times are CPU seconds of one thread, medians of steps in turns with SVD-BP; memory is what
is alive at the peak of a step.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from svdalign.lab.costs import step_memory
from svdalign.lab.training import Trainer, build_learner, load_data
from svdalign.lab.training.build import example_batch, prepare_machine
from svdalign.lab.training.config import JobConfig, RunConfig, method_config
from svdalign.lab.training.record import provenance

JOBS: dict[str, dict[str, Any]] = {
    "smallconv": {
        "data": "cifar10", "image_size": 16, "train_limit": 4000, "test_limit": 4000, "epochs": 6,
    },
    "vgg8": {
        "data": "cifar10", "train_limit": 2000, "test_limit": 2000, "epochs": 5, "model": "vgg8",
        "width": 0.25,
    },
}  # fmt: skip

ROUNDS = 7  #: of steps that are timed

#: By name: units, horizon, options of the rule.
CHOICES: dict[str, tuple[Any, int | None, dict[str, Any]]] = {
    "SVD-BP": ("block", None, {}),
    "balanced, h 0": ("balanced", 0, {}),
    "balanced, h 0, no similarity": ("balanced", 0, {"alpha": 0.0}),
    "balanced-3, h 0": ("balanced-3", 0, {}),
    "balanced-3, h 1": ("balanced-3", 1, {}),
    "balanced-3, h 0, no similarity": ("balanced-3", 0, {"alpha": 0.0}),
    "block, h 0": ("block", 0, {}),
    "block, h 1": ("block", 1, {}),
    "block, h 2": ("block", 2, {}),
    "block, h 2, no similarity": ("block", 2, {"alpha": 0.0}),
}


def config_of(net: str, choice: str, seed: int, data_dir: str | None, epochs: int) -> RunConfig:
    units, horizon, options = CHOICES[choice]
    job = JobConfig(
        **{**JOBS[net], "epochs": epochs}, data_dir=data_dir, units=units, threads=1,
        augment=["crop", "flip"],
    )  # fmt: skip
    if horizon is None:
        return method_config("bp", job, seed=seed)
    return method_config("ssa", job, seed=seed, settings={"horizon": horizon, "options": options})


def costs(net: str, data_dir: str | None) -> dict[str, dict[str, float]]:
    """Bytes at the peak of a step, and its CPU time against SVD-BP's."""
    steps, peaks = dict[str, Callable[[], object]](), dict[str, int]()
    for choice in CHOICES:
        config = config_of(net, choice, 0, data_dir, JOBS[net]["epochs"])
        data = load_data(config)
        learner = build_learner(config, data)
        x = example_batch(config, data, config.batch_size)
        y = data.train.labels[: config.batch_size]
        steps[choice] = partial(learner.step, x, y)
        steps[choice]()
        modules = [learner.model, learner.feedback]
        peaks[choice] = step_memory(steps[choice], modules, learner.optimizer, [x, y]).peak
    taken: dict[str, list[float]] = {choice: [] for choice in CHOICES}
    for _ in range(ROUNDS):
        for choice, step in steps.items():
            start = time.process_time()
            step()
            taken[choice].append(time.process_time() - start)
    ratios = {
        choice: statistics.median(a / b for a, b in zip(t, taken["SVD-BP"], strict=True))
        for choice, t in taken.items()
    }
    return {c: {"peak_bytes": peaks[c], "time": ratios[c]} for c in CHOICES}


def trained(net: str, choice: str, seed: int, data_dir: str | None, epochs: int) -> float:
    """Test accuracy after so many epochs."""
    config = config_of(net, choice, seed, data_dir, epochs)
    data = load_data(config)
    trainer = Trainer(config, data, build_learner(config, data))
    trainer.run()
    return float(trainer.history[-1]["test_accuracy"])


def epochs_of(found: Mapping[str, Any], choice: str, equal: str) -> int:
    """Epochs of a run that takes as many ``epochs`` as SVD-BP, or the same ``time``."""
    whole = found["epochs"]
    return whole if equal == "epochs" else max(1, round(whole / found["costs"][choice]["time"]))


def picture(documents: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy at equal epochs and at equal time, against memory."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(documents), 2, figsize=(10, 4.2 * len(documents)), squeeze=False
    )
    for row, found in zip(axes, documents, strict=True):
        for axis, equal in zip(row, ("epochs", "time"), strict=True):
            for choice, cost in found["costs"].items():
                runs = accuracies(found, choice, equal)
                if runs:
                    x, y = cost["peak_bytes"] / 2**20, 100 * statistics.mean(runs)
                    axis.plot(x, y, "o" if choice != "SVD-BP" else "s", markersize=7)
                    axis.annotate(
                        f"{choice} ({cost['time']:.2f} x)", (x, y), fontsize=7,
                        xytext=(4, 4), textcoords="offset points",
                    )  # fmt: skip
            axis.set(
                title=f"{found['net']}, equal {equal}", xlabel="peak of a step, MiB",
                ylabel="test accuracy, %",
            )  # fmt: skip
            axis.margins(x=0.25)
    figure.tight_layout()
    figure.savefig(path)


def accuracies(found: Mapping[str, Any], choice: str, equal: str) -> list[float]:
    """Those of all seeds."""
    epochs = epochs_of(found, choice, equal)
    return [r["accuracy"] for r in found["runs"] if (r["choice"], r["epochs"]) == (choice, epochs)]


def main() -> None:
    """Measure what is missing, or draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", choices=JOBS)
    parser.add_argument("--data-dir")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", nargs="+", type=Path)
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args()
    if args.picture:
        picture([json.loads(path.read_text()) for path in args.picture], args.svg)
        return
    end = time.monotonic() + args.seconds
    prepare_machine(JobConfig(threads=1))
    found: dict[str, Any] = {"net": args.net, "epochs": JOBS[args.net]["epochs"], "runs": []}
    if args.out.exists():
        found = json.loads(args.out.read_text())
    else:
        found |= {**provenance("cpu"), "job": JOBS[args.net]}
        found["costs"] = costs(args.net, args.data_dir)
    for seed in args.seeds:
        for choice in CHOICES:
            for equal in ("epochs", "time"):
                epochs = epochs_of(found, choice, equal)
                key = {"choice": choice, "seed": seed, "epochs": epochs}
                known = any(key.items() <= run.items() for run in found["runs"])
                if known or time.monotonic() > end:
                    continue
                accuracy = trained(args.net, choice, seed, args.data_dir, epochs)
                found["runs"].append({**key, "accuracy": accuracy})
                print(key, f"{accuracy:.3f}", flush=True)
                args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
