"""BioTorch's DFA and uSF beside ours: same network, images, order, schedule and budget.

    python -m venv build/peers
    build/peers/bin/pip install -c constraints.txt -e .
    build/peers/bin/pip install --no-deps biotorch==0.0.16
    build/peers/bin/python benchmarks/peers.py --data-dir FOLDER

biotorch 0.0.16 asks for torchvision, Jupyter and torchattacks, hence an environment of its own and
``--no-deps``. Its layers and ``BioModule`` need torch alone and run unchanged on torch 2.13; its
models, data sets and ``Benchmark`` need torchvision and are not used. Its DFA relies on non-full
backward hooks, which torch calls deprecated, so what they do is checked here against DFA by hand.

SmallConv on CIFAR-10 at 16 x 16. Every method, ours too, gets the learning rate that the search of
``svdalign tune`` finds for it on held-out images, then three seeds. ``angles``: degrees to
BP's gradient at the end of training, layer by layer. Step times are taken in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import statistics
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from biotorch.module.biomodule import BioModule
from torch import Tensor, nn

from svdalign import Learner, StepReport
from svdalign.lab import methods
from svdalign.lab.costs import alternate
from svdalign.lab.data import ImageData
from svdalign.lab.experiments.search import best, search
from svdalign.lab.methods import METHODS, Method
from svdalign.lab.training.build import build_learner, build_model, load_data, prepare_machine
from svdalign.lab.training.config import JobConfig, RunConfig, method_config
from svdalign.lab.training.record import provenance, write_json
from svdalign.lab.training.trainer import Trainer

OURS: dict[str, Method] = {
    "bp-dense": METHODS["bp-dense"],
    "dfa-dense": METHODS["dfa-dense"],
    "sign-dense": methods.get("sign-symmetric-dense"),
}
PEERS = {"biotorch-dfa": ("BioTorch DFA", "dfa"), "biotorch-usf": ("BioTorch uSF", "usf")}
SEEDS = range(3)
RATES, TRIES = (5e-3, 1e-2, 2e-2), 5


class Peer:
    """A network that biotorch converted to ``mode``, as :class:`Trainer` wants a learner.

    It starts from the weights that ours start from; a step is that of biotorch's own loop.
    """

    def __init__(self, config: RunConfig, data: ImageData, mode: str) -> None:
        self.mode = mode
        torch.manual_seed(config.seed)
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = BioModule(
                build_model(config, data), mode=mode, output_dim=data.num_classes
            )
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            config.lr,
            betas=(config.momentum, config.beta2),
            weight_decay=config.weight_decay,
        )

    def backward(self, x: Tensor, y: Tensor) -> StepReport:
        z = self.model(x, y, F.cross_entropy) if self.mode == "dfa" else self.model(x)
        loss = F.cross_entropy(z, y)
        loss.backward()
        return StepReport(loss.detach(), (z.detach().argmax(-1) == y).float().mean(), {})

    def step(self, x: Tensor, y: Tensor) -> StepReport:
        self.optimizer.zero_grad()
        report = self.backward(x, y)
        self.optimizer.step()
        return report

    def gradients(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        self.optimizer.zero_grad()
        self.backward(x, y)
        named = self.model.module.named_parameters()
        return {name: p.grad for name, p in named if p.grad is not None}

    def by_hand(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """DFA as biotorch defines it, without its hooks: the output's error, the same at every
        position, goes through the feedback of the layer above and from there to the layer."""
        net = self.model.module
        z = net(x).detach().requires_grad_()
        (error,) = torch.autograd.grad(F.cross_entropy(z, y), z)
        starts = [i for i, layer in enumerate(net) if isinstance(layer, nn.Conv2d | nn.Linear)]
        found: dict[str, Tensor] = {}
        for start, end in itertools.pairwise(starts):
            x = net[start:end](x.detach())  # no gradient of the input, so the hook stays away
            above = net[end]
            if isinstance(above, nn.Conv2d):
                spread = error[:, :, None, None].expand(-1, -1, *x.shape[2:])
                delta = F.conv_transpose2d(spread, above.weight_backward, padding=above.padding)
            else:
                delta = error @ above.weight_backward
            here = {
                f"{i}.{name}": p
                for i in range(start, end)
                for name, p in net[i].named_parameters()
                if p.requires_grad
            }
            found |= zip(here, torch.autograd.grad(x, list(here.values()), delta), strict=True)
        return found


def config_of(name: str, job: JobConfig, *, seed: int, lr: float) -> RunConfig:
    return method_config(OURS.get(name, METHODS["bp-dense"]), job, seed=seed, lr=lr)


def learner_of(name: str, config: RunConfig, data: ImageData) -> Learner | Peer:
    if name in PEERS:
        return Peer(config, data, PEERS[name][1])
    return build_learner(config, data)


def train(name: str, job: JobConfig, data: ImageData, *, seed: int, lr: float) -> Trainer:
    config = config_of(name, job, seed=seed, lr=lr)
    trainer = Trainer(config, data, learner_of(name, config, data))  # type: ignore[arg-type]
    trainer.run()
    accuracy = trainer.history[-1]["test_accuracy"]
    print(f"{name:12} seed {seed}, lr {lr:g}: {accuracy:.4f}", flush=True)
    return trainer


def accuracy_of(trainer: Trainer) -> float:
    return float(trainer.history[-1]["test_accuracy"])


def degrees(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> list[float]:
    """Angle between two gradients of each convolution and of the classifier, 0 to rounding."""
    angles = []
    for name, other in reference.items():
        if other.dim() > 1:
            a, b = found[name].double().flatten(), other.double().flatten()
            across = (a / a.norm() - b / b.norm()).norm() / 2
            angles.append(torch.rad2deg(2 * torch.asin(across.clamp(max=1))).item())
    return angles


def angles_to_bp(trainer: Trainer) -> list[float]:
    """Angles of the learner's gradients to BP's at the same weights, on the next batch."""
    x, y = next(trainer.batches())
    model = trainer.learner.model
    net = build_model(trainer.config, trainer.data)
    own = getattr(model, "module", model).state_dict()
    net.load_state_dict({name: own[name] for name in net.state_dict()})
    F.cross_entropy(net(x), y).backward()
    exact = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return degrees(trainer.learner.gradients(x, y), exact)


def check(job: JobConfig, data: ImageData) -> dict[str, float]:
    """Largest angle between biotorch's gradients and what they have to be, in degrees.

    DFA's is by hand. uSF's is our sign-symmetric rule, another program for the same directions: the
    two scale the signs of a layer differently, which turns no gradient.
    """
    made = {
        name: learner_of(name, config_of(name, job, seed=0, lr=1e-3), data)
        for name in ("sign-dense", *PEERS)
    }
    config = config_of("bp-dense", job, seed=0, lr=1e-3)
    trainer = Trainer(config, data, made["sign-dense"])  # type: ignore[arg-type]
    x, y = next(trainer.batches())
    wanted = {
        "biotorch-dfa": made["biotorch-dfa"].by_hand(x, y),
        "biotorch-usf": made["sign-dense"].gradients(x, y),
    }
    found = {
        name: max(degrees(made[name].gradients(x, y), gradients))
        for name, gradients in wanted.items()
    }
    if max(found.values()) > 0.1:
        raise RuntimeError(f"biotorch's gradients are not what they should be: {found} degrees")
    return found


def step_times(job: JobConfig, data: ImageData, rounds: int) -> dict[str, Any]:
    """Median step and its ratio to BP's and to our DFA's, all in turns."""
    configs = {name: config_of(name, job, seed=0, lr=1e-3) for name in (*OURS, *PEERS)}
    learners = {name: learner_of(name, config, data) for name, config in configs.items()}
    trainer = Trainer(configs["bp-dense"], data, learners["bp-dense"])  # type: ignore[arg-type]
    x, y = next(trainer.batches())
    times = alternate(
        {name: lambda learner=learner: learner.step(x, y) for name, learner in learners.items()},
        rounds=rounds,
        warmup=5,
    )
    return {
        name: {
            "step_seconds": time.median,
            "step_ratio": time.ratio(times["bp-dense"]),
            "step_ratio_to_dfa": time.ratio(times["dfa-dense"]),
        }
        for name, time in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers.json"))
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "Using a non-full backward hook", FutureWarning)
    job = JobConfig(
        data="cifar10",
        data_dir=options.data_dir,
        image_size=16,
        train_limit=10_000,
        augment=["crop", "flip"],
        epochs=8,
        threads=options.threads,
    )
    tuning = dataclasses.replace(job, validation=2_000, epochs=6)
    prepare_machine(job)
    data, held_out = load_data(job), load_data(tuning)
    checked = check(job, data)
    print(f"degrees off: {checked}", flush=True)
    times = step_times(job, data, options.rounds)
    labels = {name: method.label for name, method in OURS.items()}
    labels |= {name: label for name, (label, _) in PEERS.items()}
    rows = []
    for name, label in labels.items():
        found = search(
            lambda rate, name=name: accuracy_of(train(name, tuning, held_out, seed=0, lr=rate)),
            RATES,
            TRIES,
        )
        rate = best(found)
        runs = [train(name, job, data, seed=seed, lr=rate) for seed in SEEDS]
        accuracies = [accuracy_of(run) for run in runs]
        rows.append(
            {
                "method": name,
                "label": label,
                "search": {f"{rate:g}": accuracy for rate, accuracy in found.items()},
                "lr": rate,
                "accuracies": accuracies,
                "accuracy": statistics.mean(accuracies),
                "accuracy_std": statistics.stdev(accuracies),
                "angles": angles_to_bp(runs[0]),
                **times[name],
            }
        )
    content = {
        "biotorch": metadata.version("biotorch"),
        "config": dataclasses.asdict(job),
        "degrees_off": checked,
        "rows": rows,
        **provenance("cpu"),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, content)


if __name__ == "__main__":
    main()
