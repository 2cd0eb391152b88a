"""What a data source promises of its rows: columns, types, and checks of their values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    from pandera.pyarrow import Check


@dataclass(frozen=True)
class RowSchema:
    """Columns of a data source, and what their values must keep.

    Args:
        arrow: Columns with their types; a field is nullable only where a missing value is allowed.
        checks: pandera's checks by column, for example ranges and allowed values; missing values
            pass them.
        key: Columns that together tell rows apart; rows arrive in their ascending order.
    """

    arrow: pa.Schema
    checks: Mapping[str, "Sequence[Check]"] = field(default_factory=dict)
    key: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a check or a key on a column that is not there."""
        unknown = sorted({*self.checks, *self.key} - set(self.arrow.names))
        if unknown:
            raise ValueError(
                f"checks and key must name columns of the schema; got {', '.join(unknown)}, "
                f"present: {', '.join(self.arrow.names)}"
            )
        nullable = [name for name in self.key if self.arrow.field(name).nullable]
        if nullable:
            raise ValueError(f"columns of the key must not be nullable; got {', '.join(nullable)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns, in order."""
        return tuple(self.arrow.names)
