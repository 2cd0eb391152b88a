"""Prefect inside a run: logger, artifacts, blocks, and the refusal to unpickle."""

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, final
from uuid import UUID

import httpx

from components.errors import AssayError, ConfigError
from components.interruption import reclaim_signals
from components.records import Record

SAFE_SERIALIZER = "json"
_FLUSH_S = 10.0


def refuse_pickle() -> None:
    """Make sure that reading a stored result never runs code in this process.

    A stored result names the serializer that reads it, so a forged file could ask for pickle and
    run code; setting the default to JSON does not prevent that. Even Prefect's JSON calls whatever
    function the file names. So pickle is disarmed, and JSON gives plain values and records only.

    Raises:
        ConfigError: Prefect is set to write results with something other than JSON.
    """
    from prefect.serializers import CompressedSerializer, JSONSerializer, PickleSerializer
    from prefect.settings import get_current_settings

    default = get_current_settings().results.default_serializer
    if default != SAFE_SERIALIZER:
        raise ConfigError(
            f"results must be written as JSON; PREFECT_RESULTS_DEFAULT_SERIALIZER is {default!r}. "
            f"Set it to {SAFE_SERIALIZER!r}."
        )

    def refuse(self: object, *args: object) -> NoReturn:
        raise ConfigError(
            "a stored result asks to be read or written with pickle, which can run code; assay "
            "stores JSON only. Delete the result storage and find out who wrote it."
        )

    def load(self: object, blob: bytes) -> Record | RuntimeError:
        value = json.loads(blob, object_hook=_revive)
        if not isinstance(value, Record | RuntimeError):
            raise ConfigError("a stored result must be a record of assay; it is something else.")
        return value

    for serializer in (CompressedSerializer, PickleSerializer):
        for method in ("loads", "dumps"):
            setattr(serializer, method, refuse)
    plain: Any = JSONSerializer
    plain.loads = load


def _revive(value: dict[str, Any]) -> Any:
    """A JSON object as Prefect's encoder writes it: a record, an error as its text, or itself."""
    if "__exc_type__" in value:
        return RuntimeError(f"{value['__exc_type__']}: {value.get('message')}")
    if "__class__" not in value:
        return value
    kinds = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in Record.__subclasses__()}
    if value["__class__"] not in kinds:
        raise ConfigError(
            f"a stored result must be a record of assay; it asks for {value['__class__']!r}, which "
            "could run code. Delete the result storage and find out who wrote it."
        )
    return kinds[value["__class__"]].model_validate(value["data"])


class _NoLink(logging.Filter):
    """Drop the line that links to the run's page."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("View at ")


def enter_flow() -> None:
    """What every flow does first: no pickle, errors that explain themselves, certain interrupts.

    Raises:
        ConfigError: As :func:`refuse_pickle`.
    """
    refuse_pickle()
    quiet_console()
    reclaim_signals()


def run_logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """The logger of the current flow or task run, or a plain one outside of runs."""
    from prefect.exceptions import MissingContextError
    from prefect.logging import get_run_logger

    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger("assay")


def flow_run_page(flow_run_id: str) -> str:
    """The address of a flow run's page; empty beside an embedded server, which is gone soon.

    Prefect takes PREFECT_UI_URL, or makes up the address from the server's.
    """
    from prefect.settings import get_current_settings

    place = get_current_settings().ui_url
    return f"{place.rstrip('/')}/runs/flow-run/{flow_run_id}" if place and flow_run_id else ""


def publish_markdown(key: str, markdown: str, description: str) -> None:
    """Create a Prefect artifact of the current run; outside of runs there is nothing to show it."""
    from prefect.artifacts import create_markdown_artifact

    if _in_run():
        create_markdown_artifact(key=_key(key), markdown=markdown, description=description)


def publish_table(key: str, rows: list[dict[str, Any]], description: str) -> None:
    """Create a table as a Prefect artifact of the current run, as :func:`publish_markdown`."""
    from prefect.artifacts import create_table_artifact

    if _in_run():
        create_table_artifact(key=_key(key), table=rows, description=description)


def _in_run() -> bool:
    from prefect.context import FlowRunContext, TaskRunContext

    return FlowRunContext.get() is not None or TaskRunContext.get() is not None


def _key(text: str) -> str:
    """An artifact's key: Prefect takes small letters, digits and dashes; others become a dash."""
    return re.sub("[^a-z0-9-]", "-", text.lower())


@final
class ProgressArtifact:
    """A progress bar on the page of the current run, made when it is first shown.

    Progress is a convenience: a server that refuses it costs the bar, not the run.
    """

    def __init__(self, key: str, description: str) -> None:
        self._key = key
        self._description = description
        self._id: UUID | None = None
        self._refused = False

    def show(self, percent: float) -> None:
        """Set the bar to a percentage; outside of runs there is nothing to show it."""
        from prefect.artifacts import create_progress_artifact, update_progress_artifact
        from prefect.context import TaskRunContext
        from prefect.exceptions import PrefectException

        if TaskRunContext.get() is None or self._refused:
            return
        try:
            if self._id is None:
                made = create_progress_artifact(percent, self._key, self._description)
                assert isinstance(made, UUID), "outside of a coroutine, it is synchronous"
                self._id = made
            else:
                update_progress_artifact(self._id, percent)
        except (httpx.HTTPError, PrefectException) as error:
            self._refused = True
            run_logger().warning("Prefect does not take the progress of training: %s", error)


def publish_rejection(stage: str, failures: Sequence[str]) -> None:
    """Show what a gate found."""
    lines = "\n".join(f"- {failure}" for failure in failures)
    publish_markdown(
        f"rejected-by-{stage.replace('_', '-')}",
        f"# Rejected by {stage}\n\n{lines}\n",
        "Why the candidate was rejected",
    )


def load_block_settings(name: str) -> dict[str, Any]:
    """Settings held by a Prefect block of type Assay Credentials.

    Raises:
        ConfigError: There is no such block.
    """
    from components.adapters.prefect_blocks import AssayCredentials

    try:
        block = AssayCredentials.load(name)
    except ValueError as error:
        raise ConfigError(
            f"ASSAY_CREDENTIALS_BLOCK must name a block of type assay-credentials; {name!r} was "
            f"not found: {error}. Create it in the Prefect UI or unset the variable."
        ) from error
    assert isinstance(block, AssayCredentials), "outside of a coroutine, load is synchronous"
    return block.settings()


class _OneParagraph(logging.Filter):
    """Take the traceback from an error that explains itself."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, AssayError):
            record.msg, record.args = "%s", (str(error),)
            record.exc_info = record.exc_text = None
        return True


def quiet_console() -> None:
    """Keep tracebacks of foreseen errors, and chatter of libraries, out of the logs."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        if not any(isinstance(known, _OneParagraph) for known in logger.filters):
            logger.addFilter(_OneParagraph())
    for name in ("torch.onnx", "onnxscript", "httpx", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def beside_embedded_server() -> Iterator[None]:
    """Send no heartbeats and print no link: the server dies with the run and shows no pages.

    The thread that sends heartbeats sleeps in whole seconds, and a run that ends waits for it.
    """
    from prefect.settings import (
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_UI_URL,
        temporary_settings,
    )

    logging.getLogger("prefect.flow_runs").addFilter(_NoLink())
    with temporary_settings(updates={PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None, PREFECT_UI_URL: ""}):
        yield


def flush_prefect() -> None:
    """Send the logs and events that are still queued, before the server goes away."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogHandler

    APILogHandler().flush()
    EventsWorker.drain_all(timeout=_FLUSH_S)
