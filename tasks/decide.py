"""Decide: candidate against champion on the same rows, both through ONNX Runtime."""

from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import pyarrow as pa
from prefect import task

from components.adapters.mlflow_ledger import Ledger
from components.adapters.mlflow_registry import CHALLENGER, Registry, Version
from components.adapters.prefect_events import announce
from components.adapters.prefect_runtime import publish_markdown
from components.decide.history import History, rolled_back
from components.decide.moves import move, reconcile
from components.decide.promotion import Contender, Judgement, hold_back, judge
from components.decide.report import decision_markdown
from components.errors import (
    ConflictError,
    ContractError,
    GateError,
    InfrastructureError,
    UsageError,
)
from components.evaluate import answer_rows, measure
from components.export.predictors import OnnxPredictor
from components.pipeline import Pipeline, load_pipeline
from components.plan import open_data
from components.records import Decision, SmokeTestedModel, lineage
from components.settings import Settings
from components.state import exclusive
from tasks.promotion import lock_of, responsible, score_of
from tasks.proof import require_intact
from tasks.runtime import Workspace, stage

_ATTEMPTS = 5


@task(name="decide", result_serializer="json", persist_result=False)
def decide(tested: SmokeTestedModel) -> Decision:
    """Score candidate and champion, move the alias, and write the reason where it is looked for.

    The alias moves only away from the version that the candidate was judged against. If another
    process moved it meanwhile, the candidate is judged again, against the new champion.

    Raises:
        GateError: The candidate, scored through ONNX Runtime, breaks a quality gate.
        ContractError: The champion cannot be scored on these rows.
        InfrastructureError: A registered file is gone or changed, or the champion does not come to
            rest.
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
        held = registry.by_number(registered.version)
        assert held is not None, "what was downloaded a moment ago is registered"
        candidate = _contender(space.settings, pipeline, registry, onnx_file, rows, held)
        bout = _Bout(
            space.settings, pipeline, registry, candidate, sha256, rows, job.as_of, space.folder
        )
        with exclusive(space.settings.root, lock_of(registry.model)):
            outcome = _settle(bout, Ledger(space.tracking, registry), space)
        champion, judgement = outcome.champion, outcome.judgement
        _publish(space, tested, pipeline, candidate, champion, judgement)
        if judgement.verdict == "rejected":
            raise GateError("decide", [judgement.reason])
        space.tracking.finish(trained.run_id, "FINISHED")
        return space.keep(
            Decision(
                tested=tested,
                decision=judgement.verdict,
                champion=outcome.holder,
                reason=judgement.reason,
                metric=pipeline.metric,
                candidate_score=candidate.metrics[pipeline.metric],
                champion_score=champion.metrics[pipeline.metric] if champion else None,
                holdout_rows=rows.num_rows,
                stage=space.ended(),
            )
        )


@dataclass(frozen=True)
class _Bout:
    """What does not change while champions come and go."""

    settings: Settings
    pipeline: Pipeline
    registry: Registry
    candidate: Contender
    sha256: str
    rows: pa.Table
    as_of: date
    folder: Path


@dataclass(frozen=True)
class _Outcome:
    """The version that was compared with, the judgement, and who is champion after it."""

    champion: Contender | None
    judgement: Judgement
    holder: int | None


def _settle(bout: _Bout, ledger: Ledger, space: Workspace) -> _Outcome:
    """Judge, and act on it, until nobody has moved the champion in between."""
    candidate = bout.candidate
    for attempt in range(_ATTEMPTS):
        history = reconcile(ledger, space.log.warning)
        holder = _holder(bout.registry, history)
        # Each champion has a folder of its own: files of two versions have the same names.
        folder = bout.folder / f"champion-{attempt}"
        champion = _champion(bout, holder, folder)
        hold = hold_back(
            bout.pipeline.release.promotion,
            bout.registry.model,
            candidate.version,
            history.champion,
            rolled_back(history, candidate.version),
        )
        judgement = judge(bout.pipeline, candidate, champion, hold)
        if champion is candidate:  # a champion keeps the reason it was promoted for
            return _Outcome(champion, judgement, history.champion)
        try:
            _apply(bout, ledger, history.champion, judgement, champion)
        except ConflictError as error:
            space.log.warning("Judging again: %s", error)
            continue
        promoted = judgement.verdict == "promoted"
        return _Outcome(champion, judgement, candidate.version if promoted else history.champion)
    raise InfrastructureError(
        f"the champion must rest while a candidate is judged; that of {bout.registry.model} was "
        f"moved {_ATTEMPTS} times. Look at 'assay history {bout.registry.model}' to see by whom, "
        "and run again: finished stages are kept."
    )


def _holder(registry: Registry, history: History) -> Version | None:
    if history.champion is None:
        return None
    holder = registry.by_number(history.champion)
    if holder is None:  # deleting a version deletes its aliases, which the next look notes
        raise InfrastructureError(
            f"the champion must be a registered version; {registry.model} version "
            f"{history.champion} was deleted a moment ago. Run again."
        )
    return holder


def _contender(
    settings: Settings,
    pipeline: Pipeline,
    registry: Registry,
    onnx_file: Path,
    rows: pa.Table,
    version: Version,
) -> Contender:
    try:
        require_intact(settings, registry, version, onnx_file)
    except GateError as error:
        raise InfrastructureError(
            f"registered files must keep their bytes; {registry.model} version {version.number}: "
            f"{'; '.join(error.failures)}. Then let the alias name a version that is intact, or "
            "take the alias away, and the next candidate is judged by the gates alone."
        ) from error
    predictor = OnnxPredictor(onnx_file.read_bytes())
    scored = answer_rows(pipeline, predictor, predictor.encoding, rows)
    return Contender(version.number, measure(pipeline, scored), scored)


def _champion(bout: _Bout, holder: Version | None, folder: Path) -> Contender | None:
    if holder is None:
        return None
    pipeline, candidate = bout.pipeline, bout.candidate
    if holder.number == candidate.version:
        return candidate
    sha256 = holder.tags.get("onnx_sha256", "")
    if sha256 == bout.sha256:  # the champion's bytes, registered anew after it was damaged
        return replace(candidate, version=holder.number)
    onnx_file = bout.registry.download(holder.number, folder)
    try:
        champion = _contender(bout.settings, pipeline, bout.registry, onnx_file, bout.rows, holder)
    except UsageError as error:  # it was made for other columns, or for other metrics
        raise ContractError(
            f"the champion must answer the held-out rows, to be compared; {pipeline.name} version "
            f"{holder.number} cannot: {error} Or let the alias name a version that can, or take "
            "the alias away, and the next candidate is judged by the gates alone."
        ) from error
    # Dates written YYYY-MM-DD compare as text.
    later = pipeline.dated and holder.tags.get("as_of", "") > str(bout.as_of)
    return replace(champion, trained_later=later)


def _apply(
    bout: _Bout,
    ledger: Ledger,
    expected: int | None,
    judgement: Judgement,
    champion: Contender | None,
) -> None:
    """Say why before moving an alias, so that no alias stands unexplained."""
    registry, version, reason = bout.registry, bout.candidate.version, judgement.reason
    registry.tag(version, {"decision": judgement.verdict, "reason": reason})
    if judgement.verdict == "candidate":  # it waits as challenger
        registry.set_alias(CHALLENGER, version)
        return
    if judgement.verdict == "promoted":
        metric = bout.pipeline.metric
        beaten = champion.metrics.get(metric) if champion else None
        scores = score_of(metric, bout.candidate.metrics[metric], beaten)
        move(
            ledger,
            expected=expected,
            to=version,
            kind="promote",
            why=reason,
            who=responsible(),
            scores=scores,
        )
        announce("promoted", model=registry.model, version=version, before=expected, reason=reason)
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
