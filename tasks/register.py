"""Register: an exported model becomes a version, once."""

from prefect import task

from components.adapters.mlflow_registry import CHALLENGER, CHAMPION, Registry, Version
from components.export.golden import read_golden
from components.export.predictors import OnnxPredictor
from components.records import ExportedModel, RegisteredModel
from components.register.tags import consumer_requirements, version_tags
from components.state import exclusive
from tasks.release import give_up, remember
from tasks.runtime import Workspace, stage

EXAMPLE_ROWS = 2


@task(name="register", result_serializer="json", persist_result=False)
def register(exported: ExportedModel) -> RegisteredModel:
    """Find or create the version that holds exactly these bytes; it becomes challenger.

    Not cached: asking the registry is cheap, and it alone knows whether the version still exists.
    Within a transaction, a later failure of any kind takes the alias back (:func:`give_up`).

    Raises:
        InfrastructureError: MLflow refuses, or does not keep the bytes.
    """
    trained = exported.validated.trained
    with stage("register", exported) as space:
        registry = Registry(space.tracking, trained.job.pipeline)
        with exclusive(space.settings.root, f"register-{registry.model}"):
            version = registry.find({"onnx_sha256": exported.onnx.sha256})
            created = version is None
            if version is None:
                version = _create(space, registry, exported)
            champion = registry.by_alias(CHAMPION)
            if champion is None or champion.number != version.number:
                registry.set_alias(CHALLENGER, version.number)
        space.log.info(
            "%s version %d %s", registry.model, version.number, "created" if created else "exists"
        )
        record = space.keep(
            RegisteredModel(
                exported=exported,
                model=registry.model,
                version=version.number,
                source=version.source,
                created=created,
                stage=space.ended(),
            )
        )
        return remember(record)


register.on_rollback(give_up)


def _create(space: Workspace, registry: Registry, exported: ExportedModel) -> Version:
    onnx_file = space.fetch(exported.onnx)
    inputs, _ = read_golden(space.fetch(exported.golden))
    return registry.create(
        exported.validated.trained.run_id,
        onnx_file,
        metadata=OnnxPredictor(onnx_file.read_bytes()).metadata,
        example={name: array[:EXAMPLE_ROWS] for name, array in inputs.items()},
        requirements=consumer_requirements(),
        tags=version_tags(exported),
    )
