from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from svdalign.lab.experiments.profile import Profile, ProfileConfig
from svdalign.lab.reports import break_even_table, epoch_table, profile_table
from svdalign.lab.reports.tables import profile_rows

TINY: dict[str, Any] = {
    "model": "smallconv", "width": 0.25, "batch_size": 16, "image_size": 16, "rank": 0.25,
    "seconds": 0.02, "fuse": False,
}  # fmt: skip
PARTS = ("parameters", "gradients", "optimizer", "activations")


def test_a_profile_end_to_end(tmp_path: Path) -> None:
    plain = ["bp-dense", "bp", "ssa"]
    methods = [*plain, "ssa-1", "ssa-2", *(f"{name}-checkpointed" for name in plain)]
    own = {"ssa": {"options": {"alpha": 2.0}}}
    results = Profile(ProfileConfig(**TINY, methods=methods, settings=own), tmp_path).run()
    assert json.loads((tmp_path / "results.json").read_text()) == results
    rows = {row["method"]: row for row in results["methods"]}
    assert list(rows) == methods
    for row in rows.values():
        assert row["memory"]["peak"] == sum(row["memory"][part] for part in PARTS)
        assert row["estimated_memory"]["peak"] == pytest.approx(row["memory"]["peak"], rel=0.05)
        assert row["step_seconds"] > 0
        assert row["latency_ratio"] > 0
    dense, local = rows["bp-dense"], rows["ssa"]
    checkpointed = rows["bp-dense-checkpointed"]
    assert (dense["step_ratio"], dense["latency_ratio"]) == (1.0, 1.0)
    assert checkpointed["memory"]["activations"] < dense["memory"]["activations"]
    for name in plain:
        again, once = rows[f"{name}-checkpointed"], rows[name]
        assert again["memory"]["activations"] < once["memory"]["activations"]
        assert again["memory"]["parameters"] == once["memory"]["parameters"]
        assert again["step_macs"] > once["step_macs"]
    once_more = dense["step_macs"] + 16 * dense["macs"]
    assert dense["step_macs"] < checkpointed["step_macs"] < once_more
    assert local["memory"]["activations"] < rows["ssa-2"]["memory"]["activations"]
    assert local["step_macs"] < rows["bp"]["step_macs"] < dense["step_macs"]
    table = io.StringIO()
    Console(file=table, width=80).print(profile_table(results))
    shown = set(table.getvalue().split())
    assert all(set(cell.split()) <= shown for row in profile_rows(results) for cell in row)
    page = (tmp_path / "report.html").read_text()
    for text in (table.getvalue(), page):
        assert "SSA, horizon 0: alpha 2.0" in text
    assert page.count('role="img"') == 2
    assert "peak (MiB)" in page


def test_fused_convolutions_hold_less_and_the_estimate_knows(tmp_path: Path) -> None:
    methods = ["bp-dense", "bp", "ssa"]
    rows = {}
    for fuse in (False, True):
        size = {"width": 0.25, "batch_size": 32, "fuse": fuse}
        config = ProfileConfig(**{**TINY, **size}, methods=methods)
        rows[fuse] = Profile(config, tmp_path / str(fuse)).run()["methods"]
    for plain, fused in zip(rows[False][1:], rows[True][1:], strict=True):
        assert fused["memory"]["activations"] < 0.8 * plain["memory"]["activations"]
        estimate = fused["estimated_memory"]["peak"]
        assert estimate == pytest.approx(fused["memory"]["peak"], rel=0.05)
    assert rows[True][0]["memory"] == rows[False][0]["memory"]


def test_half_precision_holds_little_more_than_half(tmp_path: Path) -> None:
    held = {}
    for precision in ("fp32", "bf16"):
        config = ProfileConfig(
            **{**TINY, "width": 0.25, "batch_size": 64}, methods=["ssa"], precision=precision
        )
        (row,) = Profile(config, tmp_path / precision).run()["methods"]
        held[precision] = row["memory"]["activations"]
        assert ("estimated_memory" in row) == (precision == "fp32")
    assert 0.4 < held["bf16"] / held["fp32"] < 0.75


def test_an_estimate_runs_nothing(tmp_path: Path) -> None:
    big = {**TINY, "width": 8.0, "image_size": 64, "batch_size": 32768, "estimate": True}
    results = Profile(ProfileConfig(**big, methods=["bp-dense", "ssa"]), tmp_path).run()
    dense, local = results["methods"]
    assert dense["memory"]["peak"] > 2**39
    assert local["memory"]["activations"] < dense["memory"]["activations"]
    assert "step_ratio" not in dense
    assert "nothing was run" in (tmp_path / "report.html").read_text()
    assert all(0 < row["macs"] < row["full_rank"] for row in results["break_even"])


def test_break_even_ranks_by_layer(tmp_path: Path) -> None:
    config = ProfileConfig(**TINY, methods=["bp-dense", "bp"], break_even=True)
    results = Profile(config, tmp_path).run()
    assert json.loads((tmp_path / "results.json").read_text()) == results
    rows = {row["layer"]: row for row in results["break_even"]}
    assert rows["0"]["input"] == [16, 3, 16, 16]
    for row in rows.values():
        ranks = [at["rank"] for at in row["ratios"]]
        assert ranks == sorted(set(ranks))
        assert ranks[-1] == row["full_rank"] > row["macs"] >= row["rank"]
        for kind in ("forward", "training"):
            assert all(at[kind] > 0 for at in row["ratios"])
            assert row[kind] is None or ranks[0] <= row[kind] <= row["full_rank"]
    console = io.StringIO()
    Console(file=console, width=80).print(break_even_table(results))
    page = (tmp_path / "report.html").read_text()
    for row in rows.values():
        share = f"{row['macs']} ({row['macs'] / row['full_rank']:.2f})"
        assert share in console.getvalue()
        assert f"<td>{share}</td>" in page


def test_an_epoch_is_so_many_steps(tmp_path: Path) -> None:
    """Of 1,000 images in batches of 16: 63 steps on one device, 8 on eight; or the gradients' way
    between devices, where that is longer."""
    options = {**TINY, "methods": ["bp"], "estimate": True, "epoch_images": 1000}
    config = ProfileConfig(**options, device_flops=1e9, utilisation=0.5, link=1e12)
    row = Profile(config, tmp_path / "fast").run()["methods"][0]
    step = 2 * row["step_macs"] / 0.5e9
    assert row["epoch_seconds"] == pytest.approx({"1": 63 * step, "8": 8 * step})
    config = ProfileConfig(**options, device_flops=1e18, link=1e6)
    slow = Profile(config, tmp_path / "slow").run()
    row = slow["methods"][0]
    assert row["epoch_seconds"]["8"] == pytest.approx(8 * 4 * row["parameters"] * 1.75 / 1e6)
    console = io.StringIO()
    Console(file=console, width=80).print(epoch_table(slow))
    shown = " ".join(console.getvalue().split())
    assert "8 devices" in shown
    assert "an epoch of 1,000 images, predicted: 1e+18 FLOP/s × 35%" in shown


def test_no_factored_method_no_break_even(tmp_path: Path) -> None:
    config = ProfileConfig(**TINY, methods=["bp-dense", "dfa-dense"], estimate=True)
    assert Profile(config, tmp_path).run()["break_even"] == []
    assert "Break-even" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["bp", "backprop"]}, "unknown method 'backprop'"),
        ({"methods": []}, "methods must be at least one"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"model": "transformer"}, "unknown model 'transformer'"),
        ({"image_size": 4}, "image_size must be at least 8"),
        ({"break_even": True, "estimate": True}, "but estimate runs nothing"),
        ({"epoch_images": 100, "estimate": True}, "device_flops is needed"),
        ({"devices": [0]}, "devices must be numbers of at least 1"),
        ({"estimate": True, "precision": "bf16"}, "estimate works out fp32 alone"),
        ({"break_even": True, "methods": ["bp-dense"]}, "needs a method with factored weights"),
        ({"device": "tpu"}, "device 'tpu' cannot be used"),
    ],
)
def test_mistakes_are_found_first(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Profile(ProfileConfig(**{**TINY, **changes}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_profile_is_not_overwritten_unasked(tmp_path: Path) -> None:
    config = ProfileConfig(**TINY, methods=["bp-dense"], estimate=True)
    first = Profile(config, tmp_path).run()
    before = (tmp_path / "results.json").read_bytes()
    assert Profile(config, tmp_path).run() == first  # there is nothing left to measure
    other = dataclasses.replace(config, batch_size=4)
    with pytest.raises(ValueError, match=r"holds another profile \(batch_size 16 there, 4 here"):
        Profile(other, tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before
    assert Profile(other, tmp_path, overwrite=True).run()["config"]["batch_size"] == 4


def test_a_profile_goes_on_with_the_next_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ProfileConfig(**TINY, methods=["bp-dense", "ssa"])
    asked = iter([False])
    part = Profile(config, tmp_path).run(stop=lambda: next(asked, True))
    assert part["status"] == "interrupted"
    (dense,) = part["methods"]
    again = Profile(config, tmp_path)
    assert again.pending == 1
    measured: list[str] = []
    memory = Profile._memory
    monkeypatch.setattr(
        Profile, "_memory", lambda self, name: measured.append(name) or memory(self, name)
    )
    results = again.run()
    assert measured == ["ssa"]
    assert results["status"] == "finished"
    assert results["methods"][0]["memory"] == dense["memory"]
    assert all(row["step_ratio"] > 0 for row in results["methods"])
