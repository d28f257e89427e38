"""Pictures in, pictures out, parts of them generated anew: through Python and on the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result
from PIL import Image

pytest.importorskip("onnxruntime")

from arinar.cli import main
from arinar.config import PRESETS, ArinarConfig
from arinar.runtime import Bundle, BundleError, Known, Pipeline, Progress
from arinar.runtime import images as images_module
from arinar.runtime.editing import MID_GREY, as_mask, as_pixels, box_mask, hide, to_tokens, token_mask
from arinar.runtime.growing import GrowingPicture
from arinar.runtime.images import read_metadata, read_picture, save_all, save_png

DIGITS = PRESETS["digits"]
SIDE, LENGTH = DIGITS.img_size, DIGITS.seq_len
LOWER = np.zeros((SIDE, SIDE), np.bool_)
LOWER[SIDE // 2 :] = True


@pytest.fixture(scope="module", params=["digits", "digits-causal"])
def pipeline(request: pytest.FixtureRequest, demo_bundle: Callable[[str], Path]) -> Pipeline:
    return Pipeline.load(demo_bundle(request.param), threads=1)


@pytest.fixture(scope="module")
def digits(digits_bundle: Path) -> Pipeline:
    return Pipeline.load(digits_bundle, threads=1)


@pytest.fixture(scope="module")
def pixels(digits: Pipeline) -> npt.NDArray[np.uint8]:
    """Three generated digits, (3, 32, 32, 3)."""
    return np.stack([np.asarray(image) for image in digits.generate([1, 2, 3], seed=3).images])


def arrays(images: list[Image.Image]) -> npt.NDArray[np.uint8]:
    return np.stack([np.asarray(image) for image in images])


# --------------------------------------------------------------------------------------------------- encode and decode


def test_encode_is_the_autoencoders_mean_normalised(pipeline: Pipeline, pixels: npt.NDArray[np.uint8]) -> None:
    torch = pytest.importorskip("torch")
    from arinar.checkpoint import load_vae
    from arinar.model import normalize, patchify
    from arinar.vae import posterior

    tokens = pipeline.encode(pixels)
    with torch.no_grad():
        mean, _ = posterior(load_vae("digits").encode(torch.from_numpy(pixels).float().permute(0, 3, 1, 2) / 127.5 - 1))
    want = patchify(normalize(mean, pipeline.config), pipeline.config.patch_size).numpy()
    assert tokens.dtype == np.float32 and tokens.shape == want.shape and np.abs(tokens - want).max() < 1e-4
    again = [pipeline.encode(form) for form in (list(pixels), [Image.fromarray(p) for p in pixels])]
    assert all(np.array_equal(tokens, other) for other in again)
    assert np.array_equal(pipeline.encode(Image.fromarray(pixels[1])), tokens[1:2])


def test_latents_to_tokens_is_the_models_own_way() -> None:
    torch = pytest.importorskip("torch")
    from arinar.model import normalize, patchify

    config = ArinarConfig(
        img_size=32, vae_stride=4, patch_size=2, vae_embed_dim=4, latent_scale=(1.0, 2.0, 3.0, 4.0), latent_shift=0.5
    )
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    want = patchify(normalize(torch.from_numpy(latents), config), 2).numpy()
    got = to_tokens(latents, config)
    assert got.shape == want.shape and got.dtype == np.float32 and np.abs(got - want).max() < 1e-6


def test_decode_is_what_generate_shows(pipeline: Pipeline) -> None:
    made = pipeline.generate([1, 2, 3], seed=3)
    assert [image.tobytes() for image in pipeline.decode(made.tokens)] == [image.tobytes() for image in made.images]
    assert pipeline.decode(made.tokens[:1])[0].tobytes() == made.images[0].tobytes()


def test_there_and_back_is_nearly_the_same_picture(pipeline: Pipeline, pixels: npt.NDArray[np.uint8]) -> None:
    back = arrays(pipeline.decode(pipeline.encode(pixels))).astype(int)
    assert np.abs(back - pixels).mean() < 8


@pytest.mark.parametrize(
    "tokens",
    [np.zeros((1, LENGTH, 3), np.float32), np.zeros((0, LENGTH, 16), np.float32), np.zeros((1, LENGTH, 16)), [1.0], None, "x"],
)
def test_decode_takes_tokens_only(digits: Pipeline, tokens: Any) -> None:
    with pytest.raises(ValueError, match=r"tokens is .*expected .*float32 \(1, 16, 16\)"):
        digits.decode(tokens)


def test_decode_refuses_what_is_not_finite(digits: Pipeline) -> None:
    with pytest.raises(ValueError, match="tokens of image 0 has values that are not finite"):
        digits.decode(np.full((1, LENGTH, 16), np.nan, np.float32))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images is empty; give at least one"),
        (np.zeros((0, 32, 32, 3), np.uint8), "images is empty"),
        ("photo.png", "images is 'photo.png'; expected PIL images, or an array"),
        (None, "images is None"),
        ([None], r"images\[0\] is None; expected a PIL image"),
        (["photo.png"], r"images\[0\] is 'photo.png'"),
        ([object()], r"images\[0\] is <object object"),
        (np.zeros((32, 32, 4), np.uint8), r"images\[0\] is uint8 \(32, 32, 4\); expected uint8 \(32, 32, 3\)"),
        (np.zeros((1, 32, 32), np.uint8), "expected a PIL image|expected uint8"),
        (np.zeros((1, 32, 32, 3)), r"images\[0\] is float64 \(32, 32, 3\); expected uint8"),
        (np.zeros((1, 30, 32, 3), np.uint8), r"images\[0\] has 32 x 30 pixels; this model takes 32 x 32: crop or resize"),
        ([Image.new("RGB", (32, 32)), Image.new("RGB", (64, 64))], r"images\[1\] has 64 x 64 pixels; this model takes 32 x 32"),
        (Image.new("I;16", (32, 32)), r"images\[0\] has pixels of the kind 'I;16'; expected 8 bits"),
        (Image.new("F", (32, 32)), "pixels of the kind 'F'"),
        (Image.new("RGBA", (32, 32), (1, 2, 3, 200)), r"images\[0\] is transparent in places; put it on a ground"),
        (Image.new("LA", (32, 32), (1, 0)), "is transparent in places"),
    ],
    ids=lambda part: part[:30] if isinstance(part, str) else "",  # a picture is written with its address
)
def test_what_is_no_picture_of_the_models_size(digits: Pipeline, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        digits.encode(images)


def test_pictures_of_every_kind_that_rgb_can_show() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    for mode in ("RGB", "L", "P", "1", "CMYK", "YCbCr", "RGBA"):
        found = as_pixels(picture.convert(mode), 32)
        assert found.shape == (1, 32, 32, 3) and np.array_equal(found[0], np.asarray(picture.convert(mode).convert("RGB")))


def test_resizing_is_done_only_where_told(digits: Pipeline) -> None:
    wide = Image.new("RGB", (80, 40), (10, 20, 30))
    wide.paste((200, 0, 0), (0, 0, 15, 40))  # left of the square that is cut out
    with pytest.raises(ValueError, match="80 x 40"):
        digits.encode(wide)
    assert np.abs(as_pixels(wide, 32, resize=True).astype(int) - (10, 20, 30)).max() <= 1
    assert digits.encode(wide, resize=True).shape == (1, LENGTH, 16)
    with pytest.raises(ValueError, match="has 100000 x 100000 pixels; expected 1 to 67,108,864"):

        class Huge(Image.Image):  # not decoded
            @property
            def size(self) -> tuple[int, int]:
                return 100_000, 100_000

        as_pixels(Huge(), 32, resize=True)


def test_a_damaged_file_is_told_when_it_is_decoded(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"images\[0\] cannot be decoded"):
        as_pixels(Image.open(tmp_path / "a.png"), 32)


def test_the_encoder_is_verified_before_it_is_used(digits_bundle: Path, tmp_path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    import shutil

    folder = Path(shutil.copytree(digits_bundle, tmp_path / "b"))
    (encoder,) = folder.glob("graphs/fp32/vae_encoder.onnx")
    data = bytearray(encoder.read_bytes())
    data[len(data) // 2] ^= 1
    encoder.write_bytes(data)
    pipeline = Pipeline.load(folder, threads=1)  # generation does not read it
    pipeline.generate([1], num_iter=1)
    with pytest.raises(BundleError, match=r"vae_encoder.onnx is damaged"):
        pipeline.encode(pixels)


# ---------------------------------------------------------------------------------------------------------------- masks


def test_a_token_is_anew_where_any_of_its_pixels_is() -> None:
    mask = np.zeros((2, SIDE, SIDE), np.bool_)
    mask[0, 8, 15] = mask[1, 31, 31] = True
    found = token_mask(mask, DIGITS).reshape(2, 4, 4)
    assert np.argwhere(found).tolist() == [[0, 1, 1], [1, 3, 3]]
    grown = token_mask(mask, DIGITS, 1).reshape(2, 4, 4)
    assert grown[0, :3, :3].all() and grown[0].sum() == 9 and grown[1, 2:, 2:].all() and grown[1].sum() == 4
    assert token_mask(mask, DIGITS, 2)[0].all() and token_mask(mask, DIGITS, 4).all()
    assert not token_mask(np.zeros((1, SIDE, SIDE), np.bool_), DIGITS, 4).any()


def test_growing_is_by_tokens_in_eight_directions_at_any_size() -> None:
    config = ArinarConfig(img_size=64, vae_stride=4, patch_size=1)
    mask = np.random.default_rng(1).random((1, 64, 64)) < 0.002
    for grow in range(4):
        near = token_mask(mask, config, grow).reshape(16, 16)
        seeds = np.argwhere(token_mask(mask, config).reshape(16, 16))
        for place in np.ndindex(16, 16):
            assert near[place] == (np.abs(seeds - place).max(1) <= grow).any()


def test_white_is_generated_anew() -> None:
    picture = Image.new("L", (SIDE, SIDE))
    picture.paste(255, (0, 16, 32, 32))
    for mode in ("L", "1", "RGB", "P", "RGBA"):
        assert np.array_equal(as_mask(picture.convert(mode), SIDE)[0], LOWER)
    assert np.array_equal(as_mask([picture, picture], SIDE), np.stack([LOWER, LOWER]))
    assert np.array_equal(as_mask(LOWER, SIDE), LOWER[None])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((16, 16), np.bool_), r"mask is bool \(16, 16\); expected bool \(32, 32\) or \(B, 32, 32\)"),
        (np.ones((SIDE, SIDE), np.uint8), r"mask is uint8 \(32, 32\); expected bool"),
        (np.ones((0, SIDE, SIDE), np.bool_), r"mask is bool \(0, 32, 32\)"),
        (np.ones((SIDE, SIDE, 3, 1), np.bool_), "mask is bool"),
        (Image.new("L", (16, 32)), r"mask\[0\] has 16 x 32 pixels; this model takes 32 x 32"),
        (Image.new("I;16", (32, 32)), r"mask\[0\] has pixels of the kind"),
        (Image.new("RGBA", (32, 32), (0, 0, 0, 0)), r"mask\[0\] is transparent in places"),
        ([[True]], "mask is .*; expected an array of bool"),
        (None, "mask is None; expected an array of bool"),
        ("mask.png", "mask is 'mask.png'"),
        ([], r"mask is \[\]"),
        (np.stack([LOWER] * 2), "mask has 2 pictures for 3 labels; give one for each label, or one for all"),
    ],
    ids=lambda part: part[:30] if isinstance(part, str) else "",  # a picture is written with its address
)
def test_bad_masks(digits: Pipeline, pixels: npt.NDArray[np.uint8], mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        digits.edit(pixels, mask, [1, 2, 3])


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((8, 8, 8, 24), "the box 8,8,8,24 is empty; expected x0,y0,x1,y1 with x0 < x1"),
        ((8, 24, 16, 8), "is empty"),
        ((-1, 0, 8, 8), "leaves the image, whose pixels run from 0,0 to 32,32"),
        ((0, 0, 8, 33), "leaves the image"),
    ],
)
def test_bad_boxes(box: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        box_mask(box, SIDE)


def test_a_box_is_x_then_y_its_end_outside() -> None:
    mask = box_mask((4, 8, 6, 32), SIDE)
    assert mask.sum() == 2 * 24 and mask[8:, 4:6].all()


# --------------------------------------------------------------------------------------------------------------- edit


def test_an_edit_keeps_the_rest_and_changes_what_is_masked(pipeline: Pipeline, pixels: npt.NDArray[np.uint8]) -> None:
    out = pipeline.edit(pixels, LOWER, [4, 5, 6], seed=1)
    got = arrays(out.images)
    assert np.array_equal(got[:, :16], pixels[:, :16])  # the very pixels
    assert np.abs(got[:, 16:].astype(int) - pixels[:, 16:]).mean((1, 2, 3)).min() > 2
    unpasted = pipeline.edit(pixels, LOWER, [4, 5, 6], seed=1, paste=False)
    assert np.array_equal(out.tokens, unpasted.tokens) and np.array_equal(out.latents, unpasted.latents)
    assert [image.tobytes() for image in unpasted.images] == [image.tobytes() for image in pipeline.decode(out.tokens)]
    assert np.array_equal(arrays(unpasted.images)[:, 16:], got[:, 16:])
    hidden = hide(pixels, token_mask(LOWER[None], DIGITS), DIGITS)
    assert (hidden[:, 16:] == MID_GREY).all() and np.array_equal(hidden[:, :16], pixels[:, :16])
    assert np.array_equal(out.tokens[:, :8], pipeline.encode(hidden)[:, :8])  # known tokens, bit for bit
    assert out.labels == [4, 5, 6] and out.seed == 1 and out.timings["total"] > 0


def test_the_model_sees_nothing_of_what_is_generated_anew(pipeline: Pipeline, pixels: npt.NDArray[np.uint8]) -> None:
    mask = np.zeros((SIDE, SIDE), np.bool_)
    mask[31] = True  # the last row of pixels: the last row of tokens
    other = pixels.copy()
    other[:, 24:] = np.random.default_rng(0).integers(0, 256, other[:, 24:].shape)
    one, two = (pipeline.edit(picture, mask, [4, 5, 6], seed=1) for picture in (pixels, other))
    assert np.array_equal(one.tokens, two.tokens)
    assert np.array_equal(arrays(one.images), arrays(two.images))  # whole tokens come back new


def test_growing_an_edit(digits: Pipeline, pixels: npt.NDArray[np.uint8]) -> None:
    mask = np.zeros((SIDE, SIDE), np.bool_)
    mask[0, 0] = True
    for grow, side in ((0, 8), (1, 16), (2, 24)):
        got = arrays(digits.edit(pixels, mask, [4, 5, 6], grow=grow).images)
        changed = (got != pixels).any((0, 3))
        assert changed[:side, :side].mean() > 0.5 and not changed[side:].any() and not changed[:, side:].any()


def test_one_picture_and_several_labels_or_one_mask_each(digits: Pipeline, pixels: npt.NDArray[np.uint8]) -> None:
    shared = digits.edit(Image.fromarray(pixels[0]), Image.fromarray(LOWER), [4, 5, 6], seed=2)
    each = digits.edit(pixels[[0, 0, 0]], np.stack([LOWER] * 3), [4, 5, 6], seed=2)
    assert np.array_equal(shared.tokens, each.tokens)
    masks = np.stack([LOWER, ~LOWER, LOWER.T])
    mixed = digits.edit(pixels[:1], masks, [4, 5, 6], seed=2, batch_size=2)
    for row, mask in enumerate(masks):
        assert np.array_equal(arrays(mixed.images)[row][~mask], pixels[0][~mask])


def test_nothing_masked_and_everything_masked(digits: Pipeline, pixels: npt.NDArray[np.uint8]) -> None:
    nothing, everything = np.zeros_like(LOWER), np.ones_like(LOWER)
    assert np.array_equal(arrays(digits.edit(pixels, nothing, [1, 2, 3]).images), pixels)
    seen: list[Progress] = []
    kept = digits.edit(pixels, nothing, [1, 2, 3], paste=False, callback=seen.append)
    assert np.array_equal(kept.tokens, digits.encode(pixels)) and [p.step for p in seen] == [0]
    plain = digits.generate([1, 2, 3], seed=4)
    whole = digits.edit(pixels, everything, [1, 2, 3], seed=4)
    assert np.array_equal(whole.tokens, plain.tokens) and np.array_equal(arrays(whole.images), arrays(plain.images))


def test_sampling_arguments_are_those_of_generate(digits: Pipeline, pixels: npt.NDArray[np.uint8]) -> None:
    settings: dict[str, Any] = {"guidance_scale": [1.0, 2.0, 3.0], "temperature": 0.9, "num_iter": 3, "indices": [5, 6, 7]}
    steps: list[Progress] = []
    got = digits.edit(pixels, LOWER, [4, 5, 6], callback=steps.append, **settings)
    tokens = digits.encode(hide(pixels, token_mask(LOWER[None], DIGITS), DIGITS))
    known = Known(tokens, np.tile(np.arange(LENGTH) < 8, (3, 1)))
    want = digits.generate([4, 5, 6], known=known, **settings)
    assert np.array_equal(got.tokens, want.tokens) and [p.step for p in steps] == [1, 2, 3] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grow": -1}, "grow is -1; expected an integer from 0 to 4"),
        ({"grow": 5}, "grow is 5; expected an integer from 0 to 4"),
        ({"grow": 1.0}, "grow is 1.0"),
        ({"grow": True}, "grow is True"),
        ({"known": None}, "known has no place here"),
        ({"labels": [77, 1, 1]}, "label 77 is out of range"),
        ({"labels": [1, 2]}, "images has 3 pictures for 2 labels; give one for each label, or one for all"),
        ({"num_iter": 0}, "num_iter is 0"),
        ({"images": np.zeros((3, 31, 32, 3), np.uint8)}, r"images\[0\] has 32 x 31 pixels"),
    ],
)
def test_bad_edits_are_refused_before_anything_is_computed(
    digits: Pipeline, pixels: npt.NDArray[np.uint8], arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits.backend, "launch", lambda *_: pytest.fail("something was computed"))
    given = {"images": pixels, "mask": LOWER, "labels": [1, 2, 3]} | arguments
    with pytest.raises(ValueError, match=message):
        digits.edit(**given)


def test_a_causal_model_is_edited_at_the_end_of_its_order(
    causal_bundle: Path, pixels: npt.NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    causal = Pipeline.load(causal_bundle, threads=1)
    assert np.array_equal(arrays(causal.edit(pixels, LOWER, [1, 2, 3]).images)[:, :16], pixels[:, :16])
    monkeypatch.setattr(causal.backend, "launch", lambda *_: pytest.fail("something was computed"))
    with pytest.raises(ValueError, match=r"must be the first of its order \(in raster order the upper rows\)"):
        causal.edit(pixels, ~LOWER, [1, 2, 3])


def test_a_bundle_without_an_encoder_says_so(digits_bundle: Path, tmp_path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    import shutil
    from dataclasses import replace

    folder = Path(shutil.copytree(digits_bundle, tmp_path / "b"))
    manifest = Bundle.open(folder).manifest
    graphs = {"fp32": {name: graph for name, graph in manifest.graphs["fp32"].items() if graph.phase != "encode"}}
    (folder / "manifest.json").write_text(replace(manifest, graphs=graphs).to_json())
    pipeline = Pipeline.load(folder, threads=1)
    with pytest.raises(
        BundleError, match="the bundle has no graph vae_encoder, which reads pictures in; export the model again"
    ):
        pipeline.edit(pixels, LOWER, [1, 2, 3])


# ---------------------------------------------------------------------------------------------------------- in a judge's eyes


def test_the_new_half_is_of_its_class(digits: Pipeline) -> None:
    """A judge that knows nothing of the model reads in the results what it was asked for, as far as the half that is kept
    leaves room for it: where it reads it in real halves, put together."""
    pytest.importorskip("sklearn")
    show = pytest.importorskip("benchmarks.editing")
    real = show.real_shares(10)
    pairs = [(int(upper), int(lower)) for upper, lower in np.argwhere(real >= show.ROOM) if upper != lower]
    assert len(pairs) >= 8
    there = [show.read_as(show.edited(digits, upper, lower, 10), lower) for upper, lower in pairs]
    before = [show.read_as(show.held_out(upper, 10), lower) for upper, lower in pairs]  # they were something else
    assert np.mean(there) >= 0.65 and np.mean(before) <= 0.05, dict(zip(pairs, there, strict=True))
    same = [show.read_as(show.edited(digits, label, label, 10), label) for label in range(10)]
    assert np.mean(same) >= 0.9, same


# ------------------------------------------------------------------------------------------------------- on the command line


def arinar(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def fails(result: Result, *words: str) -> None:
    """Exit code 2, one line of error with these words in it."""
    assert result.exit_code == 2, result.output
    message = [line for line in result.stderr.strip().splitlines() if "rror" in line]
    assert len(message) == 1 and "Traceback" not in result.output, result.output
    for word in words:
        assert word in message[0], message[0]


@pytest.fixture
def photo(tmp_path: Path, pixels: npt.NDArray[np.uint8]) -> Path:
    Image.fromarray(pixels[0]).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_the_command_edits_a_file(digits_bundle: Path, digits: Pipeline, photo: Path, tmp_path: Path) -> None:
    Image.fromarray(LOWER).save(tmp_path / "mask.png")
    edit = ("edit", digits_bundle, photo, "--label", 8, "--seed", 5, "--threads", 1)
    for name, words in (("a", ("--mask", tmp_path / "mask.png")), ("b", ("--box", "0,16,32,32"))):
        done = arinar(*edit, *words, "-o", tmp_path / f"{name}.png", "--json")
        assert done.exit_code == 0, done.output
        report = json.loads(done.stdout)
        assert (
            report["generated_tokens"] == 8 and report["labels"] == [8] and report["images"] == [str(tmp_path / f"{name}.png")]
        )
    want = digits.edit(Image.open(photo), LOWER, [8], seed=5).images[0]
    for name in ("a", "b"):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{name}.png")), np.asarray(want))
    metadata = read_metadata(tmp_path / "a.png")
    assert metadata is not None and metadata == read_metadata(tmp_path / "b.png")
    assert metadata["label"] == 8 and metadata["seed"] == 5 and metadata["num_iter"] == 12 and metadata["index"] == 0
    assert metadata["edit"]["grow"] == 0 and metadata["edit"]["paste"] is True and len(metadata["edit"]["mask_sha256"]) == 16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png", "mask.png", "photo.png"]


def test_outpainting_several_labels_and_options(digits_bundle: Path, photo: Path, tmp_path: Path) -> None:
    words = ("edit", digits_bundle, photo, "--box", "8,8,24,24", "--outpaint", "--labels", "1-3", "--per-label", 4, "-o")
    done = arinar(*words, tmp_path / "o.png", "--batch-size", 5, "--num-iter", 3)
    assert done.exit_code == 0 and "12 of 16 tokens are new" in done.stdout, done.output
    given = np.asarray(Image.open(photo))
    paths = sorted(tmp_path.glob("o-*.png"))
    assert [path.name for path in paths] == [f"o-{number:02}.png" for number in range(12)]
    for number, path in enumerate(paths):
        assert np.array_equal(np.asarray(Image.open(path))[8:24, 8:24], given[8:24, 8:24])
        metadata = read_metadata(path)
        assert metadata is not None and metadata["label"] == 1 + number // 4 and metadata["index"] == number
    assert len({path.read_bytes() for path in paths}) == 12
    grown = arinar(*words[:3], "--box", "0,0,1,1", "--label", 1, "--grow", 1, "--no-paste", "-o", tmp_path / "g.png")
    assert grown.exit_code == 0 and "4 of 16 tokens are new" in grown.stdout
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "g.png"))[16:], given[16:])


def test_a_photo_of_another_size(digits_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (90, 60), (9, 9, 9)).save(tmp_path / "wide.jpg")
    words = ("edit", digits_bundle, tmp_path / "wide.jpg", "--box", "0,16,32,32", "--label", 1, "-o", tmp_path / "o.png")
    fails(arinar(*words), "wide.jpg cannot be used as a picture: it has 90 x 60 pixels; this model takes 32 x 32", "--resize")
    assert arinar(*words, "--resize").exit_code == 0
    with Image.open(tmp_path / "o.png") as made:
        assert made.size == (32, 32)


def test_bad_input_on_the_command_line(digits_bundle: Path, causal_bundle: Path, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.png"
    edit = ("edit", digits_bundle, photo, "-o", out, "--label")
    for name, size in (("small", (16, 16)), ("black", (32, 32))):
        Image.new("L", size).save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("not a picture")
    os.mkfifo(tmp_path / "pipe.png")
    fails(arinar(*edit, 3), "--mask FILE or --box")
    fails(arinar(*edit, 3, "--box", "0,0,8,8", "--mask", photo), "one of them")
    fails(arinar(*edit, 3, "--mask", photo, "--outpaint"), "--outpaint keeps what is in a box")
    fails(arinar(*edit, 3, "--box", "0,0,8"), "is no box; write x0,y0,x1,y1")
    fails(arinar(*edit, 3, "--box", "0,0,8,eight"), "is no box")
    fails(arinar(*edit, 3, "--box", "0,0,0,8"), "the box 0,0,0,8 is empty")
    fails(arinar(*edit, 3, "--box", "0,0,40,8"), "leaves the image, whose pixels run from 0,0 to 32,32")
    fails(arinar(*edit, 3, "--box", "0,0,32,32", "--outpaint"), "keeps the whole picture: nothing is left to generate")
    fails(arinar(*edit, 3, "--mask", tmp_path / "black.png"), "black.png is black everywhere: nothing is left")
    fails(arinar(*edit, 3, "--mask", tmp_path / "small.png"), "small.png", "it has 16 x 16 pixels; this model takes 32 x 32")
    fails(arinar(*edit, 3, "--mask", tmp_path / "none.png"), "none.png cannot be used as a picture: No such file")
    fails(arinar(*edit, 10, "--box", "0,0,8,8"), "label 10 is out of range", "0..9")
    fails(arinar(*edit, 3, "--box", "0,0,8,8", "--grow", 9), "grow is 9; expected an integer from 0 to 4")
    fails(arinar(*edit, 3, "--box", "0,0,8,8", "--num-iter", 17), "num_iter is 17")
    fails(arinar(*edit, 3, "--box", "0,0,8,8", "--per-label", 10**6), "results of one picture are too many")
    for name in ("text.png", "pipe.png", "none.png", ""):
        fails(arinar("edit", digits_bundle, tmp_path / name, *edit[3:], 3, "--box", "0,0,8,8"), "cannot be used as a picture")
    fails(arinar("edit", causal_bundle, photo, *edit[3:], 3, "--box", "0,0,8,8"), "must be the first of its order")
    fails(arinar(*edit[:3], "-o", tmp_path / "o.jpg", "--label", 3, "--box", "0,0,8,8"), "does not end in .png")
    fails(arinar(*edit[:3], "-o", tmp_path / "no" / "o.png", "--label", 3, "--box", "0,0,8,8"), "does not exist")
    fails(arinar(*edit[:3], "-o", photo, "--label", 3, "--box", "0,0,8,8"), "photo.png is there already", "--overwrite")
    assert not out.exists()


def test_pictures_that_would_not_fit_into_memory_are_not_decoded(
    digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (9_000, 60_000):  # beyond our limit, and beyond Pillow's own
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        bomb = tmp_path / f"bomb-{side}.png"
        bomb.write_bytes(
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        )
        words = ("edit", digits_bundle, bomb, "--box", "0,0,8,8", "--label", 1, "-o", tmp_path / "o.png")
        for more in ((), ("--resize",)):
            fails(arinar(*words, *more), f"{bomb.name} cannot be used as a picture", "pixels")
    monkeypatch.setattr(images_module, "MOST_PIXELS", 10)
    save_png(Image.new("RGB", (32, 32)), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png cannot be used as a picture: it has 32 x 32 pixels; expected at most 10"):
        read_picture(tmp_path / "a.png")


def test_a_picture_is_turned_as_its_camera_was_held(tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 32), "black")
    picture.paste("white", (0, 0, 32, 16))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "turned.png", exif=exif)
    assert np.asarray(read_picture(tmp_path / "turned.png"))[16, 28, 0] == 255


# ----------------------------------------------------------------------------------------------------- previews and Ctrl-C


@pytest.mark.parametrize("ending", ["png", "webp", "apng", "gif"])
def test_a_preview_grows_with_the_images(digits_bundle: Path, tmp_path: Path, ending: str) -> None:
    preview = tmp_path / f"p.{ending}"
    words = ("generate", digits_bundle, "--labels", "3,5,7", "-o", tmp_path / "out", "--num-iter", 6, "--preview", preview)
    done = arinar(*words)
    assert done.exit_code == 0, done.output
    from arinar.runtime.images import contact_sheet

    want = np.asarray(contact_sheet([Image.open(path) for path in sorted((tmp_path / "out").iterdir())]), int)
    with Image.open(preview) as found:
        frames = getattr(found, "n_frames", 1)
        assert frames == (1 if ending == "png" else 6) and found.size == (70, 70)
        far = []
        for frame in range(frames):
            found.seek(frame)
            far.append(np.abs(np.asarray(found.convert("RGB"), int) - want).mean())
    assert far[-1] < (3 if ending == "gif" else 1e-9) and (frames == 1 or far[0] > far[-1] + 5)  # a GIF has 256 colours
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_png_of_a_preview_is_whole_at_every_step(digits: Pipeline, tmp_path: Path) -> None:
    growing = GrowingPicture(tmp_path / "p.png")
    seen = []
    for progress in digits.stream([3], num_iter=5):
        growing.add(progress.preview())
        assert [path.name for path in tmp_path.iterdir()] == ["p.png"]
        seen.append(np.asarray(Image.open(tmp_path / "p.png"), int))
        assert np.array_equal(seen[-1], np.asarray(progress.preview()[0], int))
    growing.close()
    assert np.abs(seen[0] - seen[-1]).mean() > 5


def test_bad_previews(digits_bundle: Path, tmp_path: Path) -> None:
    words = ("generate", digits_bundle, "-o", tmp_path / "out")
    fails(arinar(*words, "--labels", 3, "--preview", tmp_path / "p.jpg"), "no known ending", ".png", ".webp", ".apng", ".gif")
    fails(arinar(*words, "--labels", 3, "--preview", tmp_path / "no" / "p.png"), "does not exist")
    many = (*words, "--labels", "0-9", "--preview", tmp_path / "p.gif")
    fails(arinar(*many, "--batch-size", 4), "images that are made at one time, here 4 of 10 are: add --batch-size 10")
    fails(arinar(*many, "--per-label", 2), "a preview shows at most 16 images; these are 20")
    assert not list(tmp_path.glob("**/*.png")) and not list(tmp_path.glob("**/*.gif"))


def test_finished_images_are_written_though_ctrl_c_comes_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def interrupted(image: Image.Image, path: Path, metadata: Any) -> None:
        if not written:
            written.append(path)
            raise KeyboardInterrupt
        save_png(image, path, metadata)

    monkeypatch.setattr(images_module, "save_png", interrupted)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    with pytest.raises(KeyboardInterrupt):
        save_all((Image.new("RGB", (4, 4)), path, {}) for path in paths)
    assert all(read_metadata(path) is None and path.exists() for path in paths)


@pytest.mark.parametrize("command", ["generate", "edit"])
def test_ctrl_c_leaves_whole_files_and_exits_with_130(digits_bundle: Path, photo: Path, tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    common = ["--threads", "1", "--batch-size", "2"]
    words = {
        "generate": ["generate", str(digits_bundle), "--labels", "0-9", "--per-label", "300", "-o", str(out), *common],
        "edit": [
            "edit", str(digits_bundle), str(photo), "--box", "0,16,32,32", "--labels", "0-9", "--per-label", "300",
            "-o", str(out / "e.png"), *common,
        ],
    }[command]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "arinar", *words],
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where the tests run in the background it is ignored
    )
    try:
        deadline = time.monotonic() + 120
        while len(list(out.glob("*.png"))) < 4 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and b"arinar: error: interrupted" in said and b"Traceback" not in said, said
    files = list(out.iterdir())
    assert 4 <= len(files) < 3000 and len(files) % 2 == 0  # whole micro-batches
    for path in files:
        metadata = read_metadata(path)
        assert metadata is not None and Image.open(path).size == (32, 32)
