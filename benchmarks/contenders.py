"""The training loops that are compared: each trains a case and says how long its epochs took.

All of them start from the same weights and do the same work per epoch: every row once, in shuffled
batches, forward, loss, backward and an optimiser step; no validation, checkpoint or log line. The
loss is measured afterwards and rows are counted in the epoch that is not timed, alike for all, so
that nobody pays for it while the clock runs.
"""

import copy
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.hooks import RemovableHandle

from components.train.config import TrainConfig
from components.train.device import reproducible
from components.train.feed import resident_feed
from components.train.loop import Reports, train_model
from components.train.order import Order, Partition


@dataclass
class Laps:
    """When epochs ended, and how many rows the first of them, which warms up, trained on."""

    device: torch.device
    ends: list[float] = field(default_factory=list)
    rows: int = 0
    _watch: RemovableHandle | None = None

    def watch(self, model: nn.Module) -> None:
        """Count the rows that go through a model in train mode, until the first epoch ends."""

        def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.rows += len(inputs[0]) if module.training else 0

        self._watch = model.register_forward_pre_hook(count)

    def lap(self) -> None:
        """An epoch has ended; work still queued on the device is waited for."""
        if self._watch:
            self._watch.remove()
            self._watch = None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Seconds of every epoch after the first."""
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]


@dataclass(frozen=True)
class Case:
    """A model, its rows on the CPU, and how it is trained; ``epochs`` are those that are timed."""

    name: str
    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    inputs: tuple[Tensor, ...]
    labels: Tensor
    batch_size: int
    learning_rate: float
    epochs: int

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return len(self.labels)

    def build(self, laps: Laps) -> nn.Module:
        """The untrained model on its device, watched while the first epoch runs."""
        model = copy.deepcopy(self.model).to(laps.device).train()
        laps.watch(model)
        return model

    def adam(self, model: nn.Module) -> torch.optim.Adam:
        """PyTorch's Adam as it comes."""
        return torch.optim.Adam(model.parameters(), lr=self.learning_rate)

    @torch.inference_mode()
    def mean_loss(self, model: nn.Module) -> float:
        """Mean loss over all rows in eval mode, on the CPU."""
        model = copy.deepcopy(model).cpu().eval()
        return float(self.loss(model(*self.inputs), self.labels))


Contender = Callable[[Case, Laps, int], nn.Module]
"""Trains a case for so many epochs, calls ``lap`` after each, and returns the trained model."""


def train_plain(case: Case, laps: Laps, epochs: int) -> nn.Module:
    """The loop that one writes by hand: rows on the device, shuffled once per epoch, and sliced."""
    model = case.build(laps)
    optimizer = case.adam(model)
    tensors = [tensor.to(laps.device) for tensor in (*case.inputs, case.labels)]
    for _ in range(epochs):
        order = torch.randperm(case.rows, device=laps.device)
        *inputs, labels = (tensor[order] for tensor in tensors)
        for start in range(0, case.rows, case.batch_size):
            rows = slice(start, start + case.batch_size)
            optimizer.zero_grad()
            loss = case.loss(model(*(tensor[rows] for tensor in inputs)), labels[rows])
            loss.backward()
            optimizer.step()
        laps.lap()
    return model


def train_assay(case: Case, laps: Laps, epochs: int) -> nn.Module:
    """The engine of assay; one row validates, which is the least that it takes."""
    config = TrainConfig(
        epochs=epochs,
        batch_size=case.batch_size,
        learning_rate=case.learning_rate,
        validation_fraction=1e-9,
        patience=epochs,
        threads=torch.get_num_threads(),
        device="cuda" if laps.device.type == "cuda" else "cpu",
    )
    partition = Partition(
        case.rows, config.seed, config.validation_fraction, config.validation_rows
    )
    order = Order(partition, config.batch_size)
    with reproducible(config):
        model = case.build(laps)
        feed = resident_feed([*case.inputs, case.labels], order, laps.device)
        train_model(model, case.loss, feed, config, reports=Reports(epoch=lambda _: laps.lap()))
    return model


def _loader(case: Case, device: torch.device) -> DataLoader[Any]:
    return DataLoader(
        TensorDataset(*case.inputs, case.labels),
        batch_size=case.batch_size,
        shuffle=True,
        pin_memory=device.type == "cuda",
    )


def train_dataloader(case: Case, laps: Laps, epochs: int) -> nn.Module:
    """A TensorDataset behind a DataLoader, as in PyTorch's tutorials."""
    model = case.build(laps)
    optimizer = case.adam(model)
    loader = _loader(case, laps.device)
    for _ in range(epochs):
        for batch in loader:
            *inputs, labels = (tensor.to(laps.device, non_blocking=True) for tensor in batch)
            optimizer.zero_grad()
            loss = case.loss(model(*inputs), labels)
            loss.backward()
            optimizer.step()
        laps.lap()
    return model


def train_accelerate(case: Case, laps: Laps, epochs: int) -> nn.Module:
    """accelerate: model, optimiser and DataLoader prepared, and its own backward."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # Its state is one per process and keeps the first device otherwise.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=laps.device.type == "cpu")
    model = case.build(laps)
    prepared, optimizer, loader = accelerator.prepare(
        model, case.adam(model), _loader(case, laps.device)
    )
    for _ in range(epochs):
        for *inputs, labels in loader:
            optimizer.zero_grad()
            loss = case.loss(prepared(*inputs), labels)
            accelerator.backward(loss)
            optimizer.step()
        laps.lap()
    return accelerator.unwrap_model(prepared)


class _Pairs(Dataset[Any]):
    """Rows as pairs of inputs and label, which is what skorch takes."""

    def __init__(self, case: Case) -> None:
        self._case = case

    def __len__(self) -> int:
        return self._case.rows

    def __getitem__(self, row: int) -> tuple[tuple[Tensor, ...], Tensor]:
        return tuple(tensor[row] for tensor in self._case.inputs), self._case.labels[row]


class _Criterion(nn.Module):
    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._loss = loss

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self._loss(logits, labels)


def train_skorch(case: Case, laps: Laps, epochs: int) -> nn.Module:
    """NeuralNet of skorch without validation split and without its callbacks."""
    from skorch import NeuralNet
    from skorch.utils import to_tensor

    class Net(NeuralNet):
        def infer(self, x: Any, **_: Any) -> Tensor:
            return self.module_(*to_tensor(x, device=self.device))

        def on_epoch_end(self, net: Any, **_: Any) -> None:
            laps.lap()

    net = Net(
        case.build(laps),
        criterion=_Criterion(case.loss),
        optimizer=torch.optim.Adam,
        lr=case.learning_rate,
        max_epochs=epochs,
        batch_size=case.batch_size,
        iterator_train__shuffle=True,
        iterator_train__pin_memory=laps.device.type == "cuda",
        train_split=None,
        callbacks="disable",
        device=str(laps.device),
        verbose=0,
    )
    net.fit(_Pairs(case), y=None)
    return net.module_


def train_lightning(case: Case, laps: Laps, epochs: int) -> nn.Module:
    """PyTorch Lightning's Trainer in its barebones mode, which switches off all that costs time."""
    import pytorch_lightning as lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = case.build(laps)

        def training_step(self, batch: Any, _: int) -> Tensor:
            *inputs, labels = batch
            return case.loss(self.net(*inputs), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return case.adam(self)

        def on_train_epoch_end(self) -> None:
            laps.lap()

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    trainer = lightning.Trainer(
        accelerator="gpu" if laps.device.type == "cuda" else "cpu",
        devices=1,
        max_epochs=epochs,
        barebones=True,
    )
    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about workers, loggers and intervals
        trainer.fit(module, _loader(case, laps.device))
    return module.net


PLAIN, ASSAY = "plain loop", "assay"
CONTENDERS: dict[str, Contender] = {
    PLAIN: train_plain,
    ASSAY: train_assay,
    "DataLoader loop": train_dataloader,
    "accelerate": train_accelerate,
    "skorch": train_skorch,
    "pytorch-lightning": train_lightning,
}
LIBRARIES: Mapping[str, str] = {
    "accelerate": "accelerate",
    "skorch": "skorch",
    "pytorch-lightning": "pytorch_lightning",
}


def is_installed(contender: str) -> bool:
    """Whether the library of a contender can be imported."""
    return contender not in LIBRARIES or find_spec(LIBRARIES[contender]) is not None
