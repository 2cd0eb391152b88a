"""Registered models, their versions and their two aliases, in MLflow."""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from components.adapters.mlflow_model import MODEL_FILE, write_model
from components.adapters.mlflow_tracking import METRICS_PER_BATCH, TAG, Tracking, mlflow_errors
from components.contract import Arrays, ModelMetadata
from components.errors import ConfigError, InfrastructureError

CHAMPION = "champion"
CHALLENGER = "challenger"
DAMAGED = "damaged"
"""Tag of a version whose bytes are no longer those that were registered."""
DIGEST = "onnx_sha256"
"""Tag with the digest of the registered graph: what makes two versions the same."""
DECISION = "decision"
"""Tag of a version that was decided upon."""
DESCRIPTION_CHARACTERS = 5000
"""What MLflow's column holds."""
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


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
        return next(iter(self._all(tags)), None)

    def _all(self, tags: Mapping[str, str]) -> list[Version]:
        wanted = " and ".join(f"tags.`{TAG}{name}` = '{value}'" for name, value in tags.items())
        with mlflow_errors(self._tracking.uri):
            found = self._client.search_model_versions(f"name = {quoted(self.model)} and {wanted}")
        intact = [version for item in found if DAMAGED not in (version := _version(item)).tags]
        return sorted(intact, key=lambda version: version.number)

    def by_alias(self, alias: str) -> Version | None:
        """The version that an alias names, if any."""
        from mlflow.exceptions import MlflowException

        with mlflow_errors(self._tracking.uri):
            try:
                return _version(self._client.get_model_version_by_alias(self.model, alias))
            except MlflowException as error:
                if error.error_code in _ABSENT:
                    return None
                raise

    def by_number(self, number: int) -> Version | None:
        """The version with a number, if it is there."""
        from mlflow.exceptions import MlflowException

        with mlflow_errors(self._tracking.uri):
            try:
                return _version(self._client.get_model_version(self.model, str(number)))
            except MlflowException as error:
                if error.error_code in _ABSENT:
                    return None
                raise

    def aliases(self) -> dict[str, int]:
        """Version numbers by alias; none where there is no such model."""
        from mlflow.exceptions import MlflowException

        with mlflow_errors(self._tracking.uri):
            try:
                found = self._client.get_registered_model(self.model)
            except MlflowException as error:
                if error.error_code in _ABSENT:
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
        description: str = "",
        more: Mapping[str, Path] | None = None,
        seal: Callable[[Path, str], Mapping[str, str]] | None = None,
    ) -> Version:
        """Upload a version's folder as a whole, and make it a version; then :meth:`settle`.

        Args:
            run_id: The MLflow run that the model came from.
            onnx_file: A single file without external data.
            metadata: Gives the signature.
            example: Named inputs of a few rows, kept as the input example.
            requirements: What a consumer installs to load it.
            tags: Tags of the version.
            description: Of the version, in Markdown; cut where MLflow's column ends.
            more: Further files, by their path in the folder.
            seal: Called with the complete folder and MLflow's address of it, before the upload;
                gives further tags.
        """
        with mlflow_errors(self._tracking.uri):
            run = self._client.get_run(run_id)
            logged = self._client.create_logged_model(
                run.info.experiment_id, name="model", source_run_id=run_id, params=run.data.params
            )
        source = f"models:/{logged.model_id}"
        try:
            with tempfile.TemporaryDirectory() as parent:
                folder = Path(parent) / self.model
                with mlflow_errors(self._tracking.uri):
                    write_model(
                        folder,
                        onnx_file,
                        logged,
                        metadata=metadata,
                        example=example,
                        requirements=requirements,
                    )
                for name, path in (more or {}).items():
                    (folder / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, folder / name)
                sealed = seal(folder, source) if seal else {}
                with mlflow_errors(self._tracking.uri):
                    self._client.log_model_artifacts(logged.model_id, str(folder))
        except BaseException:
            with contextlib.suppress(Exception):
                self._client.finalize_logged_model(logged.model_id, "FAILED")
            raise
        self._finalize(run, logged.model_id)
        self._ensure_model(metadata.description)
        return self._create_version(run_id, logged.model_id, {**tags, **sealed}, description)

    def _finalize(self, run: Any, model_id: str) -> None:
        """Mark the files as complete, and let the run's page and the model's name each other."""
        from mlflow.entities import LoggedModelOutput, Metric

        with mlflow_errors(self._tracking.uri):
            self._client.finalize_logged_model(model_id, "READY")
            self._client.log_outputs(run.info.run_id, [LoggedModelOutput(model_id, step=0)])
            # With step and time of the run's own, MLflow does not log them to the run again.
            metrics = [
                Metric(m.key, m.value, m.timestamp, m.step, model_id=model_id)
                for m in run.data._metric_objs
            ]
            for start in range(0, len(metrics), METRICS_PER_BATCH):
                batch = metrics[start : start + METRICS_PER_BATCH]
                self._client.log_batch(run.info.run_id, metrics=batch)

    def _create_version(
        self, run_id: str, model_id: str, tags: Mapping[str, str], description: str
    ) -> Version:
        import mlflow

        # A store of this process looks the files up through the process-wide setting.
        mlflow.set_tracking_uri(self._tracking.uri)
        with mlflow_errors(self._tracking.uri):
            version = self._client.create_model_version(
                self.model,
                f"models:/{model_id}",
                run_id,
                tags={TAG + name: value for name, value in tags.items()},
                description=cut(description, DESCRIPTION_CHARACTERS) or None,
                model_id=model_id,
            )
        return _version(version)

    def settle(self, version: Version) -> Version:
        """Of all intact versions with the same bytes only the oldest counts; give that one.

        A second one comes to be when another machine registers the candidate at the same time, or
        when the request is sent twice. Numbers only grow, so whoever is not first sees who is. Its
        version and files are deleted, and so is what a process left that died in between; never a
        version that has an alias, or was decided upon.
        """
        if DIGEST not in version.tags:
            return version
        first, *younger = self._all({DIGEST: version.tags[DIGEST]}) or [version]
        taken = {*self.aliases().values()} if younger else set()
        for other in younger:
            idle = other.number not in taken and DECISION not in other.tags
            if idle and (other.number == version.number or other.run_id == version.run_id):
                self._delete(other, files=other.source != first.source)
        return first

    def twin_of(self, version: Version) -> Version | None:
        """An older intact version with the same bytes, which this one can only be made from."""
        same = self._all({DIGEST: version.tags.get(DIGEST, "")})
        return next((other for other in same if other.number < version.number), None)

    def claims(self, version: Version) -> dict[str, Any]:
        """What the registry says of a version, for :func:`components.register.verify.verify_files`.

        All that it takes but the folder, the settings and the digest.
        """
        twin = self.twin_of(version)
        return {
            "model": self.model,
            "run_id": version.run_id,
            "source": version.source,
            "provenance_sha256": version.tags.get("provenance_sha256", ""),
            "twin": twin.number if twin else None,
        }

    def _delete(self, version: Version, *, files: bool) -> None:
        from mlflow.exceptions import MlflowException

        with mlflow_errors(self._tracking.uri):
            try:
                self._client.delete_model_version(self.model, str(version.number))
                if files:  # else a request that was sent twice has made both from the same
                    self._client.delete_logged_model(version.source.removeprefix("models:/"))
            except MlflowException as error:
                if error.error_code not in _ABSENT:  # else another process has deleted it
                    raise

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

    def delete_alias(self, alias: str) -> None:
        """Take an alias away, if there is one."""
        with mlflow_errors(self._tracking.uri):
            self._client.delete_registered_model_alias(self.model, alias)

    def untag(self, version: int, name: str) -> None:
        """Take a tag from a version, if it has it."""
        with mlflow_errors(self._tracking.uri):
            self._client.delete_model_version_tag(self.model, str(version), TAG + name)

    def versions(self) -> list[Version]:
        """All versions, the first one first; none where there is no such model."""
        with mlflow_errors(self._tracking.uri):
            found = self._client.search_model_versions(
                f"name = {quoted(self.model)}", order_by=["version_number ASC"]
            )
        return [_version(item) for item in found]

    def _ensure_model(self, description: str) -> None:
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(MlflowException):  # it exists already, the usual case
            self._client.create_registered_model(self.model, description=description)
            return
        self._client.get_registered_model(self.model)


def quoted(name: str) -> str:
    """A model's name as a filter of MLflow takes it, which has no way to escape a quote.

    Raises:
        ConfigError: It holds quotes of both kinds.
    """
    mark = '"' if "'" in name else "'"
    if mark in name:
        raise ConfigError(
            f"a model's name must not hold quotes of both kinds; got {name!r}. 'assay pipelines' "
            "lists the names."
        )
    return f"{mark}{name}{mark}"


def cut(markdown: str, most: int) -> str:
    """Markdown of at most so many characters, cut before a heading or, failing that, a line."""
    if len(markdown) <= most:
        return markdown
    end = "\n\n*The whole card is the file model_card.md.*\n"
    start = markdown[: most - len(end)]
    place = max(start.rfind("\n## "), 0) or max(start.rfind("\n"), 0) or len(start)
    return start[:place].rstrip() + end


def _version(item: Any) -> Version:
    tags = {k.removeprefix(TAG): v for k, v in item.tags.items() if k.startswith(TAG)}
    return Version(int(item.version), str(item.source), tags, str(item.run_id or ""))
