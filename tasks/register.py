"""Register: an exported model becomes a version, once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import task
from pydantic import BaseModel

from components.adapters.mlflow_registry import CHALLENGER, CHAMPION, DIGEST, Registry, Version
from components.adapters.prefect_runtime import flow_run_page
from components.export.golden import read_golden
from components.export.parity import ParityReport
from components.export.predictors import OnnxPredictor
from components.records import Artifact, ExportedModel, RegisteredModel
from components.register.card import Facts, model_card
from components.register.provenance import installed
from components.register.seal import seal_folder
from components.register.tags import consumer_requirements, version_tags
from components.state import exclusive
from components.validate.contract_report import ContractReport
from components.validate.gates.report import GatesReport
from components.validate.gradients.report import GradientReport
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
        ConfigError: The signing key is none.
    """
    trained = exported.validated.trained
    with stage("register", exported) as space:
        registry = Registry(space.tracking, trained.job.pipeline)
        with exclusive(space.settings.root, f"register-{registry.model}"):
            found = registry.find({DIGEST: exported.onnx.sha256})
            made = found or _create(space, registry, exported)
            version = registry.settle(made)  # other machines do not see this lock
            created = found is None and version.number == made.number
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
                signed=version.tags.get("signed") == "true",
                stage=space.ended(),
            )
        )
        return remember(record)


register.on_rollback(give_up)


def _create(space: Workspace, registry: Registry, exported: ExportedModel) -> Version:
    onnx_file, golden = space.fetch(exported.onnx), space.fetch(exported.golden)
    inputs, _ = read_golden(golden)
    metadata = OnnxPredictor(onnx_file.read_bytes()).metadata
    champion = registry.by_alias(CHAMPION)
    parent = f"{registry.model}/{champion.number}" if champion else ""
    flow_run_id = space.ended().flow_run_id
    flow_run = (flow_run_id, flow_run_page(flow_run_id))
    files = {"golden.npz": golden, **_release_files(space, exported)}
    plots = {f"plots/{path.name}": path for path in map(space.fetch, exported.validated.pictures)}
    card = model_card(
        Facts(
            exported=exported,
            metadata=metadata,
            **_reports(space, exported),
            plots=tuple(path.name for path in plots.values()),
            parent=parent,
            flow_run=flow_run[1] or f"`{flow_run_id}`",
        )
    )
    for name, text in (("model_card.md", card), ("environment.txt", installed())):
        files[name] = space.folder / name
        files[name].write_text(text, encoding="utf-8")

    def seal(folder: Path, source: str) -> Mapping[str, str]:
        return seal_folder(
            folder, exported, space.settings, source=source, parent=parent, flow_run=flow_run
        )

    return registry.create(
        exported.validated.trained.run_id,
        onnx_file,
        metadata=metadata,
        example={name: array[:EXAMPLE_ROWS] for name, array in inputs.items()},
        requirements=consumer_requirements(),
        tags=version_tags(
            exported, parent=parent, flow_run_id=flow_run[0], flow_run_url=flow_run[1]
        ),
        description=card,
        more={**files, **plots},
        seal=seal,
    )


def _release_files(space: Workspace, exported: ExportedModel) -> dict[str, Path]:
    """The further files of the release, by their names in the version."""
    kept: dict[str, Artifact | None] = {
        "tensor.onnx": exported.tensor,
        "tensor_golden.npz": exported.tensor_golden,
        **{f"model.{variant.kind}.onnx": variant.onnx for variant in exported.variants},
    }
    return {name: space.fetch(one) for name, one in kept.items() if one is not None}


def _reports(space: Workspace, exported: ExportedModel) -> dict[str, Any]:
    validated = exported.validated
    kinds: dict[str, tuple[Artifact, type[BaseModel]]] = {
        "contract": (validated.contract_report, ContractReport),
        "gradients": (validated.gradient_report, GradientReport),
        "gates": (validated.gates_report, GatesReport),
        "parity": (exported.parity_report, ParityReport),
    }
    return {
        name: kind.model_validate_json(space.fetch(artifact).read_bytes())
        for name, (artifact, kind) in kinds.items()
    }
