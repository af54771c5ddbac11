from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from svdalign.lab.experiments import CompareConfig, Comparison
from svdalign.lab.experiments.profile import Profile, ProfileConfig

ROOT = Path(__file__).parents[2]
INSIDE = {"0.005": 0.5, "0.01": 0.7, "0.02": 0.6}
AT_THE_EDGE = {"0.005": 0.7, "0.01": 0.6, "0.02": 0.5}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "benchmarks" / "results_table.py"
    spec = importlib.util.spec_from_file_location("results_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with comparisons, a profile and an experiment in it."""
    folder = tmp_path_factory.mktemp("results")
    config = CompareConfig(
        model="mlp", width=0.05, train_limit=64, test_limit=30, batch_size=32, epochs=1,
        rules=["bp-dense", "ssa"], seeds=2,
    )  # fmt: skip
    comparison = Comparison(config, folder / "runs")
    size: dict[str, Any] = {"model": "mlp", "width": 0.05, "batch_size": 4, "image_size": 8}
    profiled = Profile(ProfileConfig(**size, estimate=True), folder / "profile").run()
    ran: dict[str, Any] = comparison.run()
    experiment = {
        "experiment": "table1", "title": "A title", "shows": "What it shows.", "drawing": "table",
        "rows": [{
            "label": "SSA", "setting": "", "x": None, "accuracy": 0.5, "accuracy_std": 0.01,
            "runs": 2, "parameters": 1234, "macs": 2e6,
        }],
    }  # fmt: skip
    compact = {
        "parameters": {"ratio": 0.311}, "macs": {"ratio": 0.352},
        "latency": [{"batch": 1, "ratio": 0.5}],
    }  # fmt: skip
    falling = [{"test_accuracy": a, "kept_energy": {"a": 0.9}} for a in (0.5, 0.45, 0.8)]
    cuts = {
        "summary": [
            {"method": "ssa, fixed", "change": "fixed", "accuracy": 0.804, "accuracy_std": None},
            {"method": "ssa, cut", "change": "cut", "accuracy": 0.8, "accuracy_std": 0.0141},
        ],
        "runs": [
            {"method": f"ssa, {name}", "compact": compact, "history": history}
            for name, history in (("fixed", []), ("cut", falling), ("cut", []))
        ],
    }
    source = {key: ran[key] for key in ("git", "command", "machine", "status", "torch")}
    for name, content in {
        "compared": ran,
        "profile": profiled,
        "break_even": profiled,
        "experiment": {**experiment, **source},
        "cuts": {**cuts, **source},
        "tune_smallconv": {"accuracy": {"bp-dense": INSIDE, "ssa": INSIDE, "ssa, fixed": INSIDE}},
    }.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


def test_tables_come_from_the_files(script: ModuleType, results: Path) -> None:
    text = "".join(
        f"before {name}\n<!-- table:{name} begin -->\nold\n<!-- table:{name} end -->\n"
        f"after {name}\n"
        for name in ("profile", "experiment", "break_even", "cuts")
    )
    fresh = script.render(text, script.Results(results, results))
    assert "old" not in fresh
    for name in ("profile", "experiment", "break_even", "cuts"):
        assert f"before {name}\n" in fresh
        assert f"\nafter {name}\n" in fresh
    assert "| BP, checkpointed |" in fresh
    assert "| layer | input | full rank | MACs |" in fresh
    assert "| SSA | 50.00% ± 1.00 | 2 | 1,234 | 2.00 M |" in fresh
    assert "| fixed | 80.4 | 0.0 | – | 31% | 35% | 0.50 |" in fresh
    assert "| cut | 80.0 ± 1.4 | 0.4 | 5.0 | 31% | 35% | 0.50 |" in fresh
    assert "| --- | ---: | ---: | ---: | ---: |" in fresh
    assert script.render(fresh, script.Results(results, results)) == fresh


def write(folder: Path, **contents: Any) -> None:
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_a_rate_at_the_edge_of_its_search_is_no_result(
    script: ModuleType, results: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(results, tmp_path / "results")
    tables = script.Results(copy, copy)
    assert script.searched(tables, "tune_smallconv", "ssa, fixed") == 0.01
    assert script.searched(tables, "tune_smallconv", "ssa-fixed") == 0.01
    write(copy, tune_smallconv={"accuracy": {"bp-dense": INSIDE, "ssa": AT_THE_EDGE}})
    with pytest.raises(
        ValueError, match=r"tune_smallconv of ssa: the best rate, 0\.005, lies at the"
    ):
        script.searched(tables, "tune_smallconv", "ssa")
    with pytest.raises(KeyError, match="tune_smallconv of dfa"):
        script.searched(tables, "tune_smallconv", "dfa")


def test_an_experiment_on_smallconv_ran_at_the_best_rates_of_the_search(
    script: ModuleType, results: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(results, tmp_path / "results")
    experiment = json.loads((copy / "experiment.json").read_text())
    row = {**experiment["rows"][0], "variant": "bp-dense", "label": "BP"}

    def run_at(rate: float) -> None:
        rows = [{**row, "config": {"lr": rate}}]
        write(copy / "reproduce", table1={**experiment, "rows": rows})

    (copy / "reproduce").mkdir()
    tables = script.Results(copy, copy)
    run_at(0.01)
    assert "| BP | 50.00%" in script.on_smallconv(tables, "table1")
    run_at(0.005)
    with pytest.raises(ValueError, match=r"bp-dense ran at 0\.005, but the best rate .* is 0\.01"):
        script.on_smallconv(tables, "table1")


def test_runs_of_the_bench_are_a_table_by_method(script: ModuleType, tmp_path: Path) -> None:
    def run(accuracy: float, parameters: int) -> dict[str, Any]:
        return {
            "accuracy": accuracy, "parameters": parameters,
            "history": [{"tta_accuracy": accuracy + 0.01}], "config": {"optimizer": "sgd", "lr": 1},
        }  # fmt: skip

    (tmp_path / "airbench").mkdir()
    write(tmp_path / "airbench", **{"bp-dense-0": run(0.93, 100), "bp-dense-1": run(0.94, 100)})
    write(tmp_path / "airbench", **{"bp-0": run(0.92, 50)})
    common = {"settings": {}, "job": {"optimizer": "sgd"}, "labels": {"bp": "F", "bp-dense": "D"}}
    searches = {"search-bp-dense-sgd": "bp-dense", "search-bp-adamw": "bp"}
    found = {f: {**common, "accuracy": {method: INSIDE}} for f, method in searches.items()}
    write(tmp_path / "airbench", **found)
    tables = script.Results(tmp_path, tmp_path)
    assert (
        "| D | sgd | 0.01 | 50.0 / **70.0** / 60.0 | 0.005 / 0.01 / 0.02 |"
        in script.airbench_search(tables)
    )
    learned = {"test_accuracy": 0.6, "train_accuracy": 0.5}
    lever = {"history": [learned], "config": {"optimizer": "sgd", "lr": 1}}
    write(tmp_path / "airbench", **{"lever-blocks-0": lever})
    assert "| blocks, the classifier a unit of its own | 60.0 | 50.0 |" in (
        script.airbench_levers(tables)
    )
    write(tmp_path / "airbench", **{"lever-muon-first-0": lever})
    assert "| two units: the first convolution, all that follows | 60.0 | 50.0 |" in (
        script.TABLES["airbench_levers_muon"](tables)
    )
    table = script.airbench(tables)
    assert "| BP | 93.50 ± 0.71 | 94.50 ± 0.71 | 2 | 1.00 | sgd, 1 | 0.01 |" in table
    assert "| SVD-BP | 92.00 | 93.00 | 1 | 0.50 | sgd, 1 | 0.01 |" in table
    assert "SSA" not in table
    write(tmp_path / "airbench", **{"search-bp-adamw": {**common, "accuracy": {"bp": AT_THE_EDGE}}})
    with pytest.raises(ValueError, match="search-bp-adamw of bp: the best rate"):
        script.airbench(tables)


def test_what_is_not_there_is_left_out(
    script: ModuleType, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "<!-- table:nothing begin -->\nold\n<!-- table:nothing end -->"
    assert script.render(text, script.Results(results, results)) == text.replace("old\n", "")
    assert "no 'nothing' yet" in capsys.readouterr().err


def test_check_says_what_is_out_of_date(
    script: ModuleType, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "results").symlink_to(results)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table:profile begin -->\n<!-- table:profile end -->\n")
    stale = readme.read_text()
    monkeypatch.setattr(sys, "argv", ["results_table.py", "--check"])
    assert script.main() == 1
    assert readme.read_text() == stale
    monkeypatch.setattr(sys, "argv", ["results_table.py"])
    assert script.main() == 0
    assert readme.read_text() != stale
    monkeypatch.setattr(sys, "argv", ["results_table.py", "--check"])
    assert script.main() == 0


def test_the_tables_of_this_checkout_are_up_to_date(script: ModuleType) -> None:
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        assert (
            script.render(text, script.Results(ROOT / "benchmarks" / "results", path.parent))
            == text
        )


def test_make_compare_runs_at_the_rates_of_its_search(
    script: ModuleType, results: Path, tmp_path: Path
) -> None:
    content = json.loads((results / "compared.json").read_text())
    content["runs"] += [{**run, "method": "bp"} for run in content["runs"][:1]]
    factored = {"method": "bp", "label": "SVD-BP", "of": "SVD-BP"}
    content["summary"].append({**content["summary"][0], **factored})
    for run in content["runs"]:
        run["config"]["lr"] = 0.01
    made = {key: content[key] for key in ("git", "command", "machine", "torch")}
    search = {**made, "accuracy": dict.fromkeys(("bp-dense", "bp", "ssa"), INSIDE)}
    write(tmp_path, compare=content, tune_compare=search)
    tables = script.Results(tmp_path, tmp_path)
    table = script.TABLES["make_compare"](tables)
    reached = 100 * content["summary"][1]["accuracy"]
    assert f"| SSA, horizon 0 | {reached:.1f} ± " in table
    assert table.count("| 0.01 |") == 3
    search["accuracy"]["ssa"] = {"0.01": 0.5, "0.02": 0.7, "0.04": 0.6}
    write(tmp_path, tune_compare=search)
    tables = script.Results(tmp_path, tmp_path)
    with pytest.raises(
        ValueError, match=r"ssa ran at 0\.01, but the best rate of tune_compare is 0\.02"
    ):
        script.TABLES["make_compare"](tables)
