"""Records of a candidate that was never trained."""

from datetime import date

from components.records import Artifact, ExportedModel, Job, Stage, TrainedModel, ValidatedModel


def exported_model(
    pipeline: str = "digits", run_id: str = "run", onnx_sha256: str = "sha of onnx"
) -> ExportedModel:
    """An exported model whose artifacts lie nowhere."""
    stage = Stage(seconds=1, flow_run_id="flow")
    job = Job(
        pipeline=pipeline,
        as_of=date(2014, 1, 1),
        window="train a, hold out b",
        seed=3,
        config={"epochs": 2},
        data_fingerprint="data",
        code_digest="code",
        code_revision="abc+changes",
        config_digest="config",
        rows={"train": 1442, "holdout": 355},
        excluded={"cancelled": 7},
    )

    def artifact(name: str) -> Artifact:
        return Artifact(uri=f"runs:/{run_id}/{name}", sha256=f"sha of {name}", size=1)

    trained = TrainedModel(
        job=job,
        run_id=run_id,
        weights=artifact("weights"),
        encoding=artifact("encoding"),
        device="cpu",
        environment={"torch": "2.13.0"},
        epochs=1,
        best_epoch=1,
        train_loss=0,
        validation_loss=0,
        stage=stage,
    )
    validated = ValidatedModel(
        trained=trained,
        metrics={"accuracy": 0.9, "accuracy/digit/1": 0.5, "log_loss": 0.2},
        intervals={"accuracy": (0.85, 0.95)},
        contract_report=artifact("contract"),
        gradient_report=artifact("gradients"),
        gates_report=artifact("gates"),
        leakage_report=artifact("leakage"),
        source_report=artifact("source"),
        page=artifact("page"),
        stage=stage,
    )
    return ExportedModel(
        validated=validated,
        onnx=Artifact(uri=f"runs:/{run_id}/onnx", sha256=onnx_sha256, size=1),
        golden=artifact("golden"),
        parity_report=artifact("parity"),
        opset=18,
        stage=stage,
    )
