"""The page, in a real browser: by mouse, by keyboard, on a phone's width."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime")
pytest.importorskip("fastapi", reason="serving needs the extra `serve`")

from served import Gate, Served, serving

from arinar.runtime import Pipeline
from arinar.serve.app import PAGE, content_policy
from arinar.serve.keys import Keys

#: Set: there must be a browser.
VARIABLE = "ARINAR_BROWSER"
#: A folder for pictures of the page, for people to look at.
SHOTS = os.environ.get("ARINAR_SHOTS")
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 850}
KEY = "a-key-for-the-page-0123"


def test_it_needs_nothing_from_elsewhere(digits_bundle: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']|@import|\burl\(|https?://(?!\$)", text)
    assert not re.findall(r"<[^>]*\son\w+=|<[^>]*\sstyle=", text)
    with serving(digits_bundle) as served:
        status, headers, body = served.ask("GET", "/")
    assert status == 200 and body.decode() == text and headers.get_content_type() == "text/html"
    policy = headers["content-security-policy"]
    assert policy == content_policy(text) and "default-src 'none'" in policy and "unsafe" not in policy
    assert len(re.findall(r"'sha256-[^']+'", policy)) == 2


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        assert VARIABLE not in os.environ, f"{VARIABLE} is set, but playwright is not installed"
        pytest.skip("playwright is not installed")
    path = os.environ.get(VARIABLE) or shutil.which("chromium")
    if path is None:
        pytest.skip(f"no chromium; {VARIABLE} may name one")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def pipeline(digits_bundle: Path) -> Pipeline:
    return Pipeline.load(digits_bundle, threads=1)


@pytest.fixture(scope="module")
def server(digits_bundle: Path) -> Iterator[Served]:
    with serving(digits_bundle) as found:
        yield found


class Looking:
    """A page in a window of a size. Whatever its script or its policy complains of fails the test at the end."""

    def __init__(self, browser: Any, url: str, size: dict[str, int], **more: Any) -> None:
        self.context = browser.new_context(viewport=size, **more)
        self.page, self.complaints = self.context.new_page(), list[str]()
        self.page.set_default_timeout(60_000)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        self.page.goto(url)

    def shot(self, name: str) -> None:
        if SHOTS:
            self.page.screenshot(path=f"{SHOTS}/{name}.png")

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def look(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    opened: list[Looking] = []

    def open_(url: str, size: dict[str, int] = DESKTOP, **more: Any) -> Looking:
        opened.append(Looking(browser, url, size, **more))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()
        # (A refused request is told of by the browser too.)
        assert [text for text in one.complaints if "Failed to load resource" not in text] == []


def pixels(page: Any, number: int = 0) -> Any:
    import base64

    source = page.locator("figure img").nth(number).get_attribute("src")
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        return np.asarray(image)


def done(page: Any, count: int) -> None:
    """Until so many pictures are finished, and nothing runs."""
    from playwright.sync_api import expect

    expect(page.locator("figure:not(.growing)")).to_have_count(count, timeout=60_000)
    expect(page.locator("#go")).to_be_enabled(timeout=60_000)


def test_pictures_by_mouse(look: Any, server: Served, pipeline: Pipeline) -> None:
    seen = look(server.url)
    page = seen.page
    page.get_by_label("Class", exact=True).click()
    page.get_by_role("option", name="7", exact=True).click()
    page.get_by_label("Images").fill("3")
    page.get_by_label("Seed").fill("5")
    page.locator("#guidance_scale").fill("2.5")
    page.locator("#num_iter").fill("6")
    page.get_by_role("button", name="Generate", exact=True).click()
    done(page, 3)
    for index in range(3):
        want = pipeline.generate([7], seed=5, indices=[index], guidance_scale=2.5, num_iter=6, batch_size=4)
        assert np.array_equal(pixels(page, index), np.asarray(want.images[0]))
    assert page.locator("figcaption").nth(1).inner_text().startswith("7\nseed 5, number 1")
    seen.shot("desktop")

    page.locator("figure .show").nth(1).click()
    assert page.locator("#large").is_visible() and "number 1" in page.locator("#large-title").inner_text()
    page.keyboard.press("ArrowRight")
    assert "number 2" in page.locator("#large-title").inner_text()
    seen.shot("enlarged")
    page.keyboard.press("Escape")
    assert not page.locator("#large").is_visible()

    with page.expect_download() as download:
        page.get_by_role("link", name="Download").nth(1).click()
    from arinar.runtime.images import read_metadata

    assert download.value.suggested_filename == "digits-7-5-1.png"
    found = read_metadata(download.value.path())
    assert found is not None and found["label"] == 7 and found["index"] == 1 and found["guidance_scale"] == 2.5

    page.get_by_role("button", name="Same again").nth(1).click()
    done(page, 4)
    assert np.array_equal(pixels(page, 0), pixels(page, 2))  # the newest stand first


def test_code_that_is_copied_makes_the_same_picture(look: Any, server: Served, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("openai")
    import subprocess

    seen = look(server.url)
    page = seen.page
    page.get_by_label("Images").fill("2")
    page.get_by_role("button", name="Generate", exact=True).click()
    done(page, 2)
    want = pixels(page, 1)
    monkeypatch.chdir(tmp_path)
    for kind in ("Python", "curl"):
        page.get_by_role("button", name=kind, exact=True).nth(1).click()
        code = page.locator("#code textarea").input_value()
        seen.shot(f"code-{kind}")
        page.get_by_role("button", name="Close").last.click()
        if kind == "Python":
            exec(compile(code, "copied", "exec"), {})
        elif shutil.which("curl"):
            subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True, cwd=tmp_path)
        with Image.open(tmp_path / "picture.png") as image:
            assert np.array_equal(np.asarray(image), want), kind
        (tmp_path / "picture.png").unlink()
        if kind == "Python" and not shutil.which("curl"):
            break


def test_by_keyboard_alone(look: Any, server: Served) -> None:
    seen = look(server.url)
    page = seen.page
    page.locator("#prompt").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("4")
    seen.shot("picker")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.locator("#prompt").input_value() == "4" and page.locator("#prompt-list").is_hidden()
    page.keyboard.press("Tab")
    page.keyboard.type("1")
    page.keyboard.press("Enter")
    done(page, 1)
    assert page.locator("figcaption").first.inner_text().startswith("4\n")
    page.get_by_role("button", name="Edit").focus()
    page.keyboard.press("Enter")
    page.locator("#board").focus()
    for key in (" ", "ArrowRight", " ", "ArrowDown", " ", " "):
        page.keyboard.press(key)
    assert page.locator("#marked").inner_text() == "2 of 16 squares marked"


def test_a_class_is_found_by_a_part_of_its_name(look: Any, server: Served) -> None:
    from playwright.sync_api import expect

    names = [f"animal {number}" for number in range(1000)]
    names[7] = "golden retriever, hunting dog"

    def named(route: Any) -> None:
        answer = route.fetch()
        data = answer.json()
        data["data"][0] |= {"class_names": names, "num_classes": 1000}
        route.fulfill(response=answer, json=data)

    seen = look("about:blank")
    page = seen.page
    page.route("**/v1/models", named)
    page.goto(server.url)
    expect(page.locator("#about")).to_contain_text("1000 classes")
    page.locator("#prompt").click()
    expect(page.get_by_role("option")).to_have_count(100)  # all that anybody looks through
    page.locator("#prompt").fill("RETR")
    expect(page.get_by_role("option")).to_have_text(["7 golden retriever, hunting dog"])
    seen.shot("names")
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_have_value("7 golden retriever, hunting dog")
    page.get_by_label("Images").fill("1")
    page.get_by_role("button", name="Generate", exact=True).click()
    done(page, 1)
    assert page.locator("figcaption").first.inner_text().startswith("7 golden retriever, hunting dog\nseed")


def test_pictures_grow_and_can_be_stopped(look: Any, digits_bundle: Path) -> None:
    from playwright.sync_api import expect

    pipeline = Pipeline.load(digits_bundle, threads=1)
    gate = Gate(pipeline)
    with serving(pipeline) as served:
        seen = look(served.url)
        page = seen.page
        page.get_by_label("Images").fill("4")
        page.get_by_label("Seed").fill("1")
        page.get_by_role("button", name="Generate", exact=True).click()
        gate.wait()
        expect(page.locator("figure.growing")).to_have_count(4)
        gate.let(8)
        expect(page.locator("#told")).to_have_text("Step 8 of 12")
        expect(page.locator("figcaption").first).to_have_text("0: step 8")
        early = pixels(page)
        assert np.array_equal(
            early, np.asarray(next(p.preview()[0] for p in gate.stream([0], seed=1, batch_size=4) if p.step == 8))
        )
        assert page.get_by_role("button", name="Generate", exact=True).is_disabled()
        seen.shot("growing")
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#told")).to_have_text("Stopped")
        expect(page.locator("figure")).to_have_count(0)
        gate.let()
        assert gate.ended.acquire(timeout=60)
        page.get_by_role("button", name="Generate", exact=True).click()
        done(page, 4)
        assert len(gate.calls) == 2
        gate.let()


def test_errors_stand_where_the_user_looks(look: Any, server: Served) -> None:
    from playwright.sync_api import expect

    seen = look(server.url)
    page, go = seen.page, seen.page.get_by_role("button", name="Generate", exact=True)
    page.locator("#temperature").fill("0")
    go.click()
    expect(page.locator("#temperature-error")).to_contain_text("Temperature is 0.0; expected a number above 0")
    expect(page.locator("#temperature")).to_be_focused()
    seen.shot("error")
    page.locator("#temperature").fill("1")
    page.locator("#prompt").fill("dog")
    page.locator("#seed").fill("99999999999999999999")
    go.click()
    expect(page.locator("#seed-error")).to_contain_text("The seed must be a whole number")
    expect(page.locator("#temperature-error")).to_be_empty()
    page.locator("#clear-seed").click()
    go.click()
    expect(page.locator("#prompt-error")).to_contain_text("no class of this model")
    assert page.locator("figure").count() == 0
    page.locator("#prompt").fill("3")
    page.route("**/v1/images/**", lambda route: route.abort())
    go.click()
    expect(page.locator("#error")).to_contain_text("The server cannot be reached")
    page.unroute("**/v1/images/**")
    go.click()
    done(page, 4)
    expect(page.locator("#error")).to_be_hidden()


def test_a_part_is_made_anew(look: Any, server: Served, pipeline: Pipeline) -> None:
    from playwright.sync_api import expect

    seen = look(server.url)
    page = seen.page
    page.get_by_label("Images").fill("1")
    page.get_by_label("Seed").fill("3")
    page.get_by_role("button", name="Generate", exact=True).click()
    done(page, 1)
    before = pixels(page)
    page.get_by_role("button", name="Edit").click()
    page.locator("#edit-go").click()
    expect(page.locator("#edit-error")).to_contain_text("Mark at least one square")
    box = page.locator("#board").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 8, box["y"] + box["height"] * 7 / 8)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 7 / 8, box["y"] + box["height"] * 7 / 8, steps=12)
    page.mouse.up()
    expect(page.locator("#marked")).to_have_text("4 of 16 squares marked")
    page.locator("#edit-prompt").fill("8")
    seen.shot("edit")
    page.locator("#edit-go").click()
    done(page, 2)
    anew = np.zeros((32, 32), np.bool_)
    anew[24:] = True
    want = pipeline.edit([Image.fromarray(before)], anew, [8], seed=3, batch_size=4).images[0]
    assert np.array_equal(pixels(page), np.asarray(want))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(look: Any, server: Served, scheme: str) -> None:
    seen = look(server.url, PHONE, color_scheme=scheme, has_touch=True)
    page = seen.page
    page.get_by_label("Images").fill("2")
    page.get_by_role("button", name="Generate", exact=True).tap()
    done(page, 2)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]  # nothing sticks out
    seen.shot(f"phone-{scheme}")
    page.locator("figure .show").first.tap()
    seen.shot(f"phone-{scheme}-enlarged")
    page.get_by_role("button", name="Close").first.tap()
    page.get_by_role("button", name="Edit").first.tap()
    page.locator("#board").tap()
    assert page.locator("#marked").inner_text() == "1 of 16 squares marked"
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    seen.shot(f"phone-{scheme}-edit")


def test_a_server_with_keys_asks_for_one(look: Any, digits_bundle: Path) -> None:
    from playwright.sync_api import expect

    with serving(digits_bundle, keys=Keys([KEY])) as served:
        seen = look(served.url)
        page = seen.page
        expect(page.locator("#key-error")).to_contain_text("This server asks for a key")
        seen.shot("key")
        page.get_by_label("API key").fill("wrong-key-wrong-key")
        page.get_by_label("Class", exact=True).click()
        expect(page.locator("#key-error")).to_contain_text("The API key is wrong")
        page.get_by_label("API key").fill(KEY)
        page.locator("#prompt").fill("2")
        page.get_by_label("Images").fill("1")
        page.get_by_role("button", name="Generate", exact=True).click()
        done(page, 1)
