"""Results as a table of pandas, which the reading of data sets brings with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def frame(results: Mapping[str, Any]) -> Any:
    """A ``pandas.DataFrame`` with a row for each epoch of each run, from what ``results.json`` of a
    comparison or of one run holds: method, seed, and each number of the epoch."""
    import pandas

    runs = results.get("runs", [results])
    rows = [
        {"method": run.get("method", run["config"].get("rule")), "seed": run["seed"]}
        | {key: value for key, value in row.items() if not isinstance(value, dict)}
        for run in runs
        for row in run["history"]
    ]
    return pandas.DataFrame(rows)
