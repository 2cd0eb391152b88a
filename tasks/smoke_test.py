"""Smoke test: the registered version, downloaded as a consumer would, in a clean process."""

import json

from prefect import task

from components.adapters.mlflow_registry import DAMAGED, Registry
from components.errors import GateError
from components.records import Latency, RegisteredModel, SmokeTestedModel
from components.smoke_test.engines.run import EngineResult
from tasks.proof import prove_answers, require_intact
from tasks.runtime import Workspace, stage


@task(name="smoke_test", result_serializer="json", persist_result=False)
def smoke_test(registered: RegisteredModel) -> SmokeTestedModel:
    """Prove the registered bytes again in every run: what was true last week may not be today.

    Raises:
        GateError: The bytes changed, the answers differ, the budget is exceeded, or the child
            process died. The transaction around the stage gives the version up.
    """
    exported = registered.exported
    with stage("smoke_test", registered) as space:
        registry = Registry(space.tracking, registered.model)
        model = registry.download(registered.version, space.folder)
        golden = space.fetch(exported.golden)
        held = registry.by_number(registered.version)
        assert held is not None, "what was downloaded a moment ago is registered"
        try:
            require_intact(space.settings, registry, held, model)
        except GateError:
            registry.tag(registered.version, {DAMAGED: "true"})  # the next run registers it anew
            raise
        proof = prove_answers(space.settings, registered.model, model, golden, exported.onnx.sha256)
        report = proof.report
        _keep_engines(space, proof.engines)
        space.put("smoke_report.json", report.model_dump_json(indent=1))
        space.log.info(
            "Smoke test passed: %d golden rows within %.1e, p50 %.3f ms, p99 %.3f ms at batch 1, "
            "%.0f rows/s at batch 1024",
            report.golden_rows,
            report.max_difference,
            report.p50_ms,
            report.p99_ms,
            report.rows_per_s,
        )
        return space.keep(
            SmokeTestedModel(
                registered=registered,
                golden_rows=report.golden_rows,
                max_difference=report.max_difference,
                batch_sizes=report.batch_sizes,
                latency=Latency(
                    p50_ms=report.p50_ms,
                    p95_ms=report.p95_ms,
                    p99_ms=report.p99_ms,
                    rows_per_s=report.rows_per_s,
                ),
                providers=report.providers,
                engines=tuple(proof.engines),
                stage=space.ended(),
            )
        )


def _keep_engines(space: Workspace, found: dict[str, EngineResult]) -> None:
    if found:
        evidence = {name: result._asdict() for name, result in found.items()}
        space.put("engines.json", json.dumps(evidence, indent=1))
    for name, result in found.items():
        space.log.info(
            "%s: %d golden rows within %.1e (%s)",
            name,
            result.rows,
            result.max_difference,
            result.version,
        )
