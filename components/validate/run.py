"""The three gates of the validate stage on one trained model: contract, gradients, quality."""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from components.contract import Model
from components.data.encoding import Encoding, read_labels
from components.data.snapshot import Snapshot
from components.errors import GateError
from components.evaluate import score_rows
from components.export.predictors import TorchPredictor
from components.pipeline import Pipeline
from components.train.objective import mean_loss
from components.train.run import to_tensors
from components.validate.contract import verify_contract
from components.validate.contract_report import ContractReport
from components.validate.gates import GatesReport, check_gates
from components.validate.gradient_report import GradientReport, Verdict, Waiver, WaiverKind
from components.validate.gradients import verify_gradients

CONTRACT_ROWS = (8, 5, 3)
GRADIENT_ROWS = 4
BATCHES = 3
MOST_NAMED = 5
SCORABLE = ("conformance", "metadata", "inputs", "outputs", "finite")
"""Contract checks without which there is nothing to score."""

Batch = tuple[tuple[Tensor, ...], Tensor]


@dataclass(frozen=True)
class Evidence:
    """What the gates found; complete whether they passed or not.

    ``gradients`` is None when the model's own code failed in float64, ``gates`` when the contract
    report says that there are no outputs that could be scored; ``trouble`` then says why.
    """

    contract: ContractReport
    gradients: GradientReport | None
    gates: GatesReport | None
    metrics: dict[str, float]
    trouble: tuple[str, ...] = ()

    def reports(self) -> dict[str, BaseModel]:
        """Every report that there is, by name."""
        named = {
            "contract_report": self.contract,
            "gradient_report": self.gradients,
            "gates_report": self.gates,
        }
        return {name: report for name, report in named.items() if report is not None}

    def require_passed(self) -> tuple[GradientReport, GatesReport]:
        """Raise once, with every failure of every gate, or give the reports that were optional.

        Raises:
            GateError: At least one gate said no.
        """
        failures = [f"contract: {failure}" for failure in self.contract.failures]
        failures += [f"gradients: {trouble}" for trouble in self.trouble]
        if self.gradients is not None and not self.gradients.passed:
            failures.append(
                f"gradients: {self.gradients.reason.rstrip('.')}{_failing(self.gradients)}"
            )
        if self.gates is not None:
            failures += [f"quality: {failure}" for failure in self.gates.failures]
        if failures or self.gradients is None or self.gates is None:
            blamed = self.gradients.culprit if self.gradients is not None else None
            # An empty path is the model itself, so only None gives way to the other report.
            culprit = blamed if self.contract.culprit is None else self.contract.culprit
            raise GateError("validate", failures, culprit=culprit, metrics=self.metrics)
        return self.gradients, self.gates


def collect_evidence(
    pipeline: Pipeline,
    model: Model,
    encoding: Encoding,
    snapshot: Snapshot,
    *,
    seed: int,
) -> Evidence:
    """Run every gate on a trained model; a gate that says no does not stop the others.

    Args:
        pipeline: Gives loss, metrics and quality gates.
        model: In eval mode, on CPU.
        encoding: How rows become the model's inputs.
        snapshot: Its training rows serve the contract and gradient checks, those held out the
            quality gates.
        seed: Of the random directions of the gradient check.
    """
    contract = verify_contract(model, contract_batches(encoding, snapshot))
    gradients, trouble = _check_gradients(pipeline, model, encoding, snapshot, seed)
    metrics: dict[str, float] = {}
    gates = None
    if all(check.passed for check in contract.checks if check.name in SCORABLE):
        metrics = score_rows(pipeline, TorchPredictor(model), encoding, snapshot.table("holdout"))
        gates = check_gates(pipeline.gates, metrics)
    return Evidence(contract, gradients, gates, metrics, trouble)


def _check_gradients(
    pipeline: Pipeline, model: Model, encoding: Encoding, snapshot: Snapshot, seed: int
) -> tuple[GradientReport | None, tuple[str, ...]]:
    batches = gradient_batches(pipeline, encoding, snapshot)
    try:
        report = verify_gradients(
            model, _loss_of(pipeline), batches, seed=seed, waivers=_waivers(pipeline, model)
        )
    except Exception as error:  # noqa: BLE001  the model's own code may raise anything
        what = f"{type(error).__name__}: {error}"
        return None, (f"forward and backward must run in float64; they raised {what}",)
    return report, ()


def _waivers(pipeline: Pipeline, model: Model) -> tuple[Waiver, ...]:
    """The declared waivers, and one for every parameter that the pipeline freezes by name."""
    frozen = tuple(
        Waiver(tensor=name, kind=WaiverKind.FROZEN, reason="declared in the pipeline's frozen")
        for name, parameter in model.named_parameters()
        if any(fnmatchcase(name, pattern) for pattern in pipeline.frozen)
    )
    return (*pipeline.waivers, *frozen)


def _failing(report: GradientReport) -> str:
    """The tensors that did not pass, at most five of them."""
    doubtful = (Verdict.FAIL, Verdict.UNVERIFIABLE)
    names = [f"{t.name} ({t.cause})" for t in report.tensors if t.verdict in doubtful]
    more = ["..."] if len(names) > MOST_NAMED else []
    return f". Tensors: {', '.join([*names[:MOST_NAMED], *more])}" if names else ""


def contract_batches(encoding: Encoding, snapshot: Snapshot) -> list[tuple[Tensor, ...]]:
    """Small batches of training rows, spread over the split."""
    starts = _starts(snapshot.rows["train"], max(CONTRACT_ROWS))
    return [
        to_tensors(encoding.encode(snapshot.slice("train", start, count)))
        for start, count in zip(starts, CONTRACT_ROWS, strict=True)
    ]


def gradient_batches(pipeline: Pipeline, encoding: Encoding, snapshot: Snapshot) -> list[Batch]:
    """Small batches of inputs and labels, spread over the training rows."""
    starts = _starts(snapshot.rows["train"], GRADIENT_ROWS)
    pieces = [snapshot.slice("train", start, GRADIENT_ROWS) for start in starts]
    return [
        (
            to_tensors(encoding.encode(piece)),
            torch.from_numpy(read_labels(piece, pipeline.features)),
        )
        for piece in pieces
    ]


def _starts(rows: int, wanted: int) -> list[int]:
    last = max(0, rows - wanted)
    return [round(last * part / (BATCHES - 1)) for part in range(BATCHES)]


def _loss_of(pipeline: Pipeline) -> Callable[[nn.Module, Batch], Tensor]:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        inputs, labels = batch
        return mean_loss(pipeline.loss(model(*inputs), labels))

    return loss
