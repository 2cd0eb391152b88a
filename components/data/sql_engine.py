"""Connections to a database that is only read, and what its complaints mean."""

import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from pydantic import SecretStr

from components.errors import AssayError, ConfigError, DataError, InfrastructureError

if TYPE_CHECKING:  # a machine that only trains may lack it
    import sqlalchemy as sa
    from sqlalchemy.exc import DBAPIError

_POSTGRES = "postgresql"
_DEFAULTS = {
    "application_name": "assay",
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",  # milliseconds until a silent network is a lost connection
}
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_PASSING = (
    "08",  # connection exceptions
    "57P",  # shut down, crashed, starting up
    "53300",  # too many connections
    "25P03",  # idle for too long, because whoever takes the rows was slow
    "40001",  # a standby needed the rows for its own recovery
)
_HINTS = {
    "42P01": "Create it, or mend the source's table or query",
    "42703": "Add it to the table, or take it from the source's schema",
    "42501": "Grant SELECT on it to the user of ASSAY_DATABASE_URL",
    "57014": "Raise statement_timeout for this user, or narrow the window",
}


def parse_url(url: SecretStr) -> "sa.URL":
    """Read an SQLAlchemy URL, never showing it.

    Raises:
        ConfigError: It is empty, not a URL, or of a database that is not supported.
    """
    import sqlalchemy as sa
    from sqlalchemy.exc import ArgumentError

    if not url.get_secret_value():
        raise ConfigError(
            "a source that reads a database needs its address; ASSAY_DATABASE_URL is empty. Set it "
            "to a URL such as postgresql://USER:PASSWORD@HOST/DATABASE or sqlite:///FILE."
        )
    try:
        parsed = sa.make_url(url.get_secret_value())
    except (ArgumentError, ValueError):  # its message may hold a part of the password
        raise ConfigError(
            "ASSAY_DATABASE_URL must be a URL such as postgresql://USER:PASSWORD@HOST/DATABASE or "
            "sqlite:///FILE; it is not one. Quote special characters of the password as %XX."
        ) from None
    if "@" in (parsed.host or ""):  # the rest of a password: it must not be shown
        raise ConfigError(
            "ASSAY_DATABASE_URL must have one @ before the host; it has more. Quote special "
            "characters of the password as %XX."
        )
    kind = parsed.get_backend_name()
    if kind not in (_POSTGRES, "sqlite") or (kind == "sqlite" and not parsed.database):
        raise ConfigError(
            "ASSAY_DATABASE_URL must lead to PostgreSQL or to an SQLite file; got "
            f"{describe_url(parsed)}. Copy the rows there, or write a source of your own."
        )
    return parsed.set(drivername=f"{_POSTGRES}+psycopg") if kind == _POSTGRES else parsed


def describe_url(url: "sa.URL") -> str:
    """The URL without its password; options are left out, which may hold another."""
    return url.set(query={}).render_as_string(hide_password=True)


def make_engine(url: "sa.URL") -> "sa.Engine":
    """An engine whose connections are made anew each time, and only read.

    Raises:
        ConfigError: The driver is not installed.
        DataError: The SQLite file is not there.
    """
    import sqlalchemy as sa
    from sqlalchemy.pool import NullPool

    if url.get_backend_name() == "sqlite":
        return _sqlite_engine(Path(url.database or ""))
    given = url.update_query_dict({**_DEFAULTS, **url.query})
    options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    try:
        return sa.create_engine(
            given, poolclass=NullPool, hide_parameters=True, execution_options=options
        )
    except ImportError:
        raise ConfigError(
            "PostgreSQL is read through the package psycopg, which is not installed. Run 'pip "
            'install "assay[postgres]"\'.'
        ) from None


def _sqlite_engine(path: Path) -> "sa.Engine":
    import sqlalchemy as sa
    from sqlalchemy.pool import NullPool

    if not path.is_file():
        raise DataError(
            f"ASSAY_DATABASE_URL must lead to an SQLite file; there is none at {path}. Create it, "
            "or mend the URL."
        )
    address = f"file:{quote(str(path.resolve()))}?mode=ro"
    return sa.create_engine(
        "sqlite://",
        creator=lambda: sqlite3.connect(address, uri=True, check_same_thread=False),
        poolclass=NullPool,
        hide_parameters=True,
    )


def is_passing(error: "DBAPIError") -> bool:
    """Whether the same request may succeed a little later, over a new connection."""
    if isinstance(error.orig, sqlite3.Error):
        return False
    state = getattr(error.orig, "sqlstate", None)
    if state is not None:
        return str(state).startswith(_PASSING)
    # No code: there is no connection. FATAL means that the server has answered, and refused.
    text = str(error.orig)
    starting = "starting up" in text or "shutting down" in text or "too many" in text
    return starting or "FATAL" not in text


def explain(error: "DBAPIError", url: "sa.URL", rows: str, progress: str) -> AssayError:
    """What went wrong, and what to do; the cause's own text is the server's.

    Args:
        error: The driver's complaint.
        url: Where it comes from.
        rows: What was read, such as ``table flights``.
        progress: How far reading went.
    """
    details = getattr(error.orig, "diag", None)
    text = " ".join(str(getattr(details, "message_primary", None) or error.orig).split())
    text = text.rstrip(".?")
    place = f"{rows} at {describe_url(url)}"
    state = getattr(error.orig, "sqlstate", None) or ""
    if isinstance(error.orig, sqlite3.Error):
        return _explain_sqlite(text, place)
    if not state and not is_passing(error):
        return InfrastructureError(
            f"the database must let the user of ASSAY_DATABASE_URL in; connecting to "
            f"{describe_url(url)} failed: {text}. Mend user, password or database in the URL."
        )
    if is_passing(error):
        return InfrastructureError(
            f"the database must answer while it is read; reading {place} failed {progress}: "
            f"{text}. Check that the server runs and can be reached, then run again."
        )
    kind = DataError if state.startswith("42") else InfrastructureError
    hint = _HINTS.get(state, "Try the source's table or query by hand")
    return kind(
        f"the database must give the declared columns; reading {place} failed: {text}. {hint}."
    )


def _explain_sqlite(text: str, place: str) -> AssayError:
    if "locked" in text or "busy" in text:
        return InfrastructureError(
            f"the database must be free to be read; {place} is not: {text}. Wait for the process "
            "that writes, then run again."
        )
    return DataError(
        f"the database must give the declared columns; reading {place} failed: {text}. Mend the "
        "file, or the source's table, query or schema."
    )
