"""Progress of training: a bar in a terminal, log lines elsewhere."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from components.train.engine import Epoch

Log = logging.Logger | logging.LoggerAdapter[logging.Logger]


@final
class TrainingProgress:
    """Shows steps on a bar, if there is one, and every epoch as a line."""

    def __init__(self, epochs: int, bar: Progress | None) -> None:
        self._epochs = epochs
        self._bar = bar
        self._task = bar.add_task("training", total=None, loss="") if bar else None

    def steps(self, done: int, total: int) -> None:
        """Move the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)

    def epoch(self, epoch: Epoch, log: Log) -> None:
        """Show an epoch's losses beside the bar, or log them."""
        text = f"training loss {epoch.train_loss:.4f}, validation loss {epoch.validation_loss:.4f}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, loss=f"epoch {epoch.number}/{self._epochs}: {text}")
        else:
            log.info("Epoch %d of at most %d: %s", epoch.number, self._epochs, text)


@contextlib.contextmanager
def progress_bar(epochs: int) -> Iterator[TrainingProgress]:
    """A bar on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        yield TrainingProgress(epochs, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield TrainingProgress(epochs, bar)
