"""Real flights: all of them, prepared once, and a small origin made of every hundredth."""

import io
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.postgres import Postgres, find_binaries, postgres_server

from components.data.flights import FlightsSource, package_folder

EVERY = 100


@pytest.fixture(scope="session")
def whole_year(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all prepared flights; only read it."""
    folder = tmp_path_factory.mktemp("year") / "flights"
    FlightsSource(folder).prepare()
    return folder


@pytest.fixture(scope="session")
def sampled_origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's CSV files with every hundredth flight; only read it."""
    folder = tmp_path_factory.mktemp("sampled") / "data"
    folder.mkdir()
    for name in ("weather.csv", "planes.csv", "airports.csv"):
        shutil.copyfile(package_folder() / name, folder / name)
    with zipfile.ZipFile(package_folder() / "flights.csv.zip") as archive:
        header, *lines = archive.read("flights.csv").splitlines(keepends=True)
    with zipfile.ZipFile(folder / "flights.csv.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("flights.csv", header + b"".join(lines[::EVERY]))
    return folder


@pytest.fixture
def origin(sampled_origin: Path, tmp_path: Path) -> Path:
    """A copy of the sampled origin that a test may damage."""
    return Path(shutil.copytree(sampled_origin, tmp_path / "origin"))


@pytest.fixture(scope="session")
def sampled(sampled_origin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample prepared; only read it."""
    folder = tmp_path_factory.mktemp("prepared") / "flights"
    FlightsSource(folder, sampled_origin).prepare()
    return folder


@pytest.fixture
def prepared(sampled: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the prepared sample that a test may damage."""
    yield Path(shutil.copytree(sampled, tmp_path / "prepared" / "flights"))


@pytest.fixture
def edit_flights() -> object:
    """Replace the text of a zipped table of flights."""

    def edit(origin: Path, old: bytes, new: bytes) -> None:
        path = origin / "flights.csv.zip"
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            text = archive.read("flights.csv")
        assert old in text
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("flights.csv", text.replace(old, new, 1))

    return edit


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A server of the session's own, on loopback."""
    if find_binaries() is None:
        pytest.skip("PostgreSQL is not installed: install the Debian package postgresql")
    with postgres_server() as server:
        yield server
