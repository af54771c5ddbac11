"""Every config of the benchmarks is one of the command that its first lines name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from svdalign.lab.experiments.compare import CompareConfig
from svdalign.lab.experiments.tune import TuneConfig
from svdalign.lab.training import RunConfig

ROOT = Path(__file__).parents[2]
KINDS = {"train": RunConfig, "compare": CompareConfig, "tune": TuneConfig}


@pytest.mark.parametrize(
    "file", sorted((ROOT / "benchmarks/configs").glob("*.yaml")), ids=lambda file: file.stem
)
def test_it_can_be_run_as_it_says(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where rules of benchmarks/ are found by name
    text = file.read_text()
    named = re.findall(r"^# svdalign (\w+) --config (\S+)", text, re.MULTILINE)
    assert named
    for command, path in named:
        assert path == f"benchmarks/configs/{file.name}"
        assert KINDS[command](**yaml.safe_load(text))
