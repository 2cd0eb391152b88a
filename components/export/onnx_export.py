"""A model to one ONNX file, and proof that the file is what was asked for.

The exporter's word is not taken: it keeps another opset, fixes a dynamic axis and writes the paths
of the source code without an error. So the bytes are cleaned, written deterministically, read back
and checked.

Source: https://docs.pytorch.org/docs/stable/onnx_export.html, which also lists the exporter's
fallbacks.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor

from components.contract import TENSOR_DTYPES, Model, ModelMetadata, axis_lengths
from components.errors import GateError
from components.export.capture import capture
from components.export.onnx_file import (
    BATCH,
    METADATA_KEY,
    graph_failures,
    name_axes,
    properties,
    texts,
    walk,
)
from components.export.opset import OLDEST_NATIVE, lower

_LIMIT = 2**31 - 1  # protobuf's largest message, in bytes
_SOURCE_FILE = re.compile(r"[\w-]\.pyc?\b")


def export_onnx(
    model: Model, example: Sequence[Tensor], *, opset: int = 20, metadata: Mapping[str, str]
) -> bytes:
    """Export ``model.predict`` as one self-contained ONNX file, its dynamic axes named.

    Equal weights and arguments give equal bytes, in any process and any folder. The model's own
    metadata is always written, under :data:`METADATA_KEY`.

    Args:
        model: In eval mode and on the CPU; it is left as it was.
        example: One tensor per input of the metadata, of 2 rows or more, and as long along other
            dynamic axes; values do not matter.
        opset: Version of the ai.onnx operator set that the file must declare. Below 18 the graph
            is rewritten, as far as the older operators can say the same.
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
    proto = capture(model, example, described, opset)
    _require(_lower(proto, opset) if opset < OLDEST_NATIVE else [])
    _clean(proto)
    name_axes(proto.graph, described)
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
        if spec.dtype not in TENSOR_DTYPES:
            yield (
                f"{spec.name!r} must be of a dtype that every engine runs, "
                f"{' or '.join(TENSOR_DTYPES)}; got {spec.dtype}. Convert it in predict"
            )
    if len(example) != len(metadata.inputs):
        yield (
            f"the example must have one tensor per input, {len(metadata.inputs)}; got "
            f"{len(example)}. Pass the inputs in the order of the metadata"
        )
        return
    lengths = axis_lengths(example, metadata.inputs)
    for tensor, spec in zip(example, metadata.inputs, strict=True):
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        wanted = (lengths.get(BATCH), *spec.sized(lengths)[1:])
        if (shape, dtype) != (wanted, spec.dtype) or not tensor.is_cpu:
            yield (
                f"example of {spec.name!r} must be {spec.shape} {spec.dtype} on the CPU; got "
                f"{shape} {dtype} on {tensor.device}. Encode it as the metadata says"
            )
            continue
        for place, axis in spec.axes:
            if shape[place] < 2:  # taken for a constant when the graph is captured
                what = "rows" if axis == BATCH else f"steps of {axis!r}"
                yield (
                    f"example of {spec.name!r} must have 2 {what} or more; got {shape[place]}. "
                    "Repeat what is there"
                )


def _property_failures(given: Mapping[str, str], written: Mapping[str, str]) -> Iterator[str]:
    for key, value in given.items():
        if value != written[key]:
            yield (
                f"property {key!r} must equal the model's own metadata; got {value[:80]!r}. "
                "Leave it out: it is written from get_model_metadata()"
            )


def _lower(proto: onnx.ModelProto, opset: int) -> list[str]:
    missing = lower(proto, opset)
    if not missing:
        return []
    return [
        (
            f"opset {opset} must have every operator of the model; {'; '.join(missing[:5])}. Ask "
            f"for opset {OLDEST_NATIVE} or later, or express the model without them"
        )
    ]


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
