"""Proof that a downloaded version is the one that was registered, before anything of it is loaded.

Without a key, the bytes must be those that the version describes, and the description that of this
model and run. With a key, somebody who holds it must have signed all that.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.digest import digest_file
from components.errors import GateError
from components.register.provenance import (
    LOADERS,
    NO_CACHE,
    NO_CACHE_TEXT,
    PROVENANCE,
    Provenance,
    described,
    list_files,
    read_provenance,
)
from components.register.signing import trusted_key, verify_folder
from components.settings import Settings

MODEL = "model.onnx"
_SHORT = 12


def verify_files(
    folder: Path,
    settings: Settings,
    *,
    model: str,
    run_id: str,
    onnx_sha256: str,
    source: str = "",
    provenance_sha256: str = "",
    twin: int | None = None,
) -> None:
    """Let only an intact version through; every way in which it is not is reported at once.

    Args:
        folder: The version's files as they were downloaded; nothing of them is executed.
        settings: Give the key whose signature is asked for, if any.
        model: The registered model.
        run_id: The MLflow run that the registry names for the version.
        onnx_sha256: What the version was registered with.
        source: The address that the registry names; empty if it is not known.
        provenance_sha256: Of ``provenance.json``, as the registry has it; empty if it has not.
        twin: An older version that holds the same bytes, if there is one.

    Raises:
        GateError: The files are not those of this version.
        ConfigError: The configured key is none.
    """
    failures = [*_foreign_kinds(folder)]
    if not failures:  # links would be followed
        if key := trusted_key(settings):
            failures += verify_folder(folder, key)
        failures += _model_failures(folder, onnx_sha256)
        found = read_provenance(folder)
        if isinstance(found, Provenance):
            wanted = {"model": model, "run_id": run_id, "onnx_sha256": onnx_sha256}
            wanted |= {"source": source} if source else {}
            failures += _stranger(found, wanted)
            failures += _changed_files(folder, found)
            failures += _rewritten(folder, provenance_sha256)
        else:
            failures.append(f"{found}. Register the candidate again")
        failures += code_failures(folder)
    if twin is not None:
        failures.append(
            f"a candidate must be registered once; version {twin} holds the same bytes, and this "
            "one was made from it. Use the older version"
        )
    if failures:
        raise GateError("smoke_test", failures)


def code_failures(folder: Path) -> list[str]:
    """Say which code of a version is not what assay ships; none of it may run in this process."""
    failures = []
    for name in (name for name in list_files(folder) if _is_code(name)):
        if name == NO_CACHE and (folder / name).read_bytes() == NO_CACHE_TEXT:
            continue
        module = re.fullmatch(r"code/(\w+)\.py", name)
        known = LOADERS.get(module.group(1)) if module else None
        if digest_file(folder / name) != known:
            failures.append(
                f"code beside a model must be what assay ships; {name} is foreign. Find out who "
                "put it there"
            )
    flavours = _flavours(folder)
    if (loader := flavours.get("python_function", {}).get("loader_module", "")) not in LOADERS:
        failures.append(
            f"MLmodel must name a loader of assay, {', '.join(LOADERS)}; it names {loader!r}. Find "
            "out who changed it"
        )
    for name, flavour in flavours.items():
        if (place := flavour.get("code")) != "code" or flavour.get("data") != MODEL:
            failures.append(
                f"MLmodel must load code from code/ and the model from {MODEL}; its flavour {name} "
                f"names {place!r} and {flavour.get('data')!r}. Find out who changed it"
            )
    return failures


def _is_code(name: str) -> bool:
    return name.startswith("code/") or name.endswith((".py", ".pyc", ".so"))


def _flavours(folder: Path) -> dict[str, dict[str, Any]]:
    import yaml

    try:
        found = yaml.safe_load((folder / "MLmodel").read_bytes())
        return {str(name): dict(flavour) for name, flavour in found["flavors"].items()}
    except (
        *(OSError, yaml.YAMLError, UnicodeDecodeError),
        *(AttributeError, KeyError, TypeError, ValueError),
    ):
        return {}  # MLflow can load nothing from it


def _foreign_kinds(folder: Path) -> Iterator[str]:
    for name in list_files(folder):
        path = folder / name
        if path.is_symlink() or not path.is_file():
            yield f"a version must hold plain files; {name} is a link or a device. Delete it"


def _model_failures(folder: Path, wanted: str) -> list[str]:
    if not (folder / MODEL).is_file():
        return [f"the version must hold {MODEL}; it does not. Register the candidate again"]
    if (found := digest_file(folder / MODEL)) == wanted:
        return []
    return [
        f"{MODEL} must keep its bytes; it was registered with sha256 {wanted[:_SHORT]} and now has "
        f"{found[:_SHORT]}. Find out who changed it"
    ]


def _stranger(found: Provenance, wanted: dict[str, str]) -> Iterator[str]:
    for name, value in wanted.items():
        if (said := getattr(found, name)) != value:
            yield (
                f"{PROVENANCE} must name the {name} {value} of this version; it names {said}, so "
                "the files are another version's. Find out who registered them again"
            )


def _changed_files(folder: Path, found: Provenance) -> Iterator[str]:
    here = described(list_files(folder))
    for name in sorted(found.files.keys() - {*here}):
        yield f"every file of the version must be there; {name} is missing"
    for name in here:
        if name not in found.files:
            yield f"a version must hold what was registered; {name} was added"
        elif name != MODEL and digest_file(folder / name) != found.files[name]:
            yield f"every file of the version must keep its bytes; {name} was altered"
    if found.files.get(MODEL) != found.onnx_sha256:
        yield f"{PROVENANCE} must give {MODEL} one digest; it gives two"


def _rewritten(folder: Path, wanted: str) -> list[str]:
    if not wanted or hashlib.sha256((folder / PROVENANCE).read_bytes()).hexdigest() == wanted:
        return []
    return [f"{PROVENANCE} must keep its bytes; it was rewritten. Find out who changed it"]
