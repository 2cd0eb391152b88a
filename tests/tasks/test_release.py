"""After registering it is all or nothing: a version that was not proved to the end is given up."""

import subprocess
import sys
from collections.abc import Callable
from datetime import date
from typing import Any

import pytest

from components.adapters.mlflow_ledger import Ledger
from components.adapters.mlflow_registry import Registry
from components.adapters.mlflow_tracking import connect
from components.decide.history import Entry, now
from components.decide.moves import reconcile
from components.errors import InfrastructureError
from components.settings import load_settings
from tasks import release
from tasks.decide import decide
from tasks.plan import plan
from tasks.register import register
from tasks.release import proving
from tasks.smoke_test import smoke_test


def dead_process() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_version_of_a_dead_run_is_rejected_by_the_next_plan(
    bench: Any, export_of: Callable[..., Any]
) -> None:
    exported = export_of("withdrawn")
    run_id = exported.validated.trained.run_id
    registered = register.fn(exported)
    assert bench.aliases("withdrawn") == {"challenger": registered.version}
    bench.client.set_tag(run_id, "assay.pid", str(dead_process()))  # killed after registering
    again = ("withdrawn", date(2014, 1, 1), 0, (), False)
    plan(*again)
    assert bench.client.get_run(run_id).info.status == "KILLED"
    assert bench.aliases("withdrawn") == {}
    tags = bench.versions("withdrawn")[registered.version]
    assert tags["decision"] == "rejected"
    assert f"MLflow run {run_id} is KILLED" in tags["reason"]
    assert tags["rejected_by"] == "failure"

    # The next run finds the version by its bytes, proves it, and says so.
    second = register.fn(exported)
    assert (second.version, second.created) == (registered.version, False)
    assert decide.fn(smoke_test.fn(second)).decision == "promoted"
    assert bench.versions("withdrawn")[registered.version]["decision"] == "promoted"
    assert bench.aliases("withdrawn") == {"champion": registered.version}
    plan(*again)
    assert bench.versions("withdrawn")[registered.version]["decision"] == "promoted"


def test_a_version_whose_run_is_alive_is_left_alone(
    bench: Any, export_of: Callable[..., Any]
) -> None:
    registered = register.fn(export_of("withdrawn", "epochs=3"))
    plan("withdrawn", date(2014, 1, 1), 0, (), False)
    assert bench.aliases("withdrawn")["challenger"] == registered.version
    assert "decision" not in bench.versions("withdrawn")[registered.version]


def test_a_store_that_fails_does_not_hide_the_error(
    bench: Any, export_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    registered = register.fn(export_of("withdrawn", "epochs=3"))

    def down(*arguments: object) -> None:
        raise InfrastructureError("the store is down")

    monkeypatch.setattr(release, "withdraw", down)
    with pytest.raises(ZeroDivisionError), proving(registered):
        raise ZeroDivisionError


def test_a_transaction_that_ends_well_rejects_nothing(
    bench: Any, export_of: Callable[..., Any]
) -> None:
    registered = register.fn(export_of("withdrawn", "epochs=3"))
    with proving(registered):
        pass
    assert bench.aliases("withdrawn")["challenger"] == registered.version
    with pytest.raises(ZeroDivisionError), proving(registered):
        raise ZeroDivisionError
    assert "challenger" not in bench.aliases("withdrawn")
    tags = bench.versions("withdrawn")[registered.version]
    assert (tags["decision"], tags["reason"]) == ("rejected", "its run ended by ZeroDivisionError")


def test_the_next_plan_completes_a_move_that_a_dead_process_began(
    bench: Any, export_of: Callable[..., Any]
) -> None:
    """It had written the entry, and had not set the alias."""
    registered = register.fn(export_of("withdrawn", "epochs=4"))
    tracking = connect(load_settings())
    ledger = Ledger(tracking, Registry(tracking, "withdrawn"))
    history = reconcile(ledger)
    began = Entry(
        seq=len(history.entries) + 1,
        id="dead",
        at=now(),
        who="a process that died",
        kind="promote",
        before=history.champion,
        to=registered.version,
        why="it won",
    )
    assert ledger.append(began)
    assert bench.aliases("withdrawn").get("champion") == history.champion
    plan("withdrawn", date(2014, 1, 1), 0, (), False)
    assert bench.aliases("withdrawn")["champion"] == registered.version
    assert ledger.read().head == began
    assert began.seq in ledger.read().applied
