"""Nothing is lost: two writers at once, processes that are killed, disks that are full, folders that cannot be written."""

from __future__ import annotations

import os
import signal
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


# Two processes add a precision each to one bundle, at one time; the one that is first holds the lock until both want it.
ADDS = """
import shutil, sys, time
from dataclasses import replace
from pathlib import Path
from arinar.export import folder
from arinar.export.folder import locked, place, scratch_folder
from arinar.runtime.bundle import Bundle

source, out, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
manifest = Bundle.open(source).manifest
if "without" in sys.argv:
    folder.fcntl = None
with scratch_folder(out) as scratch:
    made = scratch / "graphs" / name
    shutil.copytree(source / "graphs" / "fp32", made)
    alone = folder._moved(replace(manifest, graphs={name: manifest.graphs["fp32"]}), "graphs/fp32/", f"graphs/{name}/")
    own = {file: info for file, info in alone.files.items() if file.startswith(f"graphs/{name}/")}
    alone = replace(alone, files=own, schemes={name: "fp32"})
    (out.parent / f"{name}.ready").touch()
    while len(list(out.parent.glob("*.ready"))) < 3 and "without" not in sys.argv:
        time.sleep(0.01)
    with locked(out, print):
        time.sleep(0.2)
        place(made, out, alone, add=(out / "manifest.json").exists())
"""


@pytest.mark.parametrize("new", [False, True], ids=["added", "new"])
def test_precisions_added_at_once_are_all_there(new: bool, shared_folder: Path, tmp_path: Path) -> None:
    import shutil

    from tiny_bundles import TINY, tiny_bundle

    from arinar.runtime import Bundle

    source, out = tiny_bundle(shared_folder, TINY), tmp_path / "b"
    if not new:
        shutil.copytree(source, out)
    words = [sys.executable, "-c", ADDS, str(source), str(out)]
    writers = [subprocess.Popen([*words, name], cwd=ROOT, stdout=subprocess.PIPE, text=True) for name in ("a", "b", "c")]
    said = [writer.communicate()[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert sum("waiting for it to end" in text for text in said) == 2
    bundle = Bundle.open(out)
    bundle.verify()
    assert set(bundle.manifest.graphs) == {"a", "b", "c"} | (set() if new else {"fp32", "fp16"})
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_bundle_is_written_where_there_are_no_locks(shared_folder: Path, tmp_path: Path) -> None:
    from tiny_bundles import TINY, tiny_bundle

    from arinar.runtime import Bundle

    words = [sys.executable, "-c", ADDS, str(tiny_bundle(shared_folder, TINY)), str(tmp_path / "b"), "a", "without"]
    assert subprocess.run(words, cwd=ROOT, check=False).returncode == 0
    Bundle.open(tmp_path / "b").verify()


def test_who_opened_the_old_graphs_is_told_to_load_again(shared_folder: Path, tmp_path: Path) -> None:
    import shutil
    from dataclasses import replace

    from tiny_bundles import TINY, tiny_bundle

    from arinar.export.folder import place
    from arinar.runtime import Bundle, BundleError

    out = Path(shutil.copytree(tiny_bundle(shared_folder, TINY), tmp_path / "b"))
    old = Bundle.open(out)
    made = Path(shutil.copytree(out / "graphs" / "fp32", tmp_path / "made"))
    files = {name: info for name, info in old.manifest.files.items() if name.startswith("graphs/fp32/")}
    again = {name: replace(info, opset=21) for name, info in old.manifest.graphs["fp32"].items()}
    alone = replace(old.manifest, graphs={"fp32": again}, files=files)
    kept = place(made, out, alone, add=True)
    assert kept.graphs["fp32"] == again and kept.files == old.manifest.files  # the same bytes stay where they are
    (out / "graphs" / "fp32" / "weights.data").write_bytes(b"damaged")
    changed = place(made, out, alone, add=True)
    folder = changed.graphs["fp32"]["outer_step"].file.split("/")[1]
    assert folder.startswith("fp32-") and changed.graphs["fp16"]["vae_decoder"].file == f"graphs/{folder}/vae_decoder.onnx"
    Bundle.open(out).verify()
    assert {path.name for path in (out / "graphs").iterdir()} == {folder, "fp16"}
    with pytest.raises(BundleError, match="another command has changed .* since it was opened; load the bundle again"):
        old.verify()


# --------------------------------------------------------------------------------------------------- commands


def _leave(words: list[str], tmp_path: Path, at: str, number: int) -> tuple[int, str]:
    """Start a command, send it a signal once it has said something -> its exit code, what it said."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    command = subprocess.Popen(
        [sys.executable, "-m", "arinar", *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment
    )
    said = ""
    assert command.stderr is not None
    for line in command.stderr:
        said += line
        if at in line:
            command.send_signal(number)
            break
    said += command.communicate()[1]
    # What PyTorch's exporter keeps in the temporary folder is not ours.
    assert not [path.name for path in temporary.iterdir() if path.name.startswith("arinar")]
    temporary.rename(tmp_path.with_name(f"{tmp_path.name}-tmp"))
    return command.returncode, said


@pytest.mark.parametrize(
    "words",
    [
        ["export", "digits", "-o", "out/bundle"],
        ["calibrate", "digits", "--out", "calib.json"],
        ["demo", "-o", "out"],
    ],
    ids=lambda words: words[0],
)
def test_sigterm_leaves_nothing_behind(words: list[str], tmp_path: Path) -> None:
    code, said = _leave(words, tmp_path, "[1/", signal.SIGTERM)
    assert code == 143 and said.splitlines()[-1] == "arinar: error: terminated", said
    left = [path for path in tmp_path.rglob("*") if not path.is_dir() or path.name.startswith(".")]
    assert left == []


def test_sigterm_is_as_it_was_afterwards() -> None:
    from arinar.cli.group import Terminated, sigterm_raises

    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(Terminated), sigterm_raises():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with sigterm_raises():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_temporary_folders_of_dead_processes_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = {"dead": ended.pid, "alive": os.getppid()}
    folders = {name: tmp_path / f"arinar-calibrate-{pid}-00000000" for name, pid in names.items()}
    fresh = tmp_path / f"arinar-calibrate-{ended.pid}-00000001"
    for folder in (*folders.values(), fresh):
        folder.mkdir()
    for folder in folders.values():
        os.utime(folder, (0, 0))
    with files.temporary_folder("arinar-calibrate") as made:
        assert set(tmp_path.iterdir()) == {folders["alive"], fresh, made}
    assert not made.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--steps", "1", "-o"],
        ["init", "--preset", "digits", "-o"],
        ["init", "--preset", "digits", "--vae-out"],
        ["export", "digits", "-o"],
        ["calibrate", "digits", "--out"],
        ["demo", "-o"],
        ["generate", "digits", "--labels", "1", "-o"],
        ["parity", "digits", "--checkpoint", "digits", "--report"],
        ["bench", "digits", "-o"],
        ["bench", "digits", "--html"],
    ],
    ids=lambda words: f"{words[0]}{words[-1]}",
)
def test_commands_check_first_that_they_can_write(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing to read, even: `digits` is no bundle, and no checkpoint is loaded."""
    from click.testing import CliRunner

    import arinar.checkpoint
    from arinar.cli import main

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("it should have looked at its output first")

    for name in ("load_arinar", "load_vae"):
        monkeypatch.setattr(arinar.checkpoint, name, never)
    (tmp_path / "file").touch()
    result = CliRunner().invoke(main, [*words, str(tmp_path / "file" / "out")])
    assert result.exit_code == 2 and result.stderr.startswith("arinar: error: cannot write"), result.output
    assert result.stderr.count("\n") == 1 and [p.name for p in tmp_path.iterdir()] == ["file"]
