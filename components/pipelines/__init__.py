"""The pipelines that ship with assay."""
