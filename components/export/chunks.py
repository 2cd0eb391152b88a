"""Rows through an engine in chunks, with both sides held against the metadata.

Legend: B = batch, the number of rows asked for.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from components.contract import (
    Arrays,
    ModelMetadata,
    TensorSpec,
    axis_lengths,
    check_inputs,
    dtype_of,
)
from components.errors import ContractError
from components.export.onnx_file import BATCH

Array = npt.NDArray[np.generic]

CHUNK_ROWS = 65_536
CHUNK_VALUES = 1 << 22
"""An engine sees at most this many rows, and about this many input values, at a time."""


def predict_in_chunks(
    inputs: Arrays, metadata: ModelMetadata, run: Callable[[Sequence[Array]], list[Array]]
) -> dict[str, Array]:
    """Map named inputs (B, ...) to named outputs (B, ...), a bounded number of rows at a time.

    Args:
        inputs: Arrays by name; text may be of any width.
        metadata: What inputs and outputs must be.
        run: Maps arrays in the order of the metadata's inputs to arrays in that of its outputs.

    Raises:
        ContractError: An input or an output is not as the metadata says.
    """
    check_inputs(inputs, metadata.inputs)
    arrays = [inputs[spec.name] for spec in metadata.inputs]
    lengths = axis_lengths(arrays, metadata.inputs)
    rows = lengths.pop(BATCH)
    values = sum(math.prod(array.shape[1:]) for array in arrays)
    step = max(1, min(CHUNK_ROWS, CHUNK_VALUES // max(1, values)))
    parts: list[list[Array]] = [[] for _ in metadata.outputs]
    for start in range(0, rows, step):
        # A copy of its own: contiguous, writable and in native byte order, whatever came in.
        chunk = [
            np.array(array[start : start + step], dtype=_numpy_dtype(spec), order="C")
            for array, spec in zip(arrays, metadata.inputs, strict=True)
        ]
        outputs = run(chunk)
        # An axis that no input has gets its length from the first chunk.
        lengths = {**axis_lengths(outputs, metadata.outputs), **lengths, BATCH: len(chunk[0])}
        _check_outputs(outputs, metadata.outputs, lengths)
        for part, output in zip(parts, outputs, strict=True):
            part.append(output)
    named = zip(metadata.outputs, parts, strict=True)
    return {
        spec.name: np.concatenate(part) if part else _empty(spec, lengths) for spec, part in named
    }


def _numpy_dtype(spec: TensorSpec) -> str:
    return "U" if spec.dtype == "string" else spec.dtype


def _empty(spec: TensorSpec, lengths: Mapping[str, int]) -> Array:
    shape = [n if isinstance(n, int) else 0 for n in spec.sized(lengths)]
    return np.empty([0, *shape[1:]], dtype=_numpy_dtype(spec))


def _check_outputs(
    outputs: Sequence[Array], specs: Sequence[TensorSpec], lengths: Mapping[str, int]
) -> None:
    wanted = [(spec.dtype, spec.sized(lengths)) for spec in specs]
    found = [(dtype_of(output), output.shape) for output in outputs]
    if found != wanted:
        raise ContractError(
            f"outputs {[spec.name for spec in specs]} must be {wanted}; got {found}. "
            "Mend predict or the model's metadata."
        )
