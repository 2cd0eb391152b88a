"""The same flights from five sources train the same weights."""

from datetime import date
from pathlib import Path

import pytest
from reliability.same_rows import compare
from support.postgres import find_binaries, postgres_server


def test_five_sources_give_one_fingerprint_and_one_set_of_weights(tmp_path: Path) -> None:
    if find_binaries() is None:
        pytest.skip("PostgreSQL is not installed: install the Debian package postgresql")
    with postgres_server() as postgres:
        found = compare(date(2013, 3, 1), 1, postgres, tmp_path)
    assert len(found) == 1
