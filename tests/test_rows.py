"""Arrays in .npz files, row by row: what NumPy reads and writes, without a whole one in memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from arinar.rows import Rows, stored_arrays, write_npz


def test_numpy_reads_what_is_written_and_bytes_are_reproducible(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)
    labels = np.arange(10)
    for name in ("a.npz", "b.npz"):
        parts = (whole[first : first + 3] for first in range(0, 10, 3))
        arrays = {"arr_0": Rows(whole.shape, "uint8", parts), "arr_1": Rows((10,), "int64", [labels])}
        write_npz(tmp_path / name, arrays)
    with np.load(tmp_path / "a.npz") as found:
        assert np.array_equal(found["arr_0"], whole) and np.array_equal(found["arr_1"], labels)
        assert found["arr_0"].dtype == np.uint8 and found["arr_1"].dtype == np.int64
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_rows_are_numpys_whether_stored_or_compressed(tmp_path: Path, save: object) -> None:
    images = np.random.default_rng(1).integers(0, 9, (23, 5, 4, 3), np.uint8)
    save(tmp_path / "x.npz", images, mu=np.arange(7.0))  # type: ignore[operator]
    arrays = stored_arrays(tmp_path / "x.npz")
    assert set(arrays) == {"arr_0", "mu"} and arrays["arr_0"].shape == images.shape
    for first, last, size in ((0, 23, 5), (4, 17, 4), (22, 23, 9)):
        parts = list(arrays["arr_0"].parts(first, last, size))
        assert np.array_equal(np.concatenate(parts), images[first:last]) and max(map(len, parts)) <= size
    assert np.array_equal(next(arrays["mu"].parts(0, 7, 7)), np.arange(7.0))


def test_writing_and_reading_hold_a_part_in_memory(tmp_path: Path) -> None:
    shape, step = (512, 256, 256, 3), 8  # 100 MB, 1.6 MB at a time
    tracemalloc.start()
    parts = (np.full((step, *shape[1:]), first % 256, np.uint8) for first in range(0, shape[0], step))
    write_npz(tmp_path / "x.npz", {"arr_0": Rows(shape, "uint8", parts)})
    total = sum(int(part[0, 0, 0, 0]) for part in stored_arrays(tmp_path / "x.npz")["arr_0"].parts(0, shape[0], step))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6
    assert total == sum(first % 256 for first in range(0, 512, 8))


def test_what_was_not_announced_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for parts, words in (
        ([np.zeros((2, 3), np.uint8)], "got 2 rows; expected 4"),
        ([np.zeros((4, 3), np.int8)], "gets rows int8"),
        ([np.zeros((4, 2), np.uint8)], r"gets rows uint8 \(2,\); expected uint8 \(3,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            write_npz(path, {"arr_0": Rows((4, 3), "uint8", parts)})
        assert not list(tmp_path.iterdir())


def test_damage_is_an_error_with_the_files_name(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, np.arange(4000.0))
    whole = path.read_bytes()
    for data in (b"", whole[:100], whole[:-30], b"words"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"x\.npz is no whole \.npz file"):
            stored_arrays(path)
    np.savez(path, objects=np.array([{}], object))
    with pytest.raises(ValueError, match="is no whole"):
        stored_arrays(path)
    np.savez(path, np.asfortranarray(np.zeros((3, 2))))
    with pytest.raises(ValueError, match="Fortran order"):
        stored_arrays(path)
    np.savez_compressed(path, np.random.default_rng(0).random(4000))
    whole = path.read_bytes()
    path.write_bytes(whole[:9000] + bytes(2000) + whole[11000:])
    with pytest.raises(ValueError, match=r"x\.npz is damaged"):
        list(stored_arrays(path)["arr_0"].parts(0, 4000, 500))
