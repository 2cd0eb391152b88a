"""Verifies a model's gradients against finite differences and names the module at fault."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from components.validate.gradients import lint
from components.validate.gradients.blame import assign_blame
from components.validate.gradients.hooks import unharmed
from components.validate.gradients.modes import BATCHES, Finding, examine
from components.validate.gradients.report import (
    GradientReport,
    TensorCheck,
    Verdict,
    evidence_passes,
)
from components.validate.gradients.step import step_checks
from components.validate.gradients.twin import build_native_twin, build_twin, needs_native
from components.validate.waivers import Waiver


def verify_gradients(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Sequence[Any],
    *,
    seed: int = 0,
    waivers: Sequence[Waiver] = (),
    optimizer: torch.optim.Optimizer | None = None,
) -> GradientReport:
    """Compare every parameter's automatic gradient with two-sided differences of the loss.

    Works on a float64 copy; the given model, its gradients and the process's random state stay as
    they are. A tensor fails where two of three points (fresh batches, nudged weights) disagree.
    Train and eval mode are both examined when they differ. Equivalences of a training step are
    checked on the way. After a failure every submodule is replayed alone to find the one at fault.
    Method and error bounds: `probe`.

    Args:
        model: any module; moved nowhere, trained never.
        loss_fn: maps (model, batch) to a tensor with one real floating-point number. It must use
            the model it is handed, which is the copy.
        batches: at least three; each a tensor or a nest of dicts, lists and tuples of tensors.
            The first three are used. Two to four rows each are enough and keep kinks rare.
        seed: of the test directions and of the random state that every evaluation starts from.
        waivers: declared exceptions; a waiver that excuses nothing fails the report.
        optimizer: if given, must hold every trainable parameter of `model`.

    Cost on a model without fault, over both modes: at most 2P + 10 forwards for P tensors up to
    500, about 20 for more; at most 12 backwards. Memory: at most 4 times the model in float64,
    beside the given one.

    An exception of `loss_fn` or the model reaches the caller, with a note on batch and mode.

    Raises:
        ValueError: fewer than three batches, no trainable or an uninitialised parameter, a model
            that cannot be copied, or a loss that is not one number.
    """
    started = time.perf_counter()
    _require_arguments(model, batches, optimizer)
    with torch.inference_mode(False), torch.enable_grad(), unharmed(model):
        data = batches[:BATCHES]
        twin, home = build_twin(model, loss_fn, data, seed)
        try:
            step = step_checks(twin, home, model, waivers=waivers, optimizer=optimizer)
        except RuntimeError as error:
            if not needs_native(twin, error):
                raise
            # Hard-coded float32 on a path that only eval mode takes.
            twin, home = build_native_twin(model, loss_fn, data, seed, twin)
            step = step_checks(twin, home, model, waivers=waivers, optimizer=optimizer)
        examination = examine(twin, home, step.loss, step.away, seed)
        home.gradients.clear()
        tensors = [_judged(finding, waivers) for finding in examination.findings]
        frozen = lint.frozen_tensors(model, waivers)
        registered, owner = lint.hidden_parameters(model)
        checks = [
            registered,
            lint.freezes_declared(frozen),
            lint.modes_consistent(model, waivers),
            lint.forward_keeps_parameters(twin.rewritten, waivers),
            *step.checks,
            lint.waivers_current(waivers, [*tensors, *frozen], model, step.in_use),
        ]
        culprit, reason = assign_blame(
            twin, examination.findings, tensors, checks, owner, seed, step
        )
    rows = (*tensors, *frozen)
    return GradientReport(
        passed=evidence_passes(rows, tuple(checks)),
        tensors=rows,
        culprit=culprit,
        reason=reason,
        checks=tuple(checks),
        modes=tuple(lint.mode_name(training) for training in examination.modes),
        forwards=twin.forwards,
        backwards=twin.backwards,
        seconds=time.perf_counter() - started,
    )


def _judged(finding: Finding, waivers: Sequence[Waiver]) -> TensorCheck:
    slot, rung = finding.slot, finding.comparison.rung if finding.comparison else None
    verdict = finding.verdict
    if verdict is Verdict.FAIL and lint.excused(finding.cause, slot.name, slot.aliases, waivers):
        verdict = Verdict.WAIVED
    # Where loss and gradient are both exactly zero there is no scale; the error is zero as well.
    scale = (rung.scale or 1.0) if rung else math.nan
    return TensorCheck(
        name=slot.name,
        aliases=slot.aliases,
        module=slot.name.rpartition(".")[0],
        verdict=verdict,
        cause=finding.cause,
        relative_error=_finite(rung.error / scale) if rung else None,
        tolerance=_finite(rung.tolerance / scale) if rung else None,
        step=rung.h if rung else None,
        mode=lint.mode_name(finding.training),
    )


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _require_arguments(model: nn.Module, batches: Sequence[Any], optimizer: object) -> None:
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            "optimizer must be a torch.optim.Optimizer or None; got "
            f"{type(optimizer).__name__}. Build it with model.parameters() and pass the instance."
        )
    if not isinstance(batches, Sequence) or len(batches) < BATCHES:
        got = len(batches) if isinstance(batches, Sequence) else type(batches).__name__
        raise ValueError(
            f"batches must be a sequence of at least {BATCHES} small batches; got {got}. "
            "Pass a list such as [next(loader) for _ in range(3)]."
        )
    parameters = list(model.parameters())
    unready = [p for p in parameters if nn.parameter.is_lazy(p) or p.is_meta]
    if unready:
        raise ValueError(
            f"every parameter must hold values; got {len(unready)} lazy or meta parameters. "
            "Run one forward or load the weights first."
        )
    if not any(p.requires_grad and p.numel() for p in parameters):
        raise ValueError(
            "model must have at least one registered parameter with requires_grad=True; got "
            f"{len(parameters)} parameters, none of them trainable, in {type(model).__name__}. "
            "Register parameters with nn.Parameter and unfreeze what is to be trained."
        )
