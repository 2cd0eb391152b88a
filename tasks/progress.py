"""Progress of training: a bar in a terminal, log lines elsewhere, and Prefect's artifact."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from components.adapters.prefect_runtime import ProgressArtifact
from components.train.checkpoint import Epoch

Log = logging.Logger | logging.LoggerAdapter[logging.Logger]
_ARTIFACT_EVERY_S = 2.0


@final
class TrainingProgress:
    """Shows steps on a bar, if there is one, every epoch as a line, and both in Prefect."""

    def __init__(self, epochs: int, bar: Progress | None, artifact: ProgressArtifact) -> None:
        self._epochs = epochs
        self._bar = bar
        self._artifact = artifact
        self._task = bar.add_task("training", total=None, loss="") if bar else None
        self._shown = time.monotonic()

    def steps(self, done: int, total: int) -> None:
        """Move the bar and, every two seconds, the artifact."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)
        now = time.monotonic()
        if now - self._shown >= _ARTIFACT_EVERY_S:
            self._shown = now
            self._artifact.show(100.0 * done / total)

    def epoch(self, epoch: Epoch, log: Log) -> None:
        """Show an epoch's losses beside the bar, or log them."""
        text = f"training loss {epoch.train_loss:.4f}, validation loss {epoch.validation_loss:.4f}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, loss=f"epoch {epoch.number}/{self._epochs}: {text}")
        else:
            log.info("Epoch %d of at most %d: %s", epoch.number, self._epochs, text)

    def end(self) -> None:
        """Training has ended, early or not."""
        self._artifact.show(100.0)


@contextlib.contextmanager
def progress_bar(pipeline: str, epochs: int) -> Iterator[TrainingProgress]:
    """A bar on stderr if that is a terminal."""
    artifact = ProgressArtifact(f"{pipeline}-training", f"Training of {pipeline}")
    if not sys.stderr.isatty():
        yield TrainingProgress(epochs, None, artifact)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield TrainingProgress(epochs, bar, artifact)
