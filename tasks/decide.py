"""Decide: candidate against champion on the same rows, both through ONNX Runtime."""

from dataclasses import replace
from datetime import date
from pathlib import Path

import pyarrow as pa
from prefect import task

from components.adapters.mlflow_registry import CHALLENGER, CHAMPION, Registry, Version
from components.adapters.prefect_runtime import publish_markdown
from components.decide.promotion import Contender, Judgement, judge
from components.decide.report import decision_markdown
from components.digest import digest_file
from components.errors import ContractError, GateError, InfrastructureError, UsageError
from components.evaluate import answer_rows, measure
from components.export.predictors import OnnxPredictor
from components.pipeline import Pipeline, load_pipeline
from components.plan import open_data
from components.records import Decision, SmokeTestedModel, lineage
from components.state import exclusive
from tasks.runtime import Workspace, stage


@task(name="decide", result_serializer="json", persist_result=False)
def decide(tested: SmokeTestedModel) -> Decision:
    """Score candidate and champion, move the alias, and write the reason where it is looked for.

    Raises:
        GateError: The candidate, scored through ONNX Runtime, breaks a quality gate.
        ContractError: The champion cannot be scored on these rows.
        InfrastructureError: A registered file is gone or changed.
    """
    registered = tested.registered
    trained = registered.exported.validated.trained
    job = trained.job
    pipeline = load_pipeline(job.pipeline)
    with stage("decide", tested) as space:
        rows = open_data(pipeline, space.settings, job).table("holdout")
        registry = Registry(space.tracking, registered.model)
        onnx_file = registry.download(registered.version, space.folder / "candidate")
        sha256 = registered.exported.onnx.sha256
        candidate = _contender(pipeline, onnx_file, sha256, rows, registered.version)
        with exclusive(space.settings.root, f"promote-{registry.model}"):
            holder = registry.by_alias(CHAMPION)
            champion = _champion(
                pipeline, registry, holder, candidate, sha256, rows, job.as_of, space.folder
            )
            judgement = judge(pipeline, candidate, champion)
            if champion is not candidate:  # a champion keeps the reason it was promoted for
                _apply(registry, candidate.version, judgement)
        _publish(space, tested, pipeline, candidate, champion, judgement)
        if judgement.verdict == "rejected":
            raise GateError("decide", [judgement.reason])
        space.tracking.finish(trained.run_id, "FINISHED")
        return space.keep(
            Decision(
                tested=tested,
                decision=judgement.verdict,
                champion=candidate.version
                if judgement.verdict == "promoted" or holder is None
                else holder.number,
                reason=judgement.reason,
                metric=pipeline.metric,
                candidate_score=candidate.metrics[pipeline.metric],
                champion_score=champion.metrics[pipeline.metric] if champion else None,
                holdout_rows=rows.num_rows,
                stage=space.ended(),
            )
        )


def _contender(
    pipeline: Pipeline, onnx_file: Path, sha256: str, rows: pa.Table, version: int
) -> Contender:
    found = digest_file(onnx_file)
    if found != sha256:
        raise InfrastructureError(
            f"registered files must keep their bytes; {pipeline.name} version {version} was "
            f"registered with sha256 {sha256[:12]} and now has {found[:12]}. Find out who changed "
            "it. Then let the alias name a version that is intact, or take the alias away, and "
            "the next candidate is judged by the gates alone."
        )
    predictor = OnnxPredictor(onnx_file.read_bytes())
    scored = answer_rows(pipeline, predictor, predictor.encoding, rows)
    return Contender(version, measure(pipeline, scored), scored)


def _champion(
    pipeline: Pipeline,
    registry: Registry,
    holder: Version | None,
    candidate: Contender,
    candidate_sha256: str,
    rows: pa.Table,
    as_of: date,
    folder: Path,
) -> Contender | None:
    if holder is None:
        return None
    if holder.number == candidate.version:
        return candidate
    sha256 = holder.tags.get("onnx_sha256", "")
    if sha256 == candidate_sha256:  # the champion's bytes, registered anew after it was damaged
        return replace(candidate, version=holder.number)
    onnx_file = registry.download(holder.number, folder / "champion")
    try:
        champion = _contender(pipeline, onnx_file, sha256, rows, holder.number)
    except UsageError as error:  # it was made for other columns, or for other metrics
        raise ContractError(
            f"the champion must answer the held-out rows, to be compared; {pipeline.name} version "
            f"{holder.number} cannot: {error} Or let the alias name a version that can, or take "
            "the alias away, and the next candidate is judged by the gates alone."
        ) from error
    # Dates written YYYY-MM-DD compare as text.
    later = pipeline.dated and holder.tags.get("as_of", "") > str(as_of)
    return replace(champion, trained_later=later)


def _apply(registry: Registry, version: int, judgement: Judgement) -> None:
    """Say why before moving an alias, so that no alias stands unexplained."""
    registry.tag(version, {"decision": judgement.verdict, "reason": judgement.reason})
    if judgement.verdict == "promoted":
        registry.set_alias(CHAMPION, version)
    registry.drop_alias(CHALLENGER, version)


def _publish(
    space: Workspace,
    given: SmokeTestedModel,
    pipeline: Pipeline,
    candidate: Contender,
    champion: Contender | None,
    judgement: Judgement,
) -> None:
    markdown = decision_markdown(pipeline, candidate, champion, judgement)
    space.put("decision.md", markdown)
    publish_markdown(f"{pipeline.name}-decision", markdown, "Who is champion, and why")
    space.log.info("%s: %s", judgement.verdict, judgement.reason)
    trained = lineage(given)["train"]
    if champion is not candidate or trained.stage.flow_run_id == space.ended().flow_run_id:
        tags = {"decision": judgement.verdict, "reason": judgement.reason}
        space.tracking.tag(space.run_id, tags)
