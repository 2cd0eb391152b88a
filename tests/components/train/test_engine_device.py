"""What training sets up around its loop, and on which device it runs."""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from components.errors import InfrastructureError
from components.train.config import TrainConfig
from components.train.engine import choose_device, reproducible, train_model

CONFIG = TrainConfig(epochs=3, batch_size=16, learning_rate=1e-2, patience=3, device="cpu")
ON_CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available")


def change(**values: object) -> TrainConfig:
    return CONFIG.model_copy(update=values)


@pytest.fixture
def _restored() -> Iterator[None]:
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict, warn_only=warn)


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize(("strict", "warn"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("fails", [False, True])
def test_what_was_set_before_is_put_back(strict: bool, warn: bool, fails: bool) -> None:
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(strict, warn_only=warn)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    try:
        with reproducible(change(threads=1, seed=5)):
            assert torch.get_num_threads() == 1
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert torch.initial_seed() == 5
            torch.rand(10)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 2
    assert torch.are_deterministic_algorithms_enabled() is strict
    assert torch.is_deterministic_algorithms_warn_only_enabled() is warn


def test_cublas_is_told_to_be_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with reproducible(CONFIG):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with reproducible(CONFIG):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "the user's choice stays"


@ON_CPU_ONLY
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (change(device="auto", require_gpu=True), "require_gpu is set"),
        (change(device="cuda"), "device is cuda"),
        (change(device="cpu", require_gpu=True), "require_gpu is set"),
    ],
)
def test_a_gpu_that_is_required_and_absent_is_refused(config: TrainConfig, words: str) -> None:
    with pytest.raises(InfrastructureError, match=words):
        choose_device(config)


def test_a_required_gpu_contradicts_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InfrastructureError, match="contradicts device=cpu"):
        choose_device(change(device="cpu", require_gpu=True))


@pytest.mark.parametrize("available", [False, True])
def test_the_device_follows_the_config_and_the_machine(
    monkeypatch: pytest.MonkeyPatch, available: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert choose_device(change(device="auto")).type == ("cuda" if available else "cpu")
    assert choose_device(change(device="cpu")).type == "cpu"


@ON_CPU_ONLY
def test_training_checks_the_device_before_it_touches_the_model() -> None:
    class Untouched(nn.Module):
        def _apply(self, *args: object, **kwargs: object) -> "Untouched":
            raise AssertionError("work was done")

    with pytest.raises(InfrastructureError):
        train_model(
            Untouched(), nn.functional.cross_entropy, [], torch.zeros(0), change(device="cuda")
        )
