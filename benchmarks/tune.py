"""Choose each method's learning rate, with the same effort for all, on held-out training images.

    python benchmarks/tune.py --data-dir FOLDER [--config JOB.yaml] [--out RESULTS.json]

Every method gets the same number of runs. They begin with the rates that are given and go on beyond
the best while it lies at the edge, then beside it (``svdalign/lab/experiments/search.py``). The
test images are not looked at. Without a config the job is SmallConv on CIFAR-10 at 16 x 16, eight
epochs on 10,000 training images, with accuracy on 10,000 others that are held out. What comes out
is written into ``svdalign/lab/methods.py``, or a config's ``settings``, by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import yaml

from svdalign.lab import methods
from svdalign.lab.experiments.search import at_edge, search
from svdalign.lab.training.build import build_learner, load_data, prepare_machine
from svdalign.lab.training.config import JobConfig, check_settings, from_dict, method_config
from svdalign.lab.training.record import Record, provenance, write_json
from svdalign.lab.training.run import train
from svdalign.lab.training.trainer import Trainer

JOB: dict[str, Any] = {
    "data": "cifar10", "image_size": 16, "train_limit": 20_000, "validation": 10_000,
    "augment": ["crop", "flip"], "epochs": 8,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--config", type=Path, help="YAML of a job, with images held out")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tune.json"))
    parser.add_argument("--runs", type=Path, default=Path("runs/tune"), help="folder of the runs")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rates", type=float, nargs="+", default=(5e-3, 1e-2, 2e-2))
    parser.add_argument("--tries", type=int, default=5, help="rates that each method tries")
    parser.add_argument("--methods", nargs="+", default=list(methods.METHODS))
    parser.add_argument(
        "--settings", type=json.loads, default={}, help="by method, any fields of its runs, as JSON"
    )
    options = parser.parse_args()
    fields = JOB if options.config is None else yaml.safe_load(options.config.read_text())
    fields |= {"data_dir": options.data_dir, "threads": options.threads}
    job = from_dict(JobConfig, fields)
    if job.validation is None:
        parser.error(f"{options.config} must hold images out: validation is null")
    settings = check_settings(options.settings, options.methods)
    prepare_machine(job)
    data = load_data(job)

    def measure(name: str, rate: float) -> float:
        reached = []
        for seed in range(options.seeds):
            config = method_config(name, job, seed=seed, lr=rate, settings=settings.get(name))
            record = Record(options.runs / f"{name}-{rate:g}-seed{seed}")
            result = record.results()
            if result is None:
                result = train(Trainer(config, data, build_learner(config, data)), record)
            diverged = result["status"] == "diverged"
            reached.append(0.0 if diverged else result["accuracy"])
        print(f"{name:12} lr {rate:g}: {statistics.mean(reached):.4f}", flush=True)
        return statistics.mean(reached)

    content: dict[str, Any] = {
        "job": dataclasses.asdict(job),
        "settings": settings,
        "seeds": options.seeds,
        "labels": {name: methods.get(name).label for name in options.methods},
        "accuracy": {},
        **provenance("cpu"),
    }
    for name in options.methods:
        found = search(lambda rate, name=name: measure(name, rate), options.rates, options.tries)
        content["accuracy"][name] = {f"{rate:g}": accuracy for rate, accuracy in found.items()}
        if at_edge(found):
            print(f"{name}: the best lies at the edge; no result without more --tries")
        write_json(options.out, content)


if __name__ == "__main__":
    main()
