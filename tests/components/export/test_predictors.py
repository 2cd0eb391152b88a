"""One suite for both engines, then what each engine has of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import external_data_helper
from torch import nn

from components.contract import Arrays, Model, Predictor, TensorSpec
from components.data.encoding import Encoding
from components.errors import ContractError, InfrastructureError
from components.export import chunks, predictors
from components.export.predictors import OnnxPredictor, TorchPredictor


@pytest.fixture(params=["torch", "onnx"])
def predictor(request: pytest.FixtureRequest, tabular: Model, exported: bytes) -> Predictor:
    return TorchPredictor(tabular) if request.param == "torch" else OnnxPredictor(exported)


def test_metadata_is_the_models(predictor: Predictor, tabular: Model) -> None:
    assert predictor.metadata == tabular.get_model_metadata()


def test_outputs_are_as_the_metadata_says(predictor: Predictor, rows: Arrays) -> None:
    outputs = predictor.predict(rows)
    assert list(outputs) == ["logits", "probabilities"]
    assert {(a.shape, a.dtype.name) for a in outputs.values()} == {((300, 3), "float32")}
    assert np.isfinite(outputs["logits"]).all()
    np.testing.assert_allclose(outputs["probabilities"].sum(axis=1), 1, rtol=1e-6)


def test_both_engines_answer_alike(tabular: Model, exported: bytes, rows: Arrays) -> None:
    ours, theirs = TorchPredictor(tabular).predict(rows), OnnxPredictor(exported).predict(rows)
    for name, array in ours.items():
        np.testing.assert_allclose(theirs[name], array, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_any_number_of_rows(predictor: Predictor, rows: Arrays, count: int) -> None:
    outputs = predictor.predict({name: array[:count] for name, array in rows.items()})
    assert {(a.shape, a.dtype.name) for a in outputs.values()} == {((count, 3), "float32")}


def test_chunks_change_nothing(
    predictor: Predictor, rows: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = predictor.predict(rows)
    seen: list[int] = []
    check = chunks._check_outputs

    def count(
        outputs: list[np.ndarray], specs: tuple[TensorSpec, ...], lengths: Mapping[str, int]
    ) -> None:
        seen.append(lengths["batch"])
        check(outputs, specs, lengths)

    monkeypatch.setattr(chunks, "_check_outputs", count)
    for name, value in (("CHUNK_ROWS", 128), ("CHUNK_VALUES", 8 * 128 + 7)):
        monkeypatch.setattr(chunks, name, value)
        seen.clear()
        for key, array in predictor.predict(rows).items():
            np.testing.assert_allclose(array, whole[key], rtol=1e-5, atol=1e-6)
        assert seen == [128, 128, 44]


def test_a_row_wider_than_a_chunk_goes_alone(
    predictor: Predictor, rows: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_VALUES", 1)
    assert predictor.predict({k: a[:3] for k, a in rows.items()})["logits"].shape == (3, 3)


@pytest.mark.parametrize(
    "change",
    [
        np.asfortranarray,
        lambda array: array[::-1][::-1],
        lambda array: array.astype(array.dtype.newbyteorder(">")),
        lambda array: np.broadcast_to(array, array.shape),
    ],
    ids=["Fortran order", "negative strides", "big-endian", "read-only"],
)
def test_memory_layout_does_not_matter(
    predictor: Predictor, rows: Arrays, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    wanted = predictor.predict(rows)
    for name, array in predictor.predict({k: change(a) for k, a in rows.items()}).items():
        np.testing.assert_array_equal(array, wanted[name])


def test_inputs_are_not_written_to(predictor: Predictor, rows: Arrays) -> None:
    before = {name: array.copy() for name, array in rows.items()}
    predictor.predict(rows)
    assert all(np.array_equal(before[k], a, equal_nan=k == "numeric") for k, a in rows.items())


def test_wrong_inputs_are_refused(predictor: Predictor, rows: Arrays) -> None:
    with pytest.raises(ContractError, match="must be named"):
        predictor.predict({"numeric": rows["numeric"]})
    with pytest.raises(ContractError, match=r"'numeric' must be .* float32; got .* float64"):
        predictor.predict({**rows, "numeric": rows["numeric"].astype(np.float64)})
    with pytest.raises(ContractError, match="'categorical' must be"):
        predictor.predict({**rows, "categorical": rows["categorical"][:, :2]})
    with pytest.raises(ContractError, match="one batch size"):
        predictor.predict({**rows, "categorical": rows["categorical"][:2]})


def test_a_category_outside_its_embedding_is_refused_in_silence(
    predictor: Predictor, rows: Arrays, capfd: pytest.CaptureFixture[str]
) -> None:
    codes = rows["categorical"].copy()
    codes[5, 1] = 10_000
    with pytest.raises(ContractError, match="a category outside its embedding"):
        predictor.predict({**rows, "categorical": codes})
    assert capfd.readouterr() == ("", "")


def test_the_predictors_are_final() -> None:
    for kind in (TorchPredictor, OnnxPredictor):
        assert kind.__final__
        assert not kind.__abstractmethods__


# PyTorch ------------------------------------------------------------------------------------------


def test_each_training_flag_is_put_back(tabular: Model, rows: Arrays) -> None:
    tabular.train()
    tabular.get_submodule("net.0").eval()
    flags = [module.training for module in tabular.modules()]
    predictor = TorchPredictor(tabular)
    first, second = predictor.predict(rows), predictor.predict(rows)
    np.testing.assert_array_equal(first["logits"], second["logits"])  # no dropout
    assert [module.training for module in tabular.modules()] == flags
    with pytest.raises(ContractError):
        predictor.predict({**rows, "categorical": rows["categorical"] + 1000})
    assert [module.training for module in tabular.modules()] == flags


def test_no_gradient_is_recorded_and_hooks_fire(tabular: Model, rows: Arrays) -> None:
    seen: list[bool] = []
    tabular.register_forward_hook(lambda *_: seen.append(torch.is_inference_mode_enabled()))
    TorchPredictor(tabular).predict(rows)
    assert seen == [True]
    assert torch.is_grad_enabled()


def test_a_model_that_belies_its_metadata_is_refused(
    tabular: Model, rows: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halves(self: Model, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self(*inputs).double(),)

    monkeypatch.setattr(type(tabular), "predict", halves)
    with pytest.raises(ContractError, match=r"outputs .* must be .*float64"):
        TorchPredictor(tabular).predict(rows)


def test_a_model_without_weights_runs(conv: Model, images: Arrays) -> None:
    conv.body = nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(4))
    assert TorchPredictor(conv).predict(images)["label"].shape == (200,)


# ONNX Runtime -------------------------------------------------------------------------------------


def changed(data: bytes, change: Callable[[onnx.ModelProto], object]) -> bytes:
    proto = onnx.ModelProto.FromString(data)
    change(proto)
    return proto.SerializeToString()


def test_the_encoding_travels_in_the_file(exported: bytes, encoding: Encoding) -> None:
    assert OnnxPredictor(exported).encoding == encoding


@pytest.mark.parametrize("threads", [1, 2])
def test_session_options_are_explicit(exported: bytes, threads: int) -> None:
    predictor = OnnxPredictor(exported, threads=threads)
    options = predictor._session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (threads, 1)
    entry = options.get_session_config_entry
    assert entry("session.intra_op.allow_spinning") == str(threads - 1)
    assert entry("session.inter_op.allow_spinning") == "0"
    assert entry("session.force_spinning_stop") == "1"
    assert options.graph_optimization_level.name == "ORT_ENABLE_ALL"
    assert predictor._session.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize("data", [b"", b"junk" * 50, b"\xff" * 99], ids=["empty", "text", "bytes"])
def test_what_is_no_onnx_file_is_refused(data: bytes) -> None:
    with pytest.raises(ContractError, match="must"):
        OnnxPredictor(data)


def test_a_truncated_file_is_refused(exported: bytes) -> None:
    for size in range(0, len(exported), 997):
        with pytest.raises(ContractError):
            OnnxPredictor(exported[:size])


def test_a_file_without_its_properties_is_refused(exported: bytes) -> None:
    for key in ("assay.metadata", "assay.encoding"):

        def drop(proto: onnx.ModelProto, key: str = key) -> None:
            kept = [entry for entry in proto.metadata_props if entry.key != key]
            del proto.metadata_props[:]
            proto.metadata_props.extend(kept)

        with pytest.raises(ContractError, match=f"must carry the property '{key}'"):
            OnnxPredictor(changed(exported, drop))


def test_a_property_that_is_no_such_record_is_refused(exported: bytes) -> None:
    def spoil(proto: onnx.ModelProto) -> None:
        entry = next(e for e in proto.metadata_props if e.key == "assay.encoding")
        entry.value = '{"categorical": 3}'

    with pytest.raises(ContractError, match="must be Encoding as JSON; it has 1 faults"):
        OnnxPredictor(changed(exported, spoil))


def test_a_graph_that_differs_from_its_metadata_is_refused(exported: bytes) -> None:
    def rename(proto: onnx.ModelProto) -> None:
        proto.graph.output[0].name = "scores"

    with pytest.raises(ContractError, match="outputs must be"):
        OnnxPredictor(changed(exported, rename))


def test_external_data_is_refused_before_it_is_followed(exported: bytes, tmp_path: Path) -> None:
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"\0" * 4096)

    def point(proto: onnx.ModelProto) -> None:
        tensor = proto.graph.initializer[0]
        external_data_helper.set_external_data(tensor, str(weights), 0, 96)
        tensor.ClearField("raw_data")

    with pytest.raises(ContractError, match="all data must be inside the file"):
        OnnxPredictor(changed(exported, point))


def test_a_graph_that_the_engine_cannot_load_is_refused(
    exported: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    def age(proto: onnx.ModelProto) -> None:
        proto.opset_import[0].version = 1

    with pytest.raises(ContractError, match="must"):
        OnnxPredictor(changed(exported, age))
    with pytest.raises(ContractError, match="must be able to load the file"):
        predictors.open_session(b"junk")
    assert capfd.readouterr() == ("", "")


def test_a_provider_that_cannot_be_used_is_refused_in_silence(
    exported: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InfrastructureError, match="NoSuchProvider cannot be"):
        OnnxPredictor(exported, providers=["NoSuchProvider"])
    if not torch.cuda.is_available():
        with pytest.raises(InfrastructureError, match="CUDAExecutionProvider cannot be"):
            OnnxPredictor(exported, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert capfd.readouterr() == ("", "")


def test_the_engine_writes_nothing_and_reports_to_nobody(exported: bytes, tmp_path: Path) -> None:
    model, home = tmp_path / "model.onnx", tmp_path / "home"
    model.write_bytes(exported)
    home.mkdir()
    # Without these two it is silent by itself, and the test would prove nothing.
    env = {k: v for k, v in os.environ.items() if k not in ("CI", "ORT_DISABLE_TELEMETRY")}
    places = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(home))
    script = (
        "import sys, pathlib\n"
        "from components.export import golden, onnx_export, onnx_file, parity, predictors\n"
        "assert 'onnxruntime' not in sys.modules\n"
        "predictors.OnnxPredictor(pathlib.Path(sys.argv[1]).read_bytes())\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(model)],
        env={**env, **places, "PYTHONPATH": str(Path(__file__).parents[3])},
        cwd=home,
        check=True,
    )
    assert list(home.rglob("*")) == []
