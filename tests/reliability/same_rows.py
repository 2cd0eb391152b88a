"""Trains flights from Parquet, CSV, SQLite and PostgreSQL: one fingerprint, and the same weights.

Usage: PYTHONPATH=.:tests python tests/reliability/same_rows.py [--as-of DATE] [--epochs N]
"""

import argparse
import sys
import tempfile
import time
from datetime import date
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
from safetensors.torch import save
from support.flight_forms import write_forms
from support.postgres import Postgres, postgres_server

from components.contract import Split
from components.data.flights import FlightsSource
from components.data.take import take_snapshot
from components.data.windows import Months
from components.pipeline import load_pipeline
from components.storage import Storage
from components.train.run import run_training

SPLITS: tuple[Split, ...] = ("train", "holdout")


def compare(as_of: date, epochs: int, postgres: Postgres, folder: Path) -> set[tuple[str, str]]:
    """Print a row per source; gives the different pairs of fingerprint and weights' sha256."""
    pipeline = load_pipeline("flights")
    config = pipeline.config.model_copy(update={"epochs": epochs})
    original = FlightsSource(folder / "original")
    original.prepare()
    flights = pa.Table.from_batches([b for s in SPLITS for b in original.batches(s, as_of)])
    forms = write_forms(flights, postgres, folder)
    sources = {"flights": original} | {n: form(Months("date")) for n, form in forms.items()}
    found = set()
    print(f"{flights.num_rows:,} flights, {original.window(as_of)}, {epochs} epochs")
    for name, source in sources.items():
        began = time.perf_counter()
        place = Storage(folder / f"snapshots-{name}")
        snapshot = take_snapshot(source, pipeline.features, as_of, place)
        read = time.perf_counter() - began
        trained, _ = run_training(pipeline, config, snapshot)
        weights = sha256(save(trained.state)).hexdigest()
        found.add((snapshot.fingerprint, weights))
        print(
            f"{name:<10}  read in {read:5.1f} s  fingerprint {snapshot.fingerprint[:16]}  "
            f"weights {weights[:16]}",
            flush=True,
        )
    return found


def main() -> int:
    """Compare, and exit with 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--as-of", type=date.fromisoformat, default=date(2014, 1, 1))
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, postgres_server() as postgres:
        found = compare(arguments.as_of, arguments.epochs, postgres, Path(folder))
    print("all equal" if len(found) == 1 else "THEY DIFFER")
    return int(len(found) != 1)


if __name__ == "__main__":
    sys.exit(main())
