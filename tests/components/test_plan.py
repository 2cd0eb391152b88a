"""Planning: what is refused before anything ran, and what makes two jobs the same job."""

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plan_sources import PIPELINE, SOURCE

from components import plan
from components.contract import Model
from components.errors import ConfigError, ContractError, DataError
from components.metrics import class_metrics, resampled_accuracy
from components.pipeline import LeakageAlarms, Pipeline, QualityGate, load_pipeline
from components.pipelines.digits import pipeline as digits
from components.plan import (
    DEFAULT_AS_OF,
    code_digest,
    code_revision,
    open_data,
    open_source,
    plan_job,
    resolve_config,
)
from components.records import Job
from components.settings import load_settings

Distribution = Callable[[Path, str, Mapping[str, str]], None]


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


@pytest.fixture
def team(site: Path, distribution: Distribution) -> Pipeline:
    """A pipeline in a package of its own, found by its entry point."""
    package = site / "planned"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "source.py").write_text(SOURCE)
    (package / "pipelines.py").write_text(PIPELINE.format(module="planned"))
    distribution(site, "planned", {"planned": "planned.pipelines:pipeline"})
    return load_pipeline("planned")


def planned(pipeline: Pipeline, tmp_path: Path, **arguments: Any) -> Job:
    return plan_job(pipeline, load_settings(home=tmp_path / "state"), **arguments)


def test_a_job_says_what_was_resolved(team: Pipeline, tmp_path: Path) -> None:
    job = planned(team, tmp_path, seed=5, assignments=["epochs=7", "learning_rate=1e-2"])
    assert (job.pipeline, job.as_of, job.window, job.seed) == (
        "planned",
        DEFAULT_AS_OF,
        "all rows",
        5,
    )
    assert job.config == {**team.config.model_dump(), "seed": 5, "epochs": 7, "learning_rate": 0.01}
    assert job.rows == {"train": 8, "holdout": 4}
    assert job.excluded == {"spoilt": 3}
    assert job.force_token == ""
    assert (tmp_path / "state" / "data" / "planned").is_dir()


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["epoch=3"], r"KEY one of epochs, batch_size.*got 'epoch=3'"),
        (["epochs"], "must be KEY=VALUE .*got 'epochs'"),
        ([""], "must be KEY=VALUE .*got ''"),
        (["=3"], "got '=3'"),
        (["Epochs=3"], "got 'Epochs=3'"),
        (["seed=3"], "The seed is set with --seed"),
        (["epochs=3", "batch_size=2", "epochs=3"], "'epochs' was given twice"),
        (["epochs=many"], "epochs: .*valid integer.*got 'many'"),
        (["epochs=2.5"], "epochs: .*got '2.5'"),
        (["epochs="], "epochs: .*got ''"),
        (["epochs=0"], "epochs: .*greater than or equal to 1; got '0'"),
        (["learning_rate=nan"], "learning_rate: .*finite"),
        (["learning_rate=inf"], "learning_rate: .*finite"),
        (["learning_rate=1,5"], "learning_rate: .*got '1,5'"),
        (["require_gpu=perhaps"], "require_gpu: "),
        (["device=gpu"], "device: .*'auto', 'cpu' or 'cuda'; got 'gpu'"),
        (["epochs=x", "patience=0"], "epochs: .*patience: "),
    ],
)
def test_a_setting_that_cannot_be_is_refused(assignments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve_config(digits, 0, assignments)


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match=f"seed: .*got {seed}"):
        resolve_config(digits, seed, [])


@pytest.mark.parametrize("seed", [0, 2**31 - 1])
def test_a_seed_at_the_end_of_its_range_is_accepted(seed: int) -> None:
    assert resolve_config(digits, seed, []).seed == seed


def test_defaults_are_the_pipelines(team: Pipeline) -> None:
    config = resolve_config(team, 0, ["batch_size=32"])
    assert (config.epochs, config.batch_size) == (2, 32)
    assert team.config.batch_size == 256, "the pipeline itself stays as it is"


def test_equal_requests_are_the_same_job(team: Pipeline, tmp_path: Path) -> None:
    first, second = planned(team, tmp_path), planned(team, tmp_path / "elsewhere")
    assert first == second
    assert first.key == second.key
    assert planned(team, tmp_path, assignments=["epochs=2"]).key == first.key, (
        "the default, spelt out"
    )


def test_config_and_token_make_another_job(team: Pipeline, tmp_path: Path) -> None:
    keys = [
        planned(team, tmp_path, **change).key
        for change in (
            {},
            {"seed": 1},
            {"assignments": ["epochs=3"]},
            {"assignments": ["threads=2"]},
            {"force_token": "flow run"},
        )
    ]
    assert len(set(keys)) == len(keys)


def test_other_rows_make_another_job(
    team: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = planned(team, tmp_path)
    monkeypatch.setattr(import_module("planned.source").Rows, "offset", 1.0)
    after = planned(team, tmp_path)
    assert after.data_fingerprint != before.data_fingerprint
    assert after.code_digest == before.code_digest
    assert after.key != before.key


@pytest.mark.parametrize("name", ["source.py", "pipelines.py", "__init__.py"])
def test_other_code_makes_another_job(
    team: Pipeline, site: Path, tmp_path: Path, name: str
) -> None:
    before = planned(team, tmp_path)
    path = site / "planned" / name
    text = path.read_text()
    path.write_text(text + "# one more line\n")
    after = planned(team, tmp_path)
    assert after.code_digest != before.code_digest
    assert after.data_fingerprint == before.data_fingerprint
    assert after.key != before.key
    path.write_text(text)
    assert planned(team, tmp_path).key == before.key


def test_a_new_file_is_other_code_and_a_note_is_not(team: Pipeline, site: Path) -> None:
    before = code_digest(team)
    (site / "planned" / "notes.md").write_text("text")
    (site / "neighbour.py").write_text("")
    assert code_digest(team) == before
    (site / "planned" / "more.py").write_text("")
    assert code_digest(team) != before


def test_a_pipeline_may_be_a_single_file(site: Path) -> None:
    package = site / "rows_of_planned"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "source.py").write_text(SOURCE)
    text = PIPELINE.format(module="rows_of_planned")
    (site / "single_file.py").write_text(text)
    pipeline = import_module("single_file").pipeline
    before = code_digest(pipeline)
    (site / "single_file.py").write_text(text + "# more\n")
    assert code_digest(pipeline) != before


def test_every_part_of_a_pipeline_is_its_code(team: Pipeline, site: Path) -> None:
    """The source, the loss and the metrics may come from other packages than the model."""
    (site / "losses_of_planned.py").write_text("def loss(logits, labels): ...\n")
    loss = import_module("losses_of_planned").loss
    for part in ("loss", "metrics", "source", "resampled", "baseline"):
        pipeline = replace(digits, **{part: loss})
        before = code_digest(pipeline)
        path = site / "losses_of_planned.py"
        path.write_text(path.read_text() + "# more\n")
        assert code_digest(pipeline) != before, part


@pytest.mark.parametrize(
    "change",
    [
        {"gates": (QualityGate(metric="accuracy", minimum=0.98),)},
        {"margin": 0.5},
        {"metric": "log_loss"},
        {"leakage": LeakageAlarms(duplicate_share=0.5)},
        {"features": replace(digits.features, min_count=1)},
        {"resampled": None},
        {"resampled": resampled_accuracy("other")},
        {"metrics": functools.partial(class_metrics, output="other")},
        {"baseline": class_metrics},
        {"loss": torch.nn.functional.nll_loss},
        {"model": Model},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_a_pipeline_declares_counts_wherever_it_stands(change: dict[str, Any]) -> None:
    assert code_digest(replace(digits, **change)) != code_digest(digits)


def test_a_partial_function_counts_as_its_function(site: Path) -> None:
    path = site / "partial_of_planned.py"
    path.write_text("def loss(smoothing, logits, labels): ...\n")
    loss = functools.partial(import_module("partial_of_planned").loss, 0.1)
    before = code_digest(replace(digits, loss=loss))
    path.write_text(path.read_text() + "# more\n")
    assert code_digest(replace(digits, loss=loss)) != before


def test_a_package_without_an_init_file_is_digested_too(site: Path) -> None:
    package = site / "spacious" / "inner"
    package.mkdir(parents=True)
    (package / "source.py").write_text(SOURCE)
    text = PIPELINE.format(module="spacious.inner")
    (package / "pipelines.py").write_text(text)
    pipeline = import_module("spacious.inner.pipelines").pipeline
    before = code_digest(pipeline)
    (package / "source.py").write_text(SOURCE + "# more\n")
    assert code_digest(pipeline) != before


def test_the_products_own_code_counts(
    team: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("components", "tasks", "flows"):
        (tmp_path / "product" / folder).mkdir(parents=True)
        (tmp_path / "product" / folder / "code.py").write_text("")
    monkeypatch.setattr(plan, "__file__", str(tmp_path / "product" / "components" / "plan.py"))
    digests = [code_digest(team)]
    for folder in ("components", "tasks"):
        (tmp_path / "product" / folder / "code.py").write_text("# more")
        digests.append(code_digest(team))
    assert len(set(digests)) == 3


def test_another_version_of_an_engine_is_other_code(
    team: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, known = code_digest(team), plan.version
    monkeypatch.setattr(plan, "version", lambda n: "9.9" if n == "torch" else known(n))
    assert code_digest(team) != before


def test_the_date_makes_no_other_job_where_it_selects_no_rows(tmp_path: Path) -> None:
    jobs = [planned(digits, tmp_path, as_of=date(year, 1, 1)) for year in (2013, 2020)]
    assert jobs[0].as_of != jobs[1].as_of
    assert jobs[0].key == jobs[1].key


def test_the_data_is_checked_before_anything_else_is_done(team: Pipeline, tmp_path: Path) -> None:
    features = replace(team.features, numeric=("y",))
    with pytest.raises(DataError, match="missing: y"):
        planned(replace(team, features=features), tmp_path)


def test_an_incomplete_source_is_named(
    team: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.contract import DataSource

    class Half(DataSource):
        def prepare(self) -> None: ...

    with pytest.raises(ContractError, match="Half must implement .*missing: batches, excluded"):
        open_source(replace(team, source=Half), load_settings(home=tmp_path))


def test_stages_see_the_rows_that_were_planned_though_the_source_has_others_now(
    team: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(home=tmp_path / "state")
    job = planned(team, tmp_path)
    before = open_data(team, settings, job).table("train")
    monkeypatch.setattr(sys.modules["planned.source"].Rows, "offset", 0.5)
    assert open_data(team, settings, job).table("train").equals(before)
    assert planned(team, tmp_path).data_fingerprint != job.data_fingerprint


def test_a_worker_without_the_snapshot_takes_it_from_the_source(
    team: Pipeline, tmp_path: Path
) -> None:
    job = planned(team, tmp_path)
    elsewhere = load_settings(home=tmp_path / "elsewhere")
    snapshot = open_data(team, elsewhere, job)
    assert snapshot.fingerprint == job.data_fingerprint
    assert snapshot.rows == job.rows
    assert (tmp_path / "elsewhere" / "data" / "planned" / "snapshots").is_dir()


def test_a_worker_that_sees_other_rows_says_so(
    team: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = planned(team, tmp_path)
    monkeypatch.setattr(sys.modules["planned.source"].Rows, "offset", 0.5)
    other = planned(team, tmp_path).data_fingerprint
    with pytest.raises(DataError, match="the data of this window has changed since the run") as no:
        open_data(team, load_settings(home=tmp_path / "elsewhere"), job)
    assert job.data_fingerprint in str(no.value)
    assert other in str(no.value)


def test_snapshots_lie_where_the_setting_says(team: Pipeline, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    settings = load_settings(home=tmp_path / "state", snapshot_root=str(shared))
    job = plan_job(team, settings)
    stored = shared / "planned" / "snapshots" / job.data_fingerprint
    assert (stored / "manifest.json").is_file()
    assert not (tmp_path / "state" / "data" / "planned" / "snapshots").exists()


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_revision_is_that_of_the_pipelines_repository(team: Pipeline, site: Path) -> None:
    assert code_revision(team) == "unknown"
    git(site, "init", "--quiet")
    git(site, "add", "planned/__init__.py", "planned/source.py", "planned/pipelines.py")
    git(site, "commit", "--quiet", "--message", "first")
    (site / ".gitignore").write_text("*\n")
    head = git(site, "rev-parse", "HEAD")
    assert code_revision(team) == head
    (site / "planned" / "source.py").write_text("# changed")
    assert code_revision(team) == f"{head}+changes"


def test_without_git_the_revision_is_unknown(
    team: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert code_revision(team) == "unknown"
