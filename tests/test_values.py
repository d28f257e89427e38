"""Files that describe things (manifests, sidecars, calibrations, reports), every value of them replaced by every other kind of
value: read, or refused in one line; never another error."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeCudaRuntime

from arinar.config import ArinarConfig
from arinar.runtime import Pipeline
from arinar.runtime.backends.cuda import device_info
from arinar.runtime.backends.engines import EngineInfo
from arinar.runtime.bundle import Bundle, BundleError, Manifest
from arinar.text import shown
from arinar.values import conforming, entry, integer, items, mapping, number, text, truth

DATA = Path(__file__).parent / "data"
DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
#: What a value may be replaced by: other types, huge, negative, not finite, nested, hostile text.
OTHERS: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    7,
    2**31,
    2**63,
    -(2**63),
    10**400,
    0.5,
    1e300,
    float("nan"),
    float("-inf"),
    "",
    "x",
    "../x",
    "/etc/passwd",
    "a\n\x1b[31mb\0",
    "x" * 5000,
    [],
    [1],
    [[]],
    ["x", None],
    {},
    {"x": {"x": 1}},
    DEEP,
]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values are, in values too; of many that are alike, the first two of each kind."""
    yield at
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*at, key))
    elif isinstance(value, list):
        for index in range(min(2, len(value))):
            yield from places(value[index], (*at, index))


def thinned(value: Any) -> Iterator[tuple[Any, ...]]:
    """Of places that differ in the names of graphs and files alone, three."""
    seen: dict[Any, int] = {}
    for at in places(value):
        kind = tuple(
            part if at[0] not in ("graphs", "files", "layers") or place in (0, 1, 3) else "*" for place, part in enumerate(at)
        )
        kind = tuple("*" if at[0] in ("files", "layers") and place == 1 else part for place, part in enumerate(kind))
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= 3:
            yield at


def replaced(value: Any, at: tuple[Any, ...], other: Any) -> Any:
    if not at:
        return other
    value = copy.deepcopy(value)
    inner = value
    for part in at[:-1]:
        inner = inner[part]
    inner[at[-1]] = other
    return value


def damaged(value: Any) -> Iterator[tuple[Any, Any]]:
    for at in thinned(value):
        for other in OTHERS:
            yield (at, other), replaced(value, at, other)
        if at and isinstance(at[-1], str):
            lacking = replaced(value, at, None)
            inner = lacking
            for part in at[:-1]:
                inner = inner[part]
            del inner[at[-1]]
            yield (at, "missing"), lacking


def fuzz(value: Any, read: Callable[[str], Any], error: type[Exception] = ValueError) -> int:
    """-> how many damaged forms were refused."""
    refused = 0
    for what, other in damaged(value):
        try:
            read(json.dumps(other))
        except error as found:
            refused += 1
            message = str(found)
            assert "\n" not in message and "\x1b" not in message and len(message) < 2000, (what, message)
        except Exception as found:
            raise AssertionError(f"{what}: {found!r}") from found
    return refused


def small_manifest() -> dict[str, Any]:
    """Of version 1, with two graphs of one precision, so that all of its values can be tried."""
    data = json.loads((DATA / "manifest-0.1-digits.json").read_text())
    data["graphs"] = {"fp32": {name: data["graphs"]["fp32"][name] for name in ("outer_step", "tokens_to_latents")}}
    for graph in data["graphs"]["fp32"].values():
        graph["inputs"] = graph["inputs"][:1]
    used = {name for graph in data["graphs"]["fp32"].values() for name in (graph["file"], graph["cpu_file"], *graph["weights"])}
    data["files"] = {name: info for name, info in data["files"].items() if name in used}
    return data


def test_manifests_of_version_1() -> None:
    assert fuzz(small_manifest(), Manifest.from_json, BundleError) > 500


def test_manifests_of_version_2() -> None:
    """What is read can be written and read again."""
    manifest = Manifest.from_json(json.dumps(small_manifest()))

    def read(text_: str) -> None:
        made = Manifest.from_json(text_)
        assert Manifest.from_json(made.to_json()) == made

    assert fuzz(json.loads(manifest.to_json()), read, BundleError) > 500


@pytest.mark.parametrize(
    ("at", "other", "message"),
    [
        (("config", "img_size"), 1e300, "config.img_size is 1e.300; expected an integer from 0 to"),
        (("config", "vae_stride"), 0, "damaged .*; export the model again"),
        (("config", "img_size"), 2**30, "img_size is 1073741824; expected an integer from 1 to 32768"),
        (("config", "latent_scale"), ["x"], r"config.latent_scale\[0\] is 'x'; expected a finite number"),
        (("config", "widht"), 3, "config has unknown entries 'widht'"),
        (("defaults", "temperature"), 0, "defaults.temperature is 0.0; expected a number above 0"),
        (("defaults", "num_iter"), True, "defaults.num_iter is True; expected an integer"),
        (
            ("graphs", "fp32", "outer_step", "opset"),
            "20",
            "graphs.fp32.outer_step.opset is '20'; expected an integer from 1 to 1000",
        ),
        (
            ("graphs", "fp32", "outer_step", "inputs", 0, "dtype"),
            "object",
            r"inputs\[0\].dtype is 'object'; expected one of float32",
        ),
        (("graphs", "fp32", "outer_step", "name"), "other", "graphs.fp32.outer_step.name is 'other'; expected 'outer_step'"),
        (("graphs",), {}, "graphs has no entries"),
        (("law",), {"num_candidates": -5}, "law.num_candidates is -5; expected an integer from 1"),
        (("format_version",), True, "format version True"),
        (("format_version",), "x" * 9999, "format version 'xxx"),
    ],
)
def test_manifests_errors_name_the_entry(at: tuple[Any, ...], other: Any, message: str) -> None:
    manifest = Manifest.from_json((DATA / "manifest-0.1-digits.json").read_text())
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(json.dumps(replaced(json.loads(manifest.to_json()), at, other)))


def test_json_itself(tmp_path: Path) -> None:
    for bad in ("[" * 100_000, "{", '{"a": ' + "1" * 5000 + "}", "nonsense"):
        with pytest.raises(BundleError, match="is not a bundle's manifest"):
            Manifest.from_json(bad)
        with pytest.raises(ValueError):
            EngineInfo.from_json(bad)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "manifest.json").write_text((DATA / "manifest-0.1-digits.json").read_text())
    (tmp_path / "bundle" / "manifest.json").symlink_to("../manifest.json")
    with pytest.raises(BundleError, match="'manifest.json' leads out of the bundle"):
        Bundle.open(tmp_path / "bundle")


def test_sidecars() -> None:
    info = EngineInfo(
        "outer_step", "fp16", "tensorrt", "10.9.0", ("8.9",), "0" * 64, 20, (1, 8, 64),
        ({"tokens": ((1, 2), (8, 2), (64, 2))},), {"workspace": None}, size=5 * 2**30,
    )  # fmt: skip
    assert EngineInfo.from_json(info.to_json()) == info

    def read(text_: str) -> None:
        made = EngineInfo.from_json(text_)
        assert EngineInfo.from_json(made.to_json()) == made and made.inputs

    assert fuzz(json.loads(info.to_json()), read) > 200


def test_reports_of_the_benchmark(tmp_path: Path) -> None:
    from arinar.measure.bench import compare, compared_with, read_report

    report = {
        "bundle": "b", "backend": "onnxruntime-cpu", "precision": "fp32", "guidance_scale": 4.0, "threads": 2,
        "machine": {"cpu": "x", "cores": 2, "date": "today", "versions": {}},
        "results": [{"batch": 1, "num_iter": 4, "s_per_image": 0.5}],
    }  # fmt: skip
    path = tmp_path / "report.json"

    def read(text_: str) -> None:
        path.write_text(text_)
        assert compared_with(compare(read_report(path), report))

    assert fuzz(report, read) > 100


def test_calibrations(demo_bundle: Any, tmp_path: Path) -> None:
    from arinar.export.layers import Graph, layer_graphs
    from arinar.export.quantize import Calibration
    from arinar.export.spec import ExportError

    bundle = Bundle.open(demo_bundle("digits"))
    infos = bundle.manifest.graphs["fp32"]
    layers = {key: layer for n in layer_graphs(infos) for key, layer in Graph.load(bundle.graph_path(infos[n])).layers.items()}
    name, layer = next((key, value) for key, value in layers.items() if value.wide)
    data = {
        "kind": "arinar calibration", "format_version": 1,
        "settings": {"model": {"graphs/fp32/weights.data": bundle.manifest.files["graphs/fp32/weights.data"].sha256}},
        "layers": {name: {"absmax_per_channel": [1.0] * len(layer.weight)}},
        "maps": {"int8-static": {"quantized": {name: {"absmax": 2.0, "smooth_alpha": 0.5}}}},
    }  # fmt: skip
    path = tmp_path / "calibration.json"

    def read(text_: str) -> None:
        path.write_text(text_)
        calibration = Calibration.read(path)
        calibration.check(bundle)
        for plan in calibration.plans("int8-static", layers).values():
            assert np.isfinite(plan.absmax) and (plan.smooth is None or np.isfinite(plan.smooth).all())

    read(json.dumps(data))
    assert fuzz(data, read, ExportError) > 100


# ----------------------------------------------------------------------------------------------------- one value at a time


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (lambda v: integer("n", v, 1, 9), 10**5000, "n is an integer of 16610 bits; expected an integer from 1 to 9"),
        (lambda v: integer("n", v), 1.0, "n is 1.0; expected an integer from 0"),
        (lambda v: integer("n", v), np.True_, "n is .*True.*; expected an integer"),
        (lambda v: number("x", v, 1), 10**400, "x is an integer of 1329 bits; expected a finite number at least 1"),
        (lambda v: number("x", v, 1), 1 + 0j, r"x is \(1\+0j\); expected a finite number"),
        (lambda v: number("x", v, 1), np.complex64(1), "x is .*; expected a finite number"),
        (lambda v: number("x", v, 0, strict=True), 1e-60, "x is 1e-60; expected a number above 0 that float32 can hold"),
        (lambda v: number("x", v, 1), 1e39, "x is 1e.39; expected a number at least 1 that float32 can hold"),
        (lambda v: text("t", v), b"x", "t is b'x'; expected text"),
        (lambda v: truth("t", v), 1, "t is 1; expected true or false"),
        (lambda v: items("l", v), "abc", "l is 'abc'; expected a list"),
        (lambda v: mapping("m", v), [1], r"m is \[1\]; expected entries by name"),
        (lambda v: entry("m", v, "k"), {}, "m has no entry 'k'"),
        (lambda v: conforming(EngineInfo, "s", v), {}, "s has no entry 'graph'"),
    ],
    ids=lambda part: part[:20] if isinstance(part, str) else "",  # some values cannot be written out
)
def test_values(check: Callable[[Any], Any], value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(value)


def test_right_values_come_back() -> None:
    assert integer("n", np.int64(3)) == 3 and number("x", np.float32(0.5)) == 0.5 and number("x", 7, 1) == 7.0
    assert text("t", "x") == "x" and truth("t", False) is False and items("l", (1, 2)) == [1, 2]


def test_shown_is_short_and_plain() -> None:
    class Rude:
        def __repr__(self) -> str:
            raise RuntimeError

    assert shown("a\x1b[31m\n") == repr("a\x1b[31m\n") and len(shown("x" * 10**6)) == 60
    assert (
        shown(Rude()).startswith("<Rude instance")
        and shown(-(10**5000)) == "an integer of 16610 bits"
        and shown([10**5000]) == "a list"
    )


def test_numpys_integers_count_as_integers(digits_bundle: Path) -> None:
    pipe = Pipeline.load(digits_bundle, threads=np.int64(1))
    assert pipe.backend.describe()["threads"] == 1
    assert ArinarConfig(num_classes=np.int32(7)).num_classes == 7
    assert device_info(FakeCudaRuntime(), np.int64(0)).index == 0
