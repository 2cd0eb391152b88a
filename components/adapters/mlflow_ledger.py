"""The history of a model's champions, kept in MLflow, where it can be read and not rewritten.

MLflow has no compare-and-swap. But a parameter of a run is written once: the store accepts the same
value again and refuses another, and its database decides between two writers. So the history is a
run of its own, and its parameters are the entries. Which run that is, is decided in the same way:
by a parameter of the run that the model's first version came from.
"""

from datetime import datetime
from typing import final

from components.adapters.mlflow_registry import CHAMPION, Registry, quoted
from components.adapters.mlflow_tracking import KIND, TAG, Tracking, mlflow_errors
from components.decide.history import Entry, History, encode, entry_name, read_history
from components.decide.moves import Book
from components.errors import InfrastructureError

HISTORY = "history"
"""The kind of run that holds a history, in its tag ``assay.kind``."""
_ELECTED = TAG + "history"
_CACHED = TAG + "history_run"


@final
class Ledger(Book):
    """The history and the alias ``champion`` of one registered model.

    Args:
        tracking: The store.
        registry: Of the model. Its experiment has the same name.
    """

    def __init__(self, tracking: Tracking, registry: Registry) -> None:
        self._tracking = tracking
        self._client = tracking.client
        self._registry = registry
        self._run_id = ""

    def read(self) -> History:
        """All entries and marks; none where the model has no history yet."""
        run_id = self._run_id or self._find()
        if not run_id:
            return History()
        with mlflow_errors(self._tracking.uri):
            return read_history(self._client.get_run(run_id).data.params)

    def append(self, entry: Entry) -> bool:
        """Keep an entry, unless its number is taken; the first entry makes the history's run."""
        return self._write_once(self._ensure(), entry_name(entry.seq), encode(entry))

    def mark(self, name: str, at: datetime) -> None:
        """Keep a mark."""
        kept = self._write_once(self._ensure(), name, at.isoformat())
        assert kept, "a mark's name is its writer's alone"

    def alias(self) -> int | None:
        """The version that the alias names."""
        return self._registry.aliases().get(CHAMPION)

    def point(self, version: int | None) -> None:
        """Let the alias name a version, or none."""
        if version is None:
            self._registry.delete_alias(CHAMPION)
        else:
            self._registry.set_alias(CHAMPION, version)

    @property
    def run_id(self) -> str:
        """The MLflow run of the history; empty where there is none."""
        return self._run_id or self._find()

    def _write_once(self, run_id: str, name: str, value: str) -> bool:
        """Write a parameter; False if another value was there first."""
        from mlflow.exceptions import MlflowException

        with mlflow_errors(self._tracking.uri):
            try:
                self._client.log_param(run_id, name, value)
            except MlflowException:
                found = self._client.get_run(run_id).data.params.get(name)
                if found is None:  # it was refused for another reason
                    raise
                return bool(found == value)
        return True

    def _find(self) -> str:
        """The run that the model's tag names: whoever elected it, wrote it there."""
        with mlflow_errors(self._tracking.uri):
            found = self._client.search_registered_models(f"name = {quoted(self._registry.model)}")
            self._run_id = found[0].tags.get(_CACHED, "") if found else ""
            if (
                self._run_id
                and self._client.get_run(self._run_id).info.lifecycle_stage == "deleted"
            ):
                self._client.restore_run(self._run_id)
        return self._run_id

    def _ensure(self) -> str:
        """The run of the history; elected, if there is none."""
        run_id = self._run_id or self._find() or self._elect()
        self._run_id = run_id
        return run_id

    def _elect(self) -> str:
        """Make a run, unless another process is first; all agree on the one that is named first."""
        tags = {TAG + KIND: HISTORY}
        name = f"history of {self._registry.model}"
        run_id = self._tracking.start_run(self._registry.model, name, tags, {})
        self._tracking.finish(run_id, "FINISHED")  # it takes parameters all the same
        with mlflow_errors(self._tracking.uri):
            oldest = self._oldest_run()
            if not self._write_once(oldest, _ELECTED, run_id):
                self._client.delete_run(run_id)
                run_id = str(self._client.get_run(oldest).data.params[_ELECTED])
            self._client.set_registered_model_tag(self._registry.model, _CACHED, run_id)
        return run_id

    def _oldest_run(self) -> str:
        """The run of the lowest version whose run is there still."""
        for version in self._registry.versions():
            if version.run_id and self._is_active(version.run_id):
                return version.run_id
        raise InfrastructureError(
            f"the history of {self._registry.model} must be anchored in the MLflow run of one of "
            "its versions; none of them has a run any more. Restore a run that was deleted, or let "
            f"the tag {_CACHED} of the registered model name an MLflow run."
        )

    def _is_active(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
