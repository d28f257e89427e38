"""The kernels of our own beside `arinar.runtime.gmm`: what only a GPU shows, as the tests run the same source on the CPU."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from arinar.runtime import gmm
from arinar.runtime.backends.cuda import Cuda
from arinar.runtime.kernels.draw import draw_kernel

from .device import Stopwatch, expect
from .session import Session

#: Largest error of a draw, in units of its mixture's values (about 1).
MOST_ERROR = 1e-4
ROWS = 1024
#: That are timed one after another.
LAUNCHES = 100
#: Of the mixtures: the published models'.
NUM_GAUSSIANS, NUM_CANDIDATES = 4, 1000


def check(session: Session) -> None:
    report = session.report
    with report.check("kernels: compile and load the draw", "see the message: NVRTC, the GPU's architecture"):
        cuda = Cuda()
        with tempfile.TemporaryDirectory(prefix="arinar-kernels-") as folder:
            kernel = draw_kernel(cuda, NUM_GAUSSIANS, NUM_CANDIDATES, Path(folder))
        draws = Draws(cuda, kernel)
        for guided in (True, False):
            with report.check(f"kernels: draws, {'guided' if guided else 'plain'}", "runtime/kernels/draw.cu"):
                error = float(np.abs(draws(guided) - draws.reference(guided)).max())
                report.add("kernels", {"kernel": "mixture_draw", "guided": guided, "rows": ROWS, "worst_error": error})
                if not error <= MOST_ERROR:
                    raise AssertionError(f"a draw is off by {error:.2g}; at most {MOST_ERROR:g} was expected")
        with report.check("kernels: a row's bits whatever is beside it", "runtime/kernels/draw.cu: order of the sums"):
            whole = draws(True)
            for row in (0, 1, ROWS - 1):
                expect(draws(True, slice(row, row + 1)), whole[row : row + 1])
        with report.check("kernels: captured and replayed", "runtime/backends/cuda.py: launch_kernel"):
            draws.replay()
        with report.check("kernels: time", ""):
            report.data["draw_kernel_us"] = {rows: round(draws.microseconds(rows), 2) for rows in (1, 64, ROWS)}
            report.say(f"a guided draw, microseconds by rows: {report.data['draw_kernel_us']}")


class Draws:
    """Random mixtures, uniforms, guidance and temperature of ROWS rows, and their draws by the kernel."""

    def __init__(self, cuda: Cuda, kernel: Any) -> None:
        self.cuda, self.kernel = cuda, kernel
        rng = np.random.default_rng(0)
        self.mixtures = np.stack([self._mixtures(rng), self._mixtures(rng)])  # (2, 3, N, K), conditional ones first
        self.uniforms = rng.random(ROWS, np.float32)
        self.scale = rng.uniform(1, 6, ROWS).astype(np.float32)
        self.temperature = rng.uniform(0.5, 1.5, ROWS).astype(np.float32)

    @staticmethod
    def _mixtures(rng: np.random.Generator) -> Any:
        weight = rng.dirichlet(np.ones(NUM_GAUSSIANS), ROWS)
        mu, logvar = rng.normal(size=weight.shape), rng.uniform(-4, 0.5, weight.shape)
        return np.stack([weight, mu, logvar]).astype(np.float32)

    def __call__(self, guided: bool, rows: slice = slice(None)) -> Any:
        """(rows,) draws."""
        arguments = self._arguments(guided, rows)
        self.kernel(*arguments)
        return self._drawn(arguments)

    def reference(self, guided: bool) -> Any:
        """The same in float64."""
        cond, uncond = (tuple(branch.astype(np.float64)) for branch in self.mixtures)
        given = [value.astype(np.float64) for value in (self.uniforms[:, None], self.scale, self.temperature)]
        return gmm.sample(
            cond,
            uncond if guided else None,
            given[0],
            guidance_scale=given[1] if guided else 1.0,
            temperature=given[2],
            num_candidates=NUM_CANDIDATES,
        )

    def replay(self) -> None:
        """Recorded, replayed twice: the same bits as plainly launched."""
        want, arguments = self(True), self._arguments(True, slice(None))
        self.cuda.begin_capture()
        try:
            self.kernel(*arguments)
            graph = self.cuda.end_capture()
        except BaseException:
            self.cuda.abandon_capture()
            raise
        for _ in range(2):
            self.cuda.clear(arguments[4])
            self.cuda.launch_graph(graph)
            expect(self._drawn(arguments), want)
        self.cuda.destroy_graph(graph)

    def microseconds(self, rows: int) -> float:
        arguments, watch = self._arguments(True, slice(rows)), Stopwatch(self.cuda)
        self.kernel(*arguments)
        watch.mark()
        for _ in range(LAUNCHES):
            self.kernel(*arguments)
        watch.mark()
        return 1e3 * watch.milliseconds()[0] / LAUNCHES

    def _arguments(self, guided: bool, rows: slice) -> list[Any]:
        branches = self.mixtures[: 2 if guided else 1, :, rows]
        count = branches.shape[2]
        parts = {
            name: self._upload(np.concatenate([branch[place] for branch in branches]))
            for place, name in enumerate(("weight", "mu", "logvar"))
        }
        scale = self._upload(self.scale[rows]) if guided else None
        feature = self.cuda.empty((len(branches) * count, 1), "float32")
        tokens = self.cuda.empty((count, 1), "float32")
        return [parts, self._upload(self.uniforms[rows]), scale, self._upload(self.temperature[rows]), feature, tokens, 0]

    def _drawn(self, arguments: list[Any]) -> Any:
        """What both outputs hold, which must be the same."""
        feature, tokens = (self.cuda.download(buffer).ravel() for buffer in arguments[4:6])
        for start in range(0, len(feature), len(tokens)):
            expect(feature[start : start + len(tokens)], tokens)
        return tokens

    def _upload(self, values: Any) -> Any:
        buffer = self.cuda.empty(values.shape, "float32")
        self.cuda.upload(np.ascontiguousarray(values), buffer)
        return buffer
