"""Models to check, and their bundles: given ones, or exported in child processes while the checks run.

python -m benchmarks.gpu.models NAME PRECISION FOLDER        # what a child process does
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from arinar.demo import DEMO_MODELS
from arinar.runtime import Bundle

from .report import Report

ROOT = Path(__file__).resolve().parents[2]


def models(name: str) -> tuple[Any, Any]:
    """A model and its VAE by name: demo models with their weights, presets and tiny ones with random weights."""
    import torch

    from arinar.checkpoint import load_arinar, load_vae
    from arinar.config import ArinarConfig, VaeConfig
    from arinar.model import Arinar, initialize, random_models
    from arinar.vae import AutoencoderKL

    if name in DEMO_MODELS:
        return load_arinar(name), load_vae(name)
    torch.manual_seed(0)  # on a GPU, the reference draws from its generator
    if not name.startswith("tiny"):
        return random_models(name)
    causal = name == "tiny-causal"
    config = ArinarConfig(
        outer="causal" if causal else "masked",
        img_size=32,
        vae_stride=8,
        vae_embed_dim=4,
        num_classes=10,
        buffer_size=3,
        encoder_width=32,
        encoder_depth=0 if causal else 1,
        encoder_heads=2,
        decoder_width=32,
        decoder_depth=1,
        decoder_heads=2,
        inner_width=32,
        inner_heads=2,
        num_gaussians=2,
        default_num_iter=4,
    )
    vae = AutoencoderKL(VaeConfig(4, 8, (1, 1, 1, 1), 1, encoder_attention_levels=(), norm_groups=4))
    return initialize(Arinar(config)).eval(), vae.eval()


def export(name: str, precision: str, out: Path) -> None:
    """Write a bundle; in float16 with its VAE, as the reference under autocast decodes."""
    from arinar.export.bundle import export_bundle

    def say(line: str) -> None:
        print(line, flush=True)

    vae_precision = "fp16" if precision == "fp16" and name not in DEMO_MODELS else "fp32"
    untrained = name not in DEMO_MODELS
    export_bundle(*models(name), out, precision=precision, vae_precision=vae_precision, untrained=untrained, progress=say)


def half_vae(bundle: Bundle, precision: str) -> bool:
    """Whether a bundle's VAE computes in float16."""
    import onnx

    info = bundle.manifest.precision_graphs(precision)["vae_decoder"]
    model = onnx.load(str(bundle.path(info.file)), load_external_data=False)
    kinds = [tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 4]
    return onnx.TensorProto.FLOAT16 in kinds


class Exports:
    """Child processes that export, and their bundles; ``given`` ones are taken as they are."""

    def __init__(self, report: Report, folder: Path, given: dict[str, Path]) -> None:
        self.report, self.folder, self.given = report, folder, given
        self.running: dict[tuple[str, str], tuple[subprocess.Popen[bytes], Path]] = {}

    def start(self, name: str, precision: str) -> None:
        if name in self.given or (name, precision) in self.running:
            return
        log = self.folder / f"{name}-{precision}.log"
        command = [sys.executable, "-m", "benchmarks.gpu.models", name, precision, str(self.path(name, precision))]
        threads = str(max(1, (os.cpu_count() or 1) // 4))  # several run at a time
        environment = {"OMP_NUM_THREADS": threads} | os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        self.running[name, precision] = process, log

    def path(self, name: str, precision: str) -> Path:
        return self.given.get(name, self.folder / f"{name}-{precision}")

    def bundle(self, name: str, precision: str) -> Path:
        """Wait for a bundle. Raises RuntimeError where its export failed, TimeoutError where it takes too long."""
        self.start(name, precision)
        if (name, precision) in self.running:
            process, log = self.running[name, precision]
            if process.poll() is None:
                self.report.say(f"waiting for the export of {name} {precision}")
            try:
                code = process.wait(max(1.0, self.report.left() - 20))
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"the export of {name} {precision} did not finish within the budget") from None
            text = log.read_text(errors="replace")
            if code:
                raise RuntimeError(f"the export of {name} {precision} ended with code {code}: {text[-3000:]}")
            notes = [line for line in text.splitlines() if line.startswith("NOTE")]
            self.report.data.setdefault("exports", {})[f"{name} {precision}"] = {"notes": notes}
        return self.path(name, precision)

    def stop(self) -> None:
        for process, _ in self.running.values():
            if process.poll() is None:
                process.terminate()


if __name__ == "__main__":
    export(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
