"""Write the tables of README.md from benchmarks/results.

    python benchmarks/results_table.py           # rewrite them
    python benchmarks/results_table.py --check   # fail if they are out of date

A table stands between ``<!-- table:NAME begin -->`` and ``<!-- table:NAME end -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGES = (HERE.parent / "README.md",)


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text())
    return content


def made_by(content: dict[str, Any]) -> str:
    machine = content["machine"]
    return (
        f"`{content['command']}`, commit {content['git'][:8]}, torch {content['torch']}, "
        f"{machine['cpu']}, {machine['threads']} thread(s)"
    )


def accuracy(row: dict[str, Any]) -> str:
    return f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_std']:.1f}"


def comparison() -> str:
    """Accuracy of each method on both data sets, and what it costs on CIFAR-10."""
    embedded, cifar = read("embedded"), read("cifar10")
    on_embedded = {row["method"]: row for row in embedded["summary"]}
    lines = [
        "| method | Fashion-MNIST part, % | CIFAR-10 part, % | parameters | MACs | time per step |",
        "|---|---|---|---|---|---|",
    ]
    for row in cifar["summary"]:
        other = on_embedded.get(row["method"])
        lines.append(
            f"| {row['label']} | {accuracy(other) if other else ''} | {accuracy(row)} "
            f"| {row['parameters']:,} | {row['macs'] / 1e6:.2f} M | {row['step_ratio']:.2f} × |"
        )
    runs = embedded["config"]["seeds"]
    lines += [
        "",
        f"SmallConv, 10,000 training images of each, {embedded['config']['epochs']} epochs of "
        f"28×28 grey and {cifar['config']['epochs']} epochs of 16×16 colour; test accuracy, mean "
        f"± standard deviation over {runs} seeds; every method at the learning rate that one "
        "search chose for it on held-out images. Parameters, multiply-accumulates of an inference "
        "and time per training step (× BP dense, CPU) are those on CIFAR-10. Made by",
        f"{made_by(embedded)}; {made_by(cifar)}.",
    ]
    return "\n".join(lines)


def memory() -> str:
    """Peak training memory of VGG-13."""
    content = read("profile_vgg13")
    rows = content["methods"]
    whole = next(row for row in rows if row["method"] == "bp-dense")["memory"]["peak"]
    lines = ["| method | peak | of BP dense |", "|---|---|---|"]
    for row in rows:
        peak = row["memory"]["peak"]
        lines.append(f"| {row['label']} | {peak / 2**20:.0f} MiB | {peak / whole:.2f} × |")
    config = content["config"]
    lines += [
        "",
        f"{config['model']} at 3×32×32, batch {config['batch_size']}, rank {config['rank']}, "
        f"{config['optimizer']}: parameters, gradients, optimizer state and activations alive at "
        f"the peak of a training step. Made by {made_by(content)}.",
    ]
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {"comparison": comparison, "memory": memory}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if out of date")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        text = new = page.read_text(encoding="utf-8")
        for name, table in TABLES.items():
            begin, end = f"<!-- table:{name} begin -->", f"<!-- table:{name} end -->"
            if begin in text:
                body = f"{begin}\n{table()}\n{end}"
                new = re.sub(f"{begin}.*?{end}", lambda _, b=body: b, new, flags=re.DOTALL)
        if new != text:
            stale.append(page.name)
            if not check:
                page.write_text(new, encoding="utf-8")
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run python benchmarks/results_table.py")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
