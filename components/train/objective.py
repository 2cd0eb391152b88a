"""What is minimised: the mean loss of a step's rows, however they are cut into parts.

Legend: B = rows of a batch.
"""

import contextlib
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from components.errors import ContractError
from components.train.config import TrainConfig
from components.train.feed import Tensors
from components.train.parallel import Group

Loss = Callable[[Tensor, Tensor], Tensor]
"""Maps logits and labels to the loss of each row (B,), or to their mean."""

_EVALUATION_ROWS = 16_384
_EVALUATION_PARTS = 4
"""Parts of a training batch that fit where none is kept for the way back."""
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def mean_loss(losses: Tensor) -> Tensor:
    """The mean of what a loss gives, whichever of its two shapes."""
    return losses.mean() if losses.ndim else losses


@final
class Objective:
    """The mean loss, its gradient, and mixed precision.

    Args:
        model: Called as ``model(*inputs)``.
        loss: As :data:`Loss`.
        config: Gives precision and the number of parts.
        device: Where tensors are.
        class_weights: float32 (classes,), how much a row of each class counts.
        group: The processes that share a step's rows.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        loss: Loss,
        config: TrainConfig,
        device: torch.device,
        class_weights: Tensor | None,
        group: Group,
    ) -> None:
        self._model = model
        self._loss = loss
        self._parts = config.accumulate
        part = -(-config.batch_size // config.accumulate)
        self._most = min(_EVALUATION_ROWS, _EVALUATION_PARTS * part)
        self._device = device
        self._weights = None if class_weights is None else class_weights.to(device)
        self._group = group
        self._dtype = _DTYPES.get(config.precision)
        half = config.precision == "float16"
        self.scaler = torch.amp.GradScaler(device.type) if half else None

    def backward(self, batch: Tensors, rows: int) -> Tensor:
        """Add the gradient of the mean loss over ``rows`` rows: the batch, or more than it.

        The batch goes through the network in parts; each counts by its rows, so the sum of the
        gradients is that of the mean over all rows, however unequal the parts are.

        Returns:
            What these rows contribute to the mean, a scalar.

        Raises:
            ContractError: The loss has a shape that cannot be reduced.
        """
        total: Tensor | int = rows
        if self._weights is not None:
            total = self._group.sum(self._weights[batch[-1]].sum())
        here = len(batch[-1])
        value = torch.zeros((), device=self._device) if self._parts > 1 or not here else None
        for part in range(self._parts):
            first, last = part * here // self._parts, (part + 1) * here // self._parts
            if first == last:
                continue
            piece = batch if self._parts == 1 else [t[first:last] for t in batch]
            with self._autocast():
                share = self._share(piece, total)
            scaled = share if self.scaler is None else self.scaler.scale(share)
            scaled.backward()  # type: ignore[no-untyped-call]
            value = share.detach() if value is None else value + share.detach()
        assert value is not None, "a batch without rows starts from zero"
        return value

    @torch.no_grad()  # not inference mode: a model may keep what it computes here
    def evaluate(self, model: nn.Module, rows: Tensors) -> float:
        """The mean loss of rows in eval mode and float32."""
        model.eval()
        total, weight = 0.0, 0.0
        for start in range(0, len(rows[-1]), self._most):
            *inputs, labels = (tensor[start : start + self._most] for tensor in rows)
            losses = self._loss(model(*inputs), labels)
            total += float(self._reduce(losses, labels, 1))
            weights = self._weights
            weight += len(labels) if weights is None else float(weights[labels].sum())
        return total / weight

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._dtype)

    def _share(self, piece: Tensors, total: Tensor | int) -> Tensor:
        *inputs, labels = piece
        losses = self._loss(self._model(*inputs), labels)
        if self._weights is None and total == len(labels):
            if losses.ndim == 0:
                return losses
            if losses.shape == labels.shape[:1]:
                return losses.mean()
        return self._reduce(losses, labels, total)

    def _reduce(self, losses: Tensor, labels: Tensor, total: Tensor | int) -> Tensor:
        if losses.shape == labels.shape[:1]:
            weighted = losses if self._weights is None else losses * self._weights[labels]
            return weighted.sum() / total
        if losses.ndim == 0 and self._weights is None:
            return losses * (len(labels) / total)
        kind = "one loss for each row" + ("" if self._weights is not None else ", or their mean")
        raise ContractError(
            f"the pipeline's loss must give {kind}: a tensor of shape ({len(labels)},)"
            f"{'' if self._weights is not None else ' or ()'}; got {tuple(losses.shape)}. Use "
            "reduction='none' in PyTorch's losses"
            + (", or set class_weights=none." if self._weights is not None else ".")
        )
