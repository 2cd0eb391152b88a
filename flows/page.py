"""``assay page``: a page that predicts with a registered version in the browser."""

from pathlib import Path

from components.errors import ConfigError
from components.settings import load_settings
from components.state import storage_errors
from components.web_page import build_page
from flows.reproduce import find_version
from tasks.proof import require_intact
from tasks.workplace import workplace

ASSETS = Path(__file__).parents[1] / "deploy" / "web"


def page(target: str, folder: Path) -> int:
    """Write the page of a version into a folder, and say how to serve it.

    Args:
        target: ``MODEL``, which means its champion, ``MODEL@VERSION`` or ``MODEL@ALIAS``.
        folder: Where the files go; made if it is not there.

    Returns:
        0.

    Raises:
        ConfigError: There is no such version, its graph takes no columns, or onnxruntime-web is not
            installed.
        GateError: The version's files are not those that were registered and signed.
        InfrastructureError: MLflow or a disk failed.
    """
    settings = load_settings()
    if not settings.node_modules:
        raise ConfigError(
            "a page needs onnxruntime-web; ASSAY_NODE_MODULES is not set. Run 'make engines' and "
            "set it to the folder that it names."
        )
    named = find_version(target if "@" in target else f"{target}@champion", settings)
    with workplace(settings, "page") as work:
        model = named.registry.download(named.version.number, work)
        require_intact(settings, named.registry, named.version, model)
        golden = model.with_name("golden.npz")
        with storage_errors(folder):
            sizes = build_page(
                model,
                golden if golden.is_file() else None,
                name=named.registry.model,
                version=named.version.number,
                assets=ASSETS,
                node_modules=Path(settings.node_modules),
                folder=folder,
            )
    megabytes = sum(sizes.values()) / 1e6
    print(f"{named.name}: {len(sizes)} files, {megabytes:.1f} MB, in {folder}")
    print(f"serve it:  python -m http.server --bind 127.0.0.1 --directory {folder} 8080")
    return 0
