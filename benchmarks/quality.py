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
from components.data.rows import Dataset, load_dataset
from components.evaluate import score_rows
from components.export.predictors import TorchPredictor
from components.pipeline import Pipeline, load_pipeline
from components.plan import open_source, resolve_config
from components.threads import single_threaded
from components.train.run import load_model, run_training

MONTHS = {
    "July": date(2013, 8, 1),
    "September": date(2013, 10, 1),
    "December": date(2014, 1, 1),
}
ALLOWED = 0.01


def network(pipeline: Pipeline, data: Dataset, seed: int) -> float:
    """ROC-AUC of the pipeline's model."""
    config = resolve_config(pipeline, seed, [])
    with tempfile.TemporaryDirectory() as folder, single_threaded():
        _, files = run_training(pipeline, config, data.train, Path(folder))
        model, encoding = load_model(pipeline, config, files.encoding, files.weights)
    return score_rows(pipeline, TorchPredictor(model), encoding, data.holdout)["roc_auc"]


def trees(pipeline: Pipeline, data: Dataset, seed: int) -> float:
    """ROC-AUC of the reference on the same columns, categories as categories."""
    encoding = fit_encoding(pipeline.features, data.train)

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
    model.fit(columns(data.train), read_labels(data.train, pipeline.features))
    scores = model.predict_proba(columns(data.holdout))[:, 1]
    return float(roc_auc_score(read_labels(data.holdout, pipeline.features), scores))


def main() -> None:
    """Print ROC-AUC of both by month, and whether the network is within the allowed distance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    pipeline = load_pipeline("flights")
    print("| held out | flights model | boosted trees | difference | within 0.01 |")
    print("|---|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(pipeline, Path(folder))
        for name, as_of in MONTHS.items():
            data = load_dataset(source, as_of, pipeline.features)
            ours = float(np.mean([network(pipeline, data, seed) for seed in seeds]))
            theirs = float(np.mean([trees(pipeline, data, seed) for seed in seeds]))
            verdict = "yes" if ours >= theirs - ALLOWED else "NO"
            print(f"| {name} | {ours:.4f} | {theirs:.4f} | {ours - theirs:+.4f} | {verdict} |")


if __name__ == "__main__":
    main()
