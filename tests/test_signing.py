"""The recipe of docs/security.md: its commands, word for word, sign a bundle, verify it, and notice what was changed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from arinar.runtime import Bundle

DOCUMENT = Path(__file__).parent.parent / "docs" / "security.md"
#: Where the command is; set, it must be there.
VARIABLE = "ARINAR_MODEL_SIGNING"


@pytest.fixture(scope="module")
def commands() -> Path:
    """The folder of the command `model_signing`."""
    given = os.environ.get(VARIABLE)
    found = given or shutil.which("model_signing", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        pytest.skip(f"model-signing is not installed; docs/security.md says how, {VARIABLE} is the path of its command")
    assert shutil.which(found), f"{VARIABLE} is {given}, which is no command"
    return Path(found).absolute().parent


def test_sign_and_verify(commands: Path, digits_bundle: Path, tmp_path: Path) -> None:
    _, keys, sign, verify = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    bundle = Path(shutil.copytree(digits_bundle, tmp_path / "bundle"))
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"

    def run(script: str) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    for script in (keys, sign):
        code, told = run(script)
        assert code == 0, told
    code, told = run(verify)
    assert code == 0 and "Verification succeeded" in told, told
    Bundle.open(bundle).verify()

    manifest = bundle / "manifest.json"
    content = manifest.read_bytes()
    manifest.write_bytes(content.replace(b'"temperature": 1.0', b'"temperature": 1.5'))
    code, told = run(verify)
    assert code == 1 and "manifest.json" in told
    manifest.write_bytes(content)
    (bundle / "extra.onnx").touch()
    code, told = run(verify)
    assert code == 1 and "extra.onnx" in told
    (bundle / "extra.onnx").unlink()
    manifest.rename(tmp_path / "manifest.json")
    manifest.symlink_to(tmp_path / "manifest.json")
    assert run(verify)[0] == 1
    manifest.unlink()
    assert run(verify)[0] == 1
