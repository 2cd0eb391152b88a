"""The gates of validate on a trained model: contract, gradients, quality, leakage, source."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel
from torch import Tensor

from components.contract import Model
from components.data.encoding import Encoding, read_labels
from components.data.snapshot import Snapshot
from components.errors import AssayError, ContractError, DataError, GateError
from components.evaluate import answer_rows, measure
from components.export.predictors import TorchPredictor
from components.pipeline import Pipeline, Scored
from components.train.config import TrainConfig
from components.train.run import build_model, to_tensors
from components.validate.component_rows import Batch, pipeline_loss, pipeline_waivers
from components.validate.contract import verify_contract
from components.validate.contract_report import ContractReport
from components.validate.gates import check_quality
from components.validate.gates.baseline import label_frequencies
from components.validate.gates.leakage import LeakageReport, check_leakage
from components.validate.gates.report import GatesReport
from components.validate.gradients import verify_gradients
from components.validate.gradients.report import GradientReport
from components.validate.source import SourceReport, verify_source

CONTRACT_ROWS = (8, 5, 3)
GRADIENT_ROWS = 4
BATCHES = 3
MOST_NAMED = 5
SCORABLE = ("conformance", "metadata", "inputs", "outputs", "finite")
"""Contract checks without which there is nothing to score."""


@dataclass(frozen=True)
class Evidence:
    """What the gates found; complete whether they passed or not.

    ``gradients`` is None when the model's own code failed in float64, ``scored`` when the contract
    report says that there are no outputs that could be scored or when the model failed on a
    held-out row, ``gates`` also when the pipeline's metrics failed, and ``leakage`` when the rows
    could not be looked at; unless the contract report does, ``trouble`` says why.
    """

    contract: ContractReport
    gradients: GradientReport | None
    gates: GatesReport | None
    leakage: LeakageReport | None
    source: SourceReport
    metrics: dict[str, float]
    scored: Scored | None = None
    trouble: tuple[str, ...] = ()

    def reports(self) -> dict[str, BaseModel]:
        """Every report that there is, by name."""
        named = {
            "contract_report": self.contract,
            "gradient_report": self.gradients,
            "gates_report": self.gates,
            "leakage_report": self.leakage,
            "source_report": self.source,
        }
        return {name: report for name, report in named.items() if report is not None}

    def failures(self) -> tuple[str, ...]:
        """Every failure of every gate, each with the gate's name before it."""
        failures = [f"contract: {failure}" for failure in self.contract.failures]
        failures += self.trouble
        if self.gradients is not None and not self.gradients.passed:
            failures.append(
                f"gradients: {self.gradients.reason.rstrip('.')}{_failing(self.gradients)}"
            )
        if self.gates is not None:
            failures += [f"quality: {failure}" for failure in self.gates.failures]
        if self.leakage is not None:
            failures += [f"leakage: {failure}" for failure in self.leakage.failures]
        failures += [f"source: {finding.sentence}" for finding in self.source.findings]
        return tuple(failures)

    def require_passed(self) -> tuple[GradientReport, GatesReport]:
        """Raise once, with every failure of every gate, or give the reports that were optional.

        Raises:
            GateError: At least one gate said no.
        """
        failures = self.failures()
        if failures or self.gradients is None or self.gates is None or self.leakage is None:
            blamed = self.gradients.culprit if self.gradients is not None else None
            # An empty path is the model itself, so only None gives way to the other report.
            culprit = blamed if self.contract.culprit is None else self.contract.culprit
            raise GateError("validate", failures, culprit=culprit, metrics=self.metrics)
        return self.gradients, self.gates


def collect_evidence(
    pipeline: Pipeline,
    config: TrainConfig,
    model: Model,
    encoding: Encoding,
    snapshot: Snapshot,
    *,
    seed: int,
    key: Sequence[str] = (),
) -> Evidence:
    """Run every gate on a trained model; a gate that says no does not stop the others.

    Args:
        pipeline: Gives loss, metrics, quality gates and leakage alarms.
        config: What the model was built with; a fresh instance must take its weights.
        model: In eval mode, on CPU.
        encoding: How rows become the model's inputs.
        snapshot: Its training rows serve the contract and gradient checks, those held out the
            quality gates.
        seed: Of the random directions of the gradient check.
        key: Columns that together tell rows apart.

    Raises:
        DataError: The stored rows are damaged, or too few to check with.
        ConfigError: bandit is not installed.
    """
    if snapshot.rows["train"] < GRADIENT_ROWS:
        raise DataError(
            f"validation needs at least {GRADIENT_ROWS} training rows to check a model with; got "
            f"{snapshot.rows['train']}. Widen the data source's window."
        )
    contract = verify_contract(
        model,
        contract_batches(encoding, snapshot),
        fresh=lambda: build_model(pipeline, encoding, config),
        waivers=pipeline_waivers(pipeline, model),
    )
    gradients, trouble = _check_gradients(pipeline, model, encoding, snapshot, seed)
    scored: Scored | None = None
    unanswered: tuple[str, ...] = ()
    if all(check.passed for check in contract.checks if check.name in SCORABLE):
        scored, unanswered = _answer_holdout(pipeline, model, encoding, snapshot)
    metrics, gates, unscored = _check_quality(pipeline, scored, snapshot)
    leakage, unseen = _check_leakage(pipeline, snapshot, key)
    return Evidence(
        contract=contract,
        gradients=gradients,
        gates=gates,
        leakage=leakage,
        source=verify_source(pipeline),
        metrics=metrics,
        scored=scored,
        trouble=(*trouble, *unanswered, *unscored, *unseen),
    )


def _answer_holdout(
    pipeline: Pipeline, model: Model, encoding: Encoding, snapshot: Snapshot
) -> tuple[Scored | None, tuple[str, ...]]:
    rows = snapshot.table("holdout")
    try:
        return answer_rows(pipeline, TorchPredictor(model), encoding, rows), ()
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001  the model's own code may raise anything
        what = f"{type(error).__name__}: {error}"
        return None, (f"quality: the model must answer every held-out row; it raised {what}",)


def _check_quality(
    pipeline: Pipeline, scored: Scored | None, snapshot: Snapshot
) -> tuple[dict[str, float], GatesReport | None, tuple[str, ...]]:
    if scored is None:
        return {}, None, ()
    try:
        metrics = measure(pipeline, scored)
    except ContractError as error:
        return {}, None, (f"quality: {error}",)
    frequencies = label_frequencies(snapshot, pipeline.features)
    return metrics, check_quality(pipeline, scored, metrics, frequencies), ()


def _check_leakage(
    pipeline: Pipeline, snapshot: Snapshot, key: Sequence[str]
) -> tuple[LeakageReport | None, tuple[str, ...]]:
    try:
        return check_leakage(pipeline, snapshot, key), ()
    except AssayError:
        raise
    except Exception as error:  # noqa: BLE001  scikit-learn and Arrow raise much
        what = f"{type(error).__name__}: {error}"
        return None, (f"leakage: the rows must be such that leakage can be looked for; {what}",)


def _check_gradients(
    pipeline: Pipeline, model: Model, encoding: Encoding, snapshot: Snapshot, seed: int
) -> tuple[GradientReport | None, tuple[str, ...]]:
    batches = gradient_batches(pipeline, encoding, snapshot)
    try:
        report = verify_gradients(
            model,
            pipeline_loss(pipeline),
            batches,
            seed=seed,
            waivers=pipeline_waivers(pipeline, model),
        )
    except Exception as error:  # noqa: BLE001  the model's own code may raise anything
        what = f"{type(error).__name__}: {error}"
        return None, (f"gradients: forward and backward must run in float64; they raised {what}",)
    return report, ()


def _failing(report: GradientReport) -> str:
    """The tensors that did not pass, at most five of them."""
    names = [f"{t.name} ({t.cause})" for t in report.tensors if t.refused]
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
