"""What a version's folder holds and where it came from: ``provenance.json``, and what is installed.

The folder of a version, as it lies in MLflow:

    model.onnx, golden.npz                 the registered graph, and rows with their answers
    tensor.onnx, tensor_golden.npz         the network alone, where the graph takes columns
    model.fp16.onnx, model.int8.onnx       variants, where the pipeline asks for them
    model_card.md, plots/*.png             for people
    environment.txt, provenance.json       for whoever must know where it came from
    MLmodel, code/, requirements.txt, ...  for MLflow
    assay.sig                              the signature over all other files, with a signing key
"""

import stat
from collections.abc import Iterable
from importlib.metadata import distributions, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from components.digest import digest_file
from components.records import ExportedModel

PROVENANCE = "provenance.json"
SIGNATURE = "assay.sig"
DOWNLOADED = "registered_model_meta"
"""Written into the folder by MLflow when a version is downloaded; no part of the version."""

LOADER = "assay_rows_1"
LOADERS = {LOADER: "63dd46f8a70b9961903b94fc36dcdb46acb69cfced65f83317c150e505c6a380"}
"""Modules that let MLflow load a version, by sha256. A changed one gets a new name, and the old
ones stay here: versions that carry them can still be loaded."""

NO_CACHE = "code/__pycache__"
"""A file where Python would make a folder: it then neither keeps compiled code beside the loader,
where a store is a local folder, nor runs any. So a folder of that name is an intruder's."""
NO_CACHE_TEXT = b"In the place of the folder that Python would keep compiled code in.\n"


class Provenance(BaseModel):
    """Where a version came from; ``files`` are sha256 by path, of all others but the signature.

    ``source`` is MLflow's own address of the files, which no two versions share.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    pipeline: str
    run_id: str
    source: str
    onnx_sha256: str
    files: dict[str, str]
    data_fingerprint: str
    window: str
    as_of: str
    code_revision: str
    code_digest: str
    config_digest: str
    parent_champion: str
    flow_run_id: str
    flow_run_url: str
    assay_version: str


def write_provenance(
    folder: Path, exported: ExportedModel, *, source: str, parent: str, flow_run: tuple[str, str]
) -> Provenance:
    """Describe a complete folder, in the folder.

    Args:
        folder: All files of the version but this one and the signature.
        exported: The candidate.
        source: MLflow's address of the files.
        parent: The champion at that moment, empty if there was none.
        flow_run: Id and address of the Prefect flow run; the address may be empty.
    """
    trained = exported.validated.trained
    job = trained.job
    found = Provenance(
        model=job.pipeline,
        pipeline=job.pipeline,
        run_id=trained.run_id,
        source=source,
        onnx_sha256=exported.onnx.sha256,
        files={name: digest_file(folder / name) for name in described(list_files(folder))},
        data_fingerprint=job.data_fingerprint,
        window=job.window,
        as_of=str(job.as_of),
        code_revision=job.code_revision,
        code_digest=job.code_digest,
        config_digest=job.config_digest,
        parent_champion=parent,
        flow_run_id=flow_run[0],
        flow_run_url=flow_run[1],
        assay_version=version("assay"),
    )
    (folder / PROVENANCE).write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return found


def read_provenance(folder: Path) -> Provenance | str:
    """What a version says of itself, or in words why that cannot be read."""
    try:
        return Provenance.model_validate_json((folder / PROVENANCE).read_bytes())
    except OSError:
        return f"{PROVENANCE} must lie beside the model; it does not"
    except ValidationError as error:
        first = error.errors()[0]
        return f"{PROVENANCE} must be as assay writes it; {first['loc']}: {first['msg']}"


def list_files(folder: Path) -> list[str]:
    """Paths of everything in a folder that is no folder, with ``/`` between the parts, sorted."""
    paths = (path for path in folder.rglob("*") if not stat.S_ISDIR(path.lstat().st_mode))
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def described(names: Iterable[str]) -> list[str]:
    """Those that the provenance must describe."""
    return [name for name in names if name not in (PROVENANCE, SIGNATURE, DOWNLOADED)]


def installed() -> str:
    """Every distribution of this environment with its version, a line each; no addresses."""
    found = {one.metadata["Name"].lower(): one.version for one in distributions()}
    return "".join(f"{name}=={found[name]}\n" for name in sorted(found))
