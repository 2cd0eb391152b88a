"""Gradient verification as one line of a team's own tests, under any test runner."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from components.validate.gradients import verify_gradients
from components.validate.gradients.report import GradientReport, TensorCheck
from components.validate.waivers import Waiver

# A fault near the loss fails most tensors of a model; more rows than these help nobody.
SHOWN_TENSORS = 20
_HEADER = ("tensor", "verdict", "cause", "mode", "error", "tolerance")


def assert_gradients(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Sequence[Any],
    *,
    seed: int = 0,
    waivers: Sequence[Waiver] = (),
    optimizer: torch.optim.Optimizer | None = None,
) -> GradientReport:
    """Raise AssertionError unless `verify_gradients`, with the same arguments, passes.

    The message gives the reason, the module at fault, the failing checks and a table of the
    failing tensors. Errors and tolerances in it are relative to the derivative's expected size.

    Raises:
        AssertionError: the report did not pass.
        ValueError: the arguments cannot be verified; see `verify_gradients`.
    """
    __tracebackhide__ = True
    report = verify_gradients(
        model, loss_fn, batches, seed=seed, waivers=waivers, optimizer=optimizer
    )
    if not report.passed:
        raise AssertionError(describe_failure(report, type(model).__name__))
    return report


def describe_failure(report: GradientReport, model: str) -> str:
    """The lines that explain a report that did not pass; `model` is how to call the model."""
    return "\n".join(_lines(report, model))


def _lines(report: GradientReport, model: str) -> Iterator[str]:
    yield f"gradients of {model} are not verified: {report.reason}"
    if report.culprit is not None:
        yield f"module at fault: {report.culprit or 'the model itself'}"
    failed = [check for check in report.checks if not check.passed]
    if failed:
        yield "failed checks:"
        yield from (f"  {check.name}: {check.detail}" for check in failed)
    refused = [t for t in report.tensors if t.refused]
    if refused:
        yield f"failing tensors ({len(refused)} of {len(report.tensors)}):"
        yield from _table([_HEADER, *(_cells(t) for t in refused[:SHOWN_TENSORS])])
    if len(refused) > SHOWN_TENSORS:
        yield f"  and {len(refused) - SHOWN_TENSORS} more"


def _cells(check: TensorCheck) -> tuple[str, ...]:
    numbers = (check.relative_error, check.tolerance)
    measured = ("-" if number is None else f"{number:.1e}" for number in numbers)
    return (check.name, check.verdict.value, check.cause.value, check.mode or "-", *measured)


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield ("  " + "  ".join(cells)).rstrip()
