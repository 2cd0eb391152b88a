"""What a model declares about itself, against what it is, takes and gives.

Legend: B = rows of a batch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from components.conformance import describe_faults, missing_members, mistyped_members
from components.contract import TENSOR_DTYPES, Model, ModelMetadata, TensorSpec, axis_lengths
from components.validate.contract_report import (
    Finding,
    NoAnswerError,
    Rows,
    Subject,
    logits_of,
    named,
    serve,
)

PROBABILITY = "probability"
"""The unit whose values must lie between 0 and 1."""


def conformance(model: object) -> list[Finding]:
    """Whether this is a Model, with every member that it needs, called as modules are."""
    findings = [] if isinstance(model, Model) else [Finding(_not_a_model(model), "")]
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if type(module).__call__ is not nn.Module.__call__:
            sentence = (
                f"__call__ must be nn.Module's own, so that hooks fire; {named(path)} "
                f"({type(module).__qualname__}) overrides it. Put the code into forward."
            )
            findings.append(Finding(sentence, path))
    return findings


def _not_a_model(model: object) -> str:
    kind = type(model)
    sentence = f"a model must be a components.contract.Model; got a {kind.__qualname__}."
    missing, mistyped = missing_members(kind, Model), mistyped_members(kind, Model)
    return f"{sentence} {describe_faults(kind, missing, mistyped)}"


def metadata_schema(subject: Subject) -> list[Finding]:
    """Whether the metadata is complete, its names and labels unique, and the labels fit."""
    metadata = subject.metadata()
    specs = (*metadata.inputs, *metadata.outputs)
    empty = [kind for kind in ("inputs", "outputs", "classes") if not getattr(metadata, kind)]
    faults = [f"{kind} of the metadata must not be empty." for kind in empty]
    # One namespace for both: in an ONNX graph an output cannot share the name of an input.
    if twice := _repeated([spec.name for spec in specs]):
        faults.append(f"inputs and outputs of the metadata must have unique names; twice: {twice}.")
    for spec in specs:
        if spec.shape[:1] != ("batch",) or "batch" in spec.shape[1:]:
            faults.append(f"{spec.name!r} must have 'batch' as its first axis only: {spec.shape}.")
        if not all(axis.isidentifier() for _, axis in spec.axes):
            faults.append(f"dynamic axes of {spec.name!r} must have words as names: {spec.shape}.")
        if spec.dtype not in TENSOR_DTYPES:
            faults.append(f"{spec.name!r} must be {' or '.join(TENSOR_DTYPES)}; got {spec.dtype}.")
        if spec.unit != spec.unit.strip() or not spec.unit.isprintable():
            faults.append(f"the unit of {spec.name!r} must be a printable word; got {spec.unit!r}.")
    if twice := _repeated(metadata.classes):
        faults.append(f"classes of the metadata must be unique; twice: {twice}.")
    return [Finding(fault, "") for fault in (*faults, *_unfit_classes(metadata))]


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def _unfit_classes(metadata: ModelMetadata) -> Iterator[str]:
    count = len(metadata.classes)
    shapes = [spec.shape[1:] for spec in metadata.outputs]
    one_for_each = any(shape[-1:] == (count,) for shape in shapes)
    of_the_second = count == 2 and any(shape in ((), (1,)) for shape in shapes)
    if count and shapes and not one_for_each and not of_the_second:
        declared = ", ".join(f"{spec.name} {spec.shape}" for spec in metadata.outputs)
        also = ", or none beside 'batch'" if count == 2 else ""
        yield (
            f"the {count} classes of the metadata must be what an output tells apart: one must "
            f"have {count} as its last axis{also}; got {declared}. Check classes and outputs."
        )


def inputs_fit(subject: Subject) -> list[Finding]:
    """Whether real rows are as the metadata's inputs say."""
    specs = subject.metadata().inputs
    faults = []
    for rows in subject.batches:
        if len(rows) != len(specs):
            faults.append(f"inputs of the metadata are {len(specs)}, tensors of a row {len(rows)}")
        faults += [f"input {words}" for words in _misfits(rows, specs, axis_lengths(rows, specs))]
    hint = ". Check get_model_metadata against the pipeline's encoding."
    return [Finding(fault + hint, "") for fault in faults]


def outputs_fit(subject: Subject) -> Iterable[Finding]:
    """Whether answers are as the metadata's outputs say, for one row and for several."""
    model, specs = subject.fresh(), subject.metadata().outputs
    training = subject.fresh(training=True)
    single = tuple(row[:1] for row in subject.batches[0])
    for rows in (single, *subject.batches):
        count, outputs, (logits,) = (len(rows[0]), serve(model, rows), logits_of(model, rows))
        faults = []
        if len(outputs) != len(specs):
            faults.append(f"outputs of the metadata are {len(specs)}, of predict {len(outputs)}")
        lengths = {**axis_lengths(outputs, specs), **axis_lengths(rows, subject.metadata().inputs)}
        faults += [f"output {words}" for words in _misfits(outputs, specs, lengths)]
        faults += _improbable(outputs, specs)
        if not logits.is_floating_point() or logits.shape[:1] != (count,):
            got = f"{tuple(logits.shape)} {_dtype(logits)}"
            faults.append(f"forward must give floating logits ({count}, ...); got {got}")
        faults += [] if rows is single else _other_logits(training, rows, logits)
        yield from (Finding(f"{fault}. Check predict and the metadata.", "") for fault in faults)


def _other_logits(training: Model, rows: Rows, logits: Tensor) -> Iterator[str]:
    try:
        (trained,) = logits_of(training, rows)
    except NoAnswerError:
        return  # the check of finite numbers calls forward in train mode too, and tells
    if (trained.shape, trained.dtype) != (logits.shape, logits.dtype):
        shapes = [f"{tuple(t.shape)} {_dtype(t)}" for t in (trained, logits)]
        yield f"forward must give the same shape in train and eval mode; got {' and '.join(shapes)}"


def _improbable(outputs: Rows, specs: Sequence[TensorSpec]) -> Iterator[str]:
    for tensor, spec in zip(outputs, specs, strict=False):
        # NaN is the business of another check.
        if spec.unit == PROBABILITY and bool(((tensor < 0) | (tensor > 1)).any()):
            low, high = float(tensor.min()), float(tensor.max())
            yield f"output {spec.name!r} has the unit probability; got {low:.3g} to {high:.3g}"


def _misfits(
    tensors: Rows, specs: Sequence[TensorSpec], lengths: Mapping[str, int]
) -> Iterator[str]:
    for tensor, spec in zip(tensors, specs, strict=False):
        wanted, count = spec.sized(lengths), lengths["batch"]
        if tuple(tensor.shape) != wanted or _dtype(tensor) != spec.dtype:
            got = f"{tuple(tensor.shape)} {_dtype(tensor)}"
            yield f"{spec.name!r} must be {wanted} {spec.dtype} for {count} rows; got {got}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
