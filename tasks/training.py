"""Training on this machine, in this process or in several, watched by MLflow and Prefect."""

import time
from collections.abc import Sequence
from typing import Any, final

from components.adapters.ray_train import run_workers
from components.data.encoding import Encoding, fit_encoding
from components.data.profile import draw_profile, profile_json
from components.data.snapshot import Snapshot
from components.interruption import deferred_signals
from components.pipeline import Pipeline, load_pipeline
from components.plan import open_data, open_snapshots
from components.records import Job, TrainedModel
from components.state import exclusive
from components.train.checkpoint import Epoch
from components.train.config import TrainConfig
from components.train.device import choose_device
from components.train.environment import training_environment
from components.train.loop import Reports, Trained
from components.train.run import run_training, write_files
from components.train.together import ENTRY, Assignment, read_result
from tasks.checkpoints import checkpoint_storage, job_checkpoints
from tasks.progress import TrainingProgress, progress_bar
from tasks.runtime import Workspace, stage


def train_here(job: Job, run_id: str = "") -> TrainedModel:
    """Train from the job's last checkpoint, if there is one.

    Args:
        job: What to train.
        run_id: The MLflow run to train into; empty starts one.
    """
    pipeline = load_pipeline(job.pipeline)
    config = type(pipeline.config).model_validate(job.config)
    if config.workers == 1:
        choose_device(config)
    with stage("train", job, run_id) as space:
        snapshot = open_data(pipeline, space.settings, job)
        space.run_id = space.run_id or start_run(space, job)
        space.put("profile.json", profile_json(snapshot))
        space.put("profile.png", draw_profile(snapshot))
        with (
            exclusive(space.settings.root, f"train-{job.key}"),  # a job's checkpoints are one's own
            progress_bar(pipeline.name, config.epochs) as bar,
        ):
            watch = _Watch(space, bar, job.rows["train"])
            if config.workers == 1:
                trained, encoding = _train_alone(pipeline, config, snapshot, job, watch)
            else:
                trained, encoding = _train_together(pipeline, config, snapshot, job, watch)
            bar.end()
        files = write_files(trained, encoding, space.folder)
        space.upload(files.loss_curve)
        return space.keep(
            TrainedModel(
                job=job,
                run_id=space.run_id,
                weights=space.upload(files.weights),
                encoding=space.upload(files.encoding),
                device=trained.device,
                environment=watch.environment or training_environment(trained.device),
                epochs=len(trained.history),
                best_epoch=trained.best.number,
                train_loss=trained.best.train_loss,
                validation_loss=trained.best.validation_loss,
                stage=space.ended(),
            )
        )


def _train_alone(
    pipeline: Pipeline, config: TrainConfig, snapshot: Snapshot, job: Job, watch: "_Watch"
) -> tuple[Trained, Encoding]:
    space = watch.space
    with deferred_signals() as stop:
        trained, encoding = run_training(
            pipeline,
            config,
            snapshot,
            checkpoints=job_checkpoints(space.settings, job, space.log.warning),
            every_s=space.settings.checkpoint_every_s,
            reports=Reports(
                epoch=watch.epoch,
                resumed=watch.resumed,
                steps=watch.bar.steps,
                warn=space.log.warning,
                stop=stop,
            ),
        )
    if trained.resumed:
        epoch, step = trained.resumed
        space.tracking.tag(space.run_id, {"resumed_at": f"epoch {epoch}, step {step}"})
    return trained, encoding


def _train_together(
    pipeline: Pipeline, config: TrainConfig, snapshot: Snapshot, job: Job, watch: "_Watch"
) -> tuple[Trained, Encoding]:
    """Start workers, and go on from the checkpoint that they leave."""
    space = watch.space
    given = Assignment(
        pipeline=pipeline.name,
        config=job.config,
        code_digest=job.code_digest,
        snapshots=open_snapshots(pipeline, space.settings).url,
        fingerprint=job.data_fingerprint,
        checkpoints=checkpoint_storage(space.settings, job).url,
        key=job.key,
        every_s=space.settings.checkpoint_every_s,
    )
    address = space.settings.ray_address
    starts = run_workers(
        ENTRY,
        given.model_dump_json(),
        workers=config.workers,
        folder=space.settings.root / "ray" / job.key,
        address=address,
        use_gpu=_on_gpu(config, address),
        cpus=config.threads,
        on_report=watch.report,
    )
    space.tracking.tag(space.run_id, {"worker_groups": str(starts)})
    trained = read_result(given, watch.device)
    return trained, fit_encoding(pipeline.features, snapshot.statistics)


def _on_gpu(config: TrainConfig, address: str) -> bool:
    """Whether workers need a GPU; that of another machine cannot be seen from here."""
    if address:
        return config.require_gpu or config.device == "cuda"
    return choose_device(config).type == "cuda"


@final
class _Watch:
    """Sends every epoch to MLflow and to whoever looks on."""

    def __init__(self, space: Workspace, bar: TrainingProgress, rows: int) -> None:
        self.space = space
        self.bar = bar
        self.device = "cpu"
        self.environment: dict[str, str] = {}
        self._rows = rows
        self._seen = 0
        self._began = time.perf_counter()

    def epoch(self, epoch: Epoch) -> None:
        """An epoch has ended."""
        now = time.perf_counter()
        speed = {"rows_per_second": self._rows / (now - self._began)}
        self._began = now
        self._log(epoch, speed)
        self.bar.epoch(epoch, self.space.log)

    def resumed(self, history: Sequence[Epoch]) -> None:
        """These epochs were trained by a process that is gone; this MLflow run shows them too."""
        self.space.log.info("Training goes on after epoch %d", len(history))
        for epoch in history:
            self._log(epoch, {})

    def report(self, report: dict[str, Any]) -> None:
        """What a worker says; see :func:`components.train.together.train_worker`."""
        match report:
            case {"epoch": values}:
                self.epoch(Epoch.model_validate(values))
            case {"resumed": history}:
                self.resumed([Epoch.model_validate(values) for values in history])
            case {"steps": [done, total]}:
                self.bar.steps(done, total)
            case {"warning": text}:
                self.space.log.warning("%s", text)
            case {"environment": environment, "device": device}:
                self.environment, self.device = environment, device

    def _log(self, epoch: Epoch, more: dict[str, float]) -> None:
        if epoch.number <= self._seen:  # workers that are replaced repeat what they had said
            return
        self._seen = epoch.number
        values = epoch.model_dump(exclude={"number"})
        self.space.tracking.log_metrics(self.space.run_id, values | more, step=epoch.number)


def start_run(space: Workspace, job: Job) -> str:
    """Start the MLflow run of a job, and return its id."""
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
