"""What people see of a learner: its units, in text and in a notebook."""

from __future__ import annotations

from html.parser import HTMLParser

import torch
from torch import nn

import svdalign as sva


class Cells(HTMLParser):
    """The texts of a table's cells."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_data(self, data: str) -> None:
        self.found.append(data)


def learner_of(depth: int) -> sva.Learner:
    layers = [module for _ in range(depth) for module in (nn.Linear(8, 8), nn.ReLU())]
    model = sva.factorize(nn.Sequential(*layers, nn.Linear(8, 3)), 3)
    return sva.Learner(
        model, "ssa", optimizer=lambda p: torch.optim.SGD(p, 0.1), example=torch.zeros(4, 8)
    )


def test_a_row_for_each_unit() -> None:
    learner = learner_of(2)
    *_, heading, first, second, last = repr(learner).splitlines()
    assert heading.split("  ")[0] == "unit"
    size = 8 * 3 + 3 + 3 * 8 + 8  # U, s, V and the bias
    assert first.split() == [learner.units[0].name, "8", str(size), "3", "its", "feedback"]
    assert second.split()[1:] == ["8", str(size), "3", "its", "feedback"]
    assert last.split() == ["output", "3", str(8 * 3 + 3), "dense", "the", "task"]


def test_a_deep_network_is_shown_by_its_ends() -> None:
    learner = learner_of(30)
    lines = repr(learner).splitlines()
    assert len(lines) < 20
    assert any("19 more" in line for line in lines)  # 31 units, 12 shown
    assert lines[-1].startswith("output")


def test_a_notebook_shows_the_same() -> None:
    learner = learner_of(2)
    for shown, text in (
        (learner._repr_html_(), repr(learner)),
        (learner.model.factorization._repr_html_(), str(learner.model.factorization)),
    ):
        cells = Cells()
        cells.feed(shown)
        assert "".join("".join(cells.found).split()) == "".join(text.split())
