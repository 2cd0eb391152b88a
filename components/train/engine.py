"""A training loop on plain autograd, the same bytes for the same seed.

Legend: B = rows of a batch, N = rows of the training split.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from components.errors import GateError, InfrastructureError
from components.train.config import TrainConfig

Loss = Callable[[Tensor, Tensor], Tensor]
_EVALUATION_ROWS = 16384


@dataclass(frozen=True)
class Epoch:
    """Mean loss per row over an epoch, and over the validation rows after it."""

    number: int
    train_loss: float
    validation_loss: float


@dataclass(frozen=True)
class Trained:
    """The best weights (on CPU), and how they were reached."""

    state: dict[str, Tensor]
    history: tuple[Epoch, ...]
    best: Epoch
    device: str


def choose_device(config: TrainConfig) -> torch.device:
    """Resolve ``device``, before any work is done.

    Raises:
        InfrastructureError: A GPU is required, or asked for by name, and CUDA is not available.
    """
    available = torch.cuda.is_available()
    if (config.require_gpu or config.device == "cuda") and not available:
        asked = "require_gpu is set" if config.require_gpu else "device is cuda"
        raise InfrastructureError(
            f"training must run on a GPU because {asked}, but PyTorch {torch.__version__} finds no "
            "CUDA device here. Send the stage to a GPU worker, or set require_gpu=false and "
            "device=auto."
        )
    if config.require_gpu and config.device == "cpu":
        raise InfrastructureError(
            "require_gpu contradicts device=cpu. Set device=auto, or require_gpu=false."
        )
    use_cuda = available and config.device != "cpu"
    return torch.device("cuda" if use_cuda else "cpu")


@contextlib.contextmanager
def reproducible(config: TrainConfig) -> Iterator[None]:
    """Seed every generator, fix threads and algorithms, and put all of it back afterwards."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # cuBLAS reads this when its first handle is made; without it matrix products may differ.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        torch.set_num_threads(config.threads)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.set_num_threads(threads)


def split_rows(rows: int, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Shuffle row numbers by the seed into training and validation, at least one row each.

    Raises:
        ValueError: There are fewer than two rows.
    """
    if rows < 2:
        raise ValueError(f"training needs at least 2 rows, got {rows}")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(config.seed))
    held = min(max(1, round(rows * config.validation_fraction)), rows - 1)
    return order[held:].sort().values, order[:held].sort().values


def train_model(
    model: nn.Module,
    loss: Loss,
    inputs: Sequence[Tensor],
    labels: Tensor,
    config: TrainConfig,
    *,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trained:
    """Minimise the mean loss with AdamW under a one-cycle learning rate, and keep the best epoch.

    The schedule is Smith and Topin's (https://arxiv.org/abs/1708.07120); training ends early after
    ``config.patience`` epochs without a lower validation loss. Call it inside
    :func:`reproducible`, and build the model there too.

    Args:
        model: Called as ``model(*inputs)``; gives logits.
        loss: Maps logits and labels to a scalar, the mean over rows.
        inputs: Tensors whose first axis has N rows.
        labels: int64 (N,).
        config: Hyper-parameters.
        on_epoch: Called after every epoch.
        on_progress: Called with steps done and steps planned.

    Raises:
        GateError: The loss stops being finite.
    """
    device = choose_device(config)
    model.to(device)
    train_rows, held_rows = split_rows(len(labels), config)
    train = [tensor[train_rows].to(device) for tensor in (*inputs, labels)]
    held = [tensor[held_rows].to(device) for tensor in (*inputs, labels)]
    steps = -(-len(train_rows) // config.batch_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.learning_rate, total_steps=steps * config.epochs + 1
    )
    order = torch.Generator().manual_seed(config.seed)
    history: list[Epoch] = []
    best_state: dict[str, Tensor] = {}
    best: Epoch | None = None
    for number in range(1, config.epochs + 1):
        model.train()
        total = torch.zeros((), dtype=torch.float64, device=device)
        shuffled = torch.randperm(len(train_rows), generator=order).to(device)
        for step in range(steps):
            rows = shuffled[step * config.batch_size : (step + 1) * config.batch_size]
            *batch, target = (tensor[rows] for tensor in train)
            optimizer.zero_grad(set_to_none=True)
            value = loss(model(*batch), target)
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += value.detach() * len(rows)
            on_progress((number - 1) * steps + step + 1, config.epochs * steps)
        epoch = Epoch(number, float(total) / len(train_rows), evaluate_loss(model, loss, held))
        _require_finite(epoch, config)
        history.append(epoch)
        on_epoch(epoch)
        if best is None or epoch.validation_loss < best.validation_loss:
            best = epoch
            best_state = {k: _copy(v) for k, v in model.state_dict().items()}
        if number - best.number >= config.patience:
            break
    assert best is not None, "epochs is at least 1"
    model.to("cpu").load_state_dict(best_state)
    return Trained(best_state, tuple(history), best, str(device))


def _copy(tensor: Tensor) -> Tensor:
    """On the CPU and contiguous, which is how safetensors takes it."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


@torch.inference_mode()
def evaluate_loss(model: nn.Module, loss: Loss, tensors: Sequence[Tensor]) -> float:
    """Mean loss per row in eval mode; the last tensor holds the labels."""
    model.eval()
    total, rows = 0.0, len(tensors[-1])
    for start in range(0, rows, _EVALUATION_ROWS):
        *batch, target = (tensor[start : start + _EVALUATION_ROWS] for tensor in tensors)
        total += float(loss(model(*batch), target)) * len(target)
    return total / rows


def _require_finite(epoch: Epoch, config: TrainConfig) -> None:
    values = torch.tensor([epoch.train_loss, epoch.validation_loss])
    if not bool(torch.isfinite(values).all()):
        raise GateError(
            "train",
            [
                f"the loss must stay finite; epoch {epoch.number} gave a training loss of "
                f"{epoch.train_loss} and a validation loss of {epoch.validation_loss}. Lower "
                f"learning_rate (now {config.learning_rate}) or weight_decay (now "
                f"{config.weight_decay}), or look for bad rows"
            ],
        )
