"""The training loop: plain autograd, the same bytes for the same seed, interrupted or not."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from components.errors import GateError, InfrastructureError
from components.train.checkpoint import Checkpoints, Epoch, State
from components.train.config import TrainConfig
from components.train.feed import Feed, Tensors
from components.train.hooks import GradientNorm
from components.train.objective import Loss, Objective
from components.train.parallel import ALONE, Group
from components.train.quick_step import QuickStep
from components.train.schedule import make_schedule
from components.train.standing import Standing

_LOOK_S = 0.2
_CUDA_LAG = 64
"""Steps between two looks at the losses on a GPU, each of which waits for it."""
_MOST_NAMED = 8


@dataclass(frozen=True)
class Trained:
    """The best weights (on CPU), and how they were reached.

    ``resumed`` is the epoch and step of the checkpoint that training went on from, if any.
    """

    state: dict[str, Tensor]
    history: tuple[Epoch, ...]
    best: Epoch
    device: str
    resumed: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Reports:
    """Whom the loop tells what, and who tells it to stop.

    Args:
        epoch: Called after every epoch.
        resumed: Called once with the epochs that lie before a checkpoint.
        steps: Called a few times a second with steps done and steps planned.
        warn: Called with what went wrong but does not stop training.
        stop: Asked a few times a second; once true, a checkpoint is written and KeyboardInterrupt
            raised.
    """

    epoch: Callable[[Epoch], None] = lambda epoch: None
    resumed: Callable[[Sequence[Epoch]], None] = lambda epochs: None
    steps: Callable[[int, int], None] = lambda done, total: None
    warn: Callable[[str], None] = lambda text: None
    stop: Callable[[], bool] = lambda: False


SILENT = Reports()


def train_model(
    model: nn.Module,
    loss: Loss,
    feed: Feed,
    config: TrainConfig,
    *,
    class_weights: Tensor | None = None,
    checkpoints: Checkpoints | None = None,
    every_s: float = 60.0,
    group: Group = ALONE,
    reports: Reports = SILENT,
) -> Trained:
    """Minimise the mean loss with AdamW and keep the weights of the best epoch.

    Training ends early after ``config.patience`` epochs without a lower validation loss. Call it
    inside :func:`~components.train.device.reproducible`, and build the model there too.

    Args:
        model: Called as ``model(*inputs)``; gives logits.
        loss: Maps logits and labels to the loss of each row (B,), or to their mean.
        feed: Gives the batches, on the device to train on.
        config: Hyper-parameters.
        class_weights: float32 (classes,), how much a row of each class counts.
        checkpoints: Where to go on from, and where the state is kept.
        every_s: Seconds between two checkpoints within an epoch.
        group: The processes that train together.
        reports: Whom to tell.

    Raises:
        GateError: The loss stops being finite.
        ContractError: The loss has a shape that cannot be reduced.
        InfrastructureError: The processes of the group found different checkpoints.
        KeyboardInterrupt: ``reports.stop`` asked for it.
    """
    loop = _Loop(model, loss, feed, config, class_weights, group, reports)
    return loop.run(checkpoints, every_s)


@final
class _Loop:
    """One training run under way."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        feed: Feed,
        config: TrainConfig,
        class_weights: Tensor | None,
        group: Group,
        reports: Reports,
    ) -> None:
        device = feed.device
        self._model = model.to(device)
        self._feed = feed
        self._config = config
        self._group = group
        self._reports = reports
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._quick_step = QuickStep(self._optimizer, self._parameters)
        self._norm = GradientNorm(self._parameters, config.clip_norm)
        self._schedule = make_schedule(config, feed.order.steps * config.epochs)
        called: Callable[..., Tensor] = model
        if config.compile != "off":
            called = torch.compile(model, mode=config.compile)
        self._objective = Objective(called, loss, config, device, class_weights, group)
        self._standing = Standing(model, self._optimizer, self._objective.scaler, device, group)
        self._lag = _CUDA_LAG if device.type == "cuda" else 1
        self._waiting: list[tuple[int, int, Tensor]] = []
        self._flagged = False

    def run(self, checkpoints: Checkpoints | None, every_s: float) -> Trained:
        """Train to the end, from a checkpoint if there is one."""
        self._checkpoints, self._every_s = checkpoints, every_s
        self._looked = self._saved = time.monotonic()
        standing = self._standing
        found = checkpoints.load() if checkpoints else None
        self._require_same_start(found)
        if found is not None:
            standing.restore(found)
            self._reports.resumed(standing.progress.history)
        while not standing.progress.finished:
            self._run_epoch()
            self._close_epoch()
            self._save()
        progress = standing.progress
        self._model.to("cpu").load_state_dict(standing.best)
        return Trained(
            state=standing.best,
            history=tuple(progress.history),
            best=progress.history[progress.best - 1],
            device=str(self._feed.device),
            resumed=(found.progress.epoch, found.progress.step) if found else None,
        )

    def _run_epoch(self) -> None:
        progress = self._standing.progress
        self._model.train()
        sizes = self._feed.order.epoch(progress.epoch).sizes()
        with contextlib.closing(self._feed.batches(progress.epoch, progress.step)) as batches:
            for batch in batches:
                wanted = self._step(batch, sizes[progress.step], self._due())
                progress.step += 1
                if wanted:
                    self._save()
                    if self._reports.stop():
                        raise KeyboardInterrupt
        self._settle()

    def _require_same_start(self, found: State | None) -> None:
        here = (found.progress.epoch, found.progress.step) if found else (1, 0)
        starts = [tuple(start.tolist()) for start in self._group.gather(torch.tensor(here))]
        if len(set(starts)) > 1:
            raise InfrastructureError(
                "all processes must go on from the same checkpoint; by rank they found epoch and "
                f"step {', '.join(map(str, starts))}. Let ASSAY_CHECKPOINT_ROOT name a place that "
                "every worker can read."
            )

    def _step(self, batch: Tensors, rows: int, flag: bool) -> bool:
        """One step of the optimiser; says whether any process wants a checkpoint after it."""
        progress = self._standing.progress
        done = (progress.epoch - 1) * self._feed.order.steps + progress.step
        rate, beta = self._schedule(done)
        for settings in self._optimizer.param_groups:
            settings["lr"] = rate
            settings["betas"] = (beta, settings["betas"][1])
        for parameter in self._parameters:
            parameter.grad = None
        value = self._objective.backward(batch, rows)
        self._flagged |= flag
        look = progress.step % self._lag == 0
        wanted = self._group.sum_gradients(self._parameters, self._flagged, look)
        self._flagged &= not wanted
        self._update(progress.step)
        self._waiting.append((progress.step, rows, value))
        if len(self._waiting) >= self._lag:
            self._settle()
        return wanted

    def _update(self, step: int) -> None:
        scaler = self._objective.scaler
        if scaler is None and not self._norm.wanted(step):
            self._quick_step()
            return
        with self._norm.attached(self._optimizer, step):
            if scaler is None:
                self._optimizer.step()
                return
            scaler.unscale_(self._optimizer)  # before the hook that clips
            scaler.step(self._optimizer)
            scaler.update()

    def _due(self) -> bool:
        """Whether a checkpoint is wanted; looks a few times a second."""
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return False
        self._looked = now
        progress, steps = self._standing.progress, self._feed.order.steps
        self._reports.steps(
            (progress.epoch - 1) * steps + progress.step, self._config.epochs * steps
        )
        return now - self._saved >= self._every_s or self._reports.stop()

    def _settle(self) -> None:
        """Take over the losses of the last steps, and stop at one that is not finite."""
        if not self._waiting:
            return
        progress = self._standing.progress
        tensors = [value for _, _, value in self._waiting]
        # One by one is faster than stacking one; on a GPU each would wait.
        values = [tensors[0].item()] if len(tensors) == 1 else torch.stack(tensors).tolist()
        for (step, rows, _), value in zip(self._waiting, values, strict=True):
            if not math.isfinite(value):
                raise self._not_finite(progress.epoch, step, value)
            progress.loss += value * rows
        self._waiting.clear()
        if self._norm.measured:
            norms = [n for n in torch.stack(self._norm.measured).tolist() if math.isfinite(n)]
            total, count = progress.norms
            progress.norms = (total + sum(norms), count + len(norms))
            self._norm.measured.clear()

    def _close_epoch(self) -> None:
        standing, progress = self._standing, self._standing.progress
        order = self._feed.order
        loss = self._group.sum(
            torch.tensor(progress.loss, dtype=torch.float64, device=self._feed.device)
        )
        self._group.share(list(self._model.buffers()))
        value = self._objective.evaluate(self._model, self._feed.held)
        held = torch.tensor(value, dtype=torch.float64)
        self._group.share([held])  # it decides when to stop, so all must see the same number
        norms, count = progress.norms
        epoch = Epoch(
            number=progress.epoch,
            train_loss=float(loss) / order.rows,
            validation_loss=held.item(),
            learning_rate=self._schedule(progress.epoch * order.steps - 1)[0],
            gradient_norm=norms / max(1, count),
        )
        if not math.isfinite(epoch.validation_loss):
            raise self._not_finite(epoch.number, None, epoch.validation_loss)
        best = progress.history[progress.best - 1].validation_loss if progress.best else math.inf
        progress.history.append(epoch)
        if epoch.validation_loss < best:
            progress.best = epoch.number
            standing.keep_best()
        progress.finished = (
            epoch.number - progress.best >= self._config.patience
            or epoch.number == self._config.epochs
        )
        progress.epoch, progress.step = epoch.number + 1, 0
        progress.loss, progress.norms = 0.0, (0.0, 0)
        self._reports.epoch(epoch)

    def _save(self) -> None:
        """Write a checkpoint; a disk that refuses costs the checkpoint, not the training."""
        self._settle()
        if self._checkpoints is None:
            return
        state = self._standing.capture()
        if self._group.rank == 0:
            try:
                self._checkpoints.save(state)
            except OSError as error:
                self._reports.warn(
                    f"no checkpoint could be written after epoch {state.progress.epoch}, step "
                    f"{state.progress.step}: {error}. Training goes on, and those before it are "
                    "intact. Free space, or name another place in ASSAY_CHECKPOINT_ROOT."
                )
        self._group.sum(torch.zeros(1))  # nobody ends, and so ends the others, before it is written
        self._saved = time.monotonic()

    def _not_finite(self, epoch: int, step: int | None, value: float) -> GateError:
        if step is None:
            where = f"the validation loss after epoch {epoch}"
        else:
            parts = self._feed.order.epoch(epoch).step_rows(step)
            rows = sorted(int(row) for part in parts for row in part)
            named = ", ".join(map(str, rows[:_MOST_NAMED])) + (", ..." * (len(rows) > _MOST_NAMED))
            where = (
                f"epoch {epoch}, step {step + 1} of {self._feed.order.steps} (a batch of "
                f"{len(rows)} rows of the training split, numbers {named})"
            )
        return GateError(
            "train",
            [
                f"the loss must stay finite; it was {value} at {where}. Lower learning_rate (now "
                f"{self._config.learning_rate}), set clip_norm, or look for bad rows in this batch"
            ],
        )
