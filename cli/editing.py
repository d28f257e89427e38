"""Subcommands that change pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import RUNTIME, SAMPLING, Labels, open_pipeline, print_json, then
from .group import main

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image

#: Results of one picture, all in one folder.
MOST_RESULTS = 10_000


class Box(click.ParamType):  # type: ignore[type-arg]
    name = "box"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            box = tuple(int(part) for part in value.split(","))
        except ValueError:
            box = ()
        if len(box) != 4:
            self.fail(f"{value!r} is no box; write x0,y0,x1,y1 in pixels, for example 0,0,128,128", param, ctx)
        return box


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--mask", "mask_file", type=click.Path(path_type=Path), help="Picture of the same size: white is generated anew.")
@click.option("--box", type=Box(), metavar="X0,Y0,X1,Y1", help="Instead of a mask: pixels, X1 and Y1 just outside.")
@click.option("--outpaint", is_flag=True, help="The box is what is kept; all around it is generated anew.")
@click.option("--grow", type=int, default=0, show_default=True, help="Tokens more around what is generated anew.")
@click.option(
    "--label",
    "--labels",
    "labels",
    type=Labels(),
    required=True,
    help="Class of the new part, by id or name; several make several results.",
)
@click.option("--per-label", type=click.IntRange(min=1), default=1, show_default=True, help="Results of each label.")
@click.option("--resize", is_flag=True, help="Cut the picture to a square and resize it to the model's size first.")
@click.option("--no-paste", is_flag=True, help="Let the kept part be as the autoencoder makes it, not the pixels themselves.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="PNG file; several results get numbers: out-0.png, out-1.png.",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Results at a time.")
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made, as JSON.")
@SAMPLING
@RUNTIME
def edit(
    bundle: Path,
    image: Path,
    mask_file: Path | None,
    box: tuple[int, ...] | None,
    outpaint: bool,
    grow: int,
    labels: list[int | str],
    per_label: int,
    resize: bool,
    no_paste: bool,
    out: Path,
    batch_size: int | None,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate a part of a picture anew, and leave the rest as it is.

    A token (a square of pixels) is generated anew where any of its pixels is. Ctrl-C leaves the results that were
    finished, and exits with 130.

    \b
    Example:  arinar edit bundle/ photo.png --mask mask.png --label 207 -o edited.png
              arinar edit bundle/ photo.png --box 64,64,192,192 --outpaint --label 207,360 -o wider.png
    """
    if (mask_file is None) == (box is None):
        raise click.UsageError("say what is to be generated anew: --mask FILE or --box X0,Y0,X1,Y1, one of them")
    if outpaint and box is None:
        raise click.UsageError("--outpaint keeps what is in a box: give --box X0,Y0,X1,Y1")
    wanted = [label for label in labels for _ in range(per_label)]
    if len(wanted) > MOST_RESULTS:
        raise ValueError(f"{len(wanted)} results of one picture are too many; expected at most {MOST_RESULTS:,}")
    paths = _paths(out, len(wanted), overwrite)
    pipeline = open_pipeline(bundle, **RUNTIME.of(options))
    picture = _picture(image, pipeline.config.img_size, resize)
    anew = _anew(mask_file, box, outpaint, pipeline.config.img_size)

    from arinar.runtime.edits import Edits

    edits = Edits(
        pipeline,
        picture,
        anew,
        wanted,
        paths,
        grow=grow,
        paste=not no_paste,
        batch_size=batch_size,
        **SAMPLING.of(options),
    )
    from tqdm import tqdm

    with tqdm(total=len(wanted) * edits.steps, unit="step") as bar:
        timings = edits.run(lambda progress: bar.update(len(progress.rows)))
    if as_json:
        print_json(
            {
                "images": [str(path) for path in paths],
                "labels": edits.sampling.classes.shown(),
                "seed": options["seed"],
                "generated_tokens": edits.unknown,
                "timings": timings,
                "backend": pipeline.backend.name,
                "precision": pipeline.precision,
            }
        )
    else:
        where = paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1].name}"
        click.echo(f"{where}: {edits.unknown} of {pipeline.config.seq_len} tokens are new")
        then(f"look at {paths[0]} (--grow 1 takes more of what is around the mask, another --seed makes others)")


def _paths(out: Path, count: int, overwrite: bool) -> list[Path]:
    """The files that results go to. Raises ValueError for a name or place that will not do, or a file that is there."""
    from arinar.files import check_writable

    if out.suffix.lower() != ".png":
        raise ValueError(f"{out} does not end in .png; results are PNG files")
    check_writable(out)
    digits = len(str(count - 1))
    paths = [out] if count == 1 else [out.with_stem(f"{out.stem}-{number:0{digits}d}") for number in range(count)]
    for path in paths:
        if path.exists() and not overwrite:
            raise ValueError(f"{path} is there already; choose another name, or --overwrite")
    return paths


def _picture(path: Path, side: int, resize: bool) -> Image:
    from arinar.runtime.images import read_picture

    return read_picture(path, None if resize else side, "crop or resize it, or --resize")


def _anew(mask_file: Path | None, box: tuple[int, ...] | None, outpaint: bool, side: int) -> npt.NDArray[np.bool_]:
    """(side, side), True where the picture is to be generated anew. Raises ValueError where that is nowhere."""
    from arinar.runtime.editing import as_mask, box_mask
    from arinar.runtime.images import read_picture

    if mask_file is None:
        assert box is not None
        inside = box_mask(box, side)
        anew = ~inside if outpaint else inside
        nothing = "the box keeps the whole picture"
    else:
        anew = as_mask(read_picture(mask_file, side), side)[0]
        nothing = f"{mask_file} is black everywhere"
    if not anew.any():
        raise ValueError(f"{nothing}: nothing is left to generate")
    return anew
