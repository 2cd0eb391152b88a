"""The quick step against the optimiser's own."""

import pytest
import torch
from torch import Tensor, nn

from components.train.quick_step import QuickStep


def weights(quick: bool, skipped: int | None) -> list[Tensor]:
    """Weights after some steps, in one of which the first parameter has no gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.3, fused=True)
    step = QuickStep(optimizer, parameters) if quick else optimizer.step
    for number in range(6):
        optimizer.param_groups[0]["lr"] = 0.1 / (number + 1)
        optimizer.param_groups[0]["betas"] = (0.85 + number / 100, 0.999)
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().sum().backward()
        if number == skipped:
            parameters[0].grad = None
        step()
    state = [tensor for p in parameters for tensor in optimizer.state[p].values()]
    return [*(p.detach() for p in parameters), *state]


@pytest.mark.parametrize("skipped", [None, 0, 3])
def test_quick_steps_are_equal_to_the_bit(skipped: int | None) -> None:
    pairs = zip(weights(True, skipped), weights(False, skipped), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)
    assert not torch.equal(weights(True, 3)[0], weights(True, None)[0])


def test_the_optimiser_itself_steps_only_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    made = []
    monkeypatch.setattr(optimizer, "step", lambda own=optimizer.step: made.append(own()))
    step = QuickStep(optimizer, list(model.parameters()))
    for _ in range(4):
        model(torch.ones(1, 2)).sum().backward()
        step()
    assert len(made) == 1
