"""Which hooks change what a model answers or learns?

A hook stands neither in the weights nor in forward, so a model whose numbers depend on one is not
the model that is exported, reviewed or rebuilt. Hooks that only look on are welcome, and those by
which PyTorch itself computes a weight (``torch.nn.utils``) are part of the model.

Hooks that run after a gradient was accumulated are not called here: they may step an optimiser. The
gradient verification looks at them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import nn

from components.contract import Model
from components.validate import call_audit as audit
from components.validate.contract_report import (
    Finding,
    NoAnswerError,
    Rows,
    Subject,
    blamed,
    clones,
    logits_of,
    named,
    run_forward,
    serve,
)
from components.validate.waivers import Waiver

HOOK_WAIVER = "hook"
"""Kind of a waiver that excuses a hook that changes gradients, by module or parameter."""

_MODULE_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
_TENSOR_HOOK = "tensor hook"
_ROUNDING = 1e-6
"""Largest difference, relative to the largest number, that is none."""


_Ask = Callable[[Subject, Sequence["_Hook"], Sequence["_Hook"]], Rows | None]


@dataclass(frozen=True)
class _Hook:
    """A hook of the module, or parameter, at ``path``; ``key`` is its place there."""

    path: str
    kind: str
    key: int
    function: Callable[..., object]

    @property
    def words(self) -> str:
        kind = _MODULE_HOOKS.get(self.kind, self.kind)
        return f"the {kind} {_name(self.function)} of {named(self.path)}"

    @property
    def module(self) -> str:
        return self.path.rpartition(".")[0] if self.kind == _TENSOR_HOOK else self.path


def hook_effects(subject: Subject) -> Iterable[Finding]:
    """Name every hook without which answers or gradients are others."""
    hooks = _hooks(subject.model)
    named_already: list[_Hook] = []
    for what, ask in (("answers", _answers), ("gradients", _gradients)):
        # A hook that changes answers changes gradients as well, and is named once.
        hooks = [hook for hook in hooks if hook not in named_already]
        for hook in _effective(subject, hooks, ask):
            named_already.append(hook)
            if what == "answers" or not _excused(hook, subject.waivers):
                yield _finding(hook, what)


def _effective(subject: Subject, hooks: Sequence[_Hook], ask: _Ask) -> Sequence[_Hook]:
    """Those without which the numbers are others; where none does it alone, all of them."""
    if not hooks:
        return ()
    whole = ask(subject, hooks, ())
    if _agree(whole, ask(subject, hooks, hooks)):
        return ()
    alone = [hook for hook in hooks if not _agree(whole, ask(subject, hooks, (hook,)))]
    return alone or hooks


def _finding(hook: _Hook, what: str) -> Finding:
    hint = "Put the computation into forward"
    hint += ", or declare a waiver of the kind 'hook'" if what == "gradients" else ""
    sentence = f"hooks must leave {what} alone; {hook.words} changes them. {hint}."
    return Finding(sentence, hook.module)


def _hooks(model: nn.Module) -> list[_Hook]:
    found = [
        _Hook(path, kind, key, function)
        for path, module in audit.hookable(model)
        for kind in _MODULE_HOOKS
        for key, function in vars(module)[kind].items()
        if not _is_torch(function)
    ]
    for path, parameter in model.named_parameters():
        for key, function in (parameter._backward_hooks or {}).items():
            if not _is_torch(function):
                found.append(_Hook(path, _TENSOR_HOOK, key, function))
    return found


def _answers(subject: Subject, hooks: Sequence[_Hook], without: Sequence[_Hook]) -> Rows | None:
    """What predict gives in eval mode and forward in train mode; None where the model raises."""
    try:
        with audit.isolated():
            served = serve(_arranged(subject, False, hooks, without), subject.batches[0])
            return served + logits_of(_arranged(subject, True, hooks, without), subject.batches[0])
    except NoAnswerError:
        return None


def _gradients(subject: Subject, hooks: Sequence[_Hook], without: Sequence[_Hook]) -> Rows | None:
    """Of a fixed weighted sum of the logits, by parameter; None where the model raises."""
    model = _arranged(subject, True, hooks, without)
    try:
        with audit.isolated(), blamed(model, "backward"):
            rows = clones(subject.batches[0])
            for row in rows:  # or a backward hook of the first module would see no gradient
                row.requires_grad_(row.is_floating_point())
            logits = run_forward(model, rows)
            weights = torch.linspace(-1.0, 1.0, logits.numel()).reshape(logits.shape)
            if logits.requires_grad:
                torch.autograd.backward((logits * weights.to(logits)).sum())
    except NoAnswerError:
        return None
    return tuple(p.new_zeros(()) if p.grad is None else p.grad for p in model.parameters())


def _agree(left: Rows | None, right: Rows | None) -> bool:
    if left is None or right is None:
        return left is right
    pairs = zip(left, right, strict=False)
    return len(left) == len(right) and all(
        audit.farthest((a.detach(),), (b.detach(),)) <= _ROUNDING * audit.largest(a)
        for a, b in pairs
    )


def _arranged(
    subject: Subject, training: bool, hooks: Sequence[_Hook], without: Sequence[_Hook]
) -> Model:
    """A private copy without some hooks of modules, with those of tensors, which copying drops."""
    model = subject.fresh(training=training)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for hook in hooks:
        if hook.kind != _TENSOR_HOOK:
            if hook in without:
                vars(modules[hook.path])[hook.kind].pop(hook.key, None)
        elif hook not in without and parameters[hook.path].requires_grad:
            parameters[hook.path].register_hook(hook.function)  # type: ignore[no-untyped-call]
    return model


def _excused(hook: _Hook, waivers: Sequence[Waiver]) -> bool:
    kinds = [waiver for waiver in waivers if waiver.kind == HOOK_WAIVER]
    return any(fnmatchcase(hook.path, waiver.tensor) for waiver in kinds)


def _is_torch(function: object) -> bool:
    inner = function.func if isinstance(function, partial) else function
    return str(getattr(inner, "__module__", "")).partition(".")[0] == "torch"


def _name(function: object) -> str:
    inner = function.func if isinstance(function, partial) else function
    return str(getattr(inner, "__qualname__", type(inner).__qualname__)).rpartition("<locals>.")[2]
