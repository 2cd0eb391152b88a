"""``assay verify``: contract, gradients and source of a component, without data or a server."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from components.errors import GateError
from components.validate.component import ComponentReport, verify_component
from components.validate.contract_report import ContractReport, named
from components.validate.gradients.report import GradientReport, Verdict
from components.validate.source import SourceReport

_MOST = 10
"""Tensors that are listed one by one."""


def verify(target: str, *, as_json: bool) -> int:
    """Verify a component and print what was found.

    Args:
        target: ``module:name``, where the current folder is importable, or a pipeline's name.
        as_json: Print the report as one JSON object.

    Returns:
        0 when everything passed, 3 when something did not.

    Raises:
        ConfigError: The target cannot be imported or built.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    with _stdout_to_stderr():
        report = verify_component(target)
    print(report.model_dump_json() if as_json else describe(report))
    return 0 if report.passed else GateError.exit_code


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Whatever the component and its child processes print, stdout holds the report alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def describe(report: ComponentReport) -> str:
    """The report for people: one line of verdict for each part, then what is wrong."""
    lines = [("component", f"{report.target}: {'passed' if report.passed else 'rejected'}")]
    lines += _headed("source", *_source(report.source))
    lines += _headed("contract", *_contract(report.contract))
    lines += _headed("gradients", *_gradients(report.gradients))
    lines += [("trouble", f"{trouble.rstrip('.')}.") for trouble in report.trouble]
    if report.culprit is not None:
        lines.append(("culprit", named(report.culprit)))
    lines.append(("seconds", f"{report.seconds:.1f}"))
    width = max(len(head) for head, _ in lines)
    return "\n".join(f"{head:<{width}}  {text}" for head, text in lines)


def _headed(head: str, verdict: str, details: Iterator[str]) -> list[tuple[str, str]]:
    return [(head, verdict), *(("", f"- {detail}") for detail in details)]


def _source(report: SourceReport) -> tuple[str, Iterator[str]]:
    hidden = f", {report.suppressed} findings hidden by nosec" if report.suppressed else ""
    count = f"{len(report.files)} {'file' if len(report.files) == 1 else 'files'}"
    verdict = f"{_verdict(report.passed)}: {count}{hidden}"
    return verdict, (f"{f.sentence}  {f.code}  ({f.rule})" for f in report.findings)


def _contract(report: ContractReport | None) -> tuple[str, Iterator[str]]:
    if report is None:
        return "not looked at", iter(())
    failed = [check for check in report.checks if not check.passed]
    count = f"{len(report.checks) - len(failed)} of {len(report.checks)} checks hold"
    return f"{_verdict(report.passed)}: {count}", (f"{c.name}: {c.detail}" for c in failed)


def _gradients(report: GradientReport | None) -> tuple[str, Iterator[str]]:
    if report is None:
        return "not looked at", iter(())
    good = sum(not t.refused for t in report.tensors)
    checks = sum(check.passed for check in report.checks)
    count = (
        f"{good} of {len(report.tensors)} tensors and {checks} of {len(report.checks)} checks hold"
    )
    degraded = [t.name for t in report.tensors if t.verdict is Verdict.DEGRADED]
    if degraded:
        more = ", ..." if len(degraded) > _MOST else ""
        count += f"; only to float32 accuracy: {', '.join(degraded[:_MOST])}{more}"
    return f"{_verdict(report.passed)}: {count}", _gradient_faults(report)


def _gradient_faults(report: GradientReport) -> Iterator[str]:
    if report.passed:
        return
    told = [c for c in report.checks if not c.passed and c.detail in report.reason]
    if not told:  # else the check itself is listed below
        yield f"{report.reason.rstrip('.')}."
    doubtful = [t for t in report.tensors if t.refused]
    for tensor in doubtful[:_MOST]:
        error = ""
        if tensor.relative_error is not None and tensor.tolerance is not None:
            error = f", relative error {tensor.relative_error:.3g} (allowed {tensor.tolerance:.3g})"
        yield f"{tensor.name}: {tensor.verdict} {tensor.cause}{error}"
    if len(doubtful) > _MOST:
        yield f"... and {len(doubtful) - _MOST} more tensors"
    yield from (f"{c.name}: {c.detail}" for c in report.checks if not c.passed)


def _verdict(passed: bool) -> str:
    return "passed" if passed else "failed"
