"""The last step before a version's folder is uploaded: describe it, and sign what was described."""

from pathlib import Path

from components.digest import digest_file
from components.records import ExportedModel
from components.register.provenance import PROVENANCE, write_provenance
from components.register.signing import sign_folder
from components.settings import Settings


def seal_folder(
    folder: Path,
    exported: ExportedModel,
    settings: Settings,
    *,
    source: str,
    parent: str = "",
    flow_run: tuple[str, str] = ("", ""),
) -> dict[str, str]:
    """Write ``provenance.json`` and, with a signing key, ``assay.sig``; give tags of the version.

    Args:
        folder: All other files of the version.
        exported: The candidate.
        settings: Give the signing key, if any.
        source: MLflow's address of the files.
        parent: The champion at that moment, empty if there was none.
        flow_run: Id and address of the Prefect flow run; the address may be empty.

    Raises:
        ConfigError: The signing key is none.
    """
    write_provenance(folder, exported, source=source, parent=parent, flow_run=flow_run)
    told = {"provenance_sha256": digest_file(folder / PROVENANCE)}
    if not settings.signing_key.get_secret_value():
        return told
    sign_folder(folder, settings.signing_key)
    return {**told, "signed": "true"}
