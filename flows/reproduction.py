"""What ``assay reproduce`` prints for people: a table and a sentence."""

import re

from components.reproduce import Check, Reproduction

_DIGEST = re.compile(r"[0-9a-f]{64}")
_AGREES = {True: "yes", False: "NO", None: "-"}


def describe(found: Reproduction) -> str:
    """Digests, what of the environment differs, notes, and the verdict."""
    same = sum(check.agrees is True for check in found.environment)
    rows = [("what", "recorded", "rebuilt", "agrees")]
    rows += [_row(check) for check in found.checks]
    rows += [_row(check) for check in found.environment if not check.agrees]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]
    code = "that is here" if found.code == "here" else f"of commit {found.code[:12]}"
    lines += [
        "",
        f"environment  {same} of {len(found.environment)} items are as recorded",
        f"code         {code}",
        f"mlflow run   {found.mlflow_run_id}",
        f"seconds      {found.seconds:.1f}",
        *_difference(found),
        *(f"note         {note}" for note in found.notes),
        "",
        found.verdict,
    ]
    return "\n".join(lines)


def _row(check: Check) -> tuple[str, str, str, str]:
    return check.what, _short(check.recorded), _short(check.rebuilt), _AGREES[check.agrees]


def _short(text: str) -> str:
    return text[:12] if _DIGEST.fullmatch(text) else text


def _difference(found: Reproduction) -> list[str]:
    if found.difference is None:
        return []
    lines = [
        f"difference   {gap:.3e} at most in output {name}, on the golden rows"
        for name, gap in found.difference.outputs.items()
    ]
    if found.difference.weight is not None:
        weight, tensor = found.difference.weight, found.difference.tensor
        lines.insert(0, f"difference   {weight:.3e} at most in a weight, in {tensor}")
    return lines
