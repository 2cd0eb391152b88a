"""The only doors to Prefect and MLflow."""
