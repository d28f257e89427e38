"""The HTML report: self-contained, verdict first, everything the checks and curves hold."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("torch")

from arinar.export.parity import Check, ParityReport
from arinar.export.report import bar_plot, heat_map, line_plot, render, write_report


@pytest.fixture
def report() -> ParityReport:
    made = ParityReport("int8", "onnxruntime-cpu", {"labels": list(range(12)), "seed": 3})
    made.checks += [
        Check("graph", "outer_step", 1e-6, 1e-4),
        Check("teacher-forced", "z <max>", 2e-3, 1e-4, note="first beyond the limit at step 4"),
        Check("teacher-forced", "mean kl", 1e-7, None),
        Check("free-running", "images within 1 grey level", 0.5, 0.99, at_least=True),
        Check("distribution", "Frechet distance / yardstick", 1.1, 1.5),
    ]
    made.curves = {name: [1e-6, 0.0, 2e-3] for name in ("z", "weight", "mu", "logvar", "kl", "diverged")}
    made.tables = {name: [[1e-6, 2e-6], [0.0, 1e-5], [1e-3, 1e-4]] for name in ("weight", "mu", "logvar", "kl")}
    made.histograms = {"reference": [5, 1, 0, 2], "deployed": [5, 0, 1, 2], "divergence step": [0, 1, 0]}
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    made.images = {"reference": images, "deployed": images ^ 1}
    made.provenance = {"bundle": "digits & more", "versions": {"numpy": "2.0"}, "sha256": {"graphs/x.onnx": "ab" * 32}}
    return made


class Balanced(HTMLParser):
    """Fails on a tag that is closed without being open."""

    EMPTY = ("meta", "img", "col", "br", "input", "rect", "line", "circle", "polyline", "!doctype")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            while self.open and self.open[-1] in ("p", "td", "tr", "th") and self.open[-1] != tag:
                self.open.pop()
            assert self.open and self.open.pop() == tag, tag


def test_one_file_that_needs_no_network(report: ParityReport, tmp_path: Path) -> None:
    path = write_report(report, tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    for outside in ("http:", "https:", "<script", "<link", "@import", "url("):
        assert outside not in text.lower(), outside
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r"src='([^']*)'", text))
    Balanced().feed(text)


def test_verdict_comes_first_and_names_the_first_failure(report: ParityReport) -> None:
    text = render(report)
    body = text[text.index("</style>") :]
    assert "2 checks failed; the first: z &lt;max&gt; (teacher-forced) is 0.002, at most 0.0001" in body
    assert body.index("checks failed") < body.index("Each graph alone") < body.index("Provenance")
    assert "first beyond the limit at step 4" in body and body.count("FAIL") == 2
    report.checks = [check for check in report.checks if check.passed]
    assert "It is the same model" in render(report)


def test_every_level_plot_and_image_row_is_there(report: ParityReport) -> None:
    text = render(report)
    for words in ("Along PyTorch", "Each on its own", "Many images", "digits &amp; more", "ab" * 32, "versions numpy"):
        assert words in text, words
    assert text.count("<svg") == 7
    assert text.count("<img") == 30  # ten images, three rows
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(svg)


def test_plots_of_nothing_and_of_extremes() -> None:
    for figure in (
        line_plot({"a": [0.0, 0.0]}, "t", "x", "y"), line_plot({"a": [1e-3]}, "t", "x", "y"),
        line_plot({"a": [1e-30, float("nan"), 1e30]}, "t", "x", "y"), bar_plot({"a": [0, 0]}, "t", "x", "y"),
        line_plot({"a": [5.0, 50.0]}, "t", "x", "%", log=False, top=100), heat_map(np.zeros((2, 3)), "t", "x", "y"),
        heat_map(np.full((1, 1), 0.5), "t <b>", "x", "y"), bar_plot({"a": [100_000], "b": [3]}, "t", "x", "y"),
    ):  # fmt: skip
        svg = re.search(r"<svg.*</svg>", figure, re.S)
        assert svg is not None
        for element in ElementTree.fromstring(svg[0]).iter():
            for name in ("x", "y", "width", "height", "cx", "cy"):
                value = element.get(name)
                assert value is None or np.isfinite(float(value))
        assert "nan" not in figure


def test_a_report_without_pictures_or_curves_renders() -> None:
    text = render(ParityReport("fp32", "onnxruntime-cpu", {}, [Check("graph", "outer_step", 0.0, 1e-4)]))
    assert "It is the same model" in text and "<img" not in text
