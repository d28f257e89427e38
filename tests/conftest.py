"""Shared fixtures: golden reference tensors, and bundles of the demo models, exported once per test run."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from once import once


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of reference tensors; ARINAR_GOLDEN overrides the copies that ship with the tests."""
    return Path(os.environ.get("ARINAR_GOLDEN") or Path(__file__).parent / "golden")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test run, the same in all worker processes."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture(scope="session")
def torch_onnx_export(shared_folder: Path) -> Iterator[Callable[..., Any] | None]:
    """PyTorch's exporter itself; meanwhile what goes by its name traces a module once per test run."""
    if importlib.util.find_spec("torch") is None:
        yield None  # a part of the tests needs none
        return
    from traces import kept_traces

    with kept_traces(Path(os.environ.get("ARINAR_TRACES") or shared_folder / "traces")) as export:
        yield export


@pytest.fixture(scope="session", autouse=True)
def first_of_all(torch_onnx_export: object, request: pytest.FixtureRequest) -> None:
    """Worker processes begin with the bundles that several tests need, each with others, in place of waiting for them."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        return
    items = request.session.items
    names = {name for item in items for name in getattr(item, "fixturenames", ())}
    makers: list[Callable[[], object]] = []
    if names & {"demo_bundle", "digits_bundle", "causal_bundle"}:
        demo_bundle = request.getfixturevalue("demo_bundle")
        makers += [lambda: demo_bundle("digits"), lambda: demo_bundle("digits-causal")]
    if any({"tiny_bundle", "tiny_with_engines"} & set(dir(getattr(item, "module", None))) for item in items):
        from tiny_bundles import TINY, TINY_CAUSAL, tiny_bundle

        folder = request.getfixturevalue("shared_folder")
        makers += [lambda: tiny_bundle(folder, TINY_CAUSAL), lambda: tiny_bundle(folder, TINY)]
    for make in makers[int(worker.removeprefix("gw")) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]:
        make()


@pytest.fixture(scope="session")
def demo_bundle(shared_folder: Path, torch_onnx_export: object) -> Callable[[str], Path]:
    """Name of a demo model -> its fp32 bundle. Treat it as read-only: copy it to change it."""

    def get(name: str) -> Path:
        out = shared_folder / f"{name}-bundle"

        def make() -> None:
            from arinar.checkpoint import load_arinar, load_vae
            from arinar.export.bundle import export_bundle

            export_bundle(load_arinar(name), load_vae(name), out)

        once(out, make)
        return out

    return get


@pytest.fixture(scope="session")
def digits_bundle(demo_bundle: Callable[[str], Path]) -> Path:
    return demo_bundle("digits")


@pytest.fixture(scope="session")
def causal_bundle(demo_bundle: Callable[[str], Path]) -> Path:
    return demo_bundle("digits-causal")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {
        "slow": ("ARINAR_SLOW", "full-size models"),
        "wheel": ("ARINAR_WHEEL", "installs packages from an index"),
    }
    for marker, (variable, reason) in reasons.items():
        if os.environ.get(variable) != "1":
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=f"{reason}; set {variable}=1"))
