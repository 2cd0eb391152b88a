"""Smoke test: the registered version, downloaded as a consumer would, in a clean process."""

from prefect import task

from components.adapters.mlflow_registry import DAMAGED, Registry
from components.errors import GateError
from components.pipeline import load_pipeline
from components.records import Latency, RegisteredModel, SmokeTestedModel, job_of
from components.register.verify import verify_files
from components.smoke_test.runner import run_smoke_test
from tasks.runtime import stage

# The golden answers are PyTorch's in float32; parity has bounded the error of both engines already.
RTOL, ATOL = 1e-4, 1e-5


@task(name="smoke_test", result_serializer="json", persist_result=False)
def smoke_test(registered: RegisteredModel) -> SmokeTestedModel:
    """Prove the registered bytes again in every run: what was true last week may not be today.

    Raises:
        GateError: The bytes changed, the answers differ, the budget is exceeded, or the child
            process died. The transaction around the stage gives the version up.
    """
    exported = registered.exported
    with stage("smoke_test", registered) as space:
        budget = load_pipeline(job_of(registered).pipeline).release.budget
        registry = Registry(space.tracking, registered.model)
        model = registry.download(registered.version, space.folder)
        golden = space.fetch(exported.golden)
        held = registry.by_number(registered.version)
        assert held is not None, "what was downloaded a moment ago is registered"
        intact = False
        try:
            verify_files(
                model.parent,
                space.settings,
                onnx_sha256=exported.onnx.sha256,
                **registry.claims(held),
            )
            intact = True
            report = run_smoke_test(
                model,
                sha256=exported.onnx.sha256,
                golden=golden,
                memory_bytes=budget.memory_bytes,
                rtol=RTOL,
                atol=ATOL,
                p99_ms=budget.p99_ms,
                rows_per_s=budget.rows_per_s,
            )
        except GateError:
            if not intact:  # the next run registers them anew
                registry.tag(registered.version, {DAMAGED: "true"})
            raise
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
                stage=space.ended(),
            )
        )
