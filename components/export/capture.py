"""PyTorch's exporter, held quiet, and what its refusals mean.

Source: https://docs.pytorch.org/docs/stable/onnx_export.html.
"""

import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress

import onnx
import torch
from torch import Tensor, nn

from components.contract import Model, ModelMetadata, axis_lengths
from components.errors import GateError
from components.export.onnx_file import BATCH
from components.export.opset import OLDEST_NATIVE
from components.export.recurrent import any_length

_CHATTY = ("torch", "onnxscript", "onnx_ir")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class _Predict(nn.Module):
    """Makes ``predict`` the entry of the graph; it calls the model, so hooks fire."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.model.predict(*inputs)


def capture(
    model: Model, example: Sequence[Tensor], metadata: ModelMetadata, opset: int
) -> onnx.ModelProto:
    """Turn ``model.predict`` into a graph of opset 18 or later, as the exporter leaves it.

    Raises:
        GateError: The exporter gave up, or only manages with an axis that is not dynamic.
    """
    axes = dict.fromkeys(axis for spec in metadata.inputs for _, axis in spec.axes)
    try:
        return _captured(model, example, metadata, opset, [*axes])
    except Exception as error:  # the exporter documents no closed set of errors
        fixed = [
            _fixed_axis(axis, example, metadata)
            for axis in axes
            if axis != BATCH and _is_fixed(axis, model, example, metadata, opset)
        ]
        raise GateError("export", fixed or [_capture_failure(error)]) from error


def _captured(
    model: Model,
    example: Sequence[Tensor],
    metadata: ModelMetadata,
    opset: int,
    axes: Sequence[str],
) -> onnx.ModelProto:
    # A name, not a Dim: with a Dim the exporter answers a conflict with a static axis.
    dynamic = [{at: axis for at, axis in s.axes if axis in axes} for s in metadata.inputs]
    with _quiet(), torch.no_grad(), any_length() as translations:
        program = torch.onnx.export(
            _Predict(model).eval(),
            tuple(example),
            dynamo=True,
            external_data=False,
            verbose=False,
            opset_version=max(opset, OLDEST_NATIVE),
            input_names=[spec.name for spec in metadata.inputs],
            output_names=[spec.name for spec in metadata.outputs],
            dynamic_shapes=(tuple(dynamic),),
            custom_translation_table=translations,
        )
        assert program is not None, "dynamo=True returns a program"
        return program.model_proto


def _is_fixed(
    axis: str, model: Model, example: Sequence[Tensor], metadata: ModelMetadata, opset: int
) -> bool:
    """Whether a graph that cannot be captured can be, once one of its axes stays as it is."""
    others = {other for spec in metadata.inputs for _, other in spec.axes} - {axis}
    with suppress(Exception):  # where this fails too, something else is at fault
        _captured(model, example, metadata, opset, sorted(others))
        return True
    return False


def _fixed_axis(axis: str, example: Sequence[Tensor], metadata: ModelMetadata) -> str:
    length = axis_lengths(example, metadata.inputs)[axis]
    return (
        f"predict must take any length of the dynamic axis {axis!r}; it can be captured only with "
        f"the example's {length}. Take the length from x.shape, or declare it as a number"
    )


def _capture_failure(error: Exception) -> str:
    cause = error.__cause__ or error
    lines = [line.strip(" -") for line in _ANSI.sub("", str(cause)).splitlines()]
    reason = " ".join(line for line in lines[:4] if line)[:400]
    return (
        "predict must be capturable with a batch of any size; the exporter stopped with "
        f"{type(cause).__name__}: {reason.rstrip('.')}. Take sizes from x.shape without int(), "
        "fold with -1, and choose between values with torch.where instead of if"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporter warns of, logs and prints; the checks on the file replace it."""
    names = [n for n in logging.root.manager.loggerDict if n.split(".")[0] in _CHATTY]
    levels = {name: logging.getLogger(name).level for name in {*names, *_CHATTY}}
    void = io.StringIO()  # for the half-finished graph that torch prints when it gives up
    with warnings.catch_warnings(), redirect_stdout(void), redirect_stderr(void):
        warnings.simplefilter("ignore")
        try:
            for name in levels:
                logging.getLogger(name).setLevel(logging.CRITICAL + 1)
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
