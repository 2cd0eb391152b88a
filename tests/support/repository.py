"""A team's repository, in which code changes from commit to commit."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Repository:
    """A team's repository, installed by a path, and the real command around it."""

    def __init__(self, folder: Path, run: Callable[..., Any], variables: dict[str, object]) -> None:
        self.folder = folder
        self.variables = variables
        self._run = run

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=team", "-c", "user.email=team@localhost"]
        command = ["git", "-C", str(self.folder), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, message: str) -> str:
        self.git("add", ".")
        self.git("commit", "--quiet", "--message", message)
        return self.git("rev-parse", "HEAD")

    def widen(self, before: int, after: int) -> None:
        path = self.folder / "ledger.py"
        text = path.read_text()
        assert f"WIDTH = {before}\n" in text
        path.write_text(text.replace(f"WIDTH = {before}\n", f"WIDTH = {after}\n"))

    def assay(self, *arguments: str) -> Any:
        return self._run(*arguments, **self.variables)
