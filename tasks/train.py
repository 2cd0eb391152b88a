"""Train: rows to weights."""

from prefect import task

from components.data.rows import load_rows
from components.pipeline import load_pipeline
from components.plan import open_source
from components.records import Job, TrainedModel
from components.train.engine import Epoch, choose_device
from components.train.run import run_training
from tasks.progress import progress_bar
from tasks.runtime import Workspace, keyed, stage


@task(
    name="train",
    cache_key_fn=keyed("train"),
    persist_result=True,
    result_serializer="json",
)
def train(job: Job) -> TrainedModel:
    """Train the job's model; the weights go to a new MLflow run.

    Raises:
        InfrastructureError: A GPU is required and absent, or MLflow cannot be used.
        GateError: The loss stopped being finite.
    """
    pipeline = load_pipeline(job.pipeline)
    config = type(pipeline.config).model_validate(job.config)
    choose_device(config)
    with stage("train", job) as space:
        source = open_source(pipeline, space.settings.root)
        source.prepare()
        rows = load_rows(source, "train", job.as_of, pipeline.features)
        space.run_id = _start_run(space, job)
        with progress_bar(config.epochs) as bar:

            def on_epoch(epoch: Epoch) -> None:
                losses = {"train_loss": epoch.train_loss, "validation_loss": epoch.validation_loss}
                space.tracking.log_metrics(space.run_id, losses, step=epoch.number)
                bar.epoch(epoch, space.log)

            trained, files = run_training(
                pipeline,
                config,
                rows,
                space.folder,
                on_epoch=on_epoch,
                on_progress=bar.steps,
            )
        space.upload(files.loss_curve)
        return space.keep(
            TrainedModel(
                job=job,
                run_id=space.run_id,
                weights=space.upload(files.weights),
                encoding=space.upload(files.encoding),
                device=trained.device,
                epochs=len(trained.history),
                best_epoch=trained.best.number,
                train_loss=trained.best.train_loss,
                validation_loss=trained.best.validation_loss,
                stage=space.ended(),
            )
        )


def _start_run(space: Workspace, job: Job) -> str:
    tags = {
        "assay.as_of": str(job.as_of),
        "assay.window": job.window,
        "assay.data_fingerprint": job.data_fingerprint,
        "assay.code_revision": job.code_revision,
        "assay.code_digest": job.code_digest,
        "assay.config_digest": job.config_digest,
        "assay.flow_run_id": space.ended().flow_run_id,
    }
    params = {
        **job.config,
        **{f"rows_{split}": count for split, count in job.rows.items()},
        **{f"excluded_{kind}": count for kind, count in job.excluded.items()},
    }
    return space.tracking.start_run(job.pipeline, f"{job.as_of} seed {job.seed}", tags, params)
