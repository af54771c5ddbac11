from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from svdalign.factors import FactoredLayer
from svdalign.lab.data import ImageData, batches
from svdalign.lab.training import Record, RunConfig, Trainer, build_learner, evaluate, train
from svdalign.lab.training.build import evaluate_views
from svdalign.lab.training.checkpoint import load_checkpoint, save_checkpoint
from svdalign.lab.training.schedule import learning_rate_factor
from svdalign.storage import ranks

TINY: dict[str, Any] = {
    "model": "smallconv",
    "width": 0.25,
    "batch_size": 16,
    "epochs": 2,
    "lr": 1e-2,
    "image_size": 8,
}


def make(data: ImageData, **changes: Any) -> Trainer:
    config = RunConfig(**{**TINY, **changes})
    return Trainer(config, data, build_learner(config, data))


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in trainer.learner.model.state_dict().items()}


@pytest.mark.parametrize("rule", ["bp", "dfa", "ssa", "ssa-reconstruction"])
def test_learns(stripes: ImageData, rule: str) -> None:
    trainer = make(stripes, rule=rule, epochs=8, schedule="cosine")
    assert trainer.run() == "finished"
    assert trainer.history[-1]["test_accuracy"] >= 0.9
    assert trainer.history[-1]["loss"] < trainer.history[0]["loss"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_a_run_is_a_function_of_its_config(stripes: ImageData, optimizer: str) -> None:
    a, b = (make(stripes, optimizer=optimizer, augment=["crop", "flip"]) for _ in range(2))
    torch.manual_seed(1)
    a.run()
    torch.manual_seed(2)  # the global random state has no part in it
    b.run()
    assert all(torch.equal(v, weights(b)[k]) for k, v in weights(a).items())
    other = make(stripes, optimizer=optimizer, augment=["crop", "flip"], seed=1)
    other.run()
    assert not all(torch.equal(v, weights(other)[k]) for k, v in weights(a).items())


def test_dense_and_factored_start_from_the_same_weights(stripes: ImageData) -> None:
    dense = make(stripes, rule="ssa-dense").learner.model.state_dict()
    factored = make(stripes, rank=0.25).learner.model.state_dict()
    shared = set(dense) & set(factored)
    assert shared
    assert all(torch.equal(dense[k], factored[k]) for k in shared)


def test_the_rest_of_an_epoch_follows_from_the_state(stripes: ImageData) -> None:
    whole = make(stripes, rule="ssa")
    whole.run()
    first = make(stripes, rule="ssa")
    assert first.run(stop=lambda: first.global_step == 5) == "interrupted"
    assert (first.epoch, first.batch) == (1, 1)
    assert first.run() == "finished"  # the same object goes on where it was
    assert all(torch.equal(v, weights(first)[k]) for k, v in weights(whole).items())
    for name in ("loss", "train_accuracy", "test_loss", "test_accuracy", "lr"):
        values = [[row[name] for row in t.history] for t in (whole, first)]
        assert values[0] == values[1]


def test_steps_have_one_size_and_the_scheduled_rate(stripes: ImageData) -> None:
    trainer = make(stripes)
    assert trainer.steps_per_epoch == 70 // 16
    for x, y in trainer.batches():
        assert len(x) == len(y) == 16
        step = trainer.global_step
        trainer.step(x, y)
        rate = trainer.learner.optimizer.param_groups[0]["lr"]
        assert rate == 1e-2 * learning_rate_factor("one-cycle", step, 8, 0.2)


def test_a_group_of_parameters_can_have_a_share_of_the_rate(stripes: ImageData) -> None:
    trainer = make(stripes)
    trainer.learner.optimizer.param_groups[0]["lr_scale"] = 0.25
    trainer.step(*next(trainer.batches()))
    rate = trainer.learner.optimizer.param_groups[0]["lr"]
    assert rate == 0.25 * 1e-2 * learning_rate_factor("one-cycle", 0, 8, 0.2)


def test_a_split_smaller_than_a_batch_is_one_step(stripes: ImageData) -> None:
    trainer = make(stripes, batch_size=100)
    assert [len(y) for _, y in trainer.batches()] == [70]


def test_the_running_loss_is_the_mean_of_the_reports(stripes: ImageData) -> None:
    trainer, reports = make(stripes, rule="bp"), []
    assert math.isnan(trainer.running().loss)
    step = trainer.learner.step
    trainer.learner.step = lambda x, y: reports.append(step(x, y)) or reports[-1]  # type: ignore[method-assign,func-returns-value]
    for x, y in trainer.batches():
        trainer.step(x, y)
    expected = sum(r.loss.item() for r in reports) / len(reports)
    assert trainer.running().loss == pytest.approx(expected)


def test_evaluation_is_over_the_whole_test_split_and_leaves_no_trace(stripes: ImageData) -> None:
    trainer = make(stripes)
    model = trainer.learner.model
    model.train()
    next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()
    modes = [module.training for module in model.modules()]
    before = weights(trainer)
    loss, accuracy = evaluate(model, stripes, trainer.config)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in weights(trainer).items())
    images = (stripes.test.images.float() / 255 - stripes.mean[0]) / stripes.std[0]
    model.eval()
    z = model(images)
    expected = torch.nn.functional.cross_entropy(z, stripes.test.labels).item()
    assert loss == pytest.approx(expected, rel=1e-4)
    assert accuracy == (z.argmax(1) == stripes.test.labels).sum().item() / 30


def test_a_run_that_diverges_says_so(stripes: ImageData) -> None:
    trainer = make(stripes, rule="bp-dense", optimizer="sgd", lr=1e30, schedule="constant")
    assert trainer.run() == "diverged"
    assert len(trainer.history) == 1


@pytest.mark.parametrize(
    "changes",
    [{"rank_energy": 0.5}, {"rank_parameters": 0.5, "rank_freeze": 2}, {"retraction": "polar"}],
)
def test_a_run_that_diverges_says_so_and_keeps_its_ranks(stripes: ImageData, changes) -> None:
    trainer = make(stripes, rule="bp", optimizer="sgd", lr=1e30, schedule="constant", **changes)
    before = ranks(trainer.learner.model)
    assert trainer.run() == "diverged"
    assert trainer.history[-1]["ranks"] == before
    assert trainer.history[-1]["kept_energy"] == {}


def test_weights_that_the_last_step_of_an_epoch_spoils_are_told_of(stripes: ImageData) -> None:
    trainer = make(stripes, rank_energy=0.5)
    layer = next(m for m in trainer.learner.model.modules() if isinstance(m, FactoredLayer))
    before = ranks(trainer.learner.model)

    def spoil() -> None:
        if trainer.batch == trainer.steps_per_epoch:
            layer.s.data.fill_(math.nan)

    assert trainer.run(on_step=spoil) == "diverged"
    assert math.isfinite(trainer.history[-1]["loss"])
    assert ranks(trainer.learner.model) == before


def test_bf16_runs(stripes: ImageData) -> None:
    trainer = make(stripes, precision="bf16", epochs=1)
    trainer.run()
    assert math.isfinite(trainer.history[-1]["loss"])


def test_label_smoothing_is_part_of_the_loss(stripes: ImageData) -> None:
    plain, smooth = (make(stripes, rule="bp", label_smoothing=v) for v in (0.0, 0.3))
    x, y = next(plain.batches())
    z = plain.learner.model(x)
    expected = torch.nn.functional.cross_entropy(z, y, label_smoothing=0.3).item()
    smooth.step(x, y)
    assert smooth.running().loss == pytest.approx(expected, rel=1e-5)


def test_what_a_run_leaves(stripes: ImageData, tmp_path: Path) -> None:
    record = Record(tmp_path / "run")
    results = train(make(stripes, rule="bp"), record)
    assert results == record.results()
    assert results["status"] == "finished"
    assert results["accuracy"] == results["history"][-1]["test_accuracy"]
    assert results["config"]["rule"] == "bp"
    assert results["seed"] == 0
    assert results["unfinished_epoch"] is None
    assert results["parameters"] > 0
    assert results["macs"] > 0
    assert results["torch"] == torch.__version__
    assert set(results["machine"]) == {"system", "cpu", "cores", "threads", "device"}
    lines = record.metrics_path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == results["history"]
    config = yaml.safe_load(record.config_path.read_text())
    assert RunConfig(**config) == RunConfig(**{**TINY, "rule": "bp"})


def test_an_interrupted_run_leaves_what_it_measured(stripes: ImageData, tmp_path: Path) -> None:
    trainer = make(stripes)
    record = Record(tmp_path)
    results = train(trainer, record, stop=lambda: trainer.global_step == 6)
    assert results["status"] == "interrupted"
    assert len(results["history"]) == 1
    assert results["accuracy"] == results["history"][0]["test_accuracy"]
    assert results["unfinished_epoch"]["steps"] == 2
    assert results == record.results()


def test_interrupted_before_the_first_epoch_ends(stripes: ImageData, tmp_path: Path) -> None:
    results = train(make(stripes), Record(tmp_path), stop=lambda: True)
    assert results["accuracy"] is None
    assert results["history"] == []
    assert results["unfinished_epoch"]["steps"] == 1


SGD = {"rule": "bp", "optimizer": "sgd", "lr": 0.05}


@pytest.mark.parametrize(("optimizer", "first"), [("adamw", 0.8), ("muon", 0.9)])
def test_adams_betas_are_those_of_the_config(
    stripes: ImageData, optimizer: str, first: float
) -> None:
    trainer = make(stripes, optimizer=optimizer, momentum=0.8, beta2=0.95)
    assert trainer.learner.optimizer.param_groups[-1]["betas"] == (first, 0.95)


def test_biases_have_a_rate_of_their_own(stripes: ImageData) -> None:
    """One step: a bias moves ``bias_lr`` times as far, its decay stays, all else is the same."""
    decay = {"rule": "bp-dense", "weight_decay": 0.1, "momentum": 0.0}
    plain, fast, still = (
        make(stripes, **{**SGD, **decay, **changes})
        for changes in ({}, {"bias_lr": 8.0}, {"bias_lr": 8.0, "weight_decay": 0.0})
    )
    biases = {n for n, _ in plain.learner.model.named_parameters() if n.endswith("bias")}
    start = {n: p.detach().clone() for n, p in plain.learner.model.named_parameters()}
    for trainer in (plain, fast, still):
        with torch.no_grad():
            for name, p in trainer.learner.model.named_parameters():
                p.copy_(start[name] + (name in biases))
        trainer.step(*next(trainer.batches()))
    rate = plain.learner.optimizer.param_groups[0]["lr"]
    for (name, a), b, c in zip(
        plain.learner.model.named_parameters(),
        fast.learner.model.parameters(),
        still.learner.model.parameters(),
        strict=True,
    ):
        if name in biases:
            torch.testing.assert_close(c - b, rate * 0.1 * (start[name] + 1))
            gradient = (start[name] + 1 - a) / rate - 0.1 * (start[name] + 1)
            torch.testing.assert_close(
                start[name] + 1 - c, 8 * rate * gradient, atol=1e-5, rtol=1e-3
            )
        else:
            assert a.equal(b)


def test_nesterov_is_torchs(stripes: ImageData) -> None:
    trainer = make(stripes, **SGD, nesterov=True)
    assert trainer.learner.optimizer.defaults["nesterov"] is True


def test_lookahead_is_its_definition(stripes: ImageData) -> None:
    """Beside a trainer without it whose weights are averaged by hand."""
    options = {**SGD, "rule": "bp-dense", "epochs": 2}
    trainer, plain = make(stripes, **options, lookahead=3), make(stripes, **options)
    average = {n: p.detach().clone() for n, p in plain.learner.model.named_parameters()}
    for step in range(1, plain.total_steps + 1):
        epoch_ends = plain.batch + 1 == plain.steps_per_epoch
        for each in (trainer, plain):
            each.step(*next(each.batches()))
        if step == plain.total_steps or step % 3 == 0:
            kept = 0.95**3 * (step / plain.total_steps) ** 3 if step < plain.total_steps else 1.0
            for name, p in plain.learner.model.named_parameters():
                average[name] = kept * average[name] + (1 - kept) * p.detach()
                p.data.copy_(average[name])
        for (name, p), q in zip(
            trainer.learner.model.named_parameters(),
            plain.learner.model.parameters(),
            strict=True,
        ):
            torch.testing.assert_close(p, q, msg=f"{name} after step {step}")
        if epoch_ends:
            for each in (trainer, plain):
                each.finish_epoch()


def test_lookahead_keeps_factors_orthonormal_through_cuts(stripes: ImageData) -> None:
    cuts = {"rank_energy": 0.7, "rank_warmup": 1, "rank_min": 1}
    trainer = make(stripes, **SGD, lookahead=2, epochs=3, **cuts)
    before = ranks(trainer.learner.model)
    assert trainer.run() == "finished"
    assert ranks(trainer.learner.model) != before
    for module in trainer.learner.model.modules():
        if isinstance(module, FactoredLayer):
            eye = torch.eye(module.rank)
            torch.testing.assert_close(module.U.mT @ module.U, eye, atol=1e-5, rtol=0)
            torch.testing.assert_close(module.V.mT @ module.V, eye, atol=1e-5, rtol=0)


def test_lookahead_goes_on_from_a_checkpoint(stripes: ImageData, tmp_path: Path) -> None:
    options = {**SGD, "lookahead": 3, "augment": ["alternate"], "bias_lr": 4.0}
    whole, half = make(stripes, **options), make(stripes, **options)
    whole.run()
    half.run(stop=lambda: half.global_step == 5)
    save_checkpoint(half, tmp_path / "c")
    again = make(stripes, **options)
    load_checkpoint(again, tmp_path / "c")
    again.run()
    for a, b in zip(
        whole.learner.model.parameters(), again.learner.model.parameters(), strict=True
    ):
        assert a.equal(b)


def test_views_answer_as_the_mean_of_what_is_seen(stripes: ImageData) -> None:
    """A network that sees only the mean of all pixels sees the same in a mirrored image."""
    trainer = make(stripes, rule="bp", tta=True, epochs=2)
    trainer.run()
    assert "tta_accuracy" not in trainer.history[0]
    model, data, config = trainer.learner.model, trainer.data, trainer.config
    x, y = (t for t in next(batches(data.test, 100, mean=data.mean, std=data.std)))
    with torch.no_grad():
        model.eval()

        def seen(dy: int) -> torch.Tensor:
            edge = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
            view = edge[:, :, 1 + dy : 9 + dy, 1 + dy : 9 + dy]
            return (model(view) + model(view.flip(-1))) / 2

        z = seen(0) / 2 + seen(-1) / 4 + seen(1) / 4
    right = (z.argmax(1) == y).float().mean().item()
    assert trainer.history[-1]["tta_accuracy"] == pytest.approx(right)
    assert evaluate_views(model, data, config)[1] == pytest.approx(right)
