"""A GRU over sequences of any length, for PyTorch's exporter.

PyTorch works out the shapes of a GRU step by step, which fixes the length of the sequence to the
example's; its exporter then retries in silence, and sizes behind the layer become constants. While
a graph is captured, the layer is therefore one opaque operator with the shapes of the
documentation, and is translated by the exporter's own function. An LSTM needs no such help.

Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html and
https://docs.pytorch.org/docs/stable/library.html.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_WIDTH = 9  # arguments of a GRU over a tensor; one over a packed sequence has fewer


@contextmanager
def any_length() -> Iterator[dict[Callable[..., Any], Callable[..., Any]]]:
    """Keep GRUs whole; gives the exporter's translation of the operator that stands for them."""
    from onnxscript.function_libs.torch_lib.ops.core import aten_gru

    with _Opaque():
        yield {torch.ops.assay.gru.default: aten_gru}


class _Opaque(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self._gru = _operator()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.gru and len(args) == _WIDTH:
            return self._gru(*args)
        return func(*args, **(kwargs or {}))


@cache
def _operator() -> Callable[..., Any]:
    """Define ``assay::gru``, once in a process."""

    def gru(
        x: Tensor,
        hx: Tensor,
        params: list[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, Tensor]:
        # Sizes of the real layer only; the graph is never run with this operator in it.
        directions = 2 if bidirectional else 1
        return x.new_empty((*x.shape[:2], directions * hx.shape[-1])), torch.empty_like(hx)

    operator = torch.library.custom_op("assay::gru", gru, mutates_args=())
    operator.register_fake(gru)
    return operator
