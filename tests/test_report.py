"""The HTML report: self-contained, verdict first, everything the checks and curves hold."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("torch")

from arinar.gmm_law import LAW
from arinar.measure.charts import bar_plot, heat_map, line_plot, round_ticks
from arinar.measure.checks import LEVELS, Check, ParityReport, parse_thresholds
from arinar.measure.parity_report import SHOWS, render, write_report


@pytest.fixture
def report() -> ParityReport:
    made = ParityReport("int8", "onnxruntime-cpu", {"labels": list(range(12)), "seed": 3}, scheme="int8", parts=LAW.titles)
    made.checks += [
        Check("graph", "outer_step", 1e-6, 1e-4),
        Check("teacher-forced", "z <max>", 2e-3, 1e-4, note="first beyond the limit at step 4", step=4),
        Check("teacher-forced", "mean kl", 1e-7, None),
        Check("free-running", "images within 1 grey level", 0.5, 0.99, at_least=True),
        Check("distribution", "Frechet distance / yardstick", 1.1, 1.5),
    ]
    for kind in ("", " mean"):
        made.curves |= {f"{name}{kind}": [1e-6, 0.0, 2e-3] for name in ("z", *LAW.parts, "kl")}
        made.tables |= {f"{name}{kind}": [[1e-6, 2e-6], [0.0, 1e-5], [1e-3, 1e-4]] for name in LAW.parts}
    made.tables["kl"] = [[1e-6, 2e-6], [0.0, 1e-5], [1e-3, 1e-4]]
    made.curves |= {"diverged": [0.0, 0.5, 1.0], "same picks": [1.0, 0.9, 0.8]}
    made.histograms = {"reference": [5, 1, 0, 2], "deployed": [5, 0, 1, 2], "divergence step": [0, 1, 0]}
    made.histograms |= {"own reference": [5, 1, 0, 2], "own deployed": [5, 0, 1, 2]}
    made.thresholds = parse_thresholds([], "int8")
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
    assert "2 of 4 checks failed." in body
    assert "First divergence: level 2, teacher-forced: z &lt;max&gt;, outer step 4 (0.002, at most 0.0001)." in body
    assert body.index("checks failed") < body.index("Level 1: each graph alone") < body.index("Provenance")
    assert "first beyond the limit at step 4" in body and body.count("FAIL") == 2
    report.checks = [check for check in report.checks if check.passed]
    assert "Passed: the deployed model is the trained one, within the limits of int8." in render(report)
    assert "was not run" in render(report)  # level 3 has no check any more


def test_the_verdict_says_what_was_changed_and_what_was_not_run(report: ParityReport) -> None:
    report.thresholds = parse_thresholds(["z=0.3"], "int8")
    report.checks = [check for check in report.checks if check.passed and check.level != "distribution"]
    report.notes = ["the bundle was exported from other weights"]
    text = render(report)
    body = text[text.index("</style>") :]
    for words in (
        "within the limits of int8, as changed here",
        "The limit z was set to 0.3; int8&#x27;s is 0.1.",
        "Level 4 (many images) was not run.",
        "The bundle was exported from other weights.",
    ):
        assert words in body and body.index(words) < body.index("Level 1: each graph alone"), words
    assert "arinar parity --distribution N" in body


def test_the_control_is_drawn_beside_and_said(report: ParityReport) -> None:
    plain = render(report)
    assert "Dotted" not in plain and "Limits of int8: measured on the demo models" in plain
    report.checks = [Check("teacher-forced", "z", 2e-3, 4e-3, control=1e-3, widened=True)]
    report.control = {"curves": report.curves, "tables": report.tables, "histograms": {"divergence step": [0, 2, 0]}}
    text = render(report)
    assert "Of 1 the limit was widened: float32 itself parts that far on these weights." in text
    assert "Dotted: PyTorch in float32 against PyTorch in float64" in text
    assert text.count("stroke-dasharray='2 4'") == 2 * (4 + 3) + 2  # by step and by feature, largest and mean; divergences
    assert "PyTorch, float32 against float64" not in text  # level 3 was not run
    Balanced().feed(text)


def test_limits_are_drawn_and_an_empty_plot_is_not(report: ParityReport) -> None:
    text = render(report)
    assert "limit of z: 0.1" in text and "limit of the parameters: 0.5" in text and "limit of the worst draw: 0.5" in text
    assert "Outer step at which an image first parts" in text
    report.histograms["divergence step"] = [0, 0, 0]
    report.curves["diverged"] = [0.0, 0.0, 0.0]
    report.images["deployed"] = report.images["reference"]
    text = render(report)
    assert "None does, at any step." in text and "Outer step at which an image first parts" not in text
    assert text.count("<td>same</td>") == 10  # instead of a PSNR


def test_values_that_are_not_finite_are_shown_as_such(report: ParityReport) -> None:
    nan = float("nan")
    report.curves["z"][1] = report.tables["mu"][2][0] = nan
    report.checks.insert(0, Check("graph", "inner_step", nan, 1e-4, where="output mu"))
    report.checks.append(Check("free-running", "finite images", 0.0, 1.0, True, "graph 'vae_decoder' made non-finite values"))
    text = render(report)
    assert "First divergence: level 1, graph: inner_step, output mu." in text and "<td class='number'>not finite</td>" in text
    assert text.count("not finite") >= 3 and not re.search(r"\bnan\b", re.sub(r"<title>nan</title>|base64,[^']*", "", text))
    report.images = {}
    Balanced().feed(render(report))


def test_every_level_plot_and_image_row_is_there(report: ParityReport) -> None:
    text = render(report)
    for words in ("along PyTorch", "each on its own", "many images", "digits &amp; more", "ab" * 32, "numpy 2.0"):
        assert words in text, words
    titles = re.findall(r"<figcaption><b>(.*?)</b>", text)
    by_step = [title for title in titles if title.endswith("error at each outer step")]
    by_feature = [title for title in titles if "error at each feature" in title]
    assert len(by_step) == len(by_feature) == 2  # largest and mean
    assert sum(title.startswith("Largest relative error: component") for title in titles) == 3  # step against feature
    assert text.count("<svg") == len(titles) == 14
    for name in ("condition vector z", "component weight", "component mean (mu)", "component log variance"):
        assert text.count(f"</i> {name}</span>") == (2 if "z" in name else 4), name
    assert text.count("<img") == 30  # ten images, three rows
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(svg)


def test_plots_of_nothing_and_of_extremes() -> None:
    for figure in (
        line_plot({"a": [0.0, 0.0]}, "t", "x", "y"),
        line_plot({"a": [1e-3]}, "t", "x", "y"),
        line_plot({"a": [1e-30, float("nan"), 1e30]}, "t", "x", "y"),
        bar_plot({"a": [0, 0]}, "t", "x", "y"),
        line_plot({"a": [5.0, 50.0]}, "t", "x", "%", log=False, top=100),
        heat_map(np.zeros((2, 3)), "t", "x", "y"),
        heat_map(np.array([[np.nan, 1.0], [np.inf, 0.0]]), "t", "x", "y"),
        heat_map(np.full((2, 2), np.nan), "t", "x", "y"),
        line_plot({"a": [1e-7, 2e-7]}, "t", "x", "y", limits={"limit": 1e-4, "none": float("inf"), "nil": 0.0}),
        heat_map(np.full((1, 1), 0.5), "t <b>", "x", "y"),
        bar_plot({"a": [100_000], "b": [3]}, "t", "x", "y"),
    ):
        svg = re.search(r"<svg.*</svg>", figure, re.S)
        assert svg is not None
        for element in ElementTree.fromstring(svg[0]).iter():
            for name in ("x", "y", "width", "height", "cx", "cy"):
                value = element.get(name)
                assert value is None or np.isfinite(float(value))
        assert "nan" not in figure.replace("<title>nan</title>", "")


def test_a_report_without_pictures_or_curves_renders() -> None:
    text = render(ParityReport("fp32", "onnxruntime-cpu", {}, [Check("graph", "outer_step", 0.0, 1e-4)]))
    assert "Passed: the deployed model is the trained one" in text and "<img" not in text


@pytest.mark.parametrize("most", [1e-12, 0.003, 0.99, 1.0, 1.01, 5.0, 12.0, 12.1, 99.9, 1000.0, 123456.0])
def test_ticks_are_few_round_and_reach_the_largest_value(most: float) -> None:
    ticks = round_ticks(most)
    steps = np.diff(ticks)
    assert ticks[0] == 0 and ticks[-2] < most <= ticks[-1] * (1 + 1e-9) and 3 <= len(ticks) <= 7
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    assert f"{steps[0]:.0e}"[0] in "125"
    counts = round_ticks(most, whole=True)
    assert counts == [round(tick) for tick in counts] and most <= counts[-1]


def test_ticks_of_nothing() -> None:
    assert round_ticks(0.0)[-1] == 1.0 and round_ticks(0.0, whole=True) == [0.0, 1.0]


def test_every_level_says_what_it_shows_and_what_it_does_not(report: ParityReport) -> None:
    assert set(SHOWS) == set(LEVELS) and all(text.replace("'", "&#x27;") in render(report) for text in SHOWS.values())
    assert all(text.startswith("A pass shows that ") and "; not " in text for text in SHOWS.values())
