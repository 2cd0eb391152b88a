"""HOW Prefect runs one step."""
