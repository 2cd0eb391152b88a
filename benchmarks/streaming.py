"""Rows per second and peak memory of training on more and more rows.

The rows are the flights of 2013 repeated with noise, made on the spot. Each size runs in a process
of its own: a snapshot is taken, then one epoch is trained, streamed from it or held in memory.

Usage: python benchmarks/streaming.py [--rows N ...] [--folder PATH]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.contract import DataSource, Split
from components.data.flights import FlightsSource
from components.data.schema import RowSchema
from components.data.take import take_snapshot
from components.pipeline import load_pipeline
from components.plan import DEFAULT_AS_OF
from components.storage import Storage
from components.train.run import run_training

SIZES = (100_000, 1_000_000, 20_000_000)
ALLOWED = 1.3
NOISY = ("distance", "temp", "humid", "wind_speed", "pressure", "plane_age")


class Repeated(DataSource):
    """Flights of January to November again and again, until there are ``rows`` of them."""

    def __init__(self, flights: FlightsSource, rows: int) -> None:
        self._flights = flights
        self._rows = rows

    def schema(self) -> RowSchema:
        """Columns of the flights."""
        schema = self._flights.schema()
        return RowSchema(schema.arrow, key=schema.key)  # noise leaves the declared ranges

    def prepare(self) -> None:
        """Prepare the flights."""
        self._flights.prepare()

    def window(self, as_of: date) -> str:
        """How many there are."""
        return f"{self._rows} repeated flights, hold out December"

    def excluded(self, as_of: date) -> Mapping[str, int]:
        """None are."""
        return {}

    def batches(self, split: Split, as_of: date) -> Iterator[pa.RecordBatch]:
        """Repeat the flights, with noise."""
        if split == "holdout":
            yield from self._flights.batches(split, as_of)
            return
        generator = np.random.default_rng(0)
        given = 0
        while given < self._rows:
            for batch in self._flights.batches(split, as_of):
                noisy = _noisy(batch.slice(0, self._rows - given), generator, given)
                given += noisy.num_rows
                yield noisy
                if given == self._rows:
                    return


def _noisy(batch: pa.RecordBatch, generator: np.random.Generator, first: int) -> pa.RecordBatch:
    columns = {name: batch.column(name) for name in batch.schema.names}
    for name in NOISY:
        noise = generator.normal(size=batch.num_rows).astype(np.float32)
        columns[name] = pc.add(columns[name], pa.array(noise))
    columns["id"] = pa.array(np.arange(first, first + batch.num_rows, dtype=np.int32))
    return pa.record_batch(columns, schema=batch.schema)


def measure(rows: int, streamed: bool, folder: Path) -> None:
    """Take a snapshot and train an epoch in this process; print what was measured as JSON."""
    pipeline = load_pipeline("flights")
    source = Repeated(FlightsSource(folder / "flights"), rows)
    source.prepare()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        snapshot = take_snapshot(source, pipeline.features, DEFAULT_AS_OF, Storage(place))
        taken = time.perf_counter()
        config = pipeline.config.model_copy(
            update={"epochs": 1, "memory_rows": 0 if streamed else rows}
        )
        trained, _ = run_training(pipeline, config, snapshot)
        ended = time.perf_counter()
        stored = sum(path.stat().st_size for path in Path(place).rglob("*.parquet"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            {
                "rows": rows,
                "streamed": streamed,
                "snapshot_rows_s": rows / (taken - began),
                "training_rows_s": rows / (ended - taken),
                "peak_mib": peak,
                "stored_mib": stored / 2**20,
                "loss": trained.best.train_loss,
            }
        )
    )


def in_child(rows: int, streamed: bool, folder: Path) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--folder", str(folder), "--measure", str(rows)]
    command += ["--streamed"] if streamed else []
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Print a table, and whether memory stays within its bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--folder", type=Path, help="where the rows are stored meanwhile")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--streamed", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.streamed, arguments.folder)
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        memory = load_pipeline("flights").config.memory_rows
        runs = [(rows, False) for rows in arguments.rows if rows <= memory]
        runs += [(rows, True) for rows in arguments.rows]
        print(f"{'rows':>12} {'held':>10} {'snapshot rows/s':>16} {'training rows/s':>16} "
              f"{'peak MiB':>9} {'stored MiB':>11} {'loss':>7}")  # fmt: skip
        peaks = {}
        for rows, streamed in runs:
            found = in_child(rows, streamed, folder)
            if streamed:
                peaks[rows] = found["peak_mib"]
            print(
                f"{rows:>12,} {'streamed' if streamed else 'in memory':>10} "
                f"{found['snapshot_rows_s']:>16,.0f} {found['training_rows_s']:>16,.0f} "
                f"{found['peak_mib']:>9,.0f} {found['stored_mib']:>11,.0f} {found['loss']:>7.4f}",
                flush=True,
            )
    if not {1_000_000, 20_000_000} <= set(peaks):
        return 0
    ratio = peaks[20_000_000] / peaks[1_000_000]
    verdict = "holds" if ratio <= ALLOWED else "is missed"
    print(f"peak memory at 20 M rows / at 1 M rows: {ratio:.2f}; the bound of {ALLOWED} {verdict}")
    return 0 if ratio <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
