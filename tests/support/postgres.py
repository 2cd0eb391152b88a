"""A PostgreSQL server of the tests' own, in a temporary folder, on loopback."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import sqlalchemy as sa
from pydantic import SecretStr

USER = "assay"


def find_binaries() -> Path | None:
    """The folder with initdb and pg_ctl; Debian does not put it on the path."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in reversed(folders) if (folder / "initdb").is_file()), None)


@dataclass(frozen=True)
class Postgres:
    """A cluster with one superuser, who needs a password."""

    binaries: Path
    folder: Path
    port: int
    password: str

    def url(self, database: str = "postgres", user: str = USER, password: str = "") -> SecretStr:
        """The address of a database, with a password."""
        url = sa.URL.create(
            "postgresql", user, password or self.password, "127.0.0.1", self.port, database
        )
        return SecretStr(url.render_as_string(hide_password=False))

    def connect(self) -> "psycopg.Connection[tuple[object, ...]]":
        """A connection of the superuser in which every statement commits."""
        return psycopg.connect(self.url().get_secret_value(), autocommit=True)

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = f"-p {self.port} -k {self.folder} -h 127.0.0.1 -c fsync=off"
        log = self.folder / "log"
        self._call("pg_ctl", "start", "-w", "-s", "-t", "60", "-l", str(log), "-o", options)

    def stop(self) -> None:
        """Stop the server at once; its clients lose their connections."""
        self._call("pg_ctl", "stop", "-w", "-s", "-m", "immediate")

    def initialise(self) -> None:
        """Make the cluster."""
        given = self.folder / "password"
        given.write_text(self.password)
        if os.getuid() == 0:  # PostgreSQL refuses to run as root
            for path in (self.folder, given):
                shutil.chown(path, "postgres")
        method = ("--auth=scram-sha-256", "--username", USER, "--pwfile", str(given))
        self._call("initdb", *method, "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync")

    def _call(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self.binaries / program, "-D", self.folder / "data", *arguments],
            user="postgres" if os.getuid() == 0 else None,
            group="postgres" if os.getuid() == 0 else None,
            extra_groups=[] if os.getuid() == 0 else None,
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "TZ": "UTC"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the server inherits it and would keep a pipe open
            stderr=subprocess.DEVNULL,
            timeout=120,
        )
        assert done.returncode == 0, f"{program} {arguments[0]} failed; see {self.folder}"


@contextlib.contextmanager
def postgres_server() -> Iterator[Postgres]:
    """A running server; its folder and its processes are gone afterwards."""
    binaries = find_binaries()
    assert binaries is not None
    # Not pytest's folder: another user must reach it, and a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="assay-pg-", dir="/tmp") as name:
        server = Postgres(binaries, Path(name), _free_port(), secrets.token_hex(12))
        server.initialise()
        server.start()
        try:
            yield server
        finally:
            with contextlib.suppress(AssertionError):  # a test may have stopped it
                server.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
