"""The history of a model's champions: its entries, and what follows from them.

An entry is one move of the alias ``champion``. Entries are numbered from 1 and never change; entry
n + 1 begins where entry n ended. Three marks are kept beside them, all of them append-only:

    000007                  the entry, as JSON
    000007.setting.ID       somebody else than its author is about to let the alias follow it
    000007.applied.ID       that write has ended: the alias follows it, or a later entry

So whoever reads the history can tell a move that was interrupted from one that somebody made
without assay.
"""

import bisect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from pydantic import ConfigDict, Field, ValidationError

from components.errors import InfrastructureError
from components.records import Record

Kind = Literal["promote", "rollback", "external"]

ENTRY_CHARACTERS = 6000
"""What MLflow keeps of a parameter."""
IN_FLIGHT = timedelta(minutes=5)
"""How long a write of the alias may be under way; a client of MLflow gives up before."""
OUTSIDE = "outside assay"

_NAME = re.compile(r"(?P<seq>\d{6,})(?:\.(?P<mark>setting|applied)\.(?P<id>[0-9a-f-]+))?")
_CUT = " [cut]"


class Entry(Record):
    """One move of the alias ``champion``: from a version to another, None where there is none."""

    model_config = ConfigDict(
        validate_by_name=True, validate_by_alias=True, serialize_by_alias=True
    )

    seq: int = Field(ge=1)
    id: str
    at: datetime
    who: str
    kind: Kind
    before: int | None = Field(alias="from")
    to: int | None
    why: str
    scores: dict[str, float] = Field(default_factory=dict)


@dataclass(frozen=True)
class History:
    """Entries in order, which of them were applied, and who is about to apply which.

    Args:
        entries: Entry n stands at n - 1.
        applied: Sequence numbers of entries that the alias was seen to follow, or a later one.
        open: Writes of the alias that began and were not seen to end: number and time.
    """

    entries: tuple[Entry, ...] = ()
    applied: frozenset[int] = frozenset()
    open: tuple[tuple[int, datetime], ...] = ()

    @property
    def head(self) -> Entry | None:
        """The last entry."""
        return self.entries[-1] if self.entries else None

    @property
    def champion(self) -> int | None:
        """The version that the last entry made champion."""
        return self.head.to if self.head else None


def entry_name(seq: int) -> str:
    """Under which name an entry is kept."""
    return f"{seq:06d}"


def mark_name(seq: int, mark: Literal["setting", "applied"], writer: str) -> str:
    """Under which name a mark of an entry is kept."""
    return f"{seq:06d}.{mark}.{writer}"


def encode(entry: Entry) -> str:
    """The entry as JSON of at most ``ENTRY_CHARACTERS`` characters; a long reason is cut."""
    text = entry.model_dump_json()
    if len(text) <= ENTRY_CHARACTERS:
        return text

    def cut(length: int) -> str:
        return entry.model_copy(update={"why": entry.why[:length] + _CUT}).model_dump_json()

    lengths = range(len(entry.why))  # JSON may need several characters for one
    length = bisect.bisect_right(lengths, ENTRY_CHARACTERS, key=lambda n: len(cut(n))) - 1
    if length < 0:
        raise InfrastructureError(
            f"an entry of the history must have at most {ENTRY_CHARACTERS} characters; without "
            f"its reason, that of version {entry.to} has {len(cut(0))}. Record fewer scores."
        )
    return cut(length)


def read_history(stored: Mapping[str, str]) -> History:
    """The history that is kept under these names; other names are not looked at.

    Raises:
        InfrastructureError: An entry is damaged or missing, or begins where the one before it did
            not end.
    """
    texts: dict[int, str] = {}
    settings: dict[tuple[int, str], datetime] = {}
    ended: set[tuple[int, str]] = set()
    for name, value in stored.items():
        found = _NAME.fullmatch(name)
        if found is None:
            continue
        seq = int(found["seq"])
        if found["mark"] is None:
            texts[seq] = value
        elif found["mark"] == "applied":
            ended.add((seq, found["id"]))
        else:
            settings[seq, found["id"]] = _time(name, value)
    entries = tuple(_decode(seq, texts[seq]) for seq in sorted(texts))
    _require_chain(entries)
    # Its author is about to set the alias too; what others did, no entry has to wait for.
    settings |= {(e.seq, e.id): e.at for e in entries if e.kind != "external"}
    seen = {seq for seq, _ in ended} | {e.seq for e in entries if e.kind == "external"}
    left = [(seq, at) for (seq, writer), at in settings.items() if (seq, writer) not in ended]
    return History(entries, frozenset(seen), tuple(sorted(left)))


def _time(name: str, value: str) -> datetime:
    try:
        return datetime.fromisoformat(value)
    except ValueError:
        raise _damaged(f"{name} must hold a time, and holds {value[:40]!r}") from None


def _decode(seq: int, text: str) -> Entry:
    try:
        entry = Entry.model_validate_json(text)
    except ValidationError as error:
        raise _damaged(
            f"entry {seq} cannot be read: {error.error_count()} of its fields are wrong"
        ) from None
    if entry.seq != seq:
        raise _damaged(f"entry {seq} says that it is entry {entry.seq}")
    return entry


def _require_chain(entries: Sequence[Entry]) -> None:
    for place, entry in enumerate(entries, 1):
        if entry.seq != place:
            raise _damaged(f"entry {place} is missing")
        if place > 1 and entry.before != entries[place - 2].to:
            raise _damaged(
                f"entry {place} begins at version {entry.before}, and the entry before it ended at "
                f"version {entries[place - 2].to}"
            )


def _damaged(what: str) -> InfrastructureError:
    return InfrastructureError(
        f"the history of a model must be a chain of whole entries; {what}. Nothing is promoted "
        "until it is: restore MLflow's database from a backup, or let the tag assay.history_run of "
        "the registered model name a new MLflow run, and a history begins anew with the present "
        "champion."
    )


def difference(history: History, alias: int | None, now: datetime) -> Literal["", "help", "note"]:
    """What to do about the alias, which was read after the history.

    ``help``: let the alias follow the last entry. Its author has not finished or has died, or
    somebody who was late has just overwritten what came after him. ``note``: somebody moved the
    alias without assay, and an entry has to say so. Empty: all is well.

    A write of the alias cannot be made to depend on what the alias is. So every writer is on record
    before he writes, and until he has seen that his entry is the last: an alias that names what he
    is writing is his doing, up to ``IN_FLIGHT`` after he began.
    """
    head = history.head
    if head is None:
        return "" if alias is None else "note"
    if head.seq not in history.applied:
        return "help"
    if alias == head.to:
        return ""
    writing = {
        history.entries[seq - 1].to
        for seq, began in history.open
        if seq != head.seq and abs(now - began) < IN_FLIGHT
    }
    return "help" if alias in writing else "note"


def noted(history: History, alias: int | None, writer: str, now: datetime) -> Entry:
    """The entry that says what somebody did without assay."""
    began = history.head is None
    why = (
        "the alias named it before there was a history"
        if began
        else ("the alias was deleted" if alias is None else "the alias was moved")
    )
    return Entry(
        seq=len(history.entries) + 1,
        id=writer,
        at=now,
        who=OUTSIDE,
        kind="external",
        before=history.champion,
        to=alias,
        why=why,
    )


def previous_champion(history: History) -> int | None:
    """The champion that a rollback returns to: the one before the present one.

    A promotion puts a champion on top of those before it, and a rollback takes the present one off,
    so that two rollbacks in a row go back two champions and not to and fro.
    """
    stack: list[int | None] = []
    for entry in history.entries:
        if not stack and entry.before is not None:
            stack.append(entry.before)
        if entry.kind == "rollback":
            stack.pop()
            if entry.to in stack:
                del stack[stack.index(entry.to) + 1 :]
                continue
        stack.append(entry.to)
    earlier = [version for version in stack[:-1] if version not in (None, history.champion)]
    return earlier[-1] if earlier else None


def rolled_back(history: History, version: int) -> str | None:
    """Why a version was rolled back, if it was, and nobody has made it champion since."""
    why: str | None = None
    for entry in history.entries:
        if entry.kind == "rollback" and entry.before == version:
            why = entry.why
        elif entry.to == version:
            why = None
    return why


def now() -> datetime:
    """The time in UTC, to the millisecond."""
    at = datetime.now(UTC)
    return at.replace(microsecond=at.microsecond // 1000 * 1000)
