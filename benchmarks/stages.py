"""How fast 8, 64 and 512 stages would be, from measured unit times and stated links.

    python benchmarks/stages.py

Units on p processes take, for a batch in the steady state,

    T(p) = max( longest stage, longest border: bytes / bandwidth + latency ).

A stage is the sum of the measured times of its units. A process sends while it works on the next
batch, and waits for no later process, so there is no bubble. Where p processes share fewer cores,
T(p) is at least the sum of all stages over the cores. A pipeline of backpropagation (GPipe, 1F1B)
in m microbatches of the same stages takes (m + p - 1) / m times its longest stage.

The network is a CIFAR ResNet-1202 (He et al. 2016), 200 blocks where ResNet-32 has 5, so that 512
stages can have one each. Its blocks are those of ResNet-32, whose times ``benchmarks/parallel.py``
measured: the first block of each width as it was, the others at the mean of the others. The same
formula is compared with the speeds measured there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from svdalign.lab.training.provenance import provenance
from svdalign.lab.training.record import read_json, write_json
from svdalign.parallel import balanced

MEASURED, OUT = (Path(f"benchmarks/results/{name}.json") for name in ("parallel", "stages"))
PLOT = Path("docs/stages.svg")
LINKS = {  # how many times as fast as the core that was measured; bits a second, seconds
    "1 Gbit/s, 100 µs": (1, 1e9, 1e-4),
    "100 × faster units, 1 Gbit/s, 100 µs": (100, 1e9, 1e-4),
    "100 × faster units, 10 Gbit/s, 50 µs": (100, 1e10, 5e-5),
    "100 × faster units, 100 Gbit/s, 10 µs": (100, 1e11, 1e-5),
}
STAGES = (1, 2, 3, 8, 64, 512)
MICROBATCHES = (8, 128)  # 128: one image each
BLOCKS = 200


def deep(seconds: Sequence[float], batch: int) -> tuple[list[float], list[int]]:
    """Seconds of each unit of ResNet-1202 and the bytes of its output, from those of ResNet-32: the
    stem, five blocks of each of three widths, the classifier."""
    stem, *blocks, classifier = seconds
    found, sizes = [stem], [4 * batch * 16 * 32 * 32]
    for width in range(3):
        first, *others = blocks[5 * width : 5 * width + 5]
        found += [first, *[sum(others) / 4] * (BLOCKS - 1)]
        sizes += [sizes[0] >> width] * BLOCKS  # half the pixels a side, twice the channels
    return [*found, classifier], [*sizes, 0]


def stages(costs: Sequence[float], counts: Sequence[int]) -> list[float]:
    """Sums of so many consecutive costs."""
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [sum(costs[end - count : end]) for end, count in zip(ends, counts, strict=True)]


def predict(seconds: Sequence[float], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """By number of stages, times the speed of one process."""
    rows = []
    for p in STAGES:
        counts = balanced(seconds, p)
        longest = max(stages(seconds, counts))
        ends = [sum(counts[: i + 1]) - 1 for i in range(p - 1)]
        row: dict[str, Any] = {"stages": p, "longest": longest, "links": {}, "pipelines": {}}
        for name, (faster, bandwidth, latency) in LINKS.items():
            border = max((8 * sizes[end] / bandwidth + latency for end in ends), default=0.0)
            row["links"][name] = sum(seconds) / max(longest, faster * border)
        for m in MICROBATCHES:
            row["pipelines"][str(m)] = sum(seconds) / (longest * (m + p - 1) / m)
        rows.append(row)
    return rows


def validate(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """The formula against images a second that were measured on one machine."""
    rows = []
    for name, jobs in measured["rows"].items():
        for job in jobs.values():
            if "unit_seconds" in job:
                own = stages(job["unit_seconds"], job["partition"])
                took = max(*own, sum(own) / min(len(own), measured["machine"]["cores"]))
                predicted, found = measured["batch"] / took, job["images_per_second"]
                rows.append({"net": name, "predicted": predicted, "measured": found})
    return rows


def plot(rows: Sequence[dict[str, Any]]) -> None:
    figure = Figure(figsize=(6.0, 3.8), layout="constrained")
    axes = figure.subplots()
    ps = [row["stages"] for row in rows]
    for name in LINKS:
        line = [row["links"][name] for row in rows]
        axes.plot(ps, line, marker="o", label=f"units side by side: {name}")
    for m in MICROBATCHES:
        line = [row["pipelines"][str(m)] for row in rows]
        axes.plot(ps, line, linestyle="--", label=f"backpropagation in {m} microbatches, at best")
    axes.set(xscale="log", yscale="log", xlabel="stages", ylabel="times one process")
    axes.set_xticks(ps, [str(p) for p in ps])
    axes.minorticks_off()
    axes.legend(fontsize=7)
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    measured = read_json(MEASURED)
    assert measured is not None, f"{MEASURED} holds nothing"
    (job,) = (j for j in measured["rows"]["resnet32, 2 processes"].values() if "unit_seconds" in j)
    rows = predict(*deep(job["unit_seconds"], measured["batch"]))
    content = {"blocks": BLOCKS, "batch": measured["batch"], "rows": rows}
    content |= {"validation": validate(measured), "unit_seconds": job["unit_seconds"]}
    write_json(OUT, content | provenance("cpu") | {"machine": measured["machine"]})
    for row in content["rows"] + content["validation"]:
        print(row)
    plot(rows)


if __name__ == "__main__":
    main()
