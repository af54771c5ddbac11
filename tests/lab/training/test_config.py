from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import yaml

from svdalign.lab import methods, models
from svdalign.lab.training.build import make_rule
from svdalign.lab.training.config import RunConfig
from svdalign.lab.training.options import to_yaml


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "epochs must be at least 1, got 0"),
        ("epochs", -3, "epochs must be at least 1, got -3"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("train_limit", 0, "train_limit must be at least 1, got 0"),
        ("horizon", -1, "horizon must be at least 0, got -1"),
        ("seed", -1, "seed must be at least 0"),
        ("threads", 0, "threads must be at least 1"),
        ("lr", 0.0, "lr must be above 0, got 0.0"),
        ("lr", float("nan"), "lr must be above 0, got nan"),
        ("width", -1.0, "width must be above 0"),
        ("rank", 0, "rank must be .* whole number of at least 1, got 0"),
        ("rank", 1.5, "rank must be a fraction in"),
        ("weight_decay", -0.1, "weight_decay must be at least 0"),
        ("label_smoothing", 1.0, "label_smoothing must be below 1"),
        ("momentum", 1.0, "momentum must be below 1"),
        ("warmup", 1.5, "warmup must be at most 1"),
        (
            "augment",
            ["rotate"],
            "augment must be any of crop, translate, flip, alternate, cutout, got 'rotate'",
        ),
    ],
)
def test_a_value_that_cannot_be_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(**{field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nesterov": True}, "nesterov needs optimizer sgd and a momentum above 0"),
        ({"nesterov": True, "optimizer": "sgd", "momentum": 0.0}, "nesterov needs optimizer sgd"),
        ({"bias_lr": 0.0}, "bias_lr must be above 0, got 0"),
        ({"bias_lr": 2.0, "optimizer": "muon"}, "bias_lr must be 1 with optimizer muon, got 2"),
        ({"nesterov": True, "optimizer": "muon"}, "nesterov needs optimizer sgd"),
        ({"lookahead": 0}, "lookahead must be at least 1, got 0"),
        ({"tta": 1}, "tta must be true or false, got 1"),
        ({"rank_parameters": 1.5}, "rank_parameters must be a fraction in"),
        ({"rank_parameters": 0}, "rank_parameters must be .* of at least 1, got 0"),
        ({"rank_parameters": 0.5}, "rank_parameters needs rank_freeze"),
        ({"rank_parameters": 0.5, "rank_energy": 0.9}, "not both"),
        ({"rank_parameters": 0.5, "rank_freeze": 5}, "rank_freeze, .* at most .* 4, got 5"),
        ({"rank_parameters": 0.5, "rank_freeze": 2, "rule": "ssa-dense"}, "needs factored weights"),
        ({"factor_classifier": True, "rule": "bp-dense"}, "factor_classifier needs factored"),
    ],
)
def test_a_budget_of_parameters_needs_a_way_there(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(**changes)


def test_yaml_gives_the_config_back() -> None:
    config = RunConfig(rule="ssa-dense", augment=["flip"], options={"alpha": 0.5}, lr=1e-4)
    assert RunConfig(**yaml.safe_load(to_yaml(config))) == config


def test_options_of_the_command_line_are_yaml() -> None:
    config = RunConfig(options={"alpha": "0.5", "learn": "false", "grid": "null"})
    assert config.options == {"alpha": 0.5, "learn": False, "grid": None}


def test_the_rule_takes_horizon_error_and_options() -> None:
    rule = make_rule(RunConfig(rule="ssa", horizon=2, error="output", options={"alpha": 0.25}))
    assert (rule.horizon, rule.error) == (2, "output")
    assert dataclasses.asdict(rule)["alpha"] == 0.25


def test_an_option_the_rule_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="rule 'ssa' has no option alhpa; it has"):
        make_rule(RunConfig(rule="ssa", options={"alhpa": 1}))


@pytest.mark.parametrize(("name", "known"), [("rule", methods), ("model", models)])
def test_help_names_everything_there_is(name: str, known: Any) -> None:
    (field,) = (f for f in dataclasses.fields(RunConfig) if f.name == name)
    words = re.findall(r"[\w-]+", field.metadata["help"])
    assert set(known.available()) <= set(words)
