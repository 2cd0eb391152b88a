"""Register as a stage: once, and with one challenger."""

from collections.abc import Callable
from typing import Any

from tasks.register import register


def test_registering_twice_gives_one_version(bench: Any, export_of: Callable[..., Any]) -> None:
    exported = export_of("once")
    first, second = register.fn(exported), register.fn(exported)
    assert (first.created, second.created) == (True, False)
    assert first.version == second.version
    assert bench.aliases("once") == {"challenger": first.version}
    assert list(bench.versions("once")) == [first.version]


def test_version_lies_in_the_experiment_of_its_pipeline(
    bench: Any, export_of: Callable[..., Any]
) -> None:
    registered = register.fn(export_of("once"))
    (run,) = bench.runs("once")
    model = bench.client.get_logged_model(registered.source.removeprefix("models:/"))
    assert model.experiment_id == run.info.experiment_id
    assert model.source_run_id == run.info.run_id
    assert model.artifact_location.startswith((bench.home / "mlflow").as_uri())


def test_signature_and_requirements_are_for_any_consumer(
    bench: Any, export_of: Callable[..., Any]
) -> None:
    import mlflow.models

    registered = register.fn(export_of("once"))
    info = mlflow.models.get_model_info(f"models:/once/{registered.version}")
    assert info.signature.inputs.to_dict()[0]["name"] == "numeric"
    assert info.signature.inputs.to_dict()[0]["tensor-spec"]["shape"] == (-1, 3)
    folder = bench.client.get_model_version_download_uri("once", str(registered.version))
    requirements = mlflow.artifacts.load_text(f"{folder}/requirements.txt").split()
    names = {line.split("==")[0] for line in requirements}
    assert "onnxruntime" in names
    assert not names & {"onnxruntime-gpu", "torch", "assay", "prefect"}
    assert all("==" in line for line in requirements)
