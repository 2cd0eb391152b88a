"""An MLflow server of the tests' own, on loopback."""

import contextlib
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from components.adapters.prefect_server import HOST, free_port

MLFLOW = Path(sys.executable).with_name("mlflow")


@contextlib.contextmanager
def mlflow_server(
    folder: Path, environment: Mapping[str, str], database: str = ""
) -> Iterator[str]:
    """A server that answers, with all its state in a folder or its tables in a database."""
    port = free_port()
    command: list[str | Path] = [MLFLOW, "server", "--host", HOST, "--port", str(port)]
    command += ["--backend-store-uri", database or f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--workers", "2"]
    command += ["--allowed-hosts", f"{HOST}:{port}"]
    url, log = f"http://{HOST}:{port}", folder / "mlflow.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 90
        while not answers(f"{url}/health"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except (OSError, urllib.error.URLError):
        return False
    return True
