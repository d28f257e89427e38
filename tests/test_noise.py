from __future__ import annotations

import numpy as np
import pytest

from arinar.config import PRESETS
from arinar.runtime import Noise

CONFIG = PRESETS["digits"]


def test_an_images_noise_depends_on_seed_and_index_alone() -> None:
    many = Noise.from_seed(5, range(4), CONFIG)
    alone = Noise.from_seed(5, [2], CONFIG)
    assert (many.order[2] == alone.order[0]).all() and (many.uniforms[2] == alone.uniforms[0]).all()
    assert not (many.order[1] == many.order[2]).all()
    assert not (Noise.from_seed(6, [2], CONFIG).uniforms == alone.uniforms).all()


def test_noise_is_well_formed_and_uniform() -> None:
    noise = Noise.from_seed(0, range(64), CONFIG)
    noise.check(64, CONFIG)
    assert noise.uniforms.dtype == np.float32 and noise.uniforms.min() >= 0 and noise.uniforms.max() < 1
    counts, _ = np.histogram(noise.uniforms, 10, (0, 1))
    expected = noise.uniforms.size / 10
    assert ((counts - expected) ** 2 / expected).sum() < 28  # chi-square, 9 degrees of freedom, p = 0.001


def test_the_same_seed_gives_the_same_noise_on_every_machine() -> None:
    noise = Noise.from_seed(2**64 - 1, [0], CONFIG)
    assert noise.order[0, :6].tolist() == [14, 6, 3, 1, 8, 10]
    assert noise.uniforms[0, 0, 0, 0] == np.float32(0.9304420948028564)


def test_a_causal_models_noise_carries_its_order_reversed() -> None:
    order = tuple(np.random.default_rng(0).permutation(16).tolist())
    config = PRESETS["digits-causal"].replace(order=order)
    noise = Noise.from_seed(1, [0, 1], config)
    assert noise.order[1, ::-1].tolist() == list(order)
    noise.check(2, config)
    with pytest.raises(ValueError, match="causal model's generation order"):
        Noise.from_seed(1, [0, 1], CONFIG).check(2, config)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, "7"])
def test_bad_seeds_are_named(seed: object) -> None:
    with pytest.raises(ValueError, match="seed is .*expected an integer"):
        Noise.from_seed(seed, [0], CONFIG)  # type: ignore[arg-type]


def test_bad_noise_is_refused() -> None:
    good = Noise.from_seed(0, range(2), CONFIG)
    with pytest.raises(ValueError, match=r"order is int64 \(2, 16\); expected int64 \(3, 16\)"):
        good.check(3, CONFIG)
    repeated = good.order.copy()
    repeated[1, 0] = repeated[1, 1]
    with pytest.raises(ValueError, match="order of image 1 is not a permutation"):
        Noise(repeated, good.uniforms).check(2, CONFIG)
    with pytest.raises(ValueError, match=r"order is int64 \(2, 15\)"):
        Noise(good.order[:, 1:], good.uniforms).check(2, CONFIG)
    with pytest.raises(ValueError, match="uniforms is float64"):
        Noise(good.order, good.uniforms.astype(np.float64)).check(2, CONFIG)  # type: ignore[arg-type]
    high = good.uniforms.copy()
    high[0, 0, 0] = 1.0
    with pytest.raises(ValueError, match=r"outside \[0, 1\)"):
        Noise(good.order, high).check(2, CONFIG)
