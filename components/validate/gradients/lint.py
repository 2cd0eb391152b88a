"""Structure checks that need no forward pass, and what waivers excuse."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import combinations

import torch
from torch import Tensor, nn

from components.validate.gradients.report import Cause, StepCheck, TensorCheck, Verdict
from components.validate.gradients.slots import storage_key
from components.validate.nests import stray_tensors
from components.validate.waivers import Waiver, WaiverKind

EXCUSES: Mapping[WaiverKind, frozenset[Cause]] = {
    WaiverKind.UNUSED: frozenset({Cause.UNUSED}),
    # Where a replaced or stopped path runs beside an intact one, the sum is a mismatch.
    WaiverKind.SURROGATE: frozenset({Cause.SURROGATE, Cause.MISMATCH}),
    WaiverKind.STOP_GRADIENT: frozenset({Cause.BROKEN_PATH, Cause.MISMATCH}),
    WaiverKind.FROZEN: frozenset(),
    WaiverKind.MODE: frozenset(),
    WaiverKind.ROWS: frozenset(),
    # What a hook does to a gradient decides how it differs from the derivative.
    WaiverKind.HOOK: frozenset({Cause.MISMATCH, Cause.BROKEN_PATH, Cause.SURROGATE}),
    WaiverKind.COPY: frozenset(),
}
# Names of parameters in torch's own layers; with other endings pruning keeps masks in buffers.
_LAYER_PARAMETERS = re.compile(r"(in_proj_)?(weight|bias)(_[ih]h_l\d+(_reverse)?)?")
# Kinds that only checks of the training step can find in use.
_STEP_KINDS = frozenset({WaiverKind.ROWS, WaiverKind.HOOK, WaiverKind.COPY})
# Fewer distinct values than this are a pattern (zeros, ones, an identity), not a copy.
_DISTINCT = 8


@dataclass(frozen=True)
class StepFinding:
    """A check, the module to blame if it failed, and the waivers that it made use of."""

    check: StepCheck
    culprit: str | None = None
    in_use: frozenset[Waiver] = frozenset()


def finding(
    name: str,
    detail: str,
    *,
    passed: bool = True,
    culprit: str | None = None,
    in_use: Iterable[Waiver] = (),
) -> StepFinding:
    """A step finding; a passed check blames no module."""
    check = StepCheck(name=name, passed=passed, detail=detail)
    return StepFinding(check, None if passed else culprit, frozenset(in_use))


def hidden_parameters(model: nn.Module) -> tuple[StepCheck, str | None]:
    """Tensors that should be parameters but are not, with the last owner's path.

    Leaves that require grad, in plain attributes or buffers, and weights of torch's own layers.
    """
    strays = (s for s in stray_tensors(model) if s.tensor.requires_grad and s.tensor.is_leaf)
    hidden = [*((s.path, s.owner) for s in strays), *_misplaced(model)]
    detail = (
        f"not registered as parameters: {listed(path for path, _ in hidden)}; use nn.Parameter "
        "attributes, nn.ParameterList or nn.ModuleList"
        if hidden
        else "every tensor that requires grad is a registered parameter"
    )
    owner = hidden[-1][1] if hidden else None
    return StepCheck(name="parameters_registered", passed=not hidden, detail=detail), owner


def _misplaced(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Buffers (name, path of the module) that are trained, or hold the weight of a layer."""
    for path, module in model.named_modules():
        kinds = [k for k in type(module).__mro__ if k.__module__.startswith("torch.nn.modules.")]
        is_layer = bool(kinds) and kinds[0] is not nn.Module
        # A weighted loss keeps its class weights in a buffer.
        is_layer = is_layer and not isinstance(module, nn.modules.loss._Loss)
        for name, buffer in module.named_buffers(recurse=False):
            trained = buffer.requires_grad and buffer.is_leaf
            if trained or (is_layer and _LAYER_PARAMETERS.fullmatch(name)):
                yield (f"{path}.{name}" if path else name), path


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
        f"requires_grad=False without a 'frozen' waiver: {listed(open_names)}"
        if open_names
        else f"{len(frozen)} frozen parameters, all declared"
    )
    return StepCheck(name="freezes_declared", passed=not open_names, detail=detail)


def modes_consistent(model: nn.Module, waivers: Sequence[Waiver]) -> StepCheck:
    """Passes when all modules share the model's train/eval mode, or are waived by path."""
    odd = _odd_modes(model, waivers)
    mode = mode_name(model.training)
    detail = (
        f"the model is in {mode} mode but these are not: {listed(odd)}; "
        "call train() or eval() on the whole model or waive them with kind 'mode'"
        if odd
        else f"all modules are in {mode} mode or waived"
    )
    return StepCheck(name="modes_consistent", passed=not odd, detail=detail)


def structural_fault(
    model: nn.Module, rewritten: Collection[str], waivers: Sequence[Waiver]
) -> tuple[str, str] | None:
    """Where mode, freezing or a parameter that forward wrote to is undeclared: module, reason."""
    written = [name for name in rewritten if not any(covers(w, name) for w in waivers)]
    if written:
        owner = common_module(written)
        return owner, f"forward or backward wrote to parameters of {label(model, owner)}"
    odd = _odd_modes(model, waivers)
    if odd:
        mode = mode_name(not model.training)
        return odd[0], f"{label(model, odd[0])} is in {mode} mode, unlike the model"
    frozen = [t.name for t in frozen_tensors(model, waivers) if t.verdict is Verdict.FAIL]
    if frozen:
        owner = common_module(frozen)
        return owner, f"parameters of {label(model, owner)} are frozen without a waiver"
    return None


def _odd_modes(model: nn.Module, waivers: Sequence[Waiver]) -> list[str]:
    named = [w.tensor for w in waivers if w.kind is WaiverKind.MODE]
    return [
        path
        for path, module in model.named_modules()
        if module.training != model.training and not any(fnmatchcase(path, glob) for glob in named)
    ]


def optimizer_covers(model: nn.Module, optimizer: torch.optim.Optimizer) -> StepCheck:
    """Passes when each trainable parameter (or one tied to it) is in a parameter group."""
    held = {storage_key(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and storage_key(parameter) not in held
    ]
    detail = (
        f"not in any parameter group: {listed(missing)}; build the optimiser from "
        "model.parameters() after the model is final"
        if missing
        else "every trainable parameter is in a parameter group"
    )
    return StepCheck(name="optimizer_covers_parameters", passed=not missing, detail=detail)


def waivers_current(
    waivers: Sequence[Waiver],
    tensors: Sequence[TensorCheck],
    model: nn.Module,
    in_use: Collection[Waiver] = (),
) -> StepCheck:
    """Passes when every waiver excuses all that it names, and names something.

    `in_use` are the waivers that checks of the training step made use of.
    """
    odd = {path for path, module in model.named_modules() if module.training != model.training}
    stale = [w for w in waivers if w not in in_use and not _is_current(w, tensors, odd)]
    detail = (
        "excusing nothing, or not all that they name: "
        + listed(f"{w.tensor} ({w.kind})" for w in stale)
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


def forward_keeps_parameters(changed: Collection[str], waivers: Sequence[Waiver]) -> StepCheck:
    """Passes when no forward or backward wrote to a parameter that is not waived."""
    open_names = [n for n in changed if not any(covers(w, n) for w in waivers)]
    detail = (
        f"forward or backward wrote to: {listed(open_names)}; only the optimiser may"
        if open_names
        else "forward and backward left the parameters as they were"
    )
    return StepCheck(name="forward_keeps_parameters", passed=not open_names, detail=detail)


def mode_name(training: bool) -> str:
    """'train' or 'eval'."""
    return "train" if training else "eval"


def eval_reaches_modules(
    model: nn.Module, switched: Sequence[str], waivers: Sequence[Waiver]
) -> StepFinding:
    """Passes when `eval()` on a copy of the model reaches every module, or waivers name the rest.

    `switched` are modules that an evaluation in eval mode put back into train mode. In train mode
    a module keeps dropping units and averaging over batches at prediction.
    """
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    stuck = [path for path, module in model.named_modules() if module.training]
    stuck += [path for path in switched if path not in stuck]
    for module, training in flags:
        module.training = training
    named = {w: [p for p in stuck if fnmatchcase(p, w.tensor)] for w in waivers}
    used = [w for w, paths in named.items() if w.kind is WaiverKind.MODE and paths]
    open_paths = [p for p in stuck if not any(p in named[w] for w in used)]
    detail = (
        f"in train mode though the model is in eval mode: {listed(open_paths)}; train(mode) must "
        "pass mode on and forward must not set it, or waive them with kind 'mode'"
        if open_paths
        else "eval() on the model reaches every module that is not waived"
    )
    # A parent comes before its children: the outermost one did not pass the mode on.
    culprit = next(iter(open_paths), None)
    return finding(
        "eval_reaches_modules", detail, passed=not open_paths, culprit=culprit, in_use=used
    )


def copied_ties(model: nn.Module, waivers: Sequence[Waiver]) -> StepFinding:
    """Passes when no two trainable parameters of different roles start with equal values.

    Equal values under one attribute name of one class are clones of a layer, as
    nn.TransformerEncoder makes them. Elsewhere they are a tie that was copied instead of shared:
    the two drift apart in training.
    """
    pairs = _equal_pairs(model)
    used = {
        w: [pair for pair in pairs if any(covers(w, name) for name in pair)]
        for w in waivers
        if w.kind is WaiverKind.COPY
    }
    open_pairs = [pair for pair in pairs if not any(pair in found for found in used.values())]
    detail = (
        f"equal values in separate memory: {listed(f'{a} and {b}' for a, b in open_pairs)}; "
        "assign the Parameter itself to tie them, or waive one with kind 'copy'"
        if open_pairs
        else "no parameter is a copy of another one of a different role"
    )
    culprit = open_pairs[0][1].rpartition(".")[0] if open_pairs else None
    in_use = [w for w, found in used.items() if found]
    return finding(
        "ties_share_memory", detail, passed=not open_pairs, culprit=culprit, in_use=in_use
    )


def _equal_pairs(model: nn.Module) -> list[tuple[str, str]]:
    alike: dict[tuple[object, ...], list[tuple[str, tuple[type, str], Tensor]]] = {}
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad and p.numel() >= _DISTINCT and not p.is_sparse:
                key = (p.shape, p.dtype, p.device, float(p.detach().abs().sum()))
                full = f"{path}.{name}" if path else name
                alike.setdefault(key, []).append((full, (type(module), name), p.detach()))
    return [
        (first, second)
        for group in alike.values()
        for (first, role, one), (second, other_role, other) in combinations(group, 2)
        if role != other_role and _is_copy(one, other)
    ]


def _is_copy(one: Tensor, other: Tensor) -> bool:
    if storage_key(one) == storage_key(other) or not torch.equal(one, other):
        return False
    if len(torch.unique(torch.view_as_real(one) if one.is_complex() else one)) < _DISTINCT:
        return False
    # Evenly spaced values are a grid, such as the centres of radial basis functions.
    return one.ndim > 1 or bool((torch.diff(one, n=2).abs() > 1e-4 * one.abs().max()).any())


def _is_current(waiver: Waiver, tensors: Sequence[TensorCheck], odd_modules: set[str]) -> bool:
    if waiver.kind is WaiverKind.MODE:
        return any(fnmatchcase(path, waiver.tensor) for path in odd_modules)
    if waiver.kind in _STEP_KINDS:
        return False
    named = [t for t in tensors if covers(waiver, t.name, t.aliases)]
    if waiver.kind is WaiverKind.FROZEN:
        # A frozen record carries no cause; every other waived record does.
        return bool(named) and all(
            t.verdict is Verdict.WAIVED and t.cause is Cause.NONE for t in named
        )
    # A verdict that says nothing about agreement does not make the waiver stale.
    blind = {Verdict.UNVERIFIABLE, Verdict.FAIL}
    return bool(named) and all(t.cause in EXCUSES[waiver.kind] or t.verdict in blind for t in named)


def listed(names: Iterable[str]) -> str:
    """The names in one line."""
    return ", ".join(names)


def common_module(names: Sequence[str]) -> str:
    """The innermost module path that contains every named parameter."""
    shared = names[0].split(".")[:-1]
    for name in names[1:]:
        parts = name.split(".")[:-1]
        equal = [a == b for a, b in zip(shared, parts, strict=False)]
        shared = shared[: equal.index(False) if False in equal else len(equal)]
    return ".".join(shared)


def label(model: nn.Module, path: str) -> str:
    """How a sentence calls a module: its path and class."""
    # Not get_submodule, which modules compiled by TorchScript refuse.
    kind = type(dict(model.named_modules(remove_duplicate=False))[path]).__name__
    return f"'{path}' ({kind})" if path else f"the model itself ({kind})"
