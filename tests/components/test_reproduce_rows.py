"""The rows of a job, read again: from the source, and what is stored beside it."""

from pathlib import Path

import pytest
from support.ledger import kept as pipeline
from support.ledger import write_rows

from components.data.snapshot_files import file_name
from components.errors import DataError
from components.plan import open_snapshots, plan_job
from components.records import Job
from components.reproduce_rows import RowsAgain, read_rows_again
from components.settings import Settings


class Case:
    """A planned job, its rows, and the snapshot that planning left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = write_rows(folder / "rows.txt")
        self.settings = Settings(home=folder / "home")
        self.job: Job = plan_job(pipeline, self.settings)
        stored = open_snapshots(pipeline, self.settings).below(self.job.data_fingerprint).local
        assert stored is not None
        self.stored = stored

    def again(self) -> RowsAgain:
        before = {path: path.read_bytes() for path in self.stored.parent.glob("*/*")}
        found = read_rows_again(pipeline, self.settings, self.job, self.folder / "again")
        after = {path: path.read_bytes() for path in self.stored.parent.glob("*/*")}
        assert after == before
        return found

    def change(self, line: int) -> None:
        lines = self.rows.read_text().splitlines()
        first, rest = lines[line].split(maxsplit=1)
        lines[line] = f"{float(first) + 1:.6f} {rest}"
        self.rows.write_text("\n".join(lines))

    def forget(self) -> None:
        for path in self.stored.iterdir():
            path.unlink()
        self.stored.rmdir()


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setenv("TEAM_ROWS", str(tmp_path / "rows.txt"))
    return Case(tmp_path)


def agreement(found: RowsAgain) -> dict[str, bool | None]:
    return {check.what: check.agrees for check in found.checks}


def test_same_rows(case: Case) -> None:
    found = case.again()
    assert agreement(found) == {"data": True, "snapshot": True}
    assert found.notes == ()
    assert found.snapshot.fingerprint == case.job.data_fingerprint


def test_changed_row_is_told_and_the_stored_rows_are_used(case: Case) -> None:
    case.change(300)  # the first line that is held out
    found = case.again()
    assert agreement(found) == {"data": False, "snapshot": True}
    assert found.snapshot.fingerprint == case.job.data_fingerprint
    told, used = found.notes
    assert case.job.data_fingerprint in told
    assert found.checks[0].rebuilt in told
    assert told.endswith("values differ in a (holdout).")
    assert "stored snapshot" in used


def test_changed_row_without_a_snapshot(case: Case) -> None:
    case.change(0)
    case.forget()
    found = case.again()
    assert agreement(found) == {"data": False, "snapshot": None}
    assert found.snapshot.fingerprint == found.checks[0].rebuilt != case.job.data_fingerprint
    assert "no stored snapshot" in found.notes[0]


def test_missing_row(case: Case) -> None:
    case.rows.write_text("\n".join(case.rows.read_text().splitlines()[1:]))
    assert "train has 299 rows instead of 300" in case.again().notes[0]


def test_damaged_snapshot_is_told_and_not_used(case: Case) -> None:
    path = case.stored / file_name("train")
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    found = case.again()
    assert agreement(found) == {"data": True, "snapshot": None}
    assert "must be as it was written" in found.notes[0]


def test_source_that_is_gone(case: Case) -> None:
    case.rows.unlink()
    found = case.again()
    assert agreement(found) == {"data": False, "snapshot": True}
    assert "no longer gives" in found.notes[0]
    case.forget()
    with pytest.raises(DataError, match="ledger must be there"):
        case.again()
