"""Artifacts of a run."""

from typing import Any

import prefect.artifacts
import pytest
from prefect.artifacts import ArtifactRequest
from prefect.context import TaskRunContext

from components.adapters.prefect_runtime import publish_markdown


def test_a_key_is_one_that_prefect_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or decide would fail after the alias was moved."""
    published: dict[str, Any] = {}
    monkeypatch.setattr(prefect.artifacts, "create_markdown_artifact", published.update)
    publish_markdown("churn-decision", "# no run", "")
    assert published == {}
    monkeypatch.setattr(TaskRunContext, "get", lambda: object())
    publish_markdown("Churn_v2.1-decision", "# why", "")
    assert published["key"] == "churn-v2-1-decision"
    ArtifactRequest(key=published["key"], type="markdown", data="")
