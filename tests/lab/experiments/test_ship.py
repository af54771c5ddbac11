"""From a run folder to files, a card, and a look inside: through the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdalign import compact, export, storage
from svdalign.lab.cli import main
from svdalign.lab.costs import inference_macs, parameter_count
from svdalign.lab.experiments import card as cards
from svdalign.lab.experiments.inspection import inspect_run
from svdalign.lab.training import RunConfig, load_run
from svdalign.lab.training.build import build_model, example_batch


@pytest.fixture(autouse=True)
def _blank_figures() -> None:
    """Here figures are drawn."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = "--width 0.25 --epochs 3 --train-limit 128 --test-limit 40 --batch-size 32 --rank 0.5"
    words += " --rank-energy 0.9 --rank-min 2"
    assert main(["train", *words.split(), "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def shipped(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cards, "SECONDS", 0.1)
        patch.setattr(cards, "BATCHES", (1, 64))
        words = ["--formats", "safetensors,pt2", "--out", str(out)]
        assert main(["export", str(run), *words]) == 0
    return out


def test_card(run: Path, shipped: Path) -> None:
    card = json.loads((shipped / "card.json").read_text())
    trainer = load_run(run)
    small = compact(trainer.learner.model)
    dense = build_model(RunConfig(**card["config"]).dense(), trainer.data)
    x = example_batch(trainer.config, trainer.data)
    for key, count in (
        ("parameters", (parameter_count(small), parameter_count(compact(dense)))),
        ("macs", (inference_macs(small, x), inference_macs(dense, x))),
    ):
        expected = {"compact": count[0], "dense": count[1], "ratio": count[0] / count[1]}
        assert card[key] == expected
    results = json.loads((run / "results.json").read_text())
    assert card["test_accuracy_of_trained_model"] == results["accuracy"]
    assert card["test_accuracy"] == pytest.approx(results["accuracy"], abs=1 / 40)
    assert {r["name"]: r["rank"] for r in card["layers"]} == results["history"][-1]["ranks"]
    assert [row["batch"] for row in card["latency"]] == [1, 64]
    assert all(row["seconds"] > 0 and row["dense_seconds"] > 0 for row in card["latency"])
    assert [f["name"] for f in card["files"]] == ["model.safetensors", "model.pt2"]
    for file in card["files"]:
        assert file["bytes"] == (shipped / file["name"]).stat().st_size
        assert 0 <= file["max_abs_difference"] < 1e-4


def test_card_for_people(shipped: Path) -> None:
    card = json.loads((shipped / "card.json").read_text())
    text = (shipped / "card.md").read_text()
    assert f"**{card['test_accuracy']:.2%}**" in text
    assert "Ankle boot" in text
    assert "| `model.pt2` |" in text
    assert "onnx" not in text  # a file that was not written


def test_the_difference_is_to_the_trained_model(run: Path) -> None:
    """A file that computes something else would be seen."""
    model = load_run(run).learner.model
    x = torch.zeros(2, 1, 28, 28)
    model.eval()
    with torch.no_grad():
        assert cards._difference(model, lambda x: model(x) + 0.25, x) == pytest.approx(0.25)
    model.train()
    norm = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()
    cards._difference(model, lambda x: x.flatten(1)[:, :1], x)
    assert model.training
    assert not norm.training


def test_weights_are_those_of_the_compact_model(run: Path, shipped: Path) -> None:
    weights = load_file(shipped / "model.safetensors")
    state = compact(load_run(run).learner.model).state_dict()
    assert weights.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in weights.items())


def test_inspect(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run)]) == 0
    out = capsys.readouterr().out
    layers = json.loads((run / "inspect.json").read_text())["layers"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    state = storage.load(run / "checkpoint.safetensors")["model"]
    assert [layer["name"] for layer in layers] == list(rows[0]["ranks"])
    for layer in layers:
        name = layer["name"]
        assert f"\n{name} " in out
        U, s, V = (state[f"{name}.{factor}"].double() for factor in "UsV")
        W = (U * s) @ V.mT
        values = torch.linalg.svdvals(W)[: len(s)]
        torch.testing.assert_close(torch.tensor(layer["spectrum"]).double(), values)
        assert layer["ranks"] == [row["ranks"][name] for row in rows]
        assert layer["rank"] == len(s)
        assert layer["full_rank"] == min(W.shape)
        assert layer["dense_parameters"] == W.numel()
        assert layer["parameters"] == len(s) * (1 + sum(W.shape))
        kept = [row["kept_energy"].get(name, 1.0) for row in rows]
        assert layer["kept_energy"] == pytest.approx(torch.tensor(kept).prod().item())
        share = values.square().cumsum(0) / values.square().sum()
        assert layer["rank_for_energy"] == int((share < 0.99).sum()) + 1
        eye = torch.eye(len(s), dtype=torch.float64)
        for error, X in zip(layer["orthogonality"], (U, V), strict=True):
            assert error == pytest.approx(torch.linalg.matrix_norm(X.mT @ X - eye).item())
    for name in ("ranks.png", "ranks.svg", "spectra.png", "spectra.svg"):
        assert (run / name).stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("export nowhere", "there is no folder nowhere"),
        ("inspect nowhere", "there is no folder nowhere"),
        ("export {run} --formats tflite", "unknown format tflite; available: safetensors"),
        ("export {run} --out {run}/config.yaml", "config.yaml cannot be made: "),
        ("inspect {run}/..", "was not made by svdalign train"),
        ("inspect", "error: RUN is missing; usage: svdalign inspect RUN"),
    ],
)
def test_mistakes(run: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.format(run=run).split()) == 2
    assert message in capsys.readouterr().err


def test_a_format_that_the_network_lacks_is_named(
    run: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("its code loops")

    monkeypatch.setitem(export.FORMATS, "pt2", refuse)
    assert main(["export", str(run), "--formats", "pt2", "--out", str(tmp_path / "out")]) == 2
    assert "error: --formats must leave out pt2: its code loops" in capsys.readouterr().err


def test_a_missing_extra_is_named(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for formats, way_out in (
        ("onnx", "--formats safetensors pt2"),
        ("safetensors,onnx", "--formats safetensors"),
    ):
        assert main(["export", str(run), "--formats", formats, "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert f"pip install 'svdalign[onnx]', or {way_out}\n" in error
    with pytest.raises(ImportError, match="svdalign"):
        cards.ship(load_run(run), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_the_other_files_are_written(
    run: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(cards, "SECONDS", 0.1)
    monkeypatch.setattr(cards, "BATCHES", (1,))
    assert main(["export", str(run), "--out", str(tmp_path)]) == 0
    needed = "model.onnx is left out: ONNX needs the extra: pip install 'svdalign[onnx]'"
    assert needed in capsys.readouterr().err
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model.safetensors", "model.pt2", "card.json", "card.md"}


def test_folders_that_cannot_be_looked_into(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    with pytest.raises(ValueError, match="no checkpoint yet"):
        inspect_run(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint yet"):
        load_run(tmp_path)
    save_file({"t": torch.ones(1)}, tmp_path / "checkpoint.safetensors")
    with pytest.raises(ValueError, match="not written by svdalign"):
        inspect_run(tmp_path)


def test_a_run_with_dense_weights(tmp_path: Path) -> None:
    words = "--width 0.1 --epochs 1 --train-limit 32 --test-limit 20 --rule bp-dense"
    assert main(["train", *words.split(), "--out", str(tmp_path / "run")]) == 0
    with pytest.raises(ValueError, match="has no factored layer"):
        inspect_run(tmp_path / "run")
