"""Smoke test: the registered version, downloaded as a consumer would, in a clean process."""

import json
from pathlib import Path

from prefect import task

from components.adapters.mlflow_registry import CHALLENGER, DAMAGED, Registry
from components.errors import GateError
from components.records import Latency, RegisteredModel, SmokeTestedModel
from components.register.verify import verify_files
from components.smoke_test.engines.installed import parse_engines
from components.smoke_test.engines.run import EngineResult, run_engines
from components.smoke_test.runner import run_smoke_test
from tasks.runtime import Workspace, stage

# The golden answers are PyTorch's in float32; parity has bounded the error of both engines already.
RTOL, ATOL = 1e-4, 1e-5


@task(name="smoke_test", result_serializer="json", persist_result=False)
def smoke_test(registered: RegisteredModel) -> SmokeTestedModel:
    """Prove the registered bytes again in every run: what was true last week may not be today.

    Raises:
        GateError: The bytes changed, the answers differ, or the child process died; the version
            is tagged with the reason and loses its alias.
    """
    exported = registered.exported
    with stage("smoke_test", registered) as space:
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
                model, sha256=exported.onnx.sha256, golden=golden, rtol=RTOL, atol=ATOL
            )
            engines = _other_engines(space, model.parent)
        except GateError as error:
            if not intact:  # the next run registers them anew
                registry.tag(registered.version, {DAMAGED: "true"})
            registry.tag(registered.version, {"decision": "rejected", "reason": str(error)[:5000]})
            registry.drop_alias(CHALLENGER, registered.version)
            raise
        space.put("smoke_report.json", report.model_dump_json(indent=1))
        space.log.info(
            "Smoke test passed: %d golden rows within %.1e, p50 %.3f ms, p99 %.3f ms at batch 1",
            report.golden_rows,
            report.max_difference,
            report.p50_ms,
            report.p99_ms,
        )
        return space.keep(
            SmokeTestedModel(
                registered=registered,
                golden_rows=report.golden_rows,
                max_difference=report.max_difference,
                batch_sizes=report.batch_sizes,
                latency=Latency(p50_ms=report.p50_ms, p99_ms=report.p99_ms),
                providers=report.providers,
                engines=tuple(engines),
                stage=space.ended(),
            )
        )


def _other_engines(space: Workspace, folder: Path) -> dict[str, EngineResult]:
    """Prove the version in the engines that the deployment asks for, and keep what they said."""
    names = parse_engines(space.settings.smoke_engines)
    modules = space.settings.node_modules
    found = run_engines(
        names, folder, node_modules=Path(modules) if modules else None, rtol=RTOL, atol=ATOL
    )
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
    return found
