"""Pages from made-up results: what they say, and that what is in a result cannot do anything."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from tests.lab.reports.made_up import LABELS, comparison, history, run, single

from svdalign.lab.reports import card_text, comparison_page, frame, run_page
from svdalign.lab.reports.tables import at_chance, beside_backpropagation, comparison_rows


class Page(HTMLParser):
    """Elements with their attributes, and the text of table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self._in_cell = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def text() -> str:
    """The page of the comparison as it is made up."""
    return comparison_page(comparison())


def test_figures_and_tables_of_a_comparison(text: str) -> None:
    page = Page(text)
    # Three accuracies and a loss, two against costs, two of costs, ranks and spectra of each.
    figures = [svg for svg in page.all("svg") if svg.get("role") == "img"]
    assert len(figures) == 4 + 4 + 2 * len(LABELS)
    assert all(svg["aria-label"] for svg in figures)
    assert "arithmetic" in text
    assert "mathdefault" not in text  # powers of ten on logarithmic scales, in plain text
    assert {"BP", "70.50% ± 0.71", "70.0%, 71.0%", "0.005", "1,001"} <= set(page.cells)
    assert [row["data-method"] for row in page.all("tr") if "data-method" in row] == list("012")
    marked = {tag for tag, attrs in page.tags if "data-method" in attrs}
    assert {"tr", "g", "figure"} <= marked


def test_scores_at_chance_are_marked(text: str) -> None:
    results = comparison()
    rows = comparison_rows(results)
    assert [row[1].endswith("†") for row in rows] == [False, True, False]
    assert "a guess is right 10.0% of the time" in text
    # 400 images of 10 classes: the standard deviation of a guess is 1.5 points.
    assert at_chance(0.129, results)
    assert not at_chance(0.131, results)
    assert not at_chance(None, results)
    assert "(at chance)" in run_page(single(0.1), "DFA")
    assert "(at chance)" not in run_page(single(0.7), "SSA")


def test_one_scale_for_accuracy_over_epochs_time_and_arithmetic(text: str) -> None:
    figures = re.findall(r'<svg role="img" aria-label="test accuracy \(%\) by.*?</svg>', text, re.S)
    assert len(figures) == 3
    ticks = [re.findall(r">(\d\d?)</text>", svg)[-8:] for svg in figures]
    scales = [[tick for tick in marks if tick.endswith("0")] for marks in ticks]
    assert all("chance" in svg for svg in figures)
    assert scales[0]
    assert scales[0] == scales[1] == scales[2]


def test_angles_are_shown_where_they_were_measured(text: str) -> None:
    assert "Angles" not in text
    results = comparison(1)
    results["runs"][2]["history"] = history(0.65, angles=True)
    text = comparison_page(results)
    assert "Angles to backpropagation" in text
    assert "angle of gradient to BP" in text


def test_a_comparison_with_nothing_measured_yet_has_a_page() -> None:
    results = comparison(1) | {"runs": [], "status": "interrupted"}
    for row in results["summary"]:
        row |= {"accuracy": None, "complete": False, "runs": 0}
        for key in ("memory", "step_seconds", "step_macs", "macs", "parameters"):
            del row[key]
    assert "Interrupted" in comparison_page(results)
    assert "Interrupted" in run_page(single(None, status="interrupted"), "SSA")


def test_a_value_that_is_not_finite_leaves_a_gap() -> None:
    results = comparison(1)
    results["runs"][0]["history"][-1] |= {"loss": None, "test_loss": None, "spectra": {}}
    page = comparison_page(results)
    assert re.search(r'"training loss by epoch; last values: [^"]*\bnan\b[^"]*\d', page)
    page = run_page(single() | {"history": results["runs"][0]["history"]}, "SSA")
    *_, last = re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.S)
    assert re.findall(r"<td[^>]*>([^<]*)</td>", last)[1::2][:2] == ["–", "–"]


HOSTILE = (
    '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 6 }} $\\frac{1}{0}$ & </style>'
)


def test_what_a_result_holds_cannot_execute_anything(text: str) -> None:
    labels = {"bp-dense": HOSTILE, HOSTILE: "DFA", "ssa": "SSA"}
    results = comparison(labels=labels, **{"model": HOSTILE, HOSTILE: HOSTILE})
    results["data"]["name"] = results["command"] = results["machine"]["cpu"] = HOSTILE
    results["config"]["settings"] = {"ssa": {"options": {HOSTILE: HOSTILE}}}
    results["runs"][0]["history"][0]["ranks"] = {HOSTILE: 3}
    results["runs"][0]["history"][0]["spectra"] = {HOSTILE: [1.0, 0.5]}
    own = Page(text)
    for text in (
        comparison_page(results),
        run_page(single(data=results["data"], config=results["config"]), HOSTILE),
    ):
        page = Page(text)
        assert "<script>alert" not in text
        assert len(page.all("script")) == len(page.all("ul"))  # the key's own, where there is one
        assert not page.all("img")
        assert "{{ 7 * 6 }}" in text  # no template of ours
        assert {tag for tag, _ in page.tags} <= {tag for tag, _ in own.tags}
        assert not [n for _, attrs in page.tags for n in attrs if n.startswith("on")]
        (policy,) = (m["content"] for m in page.all("meta") if m.get("http-equiv"))
        assert policy is not None
        assert "default-src 'none'" in policy
        assert "unsafe-inline" not in policy.partition("script-src")[2]


@pytest.mark.parametrize("outside", ["<script ", "<link", "<img", "@import", "url(http"])
def test_a_page_needs_nothing_else(text: str, outside: str) -> None:
    assert outside not in text


def test_ids_are_unique_and_every_reference_is_met(text: str) -> None:
    for svg in re.findall(r"<svg role.*?</svg>", text, re.S):
        ids = re.findall(r'\sid="([^"]+)"', svg)
        assert len(ids) == len(set(ids))
        assert set(re.findall(r"(?:url\(|href=\")#([\w-]+)", svg)) <= set(ids)


def test_a_card_says_how_many_images_and_escapes_names() -> None:
    versus = {"compact": 10, "dense": 20, "ratio": 0.5}
    card: dict[str, Any] = {
        "network": "mlp", "width": 1.0, "classes": ["a|b", "<b>"], "modules": "Sequential()",
        "input": {"shape": [1, 28, 28], "mean": [0.5], "std": [0.25]}, "test_accuracy": 0.75,
        "training": {"rule": "ssa", "epochs": 3, "seed": 0}, "parameters": versus, "macs": versus,
        "latency": [{"batch": 1, "seconds": 0.001, "dense_seconds": 0.002, "ratio": 0.5}],
        "files": [{"name": "model.pt2", "bytes": 1234, "max_abs_difference": 1e-7}],
        "layers": [{"name": "0", "rank": 3, "full_rank": 6, "form": "factored"}],
        "config": {"validation": None}, "data": comparison()["data"], "torch": "2.13",
        "machine": {"cpu": "a CPU", "threads": 1},
    }  # fmt: skip
    text = card_text(card)
    assert "Test accuracy **75.00%** on 400 images of embedded" in text
    assert "3 epochs on 320 images" in text
    assert "a&#124;b, &lt;b&gt;" in text
    assert "| latency, batch 1 | 1.00 ms | 2.00 ms | 0.50 |\n\nDense" in text
    assert "| `model.pt2` | 1,234 | 1.0e-07 |" in text


def test_runs_of_different_lengths_share_a_figure() -> None:
    results = comparison(2)
    results["runs"][-1] = run("ssa", 1, 0.3, history=history(0.3, 2), status="interrupted")
    assert "SSA, horizon 2" in comparison_page(results)


def test_results_as_a_frame() -> None:
    table = frame(comparison(2))
    assert len(table) == 2 * len(LABELS) * 4
    last = table[(table.method == "ssa") & (table.epoch == 4)]
    assert last.groupby("seed").test_accuracy.first().tolist() == pytest.approx([0.65, 0.66])
    assert list(frame(single()).epoch) == [1, 2, 3, 4]


def test_memory_and_accuracy_are_set_beside_the_leanest_backpropagation() -> None:
    labels = {"bp-dense": "BP", "dfa": "DFA", "ssa": "SSA, horizon 2"}
    results = comparison(1, labels)
    for row, peak in zip(results["summary"], (50, 10, 20), strict=True):
        row["memory"]["peak"] = peak
    line, noise = beside_backpropagation(results)
    assert line == (
        "Beside BP, the leanest backpropagation: DFA takes 0.20 times its memory for -60.0 points "
        "of accuracy; SSA, horizon 2 takes 0.40 times its memory for -5.0 points of accuracy."
    )
    # Two standard deviations of a difference of two scores of 70 % on 400 images.
    assert noise == "With one seed and 400 images, 6.5 points or less may be chance."
    assert line in comparison_page(results)
    assert len(beside_backpropagation(comparison(2))) == 1  # the deviation over seeds is shown


@pytest.mark.parametrize("missing", ["memory", "bp-dense"])
def test_nothing_is_set_beside_what_is_missing(missing: str) -> None:
    results = comparison(1)
    rows = [row for row in results["summary"] if row["method"] != missing]
    results["summary"] = [{k: v for k, v in row.items() if k != missing} for row in rows]
    assert beside_backpropagation(results) == []


def test_no_label_is_a_formula() -> None:
    spread = history(0.7)
    for row in spread:
        row["spectra"] = {"conv1": [1.0, 0.8, 0.5], "conv2": [1.0, 0.1, 0.003]}
    assert "mathdefault" not in run_page(single(history=spread), "a run")
