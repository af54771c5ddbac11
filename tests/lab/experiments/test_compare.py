from __future__ import annotations

import dataclasses
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from svdalign.lab.experiments import METHODS, CompareConfig, Comparison, card
from svdalign.lab.experiments.compare import summarise
from svdalign.lab.experiments.variants import Entry
from svdalign.lab.reports import comparison_table
from svdalign.lab.training.build import make_rule
from svdalign.lab.training.config import method_config

TINY: dict[str, Any] = {
    "model": "mlp",
    "width": 0.1,
    "train_limit": 64,
    "test_limit": 30,
    "batch_size": 32,
    "epochs": 2,
    "rules": ["bp-dense", "ssa"],
}


def compare(folder: Path, *, overwrite: bool = False, stop_after: int = 99, **changes: Any) -> Any:
    """``stop_after``: steps."""
    comparison = Comparison(CompareConfig(**{**TINY, **changes}), folder, overwrite=overwrite)
    asked = iter(range(1, 100))

    def stop() -> bool:
        return next(asked) > stop_after

    return comparison.run(stop=stop)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_names_a_rule_and_differs_from_the_job_in_that_alone(name: str) -> None:
    job = CompareConfig(**TINY, rank=0.3)
    config = method_config(name, job, seed=3)
    assert make_rule(config).name == METHODS[name].rule
    assert config.seed == 3
    assert config.rank == (0.3 if METHODS[name].factored else None)
    assert method_config(name, job, seed=0, lr=0.5).lr == 0.5
    for field in dataclasses.fields(CompareConfig):
        if hasattr(config, field.name) and field.name not in ("lr", "rank"):
            assert getattr(config, field.name) == getattr(job, field.name)


def test_settings_are_of_one_method_alone() -> None:
    settings = {"dfa": {"units": "2", "options": {"beta": "0.5"}}}  # as the command line gives them
    two = {**TINY, "rules": ["bp", "dfa"]}
    job = CompareConfig(**two, settings=settings)
    bp, dfa = (job.run(variant, 0) for variant in job.variants)
    assert (dfa.units, dfa.options) == (2, {**METHODS["dfa"].options, "beta": 0.5})
    assert bp == method_config("bp", CompareConfig(**two), seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ssa": {"units": 3}}, "settings names ssa, but the methods are bp, dfa"),
        ({"dfa": 3}, "settings of dfa must be {field: value}, got 3"),
        ({"dfa": {"fuse": "maybe"}}, "fuse must be true, false or measured, got 'maybe'"),
        ({"dfa": {"unit": 3}}, "settings of dfa name unit; a run has .*units"),
        ({"dfa": {"width": -1}}, "width must be above 0, got -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message: str) -> None:
    two = {**TINY, "rules": ["bp", "dfa"]}
    with pytest.raises(ValueError, match=message):
        CompareConfig(**two, settings=settings)


def test_a_comparison_end_to_end(tmp_path: Path) -> None:
    results = compare(tmp_path, seeds=2)
    assert results["status"] == "finished"
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert [(run["method"], run["seed"]) for run in results["runs"]] == [
        ("bp-dense", 0),
        ("ssa", 0),
        ("bp-dense", 1),
        ("ssa", 1),
    ]
    dense, ssa = results["summary"]
    for row in (dense, ssa):
        mine = [r["accuracy"] for r in results["runs"] if r["method"] == row["method"]]
        assert row["accuracy"] == statistics.mean(mine)
        assert row["accuracy_std"] == statistics.stdev(mine)
        assert row["step_seconds"] > 0
        parts = ("parameters", "gradients", "optimizer", "activations")
        assert row["memory"]["peak"] == sum(row["memory"][part] for part in parts)
    assert dense["step_ratio"] == 1.0
    assert ssa["parameters"] < dense["parameters"]
    assert ssa["macs"] < dense["macs"]
    for run in ("bp-dense-seed0", "ssa-seed1"):
        names = {path.name for path in (tmp_path / run).iterdir()}
        assert names >= {"config.yaml", "metrics.jsonl", "results.json", "report.html"}


def test_the_report_is_one_page_that_needs_nothing_else(tmp_path: Path) -> None:
    compare(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count('role="img"') == 9  # spectra of the one with factors among them
    assert "SVD-BP" not in page
    assert "SSA, horizon 0" in page
    assert 'name="viewport"' in page
    for outside in ("<script ", "<link", "<img", "@import", "url(http"):
        assert outside not in page


def test_what_one_method_has_for_itself_is_told_with_the_results(tmp_path: Path) -> None:
    settings = {"ssa": {"factor_classifier": True, "epochs": 1, "options": {"alpha": 2.0}}}
    results = compare(tmp_path, settings=settings)
    table, told = io.StringIO(), "SSA, horizon 0: factor_classifier, epochs 1, alpha 2.0"
    Console(file=table, width=100).print(comparison_table(results))
    assert told in table.getvalue()
    assert told in (tmp_path / "report.html").read_text()


def test_the_same_again_runs_nothing(tmp_path: Path) -> None:
    first = compare(tmp_path)
    runs = files(tmp_path / "ssa-seed0")
    again = Comparison(CompareConfig(**TINY), tmp_path)
    assert again.pending == 0
    results = again.run()
    assert results["summary"] == first["summary"]
    assert files(tmp_path / "ssa-seed0") == runs


def test_another_seed_or_method_is_added(tmp_path: Path) -> None:
    compare(tmp_path)
    runs = files(tmp_path / "ssa-seed0")
    more = Comparison(CompareConfig(**{**TINY, "rules": ["bp-dense", "ssa", "dfa"]}), tmp_path)
    assert more.pending == 1
    assert Comparison(CompareConfig(**TINY, seeds=2), tmp_path).pending == 2
    assert files(tmp_path / "ssa-seed0") == runs


def test_results_of_another_config_are_kept_unless_told_otherwise(tmp_path: Path) -> None:
    compare(tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"another config \(epochs 2 there, 3 here\)"):
        compare(tmp_path, epochs=3)
    assert files(tmp_path) == before
    assert compare(tmp_path, epochs=3, overwrite=True)["config"]["epochs"] == 3


def test_interrupted_it_tells_what_it_has_and_goes_on_later(tmp_path: Path) -> None:
    # 4 steps a run, asked after each and before each run: in the second epoch of the second run.
    results = compare(tmp_path, stop_after=8)
    assert results["status"] == "interrupted"
    assert [run["status"] for run in results["runs"]] == ["finished", "interrupted"]
    dense, ssa = results["summary"]
    assert dense["complete"]
    assert not ssa["complete"]
    assert ssa["accuracy"] == results["runs"][1]["history"][0]["test_accuracy"]
    table = io.StringIO()
    Console(file=table, width=100).print(comparison_table(results))
    assert " so far" in table.getvalue()
    assert "Interrupted" in (tmp_path / "report.html").read_text()
    assert Comparison(CompareConfig(**TINY), tmp_path).pending == 1
    resumed = compare(tmp_path)
    assert resumed["status"] == "finished"
    fresh = compare(tmp_path / "fresh")
    assert [r["accuracy"] for r in resumed["runs"]] == [r["accuracy"] for r in fresh["runs"]]


def test_interrupted_before_anything_is_measured(tmp_path: Path) -> None:
    results = compare(tmp_path, stop_after=0)
    assert results["status"] == "interrupted"
    assert results["runs"] == []
    assert [row["accuracy"] for row in results["summary"]] == [None, None]
    Console(file=io.StringIO()).print(comparison_table(results))


def test_rates_can_be_given_by_method() -> None:
    config = CompareConfig(**{**TINY, "rules": ["bp", "ssa"], "lr": {"ssa": 0.25}})
    assert [config.run(variant, 0).lr for variant in config.variants] == [METHODS["bp"].lr, 0.25]


CHANGES: dict[str, Any] = {
    "as it is": {},
    "half the rank": {"rank": 0.25, "rules": ["ssa"]},
    "slow": {"lr": 0.001, "options": {"beta": "0.5"}, "rules": ["ssa"]},
}


def test_changes_are_made_one_at_a_time_on_top_of_a_methods_own_settings() -> None:
    settings = {"ssa": {"epochs": 1, "options": {"alpha": 3.0}}}
    job = CompareConfig(**TINY, changes=CHANGES, settings=settings)
    plain, ssa, half, slow = (job.run(variant, 0) for variant in job.variants)
    assert [variant.name for variant in job.variants] == [
        "bp-dense, as it is", "ssa, as it is", "ssa, half the rank", "ssa, slow",
    ]  # fmt: skip
    assert plain == method_config("bp-dense", job, seed=0)
    assert ssa == method_config("ssa", job, seed=0, settings=settings["ssa"])
    assert half == dataclasses.replace(ssa, rank=0.25)
    assert slow == dataclasses.replace(ssa, lr=0.001, options={"alpha": 3.0, "beta": 0.5})


def test_a_comparison_of_changes_names_them_and_goes_on(tmp_path: Path) -> None:
    changes = {"changes": CHANGES, "costs": False, "epochs": 1}
    part = compare(tmp_path, stop_after=4, **changes)
    assert part["status"] == "interrupted"
    results = compare(tmp_path, **changes)
    assert [(row["of"], row["change"], row["runs"]) for row in results["summary"]] == [
        ("BP", "as it is", 1), ("SSA, horizon 0", "as it is", 1),
        ("SSA, horizon 0", "half the rank", 1), ("SSA, horizon 0", "slow", 1),
    ]  # fmt: skip
    ranks = [max(run["history"][-1]["ranks"].values()) for run in results["runs"][1:]]
    assert ranks[0] == 2 * ranks[1] == ranks[2]
    assert results["runs"][2]["config"]["rank"] == 0.25
    assert (tmp_path / "ssa-half-the-rank-seed0" / "results.json").exists()
    assert "SSA, horizon 0, slow" in (tmp_path / "report.html").read_text()
    assert Comparison(CompareConfig(**{**TINY, **changes}), tmp_path).pending == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": {"rnk": 1}}, "settings of a name rnk; a run has"),
        ({"a": 3}, "settings of a must be {field: value}, got 3"),
        ({"half": {"rank": 0.25}}, "'half' changes nothing of bp-dense; name"),
        ({"a, b": {"width": 0.5}, "a b": {"width": 0.4}}, "changes must differ in letters"),
    ],
)
def test_changes_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompareConfig(**TINY, changes=changes)


def test_what_compact_networks_take_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card, "BATCHES", (1,))
    changes = {"rules": ["ssa"], "costs": False, "compact": True}
    (run,) = compare(tmp_path, **changes)["runs"]
    found = run["compact"]
    assert 0 < found["parameters"]["ratio"] < 1
    sizes = found["parameters"]
    assert sizes["ratio"] == sizes["compact"] / sizes["dense"]
    assert sizes["compact"] < run["parameters"]  # s and the norms are folded into the weights
    assert [row["batch"] for row in found["latency"]] == [1]
    (again,) = compare(tmp_path, **changes)["runs"]
    assert again["compact"] == found  # a latency is not measured the same twice


def test_a_summary_prefers_whole_runs(tmp_path: Path) -> None:
    def run(seed: int, status: str, accuracy: float | None) -> dict[str, Any]:
        sizes = {"parameters": 100 + seed, "macs": 1000}  # ranks were cut
        return {"method": "bp", "seed": seed, "status": status, "accuracy": accuracy, **sizes}

    whole, part = run(0, "finished", 0.8), run(1, "interrupted", 0.2)
    entries = [Entry(METHODS["bp"], given="bp")]
    costs = {"bp": {"parameters": 200, "macs": 2000, "step_seconds": 1.0}}
    (row,) = summarise(entries, [whole, part], costs)
    assert (row["accuracy"], row["accuracy_std"], row["runs"]) == (0.8, None, 1)
    assert (row["parameters"], row["macs"], row["step_seconds"]) == (100, 1000, 1.0)
    (row,) = summarise(entries, [part], costs)
    assert (row["accuracy"], row["complete"], row["parameters"]) == (0.2, False, 200)
    (row,) = summarise(entries, [whole, run(2, "finished", 0.6)], costs)
    assert row["parameters"] == 101


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rules": ["bp", "backprop"]}, r"unknown method 'backprop' \(available: bp-dense, bp"),
        ({"rules": []}, "rules must be at least one"),
        ({"rules": ["bp", "bp"]}, "each once"),
        ({"seeds": 0}, "seeds must be at least one"),
        ({"seeds": [1, 1]}, "each once"),
        ({"seeds": [-1]}, "seed must be at least 0"),
        ({"lr": -1.0}, "lr must be above 0"),
        ({"lr": {"bpp": 0.1}}, "lr names bpp, but rules are"),
        ({"lr": {"ssa": -0.1}}, "lr must be above 0"),
        ({"epochs": -2}, "epochs must be at least 1"),
        ({"model": "transformer"}, "unknown model 'transformer'"),
        ({"data": "imagenet"}, "unknown data set 'imagenet'"),
        ({"device": "tpu"}, "device 'tpu' cannot be used"),
        ({"units": "head"}, "units must be"),
    ],
)
def test_mistakes_are_found_before_training(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Comparison(CompareConfig(**{**TINY, **changes}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
