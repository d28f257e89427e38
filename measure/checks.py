"""What a parity run found: limits, checks against them, and the report that holds both with the curves behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from arinar.text import aligned

if TYPE_CHECKING:
    from .distribution import Distribution

Array = npt.NDArray[Any]

#: The levels, in the order in which they are run.
LEVELS = ("graph", "teacher-forced", "free-running", "distribution")
#: Checks of an edit have the names that those of level 3 have, after this.
EDIT = "edit: "
# A feature of a token parts where it differs by more than this share of the largest value of all tokens (at least 1).
PARTED = 1e-3
# Levels 2 and 3 are judged beside a control, where one was run: the reference in float32 against itself in float64, the
# same noise. Errors may be so many times the control's where that is above their limit. Kernels that add in another
# order err as PyTorch's float32 does, half of them less; but a largest error is a matter of chance: of twelve harsh
# random models the worst mean divergence was 42 times the control's, an error of 6.5 times. One weight wrong by a
# twentieth gives 200 times and more (tests/test_parity.py).
CONTROL_FACTOR = 8.0
KL_FACTOR = CONTROL_FACTOR**2  # a divergence goes with the square of the errors


@dataclass(frozen=True)
class Thresholds:
    """Limits. Errors, ``absolute`` apart, are relative to the largest value of an output where that is above 1.

    No limit at all: infinity, or 0 where a value must be at least its limit.
    """

    graph: float = 1e-4
    sampled_graph: float = 5e-3  # graphs that end in a draw: a small error may be steep in the tails
    token: float = 2e-4  # graphs that draw a whole token, one feature from another: for three in four features
    z: float = 1e-4
    mixture: float = 1e-4  # of the parameters of a draw's law
    absolute: float = 1e-4  # of z and those parameters
    kl: float = 1e-5  # of the worst draw
    mean_kl: float = 1e-7
    # Share of drawn features that both sides' mixtures ascribe to the same component: of the same tokens (level 2), and
    # each side of its own (level 3).
    same_component: float = 0.999
    same_picks: float = 0.999
    # Share of the free-running images that must lie within one grey level everywhere; median PSNR in dB.
    same_images: float = 0.99
    psnr: float = 45.0
    # Distribution: how much less often the classifier may agree (beyond two standard errors), Frechet distance
    # relative to that of two PyTorch runs (to other noise; to the same noise), p-value of the discrepancy, distance to
    # given statistics against PyTorch's.
    agreement_drop: float = 0.01
    frechet_ratio: float = 1.5
    paired_ratio: float = 0.1
    mmd_p: float = 0.005
    stats_ratio: float = 1.1


# 8 bits. Largest errors depend on how far the tails were looked at; what counts is in the mixtures' mean divergence
# (`arinar calibrate` keeps it within a budget) and in level 4.
QUANTIZED = Thresholds(
    graph=0.5,
    sampled_graph=2.0,
    token=0.5,
    z=0.1,
    mixture=0.5,
    absolute=math.inf,
    kl=0.5,
    mean_kl=2e-3,
    same_component=0.97,
    same_picks=0.8,
    same_images=0.0,
    psnr=0.0,
    paired_ratio=math.inf,
)

_DEMO = "measured on the demo models, with room"
_DEMO_8 = f"{_DEMO}; other weights bear 8 bits otherwise: there the mean kl and level 4 (many images) tell"
#: Scheme -> where its limits come from, as a report says it.
ORIGINS = {
    "fp32": "set by what float32's rounding leaves on trained weights, the demo models' among them",
    "fp16": f"{_DEMO} for GPUs and deeper models",
    "bf16": "measured on the demo models and on random weights of the published size, with room",
    "int8": _DEMO_8,
    "int8-static": _DEMO_8,
    "fp8": _DEMO_8,
}

#: By scheme; see `ORIGINS`.
THRESHOLDS = {
    "fp32": Thresholds(),
    # Measured in ONNX Runtime on the CPU: graph 7e-4, z 5.3e-4, mixture 1.8e-3, kl 8.8e-5 (draws stay in float32). The
    # room is for GPUs, which accumulate and fuse in another order, and for deeper models.
    "fp16": Thresholds(
        graph=1e-2,
        sampled_graph=5e-3,
        token=0.1,
        z=1e-2,
        mixture=2e-2,
        absolute=math.inf,
        kl=1e-3,
        mean_kl=1e-4,
        same_component=0.99,
        same_picks=0.9,
        same_images=0.0,
        psnr=25.0,
        paired_ratio=math.inf,
    ),
    # Measured in OpenVINO 2026.4 on an AMD EPYC with AVX512-BF16, the worst of the demo models (three seeds, ten images
    # each) and, in brackets, of random weights of the published size (one image in 4 steps): transformers' graphs 7e-3
    # (9e-3), the VAE's decoder 2 grey levels (16) and encoder 8e-3 (0.018), z 3.6e-3 (0.010), mixture 1.6e-2 (0.021), kl
    # 1e-3 (0.027), mean kl 1.2e-5 (6e-4), same component 0.998 (0.998), same picks 0.996 (0.85), median PSNR 51 dB (15:
    # such weights send errors apart). Heads and draws stay in float32.
    "bf16": replace(
        QUANTIZED, graph=0.1, sampled_graph=5e-3, token=2e-4, z=3e-2, mixture=5e-2, kl=0.1, same_component=0.99, same_picks=0.7
    ),
    "int8": QUANTIZED,
    "int8-static": QUANTIZED,
    "fp8": replace(
        QUANTIZED, graph=0.8, token=0.8, z=0.5, mixture=0.8, kl=1.0, mean_kl=1e-2, same_component=0.95, same_picks=0.7
    ),
}


def parse_thresholds(given: Sequence[str], scheme: str) -> Thresholds:
    """The limits of a scheme with some overridden: ["z=1e-3", ...]. Raises ValueError for an unknown name, or what
    is not a number of at least 0."""
    base = THRESHOLDS[scheme]
    changes: dict[str, float] = {}
    for item in given:
        name, _, value = item.partition("=")
        if name not in asdict(base):
            raise ValueError(f"no threshold {name!r}; there are {', '.join(asdict(base))}")
        try:
            changes[name] = float(value)
        except ValueError:
            raise ValueError(f"threshold {item!r} has no number; write for example {name}=1e-3") from None
        if not changes[name] >= 0:
            raise ValueError(f"threshold {item!r} is not a limit; expected a number of at least 0, for example {name}=1e-3")
    return replace(base, **changes)


@dataclass(frozen=True)
class Check:
    """One line of the table: ``value`` must be at most ``limit`` (at least, where ``at_least``).

    ``step``: the first outer step beyond the limit. ``where``: more exactly, what is. ``control``: the value that float32
    has against float64 in the same place, where that was computed; ``widened``: ``limit`` is the control's, not the
    precision's own.
    """

    level: str
    name: str
    value: float
    limit: float | None
    at_least: bool = False
    note: str = ""
    step: int | None = None
    where: str = ""
    control: float | None = None
    widened: bool = False

    @property
    def quantity(self) -> str:
        """What it measures, of an edit too."""
        return self.name.removeprefix(EDIT)

    @property
    def passed(self) -> bool:
        if self.limit is None:
            return True
        return bool(self.value >= self.limit) if self.at_least else bool(self.value <= self.limit)

    def beside(self, control: float, allowed: float, held: bool = False) -> Check:
        """The same beside the control's value, which leaves so wide a limit: that counts where the own one is
        exceeded, unless ``held``."""
        shown = replace(self, control=control, note=f"{self.note}; float32 against float64 {control:.3g}".lstrip("; "))
        wider = self.limit is not None and (allowed < self.limit if self.at_least else allowed > self.limit)
        if held or self.passed or not wider:
            return shown
        note = f"{shown.note}, limit widened from {self.limit:g}"
        note += "" if allowed else ": nothing is left to fail here"
        return replace(shown, limit=allowed, widened=True, note=note)


def most(limit: float, control: float, factor: float = CONTROL_FACTOR) -> float:
    """The limit of an error beside the control's. A control that is not finite widens nothing."""
    return max(limit, factor * control) if math.isfinite(control) else limit


def least(control: float) -> float:
    """What a share of those that agree must be at least: so many times as many may differ as in the control."""
    return max(0.0, 1 - CONTROL_FACTOR * (1 - control))


@dataclass
class ParityReport:
    """Checks in the order they were made, and the curves behind them (outer step -> value)."""

    precision: str
    backend: str
    settings: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    # "z", the parts of the law, "kl": largest; "z mean", ...: mean.
    curves: dict[str, list[float]] = field(default_factory=dict)
    images: dict[str, Array] = field(default_factory=dict)
    # (outer step, draw) tables: largest and mean error of each part of the law ("mu", "mu mean"), mean divergence ("kl").
    tables: dict[str, list[list[float]]] = field(default_factory=dict)
    # Name -> counts per bin.
    histograms: dict[str, list[int]] = field(default_factory=dict)
    distribution: Distribution | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    thresholds: Thresholds | None = None
    # What a reader should know besides the checks.
    notes: list[str] = field(default_factory=list)
    scheme: str = "fp32"
    # Names of the parts of the law, and what each is.
    parts: dict[str, str] = field(default_factory=dict)
    # What is drawn at one time (`arinar.law.Law`).
    draw: str = "feature"
    # Of float32 against float64, where that was run: "curves", "tables", "histograms", as above.
    control: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def limited(self) -> int:
        """How many of the checks can fail."""
        return sum(check.limit is not None for check in self.checks)

    @property
    def widened(self) -> list[Check]:
        """The checks whose limit the control has widened."""
        return [check for check in self.checks if check.widened]

    @property
    def remarks(self) -> list[str]:
        """Notes, then what the control and the limits have to say."""
        found = list(self.notes)
        if self.control:
            found.append(f"control: {self._control_said()}")
        for name, (usual, now) in self.changed_limits.items():
            found.append(f"the limit {name} was set to {now:g}; {self.precision}'s is {usual:g}")
        if self.thresholds is not None:
            found.append(f"limits of {self.precision}: {ORIGINS[self.scheme]}")
        return found

    def _control_said(self) -> str:
        beyond = [c for c in self.failed if c.control is not None]
        if not self.widened:
            said = "PyTorch in float32 stays near PyTorch in float64 on these weights, no limit was widened"
            return f"{said}; float32's rounding does not explain what failed" if beyond else said
        names = ", ".join(f"{check.name} (level {LEVELS.index(check.level) + 1})" for check in self.widened)
        said = (
            f"float32 itself parts that far on these weights: limits widened to {CONTROL_FACTOR:g} times the error of PyTorch"
        )
        said += f" in float32 against float64, of {names}"
        return f"{said}; what failed lies beyond that" if beyond else said

    @property
    def changed_limits(self) -> dict[str, tuple[float, float]]:
        """Limits that are not the precision's own: name -> default, what it was set to."""
        if self.thresholds is None:
            return {}
        usual, now = asdict(THRESHOLDS[self.scheme]), asdict(self.thresholds)
        return {name: (usual[name], value) for name, value in now.items() if value != usual[name]}

    @property
    def first_failure(self) -> Check | None:
        """What failed first: by level, then by outer step, then in the order of the data's way through the model."""

        def order(check: Check) -> tuple[int, float]:
            level = LEVELS.index(check.level) if check.level in LEVELS else len(LEVELS)
            return level, math.inf if check.step is None else check.step

        return min(self.failed, key=order, default=None)

    @property
    def first_divergence(self) -> str | None:
        """In words: level, graph or quantity, outer step."""
        check = self.first_failure
        if check is None:
            return None
        number = f"level {LEVELS.index(check.level) + 1}, " if check.level in LEVELS else ""
        at = "" if check.step is None else f", outer step {check.step}"
        return f"{number}{check.level}: {check.name}{at}{f', {check.where}' if check.where else ''}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON: a number that is not finite is None."""
        found = {
            "precision": self.precision,
            "backend": self.backend,
            "settings": self.settings,
            "passed": self.passed,
            "first_divergence": self.first_divergence,
            "checks": [asdict(check) | {"passed": check.passed} for check in self.checks],
            "changed_limits": self.changed_limits,
            "limits": None if self.thresholds is None else ORIGINS[self.scheme],
            "notes": self.remarks,
            "curves": self.curves,
            "tables": self.tables,
            "histograms": self.histograms,
            "control": self.control | {"factor": CONTROL_FACTOR} if self.control else None,
            "distribution": None if self.distribution is None else asdict(self.distribution),
            "provenance": self.provenance,
        }
        return {key: _finite(value) for key, value in found.items()}

    def table(self) -> str:
        """The checks as aligned text, one line each, with a verdict."""
        rows = [("level", "check", "value", "limit", "")]
        for check in self.checks:
            limit = "" if check.limit is None else f"{'>=' if check.at_least else '<='} {check.limit:g}"
            verdict = "" if check.limit is None else ("ok" if check.passed else "FAIL")
            rows.append((check.level, check.name, f"{check.value:.3g}", limit, f"{verdict}  {check.note}".rstrip()))
        lines = aligned(rows)
        lines.insert(1, "-" * max(map(len, lines)))
        lines += [f"note: {note}" for note in self.remarks]
        if self.passed:
            widened = f", {len(self.widened)} of them by limits that the control widened" if self.widened else ""
            lines.append(f"all {self.limited} checks passed{widened}")
        else:
            lines.append(f"first divergence: {self.first_divergence}")
            lines.append(f"{len(self.failed)} of {self.limited} checks FAILED")
        return "\n".join(lines)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
