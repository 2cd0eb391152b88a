"""Events about a model's champions, for Prefect's automations and for its page of events."""

from typing import Literal

Happening = Literal["promoted", "rejected", "rolled_back"]
_REASON_CHARACTERS = 2000


def announce(
    happening: Happening,
    *,
    model: str,
    version: int | None,
    before: int | None,
    reason: str,
    outside_runs: bool = False,
) -> None:
    """Emit ``assay.model.HAPPENING`` about the resource ``assay.model.NAME``.

    An event is a convenience: what happened stands in MLflow, whether it is received or not.

    Args:
        happening: What happened to the version.
        model: The registered model, which has its pipeline's name.
        version: The version that is champion now, or was rejected; None if it had no number yet.
        before: The champion before it, or the one that stays; None where there is none.
        reason: Why.
        outside_runs: Emit where no flow runs, too; Prefect's server must be known to answer.
    """
    from prefect.context import FlowRunContext, TaskRunContext
    from prefect.events import emit_event
    from prefect.runtime import flow_run

    in_run = FlowRunContext.get() is not None or TaskRunContext.get() is not None
    if not in_run and not outside_runs:
        return
    emit_event(
        f"assay.model.{happening}",
        resource={"prefect.resource.id": f"assay.model.{model}", "prefect.resource.name": model},
        payload={
            "model": model,
            "version": version,
            "from": before,
            "reason": reason[:_REASON_CHARACTERS],
            "flow_run_id": str(flow_run.id or "") if in_run else "",
            "pipeline": model,
        },
    )
