"""Containers of the published code's versions, wrapped models, averages that are none, latent statistics.

The argument lists are those that the versions save, as far as they tell something.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from torch import nn

from arinar.checkpoint import CheckpointError, inspect_checkpoint, load_arinar, load_vae, save_arinar
from arinar.cli import main
from arinar.config import PRESETS, ArinarConfig, VaeConfig
from arinar.model import Arinar, initialize
from arinar.vae import AutoencoderKL

State = dict[str, Any]

# A published outer width (its heads need no config), all else small.
CONFIG = ArinarConfig(
    img_size=32,
    num_classes=3,
    buffer_size=2,
    encoder_depth=1,
    decoder_depth=1,
    mlp_ratio=0.0625,
    inner_width=32,
    inner_heads=16,
    inner_mlp_ratio=2.0,
    default_num_iter=4,
)
NARROW = CONFIG.replace(encoder_width=24, encoder_heads=3, decoder_width=24, decoder_heads=3, mlp_ratio=1.0)

FIRST = {"model": "mar_base", "class_num": 3, "use_cached": True, "cached_path": "cache/vae", "img_size": 32}
ABLATION = FIRST | {"head_width": 32, "head_depth": 1}
MARCH_21 = ABLATION | {"model_type": "mar_large", "head_type": "ar_gmm"}
MARCH_24 = MARCH_21 | {"enc_dec_depth": -1}
MARCH_29 = MARCH_24 | {"inner_ar_width": 32, "inner_ar_depth": 1}
APRIL_7 = {name: value for name, value in MARCH_29.items() if name != "model_type"} | {"bf16": False, "pos_emb_for_head": False}
APRIL_14 = {name: value for name, value in APRIL_7.items() if name != "pos_emb_for_head"} | {
    "bilevel_schedule": False,
    "feature_group": 1,
}
APRIL_29 = APRIL_14 | {"norm_scale": 0.294, "huggingface_dir": "", "head_batch_mul": 1}
APRIL_30 = {name: value for name, value in APRIL_29.items() if name != "norm_scale"}
MAY_30 = APRIL_30 | {"bilevel_schedule": "constant", "diff_sampling_strategy": "constant", "use_nf": False}


@pytest.fixture(scope="module")
def weights() -> State:
    return dict(initialize(Arinar(CONFIG), 0).state_dict())


def container(path: Path, state: State, args: dict[str, Any], **entries: Any) -> Path:
    averaged = {name: nn.Parameter(value.clone()) for name, value in state.items()}
    torch.save({"model": state, "model_ema": averaged, "epoch": 1, "args": argparse.Namespace(**args), **entries}, path)
    return path


def arinar(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.mark.parametrize(
    ("args", "heads", "reason", "divides", "scale"),
    [
        (FIRST, 4, "lack inner_ar_width, head_type", True, 0.2325),
        (MARCH_21, 16, "have head_type", True, 0.2325),
        ({**FIRST, "enc_dec_depth": 14}, 16, "have enc_dec_depth", True, 0.2325),
        (MARCH_24, 16, "have head_type", True, 0.2325),
        (MARCH_29, 16, "have inner_ar_width", True, 0.2325),
        (APRIL_7, 16, "have inner_ar_width", False, 0.2325),
        (APRIL_14, 16, "have inner_ar_width", False, 0.2325),
        (APRIL_29, 16, "have inner_ar_width", False, 0.294),
        (MAY_30 | {"cached_path": "data/mar_cache"}, 16, "have inner_ar_width", False, 0.2325),
    ],
)
def test_versions(
    tmp_path: Path, weights: State, args: dict[str, Any], heads: int, reason: str, divides: bool, scale: float
) -> None:
    settings = {"num_iter": 3, "cfg": 3.9, "cfg_schedule": "constant", "temperature": 1.1}
    path = container(tmp_path / "checkpoint-last.pth", weights, args | settings)
    info = inspect_checkpoint(path)
    temperature = 1 / 1.1 if divides else 1.1
    assert info.config == CONFIG.replace(
        inner_heads=heads,
        latent_scale=scale,
        default_num_iter=3,
        default_guidance_scale=3.9,
        default_cfg_schedule="constant",
        default_temperature=temperature,
    )
    assert info.warnings == () and reason in info.inner_heads_source
    notes = "\n".join(info.notes)
    assert ("1.1 there is 1/1.1 here" in notes) == divides
    assert "bilevel" not in notes and "guidance_scale 3.9, cfg_schedule constant" in notes
    assert ("2025-03-29 to 04-05" in notes) == (args in (MARCH_29, APRIL_7))
    assert load_arinar(path).config == info.config


def test_head_width_alone_is_asked_about(tmp_path: Path, weights: State) -> None:
    for args in (ABLATION, ABLATION | {"model_type": "mar_large"}):
        path = container(tmp_path / "checkpoint-last.pth", weights, args)
        for read in (load_arinar, inspect_checkpoint):
            with pytest.raises(CheckpointError, match=r"cannot be told: .*head_width.*inner_heads=4 or .*=16 \(--inner-heads"):
                read(path)
        assert load_arinar(path, inner_heads=4).config.inner_heads == 4
        assert load_arinar(path, config=CONFIG).config == CONFIG
    result = arinar("inspect", path)
    assert result.exit_code == 2 and "--inner-heads" in result.stderr
    assert arinar("inspect", path, "--inner-heads", 16).exit_code == 0


@pytest.mark.parametrize("path_name", ["cache/vavae", "cache/mar_cache"])
def test_statistics_files_are_asked_for_where_the_version_used_them(tmp_path: Path, weights: State, path_name: str) -> None:
    statistics = tmp_path / "latents_stats.pt"
    mean, std = torch.arange(16.0) / 10, torch.arange(1.0, 17.0)
    torch.save({"mean": mean.reshape(1, 16, 1, 1), "std": std.reshape(1, 16, 1, 1)}, statistics)
    for args, used in ((MARCH_29, False), (APRIL_29, False), (APRIL_30, True), (MAY_30, "mar_cache" not in path_name)):
        path = container(tmp_path / "checkpoint-last.pth", weights, args | {"cached_path": path_name})
        told = inspect_checkpoint(path).warnings
        assert len(told) == used and all("--latent-stats FILE" in warning for warning in told)
        given = inspect_checkpoint(path, latent_stats=statistics)
        assert given.warnings == ()
        assert given.config.latent_shift == pytest.approx(mean.tolist())  # type: ignore[union-attr]
        assert given.config.latent_scale == pytest.approx((1 / std).tolist())  # type: ignore[union-attr]
    notes = inspect_checkpoint(path).notes
    assert any("cached_path" in note for note in notes) == ("mar_cache" in path_name)


def test_kinds_of_statistics_files(tmp_path: Path, weights: State) -> None:
    path = container(tmp_path / "checkpoint-last.pth", weights, MAY_30)
    np.savez(tmp_path / "stats.npz", mean=np.float32(0.5), std=np.full((1, 16, 1, 1), 4.0))
    save_file({"mean": torch.zeros(16), "std": torch.full((1,), 2.0)}, tmp_path / "stats.safetensors")
    config = load_arinar(path, latent_stats=tmp_path / "stats.npz").config
    assert (config.latent_shift, config.latent_scale) == (0.5, (0.25,) * 16)
    config = load_arinar(path, latent_stats=tmp_path / "stats.safetensors").config
    assert (config.latent_shift, config.latent_scale) == ((0.0,) * 16, 0.5)
    info = json.loads(arinar("inspect", path, "--latent-stats", tmp_path / "stats.npz", "--json").stdout)
    assert info["config"]["latent_shift"] == 0.5 and info["warnings"] == []

    for name, arrays, message in (
        ("few", {"mean": np.zeros(3), "std": np.ones(16)}, "mean has 3 values; expected 1, or 16"),
        ("zero", {"mean": np.zeros(16), "std": np.zeros(16)}, "std has values that are not numbers above 0"),
        ("nan", {"mean": np.full(16, np.nan), "std": np.ones(16)}, "mean has values that are not finite"),
        ("other", {"mu": np.zeros(16)}, "has no mean and no std .it holds mu."),
        ("object", {"mean": np.array([{}]), "std": np.ones(16)}, "holds more than numbers"),
        ("text", {"mean": np.array(["a"]), "std": np.ones(16)}, "holds more than numbers"),
        ("big", {"mean": np.zeros(1 << 18), "std": np.ones(16)}, "unpacks to more than"),
    ):
        np.savez_compressed(tmp_path / name, **arrays)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match=message):
            load_arinar(path, latent_stats=tmp_path / f"{name}.npz")
    with pytest.raises(CheckpointError, match="no file .*none.pt"):
        load_arinar(path, latent_stats=tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="expected statistics of latents"):
        load_arinar(path, latent_stats=path)


@pytest.mark.parametrize(
    ("schedule", "noted"), [(False, False), ("constant", False), (True, True), ("linear", True), ("cosine", True)]
)
def test_bilevel_schedules(tmp_path: Path, weights: State, schedule: Any, noted: bool) -> None:
    path = container(tmp_path / "checkpoint-last.pth", weights, APRIL_14 | {"bilevel_schedule": schedule})
    assert any(f"bilevel_schedule {schedule} " in note for note in inspect_checkpoint(path).notes) == noted


@pytest.mark.parametrize("told_by", ["args", "weights"])
def test_positions_before_the_head_are_refused(tmp_path: Path, weights: State, told_by: str) -> None:
    args = APRIL_7 | {"pos_emb_for_head": told_by == "args"}
    extra = {"arhead.head_nm.loc_emb.weight": torch.zeros(16, 768)} if told_by == "weights" else {}
    path = container(tmp_path / "checkpoint-last.pth", weights | extra, args)
    with pytest.raises(CheckpointError, match="pos_emb_for_head"):
        load_arinar(path)


@pytest.mark.parametrize(
    ("name", "value", "default"),
    [
        ("num_iter", 64, 4),  # there are 4 tokens
        ("cfg", 0.0, 1.0),
        ("cfg", 1, 1.0),
        ("num_iter", 0, None),
        ("num_iter", 2.5, None),
        ("num_iter", True, None),
        ("cfg", 0.5, None),
        ("cfg", "4.5", None),
        ("cfg", 10**400, None),
        ("cfg_schedule", "sine", None),
        ("temperature", 0.0, None),
        ("temperature", float("nan"), None),
        ("temperature", [1.0], None),
    ],
)
def test_saved_sampling_settings(tmp_path: Path, weights: State, name: str, value: Any, default: Any) -> None:
    path = container(tmp_path / "checkpoint-last.pth", weights, MAY_30 | {"cached_path": "mar_cache", name: value})
    info = inspect_checkpoint(path)
    field = {"cfg": "default_guidance_scale"}.get(name, f"default_{name}")
    got, usual = getattr(info.config, field), getattr(CONFIG, field)
    assert got == (usual if default is None else default)
    assert any(f"saved {name} is" in note and "does not become the default" in note for note in info.notes) == (default is None)


@pytest.mark.parametrize("value", [0, -1.0, "0.5", float("nan"), None, (1.0,)])
def test_useless_norm_scale(tmp_path: Path, weights: State, value: Any) -> None:
    path = container(tmp_path / "checkpoint-last.pth", weights, APRIL_29 | {"norm_scale": value})
    with pytest.raises(CheckpointError, match="norm_scale is .* in its saved args; expected a number above 0"):
        load_arinar(path)
    assert load_arinar(path, config=CONFIG).config == CONFIG


@pytest.mark.parametrize(("width", "depth"), [(1024, 18), (1280, 22)])
def test_sizes_of_both_kinds_of_versions_are_asked_about(width: int, depth: int) -> None:
    from arinar.published import infer_arinar

    config = PRESETS["large" if width == 1024 else "huge"].replace(inner_width=768)
    with torch.device("meta"):
        state = Arinar(config).state_dict()
    with pytest.raises(CheckpointError, match=rf"{depth} blocks a side .* have 4 \(.*\) or 16 .*--inner-heads"):
        infer_arinar(Path("bare"), state, None, None)
    assert infer_arinar(Path("bare"), state, None, 4)[0].inner_heads == 4
    assert infer_arinar(Path("bare"), state, FIRST | {"class_num": 1000, "img_size": 256}, None)[0].inner_heads == 4


# ------------------------------------------------------------------------------------------ averages, wrappers


def trained(state: State, moved: float = 0.05) -> State:
    """Weights after some training: everything has moved a little, as in ``moved`` of a normal variable."""
    generator = torch.Generator().manual_seed(1)
    return {name: value + moved * torch.randn(value.shape, generator=generator) for name, value in state.items()}


def test_averages_that_never_moved(tmp_path: Path, weights: State) -> None:
    raw = trained(weights, 0.01)
    nearly = {name: value.lerp(raw[name], 0.01) for name, value in weights.items()}
    for averaged in (weights, nearly):
        path = container(tmp_path / "checkpoint-last.pth", averaged, APRIL_14, model=raw)
        with pytest.warns(UserWarning, match="nearly at their initial values.*ema=False .--no-ema"):
            load_arinar(path)
        assert "WARNING" in (told := arinar("inspect", path)).output and "--no-ema" in told.output
        assert inspect_checkpoint(path, ema=False).warnings == ()


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_averages_of_another_scale(tmp_path: Path, weights: State, factor: float) -> None:
    raw = trained(weights)
    path = container(
        tmp_path / "checkpoint-last.pth", {name: factor * value for name, value in raw.items()}, APRIL_14, model=raw
    )
    assert [
        f"are {factor:.2g} times as large" in text and "--no-ema" in text for text in inspect_checkpoint(path).warnings
    ] == [True]


def test_healthy_averages(tmp_path: Path, golden: Path, weights: State) -> None:
    raw = trained(weights)
    lagging = {name: value.lerp(raw[name], 0.6) for name, value in weights.items()}
    for averaged in (raw, lagging, {name: value + 1e-3 for name, value in raw.items()}):
        path = container(tmp_path / "checkpoint-last.pth", averaged, APRIL_14, model=raw)
        assert inspect_checkpoint(path).warnings == ()
    config = json.loads(arinar("init", "--print-config", "digits").stdout)
    assert ArinarConfig.from_dict(config) == PRESETS["digits"]
    path = golden / "tiny_masked" / "checkpoint-last.pth"
    info = inspect_checkpoint(path, outer_heads=4)
    assert info.warnings == () and info.config.encoder_heads == info.config.decoder_heads == 4  # type: ignore[union-attr]
    assert inspect_checkpoint("digits").warnings == ()


def test_export_warns_of_averages_in_one_line(tmp_path: Path) -> None:
    """On the standard error, before the long work; here the work is refused: the autoencoder does not fit."""
    state = dict(initialize(Arinar(NARROW), 0).state_dict())
    path = container(tmp_path / "checkpoint-last.pth", state, APRIL_14, model=trained(state))
    result = arinar("export", path, "--vae", "digits", "--outer-heads", 3, "-o", tmp_path / "bundle")
    lines = [line for line in result.stderr.splitlines() if "--no-ema" in line]
    assert len(lines) == 1 and lines[0].startswith("WARNING: "), result.output
    assert "UserWarning" not in result.output


@pytest.mark.parametrize("prefix", ["model.", "net.", "ema.", "module.model.", "_orig_mod.net.", "generator.mar."])
def test_wrapped_models(tmp_path: Path, weights: State, prefix: str) -> None:
    path = tmp_path / "bare.pth"
    torch.save({prefix + name: value for name, value in weights.items()}, path)
    assert same(load_arinar(path, inner_heads=16), weights)
    assert any(prefix in note for note in inspect_checkpoint(path, inner_heads=16).notes)


def test_lightning_modules(tmp_path: Path, weights: State) -> None:
    path, raw = tmp_path / "last.ckpt", trained(weights)
    state = {f"model.{name}": value for name, value in raw.items()} | {"loss.scale": torch.ones(1)}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.5"}, path)
    assert same(load_arinar(path, inner_heads=16), raw)
    assert any("1 entries beside the wrapped model" in note for note in inspect_checkpoint(path, inner_heads=16).notes)

    torch.save({"state_dict": state | {f"ema.{name}": value for name, value in weights.items()}}, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same(load_arinar(path, inner_heads=16), weights)
    assert same(load_arinar(path, inner_heads=16, ema=False), raw)

    torch.save({"state_dict": state | {f"other.{name}": value for name, value in weights.items()}}, path)
    with pytest.raises(CheckpointError, match=r"several models \(model\.\*, other\.\*\)"):
        load_arinar(path, inner_heads=16)


def same(module: nn.Module, state: State) -> bool:
    return all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "module."])
def test_autoencoders_with_their_foundation_model(tmp_path: Path, prefix: str) -> None:
    config = VaeConfig(embed_dim=4, channels=32, channel_multipliers=(1, 2), num_res_blocks=1, encoder_attention_levels=(1,))
    state = AutoencoderKL(config).state_dict()
    beside = {
        "foundation_model.blocks.0.weight": torch.zeros(2),
        "foundation_model.count": torch.zeros(1, dtype=torch.int64),
        "linear_proj.weight": torch.zeros(3, 4),
        "loss.logvar": torch.zeros(()),
    }
    torch.save({"state_dict": {prefix + name: value for name, value in (state | beside).items()}}, tmp_path / "vavae.pt")
    vae = load_vae(tmp_path / "vavae.pt")
    assert vae.config == config and same(vae, state)
    notes = inspect_checkpoint(tmp_path / "vavae.pt").notes
    assert any("3 entries of the foundation model" in note for note in notes)


# ------------------------------------------------------------------------------------------- configs by command


def test_models_of_another_width(tmp_path: Path) -> None:
    state = initialize(Arinar(NARROW), 0).state_dict()
    path, config = tmp_path / "bare.safetensors", tmp_path / "config.json"
    save_file(state, path)
    result = arinar("inspect", path, "--inner-heads", 16)
    assert result.exit_code == 2 and "--outer-heads N" in result.stderr and "--config FILE" in result.stderr
    info = json.loads(arinar("inspect", path, "--inner-heads", 16, "--outer-heads", 3, "--json").stdout)
    assert ArinarConfig.from_dict(info["config"]) == NARROW
    config.write_text(NARROW.to_json())
    info = json.loads(arinar("inspect", path, "--config", config, "--json").stdout)
    assert ArinarConfig.from_dict(info["config"]) == NARROW and info["config_source"] == "given by the caller"
    result = arinar("inspect", path, "--inner-heads", 16, "--outer-heads", 5)
    assert result.exit_code == 2 and "encoder_width 24 is not divisible by encoder_heads 5" in result.stderr
    with pytest.raises(CheckpointError, match="outer_heads is 5: encoder_width 24"):
        load_arinar(path, config=NARROW, outer_heads=5)


def test_config_files(tmp_path: Path) -> None:
    save_arinar(tmp_path / "model", Arinar(NARROW))
    config = tmp_path / "config.json"
    for text, words in (
        ('{"encoder_widht": 3, "flavour": 1}', ("encoder_widht (nearest: encoder_width)", "flavour", "--print-config")),
        ("[1]", ("holds a list", "--print-config")),
        ("{", ("is not a config file",)),
    ):
        config.write_text(text)
        result = arinar("inspect", tmp_path / "model", "--config", config)
        assert result.exit_code == 2 and all(word in result.stderr for word in words), result.output
        result = arinar("train", "model", "--config", config, "-o", tmp_path / "new")
        assert result.exit_code == 2 and all(word in result.stderr for word in words), result.output
    result = arinar("inspect", tmp_path / "model", "--config", "bas")
    assert result.exit_code == 2 and "config is 'bas'" in result.stderr and "base" in result.stderr
    result = arinar("inspect", tmp_path / "model", "--config", "digits")
    assert result.exit_code == 2 and "does not fit the config given by the caller" in result.stderr


def test_init_says_what_is_missing_and_overwrites_only_when_told(tmp_path: Path) -> None:
    result = arinar("init", "-o", tmp_path / "m")
    assert result.exit_code == 2 and "--preset is missing" in result.stderr and "digits" in result.stderr
    result = arinar("init", "--print-config", "bas")
    assert result.exit_code == 2 and "preset is 'bas'" in result.stderr
    assert arinar("init", "--preset", "digits", "--vae-out", tmp_path / "v").exit_code == 0
    before = (tmp_path / "v").read_bytes()
    words = ("init", "--preset", "digits", "-o", tmp_path / "m", "--vae-out", tmp_path / "v", "--seed", 1)
    result = arinar(*words)
    assert result.exit_code == 2 and "exists already" in result.stderr and "--overwrite" in result.stderr
    assert (tmp_path / "v").read_bytes() == before and not (tmp_path / "m").exists()
    assert arinar(*words, "--overwrite").exit_code == 0
    assert (tmp_path / "v").read_bytes() != before
    result = arinar("init", "--preset", "digits", "-o", tmp_path / "x", "--vae-out", tmp_path / "x")
    assert result.exit_code == 2 and "the same file" in result.stderr


def test_old_configs_load_and_new_defaults_reach_the_bundle() -> None:
    from arinar.runtime.bundle import Defaults

    old = {
        name: value for name, value in NARROW.to_dict().items() if name not in ("default_temperature", "default_cfg_schedule")
    }
    assert ArinarConfig.from_dict(old) == NARROW
    config = NARROW.replace(default_temperature=0.9, default_cfg_schedule="constant")
    assert ArinarConfig.from_json(config.to_json()) == config
    assert Defaults.of(config) == Defaults(4, 4.5, "constant", 0.9)
    with pytest.raises(ValueError, match="cfg_schedule is 'sine'"):
        NARROW.replace(default_cfg_schedule="sine")
    with pytest.raises(ValueError, match="default_temperature is 0"):
        NARROW.replace(default_temperature=0.0)
