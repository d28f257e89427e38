"""Shared fixtures: golden reference tensors, and bundles of the demo models, exported once per test run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

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
def demo_bundle(shared_folder: Path) -> Callable[[str], Path]:
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
    if os.environ.get("ARINAR_SLOW") != "1":
        skip = pytest.mark.skip(reason="full-size models; set ARINAR_SLOW=1")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)
