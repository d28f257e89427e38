"""An evaluation as text."""

from __future__ import annotations

from arinar.text import aligned

from .evaluate import Estimate, Evaluation


def table(found: Evaluation) -> str:
    """One line a number, what it is in brackets, then what is to be known about them."""
    against = f" against {found.reference}" if found.reference else ""
    lines = [f"{found.images} images of {found.samples}{against}, {found.features} features ({found.width})"]
    if found.weights_sha256:
        lines.append(f"weights SHA-256 {found.weights_sha256}")
    rows = [(name, value, words) for name, value, words in _rows(found) if value]
    lines += aligned(rows)
    lines += [f"note: {note}" for note in found.notes]
    return "\n".join(lines)


def _rows(found: Evaluation) -> list[tuple[str, str, str]]:
    floor = "" if found.floor is None else f"{found.floor:.4g}"
    return [
        ("FID", _with_interval(found.fid), "Frechet distance; 95 % by bootstrap"),
        ("FID floor", floor, "the reference against its own model with another seed"),
        ("KID x 1000", _with_std(found.kid, 1000), "polynomial kernel distance; std over subsets"),
        ("precision", _share(found.precision), "of the images lie in the reference's manifold"),
        ("recall", _share(found.recall), "of the reference's lie in the images' manifold"),
        ("inception score", _with_std(found.inception), "std over parts"),
        ("agreement", _share(found.agreement), "of the digits' independent classifier with the labels"),
        ("pairs, PSNR", "" if found.psnr is None else f"{found.psnr:.1f} dB", "median over images of one seed and index"),
        ("pairs, the same", _share(found.same), "of the images have the same pixels"),
    ]


def _with_interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    if estimate.interval is None:
        return f"{estimate.value:.4g}"
    low, high = estimate.interval
    return f"{estimate.value:.4g}  [{max(low, 0):.4g}, {high:.4g}]"


def _with_std(estimate: Estimate | None, scale: float = 1) -> str:
    if estimate is None:
        return ""
    deviation = "" if estimate.std is None else f" +- {estimate.std * scale:.3g}"
    return f"{estimate.value * scale:.4g}{deviation}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
