"""The history of champions: what is kept, what is refused, and what follows from it."""

from datetime import timedelta
from typing import Any

import pytest

from components.decide.history import (
    ENTRY_CHARACTERS,
    IN_FLIGHT,
    Entry,
    History,
    difference,
    encode,
    entry_name,
    mark_name,
    noted,
    now,
    previous_champion,
    read_history,
    rolled_back,
)
from components.errors import InfrastructureError

NOW = now()


def entry(
    seq: int, before: int | None, to: int | None, kind: Any = "promote", **more: Any
) -> Entry:
    given = {"id": f"{seq:08x}", "at": NOW, "who": "someone", "why": f"reason {seq}", **more}
    return Entry(seq=seq, before=before, to=to, kind=kind, **given)


def path(*champions: int | str | None) -> History:
    """A history whose entries lead to these versions; ``"<3"`` is a rollback to version 3."""
    entries: list[Entry] = []
    for seq, step in enumerate(champions, 1):
        back = isinstance(step, str)
        to = int(step[1:]) if isinstance(step, str) else step
        before = entries[-1].to if entries else None
        entries.append(entry(seq, before, to, "rollback" if back else "promote"))
    return History(tuple(entries), frozenset(range(1, len(entries) + 1)))


def stored(*entries: Entry, applied: tuple[int, ...] = ()) -> dict[str, str]:
    marks = {mark_name(n, "applied", f"{n:08x}"): NOW.isoformat() for n in applied}
    return {**{entry_name(e.seq): encode(e) for e in entries}, **marks}


def test_an_entry_comes_back_as_it_was() -> None:
    written = entry(1, None, 3, scores={"auc": 0.75, "auc of champion": float("inf")})
    assert '"from":null,"to":3' in encode(written)
    found = read_history({**stored(written), "unrelated": "x", "assay.history": "y"})
    assert found.entries == (written,)
    assert (found.head, found.champion, found.applied) == (written, 3, frozenset())
    assert found.open == ((1, NOW),)
    assert read_history({}) == History()


@pytest.mark.parametrize("why", ["x" * 9000, '"' * 9000, "ä" * 9000, "\x00" * 9000])
def test_a_long_reason_is_cut(why: str) -> None:
    text = encode(entry(1, None, 3, why=why))
    assert ENTRY_CHARACTERS * 0.8 < len(text) <= ENTRY_CHARACTERS
    found = read_history({entry_name(1): text}).entries[0].why
    assert found.endswith(" [cut]") and found.startswith(why[:100])
    with pytest.raises(InfrastructureError, match="Record fewer scores"):
        encode(entry(1, None, 3, scores={f"metric {n}": 0.123456 for n in range(400)}))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (stored(entry(1, None, 1), entry(3, 1, 2)), "entry 2 is missing"),
        (stored(entry(2, None, 1)), "entry 1 is missing"),
        (stored(entry(1, None, 1), entry(2, 5, 2)), "begins at version 5, and the entry before it"),
        ({entry_name(2): encode(entry(1, None, 1))}, "says that it is entry 1"),
        ({entry_name(1): "{"}, "entry 1 cannot be read"),
        ({entry_name(1): encode(entry(1, None, 1))[:-1] + ',"more":1}'}, "entry 1 cannot be read"),
        ({mark_name(1, "setting", "ab"): "soon"}, "must hold a time, and holds 'soon'"),
    ],
)
def test_a_damaged_history_is_refused(given: dict[str, str], words: str) -> None:
    with pytest.raises(InfrastructureError, match=words):
        read_history(given)


def test_only_what_was_applied_is_at_rest() -> None:
    one, two = entry(1, None, 1), entry(2, 1, 2)
    assert difference(History(), None, NOW) == ""
    assert difference(History(), 4, NOW) == "note"
    begun = read_history(stored(one, two, applied=(1,)))
    for alias in (1, 2, 7, None):  # the author of entry 2 has not finished, or is dead
        assert difference(begun, alias, NOW) == "help"
    done = read_history(stored(one, two, applied=(1, 2)))
    assert difference(done, 2, NOW) == ""
    for alias in (1, 7, None):
        assert difference(done, alias, NOW) == "note"


def test_a_late_writer_is_told_from_an_intruder() -> None:
    """Entry 1 was completed by a helper, its author is still about to write."""
    late = stored(entry(1, None, 1), entry(2, 1, 2), applied=(2,))
    late[mark_name(1, "applied", "ffff")] = NOW.isoformat()
    found = read_history(late)
    assert found.open == ((1, NOW),)
    assert difference(found, 1, NOW) == "help"
    assert difference(found, 9, NOW) == "note"
    assert difference(found, 1, NOW + IN_FLIGHT) == "note"
    assert difference(found, 1, NOW + IN_FLIGHT - timedelta(seconds=1)) == "help"
    helper = {**stored(entry(1, None, 1), entry(2, 1, 2), applied=(1, 2))}
    assert difference(read_history(helper), 1, NOW) == "note"
    helper[mark_name(1, "setting", "eeee")] = NOW.isoformat()
    assert difference(read_history(helper), 1, NOW) == "help"


def test_what_somebody_did_without_assay_is_an_entry() -> None:
    first = noted(History(), 4, "ab", NOW)
    assert (first.seq, first.before, first.to, first.who) == (1, None, 4, "outside assay")
    assert "before there was a history" in first.why
    moved, gone = noted(path(1, 2), 1, "ab", NOW), noted(path(1, 2), None, "ab", NOW)
    assert (moved.seq, moved.before, moved.to, moved.kind) == (3, 2, 1, "external")
    assert (gone.to, gone.why) == (None, "the alias was deleted")
    found = read_history(stored(first))
    assert found.applied == {1} and found.open == ()


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        (path(), None),
        (path(1), None),
        (path(1, 2), 1),
        (path(1, 2, 3), 2),
        (path(1, 2, 3, "<2"), 1),
        (path(1, 2, 3, "<2", "<1"), None),
        (path(1, 2, "<1", 3), 1),
        (path(1, 2, 3, "<1"), None),
        (path(1, 2, 3, "<9"), 2),  # never champion before: it takes the place of the one it follows
        (path(1, 2, None), 2),
        (path(1, 2, None, 2), 1),
        (path(1, 2, 1), 2),
    ],
)
def test_a_rollback_goes_one_champion_back(history: History, expected: int | None) -> None:
    assert previous_champion(history) == expected


def test_a_history_may_begin_in_the_middle() -> None:
    assert previous_champion(History((entry(1, 4, 5),))) == 4


def test_a_version_that_was_rolled_back_stays_so_until_it_is_champion_again() -> None:
    back = path(1, 2, "<1")
    assert rolled_back(back, 2) == "reason 3"
    assert rolled_back(back, 1) is None
    assert rolled_back(path(1, 2, "<1", 3), 2) == "reason 3"
    assert rolled_back(path(1, 2, "<1", 2), 2) is None
    assert rolled_back(path(1, 2, "<1", "<2"), 2) is None
    assert rolled_back(path(1, 2, "<1", 2, "<1"), 2) == "reason 5"
