"""The units of a learner as the rows of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .learner import Learner

_SHOWN = 12  #: units at most


def unit_rows(learner: Learner) -> list[tuple[str, ...]]:
    """Headings, and a row for each unit; of many, the first and the last ones."""
    sizes = {name: p.numel() for name, p in learner.model.named_parameters()}
    rows = []
    for unit in learner.units:
        feedback = learner.feedback_of(unit)
        teacher = "later units" if feedback is None else "its feedback"
        rows.append(
            (
                unit.name,
                " and ".join("×".join(map(str, f.shape[1:])) or "1" for f in unit.features),
                f"{sum(sizes.get(name, 0) for name in unit.parameters):,}",
                ", ".join(str(layer.rank) for layer in learner.unit_spec(unit).layers) or "dense",
                "the task" if unit is learner.plan.output else teacher,
            )
        )
    if len(rows) > _SHOWN:
        left_out = ("…", f"{len(rows) - _SHOWN} more", "", "", "")
        rows = [*rows[: _SHOWN // 2], left_out, *rows[-_SHOWN // 2 :]]
    return [("unit", "output of a sample", "parameters", "ranks", "taught by"), *rows]
