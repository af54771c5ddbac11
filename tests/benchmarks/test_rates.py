"""What is published ran at rates that a search found best, and that lie inside it."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from svdalign.lab.experiments.paper import specs
from svdalign.lab.experiments.search import at_edge, best
from svdalign.lab.experiments.variants import folder_name

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


#: What methods are called in searches of the time when ``ssa`` meant a horizon of two.
THEN = {
    "ssa": "ssa-local", "ssa-fixed": "ssa-local-fixed", "ssa-target": "ssa-local-target",
    "ssa-2": "ssa", "ssa-2-dense": "ssa-dense",
}  # fmt: skip


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("search", "variants"),
    [
        ("tune_perceptron", specs.PERCEPTRON),
        ("tune_resnet32", specs.DEEP),
        ("tune_smallconv", specs.EXPERIMENTS["table1"].variants),
        ("tune_smallconv", specs.EXPERIMENTS["table4"].variants),
    ],
)
def test_what_is_shown_runs_at_the_best_rates_of_its_search(search: str, variants: Any) -> None:
    accuracies = {folder_name(name): rates for name, rates in read(search)["accuracy"].items()}
    for name, variant in variants.items():
        found = accuracies[THEN.get(name, name)]
        reached = {float(rate): accuracy for rate, accuracy in found.items()}
        assert variant.method.lr == best(reached)


KEYS = {
    **{f"alignment {name}": form for form, name in specs._NAMES.items()},
    "no alignment": "none", "no orthogonality": "loose", "Hoyer, ranks cut": "cut",
    "our recipe": "ours",
}  # fmt: skip


def test_table_3_runs_at_the_best_point_of_its_search() -> None:
    crosses: dict[str, dict[tuple[float, float], float]] = defaultdict(dict)
    for row in read("reproduce/reconstruction")["rows"]:
        crosses[row["setting"]][row["x"], row["y"]] = row["accuracy"]
    for setting, points in crosses.items():
        network, _, form = setting.partition(", ")
        assert max(points, key=points.__getitem__) == specs._FOUND[network.lower()][KEYS[form]]
        middle = sorted(y for _, y in points)[len(points) // 2]
        assert not at_edge({x: a for (x, y), a in points.items() if y == middle})
