"""Events about champions; ``tests/flows/test_promotion.py`` finds them on a real server."""

from typing import Any

import pytest

from components.adapters.prefect_events import announce


def test_outside_of_runs_nothing_is_emitted_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import prefect.events

    emitted: list[Any] = []
    monkeypatch.setattr(
        prefect.events, "emit_event", lambda event, **more: emitted.append((event, more))
    )
    told: dict[str, Any] = {"model": "flights", "version": 3, "before": 2, "reason": "x" * 9000}
    announce("promoted", **told)
    assert emitted == []
    announce("rolled_back", **told, outside_runs=True)
    ((event, more),) = emitted
    assert event == "assay.model.rolled_back"
    assert more["resource"]["prefect.resource.id"] == "assay.model.flights"
    payload = more["payload"]
    assert (payload["from"], payload["version"], payload["flow_run_id"]) == (2, 3, "")
    assert len(payload["reason"]) == 2000
