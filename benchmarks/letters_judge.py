"""A judge of letters that knows nothing of the models: a small convolutional network, trained on the fonts that models are
trained on and tried on fonts that it never saw.

    python -m benchmarks.letters_judge letters/ -o letters-judge.pt      # some minutes

It sees luminance alone, standardised per picture, so that colours do not decide; ink may be lighter than paper.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from arinar.data import Augment, Dataset, load_dataset, to_float

CLASSES, SIDE, FEATURES = 26, 64, 128
LUMINANCE = (0.2126, 0.7152, 0.0722)


class Reader(nn.Module):
    """Float images (N, 3, 64, 64) in [-1, 1] -> logits (N, 26); the layer before them has FEATURES values."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 24, 48, 96, FEATURES)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b)) for a, b in itertools.pairwise(widths)
        )  # fmt: skip
        self.last = nn.Linear(FEATURES * 4, FEATURES)
        self.logits = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """(N, FEATURES)."""
        grey = (images * torch.tensor(LUMINANCE, device=images.device)[:, None, None]).sum(1, keepdim=True)
        grey = F.avg_pool2d(grey, 2)
        grey = (grey - grey.mean((1, 2, 3), keepdim=True)) / (grey.std((1, 2, 3), keepdim=True) + 1e-3)
        for layer in self.layers:
            grey = F.max_pool2d(F.relu(layer(grey)), 2)
        return F.relu(self.last(grey.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.logits(F.dropout(self.features(images), 0.2, self.training))
        return logits


def train(data: Dataset, *, epochs: int = 4, batch_size: int = 128, seed: int = 0) -> Reader:
    torch.manual_seed(seed)
    reader, augment = Reader(), Augment(rotation=8, shear=8, scale=0.15, shift=4)
    images, labels = data.train.images, data.train.labels
    steps = epochs * (len(labels) // batch_size)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3, weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), unit="step"):
        rows = torch.randint(len(labels), (batch_size,), generator=generator)
        logits = reader(augment(to_float(images[rows]), generator))
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return reader.eval()


@torch.no_grad()
def read(reader: Reader, images: Any) -> tuple[Any, Any]:
    """Images (N, 64, 64, 3) uint8 -> features (N, FEATURES) float32, labels (N,)."""
    parts = torch.split(torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2), 256)
    found = torch.cat([reader.features(to_float(part)) for part in parts])
    return found.numpy(), reader.logits(found).argmax(1).numpy()


def load(path: Path) -> Reader:
    reader = Reader()
    reader.load_state_dict(torch.load(path, weights_only=True))
    return reader.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that benchmarks.letters_data made")
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()
    data = load_dataset(arguments.data, img_size=SIDE)
    reader = train(data)
    torch.save(reader.state_dict(), arguments.out)
    for name, part in (("training fonts", data.train), ("held-out fonts", data.held_out)):
        found = read(reader, part.images.permute(0, 2, 3, 1).numpy())[1]
        print(f"{name}: {np.mean(found == part.labels.numpy()):.1%} of {len(found)}")


if __name__ == "__main__":
    main()
