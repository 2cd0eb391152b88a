"""A model to one ONNX file, and proof that the file is what was asked for.

The exporter's word is not taken: it keeps another opset, fixes a dynamic axis and writes the paths
of the source code without an error. So the bytes are cleaned, written deterministically, read back
and checked.

Source: https://docs.pytorch.org/docs/stable/onnx_export.html, which also lists the exporter's
fallbacks.
"""

import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from components.contract import Model, ModelMetadata
from components.errors import GateError
from components.export.onnx_file import BATCH, METADATA_KEY, graph_failures, properties, texts, walk

_LIMIT = 2**31 - 1  # protobuf's largest message, in bytes
_CHATTY = ("torch", "onnxscript", "onnx_ir")
_SOURCE_FILE = re.compile(r"[\w-]\.pyc?\b")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class _Predict(nn.Module):
    """Makes ``predict`` the entry of the graph; it calls the model, so hooks fire."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.model.predict(*inputs)


def export_onnx(
    model: Model, example: Sequence[Tensor], *, opset: int = 20, metadata: Mapping[str, str]
) -> bytes:
    """Export ``model.predict`` as one self-contained ONNX file, its first axes named ``batch``.

    Equal weights and arguments give equal bytes, in any process and any folder. The model's own
    metadata is always written, under :data:`METADATA_KEY`.

    Args:
        model: In eval mode and on the CPU; it is left as it was.
        example: One tensor per input of the metadata, of 2 rows or more; values do not matter.
        opset: Version of the ai.onnx operator set that the file must declare.
        metadata: Further properties of the file; they must not depend on time or place.

    Raises:
        GateError: The model is not ready, cannot be captured, or the file is not as declared.
    """
    described = model.get_model_metadata()
    written = {**metadata, METADATA_KEY: described.model_dump_json()}
    _require(
        [
            *_model_failures(model),
            *_example_failures(example, described),
            *_property_failures(metadata, written),
        ]
    )
    proto = _capture(model, example, described, opset)
    _clean(proto)
    for key, value in sorted(written.items()):
        proto.metadata_props.add(key=key, value=value)
    data: bytes = proto.SerializeToString(deterministic=True)
    _require([*graph_failures(data, described, opset=opset), *_leaks(data, model)])
    return data


def _require(failures: Sequence[str]) -> None:
    if failures:
        raise GateError("export", failures)


def _model_failures(model: Model) -> Iterator[str]:
    training = [name or "the model itself" for name, m in model.named_modules() if m.training]
    if training:
        yield (
            f"the model must be in eval mode; in train mode: {', '.join(training)}. "
            "Call model.eval() first"
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    away = sorted(f"{name} on {tensor.device}" for name, tensor in tensors if not tensor.is_cpu)
    if away:
        yield f"the model must be on the CPU; got {', '.join(away)}. Call model.cpu() first"
    size = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)
    if size > _LIMIT:
        yield (
            f"weights must fit into one file of at most {_LIMIT} bytes; got {size}. "
            "Use a smaller model or half precision"
        )


def _example_failures(example: Sequence[Tensor], metadata: ModelMetadata) -> Iterator[str]:
    for spec in (*metadata.inputs, *metadata.outputs):
        if spec.shape[:1] != (BATCH,) or BATCH in spec.shape[1:]:
            yield (
                f"{spec.name!r} must have {BATCH!r} as its first axis and nowhere else; got "
                f"{spec.shape}. Mend the model's metadata"
            )
    if len(example) != len(metadata.inputs):
        yield (
            f"the example must have one tensor per input, {len(metadata.inputs)}; got "
            f"{len(example)}. Pass the inputs in the order of the metadata"
        )
        return
    for tensor, spec in zip(example, metadata.inputs, strict=True):
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        if (shape[1:], dtype) != (spec.shape[1:], spec.dtype) or not tensor.is_cpu:
            yield (
                f"example of {spec.name!r} must be {spec.shape} {spec.dtype} on the CPU; got "
                f"{shape} {dtype} on {tensor.device}. Encode it as the metadata says"
            )
        elif shape[0] < 2:  # a size of 1 is taken for a constant when the graph is captured
            yield f"example of {spec.name!r} must have 2 rows or more; got {shape[0]}. Repeat a row"


def _property_failures(given: Mapping[str, str], written: Mapping[str, str]) -> Iterator[str]:
    for key, value in given.items():
        if value != written[key]:
            yield (
                f"property {key!r} must equal the model's own metadata; got {value[:80]!r}. "
                "Leave it out: it is written from get_model_metadata()"
            )


def _capture(
    model: Model, example: Sequence[Tensor], metadata: ModelMetadata, opset: int
) -> onnx.ModelProto:
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                _Predict(model).eval(),
                tuple(example),
                dynamo=True,
                external_data=False,
                verbose=False,
                opset_version=opset,
                input_names=[spec.name for spec in metadata.inputs],
                output_names=[spec.name for spec in metadata.outputs],
                # A name, not a Dim: with a Dim the exporter answers a conflict with a static axis.
                dynamic_shapes=(tuple({0: BATCH} for _ in example),),
            )
            assert program is not None, "dynamo=True returns a program"
            return program.model_proto
    except Exception as error:  # the exporter documents no closed set of errors
        raise GateError("export", [_capture_failure(error)]) from error


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


def _clean(proto: onnx.ModelProto) -> None:
    """Drop all that tells of the exporting process: traces, comments, symbol names, versions."""
    for message in walk(proto):
        for name in ("metadata_props", "doc_string", "value_info"):
            if name in message.DESCRIPTOR.fields_by_name:
                message.ClearField(name)
    proto.producer_name = "pytorch"
    proto.producer_version = torch.__version__.split("+")[0]  # the build, "+cpu", says nothing


def _leaks(data: bytes, model: Model) -> list[str]:
    """Find source files and local folders in the file's text; weights are not text."""
    proto = onnx.ModelProto.FromString(data)
    sources = _source_files(model)
    found = {k for k, text in properties(proto).items() if any(s in text for s in sources)}
    proto.ClearField("metadata_props")  # the wider rules would refuse a vocabulary of paths
    places = [str(p) for p in (Path.cwd(), Path.home(), Path(sys.prefix)) if len(p.parts) > 2]
    found |= {t for t in texts(proto) if _SOURCE_FILE.search(t) or any(p in t for p in places)}
    if not found:
        return []
    return [
        (
            "the file must not tell where it was made; found the path of source code or a local "
            f"folder in {[text[:80] for text in sorted(found)[:5]]}. Rename the value or mend the "
            "property"
        )
    ]


def _source_files(model: Model) -> set[str]:
    modules = {sys.modules.get(type(module).__module__) for module in model.modules()}
    files = {getattr(module, "__file__", None) for module in modules}
    return {str(Path(file).resolve()) for file in files if file}
