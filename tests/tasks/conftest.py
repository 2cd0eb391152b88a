"""Stages called one by one, without Prefect."""

from collections.abc import Callable
from datetime import date
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from components.records import ExportedModel


@pytest.fixture(scope="session")
def _exported() -> dict[tuple[str, ...], "ExportedModel"]:
    return {}


@pytest.fixture
def export_of(bench: Any, _exported: dict[tuple[str, ...], Any]) -> Callable[..., "ExportedModel"]:
    """The exported model of a pipeline and its settings, made once in a session."""
    from tasks.export import export
    from tasks.plan import plan
    from tasks.train import train
    from tasks.validate import validate

    def make(pipeline: str, *settings: str) -> "ExportedModel":
        key = (pipeline, *settings)
        if key not in _exported:
            job = plan(pipeline, date(2014, 1, 1), 0, settings, False)
            _exported[key] = export.fn(validate.fn(train.fn(job)))
        return _exported[key]

    return make
