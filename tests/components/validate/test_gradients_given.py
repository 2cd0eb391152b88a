"""What is given stays as it is, and what user code may do or raise is dealt with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from components.validate.gradients import verify_gradients
from components.validate.gradients.report import Cause, Verdict
from components.validate.waivers import Waiver, WaiverKind


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).pow(2).mean()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 4, generator=generator) for _ in range(3)]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def spoil(model: nn.Linear) -> None:
    """What a hook may do to the model that it closes over."""
    with torch.no_grad():
        model.weight.fill_(torch.nan)
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.ones_like(parameter)
        parameter.grad.fill_(7.0)
    model.eval()


def before_gradient(model: nn.Linear) -> None:
    model.weight.register_hook(lambda _: spoil(model))


def after_gradient(model: nn.Linear) -> None:
    model.weight.register_post_accumulate_grad_hook(lambda _: spoil(model))


def on_backward(model: nn.Linear) -> None:
    model.register_full_backward_pre_hook(lambda *_: spoil(model))


def on_forward(model: nn.Linear) -> None:
    model.register_forward_hook(lambda *_: spoil(model))


@pytest.mark.parametrize("register", [before_gradient, after_gradient, on_backward, on_forward])
@pytest.mark.parametrize("graded", [False, True])
def test_hooks_that_write_to_the_given_model_leave_it_unharmed(
    register: Callable[[nn.Linear], None], graded: bool
) -> None:
    model = nn.Linear(4, 3)
    if graded:
        torch.autograd.backward(squared(model, batches()[0]))
    given = [p.grad for p in model.parameters()]
    gradients = [g if g is None else g.clone() for g in given]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    register(model)

    # A module's backward hook warns where no input requires grad.
    data = [batch.requires_grad_() for batch in batches()]
    assert verify_gradients(model, squared, data).passed

    assert model.training
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    for parameter, before, kept in zip(model.parameters(), given, gradients, strict=True):
        assert parameter.grad is before
        assert kept is None or (before is not None and torch.equal(before, kept))


def test_zeros_that_a_hook_wrote_over_nan_are_undone() -> None:
    model = nn.Linear(4, 3)
    model.register_buffer("unset", torch.full((2,), torch.nan))

    def zero(*_: Any) -> None:
        model.unset.fill_(0.0)

    model.register_forward_hook(zero)
    verify_gradients(model, squared, batches())
    assert bool(model.unset.isnan().all())


def test_a_forward_bound_to_the_given_model_leaves_no_gradients() -> None:
    model = nn.Linear(4, 3)
    original = model.forward
    model.forward = lambda x: original(x)  # type: ignore[method-assign]
    assert not verify_gradients(model, squared, batches()).passed
    assert model.weight.grad is None and model.bias.grad is None


def test_a_buffer_with_a_graph_beside_a_hook() -> None:
    model = nn.Linear(4, 3)
    model.register_buffer("doubled", model.weight * 2)
    model.register_forward_hook(lambda *_: None)
    assert verify_gradients(model, squared, batches()).passed


class NumpyNoise(OneLayer):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * float(1 + np.random.rand())


def test_numpy_noise_is_seeded_and_its_state_kept() -> None:
    model = NumpyNoise()
    np.random.seed(3)
    assert verify_gradients(model, squared, batches()).passed
    assert np.random.rand() == np.random.RandomState(3).rand()


class Wrapped(MutableMapping[str, Tensor]):
    """A mapping that shares what it holds with its shallow copy."""

    def __init__(self, held: dict[str, Tensor]) -> None:
        self.held = held

    def __getitem__(self, key: str) -> Tensor:
        return self.held[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self.held[key] = value

    def __delitem__(self, key: str) -> None:
        del self.held[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def test_a_batch_that_is_a_mapping_of_its_own_kind_is_not_written_to() -> None:
    tensors = batches()
    given = [Wrapped({"x": x}) for x in tensors]
    report = verify_gradients(nn.Linear(4, 3), lambda m, b: squared(m, b["x"]), given)
    assert {t.verdict for t in report.tensors} == {Verdict.PASS}
    assert all(batch["x"] is x for batch, x in zip(given, tensors, strict=True))


def test_another_default_device_is_not_used() -> None:
    model, data = OneLayer(), batches()
    with torch.device("meta"):
        assert verify_gradients(model, squared, data).passed


class Momentum(OneLayer):
    """A frozen teacher that follows the trained layer in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(4, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        given = self.layer(x) - self.teacher(x)
        with torch.no_grad():
            pairs = zip(self.layer.parameters(), self.teacher.parameters(), strict=True)
            for trained, follower in pairs:
                follower.lerp_(trained, 0.1)
        return given


def test_frozen_parameters_that_forward_writes_to_start_anew_every_time() -> None:
    frozen = Waiver(tensor="teacher.*", kind=WaiverKind.FROZEN, reason="follows the student")
    assert verify_gradients(Momentum(), squared, batches(), waivers=[frozen]).passed

    report = verify_gradients(Momentum(), squared, batches())
    failed = [check.name for check in report.checks if not check.passed]
    assert failed == ["freezes_declared", "forward_keeps_parameters"]
    assert report.culprit == "teacher"


class NoCopies(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        raise AttributeError("no copies")


def test_whatever_copying_raises_is_explained() -> None:
    with pytest.raises(ValueError, match=r"survive copy\.deepcopy.*AttributeError: no copies"):
        verify_gradients(NoCopies(4, 3), squared, batches())


class OnlyTrains(OneLayer):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            raise KeyError("no head for prediction")
        return self.layer(x)


def test_an_exception_of_the_model_says_where_it_rose() -> None:
    model = OnlyTrains()
    with pytest.raises(KeyError, match="no head") as caught:
        verify_gradients(model, squared, batches())
    assert caught.value.__notes__ == ["while gradients were verified: batch 0, eval mode"]
    assert model.training


class LowInEval(OneLayer):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x if self.training else x.float())


def test_float32_that_only_eval_mode_asks_for_degrades() -> None:
    report = verify_gradients(LowInEval(), squared, batches())
    assert report.passed
    assert {t.verdict for t in report.tensors} == {Verdict.DEGRADED}


class NeedsContext(nn.Module):
    """Gives NaN, and cannot be called but by its owner."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.context: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.context:
            raise RuntimeError("no context")
        self.context.pop()
        return (self.weight * 0 * x.sum() - 1).sqrt()


class Owner(OneLayer):
    def __init__(self) -> None:
        super().__init__()
        self.inner = NeedsContext()

    def forward(self, x: Tensor) -> Tensor:
        self.inner.context = [1]
        return self.inner(self.layer(x))


def test_nan_in_a_module_that_cannot_be_replayed_is_laid_to_its_owner() -> None:
    report = verify_gradients(Owner(), squared, batches())
    assert {t.cause for t in report.tensors} == {Cause.NON_FINITE}
    assert report.culprit == ""
