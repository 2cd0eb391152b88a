"""Does a model keep the contract of :class:`components.contract.Model`?

Every check works on a fresh private copy, runs whatever the others found, and blames a module where
one can be blamed. What the rules protect: hooks, which gradient checks and tracing need; answers
row by row, which serving needs; and weights that travel as safetensors.

Legend: B = rows of a batch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from components.contract import Model
from components.validate import call_audit as audit
from components.validate.call_audit import Arrangement, farthest, same_answers, same_bits
from components.validate.contract_hooks import hook_effects
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
from components.validate.contract_schema import (
    conformance,
    inputs_fit,
    metadata_schema,
    outputs_fit,
)
from components.validate.nests import stray_tensors
from components.validate.waivers import Waiver

Findings = Iterable[Finding]


def verify_contract(
    model: Model,
    batches: Sequence[Sequence[Tensor]],
    *,
    fresh: Callable[[], Model] | None = None,
    waivers: Sequence[Waiver] = (),
) -> ContractReport:
    """Run every check of the model contract; the model is left as it was given.

    Args:
        model: The model, in any mode.
        batches: At least three batches of real rows on the model's device, each the tensors
            (B, ...) of the metadata's inputs in order. B may differ; the first has 4 rows or more.
        fresh: Builds the model anew; with it the state must also bring back the answers in an
            instance that never saw the model's weights or attributes.
        waivers: Those of the kind ``hook`` excuse hooks that change gradients.

    Returns:
        A report of all failures. An exception in the model's own code is a failure too.

    Raises:
        ValueError: There are too few batches or rows to check with.
    """
    subject = Subject(model, usable(batches), fresh, tuple(waivers))
    if not isinstance(model, nn.Module):
        return verify_conformance(model)
    before = audit.footprint(model)
    try:
        found = [(name, rule, _findings(check, subject)) for name, rule, check in _RULES]
        reached = _findings(partial(_reached_back, before=before), subject)
        return report_findings([*found, (*_COPY_RULE, reached)])
    finally:
        audit.restore(model, before)


def verify_conformance(model: object) -> ContractReport:
    """Only the check that needs no rows: is this a Model with every member?"""
    return report_findings([(*_CONFORMANCE_RULE, conformance(model))])


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
    return audit.largest(tensor) if tensor.is_floating_point() else 0.0


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
    if (found := _unlike(original, other, rows)) is not None:
        difference, path = found
        path = next(iter(strays.values()), path)
        yield Finding(
            "predict must give the same bits once its state_dict went through safetensors; got a "
            f"difference of {difference:.3g}, caused by {', '.join(strays) or named(path)}. "
            "Register tensors as parameters or buffers, and modules in an nn.ModuleList.",
            path,
        )
    elif subject.factory is not None:
        yield from _rebuilt(subject, subject.factory, state)


def _rebuilt(
    subject: Subject, factory: Callable[[], Model], state: Mapping[str, Tensor]
) -> Findings:
    """The state in an instance that was built anew, as whoever loads the weights has it."""
    original = subject.fresh()
    with blamed(original, "building a fresh instance"):
        other = factory()
    devices = {weight.device for weight in original.parameters()}
    with blamed(other, "load_state_dict of the model's state in a fresh instance"):
        other.to(next(iter(devices), None)).eval()
        other.load_state_dict(state, strict=True)
    if (found := _unlike(original, other, subject.batches[0])) is not None:
        difference, path = found
        yield Finding(
            "a fresh instance that loads the state must give the same bits; got a difference of "
            f"{difference:.3g}, first in {named(path)}. Whatever changes after construction "
            "must be a parameter, a buffer or an argument of the constructor.",
            path,
        )


def _unlike(original: Model, other: Model, rows: Rows) -> tuple[float, str] | None:
    """The largest difference of the answers, and the first module that differs, if any."""
    # From one random state: a random predict is the business of another check.
    with audit.isolated():
        expected = serve(original, rows)
    with audit.isolated():
        got = serve(other, rows)
    if same_answers(expected, got):
        return None
    left, right = (audit.trace(m, partial(serve, m, rows)) for m in (original, other))
    return farthest(expected, got), audit.first_divergence(left, right, same_bits)


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

_CONFORMANCE_RULE = ("conformance", "The model is a Model and no module overrides __call__.")

_RULES: tuple[tuple[str, str, Callable[[Subject], Findings]], ...] = (
    (*_CONFORMANCE_RULE, lambda subject: conformance(subject.model)),
    ("metadata", "The metadata is complete, and its names and labels fit.", metadata_schema),
    ("inputs", "Real rows have the dtypes and shapes of the metadata.", inputs_fit),
    ("outputs", "Outputs have the dtypes, shapes and units of the metadata.", outputs_fit),
    ("finite", "Real rows give finite numbers.", _finite),
    ("determinism", "The same rows give the same bits in eval mode.", _deterministic),
    ("independence", "A row's outputs do not depend on its batch.", _independent),
    ("inputs_kept", "Neither forward nor predict writes to its inputs.", _inputs_kept),
    ("weights_kept", "predict in eval mode writes to no parameter or buffer.", _weights_kept),
    ("hooks", "Every module that runs is called, so that its hooks fire.", _hooks_fire),
    ("hook_effects", "No hook changes answers or gradients.", hook_effects),
    ("round_trip", "The state survives safetensors and a strict load.", _round_trip),
    ("state_kept", "predict leaves modes, hooks, gradients and random state alone.", _state_kept),
)
_COPY_RULE = ("copy", "The model can be deep-copied, and the copy is independent of it.")
