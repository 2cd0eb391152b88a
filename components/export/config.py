"""How a pipeline's model is released: its operator set, its variants and its budget."""

import math
from dataclasses import dataclass, field
from typing import Literal

VariantKind = Literal["fp16", "int8"]
Promotion = Literal["automatic", "manual"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A smaller form of the model, registered beside it once it kept its own bounds.

    Args:
        kind: ``fp16`` computes in half precision; ``int8`` quantises weights and, at run time,
            activations.
        tolerance: Largest absolute difference of an output from the module in float64, on the
            held-out rows.
        metric_drop: How much worse the deciding metric may be on the held-out rows.
    """

    kind: VariantKind
    tolerance: float
    metric_drop: float

    def __post_init__(self) -> None:
        """Refuse bounds that no variant, or every variant, could keep."""
        for name in ("tolerance", "metric_drop"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"variant {self.kind}: {name} must be finite and >= 0, got {value}"
                )


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the registered file may cost a consumer, in a clean process with one thread.

    Args:
        p99_ms: Milliseconds that 99 of 100 calls with one row must stay below.
        rows_per_s: Rows that must be answered in a second, in batches of 1024.
        memory_bytes: Address space of the process that loads and runs the file.
    """

    p99_ms: float = math.inf
    rows_per_s: float = 0.0
    memory_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        """Refuse a budget that nothing could keep."""
        if not self.p99_ms > 0:
            raise ValueError(f"budget: p99_ms must be positive, got {self.p99_ms}")
        if not 0 <= self.rows_per_s < math.inf:
            raise ValueError(f"budget: rows_per_s must be finite and >= 0, got {self.rows_per_s}")
        if self.memory_bytes <= 0:
            raise ValueError(f"budget: memory_bytes must be positive, got {self.memory_bytes}")


@dataclass(frozen=True, kw_only=True)
class Release:
    """How a validated model becomes a registered one.

    Args:
        opset: Version of the ai.onnx operator set that the files declare.
        variants: Smaller forms to offer beside the model. One that breaks its own bounds is not
            registered, and the report and the log say why; the model itself goes on.
        budget: Latency, throughput and memory that the smoke test holds it to.
        provider: Execution provider of ONNX Runtime on which the smoke test must run; a machine
            without it fails the test.
        promotion: ``manual`` lets a proved candidate wait for ``assay promote``.
    """

    opset: int = 20
    variants: tuple[Variant, ...] = ()
    budget: Budget = field(default_factory=Budget)
    promotion: Promotion = "automatic"
    provider: str = "CPUExecutionProvider"

    def __post_init__(self) -> None:
        """Refuse an operator set that does not exist, and variants that hide each other."""
        if self.opset < 7:
            raise ValueError(f"release: opset must be 7 or later, got {self.opset}")
        kinds = [variant.kind for variant in self.variants]
        if len({*kinds}) != len(kinds):
            raise ValueError(f"release: each kind of variant may stand once, got {kinds}")
