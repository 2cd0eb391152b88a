"""All or nothing after registering: a version that is not proved to the end loses its alias."""

import contextlib
import sys
from collections.abc import Iterator

from prefect.transactions import BaseTransaction, get_transaction, transaction

from components.adapters.mlflow_registry import CHALLENGER, CHAMPION, Registry
from components.adapters.mlflow_tracking import Tracking, connect
from components.adapters.prefect_events import announce
from components.adapters.prefect_runtime import run_logger
from components.errors import AssayError, GateError
from components.interruption import interrupt_received
from components.records import RegisteredModel
from tasks.runtime import current_settings

_REGISTERED = "registered"
REJECTED_BY = "rejected_by"
"""Tag of a rejected version: a gate that looked at it, or a failure that was not its own."""
FAILURE = "failure"
_DEAD = ("FAILED", "KILLED")


@contextlib.contextmanager
def proving(registered: RegisteredModel) -> Iterator[None]:
    """A transaction for a stage that is run alone, as ``retrain`` has one for all of them."""
    with transaction() as attempt:
        attempt.set(_REGISTERED, registered)
        attempt.stage(None, on_rollback_hooks=[give_up])
        yield


def remember(registered: RegisteredModel) -> RegisteredModel:
    """Tell the transaction of the task that runs which version to give up, should it fail later."""
    active = get_transaction()
    if active is not None:  # a stage may be called without Prefect
        active.set(_REGISTERED, registered)
    return registered


def give_up(attempt: BaseTransaction) -> None:
    """Reject the version of a transaction that is rolled back, with the error that ended it.

    Prefect calls this while it handles that error. A store that fails now must not hide it.
    """
    interrupt_received()  # what is left to do is not to be interrupted
    error = sys.exception()
    reason = (
        str(error) if isinstance(error, AssayError) else f"its run ended by {type(error).__name__}"
    )
    registered = attempt.get(_REGISTERED)
    assert isinstance(registered, RegisteredModel), "register has put it there"
    try:
        registry = Registry(connect(current_settings()), registered.model)
        champion = registry.aliases().get(CHAMPION)
        by = "gate" if isinstance(error, GateError) else FAILURE
        if not withdraw(registry, registered.version, reason, by):
            return
    except AssayError as second:
        run_logger().warning(
            "Version %d could not be marked as rejected, which the next run does: %s",
            registered.version,
            second,
        )
        return
    if not isinstance(error, GateError):  # its stage has told already
        announce(
            "rejected",
            model=registered.model,
            version=registered.version,
            before=champion,
            reason=reason,
        )


def withdraw(registry: Registry, version: int, reason: str, by: str) -> bool:
    """Mark a version as rejected and take its alias, unless it is champion.

    What consumers follow is left as it is: a champion was proved, and a run that failed later is
    no verdict on it.
    """
    if registry.aliases().get(CHAMPION) == version:
        return False
    registry.tag(version, {"decision": "rejected", "reason": reason[:5000], REJECTED_BY: by})
    registry.drop_alias(CHALLENGER, version)
    return True


def withdraw_dead(tracking: Tracking, registry: Registry) -> list[int]:
    """Withdraw versions that were registered by runs which died before they were judged.

    Call it after :meth:`Tracking.reconcile`. A candidate that waits for a person is left alone.

    Returns:
        Their numbers.
    """
    challenger = registry.aliases().get(CHALLENGER)
    withdrawn = []
    for version in registry.versions():
        decision = version.tags.get("decision")
        challenges = version.number == challenger and decision != "candidate"
        if (decision is not None and not challenges) or not version.run_id:
            continue
        status = tracking.status(version.run_id)
        if status in _DEAD:
            reason = f"its run died before it was judged: MLflow run {version.run_id} is {status}"
            if withdraw(registry, version.number, reason, FAILURE):
                withdrawn.append(version.number)
    return withdrawn
