"""Checkpoints with MAR's diffusion head: the published container, what is inferred from it, what is refused."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import CONFIG
from test_golden_mar import TINY_MAR
from torch import Tensor

from arinar.checkpoint import CheckpointError, inspect_checkpoint, load_arinar, save_arinar
from arinar.config import PRESETS, ArinarConfig
from arinar.model import Arinar, initialize
from arinar.published import infer_arinar

State = dict[str, Tensor]

SMALL = CONFIG.replace(
    head="diffusion", inner_width=24, inner_depth=2, inner_heads=16, inner_mlp_ratio=4.0, default_guidance_scale=2.9
)
MAR_ARGS = {
    "model": "mar_base",
    "img_size": 32,
    "vae_embed_dim": 16,
    "vae_stride": 16,
    "patch_size": 1,
    "class_num": 3,
    "buffer_size": 2,
    "diffloss_d": 2,
    "diffloss_w": 24,
    "num_sampling_steps": "50",
    "diffusion_batch_mul": 1,
    "num_iter": 64,
    "cfg": 3.2,
    "cfg_schedule": "linear",
    "temperature": 0.95,
}


@pytest.fixture(scope="module")
def state() -> State:
    with torch.device("cpu"):
        return dict(initialize(Arinar(SMALL), 1).state_dict())


def container(path: Path, state: State, args: dict[str, Any] | None = None, **more: Any) -> Path:
    raw = {name: value + 1 for name, value in state.items()}
    saved: dict[str, Any] = {"model": raw, "model_ema": {name: torch.nn.Parameter(value) for name, value in state.items()}}
    if args is not None:
        saved |= {"args": argparse.Namespace(**args), "epoch": 400, "scaler": {}, "optimizer": {}}
    torch.save(saved | more, path)
    return path


def test_the_published_container(golden: Path) -> None:
    """Weights, config and settings of a file as MAR's training writes it; the average is taken."""
    path = golden / "tiny_mar" / "checkpoint-last.pth"
    model = load_arinar(path, outer_heads=4, config=None)
    assert model.config.replace(default_num_iter=8, default_guidance_scale=4.5, default_temperature=1.0) == TINY_MAR
    weights = load_file(golden / "tiny_mar" / "weights.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    raw = load_arinar(path, outer_heads=4, ema=False)
    assert not torch.equal(raw.fake_latent, model.fake_latent)


def test_model_and_average_alone(tmp_path: Path, state: State) -> None:
    """The really published files are believed to hold nothing else."""
    info = inspect_checkpoint(container(tmp_path / "checkpoint-last.pth", state))
    assert info.config == SMALL
    assert info.weights == "model_ema" and info.inner_heads is None and not info.warnings
    told = " ".join(info.notes)
    assert "width 24 (rows of input_proj) and depth 2 (number of res_blocks)" in told
    assert "not known from the weights: attention heads" in told
    assert "sampling_steps is '100', as MAR's evaluation has it: there is no saved num_sampling_steps" in told
    assert "guidance 2.9 is what MAR recommends" in told


def test_settings_of_the_saved_args(tmp_path: Path, state: State) -> None:
    info = inspect_checkpoint(container(tmp_path / "m.pth", state, MAR_ARGS))
    config = info.config
    assert isinstance(config, ArinarConfig)
    assert (config.sampling_steps, config.default_num_iter) == ("50", 4)  # 64 outer steps, of 4 tokens
    # Temperature multiplies in MAR, whatever ARINAR's versions do.
    assert (config.default_guidance_scale, config.default_temperature) == (3.2, 0.95)
    assert info.epoch == 400
    assert not any("divides" in note for note in info.notes)


def test_safetensors_and_wrapped_names(tmp_path: Path, state: State) -> None:
    save_file(state, tmp_path / "plain.safetensors")
    save_file({f"module.{name}": value for name, value in state.items()}, tmp_path / "wrapped.safetensors")
    for name in ("plain", "wrapped"):
        model = load_arinar(tmp_path / f"{name}.safetensors")
        assert model.config == SMALL
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_our_own_files(tmp_path: Path, state: State) -> None:
    config = SMALL.replace(sampling_steps="25-5")
    model = Arinar(config)
    model.load_state_dict(state)
    save_arinar(tmp_path / "own.safetensors", model)
    assert load_arinar(tmp_path / "own.safetensors").config == config


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"num_sampling_steps": "ddim25"}, "ddim25"),
        ({"num_sampling_steps": "10,20"}, "10,20"),
        ({"num_sampling_steps": "1"}, "100"),
        ({"num_sampling_steps": 100}, "100"),
        ({"num_sampling_steps": "ddim60"}, "100"),
        ({"diff_sampling_strategy": "linear", "diff_upper_steps": 25, "diff_lower_steps": 5}, "25-5"),
        ({"diff_sampling_strategy": "linear", "diff_upper_steps": None, "diff_lower_steps": 5}, "100"),
        ({"diff_sampling_strategy": "cosine"}, "50"),
    ],
)
def test_saved_sampling_steps(tmp_path: Path, state: State, changes: dict[str, Any], steps: str) -> None:
    info = inspect_checkpoint(container(tmp_path / "m.pth", state, MAR_ARGS | changes))
    assert isinstance(info.config, ArinarConfig)
    assert info.config.sampling_steps == steps
    assert sum(note.startswith("sampling_steps ") for note in info.notes) == 1


def test_arinars_repository_with_this_head(tmp_path: Path, state: State) -> None:
    """Same keys; its ``head_width`` and the like do not mean this head's network."""
    args = {name: value for name, value in MAR_ARGS.items() if not name.startswith("diffloss")}
    args |= {"head_type": "diff_loss", "inner_ar_width": 768, "enc_dec_depth": 1, "diffloss_w": 999}
    assert load_arinar(container(tmp_path / "m.pth", state, args)).config.inner_width == 24


@pytest.mark.parametrize("size", ["mar_base", "mar_large", "mar_huge"])
def test_published_sizes_are_recognised(size: str) -> None:
    with torch.device("meta"):
        state = Arinar(PRESETS[size]).state_dict()
    found = infer_arinar(Path("m.pth"), state, None, None)
    assert found.config == PRESETS[size]
    assert not found.warned and found.heads_source == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_type": "rect_flow"}, r"head rect_flow \(rectified flow\)"),
        ({"head_type": "ar_gmm"}, "head_type ar_gmm, its weights have MAR's diffusion head"),
        ({"diffloss_w": 48}, "diffloss_w is 48 in args, 24 in the weights"),
        ({"class_num": 4}, "class_num is 4 in args, 3 in the weights"),
    ],
)
def test_args_that_disagree(tmp_path: Path, state: State, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_arinar(container(tmp_path / "m.pth", state, MAR_ARGS | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("diffloss.net.input_proj.weight"), "no matrix diffloss.net.input_proj.weight"),
        (lambda state: state.pop("diffloss.net.cond_embed.bias"), r"1 missing \(diffloss.net.cond_embed.bias\)"),
        # A head of one output row for each feature is no diffusion with a learned variance: a flow, say.
        (
            lambda state: state.update({"diffloss.net.final_layer.linear.weight": torch.zeros(16, 24)}),
            r"per-token \(not MAR's\) head",
        ),
        (lambda state: state.update({"diffloss.net.res_blocks.7.in_ln.weight": torch.zeros(24)}), "missing"),
    ],
)
def test_weights_that_are_refused(tmp_path: Path, state: State, change: Any, message: str) -> None:
    changed = dict(state)
    change(changed)
    torch.save(changed, tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match=message):
        load_arinar(tmp_path / "bare.pth")


def test_inner_heads_are_the_other_heads(tmp_path: Path, state: State) -> None:
    with pytest.raises(CheckpointError, match="inner_heads is 4; a diffusion head has no attention"):
        load_arinar(container(tmp_path / "m.pth", state), inner_heads=4)
