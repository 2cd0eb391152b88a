"""The whole chain as a bare script: the same functions as the flow, without Prefect.

Usage: python benchmarks/bare_chain.py PIPELINE HOME SEED
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa

from components.adapters.mlflow_registry import CHAMPION, Registry
from components.adapters.mlflow_tracking import connect
from components.decide.promotion import Contender, judge
from components.evaluate import answer_rows
from components.export.golden import read_golden
from components.export.predictors import OnnxPredictor
from components.export.run import run_export
from components.pipeline import Pipeline, load_pipeline
from components.plan import open_data, plan_job
from components.register.tags import consumer_requirements
from components.settings import load_settings
from components.smoke_test.runner import run_smoke_test
from components.state import make_root
from components.threads import single_threaded
from components.train.loop import Reports
from components.train.run import load_model, run_training, write_files
from components.validate.run import collect_evidence


def main(name: str, home: Path, seed: int) -> None:
    """Train, validate, export, register, smoke-test and decide, one after the other."""
    started = time.perf_counter()
    settings = load_settings(home=home)
    make_root(settings.root)
    pipeline = load_pipeline(name)
    job = plan_job(pipeline, settings, seed=seed)
    config = type(pipeline.config).model_validate(job.config)
    tracking = connect(settings)
    registry = Registry(tracking, name)
    with tempfile.TemporaryDirectory() as temporary, single_threaded():
        folder = Path(temporary)
        run_id = tracking.start_run(name, "bare", {}, job.config)
        snapshot = open_data(pipeline, settings, job)
        reports = Reports(
            epoch=lambda epoch: tracking.log_metrics(
                run_id, epoch.model_dump(exclude={"number"}), step=epoch.number
            )
        )
        files = write_files(*run_training(pipeline, config, snapshot, reports=reports), folder)
        for path in (files.weights, files.encoding, files.loss_curve):
            tracking.put(run_id, path, "train")
        model, encoding = load_model(pipeline, config, files.encoding, files.weights)
        evidence = collect_evidence(
            pipeline, config, model, encoding, snapshot, seed=job.seed, key=job.row_key
        )
        evidence.require_passed()
        for key, report in evidence.reports().items():
            path = folder / f"{key}.json"
            path.write_text(report.model_dump_json(indent=1))
            tracking.put(run_id, path, "validate")
        tracking.log_metrics(run_id, evidence.metrics)
        exported, _ = run_export(model, encoding, snapshot, job, folder)
        onnx = tracking.put(run_id, exported.onnx, "export")
        tracking.put(run_id, exported.golden, "export")
        tracking.put(run_id, exported.parity, "export")
        inputs, _ = read_golden(exported.golden)
        predictor = OnnxPredictor(exported.onnx.read_bytes())
        version = registry.create(
            run_id,
            exported.onnx,
            metadata=predictor.metadata,
            example={key: array[:2] for key, array in inputs.items()},
            requirements=consumer_requirements(),
            tags={"onnx_sha256": onnx.sha256},
        )
        path = registry.download(version.number, folder / "candidate")
        run_smoke_test(path, sha256=onnx.sha256, golden=exported.golden)
        rows = snapshot.table("holdout")
        candidate = _contender(pipeline, version.number, path, rows)
        holder = registry.by_alias(CHAMPION)
        champion = None
        if holder is not None:
            held = registry.download(holder.number, folder / "champion")
            champion = _contender(pipeline, holder.number, held, rows)
        judgement = judge(pipeline, candidate, champion)
        if judgement.verdict == "promoted":
            registry.set_alias(CHAMPION, version.number)
        tracking.finish(run_id, "FINISHED")
    print(json.dumps({"seconds": time.perf_counter() - started, "reason": judgement.reason}))
    # Out as the command goes: without tearing down PyTorch and MLflow, which takes about a second.
    sys.stdout.flush()
    os._exit(0)


def _contender(pipeline: Pipeline, version: int, path: Path, rows: pa.Table) -> Contender:
    predictor = OnnxPredictor(path.read_bytes())
    scored = answer_rows(pipeline, predictor, predictor.encoding, rows)
    return Contender(version, pipeline.metrics(scored), scored)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
