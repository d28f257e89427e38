"""README and docs do as they say: Python blocks run, `arinar` commands run or at least parse, links lead somewhere.

They are written for a published model of 1,000 classes and 256 pixels, and run on the digits': `in_small` is all that is
changed. What a command needs lies in its folder: the checkpoint `checkpoint-last.pth`, its autoencoder `kl16.ckpt`, pictures.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from once import once
from PIL import Image

from arinar.checkpoint import load_arinar, save_arinar
from arinar.cli import main
from arinar.demo import demo_vae
from arinar.runtime import Bundle

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Classes 2 and 3 are called as 207 and 360 are.
NAMES = ("tench", "goldfish", "golden retriever", "otter", "4", "5", "6", "7", "8", "9")
#: Commands that take minutes, wait for ever, or need what is not here: their arguments are only parsed.
LONG = ("demo", "train", "serve", "build", "completion", "sample", "evaluate", "sweep")
#: Pages whose commands build on what such commands make.
PARSED = ("train.md", "precision.md", "gpu.md", "mar.md", "demo-models.md", "security.md", "contributing.md", "models.md")
#: Python that talks to a running server (tests/test_serve.py does).
ELSEWHERE = ("serving.md",)
#: Commands that change nothing: the same words on several pages are run once.
READING = ("inspect", "parity", "bench")
RAN: set[tuple[str, ...]] = set()
#: Whatever else begins a line of a shell block.
OTHERS = (
    *("python3", "python", "python3.13", "pip", "git", "curl", "openssl", "chmod", "sha256sum"),
    *("model_signing", "mkdocs", "serve", "ruff", "mypy"),
)


def blocks(page: Path, *languages: str) -> list[str]:
    pattern = rf"^```(?:{'|'.join(languages)})\n(.*?)^```$"
    return re.findall(pattern, page.read_text(encoding="utf-8"), flags=re.M | re.S)


def in_small(text: str) -> str:
    """The digits' classes, steps and pixels in place of a published model's."""
    text = re.sub(r"\b207\b", "2", re.sub(r"\b360\b", "3", text))
    text = re.sub(r"--box ([\d,]+)", lambda m: "--box " + ",".join(str(int(n) // 8) for n in m[1].split(",")), text)
    text = re.sub(r"staged:64x24,64x6,128x2\b", "staged:4x3,4x2,8x1", text)
    return re.sub(r"num_iter=64\b", "num_iter=12", re.sub(r"--num-iter (24|32|64|256)\b", "--num-iter 12", text))


def commands(page: Path) -> list[list[str]]:
    """Every command of a page's shell blocks, as words; lines that end in a backslash go on."""
    lines = [line for block in blocks(page, "sh", "bash") for line in block.replace("\\\n", " ").splitlines()]
    parts = [part for line in lines for part in re.split(r"&&|\|\|?|;", line.split("  #")[0])]
    return [words for part in parts if (words := shlex.split(in_small(part), comments=True))]


@pytest.fixture(scope="session")
def exported(digits_bundle: Path, shared_folder: Path) -> Path:
    """The digits' bundle, with classes that have names."""
    out = shared_folder / "named-bundle"

    def make() -> None:
        shutil.copytree(digits_bundle, out)
        manifest = json.loads((out / "manifest.json").read_text())
        manifest["config"]["class_names"] = NAMES
        (out / "manifest.json").write_text(json.dumps(manifest))

    once(out, make)
    return out


@pytest.fixture
def folder(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    model = load_arinar("digits")
    model.config = model.config.replace(class_names=NAMES)
    save_arinar(tmp_path / "checkpoint-last.pth", model)
    shutil.copyfile(demo_vae("digits"), tmp_path / "kl16.ckpt")
    Image.new("RGB", (32, 32), "white").save(tmp_path / "photo.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    mask.save(tmp_path / "mask.png")
    shutil.copytree(exported, tmp_path / "demo-output" / "digits-bundle")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_blocks_run(page: Path, folder: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One after another, as a reader would."""
    if page.name in ELSEWHERE:
        pytest.skip("it asks a running server")
    shutil.copytree(exported, folder / "bundle")
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, "python"), 1):
        exec(compile(in_small(block), f"{page.name}, Python block {number}", "exec"), names)
        for file in re.findall(r'\.save\("([^{}"]+?)"', block):
            with Image.open(folder / file) as image:
                image.load()
                assert image.size == (32, 32)
        for name in re.findall(r"\bout\.(\w+)", block):  # also those that a comment promises
            assert getattr(names["out"], name) is not None
    Bundle.open(folder / "bundle").verify()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh", "bash")], ids=lambda page: page.name)
def test_commands_run(page: Path, folder: Path, exported: Path) -> None:
    """Those that take seconds; of the others, that the command takes such arguments."""
    for words in commands(page):
        program, *arguments = words
        if Path(program).name != "arinar":
            assert Path(program).name in OTHERS or program in ("export", "cd", "."), words
            continue
        name, *options = arguments
        assert name in main.commands, words
        main.commands[name].make_context(name, list(options), resilient_parsing=False)
        if name in LONG or page.name in PARSED or "--backend" in options or "--help" in options:
            continue
        if name == "export" and "--precision" not in options and options[-1] == "bundle/":
            shutil.copytree(exported, folder / "bundle")  # exports of a demo model are tests of their own
            continue
        if any(option.startswith("bundle") for option in options) and not (folder / "bundle").exists():
            shutil.copytree(exported, folder / "bundle")
        if tuple(words) in RAN:
            continue
        once_only = ["--repeats", "1"] if name == "bench" else []
        result = CliRunner().invoke(main, [name, *options, *once_only])
        assert result.exit_code == 0, (words, result.output, result.exception)
        if name in READING:
            RAN.add(tuple(words))


def test_the_pages_are_looked_at() -> None:
    """Else the tests above could pass by finding nothing."""
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 10
    assert sum(words[0].endswith("arinar") for page in PAGES for words in commands(page)) >= 60
    with pytest.raises(click.UsageError):
        main.commands["generate"].make_context("generate", ["bundle/", "--lables", "3"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Those within the repository, and the headings that they name."""
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)", page.read_text(encoding="utf-8")):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            lines = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.M)
            anchors = {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}
            assert heading in anchors, link


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.M))
    assert listed == {page.name for page in PAGES[1:]}
