"""Pipelines: what may not be declared, and how a registered one is found and loaded."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components.errors import ConfigError, ContractError
from components.pipeline import Pipeline, QualityGate, load_pipeline
from components.pipeline_entries import pipeline_entries
from components.pipelines.digits import pipeline as digits

Distribution = Callable[[Path, str, Mapping[str, str]], None]
BROKEN = {
    "quits": "raise SystemExit(0)\n",
    "unripe": "raise RuntimeError('not yet')",
    "typo": "def f(:",
    "lost": "import no_such_module_anywhere",
    "picky": "from components.errors import ContractError\nraise ContractError('no predict')",
    "plain": "pipeline = 'a string'",
    "empty": "",
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed code, on the path for one test."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    known = set(sys.modules)
    yield folder
    for name in set(sys.modules) - known:
        del sys.modules[name]


@pytest.mark.parametrize("bounds", [{}, {"minimum": float("-inf")}, {"maximum": float("inf")}])
def test_a_gate_that_lets_everything_pass_is_refused(bounds: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="'auc' must set minimum or maximum; got neither"):
        QualityGate(metric="auc", **bounds)


@pytest.mark.parametrize(
    "bounds", [{"minimum": 0.5}, {"maximum": 0.5}, {"minimum": 0, "maximum": 1}]
)
def test_a_gate_has_one_bound_or_two(bounds: dict[str, float]) -> None:
    gate = QualityGate(metric="auc", **bounds)
    assert all(getattr(gate, name) == bound for name, bound in bounds.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gates": ()}, "at least one quality gate"),
        ({"margin": -0.1}, r"must be finite and >= 0, got -0\.1"),
        ({"margin": math.nan}, "must be finite and >= 0, got nan"),
        ({"margin": math.inf}, "must be finite and >= 0, got inf"),
    ],
)
def test_a_pipeline_without_gates_or_with_a_negative_margin_is_refused(
    change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        replace(digits, **change)
    assert "'digits'" in str(caught.value)


def test_the_pipelines_that_ship_are_registered_under_their_names() -> None:
    for name in ("digits", "flights"):
        assert load_pipeline(name).name == name


@pytest.mark.parametrize(
    ("asked", "near"),
    [("digit", "digits"), ("flight", "flights"), ("Digits", "digits"), ("fligths", "flights")],
)
def test_a_near_match_is_proposed(asked: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"got '{asked}'. Did you mean {near}[? ]"):
        load_pipeline(asked)


def test_without_a_near_match_the_known_ones_are_listed() -> None:
    with pytest.raises(ConfigError, match="must be one of digits, flights") as caught:
        load_pipeline("zzz")
    assert "Did you mean" not in str(caught.value)
    assert "assay.pipelines" in str(caught.value)


@pytest.mark.parametrize("name", ["os:system", "components.pipelines.digits:pipeline", "", "../x"])
def test_a_name_is_never_an_import_path(name: str) -> None:
    with pytest.raises(ConfigError, match="pipeline must be one of"):
        load_pipeline(name)


def test_a_team_registers_its_own(site: Path, distribution: Distribution) -> None:
    (site / "team_own.py").write_text(
        "from dataclasses import replace\n"
        "from components.pipelines.digits import pipeline as digits\n"
        "pipeline = replace(digits, name='own')\n"
    )
    distribution(site, "team_own", {"own": "team_own:pipeline"})
    found = load_pipeline("own")
    assert isinstance(found, Pipeline)
    assert found.name == "own"


def test_entries_are_listed_without_importing_them(site: Path, distribution: Distribution) -> None:
    (site / "team_never.py").write_text("raise AssertionError('was imported')")
    distribution(site, "team_never", {"never": "team_never:pipeline"})
    assert pipeline_entries()["never"].value == "team_never:pipeline"
    assert "team_never" not in sys.modules


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unripe", "RuntimeError: not yet"),
        ("typo", "SyntaxError"),
        ("lost", "no_such_module_anywhere"),
        ("plain", "must name a Pipeline object; got a str"),
        ("empty", "AttributeError"),
        ("quits", "SystemExit: 0"),
    ],
)
def test_a_module_that_does_not_load_is_the_users_to_mend(
    site: Path, distribution: Distribution, name: str, words: str
) -> None:
    (site / f"team_{name}.py").write_text(BROKEN[name])
    distribution(site, f"team_{name}", {name: f"team_{name}:pipeline"})
    with pytest.raises(ConfigError, match=words) as caught:
        load_pipeline(name)
    assert f"team_{name}:pipeline" in str(caught.value)


def test_an_error_with_its_own_words_passes(site: Path, distribution: Distribution) -> None:
    (site / "team_picky.py").write_text(BROKEN["picky"])
    distribution(site, "team_picky", {"picky": "team_picky:pipeline"})
    with pytest.raises(ContractError, match="^no predict$"):
        load_pipeline("picky")


def test_a_name_registered_twice_is_refused(site: Path, distribution: Distribution) -> None:
    distribution(site, "team_one", {"same": "team_one:pipeline"})
    distribution(site, "team_two", {"same": "team_two:pipeline"})
    with pytest.raises(
        ConfigError, match="'same' is registered as team_one:pipeline and"
    ) as caught:
        load_pipeline("digits")
    assert "team_two:pipeline" in str(caught.value)


def test_one_entry_found_twice_is_one_entry(site: Path, distribution: Distribution) -> None:
    for name in ("team_one", "team_one_editable"):
        distribution(site, name, {"same": "team_one:pipeline"})
    assert pipeline_entries()["same"].value == "team_one:pipeline"
