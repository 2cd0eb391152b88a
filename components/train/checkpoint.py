"""Training interrupted anywhere goes on to the same bytes: its whole state, on disk.

A checkpoint is two files: the tensors as safetensors, then a JSON file that holds everything else,
the sha256 of the tensors and its own. What lacks the second, or does not agree with it, is none.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, final

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from components.digest import digest_json
from components.errors import InfrastructureError
from components.storage import Storage

KEPT = 2
_NAME = re.compile(r"^checkpoint-\d{8}-\d{10}\.json$")


class Epoch(BaseModel):
    """What an epoch came to: mean loss per row in training and, after it, of the validation rows.

    ``gradient_norm`` is the mean over the steps at which it was measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    train_loss: float
    validation_loss: float
    learning_rate: float
    gradient_norm: float


class Progress(BaseModel):
    """Where training stands, apart from its tensors.

    Args:
        epoch: The epoch that is under way, from 1.
        step: Its next step, from 0.
        loss: Sum of the losses of its rows so far, in this process.
        norms: Sum and number of the gradient norms measured in it.
        history: The epochs before.
        best: Number of the epoch with the lowest validation loss; 0 before the first has ended.
        finished: Whether training has ended.
        scaler: State of the loss scaling.
        python: State of Python's random numbers.
        numpy: State of numpy's global random numbers.
    """

    model_config = ConfigDict(extra="forbid")

    epoch: int = 1
    step: int = 0
    loss: float = 0.0
    norms: tuple[float, int] = (0.0, 0)
    history: list[Epoch] = []
    best: int = 0
    finished: bool = False
    scaler: dict[str, int | float] = {}
    python: list[Any] = []
    numpy: list[Any] = []


@dataclass(frozen=True)
class State:
    """Everything that training goes on from; tensors are on the CPU."""

    progress: Progress
    tensors: dict[str, Tensor]


@final
class Checkpoints:
    """The checkpoints of one job, the last two of them.

    Args:
        storage: Where they lie; nothing else does.
        key: The job's key: a checkpoint of another one is refused.
        warn: Told what was wrong with a checkpoint that could not be used.
    """

    def __init__(self, storage: Storage, key: str, warn: Callable[[str], None]) -> None:
        self._storage = storage
        self._key = key
        self._warn = warn

    def save(self, state: State) -> None:
        """Write a checkpoint, then drop all but the last two.

        Raises:
            OSError: It could not be written; those before it are intact.
        """
        progress = state.progress
        name = f"checkpoint-{progress.epoch:08d}-{progress.step:010d}"
        tensors = save_tensors(state.tensors)
        content = {
            "key": self._key,
            "tensors": sha256(tensors).hexdigest(),
            "progress": progress.model_dump(mode="json"),
        }
        record = _Sealed(**content, sha256=digest_json(content))
        self._prune()  # what an earlier failure left may be what fills the disk
        self._storage.delete(f"{name}.json")  # else it would speak of other tensors for a moment
        self._storage.write(f"{name}.safetensors", tensors)
        self._storage.write(f"{name}.json", record.model_dump_json().encode())
        self._prune()

    def load(self) -> State | None:
        """The latest checkpoint that is whole and belongs to this job.

        Raises:
            InfrastructureError: Their place cannot be read at all.
        """
        try:
            names = self._names()
        except OSError as error:
            raise InfrastructureError(
                f"checkpoints must be readable; {self._storage.shown} is not: {error}. Mend it, or "
                "name another place in ASSAY_CHECKPOINT_ROOT."
            ) from error
        for name in names:
            try:
                return self._read(name)
            except (OSError, ValueError, SafetensorError) as error:
                self._warn(
                    f"checkpoint {self._storage.shown}/{name} is not used: {error}. Training goes "
                    "on from the one before it, or from the start."
                )
        return None

    def _prune(self) -> None:
        kept = self._names()[:KEPT]
        for name in self._storage.names():
            if name.rpartition(".")[0] not in kept:
                self._storage.delete(name)

    def _names(self) -> list[str]:
        """Names without their endings, the latest first."""
        names = [name for name in self._storage.names() if _NAME.match(name)]
        return sorted((name.removesuffix(".json") for name in names), reverse=True)

    def _read(self, name: str) -> State:
        try:
            record = _Sealed.model_validate_json(self._storage.read(f"{name}.json"))
        except ValidationError as error:
            raise ValueError(f"its JSON file is damaged: {error.errors()[0]['msg']}") from None
        if digest_json(record.model_dump(mode="json", exclude={"sha256"})) != record.sha256:
            raise ValueError("its JSON file has been changed")
        if record.key != self._key:
            raise ValueError(
                f"it belongs to the job {record.key[:12]}, of other data, code or configuration, "
                f"and this one is {self._key[:12]}"
            )
        tensors = self._storage.read(f"{name}.safetensors")
        if sha256(tensors).hexdigest() != record.tensors:
            raise ValueError("its tensors are torn or have been changed")
        return State(record.progress, load_tensors(tensors))


class _Sealed(BaseModel):
    """The JSON file of a checkpoint."""

    model_config = ConfigDict(extra="forbid")

    key: str
    tensors: str
    progress: Progress
    sha256: str
