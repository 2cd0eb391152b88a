"""Code of an earlier commit, from a real repository."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from components.errors import InfrastructureError
from components.revision import export_revision, why_not_exported

Git = Callable[..., str]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "repository" / "src").mkdir(parents=True)
    return tmp_path / "repository"


@pytest.fixture
def git(repository: Path) -> Git:
    def run(*arguments: str) -> str:
        identity = ["-c", "user.name=team", "-c", "user.email=team@localhost"]
        command = ["git", "-C", str(repository), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    run("init", "--quiet")
    return run


@pytest.fixture
def commits(repository: Path, git: Git) -> list[str]:
    """Two commits of one module."""
    found = []
    for number in (1, 2):
        (repository / "src" / "module.py").write_text(f"NUMBER = {number}\n")
        git("add", ".")
        git("commit", "--quiet", "--message", str(number))
        found.append(git("rev-parse", "HEAD"))
    return found


def test_earlier_code_is_exported(
    repository: Path, git: Git, commits: list[str], tmp_path: Path
) -> None:
    source, into = repository / "src", tmp_path / "into"
    into.mkdir()
    assert why_not_exported(source, commits[0]) == ""
    place = export_revision(source, commits[0], into)
    assert place == into / "src"
    assert (place / "module.py").read_text() == "NUMBER = 1\n"
    assert (source / "module.py").read_text() == "NUMBER = 2\n"
    assert git("status", "--porcelain") == ""


def test_why_code_is_not_exported(repository: Path, commits: list[str], tmp_path: Path) -> None:
    source = repository / "src"
    for revision, words in {
        "unknown": "not recorded",
        "": "not recorded",
        "--output=x": "not recorded",
        f"{commits[0]}+changes": "not committed",
        "0" * 40: "not in the repository",
        commits[1]: "already",
    }.items():
        assert words in why_not_exported(source, revision)
    (source / "module.py").write_text("NUMBER = 3\n")
    assert why_not_exported(source, commits[1]) == ""
    assert "not in a git repository" in why_not_exported(tmp_path, commits[0])


def test_tree_that_cannot_be_exported(
    repository: Path, git: Git, commits: list[str], tmp_path: Path
) -> None:
    (repository / "later").mkdir()
    with pytest.raises(InfrastructureError, match="no folder later"):
        export_revision(repository / "later", commits[0], tmp_path)
    with pytest.raises(InfrastructureError, match="git archive; that failed: .*--here"):
        export_revision(repository, "0" * 40, tmp_path)
