"""The CUDA C++ of this folder, with the constants that Python has for it: what is compiled, and what a cubin is made of."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from arinar import mixture_law
from arinar.config import ArinarConfig

FOLDER = Path(__file__).parent
HEADERS = ("device.cuh", "draw.cuh")
#: Constants of the law that go to the kernels under the names that they have there.
LAW = "CELLS_PER_GAUSSIAN REACH TABLE_NODES NODES EVEN_RANGE SOFT_MIN LOG_TW_MIN LOG_TW_MAX LOGIT_MAX MAX_LEAN TINY SMALL"
#: Threads of a row's block: with the published four Gaussians, one for each cell.
DRAW_THREADS = 256
#: Threads of a block that adds.
ADD_THREADS = 256
#: How many warps of a block of eight divide a column of each product of the inner model: at the published size that makes 72
#: or 96 blocks for every 8 rows. More would occupy more of a large GPU, and read the rows more often than the weights.
SPLITS = {"qkv": 1, "project": 4, "expand": 1, "contract": 4}
#: Rows of a tile, columns of a warp: as in inner.cu.
ROWS, COLUMNS, LANES = 8, 4, 32
#: Gaussians of a mixture, at most: beyond, a row's cells do not fit a block's static shared memory (48 KiB).
MOST_GAUSSIANS = 32


@dataclass(frozen=True)
class Source:
    """A module of kernels: its file in this folder, and its constants as lines of the preprocessor."""

    file: str
    constants: str

    @property
    def name(self) -> str:
        return self.file.removesuffix(".cu")

    @property
    def text(self) -> str:
        return f'{self.constants}#line 1 "{self.file}"\n{(FOLDER / self.file).read_text(encoding="utf-8")}'

    @property
    def headers(self) -> dict[str, str]:
        return {name: (FOLDER / name).read_text(encoding="utf-8") for name in HEADERS}

    @property
    def sha256(self) -> str:
        """Of everything that the compiler reads."""
        parts = [self.file, self.text, *(f"{name}\n{text}" for name, text in self.headers.items())]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def add_source() -> Source:
    """Sums of two buffers."""
    return Source("add.cu", constants({"ADD_THREADS": ADD_THREADS}))


def draw_source(num_gaussians: int, num_candidates: int) -> Source:
    """Draws from mixtures of so many Gaussians, at most MOST_GAUSSIANS; guided ones as the pick of so many proposals."""
    return Source("draw.cu", constants(draw_constants(num_gaussians, num_candidates)))


def draw_constants(num_gaussians: int, num_candidates: int) -> dict[str, float | Iterable[float]]:
    """Of one candidate a guided draw is a plain one: what the plan is made for then does not matter."""
    plan = mixture_law.node_plan(max(2, num_candidates))
    law: dict[str, float] = {name: getattr(mixture_law, name) for name in LAW.split()}
    return {
        "DRAW_THREADS": DRAW_THREADS,
        "GAUSSIANS": num_gaussians,
        "CANDIDATES": num_candidates,
        **law,
        "NODE_TARGETS": plan.targets.tolist(),
        "FIRST_TARGET": float(plan.targets[0]),
        "LAST_OFFSET": plan.offset,
    }


def inner_source(config: ArinarConfig, num_candidates: int, dtype: str) -> Source:
    """A feature of the inner model, its weights, modulation and cache of a type: float32 or float16."""
    return Source(
        "inner.cu",
        constants(
            {
                **draw_constants(config.num_gaussians, num_candidates),
                "NUMBER": {"float32": "float", "float16": "Half"}[dtype],
                "WIDTH": config.inner_width,
                "HEADS": config.inner_heads,
                "HIDDEN": int(config.inner_width * config.inner_mlp_ratio),
                "FEATURES": config.token_dim,
                "MODULATIONS": 6 * config.inner_depth + 2,
                "NORM_EPS": config.norm_eps,
                "ATTENTION_SCALE": config.inner_attention_scale,
                **{f"{name.upper()}_SPLIT": split for name, split in SPLITS.items()},
            }
        ),
    )


def block_columns(product: str) -> int:
    """Columns that a block makes of a product."""
    return DRAW_THREADS // LANES // SPLITS[product] * COLUMNS


def constants(values: Mapping[str, str | float | Iterable[float]]) -> str:
    """As lines of the preprocessor: integers, numbers in float32, lists of these in braces; texts as they are."""
    return "".join(f"#define {name} {_literal(value)}\n" for name, value in values.items())


def _literal(value: str | float | Iterable[float]) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"({value})"
    if isinstance(value, float):
        assert math.isfinite(value)
        return f"({value!r}f)" if "." in repr(value) or "e" in repr(value) else f"({value!r}.0f)"
    return "{" + ", ".join(_literal(item) for item in value) + "}"
