"""The subject of a contract verification, and what was found about it.

Legend: B = rows of a batch.
"""

import copy
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from safetensors.torch import load, save
from torch import Tensor, nn

from components.contract import Model, ModelMetadata
from components.validate.nests import stray_tensors
from components.validate.waivers import Waiver

Rows = tuple[Tensor, ...]
"""Tensors (B, ...) in the order of the metadata's inputs or outputs."""

Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True)
class Finding:
    """One broken rule in one sentence, and the path of the module at fault ('' is the model)."""

    sentence: str
    culprit: str | None = None


class NoAnswerError(Exception):
    """The model raised, or returned something that cannot be read as an answer."""

    def __init__(self, finding: Finding) -> None:
        self.finding = finding
        super().__init__(finding.sentence)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Check(_Frozen):
    """One rule: ``detail`` states it when it holds, and otherwise says everything that broke it."""

    name: str
    passed: bool
    detail: str
    culprit: str | None = None


class ContractReport(_Frozen):
    """Outcome of ``verify_contract``; plain JSON.

    ``failures`` holds one sentence per distinct fault, even where it failed several checks.
    ``culprit`` is the module path blamed by the first failed check that could blame one; ``''`` is
    the model itself, None means that no module is to blame.
    """

    passed: bool
    checks: tuple[Check, ...]
    failures: tuple[str, ...]
    culprit: str | None

    @model_validator(mode="after")
    def _follows_from_checks(self) -> Self:
        agreed = all(check.passed for check in self.checks)
        if self.passed != agreed or self.passed == bool(self.failures):
            raise ValueError(
                f"passed must follow from checks and failures; got passed={self.passed} with "
                f"{len(self.failures)} failures. Build the report with report_findings()."
            )
        return self


def check_of(name: str, rule: str, findings: Sequence[Finding]) -> Check:
    """Passed, with the rule as detail, when there are no findings."""
    detail = " ".join(dict.fromkeys(f.sentence for f in findings)) or rule
    culprits = [f.culprit for f in findings if f.culprit is not None]
    culprit = culprits[0] if culprits else None
    return Check(name=name, passed=not findings, detail=detail, culprit=culprit)


def report_findings(found: Sequence[tuple[str, str, Sequence[Finding]]]) -> ContractReport:
    """Build the report from (name, rule, findings) of every check, in order."""
    checks = tuple(check_of(name, rule, findings) for name, rule, findings in found)
    sentences = dict.fromkeys(f.sentence for _, _, findings in found for f in findings)
    culprits = [check.culprit for check in checks if check.culprit is not None]
    return ContractReport(
        passed=not sentences,
        checks=checks,
        failures=tuple(sentences),
        culprit=culprits[0] if culprits else None,
    )


def named(path: str | None) -> str:
    """How a sentence calls a module: its path in quotes, or ``the model itself``."""
    return repr(path) if path else "the model itself"


@contextmanager
def blamed(model: nn.Module, what: str) -> Iterator[None]:
    """Turn an exception of the model's own code into a :class:`NoAnswerError`."""
    try:
        yield
    except NoAnswerError:
        raise
    except Exception as error:
        path = innermost_module(model, error)
        reason = (str(error).strip().splitlines() or ["(no message)"])[0][:200].rstrip(".")
        sentence = f"{what} must not raise; {named(path)} raised {type(error).__name__}: {reason}."
        raise NoAnswerError(Finding(sentence, path)) from error


def innermost_module(model: nn.Module, error: BaseException) -> str:
    """Path of the last module on the error's stack; ``''`` when none but the model is there."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_argcount:
            # A method's first argument is its module, whatever it is called.
            owner = frame.f_locals.get(frame.f_code.co_varnames[0])
            found = paths.get(id(owner), found)
    return found


def private_copy(model: Net) -> Net:
    """A deep copy without history.

    Raises:
        NoAnswerError: An attribute cannot be copied, for example a lock or an open file.
    """
    held = [*model.buffers(), *(stray.tensor for stray in stray_tensors(model))]
    # deepcopy refuses results of a computation, such as an activation kept by the last forward.
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in held if not t.is_leaf}
    with blamed(model, "copy.deepcopy of the model, which every check works on,"):
        return copy.deepcopy(model, memo)


@dataclass(frozen=True)
class Subject:
    """The model as it was given, never called itself, and the batches to call copies with.

    Args:
        model: Copied for every check.
        batches: Real rows.
        factory: Builds the model anew, with other weights; None where that is not known.
        waivers: Declared exceptions; those of the kind ``hook`` count here.
    """

    model: Model
    batches: tuple[Rows, ...]
    factory: Callable[[], Model] | None = None
    waivers: tuple[Waiver, ...] = ()

    def fresh(self, *, training: bool = False) -> Model:
        """A private copy in train or eval mode."""
        model = private_copy(self.model)
        with blamed(model, "train() and eval()"):
            model.train(training)
        return model

    def metadata(self) -> ModelMetadata:
        """What the model declares about itself."""
        model = self.fresh()
        with blamed(model, "get_model_metadata"):
            metadata: object = model.get_model_metadata()
        if not isinstance(metadata, ModelMetadata):
            raise _unreadable("get_model_metadata must return a ModelMetadata", metadata)
        return metadata


def usable(batches: Sequence[Sequence[Tensor]]) -> tuple[Rows, ...]:
    """The batches as tuples; raises ValueError when they are too few or too small to check with."""
    found = tuple(tuple(batch) for batch in batches)
    shapes = [[tuple(row.shape) for row in rows] for rows in found]
    even = all(rows and all(rows) and len({row[0] for row in rows}) == 1 for rows in shapes)
    if len(found) < 3 or not even or not all(rows[0][0] for rows in shapes) or shapes[0][0][0] < 4:
        raise ValueError(
            "verify_contract needs three or more batches, every tensor of a batch with the same "
            f"number of rows, four or more in the first; got shapes {shapes}."
        )
    return found


def run_forward(model: Model, rows: Rows) -> Tensor:
    """Logits of exactly these tensors; raises NoAnswerError, as all calls of the model below."""
    with blamed(model, "forward"):
        logits: object = model(*rows)
    if not isinstance(logits, Tensor):
        raise _unreadable("forward must return one tensor, the logits", logits)
    return logits


def run_predict(model: Model, rows: Rows) -> Rows:
    """Outputs for exactly these tensors."""
    with blamed(model, "predict"):
        outputs: object = model.predict(*rows)
    if not isinstance(outputs, tuple) or not all(isinstance(o, Tensor) for o in outputs):
        raise _unreadable("predict must return a tuple of tensors", outputs)
    return outputs


def logits_of(model: Model, rows: Rows) -> Rows:
    """The logits, as one output, of private copies of the rows, with gradients on."""
    return (run_forward(model, clones(rows)),)


def serve(model: Model, rows: Rows) -> Rows:
    """The outputs for private copies of the rows, without gradients."""
    with torch.no_grad():
        return run_predict(model, clones(rows))


def through_bytes(model: Model) -> dict[str, Tensor]:
    """The model's state_dict, written to safetensors and read again."""
    with blamed(model, "state_dict"):
        state: Mapping[str, object] = model.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if others := sorted(set(state) - set(tensors)):
        sentence = f"state_dict must hold tensors only, for safetensors; {others} hold others."
        raise NoAnswerError(Finding(sentence, others[0].rpartition(".")[0]))
    with blamed(model, "safetensors.torch.save of the state_dict"):
        # safetensors refuses tensors that share memory, as tied weights do.
        whole = torch.contiguous_format
        return load(save({n: t.detach().clone(memory_format=whole) for n, t in tensors.items()}))


def clones(rows: Rows) -> Rows:
    """Private copies, so that a model that writes to its inputs disturbs no other check."""
    return tuple(row.clone() for row in rows)


def _unreadable(rule: str, got: object) -> NoAnswerError:
    return NoAnswerError(Finding(f"{rule}; got a {type(got).__name__}.", ""))
