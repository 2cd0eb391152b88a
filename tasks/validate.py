"""Validate: contract, gradients and quality of a trained model."""

from prefect import task

from components.adapters.prefect_runtime import publish_markdown
from components.pipeline import Pipeline, load_pipeline
from components.plan import open_data
from components.records import Artifact, TrainedModel, ValidatedModel
from components.train.run import load_model
from components.validate.intervals import metric_intervals
from components.validate.page import make_page
from components.validate.page_plots import Losses
from components.validate.run import Evidence, collect_evidence
from tasks.checkpoints import drop_checkpoints
from tasks.runtime import Workspace, keyed, log_metrics_of, stage


@task(
    name="validate",
    cache_key_fn=keyed("validate"),
    persist_result=True,
    result_serializer="json",
)
def validate(trained: TrainedModel) -> ValidatedModel:
    """Prove contract, gradients, quality, data and source; reports are kept passed or not.

    Raises:
        GateError: A gate rejects the model; the message holds every failure.
    """
    job = trained.job
    pipeline = load_pipeline(job.pipeline)
    config = type(pipeline.config).model_validate(job.config)
    with stage("validate", trained) as space:
        drop_checkpoints(space.settings, job)  # what training gave is kept by now
        encoding_file, weights = space.fetch(trained.encoding), space.fetch(trained.weights)
        model, encoding = load_model(pipeline, config, encoding_file, weights)
        snapshot = open_data(pipeline, space.settings, job)
        evidence = collect_evidence(
            pipeline, config, model, encoding, snapshot, seed=job.seed, key=job.row_key
        )
        kept = {
            name: space.put(f"{name}.json", report.model_dump_json(indent=1))
            for name, report in evidence.reports().items()
        }
        kept["page"], pictures = _publish(space, pipeline, evidence)
        space.tracking.log_metrics(trained.run_id, evidence.metrics)
        gradients, _ = evidence.require_passed()
        space.log.info(
            "Validated: %d contract checks, %d parameter tensors, %s",
            len(evidence.contract.checks),
            len(gradients.tensors),
            log_metrics_of(evidence.metrics),
        )
        assert evidence.scored is not None, "a model that passed has answered the held-out rows"
        return space.keep(
            ValidatedModel(
                trained=trained,
                metrics=evidence.metrics,
                intervals=metric_intervals(pipeline, evidence.scored, evidence.metrics),
                pictures=pictures,
                **kept,
                stage=space.ended(),
            )
        )


def _publish(
    space: Workspace, pipeline: Pipeline, evidence: Evidence
) -> tuple[Artifact, tuple[Artifact, ...]]:
    """Show the report page in MLflow, pictures beside it, and in Prefect, pictures inside."""
    losses = Losses(
        space.tracking.history(space.run_id, "train_loss"),
        space.tracking.history(space.run_id, "validation_loss"),
    )
    page = make_page(pipeline, evidence, losses)
    pictures = tuple(space.put(name, picture) for name, picture in page.pictures.items())
    publish_markdown(
        f"{pipeline.name}-validation", page.embedded(), "What the gates of validation found"
    )
    return space.put("report.md", page.beside_files()), pictures
