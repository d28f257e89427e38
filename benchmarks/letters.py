"""The letters, from the fonts to a judged model: `letters` and its autoencoder as they are shipped.

    python -m benchmarks.letters letters/            # two hours on two cores; goes on where it was interrupted

Each part is left out where its result lies in the folder already: the pictures (`benchmarks.letters_data`), letters-vae.safetensors,
judge.pt (`benchmarks.letters_judge`), letters.safetensors; then samples are judged and the weights written as float16.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arinar.checkpoint import load_arinar, load_vae, save_arinar, save_vae
from arinar.data import Augment, Dataset, ImageSet, load_dataset
from arinar.train import sample_images, train_arinar, train_vae
from benchmarks import letters_data, letters_judge

#: What both trainings see of it: a font's glyphs leaning and placed a little otherwise.
AUGMENT = Augment(rotation=3, shear=4, scale=0.06, shift=1.5)
VAE = {"steps": 2000, "batch_size": 16, "learning_rate": 2e-3, "kl_weight": 0.02, "eval_every": 500, "save_every": 100}
MODEL = {
    "steps": 4500,
    "batch_size": 32,
    "learning_rate": 1.5e-3,
    "warmup": 200,
    "dropout": 0.05,
    "augmented_copies": 1,
    "eval_every": 500,
    "save_every": 100,
}
#: Of the held-out pictures, every so many choose the weights: all of them would cost more than the training.
EVAL_STRIDE = 9
#: Samples of the judgement, as many of each letter, at the model's default settings.
JUDGED = 1040


def data(folder: Path) -> Dataset:
    """The pictures, the held-out ones thinned to what an evaluation takes."""
    if not (folder / "fonts.tsv").exists():
        letters_data.render(folder)
    whole = load_dataset(folder, img_size=letters_data.SIDE)
    some = ImageSet(whole.held_out.images[::EVAL_STRIDE], whole.held_out.labels[::EVAL_STRIDE])
    return replace(whole, held_out=some, name="letters of Debian's fonts")


def train(folder: Path) -> bool:
    """Autoencoder, judge and model; whether all are there (False: interrupted, the same call goes on)."""
    pictures = data(folder)
    vae, model, judge = folder / "letters-vae.safetensors", folder / "letters.safetensors", folder / "judge.pt"
    if not vae.exists() and not train_vae(vae, config="letters", data=pictures, img_size=64, augment=AUGMENT, **VAE).finished:
        return False
    if not judge.exists():
        torch.save(letters_judge.train(pictures).state_dict(), judge)
    return (
        model.exists() or train_arinar(model, config="letters", data=pictures, vae=vae, augment=AUGMENT, **MODEL).finished
    )


def judged(folder: Path, count: int = JUDGED, seed: int = 0) -> dict[str, Any]:
    """What an independent reader makes of samples, and of held-out fonts: shares in 0..1."""
    reader = letters_judge.load(folder / "judge.pt")
    model, vae = load_arinar(folder / "letters.safetensors"), load_vae(folder / "letters-vae.safetensors")
    labels = torch.arange(count) % letters_judge.CLASSES
    images = sample_images(model, vae, labels, seed=seed)
    read = letters_judge.read(reader, images)[1]
    held_out = load_dataset(folder, img_size=letters_data.SIDE).held_out
    real = letters_judge.read(reader, held_out.images.permute(0, 2, 3, 1).numpy())[1]
    return {
        "agreement": f"{np.mean(read == labels.numpy()):.4f}",
        "agreement_held_out_fonts": f"{np.mean(real == held_out.labels.numpy()):.4f}",
        "judged_samples": str(count),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything is kept")
    parser.add_argument("--threads", type=int, default=None, help="of torch (default: all cores)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if not train(arguments.folder):
        raise SystemExit("interrupted: the same command goes on from here")
    found = judged(arguments.folder)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
