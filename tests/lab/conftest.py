from __future__ import annotations

from typing import IO, Any

import pytest
from matplotlib.figure import Figure


def _blank(figure: Figure, file: IO[bytes], *, format: str, **options: Any) -> None:
    file.write({"svg": b'<?xml version="1.0"?><svg ></svg>', "png": b"\x89PNG"}[format])


@pytest.fixture(autouse=True)
def _blank_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure is made from what was measured, but matplotlib, which takes longer to draw it
    than a small network to be trained, leaves it blank. ``reports`` has them drawn."""
    monkeypatch.setattr(Figure, "savefig", _blank)
