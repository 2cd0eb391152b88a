"""Hooks and activation checkpointing must leave gradients as they are."""

from typing import Any

import pytest
import torch
from support.gradient_models import Healthy, Net, checks_failed, verified
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint

from components.validate.gradients.report import GradientReport
from components.validate.waivers import Waiver, WaiverKind


def detail(report: GradientReport, name: str) -> str:
    return next(check.detail for check in report.checks if check.name == name)


def halved(gradient: Tensor) -> Tensor:
    return gradient / 2


def halved_in_place(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad /= 2


def norm_clipped(gradient: Tensor) -> Tensor:
    return gradient / (1 + gradient.norm())


def test_a_clipping_hook_is_clipping_before_unscaling() -> None:
    torch.manual_seed(0)
    model = Net(Healthy())
    model.block[1].weight.register_hook(norm_clipped)
    report = verified(model)
    assert {"loss_scale_linear", "hooks_keep_gradients"} <= set(checks_failed(report))
    assert "block.1.weight" in detail(report, "loss_scale_linear")
    assert "unscaled" in detail(report, "loss_scale_linear")
    # Each gradient is clipped alone, so that their sum is right.
    assert "accumulation_adds" not in checks_failed(report)
    assert report.culprit == "block.1"


def test_a_limit_that_only_a_scaled_loss_reaches() -> None:
    torch.manual_seed(0)
    model = Net(Healthy())
    model.block[1].weight.register_hook(lambda g: g / g.norm().clamp(min=1.0))
    report = verified(model)
    assert checks_failed(report) == ["loss_scale_linear"]
    assert report.culprit == "block.1"


def test_a_waiver_for_a_hook_does_not_excuse_a_wrong_gradient() -> None:
    class Detached(Healthy):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x.detach())

    torch.manual_seed(0)
    names = ("stem.*", "block.0.*")
    waivers = [Waiver(tensor=name, kind=WaiverKind.HOOK, reason="no hook") for name in names]
    assert "waivers_current" in checks_failed(verified(Net(Detached()), waivers=waivers))


@pytest.mark.parametrize("kind", ["parameter", "after", "module", "module before"])
def test_a_hook_that_changes_a_gradient_is_named_and_can_be_waived(kind: str) -> None:
    torch.manual_seed(0)
    model = Net(Healthy())
    hooked = model.block[1]
    if kind == "parameter":
        hooked.weight.register_hook(halved)
    elif kind == "after":
        hooked.weight.register_post_accumulate_grad_hook(halved_in_place)
    elif kind == "module":
        hooked.register_full_backward_hook(lambda m, given, taken: (given[0] / 2,))
    else:
        hooked.register_full_backward_pre_hook(lambda m, taken: (taken[0] / 2,))
    report = verified(model)
    assert "hooks_keep_gradients" in checks_failed(report)
    assert report.culprit == "block.1", report.reason
    assert "hook" in report.reason

    upstream = ["stem.*", "block.0.*"] if kind.startswith("module") else []
    own = {"parameter": ["block.1.weight"], "after": ["block.1.weight"], "module": []}
    names = [*upstream, *own.get(kind, ["block.1.*"])]
    waivers = [Waiver(tensor=name, kind=WaiverKind.HOOK, reason="meant") for name in names]
    excused = verified(model, waivers=waivers)
    assert excused.passed, excused.reason
    stale = Waiver(tensor="head.bias", kind=WaiverKind.HOOK, reason="left over")
    assert checks_failed(verified(model, waivers=[*waivers, stale])) == ["waivers_current"]


def test_hooks_that_only_look_or_do_not_bite_pass() -> None:
    seen: list[float] = []
    torch.manual_seed(0)
    model = Net(Healthy())
    model.stem.weight.register_hook(lambda g: seen.append(float(g.norm())))
    model.head.weight.register_hook(lambda g: g.clamp(-1e3, 1e3))
    model.block.register_full_backward_hook(lambda m, given, taken: None)
    report = verified(model)
    assert report.passed, report.reason
    assert seen and detail(report, "hooks_keep_gradients") == "hooks leave every gradient as it is"
    # Whether a clipping hook bites depends on the data: its waiver is not stale meanwhile.
    waiver = Waiver(tensor="head.weight", kind=WaiverKind.HOOK, reason="clips outliers")
    assert verified(model, waivers=[waiver]).passed


class Recomputed(Healthy):
    """Recomputes its own forward, with dropout, in the backward pass."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def body(self, x: Tensor) -> Tensor:
        return functional.dropout(super().forward(x), 0.5, self.training)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, **self.options)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_that_forgets_the_random_state(reentrant: bool) -> None:
    originals = vars(checkpointing).copy()
    torch.manual_seed(0)
    sound = verified(Net(Recomputed(use_reentrant=reentrant)))
    assert sound.passed, sound.reason
    assert "without activation checkpointing" in detail(sound, "checkpointing_agrees")

    faulty = Recomputed(use_reentrant=reentrant, preserve_rng_state=False)
    report = verified(Net(faulty))
    assert "checkpointing_agrees" in checks_failed(report)
    assert "block.1" in detail(report, "checkpointing_agrees")
    assert report.culprit == "block.1"
    for name in ("CheckpointFunction", "_checkpoint_without_reentrant_generator"):
        assert vars(checkpointing)[name] is originals[name]


def test_checkpointing_and_hooks_are_told_apart() -> None:
    torch.manual_seed(0)
    model = Net(Recomputed(use_reentrant=False, preserve_rng_state=False))
    model.head.weight.register_hook(lambda g: None)
    failed = checks_failed(verified(model))
    assert "checkpointing_agrees" in failed and "hooks_keep_gradients" not in failed

    model = Net(Recomputed(use_reentrant=False))
    model.head.weight.register_hook(halved)
    failed = checks_failed(verified(model))
    assert "hooks_keep_gradients" in failed and "checkpointing_agrees" not in failed


def test_a_hook_that_shows_in_eval_mode_only_is_named() -> None:
    torch.manual_seed(0)
    # Before a batch norm the bias has no gradient in train mode.
    model = Net(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)))
    model.block[1][0].bias.register_post_accumulate_grad_hook(halved_in_place)
    report = verified(model)
    assert not report.passed
    assert report.culprit == "block.1.0" and "hooks" in report.reason
