"""Models that others wrote, as they are: timm and Hugging Face transformers, without weights."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svdalign as sva
from svdalign.export import FORMATS


def learns(net: nn.Module, x: Any, y: Tensor, loss: Any = None, steps: int = 12) -> nn.Module:
    """Every parameter gets a gradient, and the loss falls; the trained model."""
    model = sva.factorize(net)
    learner = sva.Learner(
        model, optimizer=lambda p: torch.optim.AdamW(p, 3e-3), example=x, loss=loss
    )
    assert not learner.plan.unreached
    assert len(learner.units) > 2
    losses = [learner.step(x, y).loss]
    gradients = learner.gradients(x, y)
    for name, _ in model.named_parameters():
        assert gradients[name].abs().max() > 0, name
    losses += [learner.step(x, y).loss for _ in range(steps)]
    assert torch.stack(losses[-3:]).mean() < 0.97 * losses[0]
    return model


@pytest.fixture(scope="module")
def timm(torchvision_operators: None) -> ModuleType:
    return importlib.import_module("timm")


TIMM: dict[str, dict[str, Any]] = {
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2},
    "mobilenetv3_small_050": {},
    "convnext_atto": {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm(timm: ModuleType, name: str, fashion: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    x, y = fashion[0][:16], fashion[1][:16]
    x = F.interpolate(x, size=32).expand(-1, 3, -1, -1)
    net = timm.create_model(name, num_classes=10, **TIMM[name])
    model = learns(net, x, y, steps=8).eval()
    small = sva.compact(model)
    assert not any("svdalign" in type(module).__module__ for module in small.modules())
    exported = FORMATS["pt2"](small, x[:4], tmp_path / "model.pt2")
    with torch.no_grad():
        wanted = model(x)
        torch.testing.assert_close(small(x), wanted, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(exported(x), wanted, rtol=1e-3, atol=1e-3)


def test_transformers_bert() -> None:
    bert = importlib.import_module("transformers.models.bert")
    config = bert.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=2, max_position_embeddings=16,
    )  # fmt: skip
    tokens = torch.randint(0, 50, (48, 12))
    x = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    learns(
        bert.BertForSequenceClassification(config), x, (tokens < 25).sum(1).gt(6).long(), steps=40
    )


def test_transformers_vit(fashion: tuple[Tensor, Tensor]) -> None:
    vit = importlib.import_module("transformers.models.vit")
    config = vit.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=16, patch_size=4, num_channels=1, num_labels=10,
    )  # fmt: skip
    learns(vit.ViTForImageClassification(config), fashion[0][:64], fashion[1][:64], steps=20)


def test_transformers_llama_reads_tokens() -> None:
    llama = importlib.import_module("transformers.models.llama")
    config = llama.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    tokens = (torch.arange(16)[:, None] * 3 + torch.arange(12) * 7) % 50
    learns(
        llama.LlamaForCausalLM(config), {"input_ids": tokens}, tokens,
        lambda z, y: F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten()), steps=15,
    )  # fmt: skip
