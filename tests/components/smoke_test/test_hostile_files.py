"""Files that mean harm, each under its own right sha256, so that the loader itself is tried.

Each is rejected for a reason of its own, and this process, which stands for the flow, goes on.
"""

import hashlib
import io
import pickle
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.smoke_types import Recorded, Smoke

from components.errors import GateError
from components.smoke_test.runner import run_smoke_test

GIB = 1 << 30
FLIPS = 40

Edit = Callable[[onnx.ModelProto], None]


@pytest.fixture
def edited(linear: Path) -> Callable[[Edit], Path]:
    """The linear model after an edit of its protobuf."""

    def apply(edit: Edit) -> Path:
        model = onnx.load(linear)
        edit(model)
        linear.write_bytes(model.SerializeToString())
        return linear

    return apply


def weight_at(location: str) -> Edit:
    """Let the weights lie in another file, six floats from its beginning."""

    def edit(model: onnx.ModelProto) -> None:
        weight = model.graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)

    return edit


@pytest.mark.parametrize("kind", ["plain", "parents", "absolute", "symlink", "hard link"])
def test_data_outside_the_file(
    tmp_path: Path,
    recorded: Recorded,
    edited: Callable[[Edit], Path],
    reject: Callable[..., str],
    kind: str,
) -> None:
    secret, beside = tmp_path / "secret", tmp_path / "weight.bin"
    secret.write_bytes(bytes(24))
    location = "weight.bin"
    if kind == "plain":
        beside.write_bytes(bytes(24))
    elif kind == "parents":
        location = "../" * 40 + "etc/passwd"
    elif kind == "absolute":
        location = str(secret)
    elif kind == "symlink":
        beside.symlink_to(secret)
    else:
        beside.hardlink_to(secret)
    message = reject(edited(weight_at(location)), recorded)
    assert "all data must be inside the file; external: weight." in message
    assert "loading the model" not in message


def foreign_operator(model: onnx.ModelProto) -> None:
    """An operator of nobody's domain."""
    model.graph.node[0].domain = "evil"
    model.opset_import.append(helper.make_opsetid("evil", 1))


def library_operator(model: onnx.ModelProto) -> None:
    """One that names native code to load: the context of another engine."""
    node = helper.make_node(
        "EPContext",
        ["features"],
        ["scores"],
        domain="com.microsoft",
        embed_mode=0,
        ep_cache_context="../../tmp/evil.so",
    )
    model.graph.node[0].CopyFrom(node)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (
            foreign_operator,
            "must come from the domains ['', 'ai.onnx', 'ai.onnx.ml']; got ['evil']",
        ),
        (library_operator, "; got ['com.microsoft']"),
    ],
    ids=["unknown", "library"],
)
def test_operators_of_other_domains(
    recorded: Recorded,
    edited: Callable[[Edit], Path],
    reject: Callable[..., str],
    edit: Edit,
    expected: str,
) -> None:
    message = reject(edited(edit), recorded)
    assert expected in message
    assert "loading the model" not in message


def huge_dimensions(model: onnx.ModelProto) -> None:
    """Weights that claim four TiB and hold six floats."""
    model.graph.initializer[0].dims[:] = [1 << 20, 1 << 20]


def overflowing_dimensions(model: onnx.ModelProto) -> None:
    """Weights whose size wraps around to zero in 64 bits."""
    model.graph.initializer[0].dims[:] = [1 << 32, 1 << 32]


def negative_dimensions(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [-3, -2]


@pytest.mark.parametrize("edit", [huge_dimensions, overflowing_dimensions, negative_dimensions])
def test_weights_that_claim_another_size(
    recorded: Recorded, edited: Callable[[Edit], Path], reject: Callable[..., str], edit: Edit
) -> None:
    assert "loading the model: " in reject(edited(edit), recorded, memory_bytes=2 * GIB)


TERABYTES = {
    "Expand": ("out of memory: ", [helper.make_node("Expand", ["one", "size"], ["wide"])]),
    "ConstantOfShape": (
        "out of memory: ",
        [helper.make_node("ConstantOfShape", ["size"], ["wide"])],
    ),
    "Tile": (
        "exceeds the supported maximum",
        [
            helper.make_node("Reshape", ["one", "flat"], ["flat_one"]),
            helper.make_node("Tile", ["flat_one", "size"], ["wide"]),
        ],
    ),
}


@pytest.mark.parametrize("operator", TERABYTES)
def test_operators_that_ask_for_terabytes(
    save_model: Callable[..., Path],
    rows: npt.NDArray[np.float32],
    reject: Callable[..., str],
    operator: str,
) -> None:
    expected, widen = TERABYTES[operator]
    nodes = [
        helper.make_node("ReduceMean", ["features"], ["one"], keepdims=0),
        # The size depends on the input, so that nothing is folded when the model is loaded.
        helper.make_node("Size", ["features"], ["count"]),
        helper.make_node("Mul", ["count", "huge"], ["size"]),
        *widen,
        helper.make_node("ReduceMax", ["wide"], ["most"], keepdims=0),
        helper.make_node("Add", ["features", "most"], ["scores"]),
    ]
    constants = {"huge": np.array([1 << 40]), "flat": np.array([1])}
    recorded = {"input/features": rows, "output/scores": rows}
    message = reject(save_model(nodes, constants=constants, width=3), recorded)
    assert "the first run: " in message
    assert expected in message


def zipped(_raw: bytes) -> bytes:
    """An archive as torch.save writes it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps({"weight": [1.0]}))
        archive.writestr("model/version", "3\n")
    return stream.getvalue()


def nested_graphs(levels: int) -> bytes:
    """A model whose graph holds graphs, in lengths that protobuf's own writers refuse."""

    def message(number: int, content: bytes) -> bytes:
        size, length = b"", len(content)
        while length >= 0x80:
            size, length = size + bytes([length & 0x7F | 0x80]), length >> 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + content

    graph = b""
    for _ in range(levels):
        graph = message(1, message(5, message(6, graph)))
    return message(7, graph)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda raw: raw[: len(raw) // 2], "it ends in the middle of a field"),
        (lambda raw: raw[:-3], "it ends in the middle of a field"),
        (lambda raw: b"", "its 0 bytes hold no graph"),
        (lambda raw: np.random.default_rng(1).bytes(4096), "the file must be an ONNX protobuf; "),
        (zipped, "it is a zip archive, as torch.save writes it"),
        (lambda raw: b"\x24\x00\x00\x00ORTM" + raw, "it is onnxruntime's own format"),
        (lambda raw: nested_graphs(2000), "messages must nest at most 100 deep"),
    ],
    ids=["half", "last bytes", "empty", "garbage", "zip", "ort format", "nested"],
)
def test_files_that_are_no_model(
    linear: Path,
    recorded: Recorded,
    reject: Callable[..., str],
    spoil: Callable[[bytes], bytes],
    expected: str,
) -> None:
    linear.write_bytes(spoil(linear.read_bytes()))
    message = reject(linear, recorded)
    assert "reading the model: " in message
    assert expected in message


class Touching:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("file", ["model", "golden"])
def test_a_pickle_is_never_loaded(
    tmp_path: Path, linear: Path, recorded: Recorded, protocol: int, file: str
) -> None:
    mark = tmp_path / "mark"
    poison = pickle.dumps(Touching(mark), protocol=protocol)
    pickle.loads(poison)
    mark.unlink()  # so it works, wherever it is loaded
    golden = tmp_path / "golden.npz"
    if file == "model":
        np.savez(golden, **recorded)
        linear.write_bytes(poison)
    else:
        golden.write_bytes(poison)
    sha256 = hashlib.sha256(linear.read_bytes()).hexdigest()
    with pytest.raises(GateError) as caught:
        run_smoke_test(linear, sha256=sha256, golden=golden, batch_sizes=(1,))
    expected = {"model": "reading the model: ", "golden": "golden file: "}[file]
    assert expected in str(caught.value)
    assert not mark.exists()


def test_a_golden_file_with_objects_is_never_loaded(
    tmp_path: Path, linear: Path, recorded: Recorded, reject: Callable[..., str]
) -> None:
    mark = tmp_path / "mark"
    recorded["output/label"] = np.array([Touching(mark)] * 5, dtype=object)
    assert "golden file: ValueError: Object arrays cannot be loaded" in reject(linear, recorded)
    assert not mark.exists()


def test_a_loop_without_end(
    endless: Path, rows: npt.NDArray[np.float32], reject: Callable[..., str]
) -> None:
    recorded = {"input/features": rows, "output/scores": rows}
    assert "must answer within 2 s; it was killed, in the step 'the first run'" in reject(
        endless, recorded, timeout_s=2
    )


def answers_nan(model: onnx.ModelProto) -> None:
    """A weight that is no number."""
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[0, 0] = np.nan
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "weight"))


def answers_wrong(model: onnx.ModelProto) -> None:
    """A weight a little off."""
    weight = numpy_helper.to_array(model.graph.initializer[0]) + np.float32(1e-3)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "weight"))


def other_input(model: onnx.ModelProto) -> None:
    """An input under another name."""
    model.graph.input[0].name = model.graph.node[0].input[0] = "pixels"


def fewer_outputs(model: onnx.ModelProto) -> None:
    del model.graph.output[1]


def cyclic(model: onnx.ModelProto) -> None:
    """A node that waits for itself."""
    model.graph.node[0].input[0] = "scores"


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (answers_nan, "'scores' must be finite; got 5 NaN"),
        (answers_wrong, "'scores' must equal the recorded values within rtol"),
        (other_input, "inputs must be {'features': 'tensor(float)'} as in the golden file"),
        (fewer_outputs, "outputs must be {'label': 'tensor(int64)', 'scores': 'tensor(float)'}"),
        (cyclic, "loading the model: "),
    ],
)
def test_models_that_answer_something_else(
    recorded: Recorded,
    edited: Callable[[Edit], Path],
    reject: Callable[..., str],
    edit: Edit,
    expected: str,
) -> None:
    assert expected in reject(edited(edit), recorded)


def test_outputs_that_changed_places(
    tmp_path: Path, rows: npt.NDArray[np.float32], smoke: Smoke, reject: Callable[..., str]
) -> None:
    def model(low: str, high: str) -> Path:
        """The least and the most of each row, under the names given."""
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            [
                helper.make_node("ReduceMin", ["features", "axis"], [low], keepdims=0),
                helper.make_node("ReduceMax", ["features", "axis"], [high], keepdims=0),
            ],
            "bounds",
            [info("features", TensorProto.FLOAT, ["batch", 3])],
            [info(name, TensorProto.FLOAT, ["batch"]) for name in ("low", "high")],
            [numpy_helper.from_array(np.array([1]), "axis")],
        )
        opset = [helper.make_opsetid("", 18)]
        path = tmp_path / "bounds.onnx"
        path.write_bytes(
            helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
        )
        return path

    low, high = rows.min(axis=1), rows.max(axis=1)
    recorded = {"input/features": rows, "output/low": low, "output/high": high}
    smoke(model("low", "high"), recorded)
    message = reject(model("high", "low"), recorded)
    assert "'low' must equal the recorded values" in message
    assert "'high' must equal the recorded values" in message


def test_flipped_bytes_are_rejected_or_change_nothing(
    tmp_path: Path, linear: Path, recorded: Recorded, save_golden: Callable[[Recorded], Path]
) -> None:
    golden, sound = save_golden(recorded), linear.read_bytes()
    rng = np.random.default_rng(0)
    places = rng.choice(len(sound), FLIPS, replace=False)
    masks = rng.integers(1, 256, FLIPS)

    def outcome(turn: int) -> str:
        changed = bytearray(sound)
        changed[places[turn]] ^= masks[turn]
        path = tmp_path / f"{turn}.onnx"
        path.write_bytes(changed)
        sha256 = hashlib.sha256(changed).hexdigest()
        try:
            run_smoke_test(path, sha256=sha256, golden=golden, batch_sizes=(1, 2), timeout_s=30)
        except GateError as error:
            return str(error)
        return "passed"

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(outcome, range(FLIPS)))
    rejected = [text for text in outcomes if text != "passed"]
    assert len(rejected) > FLIPS // 2
    assert not [text for text in rejected if "it was killed" in text]
