"""One run of ``retrain`` in this process, from the request to the summary."""

import contextlib
import time

from components.adapters.mlflow_registry import CHAMPION, Registry
from components.adapters.mlflow_tracking import connect
from components.adapters.prefect_runtime import beside_embedded_server, flush_prefect
from components.adapters.prefect_server import EmbeddedServer
from components.errors import GateError
from components.pipeline import Pipeline, load_pipeline
from components.plan import DEFAULT_AS_OF, resolve_config
from components.settings import Settings
from components.train.device import choose_device
from flows.request import Request
from flows.retrain import retrain
from flows.summary import RunSummary, summarise, summarise_rejection


def execute(
    request: Request, settings: Settings, server: EmbeddedServer | None, started: float
) -> tuple[RunSummary, Pipeline]:
    """Check the request, wait for Prefect, run the flow, and sum up.

    Raises:
        UsageError: The request cannot be carried out; nothing has been recorded anywhere.
        InfrastructureError: MLflow or Prefect cannot be used.
    """
    pipeline = load_pipeline(request.pipeline)
    config = resolve_config(pipeline, request.seed, request.assignments)
    if not settings.train_deployment:  # else the device is that of another machine
        choose_device(config)
    if request.as_of is not None and not pipeline.dated:
        print(f"assay: --as-of is ignored: the data of {pipeline.name} has no dates.")
    connect(settings)
    if server is not None:
        server.wait()
    try:
        with beside_embedded_server() if server is not None else contextlib.nullcontext():
            decision = retrain(
                pipeline=request.pipeline,
                as_of=request.as_of or DEFAULT_AS_OF,
                seed=request.seed,
                settings=list(request.assignments),
                force=request.force,
            )
    except GateError as error:
        if error.rejection is None:
            raise
        holder = Registry(connect(settings), pipeline.name).by_alias(CHAMPION)
        champion = holder.number if holder else None
        seconds = time.perf_counter() - started
        return summarise_rejection(error.rejection, champion, seconds), pipeline
    finally:
        flush_prefect()
    return summarise(decision, time.perf_counter() - started), pipeline
