"""What ``assay run`` was asked for."""

from dataclasses import dataclass
from datetime import date


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for."""

    pipeline: str
    as_of: date | None
    seed: int
    assignments: tuple[str, ...]
    force: bool
    as_json: bool
