"""Tiny ONNX models with known answers, and the golden files that go with them."""

import hashlib
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.smoke_types import Recorded, Smoke

from components.errors import GateError
from components.smoke_test import runner
from components.smoke_test.runner import SmokeReport, run_smoke_test

Arrays = Mapping[str, Any]

WEIGHT = np.array([[0.5, -1.0], [2.0, 0.25], [-0.125, 3.0]], dtype=np.float32)
ROWS = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


@pytest.fixture
def rows() -> npt.NDArray[np.float32]:
    """Five different rows of three features."""
    return ROWS.copy()


@pytest.fixture
def recorded() -> dict[str, npt.NDArray[Any]]:
    """What the linear model answers for the rows, worked out by numpy."""
    scores = ROWS @ WEIGHT
    return {
        "input/features": ROWS.copy(),
        "output/scores": scores,
        "output/label": scores.argmax(axis=1),
    }


@pytest.fixture
def save_golden(tmp_path: Path) -> Callable[[Arrays], Path]:
    """Write arrays as a golden file."""

    def save(arrays: Arrays) -> Path:
        path = tmp_path / "golden.npz"
        with path.open("wb") as stream:
            np.savez(stream, **arrays)
        return path

    return save


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., Path]:
    """Write a graph from ``features`` (batch, 3) to ``scores``, and ``label`` if asked."""

    def save(
        nodes: list[onnx.NodeProto],
        *,
        constants: Arrays | None = None,
        batch: str | int = "batch",
        feature: str = "features",
        width: int = 2,
        label: bool = False,
    ) -> Path:
        outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, width])]
        if label:
            outputs.append(helper.make_tensor_value_info("label", TensorProto.INT64, [batch]))
        graph = helper.make_graph(
            nodes,
            "tiny",
            [helper.make_tensor_value_info(feature, TensorProto.FLOAT, [batch, 3])],
            outputs,
            [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
        )
        opset = [helper.make_opsetid("", 18)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=10)
        path = tmp_path / "model.onnx"
        path.write_bytes(model.SerializeToString(deterministic=True))
        return path

    return save


@pytest.fixture
def linear(save_model: Callable[..., Path]) -> Path:
    """A linear classifier: scores and the label of the larger one."""
    nodes = [
        helper.make_node("MatMul", ["features", "weight"], ["scores"]),
        helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0),
    ]
    return save_model(nodes, constants={"weight": WEIGHT}, label=True)


@pytest.fixture
def endless(save_model: Callable[..., Path]) -> Path:
    """A model that takes the cosine of its input 2**60 times."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "ab"]
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["keep"], ["go"]),
            helper.make_node("Cos", ["a"], ["b"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("keep", TensorProto.BOOL, []),
            value[0],
        ],
        [helper.make_tensor_value_info("go", TensorProto.BOOL, []), value[1]],
    )
    loop = helper.make_node("Loop", ["turns", "", "features"], ["scores"], body=body)
    return save_model([loop], constants={"turns": np.array(1 << 60)}, width=3)


@pytest.fixture
def sha256() -> Callable[[Path], str]:
    """Hex digest of a file's bytes."""
    return lambda path: hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def smoke(save_golden: Callable[[Recorded], Path], sha256: Callable[[Path], str]) -> Smoke:
    """Test a model file against recorded arrays, by default with its own sha256."""

    def test(model: Path, recorded: Recorded, **options: Any) -> SmokeReport:
        defaults: dict[str, Any] = {"batch_sizes": (1, 2), "timeout_s": 30}
        chosen = {"sha256": sha256(model), **defaults, **options}
        return run_smoke_test(model, golden=save_golden(recorded), **chosen)

    return test


@pytest.fixture
def reject(smoke: Smoke) -> Callable[..., str]:
    """Expect a gate's refusal and give its message."""

    def test(model: Path, recorded: Recorded, **options: Any) -> str:
        with pytest.raises(GateError) as caught:
            smoke(model, recorded, **options)
        assert caught.value.stage == "smoke_test"
        return str(caught.value)

    return test


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a script in the place of the child."""

    def replace(source: str) -> None:
        path = tmp_path / "stub.py"
        path.write_text(textwrap.dedent(source))
        monkeypatch.setattr(runner, "_CHILD", path)

    return replace
