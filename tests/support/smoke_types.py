"""The types that tests of the smoke test share."""

from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from components.smoke_test.runner import SmokeReport

Recorded = dict[str, npt.NDArray[Any]]


class Smoke(Protocol):
    def __call__(self, model: Path, recorded: Recorded, **options: Any) -> SmokeReport: ...
