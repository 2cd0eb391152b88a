"""Train: rows to weights."""

import time
from collections.abc import Sequence
from typing import final

from prefect import task

from components.data.profile import draw_profile, profile_json
from components.interruption import deferred_signals
from components.pipeline import load_pipeline
from components.plan import open_data
from components.records import Job, TrainedModel
from components.train.checkpoint import Epoch
from components.train.device import choose_device
from components.train.environment import training_environment
from components.train.loop import Reports
from components.train.run import run_training, write_files
from tasks.checkpoints import drop_checkpoints, job_checkpoints
from tasks.progress import TrainingProgress, progress_bar
from tasks.runtime import Workspace, current_settings, keyed, stage
from tasks.train_remote import train_elsewhere


@task(
    name="train",
    cache_key_fn=keyed("train"),
    persist_result=True,
    result_serializer="json",
)
def train(job: Job) -> TrainedModel:
    """Train the job's model, here or where the settings say; the weights go to a new MLflow run.

    Raises:
        InfrastructureError: A required GPU is absent, a worker failed, or MLflow cannot be used.
        GateError: The loss stopped being finite.
    """
    deployment = current_settings().train_deployment
    if not deployment:
        return train_here(job)
    with stage("train", job) as space:
        space.run_id = _start_run(space, job)
        return space.keep(train_elsewhere(space, job, deployment))


@task(
    name="train",
    cache_key_fn=keyed("train"),
    persist_result=True,
    result_serializer="json",
)
def train_alone(job: Job) -> TrainedModel:
    """Train the job's model in this process, whatever the settings say; else as :func:`train`."""
    return train_here(job)


@task(name="train", result_serializer="json", persist_result=False)
def train_into(job: Job, run_id: str) -> TrainedModel:
    """Train the job's model in this process, into the MLflow run of whoever waits for it.

    Not cached: the weights must lie in that run. Its checkpoints are on this machine, so they go
    here.
    """
    trained = train_here(job, run_id)
    drop_checkpoints(current_settings(), job)
    return trained


def train_here(job: Job, run_id: str = "") -> TrainedModel:
    """Train in this process, from the job's last checkpoint if there is one.

    Args:
        job: What to train.
        run_id: The MLflow run to train into; empty starts one.
    """
    pipeline = load_pipeline(job.pipeline)
    config = type(pipeline.config).model_validate(job.config)
    choose_device(config)
    with stage("train", job, run_id) as space:
        snapshot = open_data(pipeline, space.settings, job)
        space.run_id = space.run_id or _start_run(space, job)
        space.put("profile.json", profile_json(snapshot))
        space.put("profile.png", draw_profile(snapshot))
        checkpoints = job_checkpoints(space.settings, job, space.log.warning)
        with progress_bar(pipeline.name, config.epochs) as bar, deferred_signals() as stop:
            watch = _Watch(space, bar, job.rows["train"])
            trained, encoding = run_training(
                pipeline,
                config,
                snapshot,
                checkpoints=checkpoints,
                every_s=space.settings.checkpoint_every_s,
                reports=Reports(
                    epoch=watch.epoch,
                    resumed=watch.resumed,
                    steps=bar.steps,
                    warn=space.log.warning,
                    stop=stop,
                ),
            )
            bar.end()
        if trained.resumed:
            epoch, step = trained.resumed
            space.tracking.tag(space.run_id, {"resumed_at": f"epoch {epoch}, step {step}"})
        files = write_files(trained, encoding, space.folder)
        space.upload(files.loss_curve)
        return space.keep(
            TrainedModel(
                job=job,
                run_id=space.run_id,
                weights=space.upload(files.weights),
                encoding=space.upload(files.encoding),
                device=trained.device,
                environment=training_environment(trained.device),
                epochs=len(trained.history),
                best_epoch=trained.best.number,
                train_loss=trained.best.train_loss,
                validation_loss=trained.best.validation_loss,
                stage=space.ended(),
            )
        )


@final
class _Watch:
    """Sends every epoch to MLflow and to whoever looks on."""

    def __init__(self, space: Workspace, bar: TrainingProgress, rows: int) -> None:
        self._space = space
        self._bar = bar
        self._rows = rows
        self._began = time.perf_counter()

    def epoch(self, epoch: Epoch) -> None:
        """An epoch has ended."""
        now = time.perf_counter()
        speed = {"rows_per_second": self._rows / (now - self._began)}
        self._began = now
        self._log(epoch, speed)
        self._bar.epoch(epoch, self._space.log)

    def resumed(self, history: Sequence[Epoch]) -> None:
        """These epochs were trained by a process that is gone; this MLflow run shows them too."""
        self._space.log.info("Training goes on after epoch %d", len(history))
        for epoch in history:
            self._log(epoch, {})

    def _log(self, epoch: Epoch, more: dict[str, float]) -> None:
        values = epoch.model_dump(exclude={"number"})
        self._space.tracking.log_metrics(self._space.run_id, values | more, step=epoch.number)


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
