"""Does a model keep the contract of :class:`components.contract.Model`?

Every check works on a fresh private copy, runs whatever the others found, and blames a module where
one can be blamed. What the rules protect: hooks, which gradient checks and tracing need; answers
row by row, which serving needs; and weights that travel as safetensors.

Legend: B = rows of a batch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from components.contract import Model, TensorSpec
from components.validate import call_audit as audit
from components.validate.call_audit import Arrangement, farthest, same_answers, same_bits
from components.validate.contract_report import (
    ContractReport,
    Finding,
    NoAnswerError,
    Rows,
    Subject,
    blamed,
    clones,
    logits_of,
    named,
    report_findings,
    run_forward,
    run_predict,
    serve,
    through_bytes,
    usable,
)
from components.validate.gradient_nests import stray_tensors

Findings = Iterable[Finding]


def verify_contract(model: Model, batches: Sequence[Sequence[Tensor]]) -> ContractReport:
    """Run every check of the model contract; the model is left as it was given.

    Args:
        model: The model, in any mode.
        batches: At least three batches of real rows on the model's device, each the tensors
            (B, ...) of the metadata's inputs in order. B may differ; the first has 4 rows or more.

    Returns:
        A report of all failures. An exception in the model's own code is a failure too.

    Raises:
        ValueError: There are too few batches or rows to check with.
    """
    subject = Subject(model, usable(batches))
    if not isinstance(model, nn.Module):
        return report_findings([(*_RULES[0][:2], _conformance(subject))])
    before = audit.footprint(model)
    try:
        found = [(name, rule, _findings(check, subject)) for name, rule, check in _RULES]
        reached = _findings(partial(_reached_back, before=before), subject)
        return report_findings([*found, (*_COPY_RULE, reached)])
    finally:
        audit.restore(model, before)


def _findings(check: Callable[[Subject], Findings], subject: Subject) -> list[Finding]:
    found: list[Finding] = []
    with audit.isolated():
        try:
            # One by one, so that what was found before an exception is kept.
            for finding in check(subject):
                found.append(finding)
        except NoAnswerError as refusal:
            found.append(refusal.finding)
    return found


def _conformance(subject: Subject) -> list[Finding]:
    model: object = subject.model
    findings = []
    if not isinstance(model, Model):
        kind = type(model).__qualname__
        findings.append(Finding(f"a model must be a components.contract.Model; got a {kind}.", ""))
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if type(module).__call__ is not nn.Module.__call__:
            sentence = (
                f"__call__ must be nn.Module's own, so that hooks fire; {named(path)} "
                f"({type(module).__qualname__}) overrides it. Put the code into forward."
            )
            findings.append(Finding(sentence, path))
    return findings


def _metadata(subject: Subject) -> Findings:
    metadata = subject.metadata()
    specs = (*metadata.inputs, *metadata.outputs)
    names = [spec.name for spec in specs]
    empty = [kind for kind in ("inputs", "outputs", "classes") if not getattr(metadata, kind)]
    faults = [f"{kind} of the metadata must not be empty." for kind in empty]
    # One namespace for both: in an ONNX graph an output cannot share the name of an input.
    if twice := sorted({name for name in names if names.count(name) > 1}):
        faults.append(f"inputs and outputs of the metadata must have unique names; twice: {twice}.")
    for spec in specs:
        if spec.shape[:1] != ("batch",) or "batch" in spec.shape[1:]:
            faults.append(f"{spec.name!r} must have 'batch' as its first axis only: {spec.shape}.")
    return [Finding(fault, "") for fault in faults]


def _inputs(subject: Subject) -> Findings:
    specs = subject.metadata().inputs
    faults = []
    for rows in subject.batches:
        if len(rows) != len(specs):
            faults.append(f"inputs of the metadata are {len(specs)}, tensors of a row {len(rows)}")
        faults += [f"input {words}" for words in _misfits(rows, specs, len(rows[0]))]
    hint = ". Check get_model_metadata against the pipeline's encoding."
    return [Finding(fault + hint, "") for fault in faults]


def _outputs(subject: Subject) -> Findings:
    model, specs = subject.fresh(), subject.metadata().outputs
    single = tuple(row[:1] for row in subject.batches[0])
    for rows in (single, *subject.batches):
        count, outputs, (logits,) = (len(rows[0]), serve(model, rows), logits_of(model, rows))
        faults = []
        if len(outputs) != len(specs):
            faults.append(f"outputs of the metadata are {len(specs)}, of predict {len(outputs)}")
        faults += [f"output {words}" for words in _misfits(outputs, specs, count)]
        if not logits.is_floating_point() or logits.shape[:1] != (count,):
            got = f"{tuple(logits.shape)} {_dtype(logits)}"
            faults.append(f"forward must give floating logits ({count}, ...); got {got}")
        yield from (Finding(f"{fault}. Check predict and the metadata.", "") for fault in faults)


def _misfits(tensors: Rows, specs: Sequence[TensorSpec], count: int) -> Iterator[str]:
    for tensor, spec in zip(tensors, specs, strict=False):
        wanted = tuple(count if axis == "batch" else axis for axis in spec.shape)
        if tuple(tensor.shape) != wanted or _dtype(tensor) != spec.dtype:
            got = f"{tuple(tensor.shape)} {_dtype(tensor)}"
            yield f"{spec.name!r} must be {wanted} {spec.dtype} for {count} rows; got {got}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _finite(subject: Subject) -> Findings:
    for what, ask, training in _CALLS:
        model = subject.fresh(training=training)
        where = f"{what} in {'train' if training else 'eval'} mode"
        # A batch norm cannot be trained on a single row.
        for rows in (b for b in subject.batches if not training or len(b[0]) > 1):
            if not all(map(audit.is_finite, ask(model, rows))):
                path = audit.first_non_finite(audit.trace(model, partial(ask, model, rows)))
                sentence = f"{where} must give finite numbers on real rows; got NaN or infinity"
                yield Finding(f"{sentence}, first from {named(path)}.", path)
                break


def _deterministic(subject: Subject) -> Findings:
    model, rows = subject.fresh(), subject.batches[0]
    first, second = serve(model, rows), serve(model, rows)
    if same_answers(first, second):
        return
    model = subject.fresh()
    left, right = (audit.trace(model, partial(serve, model, rows)) for _ in range(2))
    path = audit.first_divergence(left, right, same_bits)
    sentence = (
        "predict must give the same bits twice for the same rows in eval mode; got a difference of "
        f"{farthest(first, second):.3g}, first from {named(path)}. Look for randomness or state."
    )
    yield Finding(sentence, path)


def _independent(subject: Subject) -> Findings:
    model, rows = subject.fresh(), subject.batches[0]
    whole = serve(model, rows)
    limits = _limits(subject, whole)
    told: set[str] = set()
    for case in audit.arrangements(subject.batches):
        pairs = zip(serve(model, case.rows), whole, limits, strict=False)
        for index, (got, want, limit) in enumerate(pairs):
            change = audit.row_change(got, want, case)
            if change > limit and case.words not in told:
                told.add(case.words)
                path = _leak(model, rows, case)
                sentence = (
                    f"a row's outputs must not depend on its batch; output {index} changes by "
                    f"{change:.3g} (allowed {limit:.3g}) {case.words}, first in {named(path)}."
                )
                yield Finding(sentence, path)


def _limits(subject: Subject, whole: Rows) -> list[float]:
    """Largest change of each output that float32 explains; integers may not change.

    Kernels for other batch sizes sum in another order. How far that moves the outputs of this model
    is measured by changing the last digit of its weights.
    """
    shaken, generator = subject.fresh(), torch.Generator().manual_seed(0)
    for weight in shaken.parameters():
        if weight.is_floating_point():
            signs = torch.randn(weight.shape, generator=generator).sign().to(weight)
            weight.data.mul_(1 + torch.finfo(weight.dtype).eps * signs)
    limits = []
    for want, nudged in zip(whole, serve(shaken, subject.batches[0]), strict=False):
        scale, noise = _scale(want), 16 * farthest((want,), (nudged,))
        # Capped, so that a model that is all noise does not excuse a leak between rows.
        limits.append(min(1e-5 * scale + noise, 1e-2 * scale))
    return limits


def _scale(tensor: Tensor) -> float:
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    return float(tensor.nan_to_num(0, 0, 0).abs().max())


def _leak(model: Model, rows: Rows, case: Arrangement) -> str:
    """The first module that takes the same rows and gives others in another company."""

    def same(got: Tensor, want: Tensor) -> bool:
        return audit.row_change(got, want, case) <= 1e-4 * _scale(want)

    arranged = audit.trace(model, partial(serve, model, case.rows))
    return audit.first_divergence(arranged, audit.trace(model, partial(serve, model, rows)), same)


def _inputs_kept(subject: Subject) -> Findings:
    for what, call in (("forward", run_forward), ("predict", run_predict)):
        rows = clones(subject.batches[0])
        with torch.no_grad():
            call(subject.fresh(), rows)
            if same_answers(rows, subject.batches[0]):
                continue
            again, model = clones(subject.batches[0]), subject.fresh()
            path = audit.first_writer(model, again, partial(call, model, again))
        sentence = f"{what} must not write to its inputs; {named(path)} did. Work on a copy."
        yield Finding(sentence, path)


def _weights_kept(subject: Subject) -> Findings:
    model = subject.fresh()
    before = audit.footprint(model)
    serve(model, subject.batches[0])
    rule = "predict in eval mode must not write to parameters or buffers; it changed"
    return _changes(rule, before, audit.footprint(model), "value")


def _changes(rule: str, before: audit.Footprint, after: audit.Footprint, *kinds: str) -> Findings:
    for path, names in audit.changed(before, after, *kinds).items():
        yield Finding(f"{rule} {', '.join(names)} of {named(path)}.", path)


def _hooks_fire(subject: Subject) -> Findings:
    rows, told = subject.batches[0], set[str]()
    for what, ask, training in _CALLS:
        model = subject.fresh(training=training)
        counts = audit.count_calls(model, partial(ask, model, rows))
        for path, (entered, fired) in counts.items():
            if entered != fired and path not in told:
                told.add(path)
                sentence = (
                    "a module must be called, so that its hooks fire; during "
                    f"{what} the forward of {named(path)} ran {entered} times and its hooks "
                    f"{fired} times. Write module(x) and self(x), not a call of the method."
                )
                yield Finding(sentence, path)
        if what == "predict" and counts.get("") == (0, 0):
            yield Finding("predict must call self(...), so that hooks fire; it never did.", "")


def _round_trip(subject: Subject) -> Findings:
    original, other, rows = subject.fresh(), subject.fresh(), subject.batches[0]
    state, strays = through_bytes(original), _strays(subject)
    for tensor in _weights(other, state, strays):
        # Keeps variances positive, and nothing but 0.6 as it was.
        tensor.data.mul_(0.5).add_(0.3)
    with suppress(NoAnswerError):
        # A value that the model caches from its old weights must not outlive them.
        serve(other, rows)
    with blamed(other, "load_state_dict of the model's own state"):
        other.load_state_dict(state, strict=True)
    # From one random state: a random predict is the business of another check.
    with audit.isolated():
        expected = serve(original, rows)
    with audit.isolated():
        got = serve(other, rows)
    if same_answers(expected, got):
        return
    left, right = (audit.trace(m, partial(serve, m, rows)) for m in (original, other))
    path = next(iter(strays.values()), audit.first_divergence(left, right, same_bits))
    sentence = (
        "predict must give the same bits once its state_dict went through safetensors; got a "
        f"difference of {farthest(expected, got):.3g}, caused by {', '.join(strays) or named(path)}"
        ". Register tensors as parameters or buffers, and modules in an nn.ModuleList."
    )
    yield Finding(sentence, path)


def _strays(subject: Subject) -> dict[str, str]:
    """Paths, with owners, of unregistered tensors that are trained or that training rewrites.

    Other tensors in plain attributes are constants, which the model's constructor sets again.
    """
    model = subject.fresh(training=True)
    before = {s.path: s.tensor.detach().clone() for s in stray_tensors(model)}
    with suppress(NoAnswerError):
        logits_of(model, subject.batches[0])
    after = {s.path: s.tensor for s in stray_tensors(model)}
    return {
        stray.path: stray.owner
        for stray in stray_tensors(subject.fresh())
        if stray.tensor.requires_grad
        or stray.path not in after
        or not same_bits(before[stray.path], after[stray.path])
    }


def _weights(model: Model, state: Mapping[str, Tensor], strays: Mapping[str, str]) -> Rows:
    buffers = (buffer for name, buffer in model.named_buffers() if name in state)
    loose = (stray.tensor for stray in stray_tensors(model) if stray.path in strays)
    found = (*model.parameters(), *buffers, *loose)
    return tuple(tensor for tensor in found if tensor.is_floating_point())


def _state_kept(subject: Subject) -> Findings:
    model, rows = subject.fresh(), subject.batches[0]
    for path, module in model.named_modules():
        if module.training:
            yield Finding(f"eval() must reach every module; {named(path)} still trains.", path)
    for weight in model.parameters():
        # So that a zero_grad or a backward inside predict leaves a mark.
        weight.grad = torch.ones_like(weight) if weight.requires_grad else None
    rule = "predict must leave modes, hooks, gradients and random state alone; it changed"
    before = audit.footprint(model)
    run_predict(model, clones(rows))
    after = audit.footprint(model)
    yield from _changes(rule, before, after, "mode", "hooks", "grad", "ambient")
    training = subject.fresh(training=True)
    before = audit.footprint(training)
    with suppress(NoAnswerError):
        # A predict that refuses to run in train mode is within its rights.
        serve(training, rows)
    yield from _changes(rule, before, audit.footprint(training), "mode", "hooks")


def _reached_back(subject: Subject, before: audit.Footprint) -> Findings:
    rule = "a deep copy must be independent of its original; calling the copy changed"
    after = audit.footprint(subject.model)
    yield from _changes(rule, before, after, "value", "mode", "hooks", "grad")
    subject.fresh()


_CALLS = (("forward", logits_of, False), ("predict", serve, False), ("forward", logits_of, True))

_RULES: tuple[tuple[str, str, Callable[[Subject], Findings]], ...] = (
    ("conformance", "The model is a Model and no module overrides __call__.", _conformance),
    ("metadata", "The metadata is complete and its names are unique.", _metadata),
    ("inputs", "Real rows have the dtypes and shapes of the metadata.", _inputs),
    ("outputs", "Outputs have the dtypes and shapes of the metadata at any batch size.", _outputs),
    ("finite", "Real rows give finite numbers.", _finite),
    ("determinism", "The same rows give the same bits in eval mode.", _deterministic),
    ("independence", "A row's outputs do not depend on its batch.", _independent),
    ("inputs_kept", "Neither forward nor predict writes to its inputs.", _inputs_kept),
    ("weights_kept", "predict in eval mode writes to no parameter or buffer.", _weights_kept),
    ("hooks", "Every module that runs is called, so that its hooks fire.", _hooks_fire),
    ("round_trip", "The state survives safetensors and a strict load.", _round_trip),
    ("state_kept", "predict leaves modes, hooks, gradients and random state alone.", _state_kept),
)
_COPY_RULE = ("copy", "The model can be deep-copied, and the copy is independent of it.")
