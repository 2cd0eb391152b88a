"""GRUs and LSTMs over sequences of any length, for PyTorch's exporter.

PyTorch works out the shapes of these layers step by step, which fixes the length of the sequence to
the example's; its exporter then retries in silence, and sizes behind the layer become constants.
While a graph is captured, such a layer is therefore one opaque operator with the shapes of the
documentation, and is translated by the exporter's own function. A plain ``nn.RNN`` has no such
translation; it keeps the example's length.

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

Function = Callable[..., Any]


@contextmanager
def any_length() -> Iterator[dict[Function, Function]]:
    """Keep recurrent layers whole; gives the exporter's translation of each."""
    from onnxscript.function_libs.torch_lib.ops.core import aten_gru, aten_lstm

    with _Opaque():
        yield {torch.ops.assay.gru.default: aten_gru, torch.ops.assay.lstm.default: aten_lstm}


class _Opaque(TorchFunctionMode):
    """Calls an opaque operator in place of PyTorch's, unless its sequences are packed."""

    def __init__(self) -> None:
        super().__init__()
        self._gru, self._lstm = _operators()

    def __torch_function__(
        self,
        func: Function,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.gru and not isinstance(args[2], Tensor):
            return self._gru(*args)
        if func is torch.lstm and not isinstance(args[1], Tensor) and not _is_projected(*args[1]):
            return self._lstm(args[0], [*args[1]], *args[2:])
        return func(*args, **(kwargs or {}))


@cache
def _operators() -> tuple[Function, Function]:
    """Define ``assay::gru`` and ``assay::lstm``, once in a process.

    They give sizes only; no graph is run with them in it.
    """

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
        return _states(x, hx, bidirectional), torch.empty_like(hx)

    def lstm(
        x: Tensor,
        hx: list[Tensor],
        params: list[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden, cell = hx
        return _states(x, hidden, bidirectional), torch.empty_like(hidden), torch.empty_like(cell)

    return _define("gru", gru), _define("lstm", lstm)


def _states(x: Tensor, hidden: Tensor, bidirectional: bool) -> Tensor:
    return x.new_empty((*x.shape[:2], (2 if bidirectional else 1) * hidden.shape[-1]))


def _is_projected(hidden: Tensor, cell: Tensor) -> bool:
    """Whether an LSTM has a ``proj_size``, which ONNX's does not."""
    return hidden.shape[-1] != cell.shape[-1]


def _define(kind: str, sizes: Function) -> Function:
    operator = torch.library.custom_op(f"assay::{kind}", sizes, mutates_args=())
    operator.register_fake(sizes)
    return operator
