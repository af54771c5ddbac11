"""The examples run, at tiny sizes."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = {
    "multi_label": {"images": 320, "epochs": 1, "width": 4},
    "regression": {"images": 320, "epochs": 1, "width": 4},
    "next_token": {"steps": 40, "width": 16, "depth": 2, "context": 16},
    "your_own_loop": {"images": 320, "epochs": 2, "width": 0.1},
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    results = load(name).main(**SIZES[name])
    assert all(math.isfinite(value) for value in results)
    if name == "next_token":
        assert results[-1] < 0.9 * results[0]
    else:
        assert capsys.readouterr().out.startswith("epoch 1")
