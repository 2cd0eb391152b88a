"""The embedded Prefect server: a child process on loopback that dies with its parent.

Nothing here imports Prefect, so that the server starts while the parent still loads its libraries.
Run as a module, this file is the child.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import IO, final

from components.errors import InfrastructureError
from components.state import exclusive, prefect_folder, storage_errors

HOST = "127.0.0.1"
_POLL_S = 0.05
_STOP_S = 10.0
_ANSWER_S = 5.0


def run_environment(root: Path) -> dict[str, str]:
    """Variables under which a run keeps to the state folder, to JSON, and to this machine.

    Prefect, PyTorch and matplotlib are given folders; usage reports of Prefect, MLflow and ONNX
    Runtime are switched off. They are read at import, so they are set before anything is loaded.
    """
    caches = root / "cache"
    return {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MPLCONFIGDIR": str(caches / "matplotlib"),
        "ORT_DISABLE_TELEMETRY": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "torchinductor"),
        "PREFECT_HOME": str(prefect_folder(root)),
        "PREFECT_PROFILES_PATH": str(prefect_folder(root) / "profiles.toml"),
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "DO_NOT_TRACK": "true",
    }


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def check_prefect(url: str) -> None:
    """Prove that a Prefect server answers, without importing Prefect.

    Raises:
        InfrastructureError: It does not answer within seconds.
    """
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=_ANSWER_S) as answer:
            answer.read(64)
    except (OSError, ValueError, HTTPException) as error:
        raise InfrastructureError(
            f"Prefect must answer at PREFECT_API_URL; {url} did not: {error}. Start the server, "
            "mend the address (it ends with /api), or unset it to use an embedded server."
        ) from error


@final
class EmbeddedServer:
    """A Prefect server on SQLite below the state folder.

    Args:
        root: The state folder.
        port: Where to listen; 0 takes a free port.
        timeout_s: How long the first answer may take; a new database is migrated first.
    """

    def __init__(self, root: Path, port: int = 0, timeout_s: float = 120.0) -> None:
        self._root = root
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._stack = contextlib.ExitStack()
        self.port = port
        self.log = prefect_folder(root) / "server.log"

    @property
    def url(self) -> str:
        """The API's address."""
        return f"http://{HOST}:{self.port}/api"

    def start(self) -> None:
        """Launch the child and return at once.

        Raises:
            InfrastructureError: The port is taken, or the state folder cannot be written.
        """
        if self.port and _is_taken(self.port):
            raise InfrastructureError(
                f"the embedded Prefect server must have its port to itself; {HOST}:{self.port} is "
                "taken. Set ASSAY_PREFECT_PORT to another one, or to 0 for any free port."
            )
        self.port = self.port or free_port()
        with storage_errors(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            output = self._stack.enter_context(self.log.open("wb"))
        # Only one process may migrate a database; the lock goes when the server answers.
        self._migration = self._stack.enter_context(contextlib.ExitStack())
        self._migration.enter_context(exclusive(self._root, "prefect"))
        environment = {
            **os.environ,
            **run_environment(self._root),
            "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false",
            "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
            "PREFECT_SERVER_UI_ENABLED": "false",
            "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
        }
        environment.pop("PREFECT_API_URL", None)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __spec__.name, str(self.port)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self) -> str:
        """Wait until the server answers, and return its address.

        Raises:
            InfrastructureError: It died or did not answer in time.
        """
        assert self._process is not None, "start() comes first"
        deadline = time.monotonic() + self._timeout_s
        while not _answers(self.url):
            if self._process.poll() is not None:
                raise InfrastructureError(self._failed(f"ended with {self._process.returncode}"))
            if time.monotonic() > deadline:
                raise InfrastructureError(self._failed(f"was silent for {self._timeout_s:.0f} s"))
            time.sleep(_POLL_S)
        self._migration.close()
        return self.url

    def stop(self) -> None:
        """End the child and wait for it; safe to call at any time."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None, "it was opened as a pipe"
            process.stdin.close()
        self._stack.close()

    def _failed(self, how: str) -> str:
        text = self.log.read_text(errors="replace").strip().splitlines()
        last = text[-1][:300] if text else "nothing"
        return (
            f"the embedded Prefect server must answer at {self.url}; it {how}. Its log, "
            f"{self.log}, ends with: {last}. Mend what it names, set PREFECT_API_URL to a server "
            f"of your own, or delete {self.log.parent}, which holds only the history of flow runs "
            "and cached results."
        )


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, HTTPException):
        return False


def _die_with_parent(stdin: IO[bytes]) -> None:
    """The pipe ends when the parent does, however it dies."""
    stdin.read()
    os._exit(0)


def serve(port: int) -> None:
    """Be the server, until the parent dies."""
    watcher = threading.Thread(target=_die_with_parent, args=(sys.stdin.buffer,), daemon=True)
    watcher.start()
    import uvicorn
    from prefect.server.api.server import create_app

    uvicorn.run(create_app(), host=HOST, port=port, log_level="error", timeout_graceful_shutdown=5)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
