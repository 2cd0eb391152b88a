"""Equal weights give equal bytes: in other processes, working folders and checkouts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
SCRIPT = """
import hashlib, sys
sys.path[:0] = ["{checkout}", "{checkout}/tests"]
import components.export.capture
assert components.export.capture.__file__.startswith("{checkout}/")
from components.export.onnx_export import export_onnx
from support.exported_architectures import EXPORTABLE, example_of
for exportable in EXPORTABLE:
    if exportable.name in ("pair", "pooling"):
        model = exportable.build()
        for opset in (20, 15):
            data = export_onnx(
                model, example_of(model.get_model_metadata()), opset=opset, metadata={{"a": "1"}}
            )
            assert b"{checkout}" not in data and b"{folder}" not in data
            print(exportable.name, opset, hashlib.sha256(data).hexdigest())
"""


def copy_checkout(folder: Path) -> Path:
    """The sources that an export needs, at another path."""
    for name in ("components", "tests/support", "tests/faults"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    return folder


def exported_in(checkout: Path, folder: Path, seed: str) -> str:
    folder.mkdir(parents=True)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT.format(checkout=checkout, folder=folder)],
        cwd=folder,
        env={**env, "PYTHONHASHSEED": seed, "HOME": str(folder)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bytes_are_equal_in_two_checkouts_folders_and_processes(tmp_path: Path) -> None:
    first = exported_in(ROOT, tmp_path / "here", "1")
    copied = copy_checkout(tmp_path / "some where" / "else")
    second = exported_in(copied, tmp_path / "there" / "deeper", "2")
    assert first == second
    assert len({*first.splitlines()}) == 4
