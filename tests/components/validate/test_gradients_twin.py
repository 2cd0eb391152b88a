"""The copy that everything happens on: its batches, its hooks, how nests of tensors are rebuilt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from components.validate.gradients import verify_gradients
from components.validate.gradients.twin import Twin, build_twin
from components.validate.nests import common_rows, map_tensors, tensors_in
from components.validate.waivers import Waiver, WaiverKind


def squared(model: nn.Module, batch: Any) -> Tensor:
    (x,) = {id(t): t for t in tensors_in(batch)}.values()
    return model(x).pow(2).mean()


def twin_on(*batches: Any) -> Twin:
    torch.manual_seed(0)
    return build_twin(nn.Linear(4, 3), squared, batches, seed=0)[0]


def test_joined_takes_the_rows_of_both() -> None:
    one, other = torch.randn(4, 4), torch.randn(2, 4)
    twin = twin_on({"x": one}, {"x": other})
    number = twin.joined(0, 1)
    assert number == 2 and twin.rows(number) == 6
    whole = nn.functional.linear(torch.cat([one, other]).double(), *twin.model.parameters())
    assert twin.value(number) == pytest.approx(float(whole.pow(2).mean().detach()), rel=1e-12)
    assert twin.rows(0) == 4 and twin.rows(1) == 2


@pytest.mark.parametrize(
    "other",
    [torch.randn(4, 5), [torch.randn(4, 4), torch.randn(4, 4)], torch.tensor(1.0)],
)
def test_batches_that_do_not_fit_are_not_joined(other: Any) -> None:
    assert twin_on(torch.randn(4, 4), other).joined(0, 1) is None


def test_batches_that_hold_one_list_twice_are_joined() -> None:
    lists = [[torch.randn(4, 4)] for _ in range(2)]
    twin = twin_on(*({"a": held, "b": held} for held in lists))
    number = twin.joined(0, 1)
    assert number is not None and twin.rows(number) == 8


def test_a_list_that_is_held_twice_stays_one_list() -> None:
    held = [torch.ones(2)]
    rebuilt = map_tensors({"a": held, "b": (held, None, "text", 3)}, torch.clone)
    assert rebuilt["a"] is rebuilt["b"][0] and rebuilt["a"] is not held
    assert rebuilt["b"][1:] == (None, "text", 3)


@pytest.mark.parametrize(
    ("beside", "rows"),
    [
        ([3, 1, 2, 2], None),
        (("a", "b", "c", "d"), None),
        ({"lengths": np.ones(4)}, None),
        (4, None),
        ([3, 1], 4),
        (None, 4),
        ("four", 4),
        (True, 4),
        (7, 4),
    ],
)
def test_rows_are_cut_only_where_nothing_else_goes_by_them(beside: Any, rows: int | None) -> None:
    assert common_rows({"x": torch.randn(4, 2), "beside": beside}) == rows


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(2, 3, batch_first=True)

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        return self.cell(packed)[1]


def test_lengths_in_a_plain_list_are_no_fault_of_the_model() -> None:
    torch.manual_seed(0)
    data = [{"x": torch.randn(4, 5, 2), "n": [5, 3, 2, 4], "id": None} for _ in range(3)]
    report = verify_gradients(Packed(), lambda m, b: m(b["x"], b["n"]).pow(2).mean(), data)
    assert report.passed, report.reason


class Counting(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)
        self.seen: list[str] = []

    def note(self, _: Tensor) -> None:
        self.seen.append("bound")


def test_hooks_of_tensors_are_copied_and_bound_to_the_copy() -> None:
    torch.manual_seed(0)
    model, seen = Counting(), list[str]()
    model.weight.register_hook(model.note)
    model.bias.register_hook(lambda _: seen.append("before"))
    model.bias.register_post_accumulate_grad_hook(lambda _: seen.append("after"))
    twin, _ = build_twin(model, squared, [torch.randn(4, 4)], seed=0)

    assert twin.has_hooks and seen == ["before", "after"]
    assert isinstance(twin.model, Counting)
    assert twin.model.seen == ["bound"] and model.seen == []
    with twin.hooks_off():
        twin.backward(0)
    assert len(seen) == 2 and len(twin.model.seen) == 1
    twin.backward(0)
    assert len(seen) == 4 and len(twin.model.seen) == 2


def test_a_model_without_hooks_has_none() -> None:
    assert not twin_on(torch.randn(4, 4)).has_hooks


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_scripted_model_is_verified_like_any_other() -> None:
    torch.manual_seed(0)
    model = torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    dict(model.named_parameters())["2.bias"].requires_grad_(False)
    frozen = Waiver(tensor="2.bias", kind=WaiverKind.FROZEN, reason="constant")
    data = [torch.randn(4, 4) for _ in range(3)]
    report = verify_gradients(model, squared, data, waivers=[frozen])
    assert report.passed, report.reason
    report = verify_gradients(model, squared, data)
    assert not report.passed and report.culprit == "2"
