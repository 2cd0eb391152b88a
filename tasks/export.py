"""Export: a validated model to ONNX."""

from prefect import task

from components.export.run import run_export
from components.pipeline import load_pipeline
from components.plan import open_data
from components.records import ExportedModel, ValidatedModel
from components.train.run import load_model
from tasks.runtime import keyed, stage


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
        files, report = run_export(pipeline, model, encoding, snapshot, job, space.folder)
        space.log.info(
            "Exported at opset %d, equal to PyTorch in %d comparisons",
            pipeline.release.opset,
            len(report.cases),
        )
        return space.keep(
            ExportedModel(
                validated=validated,
                onnx=space.upload(files.onnx),
                golden=space.upload(files.golden),
                tensor=space.upload(files.tensor),
                tensor_golden=space.upload(files.tensor_golden),
                parity_report=space.upload(files.parity),
                opset=pipeline.release.opset,
                stage=space.ended(),
            )
        )
