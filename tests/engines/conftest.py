"""Engines of this machine: a test is skipped where one is missing, and fails under ``CI=true``."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.row_model import write_tensors, write_version

from components.smoke_test.engines.installed import missing


@pytest.fixture(scope="session")
def node_modules(checkout: Path) -> Path:
    """Where ``make engines`` installs packages for JavaScript."""
    return checkout / ".engines" / "node_modules"


@pytest.fixture(scope="session")
def needs(node_modules: Path) -> Callable[..., None]:
    """Leave a test out where an engine is missing."""

    def check(*engines: str) -> None:
        faults = [fault for engine in engines for fault in missing(engine, node_modules)]
        if faults and os.environ.get("CI") == "true":
            pytest.fail(f"every engine must be installed in CI: {'; '.join(faults)}")
        if faults:
            pytest.skip("; ".join(faults))

    return check


@pytest.fixture(scope="session")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a hand-made version that takes rows; tests may not change them."""
    return write_tensors(write_version(tmp_path_factory.mktemp("version") / "rows"))
