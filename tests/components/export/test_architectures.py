"""No false refusal: twelve architectures, at five batch sizes, in the newest and in an old set."""

import numpy as np
import onnx
import pytest
from support.exported_architectures import EXPORTABLE, Exportable, example_of, rows_of

from components.contract import ModelMetadata
from components.export.chunks import predict_in_chunks
from components.export.onnx_export import export_onnx
from components.export.parity import check_parity
from components.export.predictors import open_session, run_session
from components.export.probes import BATCHES, LENGTHS

BY_NAME = {exportable.name: exportable for exportable in EXPORTABLE}


EVERY_RULE = ("mlp", "conv_batchnorm", "cross_attention", "lstm", "pooling")
"""Architectures that together need every rule by which a graph is rewritten for older sets."""
ALL = [pytest.param(exportable, id=name) for name, exportable in BY_NAME.items()]


def file_shapes(proto: onnx.ModelProto) -> dict[str, tuple[str | int, ...]]:
    values = (*proto.graph.input, *proto.graph.output)
    dims = {v.name: v.type.tensor_type.shape.dim for v in values}
    return {name: tuple(d.dim_param or d.dim_value for d in dim) for name, dim in dims.items()}


def declared_shapes(metadata: ModelMetadata) -> dict[str, tuple[str | int, ...]]:
    return {spec.name: spec.shape for spec in (*metadata.inputs, *metadata.outputs)}


@pytest.mark.parametrize("exportable", ALL)
def test_a_sound_model_is_exported_and_equal_at_every_batch_size(exportable: Exportable) -> None:
    model = exportable.build()
    metadata = model.get_model_metadata()
    data = export_onnx(model, example_of(metadata), metadata={})
    assert file_shapes(onnx.ModelProto.FromString(data)) == declared_shapes(metadata)
    report = check_parity(model, data, rows_of(metadata, 64))
    assert report.failures == ()
    assert report.divergence is None
    assert {case.batch for case in report.cases} == {*BATCHES}


def test_sixty_combinations_are_covered() -> None:
    """Each architecture runs above, and its report is held against every batch size."""
    assert len(BY_NAME) * len(BATCHES) == 60


@pytest.mark.parametrize("name", EVERY_RULE)
def test_they_can_be_written_for_the_operator_set_of_old_engines(
    name: str,
) -> None:
    model = BY_NAME[name].build()
    metadata = model.get_model_metadata()
    data = export_onnx(model, example_of(metadata), opset=15, metadata={})
    proto = onnx.ModelProto.FromString(data)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 15)]
    assert file_shapes(proto) == declared_shapes(metadata)
    assert check_parity(model, data, rows_of(metadata, 64)).failures == ()


def test_lengths_of_sequences_are_probed_apart_from_the_examples() -> None:
    model = BY_NAME["pooling"].build()
    metadata = model.get_model_metadata()
    data = export_onnx(model, example_of(metadata), metadata={})
    report = check_parity(model, data, rows_of(metadata, 8))
    probed = {case.lengths["sequence"] for case in report.cases if case.batch in (1, 3)}
    assert probed == {*LENGTHS}
    session = open_session(data)
    for count, length in ((0, 4), (1, 1), (5, 11)):
        steps = np.ones((count, length, 4), np.float32)
        outputs = predict_in_chunks(
            {"steps": steps}, metadata, lambda chunk: run_session(session, {"steps": chunk[0]})
        )
        assert outputs["probabilities"].shape == (count, 3)
        assert outputs["weights"].shape == (count, length)
