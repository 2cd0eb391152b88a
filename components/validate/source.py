"""What can be seen in a component's source without running it.

The rules are those of bandit (https://bandit.readthedocs.io), narrowed to what must not stand in
code that trains and serves a model: unpickling, running text as code, shells, credentials, and
unverified connections. ``# nosec`` hides a finding, as it does for bandit; how many were hidden is
reported.
"""

import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, model_validator

from components import import_guard
from components.errors import ConfigError
from components.plan import component_modules
from components.validate.source_files import component_files

if TYPE_CHECKING:
    from components.pipeline import Pipeline

_UNPICKLE = (
    "unpickling runs code that the file names. Keep tensors as safetensors, the rest as JSON"
)
_CREDENTIAL = "a credential must not stand in code. Read it from a setting or a secret store"
_SHELL = "a shell runs whatever its text says. Start the program from a list, without a shell"
_TLS = "a server must prove who it is. Leave certificate verification on"
RULES = {
    "B102": "exec runs text as code. Call a function instead",
    "B105": _CREDENTIAL,
    "B106": _CREDENTIAL,
    "B107": _CREDENTIAL,
    "B301": _UNPICKLE,
    "B302": _UNPICKLE,
    "B307": "eval runs text as code. Use ast.literal_eval or JSON for values",
    "B323": _TLS,
    "B403": _UNPICKLE,
    "B501": _TLS,
    "B506": "yaml.load builds any object that the file names. Use yaml.safe_load",
    "B602": _SHELL,
    "B604": _SHELL,
    "B605": _SHELL,
    "B614": "torch.load unpickles. Pass weights_only=True, or keep weights as safetensors",
}
"""Rules of bandit that are applied, each with its reason and what to do."""
NETWORK = "network"
"""Rule that a module's import keeps off the network."""
UNREADABLE = "unreadable"
"""Rule that every file can be parsed."""

_CREDENTIAL_RULES = ("B105", "B106", "B107")
_PICKLERS = ("cloudpickle", "joblib", "marshal")
"""Modules that unpickle too, besides those on bandit's list."""
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_SPECIAL_TOKEN = re.compile(r"<.*>|\[.*\]|")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceFinding(_Frozen):
    """One line that breaks a rule; ``code`` is the line, without the text of a credential."""

    rule: str
    file: str
    line: int
    code: str
    sentence: str


class SourceReport(_Frozen):
    """Outcome of a look at the source; ``suppressed`` counts what ``# nosec`` hides."""

    passed: bool
    findings: tuple[SourceFinding, ...]
    files: tuple[str, ...]
    suppressed: int

    @model_validator(mode="after")
    def _follows_from_findings(self) -> Self:
        if self.passed == bool(self.findings):
            raise ValueError(
                f"passed must follow from the findings; got passed={self.passed} with "
                f"{len(self.findings)} findings. Build the report with scan_source()."
            )
        return self


def verify_source(pipeline: "Pipeline") -> SourceReport:
    """Look at the code of a pipeline: its parts, and what they import from the same package.

    Network calls are reported for modules whose import was watched by
    :func:`components.import_guard.network_refused`.

    Raises:
        ConfigError: bandit is not installed.
    """
    return scan_source(component_files(component_modules(pipeline)), import_guard.attempts)


def scan_source(
    files: Sequence[tuple[str, Path]], attempts: Sequence[import_guard.Attempt] = ()
) -> SourceReport:
    """Apply every rule to the files; nothing in them is run.

    Args:
        files: Name to report, and path, of each.
        attempts: Calls of the network while modules were imported; those from ``files`` count.

    Raises:
        ConfigError: bandit is not installed.
    """
    names = {str(path.resolve()): name for name, path in files}
    found, suppressed = _bandit(list(names)) if names else ([], 0)
    for attempt in dict.fromkeys(attempts):
        sentence = (
            f"importing must not use the network; this line led to {attempt.event}. Move the call "
            "into a function"
        )
        found.append((NETWORK, str(Path(attempt.file).resolve()), attempt.line, sentence))
    findings = tuple(
        _finding(rule, path, names[path], line, sentence)
        for rule, path, line, sentence in sorted(
            found, key=lambda f: (names.get(f[1], ""), f[2], f[0])
        )
        if path in names
    )
    return SourceReport(
        passed=not findings,
        findings=findings,
        files=tuple(name for name, _ in files),
        suppressed=suppressed,
    )


def _finding(rule: str, path: str, name: str, line: int, sentence: str) -> SourceFinding:
    code = _line(path, line)
    if rule in _CREDENTIAL_RULES:  # a report is kept and shown: the secret must not be in it
        code = _QUOTED.sub("'***'", code)
    return SourceFinding(
        rule=rule, file=name, line=line, code=code, sentence=f"{name}:{line}: {sentence}."
    )


def _line(path: str, line: int) -> str:
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return lines[line - 1].strip()[:200] if 0 < line <= len(lines) else ""


def _bandit(paths: Sequence[str]) -> tuple[list[tuple[str, str, int, str]], int]:
    """Rule, file, line and sentence of every finding, and how many are suppressed."""
    with _quiet():
        try:
            from bandit.core import config, manager
        except ImportError as error:
            raise ConfigError(
                "the source of a component is checked with bandit, which is not installed: "
                f"{error}. Install assay with its dependencies, or pip install 'bandit>=1.9,<2'."
            ) from None
        scan = manager.BanditManager(config.BanditConfig(), "file", quiet=True, profile=_profile())
        scan.files_list = sorted(paths)
        scan.run_tests()
    found = [
        (issue.test_id, issue.fname, issue.lineno, RULES[issue.test_id])
        for issue in scan.get_issue_list()
        if not _harmless(issue)
    ]
    for path, reason in scan.get_skipped():
        found.append((UNREADABLE, path, 1, f"the file must be readable; {reason}"))
    totals = scan.metrics.data["_totals"]
    return found, totals["nosec"] + totals["skipped_tests"]


def _profile() -> dict[str, Any]:
    """Bandit's rules that are applied, with more names for the one about pickle."""
    from bandit.blacklists.utils import build_conf_dict
    from bandit.core.extension_loader import MANAGER
    from bandit.core.issue import Cwe

    unpickling = Cwe.DESERIALIZATION_OF_UNTRUSTED_DATA
    more = build_conf_dict("import_pickle", "B403", unpickling, list(_PICKLERS), "{name}", "LOW")
    listed = {
        node: [check for check in checks if check["id"] in RULES]
        for node, checks in MANAGER.blacklist.items()
    }
    # Calls are on the list for the sake of __import__("joblib").
    return {
        "include": list(RULES),
        "blacklist": {node: [*checks, more] for node, checks in listed.items()},
    }


def _harmless(issue: Any) -> bool:
    """Whether a text in a place for credentials is none: ``pad_token = "<pad>"``, ``PASS``."""
    if issue.test_id not in _CREDENTIAL_RULES:
        return False
    value = issue.text.partition("'")[2].rpartition("'")[0]
    line = _line(issue.fname, issue.lineno)
    named_like_itself = re.search(rf"\b{re.escape(value)}\s*=\s*['\"]{re.escape(value)}['\"]", line)
    return _SPECIAL_TOKEN.fullmatch(value) is not None or named_like_itself is not None


@contextmanager
def _quiet() -> Iterator[None]:
    """Let bandit, and stevedore, which loads its plugins, say and leave nothing.

    Trouble with a file becomes a finding. A plugin that lacks a library is none of ours, and
    stevedore would keep a cache in the home folder where no file ``.disable`` forbids it.
    """
    loggers = [logging.getLogger(name) for name in ("bandit", "stevedore")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    before = os.environ.get("XDG_CACHE_HOME")
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bandit calls its plugin loader in a deprecated way
            cache = Path(folder, "python-entrypoints")
            cache.mkdir()
            (cache / ".disable").touch()
            os.environ["XDG_CACHE_HOME"] = folder
            yield
    finally:
        os.environ.pop("XDG_CACHE_HOME", None)
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
