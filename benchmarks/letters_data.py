"""The letters' data: glyphs A to Z of freely licensed fonts, 64 x 64 pixels, ink and paper of many tones.

    python -m benchmarks.letters_data letters/                     # needs apt-get and dpkg-deb (Debian, Ubuntu); not root

Fonts come from Debian's packages (`PACKAGES`; each one's licence lies beside its fonts, in usr/share/doc/PACKAGE/copyright),
which are unpacked under ``letters/.fonts/`` and never installed. ``letters/train/`` and ``letters/val/`` then hold a folder of
PNG files for each letter: every tenth package's fonts are held out, so that a letter is judged on shapes that no model saw.
``letters/fonts.tsv`` lists what was drawn: package, version, licences, file, family, style, split.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PACKAGES = """
    3270 adf-accanthis adf-baskervald adf-berenis adf-gillius adf-ikarius adf-irianis adf-libris adf-mekanus adf-oldania
    adf-romande adf-solothurn adf-switzera adf-tribun adf-universalis adf-verana agave allerta anonymous-pro arapey
    averia-gwf averia-sans-gwf averia-serif-gwf b612 bebas-neue beteckna cabin cantarell cardo clear-sans cmu comfortaa
    comic-neue courier-prime croscore crosextra-caladea crosextra-carlito dancingscript dejavu-core dejavu-extra dosis
    ebgaramond elstob essays1743 eurofurence fanwood fantasque-sans firacode freefont-ttf go goudybookletter hack hermit
    humor-sans inconsolata inter jetbrains-mono junction junicode jura karla kaushanscript lato league-mono league-spartan
    leckerli-one levien-typoscript liberation2 lindenhill linuxlibertine lmodern lobster lobstertwo manrope millimetre
    monofur monoid mononoki national-park noto-mono ocr-a ocr-b okolaks oldstandard open-sans opendin opendyslexic osifont
    oxygen paratype play prociono quattrocento quicksand roadgeek roboto-fontface roboto-slab rufscript sil-andika
    sil-charis sil-doulos sil-gentium sil-gentiumplus sora stix summersby texgyre tiresias tuffy ubuntu-title urw-base35
    vollkorn yanone-kaffeesatz yrsa-rasa
""".split()  # noqa: SIM905
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SIDE = 64
#: Fonts of one package, at most: a family of forty weights is one design. Every HELD_OUT-th package is held out.
FACES = 8
HELD_OUT = 10
#: Pictures of a letter in one font, each in tones and a size of its own.
COPIES = 3
#: Height of a capital, in pixels; drawn OVERSIZE times as large and made smaller, for smooth edges.
CAPITAL = (36.0, 44.0)
OVERSIZE = 4
#: The ends of the tones, RGB in 0..1: an ink between blue and black, a warm paper. All colours lie on the line between them:
#: with hues of their own, an autoencoder of a million weights kept the shapes and lost the hues.
DARK, LIGHT = np.array((0.06, 0.11, 0.24)), np.array((0.99, 0.96, 0.89))


@dataclass(frozen=True)
class Face:
    path: Path
    family: str
    style: str

    def glyph(self, letter: str, size: float) -> Any:
        """A letter's coverage (SIDE, SIDE) in 0..1, its box in the middle; None where it does not fit."""
        font = ImageFont.truetype(str(self.path), round(size * OVERSIZE))
        left, top, right, bottom = font.getbbox(letter)
        full = SIDE * OVERSIZE
        if not 0 < right - left <= full - 8 or not 0 < bottom - top <= full - 8:
            return None
        canvas = Image.new("L", (full, full))
        place = ((full - right - left) / 2, (full - bottom - top) / 2)
        ImageDraw.Draw(canvas).text(place, letter, fill=255, font=font)
        return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 255


def fetch(folder: Path) -> Iterator[tuple[str, str, Path]]:
    """Every package, its version and where it is unpacked; what is there already is not fetched again."""
    (folder / "debs").mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(PACKAGES):
        package = f"fonts-{name}"
        print(f"\r{number + 1}/{len(PACKAGES)} {package:40}", end="", file=sys.stderr, flush=True)
        if not list((folder / "debs").glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", "-qq", package], cwd=folder / "debs", check=True, stdout=subprocess.DEVNULL)
        deb = next((folder / "debs").glob(f"{package}_*.deb"))
        if not (folder / package).is_dir():
            subprocess.run(["dpkg-deb", "-x", str(deb), str(folder / package)], check=True)
        yield package, deb.name.split("_")[1], folder / package
    print(file=sys.stderr)


def licences(copyright_file: Path) -> str:
    """The short names of the licences that a package's copyright file states; "in words" where it has no fields."""
    text = copyright_file.read_text(encoding="utf-8", errors="replace")
    return ", ".join(sorted(set(re.findall(r"(?m)^License: *(\S.*?) *$", text)))) or "in words"


def faces(package: str, folder: Path) -> list[Face]:
    """The fonts of a package that have all capitals, each drawing once: at most FACES, evenly chosen."""
    found: dict[str, Face] = {}
    paths = sorted(path for ending in ("ttf", "otf") for path in folder.rglob(f"*.{ending}") if not path.is_symlink())
    for path in paths:
        try:
            family, style = ImageFont.truetype(str(path), 16).getname()
            face = Face(path, family or "", style or "")
            drawings = [face.glyph(letter, 32) for letter in LETTERS]
            missing = face.glyph("\U000e0101", 32)
        except OSError:
            continue  # no font, or one that FreeType cannot read
        if any(drawing is None or drawing.max() < 0.5 for drawing in drawings):
            continue
        shapes = {drawing.tobytes() for drawing in drawings}
        if len(shapes) < len(LETTERS) or (missing is not None and missing.max() > 0 and missing.tobytes() in shapes):
            continue
        found.setdefault(hashlib.sha256(b"".join(sorted(shapes))).hexdigest(), face)
    all_faces = sorted(found.values(), key=lambda face: face.path.name)
    chosen = np.unique(np.linspace(0, len(all_faces) - 1, min(FACES, len(all_faces))).round().astype(int))
    return [all_faces[index] for index in chosen] if all_faces else []


def tones(rng: np.random.Generator) -> tuple[Any, Any]:
    """Ink and paper, (3,) RGB in 0..1 each: two tones of one scale, two of three dark on light."""
    dark, light = rng.uniform(0.0, 0.35), rng.uniform(0.7, 1.0)
    dark, light = DARK + (LIGHT - DARK) * dark, DARK + (LIGHT - DARK) * light
    return (dark, light) if rng.random() < 2 / 3 else (light, dark)


def draw(face: Face, letter: str, rng: np.random.Generator) -> Image.Image:
    capital = ImageFont.truetype(str(face.path), 100).getbbox("H")
    size = rng.uniform(*CAPITAL) * 100 / (capital[3] - capital[1])
    while (coverage := face.glyph(letter, size)) is None:  # an M that is wider than high
        size *= 0.9
    ink, paper = tones(rng)
    pixels = paper + (ink - paper) * coverage[:, :, None]
    return Image.fromarray(np.rint(pixels * 255).astype(np.uint8))


def render(out: Path, seed: int = 0) -> None:
    """Fetch the fonts, draw every letter of each COPIES times, and list the fonts."""
    for split in ("train", "val"):
        for letter in LETTERS:
            (out / split / letter).mkdir(parents=True, exist_ok=True)
    rows = ["package\tversion\tlicences\tfile\tfamily\tstyle\tsplit"]
    for number, (package, version, folder) in enumerate(fetch(out / ".fonts")):
        split = "val" if number % HELD_OUT == HELD_OUT - 1 else "train"
        terms = licences(folder / "usr/share/doc" / package / "copyright")
        for face in faces(package, folder):
            rows.append("\t".join((package, version, terms, face.path.name, face.family, face.style, split)))
            for index, letter in enumerate(LETTERS):
                for copy in range(COPIES):
                    name = f"{package}-{face.path.stem}-{copy}.png".replace(" ", "_")
                    rng = np.random.default_rng([seed, index, copy, *hashlib.sha256(name.encode()).digest()[:8]])
                    draw(face, letter, rng).save(out / split / letter / name)
    (out / "fonts.tsv").write_text("\n".join(rows) + "\n")
    held_out = sum(row.endswith("\tval") for row in rows)
    print(f"{out}: {len(rows) - 1} fonts ({held_out} held out), {(len(rows) - 1) * len(LETTERS) * COPIES} pictures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="of the tones and sizes")
    arguments = parser.parse_args()
    render(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
