"""Moving the champion: compare-and-swap over a history that survives a crash at any point.

The alias is one value that anybody may set; the history is append-only, and the first to write an
entry has it. So a move is an entry first. Then the alias follows, by its author's hand or, if he
died, by that of whoever comes next.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from datetime import datetime
from uuid import uuid4

from components.decide.history import (
    Entry,
    History,
    Kind,
    difference,
    mark_name,
    noted,
    now,
)
from components.errors import ConflictError, InfrastructureError

_ATTEMPTS = 50


class Book(ABC):
    """Where the history and the alias of one model are kept."""

    @abstractmethod
    def read(self) -> History:
        """All entries and marks."""

    @abstractmethod
    def append(self, entry: Entry) -> bool:
        """Keep an entry, unless its number is taken; says whether it is kept."""

    @abstractmethod
    def mark(self, name: str, at: datetime) -> None:
        """Keep a mark, under a name that nobody else uses."""

    @abstractmethod
    def alias(self) -> int | None:
        """The version that is champion for consumers."""

    @abstractmethod
    def point(self, version: int | None) -> None:
        """Let the alias name a version, or none."""


def _unsaid(text: str) -> None:
    """Where nobody listens."""


def reconcile(book: Book, say: Callable[[str], None] = _unsaid) -> History:
    """Finish a move that was interrupted, and note what was done without assay.

    Args:
        book: Of the model.
        say: Is told what was found and done.

    Returns:
        The history, whose last entry names what the alias does.

    Raises:
        InfrastructureError: The alias does not come to rest, or the history is damaged.
    """
    for _ in range(_ATTEMPTS):
        history = book.read()
        alias = book.alias()  # after the history, or a move in between would look like an intruder
        match difference(history, alias, now()):
            case "":
                return history
            case "help":
                assert history.head is not None, "there is an entry to follow"
                say(
                    f"the alias champion is at {name(alias)}; entry {history.head.seq} of the "
                    f"history moved it to {name(history.head.to)}, and is completed now"
                )
                _follow(book, history.head)
            case "note":
                entry = noted(history, alias, str(uuid4()), now())
                if book.append(entry):
                    say(
                        f"the alias champion went from {name(entry.before)} to {name(alias)} "
                        f"without assay; it is entry {entry.seq} of the history now"
                    )
    raise InfrastructureError(
        f"the alias champion must come to rest; it was moved {_ATTEMPTS} times while it was looked "
        "at. Find out who else moves it, and run again."
    )


def move(
    book: Book,
    *,
    expected: int | None,
    to: int,
    kind: Kind,
    why: str,
    who: str,
    scores: Mapping[str, float] | None = None,
) -> Entry:
    """Make a version champion, if ``expected`` is champion still.

    Args:
        book: Of the model.
        expected: The champion that the version was judged against.
        to: The version, which is another.
        kind: Whether this goes forward or back.
        why: The reason.
        who: Who is responsible, for people.
        scores: What the decision rests on, by name.

    Returns:
        The entry of the move. Once it is there, the alias follows, however this process ends.

    Raises:
        ConflictError: Another version is champion by now; nothing was changed.
        InfrastructureError: As :func:`reconcile`.
    """
    assert to != expected, "a champion is not replaced by itself"
    history = reconcile(book)
    if history.champion != expected:
        raise _conflict(expected, history.champion)
    entry = Entry(
        seq=len(history.entries) + 1,
        id=str(uuid4()),
        at=now(),
        who=who,
        kind=kind,
        before=expected,
        to=to,
        why=why,
        scores=dict(scores or {}),
    )
    if not book.append(entry):
        raise _conflict(expected, reconcile(book).champion)
    _set(book, entry, entry.id)
    return entry


def name(version: int | None) -> str:
    """A champion, or that there is none, for people."""
    return "no version" if version is None else f"version {version}"


def _conflict(expected: int | None, found: int | None) -> ConflictError:
    return ConflictError(
        "a version may replace only the champion that it was judged against; that was "
        f"{name(expected)}, another process has moved the alias since, and now it names "
        f"{name(found)}. Look at 'assay history', and decide again."
    )


def _follow(book: Book, entry: Entry) -> None:
    """Let the alias follow an entry of somebody else, or the one that has become the last."""
    while True:
        writer = str(uuid4())
        book.mark(mark_name(entry.seq, "setting", writer), now())
        head = book.read().head
        assert head is not None, "entries stay"
        if head.seq == entry.seq:
            _set(book, entry, writer)
            return
        book.mark(mark_name(entry.seq, "applied", writer), now())  # nothing was written
        entry = head


def _set(book: Book, entry: Entry, writer: str) -> None:
    """Set the alias, on record, until the entry that it follows is seen to be the last.

    Another process may have helped with this entry and gone on from there, so that this write came
    late and covered a newer one. Then the newest is written again.
    """
    book.point(entry.to)
    head = book.read().head
    assert head is not None, "entries stay"
    if head.seq != entry.seq:
        _follow(book, head)
    book.mark(mark_name(entry.seq, "applied", writer), now())
