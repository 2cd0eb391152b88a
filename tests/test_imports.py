"""Importing a module has no side effect, and components need neither Prefect nor MLflow."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

BARE = """
import importlib, pkgutil, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("prefect", "mlflow", "ray", "fastapi", "sqlalchemy"):
            raise ModuleNotFoundError(f"{name} is not installed", name=name)
sys.meta_path.insert(0, Absent())
import components
names = [m.name for m in pkgutil.walk_packages(components.__path__, "components.")]
names = [name for name in names if not name.startswith("components.adapters")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def run(arguments: list[str], folder: Path, environment: Mapping[str, str]) -> str:
    home = folder / "user"
    cwd = folder / "cwd"
    for path in (home, cwd):
        path.mkdir()
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={
            **environment,
            "HOME": str(home),
            "PREFECT_HOME": str(folder / "prefect"),  # Prefect makes this one when it is imported
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in folder.iterdir()} <= {"user", "cwd", "prefect"}
    assert list(cwd.rglob("*")) == []
    assert list(home.rglob("*")) == []
    return done.stdout


def test_importing_everything_changes_nothing(
    tmp_path: Path, checkout: Path, child_environment: Mapping[str, str]
) -> None:
    script = checkout / "tests" / "support" / "import_everything.py"
    found = json.loads(run([str(script)], tmp_path, child_environment))
    files = [
        path for layer in ("components", "flows", "tasks") for path in modules(checkout / layer)
    ]
    assert len(found["modules"]) == len(files)
    assert found["after"] == found["before"]
    assert found["after"]["connected"] == []


def modules(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.py") if (path.parent / "__init__.py").is_file()]


def test_components_import_where_prefect_and_mlflow_are_absent(
    tmp_path: Path, child_environment: Mapping[str, str]
) -> None:
    assert int(run(["-c", BARE], tmp_path, child_environment)) > 40
