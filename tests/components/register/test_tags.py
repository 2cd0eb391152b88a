"""What a version says of itself, and what its consumers are told to install."""

from importlib.metadata import PackageNotFoundError, version

import pytest
from support.records import exported_model

from components.errors import ConfigError
from components.records import ExportedModel
from components.register import tags
from components.register.tags import (
    RUNTIMES,
    consumer_requirements,
    installed_runtime,
    version_tags,
)


@pytest.fixture
def exported() -> ExportedModel:
    return exported_model()


def install(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Pretend that these distributions of ONNX Runtime are installed, and no other."""
    known = {name.replace("_", "-"): number for name, number in versions.items()}

    def look(name: str) -> str:
        if name in RUNTIMES and name not in known:
            raise PackageNotFoundError(name)
        return known.get(name) or version(name)

    monkeypatch.setattr(tags, "version", look)


def test_a_version_says_where_it_came_from(exported: ExportedModel) -> None:
    assert version_tags(exported) == {
        "onnx_sha256": "sha of onnx",
        "data_fingerprint": "data",
        "code_revision": "abc+changes",
        "code_digest": "code",
        "config_digest": "config",
        "as_of": "2014-01-01",
        "window": "train a, hold out b",
        "seed": "3",
    }


def test_what_led_to_a_version_is_told_where_it_is_known(exported: ExportedModel) -> None:
    told = version_tags(exported, parent="digits/3", flow_run_id="f", flow_run_url="http://ui/f")
    assert told == {
        **version_tags(exported),
        "parent_champion": "digits/3",
        "flow_run_id": "f",
        "flow_run_url": "http://ui/f",
    }


def test_the_runtime_here_is_the_one_that_is_installed() -> None:
    name, number = installed_runtime()
    assert name in RUNTIMES
    assert version(name) == number


@pytest.mark.parametrize("name", RUNTIMES)
def test_either_runtime_will_do(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    install(monkeypatch, **{name.replace("-", "_"): "9.8.7"})
    assert installed_runtime() == (name, "9.8.7")
    assert consumer_requirements()[0] == "onnxruntime==9.8.7", "a consumer needs no GPU"


def test_no_runtime_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(ConfigError, match="found none"):
        installed_runtime()


def test_two_runtimes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, onnxruntime="1.0", onnxruntime_gpu="1.0")
    with pytest.raises(ConfigError, match=r"found onnxruntime-gpu, onnxruntime\. Uninstall both"):
        consumer_requirements()


def test_requirements_pin_what_is_installed_here() -> None:
    pins = dict(line.split("==") for line in consumer_requirements())
    assert set(pins) == {"onnxruntime", "mlflow", "numpy", "onnx", "pandas"}
    for name, number in pins.items():
        if name != "onnxruntime":
            assert version(name) == number
