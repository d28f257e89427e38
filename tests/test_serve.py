"""The server as its clients see it: a real one, on a free port."""

from __future__ import annotations

import base64
import http.client
import io
import json
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime")
pytest.importorskip("fastapi", reason="serving needs the extra `serve`")

from served import JSON, Gate, Served, pixels, serving

from arinar.class_names import Classes
from arinar.config import PRESETS
from arinar.runtime import Pipeline
from arinar.runtime.editing import about_edit
from arinar.serve import logs
from arinar.serve.door import Limits
from arinar.serve.keys import Keys

ROUTE = "/v1/images/generations"


@pytest.fixture(scope="module")
def pipeline(digits_bundle: Path) -> Pipeline:
    return Pipeline.load(digits_bundle, threads=1)


@pytest.fixture(scope="module")
def served(digits_bundle: Path) -> Iterator[Served]:
    with serving(digits_bundle) as found:
        yield found


def direct(pipeline: Pipeline, label: int, seed: int, index: int = 0, **sampling: Any) -> Any:
    """What the answer must hold."""
    made = pipeline.generate([label], seed=seed, indices=[index], batch_size=4, **sampling)
    return np.asarray(made.images[0])


def refused(answer: tuple[int, Any, Any], status: int, code: str | None, *words: str, param: str | None = None) -> None:
    """An error in OpenAI's shape, with these words in its message."""
    assert answer[0] == status, answer
    error = answer[2]["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    for word in words:
        assert word in error["message"], error


# ------------------------------------------------------------------------------------------------------ generating


def test_pictures_are_those_of_direct_calls(served: Served, pipeline: Pipeline) -> None:
    status, headers, answer = served.generate(prompt="3", n=3, seed=7, guidance_scale=2.5, temperature=0.9, num_iter=6)
    assert status == 200 and headers["x-request-id"] and headers["cache-control"] == "no-store"
    assert answer["settings"] == {
        "guidance_scale": 2.5, "cfg_schedule": "linear", "temperature": 0.9, "num_iter": 6, "batch_size": 4
    }  # fmt: skip
    assert answer["model"] == "digits" and answer["size"] == "32x32" and answer["created"] > 0
    for k, datum in enumerate(answer["data"]):
        assert (datum["seed"], datum["index"], datum["label"], datum["class_name"]) == (7, k, 3, "3")
        want = direct(pipeline, 3, 7, k, guidance_scale=2.5, temperature=0.9, num_iter=6)
        assert np.array_equal(pixels(datum), want)


def test_a_picture_holds_what_it_takes_to_make_it_again(served: Served, tmp_path: Path) -> None:
    from arinar.runtime.images import read_metadata

    datum = served.generate(labels=[8, 1], seed=2**64 - 1)[2]["data"][1]
    (tmp_path / "1.png").write_bytes(base64.b64decode(datum["b64_json"]))
    found = read_metadata(tmp_path / "1.png")
    assert found is not None and found["label"] == 1 and found["index"] == 1 and found["seed"] == 2**64 - 1
    assert found["batch_size"] == 4 and found["num_iter"] == 12 and len(found["bundle"]) == 16
    answer = served.generate(labels=[1], indices=[found["index"]], seed=found["seed"])[2]
    assert answer["data"][0]["b64_json"] == datum["b64_json"]


def test_an_image_of_no_class(served: Served, pipeline: Pipeline) -> None:
    """It goes with unguided images, whatever guidance is asked for, and is the direct call's."""
    (datum,) = served.generate(labels=[-1], seed=4, guidance_scale=3.0)[2]["data"]
    assert datum["label"] == -1 and datum["class_name"] == "unconditional"
    assert np.array_equal(pixels(datum), direct(pipeline, -1, 4))


def test_labels_and_indices(served: Served, pipeline: Pipeline) -> None:
    data = served.generate(labels=[4, 9], seed=1, indices=[5, 0], prompt="", n=2)[2]["data"]
    assert [(datum["label"], datum["index"]) for datum in data] == [(4, 5), (9, 0)]
    assert np.array_equal(pixels(data[0]), direct(pipeline, 4, 1, 5)) and np.array_equal(
        pixels(data[1]), direct(pipeline, 9, 1)
    )


def test_a_seed_is_drawn_where_none_is_given(served: Served, pipeline: Pipeline) -> None:
    first, second = (served.generate(prompt=5)[2]["data"][0] for _ in range(2))
    assert first["seed"] != second["seed"] and 0 <= first["seed"] < 2**32
    assert np.array_equal(pixels(first), direct(pipeline, 5, first["seed"]))


def test_a_stream_tells_steps_previews_and_pictures(served: Served, pipeline: Pipeline) -> None:
    events = served.events(prompt="6", n=2, seed=3, partial_images=3)
    kinds = [event["type"].removeprefix("image_generation.") for event in events]
    assert kinds[0] == "queued" and kinds[-2:] == ["completed"] * 2 and kinds.count("partial_image") == 6
    steps = [event for event in events if event["type"].endswith("progress")]
    assert [(e["step"], e["num_iter"], e["indices"]) for e in steps] == [(step, 12, [0, 1]) for step in range(1, 13)]
    partial = [event for event in events if event["type"].endswith("partial_image")]
    assert [(e["step"], e["partial_image_index"], e["index"]) for e in partial] == [
        (step, number, index) for number, step in enumerate((3, 6, 9)) for index in (0, 1)
    ]
    preview = next(item.preview()[0] for item in pipeline.stream([6], seed=3, batch_size=4) if item.step == 6)
    assert np.array_equal(pixels(partial[2]), np.asarray(preview))
    for index, event in enumerate(events[-2:]):
        assert event["index"] == index and np.array_equal(pixels(event), direct(pipeline, 6, 3, index))
        assert event["settings"]["batch_size"] == 4 and event["size"] == "32x32" and event["output_format"] == "png"


def test_the_openai_client_generates(served: Served, pipeline: Pipeline) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any")
    answer = client.images.generate(model="digits", prompt="2", n=2, size="32x32", extra_body={"seed": 11, "guidance_scale": 3})
    for k, datum in enumerate(answer.data):
        assert np.array_equal(pixels({"b64_json": datum.b64_json}), direct(pipeline, 2, 11, k, guidance_scale=3))
        assert datum.index == k and datum.seed == 11
    assert answer._request_id
    events = list(client.images.generate(prompt="2", stream=True, partial_images=2, extra_body={"seed": 11}))
    done = [event for event in events if event.type == "image_generation.completed"]
    assert [event.type for event in events].count("image_generation.partial_image") == 2
    assert np.array_equal(pixels({"b64_json": done[0].b64_json}), direct(pipeline, 2, 11))
    assert [model.id for model in client.models.list()] == ["digits"] and client.models.retrieve("digits").id == "digits"
    with pytest.raises(openai.BadRequestError, match="size is '1024x1024'; this model makes 32x32") as error:
        client.images.generate(prompt="2", size="1024x1024")
    assert error.value.param == "size" and error.value.code == "invalid_value"


def test_the_same_bytes_under_load(digits_bundle: Path, pipeline: Pipeline) -> None:
    """Several clients at a time, of all kinds of requests, each as a direct call makes it."""
    wishes = [
        {"prompt": str(number % 10), "n": 1 + number % 5, "seed": number // 3, "guidance_scale": [1.0, 4.0, 2.0][number % 3]}
        | ([{}, {"num_iter": 4}, {"temperature": 0.8}, {"cfg_schedule": "constant"}][number % 4])
        for number in range(20)
    ]
    with serving(digits_bundle) as served, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda wish: served.generate(**wish), wishes))
        images = sum(wish["n"] for wish in wishes)
        # (Told after the answers are.)
        until(lambda: f"arinar_images_total {images}.0" in served.ask("GET", "/metrics")[2].decode())
        metrics = served.ask("GET", "/metrics")[2].decode()
    for wish, (status, _, answer) in zip(wishes, answers, strict=True):
        assert status == 200
        sampling = {k: v for k, v in wish.items() if k in ("guidance_scale", "temperature", "num_iter", "cfg_schedule")}
        for k, datum in enumerate(answer["data"]):
            assert np.array_equal(pixels(datum), direct(pipeline, int(wish["prompt"]), wish["seed"], k, **sampling)), wish
    batches = float(metrics.split('arinar_batches_total{outcome="made"} ')[1].split()[0])
    assert batches < images / 1.5


# ---------------------------------------------------------------------------------------------------------- refusing


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "prompt is missing; give a class id or name"),
        ({"prompt": ""}, "prompt", "prompt is missing"),
        ({"prompt": "10"}, "prompt", "prompt is 10; this model has classes 0..9"),
        ({"prompt": -2}, "prompt", "prompt is -2, no class of this model"),
        ({"prompt": "dog"}, "prompt", "prompt is 'dog', no class of this model"),
        ({"prompt": "x" * 1001}, "prompt", "at most 1000 characters"),
        ({"prompt": ["3"]}, "prompt", "prompt is ['3']; it should be a valid string"),
        ({"prompt": True}, "prompt", "prompt is True"),
        ({"prompt": "3", "labels": [3]}, "prompt", "prompt and labels are both given"),
        ({"labels": []}, "labels", "labels is []; List should have at least 1 item"),
        ({"labels": [3] * 65}, "labels", "at most 64 items"),
        ({"labels": [3.5]}, "labels", "labels[0] is 3.5; it should be a valid integer"),
        ({"labels": [3, True]}, "labels", "labels[1] is True; it should be a valid integer"),
        ({"labels": [3, 12]}, "labels", "label 12 is out of range; this model has classes 0..9"),
        ({"labels": [-2]}, "labels", "label -2 is out of range"),
        ({"labels": 3}, "labels", "labels is 3; it should be a valid list"),
        ({"labels": [3, 4], "n": 3}, "n", "n is 3 for 2 labels"),
        ({"prompt": "3", "n": 0}, "n", "n is 0; it should be greater than or equal to 1"),
        ({"prompt": "3", "n": 65}, "n", "n is 65; it should be less than or equal to 64"),
        ({"prompt": "3", "n": "2"}, "n", "n is '2'; it should be a valid integer"),
        ({"prompt": "3", "n": 1.5}, "n", "n is 1.5; it should be a valid integer"),
        ({"prompt": "3", "size": "256x256"}, "size", "size is '256x256'; this model makes 32x32"),
        ({"prompt": "3", "size": 32}, "size", "size is 32; it should be a valid string"),
        ({"prompt": "3", "response_format": "url"}, "response_format", "response_format is 'url'; it should be 'b64_json'"),
        ({"prompt": "3", "output_format": "webp"}, "output_format", "it should be 'png'"),
        ({"prompt": "3", "seed": -1}, "seed", "seed is -1; expected an integer from 0 to 2**64 - 1"),
        ({"prompt": "3", "seed": 2**64}, "seed", "expected an integer from 0 to 2**64 - 1"),
        ({"prompt": "3", "seed": 1.0}, "seed", "seed is 1.0; it should be a valid integer"),
        ({"prompt": "3", "seed": "0"}, "seed", "seed is '0'"),
        ({"prompt": "3", "indices": [0, 1]}, "indices", "indices has 2 values for 1 labels"),
        ({"prompt": "3", "indices": [-1]}, "indices", "image index is -1"),
        ({"prompt": "3", "guidance_scale": 0.5}, "guidance_scale", "guidance_scale is 0.5; expected a number at least 1"),
        ({"prompt": "3", "guidance_scale": "4"}, "guidance_scale", "guidance_scale is '4'; it should be a valid number"),
        ({"prompt": "3", "guidance_scale": [4]}, "guidance_scale", "it should be a valid number"),
        ({"prompt": "3", "guidance_scale": 1e39}, "guidance_scale", "that float32 can hold"),
        ({"prompt": "3", "temperature": 0}, "temperature", "temperature is 0.0; expected a number above 0"),
        ({"prompt": "3", "temperature": float("nan")}, "temperature", "temperature is nan"),
        ({"prompt": "3", "temperature": float("inf")}, "temperature", "temperature is inf"),
        ({"prompt": "3", "cfg_schedule": "cosine"}, "cfg_schedule", "choose one of linear, constant"),
        ({"prompt": "3", "num_iter": 0}, "num_iter", "num_iter is 0; expected an integer from 1 to 16"),
        ({"prompt": "3", "num_iter": 17}, "num_iter", "num_iter is 17"),
        ({"prompt": "3", "num_iter": 4.5}, "num_iter", "it should be a valid integer"),
        ({"prompt": "3", "sampling_steps": "100"}, "sampling_steps", "this model's head draws each feature at once"),
        ({"prompt": "3", "stream": "yes"}, "stream", "stream is 'yes'; it should be a valid boolean"),
        ({"prompt": "3", "partial_images": 2}, "partial_images", "partial_images has a meaning with stream alone"),
        ({"prompt": "3", "partial_images": -1, "stream": True}, "partial_images", "greater than or equal to 0"),
        ({"prompt": "3", "user": "x" * 300}, "user", "at most 256 characters"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(served: Served, body: dict[str, Any], param: str, words: str) -> None:
    answer = served.generate(**body)
    code = "missing" if "missing" in words else "invalid_value"
    refused(answer, 400, code, words, param=param)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("guidance_scal", "did you mean 'guidance_scale'?"),
        ("cfg_scale", "did you mean 'guidance_scale'?"),
        ("num_inference_steps", "did you mean 'num_iter'?"),
        ("quality", "there are cfg_schedule, guidance_interval"),
        ("\x1b[31m" + "x" * 500, "unknown parameter"),
    ],
)
def test_an_unknown_parameter_is_refused_with_the_nearest(served: Served, name: str, words: str) -> None:
    status, _, answer = served.generate(**{"prompt": "3", name: 1})
    assert status == 400 and answer["error"]["code"] == "unknown_parameter" and words in answer["error"]["message"]
    assert len(answer["error"]["message"]) <= 500 and "\x1b" not in answer["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"])
def test_a_body_that_is_no_json_object(served: Served, body: bytes) -> None:
    refused(served.ask("POST", ROUTE, body, JSON), 400, "invalid_json", "the body is no JSON")


def test_routes_methods_types_and_models_that_are_not_there(served: Served) -> None:
    refused(served.ask("POST", ROUTE, b"{}", {"Content-Type": "text/plain"}), 400, "unsupported_media_type", "application/json")
    refused(served.ask("GET", "/v2/images"), 404, "not_found", "there is no such route")
    refused(served.ask("GET", ROUTE), 405, "method_not_allowed", "this route does not take GET")
    refused(served.generate(prompt="3", model="dall-e-3"), 404, "model_not_found", "this is 'digits'", param="model")
    refused(served.ask("GET", "/v1/models/gpt"), 404, "model_not_found", param="model")


def test_what_the_server_tells_of_itself(served: Served) -> None:
    assert served.ask("GET", "/healthz")[0] == 200 and served.ask("GET", "/readyz")[0] == 200
    (card,) = served.ask("GET", "/v1/models")[2]["data"]
    assert card["num_classes"] == 10 and card["size"] == "32x32" and card["batch_size"] == 4
    assert card["defaults"] == {"guidance_scale": 4.0, "cfg_schedule": "linear", "temperature": 1.0, "num_iter": 12}
    schema = served.ask("GET", "/openapi.json")[2]
    assert set(schema["paths"]) >= {ROUTE, "/v1/images/edits", "/v1/models", "/healthz", "/readyz", "/metrics"}
    served.generate(prompt="3", seed=0)
    served.generate(prompt="3", seed="0")
    text = served.ask("GET", "/metrics")[2].decode()
    for line in (
        "arinar_queue_rows 0.0",
        "arinar_running_rows 0.0",
        'arinar_requests_total{route="/v1/images/generations",status="400"}',
        'arinar_errors_total{code="invalid_value"}',
        'arinar_phase_seconds_count{phase="outer"}',
        'arinar_phase_seconds_count{phase="queue"}',
        "arinar_batch_fill_count",
        "arinar_images_total",
    ):
        assert line in text, line


def test_before_it_is_ready(digits_bundle: Path) -> None:
    with serving(digits_bundle, start=False) as served:
        assert served.ask("GET", "/healthz")[0] == 200 and served.ask("GET", "/readyz")[0] == 503
        answer = served.generate(prompt="3")
        refused(answer, 503, "not_ready", "being made ready")
        assert int(answer[1]["retry-after"]) >= 1
        assert served.ask("GET", "/v1/models")[2]["data"][0]["batch_size"] is None


def test_where_only_a_restart_helps(digits_bundle: Path) -> None:
    with serving(digits_bundle, start=False) as served:
        served.service.failed = True  # the thread that makes it ready says so
        assert served.ask("GET", "/healthz")[0] == 503
    with serving(digits_bundle) as served:
        scheduler = served.service.scheduler
        scheduler._generate = None  # type: ignore[assignment, method-assign]
        refused(served.generate(prompt="3"), 503, "shutting_down", "the server has stopped working")
        scheduler._worker.join(60)
        assert served.ask("GET", "/healthz")[0] == 503 and served.ask("GET", "/readyz")[0] == 503
        assert served.generate(prompt="3")[0] == 503


# ----------------------------------------------------------------------------------------------------- who may ask

KEYS = ("first-key-0123456789", "second-key-0123456789")


def test_keys(digits_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_text(f"# of the team\n{KEYS[0]}\n\n  {KEYS[1]}  \n")
    with serving(digits_bundle, keys=Keys.read(file)) as served:
        for key in KEYS:
            assert served.generate({"Authorization": f"Bearer {key}"}, prompt="3")[0] == 200
            assert served.generate({"authorization": f"bearer {key}"}, prompt="3")[0] == 200
        for wrong in (
            "Bearer x",
            f"Basic {KEYS[0]}",
            "Bearer",
            KEYS[0],
            f"Bearer {KEYS[0]}x",
            f"Bearer {KEYS[0][:-1]}",
            "Bearer \xff",
        ):
            refused(served.generate({"Authorization": wrong}, prompt="3"), 401, "invalid_api_key", "the API key is wrong")
        for path in ("/v1/models", "/metrics", "/v1/nothing", ROUTE):
            answer = served.ask("GET", path)
            refused(answer, 401, "missing_api_key", "an API key is needed: send Authorization: Bearer KEY")
            assert answer[1]["www-authenticate"] == "Bearer"
        for path in ("/", "/healthz", "/readyz"):
            assert served.ask("GET", path)[0] == 200


@pytest.mark.parametrize(
    ("text", "words"), [("", "holds no API key"), ("# none\n", "holds no API key"), ("short\n", "key 1 is too easy to guess")]
)
def test_bad_key_files(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "keys.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        Keys.read(file)
    with pytest.raises(ValueError, match="a folder; expected a file"):
        Keys.read(tmp_path)


def test_pages_of_strangers_may_not_use_it(digits_bundle: Path) -> None:
    with serving(digits_bundle, hosts=("127.0.0.1", "localhost")) as served:
        refused(served.generate({"Origin": "https://evil.example"}, prompt="3"), 403, "wrong_origin", "another site's page")
        refused(served.generate({"Origin": "null"}, prompt="3"), 403, "wrong_origin")
        refused(served.generate({"Host": f"evil.example:{served.port}"}, prompt="3"), 403, "wrong_host", "'evil.example'")
        refused(served.generate({"Origin": "http://[bad"}, prompt="3"), 400, "invalid_header")
        assert served.generate({"Origin": served.url}, prompt="3")[0] == 200
        assert served.generate({"Host": f"localhost:{served.port}"}, prompt="3")[0] == 200


# ------------------------------------------------------------------------------------------------- how much, how slowly


def send(served: Served, *pieces: bytes, wait: bool = True) -> tuple[int, dict[str, Any]]:
    """Bytes on a connection of their own -> the answer's status and JSON."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        for piece in pieces:
            connection.sendall(piece)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, json.loads(answer.read())


def test_a_body_that_is_too_large(served: Served) -> None:
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Type: application/json\r\n".encode()
    for pieces in (
        (head + b"Content-Length: 300000\r\n\r\n",),  # refused as it is declared
        (
            head + b"Transfer-Encoding: chunked\r\n\r\n",
            b"20000\r\n" + b" " * 0x20000 + b"\r\n",
            b"20001\r\n" + b" " * 0x20001 + b"\r\n",
        ),
    ):
        status, answer = send(served, *pieces)
        assert status == 413 and answer["error"]["code"] == "body_too_large"
        assert "at most 262,144 bytes" in answer["error"]["message"]
    assert served.generate(prompt="3", user="x" * 200)[0] == 200


def test_a_body_that_does_not_arrive(digits_bundle: Path) -> None:
    with serving(digits_bundle, limits=Limits(seconds=0.2)) as served:
        head = f"POST {ROUTE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n".encode()
        status, answer = send(served, head + b'{"prompt"')
        assert status == 408 and answer["error"]["code"] == "slow_body"
        assert served.generate(prompt="3")[0] == 200


def test_many_clients_that_say_nothing_do_no_harm(served: Served) -> None:
    idle = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(50)]
    for connection in idle[:25]:
        connection.sendall(b"POST /v1/images")
    assert served.generate(prompt="3")[0] == 200
    for connection in idle:
        connection.close()
    assert served.generate(prompt="3")[0] == 200


def test_an_answer_that_nobody_takes_is_given_up() -> None:
    import asyncio

    from arinar.serve.door import Visit

    async def stuck(message: Any) -> None:
        await asyncio.Event().wait()

    scope: dict[str, Any] = {"method": "GET", "path": "/", "headers": []}
    visit = Visit(scope, stuck, stuck, Limits(seconds=0.01))  # type: ignore[arg-type]
    with pytest.raises(TimeoutError):
        asyncio.run(visit.send({"type": "http.response.body", "body": b"x"}))


@pytest.fixture
def gated(digits_bundle: Path) -> Iterator[tuple[Served, Gate]]:
    pipeline = Pipeline.load(digits_bundle, threads=1)
    gate = Gate(pipeline)
    with serving(pipeline, options={"queue": 4, "max_wait_ms": 0}) as served:
        yield served, gate
        gate.let()


def in_threads(*works: Any) -> list[Any]:
    pool = ThreadPoolExecutor(len(works))
    found = [pool.submit(work) for work in works]
    pool.shutdown(wait=False)
    return found


def until(condition: Any) -> None:
    waiting = threading.Event()
    for _ in range(6000):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("it did not come to pass")


def test_a_flood_is_refused_with_when_to_come_again(gated: tuple[Served, Gate]) -> None:
    served, gate = gated
    (running,) = in_threads(lambda: served.generate(prompt="1"))
    gate.wait()
    waiting = in_threads(*[lambda: served.generate(prompt="2")] * 4)
    until(lambda: served.service.scheduler.depth == 4)
    answers = [served.generate(prompt="3"), served.generate(prompt="3", stream=True)]
    refused(served.generate(prompt="3", n=5), 400, "invalid_value", "5 images are more than this server takes", param="n")
    for answer in answers:
        refused(answer, 429, "queue_full", "4 images are waiting and 1 more were asked for; at most 4 may wait")
        assert answer[2]["error"]["type"] == "rate_limit_error" and int(answer[1]["retry-after"]) >= 1
    gate.let()
    assert [future.result(60)[0] for future in (running, *waiting)] == [200] * 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels(gated: tuple[Served, Gate], stream: bool) -> None:
    served, gate = gated
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    connection.request("POST", ROUTE, json.dumps({"prompt": "1", "n": 4, "stream": stream}), JSON)
    gate.wait()
    connection.close()
    until(lambda: all(row.job.ended for row in served.service.scheduler._running))
    gate.let(1)
    assert gate.ended.acquire(timeout=60) and len(gate.calls) == 1
    gate.let()
    assert served.generate(prompt="3", seed=0)[0] == 200
    until(lambda: 'arinar_batches_total{outcome="cancelled"} 1.0' in served.ask("GET", "/metrics")[2].decode())


def test_a_stream_shows_that_it_is_alive(gated: tuple[Served, Gate], monkeypatch: pytest.MonkeyPatch) -> None:
    from arinar.serve import service

    monkeypatch.setattr(service, "SIGN_OF_LIFE", 0.01)
    served, gate = gated
    (asked,) = in_threads(lambda: served.generate(prompt="1", stream=True))
    gate.wait()
    threading.Event().wait(0.2)
    gate.let()
    text = asked.result(60)[2].decode()
    assert ": waiting\n\n" in text and text.endswith("data: [DONE]\n\n")


def test_a_request_that_takes_too_long(digits_bundle: Path) -> None:
    with serving(digits_bundle, options={"timeout": 0}) as served:
        refused(served.generate(prompt="3"), 504, "timeout", "not finished within 0 s")
        events = served.events(prompt="3")
        assert events[-1]["error"]["code"] == "timeout"


def test_a_failure_tells_nothing_of_the_server(gated: tuple[Served, Gate]) -> None:
    served, gate = gated
    gate.let()
    lines = io.StringIO()
    logs.set_up(lines)
    gate.error = RuntimeError("graph 'x' did not run in ONNX Runtime: /secret/place/outer_step.onnx")
    answer = served.generate({"X-Request-ID": "mine-1"}, prompt="3")
    refused(answer, 500, "internal_error", "its log has the reason")
    assert "secret" not in json.dumps(answer[2]) and answer[1]["x-request-id"] == "mine-1"
    assert served.events(prompt="3")[-1]["error"]["code"] == "internal_error"
    gate.error = FloatingPointError("graph 'x' made non-finite values")
    refused(served.generate(prompt="3"), 500, "not_finite", "values that are not finite")
    gate.error = None
    assert served.generate({"X-Request-ID": "no good"}, prompt="3")[1]["x-request-id"].isalnum()
    logs.LOGGER.handlers, logs.LOGGER.propagate = [], True
    found = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert any(line["event"] == "request" and line["id"] == "mine-1" and line["status"] == 500 for line in found)
    assert any("secret" in line.get("traceback", "") and line["id"] == "mine-1" for line in found)
    assert all(logging.getLevelName(line["level"].upper()) >= logging.INFO for line in found)


def test_shutting_down_finishes_what_was_begun_and_tells_the_others(gated: tuple[Served, Gate]) -> None:
    served, gate = gated
    (running,) = in_threads(lambda: served.generate(prompt="1"))
    gate.wait()
    (waiting,) = in_threads(lambda: served.generate(prompt="2"))
    (stream,) = in_threads(lambda: served.events(prompt="2"))
    until(lambda: served.service.scheduler.depth == 2)
    served.server.should_exit = True
    refused(waiting.result(60), 503, "shutting_down", "this request was not begun")
    assert stream.result(60)[-1]["error"]["code"] == "shutting_down"
    gate.let()
    assert running.result(60)[0] == 200


# ------------------------------------------------------------------------------------------------------------ classes

NAMES = ("tench, Tinca tinca", "crane", "Crane", "crane", "maillot, tank suit", "maillot", "German shepherd, Alsatian")


def test_prompts_name_classes() -> None:
    classes = Classes(PRESETS["digits"].replace(num_classes=len(NAMES), class_names=NAMES))
    for prompt, label in {
        "tench, Tinca tinca": 0, "TINCA TINCA": 0, "tench": 0, "Crane": 2, " maillot ": 5, "tank suit": 4, "alsatian": 6, "3": 3
    }.items():  # fmt: skip
        assert classes.label(prompt) == label, prompt
    for prompt, words in {
        "crane": r"names several classes: give an id, 1 \(crane\), 3 \(crane\)",
        "CRANE": r"1 \(crane\), 2 \(Crane\), 3 \(crane\)",
        "german shepard, alsatian": r"close to it are 6 \(German shepherd, Alsatian\)",
        "7": "label is 7; this model has classes 0..6",
        "\u0663": "no class of this model",
    }.items():
        with pytest.raises(ValueError, match=words):
            classes.label(prompt)
    nameless = Classes(PRESETS["digits"].replace(class_names=()))
    assert nameless.label(4) == 4 and nameless.name(4) is None
    with pytest.raises(ValueError, match="this model's classes have no names"):
        nameless.label("four")


# ------------------------------------------------------------------------------------------------------------ editing


def png(image: Any, **more: Any) -> bytes:
    data = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(data, **({"format": "PNG"} | more))
    return data.getvalue()


def form(fields: list[tuple[str, str]], files: dict[str, bytes]) -> tuple[bytes, dict[str, str]]:
    mark, parts = "limit-of-a-part", []
    for name, value in fields:
        parts.append(f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode())
    for name, data in files.items():
        head = f'--{mark}\r\nContent-Disposition: form-data; name="{name}"; filename="/etc/{name}"\r\n\r\n'
        parts.append(head.encode() + data + b"\r\n")
    return b"".join(parts) + f"--{mark}--\r\n".encode(), {"Content-Type": f"multipart/form-data; boundary={mark}"}


def edit(served: Served, files: dict[str, bytes], *fields: tuple[str, str], **plain: str) -> tuple[int, Any, Any]:
    body, headers = form([*plain.items(), *fields], files)
    return served.ask("POST", "/v1/images/edits", body, headers)


@pytest.fixture(scope="module")
def picture(pipeline: Pipeline) -> Image.Image:
    return pipeline.generate([3], seed=5, batch_size=4).images[0]


def mask_of(lower: int = 16) -> Any:
    mask = np.full((32, 32, 4), 255, np.uint8)
    mask[lower:, :, 3] = 0
    return mask


def test_edits_are_those_of_direct_calls(served: Served, pipeline: Pipeline, picture: Image.Image) -> None:
    anew = np.zeros((32, 32), np.bool_)
    anew[16:] = True
    for plain, sampling in (
        ({"seed": "4", "guidance_scale": "2.5"}, {"seed": 4, "guidance_scale": 2.5}),
        ({"seed": "4", "paste": "false", "grow": "1", "num_iter": "3"}, {"seed": 4, "paste": False, "grow": 1, "num_iter": 3}),
    ):
        files = {"image": png(picture), "mask": png(mask_of())}
        status, _, answer = edit(served, files, ("labels[]", "8"), ("labels[]", "9"), **plain)
        assert status == 200, answer
        for index, label in enumerate((8, 9)):
            want = pipeline.edit([picture], anew, [label], indices=[index], batch_size=4, **sampling)  # type: ignore[arg-type]
            assert np.array_equal(pixels(answer["data"][index]), np.asarray(want.images[0]))
    with Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))) as image:
        about = json.loads(image.info["arinar"])
    assert about["edit"] == about_edit(np.asarray(picture)[None], anew, 1, False) and about["label"] == 8


def test_the_openai_client_edits(served: Served, pipeline: Pipeline, picture: Image.Image) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any")
    anew = np.zeros((32, 32), np.bool_)
    anew[8:] = True
    answer = client.images.edit(
        image=("a.png", png(picture)), mask=("m.png", png(mask_of(8))), prompt="0", n=2, size="32x32", extra_body={"seed": 1}
    )
    want = pipeline.edit([picture] * 2, anew, [0, 0], seed=1, batch_size=4)
    for k, datum in enumerate(answer.data):
        assert np.array_equal(pixels({"b64_json": datum.b64_json}), np.asarray(want.images[k]))


def test_a_picture_may_say_itself_what_is_to_be_made_anew(served: Served, picture: Image.Image) -> None:
    own = np.dstack([np.asarray(picture), mask_of()[:, :, 3]])
    with_mask = edit(served, {"image": png(picture), "mask": png(mask_of())}, prompt="1", seed="2")[2]
    without = edit(served, {"image": png(own)}, prompt="1", seed="2")[2]
    assert with_mask["data"][0]["b64_json"] == without["data"][0]["b64_json"]
    assert np.array_equal(pixels(without["data"][0])[:16], np.asarray(picture)[:16])


def test_edits_and_generations_stream_and_share_the_server(served: Served, picture: Image.Image) -> None:
    body, headers = form(
        [("prompt", "1"), ("stream", "true"), ("partial_images", "1"), ("seed", "0")],
        {"image": png(picture, format="WEBP", lossless=True), "mask": png(mask_of())},
    )
    asked = in_threads(
        *[lambda: served.ask("POST", "/v1/images/edits", body, headers)] * 3,
        *[lambda: served.generate(prompt="2", seed=0, n=3)] * 3,
    )
    answers = [future.result(120) for future in asked]
    assert [answer[0] for answer in answers] == [200] * 6
    texts = {answer[2] for answer in answers[:3]}
    kinds = [line for line in texts.pop().decode().splitlines() if line.startswith("event: image_edit.")]
    assert kinds[0] == "event: image_edit.queued" and kinds[-1] == "event: image_edit.completed"
    assert kinds.count("event: image_edit.partial_image") == 1


@pytest.mark.parametrize(
    ("files", "fields", "param", "words"),
    [
        ({}, {}, "image", "image is missing; send it as a file"),
        ({"image": b""}, {}, "image", "image is empty"),
        ({"image": b"not a picture"}, {}, "image", "image cannot be told as PNG or JPEG or WebP picture"),
        ({"image": png(mask_of())[:90]}, {}, "image", "image is a damaged PNG or JPEG or WebP picture"),
        ({"image": png(mask_of(), format="GIF")}, {}, "image", "image cannot be told as"),
        ({"image": png(mask_of(), format="TIFF")}, {}, "image", "image cannot be told as"),
        ({"image": png(np.zeros((64, 32, 3), np.uint8))}, {}, "image", "image has 32 x 64 pixels; this model takes 32 x 32"),
        ({"image": png(Image.new("1", (20_000, 20_000)))}, {}, "image", "image has far too many pixels; this model takes"),
        ({"image": png(np.zeros((32, 32, 3), np.uint8))}, {}, "mask", "mask is missing, and image has no transparent pixels"),
        ({"image": png(np.full((32, 32, 4), 255, np.uint8))}, {}, "image", "image has no transparent pixel"),
        ({"image": png(mask_of()), "mask": png(mask_of(32))}, {}, "mask", "mask has no transparent pixel"),
        ({"image": png(mask_of()), "mask": png(np.zeros((32, 32), np.uint8))}, {}, "mask", "mask has no alpha channel"),
        ({"image": png(mask_of()), "mask": png(np.zeros((16, 16, 4), np.uint8))}, {}, "mask", "mask has 16 x 16 pixels"),
        ({"image": png(mask_of()), "mask": b"x"}, {}, "mask", "mask cannot be told as a PNG picture"),
        ({"image": png(mask_of()), "other": b"x"}, {}, "other", "unknown file 'other'; expected image and mask"),
        ({"image": png(mask_of())}, {"prompt": "x"}, "prompt", "prompt is 'x', no class"),
        ({"image": png(mask_of())}, {"n": "many"}, "n", "n is 'many'; it should be a valid integer"),
        ({"image": png(mask_of())}, {"grow": "5"}, "grow", "grow is 5; expected an integer from 0 to 4"),
        ({"image": png(mask_of())}, {"grow": "-1"}, "grow", "grow is -1; it should be greater"),
        ({"image": png(mask_of())}, {"paste": "perhaps"}, "paste", "it should be a valid boolean"),
        ({"image": png(mask_of())}, {"labels": "3,x", "prompt": ""}, "labels", "labels[1] is 'x'"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 30 else "",
)  # fmt: skip
def test_bad_edits(served: Served, files: dict[str, bytes], fields: dict[str, str], param: str, words: str) -> None:
    answer = edit(served, files, **({"prompt": "3"} | fields))
    code = {
        "image is missing; send it as a file": "missing",
        "unknown file 'other'; expected image and mask": "unknown_parameter",
    }
    refused(answer, 400, code.get(words, "invalid_value"), words, param=param)


def test_forms_that_are_none(served: Served, picture: Image.Image) -> None:
    assert served.ask("POST", "/v1/images/edits", b"{}", JSON)[0] == 400
    body, headers = form([("prompt", "3")], {"image": png(picture)})
    answer = served.ask("POST", "/v1/images/edits", body[:-60], headers)
    assert answer[0] == 400, answer
    refused(
        edit(served, {"image": png(mask_of())}, ("seed", "1"), ("seed", "2"), prompt="3"),
        400,
        "invalid_value",
        "given twice",
        param="seed",
    )
    refused(edit(served, {"image": png(mask_of())}, ("sed", "1"), prompt="3"), 400, "unknown_parameter", "'seed'", param="sed")
    head = b"POST /v1/images/edits HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    assert send(served, head + b"Content-Length: 16777217\r\n\r\n")[0] == 413


def test_a_causal_model_edits_what_comes_last(causal_bundle: Path, picture: Image.Image) -> None:
    with serving(causal_bundle) as served:
        assert edit(served, {"image": png(picture), "mask": png(mask_of())}, prompt="3", seed="0")[0] == 200
        upper = mask_of()[::-1]
        answer = edit(served, {"image": png(picture), "mask": png(upper)}, prompt="3")
        refused(answer, 400, "invalid_value", "A causal model goes on from the tokens that it is given", param="mask")


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_serves_until_it_is_told_to_stop(digits_bundle: Path, pipeline: Pipeline) -> None:
    import signal
    import subprocess
    import sys

    command = [sys.executable, "-m", "arinar", "serve", str(digits_bundle), "--port", "0", "--max-batch", "4", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stderr is not None
        greeting = process.stdout.readline()
        port = int(greeting.split("http://127.0.0.1:")[1].split()[0])
        assert "Ctrl-C stops it" in greeting and f"curl http://127.0.0.1:{port}/v1/images" in process.stdout.readline()
        ready = json.loads(process.stderr.readline())  # the trial is over
        assert ready["event"] == "ready" and ready["micro_batches"][-1] == 4 and ready["tried"] is True
        served = Served(None, port, None)  # type: ignore[arg-type]
        answer = served.generate(prompt="3", seed=9)[2]
        assert np.array_equal(pixels(answer["data"][0]), direct(pipeline, 3, 9)) and answer["model"] == digits_bundle.name
        refused(served.generate({"Host": "evil.example"}, prompt="3"), 403, "wrong_host")
        process.send_signal(signal.SIGINT)
        out, log = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0 and out.endswith("stopped\n")
    events = [json.loads(line)["event"] for line in log.splitlines()]
    assert events == ["request", "request", "shutting down"]


def test_the_command_stops_while_it_is_being_made_ready(digits_bundle: Path) -> None:
    import signal
    import subprocess
    import sys

    command = [sys.executable, "-m", "arinar", "serve", str(digits_bundle), "--port", "0", "--max-batch", "4096"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().split("http://127.0.0.1:")[1].split()[0])
        served = Served(None, port, None)  # type: ignore[arg-type]
        until(lambda: served.ask("GET", "/readyz")[0] == 503)  # it answers, and is trying
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0 and out.endswith("stopped\n")


def test_what_the_command_refuses(digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from test_cli import arinar, fails

    serve = ("serve", digits_bundle)
    fails(arinar(*serve, "--host", "0.0.0.0"), 2, "--host 0.0.0.0 lets other machines in: give --api-key-file", "--insecure")
    fails(arinar(*serve, "--max-batch", 6), 2, "max_batch is 6; expected 1, 2, 4, 8")
    fails(arinar(*serve, "--queue", 0), 2, "queue is 0; expected a number from 1 on")
    fails(arinar(*serve, "--max-wait-ms", -1), 2, "max_wait_ms is -1.0")
    fails(arinar(*serve, "--timeout", "nan"), 2, "timeout is nan")
    fails(arinar(*serve, "--api-key-file", tmp_path / "none"), 2, "No such file")
    fails(arinar(*serve, "--host", "no.such.host.invalid", "--insecure"), 2, "cannot listen on no.such.host.invalid")
    fails(arinar("serve", tmp_path, "--port", 0), 2, "is not a bundle")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        fails(arinar(*serve, "--port", taken.getsockname()[1]), 2, "in use; choose another --port")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "arinar.serve.server", raising=False)
    fails(arinar(*serve), 2, "this command needs the package 'uvicorn'", "pip install '.[serve]'")
