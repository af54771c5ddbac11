from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from svdalign.lab.experiments import METHODS
from svdalign.lab.experiments.paper import (
    EXPERIMENTS,
    SCALES,
    Experiment,
    ReproduceConfig,
    Reproduction,
    Row,
    reproduction,
)
from svdalign.lab.experiments.paper.draw import experiment_figures, experiment_table, index_page
from svdalign.lab.experiments.profile import ProfileConfig
from svdalign.lab.training.build import make_rule
from svdalign.lab.training.record import Record

JOB = {
    "model": "mlp", "width": 0.05,
    "train_limit": 64, "test_limit": 30, "epochs": 2, "batch_size": 32,
}  # fmt: skip
CUT = {"rank_energy": 0.5, "rank_min": 1}


def tiny(drawing: Any, **fields: Any) -> Experiment:
    return Experiment("A title", "what it shows", drawing, dict.fromkeys(SCALES, JOB), **fields)


TINY = {
    "layers": tiny("layers", variants={"ssa": Row(METHODS["ssa"])}, group="a", angles=True),
    "angles": tiny(
        "angles",
        variants={name: Row(METHODS[name]) for name in ("bp", "dfa-dense")},
        group="a", angles=True,
    ),
    "errors": tiny(
        "errors",
        variants={name: Row(METHODS[name]) for name in ("bp", "dfa-dense")},
        group="a", angles=True,
    ),
    "drift": tiny(
        "drift",
        variants={
            str(name): Row(METHODS["ssa-reconstruction"], {"retraction": name})
            for name in ("qr", None)
        },
        angles=True,
    ),
    "units": tiny("units", variants={"ssa": Row(METHODS["ssa"])}, group="a", angles=True),
    "ranks": tiny(
        "ranks",
        variants={
            "low": Row(METHODS["bp"], {"rank": 2}, curve="BP", x=0.1),
            "high": Row(METHODS["bp"], {"rank": 4}, curve="BP", x=0.2),
            "cut": Row(METHODS["bp"], CUT, curve="BP, cut"),
        },
    ),
    "table": tiny(
        "table",
        variants={
            "bp": Row(METHODS["bp"], setting="one"),
            "dfa": Row(METHODS["dfa"], {"rank": 3}, setting="another"),
            "large": Row(METHODS["dfa"], {"data": "cifar100"}, smoke=False),
        },
        seeds={"smoke": 2, "cpu": 1, "full": 1},
    ),
    "maps": tiny(
        "maps",
        variants={
            f"{x}-{y}": Row(METHODS["bp"], {"rank": x}, "map", x=x, y=y)
            for x, y in ((2, 0.5), (3, 0.5), (2, 1.0))
        },
        axes={"map": ("rank", "size")},
    ),
    "costs": Experiment(
        "A title", "what it shows", "costs",
        costs={scale: {
            "small": ProfileConfig(
                model="mlp", width=0.05, batch_size=4, image_size=8, seconds=0.02,
                methods=["bp-dense", "ssa"],
            ),
            "large": ProfileConfig(
                model="smallconv", image_size=32, batch_size=4, estimate=True, methods=["bp-dense"],
            ),
        } for scale in SCALES},
    ),
}  # fmt: skip


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in reversed(list(EXPERIMENTS)):  # put back last first, so in their order
        monkeypatch.delitem(EXPERIMENTS, name)
    for name, experiment in TINY.items():
        monkeypatch.setitem(EXPERIMENTS, name, experiment)


def reproduce(names: list[str], folder: Path, stop_after: int = 999, **fields: Any) -> Any:
    """``stop_after``: how often going on is granted."""
    asked = iter(range(1, 10_000))
    work = Reproduction(names, ReproduceConfig(**fields), folder)
    return work.run(stop=lambda: next(asked) > stop_after)


@pytest.mark.usefixtures("_tiny")
def test_everything_end_to_end(tmp_path: Path) -> None:
    found = reproduce(["all"], tmp_path)
    assert list(found) == list(TINY)
    page = (tmp_path / "index.html").read_text()
    for name, results in found.items():
        assert results["status"] == "finished"
        assert results == json.loads((tmp_path / f"{name}.json").read_text())
        figures = experiment_figures(results)
        for i in range(len(figures)):
            assert (tmp_path / f"{name}-{i + 1}.svg").read_text().startswith("<?xml")
            assert (tmp_path / f"{name}-{i + 1}.png").read_bytes().startswith(b"\x89PNG")
        headings, rows = experiment_table(results)
        assert all(len(row) == len(headings) for row in rows)
        assert f"<h2>{name}: A title</h2>" in page
    assert page.count("<svg") == sum(len(experiment_figures(r)) for r in found.values())
    for outside in ("<script", "<link", "<img", "@import", "url(http"):
        assert outside not in page
    runs = {path.name for path in (tmp_path / "runs").iterdir()}
    assert runs == {
        "a-ssa-seed0", "a-bp-seed0", "a-dfa-dense-seed0", "drift-qr-seed0", "drift-None-seed0",
        "ranks-low-seed0", "ranks-high-seed0", "ranks-cut-seed0",
        "table-bp-seed0", "table-bp-seed1", "table-dfa-seed0", "table-dfa-seed1",
        "maps-2-0.5-seed0", "maps-3-0.5-seed0", "maps-2-1.0-seed0",
        "costs-1", "costs-2",
    }  # fmt: skip


@pytest.mark.usefixtures("_tiny")
def test_angles_are_measured_after_every_epoch(tmp_path: Path) -> None:
    (row,) = reproduce(["layers"], tmp_path)["layers"]["rows"]
    (history,) = row["histories"]
    assert len(history) == 2
    for epoch in history:
        measured = epoch["alignment"]
        assert set(measured["layers"]) == {"1", "3", "5"}
        assert measured["layers"]["5"] == pytest.approx(0.0, abs=0.1)  # the task teaches it itself
        assert all(0 <= angle <= 180 for angle in measured["units"].values())
        assert 0 <= measured["descent_share"] <= 1


@pytest.mark.usefixtures("_tiny")
def test_backpropagations_angle_to_itself_checks_the_others(tmp_path: Path) -> None:
    results = reproduce(["angles"], tmp_path)["angles"]
    bp, dfa = (dict(zip(*row, strict=True)) for row in _columns(results))
    assert float(bp["angle"].strip("°")) < 0.1
    assert float(bp["hidden layers"].strip("°")) < 0.1
    assert bp["layers downhill"] == bp["steps downhill"] == "100%"
    assert float(dfa["hidden layers"].strip("°")) > 10


@pytest.mark.usefixtures("_tiny")
def test_drift_is_at_rounding_with_a_retraction_and_not_without(tmp_path: Path) -> None:
    held, free = reproduce(["drift"], tmp_path)["drift"]["rows"]
    for row, low, high in ((held, 0, 1e-5), (free, 1e-4, 10)):
        for epoch in row["histories"][0]:
            assert set(epoch["orthogonality"]) == {"1", "3"}  # the classifier stays dense
            assert all(low <= drift <= high for drift in epoch["orthogonality"].values())


def test_the_epoch_that_reaches_dfas_last_error() -> None:
    def row(variant: str, *seeds: list[float]) -> dict[str, Any]:
        return {
            "variant": variant, "label": variant, "setting": "", "x": None, "runs": len(seeds),
            "accuracy": 0.5, "accuracy_std": None, "parameters": 1, "macs": 1,
            "histories": [[{"test_accuracy": accuracy} for accuracy in seed] for seed in seeds],
        }  # fmt: skip

    rows = [
        row("dfa-dense", [0.1, 0.3, 0.4], [0.1, 0.2, 0.5]),
        row("sooner", [0.2, 0.5, 0.6], [0.1, 0.4, 0.7]),  # 0.45 on average after the second
        row("later", [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]),
    ]
    cells = [_columns({"drawing": "errors", "rows": rows})[i][1][-1] for i in range(3)]
    assert cells == ["3", "2", "never"]


def _columns(results: Any) -> list[tuple[list[str], list[str]]]:
    headings, rows = experiment_table(results)
    return [(list(headings), row) for row in rows]


@pytest.mark.usefixtures("_tiny")
def test_interrupted_in_the_middle_it_goes_on(tmp_path: Path) -> None:
    whole = reproduce(["table"], tmp_path / "whole")["table"]
    part = reproduce(["table"], tmp_path / "part", stop_after=4)["table"]
    assert part["status"] == "interrupted"
    index_page([part])
    assert Reproduction(["table"], ReproduceConfig(), tmp_path / "part").pending == 3
    again = reproduce(["table"], tmp_path / "part")["table"]
    assert again["status"] == "finished"
    assert [row["accuracy"] for row in again["rows"]] == [row["accuracy"] for row in whole["rows"]]
    assert [row["runs"] for row in again["rows"]] == [2, 2]
    assert Reproduction(["table"], ReproduceConfig(), tmp_path / "part").pending == 0


@pytest.mark.usefixtures("_tiny")
def test_another_config_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reproduce(["ranks"], tmp_path)
    longer = dataclasses.replace(TINY["ranks"], job={"smoke": {**JOB, "epochs": 3}})
    monkeypatch.setitem(EXPERIMENTS, "ranks", longer)
    with pytest.raises(ValueError, match=r"another config \(epochs 2 there, 3 here\)"):
        Reproduction(["ranks"], ReproduceConfig(), tmp_path)


@pytest.mark.usefixtures("_tiny")
def test_folders_of_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("my home page")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="not made by svdalign reproduce"):
            Reproduction(["ranks"], ReproduceConfig(), tmp_path, overwrite=overwrite)
    Record(tmp_path / "run", "compare").start("")
    with pytest.raises(ValueError, match="not made by svdalign reproduce"):
        Reproduction(["ranks"], ReproduceConfig(), tmp_path / "run")
    (tmp_path / "project" / "runs" / "train-001").mkdir(parents=True)
    with pytest.raises(ValueError, match="not made by svdalign reproduce"):
        Reproduction(["ranks"], ReproduceConfig(), tmp_path / "project")


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown experiment fig9; there are all, fig2"):
        Reproduction(["fig9"], ReproduceConfig(), tmp_path)
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        ReproduceConfig(seeds=0)


@pytest.mark.parametrize("scale", SCALES)
def test_every_run_of_every_scale_is_one_that_can_be(
    scale: Any, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(reproduction, "sizes", lambda data, data_dir: (10_000, 10_000))
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "images"):
        (tmp_path / folder).mkdir()
    config = ReproduceConfig(scale=scale, data_dir="data", image_folder="images")
    work = Reproduction(["all"], config, tmp_path / "out")
    assert work.pending > 0
    for name in EXPERIMENTS:
        for run in work._runs_of(name):
            make_rule(run.config)
            folder = {"embedded": None, "folder": "images"}.get(run.config.data, "data")
            assert run.config.data_dir == folder
            assert (run.config.data == "embedded") == (scale == "smoke")
    work_without = Reproduction(["table2"], ReproduceConfig(scale=scale), tmp_path / "out")
    assert all(run.config.data != "folder" for run in work_without._runs_of("table2"))


def test_a_folder_with_fewer_images_than_the_scale_takes_is_used_whole(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8)).save(tmp_path / split / label / f"{i}.png")
    config = ReproduceConfig(scale="cpu", image_folder=str(tmp_path))
    runs = Reproduction(["table2"], config, tmp_path / "out")._runs_of("table2")
    limits = {run.config.data: run.config.train_limit for run in runs}
    assert limits == {"cifar10": 10_000, "cifar100": 10_000, "folder": 6}


def test_data_that_are_not_there_are_missed_before_anything_runs(tmp_path: Path) -> None:
    config = ReproduceConfig(scale="cpu", image_folder=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"--image-folder is not a folder: .*nowhere"):
        Reproduction(["table2"], config, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    config = ReproduceConfig(scale="cpu", data_dir=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="empty"):
        Reproduction(["table1"], config, tmp_path / "out")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_run_of_an_experiment_is_told_by_its_name(name: str, tmp_path: Path) -> None:
    """Progress shows the label and the seed."""
    runs = list(Reproduction([name], ReproduceConfig(), tmp_path)._runs_of(name))
    assert len({run.shown for run in runs}) == len(runs)


def test_a_label_says_setting_method_and_point() -> None:
    def labels(name: str) -> list[str]:
        experiment = EXPERIMENTS[name]
        return [variant.label_in(experiment) for variant in experiment.variants.values()]

    assert f"{METHODS['bp'].label}, rank 0.35" in labels("ranks")
    assert "DFA, task" in labels("terms")
    assert "horizon and alignment, horizon 3, α 12.5" in labels("sensitivity")


def test_the_paper_has_its_figures_and_tables() -> None:
    assert list(EXPERIMENTS) == [
        "fig2", "fig3", "fig4", "fig5", "table1", "table2", "table3", "table4",
        "drift", "reconstruction", "vgg8-angles", "vgg8-feedback", "ranks",
        "terms", "sensitivity",
    ]  # fmt: skip
