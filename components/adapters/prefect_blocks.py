"""The Prefect block that keeps credentials out of code, files and flow parameters."""

from typing import Any

from prefect.blocks.core import Block
from pydantic import Field, SecretStr


class AssayCredentials(Block):
    """How a worker reaches MLflow and a database; secrets are stored encrypted and shown masked."""

    _block_type_name = "Assay Credentials"
    _block_type_slug = "assay-credentials"

    mlflow_tracking_uri: str = Field("", description="MLflow server, for example https://host:5000")
    mlflow_username: str = Field("", description="user name for the MLflow server")
    mlflow_password: SecretStr = Field(SecretStr(""), description="password for the MLflow server")
    mlflow_token: SecretStr = Field(SecretStr(""), description="bearer token for the MLflow server")

    database_url: SecretStr = Field(
        SecretStr(""), description="SQLAlchemy URL of the database that SQL sources read"
    )

    signing_key: SecretStr = Field(
        SecretStr(""), description="private key (PEM, or the path of one) that signs versions"
    )
    trusted_signer: str = Field(
        "", description="public key (PEM, or its path) of signatures; else the signing key's"
    )

    def settings(self) -> dict[str, Any]:
        """Values by setting name, empty ones left out."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {
            name: value
            for name, value in values.items()
            if (value.get_secret_value() if isinstance(value, SecretStr) else value)
        }
