"""The child of the smoke test: judges one ONNX model with numpy and onnxruntime alone.

Run as ``python -I -S child.py <folder> ...``, where the folders hold numpy and onnxruntime. A
:class:`~components.smoke_test.judge.job.Job` is read as JSON from stdin, and an answer is written
as JSON to stdout. It is stand-alone: nothing of assay is importable here, and that is part of the
proof. The checks lie in the folder ``judge``, which becomes a package of its own; no folder of
assay is ever on the path.
"""

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path

JUDGE = "smoke_judge"
"""Name of the package of checks in this process."""

ALLOWED = frozenset({"numpy", "onnxruntime", JUDGE})
"""Importable beyond the standard library; onnxruntime itself needs only numpy to load."""


class ImportGuard(MetaPathFinder):
    """Refuses every package but those of the standard library and :data:`ALLOWED`."""

    def find_spec(self, fullname: str, _path: object = None, _target: object = None) -> None:
        """Leave an allowed name to the next finder.

        Raises:
            ModuleNotFoundError: The package is not allowed.
        """
        package = fullname.partition(".")[0]
        if package not in ALLOWED and package not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"the smoke test forbids {fullname!r}", name=fullname)


def add_judge() -> None:
    """Make the folder beside this file a package, the only one that is found in its place."""
    folder = Path(__file__).with_name("judge")
    spec = importlib.util.spec_from_file_location(
        JUDGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None, "a path that ends in .py has a loader"
    sys.modules[JUDGE] = importlib.util.module_from_spec(spec)


def main(folders: Sequence[str]) -> None:
    """Read the job from stdin, judge, and write the answer to stdout."""
    sys.meta_path.insert(0, ImportGuard())
    sys.path.extend(folders)
    add_judge()
    # Native code may print, so stdout is kept for the answer and everything else goes to stderr.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.buffer.read())
    verdict = importlib.import_module(f"{JUDGE}.verdict")
    with answer:
        json.dump(verdict.judge(job), answer, allow_nan=False)


if __name__ == "__main__":
    main(sys.argv[1:])
