"""Records of a gradient verification: what was measured, judged and excused."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator


class Verdict(StrEnum):
    """Judgement on one tensor; only PASS, WAIVED and DEGRADED let a report pass."""

    PASS = "PASS"
    FAIL = "FAIL"
    WAIVED = "WAIVED"
    DEGRADED = "DEGRADED"
    UNVERIFIABLE = "UNVERIFIABLE"


class Cause(StrEnum):
    """How the automatic gradient and the finite difference disagree.

    mismatch     both are non-zero and differ
    broken_path  the loss depends on the tensor, the gradient is zero or missing
    surrogate    the gradient is non-zero, the loss does not depend on the tensor locally
    unused       the loss does not depend on the tensor and there is no gradient
    non_finite   the loss or the gradient is NaN or infinite
    """

    MISMATCH = "mismatch"
    BROKEN_PATH = "broken_path"
    SURROGATE = "surrogate"
    UNUSED = "unused"
    NON_FINITE = "non_finite"
    NONE = "none"


class _Record(BaseModel):
    # allow_inf_nan=False: JSON has no such numbers, an unmeasured value is None instead.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TensorCheck(_Record):
    """One parameter tensor: the comparison that decided its verdict.

    `relative_error` and `tolerance` share one unit (the size expected of a directional derivative
    along the tested direction), so `relative_error <= tolerance` means agreement. `step` is the
    relative step h. All three are None where nothing could be compared.
    """

    name: str
    aliases: tuple[str, ...] = ()
    module: str
    verdict: Verdict
    cause: Cause
    relative_error: float | None = None
    tolerance: float | None = None
    step: float | None = None
    mode: str | None = None

    @property
    def refused(self) -> bool:
        """True when this verdict alone makes the report fail."""
        return self.verdict in (Verdict.FAIL, Verdict.UNVERIFIABLE)


class StepCheck(_Record):
    """One named check on the model's structure or on its training step."""

    name: str
    passed: bool
    detail: str


class GradientReport(_Record):
    """Outcome of `verify_gradients`.

    `culprit` is a module path ('' is the model itself), or None where no module is to blame.
    `forwards` counts calls of the loss and replays of single modules; `seconds` is wall time.
    """

    passed: bool
    tensors: tuple[TensorCheck, ...]
    culprit: str | None
    reason: str
    checks: tuple[StepCheck, ...]
    modes: tuple[str, ...]
    forwards: int
    backwards: int
    seconds: float

    @model_validator(mode="after")
    def _passed_follows_from_evidence(self) -> Self:
        if self.passed != evidence_passes(self.tensors, self.checks):
            raise ValueError(
                f"passed must follow from tensors and checks; got passed={self.passed}. "
                "Build it with evidence_passes()."
            )
        return self


def evidence_passes(tensors: tuple[TensorCheck, ...], checks: tuple[StepCheck, ...]) -> bool:
    """True when no tensor is FAIL or UNVERIFIABLE and every check passed."""
    return all(not t.refused for t in tensors) and all(c.passed for c in checks)
