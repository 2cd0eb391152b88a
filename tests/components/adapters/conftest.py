"""One MLflow store on SQLite for all adapter tests, and servers that answer as they are told."""

import http.server
import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from components.adapters.mlflow_tracking import Tracking, connect
from components.settings import Settings, load_settings


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of an embedded store; the folder's name has what paths may have."""
    return load_settings(
        home=tmp_path_factory.mktemp("adapters") / "state of 100% ä", _env_file=None
    )


@pytest.fixture
def tracking(
    store: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Tracking]:
    """The store, opened from a folder in which nothing may be written."""
    import mlflow

    before = mlflow.get_tracking_uri()
    folder = tmp_path / "working directory"
    folder.mkdir()
    monkeypatch.chdir(folder)
    found = connect(store)
    mlflow.set_tracking_uri(found.uri)
    yield found
    mlflow.set_tracking_uri(before)
    assert list(folder.iterdir()) == [], "everything belongs below the state folder"


@pytest.fixture
def answering() -> Iterator[Callable[[int], str]]:
    """Start a server on loopback that answers every request with a status, and give its address."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(status: int) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def foreign() -> Iterator[Callable[[bytes | None], int]]:
    """Start a server that sends these bytes to whoever connects, or nothing; give its port."""
    servers: list[socketserver.ThreadingTCPServer] = []
    done = threading.Event()

    def start(greeting: bytes | None) -> int:
        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                if greeting is None:
                    done.wait(10)
                else:
                    self.request.recv(1000)
                    self.request.sendall(greeting)

        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        return int(server.server_address[1])

    yield start
    done.set()
    for server in servers:
        server.shutdown()
        server.server_close()
