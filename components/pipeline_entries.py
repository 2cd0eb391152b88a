"""Registered pipelines by name, found without importing them."""

from importlib.metadata import EntryPoint, entry_points

from components.errors import ConfigError

GROUP = "assay.pipelines"


def pipeline_entries() -> dict[str, EntryPoint]:
    """Registered pipelines by name, without importing them.

    Raises:
        ConfigError: Two distributions register the same name.
    """
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        known = found.setdefault(entry.name, entry)
        if known.value != entry.value:
            raise ConfigError(
                f"pipeline names must be unique; {entry.name!r} is registered as {known.value} and "
                f"as {entry.value}. Rename one of the two entry points."
            )
    return found
