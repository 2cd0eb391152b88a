"""Export: a validated model to ONNX."""

import math

from prefect import task

from components.adapters.prefect_runtime import publish_markdown
from components.export.run import Exported, run_export
from components.export.variant_report import variants_markdown
from components.pipeline import Pipeline, load_pipeline
from components.plan import open_data
from components.records import ExportedModel, ValidatedModel, VariantModel
from components.train.run import load_model
from tasks.runtime import Workspace, keyed, stage


@task(
    name="export",
    cache_key_fn=keyed("export"),
    persist_result=True,
    result_serializer="json",
)
def export(validated: ValidatedModel) -> ExportedModel:
    """Export to ONNX and prove that the graph gives the model's answers.

    Raises:
        GateError: The graph is not what was asked for, or differs from the model.
    """
    trained = validated.trained
    job = trained.job
    pipeline = load_pipeline(job.pipeline)
    config = type(pipeline.config).model_validate(job.config)
    with stage("export", validated) as space:
        encoding_file, weights = space.fetch(trained.encoding), space.fetch(trained.weights)
        model, encoding = load_model(pipeline, config, encoding_file, weights)
        snapshot = open_data(pipeline, space.settings, job)
        exported = run_export(pipeline, model, encoding, snapshot, job, space.folder)
        files = exported.files
        space.log.info(
            "Exported at opset %d, equal to PyTorch in %d comparisons",
            pipeline.release.opset,
            len(exported.parity.cases),
        )
        _tell_variants(space, pipeline, exported)
        return space.keep(
            ExportedModel(
                validated=validated,
                onnx=space.upload(files.onnx),
                golden=space.upload(files.golden),
                tensor=space.upload(files.tensor),
                tensor_golden=space.upload(files.tensor_golden),
                variants=_variants(space, exported),
                parity_report=space.upload(files.parity),
                opset=pipeline.release.opset,
                stage=space.ended(),
            )
        )


def _tell_variants(space: Workspace, pipeline: Pipeline, exported: Exported) -> None:
    """A variant that was asked for and is not there must be seen: in the log, and in the report."""
    if not exported.variants:
        return
    space.upload(exported.files.variant_report)
    markdown = variants_markdown(exported.variants)
    space.put("variants.md", markdown)
    publish_markdown(f"{pipeline.name}-variants", markdown, "Smaller forms beside the model")
    for report in exported.variants:
        if not report.passed:
            space.log.warning("Variant %s is left out: %s", report.kind, "; ".join(report.failures))


def _variants(space: Workspace, exported: Exported) -> tuple[VariantModel, ...]:
    reports = {report.kind: report for report in exported.variants}
    return tuple(
        VariantModel(
            kind=kind,
            onnx=space.upload(path),
            difference=reports[kind].difference,
            metric_difference=reports[kind].metric_difference,
            p50_ms=speed.p50_ms if (speed := reports[kind].speed) else math.nan,
        )
        for kind, path in exported.files.variants.items()
    )
