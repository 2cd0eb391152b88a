"""Two Ray workers, a killed one, and a single process, on flights of January."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: install assay[ray]")
def test_workers_give_the_same_bytes_even_if_one_is_killed(checkout: Path, tmp_path: Path) -> None:
    script = checkout / "tests" / "reliability" / "ray_training.py"
    path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["calm"]["starts"] == 1
    assert found["killed"]["starts"] == 2
    assert found["killed"]["weights"] == found["calm"]["weights"]
    assert found["killed"]["history_equal"]
    # Sums over two processes round otherwise than over one, and AdamW magnifies it.
    together, alone = found["loss"]
    assert together == pytest.approx(alone, abs=1e-4)
    assert found["difference"] < 1e-2
