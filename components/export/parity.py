"""Proof that an ONNX graph is the same function as the module it came from.

The reference is a float64 copy of the module on the CPU. float32 itself is not exact, so the
module's own float32 error is measured, and the graph may err up to four times as much:

    error(graph) <= max(4 * error(module in float32), 1e-6 * scale)

for every output, kind of rows, batch size and optimisation level. A single row can by luck be
exact in float32; so error and scale are the largest over all batches of a kind and over the real
rows, and float32 is sampled again at inputs one rounding step away.

Source: PyTorch accepts a compiled model in the same way, by its error against a float64 baseline
relative to that of eager float32 (``same(..., fp64_ref=...)`` in torch/_dynamo/utils.py).
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict

from components.contract import (
    Arrays,
    Model,
    ModelMetadata,
    TensorSpec,
    axis_lengths,
    check_inputs,
)
from components.errors import ContractError, GateError
from components.export.divergence import Divergence, first_divergence
from components.export.measures import Run, Yardstick, changed_decisions, clear_rows, measure
from components.export.onnx_file import BATCH, graph_failures
from components.export.predictors import open_session, run_session
from components.export.probes import neighbours, other_lengths, probe_rows, split_batches

Array: TypeAlias = npt.NDArray[np.generic]
Engine: TypeAlias = Callable[[Arrays], list[Array]]
Optimisation = Literal["disabled", "all"]

_VACUOUS = 1e-2  # a module this far from its own float64 copy can be compared with nothing
RESAMPLES = 4


class Case(BaseModel):
    """One output of one comparison; ``error`` is the largest absolute difference.

    An integer output may differ, beyond ``allowed`` = 0, only in rows that rounding can decide.
    ``lengths`` are those of dynamic axes other than the batch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    case: str
    batch: int
    optimisation: Optimisation
    output: str
    error: float
    allowed: float
    scale: float
    lengths: Mapping[str, int] = {}


class ParityReport(BaseModel):
    """Every comparison made, and every failure, in the order in which to mend them.

    Where values differ, ``divergence`` says where in the graph that starts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    passed: bool
    failures: tuple[str, ...]
    cases: tuple[Case, ...]
    divergence: Divergence | None = None


@dataclass(frozen=True)
class _Findings:
    """What comparing gave so far, and the first run in which values of a graph differed."""

    cases: list[Case]
    failures: list[str]
    unequal: dict[Optimisation, Run]

    def add(self, run: Run, case: Case, failure: str | None) -> None:
        self.cases.append(case)
        if failure:
            self.failures.append(failure)
            self.unequal.setdefault(case.optimisation, run)


@dataclass(frozen=True)
class _Engines:
    """The same function three times; float64 is what the others are held against."""

    float64: Engine
    float32: Engine
    graph: Mapping[Optimisation, Engine]


def check_parity(model: Model, onnx_model: bytes, inputs: Arrays, *, seed: int = 0) -> ParityReport:
    """Compare an ONNX file with the module it came from.

    Names come first, then dynamic axes, dtypes and shapes; only a file that is right so far is run.

    Args:
        model: The module; it is copied, and may be in any mode and on any device.
        onnx_model: The bytes to judge, as exported or as downloaded again.
        inputs: Real rows as the model's named inputs, one or more; up to 1024 of them are drawn.
        seed: Draws rows and makes up the others.

    Raises:
        ContractError: The inputs are not as the model's metadata says, or there are no rows.
    """
    metadata = model.get_model_metadata()
    check_inputs(inputs, metadata.inputs)
    if not all(array.size for array in inputs.values()):
        raise ContractError("parity needs at least one row; got none. Pass rows of the holdout.")
    found = _Findings([], graph_failures(onnx_model, metadata), {})
    if not found.failures:
        try:
            engines = _open_engines(model, onnx_model)
            _compare(engines, inputs, metadata, seed, found)
        except ContractError as error:  # the module refuses rows, or the file does not load
            found.failures.append(str(error))
    divergence = _locate(model, onnx_model, found.unequal)
    if divergence:
        found.failures.insert(0, divergence.sentence)
    return ParityReport(
        passed=not found.failures,
        failures=tuple(found.failures),
        cases=tuple(found.cases),
        divergence=divergence,
    )


def require_parity(report: ParityReport) -> None:
    """Let only a passed report through.

    Raises:
        GateError: The report holds failures.
    """
    if not report.passed:
        place = report.divergence
        raise GateError("export", report.failures, culprit=place.culprit if place else None)


def _locate(
    model: Model, onnx_model: bytes, unequal: Mapping[Optimisation, Run]
) -> Divergence | None:
    if not unequal:
        return None
    if "disabled" not in unequal:
        return Divergence.of_optimisation()
    return first_divergence(model, onnx_model, unequal["disabled"].rows)


def _open_engines(model: Model, onnx_model: bytes) -> _Engines:
    float32 = copy.deepcopy(model).cpu().eval()
    float64 = copy.deepcopy(float32).double()
    levels: dict[Optimisation, bool] = {"disabled": False, "all": True}
    sessions = {name: open_session(onnx_model, optimise=on) for name, on in levels.items()}
    return _Engines(
        float64=partial(run_module, float64, True),
        float32=partial(run_module, float32, False),
        graph={name: partial(run_session, session) for name, session in sessions.items()},
    )


def run_module(model: Model, widen: bool, rows: Arrays) -> list[Array]:
    """Answers of a module, with inputs widened to float64 or as they are.

    Raises:
        ContractError: The module refuses the rows.
    """
    arrays = [rows[spec.name] for spec in model.get_model_metadata().inputs]
    if widen:
        arrays = [a.astype(np.float64) if a.dtype.kind == "f" else a for a in arrays]
    try:
        with torch.inference_mode():
            outputs = model.predict(*map(torch.from_numpy, arrays))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ContractError(
            "predict must run in float32 and in float64; with inputs of the shapes "
            f"{[array.shape for array in arrays]} it failed: {error}. Take dtypes from the inputs "
            "or the weights, and sizes from x.shape."
        ) from error
    return [output.numpy() for output in outputs]


def _compare(
    engines: _Engines, inputs: Arrays, metadata: ModelMetadata, seed: int, found: _Findings
) -> None:
    rng = np.random.default_rng(seed)
    specs = metadata.outputs
    floor = [Yardstick() for _ in specs]
    for kind, rows in probe_rows(inputs, rng):
        batches = chain(split_batches(rows), other_lengths(rows, metadata.inputs))
        runs = [_run(engines, kind, batch, metadata) for batch in batches]
        near = [neighbours(rows, rng) for _ in range(RESAMPLES)]
        samples = runs + [_run(engines, kind, moved, metadata) for moved in near]
        yardsticks = [measure(samples, i, least) for i, least in enumerate(floor)]
        if kind == "real":
            floor = yardsticks
        for spec, yardstick in zip(specs, yardsticks, strict=True):
            found.failures.extend(_vacuous(kind, spec, yardstick))
        for run in runs:
            for level, graph in engines.graph.items():
                _judge(run, level, graph, metadata, yardsticks, found)


def _run(engines: _Engines, kind: str, rows: Arrays, metadata: ModelMetadata) -> Run:
    wide, narrow = engines.float64(rows), engines.float32(rows)
    # An axis that no input has is as long as the module makes it.
    given = axis_lengths([rows[spec.name] for spec in metadata.inputs], metadata.inputs)
    lengths = {**axis_lengths(narrow, metadata.outputs), **given}
    run = Run(kind, rows, wide, narrow, lengths)
    if fault := _type_fault(narrow, run, metadata):
        raise ContractError(f"the module: {fault}.")
    return run


def _vacuous(kind: str, spec: TensorSpec, yardstick: Yardstick) -> Iterator[str]:
    bound = _VACUOUS * yardstick.scale
    if kind == "large" or spec.dtype == "int64" or yardstick.error <= bound:
        return
    yield (
        f"{kind} rows: output {spec.name!r} of the module in float32 must be within {bound:.3g} of "
        f"itself in float64, or nothing can be compared; got {yardstick.error:.3g}. Look for a "
        "jump or a cancellation in predict"
    )


def _judge(
    run: Run,
    level: Optimisation,
    graph: Engine,
    metadata: ModelMetadata,
    yardsticks: Sequence[Yardstick],
    found: _Findings,
) -> None:
    lengths = {axis: length for axis, length in run.lengths.items() if axis != BATCH}
    sizes = [f"batch {run.size}", *(f"{axis} {length}" for axis, length in lengths.items())]
    where = f"{run.kind} rows, {', '.join(sizes)}, optimisation {level}"
    try:
        outputs = graph(run.rows)
    except ContractError as refusal:
        found.failures.append(f"{where}: {refusal}")
        return
    if fault := _type_fault(outputs, run, metadata):
        found.failures.append(f"{where}: {fault}")
        return
    clear = clear_rows(run, metadata.outputs, yardsticks)
    for index, (spec, yardstick) in enumerate(zip(metadata.outputs, yardsticks, strict=True)):
        whole = spec.dtype == "int64"
        gaps = run.differences(index, outputs)
        error = float((gaps[clear] if whole else gaps).max(initial=0.0))
        allowed = 0.0 if whole else yardstick.allowed
        case = Case(
            case=run.kind,
            batch=run.size,
            optimisation=level,
            output=spec.name,
            error=error,
            allowed=allowed,
            scale=yardstick.scale,
            lengths=lengths,
        )
        found.add(run, case, _value_fault(where, case))
        if not whole:
            changed = changed_decisions(run, index, outputs, yardstick.allowed)
            found.failures.extend(_decision_fault(where, spec, changed))


def _value_fault(where: str, case: Case) -> str | None:
    if case.error <= case.allowed:
        return None
    return (
        f"{where}: output {case.output!r} must be within {case.allowed:.3g} of the float64 module; "
        f"got {case.error:.3g} (scale {case.scale:.3g}). Export this module again, or look in "
        f"predict for a branch on the {' or on the length of '.join(['batch size', *case.lengths])}"
    )


def _decision_fault(where: str, spec: TensorSpec, changed: int) -> Iterator[str]:
    if not changed:
        return
    yield (
        f"{where}: output {spec.name!r} must decide as the module does outside the error margin; "
        f"{changed} rows do not. Look at the errors of the same case"
    )


def _type_fault(outputs: Sequence[Array], run: Run, metadata: ModelMetadata) -> str | None:
    specs = metadata.outputs
    wanted = [(spec.name, spec.dtype, spec.sized(run.lengths)) for spec in specs]
    names = [spec.name for spec in specs]
    found = [(n, o.dtype.name, o.shape) for n, o in zip(names, outputs, strict=False)]
    if found == wanted and len(outputs) == len(specs):
        return None
    return f"outputs must be {wanted}; got {found}. Mend predict or the model's metadata"
