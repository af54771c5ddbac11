"""The code in the guides runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.zoo.nets import NETS
from torch import Tensor

import svdalign as sva

DOCS = Path(__file__).parents[2] / "docs"


def blocks(guide: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / guide).read_text(), re.M | re.S)


def test_your_rule_is_short_and_learns(
    fashion: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, use = blocks("your-rule.md")
    assert len([line for line in rule.splitlines() if line.strip()]) < 30
    x, y = fashion
    names: dict[str, Any] = {"net": NETS["cifar-resnet"](), "x": x, "y": y}
    exec(compile(rule + use, "docs/your-rule.md", "exec"), names)
    learner = names["learner"]
    assert learner.rule.name == "greedy"
    losses = [
        learner.step(x[i : i + 32], y[i : i + 32]).loss for _ in range(6) for i in (0, 64, 128)
    ]
    assert torch.stack(losses[-3:]).mean() < 0.93 * torch.stack(losses[:3]).mean()
    gradients = learner.gradients(x, y)
    assert all(gradients[n].abs().max() > 0 for n, _ in learner.model.named_parameters())


def test_your_model_runs(
    fashion: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = fashion
    names: dict[str, Any] = {
        "sva": sva, "torch": torch, "net": NETS["mobilenet-v2"](), "x": x, "y": y,
        "batches": [(x[:32], y[:32]), (x[32:64], y[32:64])],
    }  # fmt: skip
    for block in blocks("your-model.md"):
        exec(compile(block, "docs/your-model.md", "exec"), names)
    assert "grouped convolution" in capsys.readouterr().out


@pytest.mark.parametrize("guide", ["quick-start.md", "your-loop.md", "ship.md"])
def test_guide_runs(guide: str, fashion: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    x, y = fashion
    model = sva.fuse(sva.factorize(NETS["vgg"]()))
    learner = sva.Learner(model, optimizer=lambda p: torch.optim.AdamW(p, 1e-2), example=x)
    names: dict[str, Any] = {
        "sva": sva, "net": NETS["vgg"](), "model": model, "learner": learner,
        "small": sva.compact(model), "x": x, "y": y, "folder": tmp_path,
        "batches": [(x[:32], y[:32]), (x[32:64], y[32:64])],
    }  # fmt: skip
    before = learner.steps
    for block in blocks(guide):
        exec(compile(block, f"docs/{guide}", "exec"), names)
    if guide == "ship.md":
        assert {"model.safetensors", "model.pt2"} <= {path.name for path in tmp_path.iterdir()}
    else:
        assert names["learner"].steps > before


def test_contributing_names_what_there_is() -> None:
    root = DOCS.parent
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = re.search(r"^```\n(src/.*?)^```", text, re.M | re.S)
    assert tree is not None
    above: list[tuple[int, Path]] = [(-1, root)]
    for line in tree[1].splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        while above[-1][0] >= indent:
            above.pop()
        place = above[-1][1]
        for file in (name, *re.findall(r"[a-z_]+\.py", line)):
            assert list(place.glob(file.rstrip("/"))), line
        if name.endswith("/"):
            above.append((indent, place / name))
    for name in re.findall(r"`([\w./-]+(?:/|\.py|\.md))`", text.replace(tree[0], "")):
        places = (root, *(root / p for p in ("src/svdalign", "src/svdalign/factors/layers")))
        inside = "_load.py", "_registry.py", "__init__.py"  # of the folder named before
        assert name in inside or any((place / name).exists() for place in places), name


def test_every_python_block_of_the_docs_compiles() -> None:
    for page in sorted(DOCS.glob("*.md")):
        found = blocks(page.name)
        assert len(found) == page.read_text(encoding="utf-8").count("```python\n")
        for block in found:
            compile(block, page.name, "exec")
