"""The reader of golden files for JavaScript gives what NumPy gives."""

import json
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.export.golden import write_golden

SCRIPT = """
import { readFileSync } from "node:fs";
import { readInputs } from "%s";
const inputs = readInputs(new Uint8Array(readFileSync(process.argv[1])));
const plain = (_, value) => (typeof value === "bigint" ? String(value) : value);
for (const item of Object.values(inputs)) item.data = [...item.data];
console.log(JSON.stringify(inputs, plain));
"""


@pytest.fixture
def read(checkout: Path, needs: Callable[..., None]) -> Callable[[Path], Any]:
    if shutil.which("node") is None:
        needs("node")
    module = checkout / "components" / "smoke_test" / "engines" / "npz.mjs"

    def run(path: Path) -> Any:
        done = subprocess.run(
            ["node", "--input-type=module", "-e", SCRIPT % module.as_uri(), str(path)],
            capture_output=True,
            text=True,
        )
        return json.loads(done.stdout) if done.returncode == 0 else done.stderr

    return run


def test_every_type_and_shape_is_read_as_numpy_reads_it(
    read: Callable[[Path], Any], tmp_path: Path
) -> None:
    inputs: dict[str, Any] = {
        "float32": np.array([[0.1, -2.5], [3e-40, 7]], np.float32),
        "float64": np.array([0.1, 1e300]),
        "int32": np.array([-1, 2**31 - 1], np.int32),
        "int64": np.array([-(2**63), 2**53 + 1]),
        "bool": np.array([[True], [False]]),
        "text": np.array([["", "a"], ["zürich ✈", "🛫\0x"]]),
        "name/with ünicode": np.zeros((2, 0), np.float32),
    }
    write_golden(tmp_path / "golden.npz", inputs, {"y": np.zeros(2)})
    found = read(tmp_path / "golden.npz")
    assert set(found) == set(inputs)
    for name, array in inputs.items():
        text = array.dtype.kind == "U"
        assert found[name]["type"] == ("string" if text else array.dtype.name)
        assert found[name]["shape"] == list(array.shape)
        values = array.ravel().tolist()
        shown = [str(v) for v in values] if name == "int64" else values
        assert found[name]["data"] == shown


def test_what_is_no_golden_file_is_refused(read: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    path.write_bytes(b"PK no archive of any kind")
    assert "its end is missing" in read(path)
    np.savez_compressed(path, **{"input/x": np.zeros(100)})
    assert "input/x.npy must be stored, not compressed" in read(path)
    np.savez(path, **{"input/x": np.zeros(3, np.complex64)})
    assert "must be of <f4,<f8,<i4,<i8,|b1 or <U; got <c8" in read(path)
    np.savez(path, **{"input/x": np.asfortranarray(np.zeros((3, 2)))})
    assert "input/x.npy must lie in C order" in read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("input/x.npy", b"no array at all")
    assert "input/x.npy must be a NumPy array" in read(path)
