"""Run exported files where this library is not installed, and compare with what it computes.

    python benchmarks/export_clean.py RUN

``RUN`` is a folder of ``svdalign train``. Makes two new virtual environments, one with torch alone
for ``model.pt2``, one with onnxruntime alone for ``model.onnx``, runs both files on 64 test images
there and compares with the trained model here. Needs a package index; writes JSON.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from svdalign.lab.data import batches
from svdalign.lab.experiments.card import IMAGES, ship
from svdalign.lab.training import load_run
from svdalign.lab.training.provenance import provenance
from svdalign.lab.training.record import write_json

PROGRAMS = {
    "pt2": """
import sys, numpy, torch
x = torch.from_numpy(numpy.load(sys.argv[1] + "/x.npy"))
y = torch.export.load(sys.argv[1] + "/model.pt2").module()(x).detach().numpy()
""",
    "onnx": """
import sys, numpy, onnxruntime
x = numpy.load(sys.argv[1] + "/x.npy")
y = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx").run(None, {"x": x})[0]
""",
}
END = """
import importlib.util
assert importlib.util.find_spec("svdalign") is None
numpy.save(sys.argv[1] + "/y.npy", y)
"""
PACKAGES = {
    "pt2": [f"torch=={torch.__version__.partition('+')[0]}", f"numpy=={np.__version__}"],
    "onnx": [f"onnxruntime=={onnxruntime.__version__}", f"numpy=={np.__version__}"],
}


def run_clean(suffix: str, folder: Path) -> dict[str, Any]:
    """Run ``model.SUFFIX`` in an environment of its own, which writes its output to ``y.npy``.
    Returns the row for the results."""
    with tempfile.TemporaryDirectory() as place:
        venv.create(place, with_pip=True)
        python = Path(place, "bin", "python")
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *PACKAGES[suffix]], check=True)
        program = [python, "-I", "-c", PROGRAMS[suffix] + END, folder]
        subprocess.run(program, check=True, cwd=place)
        freeze = [python, "-m", "pip", "freeze"]
        installed = subprocess.run(freeze, check=True, capture_output=True, text=True)
    return {"file": f"model.{suffix}", "installed": installed.stdout.split()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/export_clean.json"))
    options = parser.parse_args()
    trainer = load_run(options.run)
    data, model = trainer.data, trainer.learner.model.eval()
    x, _ = next(batches(data.test, IMAGES, mean=data.mean, std=data.std))
    with torch.no_grad():
        expected = model(x).numpy()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        ship(trainer, folder, list(PROGRAMS))
        np.save(folder / "x.npy", x.numpy())
        for suffix in PROGRAMS:
            row = run_clean(suffix, folder)
            y = np.load(folder / "y.npy")
            row["max_abs_difference"] = float(np.abs(y - expected).max())
            rows.append(row)
            print(row)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, {"images": IMAGES, "rows": rows, **provenance("cpu")})
    return int(any(row["max_abs_difference"] > 1e-4 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
