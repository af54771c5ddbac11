"""Choose each method's learning rate, with the same effort for all, on held-out training images.

    python benchmarks/tune.py --data-dir FOLDER [--out benchmarks/results/tune.json]

SmallConv on CIFAR-10 at 16 x 16, eight epochs on 10,000 training images, accuracy on 10,000
others held out of the training set; every method at every rate of the same grid, two seeds. The
test images are not looked at. What comes out is written into
``svdalign/lab/experiments/methods.py``
by hand and used unchanged on every other job.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

from svdalign.lab.experiments.methods import METHODS, check_settings, method_config
from svdalign.lab.training.build import build_learner, load_data, prepare_machine
from svdalign.lab.training.config import JobConfig
from svdalign.lab.training.record import Record, provenance
from svdalign.lab.training.run import train
from svdalign.lab.training.trainer import Trainer

RATES = (5e-3, 1e-2, 2e-2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tune.json"))
    parser.add_argument("--runs", type=Path, default=Path("runs/tune"), help="folder of the runs")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--model", default="smallconv", help="another network, to see what moves")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument(
        "--settings", type=json.loads, default={}, help="by method, any fields of its runs, as JSON"
    )
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--data", default="cifar10", help="another data set, likewise")
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    options = parser.parse_args()
    job = JobConfig(
        model=options.model,
        width=options.width,
        precision=options.precision,
        data=options.data,
        data_dir=options.data_dir,
        image_size=options.image_size,
        train_limit=20_000,
        validation=10_000,
        augment=["crop", "flip"],
        epochs=8,
        threads=options.threads,
    )
    settings = check_settings(options.settings, options.methods)
    prepare_machine(job)
    data = load_data(job)
    found: dict[str, dict[str, float]] = {}
    for name in options.methods:
        for rate in options.rates:
            reached = []
            for seed in range(options.seeds):
                config = method_config(name, job, seed=seed, lr=rate, settings=settings.get(name))
                record = Record(options.runs / f"{name}-{rate}-seed{seed}")
                result = record.results()
                if result is None:
                    result = train(Trainer(config, data, build_learner(config, data)), record)
                reached.append(result["accuracy"])
            found.setdefault(name, {})[f"{rate:g}"] = statistics.mean(reached)
            print(f"{name:12} lr {rate:g}: {statistics.mean(reached):.4f}", flush=True)
    best = {name: max(rates, key=rates.__getitem__) for name, rates in found.items()}
    labels = {name: METHODS[name].label for name in found}
    content = {"job": dataclasses.asdict(job), "settings": settings, "labels": labels}
    content |= {"accuracy": found, "best": best, **provenance("cpu")}
    options.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
