"""The vocabulary of methods, and that every command takes every one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from svdalign import rules
from svdalign.lab import methods
from svdalign.lab.cli import main
from svdalign.lab.data import ImageData, Split
from svdalign.lab.training import RunConfig, build_learner, build_model, load_run
from svdalign.lab.training.checkpointing import CheckpointedSequential
from svdalign.rules import Rule

NAMES = [
    name + suffix
    for name in methods.available()
    for suffix in ("", "-checkpointed", *(() if name.endswith("-dense") else ("-dense",)))
]
OWN = '''
import torch
from dataclasses import dataclass
from torch import nn
from svdalign.rules import Rule, SSA


@dataclass(frozen=True)
class Greedy(SSA):
    """Nothing but a unit's own readout."""
    name: str = "greedy"
    horizon: int = 0
    alpha: float = 0.0


class Net(nn.Sequential):
    def __init__(self, in_channels, num_classes):
        super().__init__(
            nn.Conv2d(in_channels, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(8 * 49, num_classes),
        )


class Loop(Net):
    def forward(self, x):
        return torch.cat([super(Loop, self).forward(image[None]) for image in x])


def mlp(in_channels, num_classes, image_size, width):
    size, hidden = in_channels * image_size**2, int(32 * width)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
    )


def frozen(config, data):
    """Trains the classifier alone."""
    from svdalign.lab.training import Trainer, build_learner

    def groups(parameters):
        return [{"params": [p], "lr_scale": float(p is parameters[-1])} for p in parameters]

    return Trainer(config, data, build_learner(config, data, groups=groups))


def no_trainer(config, data):
    return None


def touch(**anything):
    open("touched", "w").close()


def nothing(in_channels, num_classes):
    return None
'''


@pytest.fixture
def _own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_things.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture(scope="module")
def images() -> ImageData:
    x = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8)
    split = Split(x, torch.arange(8) % 2)
    return ImageData("noise", split, split, ("a", "b"), (0.5,), (0.25,))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_makes_a_step(name: str, images: ImageData) -> None:
    config = RunConfig(rule=name, model="smallconv", width=0.25, batch_size=8)
    learner = build_learner(config, images)
    dense = name.endswith(("-dense", "-dense-checkpointed"))
    assert any(p.endswith(".U") for p, _ in learner.model.named_parameters()) != dense
    assert (config.rank is None) == dense
    twice = any(isinstance(m, CheckpointedSequential) for m in learner.model.modules())
    assert (twice or learner.recompute) == name.endswith("-checkpointed")
    report = learner.step(*example(images))
    assert torch.isfinite(report.loss)


def example(images: ImageData) -> tuple[torch.Tensor, torch.Tensor]:
    return images.train.images.float() / 255, images.train.labels


@pytest.mark.parametrize("name", ["bp", "bp-dense", "ssa", "dfa-dense"])
def test_checkpointed_computes_the_same(name: str, images: ImageData) -> None:
    """Batch norm in the mode that leaves no trace, for it sees a batch twice."""
    found = []
    for rule in (name, f"{name}-checkpointed"):
        config = RunConfig(rule=rule, model="smallconv", width=0.25, batch_size=8, fuse=False)
        found.append(build_learner(config, images).gradients(*example(images)))
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient)


def test_a_name_is_what_it_says() -> None:
    assert methods.get("bp").label == "SVD-BP"
    assert methods.get("bp-dense").label == "BP"
    assert methods.get("bp-dense-checkpointed").label == "BP, checkpointed"
    assert methods.get("drtp-dense-checkpointed").label == "DRTP, dense, checkpointed"
    for name in NAMES:
        method = methods.get(name)
        again = RunConfig(rule=name)
        # What a run's config says by itself is the same method.
        assert RunConfig(**again.__dict__) == again
        assert again.method.factored == method.factored
        assert again.method.checkpointed == method.checkpointed
        assert again.rate == method.lr


@pytest.mark.parametrize(
    "name",
    ["", "-dense", "bp-checkpointed-dense", "bp-dense-dense", "ssa-checkpointed-checkpointed"],
)
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unknown method"):
        methods.get(name)


def test_a_registered_rule_is_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    from svdalign.rules import _registry

    monkeypatch.setattr(_registry, "_rules", dict(_registry._rules))
    rules.register(rules.DFA(name="dfa-of-mine", grid=3))
    method = methods.get("dfa-of-mine-dense")
    assert (method.rule, method.factored, method.lr) == ("dfa-of-mine", False, methods.DEFAULT_LR)
    assert RunConfig(rule="dfa-of-mine-dense").rule == "dfa-of-mine-dense"


SMALL = ["--train-limit", "64", "--test-limit", "20", "--batch-size", "32", "--epochs", "1"]


@pytest.mark.usefixtures("_own")
def test_a_rule_and_a_network_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "--model", "own_things:Net", "--units", "layer"]
    rule = "own_things:Greedy-dense-checkpointed"
    assert main(["train", *words, "--rule", rule, "--out", "a"]) == 0
    assert json.loads(Path("a/results.json").read_text())["config"]["rule"] == rule
    own = ["own_things:Greedy", "bp-dense"]
    assert main(["compare", *words, "--rules", *own, "--out", "b"]) == 0
    rows = json.loads(Path("b/results.json").read_text())["summary"]
    assert [row["method"] for row in rows] == own
    assert "Greedy" in capsys.readouterr().out
    profile = ["profile", "--estimate", "true", "--model", "own_things:mlp", "--width", "0.5"]
    assert main([*profile, "--methods", *own, "--out", "c"]) == 0


@pytest.mark.usefixtures("_own")
def test_a_trainer_of_ones_own_is_part_of_the_run() -> None:
    words = [*SMALL, "--model", "own_things:Net", "--rule", "bp-dense"]
    assert main(["train", *words, "--trainer", "own_things:frozen", "--out", "a"]) == 0
    trainer = load_run("a")
    initial = build_model(trainer.config, trainer.data).state_dict()
    *others, last = trainer.learner.model.state_dict().items()
    assert all(torch.equal(value, initial[name]) for name, value in others)
    assert not torch.equal(last[1], initial[last[0]])
    assert main(["train", "--resume", "a", "--epochs", "2"]) == 0
    assert len(load_run("a").learner.optimizer.param_groups) == len(initial)


@pytest.mark.usefixtures("_own")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_things:nothing", "takes config and data; config, data is not among its parameters"),
        ("own_things:Nothing", "own_things:Nothing cannot be imported"),
        ("own_things", "must be package.module:Name"),
        ("own_things:no_trainer", "must make a svdalign.lab.training.Trainer, got NoneType"),
    ],
)
def test_what_is_no_trainer_is_refused(
    name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *SMALL, "--model", "mlp", "--trainer", name, "--out", "a"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("a").exists()


@pytest.mark.usefixtures("_own")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "own_things:Net"}, "Rule"),
        ({"rule": "own_things:Nothing"}, "Nothing"),
        ({"rule": "no_such_module:Rule"}, "no_such_module"),
        ({"model": "own_things:Nothing"}, "own_things:Nothing cannot be imported"),
        ({"model": "own_things:touch"}, "in_channels, num_classes is not among its parameters"),
        ({"model": "own_things:nothing"}, "must make an nn.Module, got NoneType"),
        ({"model": "own_things:Net", "width": 0.5}, "takes no width, got width 0.5"),
        ({"model": "own_things:Loop"}, "fuse must be false for this network: .* cannot be traced"),
    ],
)
def test_what_cannot_be_used_is_refused_and_not_called(
    changes: dict[str, Any], message: str, images: ImageData
) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(RunConfig(**changes), images)
    assert not Path("touched").exists()


def test_rules_are_told_apart_by_name_alone() -> None:
    assert all(isinstance(methods.get(name).make_rule(), Rule) for name in NAMES)
