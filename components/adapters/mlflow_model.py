"""A model in MLflow's format: the folder with its MLmodel file, made without MLflow's fluent state.

Signature and input example go by column where the graph takes columns, and by tensor elsewhere.
"""

import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.contract import Arrays, ModelMetadata, TensorSpec
from components.digest import digest_file
from components.errors import GateError, InfrastructureError
from components.register.provenance import LOADER, NO_CACHE, NO_CACHE_TEXT

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.models import ModelSignature

MODEL_FILE = "model.onnx"
_COLUMNS = {
    "string": "string",
    "int64": "long",
    "float64": "double",
    "float32": "float",
    "bool": "boolean",
}


def takes_columns(metadata: ModelMetadata) -> bool:
    """Whether every input is a column: one value in each row."""
    return all(len(spec.shape) == 1 for spec in metadata.inputs)


def write_model(
    folder: Path,
    onnx_file: Path,
    logged: "LoggedModel",
    *,
    metadata: ModelMetadata,
    example: Arrays,
    requirements: Sequence[str],
) -> None:
    """Write a model into an empty folder, its ONNX file byte for byte.

    Loaded as a Python function, it is assay's own loader that answers: MLflow's does not take
    pandas' text columns, and makes the word "None" of a missing value.

    Args:
        folder: Empty, or not there yet.
        onnx_file: A single file without external data.
        logged: The entry that the files will belong to.
        metadata: Gives the signature.
        example: Named inputs of a few rows, kept as the input example.
        requirements: What a consumer installs to load it.
    """
    import mlflow.onnx
    import onnx
    from mlflow.models import Model

    described = Model(
        artifact_path=f"models:/{logged.model_id}",
        model_uuid=logged.model_id,
        run_id=logged.source_run_id,
        model_id=logged.model_id,
    )
    with tempfile.TemporaryDirectory() as code, warnings.catch_warnings():
        # MLflow compares the example's column names with a range, which pandas 3 deprecates.
        warnings.filterwarnings("ignore", "Operation with range is deprecated")
        loader = Path(code) / f"{LOADER}.py"
        loader.write_bytes(files("components.register").joinpath("assay_rows.py").read_bytes())
        mlflow.onnx.save_model(
            onnx.load(onnx_file, load_external_data=False),
            str(folder),
            code_paths=[str(loader)],
            mlflow_model=described,
            signature=signature_of(metadata),
            input_example=_example(metadata, example),
            pip_requirements=list(requirements),
            onnx_execution_providers=["CPUExecutionProvider"],
            save_as_external_data=False,
        )
    shutil.copyfile(onnx_file, folder / MODEL_FILE)  # MLflow has written the graph anew
    if (wrong := digest_file(folder / MODEL_FILE)) != digest_file(onnx_file):
        raise InfrastructureError(
            f"the folder of the version must hold the exported bytes; {folder} has {wrong[:12]}. "
            "Look at the disk, and run again."
        )
    (folder / NO_CACHE).write_bytes(NO_CACHE_TEXT)
    described.flavors["python_function"]["loader_module"] = LOADER
    described.save(str(folder / "MLmodel"))


def answer_as_function(folder: Path, inputs: Arrays) -> dict[str, "np.ndarray[Any, Any]"]:
    """Answer rows as a consumer who loads the version with ``mlflow.pyfunc.load_model``.

    Args:
        folder: An intact version's files: its loader runs in this process.
        inputs: By name; columns go in as a DataFrame.

    Raises:
        GateError: It cannot be loaded, or refuses the rows.
    """
    import mlflow.pyfunc

    path = [*sys.path]
    try:
        model = mlflow.pyfunc.load_model(str(folder))
        if any(array.ndim > 1 for array in inputs.values()):
            answers: Any = model.predict(dict(inputs))
        else:
            import pandas as pd

            answers = model.predict(pd.DataFrame({k: v.tolist() for k, v in inputs.items()}))
    except Exception as error:  # whatever the loader or MLflow's check of the schema raises
        raise GateError(
            "smoke_test",
            [
                "the version must answer as MLflow's Python function; it raised "
                f"{type(error).__name__}: {error}"
            ],
        ) from error
    finally:
        sys.path[:] = path  # MLflow leaves the folder of the loader there
    return {str(name): _whole(values) for name, values in answers.items()}


def _whole(values: Any) -> "np.ndarray[Any, Any]":
    found = np.asarray(values)
    if found.dtype.hasobject:  # text, or a list in each row
        listed = values.tolist()
        text = all(isinstance(value, str) for value in listed)
        found = np.asarray(listed, dtype=np.str_ if text else np.float32)
    return found


def signature_of(metadata: ModelMetadata) -> "ModelSignature":
    """By column where all inputs are columns; else by tensor, -1 for an axis that is dynamic."""
    from mlflow.models import ModelSignature
    from mlflow.types import Schema
    from mlflow.types.schema import Array, ColSpec
    from mlflow.types.schema import TensorSpec as MlflowTensorSpec

    def column(spec: TensorSpec) -> Any:
        kind: Any = _COLUMNS[spec.dtype]
        for _ in spec.shape[1:]:
            kind = Array(kind)
        return ColSpec(kind, spec.name)

    def tensor(spec: TensorSpec) -> Any:
        kind = np.dtype(str if spec.dtype == "string" else spec.dtype)
        shape = tuple(-1 if isinstance(axis, str) else axis for axis in spec.shape)
        return MlflowTensorSpec(kind, shape, spec.name)

    one = column if takes_columns(metadata) else tensor
    inputs, outputs = (
        Schema([one(spec) for spec in specs]) for specs in (metadata.inputs, metadata.outputs)
    )
    return ModelSignature(inputs=inputs, outputs=outputs)


def _example(metadata: ModelMetadata, arrays: Arrays) -> Any:
    if not takes_columns(metadata):
        return {name: np.asarray(array) for name, array in arrays.items()}
    import pandas as pd

    return pd.DataFrame({spec.name: arrays[spec.name].tolist() for spec in metadata.inputs})
