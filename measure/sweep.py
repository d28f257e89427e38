"""The best guidance, temperature and number of steps: the same noise through every setting of a grid, each judged alike.

    FOLDER/sweep.json           what all settings share: model, seed, labels, number of images, features, reference
    FOLDER/scores/NAME.json     what a setting scored; a setting that has a score is not made again
    FOLDER/runs/NAME/           its images, until they are judged (or for good, where they are kept)
    FOLDER/sweep.html           the table and the plots

Image i of every setting begins with the same random numbers, and the bootstrap draws the same images of every set: what two
settings differ by is known better than either score.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arinar.files import check_folder, remove, write_text
from arinar.reading import read_json
from arinar.runtime.bundle import Bundle, Defaults
from arinar.runtime.run import RECORD, Run
from arinar.runtime.sampling import one_process, sample
from arinar.text import shown

from .evaluate import Estimate, Evaluation, Reference, check_count, judge, load_reference, width_of
from .image_sets import open_images, open_reference
from .moments import Source

SHARED, SCORES, RUNS, PAGE = "sweep.json", "scores", "runs", "sweep.html"
#: Relative difference of a reference's moments that is rounding.
ROUNDING = 1e-6


class Setting(NamedTuple):
    """One point of the grid."""

    guidance_scale: float
    temperature: float
    num_iter: int

    @property
    def name(self) -> str:
        """As it can be a file's name."""
        return f"guidance-{self.guidance_scale:.9g}-temperature-{self.temperature:.9g}-steps-{self.num_iter}"


@dataclass(frozen=True)
class Score:
    """What a setting scored. ``behind``: its FID less the best one's; its std is that of the difference, paired."""

    setting: Setting
    evaluation: Evaluation
    behind: Estimate


@dataclass(frozen=True)
class Sweep:
    """All scores, the best first; what was compared, and how."""

    scores: list[Score]
    reference: str
    shared: dict[str, Any]

    @property
    def best(self) -> Setting:
        return self.scores[0].setting

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rows = [
            {**score.setting._asdict(), **score.evaluation.to_dict(), "behind": asdict(score.behind)} for score in self.scores
        ]
        return {"best": self.best._asdict(), "reference": self.reference, "shared": self.shared, "scores": rows}


def grid(
    bundle: Bundle,
    guidance: Sequence[float] | None = None,
    temperature: Sequence[float] | None = None,
    num_iter: Sequence[int] | None = None,
) -> list[Setting]:
    """Every combination; what is None is the bundle's default. Raises ValueError where a value is named twice."""
    config, defaults = bundle.manifest.config, bundle.manifest.defaults
    steps_of_all = config.seq_len if config.outer == "causal" else defaults.num_iter
    axes = {
        "guidance": guidance or [defaults.guidance_scale],
        "temperature": temperature or [defaults.temperature],
        "num_iter": num_iter or [steps_of_all],
    }
    for name, values in axes.items():
        if len(set(values)) < len(values):
            raise ValueError(f"{name} is {shown(list(values))}; expected every value once")
    return [Setting(float(scale), float(heat), int(steps)) for steps, heat, scale in product(*reversed(axes.values()))]


def sweep(
    bundle: Bundle,
    folder: Path,
    settings: Sequence[Setting],
    num_images: int,
    reference: str,
    *,
    features: str | Callable[[Any], Any] = "builtin",
    weights: Path | None = None,
    bootstrap: int = 100,
    keep_images: bool = False,
    workers: Any = one_process,
    progress: Callable[[str], object] = lambda line: None,
    **arguments: Any,
) -> Sweep:
    """Make and judge ``num_images`` images of every setting. ``arguments``: of `Run.of`. The rest: as `evaluate` has them.

    Raises ValueError for a setting that the model does not take, a reference that does not fit, a folder of another sweep: all
    before the first image is made.
    """
    check_folder(folder)
    runs = {setting: Run.of(bundle, num_images, **arguments, **setting._asdict()) for setting in settings}
    source = Source(features, bundle.manifest.config, weights)
    width = width_of(source)
    check_count("a setting", num_images, width)
    progress(f"features of {reference}")
    goal = load_reference(reference, *open_reference(reference), source, width, workers)
    shared = _open(folder, next(iter(runs.values())), goal, source, bootstrap)
    found = []
    for number, (setting, run) in enumerate(runs.items(), 1):
        path = folder / SCORES / f"{setting.name}.json"
        evaluation, had = _read_score(path), "there already"
        if evaluation is None:
            place, had = folder / RUNS / setting.name, "made"
            sample(bundle, place, run, workers=workers, npz=False)
            evaluation = judge(open_images(str(place)), goal, source, bootstrap=bootstrap, workers=workers)
            path.parent.mkdir(exist_ok=True)
            write_text(path, json.dumps(evaluation.to_dict(), indent=2, sort_keys=True) + "\n")
            if not keep_images:
                remove(place)
        progress(f"[{number}/{len(runs)}] {describe(setting)}: FID {_fid(evaluation):.4g} ({had})")
        found.append((setting, evaluation))
    return Sweep(ranked(found), reference, shared)


def ranked(found: Sequence[tuple[Setting, Evaluation]]) -> list[Score]:
    """The best first, each with what it is behind it."""
    order = sorted(found, key=lambda pair: _fid(pair[1]))
    best = order[0][1]
    scores = []
    for setting, evaluation in order:
        std = None
        mine, theirs = np.array(evaluation.replicates), np.array(best.replicates)
        if len(mine) == len(theirs) > 1:
            std = float(np.std(mine - theirs, ddof=1))
        scores.append(Score(setting, evaluation, Estimate(_fid(evaluation) - _fid(best), std)))
    return scores


def describe(setting: Setting) -> str:
    return f"guidance {setting.guidance_scale:g}, temperature {setting.temperature:g}, {setting.num_iter} steps"


def with_best(defaults: Defaults, best: Setting) -> Defaults:
    return Defaults(best.num_iter, best.guidance_scale, defaults.cfg_schedule, best.temperature)


def _fid(evaluation: Evaluation) -> float:
    assert evaluation.fid is not None
    return evaluation.fid.value


def _open(folder: Path, run: Run, goal: Reference, source: Source, bootstrap: int) -> dict[str, Any]:
    """Begin a sweep in a folder, or go on with it -> what its settings share. Raises ValueError where it is another."""
    own = ("guidance_scale", "temperature", "num_iter")
    settings = {name: value for name, value in run.settings.items() if name not in own}
    moments = goal.moments
    shared = {
        **{name: value for name, value in asdict(run).items() if name != "settings"},
        **settings,
        "labels": list(run.labels),
        "features": source.name,
        "bootstrap": bootstrap,
        "reference": {"mean": float(np.abs(moments.mean).sum()), "trace": float(np.trace(moments.covariance))},
    }
    path = folder / SHARED
    if not path.exists():
        if (folder / RECORD).exists():
            raise ValueError(f"{folder} holds a run of `arinar sample`; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(shared, indent=2, sort_keys=True) + "\n")
        return shared
    try:
        there = dict(read_json(path))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no record of a sweep ({error}); choose another folder") from error
    for name, value in shared.items():
        if not _same(there.get(name), value):
            raise ValueError(
                f"{folder} holds another sweep: {name} was {shown(there.get(name))} and is {shown(value)}; choose another "
                f"folder"
            )
    return shared


def _same(there: Any, asked: Any) -> bool:
    if isinstance(asked, dict):
        return isinstance(there, dict) and all(_same(there.get(name), value) for name, value in asked.items())
    if isinstance(asked, float) and isinstance(there, (int, float)):
        return abs(there - asked) <= ROUNDING * max(abs(asked), 1e-12)
    return bool(there == asked)


def _read_score(path: Path) -> Evaluation | None:
    """None where there is none, or it is damaged: it is made again."""
    try:
        return Evaluation.from_dict(read_json(path))
    except (OSError, ValueError, TypeError, KeyError):
        return None
