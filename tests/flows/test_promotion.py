"""Champions moved by people: promote, rollback and history, as commands and as flows."""

import json
import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

from components.adapters.prefect_runtime import flush_prefect
from components.adapters.prefect_server import free_port
from components.errors import ConfigError, InfrastructureError

WHY = "it calls every flight late"


def ask(url: str, path: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"{url}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def events_of(url: str, model: str, count: int) -> list[tuple[str, dict[str, Any]]]:
    """Name and payload of a model's events, the first one first, once there are so many."""
    flush_prefect()
    wanted = {"event": {"prefix": ["assay.model."]}, "resource": {"id": [f"assay.model.{model}"]}}
    deadline = time.monotonic() + 60
    while True:
        found = ask(url, "events/filter", filter=wanted, limit=50)["events"]
        if len(found) >= count or time.monotonic() > deadline:
            found = sorted(found, key=lambda event: event["occurred"])
            assert all(e["resource"]["prefect.resource.name"] == model for e in found)
            return [(e["event"].removeprefix("assay.model."), e["payload"]) for e in found]
        time.sleep(0.2)


def standing(lab: Any, model: str) -> Any:
    """Everything that a move would change."""
    from components.adapters.mlflow_ledger import Ledger
    from components.adapters.mlflow_registry import Registry
    from components.adapters.mlflow_tracking import connect
    from components.settings import load_settings

    tracking = connect(load_settings())
    history = Ledger(tracking, Registry(tracking, model)).read()
    return lab.aliases(model), lab.versions(model), history


@pytest.fixture
def restored(lab: Any) -> Any:
    """Version 2 is champion, version 1 was; both by ``retrain``."""
    if not lab.versions("restored"):
        lab.retrain("restored", "learning_rate=0.02", "epochs=1")
        assert lab.retrain("restored").decision == "promoted"
    return lab


def test_rollback_and_promotion_by_hand(
    restored: Any, command: Callable[..., Any], prefect_server: str
) -> None:
    back = command("rollback", "restored", "--reason", WHY)
    assert back.code == 0, back.err
    lines = dict(line.split(maxsplit=1) for line in back.out.splitlines())
    assert lines["model"] == "restored version 1: champion again"
    assert lines["champion"] == "version 1; version 2 before"
    assert (lines["reason"], lines["history"].split(",")[0]) == (WHY, "entry 3")
    assert re.match(r"64 golden rows within \d\.\de-\d\d, p50 0\.\d{3} ms", lines["proof"])
    assert restored.aliases("restored") == {"champion": 1}
    tags = restored.versions("restored")
    assert (tags[1]["decision"], tags[1]["reason"]) == ("promoted", WHY)
    assert (tags[2]["decision"], tags[2]["rolled_back"]) == ("rolled_back", WHY)

    # It would win again, and is not let.
    again = restored.retrain("restored")
    assert (again.decision, again.champion) == ("kept_champion", 1)
    assert f"it was rolled back ({WHY})" in again.reason
    assert "assay promote restored 2 --reason TEXT" in again.reason
    assert restored.aliases("restored") == {"champion": 1}

    on = command("promote", "restored", "2", "--reason", "the data was wrong, not the model")
    assert on.code == 0, on.err
    assert "restored version 2: promoted" in on.out
    assert restored.aliases("restored") == {"champion": 2}
    assert "rolled_back" not in restored.versions("restored")[2]

    shown = command("history", "restored")
    table, champion = shown.out.strip().split("\n\n")
    assert champion == "champion  version 2"
    header, *rows = (re.split(r"\s{2,}", line) for line in table.splitlines())
    assert header == ["entry", "when", "what", "from", "to", "who", "why"]
    moves = [(row[0], *row[2:5]) for row in rows]
    assert moves == [
        ("1", "promote", "-", "1"),
        ("2", "promote", "1", "2"),
        ("3", "rollback", "2", "1"),
        ("4", "promote", "1", "2"),
    ]
    told = command("history", "restored", "--json").json
    assert (told["model"], told["champion"]) == ("restored", 2)
    assert [entry["from"] for entry in told["entries"]] == [None, 1, 2, 1]
    assert told["entries"][1]["scores"].keys() == {"accuracy", "accuracy of champion"}
    assert told["entries"][1]["who"].startswith("flow run ")
    assert told["entries"][3]["scores"].keys() == {"accuracy", "accuracy of champion"}

    events = events_of(prefect_server, "restored", 4)
    assert [name for name, _ in events] == ["promoted", "promoted", "rolled_back", "promoted"]
    assert [(e["from"], e["version"]) for _, e in events] == [(None, 1), (1, 2), (2, 1), (1, 2)]
    assert events[2][1]["reason"] == WHY
    assert events[1][1]["flow_run_id"] and events[1][1]["pipeline"] == "restored"


def test_moves_as_flows(restored: Any, prefect_server: str) -> None:
    from flows.history import history
    from flows.promote import promote
    from flows.rollback import rollback

    moved = rollback("restored", reason="tried from Prefect")
    assert (moved.entry.before, moved.entry.to, moved.entry.kind) == (2, 1, "rollback")
    assert moved.entry.who.startswith("flow run ")
    assert promote("restored", 2, "and back").entry.to == 2
    champions = history("restored")
    assert (champions.champion, champions.entries[-1].why) == (2, "and back")
    wanted = {"key": {"any_": ["restored-history"]}}
    (artifact,) = ask(prefect_server, "artifacts/latest/filter", artifacts=wanted)
    assert artifact["type"] == "table"
    assert json.loads(artifact["data"])[-1]["why"] == "and back"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["promote", "restored", "9", "--reason", "x"], 2, ["has no version 9"]),
        (["promote", "restored", "2", "--reason", "x"], 2, ["version 2 is champion already"]),
        (["promote", "restored", "1", "--reason", ""], 2, ["reason must not be empty"]),
        (["promote", "restored", "1", "--reason", " \n"], 2, ["reason must not be empty"]),
        (["promote", "restored", "1"], 2, ["--reason"]),
        (["promote", "restored", "0", "--reason", "x"], 2, ["a version's number", "'0'"]),
        (["promote", "restored", "one", "--reason", "x"], 2, ["a version's number", "'one'"]),
        (["promote", "restord", "1", "--reason", "x"], 2, ["no versions of 'restord'"]),
        (["rollback", "restored", "--to", "2", "--reason", "x"], 2, ["must lead to another"]),
        (["rollback", "restored", "--to", "9", "--reason", "x"], 2, ["has no version 9"]),
        (["rollback", "restord", "--reason", "x"], 2, ["no versions of 'restord'"]),
        (["rollback", "restored"], 2, ["--reason"]),
        (["history", "restord"], 2, ["no versions of 'restord'"]),
    ],
    ids=lambda value: "_".join(value).replace("\n", "") if isinstance(value, list) else str(value),
)
def test_what_cannot_be_is_refused(
    restored: Any, command: Callable[..., Any], arguments: list[str], code: int, words: list[str]
) -> None:
    before = standing(restored, "restored")
    outcome = command(*arguments)
    assert (outcome.code, outcome.out) == (code, ""), outcome.err
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err
    assert standing(restored, "restored") == before


def test_what_is_not_proved_is_refused(restored: Any, command: Callable[..., Any]) -> None:
    place = restored.client.get_model_version_download_uri("restored", "1")
    path = Path(urlparse(place).path) / "model.onnx"
    content = path.read_bytes()
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1

    def refused(*words: str) -> None:
        before = standing(restored, "restored")
        for arguments in (("rollback", "restored"), ("promote", "restored", "1")):
            outcome = command(*arguments, "--reason", "x")
            assert (outcome.code, outcome.out) == (3, ""), outcome.err
            for word in words:
                assert word in outcome.err
        assert standing(restored, "restored") == before

    try:
        path.write_bytes(changed)
        refused("proof rejected", "sha256")
        path.unlink()
        refused("proof rejected", "must hold model.onnx")
    finally:
        path.write_bytes(content)
    before = restored.versions("restored")[1]
    set_tag = restored.client.set_model_version_tag
    set_tag("restored", "1", "assay.decision", "rejected")
    refused("version 1 was rejected")
    set_tag("restored", "1", "assay.rejected_by", "gate")
    refused("version 1 was rejected")
    set_tag("restored", "1", "assay.decision", before["decision"])
    sha256 = before["onnx_sha256"]
    restored.client.delete_model_version_tag("restored", "1", "assay.onnx_sha256")
    refused("must have the tag assay.onnx_sha256")
    set_tag("restored", "1", "assay.onnx_sha256", sha256)


def test_a_conflict_leaves_the_tags_as_they_were(
    restored: Any, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.errors import ConflictError
    from tasks import promotion

    def late(*arguments: Any, **move: Any) -> None:
        assert restored.versions("restored")[1]["reason"] == "x", "said before it is done"
        raise ConflictError("another process was first")

    monkeypatch.setattr(promotion, "move", late)
    before = standing(restored, "restored")
    assert command("rollback", "restored", "--reason", "x").code == 1
    assert standing(restored, "restored") == before


def test_rollback_needs_no_prefect_server(restored: Any, command: Callable[..., Any]) -> None:
    nobody = f"http://127.0.0.1:{free_port()}/api"
    outcome = command("rollback", "restored", "--reason", "3 a.m.", PREFECT_API_URL=nobody)
    assert outcome.code == 0, outcome.err
    assert "no event is emitted" in outcome.err
    assert restored.aliases("restored") == {"champion": 1}
    outcome = command("promote", "restored", "2", "--reason", "morning", PREFECT_API_URL="")
    assert (outcome.code, outcome.err) == (0, "")
    assert restored.aliases("restored") == {"champion": 2}


def test_a_hand_on_the_alias_shows_in_the_history(
    restored: Any, command: Callable[..., Any]
) -> None:
    restored.client.set_registered_model_alias("restored", "champion", "1")
    outcome = command("history", "restored", "--json")
    assert outcome.json["champion"] == 1
    last = outcome.json["entries"][-1]
    assert (last["kind"], last["who"], last["from"], last["to"]) == (
        "external",
        "outside assay",
        2,
        1,
    )
    assert command("promote", "restored", "2", "--reason", "as before").code == 0


def test_a_pipeline_may_wait_for_a_person(
    lab: Any, command: Callable[..., Any], prefect_server: str
) -> None:
    outcome = command("run", "approved")
    assert outcome.code == 0, outcome.err
    lines = dict(line.split(maxsplit=1) for line in outcome.out.splitlines())
    assert lines["model"] == "approved version 1: candidate"
    assert lines["champion"] == "none"
    assert lines["approve"] == "assay promote approved 1 --reason TEXT"
    assert "this pipeline is promoted by hand" in lines["reason"]
    assert lab.aliases("approved") == {"challenger": 1}
    assert lab.versions("approved")[1]["decision"] == "candidate"
    assert lab.retrain("approved").decision == "candidate", "it waits on"
    assert command("promote", "approved", "1", "--reason", "looks good").code == 0
    assert lab.aliases("approved") == {"champion": 1}
    assert lab.versions("approved")[1]["decision"] == "promoted"
    assert lab.retrain("approved").decision == "kept_champion"
    alone = command("rollback", "approved", "--reason", "x")
    assert alone.code == 2
    assert "version 1 is the first that approved has had" in alone.err


@pytest.mark.parametrize("kind", [InfrastructureError, RuntimeError, KeyboardInterrupt])
def test_a_failure_after_registering_leaves_no_alias(
    lab: Any,
    monkeypatch: pytest.MonkeyPatch,
    prefect_server: str,
    kind: type[BaseException],
) -> None:
    import importlib

    stage = importlib.import_module("tasks.decide")
    champion = lab.retrain("forsaken", "learning_rate=0.01", "epochs=1").champion

    def fail(*arguments: object) -> None:
        raise kind("the disk is gone")

    with monkeypatch.context() as patch, pytest.raises(kind):
        patch.setattr(stage, "open_data", fail)
        lab.retrain("forsaken")
    assert lab.aliases("forsaken") == {"champion": champion}
    tags = lab.versions("forsaken")
    version = max(tags)
    assert version != champion
    assert tags[champion]["decision"] == "promoted"
    assert tags[version]["decision"] == "rejected"
    said = "disk is gone" if kind is InfrastructureError else f"its run ended by {kind.__name__}"
    assert said in tags[version]["reason"]
    name, event = events_of(prefect_server, "forsaken", 2)[-1]
    assert (name, event["version"], event["from"]) == ("rejected", version, champion)

    if kind is KeyboardInterrupt:  # the last of them: the same bytes are proved again
        decision = lab.retrain("forsaken")
        assert decision.tested.registered.version == version
        assert lab.versions("forsaken")[version]["decision"] == decision.decision == "promoted"


def test_a_failure_after_the_move_leaves_the_champion(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    def fail(*arguments: object) -> None:
        raise RuntimeError("no page")

    monkeypatch.setattr(importlib.import_module("tasks.decide"), "_publish", fail)
    with pytest.raises(RuntimeError, match="no page"):
        lab.retrain("forsaken", "epochs=4")
    champion = lab.aliases("forsaken")["champion"]
    assert lab.versions("forsaken")[champion]["decision"] == "promoted"


def test_a_reason_is_one_line_without_control_characters() -> None:
    from tasks import promotion

    assert promotion._reason("two\nlines \x1b[31mred\t\N{GRINNING FACE}") == (
        "two lines [31mred \N{GRINNING FACE}"
    )
    with pytest.raises(ConfigError, match="must not be empty"):
        promotion._reason("\x1b \n")
