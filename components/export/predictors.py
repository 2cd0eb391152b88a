"""One model, two engines: PyTorch and ONNX Runtime behind the same interface.

Legend: B = batch, the number of rows asked for.

Source of the session options: https://onnxruntime.ai/docs/performance/tune-performance/threading
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar, final

import numpy as np
import numpy.typing as npt
import onnx
import torch
from google.protobuf.message import DecodeError
from pydantic import BaseModel, ValidationError

from components.contract import Arrays, Model, ModelMetadata, Predictor
from components.data.encoding import Encoding
from components.errors import ContractError, InfrastructureError
from components.export.chunks import predict_in_chunks
from components.export.onnx_file import (
    COLUMNS_KEY,
    ENCODING_KEY,
    METADATA_KEY,
    graph_failures,
    properties,
)
from components.export.raw_columns import RawColumns

if TYPE_CHECKING:
    import onnxruntime as ort

Array = npt.NDArray[np.generic]
Value = TypeVar("Value", bound=BaseModel)

_FATAL = 4  # the severity above which onnxruntime logs; its errors still raise
_WARNING = 2  # onnxruntime's own default
_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}  # TF32 keeps 10 bits of the mantissa


@final
class TorchPredictor(Predictor):
    """Answers with the module itself, on the device where its weights are.

    The module is put into eval mode for a call, and each submodule back as it was.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._metadata = model.get_model_metadata()

    @property
    def metadata(self) -> ModelMetadata:
        """What the model says of itself."""
        return self._metadata

    def predict(self, inputs: Arrays) -> dict[str, Array]:
        """Map named inputs (B, ...) to named outputs (B, ...), as NumPy arrays.

        Raises:
            ContractError: An input or an output is not as the metadata says, or the module refused
                the values, such as a category outside its embedding.
        """
        return predict_in_chunks(inputs, self._metadata, self._run)

    def _run(self, chunk: Sequence[Array]) -> list[Array]:
        tensors = chain(self._model.parameters(), self._model.buffers())
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        with eval_mode(self._model), torch.inference_mode():
            try:
                outputs = self._model.predict(*(torch.from_numpy(a).to(device) for a in chunk))
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                raise ContractError(_refusal("the model", error)) from error
        return [output.cpu().numpy() for output in outputs]


@final
class OnnxPredictor(Predictor):
    """Answers with ONNX Runtime, from the bytes of a file alone.

    Args:
        model: An ONNX file with its metadata and encoding inside, as the export stage writes it.
        threads: Threads within an operator; there is never more than one operator at a time.
        providers: Execution providers, the preferred first; each must be usable.

    Raises:
        ContractError: The file is not such a file, or its graph differs from its metadata.
        InfrastructureError: A provider cannot be used on this machine.
    """

    def __init__(
        self,
        model: bytes,
        *,
        threads: int = 1,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        held = _read_properties(model)
        self._metadata = _parse(ModelMetadata, held, METADATA_KEY)
        raw = COLUMNS_KEY in held
        self._encoding: Encoding | RawColumns = (
            _parse(RawColumns, held, COLUMNS_KEY) if raw else _parse(Encoding, held, ENCODING_KEY)
        )
        if failures := graph_failures(model, self._metadata):
            raise ContractError("; ".join(failures) + ".")
        self._session = open_session(model, threads=threads, providers=providers)

    @property
    def metadata(self) -> ModelMetadata:
        """What the file says of itself."""
        return self._metadata

    @property
    def encoding(self) -> Encoding | RawColumns:
        """How a row becomes the inputs of the graph."""
        return self._encoding

    def predict(self, inputs: Arrays) -> dict[str, Array]:
        """Map named inputs (B, ...) to named outputs (B, ...).

        Raises:
            ContractError: An input or an output is not as the metadata says, or the graph refused
                the values, such as a category outside its embedding.
        """
        return predict_in_chunks(inputs, self._metadata, self._run)

    def _run(self, chunk: Sequence[Array]) -> list[Array]:
        names = [spec.name for spec in self._metadata.inputs]
        return run_session(self._session, dict(zip(names, chunk, strict=True)))


def open_session(
    model: bytes,
    *,
    threads: int = 1,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    optimise: bool = True,
) -> "ort.InferenceSession":
    """Load an ONNX file into ONNX Runtime: nothing printed, no spinning threads, full float32.

    Raises:
        ContractError: The file cannot be loaded.
        InfrastructureError: A provider cannot be used on this machine.
    """
    ort = _import_onnxruntime()
    _require_providers(providers, ort.get_available_providers())
    levels = ort.GraphOptimizationLevel
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    # Threads that wait within a call spin, or waking them costs more than they save; between calls
    # they sleep, since a spinning thread falsifies latency and burns a core.
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(threads > 1)))
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    wanted = [(name, _OPTIONS.get(name, {})) for name in providers]
    try:
        # A provider that cannot start is logged by the process-wide logger, and then left out.
        ort.set_default_logger_severity(_FATAL)
        session = ort.InferenceSession(model, options, providers=wanted)
    except Exception as error:  # onnxruntime's errors have no base of their own
        raise ContractError(
            f"onnxruntime {ort.__version__} must be able to load the file; {_reason(error)}. "
            "Export the model again"
        ) from error
    finally:
        ort.set_default_logger_severity(_WARNING)
    session.disable_fallback()
    _require_providers(providers, session.get_providers())
    return session


def run_session(session: "ort.InferenceSession", inputs: Arrays) -> list[Array]:
    """Run a graph once, its outputs in the order of the file.

    Raises:
        ContractError: The graph refused the values or their shapes.
    """
    try:
        outputs: list[Array] = session.run(None, dict(inputs))
    except Exception as error:  # onnxruntime's errors have no base of their own
        raise ContractError(_refusal("the graph", error)) from error
    # Text comes as Python objects.
    return [a.astype("U") if a.dtype.hasobject else a for a in outputs]


def _import_onnxruntime() -> Any:
    """Import ONNX Runtime, telling nobody.

    From 1.29 on its Linux build writes a device id into the home folder when it is imported, and
    reports models to its maker. This variable, read at that moment, is the only full opt-out
    (https://github.com/microsoft/onnxruntime/pull/27379). An explicit setting is left alone.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and afterwards each submodule back as it was."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def _require_providers(wanted: Sequence[str], usable: Sequence[str]) -> None:
    if missing := [name for name in wanted if name not in usable]:
        raise InfrastructureError(
            f"execution providers must be usable on this machine; {', '.join(missing)} cannot be, "
            f"only {', '.join(usable)}. Install its libraries or ask for CPUExecutionProvider."
        )


def _read_properties(model: bytes) -> dict[str, str]:
    try:
        return properties(onnx.ModelProto.FromString(model))
    except DecodeError as error:
        raise ContractError(
            f"the model must be an ONNX file; got {len(model)} bytes of something else. "
            "Check that the download is complete."
        ) from error


def _parse(kind: type[Value], held: dict[str, str], key: str) -> Value:
    if key not in held:
        raise ContractError(
            f"the ONNX file must carry the property {key!r}; got {sorted(held)}. "
            "Export it with assay."
        )
    try:
        return kind.model_validate_json(held[key])
    except ValidationError as error:
        raise ContractError(
            f"the property {key!r} of the ONNX file must be {kind.__name__} as JSON; it has "
            f"{error.error_count()} faults, the first {error.errors()[0]['msg']!r} at "
            f"{error.errors()[0]['loc']}. Export the file with this version of assay."
        ) from error


def _refusal(who: str, error: Exception) -> str:
    return (
        f"{who} must take every row of the declared dtypes and shapes; {_reason(error)}. Look for "
        "a category outside its embedding, or a size that predict fixes"
    )


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:300].rstrip(".")
    return f"it failed with {type(error).__name__}: {text}"
