"""Validate: contract, gradients and quality of a trained model."""

from prefect import task

from components.pipeline import load_pipeline
from components.plan import open_data
from components.records import TrainedModel, ValidatedModel
from components.train.run import load_model
from components.validate.run import collect_evidence
from tasks.checkpoints import drop_checkpoints
from tasks.runtime import keyed, log_metrics_of, stage


@task(
    name="validate",
    cache_key_fn=keyed("validate"),
    persist_result=True,
    result_serializer="json",
)
def validate(trained: TrainedModel) -> ValidatedModel:
    """Prove contract, gradients and quality; the reports are kept whether they pass or not.

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
        evidence = collect_evidence(pipeline, model, encoding, snapshot, seed=job.seed)
        kept = {
            name: space.put(f"{name}.json", report.model_dump_json(indent=1))
            for name, report in evidence.reports().items()
        }
        space.tracking.log_metrics(trained.run_id, evidence.metrics)
        gradients, _ = evidence.require_passed()
        space.log.info(
            "Validated: %d contract checks, %d parameter tensors, %s",
            len(evidence.contract.checks),
            len(gradients.tensors),
            log_metrics_of(evidence.metrics),
        )
        return space.keep(
            ValidatedModel(trained=trained, metrics=evidence.metrics, **kept, stage=space.ended())
        )
