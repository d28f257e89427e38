"""Classes by name and by none: names that find a class, images of no class, and what files and pictures say of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from arinar.class_names import Classes, imagenet_names
from arinar.config import PRESETS
from arinar.runtime import Pipeline
from arinar.runtime.images import read_metadata
from arinar.runtime.labels import Labels
from arinar.runtime.worklist import Worklist, file_words

BASE, DIGITS = Classes(PRESETS["base"]), Classes(PRESETS["digits"])


def test_imagenet_has_a_thousand_names() -> None:
    names = imagenet_names()
    assert len(names) == 1000 and all(name and name == name.strip() for name in names)
    # What everybody knows by heart of the list: its ends, the two cranes, and some between.
    for label, name in {0: "tench", 1: "goldfish", 207: "golden retriever", 360: "otter", 388: "giant panda", 417: "balloon",
                        980: "volcano", 999: "toilet tissue", 134: "crane", 517: "crane"}.items():  # fmt: skip
        assert names[label].split(",")[0] == name
    assert BASE.guessed and not DIGITS.guessed and Classes(PRESETS["base"].replace(num_classes=999)).names == ()


def test_names_find_their_class_or_the_nearest_are_told() -> None:
    for text, label in {
        "golden retriever": 207,
        "Golden Retriever": 207,
        "tabby cat": 281,
        "great white shark": 2,
        "-1": -1,
    }.items():
        assert BASE.label(text) == label
    for text, words in {
        "crane": r"label is 'crane', which names several classes: give an id, 134 \(crane\), 517 \(crane\)",
        "golden retreiver": r"no class of this model; close to it are 207 \(golden retriever\)",
        "terrier": r"close to it are .*terrier",
        "zxqj": "give an id, 0..999, or a name",
        "-2": "no class of this model",
        "1000": r"this model has classes 0\.\.999",
    }.items():
        with pytest.raises(ValueError, match=words):
            BASE.label(text)


def test_labels_may_be_names_ids_and_weights_by_names() -> None:
    config = PRESETS["base"]
    assert Labels.of(["golden retriever", 360, "otter"], config).shown() == [207, 360, 360]
    assert Labels.of([{"golden retriever": 1, "otter": 3}], config).shown() == [{207: 0.25, 360: 0.75}]
    for labels, words in [
        (["golden retriever", "retreiver"], r"labels\[1\] is 'retreiver', no class"),
        ([{"otter": 1, 360: 1}], r"labels\[0\] is .* in which a class has two names"),
        ([{-1: 1, 3: 1}], "label -1 is out of range"),
        ([-2], "label -2 is out of range; this model has classes 0..999, and -1 for an image of no class"),
        ("otter", "expected a list of integer class ids"),
    ]:
        with pytest.raises(ValueError, match=words):
            Labels.of(labels, config)


def test_words_of_file_names() -> None:
    assert file_words(207, BASE) == "207-golden-retriever" and file_words(5, DIGITS) == "5"
    assert file_words(-1, BASE) == "unconditional" and file_words({3: 0.5, 8: 0.5}, DIGITS) == "3+8"
    odd = Classes(PRESETS["digits"].replace(class_names=("../../etc", "a/b\\c", "\x1b[31m", "名前", "x" * 900, *"56789")))
    assert [file_words(label, odd) for label in range(5)] == ["0-etc", "1-a-b-c", "2-31m", "3", f"4-{'x' * 60}"]


@pytest.mark.parametrize("kind", ["digits", "digits-causal", "digits-mar"])
def test_unconditional_images_are_the_unconditional_branch(kind: str, demo_bundle) -> None:  # type: ignore[no-untyped-def]
    """Whatever guidance is asked for beside them, they are as PyTorch makes them of no class."""
    from arinar.checkpoint import load_arinar
    from arinar.sampler import sample

    with Pipeline.load(demo_bundle(kind)) as pipe:
        mixed = pipe.generate([-1, 3, -1], guidance_scale=4.0, seed=5, batch_size=4)
        alone = pipe.generate([-1], guidance_scale=1.0, seed=5, batch_size=4)
        assert np.array_equal(mixed.tokens[0], alone.tokens[0]) and mixed.labels == [-1, 3, -1]
        assert mixed.images[0].info["class_name"] == "unconditional" and mixed.images[0].info["guidance_scale"] == 1.0
        noise = pipe.resolve([-1], seed=5).batch().noise
        reference = sample(load_arinar(kind), [-1], noise=noise, guidance_scale=1.0)
        assert np.abs(reference.numpy() - alone.tokens).max() < 1e-3


def test_files_and_pictures_say_what_they_are_of(digits_bundle: Path, tmp_path: Path) -> None:
    with Pipeline.load(digits_bundle) as pipe:
        work = Worklist(pipe, [3, {3: 0.5, 8: 0.5}, -1], tmp_path, seed=4)
        work.prepare()
        work.run()
        assert [path.name for path in work.paths] == ["000000-3.png", "000001-3+8.png", "000002-unconditional.png"]
        made = pipe.generate([3, {"3": 1, "8": 1}, -1], seed=4)
        assert [read_metadata(path) for path in work.paths] == [image.info for image in made.images] == work.metadata
    assert made.images[1].info["label"] == {"3": 0.5, "8": 0.5}
