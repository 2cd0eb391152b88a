"""``assay run``: the embedded services around the flow, and its result on the terminal."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from components.adapters.mlflow_tracking import check_mlflow, configure_mlflow
from components.adapters.prefect_deployments import check_placement
from components.adapters.prefect_server import (
    HOST,
    EmbeddedServer,
    check_prefect,
    run_environment,
)
from components.errors import GateError
from components.interruption import interrupt_received
from components.pipeline_entries import pipeline_entries
from components.settings import Settings, load_settings
from components.state import make_root, prefect_folder
from flows.request import Request


def run(request: Request) -> int:
    """Run the flow ``retrain`` and print its summary.

    Returns:
        0 when the run completed, 3 when a gate rejected the candidate.

    Raises:
        UsageError: The request cannot be carried out.
        InfrastructureError: The state folder, MLflow or Prefect cannot be used.
    """
    started = time.perf_counter()
    pipeline_entries()
    settings = load_settings()
    named = os.environ.get("PREFECT_API_URL") or settings.prefect_api_url
    check_placement(settings, named)
    make_root(settings.root)
    check_mlflow(settings)
    with contextlib.redirect_stdout(sys.stderr), prefect_api(settings, named) as server:
        from flows.embedded import execute

        summary, pipeline = execute(request, settings, server, started)
    if request.as_json:
        print(summary.model_dump_json())
    else:
        from flows.summary import describe

        print(describe(summary, pipeline, _places(settings, named)))
    return GateError.exit_code if summary.decision == "rejected" else 0


@contextlib.contextmanager
def prefect_api(settings: Settings, named: str) -> Iterator[EmbeddedServer | None]:
    """Point Prefect at the server that is named, or launch one without waiting for it.

    Raises:
        InfrastructureError: The named server does not answer, or the port is taken.
    """
    os.environ.update(run_environment(settings.root))
    if named:
        check_prefect(named)
        os.environ["PREFECT_API_URL"] = named
        yield None
        return
    server = EmbeddedServer(settings.root, settings.prefect_port, settings.prefect_timeout_s)
    server.start()
    os.environ["PREFECT_API_URL"] = server.url
    for name in ("no_proxy", "NO_PROXY"):  # no proxy stands between this process and its own child
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), HOST)))
    try:
        yield server
    finally:
        interrupt_received()
        server.stop()


def _places(settings: Settings, named: str) -> dict[str, str]:
    """Where the run can be looked at, as commands that can be pasted."""
    commands = Path(sys.executable).parent
    mlflow = f"{commands / 'mlflow'} ui --backend-store-uri {configure_mlflow(settings)}"
    home = prefect_folder(settings.root)
    return {
        "mlflow": settings.mlflow_tracking_uri or mlflow,
        "prefect": named or f"PREFECT_HOME={home} {commands / 'prefect'} server start",
        "state": str(settings.root),
    }
