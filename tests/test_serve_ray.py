"""The application under Ray Serve: two replicas, of which one is killed under load."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

#: Set: Ray must be there.
VARIABLE = "ARINAR_RAY"
if VARIABLE not in os.environ:
    pytest.importorskip("ray.serve", reason="several replicas need the extra `ray`")
from served import Served, pixels  # noqa: E402

from arinar.runtime import Pipeline  # noqa: E402
from arinar.serve.ray import app  # noqa: E402

NAME = f"arinar-test-{os.getpid()}"


@pytest.fixture(scope="module")
def served(digits_bundle: Path) -> Iterator[Served]:
    import socket

    import ray
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    checkout = str(Path(__file__).parent.parent)
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": checkout}})
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(app({"bundle": str(digits_bundle), "replicas": "2", "max_batch": 4, "name": "digits"}), name=NAME)
        yield Served(None, port, None)  # type: ignore[arg-type]
    finally:
        serve.shutdown()
        ray.shutdown()


def replicas() -> set[int]:
    """Processes of ours that Ray gave the name of a replica."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(f"ray::ServeReplica:{NAME}".encode()):
                found.add(int(folder.name))
        except OSError:  # it has just ended
            continue
    return found


def test_pictures_do_not_depend_on_the_replica_and_survive_the_end_of_one(served: Served, digits_bundle: Path) -> None:
    pipeline = Pipeline.load(digits_bundle, threads=1)
    before = replicas()
    assert len(before) == 2
    wishes = [{"prompt": str(number % 10), "n": 1 + number % 3, "seed": number} for number in range(24)]
    killed = threading.Event()

    def take(number: int) -> tuple[Any, int]:
        """As clients do: where the server failed, ask again."""
        if number == 8:
            os.kill(min(before), signal.SIGKILL)
            killed.set()
        for attempt in range(600):
            try:
                status, _, answer = served.generate(**wishes[number])
            except OSError:
                status = 0
            if status == 200:
                return answer, attempt
            assert status in (0, 500, 503), answer
            threading.Event().wait(0.1)
        raise AssertionError("no answer")

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(take, range(len(wishes))))
    assert killed.is_set()
    for wish, (answer, _) in zip(wishes, answers, strict=True):
        for index, datum in enumerate(answer["data"]):
            want = pipeline.generate([int(wish["prompt"])], seed=wish["seed"], indices=[index], batch_size=4).images[0]
            assert np.array_equal(pixels(datum), np.asarray(want))
    for _ in range(1200):  # Ray notices, and starts another
        if len(now := replicas()) == 2 and min(before) not in now:
            break
        threading.Event().wait(0.1)
    assert len(replicas()) == 2 and min(before) not in replicas()


def test_streams_and_errors_come_through(served: Served) -> None:
    events = served.events(prompt="3", seed=1)
    assert events[-1]["type"] == "image_generation.completed" and len(events) == 14
    status, headers, answer = served.generate({"X-Request-ID": "mine"}, prompt="x")
    assert status == 400 and answer["error"]["param"] == "prompt" and headers["x-request-id"] == "mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "bundle is missing; give the path of one: bundle=PATH"),
        ({"bundle": "b", "replica": 2}, "unknown argument 'replica'; there are name, max_batch"),
        ({"bundle": "b", "replicas": "two"}, "replicas is 'two'; expected int"),
        ({"bundle": "b", "max_batch": 3}, "max_batch is 3; expected 1, 2, 4, 8"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        app(arguments)
