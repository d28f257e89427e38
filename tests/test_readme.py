"""The README's Python code runs, as it stands."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from arinar.runtime import Bundle

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.M | re.S)


def test_there_is_code() -> None:
    assert BLOCKS and "Pipeline.load" in BLOCKS[0]


def test_the_page_on_editing_runs(digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", (README.parent / "docs" / "editing.md").read_text(), flags=re.M | re.S)
    shutil.copytree(digits_bundle, tmp_path / "bundle")
    Image.new("RGB", (32, 32), "white").save(tmp_path / "photo.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    mask.save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(block.replace("[207]", "[2]"), "docs/editing.md", "exec"), {"__name__": "__main__"})
    with Image.open("edited.png") as edited:
        assert edited.getpixel((0, 0)) == (255, 255, 255) and edited.getpixel((16, 16)) != (255, 255, 255)


def test_python_blocks_run(digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, as a reader would, on a demo model: it has other labels and fewer steps than a published one.
    Nothing else is changed."""
    shutil.copytree(digits_bundle, tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(BLOCKS, 1):
        code = block.replace("[207, 360]", "[2, 3]").replace("[207]", "[2]").replace("num_iter=64", "num_iter=12")
        exec(compile(code, f"README.md, Python block {number}", "exec"), names)
        for file in re.findall(r'\.save\("(.+?)"', code):
            with Image.open(tmp_path / file) as image:
                image.load()
                assert image.size == (32, 32)
            (tmp_path / file).unlink()
        for name in re.findall(r"\bout\.(\w+)", block):  # also those that a comment promises
            assert getattr(names["out"], name) is not None
    Bundle.open(tmp_path / "bundle").verify()


@pytest.mark.parametrize("page", [README, *sorted((README.parent / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Those within the repository."""
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]
