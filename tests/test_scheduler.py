"""Requests that share micro-batches: the same bits under any load, order, limits, time, cancelling, failing, ending."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from arinar.runtime import Pipeline
from arinar.serve.places import Trial
from arinar.serve.scheduler import (
    BatchReport,
    Ended,
    Event,
    Job,
    Made,
    QueueFull,
    Scheduler,
    Stepped,
    Stopping,
    TookTooLong,
)

SIZE = 4


@pytest.fixture(scope="module")
def pipeline(digits_bundle: Path) -> Pipeline:
    return Pipeline.load(digits_bundle, threads=1)


class Gated:
    """A pipeline whose every step waits until it is let through; it writes down what it was asked for."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.resolve = pipeline, pipeline.resolve
        self.calls: list[dict[str, Any]] = []
        self.steps: list[int] = []
        self.closed = 0
        self.begun, self.open = threading.Semaphore(0), threading.Semaphore(0)
        self.bad: set[int] = set()  # labels that fail

    def stream(self, **arguments: Any) -> Iterator[Any]:
        self.calls.append(arguments)
        self.begun.release()
        try:
            for progress in self.pipeline.stream(**arguments):
                assert self.open.acquire(timeout=60)
                if self.bad & set(arguments["labels"]):
                    raise FloatingPointError("graph 'x' made values that are not finite")
                self.steps.append(progress.step)
                yield progress
        finally:
            self.closed += 1

    def let(self, steps: int = 1000) -> None:
        self.open.release(steps)


class Asked:
    """A request and what was told of it."""

    def __init__(self, scheduler: Scheduler, labels: list[int], *, previews: Any = (), **arguments: Any) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.sampling = scheduler.pipeline.resolve(labels, **arguments)
        self.job: Job = scheduler.submit(self.sampling, self.events.put, previews=previews)
        self.seen: list[Event] = []

    def next(self) -> Event:
        self.seen.append(self.events.get(timeout=60))
        return self.seen[-1]

    def end(self) -> Exception | None:
        while not isinstance(event := self.next(), Ended):
            pass
        return event.error

    def images(self) -> list[Any]:
        assert self.end() is None
        made = {event.row: np.asarray(event.image) for event in self.seen if isinstance(event, Made)}
        return [made[row] for row in range(len(self.sampling))]


@pytest.fixture
def gated(pipeline: Pipeline) -> Gated:
    return Gated(pipeline)


@pytest.fixture
def slow(gated: Gated) -> Iterator[Scheduler]:
    """A scheduler whose steps are let through one by one; rows do not wait for company."""
    scheduler = Scheduler(gated, sizes=(SIZE,), max_wait=0.0, queue=8, timeout=600)  # type: ignore[arg-type]
    yield scheduler
    gated.let()
    scheduler.close()


def test_pictures_are_those_of_direct_calls_under_any_load(pipeline: Pipeline) -> None:
    reports: list[BatchReport] = []
    scheduler = Scheduler(pipeline, sizes=(SIZE,), max_wait=0.05, observe=reports.append)
    wishes: list[tuple[list[int], dict[str, Any]]] = [
        ([number % 10] * (1 + number % 6), {"seed": number, "guidance_scale": [1.0, 2.0, 4.5][number % 3]} | extra)
        for number, extra in enumerate([{}, {"temperature": 0.9}, {"num_iter": 5}, {"cfg_schedule": "constant"}] * 3)
    ]
    asked: list[Asked] = []

    def ask(some: slice) -> None:
        for labels, arguments in wishes[some]:
            asked.append(Asked(scheduler, labels, **arguments))

    threads = [threading.Thread(target=ask, args=(slice(start, None, 3),)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in asked:
        sampling = one.sampling
        for k, image in enumerate(one.images()):
            want = pipeline.generate(
                [int(sampling.labels[k])],
                seed=sampling.seed,
                indices=[k],
                batch_size=SIZE,
                guidance_scale=float(sampling.guidance_scale[k]),
                temperature=float(sampling.temperature[k]),
                cfg_schedule=sampling.cfg_schedule,
                num_iter=sampling.num_iter,
            )
            assert np.array_equal(image, np.asarray(want.images[0]))
    scheduler.close()
    rows = sum(report.rows for report in reports)
    assert rows == sum(len(labels) for labels, _ in wishes)
    assert len(reports) < rows / 2 and all(report.size == SIZE and report.error is None for report in reports)
    assert all(set(report.seconds) == {"outer", "inner", "vae", "total"} for report in reports)


def test_tokens_of_a_joined_micro_batch_are_those_of_direct_calls(pipeline: Pipeline) -> None:
    """To the last bit of a float, not only of a pixel."""
    calls: list[Any] = []

    class Watched(Gated):
        def stream(self, **arguments: Any) -> Iterator[Any]:
            for progress in self.pipeline.stream(**arguments):
                calls.extend([progress.result.tokens] if progress.result else [])
                yield progress

    scheduler = Scheduler(Watched(pipeline), sizes=(SIZE,), max_wait=10.0)  # type: ignore[arg-type]
    asked = [Asked(scheduler, [label], seed=label, temperature=1 - label / 50) for label in range(SIZE)]
    assert [one.end() for one in asked] == [None] * SIZE
    (tokens,) = calls
    for place, one in enumerate(asked):
        want = pipeline.generate([place], seed=place, temperature=1 - place / 50, batch_size=SIZE).tokens[0]
        assert np.array_equal(tokens[place], want), one.sampling
    scheduler.close()


def test_only_what_may_share_a_micro_batch_does_in_order_of_arrival(gated: Gated, slow: Scheduler) -> None:
    first = Asked(slow, [0])
    assert gated.begun.acquire(timeout=60)  # it runs alone; what follows piles up
    rest = [
        Asked(slow, [1], guidance_scale=2.0),
        Asked(slow, [2], num_iter=3),
        Asked(slow, [3], guidance_scale=1.0),
        Asked(slow, [4, 4, 4], guidance_scale=7.0, temperature=0.8, seed=9),
        Asked(slow, [5], num_iter=3),
    ]
    assert slow.depth == 7 and slow.running == 1
    gated.let()
    assert [one.end() for one in (first, *rest)] == [None] * 6
    assert [call["labels"] for call in gated.calls] == [[0], [1, 4, 4, 4], [2, 5], [3]]
    assert gated.calls[1]["guidance_scale"] == [2.0, 7.0, 7.0, 7.0]
    assert all(call["batch_size"] == SIZE for call in gated.calls)


def test_a_row_waits_for_company(pipeline: Pipeline) -> None:
    reports: list[BatchReport] = []
    scheduler = Scheduler(pipeline, sizes=(2,), max_wait=3600, observe=reports.append)
    one = Asked(scheduler, [1])
    assert scheduler.depth == 1
    other = Asked(scheduler, [2])
    assert one.end() is None and other.end() is None
    scheduler.close()
    assert [(report.rows, len(report.waited)) for report in reports] == [(2, 2)]


def test_steps_and_previews_are_told_to_who_asked(pipeline: Pipeline) -> None:
    scheduler = Scheduler(pipeline, sizes=(SIZE,), max_wait=3600)
    plain, curious = Asked(scheduler, [1]), Asked(scheduler, [2, 3, 4], previews={2, 5})
    assert plain.end() is None and curious.end() is None
    scheduler.close()
    steps = [event for event in plain.seen if isinstance(event, Stepped)]
    assert [(event.step, event.num_iter, event.rows, event.previews) for event in steps] == [
        (s, 12, (0,), ()) for s in range(1, 13)
    ]
    shown = [(event.step, event.rows) for event in curious.seen if isinstance(event, Stepped) and event.previews]
    assert shown == [(2, (0, 1, 2)), (5, (0, 1, 2))]
    assert [event.row for event in curious.seen if isinstance(event, Made)] == [0, 1, 2]
    want = next(e.preview()[0] for e in pipeline.stream([2], batch_size=SIZE) if e.step == 5)
    previews = next(e.previews for e in curious.seen if isinstance(e, Stepped) and e.step == 5)
    assert np.array_equal(np.asarray(previews[0]), np.asarray(want))


def test_a_full_queue_refuses_and_says_about_when(gated: Gated, slow: Scheduler) -> None:
    running = Asked(slow, [0])
    assert gated.begun.acquire(timeout=60)
    waiting = Asked(slow, [1] * 7)
    with pytest.raises(QueueFull, match="7 images are waiting and 2 more were asked for; at most 8 may wait") as refused:
        Asked(slow, [2, 2])
    assert refused.value.seconds >= 0
    last = Asked(slow, [3])
    gated.let()
    assert [one.end() for one in (running, waiting, last)] == [None] * 3


def test_cancelling_ends_a_micro_batch_within_a_step_and_drops_what_waits(gated: Gated, slow: Scheduler) -> None:
    running = Asked(slow, [0, 0])
    assert gated.begun.acquire(timeout=60)
    waiting, kept = Asked(slow, [1, 1]), Asked(slow, [2])
    gated.let(2)
    assert [running.next().step for _ in range(2)] == [1, 2]  # type: ignore[union-attr]
    waiting.job.cancel()
    assert slow.depth == 1
    running.job.cancel()
    gated.let(1)
    assert gated.begun.acquire(timeout=60)
    assert gated.closed == 1 and gated.steps == [1, 2, 3]
    gated.let()
    assert kept.end() is None
    assert [call["labels"] for call in gated.calls] == [[0, 0], [2]]
    assert running.events.empty() and waiting.events.empty()


def test_a_micro_batch_goes_on_while_somebody_wants_it(gated: Gated, slow: Scheduler) -> None:
    first = Asked(slow, [0])
    assert gated.begun.acquire(timeout=60)
    gone, kept = Asked(slow, [1]), Asked(slow, [2])
    gated.let(12)
    assert first.end() is None and gated.begun.acquire(timeout=60)
    gone.job.cancel()
    gated.let()
    assert kept.end() is None and gone.events.empty()
    assert gated.calls[1]["labels"] == [1, 2]


def test_time_runs_out_while_waiting_and_while_running(gated: Gated) -> None:
    scheduler = Scheduler(gated, sizes=(SIZE,), max_wait=0.0, timeout=0.0)  # type: ignore[arg-type]
    late = Asked(scheduler, [0])
    assert isinstance(late.end(), TookTooLong) and gated.calls == []
    scheduler.timeout = 600
    running = Asked(scheduler, [1])
    assert gated.begun.acquire(timeout=60)
    running.job.deadline = 0.0
    waiting = Asked(scheduler, [2])
    waiting.job.deadline = 0.0
    fine = Asked(scheduler, [3])
    gated.let()
    assert isinstance(running.end(), TookTooLong) and isinstance(waiting.end(), TookTooLong)
    assert fine.end() is None and gated.steps[:2] == [1, 1]
    scheduler.close()


def test_an_error_reaches_the_request_that_causes_it_and_no_other(gated: Gated, slow: Scheduler) -> None:
    first = Asked(slow, [0])
    assert gated.begun.acquire(timeout=60)
    gated.bad = {9}
    asked = [Asked(slow, [label]) for label in (1, 9, 2)]
    after = Asked(slow, [3], num_iter=3)
    gated.let()
    assert first.end() is None and after.end() is None
    errors = [one.end() for one in asked]
    assert errors[0] is None and errors[2] is None and isinstance(errors[1], FloatingPointError)
    # Each of them again by itself, before what came later.
    assert [call["labels"] for call in gated.calls] == [[0], [1, 9, 2], [1], [9], [2], [3]]
    for one, label in ((asked[0], 1), (asked[2], 2)):
        made = [event.image for event in one.seen if isinstance(event, Made)]
        assert np.array_equal(np.asarray(made[0]), np.asarray(gated.pipeline.generate([label], batch_size=SIZE).images[0]))


def test_the_worker_calls_functions_between_two_steps(gated: Gated, slow: Scheduler) -> None:
    running = Asked(slow, [0])
    assert gated.begun.acquire(timeout=60)
    name, broken = slow.run(lambda: threading.current_thread().name), slow.run(lambda: 1 // 0)
    gated.let(1)
    assert name.result(60) == "arinar-scheduler"
    with pytest.raises(ZeroDivisionError):
        broken.result(60)
    assert gated.steps == [1]
    gated.let()
    assert running.end() is None
    assert slow.run(lambda: 5).result(60) == 5  # at rest, too


def test_closing_finishes_what_was_begun_and_tells_the_others(gated: Gated) -> None:
    scheduler = Scheduler(gated, sizes=(SIZE,), max_wait=0.0)  # type: ignore[arg-type]
    begun = Asked(scheduler, [0] * 6)  # two micro-batches
    assert gated.begun.acquire(timeout=60)
    waiting = Asked(scheduler, [1])
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    assert isinstance(waiting.end(), Stopping)
    with pytest.raises(Stopping):
        Asked(scheduler, [2])
    with pytest.raises(Stopping):
        scheduler.run(lambda: 1)
    gated.let()
    closing.join(60)
    assert not closing.is_alive() and len(begun.images()) == 6 and not scheduler.alive
    assert [call["labels"] for call in gated.calls] == [[0] * 4, [0] * 2]


def test_closing_waits_only_so_long(gated: Gated) -> None:
    scheduler = Scheduler(gated, sizes=(SIZE,), max_wait=0.0)  # type: ignore[arg-type]
    begun = Asked(scheduler, [0] * 6)
    assert gated.begun.acquire(timeout=60)
    closing = threading.Thread(target=lambda: scheduler.close(timeout=0.0))
    closing.start()
    assert isinstance(begun.end(), Stopping)
    gated.let(1)
    closing.join(60)
    assert not closing.is_alive() and gated.steps == [1]


def test_places_do_not_matter_in_micro_batches_of_powers_of_two(pipeline: Pipeline) -> None:
    assert not Trial(pipeline).places_matter(1) and not Trial(pipeline).places_matter(SIZE)
    assert Trial(pipeline).sizes(5)[-1] == 4


def test_a_size_at_which_places_matter_is_found_out(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = pipeline.loop.walk

    def uneven(batch: Any, *rest: Any, **more: Any) -> Any:
        made = yield from walk(batch, *rest, **more)
        if len(batch) > 2:
            made.tokens[-1, 0, 0] = np.nextafter(made.tokens[-1, 0, 0], np.float32(9))  # the last bit of one number
        return made

    monkeypatch.setattr(pipeline.loop, "walk", uneven)
    assert Trial(pipeline).places_matter(4) and not Trial(pipeline).places_matter(2)
    assert Trial(pipeline).sizes(8)[-1] == 2


def test_few_rows_are_filled_up_to_the_smallest_size_that_makes_the_same_bits(digits_bundle: Path) -> None:
    pipeline = Pipeline.load(digits_bundle, threads=1)
    sizes = Trial(pipeline).sizes(8)
    assert sizes[-1] == 8 and sizes == sorted(set(sizes))
    reports: list[BatchReport] = []
    scheduler = Scheduler(pipeline, sizes=sizes, max_wait=0.0, observe=reports.append)
    for count in (1, 3, 8):
        asked = Asked(scheduler, [4] * count, seed=count, guidance_scale=3.0)
        for index, image in enumerate(asked.images()):
            want = pipeline.generate([4], seed=count, indices=[index], guidance_scale=3.0, batch_size=8).images[0]
            assert np.array_equal(image, np.asarray(want))
    scheduler.close()
    assert [report.size for report in reports] == [next(s for s in sizes if s >= count) for count in (1, 3, 8)]


def test_a_diffusion_head_shares_micro_batches_by_its_sampling_steps(demo_bundle: Any) -> None:
    pipeline = Pipeline.load(demo_bundle("digits-mar"), threads=1)
    gated = Gated(pipeline)
    gated.let()
    scheduler = Scheduler(gated, sizes=(SIZE,), max_wait=600)  # type: ignore[arg-type]
    settings = [
        {"sampling_steps": steps, "num_iter": 2} for steps in ("ddim5", "10", "ddim5", "10", "ddim5", "10", "ddim5", "10")
    ]
    asked = [Asked(scheduler, [label], seed=label, **rest) for label, rest in enumerate(settings)]
    for label, (one, rest) in enumerate(zip(asked, settings, strict=True)):
        (image,) = one.images()
        want = pipeline.generate([label], seed=label, batch_size=SIZE, **rest).images[0]  # type: ignore[arg-type]
        assert np.array_equal(image, np.asarray(want))
    scheduler.close()
    assert [call["labels"] for call in gated.calls] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_a_size_that_makes_other_bits_is_found_out(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = pipeline.loop.walk

    def other(batch: Any, *rest: Any, **more: Any) -> Any:
        made = yield from walk(batch, *rest, **more)
        if len(batch) == 2:
            made.tokens[0, 0, 0] = np.nextafter(made.tokens[0, 0, 0], np.float32(9))
        return made

    monkeypatch.setattr(pipeline.loop, "walk", other)
    assert 2 not in Trial(pipeline).sizes(4)


def test_a_trial_can_be_ended(pipeline: Pipeline) -> None:
    steps: list[int] = []

    def third() -> None:
        steps.append(1)
        if len(steps) == 3:
            raise Stopping("enough")

    with pytest.raises(Stopping):
        Trial(pipeline, third).sizes(4)
    assert len(steps) == 3
    assert pipeline.generate([1], num_iter=2).images  # it is as good as before
