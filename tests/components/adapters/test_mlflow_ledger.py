"""The history on real stores: written once, elected once, and whole after crowds and crashes."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.mlflow_server import mlflow_server
from support.postgres import find_binaries, postgres_server

from components.adapters.mlflow_ledger import Ledger
from components.adapters.mlflow_registry import CHAMPION, Registry
from components.adapters.mlflow_tracking import Tracking, connect
from components.decide.history import Entry, History, now
from components.decide.moves import move, reconcile
from components.errors import ConflictError, InfrastructureError
from components.settings import Settings, load_settings

PROMOTERS = Path(__file__).parents[2] / "support" / "promoters.py"
PROCESSES, MOVES = 8, 3


def make_model(tracking: Tracking, name: str, versions: int) -> Registry:
    """A registered model whose versions have a run and no files."""
    run_id = tracking.start_run(name, "run", {}, {})
    tracking.finish(run_id, "FINISHED")
    tracking.client.create_registered_model(name)
    for _ in range(versions):
        tracking.client.create_model_version(name, f"runs:/{run_id}/none", run_id=run_id)
    return Registry(tracking, name)


@pytest.fixture
def registry(tracking: Tracking, request: pytest.FixtureRequest) -> Registry:
    """A model of the test's own with three versions."""
    return make_model(tracking, request.node.name, 3)


def entry(seq: int, before: int | None, to: int | None, writer: str = "ab") -> Entry:
    return Entry(
        seq=seq, id=writer, at=now(), who=writer, kind="promote", before=before, to=to, why=""
    )


def histories(tracking: Tracking, model: str) -> list[Any]:
    """Runs of the model's experiment that hold a history."""
    experiment = tracking.client.get_experiment_by_name(model)
    assert experiment is not None
    return list(
        tracking.client.search_runs([experiment.experiment_id], "tags.`assay.kind` = 'history'")
    )


def test_the_first_writer_of_an_entry_has_it(tracking: Tracking, registry: Registry) -> None:
    one, other = Ledger(tracking, registry), Ledger(tracking, registry)
    assert one.read() == History() == other.read()
    first = entry(1, None, 1, "aa")
    assert one.append(first)
    assert one.append(first), "a client that asks again is told the same"
    assert not other.append(entry(1, None, 2, "bb"))
    assert other.read().entries == (first,)


def test_two_who_begin_a_history_agree_on_one(
    tracking: Tracking, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledgers = [Ledger(tracking, registry) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_find", lambda self: "")  # both have looked, and found none
        assert ledgers[0].append(entry(1, None, 1, "aa"))
        assert not ledgers[1].append(entry(1, None, 2, "bb"))
    (run,) = histories(tracking, registry.model)
    assert {ledger.run_id for ledger in ledgers} == {run.info.run_id}
    assert run.info.status == "FINISHED"
    tags = tracking.client.get_registered_model(registry.model).tags
    assert tags["assay.history_run"] == run.info.run_id


def test_a_dead_elector_leaves_a_run_that_others_find(
    tracking: Tracking, registry: Registry
) -> None:
    assert Ledger(tracking, registry).append(entry(1, None, 1))
    tracking.client.delete_registered_model_tag(registry.model, "assay.history_run")
    assert not Ledger(tracking, registry).append(entry(1, None, 2, "bb"))
    assert Ledger(tracking, registry).read().champion == 1
    assert len(histories(tracking, registry.model)) == 1


def test_a_history_that_was_deleted_comes_back(tracking: Tracking, registry: Registry) -> None:
    ledger = Ledger(tracking, registry)
    move(ledger, expected=None, to=1, kind="promote", why="", who="me")
    tracking.client.delete_run(ledger.run_id)
    again = Ledger(tracking, registry)
    assert move(again, expected=1, to=2, kind="promote", why="", who="me").seq == 2


def test_a_history_needs_an_anchor(tracking: Tracking, registry: Registry) -> None:
    tracking.client.delete_run(registry.versions()[0].run_id)
    with pytest.raises(InfrastructureError, match="anchored in the MLflow run of one of its vers"):
        Ledger(tracking, registry).append(entry(1, None, 1))


def test_a_refusal_for_another_reason_is_no_lost_race(
    tracking: Tracking, registry: Registry
) -> None:
    ledger = Ledger(tracking, registry)
    ledger.append(entry(1, None, 1))
    tracking.client.delete_run(ledger.run_id)
    with pytest.raises(InfrastructureError, match="must store what a run gives it"):
        ledger.append(entry(2, 1, 2))


def test_the_alias_follows_the_history(tracking: Tracking, registry: Registry) -> None:
    ledger = Ledger(tracking, registry)
    registry.set_alias(CHAMPION, 2)
    assert reconcile(ledger).champion == 2
    with pytest.raises(ConflictError):
        move(ledger, expected=None, to=1, kind="promote", why="", who="me")
    move(ledger, expected=2, to=1, kind="promote", why="", who="me")
    assert registry.aliases() == {CHAMPION: 1}
    ledger.point(None)
    ledger.point(None)
    assert reconcile(ledger).champion is None
    kinds = [(e.kind, e.to) for e in Ledger(tracking, registry).read().entries]
    assert kinds == [("external", 2), ("promote", 1), ("external", None)]


def test_a_version_that_is_deleted_takes_the_alias_along(
    tracking: Tracking, registry: Registry
) -> None:
    ledger = Ledger(tracking, registry)
    move(ledger, expected=None, to=2, kind="promote", why="", who="me")
    tracking.client.delete_model_version(registry.model, "2")
    assert reconcile(ledger).champion is None


@pytest.fixture
def promoters(child_environment: Mapping[str, str], checkout: Path) -> Callable[..., Any]:
    """Run processes that move champions, and give what they print and how they ended."""

    def run(*arguments: object, uri: str = "") -> Any:
        return subprocess.run(
            [sys.executable, PROMOTERS, *map(str, arguments)],
            env={**child_environment, "PYTHONPATH": str(checkout), "TRACKING_URI": uri},
            capture_output=True,
            text=True,
            timeout=150,
        )

    return run


def check_crowd(done: Any, tracking: Tracking, registry: Registry) -> int:
    """Hold the history against what every process says that it did; give the conflicts."""
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])["processes"]
    moved = sorted(tuple(move) for process in told for move in process["moved"])
    assert len(moved) == PROCESSES * MOVES
    history = Ledger(tracking, registry).read()
    assert [(e.seq, e.before, e.to) for e in history.entries] == moved
    assert {e.kind for e in history.entries} == {"promote"}
    assert registry.aliases() == {CHAMPION: history.champion}
    assert reconcile(Ledger(tracking, registry)) == history
    (run,) = histories(tracking, registry.model)
    assert run.info.status == "FINISHED"
    return sum(process["conflicts"] for process in told)


def test_eight_processes_with_one_home_take_turns(
    tracking: Tracking, store: Settings, promoters: Callable[..., Any]
) -> None:
    registry = make_model(tracking, "crowd", PROCESSES * MOVES)
    done = promoters("crowd", "crowd", MOVES, *[store.home] * PROCESSES)
    assert check_crowd(done, tracking, registry) == 0, "the lock lets one at a time"


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, child_environment: Mapping[str, str]
) -> Iterator[str]:
    """An MLflow server, on PostgreSQL where that is installed."""
    folder = tmp_path_factory.mktemp("server")
    if find_binaries() is None:
        with mlflow_server(folder, child_environment) as uri:
            yield uri
        return
    with postgres_server() as postgres:
        url = postgres.url().get_secret_value().replace("postgresql", "postgresql+psycopg", 1)
        with mlflow_server(folder, child_environment, url) as uri:
            yield uri


@pytest.mark.server
def test_eight_machines_lose_no_update(
    server: str, promoters: Callable[..., Any], tmp_path: Path
) -> None:
    """Each has a home of its own, and so no lock in common."""
    tracking = connect(load_settings(home=tmp_path, mlflow_tracking_uri=server, _env_file=None))
    registry = make_model(tracking, "machines", PROCESSES * MOVES)
    homes = [tmp_path / str(n) for n in range(PROCESSES)]
    done = promoters("crowd", "machines", MOVES, *homes, uri=server)
    assert check_crowd(done, tracking, registry) > 0, "they were not at it at once"


def test_a_killed_process_leaves_a_move_that_the_next_one_completes(
    tracking: Tracking, store: Settings, promoters: Callable[..., Any]
) -> None:
    cases = ("before-alias", "after-alias")
    registries = {when: make_model(tracking, when, 3) for when in cases}
    for registry in registries.values():
        move(Ledger(tracking, registry), expected=None, to=1, kind="promote", why="", who="me")
    done = promoters("die", store.home, *(word for when in cases for word in (when, when)))
    assert (done.returncode, done.stdout.strip()) == (0, "[-9, -9]"), done.stderr
    for when, registry in registries.items():
        assert registry.aliases() == {CHAMPION: 1 if when == "before-alias" else 2}
        assert Ledger(tracking, registry).read().applied == {1}
        told: list[str] = []
        history = reconcile(Ledger(tracking, registry), told.append)
        assert registry.aliases() == {CHAMPION: 2}
        assert (history.champion, history.applied) == (2, {1, 2})
        last = history.entries[-1]
        assert (last.before, last.to, last.kind) == (1, 2, "promote")
        assert last.who == "a process that died"
        assert len(told) == 1 and "entry 2 of the history" in told[0]
        book = Ledger(tracking, registry)
        assert move(book, expected=2, to=3, kind="promote", why="", who="me").seq == 3
