"""The command: what a user types, what comes back, and with which exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
from click.shell_completion import get_completion_class
from click.testing import CliRunner, Result
from PIL import Image

from arinar.cli import main
from arinar.cli.common import parse_labels, program, running
from arinar.runtime import Bundle, Pipeline
from arinar.runtime.images import read_metadata


def arinar(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def fails(result: Result, code: int, *words: str) -> None:
    """One line on standard error, with these words in it, and this exit code."""
    assert result.exit_code == code, result.output
    message = [line for line in result.stderr.strip().splitlines() if "rror" in line]
    assert len(message) == 1 and "Traceback" not in result.output, result.output
    for word in words:
        assert word in message[0], message[0]


def test_labels() -> None:
    assert parse_labels("207,360") == [207, 360]
    assert parse_labels("0-3, 7,5-5") == [0, 1, 2, 3, 7, 5]
    assert parse_labels("golden retriever, -1,3,jack-o'-lantern") == ["golden retriever", -1, 3, "jack-o'-lantern"]
    for text in ("5-1", "", "1,,2", "-3", "1--2", "9" * 40):
        with pytest.raises(click.BadParameter):
            parse_labels(text)


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = arinar(command, "--help")
    assert result.exit_code == 0 and "Example:  arinar" in result.output


def test_help_lists_every_command_whole() -> None:
    lines = arinar("--help").output
    assert "..." not in lines.replace("[ARGS]...", "") and "Other:" not in lines
    places = [lines.index(f"\n  {name} ") for name in ("demo", "train", "export", "parity", "generate", "completion")]
    assert places == sorted(places)
    for name, command in main.commands.items():
        assert f"\n  {name} " in lines and len(command.get_short_help_str(1000)) <= 80, name


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_and_options(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = arinar("completion", shell)
    assert script.exit_code == 0 and "_ARINAR_COMPLETE" in script.output and "arinar" in script.output
    kind = get_completion_class(shell)
    assert kind is not None
    complete = kind(main, {}, "arinar", "_ARINAR_COMPLETE").get_completions
    assert {item.value for item in complete([], "gen")} == {"generate"}
    assert "--labels" in {item.value for item in complete(["generate"], "--lab")}
    assert {item.value for item in complete(["export", "--vae-precision"], "fp")} == {"fp32", "fp16"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_takes_the_script() -> None:
    script = arinar("completion", "bash").output
    subprocess.run(["bash", "-euc", f"{script}\ntype _arinar_completion > /dev/null"], check=True)


def test_what_comes_next_is_a_command_that_works_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "bin" / "arinar"
    here.parent.mkdir()
    here.touch(0o755)
    monkeypatch.setattr(sys, "argv", [str(here)])
    assert program() == str(here)  # not on the path
    monkeypatch.setenv("PATH", str(here.parent))
    assert program() == "arinar"
    monkeypatch.setattr(sys, "argv", ["/somewhere/arinar/__main__.py"])
    assert program() == f"{sys.executable} -m arinar"


def test_generate_tells_the_precision_and_what_to_do_next(digits_bundle: Path, tmp_path: Path) -> None:
    result = arinar("generate", digits_bundle, "--labels", "3", "-o", tmp_path)
    assert "precision fp32 on onnxruntime-cpu\n" in result.stderr and "next: look at" in result.stderr
    manifest = Bundle.open(digits_bundle).manifest
    both = replace(manifest, graphs=manifest.graphs | {"mine": manifest.graphs["fp32"]}, schemes={"mine": "int8"})
    with Pipeline.load(digits_bundle) as pipe:
        pipe.bundle = Bundle(digits_bundle, both)
        assert running(pipe) == "precision fp32 on onnxruntime-cpu; faster here: --precision mine"
        pipe.precision = "mine"
        assert running(pipe) == "precision mine on onnxruntime-cpu"


def test_generate_writes_numbered_files_with_metadata_and_a_grid(digits_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = arinar("generate", digits_bundle, "--labels", "3,5", "--per-label", 2, "-o", out, "--grid", "--seed", 4, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["labels"] == [3, 3, 5, 5] and report["made"] == 4 and report["timings"]["total"] > 0
    assert sorted(p.name for p in out.iterdir()) == ["000000-3.png", "000001-3.png", "000002-5.png", "000003-5.png", "grid.png"]
    metadata = read_metadata(out / "000002-5.png")
    assert metadata is not None and metadata["label"] == 5 and metadata["seed"] == 4 and metadata["index"] == 2
    with Image.open(out / "grid.png") as grid:
        assert grid.size[0] > 2 * 34 + 2 and grid.size[1] == 2 * 34 + 2  # the rows' labels are left of them


def test_generate_resumes_and_refuses_files_made_otherwise(digits_bundle: Path, tmp_path: Path) -> None:
    words = ("generate", digits_bundle, "--labels", "0-5", "-o", tmp_path, "--batch-size", 2)
    assert arinar(*words).exit_code == 0
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    (tmp_path / "000003-3.png").unlink()
    (tmp_path / "000004-4.png").write_bytes(first["000004-4.png"][:100])  # half written by something else
    fails(arinar(*words), 2, "000004-4.png", "other settings", "--overwrite")
    (tmp_path / "000004-4.png").unlink()
    result = arinar(*words)
    assert result.exit_code == 0 and "4 of 6 images are already" in result.output
    again = {p.name: np.asarray(Image.open(p)).astype(int) for p in tmp_path.iterdir()}
    assert again.keys() == first.keys()
    reference = tmp_path.parent / "reference"
    assert arinar(*words[:4], "-o", reference, "--batch-size", 2).exit_code == 0
    for name, pixels in again.items():
        assert np.abs(pixels - np.asarray(Image.open(reference / name)).astype(int)).max() <= 1
    fails(arinar(*words, "--seed", 1), 2, "000000-0.png", "other settings")
    assert arinar(*words, "--seed", 1, "--overwrite").exit_code == 0
    assert (tmp_path / "000000-0.png").read_bytes() != first["000000-0.png"]


def test_generate_with_low_memory_makes_the_same_files(digits_bundle: Path, tmp_path: Path) -> None:
    plain, saving = tmp_path / "plain", tmp_path / "saving"
    words = ("generate", digits_bundle, "--labels", "3,5", "--batch-size", 1, "-o")
    for done in (arinar(*words, plain), arinar(*words, saving, "--low-memory")):
        assert done.exit_code == 0, done.output
    assert [p.read_bytes() for p in sorted(plain.iterdir())] == [p.read_bytes() for p in sorted(saving.iterdir())]


def test_bad_input_is_one_line_and_exit_code_2(digits_bundle: Path, tmp_path: Path) -> None:
    generate = ("generate", digits_bundle, "-o", tmp_path / "x")
    fails(arinar(*generate, "--labels", "10"), 2, "label 10 is out of range", "0..9")
    fails(arinar(*generate, "--labels", "3", "--guidance-scale", 0.5), 2, "guidance_scale is 0.5", "at least 1")
    fails(arinar(*generate, "--labels", "3", "--guidance-scale", "nan"), 2, "guidance_scale is nan")
    fails(arinar(*generate, "--labels", "3", "--temperature", 0), 2, "temperature is 0.0", "above 0")
    fails(arinar(*generate, "--labels", "3", "--num-iter", 0), 2, "num_iter is 0", "1 to 16")
    fails(arinar(*generate, "--labels", "3", "--num-iter", 17), 2, "num_iter is 17")
    fails(arinar(*generate, "--labels", "3", "--seed", -1), 2, "seed is -1")
    fails(arinar(*generate, "--labels", "3", "--backend", "abacus"), 2, "abacus", "onnxruntime-cpu")
    fails(arinar(*generate, "--labels", "three"), 2, "labels[0] is 'three', no class of this model")
    assert arinar(*generate, "--labels", "5-1").exit_code == 2
    fails(arinar("generate", tmp_path / "none", "--labels", 1, "-o", tmp_path / "x"), 2, "is not a bundle")
    (tmp_path / "file").write_text("x")
    fails(arinar("generate", digits_bundle, "--labels", 1, "-o", tmp_path / "file" / "sub"), 2, "cannot write to")
    fails(arinar("export", tmp_path / "no.pth", "--vae", "digits", "-o", tmp_path / "b"), 2, "no.pth")
    fails(arinar("inspect", tmp_path / "file"), 2, "file")
    fails(arinar("init", "--preset", "gigantic", "-o", tmp_path / "g"), 2, "gigantic", "base")
    fails(arinar("train", "model", "--config", "gigantic", "-o", tmp_path / "g"), 2, "gigantic")
    fails(arinar("train", "model", "--device", "cuda:99", "-o", tmp_path / "g"), 2, "device is 'cuda:99'", "choose cpu")
    fails(arinar(*generate, "--labels", "0-9", "--per-label", 10**9), 2, "--per-label", "1,000,000 files in one folder")
    fails(arinar(*generate, "--labels", "3", "--batch-size", 10**9), 2, "batch_size is 1000000000", "4096")
    fails(arinar(*generate, "--labels", "3", "--threads", 10**9), 2, "threads is 1000000000")
    fails(arinar(*generate, "--labels", "3", "--guidance-scale", "1e39"), 2, "guidance_scale is 1e+39", "float32")
    fails(arinar(*generate, "--labels", "3", "--precision", "fp31"), 2, "no 'fp31' graphs")
    assert not (tmp_path / "x").exists()  # told before anything is made


def test_export_of_a_foreign_checkpoint_without_vae(golden: Path, tmp_path: Path) -> None:
    result = arinar("export", golden / "tiny_masked" / "checkpoint-last.pth", "-o", tmp_path / "b")
    fails(result, 2, "--vae is missing")


def test_inspect_bundle_checkpoint_and_demo(digits_bundle: Path, tmp_path: Path) -> None:
    text = arinar("inspect", digits_bundle)
    assert text.exit_code == 0 and "all hashes match" in text.output and len(text.output.splitlines()) <= 24
    for words in ("0, 1, 2, ... 9", "12 outer steps, guidance 4", "onnxruntime-cpu", "next: arinar generate"):
        assert words in text.output
    assert "outer_step" not in text.output and "outer_step" in arinar("inspect", digits_bundle, "--graphs").output
    assert json.loads(arinar("inspect", digits_bundle, "--json").stdout)["format_version"] == 2
    info = json.loads(arinar("inspect", "digits", "--json").stdout)
    assert info["kind"] == "arinar" and info["config"]["img_size"] == 32
    copy = Path(shutil.copytree(digits_bundle, tmp_path / "b"))
    (copy / "graphs" / "fp32" / "weights.data").write_bytes(b"0")
    fails(arinar("inspect", copy), 2, "weights.data has 1 bytes")
    assert arinar("inspect", copy, "--no-verify").exit_code == 0


def test_init_lists_presets_and_writes_a_loadable_checkpoint(tmp_path: Path) -> None:
    assert "base" in arinar("init", "--list").output
    assert arinar("init", "--preset", "digits", "-o", tmp_path / "m.safetensors").exit_code == 0
    info = json.loads(arinar("inspect", tmp_path / "m.safetensors", "--json").stdout)
    assert info["metadata"]["weights"] == "random, seed 0"


def test_parity_passes_on_the_right_model_and_fails_on_another(digits_bundle: Path, tmp_path: Path) -> None:
    good = arinar("parity", digits_bundle, "--checkpoint", "digits", "--labels", "0-9")
    assert good.exit_code == 0 and "checks passed" in good.output, good.output
    from arinar.checkpoint import load_arinar, save_arinar

    model = load_arinar("digits")
    model.arhead.head.bias.data[0] += 0.01
    save_arinar(tmp_path / "other.safetensors", model)
    bad = arinar("parity", digits_bundle, "--checkpoint", tmp_path / "other.safetensors", "--vae", "digits", "--json")
    assert bad.exit_code == 1
    report = json.loads(bad.stdout)
    failed = {check["name"] for check in report["checks"] if not check["passed"]}
    assert {"inner_step", "mu"} <= failed and not failed & {"outer_step", "z"}
