"""Structure checks that need no forward pass, and the checks of one training step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from components.validate.gradient_nests import stray_tensors
from components.validate.gradient_report import (
    Cause,
    StepCheck,
    TensorCheck,
    Verdict,
    Waiver,
    WaiverKind,
)
from components.validate.gradient_slots import Reading, storage_key
from components.validate.gradient_twin import Twin

EXCUSES: Mapping[WaiverKind, frozenset[Cause]] = {
    WaiverKind.UNUSED: frozenset({Cause.UNUSED}),
    # Where a replaced or stopped path runs beside an intact one, the sum is a mismatch.
    WaiverKind.SURROGATE: frozenset({Cause.SURROGATE, Cause.MISMATCH}),
    WaiverKind.STOP_GRADIENT: frozenset({Cause.BROKEN_PATH, Cause.MISMATCH}),
    WaiverKind.FROZEN: frozenset(),
    WaiverKind.MODE: frozenset(),
}
# Two identical backward passes may differ by the summation order of a parallel device.
_REPEAT_UNITS = 1e4


def hidden_parameters(model: nn.Module) -> tuple[StepCheck, str | None]:
    """Leaf tensors that require grad but are not registered, with the last owner's path."""
    hidden = [s for s in stray_tensors(model) if s.tensor.requires_grad and s.tensor.is_leaf]
    detail = (
        f"not registered: {_listed(s.path for s in hidden)}; use nn.Parameter attributes, "
        "nn.ParameterList or nn.ModuleList"
        if hidden
        else "every tensor that requires grad is a registered parameter"
    )
    owner = hidden[-1].owner if hidden else None
    return StepCheck(name="parameters_registered", passed=not hidden, detail=detail), owner


def frozen_tensors(model: nn.Module, waivers: Sequence[Waiver]) -> list[TensorCheck]:
    """One record per parameter with requires_grad=False: WAIVED if declared frozen, else FAIL."""
    checks = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            waived = any(w.kind is WaiverKind.FROZEN and covers(w, name) for w in waivers)
            verdict = Verdict.WAIVED if waived else Verdict.FAIL
            module = name.rpartition(".")[0]
            checks.append(TensorCheck(name=name, module=module, verdict=verdict, cause=Cause.NONE))
    return checks


def freezes_declared(frozen: Sequence[TensorCheck]) -> StepCheck:
    """Passes when every frozen parameter has a waiver."""
    open_names = [check.name for check in frozen if check.verdict is Verdict.FAIL]
    detail = (
        f"requires_grad=False without a 'frozen' waiver: {_listed(open_names)}"
        if open_names
        else f"{len(frozen)} frozen parameters, all declared"
    )
    return StepCheck(name="freezes_declared", passed=not open_names, detail=detail)


def modes_consistent(model: nn.Module, waivers: Sequence[Waiver]) -> StepCheck:
    """Passes when all modules share the model's train/eval mode, or are waived by path."""
    odd = [
        path
        for path, module in model.named_modules()
        if module.training != model.training
        and not any(w.kind is WaiverKind.MODE and fnmatchcase(path, w.tensor) for w in waivers)
    ]
    mode = mode_name(model.training)
    detail = (
        f"the model is in {mode} mode but these are not: {_listed(odd)}; "
        "call train() or eval() on the whole model or waive them with kind 'mode'"
        if odd
        else f"all modules are in {mode} mode or waived"
    )
    return StepCheck(name="modes_consistent", passed=not odd, detail=detail)


def optimizer_covers(model: nn.Module, optimizer: torch.optim.Optimizer) -> StepCheck:
    """Passes when each trainable parameter (or one tied to it) is in a parameter group."""
    held = {storage_key(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and storage_key(parameter) not in held
    ]
    detail = (
        f"not in any parameter group: {_listed(missing)}; build the optimiser from "
        "model.parameters() after the model is final"
        if missing
        else "every trainable parameter is in a parameter group"
    )
    return StepCheck(name="optimizer_covers_parameters", passed=not missing, detail=detail)


def waivers_current(
    waivers: Sequence[Waiver], tensors: Sequence[TensorCheck], model: nn.Module
) -> StepCheck:
    """Passes when every waiver excuses all that it names, and names something."""
    odd = {path for path, module in model.named_modules() if module.training != model.training}
    stale = [w for w in waivers if not _is_current(w, tensors, odd)]
    detail = (
        "excusing nothing, or not all that they name: "
        + _listed(f"{w.tensor} ({w.kind})" for w in stale)
        + "; remove or narrow them"
        if stale
        else f"{len(waivers)} waivers, all in use"
    )
    return StepCheck(name="waivers_current", passed=not stale, detail=detail)


def covers(waiver: Waiver, name: str, aliases: Iterable[str] = ()) -> bool:
    """True when the waiver's name or glob matches the tensor under any of its names."""
    return any(fnmatchcase(candidate, waiver.tensor) for candidate in (name, *aliases))


def excused(cause: Cause, name: str, aliases: Iterable[str], waivers: Sequence[Waiver]) -> bool:
    """True when some waiver of a fitting kind covers the tensor."""
    known = tuple(aliases)
    return any(cause in EXCUSES[w.kind] and covers(w, name, known) for w in waivers)


def repeat_checks(twin: Twin, first: Reading) -> tuple[list[StepCheck], list[float]]:
    """Two more backward passes on batch 0, right after `first` was read from it.

    The first one accumulates and must double every gradient, the second follows the model's own
    zero_grad and must reproduce it. Returns the checks and the two losses.
    """
    losses = [twin.backward(0)]
    doubled = twin.gradients()
    twin.model.zero_grad()
    losses.append(twin.backward(0))
    repeated = twin.gradients()
    bound = _REPEAT_UNITS * torch.finfo(torch.float32 if twin.native else torch.float64).eps
    drifting = _differing(first.gradients, repeated, 1.0, bound)
    nonlinear = _differing(first.gradients, doubled, 2.0, bound)
    repeats = StepCheck(
        name="zero_grad_repeats",
        passed=not drifting,
        detail=f"a second identical step gave other gradients: {_listed(drifting)}"
        if drifting
        else "two identical steps with zero_grad between them gave the same gradients",
    )
    adds = StepCheck(
        name="accumulation_adds",
        passed=not nonlinear,
        detail=f"two backward passes did not double: {_listed(nonlinear)}"
        if nonlinear
        else "two backward passes without zero_grad doubled every gradient",
    )
    return [repeats, adds], losses


def forward_keeps_parameters(changed: Collection[str], waivers: Sequence[Waiver]) -> StepCheck:
    """Passes when no forward or backward wrote to a parameter that is not waived."""
    open_names = [n for n in changed if not any(covers(w, n) for w in waivers)]
    detail = (
        f"forward or backward wrote to: {_listed(open_names)}; only the optimiser may"
        if open_names
        else "forward and backward left the parameters as they were"
    )
    return StepCheck(name="forward_keeps_parameters", passed=not open_names, detail=detail)


def mode_name(training: bool) -> str:
    """'train' or 'eval'."""
    return "train" if training else "eval"


def _is_current(waiver: Waiver, tensors: Sequence[TensorCheck], odd_modules: set[str]) -> bool:
    if waiver.kind is WaiverKind.MODE:
        return any(fnmatchcase(path, waiver.tensor) for path in odd_modules)
    named = [t for t in tensors if covers(waiver, t.name, t.aliases)]
    if waiver.kind is WaiverKind.FROZEN:
        # A frozen record carries no cause; every other waived record does.
        return bool(named) and all(
            t.verdict is Verdict.WAIVED and t.cause is Cause.NONE for t in named
        )
    # A verdict that says nothing about agreement does not make the waiver stale.
    blind = {Verdict.UNVERIFIABLE, Verdict.FAIL}
    return bool(named) and all(t.cause in EXCUSES[waiver.kind] or t.verdict in blind for t in named)


def _differing(
    reference: Mapping[str, Tensor | None],
    measured: Mapping[str, Tensor | None],
    factor: float,
    bound: float,
) -> list[str]:
    names = []
    for name, expected in reference.items():
        got = measured[name]
        if expected is None or got is None:
            same = expected is None and got is None
        else:
            gap, size = float((got - factor * expected).norm()), factor * float(expected.norm())
            same = gap <= bound * size
        if not same:
            names.append(name)
    return names


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
