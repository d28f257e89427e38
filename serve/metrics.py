"""What `/metrics` tells, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .scheduler import BatchReport

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """Counters of one server. ``depth``, ``running``: rows that wait, and that are being made, whenever it is asked."""

    def __init__(self, depth: Callable[[], int], running: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        Gauge("arinar_queue_rows", "Images that wait.", registry=registry).set_function(depth)
        Gauge("arinar_running_rows", "Images of the micro-batch that is being made.", registry=registry).set_function(running)
        self.requests = Counter("arinar_requests", "Answers, by route and status.", ["route", "status"], registry=registry)
        self.errors = Counter("arinar_errors", "Errors that were answered, by code.", ["code"], registry=registry)
        self.images = Counter("arinar_images", "Images that were made.", registry=registry)
        self.batches = Counter("arinar_batches", "Micro-batches: made, cancelled, failed.", ["outcome"], registry=registry)
        self.fill = Histogram(
            "arinar_batch_fill", "Share of a micro-batch's places that were asked for.", buckets=[n / 8 for n in range(1, 9)],
            registry=registry,
        )  # fmt: skip
        self.phases = Histogram(
            "arinar_phase_seconds",
            "Time of a micro-batch by phase (outer, inner, vae; on a GPU device), and of waiting (queue), by image.",
            ["phase"],
            buckets=SECONDS,
            registry=registry,
        )
        self.latency = Histogram(
            "arinar_request_seconds", "From a request to the end of its answer.", ["route"], buckets=SECONDS, registry=registry
        )

    def batch(self, report: BatchReport) -> None:
        """A micro-batch is over."""
        outcome = "failed" if report.error else "cancelled" if report.cancelled else "made"
        self.batches.labels(outcome).inc()
        self.fill.observe(report.rows / report.size)
        if outcome == "made":
            self.images.inc(report.rows)
        for phase, seconds in report.seconds.items():
            self.phases.labels(phase).observe(seconds)
        for seconds in report.waited:
            self.phases.labels("queue").observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
