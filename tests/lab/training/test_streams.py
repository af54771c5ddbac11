"""Runs on images that stay on disk."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tests.oracles import imagenet

from svdalign import storage
from svdalign.lab.experiments import CompareConfig
from svdalign.lab.training import (
    Record,
    RunConfig,
    Trainer,
    build_learner,
    evaluate,
    load_checkpoint,
    load_data,
    train,
)

CONFIGS = Path(__file__).parents[3] / "benchmarks" / "configs"


def make(tree: Path, workers: int = 0) -> Trainer:
    config = RunConfig(
        data="folder", data_dir=str(tree), image_size=16, stream=True, max_unreadable=0.1,
        augment=["crop", "flip", "alternate"], model="smallconv", width=0.125, batch_size=7,
        epochs=2, checkpoint_seconds=0.0,
    )  # fmt: skip
    data = load_data(replace(config, workers=workers))
    return Trainer(config, data, build_learner(config, data))


def test_killed_in_an_epoch_and_resumed_by_other_workers_is_the_run_that_was_not(
    tmp_path: Path,
) -> None:
    tree = imagenet.make(tmp_path / "tree", classes=3, images=5, largest=60)
    whole, halves = Record(tmp_path / "whole"), Record(tmp_path / "halves")
    results = train(make(tree), whole)
    first = make(tree)
    stopped = train(first, halves, stop=lambda: first.global_step == 2)
    assert stopped["status"] == "interrupted"
    torch.randn(3)  # the global generator has no part in it
    second = make(tree, workers=1)
    load_checkpoint(second, halves.checkpoint_path)
    assert second.batch == 2
    train(second, halves, resume=True)
    expected, got = (storage.read(record.checkpoint_path) for record in (whole, halves))
    for part in ("model", "feedback"):
        assert expected[part].keys() == got[part].keys()
        assert all(expected[part][name].equal(got[part][name]) for name in got[part])
    # What could not be read is counted and listed, once, and not evaluated either.
    assert results["unreadable_images"] == 2
    for record in (whole, halves):
        listed = (record.folder / "unreadable.txt").read_text().splitlines()
        assert len(listed) == 2
        assert all(any(name in line for line in listed) for name in imagenet.UNREADABLE)


def test_accuracy_is_that_of_the_images_that_can_be_read(tmp_path: Path) -> None:
    tree = imagenet.make(tmp_path, classes=2, images=40, largest=60, odd=False)
    (tree / "val" / "n00000000" / "page.jpg").write_text("<html>")
    trainer = make(tree)
    with torch.no_grad():
        for parameter in trainer.learner.model.parameters():
            parameter.zero_()  # all answers are the same: the first of the two classes
    loss, accuracy = evaluate(trainer.learner.model, trainer.data, trainer.config)
    assert accuracy == 0.5  # 20 of 40, not of 41
    assert loss == pytest.approx(math.log(2))


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("imagenet_*.yaml")), ids=lambda f: f.stem)
def test_configs_for_imagenet_are_ones(file: Path) -> None:
    config = CompareConfig(**yaml.safe_load(file.read_text()))
    assert config.stream
    assert config.image_size == 224
    assert file.stem == f"imagenet_{config.model}"
    assert file.stem in file.read_text().splitlines()[0]  # the command that runs it
