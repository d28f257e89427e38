"""Nothing is lost: two writers at once, processes that are killed, disks that are full, folders that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arinar import files
from arinar.files import check_folder, check_writable, hidden_name, replacing, sweep, write_text

ROOT = Path(files.__file__).resolve().parent.parent


def test_two_writers_of_one_file_do_not_collide(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    with replacing(path) as first, replacing(path) as second:
        assert first != second and str(os.getpid()) in first.name
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the last to end
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_processes_that_write_one_file_leave_one_of_theirs_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    code = (
        "import sys; from arinar.files import write_text\n"
        f"for _ in range(40): write_text({str(path)!r}, sys.argv[1] * 200_000)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, letter], cwd=ROOT) for letter in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    text = path.read_text()
    assert len(text) == 200_000 and len(set(text)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out.txt"]


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    fsync, rename = os.fsync, os.replace

    def synced(handle: int) -> None:
        seen.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *names: (seen.append("renamed"), rename(*names)))
    write_text(tmp_path / "a", "text")
    assert seen == ["file", "renamed", "folder"]


def test_an_exception_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_litter_is_swept_when_it_is_old_and_ours(tmp_path: Path) -> None:
    litter = [hidden_name(tmp_path / "bundle", "partial"), hidden_name(tmp_path / "other.png", "old")]
    litter.append(tmp_path / ".bundle.old-abc")  # as earlier versions named it, beside the same name alone
    theirs = [tmp_path / ".other.partial-mine", tmp_path / "bundle.partial-1-00000000", tmp_path / ".bundle.lock"]
    fresh = hidden_name(tmp_path / "bundle", "partial")
    busy = hidden_name(tmp_path / "bundle", "partial")
    for folder in (*litter, busy, fresh):
        (folder / "graphs").mkdir(parents=True)
        (folder / "graphs" / "a.onnx").touch()
    for path in theirs:
        path.touch()
    old = time.time() - files.LITTER_AGE - 60
    for path in (*tmp_path.rglob("*"),):
        if (not path.is_relative_to(fresh) and path.name != "a.onnx") or any(path.is_relative_to(p) for p in litter):
            os.utime(path, (old, old))
    sweep(tmp_path / "bundle")
    # One is of today, and something in the other was written today.
    assert set(tmp_path.iterdir()) == {*theirs, fresh, busy}


def test_checking_sweeps_and_leaves_nothing(tmp_path: Path) -> None:
    left = hidden_name(tmp_path / "a", "partial")
    left.touch()
    os.utime(left, (0, 0))
    check_writable(tmp_path / "a")
    check_folder(tmp_path / "not" / "there")
    assert list(tmp_path.iterdir()) == []


def test_links_are_swept_and_what_they_lead_to_is_not(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    kept = write_text(tmp_path / "mine" / "kept", "text")
    link = hidden_name(tmp_path / "a", "old")
    link.symlink_to(tmp_path / "mine")
    os.utime(link, (0, 0), follow_symlinks=False)
    sweep(tmp_path / "a")
    assert kept.exists() and not link.is_symlink()


@pytest.mark.parametrize("folder", ["file", "file/sub/sub", "/proc/nowhere"])
def test_folders_that_cannot_be_written(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write to .*; choose another folder"):
        check_folder(tmp_path / folder)
    with pytest.raises(ValueError, match=r"cannot write .*; choose another file"):
        check_writable(tmp_path / folder / "a", make_folder=True)


def test_a_full_disk_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a", "old")
    with pytest.raises(OSError, match=r"cannot write .*a: No space left on device; make room there, or choose") as caught:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError(28, os.strerror(28))
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


# ------------------------------------------------------------------------------------- bundles, light on their feet

# A precision is replaced in a process that needs neither PyTorch nor ONNX: `place` under the lock is where files move.
# Each child dies at its n-th file operation, as a kill -9 would have it.
KILLS = """
import os, shutil, signal, sys
from dataclasses import replace
from pathlib import Path
from arinar.export.folder import locked, place, scratch_folder
from arinar.runtime.bundle import Bundle, BundleError, file_info

source, out, precision, model = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree", "os.listdir", "os.scandir")

def overwrite(number):
    manifest = Bundle.open(source).manifest
    with scratch_folder(out) as scratch:
        made = scratch / "graphs" / precision
        made.mkdir(parents=True)
        entries = manifest.graphs[precision]
        prefix = f"graphs/{precision}/"
        for name in manifest.files:
            if name.startswith(prefix):
                shutil.copy(source / name, made / Path(name).name)
        (made / "extra.data").write_bytes(b"%d" % number)
        entries = {key: replace(i, weights=(*i.weights, prefix + "extra.data") if i.file.startswith(prefix) else i.weights)
                   for key, i in entries.items()}
        kept = {name: info for name, info in manifest.files.items() if name.startswith(prefix)}
        kept |= {prefix + "extra.data": file_info(made / "extra.data")}
        shared = {f: manifest.files[f] for i in entries.values() for f in i.files if f not in kept}
        graphs = {precision: entries}
        if model == "other":  # replaces the bundle: it must hold all that it names
            graphs[precision] = {key: i for key, i in entries.items() if i.file.startswith(prefix)}
            shared = {}
        with locked(out, print):
            start()
            place(made, out, replace(manifest, graphs=graphs, files=kept | shared, schemes={}), add=model == "same")

killed = 0
shutil.copytree(source, out)
for count in range(1, 10_000):
    child = os.fork()
    if child == 0:
        seen = 0
        def hook(event, args):
            global seen
            if event in EVENTS:
                seen += 1
                if seen == count:
                    os.kill(os.getpid(), signal.SIGKILL)
        def start():
            sys.addaudithook(hook)
        overwrite(count)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    bundle = Bundle.open(out)
    bundle.verify()
    assert precision in bundle.manifest.graphs
    if model == "same":
        assert set(bundle.manifest.graphs) == set(Bundle.open(source).manifest.graphs)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    killed += 1
assert {p.name for p in (out / "graphs").iterdir()} == {n.split("/")[1] for n in bundle.manifest.files}
assert not out.with_name(f".{out.name}.lock").exists()
print(killed)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("model", ["same", "other"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_killed_overwrite_leaves_a_whole_bundle(precision: str, model: str, shared_folder: Path, tmp_path: Path) -> None:
    from tiny_bundles import TINY, tiny_bundle

    words = [sys.executable, "-c", KILLS, str(tiny_bundle(shared_folder, TINY)), str(tmp_path / "b"), precision, model]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30
