"""flights against gradient-boosted trees on the same rows and columns.

The reference is scikit-learn's HistGradientBoostingClassifier with 200 iterations, averaged over
random states, since one alone moves by a few thousandths.

Usage: python benchmarks/quality.py [--seeds N]
"""

import argparse
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from components.data.encoding import fit_encoding, read_labels
from components.data.snapshot import Snapshot
from components.data.take import take_snapshot
from components.evaluate import score_rows
from components.export.predictors import TorchPredictor
from components.pipeline import Pipeline, load_pipeline
from components.plan import open_snapshots, open_source, resolve_config
from components.settings import load_settings
from components.threads import single_threaded
from components.train.run import load_model, run_training, write_files

MONTHS = {
    "July": date(2013, 8, 1),
    "September": date(2013, 10, 1),
    "December": date(2014, 1, 1),
}
ALLOWED = 0.01


def network(pipeline: Pipeline, snapshot: Snapshot, seed: int) -> float:
    """ROC-AUC of the pipeline's model."""
    config = resolve_config(pipeline, seed, [])
    with tempfile.TemporaryDirectory() as folder, single_threaded():
        files = write_files(*run_training(pipeline, config, snapshot), Path(folder))
        model, encoding = load_model(pipeline, config, files.encoding, files.weights)
    rows = snapshot.table("holdout")
    return score_rows(pipeline, TorchPredictor(model), encoding, rows)["roc_auc"]


def trees(pipeline: Pipeline, snapshot: Snapshot, seed: int) -> float:
    """ROC-AUC of the reference on the same columns, categories as categories."""
    encoding = fit_encoding(pipeline.features, snapshot.statistics)
    train, holdout = snapshot.table("train"), snapshot.table("holdout")

    def columns(rows: pa.Table) -> np.ndarray:
        inputs = encoding.encode(rows)
        return np.concatenate(
            [inputs["categorical"].astype(np.float64), inputs["numeric"].astype(np.float64)], axis=1
        )

    model = HistGradientBoostingClassifier(
        max_iter=200,
        categorical_features=list(range(len(encoding.categorical))),
        random_state=seed,
    )
    model.fit(columns(train), read_labels(train, pipeline.features))
    scores = model.predict_proba(columns(holdout))[:, 1]
    return float(roc_auc_score(read_labels(holdout, pipeline.features), scores))


def main() -> None:
    """Print ROC-AUC of both by month, and whether the network is within the allowed distance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    pipeline = load_pipeline("flights")
    print("| held out | flights model | boosted trees | difference | within 0.01 |")
    print("|---|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(home=folder)
        source = open_source(pipeline, settings)
        source.prepare()
        storage = open_snapshots(pipeline, settings)
        for name, as_of in MONTHS.items():
            snapshot = take_snapshot(source, pipeline.features, as_of, storage)
            ours = float(np.mean([network(pipeline, snapshot, seed) for seed in seeds]))
            theirs = float(np.mean([trees(pipeline, snapshot, seed) for seed in seeds]))
            verdict = "yes" if ours >= theirs - ALLOWED else "NO"
            print(f"| {name} | {ours:.4f} | {theirs:.4f} | {ours - theirs:+.4f} | {verdict} |")


if __name__ == "__main__":
    main()
