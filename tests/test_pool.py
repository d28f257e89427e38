"""Workers on a real Ray: the same bytes as one process, whatever is killed on the way, and nothing lost or doubled."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

#: Set: Ray must be there.
VARIABLE = "ARINAR_RAY"
if VARIABLE not in os.environ:
    pytest.importorskip("ray", reason="workers need the extra `ray`")

from arinar.measure.evaluate import evaluate  # noqa: E402
from arinar.runtime import Bundle  # noqa: E402
from arinar.runtime.run import Run, shard_path  # noqa: E402
from arinar.runtime.sampling import sample  # noqa: E402
from arinar.runtime.shards import Shard  # noqa: E402
from arinar.serve.pool import TRIES, RayPool  # noqa: E402

COUNT, SETTINGS = 96, {"batch_size": 4, "shard_size": 8, "num_iter": 2, "seed": 5}
WORDS = ("-n", "96", "--batch-size", "4", "--shard-size", "8", "--num-iter", "2", "--seed", "5")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a Ray cluster of two cores on this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    checkout = str(Path(__file__).parent.parent)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([checkout, str(Path(__file__).parent), *([before] if before else [])])
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        yield made.address
    finally:
        made.shutdown()
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@pytest.fixture(scope="module")
def bundle(digits_bundle: Path) -> Bundle:
    return Bundle.open(digits_bundle)


@pytest.fixture(scope="module")
def one(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as one process makes it."""
    folder = tmp_path_factory.mktemp("one") / "run"
    sample(bundle, folder, Run.of(bundle, COUNT, **SETTINGS))  # type: ignore[arg-type]
    return folder


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.json" and path.name[0] != "."]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def workers() -> set[int]:
    """Processes that Ray gave the name of our workers."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::_Worker"):
                found.add(int(folder.name))
        except OSError:  # it has just ended
            continue
    return found


def square(number: int) -> int:
    return number * number


def test_two_workers_make_the_bytes_of_one_process(bundle: Bundle, one: Path, cluster: str, tmp_path: Path) -> None:
    run = Run.of(bundle, COUNT, **SETTINGS)  # type: ignore[arg-type]
    with RayPool(2, cluster) as pool:
        done = sample(bundle, tmp_path / "run", run, workers=pool)
    assert done.made == COUNT and hashes(tmp_path / "run") == hashes(one)


def test_a_worker_killed_on_the_way_is_replaced(bundle: Bundle, one: Path, cluster: str, tmp_path: Path) -> None:
    run, losses, done = Run.of(bundle, COUNT, **SETTINGS), list[str](), Counter[int]()  # type: ignore[arg-type]
    before = workers()

    def progress(shard: Shard) -> None:
        done[shard.number] += 1
        if sum(done.values()) in (2, 5):
            os.kill(min(workers() - before), signal.SIGKILL)

    with RayPool(2, cluster, on_loss=losses.append) as pool:
        result = sample(bundle, tmp_path / "run", run, workers=pool, progress=progress)
    # (A worker may have been between two tasks, and its shard in place: then nothing is made again.)
    assert 1 <= len(losses) <= 2
    assert set(done.values()) == {1} and len(done) == run.shards
    assert COUNT - 8 * len(losses) <= result.made <= COUNT
    assert hashes(tmp_path / "run") == hashes(one)


def test_the_driver_killed_and_begun_again_makes_the_same_set(bundle: Bundle, one: Path, tmp_path: Path) -> None:
    """On a cluster of its own, as `arinar sample --workers 2` starts one: it ends with the driver."""
    folder = tmp_path / "run"
    words = ["sample", str(bundle.folder), "-o", str(folder), "--workers", "2", *WORDS]
    command = [sys.executable, "-m", "arinar", *words]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list((folder / "shards").glob("0*.npz"))) < 3:
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = len(list((folder / "shards").glob("0*.npz")))
    assert 3 <= kept < 12
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "shards").glob("0*.npz")}
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, check=True)
    assert '"images": 96' in done.stdout
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "shards").glob("0*.npz")}
    assert before.items() <= after.items()  # what was there was kept
    assert hashes(folder) == hashes(one)


def test_more_workers_than_room_come_to_an_end(cluster: str) -> None:
    with RayPool(5, cluster) as pool:
        assert sorted(pool(lambda: square, range(40))) == [number**2 for number in range(40)]
        assert sorted(pool(lambda: square, range(3))) == [0, 1, 4]  # again, on the same pool


class Dies:
    """A task that ends its worker, each time."""

    def __init__(self, task: int, folder: Path, times: int = 1000) -> None:
        self.task, self.folder, self.times = task, folder, times

    def __call__(self) -> Callable[[int], int]:
        def work(number: int) -> int:
            if number == self.task and len(list(self.folder.iterdir())) < self.times:
                (self.folder / f"{time.monotonic_ns()}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return number

        return work


def test_a_task_that_kills_its_worker_each_time_ends_the_run(cluster: str, tmp_path: Path) -> None:
    losses: list[str] = []
    with RayPool(2, cluster, on_loss=losses.append) as pool:
        with pytest.raises(RuntimeError, match=f"a worker ended {TRIES} times over the same work"):
            list(pool(Dies(3, tmp_path), range(8)))
    assert len(losses) == TRIES - 1 == len(list(tmp_path.iterdir())) - 1


def test_a_task_that_kills_its_worker_less_often_is_done(cluster: str, tmp_path: Path) -> None:
    with RayPool(2, cluster) as pool:
        assert sorted(pool(Dies(3, tmp_path, TRIES - 1), range(8))) == list(range(8))


def broken() -> Callable[[int], int]:
    def work(number: int) -> int:
        raise FloatingPointError(f"graph 'outer' made non-finite values, task {number}")

    return work


def refused() -> Callable[[int], int]:
    raise ValueError("the folder is not seen here")


def test_errors_of_tasks_come_back_as_they_are(cluster: str) -> None:
    with RayPool(2, cluster) as pool:
        with pytest.raises(ValueError, match=r"^the folder is not seen here$"):
            list(pool(refused, range(4)))
        with pytest.raises(FloatingPointError, match=r"^graph 'outer' made non-finite values, task 0$"):
            list(pool(broken, [0]))


def test_a_cluster_that_does_not_answer_or_has_no_room_is_named(cluster: str) -> None:
    for address, words in (
        ("127.0.0.1:1", r"no Ray cluster answers at 127.0.0.1:1 .*`ray start --head` starts one"),
        ("ray://127.0.0.1:1", "no Ray cluster answers at ray://127.0.0.1:1"),
        ("nowhere", "address is 'nowhere'; expected auto, host:port or ray://host:10001"),
    ):
        with pytest.raises(ValueError, match=words), RayPool(2, address):
            pass
    with pytest.raises(ValueError, match="a worker needs 3 CPUs, and the cluster has 2"), RayPool(1, cluster, cpus=3):
        pass
    with pytest.raises(ValueError, match="a worker needs 1 GPUs, and the cluster has 0"), RayPool(1, cluster, gpus=1):
        pass


def test_damage_is_found_by_workers_too(bundle: Bundle, one: Path, cluster: str, tmp_path: Path) -> None:
    folder = shutil.copytree(one, tmp_path / "run")
    run = Run.of(bundle, COUNT, **SETTINGS)  # type: ignore[arg-type]
    shard_path(folder, 4).write_bytes(b"x")
    with RayPool(2, cluster) as pool:
        done = sample(bundle, folder, run, workers=pool)
    assert done.damaged == [4] and done.made == 8 and hashes(folder) == hashes(one)


def test_an_evaluation_on_workers_is_that_of_one_process(one: Path, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from arinar.measure import image_sets

    monkeypatch.setattr(image_sets, "PIECE", 16)  # six pieces
    alone = evaluate(str(one), "digits", bootstrap=5)
    with RayPool(2, cluster) as pool:
        shared = evaluate(str(one), "digits", bootstrap=5, workers=pool)
    assert shared == alone and alone.fid is not None and alone.fid.value > 0
