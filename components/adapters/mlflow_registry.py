"""Registered models, their versions and their two aliases, in MLflow."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from components.adapters.mlflow_tracking import TAG, Tracking, mlflow_errors
from components.contract import Arrays, ModelMetadata, TensorSpec
from components.errors import InfrastructureError

CHAMPION = "champion"
CHALLENGER = "challenger"
MODEL_FILE = "model.onnx"
DAMAGED = "damaged"
"""Tag of a version whose bytes are no longer those that were registered."""


@dataclass(frozen=True)
class Version:
    """A registered version: its number, where its files came from, and its tags (no prefix).

    ``run_id`` is the MLflow run that it was registered from.
    """

    number: int
    source: str
    tags: Mapping[str, str]
    run_id: str = ""


@final
class Registry:
    """One registered model of a tracking store."""

    def __init__(self, tracking: Tracking, model: str) -> None:
        self._tracking = tracking
        self._client = tracking.client
        self.model = model

    def find(self, tags: Mapping[str, str]) -> Version | None:
        """The oldest intact version that carries all these tags."""
        wanted = " and ".join(f"tags.`{TAG}{name}` = '{value}'" for name, value in tags.items())
        with mlflow_errors(self._tracking.uri):
            found = self._client.search_model_versions(f"name = '{self.model}' and {wanted}")
        intact = [version for item in found if DAMAGED not in (version := _version(item)).tags]
        versions = sorted(intact, key=lambda version: version.number)
        return versions[0] if versions else None

    def by_alias(self, alias: str) -> Version | None:
        """The version that an alias names, if any."""
        from mlflow.exceptions import MlflowException

        with mlflow_errors(self._tracking.uri):
            try:
                return _version(self._client.get_model_version_by_alias(self.model, alias))
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return None
                raise

    def by_number(self, number: int) -> Version | None:
        """The version with a number, if it is there."""
        from mlflow.exceptions import MlflowException

        with mlflow_errors(self._tracking.uri):
            try:
                return _version(self._client.get_model_version(self.model, str(number)))
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return None
                raise

    def aliases(self) -> dict[str, int]:
        """Version numbers by alias; none where there is no such model."""
        from mlflow.exceptions import MlflowException

        with mlflow_errors(self._tracking.uri):
            try:
                found = self._client.get_registered_model(self.model)
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return {}
                raise
        return {alias: int(number) for alias, number in found.aliases.items()}

    def set_alias(self, alias: str, version: int) -> None:
        """Let an alias name a version."""
        with mlflow_errors(self._tracking.uri):
            self._client.set_registered_model_alias(self.model, alias, str(version))

    def drop_alias(self, alias: str, version: int) -> None:
        """Take an alias from a version, if that version carries it."""
        holder = self.by_alias(alias)
        if holder is not None and holder.number == version:
            with mlflow_errors(self._tracking.uri):
                self._client.delete_registered_model_alias(self.model, alias)

    def tag(self, version: int, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        with mlflow_errors(self._tracking.uri):
            for name, value in tags.items():
                self._client.set_model_version_tag(self.model, str(version), TAG + name, value)

    def create(
        self,
        run_id: str,
        onnx_file: Path,
        *,
        metadata: ModelMetadata,
        example: Arrays,
        requirements: Sequence[str],
        tags: Mapping[str, str],
    ) -> Version:
        """Log the ONNX model to the run and make it a version.

        Args:
            run_id: The MLflow run that the model came from.
            onnx_file: A single file without external data.
            metadata: Gives the signature.
            example: Named inputs of a few rows, kept as the input example.
            requirements: What a consumer installs to load it.
            tags: Tags of the version.
        """
        import mlflow.onnx
        import onnx

        # log_model has no argument for the store: it asks the process-wide setting.
        mlflow.set_tracking_uri(self._tracking.uri)
        with mlflow_errors(self._tracking.uri):
            run = self._client.get_run(run_id)
            # Left to itself, log_model files it under the default experiment, in ./mlruns.
            logged = self._client.create_logged_model(
                run.info.experiment_id, name="model", source_run_id=run_id, params=run.data.params
            )
            info = mlflow.onnx.log_model(
                onnx.load(onnx_file, load_external_data=False),
                name="model",
                run_id=run_id,
                model_id=logged.model_id,
                signature=_signature(metadata),
                input_example={name: np.asarray(array) for name, array in example.items()},
                pip_requirements=list(requirements),
                onnx_execution_providers=["CPUExecutionProvider"],
                save_as_external_data=False,
            )
            self._ensure_model(metadata.description)
            version = self._client.create_model_version(
                self.model,
                info.model_uri,
                run_id,
                tags={TAG + name: value for name, value in tags.items()},
                model_id=logged.model_id,
            )
        return _version(version)

    def download(self, version: int, into: Path) -> Path:
        """Fetch a version's files as a consumer would, and return the path of its ONNX file.

        Raises:
            InfrastructureError: The version, or its ONNX file, is gone.
        """
        path = self.fetch(version, into)
        if not path.is_file():
            self.tag(version, {DAMAGED: "true"})
            raise InfrastructureError(
                f"models:/{self.model}/{version} must hold {MODEL_FILE}; it holds "
                f"{', '.join(sorted(p.name for p in path.parent.iterdir()))}. The version is "
                "marked as damaged; run again, and the candidate is registered anew."
            )
        return path

    def fetch(self, version: int, into: Path) -> Path:
        """Fetch a version's files, and say where its ONNX file lies, or would if it were there.

        Raises:
            InfrastructureError: The version's files are gone.
        """
        import mlflow.artifacts

        with mlflow_errors(self._tracking.uri):
            folder = mlflow.artifacts.download_artifacts(
                f"models:/{self.model}/{version}",
                dst_path=str(into),
                tracking_uri=self._tracking.uri,
            )
        return Path(folder) / MODEL_FILE

    def _ensure_model(self, description: str) -> None:
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(MlflowException):  # it exists already, the usual case
            self._client.create_registered_model(self.model, description=description)
            return
        self._client.get_registered_model(self.model)


def _version(item: Any) -> Version:
    tags = {k.removeprefix(TAG): v for k, v in item.tags.items() if k.startswith(TAG)}
    return Version(int(item.version), str(item.source), tags, str(item.run_id or ""))


def _signature(metadata: ModelMetadata) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import Schema
    from mlflow.types.schema import TensorSpec as MlflowTensorSpec

    def schema(specs: tuple[TensorSpec, ...]) -> Schema:
        return Schema(
            [
                MlflowTensorSpec(
                    np.dtype("O" if spec.dtype == "string" else spec.dtype),
                    tuple(-1 if isinstance(axis, str) else axis for axis in spec.shape),
                    spec.name,
                )
                for spec in specs
            ]
        )

    return ModelSignature(inputs=schema(metadata.inputs), outputs=schema(metadata.outputs))
