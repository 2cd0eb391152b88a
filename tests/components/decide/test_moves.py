"""Compare-and-swap under every interleaving that chance finds, with crashes between any two steps.

Each process is a thread that waits before and after each step on the book until its turn comes, so
that a seed decides the order of all steps, and a process can be stopped for good at any of them.
"""

import random
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any, final

import pytest

from components.decide import moves
from components.decide.history import Entry, History, encode, entry_name, read_history
from components.decide.moves import Book, move, reconcile
from components.errors import ConflictError, InfrastructureError


class Store:
    """What MLflow would keep."""

    def __init__(self) -> None:
        self.params: dict[str, str] = {}
        self.champion: int | None = None

    @property
    def history(self) -> History:
        return read_history(self.params)


@final
class Memory(Book):
    """A book in memory; ``step`` is called before and after everything that is done to it."""

    def __init__(self, store: Store, step: Callable[[], None] = lambda: None) -> None:
        self.store = store
        self._step = step

    def _do(self, action: Callable[[], Any]) -> Any:
        self._step()
        result = action()
        self._step()
        return result

    def read(self) -> History:
        return self._do(lambda: self.store.history)

    def append(self, entry: Entry) -> bool:
        return self._do(lambda: self._once(entry_name(entry.seq), encode(entry)))

    def mark(self, name: str, at: datetime) -> None:
        assert self._do(lambda: self._once(name, at.isoformat()))

    def alias(self) -> int | None:
        return self._do(lambda: self.store.champion)

    def point(self, version: int | None) -> None:
        self._do(lambda: setattr(self.store, "champion", version))

    def _once(self, name: str, value: str) -> bool:
        return self.store.params.setdefault(name, value) == value


class Killed(BaseException):
    """The process is gone, wherever it was."""


class Process(threading.Thread):
    """Moves the champion to versions of its own, one after the other, whatever others do."""

    def __init__(self, store: Store, versions: list[int]) -> None:
        super().__init__(daemon=True)
        self.versions = versions
        self.moved: list[int] = []
        self.killed = self.ended = False
        self.error: BaseException | None = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._book = Memory(store, self._wait)

    def _wait(self) -> None:
        self._back.release()
        self._go.acquire()
        if self.killed:
            raise Killed

    def turn(self) -> None:
        """Let it do one step."""
        self._go.release()
        self._back.acquire()

    def run(self) -> None:
        self._go.acquire()
        try:
            while self.versions and not self.killed:
                champion = reconcile(self._book).champion
                try:
                    move(
                        self._book,
                        expected=champion,
                        to=self.versions[0],
                        kind="promote",
                        why="",
                        who=self.name,
                    )
                except ConflictError:
                    continue
                self.moved.append(self.versions.pop(0))
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001  the main thread tells of it
            self.error = error
        self.ended = True
        self._back.release()


def play(seed: int, processes: int = 4, each: int = 2, crashes: int = 0) -> list[str]:
    """Play one order of steps to its end, and give everything that is wrong then."""
    chance, store = random.Random(seed), Store()
    crew = [Process(store, [10 * n + i for i in range(each)]) for n in range(1, processes + 1)]
    for process in crew:
        process.start()
    running, steps = list(crew), 0
    while running:
        steps += 1
        if steps > 20_000:
            return ["it does not end"]
        # Long turns of one process and short ones: a late writer is late by a lot.
        process = chance.choice(running)
        for _ in range(chance.choice((1, 1, 2, 5, 20))):
            if crashes and len(running) > 1 and chance.random() < 0.02:
                crashes -= 1
                process.killed = True
            process.turn()
            if process.ended:
                running.remove(process)
                break
    return faults(store, crew)


def faults(store: Store, crew: list[Process]) -> list[str]:
    found = [f"{process.name}: {process.error!r}" for process in crew if process.error]
    try:
        history = reconcile(Memory(store))
    except (InfrastructureError, AssertionError) as error:
        return [*found, f"{error}"]
    if store.champion != history.champion:
        found.append(f"alias {store.champion}, history {history.champion}")
    if strange := [e for e in history.entries if e.kind == "external"]:
        found.append(f"nobody was outside, and yet {strange}")
    made = [e.to for e in history.entries]
    moved = [version for process in crew for version in process.moved]
    if lost := set(moved) - set(made):
        found.append(f"lost {lost}")
    # A killed process may have begun one move that others completed; no other entry is anybody's.
    begun = {process.versions[0] for process in crew if process.killed and process.versions}
    if len(made) != len(set(made)) or set(made) - set(moved) - begun:
        found.append(f"entries {made}, moves {moved}")
    return found


def test_no_order_of_steps_loses_an_update() -> None:
    assert {seed: wrong for seed in range(150) if (wrong := play(seed))} == {}


def test_no_crash_between_two_steps_loses_an_update() -> None:
    assert {seed: wrong for seed in range(200) if (wrong := play(seed, crashes=3))} == {}


def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """An author who sets the alias and does not look again."""

    def careless(book: Book, entry: Entry, writer: str) -> None:
        book.point(entry.to)
        book.mark(moves.mark_name(entry.seq, "applied", writer), moves.now())

    monkeypatch.setattr(moves, "_set", careless)


def unrecorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds another champion than the history's takes it for somebody's doing."""
    original = moves.difference

    def hasty(history: History, alias: int | None, at: datetime) -> Any:
        closed = History(history.entries, history.applied)
        return original(closed, alias, at)

    monkeypatch.setattr(moves, "difference", hasty)


def unconditional(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last writer of an entry has it."""

    def overwrite(self: Memory, name: str, value: str) -> bool:
        self.store.params[name] = value
        return True

    monkeypatch.setattr(Memory, "_once", overwrite)


@pytest.mark.parametrize("fault", [unwatched, unrecorded, unconditional])
def test_a_weaker_protocol_is_found_out(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    assert any(play(seed) for seed in range(150))


def test_a_move_away_from_another_champion_changes_nothing() -> None:
    store = Store()
    book = Memory(store)
    move(book, expected=None, to=1, kind="promote", why="first", who="me", scores={"auc": 0.5})
    before = dict(store.params)
    for expected in (None, 2):
        with pytest.raises(ConflictError, match="now it names version 1"):
            move(book, expected=expected, to=3, kind="promote", why="late", who="me")
    assert (store.params, store.champion) == (before, 1)


@pytest.mark.parametrize("steps", range(3, 12))
def test_the_next_to_come_completes_what_a_dead_process_began(steps: int) -> None:
    store = Store()
    move(Memory(store), expected=None, to=1, kind="promote", why="first", who="me")
    left = steps

    def die() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    with pytest.raises(Killed):
        move(Memory(store, die), expected=1, to=2, kind="promote", why="second", who="dead")
    told: list[str] = []
    history = reconcile(Memory(store), told.append)
    assert store.champion == history.champion
    assert [e.kind for e in history.entries] == ["promote"] * len(history.entries)
    if len(history.entries) == 2:
        assert (store.champion, history.entries[1].who) == (2, "dead")
        assert all("is completed now" in text for text in told)
    assert reconcile(Memory(store)) == history


def test_a_hand_on_the_alias_is_noted() -> None:
    store = Store()
    book = Memory(store)
    move(book, expected=None, to=1, kind="promote", why="first", who="me")
    told: list[str] = []
    for champion in (7, None, 3):
        store.champion = champion
        assert reconcile(book, told.append).champion == champion == store.champion
    found = [(e.kind, e.before, e.to) for e in store.history.entries[1:]]
    assert found == [("external", 1, 7), ("external", 7, None), ("external", None, 3)]
    assert told[0].startswith("the alias champion went from version 1 to version 7 without assay")
    assert len(told) == 3


def test_an_alias_that_never_rests_is_an_error() -> None:
    store = Store()
    book = Memory(store, lambda: setattr(store, "champion", random.randrange(10**9)))
    with pytest.raises(InfrastructureError, match="must come to rest"):
        reconcile(book)
