"""A registered version as it is downloaded again: intact it passes, changed in any way it does not.

The versions are real ones in MLflow; what changes is what lies in its store.
"""

import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from pydantic import SecretStr
from support.column_model import METADATA, ROWS, column_model
from support.keys import make_key
from support.records import exported_model

from components.adapters.mlflow_registry import DAMAGED, Registry, Version
from components.adapters.mlflow_tracking import Tracking
from components.digest import digest_file
from components.errors import GateError
from components.register.provenance import (
    DOWNLOADED,
    NO_CACHE,
    PROVENANCE,
    SIGNATURE,
    list_files,
)
from components.register.seal import seal_folder
from components.register.signing import sign_folder
from components.register.verify import verify_files
from components.settings import Settings, load_settings

KEY, OTHER = make_key(), make_key()
MODEL = "guarded"
SIGNED = load_settings(signing_key=SecretStr(KEY.private), _env_file=None)
UNSIGNED = load_settings(_env_file=None)


def make(
    tracking: Tracking, folder: Path, factor: float, settings: Settings = SIGNED, model: str = MODEL
) -> Version:
    """A version of the column model, sealed."""
    onnx_file = folder / f"exported-{factor}.onnx"
    onnx_file.write_bytes(column_model(factor).SerializeToString(deterministic=True))
    digest = digest_file(onnx_file)
    run_id = tracking.start_run(model, "run", {}, {})
    exported = exported_model(model, run_id, digest)
    card = folder / "card.md"
    card.write_text("# a card\n")
    return Registry(tracking, model).create(
        run_id,
        onnx_file,
        metadata=METADATA,
        example=ROWS,
        requirements=["onnxruntime==1.0"],
        tags={"onnx_sha256": digest},
        more={"model_card.md": card, "plots/loss.png": card},
        seal=lambda place, source: seal_folder(place, exported, settings, source=source),
    )


def stored(registry: Registry, version: Version) -> Path:
    """The folder in the store."""
    uri = registry._client.get_model_version_download_uri(registry.model, str(version.number))
    return Path(unquote(urlparse(uri).path))


@pytest.fixture(scope="session")
def made() -> dict[str, Version]:
    return {}


@pytest.fixture
def versions(
    tracking: Tracking, tmp_path: Path, made: dict[str, Version]
) -> Iterator[tuple[Registry, Version, Version, Path]]:
    """The registry, two signed versions, and the store's folder of the second, put back after."""
    if not made:
        made["older"] = make(tracking, tmp_path, 1.0)
        made["newer"] = make(tracking, tmp_path, 2.0)
    registry = Registry(tracking, MODEL)
    place = stored(registry, made["newer"])
    assert place.is_dir()
    shutil.copytree(place, tmp_path / "kept")
    (tmp_path / "fetched").mkdir()
    yield registry, made["older"], made["newer"], place
    shutil.rmtree(place)
    shutil.copytree(tmp_path / "kept", place)


def verify(
    registry: Registry, version: Version, into: Path, settings: Settings = SIGNED, **other: Any
) -> None:
    """Download and verify as the stages do."""
    into = into / "download"
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir()
    folder = registry.fetch(version.number, into).parent
    claims = {**registry.claims(version), "onnx_sha256": version.tags["onnx_sha256"], **other}
    verify_files(folder, settings, **claims)


def test_an_intact_version_passes_with_and_without_a_key(
    versions: Any, tmp_path: Path, tracking: Tracking
) -> None:
    registry, older, newer, place = versions
    for version in (older, newer):
        assert version.tags["signed"] == "true"
        verify(registry, version, tmp_path)
        verify(registry, version, tmp_path, UNSIGNED)
    trusting = load_settings(trusted_signer=KEY.public, _env_file=None)
    verify(registry, newer, tmp_path, trusting)
    assert (tmp_path / "download" / DOWNLOADED).is_file(), "MLflow's own addition"
    assert (place / SIGNATURE).is_file()
    plain = make(tracking, tmp_path, 3.0, UNSIGNED, "plain")
    assert "signed" not in plain.tags
    verify(Registry(tracking, "plain"), plain, tmp_path, UNSIGNED)


def flip(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)


def write(name: str, text: str = "x") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return change


def edit(**fields: Any) -> Callable[[Path], None]:
    """Write the provenance anew."""

    def change(folder: Path) -> None:
        found = json.loads((folder / PROVENANCE).read_text())
        (folder / PROVENANCE).write_text(json.dumps({**found, **fields}))

    return change


def replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


# What was done to the files, and what is said of it without a key.
CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (lambda f: flip(f, "model.onnx"), "model.onnx must keep its bytes; .* sha256"),
    "flipped card": (lambda f: flip(f, "model_card.md"), "model_card.md was altered"),
    "removed file": (lambda f: (f / "MLmodel").unlink(), "MLmodel is missing"),
    "removed model": (lambda f: (f / "model.onnx").unlink(), "must hold model.onnx; it does not"),
    "added file": (write("plots/more.png"), "plots/more.png was added"),
    "added code": (write("code/numpy.py"), "code/numpy.py is foreign"),
    "added library": (write("sitecustomize.py"), "sitecustomize.py is foreign"),
    "changed code": (write("code/assay_rows_1.py", "import os"), "assay_rows_1.py is foreign"),
    "other loader": (
        replace("MLmodel", "loader_module: assay_rows_1", "loader_module: os"),
        "must name a loader of assay, assay_rows_1; it names 'os'",
    ),
    "other code": (
        replace("MLmodel", "code: code", "code: ../elsewhere"),
        "its flavour python_function names '../elsewhere' and 'model.onnx'",
    ),
    "other file": (
        replace("MLmodel", "data: model.onnx", "data: other.onnx"),
        "its flavour onnx names 'code' and 'other.onnx'",
    ),
    "no flavours": (write("MLmodel", "flavors: [1]"), "must name a loader of assay, .*''"),
    "no MLmodel": (write("MLmodel", "{"), "must name a loader of assay"),
    "no provenance": (lambda f: (f / PROVENANCE).unlink(), "provenance.json must lie beside"),
    "broken provenance": (write(PROVENANCE, "{}"), "provenance.json must be as assay writes it"),
    "other model": (edit(model="digits"), "must name the model guarded .* it names digits"),
    "other run": (edit(run_id="0"), "must name the run_id .* it names 0"),
    "rewritten": (edit(window="all"), "provenance.json must keep its bytes; it was rewritten"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_version_is_refused_with_and_without_a_key(
    versions: Any, tmp_path: Path, change: str
) -> None:
    registry, _, newer, place = versions
    do, message = CHANGES[change]
    do(place)
    for settings, said in ((UNSIGNED, message), (SIGNED, message)):
        with pytest.raises(GateError) as raised:
            verify(registry, newer, tmp_path, settings)
        assert raised.value.stage == "smoke_test"
        assert re.search(said, str(raised.value)), raised.value
    assert "by the trusted key" in str(raised.value)


def test_links_and_devices_are_not_even_read(versions: Any, tmp_path: Path) -> None:
    registry, _, newer, _ = versions
    folder = registry.fetch(newer.number, tmp_path / "fetched").parent
    (folder / "link").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    assert stat.S_ISFIFO((folder / "pipe").stat().st_mode)
    with pytest.raises(GateError) as raised:
        verify_files(folder, SIGNED, model=MODEL, run_id="", onnx_sha256="")
    assert [failure.split(";")[1].split()[0] for failure in raised.value.failures] == [
        "link",
        "pipe",
    ]


def test_a_signature_that_is_gone_is_missed_only_with_a_key(versions: Any, tmp_path: Path) -> None:
    registry, _, newer, place = versions
    (place / SIGNATURE).unlink()
    with pytest.raises(GateError, match="assay.sig is missing") as raised:
        verify(registry, newer, tmp_path)
    assert len(raised.value.failures) == 1
    verify(registry, newer, tmp_path, UNSIGNED)


def test_a_signature_of_another_version_is_refused(versions: Any, tmp_path: Path) -> None:
    registry, older, newer, place = versions
    other = registry.fetch(older.number, tmp_path / "fetched").parent
    shutil.copy(other / SIGNATURE, place / SIGNATURE)
    with pytest.raises(GateError, match="Hash mismatch for 'MLmodel'") as raised:
        verify(registry, newer, tmp_path)
    assert len(raised.value.failures) == 1


def test_another_signer_is_refused(versions: Any, tmp_path: Path) -> None:
    registry, _, newer, place = versions
    with pytest.raises(GateError, match="Key mismatch"):
        verify(
            registry, newer, tmp_path, load_settings(trusted_signer=OTHER.public, _env_file=None)
        )
    sign_folder(place, SecretStr(OTHER.private))
    with pytest.raises(GateError, match="Key mismatch"):
        verify(registry, newer, tmp_path)


def test_files_of_an_older_version_under_a_newer_one_are_refused(
    versions: Any, tmp_path: Path
) -> None:
    registry, older, newer, place = versions
    shutil.rmtree(place)
    shutil.copytree(registry.fetch(older.number, tmp_path / "fetched").parent, place)
    with pytest.raises(GateError) as raised:
        verify(registry, newer, tmp_path)
    said = str(raised.value)
    for part in ("model.onnx must keep its bytes", "must name the run_id", "must name the source"):
        assert part in said
    assert "by the trusted key" not in said, "the files and their signature are intact"
    # Even if the registry claimed the older run and digest, its own address tells them apart.
    claims = {"run_id": older.run_id, "onnx_sha256": older.tags["onnx_sha256"]}
    with pytest.raises(GateError, match="must name the source") as raised:
        verify(registry, newer, tmp_path, provenance_sha256="", **claims)
    assert len(raised.value.failures) == 1


def test_an_older_version_registered_again_is_refused(
    versions: Any, tmp_path: Path, tracking: Tracking
) -> None:
    registry, older, *_ = versions
    tags = {f"assay.{name}": value for name, value in older.tags.items()}
    again = tracking.client.create_model_version(MODEL, older.source, older.run_id, tags=tags)
    try:
        found = registry.by_number(int(again.version))
        assert found is not None
        twin = registry.twin_of(found)
        assert twin is not None
        assert twin.number == older.number
        assert registry.twin_of(older) is None
        with pytest.raises(GateError, match=f"version {older.number} holds the same") as raised:
            verify(registry, found, tmp_path)
        assert len(raised.value.failures) == 1
        registry.tag(older.number, {DAMAGED: "true"})
        assert registry.twin_of(found) is None, "what is damaged may be registered anew"
    finally:
        tracking.client.delete_model_version_tag(MODEL, str(older.number), f"assay.{DAMAGED}")
        tracking.client.delete_model_version(MODEL, again.version)


def test_loading_from_the_store_leaves_no_compiled_code(versions: Any, tmp_path: Path) -> None:
    """MLflow loads from a local store in place, and Python would keep the loader compiled there."""
    import mlflow.pyfunc

    registry, _, newer, place = versions
    before = list_files(place)
    path, modules = [*sys.path], {*sys.modules}
    try:
        mlflow.pyfunc.load_model(str(place))
    finally:
        sys.path[:] = path
        for name in {*sys.modules} - modules:
            del sys.modules[name]
    assert list_files(place) == before
    assert NO_CACHE in before
    verify(registry, newer, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "code/__pycache__/assay_rows_1.cpython-311.pyc",
        "__pycache__/x.pyc",
        "plots/__pycache__/y.py",
        "plots/__pycache__/notes.txt",
    ],
)
def test_compiled_code_in_the_store_is_refused(versions: Any, tmp_path: Path, name: str) -> None:
    """Python would run it in place of the source, wherever the version is loaded."""
    registry, _, newer, place = versions
    if name.startswith(NO_CACHE):
        (place / NO_CACHE).unlink()
    write(name)(place)
    for settings in (SIGNED, UNSIGNED):
        folder = tmp_path / str(settings is SIGNED)
        folder.mkdir()
        with pytest.raises(GateError, match=f"{re.escape(name)} was added"):
            verify(registry, newer, folder, settings)


def test_other_words_in_the_place_of_compiled_code_are_refused(
    versions: Any, tmp_path: Path
) -> None:
    registry, _, newer, place = versions
    (place / NO_CACHE).write_bytes(b"other words")
    with pytest.raises(GateError, match=f"{NO_CACHE} is foreign"):
        verify(registry, newer, tmp_path)


def test_every_failure_is_reported_at_once(versions: Any, tmp_path: Path) -> None:
    registry, _, newer, place = versions
    flip(place, "model.onnx")
    write("code/more.py")(place)
    (place / SIGNATURE).unlink()
    with pytest.raises(GateError) as raised:
        verify(registry, newer, tmp_path)
    assert len(raised.value.failures) == 4
