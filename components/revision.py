"""The code of a recorded git commit, exported beside the code that is here."""

import re
import subprocess
import tarfile
from pathlib import Path

from components.errors import InfrastructureError

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_TIMEOUT_S = 60.0


def why_not_exported(folder: Path, revision: str) -> str:
    """Why a revision's code cannot be had, in words; empty if it can.

    Args:
        folder: Where the code lies here, a folder of the same git repository.
        revision: As :func:`components.plan.code_revision` gives it.
    """
    if revision.endswith("+changes"):
        commit = revision.removesuffix("+changes")[:12]
        return f"it was trained with changes that were not committed, on top of commit {commit}"
    if not _COMMIT.fullmatch(revision):
        return f"the commit that it was trained with is not recorded ({revision})"
    if _git(folder, "rev-parse", "--show-toplevel") is None:
        return f"the code here, in {folder}, is not in a git repository"
    if _git(folder, "cat-file", "-e", f"{revision}^{{commit}}") is None:
        return f"its commit {revision[:12]} is not in the repository of {folder}; fetch it"
    if _git(folder, "rev-parse", "--verify", "HEAD") == revision and not _changed(folder):
        return (
            f"the pipeline's code is at its commit {revision[:12]} already; assay's own code, or "
            "the version of an engine, differs"
        )
    return ""


def export_revision(folder: Path, revision: str, into: Path) -> Path:
    """Export the tree of a commit, and give the folder in it that stands for ``folder``.

    Args:
        folder: A folder of the git repository.
        revision: A commit in it.
        into: An empty folder.

    Raises:
        InfrastructureError: git fails, or the tree cannot be written.
    """
    top = _git(folder, "rev-parse", "--show-toplevel") or str(folder)
    prefix = _git(folder, "rev-parse", "--show-prefix") or ""
    command = ["git", "-C", top, "archive", "--format=tar", revision]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                archive.extractall(into, filter="data")
        except (tarfile.TarError, OSError) as error:
            process.kill()
            raise _failed(revision, str(error)) from error
        _, said = process.communicate()
    if process.returncode:
        raise _failed(revision, said.decode(errors="replace").strip())
    place = into / prefix
    if not place.is_dir():
        raise _failed(revision, f"it has no folder {prefix}")
    return place


def _failed(revision: str, what: str) -> InfrastructureError:
    return InfrastructureError(
        f"the tree of commit {revision[:12]} must be exported by git archive; that failed: {what}. "
        "Mend the repository, or pass --here to rebuild with the code that is here."
    )


def _changed(folder: Path) -> bool:
    return bool(_git(folder, "status", "--porcelain"))


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None if it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
