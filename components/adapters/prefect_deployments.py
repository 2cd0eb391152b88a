"""Runs of deployments: one is started on another work pool, waited for, and cancelled.

Nothing here imports Prefect before a function needs it.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

from components.errors import ConfigError, InfrastructureError
from components.settings import Settings

Log = logging.Logger | logging.LoggerAdapter[logging.Logger]

POLL_S = 2.0
WARN_EVERY_S = 60.0
SILENCE_S = 300.0
"""How long Prefect may be silent before a run that was started there is given up."""
CANCEL_S = 20.0
"""How long to wait for a cancelled run; a process worker kills its own after 30 seconds."""

TRAIN_FLOW = "train"


def check_placement(settings: Settings, prefect_url: str | None) -> None:
    """Prove from the settings alone that training can be sent to a worker, if it is to be.

    Args:
        settings: Their ``train_deployment`` may be empty: then there is nothing to prove.
        prefect_url: The Prefect server that workers poll, too; empty is an embedded one.

    Raises:
        ConfigError: It does not name a deployment of the flow ``train``, or one of the servers is
            embedded and so out of a worker's reach.
    """
    name = settings.train_deployment
    if not name:
        return
    if not _is_train(name):
        raise ConfigError(
            f"ASSAY_TRAIN_DEPLOYMENT must name a deployment of the flow {TRAIN_FLOW}, for example "
            f"{TRAIN_FLOW}/gpu; got {name!r}. Name one, or unset it to train here."
        )
    if not settings.mlflow_tracking_uri.startswith(("http://", "https://")):
        raise ConfigError(
            "training on another worker needs an MLflow server that both reach; "
            f"ASSAY_TRAIN_DEPLOYMENT is {name!r} and ASSAY_MLFLOW_TRACKING_URI names none. Set "
            "it to a server's address, or unset ASSAY_TRAIN_DEPLOYMENT to train here."
        )
    if not prefect_url:
        raise ConfigError(
            f"training on another worker needs a Prefect server that the worker polls; "
            f"ASSAY_TRAIN_DEPLOYMENT is {name!r} and Prefect's server is embedded in this run. Set "
            "PREFECT_API_URL to a server's address, or unset ASSAY_TRAIN_DEPLOYMENT to train here."
        )


def _is_train(name: str) -> bool:
    flow, slash, deployment = name.partition("/")
    return flow == TRAIN_FLOW and bool(slash and deployment) and "/" not in deployment


def server_address() -> str | None:
    """The Prefect server that this process uses, if it is a server of its own."""
    from prefect.settings import get_current_settings

    return get_current_settings().api.url


def find_pool(deployment: str) -> str:
    """The work pool of a deployment.

    Raises:
        ConfigError: There is no such deployment, or it has no work pool.
        InfrastructureError: Prefect does not answer.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    try:
        with _prefect_errors(), get_client(sync_client=True) as client:
            pool = client.read_deployment_by_name(deployment).work_pool_name
    except ObjectNotFound as error:
        raise ConfigError(
            f"ASSAY_TRAIN_DEPLOYMENT must name a deployment that the Prefect server has; "
            f"{deployment!r} is not there. Create it with 'prefect --no-prompt deploy --all', or "
            "name another one."
        ) from error
    if not pool:
        raise ConfigError(
            f"a deployment that retrain sends training to must have a work pool; {deployment!r} "
            "has none. Give it one in prefect.yaml, and deploy it again."
        )
    return pool


@dataclass(frozen=True)
class Ended:
    """How a flow run ended: the type of its state, and what the state says."""

    kind: str
    message: str

    @property
    def completed(self) -> bool:
        """Whether it did what it was for."""
        return self.kind == "COMPLETED"


@final
@dataclass(frozen=True)
class RemoteRun:
    """A flow run that a worker of another pool is to take."""

    deployment: str
    pool: str
    flow_run_id: str

    def wait(self, log: Log) -> Ended:
        """Wait until it has ended, however long that takes.

        That nobody takes it is no error, since a worker may come; a warning is logged at times.

        Raises:
            InfrastructureError: The run was deleted, or Prefect is silent for minutes.
        """
        from httpx import HTTPError
        from prefect.client.orchestration import get_client

        heard = warned = time.monotonic()
        with get_client(sync_client=True) as client:
            while True:
                now = time.monotonic()
                try:
                    state = self._state(client)
                except HTTPError as error:  # a server that restarts must not cost hours of training
                    if now - heard > SILENCE_S:
                        raise InfrastructureError(_silent(error)) from error
                else:
                    heard = now
                    if state.is_final():
                        return Ended(state.type.value, state.message or "it gives no reason")
                    waits = state.is_scheduled() or state.is_pending()
                    if waits and now - warned >= WARN_EVERY_S:
                        warned = now
                        log.warning("%s", self._waits(state.name))
                time.sleep(POLL_S)

    def cancel(self, log: Log) -> None:
        """Have it cancelled, and wait a little for its end.

        Raises nothing: an error or an interrupt is on its way already.
        """
        from httpx import HTTPError
        from prefect.client.orchestration import get_client
        from prefect.exceptions import PrefectException
        from prefect.states import Cancelling

        deadline = time.monotonic() + CANCEL_S
        try:
            with get_client(sync_client=True) as client:
                if self._state(client).is_final():
                    return
                why: Any = Cancelling(message="the run that waits for it has ended")
                client.set_flow_run_state(self.flow_run_id, why)
                while not self._state(client).is_final():
                    if time.monotonic() > deadline:
                        log.warning("Flow run %s has been told to end, not yet has", self)
                        return
                    time.sleep(min(POLL_S, 0.5))
        except (HTTPError, PrefectException, InfrastructureError) as error:
            log.warning("Flow run %s could not be cancelled: %s", self, error)

    def _state(self, client: Any) -> Any:
        from prefect.exceptions import ObjectNotFound
        from prefect.states import Pending

        try:
            return client.read_flow_run(self.flow_run_id).state or Pending()
        except ObjectNotFound as error:
            raise InfrastructureError(
                f"a flow run must not be deleted before it has ended; {self} was. Run again."
            ) from error

    def _waits(self, state: str) -> str:
        return (
            f"Flow run {self} waits for a worker of pool {self.pool} (it is {state}). See that one "
            f"is at work: prefect worker start --pool {self.pool}"
        )

    def __str__(self) -> str:
        return f"{self.flow_run_id} of {self.deployment}"


def start_run(deployment: str, parameters: Mapping[str, Any], key: str) -> RemoteRun:
    """Have a flow run of a deployment scheduled now, as a part of the current run.

    Args:
        deployment: ``FLOW/NAME``.
        parameters: JSON values by the flow's parameter names.
        key: The same key never makes a second run.

    Raises:
        ConfigError: There is no such deployment.
        InfrastructureError: Prefect refuses or does not answer.
    """
    from prefect.deployments import run_deployment
    from prefect.exceptions import PrefectException

    pool = find_pool(deployment)
    with _prefect_errors():
        try:
            # With timeout 0 this returns at once: it would neither warn nor cancel.
            run: Any = run_deployment(
                deployment, parameters=dict(parameters), timeout=0, idempotency_key=key
            )
        except PrefectException as error:
            raise InfrastructureError(
                f"Prefect must start a run of {deployment}; it refused: {error}. See that the "
                "deployment is that of this version: prefect --no-prompt deploy --all."
            ) from error
    return RemoteRun(deployment, pool, str(run.id))


@contextlib.contextmanager
def _prefect_errors() -> Iterator[None]:
    from httpx import HTTPError

    try:
        yield
    except HTTPError as error:
        raise InfrastructureError(_silent(error)) from error


def _silent(error: Exception) -> str:
    return (
        f"Prefect must answer at PREFECT_API_URL; it did not: {error or type(error).__name__}. "
        "Start the server or mend the address, and run again."
    )
