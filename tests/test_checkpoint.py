"""Reading and writing checkpoints: what is understood, how configs are settled, what is refused and how."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_golden import TINY as GOLDEN_TINY
from torch import Tensor, nn

from arinar import checkpoint_files
from arinar.checkpoint import (
    CheckpointError,
    inspect_checkpoint,
    load_arinar,
    load_vae,
    save_arinar,
    save_vae,
)
from arinar.config import PRESETS, VAE_PRESETS, ArinarConfig, VaeConfig
from arinar.model import Arinar, CausalArinar
from arinar.published import guess_heads, infer_arinar, infer_vae
from arinar.vae import AutoencoderKL

State = dict[str, Tensor]

# The smallest model whose outer width is a published one, so that its heads need no config.
CONFIG = ArinarConfig(
    img_size=32,
    num_classes=3,
    buffer_size=2,
    encoder_width=768,
    encoder_depth=1,
    encoder_heads=12,
    decoder_width=768,
    decoder_depth=1,
    decoder_heads=12,
    mlp_ratio=0.0625,
    inner_width=32,
    inner_depth=1,
    inner_heads=4,
    inner_mlp_ratio=2.0,
    default_num_iter=4,
)
SMALL = CONFIG.replace(
    encoder_width=8,
    encoder_heads=2,
    decoder_width=8,
    decoder_heads=4,
    inner_width=16,
    inner_heads=4,
    mlp_ratio=1.0,
    class_names=("a", "b", "c"),
    latent_scale=tuple(range(1, 17)),
    latent_shift=0.5,
)
CAUSAL = SMALL.replace(outer="causal", encoder_depth=0, order=(3, 1, 0, 2))
TINY = GOLDEN_TINY.replace(inner_heads=4, default_num_iter=16)
VAE = VaeConfig(
    embed_dim=4,
    channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    encoder_attention_levels=(1,),
    norm_groups=4,
)


def random_module(config: ArinarConfig | VaeConfig, seed: int = 0) -> Any:
    module: nn.Module = Arinar(config) if isinstance(config, ArinarConfig) else AutoencoderKL(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
    return module


@pytest.fixture(scope="module")
def published() -> State:
    return dict(random_module(CONFIG).state_dict())


def arguments(**changes: Any) -> argparse.Namespace:
    """Saved args of the later version; ``name=None`` takes an entry out."""
    entries = {
        "model": "mar_base",
        "img_size": 32,
        "vae_stride": 16,
        "patch_size": 1,
        "vae_embed_dim": 16,
        "class_num": 3,
        "buffer_size": 2,
        "num_gaussians": 4,
        "inner_ar_width": 32,
        "inner_ar_depth": 1,
        "head_type": "ar_gmm",
        "feature_group": 1,
        "use_nf": False,
        "cached_path": "mar_cache",
        "lr": 1e-4,
    }
    entries.update(changes)
    return argparse.Namespace(**{name: value for name, value in entries.items() if value is not None})


def container(path: Path, state: State, **entries: Any) -> Path:
    """As the published training writes it: the averaged weights are Parameters, the plain ones differ."""
    averaged = {name: nn.Parameter(value.clone()) for name, value in state.items()}
    plain = {name: value + 1 for name, value in state.items()}
    content = {
        "model": plain,
        "model_ema": averaged,
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 7,
        "scaler": {"scale": 1.0},
        "args": arguments(),
        **entries,
    }
    torch.save({name: value for name, value in content.items() if value is not None}, path)
    return path


def assert_state(module: nn.Module, state: State) -> None:
    loaded = module.state_dict()
    assert list(loaded) == list(state)
    for name, value in state.items():
        torch.testing.assert_close(loaded[name], value.float(), rtol=0, atol=0)
    assert not module.training
    assert all(parameter.device.type == "cpu" and parameter.requires_grad for parameter in module.parameters())


@pytest.fixture
def silent() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ------------------------------------------------------------------------------------------------ own format


@pytest.mark.parametrize("config", [SMALL, CAUSAL], ids=["masked", "causal"])
def test_model_round_trip(tmp_path: Path, silent: None, config: ArinarConfig) -> None:
    model, path = random_module(config), tmp_path / "model.safetensors"
    save_arinar(path, model, metadata={"trained on": "noise"})
    loaded = load_arinar(path)
    assert loaded.config == config and type(loaded) is type(model)
    assert_state(loaded, model.state_dict())
    arguments = torch.randn(2, 4, 16), torch.zeros(2, 4), torch.tensor([0, -1])
    assert torch.equal(loaded.condition(*arguments), model.eval().condition(*arguments))
    if isinstance(loaded, CausalArinar):
        assert loaded.order.tolist() == [3, 1, 0, 2]
    info = inspect_checkpoint(path)
    assert (info.kind, info.config, info.config_source) == ("arinar", config, "stored in the file")
    assert info.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert info.metadata == {"trained on": "noise"} and info.size == path.stat().st_size
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_vae_round_trip(tmp_path: Path, silent: None) -> None:
    vae, path = random_module(VAE), tmp_path / "vae.safetensors"
    save_vae(path, vae)
    loaded = load_vae(path)
    assert loaded.config == VAE
    assert_state(loaded, vae.state_dict())
    assert inspect_checkpoint(path).kind == "vae"


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_arinar(tmp_path / name, random_module(SMALL), metadata={"b": "1", "a": "2"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_arinar(path, random_module(SMALL))
    before = path.read_bytes()

    def half(state: State, name: Path, metadata: dict[str, str]) -> None:
        Path(name).write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_files, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        save_arinar(path, random_module(SMALL, seed=1))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.safetensors"]


def test_stored_config_can_be_overruled(tmp_path: Path, silent: None) -> None:
    path = tmp_path / "model.safetensors"
    save_arinar(path, random_module(SMALL))
    assert load_arinar(path, inner_heads=16).config == SMALL.replace(inner_heads=16)
    other = SMALL.replace(latent_scale=0.5)
    assert load_arinar(path, config=other).config == other
    assert load_arinar(path, ema=False).config == SMALL  # one set of weights: nothing to choose
    with pytest.raises(CheckpointError, match="inner_heads is 3: inner_width 16 is not divisible"):
        load_arinar(path, inner_heads=3)
    with pytest.raises(CheckpointError, match="does not fit the config given by the caller"):
        load_arinar(path, config=SMALL.replace(num_classes=4, class_names=()))


def test_newer_format_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    monkeypatch.setattr(checkpoint_files, "FORMAT_VERSION", 2)
    save_arinar(path, random_module(SMALL))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format version 2, this arinar reads 1: use a newer arinar"):
        load_arinar(path)


def test_unknown_config_entry(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = random_module(SMALL)
    header = {
        "format_version": 1,
        "kind": "arinar",
        "config": {**SMALL.to_dict(), "flavour": 1},
        "metadata": {},
    }
    header["sha256"] = checkpoint_files.contents_sha256(header, model.state_dict())
    save_file(model.state_dict(), path, {"arinar": json.dumps(header)})
    with pytest.raises(CheckpointError, match=r"its stored config is not usable: .*unknown entries flavour"):
        load_arinar(path)


# ---------------------------------------------------------------------------------------- published containers


def test_golden_container(golden: Path, silent: None) -> None:
    path = golden / "tiny_masked" / "checkpoint-last.pth"
    weights = load_file(golden / "tiny_masked" / "weights.safetensors")
    averaged = load_arinar(path, config=TINY)
    assert_state(averaged, {name: weights[name] for name in averaged.state_dict()})
    raw = load_arinar(path, ema=False, config=TINY)
    assert not torch.equal(raw.state_dict()["fake_latent"], weights["fake_latent"])
    info = inspect_checkpoint(path, config=TINY)
    assert (info.weights, info.epoch, info.inner_heads) == ("model_ema", 399, 4)
    assert any("1.1 there is 1/1.1 here" in note for note in info.notes)
    with pytest.raises(CheckpointError, match=r"encoder width 64, .*pass config=ArinarConfig"):
        load_arinar(path)


@pytest.mark.parametrize("head_count", [4, 16])
def test_config_from_args_and_shapes(tmp_path: Path, silent: None, published: State, head_count: int) -> None:
    first = head_count == 4
    args = arguments(inner_ar_width=None if first else 32, inner_ar_depth=None, head_type=None, use_nf=None)
    path = container(tmp_path / "checkpoint-last.pth", published, args=args)
    model = load_arinar(path)
    assert model.config == CONFIG.replace(inner_heads=head_count)
    assert_state(model, published)
    info = inspect_checkpoint(path)
    assert info.inner_heads == head_count and info.warnings == ()
    assert ("lack inner_ar_width" if first else "have inner_ar_width") in info.inner_heads_source
    assert info.config_source == "inferred from the saved args and the weights' shapes"
    json.dumps(info.to_dict())
    assert load_arinar(path, inner_heads=8).config.inner_heads == 8


def test_averaged_or_plain_weights(tmp_path: Path, silent: None, published: State) -> None:
    path = container(tmp_path / "both.pth", published)
    plain = {name: value + 1 for name, value in published.items()}
    assert_state(load_arinar(path, ema=False), plain)
    assert inspect_checkpoint(path, ema=False).weights == "model"

    path = container(tmp_path / "plain.pth", published, model_ema=None)
    with pytest.raises(CheckpointError, match=r"no model_ema weights \(it has model\): pass ema=False"):
        load_arinar(path)
    assert_state(load_arinar(path, ema=False), plain)
    assert inspect_checkpoint(path).weights == "model"

    path = container(tmp_path / "averaged.pth", published, model=None)
    assert_state(load_arinar(path), published)
    with pytest.raises(CheckpointError, match=r"no model or state_dict weights \(it has model_ema\): pass ema=True"):
        load_arinar(path, ema=False)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapper_prefixes(tmp_path: Path, silent: None, published: State, prefix: str) -> None:
    path = container(tmp_path / "model.pth", {prefix + name: value for name, value in published.items()})
    assert_state(load_arinar(path), published)


@pytest.mark.parametrize("ending", ["pth", "legacy.pth", "safetensors"])
def test_bare_weights_warn_of_the_guess(tmp_path: Path, published: State, ending: str) -> None:
    path = tmp_path / f"bare.{ending}"
    if ending == "safetensors":
        save_file(published, path)
    else:
        torch.save(published, path, _use_new_zipfile_serialization=not ending.startswith("legacy"))
    with pytest.warns(UserWarning, match=r"inner_heads=16 is a guess.*inner width 768.*pass inner_heads=4 .*=16"):
        model = load_arinar(path)
    assert model.config == CONFIG.replace(inner_heads=16)
    assert_state(model, published)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_arinar(path, inner_heads=4).config.inner_heads == 4
        assert load_arinar(path, config=CONFIG).config == CONFIG
        assert len(inspect_checkpoint(path).warnings) == 1  # told, not warned


def test_guesses_of_inner_heads() -> None:
    """Sizes that one kind of version has unasked decide; the published base fits both and came from the first."""
    for outer, inner, heads in [
        ((768, 14), (768, 1), 4),
        ((1024, 16), (768, 1), 4),
        ((1280, 20), (768, 1), 4),
        ((768, 14), (1024, 1), 16),
        ((1024, 18), (768, 1), None),
        ((1280, 22), (768, 1), None),
        ((1280, 22), (1024, 1), 16),
        ((768, 14), (768, 2), 16),
    ]:
        assert guess_heads(outer, inner)[0] == heads


@pytest.mark.parametrize("name", ["base", "large", "huge", "base-v1", "large-v1", "huge-v1"])
def test_published_sizes_are_recognised(name: str) -> None:
    """From shapes alone, heads included: base and its first version look the same, so that guess is the first."""
    with torch.device("meta"):
        state = Arinar(PRESETS[name]).state_dict()
    config, _, warned, _ = infer_arinar(Path("bare"), state, None, None)
    assert config == PRESETS["base-v1" if name == "base" else name] and len(warned) == 1
    args = {"inner_ar_width": PRESETS[name].inner_width}
    config, _, warned, _ = infer_arinar(Path("bare"), state, args, None)
    assert config == PRESETS[name].replace(inner_heads=16) and not warned


def test_published_autoencoder_is_recognised() -> None:
    with torch.device("meta"):
        state = AutoencoderKL(VAE_PRESETS["kl16"]).state_dict()
    assert infer_vae(Path("kl16.ckpt"), state) == VAE_PRESETS["kl16"]


def test_given_config_against_the_args(tmp_path: Path, published: State) -> None:
    path = container(tmp_path / "model.pth", published, args=arguments(inner_ar_width=None, head_type=None))
    with pytest.warns(UserWarning, match="given config has inner_heads=16, but its saved args lack inner_ar_width"):
        assert load_arinar(path, config=CONFIG.replace(inner_heads=16)).config.inner_heads == 16


def test_own_latent_statistics_are_said(tmp_path: Path, published: State) -> None:
    path = container(tmp_path / "model.pth", published, args=arguments(cached_path="cache/vavae"))
    with pytest.warns(UserWarning, match=r"latents_stats.pt.*latent_scale 0.2325.*pass config="):
        load_arinar(path)


def test_sampling_schedule_of_the_args_is_noted(tmp_path: Path, silent: None, published: State) -> None:
    path = container(tmp_path / "model.pth", published, args=arguments(bilevel_schedule="cosine"))
    assert any("bilevel_schedule cosine" in note for note in inspect_checkpoint(path).notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"head_type": "ar_diff_loss"},
            r"head ar_diff_loss \(inner autoregressive diffusion\); supported are",
        ),
        ({"head_type": "ar_rect_flow"}, "rectified flow"),
        ({"head_type": "ar_byte"}, "bytes"),
        ({"head_type": "diff_loss"}, "head_type diff_loss, its weights lack MAR's diffusion head"),
        ({"head_type": "gmm_cov_wo_ar"}, "full-covariance"),
        ({"head_type": "surprise"}, r"head surprise \(unknown\)"),
        ({"use_nf": True}, "normalising flow"),
        ({"model": "var_d16"}, "backbone var_d16"),
        ({"num_gaussians": 1}, "num_gaussians is 1 in args, 4 in the weights"),
        ({"img_size": 256}, "img_size is 256 in args, 32 in the weights"),
        ({"patch_size": "x"}, "patch_size is 'x' in its saved args; expected a positive integer"),
    ],
)
def test_args_that_are_refused(tmp_path: Path, published: State, changes: dict[str, Any], message: str) -> None:
    path = container(tmp_path / "model.pth", published, args=arguments(**changes))
    with pytest.raises(CheckpointError, match=message):
        load_arinar(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("diffloss.net.input_proj.weight", r"per-token \(not MAR's\) head"),
        ("diffloss.flow_net.input_proj.weight", "rectified-flow head"),
        ("gmm_head.net.weight", "non-autoregressive Gaussian-mixture head"),
        ("arhead.net.input_proj.weight", "inner diffusion or rectified-flow head"),
        ("arhead.word_embed.0.weight", "inner bytes head"),
        ("arhead.nf.blocks.0.weight", "normalising flow"),
        ("surprise", r"1 unexpected \(surprise\)"),
    ],
)
def test_entries_that_are_refused(tmp_path: Path, published: State, name: str, message: str) -> None:
    path = tmp_path / "bare.pth"
    torch.save({**published, name: torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=message):
        load_arinar(path)


def changed(state: State, name: str, value: Any) -> State:
    copy = dict(state)
    if value is None:
        del copy[name]
    else:
        copy[name] = value
    return copy


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("arhead.input_proj.weight", torch.zeros(32, 2), r"2 features at a time \(feature_group 2\)"),
        ("encoder_norm.weight", None, r"1 missing \(encoder_norm.weight\); of \d+ expected"),
        (
            "encoder_norm.weight",
            torch.zeros(3),
            r"1 mis-shaped \(encoder_norm.weight is \(3,\), expected \(768,\)\)",
        ),
        ("class_emb.weight", None, "not an ARINAR checkpoint: it has no class_emb.weight"),
        ("class_emb.weight", torch.zeros(3), r"class_emb.weight is \(3,\); expected 2 axes"),
        (
            "fake_latent",
            torch.zeros(1, 768, dtype=torch.int64),
            "entry fake_latent is torch.strided torch.int64",
        ),
        ("fake_latent", torch.zeros(1, 768).to_sparse(), "expected dense floating-point weights"),
        ("fake_latent", "text", "entry fake_latent is a str, not a tensor"),
        (
            "fake_latent",
            torch.full((1, 768), torch.nan),
            r"non-finite weights in 1 of \d+ entries \(fake_latent\)",
        ),
        ("fake_latent", torch.full((1, 768), 1e300, dtype=torch.float64), "non-finite weights"),
        ("arhead.head.weight", torch.zeros(13, 32), "1 mis-shaped"),
        ("encoder_blocks.99999999.norm1.weight", torch.zeros(768), "missing .* unexpected|unexpected"),
    ],
)
def test_weights_that_are_refused(tmp_path: Path, published: State, name: str, value: Any, message: str) -> None:
    path = tmp_path / "bare.pth"
    torch.save(changed(published, name, value), path)
    with pytest.raises(CheckpointError, match=message):
        load_arinar(path, inner_heads=4)


def test_many_faults_are_counted(tmp_path: Path, published: State) -> None:
    path = tmp_path / "bare.pth"
    torch.save({name: value for name, value in published.items() if ".attn." not in name}, path)
    with pytest.raises(CheckpointError, match=r"14 missing \([^,]+, [^,]+, [^,]+, \.\.\.\)"):
        load_arinar(path, inner_heads=4)


def test_causal_weights_need_their_config(tmp_path: Path, silent: None) -> None:
    model, path = random_module(CAUSAL), tmp_path / "bare.safetensors"
    save_file(model.state_dict(), path)
    with pytest.raises(CheckpointError, match="causal model without its config"):
        load_arinar(path)
    assert_state(load_arinar(path, config=CAUSAL), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path: Path, silent: None, published: State, dtype: torch.dtype) -> None:
    state, path = {name: value.to(dtype) for name, value in published.items()}, tmp_path / "bare.safetensors"
    save_file(state, path)
    model = load_arinar(path, inner_heads=4)
    assert model.fake_latent.dtype == torch.float32
    assert_state(model, state)


# -------------------------------------------------------------------------------------------- autoencoders


def vae_checkpoint(path: Path, state: State, nested: str) -> Path:
    with_loss = {**state, "loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(2)}
    torch.save({nested: with_loss, "global_step": 1} if nested else with_loss, path)
    return path


@pytest.mark.parametrize("nested", ["", "model", "state_dict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_vae_containers(tmp_path: Path, silent: None, nested: str, dtype: torch.dtype) -> None:
    config = VaeConfig(
        embed_dim=4,
        channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        encoder_attention_levels=(1,),
        decoder_attention_levels=(0,),
    )
    state = {name: value.to(dtype) for name, value in random_module(config).state_dict().items()}
    path = vae_checkpoint(tmp_path / "kl16.ckpt", state, nested)
    vae = load_vae(path)
    assert vae.config == config
    assert_state(vae, state)
    info = inspect_checkpoint(path)
    assert info.kind == "vae" and info.inner_heads is None
    assert info.notes == ("2 entries of the training loss and its averages were left out",)
    assert info.dtypes == (str(dtype).removeprefix("torch."),)


def test_golden_vae(golden: Path, silent: None) -> None:
    config = json.loads((golden / "tiny_vae" / "config.json").read_text())
    vae = load_vae(golden / "tiny_vae" / "weights.safetensors")
    assert vae.config == VaeConfig(
        embed_dim=16,
        channels=config["ch"],
        channel_multipliers=config["ch_mult"],
        num_res_blocks=1,
        encoder_attention_levels=config["encoder_attn_levels"],
    )
    assert sum(parameter.numel() for parameter in vae.parameters()) == config["params"]


def test_vae_faults(tmp_path: Path) -> None:
    state, path = random_module(VAE).state_dict(), tmp_path / "vae.safetensors"
    save_file(state, path)
    with pytest.raises(CheckpointError, match=r"not divisible by norm_groups 32.*pass config=VaeConfig"):
        load_vae(path)
    assert load_vae(path, config=VAE).config == VAE
    save_file({name: value for name, value in state.items() if not name.startswith("encoder.")}, path)
    with pytest.raises(CheckpointError, match=r"no convolution encoder.conv_in.weight"):
        load_vae(path)
    with pytest.raises(CheckpointError, match=r"\d+ missing \(encoder.conv_in.weight"):
        load_vae(path, config=VAE)


def test_model_and_autoencoder_are_not_confused(tmp_path: Path, published: State) -> None:
    own_model, own_vae = tmp_path / "model.safetensors", tmp_path / "vae.safetensors"
    save_arinar(own_model, random_module(SMALL))
    save_vae(own_vae, random_module(VAE))
    container(tmp_path / "model.pth", published)
    vae_checkpoint(tmp_path / "kl16.ckpt", random_module(VAE).state_dict(), "model")
    for path in (own_model, tmp_path / "model.pth"):
        with pytest.raises(CheckpointError, match="is a model, not an autoencoder: load it with load_arinar"):
            load_vae(path)
        with pytest.raises(CheckpointError, match="its config is an ArinarConfig"):
            inspect_checkpoint(path, config=VAE)
    for path in (own_vae, tmp_path / "kl16.ckpt"):
        with pytest.raises(CheckpointError, match="is an autoencoder, not a model: load it with load_vae"):
            load_arinar(path)
        with pytest.raises(CheckpointError, match="its config is a VaeConfig"):
            inspect_checkpoint(path, config=SMALL)
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"not a KL autoencoder: it has no post_quant_conv.weight \(weight\)"):
        load_vae(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not an ARINAR checkpoint: it has no diffusion_pos_embed_learned"):
        load_arinar(tmp_path / "other.safetensors")


# ------------------------------------------------------------------------------------ code, damage, other files


class Payload:
    """Pickles into a call of os.system, in the way a hostile checkpoint would."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("place", ["args", "inside args", "weights", "whole file"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("load", [load_arinar, load_vae, inspect_checkpoint])
def test_pickled_code_never_runs(
    tmp_path: Path, published: State, place: str, zipped: bool, load: Callable[[Path], Any]
) -> None:
    target, path = tmp_path / "executed", tmp_path / "model.pth"
    payload = Payload(target)
    content: Any = {"model": published, "model_ema": published, "args": arguments()}
    if place == "args":
        content["args"] = payload
    elif place == "inside args":
        content["args"] = argparse.Namespace(model="mar_base", lr=payload)
    elif place == "weights":
        content["model_ema"] = {**published, "extra": payload}
    else:
        content = payload
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"needs (posix|nt|os)\.system.*running code.*refused: save its state"):
        load(path)
    assert not target.exists()
    # The payload works: only the reader stops it.
    torch.load(path, weights_only=False)
    assert target.exists()


def test_raw_pickle_and_whole_modules_are_refused(tmp_path: Path) -> None:
    target, path = tmp_path / "executed", tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(Payload(target)))
    with pytest.raises(CheckpointError):
        load_arinar(path)
    assert not target.exists()
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match=r"needs torch\.nn\.modules\.linear\.Linear.*save its state dict"):
        load_arinar(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, published: State) -> dict[str, Path]:
    """One small model in each format, inner_heads settled."""
    folder = tmp_path_factory.mktemp("formats")
    model = random_module(SMALL)
    save_arinar(folder / "own.safetensors", model)
    save_file(model.state_dict(), folder / "bare.safetensors")
    container(folder / "container.pth", model.state_dict(), args=None)
    torch.save(model.state_dict(), folder / "legacy.pth", _use_new_zipfile_serialization=False)
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["own", "bare", "container", "legacy"])
def test_truncation(tmp_path: Path, files: dict[str, Path], name: str) -> None:
    whole = files[name].read_bytes()
    assert load_arinar(files[name], config=SMALL).config == SMALL
    path = tmp_path / files[name].name
    for kept in (0, 1, 5, 9, 100, len(whole) // 3, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(CheckpointError, match=r"is empty|truncated or damaged|is not a checkpoint"):
            load_arinar(path, config=SMALL)


@pytest.mark.parametrize("name", ["own", "container"])
def test_flipped_bits(tmp_path: Path, files: dict[str, Path], name: str) -> None:
    """Each flip is found, or changes nothing that is read (a zip's dates, say)."""
    whole, path = files[name].read_bytes(), tmp_path / files[name].name
    reference = load_arinar(files[name], config=SMALL).state_dict()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(whole), (60,), generator=generator).tolist()
    found = 0
    for place in [*range(0, 24), *places, *range(len(whole) - 24, len(whole))]:
        broken = bytearray(whole)
        broken[place] ^= 1 << (place % 8)
        path.write_bytes(broken)
        try:
            loaded = load_arinar(path, config=SMALL).state_dict()
        except CheckpointError:
            found += 1
        else:
            assert name != "own", f"byte {place} went unnoticed"
            assert all(torch.equal(loaded[key], value) for key, value in reference.items()), f"byte {place}"
    assert found >= 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (
            b"a list of things to do\n" * 9,
            "not a checkpoint .a text file.: expected safetensors or a PyTorch file",
        ),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG image"),
        (b"\xff\xd8\xff\xe0" + bytes(99), "a JPEG image"),
        (b"<!DOCTYPE html><html>404</html>", "a web page: the download failed"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (bytes(99), "unknown format"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", "not an ARINAR checkpoint"),
        (b"\xff\xff\xff\x00\x00\x00\x00\x00{}", "truncated or damaged"),
        (b"\x80\x02]q\x00.", "truncated or damaged"),
        (b"PK\x03\x04 not really", "truncated or damaged"),
    ],
)
@pytest.mark.parametrize("load", [load_arinar, inspect_checkpoint])
def test_foreign_files(tmp_path: Path, content: bytes, message: str, load: Callable[[Path], Any]) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_foreign_containers(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(CheckpointError, match="zip archive, but not a PyTorch checkpoint"):
        load_arinar(tmp_path / "archive.zip")
    for content, message in [
        ([1, 2], "holds a list; expected a state dict"),
        ({"step": 1, "module": {}}, r"holds no weights \(its entries: step, module\)"),
        ({}, r"holds no weights \(its entries: nothing\)"),
    ]:
        torch.save(content, tmp_path / "model.pth")
        with pytest.raises(CheckpointError, match=message):
            load_arinar(tmp_path / "model.pth")


def test_missing_files(tmp_path: Path) -> None:
    for load in (load_arinar, load_vae, inspect_checkpoint):
        with pytest.raises(CheckpointError, match=r"no file .*nothing.pth: give the path"):
            load(tmp_path / "nothing.pth")
        with pytest.raises(CheckpointError, match="is a folder"):
            load(tmp_path)
        with pytest.raises(CheckpointError, match=r"no file nothing, nor a demo model .*digits, digits-causal"):
            load("nothing")


# --------------------------------------------------------------------------------------------------- demo names


def test_demo_names_stand_for_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: None) -> None:
    save_arinar(tmp_path / "model", random_module(SMALL))
    save_vae(tmp_path / "vae", random_module(VAE))
    demo = types.ModuleType("arinar.demo")
    demo.DEMO_MODELS = {"digits": "digits", "digits-causal": "digits"}  # type: ignore[attr-defined]
    demo.demo_checkpoint = lambda name: tmp_path / "model"  # type: ignore[attr-defined]
    demo.demo_vae = lambda name: tmp_path / "vae"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "arinar.demo", demo)
    monkeypatch.setattr("arinar.demo", demo, raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "digits-causal"):
        assert load_arinar(name).config == SMALL
        assert load_vae(name).config == VAE
        assert inspect_checkpoint(name).kind == "arinar"
    with pytest.raises(CheckpointError, match="no file digits: give the path"):
        load_arinar("./digits")  # a path, not a name
    assert load_arinar("model").config == SMALL  # a file with a bare name
    with pytest.raises(CheckpointError, match="no file kl16, nor a demo model"):
        load_vae("kl16")


def test_shipped_demo_models() -> None:
    from arinar.demo import DEMO_MODELS, demo_checkpoint, demo_vae

    for name in DEMO_MODELS:
        if not demo_checkpoint(name).exists():
            pytest.skip(f"{name} is not trained yet")
        config = load_arinar(name).config
        assert config.outer == PRESETS[name].outer
        assert load_vae(name).config == VAE_PRESETS["digits"]
        assert inspect_checkpoint(demo_vae(name)).kind == "vae"
