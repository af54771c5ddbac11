"""The card of a shipped model, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .page import environment, plain
from .tables import evaluated, images, of_whole

#: What each file beside a card is for.
_USES = {
    "model.safetensors": "`model.safetensors` holds the weights of the modules below.",
    "model.pt2": "`model.pt2` runs with torch alone (`torch.export.load`).",
    "model.onnx": "`model.onnx` runs with onnxruntime (input `x`, output `y`).",
}


def card_text(card: Mapping[str, Any]) -> str:
    """``card.md``, from what ``card.json`` holds."""
    mean, std = (", ".join(f"{v:.4f}" for v in card["input"][key]) for key in ("mean", "std"))
    return (
        environment()
        .get_template("card.md")
        .render(
            **card,
            images=images(card),
            evaluated=plain(evaluated(card)),
            trained=of_whole(card["data"], "train"),
            mean=mean,
            std=std,
            uses=" ".join(_USES[file["name"]] for file in card["files"]),
        )
    )
