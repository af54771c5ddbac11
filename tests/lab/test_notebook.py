"""A session in a notebook: progress is seen, and tables and learners are drawn as tables."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.zoo.test_docs import blocks

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

CELLS = [
    blocks("frameworks.md")[-1],
    "frame(results)",
    "from svdalign.lab.training import build_learner\n"
    "build_learner(config.run(config.variants[-1], 0), comparison.data)",
]


def test_a_session(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    client = nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    session, frame, learner = (
        "".join(output.get("text", "") + output.get("data", {}).get("text/html", "")
                for output in cell.outputs)
        for cell in notebook.cells
    )  # fmt: skip
    for seen in ("epoch 1/2", "epoch 2/2", "leanest backpropagation"):
        assert seen in session
    assert "<table" in frame
    assert "<table" in learner
    assert "output of a sample" in learner
