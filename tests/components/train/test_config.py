"""Training settings: ranges, closed for unknown keys, frozen."""

import math
from typing import Any

import pytest
from pydantic import Field, ValidationError

from components.train.config import TrainConfig


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0},
        {"learning_rate": math.inf},
        {"learning_rate": math.nan},
        {"weight_decay": -0.1},
        {"seed": -1},
        {"seed": 2**31},
        {"validation_fraction": 0},
        {"validation_fraction": 1},
        {"patience": 0},
        {"threads": 0},
        {"threads": 257},
        {"device": "tpu"},
        {"require_gpu": "perhaps"},
        {"epochs": "2.5"},
        {"momentum": 0.9},
        {"accumulate": 0},
        {"clip_norm": -1},
        {"schedule": "linear"},
        {"class_weights": "inverse"},
        {"validation_rows": 0},
        {"precision": "float64"},
        {"compile": "max"},
        {"memory_rows": -1},
        {"workers": 0},
        {"shards": -1},
    ],
    ids=str,
)
def test_what_is_unknown_or_out_of_range_is_refused(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(ValidationError) as caught:
        TrainConfig(**bad)
    assert caught.value.errors()[0]["loc"] == (name,)


@pytest.mark.parametrize(
    "good",
    [{"epochs": 1, "batch_size": 1, "threads": 256}, {"weight_decay": 0, "seed": 2**31 - 1}],
)
def test_the_ends_of_the_ranges_are_accepted(good: dict[str, Any]) -> None:
    assert TrainConfig(**good).model_dump().items() >= good.items()


def test_words_from_the_command_line_are_read() -> None:
    config = TrainConfig.model_validate(
        {"epochs": "3", "learning_rate": "1e-2", "require_gpu": "true", "device": "cpu"}
    )
    assert (config.epochs, config.learning_rate, config.require_gpu) == (3, 0.01, True)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"workers": 2, "shards": 3}, "workers must divide shards.*workers=2 and shards=3"),
        ({"shards": 4, "batch_size": 3}, "at least shards.*batch_size=3 and 4 shards"),
        ({"workers": 4, "batch_size": 3}, "at least shards.*batch_size=3 and 4 shards"),
    ],
)
def test_shards_are_dealt_evenly_and_each_gives_a_row(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainConfig(**bad)


def test_there_are_as_many_shards_as_workers_unless_said_otherwise() -> None:
    settings = [{}, {"workers": 3}, {"shards": 4}, {"workers": 2, "shards": 4}]
    assert [TrainConfig(**given).parts for given in settings] == [1, 3, 4, 4]


def test_a_config_is_frozen_and_survives_json() -> None:
    config = TrainConfig(epochs=7)
    with pytest.raises(ValidationError, match="frozen"):
        config.epochs = 8
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


def test_a_pipeline_adds_settings_of_its_own() -> None:
    class Wider(TrainConfig):
        width: int = Field(8, ge=1)

    assert Wider.model_validate({"width": "16"}).width == 16
    with pytest.raises(ValidationError):
        Wider(width=0)


def test_every_setting_says_what_it_is() -> None:
    assert [n for n, field in TrainConfig.model_fields.items() if not field.description] == []
