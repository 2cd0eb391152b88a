"""Proof that a registered graph answers rows as the module answers their encoding.

The network itself is proved by :mod:`components.export.parity`; here the columns in front of it and
the label behind it are, on tables of the source's own types: the reference is the module in float64
on the inputs that training would have made of the same rows. The bounds are those of parity, or
what the proved network errs by on the same inputs, where that is more: where most answers are
saturated, a few rows decide how far float32 strays, and they must not fail a graph that is equal.

Legend: B = batch.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from components.contract import Arrays, Model, ModelMetadata
from components.data.encoding import Encoding
from components.errors import ContractError
from components.export.measures import (
    FACTOR,
    Floats,
    Run,
    Yardstick,
    any_by_row,
    clear_rows,
    measure,
)
from components.export.onnx_file import graph_failures
from components.export.parity import RESAMPLES, Case, Engine, Optimisation, ParityReport, run_module
from components.export.predictors import open_session, run_session
from components.export.probes import BATCHES, LARGE, neighbours
from components.export.raw_columns import RawColumns
from components.export.raw_graph import LABEL, compose_graph, label_of, registered_metadata

Array = npt.NDArray[np.generic]

_ROWS = max(BATCHES)
_UNSEEN = "≠ a category that no row has"


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A registered graph with what it was composed of.

    Args:
        onnx: Its bytes.
        metadata: What it takes and gives.
        columns: The columns of rows that it takes.
        encoding: What training made of these columns.
        threshold: Where a single number turns to the second class.
        described: What the network alone takes and gives.
        network: The bytes of the network alone.
    """

    onnx: bytes
    metadata: ModelMetadata
    columns: RawColumns
    encoding: Encoding
    threshold: float
    described: ModelMetadata
    network: bytes

    @classmethod
    def compose(
        cls,
        network: bytes,
        described: ModelMetadata,
        encoding: Encoding,
        columns: RawColumns,
        threshold: float,
    ) -> "Registered":
        """Put rows in front of a network and the label behind it.

        Raises:
            GateError: As :func:`~components.export.raw_graph.registered_metadata`.
        """
        return cls(
            onnx=compose_graph(
                network, described, encoding=encoding, columns=columns, threshold=threshold
            ),
            metadata=registered_metadata(described, columns),
            columns=columns,
            encoding=encoding,
            threshold=threshold,
            described=described,
            network=network,
        )

    def around(self, network: bytes) -> bytes:
        """The same columns and label around another form of the network."""
        return compose_graph(
            network,
            self.described,
            encoding=self.encoding,
            columns=self.columns,
            threshold=self.threshold,
        )


def check_raw_parity(
    model: Model, registered: Registered, rows: pa.Table, *, seed: int = 0
) -> ParityReport:
    """Compare a registered graph with the module on whole rows.

    Args:
        model: In eval mode, on the CPU; in float32.
        registered: The graph to judge.
        rows: Real rows of the source, one or more.
        seed: Draws rows and makes up the others.
    """
    failures = graph_failures(registered.onnx, registered.metadata)
    cases: list[Case] = []
    if not failures:
        try:
            for case, failure in _compare(model, registered, rows, seed):
                cases += [case] if case else []
                failures += [failure] if failure else []
        except ContractError as error:
            failures.append(str(error))
    named = tuple(f"registered graph, {failure}" for failure in failures)
    return ParityReport(passed=not named, failures=named, cases=tuple(cases))


def _compare(
    model: Model, registered: Registered, rows: pa.Table, seed: int
) -> Iterator[tuple[Case | None, str | None]]:
    reference = partial(run_module, copy.deepcopy(model).double(), True)
    single = partial(run_module, model, False)
    levels: dict[Optimisation, bool] = {"disabled": False, "all": True}
    graphs: dict[Optimisation, Engine] = {
        name: partial(run_session, open_session(registered.onnx, optimise=on))
        for name, on in levels.items()
    }
    network = partial(run_session, open_session(registered.network))
    count = len(model.get_model_metadata().outputs)
    floor = [Yardstick() for _ in range(count)]
    rng = np.random.default_rng(seed)
    for kind, table in probe_tables(rows, registered.encoding, rng):
        batches = [table.slice(0, size) for size in BATCHES]
        encoded = [registered.encoding.encode(batch) for batch in batches]
        near = [neighbours(encoded[-1], rng) for _ in range(RESAMPLES)]
        samples = [
            Run(kind, inputs, reference(inputs), single(inputs)) for inputs in (*encoded, *near)
        ]
        runs = samples[: len(batches)]
        yardsticks = [measure(samples, i, least) for i, least in enumerate(floor)]
        proved = [(run, network(run.rows)) for run in runs]
        yardsticks = [
            _stretched(yardstick, (run.differences(i, found) for run, found in proved))
            for i, yardstick in enumerate(yardsticks)
        ]
        if kind == "real":
            floor = yardsticks
        for run, batch in zip(runs, batches, strict=True):
            feed = registered.columns.encode(batch)
            for level, graph in graphs.items():
                yield from _judge(run, feed, level, graph, registered, yardsticks)


def _stretched(yardstick: Yardstick, gaps: Iterable[Floats]) -> Yardstick:
    """A yardstick that allows what the proved network errs by, too."""
    worst = max(float(gap.max(initial=0.0)) for gap in gaps)
    return Yardstick(max(yardstick.error, worst / FACTOR), yardstick.scale)


def _judge(
    run: Run,
    feed: Arrays,
    level: Optimisation,
    graph: Engine,
    registered: Registered,
    yardsticks: Sequence[Yardstick],
) -> Iterator[tuple[Case | None, str | None]]:
    where = f"{run.kind} rows, batch {run.size}, optimisation {level}"
    try:
        outputs = graph(feed)
    except ContractError as refusal:
        yield None, f"{where}: {refusal}"
        return
    specs = registered.metadata.outputs
    clear = clear_rows(run, specs[: len(yardsticks)], yardsticks)
    for index, (spec, yardstick) in enumerate(zip(specs, yardsticks, strict=False)):
        gaps = run.differences(index, outputs)
        whole = spec.dtype == "int64"
        error = float((gaps[clear] if whole else gaps).max(initial=0.0))
        case = Case(
            case=f"rows/{run.kind}",
            batch=run.size,
            optimisation=level,
            output=spec.name,
            error=error,
            allowed=0.0 if whole else yardstick.allowed,
            scale=yardstick.scale,
        )
        yield case, _value_fault(where, case)
    if len(specs) > len(yardsticks):
        wanted = label_of(
            registered.metadata, _named(registered, run.float64), registered.threshold
        )
        wrong = int((any_by_row(wanted != outputs[-1]) & clear).sum())
        yield None, _label_fault(where, wrong)


def _named(registered: Registered, outputs: Sequence[Array]) -> Mapping[str, Array]:
    return dict(zip((s.name for s in registered.metadata.outputs), outputs, strict=False))


def _value_fault(where: str, case: Case) -> str | None:
    if case.error <= case.allowed:
        return None
    return (
        f"{where}: output {case.output!r} must be within {case.allowed:.3g} of the module on the "
        f"encoded rows; got {case.error:.3g}. The columns and their encoding disagree: look at "
        "types, categories and missing values of the data source"
    )


def _label_fault(where: str, wrong: int) -> str | None:
    if not wrong:
        return None
    return (
        f"{where}: output {LABEL!r} must name the class that the module decides for; {wrong} rows "
        "do not. Look at the order of the classes in the model's metadata"
    )


def probe_tables(
    rows: pa.Table, encoding: Encoding, rng: np.random.Generator
) -> Iterator[tuple[str, pa.Table]]:
    """Tables of 1024 rows of several kinds, by name, in the types of ``rows``.

    - ``real``: drawn from ``rows``, repeated where there are fewer;
    - ``missing``: the same with half of what may be missing left out, in the first row all of it;
    - ``unseen``: the same with categories that training did not see;
    - ``zeros``: nothing but zeros and empty texts;
    - ``large``: numbers of either sign, up to :data:`LARGE` times what was observed.
    """
    names = dict.fromkeys([*(c.column for c in encoding.categorical)])
    numbers = [c.column for c in encoding.numeric if c.column not in names]
    real = rows.take(pa.array(np.resize(rng.permutation(rows.num_rows), _ROWS)))
    yield "real", real
    holes = [name for name in (*names, *numbers) if rows.schema.field(name).nullable]
    if holes:
        yield "missing", _changed(real, {name: _holes(real, name, rng) for name in holes})
    if names:
        yield "unseen", _changed(real, {name: _unseen(real, name, rng) for name in names})
    yield "zeros", _changed(real, {name: _zeros(real, name) for name in (*names, *numbers)})
    if numbers:
        yield "large", _changed(real, {name: _large(real, name, rng) for name in numbers})


def _changed(table: pa.Table, columns: Mapping[str, pa.Array]) -> pa.Table:
    for name, column in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), column)
    return table


def _holes(table: pa.Table, name: str, rng: np.random.Generator) -> pa.Array:
    chosen = rng.random(table.num_rows) < 0.5
    chosen[0] = True
    column = table.column(name).combine_chunks()
    return pc.if_else(pa.array(chosen), pa.scalar(None, column.type), column)


def _unseen(table: pa.Table, name: str, rng: np.random.Generator) -> pa.Array:
    kind = table.schema.field(name).type
    if pa.types.is_integer(kind):
        bounds = np.iinfo(kind.to_pandas_dtype())
        return pa.array(rng.integers(bounds.min, bounds.max, table.num_rows, bounds.dtype), kind)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.array([_UNSEEN] * table.num_rows, kind)
    return table.column(name).combine_chunks()  # truth values and dates: nothing else is known


def _zeros(table: pa.Table, name: str) -> pa.Array:
    kind = table.schema.field(name).type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.array([""] * table.num_rows, kind)
    if pa.types.is_dictionary(kind) or pa.types.is_temporal(kind):
        return table.column(name).combine_chunks()
    return pa.array(np.zeros(table.num_rows, np.int8)).cast(pa.int64()).cast(kind, safe=False)


def _large(table: pa.Table, name: str, rng: np.random.Generator) -> pa.Array:
    kind = table.schema.field(name).type
    known = table.column(name).combine_chunks().cast(pa.float64(), safe=False).drop_null()
    top = np.abs(known.to_numpy(zero_copy_only=False))
    bound = LARGE * max(1.0, float(top.max(initial=0.0, where=np.isfinite(top))))
    if pa.types.is_integer(kind):
        limits = np.iinfo(kind.to_pandas_dtype())
        low, high = max(-int(bound), limits.min), min(int(bound), limits.max)
        return pa.array(rng.integers(low, high, table.num_rows), pa.int64()).cast(kind)
    bound = min(bound, float(np.finfo(np.float32).max))
    made = rng.uniform(-bound, bound, table.num_rows)
    return pa.array(made.astype(np.float32)).cast(kind, safe=False)
