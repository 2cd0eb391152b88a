"""The champion moved by a person: promote, rollback, and the history of both.

Plain functions: they need MLflow and nothing else, whether or not Prefect is up.
"""

import getpass
import os
import socket
from dataclasses import dataclass
from typing import final

from prefect.runtime import flow_run

from components.adapters.mlflow_ledger import Ledger
from components.adapters.mlflow_registry import CHALLENGER, DAMAGED, Registry, Version
from components.adapters.mlflow_tracking import Tracking, connect, has_store
from components.adapters.prefect_events import announce
from components.adapters.prefect_runtime import run_logger
from components.decide.history import Entry, History, Kind, previous_champion
from components.decide.moves import move, reconcile
from components.errors import ConfigError, ConflictError, GateError
from components.records import Decision, Record
from components.settings import Settings
from components.smoke_test.runner import SmokeReport
from components.state import exclusive
from tasks.proof import prove
from tasks.release import FAILURE, REJECTED_BY
from tasks.workplace import workplace

ROLLED_BACK = "rolled_back"
"""Tag of a version that was rolled back, with the reason."""


class Moved(Record):
    """A move of the champion by hand, and the proof that came before it."""

    model: str
    entry: Entry
    golden_rows: int
    max_difference: float
    p50_ms: float


class Champions(Record):
    """The history of a model's champions, and who is champion now."""

    model: str
    champion: int | None
    entries: tuple[Entry, ...]


@final
@dataclass(frozen=True)
class _Shelf:
    """A registered model, and what is known of it."""

    settings: Settings
    tracking: Tracking
    registry: Registry
    ledger: Ledger

    @property
    def model(self) -> str:
        return self.registry.model

    def version(self, number: int) -> Version:
        found = self.registry.by_number(number)
        if found is None:
            raise ConfigError(
                f"the version must be one of {self.model}; it has no version {number}. The "
                f"versions are listed in MLflow, past champions by 'assay history {self.model}'."
            )
        return found

    def history(self) -> History:
        with exclusive(self.settings.root, lock_of(self.model)):
            return reconcile(self.ledger, run_logger().warning)


def lock_of(model: str) -> str:
    """The name of the lock under which processes of this machine move a model's champion."""
    return f"promote-{model}"


def responsible() -> str:
    """Who is doing this, for the history: a flow run, or a user, and the machine."""
    if flow_run.id:
        who = f"flow run {flow_run.name} ({flow_run.id})"
    else:
        try:
            who = getpass.getuser()
        except (KeyError, OSError):  # a container's user may have no name
            who = f"user {os.getuid()}"
    return f"{who} on {socket.gethostname()}"


def promote(settings: Settings, model: str, number: int, reason: str) -> Moved:
    """Prove a version anew and make it champion, whatever ``decide`` would say of its scores.

    Args:
        settings: Of the installation.
        model: The registered model.
        number: The version.
        reason: Why; it is kept in the history.

    Raises:
        ConfigError: No such model or version, it is champion already, or there is no reason.
        GateError: It was rejected, or the proof fails; nothing was changed.
        ConflictError: Another process moved the champion meanwhile.
        InfrastructureError: MLflow or a disk failed.
    """
    why = _reason(reason)
    shelf = _open(settings, model)
    version = shelf.version(number)
    history = shelf.history()
    if history.champion == number:
        raise ConfigError(
            f"the version must be another than the champion; {model} version {number} is champion "
            "already. Nothing was changed."
        )
    return _move(shelf, history.champion, version, "promote", why)


def roll_back(settings: Settings, model: str, number: int | None, reason: str) -> Moved:
    """Prove an earlier version anew and make it champion again.

    Args:
        settings: Of the installation.
        model: The registered model.
        number: The version; None takes the champion before the present one.
        reason: Why; it is kept in the history and on the version that is left.

    Raises:
        ConfigError: As :func:`promote`, or there is no champion, or none before it.
        GateError: As :func:`promote`.
        ConflictError: As :func:`promote`.
        InfrastructureError: As :func:`promote`.
    """
    why = _reason(reason)
    shelf = _open(settings, model)
    history = shelf.history()
    if history.champion is None:
        raise ConfigError(
            f"there must be a champion to roll back; {model} has none. Name one by "
            f"'assay promote {model} VERSION --reason TEXT'."
        )
    number = number or previous_champion(history)
    if number is None:
        raise ConfigError(
            f"there must be a champion before the present one; version {history.champion} is the "
            f"first that {model} has had. Name a version with --to."
        )
    version = shelf.version(number)
    if number == history.champion:
        raise ConfigError(
            f"a rollback must lead to another version; {model} version {number} is champion now. "
            "Nothing was changed."
        )
    return _move(shelf, history.champion, version, "rollback", why)


def read_champions(settings: Settings, model: str) -> Champions:
    """The history, after a look at whether the alias agrees with it.

    Raises:
        ConfigError: There is no such model.
        InfrastructureError: MLflow failed, or the history is damaged.
    """
    history = _open(settings, model).history()
    return Champions(model=model, champion=history.champion, entries=history.entries)


def announced(moved: Moved, *, outside_runs: bool = False) -> Moved:
    """Tell Prefect's automations of a move by hand.

    Args:
        moved: What happened.
        outside_runs: As :func:`components.adapters.prefect_events.announce`.
    """
    announce(
        "promoted" if moved.entry.kind == "promote" else "rolled_back",
        model=moved.model,
        version=moved.entry.to,
        before=moved.entry.before,
        reason=moved.entry.why,
        outside_runs=outside_runs,
    )
    return moved


def _reason(reason: str) -> str:
    if not any(c.isprintable() and not c.isspace() for c in reason):
        raise ConfigError("the reason must not be empty: it is what the history is read for.")
    # A line of a table, and on a terminal: no control characters, whoever writes it.
    return " ".join("".join(c if c.isprintable() else " " for c in reason).split())


def _open(settings: Settings, model: str) -> _Shelf:
    if not has_store(settings):
        raise ConfigError(
            f"{model} must be a registered model; the state folder {settings.root} has no MLflow "
            "store yet. Name the right folder in ASSAY_HOME, or a server in "
            "ASSAY_MLFLOW_TRACKING_URI."
        )
    tracking = connect(settings)
    registry = Registry(tracking, model)
    if not registry.versions():
        raise ConfigError(
            f"the model must be a registered one; MLflow has no versions of {model!r}. A run of a "
            "pipeline registers the model of its name; 'assay pipelines' lists them."
        )
    return _Shelf(settings, tracking, registry, Ledger(tracking, registry))


def _move(shelf: _Shelf, champion: int | None, version: Version, kind: Kind, why: str) -> Moved:
    _require_unrejected(shelf.model, version)
    with workplace(shelf.settings, "proof") as folder:
        report = prove(shelf.settings, shelf.tracking, shelf.registry, version, folder)
    entry = _record(shelf, champion, version, kind, why)
    return _moved(shelf.model, entry, report)


def _require_unrejected(model: str, version: Version) -> None:
    failures = []
    if version.tags.get("decision") == "rejected" and version.tags.get(REJECTED_BY) != FAILURE:
        failures.append(
            f"{model} version {version.number} was rejected: {version.tags.get('reason', '')} "
            "Train it again: a run that finds the same bytes proves this version anew"
        )
    if DAMAGED in version.tags:
        failures.append(
            f"{model} version {version.number} does not hold the bytes that were registered"
        )
    if failures:
        raise GateError("promotion", failures)


def _record(shelf: _Shelf, champion: int | None, version: Version, kind: Kind, why: str) -> Entry:
    """Tag, move, tag: no alias stands unexplained, and no version that was not moved is praised."""
    registry, number = shelf.registry, version.number
    scores = _scores(shelf.tracking, registry.model, version)
    with exclusive(shelf.settings.root, lock_of(registry.model)):
        registry.tag(number, {"decision": "promoted", "reason": why[:5000]})
        try:
            entry = move(
                shelf.ledger,
                expected=champion,
                to=number,
                kind=kind,
                why=why,
                who=responsible(),
                scores=scores,
            )
        except ConflictError:
            for name in ("decision", "reason"):
                if name in version.tags:
                    registry.tag(number, {name: version.tags[name]})
                else:
                    registry.untag(number, name)
            raise
        if kind == "rollback" and champion is not None:
            tags = {ROLLED_BACK: why[:5000], "decision": "rolled_back", "reason": why[:5000]}
            registry.tag(champion, tags)
        if ROLLED_BACK in version.tags:
            registry.untag(number, ROLLED_BACK)
        registry.drop_alias(CHALLENGER, number)
    return entry


def _scores(tracking: Tracking, model: str, version: Version) -> dict[str, float]:
    """What the version was last judged by, if it was."""
    try:
        text = tracking.read_record(version.run_id, "decide")
        decision = Decision.model_validate_json(text)
    except (ConfigError, ValueError):
        return {}
    registered = decision.tested.registered
    if (registered.model, registered.version) != (model, version.number):
        return {}
    return score_of(decision.metric, decision.candidate_score, decision.champion_score)


def score_of(metric: str, candidate: float, champion: float | None) -> dict[str, float]:
    """The scores of an entry by name."""
    scores = {metric: candidate}
    return scores if champion is None else {**scores, f"{metric} of champion": champion}


def _moved(model: str, entry: Entry, report: SmokeReport) -> Moved:
    return Moved(
        model=model,
        entry=entry,
        golden_rows=report.golden_rows,
        max_difference=report.max_difference,
        p50_ms=report.p50_ms,
    )
