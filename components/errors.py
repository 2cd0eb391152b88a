"""The one exception tree.

    AssayError
    ├── UsageError             exit 2  the caller asked for something that cannot be
    │   ├── ConfigError                a setting or a parameter is unknown or ill-typed
    │   ├── DataError                  the data cannot be used: missing, corrupt, out of range
    │   └── ContractError              a component breaks its interface before anything ran
    ├── GateError              exit 3  a gate looked at the candidate and said no
    └── InfrastructureError    exit 1  a server, a disk or a device failed
        └── ConflictError              another process moved the champion first

Every message names the rule, what arrived, and the next step. A gate's refusal carries its stage
and every failure found, so that it can be shown, logged and tagged.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from components.records import Rejection


class AssayError(Exception):
    """Base of every error that assay raises on purpose."""

    exit_code = 1


class UsageError(AssayError):
    """The request cannot be carried out as it was made."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting, parameter or pipeline name is unknown or ill-typed."""


class DataError(UsageError):
    """The data of a window is missing, corrupt or breaks its declared schema."""


class ContractError(UsageError):
    """A component does not fulfil the abstract base class that it claims to implement."""


class InfrastructureError(AssayError):
    """A server, a disk or a device that assay depends on failed."""


class ConflictError(InfrastructureError):
    """Another process moved the champion between a decision and the move that follows from it."""


class GateError(AssayError):
    """A gate rejected the candidate.

    Args:
        stage: The stage whose gate fired, for example ``"validate"``.
        failures: Every failure found, one sentence each; the message joins them.
        culprit: The module, tensor or metric most likely at fault, when known.
        metrics: What was measured before the gate said no.

    The stage's runtime sets ``rejection``, the record of it.
    """

    exit_code = 3

    def __init__(
        self,
        stage: str,
        failures: Sequence[str],
        *,
        culprit: str | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        assert failures, "a gate rejects for at least one reason"
        self.stage = stage
        self.failures = tuple(failures)
        self.culprit = culprit
        self.metrics = dict(metrics or {})
        self.rejection: Rejection | None = None
        super().__init__(stage, self.failures)  # what a copy is made from

    def __str__(self) -> str:
        return f"{self.stage} rejected the candidate: " + "; ".join(self.failures)
