"""Spectral norms, whose gradient is right only once their power iteration has converged."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm


def settle_spectral_norms(model: nn.Module) -> None:
    """Give every spectral norm of a copy the exact singular vectors of its weight.

    torch treats the vectors as constants (Miyato et al., https://arxiv.org/abs/1802.05957). That is
    the gradient of the norm where they are exact, which they come to be over many steps of
    training; after one iteration the difference would look like a wrong backward.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.utils.parametrize.ParametrizationList):
                _settle_parametrization(module)
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, SpectralNorm):
                    matrix = hook.reshape_weight_to_matrix(getattr(module, f"{hook.name}_orig"))
                    given = (getattr(module, f"{hook.name}_{which}") for which in "uv")
                    _settle(matrix, *given)


def _settle_parametrization(parametrizations: nn.utils.parametrize.ParametrizationList) -> None:
    first = next(iter(parametrizations))
    # Behind another parametrization, or split into several tensors, the weight is not at hand.
    weight = getattr(parametrizations, "original", None)
    if isinstance(first, _SpectralNorm) and weight is not None and weight.ndim > 1:
        _settle(first._reshape_weight_to_matrix(weight), first._u, first._v)


def _settle(matrix: Tensor, left: Tensor, right: Tensor) -> None:
    lefts, _, rights = torch.linalg.svd(matrix, full_matrices=False)
    left.copy_(lefts[:, 0])
    right.copy_(rights[0].conj())
