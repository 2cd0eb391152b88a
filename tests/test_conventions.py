"""Rules of the repository that no other tool checks."""

import re
from pathlib import Path

import pytest

from components.settings import PREFIX, Settings

STAGES = ("train", "validate", "export", "register", "smoke_test", "decide")
LAYERS = ("flows", "tasks", "components")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_one_name_everywhere(checkout: Path, stage: str) -> None:
    for layer in (checkout, checkout / "tests"):
        assert (layer / "components" / stage).is_dir()
    for layer in ("flows", "tasks"):
        assert (checkout / layer / f"{stage}.py").is_file()
    flow = (checkout / "flows" / f"{stage}.py").read_text()
    assert f"def {stage}(" in flow
    assert f"def {stage}(" in (checkout / "tasks" / f"{stage}.py").read_text()


def test_the_flow_is_the_diagram(checkout: Path) -> None:
    body = (checkout / "flows" / "retrain.py").read_text().partition("def retrain(")[2]
    called = re.findall(r"\b(\w+)\(", body)
    assert [name for name in called if name in STAGES] == list(STAGES)
    assert not re.search(r"^\s+(if|for|while|try|with (?!transaction))\b", body, flags=re.MULTILINE)
    # What follows registering is all or nothing.
    assert re.search(r"with transaction\(\):\s+registered = register\(", body)


@pytest.mark.parametrize("layer", LAYERS)
def test_modules_are_short(checkout: Path, layer: str) -> None:
    lengths = {
        str(path.relative_to(checkout)): len(path.read_text().splitlines())
        for path in (checkout / layer).rglob("*.py")
    }
    assert lengths
    assert {name: count for name, count in lengths.items() if count > 400} == {}


def test_every_setting_is_in_the_example(checkout: Path) -> None:
    lines = (checkout / ".env.example").read_text().splitlines()
    named = re.findall(rf"^#? ?({PREFIX}\w+)=", "\n".join(lines), flags=re.MULTILINE)
    assert sorted(named) == sorted(PREFIX + name.upper() for name in Settings.model_fields)


def test_every_setting_says_what_it_is() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_tests_have_no_packages(checkout: Path) -> None:
    assert list((checkout / "tests").rglob("__init__.py")) == []


def test_pickle_is_imported_nowhere(checkout: Path) -> None:
    words = re.compile(r"\b(import|from) (pickle|cloudpickle|dill|joblib|shelve)\b|torch\.load\(")
    found = [
        str(path.relative_to(checkout))
        for layer in LAYERS
        for path in (checkout / layer).rglob("*.py")
        if words.search(path.read_text())
    ]
    assert found == []
