"""A server under load against a loop over `Pipeline.generate`: throughput, latency, how full the micro-batches are, memory.

    python -m benchmarks.serve BUNDLE --minutes 5 --json out.json

The server is `arinar serve` in a process of its own. Requests of all kinds (1 to 4 images, labels, seeds, guided or not, two
numbers of steps) arrive at random times, whether earlier ones are answered or not (open loop), at shares of what the loop makes
in the same time. The loop takes the same requests one after another, all cores for each: its times are measured, its latencies
follow from them and the arrivals. Every picture of every answer is compared with the direct call that it must equal. With
``--leaving SHARE`` so many clients go away within two seconds, which is not counted among the answers.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from arinar.files import check_writable, write_text
from arinar.measure.bench import fresh_environment
from arinar.runtime import Pipeline
from arinar.runtime.machine import machine

from .scaling import resident_bytes, slope

#: Different requests; what arrives is drawn from them, so that every picture's reference is made once.
WISHES = 48
#: Seconds that a client who goes away has waited, at most.
PATIENCE = 2.0
#: Threads that wait for answers.
CLIENTS = 256


def say(line: str) -> None:
    click.echo(line, err=True)


@dataclass(frozen=True)
class Wish:
    """A request, and the hashes of the pictures that its answer must hold."""

    body: dict[str, Any]
    pictures: list[str]
    seconds: float  # of the loop's call

    @property
    def count(self) -> int:
        return len(self.pictures)


def wishes(pipeline: Pipeline, size: int, seed: int) -> list[Wish]:
    """Requests of all kinds, each timed in the loop, their references made as the server's contract says."""
    draw, made = random.Random(seed), []
    usual = pipeline.resolve([0]).num_iter
    for number in range(WISHES):
        labels = [draw.randrange(pipeline.config.num_classes)] * draw.choice((1, 1, 2, 4))
        sampling: dict[str, Any] = {"guidance_scale": draw.choice((1.0, 3.0, 4.5)), "temperature": draw.choice((0.9, 1.0))}
        if pipeline.config.outer == "masked":
            sampling["num_iter"] = draw.choice((usual, usual, usual, max(1, usual // 2)))
        pipeline.generate(labels, seed=number, **sampling)  # warm
        began = time.perf_counter()
        pipeline.generate(labels, seed=number, **sampling)
        seconds = time.perf_counter() - began
        alone = (
            pipeline.generate([label], seed=number, indices=[index], batch_size=size, **sampling).images[0]
            for index, label in enumerate(labels)
        )
        made.append(Wish({"labels": labels, "seed": number} | sampling, [digest(image) for image in alone], seconds))
    return made


def digest(image: Image.Image) -> str:
    return hashlib.sha256(np.asarray(image).tobytes()).hexdigest()


class Client:
    """Asks a server, and checks what it answers."""

    def __init__(self, port: int) -> None:
        self.port, self.lock, self.wrong, self.refused, self.gone = port, threading.Lock(), 0, 0, 0

    def get(self, path: str) -> bytes:
        return self._ask("GET", path, None)[1]

    def _ask(self, method: str, path: str, body: bytes | None, timeout: float = 600) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def take(self, wish: Wish, arrived: float, patience: float | None) -> float | None:
        """Seconds from a request's arrival to its answer; None where it was refused, or not waited for any longer."""
        try:
            status, data = self._ask("POST", "/v1/images/generations", json.dumps(wish.body).encode(), patience or 600)
        except TimeoutError:
            with self.lock:
                self.gone += 1
            return None
        seconds = time.perf_counter() - arrived
        if status != 200:
            with self.lock:
                self.refused += 1
            return None
        images = [Image.open(io.BytesIO(base64.b64decode(datum["b64_json"]))) for datum in json.loads(data)["data"]]
        if [digest(image) for image in images] != wish.pictures:
            with self.lock:
                self.wrong += 1
        return seconds

    def counters(self) -> dict[str, float]:
        found = {}
        for line in self.get("/metrics").decode().splitlines():
            if line.startswith(
                ("arinar_images_total", "arinar_batches_total", "arinar_batch_fill_sum", "arinar_batch_fill_count")
            ):
                name, _, value = line.rpartition(" ")
                found[name] = float(value)
        return found


@contextmanager
def server(bundle: Path, precision: str, size: int, wait: float) -> Iterator[tuple[subprocess.Popen[str], Client]]:
    """`arinar serve`, ready to answer."""
    command = [sys.executable, "-m", "arinar", "serve", str(bundle), "--port", "0", "--precision", precision, "--queue", "4096"]
    process = subprocess.Popen(
        [*command, "--max-batch", str(size), "--max-wait-ms", str(wait)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=fresh_environment(),
    )
    try:
        assert process.stdout is not None
        greeting = process.stdout.readline()
        client = Client(int(greeting.split("http://127.0.0.1:")[1].split()[0]))
        while client.get("/readyz") != b"ready\n":
            time.sleep(0.1)
        yield process, client
    finally:
        process.terminate()
        process.wait()


def level(
    client: Client, asked: Sequence[Wish], load: float, seconds: float, seed: int, pid: int, leaving: float
) -> dict[str, Any]:
    """Requests at a share of the loop's throughput, for so long; of a share of them the client goes away."""
    draw = random.Random(seed)
    rate = load / statistics.mean(wish.seconds for wish in asked)
    arrivals, moment = [], 0.0
    while (moment := moment + draw.expovariate(rate)) < seconds:
        arrivals.append((moment, draw.choice(asked)))
    before, wrong, refused, gone = client.counters(), client.wrong, client.refused, client.gone
    resident: list[float] = []
    waiting: list[Any] = []
    start = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        for moment, wish in arrivals:
            while (left := start + moment - time.perf_counter()) > 0:
                time.sleep(min(left, 0.5))
            if not resident or len(waiting) % 20 == 0:
                resident.append(resident_bytes(pid) / 1e6)
            patience = draw.uniform(0.01, PATIENCE) if draw.random() < leaving else None
            waiting.append(pool.submit(client.take, wish, start + moment, patience))
        found = [future.result() for future in waiting]
    took = time.perf_counter() - start
    after = client.counters()
    gained = {name: after[name] - before.get(name, 0.0) for name in after}
    answered = [one for one in found if one is not None]
    images = sum(wish.count for (_, wish), one in zip(arrivals, found, strict=True) if one is not None)
    return {
        "load": load,
        "requests": len(arrivals),
        "images": images,
        "seconds": took,
        "images_per_s": images / took,
        "latency_s": quantiles(answered),
        "loop_latency_s": quantiles(in_turn(arrivals)),
        "loop_images_per_s": images / max(took_in_turn(arrivals), seconds),
        "rows_per_micro_batch": gained["arinar_images_total"] / max(1.0, gained['arinar_batches_total{outcome="made"}']),
        "fill": gained["arinar_batch_fill_sum"] / max(1.0, gained["arinar_batch_fill_count"]),
        "wrong": client.wrong - wrong,
        "refused": client.refused - refused,
        "gone": client.gone - gone,
        "resident_mb": [round(size, 1) for size in resident[:: max(1, len(resident) // 20)]],
        "resident_slope_kb_per_request": 1e3 * slope(resident[len(resident) // 2 :]) / 20,
    }


def in_turn(arrivals: Sequence[tuple[float, Wish]]) -> list[float]:
    """Latencies of the loop: each request begins when it has arrived and the one before it is done."""
    free, found = 0.0, []
    for moment, wish in arrivals:
        free = max(free, moment) + wish.seconds
        found.append(free - moment)
    return found


def took_in_turn(arrivals: Sequence[tuple[float, Wish]]) -> float:
    """When the loop has made the last of them."""
    return arrivals[-1][0] + in_turn(arrivals)[-1]


def quantiles(values: Sequence[float]) -> dict[str, float]:
    p50, p95 = np.quantile(values, [0.5, 0.95])
    return {"p50": float(p50), "p95": float(p95), "max": max(values)}


def table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['bundle']} ({report['precision']}), micro-batches of {report['max_batch']}; {report['machine']['cpu']}, "
        f"{report['machine']['cores']} cores; the loop makes {report['loop_images_per_s']:.1f} images/s",
        "load  requests  images/s  (loop)  p50 s  (loop)  p95 s  (loop)  rows per micro-batch  wrong",
    ]
    for one in report["levels"]:
        ours, loop = one["latency_s"], one["loop_latency_s"]
        lines.append(
            f"{one['load']:<4g}  {one['requests']:>8}  {one['images_per_s']:>8.1f}  {one['loop_images_per_s']:>6.1f}  "
            f"{ours['p50']:>5.2f}  {loop['p50']:>6.2f}  {ours['p95']:>5.2f}  {loop['p95']:>6.2f}  "
            f"{one['rows_per_micro_batch']:>20.2f}  {one['wrong']:>5}"
        )
    first, last = report["levels"][0]["resident_mb"][0], report["levels"][-1]["resident_mb"][-1]
    lines.append(f"memory of the server: {first:.0f} MB at first, {last:.0f} MB at last")
    return "\n".join(lines)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--precision", help="Variant of the bundle. [default: fp32, or the only one]")
@click.option("--max-batch", "size", type=int, default=8, show_default=True)
@click.option("--max-wait-ms", "wait", type=float, default=10, show_default=True)
@click.option(
    "--load",
    "loads",
    type=float,
    multiple=True,
    default=(0.5, 0.9, 1.5),
    help="Shares of the loop's throughput. [default: 0.5, 0.9, 1.5]",
)
@click.option("--minutes", type=click.FloatRange(min=0.05), default=5, show_default=True, help="Of all loads together.")
@click.option("--leaving", type=click.FloatRange(0, 0.9), default=0.0, show_default=True, help="Share of clients that go away.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    bundle: Path,
    precision: str | None,
    size: int,
    wait: float,
    loads: tuple[float, ...],
    minutes: float,
    leaving: float,
    seed: int,
    json_path: Path | None,
) -> None:
    """Serve a bundle under load. Exit code 1 where an answer was not the direct call's."""
    if json_path is not None:
        check_writable(json_path)
    pipeline = Pipeline.load(bundle, precision=precision)
    say(f"{WISHES} different requests, each made by the loop and by the direct calls that the answers must equal")
    asked = wishes(pipeline, size, seed)
    report: dict[str, Any] = {
        "machine": machine(("numpy", "onnxruntime", "fastapi", "uvicorn")),
        "bundle": pipeline.bundle.folder.name,
        "backend": pipeline.backend.name,
        "precision": pipeline.precision,
        "max_batch": size,
        "max_wait_ms": wait,
        "minutes": minutes,
        "leaving": leaving,
        "loop_images_per_s": sum(wish.count for wish in asked) / sum(wish.seconds for wish in asked),
        "levels": [],
    }
    with server(bundle, pipeline.precision, size, wait) as (process, client):
        for number, load in enumerate(loads):
            say(f"load {load:g}")
            seconds = 60 * minutes / len(loads)
            report["levels"].append(level(client, asked, load, seconds, seed + number, process.pid, leaving))
            if json_path is not None:
                write_text(json_path, json.dumps(report, indent=2) + "\n")
    click.echo(table(report))
    if any(one["wrong"] or one["refused"] for one in report["levels"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
