"""Bundles that earlier versions wrote: read, or refused with the remedy.

`data/manifest-0.1-*.json` are as version 0.1.0 wrote them: `arinar export digits` in fp32, then `--precision int8` and
`fp16` added; `arinar export digits-causal` in fp32. They are never written again: what has been deployed stays as it is.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arinar.config import ArinarConfig
from arinar.runtime.bundle import FORMAT_VERSION, MANIFEST_NAME, Bundle, BundleError, Manifest

DATA = Path(__file__).parent / "data"
INNER = {"inner_condition", "inner_step", "inner_token", "inner_token_guided", "mixture_sample", "mixture_sample_guided"}
ALWAYS = INNER | {"outer_step", "tokens_to_latents", "vae_decoder", "vae_encoder"}
NAMES = ["digits", "digits-causal"]


def text(name: str) -> str:
    return (DATA / f"manifest-0.1-{name}.json").read_text(encoding="utf-8")


def read(name: str) -> Manifest:
    """The manifest. Once the format is another one, refusing is allowed: with the remedy, as BundleError."""
    try:
        return Manifest.from_json(text(name))
    except BundleError as error:
        assert FORMAT_VERSION > 1, "this version still writes the format that it refuses"
        assert "export the model again" in str(error)
        pytest.skip(f"refused: {error}")


@pytest.mark.parametrize("name", NAMES)
def test_config_and_defaults(name: str) -> None:
    manifest, written = read(name), json.loads(text(name))
    config = json.loads(json.dumps(manifest.config.to_dict()))
    assert config == config | written["config"]  # fields that came later have their defaults
    assert isinstance(manifest.config, ArinarConfig)
    causal = name == "digits-causal"
    assert (manifest.config.outer, manifest.config.num_classes) == ("causal" if causal else "masked", 10)
    assert (manifest.config.inner_depth, manifest.config.num_gaussians, manifest.config.vae_embed_dim) == (1, 4, 16)
    defaults = manifest.defaults
    assert (defaults.num_iter, defaults.guidance_scale) == (16 if causal else 12, 4.0)
    assert (defaults.cfg_schedule, defaults.temperature) == ("linear", 1.0)
    assert manifest.law == {"num_candidates": 1000}
    assert manifest.provenance["arinar"] == "0.1.0" and manifest.provenance["checkpoint"] == name


@pytest.mark.parametrize("name", NAMES)
def test_graphs_and_files(name: str) -> None:
    manifest, written = read(name), json.loads(text(name))
    variants = {"digits": {"fp32", "fp16", "int8"}, "digits-causal": {"fp32"}}[name]
    assert set(manifest.graphs) == variants
    for variant in variants:
        graphs = manifest.precision_graphs(variant)
        assert set(graphs) == ALWAYS | ({"outer_prefill"} if name == "digits-causal" else set())
        assert manifest.scheme(variant) == variant
        for key, graph in graphs.items():
            entry: dict[str, Any] = written["graphs"][variant][key]
            assert (graph.name, graph.file, graph.opset, graph.cpu_file) == (key, entry["file"], 20, entry["cpu_file"])
            for have, want in ((graph.inputs, entry["inputs"]), (graph.outputs, entry["outputs"])):
                assert [(t.name, t.dtype, list(t.shape)) for t in have] == [(t["name"], t["dtype"], t["shape"]) for t in want]
            assert set(graph.files) <= set(manifest.files)
            assert graph.max_abs_err == entry["max_abs_err"]
    assert {file: (info.size, info.sha256) for file, info in manifest.files.items()} == {
        file: (info["size"], info["sha256"]) for file, info in written["files"].items()
    }


def test_the_8_bit_variant_computes_in_8_bits() -> None:
    manifest = read("digits")
    assert manifest.scheme("int8") == "int8" and manifest.provenance["quantization"]["int8"]["layers"] == 32
    # Only some graphs have products to round; the others are the float ones, and their files are shared.
    shared = {n for n, g in manifest.graphs["int8"].items() if g.file == manifest.graphs["fp32"][n].file}
    assert shared == {"mixture_sample", "mixture_sample_guided", "tokens_to_latents", "vae_decoder", "vae_encoder"}


def test_the_graphs_have_what_the_loop_feeds() -> None:
    step = read("digits").graphs["fp32"]["outer_step"]
    names = ["visible_tokens", "visible_positions", "target_positions", "hidden_positions", "labels"]
    assert [tensor.name for tensor in step.inputs] == names and [tensor.name for tensor in step.outputs] == ["z"]
    causal = read("digits-causal").graphs["fp32"]["outer_step"]
    assert [tensor.name for tensor in causal.inputs[:3]] == ["token", "rows", "position"]
    assert len(causal.inputs) == 3 + 2 * 6 and causal.inputs[3].shape == ("N", 4, 19, 24)


@pytest.mark.parametrize("name", NAMES)
def test_it_survives_being_written_by_this_version(name: str) -> None:
    manifest = read(name)
    assert Manifest.from_json(manifest.to_json()) == replace(manifest, format_version=FORMAT_VERSION)


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_opens_and_says_which_file_is_missing(name: str, tmp_path: Path) -> None:
    read(name)
    (tmp_path / MANIFEST_NAME).write_text(text(name), encoding="utf-8")
    bundle = Bundle.open(tmp_path)
    with pytest.raises(BundleError, match=r"is missing; copy the bundle again, or export the model again"):
        bundle.verify()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_it_belongs_to_the_machine_that_wrote_it(name: str) -> None:
    assert '"/' not in text(name) and "file:" not in text(name)
