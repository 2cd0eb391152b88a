"""Which files make up a component: its modules, and what they import from the same place.

Imports are read from the text, so that also those inside functions are followed and nothing runs.
Other people's packages are not followed: they are judged by their version, not by us.
"""

import ast
import importlib.util
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_OWN = tuple(
    Path(__file__).resolve().parents[2] / name for name in ("components", "flows", "tasks")
)
_SITE = frozenset(Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib"))
_STDLIB = Path(sysconfig.get_path("stdlib")).resolve()


@dataclass(frozen=True)
class Place:
    """Where a module is imported from: the folder, and its name within it."""

    folder: Path
    module: str
    file: Path

    @property
    def package(self) -> str:
        """The top-level package, or the one module."""
        return self.module.partition(".")[0]

    @property
    def installed(self) -> bool:
        """Whether the folder is shared with packages of other people."""
        return self.folder in _SITE

    @property
    def own(self) -> bool:
        """Whether the module is part of assay itself."""
        return any(package in self.file.parents for package in _OWN)

    @property
    def foreign(self) -> bool:
        """Whether the module is Python's own, or built in."""
        return _STDLIB in self.file.parents and not self.installed

    def accepts(self, file: Path, name: str) -> bool:
        """Whether an import of this module leads to another part of the same component."""
        if any(package in file.parents for package in _OWN):
            return False
        return not self.installed or name.partition(".")[0] == self.package


def place_of(module: str) -> Place | None:
    """Where a module that was imported, or can be found, lies; None where it has no source."""
    loaded = sys.modules.get(module)
    file = getattr(loaded, "__file__", None)
    if loaded is None:
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            return None
        file = spec.origin if spec is not None else None
    if file is None or not file.endswith(".py"):
        return None
    path = Path(file).resolve()
    parts = len(module.split(".")) + (path.name == "__init__.py")
    return Place(path.parents[parts - 1], module, path)


def component_files(modules: Iterable[str]) -> list[tuple[str, Path]]:
    """Name, relative to its root, and path of every file of a component, in order.

    Args:
        modules: Where its parts are defined; the first is the component's own. Modules of other
            people's packages are left out, and those of assay too, unless the first is one.
    """
    places = [place for module in modules if (place := place_of(module)) is not None]
    if not places:
        return []
    home, found = places[0], dict[Path, str]()
    for place in places:
        if place.own:
            if home.own:  # of assay itself only the named modules, not all that they need
                found[place.file] = str(place.file.relative_to(place.folder))
        elif not place.foreign and (not place.installed or place.package == home.package):
            _follow(place, found)
    return sorted((name, path) for path, name in found.items())


def _follow(place: Place, found: dict[Path, str]) -> None:
    pending = [(place.file, place.module)]
    while pending:
        file, module = pending.pop()
        if file in found:
            continue
        found[file] = str(file.relative_to(place.folder))
        for name in _imported(file, module):
            pending += [
                (path, full)
                for path, full in _candidates(place.folder, name)
                if path not in found and place.accepts(path, full)
            ]


def _candidates(folder: Path, name: str) -> Iterator[tuple[Path, str]]:
    """Files that ``import name`` would run, packages on the way included."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        stem, full = folder.joinpath(*parts[:end]), ".".join(parts[:end])
        for path in (stem / "__init__.py", stem.with_suffix(".py")):
            if path.is_file():
                yield path.resolve(), full
                break


def _imported(file: Path, module: str) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # the scan itself reports a file that cannot be read
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(filter(None, [*parents, base]))
            yield from (".".join(filter(None, (base, alias.name))) for alias in node.names)
