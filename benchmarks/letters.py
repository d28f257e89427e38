"""The letters, from the fonts to a judged model: `letters` and its autoencoder.

    python -m benchmarks.letters letters/                   # 3,600 steps: an hour on two cores
    python -m benchmarks.letters letters/ --steps 20000     # better; both go on where they were interrupted

What lies in the folder already is not made again: the pictures (`benchmarks.letters_data`), letters-vae.safetensors,
letters.safetensors, judge.pt (`benchmarks.letters_judge`). Then samples are judged, and both are written to letters/float16/.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from arinar.checkpoint import load_arinar, load_vae, save_arinar, save_vae
from arinar.data import Augment, Dataset, ImageSet, load_dataset
from arinar.train import sample_images, train_arinar, train_vae
from benchmarks import letters_data, letters_judge

#: What both trainings see of it: a font's glyphs leaning and placed a little otherwise.
AUGMENT = Augment(rotation=3, shear=4, scale=0.06, shift=1.5)
#: Of the held-out pictures, every so many choose the weights: all of them would cost more than the training.
EVAL_STRIDE = 9
#: Samples that are judged, as many of each letter, at the model's default settings; and how many at a time.
JUDGED, JUDGE_BATCH = 260, 52


def data(folder: Path) -> Dataset:
    """The pictures, the held-out ones thinned to what an evaluation takes."""
    if not (folder / "fonts.tsv").exists():
        letters_data.render(folder)
    whole = load_dataset(folder, img_size=letters_data.SIDE)
    some = ImageSet(whole.held_out.images[::EVAL_STRIDE], whole.held_out.labels[::EVAL_STRIDE])
    return replace(whole, held_out=some, name="letters of Debian's fonts")


def autoencoder(pictures: Dataset, out: Path) -> bool:
    """Whether it is there (False: interrupted)."""
    return (
        out.exists()
        or train_vae(
            out,
            config="letters",
            data=pictures,
            img_size=letters_data.SIDE,
            steps=2000,
            batch_size=16,
            learning_rate=2e-3,
            kl_weight=0.02,
            augment=AUGMENT,
            eval_every=500,
            save_every=100,
        ).finished
    )


def model(pictures: Dataset, vae: Path, out: Path, steps: int) -> bool:
    """Whether it is there (False: interrupted)."""
    return (
        out.exists()
        or train_arinar(
            out,
            config="letters",
            data=pictures,
            vae=vae,
            steps=steps,
            batch_size=32,
            learning_rate=1.5e-3,
            warmup=200,
            dropout=0.0,
            mask_ratio_min=0.1,  # 64 tokens are few: docs/demo-models.md
            mask_ratio_std=0.5,
            augment=AUGMENT,
            augmented_copies=1,
            eval_every=500,
            save_every=100,
        ).finished
    )


def judged(folder: Path, seed: int = 0) -> dict[str, str]:
    """How many letters an independent reader reads as what they are, of samples and of held-out fonts: shares in 0..1."""
    reader = letters_judge.load(folder / "judge.pt")
    drawn, vae = load_arinar(folder / "letters.safetensors"), load_vae(folder / "letters-vae.safetensors")
    labels = torch.arange(JUDGED) % letters_judge.CLASSES
    parts = enumerate(torch.split(labels, JUDGE_BATCH))
    images = torch.cat([sample_images(drawn, vae, part, seed=seed + index) for index, part in parts])
    real = load_dataset(folder, img_size=letters_data.SIDE).held_out
    right = {
        "agreement": letters_judge.read(reader, images)[1] == labels.numpy(),
        "agreement_held_out_fonts": letters_judge.read(reader, real.images.permute(0, 2, 3, 1))[1] == real.labels.numpy(),
    }
    return {name: f"{np.mean(found):.4f}" for name, found in right.items()} | {"judged_samples": str(JUDGED)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything is kept")
    parser.add_argument("--threads", type=int, help="of torch (default: all cores)")
    parser.add_argument("--steps", type=int, default=3600, help="of the model's training (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    folder, pictures = arguments.folder, data(arguments.folder)
    vae, weights, judge = (folder / name for name in ("letters-vae.safetensors", "letters.safetensors", "judge.pt"))
    if not (autoencoder(pictures, vae) and model(pictures, vae, weights, arguments.steps)):
        raise SystemExit("interrupted: the same command goes on from here")
    if not judge.exists():
        torch.save(letters_judge.train(pictures).state_dict(), judge)
    found = judged(folder)
    print(found)
    half = folder / "float16"
    half.mkdir(exist_ok=True)
    save_vae(half / vae.name, load_vae(vae).half())
    save_arinar(half / weights.name, load_arinar(weights).half(), metadata=found)


if __name__ == "__main__":
    main()
