"""Where training runs, what it sets there and puts back, and what it says when memory is short."""

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support.training_lab import CONFIG, change

from components.errors import InfrastructureError
from components.train.config import TrainConfig
from components.train.device import choose_device, memory_errors, reproducible

ON_CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available")


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


def test_every_generator_is_seeded_and_put_back() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    found = []
    for seed in (3, 3, 4):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        with reproducible(change(seed=seed)):
            found.append(draw())
        after = draw()
    assert found[0] == found[1]
    assert all(one != other for one, other in zip(found[0], found[2], strict=True))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert after == draw(), "as if nothing had been drawn"


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


def test_short_memory_names_the_settings_that_help() -> None:
    config = change(batch_size=100, accumulate=3, precision="bfloat16", memory_rows=7)
    words = (
        r"batch_size=100 in 3 parts of 34 rows, precision=bfloat16 and memory_rows=7\. Raise "
        r"accumulate \(--set accumulate=6 .*set memory_rows=0"
    )
    with pytest.raises(InfrastructureError, match=words) as caught, memory_errors(config):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="mine"), memory_errors(CONFIG):
        raise RuntimeError("mine")
