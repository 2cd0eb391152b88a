"""``assay promote``, ``assay rollback`` and ``assay history``: champions moved and explained.

They need MLflow alone. If a Prefect server is named and answers, it is told.
"""

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from components.adapters.prefect_server import check_prefect, run_environment
from components.decide.moves import name
from components.errors import ConfigError, InfrastructureError
from components.settings import Settings, load_settings
from components.state import make_root

if TYPE_CHECKING:
    from tasks.promotion import Champions, Moved

_WHY_CHARACTERS = 60


def promote(model: str, version: int, reason: str) -> int:
    """Prove a version, make it champion, and say so.

    Raises:
        UsageError: The request cannot be carried out.
        GateError: The version was rejected, or its proof failed; nothing was changed.
        InfrastructureError: MLflow or a disk failed, or another process moved the champion.
    """
    with contextlib.redirect_stdout(sys.stderr):
        settings, listening = _enter()
        from tasks import promotion

        moved = promotion.promote(settings, model, version, reason)
        _tell(moved, listening)
    print(describe_move(moved))
    return 0


def rollback(model: str, version: int | None, reason: str) -> int:
    """Prove an earlier version, make it champion again, and say so.

    Raises:
        UsageError: As :func:`promote`.
        GateError: As :func:`promote`.
        InfrastructureError: As :func:`promote`.
    """
    with contextlib.redirect_stdout(sys.stderr):
        settings, listening = _enter()
        from tasks import promotion

        moved = promotion.roll_back(settings, model, version, reason)
        _tell(moved, listening)
    print(describe_move(moved))
    return 0


def history(model: str, *, as_json: bool) -> int:
    """Print who was champion, when and why.

    Raises:
        UsageError: There is no such model.
        InfrastructureError: MLflow failed, or the history is damaged.
    """
    with contextlib.redirect_stdout(sys.stderr):
        settings, _ = _enter()
        from tasks import promotion

        champions = promotion.read_champions(settings, model)
    print(champions.model_dump_json() if as_json else describe(champions))
    return 0


def _enter() -> tuple[Settings, bool]:
    """Settings, and whether a Prefect server that is named listens to events."""
    settings = load_settings()
    make_root(settings.root)
    os.environ.update(run_environment(settings.root))
    named = os.environ.get("PREFECT_API_URL") or settings.prefect_api_url
    if settings.credentials_block:
        if not named:
            raise ConfigError(
                "ASSAY_CREDENTIALS_BLOCK must be on a Prefect server that is named; this command "
                "starts none. Set PREFECT_API_URL, or give the block's settings in the environment."
            )
        check_prefect(named)
        os.environ["PREFECT_API_URL"] = named
        from tasks.runtime import current_settings

        return current_settings(), True
    return settings, _listens(named)


def _listens(named: str) -> bool:
    if not named:
        return False
    try:
        check_prefect(named)
    except InfrastructureError as error:
        sys.stderr.write(f"notice  no event is emitted: {error}\n")
        return False
    os.environ["PREFECT_API_URL"] = named
    return True


def _tell(moved: "Moved", listening: bool) -> None:
    if not listening:
        return
    from components.adapters.prefect_runtime import flush_prefect
    from tasks.promotion import announced

    announced(moved, outside_runs=True)
    flush_prefect()


def describe_move(moved: "Moved") -> str:
    """A move for people: what it was, who was champion before, and what was proved."""
    entry = moved.entry
    what = "promoted" if entry.kind == "promote" else "champion again"
    before = "none before" if entry.before is None else f"version {entry.before} before"
    lines = {
        "model": f"{moved.model} version {entry.to}: {what}",
        "champion": f"version {entry.to}; {before}",
        "reason": entry.why,
        "proof": f"{moved.golden_rows} golden rows within {moved.max_difference:.1e}, "
        f"p50 {moved.p50_ms:.3f} ms",
        "history": f"entry {entry.seq}, by {entry.who}",
    }
    width = max(map(len, lines))
    return "\n".join(f"{label:<{width}}  {text}" for label, text in lines.items())


def rows_of(champions: "Champions") -> list[dict[str, str]]:
    """The history as a table, the first entry first."""
    return [
        {
            "entry": str(entry.seq),
            "when": f"{entry.at:%Y-%m-%d %H:%M:%S}Z",
            "what": entry.kind,
            "from": "-" if entry.before is None else str(entry.before),
            "to": "-" if entry.to is None else str(entry.to),
            "who": entry.who,
            "why": entry.why,
        }
        for entry in champions.entries
    ]


def describe(champions: "Champions") -> str:
    """The history for people: a table, with long reasons cut, and who is champion now."""
    rows = rows_of(champions)
    last = f"champion  {name(champions.champion)}"
    if not rows:
        return f"{last}; {champions.model} has had none yet"
    rows = [{**row, "why": _short(row["why"])} for row in rows]
    rows = [{title: title for title in rows[0]}, *rows]
    widths = {title: max(len(row[title]) for row in rows) for title in rows[0]}
    table = ["  ".join(row[t].ljust(widths[t]) for t in row).rstrip() for row in rows]
    return "\n".join([*table, "", last])


def _short(text: str) -> str:
    return text if len(text) <= _WHY_CHARACTERS else text[: _WHY_CHARACTERS - 3] + "..."
