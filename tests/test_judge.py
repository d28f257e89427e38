"""The judge of generated digits: does it tell good samples from bad ones?"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from arinar import judge


def test_classifier_reads_digits_it_never_saw() -> None:
    assert judge.classifier_accuracy() >= 0.98


def test_real_digits_pass() -> None:
    real = judge.real_digits()
    found = judge.judge(real.held_out_images, real.held_out_labels)
    assert found.agreement >= 0.98 and found.images == 297
    assert 0.9 < found.diversity < 1.1
    assert found.novelty == pytest.approx(1.0)


def test_copies_are_found_out() -> None:
    real = judge.real_digits()
    assert judge.nearest_ratio(real.train_images[:50]) < 1e-3


def test_sameness_is_found_out() -> None:
    real = judge.real_digits()
    picks = np.repeat([int(np.flatnonzero(real.train_labels == label)[0]) for label in range(10)], 5)
    assert judge.diversity_ratio(real.train_images[picks], real.train_labels[picks]) < 1e-6


def test_wrong_labels_and_mush_are_found_out() -> None:
    real = judge.real_digits()
    assert judge.agreement(real.held_out_images, (real.held_out_labels + 1) % 10) < 0.05
    mush = np.full((100, 32, 32, 3), 90, np.uint8)
    assert judge.agreement(mush, np.arange(100) % 10) <= 0.1


def test_pairwise_distance_against_a_plain_loop() -> None:
    rows = np.random.default_rng(0).random((7, 5))
    plain = [np.linalg.norm(a - b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    assert judge._mean_pairwise(rows) == pytest.approx(np.mean(plain))
    assert judge._mean_pairwise(rows[:1]) == 0.0


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 32, 32), np.uint8),
        np.zeros((2, 32, 32, 3), np.float32),
        np.zeros((0, 32, 32, 3), np.uint8),
        np.zeros((2, 28, 28, 3), np.uint8),
    ],
)
def test_images_are_checked(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected \\(N, 32, 32, 3\\) uint8"):
        judge.nearest_ratio(images)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2], "one integer per image"),
        ([0.0, 1.0], "one integer per image"),
        ([0, 10], "from 0 to 9"),
        ([-1, 0], "from 0 to 9"),
    ],
)
def test_labels_are_checked(labels: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge.agreement(np.zeros((2, 32, 32, 3), np.uint8), labels)


def test_judge_needs_no_torch() -> None:
    code = "import sys; from arinar import judge; judge.classifier_accuracy(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
