"""Files that would eat the machine, or give wrong numbers without a word: by kind, with the right value beside each."""

from __future__ import annotations

import argparse
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from arinar import checkpoint_files
from arinar.checkpoint_files import CheckpointError, open_checkpoint
from arinar.config import PRESETS, ArinarConfig, VaeConfig
from arinar.data import load_folder
from arinar.pickled import Unknown, plain, read_pickle
from arinar.reading import MAX_JSON_DEPTH, parse_json, read_json, read_npz
from arinar.text import printable

HOSTILE = Path(__file__).parent / "data" / "hostile"

# Runs `arinar inspect` on files under a limit of memory and time, and tells what became of each.
INSPECT = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (8_000_000 * 1024,) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
from click.testing import CliRunner
from arinar.cli import main
done = [CliRunner().invoke(main, ["inspect", name]) for name in sys.argv[1:]]
# Of this program alone: getrusage counts what the process was before, a test worker of any size.
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(json.dumps({"used": used, "done": [[result.exit_code, result.output] for result in done]}))
"""


def test_files_that_ate_the_machine_take_one_line(tmp_path: Path) -> None:
    files = sorted(path for path in HOSTILE.iterdir() if path.suffix in (".pth", ".safetensors"))
    os.mkfifo(tmp_path / "pipe.pth")
    files += [tmp_path / "pipe.pth", Path("/dev/zero")]
    command = [sys.executable, "-c", INSPECT, *map(str, files)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=300, check=True)
    told = json.loads(result.stdout)
    expected = {
        "bzip2.pth": "compressed (bzip2)",
        "laughs-args-head_type.pth": "has the head",
        "depth.safetensors": "decoder_depth is 10000000; expected an integer",
        "float-depth.safetensors": "decoder_depth is 1.5; expected an integer",
        "deep.safetensors": "nested more than 64 deep",
        "pipe.pth": "is a named pipe",
        "zero": "is a device",
    }
    assert {path.name for path in files} == set(expected)
    for path, (code, output) in zip(files, told["done"], strict=True):
        assert code == 2 and output.count("\n") == 1 and len(output) < 2100, (path, output)
        assert output.startswith("arinar: error: ") and expected[path.name] in output, output
    assert told["used"] * 1024 < 2e9


# ----------------------------------------------------------------------------------------- files of torch.save

WEIGHTS = {
    "w": torch.arange(6.0).reshape(2, 3),
    "half": torch.ones(3, dtype=torch.float16),
    "t": torch.arange(6.0).reshape(2, 3).T,
}


def saved(path: Path, content: Any, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def repacked(path: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED, again: str = "") -> Path:
    """An archive's entries, changed, written anew; the one whose name ends with ``again``, twice."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the second entry of a name
        for name, content in entries.items():
            archive.writestr(name, change(name, content))
        for name in entries:
            if again and name.endswith(again):
                archive.writestr(name, bytes(len(entries[name])))
    return path


def test_both_kinds_of_files_give_what_was_saved(tmp_path: Path) -> None:
    shared = torch.arange(12.0)
    content = {
        **WEIGHTS,
        "first": shared[:4],
        "every other": shared[4::2],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
    }
    content |= {"bf16": torch.ones(5, dtype=torch.bfloat16), "f8": torch.ones(2, dtype=torch.float8_e4m3fn)}
    content |= {"parameter": torch.nn.Parameter(torch.ones(2)), "int": torch.arange(3), "bool": torch.tensor([True, False])}
    for zipped in (True, False):
        (state,) = open_checkpoint(saved(tmp_path / "a.pth", OrderedDict(content), zipped)).states.values()
        assert list(state) == list(content)
        for name, value in content.items():
            assert state[name].dtype == value.dtype and state[name].shape == value.shape
            assert torch.equal(state[name].float(), value.detach().float()), name


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_entries_are_refused(tmp_path: Path, method: int) -> None:
    path = repacked(saved(tmp_path / "a.pth", WEIGHTS), lambda name, content: content, method)
    with pytest.raises(
        CheckpointError, match=r"a\.pth has an entry that is compressed \((deflate|bzip2|lzma)\).*save it again"
    ):
        open_checkpoint(path)


@pytest.mark.parametrize("again", ["data/0", "data.pkl", "version"])
def test_entries_of_one_name_are_refused(tmp_path: Path, again: str) -> None:
    path = repacked(saved(tmp_path / "a.pth", WEIGHTS), lambda name, content: content, again=again)
    with pytest.raises(CheckpointError, match=r"two entries named '.*torch\.save writes each once"):
        open_checkpoint(path)


@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: c[:-4], lambda c: c + b"\0" * 4, lambda c: b""])
def test_records_of_another_length_are_refused(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    path = repacked(saved(tmp_path / "a.pth", WEIGHTS), lambda name, c: change(c) if name.endswith("/data/0") else c)
    with pytest.raises(CheckpointError, match=r"data/0' has \d+ bytes where its tensors need 24"):
        open_checkpoint(path)
    same = repacked(saved(tmp_path / "b.pth", WEIGHTS), lambda name, content: content)
    assert torch.equal(open_checkpoint(same).states[""]["w"], WEIGHTS["w"])


def test_entries_inside_another_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("a/data/1", b"1234")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("a/data/0", inner.getvalue())
        hidden = zipfile.ZipInfo("a/data/1")
        hidden.CRC, hidden.file_size, hidden.compress_size = zipfile.ZipFile(inner).getinfo("a/data/1").CRC, 4, 4
        hidden.header_offset = archive.fp.tell() - len(inner.getvalue())  # type: ignore[union-attr]
        archive.filelist.append(hidden)
    with pytest.raises(CheckpointError, match=r"overlap \('a/data/0'\)"):
        open_checkpoint(path)


class Storage:
    """Pickled as a reference to a record of floats."""

    def __init__(self, count: Any, key: Any = "0") -> None:
        self.pid = ("storage", torch.FloatStorage, key, "cpu", count)


class View:
    """Pickled as a tensor over a storage."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, (*self.args, False, OrderedDict())


def forged(path: Path, content: Any, record: bytes = bytes(16)) -> Path:
    """An archive as torch.save writes it, of any content, with one record."""
    stream = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.pid if isinstance(obj, Storage) else None

    Pickler(stream, protocol=2).dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        archive.writestr("archive/data/0", record)
    return path


@pytest.mark.parametrize(
    "args",
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (0, (2, 2), (3, 1)),
        (0, (2**62,), (2**62,)),
        (-1, (4,), (1,)),
        (0, (4,), (-1,)),
        (0, (4,), (1, 1)),
        (0, (True,), (1,)),
        (0, (4.0,), (1,)),
        (0, [4] * 10**4, [1] * 10**4),
        (0, ((),), (1,)),
    ],
)
def test_tensors_beyond_their_storage_are_refused(tmp_path: Path, args: tuple[Any, ...]) -> None:
    right = open_checkpoint(forged(tmp_path / "a.pth", {"w": View(Storage(4), 0, (2, 2), (2, 1))}))
    assert torch.equal(right.states[""]["w"], torch.zeros(2, 2))
    with pytest.raises(CheckpointError, match=r"truncated or damaged \(it has a tensor"):
        open_checkpoint(forged(tmp_path / "a.pth", {"w": View(Storage(4), *args)}))


@pytest.mark.parametrize(
    "storage", [Storage(10**12), Storage(5), Storage(-4), Storage(4.0), Storage(4, "1"), Storage(4, ()), Storage(True)]
)
def test_storages_that_are_not_there_are_refused(tmp_path: Path, storage: Storage) -> None:
    with pytest.raises(CheckpointError, match=r"truncated or damaged \(its? "):
        open_checkpoint(forged(tmp_path / "a.pth", {"w": View(storage, 0, (4,), (1,))}))


def test_views_that_repeat_their_elements_are_not_copied_out(tmp_path: Path) -> None:
    for zipped in (True, False):
        path = saved(tmp_path / "a.pth", {"w": torch.zeros(1).expand(1 << 40), "right": torch.ones(2)}, zipped)
        state = open_checkpoint(path).states[""]
        assert torch.equal(state["right"], torch.ones(2))  # what is not used does no harm
        with pytest.raises(CheckpointError, match=r"entry w is a tensor \(1099511627776\) over a storage of 1 elements"):
            checkpoint_files.dense_weights(path, state)


def test_weights_that_share_a_storage_many_times_are_not_copied_out(tmp_path: Path) -> None:
    one = torch.zeros(1 << 14)
    path = saved(tmp_path / "a.pth", {"a": one, "b": one})
    assert len(checkpoint_files.dense_weights(path, open_checkpoint(path).states[""])) == 2
    path = saved(tmp_path / "a.pth", {f"w{i}": one for i in range(200)})
    with pytest.raises(CheckpointError, match=r"share storages: 13,107,200 bytes out of a file of"):
        checkpoint_files.dense_weights(path, open_checkpoint(path).states[""])


def laughs(levels: int = 12) -> Any:
    found: Any = ()
    for _ in range(levels):
        found = (found,) * 10
    return found


def dumped(levels: int) -> bytes:
    """A pickle of tuples in tuples, written without recursion: (), then each level from the last."""
    return b"\x80\x02)" + b"\x85" * levels + b"."


@pytest.mark.parametrize("place", ["args", "entry of args", "key of args", "epoch", "key", "weights' name", "weights"])
def test_shared_parts_are_not_unfolded(tmp_path: Path, place: str) -> None:
    args: dict[Any, Any] = {"model": "mar_base", "betas": [0.9, 0.95]}
    content: dict[Any, Any] = {"model": {"w": View(Storage(4), 0, (4,), (1,))}, "args": args, "epoch": 3}
    stream = laughs()
    if place == "args":
        content["args"] = stream
    elif place == "entry of args":
        args["head_type"] = [stream]
    elif place == "epoch":
        content["epoch"] = stream
    elif place == "weights":
        content["model"]["x"] = stream
    else:
        into = {"key of args": args, "key": content, "weights' name": content["model"]}[place]
        into[Key()] = 1
    contents = open_checkpoint(forged(tmp_path / "a.pth", content))
    assert torch.equal(contents.states["model"]["w"], torch.zeros(4))
    assert len(str(contents.args)) < 20_000 and len(contents.notes) <= 1
    if place == "args":
        assert contents.args is None
    else:
        assert contents.args is not None and contents.args["betas"] == [0.9, 0.95]


class Key:
    """Hashes at once, and is pickled as something made from an endless tuple."""

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (laughs(),)


def test_tuples_as_keys_are_not_hashed() -> None:
    for endless in (b")" + b"\x85" * 100_000, b")" + b"q\x00h\x00\x86q\x00" * 60):
        value = read_pickle(io.BytesIO(b"\x80\x02}" + endless + b"K\x01s."))
        ((key, one),) = value.items()
        assert isinstance(key, Unknown) and key.name == "tuple" and one == 1
    value = read_pickle(io.BytesIO(pickle.dumps({1: 2, "a": 3, b"b": 4, None: 5, 1.5: {1, 2}}, protocol=4)))
    assert value == {1: 2, "a": 3, b"b": 4, None: 5, 1.5: {1, 2}}


def test_pickles_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(str(plain(laughs()))) < 1000 and plain(laughs(1)) == laughs(1)
    assert plain({"a": [1, (2, 3)]})["a"][0] == 1
    deep = read_pickle(io.BytesIO(dumped(200_000)))
    assert isinstance(deep, tuple) and len(str(plain(deep))) < 100
    huge = read_pickle(io.BytesIO(pickle.dumps([10**100, 10**100_000])))
    assert huge[0] == 10**100 and isinstance(huge[1], Unknown)
    monkeypatch.setattr("arinar.pickled.MAX_INSTRUCTIONS", 1000)
    with pytest.raises(ValueError, match="more than 1,000 instructions"):
        read_pickle(io.BytesIO(dumped(2000)))


@pytest.mark.parametrize("zipped", [True, False])
def test_unknown_classes_leave_the_tensors(tmp_path: Path, zipped: bool) -> None:
    ours = {
        "output_dir": pathlib.PurePosixPath("/data/mar_cache"),
        "seed": np.float64(3),
        "rng": np.arange(3),
        "parser": types.SimpleNamespace(a=1),
        "kind": OrderedDict(a=1),
        "lr": 1e-4,
    }
    content = {"model": WEIGHTS, "args": argparse.Namespace(**ours), "ema": anothers(), "epoch": 3}
    path = saved(tmp_path / "a.pth", content, zipped)
    before = set(sys.modules)
    contents = open_checkpoint(path)
    assert set(sys.modules) == before
    assert all(torch.equal(contents.states["model"][name], value) for name, value in WEIGHTS.items())
    args = contents.args
    assert args is not None and args["lr"] == 1e-4 and args["kind"] == {"a": 1} and contents.epoch == 3
    assert str(args["output_dir"]) == "pathlib.PurePosixPath('/', 'data', 'mar_cache')"
    assert all(isinstance(args[name], Unknown) for name in ("output_dir", "seed", "rng", "parser"))
    assert any("its args hold what is not read" in note and "pathlib.PurePosixPath" in note for note in contents.notes)


class Others(dict):  # type: ignore[type-arg]
    """Somebody else's dict, list and state at once."""


def anothers() -> Others:
    made = Others(a=1)
    made.note = "state"  # type: ignore[attr-defined]
    return made


# -------------------------------------------------------------------------------- which format; configs; JSON


def own_file(path: Path, config: dict[str, Any], length: int | None = None) -> Path:
    """A safetensors file of ours with one weight; its header padded to ``length`` bytes."""
    state = {"w": torch.zeros(4)}
    header = {"format_version": 1, "kind": "arinar", "config": config, "metadata": {}}
    header["sha256"] = checkpoint_files.contents_sha256(header, state)
    save_file(state, path, {"arinar": json.dumps(header)})
    if length is not None:
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        text = content[8 : 8 + size].rstrip()
        assert len(text) <= length
        path.write_bytes(length.to_bytes(8, "little") + text.ljust(length) + content[8 + size :])
    return path


@pytest.mark.parametrize("proto", [0, 2, 4, 5])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "model"])
def test_safetensors_whose_length_looks_like_a_pickle(tmp_path: Path, proto: int, name: str) -> None:
    config = PRESETS["digits"].to_dict()
    path = own_file(tmp_path / name, config, 0x80 + 256 * proto if proto >= 4 else 0x80 + 256 * (proto + 256))
    assert path.read_bytes()[0] == 0x80
    contents = open_checkpoint(path)
    assert contents.config is not None and ArinarConfig.from_dict(contents.config) == PRESETS["digits"]


BAD_INTEGERS = [1.5, True, "3", None, [1], -1, 10**30, 10**100_000, float("nan")]
BAD_NUMBERS = [True, "3", None, [[]], float("nan"), float("inf"), 10**400]


@pytest.mark.parametrize("kind", [ArinarConfig, VaeConfig])
def test_every_entry_of_a_config_has_its_type_and_range(kind: Any) -> None:
    whole = kind().to_dict()
    assert kind.from_dict(json.loads(json.dumps(whole))) == kind()
    for name, value in whole.items():
        if isinstance(value, bool) or name in ("order", "class_names"):
            continue
        bad: list[Any] = BAD_NUMBERS if isinstance(value, float) else BAD_INTEGERS
        if isinstance(value, tuple):
            bad = [3, "34", None, {"a": 1}, *([item] for item in BAD_INTEGERS), list(range(1000))]
        if name == "sampling_steps":  # "3" is such
            bad = [wrong for wrong in BAD_INTEGERS if wrong != "3"]
        for wrong in bad:
            with pytest.raises(ValueError) as told:
                kind.from_dict(whole | {name: wrong})
            assert name in str(told.value) and len(str(told.value)) < 300, (name, wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": [0.5] * 256, "outer": "causal", "encoder_depth": 0}, "order is 0.5; expected an integer"),
        ({"order": [10**12], "outer": "causal", "encoder_depth": 0}, "order is 1000000000000; expected an integer"),
        ({"order": "abc"}, "order is 'abc'; expected a list"),
        ({"class_names": [1, 2]}, "class_names holds 1; expected texts"),
        ({"class_names": ["x" * 100_000]}, "class_names holds 'x+...; expected texts of at most 1000"),
        ({"latent_scale": [0.1] * 15}, "latent_scale has 15 values; expected one number or 16"),
        ({"latent_shift": [float("nan")] * 16}, "latent_shift is nan; expected a finite number"),
        ({"img_size": 32768}, "makes 4,194,304 tokens of an image; expected at most 65,536"),
        ({"outer": ["masked"]}, "outer is \\['masked'\\]; choose one of masked, causal"),
        ({"x" * 100_000: 1}, r"unknown entries x+\.\.\.; mistyped"),
    ],
)
def test_lists_and_sizes_of_a_config(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArinarConfig.from_dict(ArinarConfig().to_dict() | changes)
    others: list[Any] = [[], 5, None, "text"]
    for other in others:
        with pytest.raises(ValueError, match="model config is .*; expected an object of named entries"):
            ArinarConfig.from_dict(other)


def test_depths_are_compared_with_the_weights_before_blocks_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from arinar import checkpoint
    from arinar.model import Arinar

    path = own_file(tmp_path / "a.safetensors", PRESETS["digits"].to_dict() | {"decoder_depth": 1000})
    monkeypatch.setattr(Arinar, "__new__", lambda *args: pytest.fail("it was built"))
    with pytest.raises(CheckpointError, match="decoder_depth is 1000, its weights have 0 blocks"):
        checkpoint.inspect_checkpoint(path)


def test_json_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        whole = opening * (MAX_JSON_DEPTH - 1) + "1" + closing * (MAX_JSON_DEPTH - 1)
        assert parse_json(whole) == json.loads(whole)
        for depth in (MAX_JSON_DEPTH + 1, 1000, 100_000):
            path.write_text(opening * depth + "1" + closing * depth)
            with pytest.raises(ValueError, match="nested more than 64 deep"):
                read_json(path)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"pipe\.json is a named pipe; expected a file"):
        read_json(tmp_path / "pipe.json")


# -------------------------------------------------------------------------------------------------------- npz


def npz(path: Path, header: str, content: bytes = bytes(16), method: int = zipfile.ZIP_DEFLATED, names: int = 1) -> Path:
    """An .npz file whose arrays say what ``header`` says."""
    text = header.encode().ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(names):
            archive.writestr("mu.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content)
    return path


def describe(shape: str, dtype: str = "'<f4'") -> str:
    return f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}"


def test_arrays_are_what_their_headers_say(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(
        path, a=np.arange(6.0).reshape(2, 3), b=np.zeros(100_000), text=np.array("words"), none=np.zeros((0, 3))
    )
    found = read_npz(path, 1 << 20)
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and str(found["text"]) == "words" and found["none"].shape == (0, 3)
    with pytest.raises(ValueError, match=r"its arrays have [\d,]+ bytes; expected at most 100,000"):
        read_npz(path, 100_000)
    assert read_npz(npz(path, describe("(4,)")), 1 << 20)["mu"].shape == (4,)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("(10**12,)", {}),
        ("(1000000000000,)", {}),
        ("(3,)", {}),
        ("(-4,)", {}),
        ("(-2, -2)", {}),
        ("(4,)", {"method": zipfile.ZIP_BZIP2}),
        ("(4,)", {"names": 2}),
    ],
)
def test_arrays_that_lie_are_refused(tmp_path: Path, shape: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        read_npz(npz(tmp_path / "a.npz", describe(shape), **options), 1 << 30)
    with pytest.raises(ValueError, match="says"):
        read_npz(npz(tmp_path / "a.npz", describe("(4,)", "'|O'"), bytes(32)), 1 << 30)


def recording_with(path: Path, changes: dict[str, Any], arrays: dict[str, Any]) -> Path:
    head = {"version": 3, "settings": {}, "done": 1, "tensors": {}, "seen_steps": 1, "samples": [["outer_step", 0]]} | changes
    sample = {"labels": np.zeros(2, np.int64), "rows": np.arange(2), "tokens": np.zeros((2, 3), np.float32)}
    every = {f"sample|0|{name}": value for name, value in sample.items()} | {"sample|0|feed|tokens": np.zeros(3)} | arrays
    np.savez_compressed(path, head=np.array(json.dumps(head)), **{name: v for name, v in every.items() if v is not None})
    return path


def test_indices_in_recordings_are_bounded(tmp_path: Path) -> None:
    from arinar.calibration.recording import CalibrationError, Recording

    path = tmp_path / "c.npz"
    right = Recording.load(recording_with(path, {}, {}))
    assert [(s.graph, s.step, s.rows.tolist()) for s in right.samples] == [("outer_step", 0, [0, 1])]
    for changes, arrays in [
        ({"done": 10**30}, {}),
        ({"done": 1.5}, {}),
        ({"seen_steps": -1}, {}),
        ({"samples": [["outer_step", 10**12]]}, {}),
        ({"samples": [["outer_step", 0]] * 100_000}, {}),
        ({"samples": 5}, {}),
        ({"settings": 5}, {}),
        ({}, {"sample|1000000000000|rows": np.zeros(1)}),
        ({}, {"sample|-1|rows": np.zeros(1)}),
        ({}, {"launch|outer_step|1000000000000|x": np.zeros(1)}),
        ({}, {"sample|0|rows": np.array([-1, 0])}),
        ({}, {"sample|0|rows": np.zeros(2)}),
        ({}, {"sample|0|tokens": np.zeros((3, 3))}),
        ({}, {"sample|0|labels": None}),
    ]:
        with pytest.raises(CalibrationError, match=r"c\.npz is damaged.*delete it and calibrate again"):
            Recording.load(recording_with(path, changes, arrays))
    with pytest.raises(CalibrationError, match="delete it and calibrate again"):
        Recording.load(HOSTILE / "recording-index.npz")


def test_recordings_of_another_model_are_refused(tmp_path: Path, digits_bundle: Path) -> None:
    from arinar.calibration.collect import _check_samples, check_arguments
    from arinar.calibration.recording import CalibrationError, Recording
    from arinar.runtime.bundle import Bundle

    bundle = Bundle.open(digits_bundle)
    sampling = check_arguments(bundle.manifest.config, bundle.manifest.defaults, num_images=4)[1]
    sizes = {"B": 4, "G": 2, "V": 10, "P": 2, "U": 4}
    feed: dict[str, Any] = {"sample|0|feed|tokens": None}
    for tensor in bundle.manifest.precision_graphs("fp32")["outer_step"].inputs:
        shape = [axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape]
        feed[f"sample|0|feed|{tensor.name}"] = np.zeros(shape, tensor.dtype)
    width = bundle.manifest.config.token_dim
    right = feed | {"sample|0|tokens": np.zeros((2, width))}
    path = tmp_path / "c.npz"
    _check_samples(Recording.load(recording_with(path, {}, right)).samples, bundle, sampling)

    def fed(**arrays: Any) -> dict[str, Any]:
        return right | {f"sample|0|feed|{name}": value for name, value in arrays.items()}

    for changes, arrays in [
        ({}, feed),
        ({"samples": [["vae_decoder", 0]]}, right),
        ({"samples": [["outer_step", 99]]}, right),
        ({}, right | {"sample|0|labels": np.array([0, 10])}),
        ({}, right | {"sample|0|feed|surprise": np.zeros(1)}),
        # Shapes: of too few axes, of another width, two sizes of one axis, more images than a micro-batch has; a type;
        # values that point beside the table, and such that are none.
        ({}, fed(visible_tokens=np.zeros(3, np.float32))),
        ({}, fed(visible_tokens=np.zeros((10, 4, width + 1), np.float32))),
        ({}, fed(visible_tokens=np.zeros((11, 4, width), np.float32))),
        ({}, fed(target_positions=np.zeros((100_000, 4), np.int64))),
        ({}, {name: np.zeros(1, value.dtype) if value is not None else None for name, value in fed().items()}),
        ({}, fed(labels=np.zeros((200, 4), np.int64))),
        ({}, fed(labels=np.zeros((2, 4), np.float32))),
        ({}, fed(labels=np.full((2, 4), 10))),
        ({}, fed(labels=np.full((2, 4), -(2**63)))),
        ({}, fed(target_positions=np.full((2, 4), 16))),
        ({}, fed(visible_tokens=np.full((10, 4, width), np.nan, np.float32))),
        ({}, fed(visible_tokens=np.full((10, 4, width), np.inf, np.float32))),
    ]:
        with pytest.raises(CalibrationError, match="are not this model's; delete it and calibrate again|is damaged"):
            _check_samples(Recording.load(recording_with(path, changes, arrays)).samples, bundle, sampling)


@pytest.mark.parametrize("wrong", ["scalars", "histogram", "channel_absmax", "step_absmax", "maxima", "none"])
def test_statistics_of_recordings_are_of_the_models_shapes(wrong: str, tmp_path: Path, digits_bundle: Path) -> None:
    """Of a real recording one array is made ten times as long: an error that says so, and no run on it."""
    from arinar.calibration.collect import collect
    from arinar.calibration.recording import CalibrationError
    from arinar.runtime.bundle import Bundle

    bundle, path = Bundle.open(digits_bundle), tmp_path / "c.npz"
    collect(bundle, num_images=4, labels=[3], batch_size=4, num_iter=2, partial=path)
    with np.load(path) as kept:
        arrays = dict(kept)
    name = next((name for name in arrays if wrong in name), None)
    if name is not None:
        arrays[name] = np.concatenate([arrays[name]] * 10)
    np.savez_compressed(path, **arrays)
    again = lambda: collect(bundle, num_images=4, labels=[3], batch_size=4, num_iter=2, partial=path)  # noqa: E731
    if wrong == "none":
        again()
        return
    with pytest.raises(CalibrationError, match="delete it and calibrate again"):
        again()


def test_statistics_are_read_within_bounds(tmp_path: Path) -> None:
    from arinar.measure.features import read_stats

    path = tmp_path / "stats.npz"
    np.savez(path, mu=np.zeros(2), sigma=np.eye(2))
    assert read_stats(path, 2)[1].tolist() == [[1, 0], [0, 1]]
    with pytest.raises(ValueError, match=r"stats\.npz holds no statistics \(its array 'mu' says \(1000000000000,\)"):
        read_stats(npz(path, describe("(1000000000000,)")), 2)
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(ValueError, match="is a named pipe"):
        read_stats(tmp_path / "pipe.npz", 2)


# ----------------------------------------------------------------------------------------- terminals, pictures


def test_text_of_unknown_origin_is_made_fit_for_a_terminal() -> None:
    assert printable("plain: Käse, 犬 -> 1.5") == "plain: Käse, 犬 -> 1.5"
    assert printable("a\n b\t c") == "a b c"
    assert printable("\x1b[2J\x07\x9b1m") == "\\x1b[2J\\x07\\x9b1m"
    assert printable("a\u202eb\u200bc\ud800") == "a\\u202eb\\u200bc\\ud800"
    assert len(printable("x" * 10**7)) <= 2000 and len(printable("\x1b" * 10**5, 90)) <= 90
    assert printable("begin" + "x" * 10**6 + "remedy").startswith("begin") and printable("x" * 10**6 + "remedy").endswith(
        "remedy"
    )
    assert printable("abcdefgh", 6) == "abc..."


def test_errors_and_inspection_escape_what_files_say(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from arinar.checkpoint import load_arinar, save_arinar
    from arinar.cli import main

    saved(tmp_path / "a.pth", {"\x1b[2J" + "x" * 100_000: 1})
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "a.pth")])
    assert result.exit_code == 2 and "\x1b" not in result.output and len(result.output) < 2100
    save_arinar(tmp_path / "b.safetensors", load_arinar("digits"), metadata={"\x1b[2J": "\x1b]0;title\x07" + "y" * 100_000})
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "b.safetensors")])
    assert result.exit_code == 0 and "\x1b" not in result.output and "\\x1b]0;title\\x07" in result.output
    assert max(map(len, result.output.splitlines())) < 400


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((HOSTILE / "huge-size.png").read_bytes(), "has too many pixels for an image; expected at most"),
        (POSTSCRIPT, "cannot be read as an image: expected one of PNG, JPEG"),
        (b"", "cannot be read as an image"),
    ],
)
def test_pictures_that_no_decoder_may_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail("a program was started"))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "b.eps").write_bytes(POSTSCRIPT)  # not an image: passed over
    Image.new("RGB", (9, 9), "white").save(tmp_path / "one" / "a.png")
    assert load_folder(tmp_path, img_size=8, held_out=0).train.images.shape == (1, 3, 8, 8)
    (tmp_path / "one" / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.png {message}"):
        load_folder(tmp_path, img_size=8)


def test_pictures_in_the_way_of_generated_ones(tmp_path: Path) -> None:
    from arinar.runtime.images import read_metadata, read_png, save_png

    for name in ("huge-size.png", "metadata-is-5.png"):
        assert read_metadata(HOSTILE / name) is None
    path = tmp_path / "000000.png"
    for text in ("5", "[]", '[["label", 3]]', "[" * 1000 + "]" * 1000, "null"):
        save_png(Image.new("RGB", (8, 8)), path, {"x": 1})
        path.write_bytes(with_text(text))
        assert read_metadata(path) is None
    path.write_bytes(with_text('{"label": 3}'))
    assert read_metadata(path) == {"label": 3}
    assert read_png(path, (8, 8)).size == (8, 8)
    for wrong in (HOSTILE / "huge-size.png", tmp_path / "none.png", HOSTILE / "bzip2.pth"):
        with pytest.raises(ValueError, match="cannot be shown: .*; delete it, and it is made again"):
            read_png(wrong, (8, 8))
    os.mkfifo(tmp_path / "pipe.png")
    reader = threading.Thread(target=read_metadata, args=(tmp_path / "pipe.png",), daemon=True)
    reader.start()
    reader.join(10)
    assert not reader.is_alive()


def with_text(text: str) -> bytes:
    from PIL import PngImagePlugin

    info, stream = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("arinar", text)
    Image.new("RGB", (8, 8)).save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("config", "decoder_depth"), 10**30),
        (("config", "decoder_depth"), 1.5),
        (("config",), []),
        (("defaults", "num_iter"), 2.5),
        (("defaults", "guidance_scale"), "4"),
        (("defaults", "temperature"), float("nan")),
        (("num_candidates",), 10**12),
        (("graphs", "fp32", "inner_step", "opset"), "x"),
        (("graphs", "fp32", "inner_step", "max_abs_err"), [1]),
        (("graphs", "fp32", "inner_step", "inputs", 0, "shape"), [10**12]),
        (("graphs", "fp32"), 5),
        (("files",), {"a.onnx": {"size": -1, "sha256": ""}}),
        (("provenance",), "[" * 5),
    ],
)
def test_manifests_are_checked_at_the_door(place: tuple[Any, ...], value: Any) -> None:
    from arinar.runtime.bundle import BundleError, Manifest

    data: Any = json.loads((HOSTILE.parent / "manifest-0.1-digits.json").read_text())
    assert Manifest.from_json(json.dumps(data)).config.decoder_depth == 3
    into = data
    for step in place[:-1]:
        into = into[step]
    into[place[-1]] = value
    with pytest.raises(BundleError, match=r"manifest\.json is damaged"):
        Manifest.from_json(json.dumps(data))
    with pytest.raises(BundleError, match="nested more than 64 deep"):
        Manifest.from_json('{"format_version": 2, "x": ' + "[" * 5000 + "]" * 5000 + "}")
