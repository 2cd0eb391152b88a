"""What a run ends with: one JSON object for machines, a few lines for people."""

from pydantic import BaseModel, ConfigDict

from components.pipeline import Pipeline
from components.records import (
    Decision,
    ExportedModel,
    Job,
    RegisteredModel,
    Rejection,
    Stage,
    StageRecord,
    ValidatedModel,
    Verdict,
    job_of,
    lineage,
    mlflow_run,
)


class StageSummary(BaseModel):
    """Seconds that the stage took in this run, and whether it was taken from an earlier one."""

    model_config = ConfigDict(frozen=True)

    seconds: float
    cached: bool


class RunSummary(BaseModel):
    """The result of ``assay run``; its fields are an interface."""

    model_config = ConfigDict(frozen=True)

    pipeline: str
    model: str
    version: int | None
    decision: Verdict
    champion: int | None
    reason: str
    mlflow_run_id: str | None
    onnx_sha256: str | None
    metrics: dict[str, float]
    stages: dict[str, StageSummary]
    seconds: float


def summarise(decision: Decision, seconds: float) -> RunSummary:
    """The summary of a run that came to a decision."""
    return _summary(
        decision,
        decision.tested,
        verdict=decision.decision,
        champion=decision.champion,
        reason=decision.reason,
        metrics={},
        current=decision.stage,
        seconds=seconds,
    )


def summarise_rejection(rejection: Rejection, champion: int | None, seconds: float) -> RunSummary:
    """The summary of a run that a gate ended."""
    summary = _summary(
        rejection.given,
        rejection.given,
        verdict="rejected",
        champion=champion,
        reason=f"{rejection.stage_name}: {'; '.join(rejection.failures)}",
        metrics=rejection.metrics,
        current=rejection.stage,
        seconds=seconds,
    )
    ended = StageSummary(seconds=rejection.stage.seconds, cached=False)
    stages = {**summary.stages, rejection.stage_name: ended}
    return summary.model_copy(update={"stages": stages})


def _summary(
    last: Job | StageRecord | Decision,
    given: Job | StageRecord,
    *,
    verdict: Verdict,
    champion: int | None,
    reason: str,
    metrics: dict[str, float],
    current: Stage,
    seconds: float,
) -> RunSummary:
    records = lineage(last)
    job = job_of(given)
    validated, exported = records.get("validate"), records.get("export")
    registered = records.get("register")
    return RunSummary(
        pipeline=job.pipeline,
        model=job.pipeline,
        version=registered.version if isinstance(registered, RegisteredModel) else None,
        decision=verdict,
        champion=champion,
        reason=reason,
        mlflow_run_id=mlflow_run(given) or None,
        onnx_sha256=exported.onnx.sha256 if isinstance(exported, ExportedModel) else None,
        metrics=validated.metrics if isinstance(validated, ValidatedModel) else metrics,
        stages={name: _stage(record.stage, current) for name, record in records.items()},
        seconds=round(seconds, 3),
    )


def _stage(stage: Stage, current: Stage) -> StageSummary:
    cached = stage.flow_run_id != current.flow_run_id
    return StageSummary(seconds=0.0 if cached else stage.seconds, cached=cached)


def describe(summary: RunSummary, pipeline: Pipeline, places: dict[str, str]) -> str:
    """The summary for people: verdict, reason, metrics, stages, and where to look."""
    version = f" version {summary.version}" if summary.version is not None else ""
    champion = f"version {summary.champion}" if summary.champion is not None else "none"
    cached = [name for name, stage in summary.stages.items() if stage.cached]
    stages = ", ".join(
        f"{name} {'cached' if stage.cached else f'{stage.seconds:.1f} s'}"
        for name, stage in summary.stages.items()
    )
    metrics = ", ".join(f"{k} {v:.4f}" for k, v in summary.metrics.items() if "/" not in k)
    lines = {
        "model": f"{summary.model}{version}: {summary.decision.replace('_', ' ')}",
        "champion": champion,
        "reason": summary.reason,
        "metrics": metrics or "none",
        "stages": f"{stages}; {summary.seconds:.1f} s in all",
        **_approval(summary),
        **({"cached": "data, code and config are unchanged; --force overrides"} if cached else {}),
        **places,
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def _approval(summary: RunSummary) -> dict[str, str]:
    """How a person lets a candidate become champion, where one waits for that."""
    if summary.decision != "candidate":
        return {}
    return {"approve": f"assay promote {summary.model} {summary.version} --reason TEXT"}
