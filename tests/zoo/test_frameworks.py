"""The code of docs/frameworks.md trains as a plain loop does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.zoo.test_docs import blocks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import svdalign as sva

LIGHTNING, TRAINER, USE, PRINTED, _ = blocks("frameworks.md")

pytestmark = pytest.mark.usefixtures("torchvision_operators")


def run(code: str, **names: Any) -> dict[str, Any]:
    names = {"sva": sva, "torch": torch, **names}
    exec(compile(code, "docs/frameworks.md", "exec"), names)
    return names


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def plain(model: nn.Module, steps: int, batches: list[Any], lr: float, example: Any) -> sva.Learner:
    learner = sva.Learner(
        model, "ssa", optimizer=lambda p: torch.optim.AdamW(p, lr), example=example
    )
    for step in range(steps):
        learner.step(*batches[step % len(batches)])
    return learner


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and intervals
def test_lightning_trains_as_a_plain_loop_and_goes_on(
    fashion: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    lightning = pytest.importorskip("lightning")
    x, y = (part[:96] for part in fashion)
    loader = DataLoader(TensorDataset(x, y), 32)
    Local = run(LIGHTNING)["Local"]

    def fit(module: Any, epochs: int, start: Path | None = None) -> Any:
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, loader, loader, ckpt_path=start)
        return trainer

    trainer = fit(Local(net(), x), 1)
    assert trainer.global_step == 3
    assert {"loss", "accuracy", "val_accuracy"} <= trainer.callback_metrics.keys()
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    module = Local(net(), x)
    fit(module, 2, tmp_path / "half.ckpt")
    expected = plain(sva.fuse(sva.factorize(net())), 6, list(loader), 1e-2, x)
    for part in ("model", "feedback"):
        theirs = getattr(expected, part).state_dict()
        for name, value in getattr(module, part).state_dict().items():
            torch.testing.assert_close(value, theirs[name])


@pytest.mark.filterwarnings("ignore")  # the Trainer's own
def test_hugging_faces_trainer_trains_as_a_plain_loop(
    fashion: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    # In the order of the data set, as the plain loop.
    monkeypatch.setattr(transformers.Trainer, "_get_train_sampler", lambda *_: None)
    x, y = (part[:16] for part in fashion)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8, num_channels=1, num_labels=10,
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.ViTForImageClassification(config)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=3, per_device_train_batch_size=16,
        max_grad_norm=0.0, lr_scheduler_type="constant", report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    found = run(
        TRAINER + USE, network=copy.deepcopy(network), pixels=x, arguments=arguments,
        images=[{"pixel_values": one, "labels": label} for one, label in zip(x, y, strict=True)],
    )  # fmt: skip
    trainer, learner = found["trainer"], found["learner"]
    assert trainer.state.global_step == learner.steps == 3
    batch = ({"pixel_values": x}, y)
    expected = plain(sva.factorize(network), 3, [batch], 2e-3, batch[0])
    for name, value in learner.model.state_dict().items():
        torch.testing.assert_close(value, expected.model.state_dict()[name])


def test_a_logger_of_ones_own_prints(capsys: pytest.CaptureFixture[str]) -> None:
    logger = run(PRINTED)["Printed"](Path(), "a run", {})
    logger.log(2, {"test_accuracy": 0.5})
    logger.close("finished")
    assert capsys.readouterr().out == "a run: 50.0% after epoch 2\na run: finished\n"
