"""The child's parts: what it may import, and what it accepts as a reference."""

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from components.smoke_test import child
from components.smoke_test.judge.golden import Golden
from components.smoke_test.judge.job import describe
from components.smoke_test.judge.verdict import check_isolation
from components.smoke_test.runner import _package_folders

Recorded = dict[str, npt.NDArray[Any]]

PROBE = """
import importlib.util, runpy, sys
child = runpy.run_path(sys.argv[1])
sys.path.extend(sys.argv[2:])
assert importlib.util.find_spec("torch"), "torch lies on the path, only the guard hides it"
sys.meta_path.insert(0, child["ImportGuard"]())
import numpy, onnxruntime
child["add_judge"]()
from smoke_judge.verdict import check_isolation
import smoke_judge.examination
assert check_isolation() == []
for name in ("torch", "torch.nn", "onnx", "pydantic", "components", "mlflow"):
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        assert "the smoke test forbids" in str(error), error
    else:
        raise AssertionError(name)
print(sorted({name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names))
"""


def test_only_numpy_and_onnxruntime_can_be_imported() -> None:
    assert find_spec("torch") is not None
    command = [sys.executable, "-I", "-S", "-c", PROBE, child.__file__, *_package_folders()]
    probe = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert probe.returncode == 0, probe.stderr
    assert probe.stdout.strip() == "['__main__', 'numpy', 'onnxruntime', 'smoke_judge']"


def test_torch_within_reach_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    assert "torch must not be importable" in check_isolation()[0]


def test_golden_splits_inputs_from_outputs(
    recorded: Recorded, save_golden: Callable[[Recorded], Path]
) -> None:
    golden = Golden(save_golden(recorded))
    assert golden.rows == 5
    assert list(golden.inputs) == ["features"]
    assert list(golden.outputs) == ["scores", "label"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"features": np.zeros((5, 3))}, "keys must be input/<name> or output/<name>"),
        ({"output/": np.zeros((5, 3))}, "keys must be input/<name> or output/<name>"),
        ({"output/label": np.zeros(4)}, r"must share N rows; got \[4, 5\]"),
        ({"output/label": np.zeros(())}, r"must share N rows; got \[0, 5\]"),
        ({"input/features": np.ones((5, 3))}, "at least two different rows"),
        ({"output/label": np.full(5, np.inf)}, "'label' holds 5 NaN or infinite"),
        ({"output/label": np.full(5, None)}, "allow_pickle=False"),
    ],
)
def test_golden_file_that_cannot_be_a_reference(
    recorded: Recorded,
    save_golden: Callable[[Recorded], Path],
    changes: Recorded,
    expected: str,
) -> None:
    with pytest.raises(ValueError, match=expected):
        Golden(save_golden(recorded | changes))


def test_failures_are_one_bounded_line_and_name_exhausted_memory() -> None:
    assert describe(ValueError("a\n  b")) == "ValueError: a b"
    assert len(describe(ValueError("x" * 9999))) == 500
    assert describe(RuntimeError("std::bad_alloc")).startswith("out of memory: ")
    assert describe(MemoryError()).startswith("out of memory: ")
