"""The child's answer to a job: what could not start, what failed, or what was measured."""

import importlib

from .job import Answer, Job, describe
from .limits import apply_limits


def judge(job: Job) -> Answer:
    """Limit this process, then run every check and collect all failures."""
    limits = apply_limits(job)
    try:
        importlib.import_module("numpy")
        ort = importlib.import_module("onnxruntime")
    except ImportError as error:
        return {"broken": describe(error), "failures": [], "report": None}
    from .examination import check_model  # needs numpy, so it comes after the limits and the test

    failures = check_isolation()
    measured = check_model(ort, job, failures)
    report = {"onnxruntime_version": ort.__version__, "limits": limits, **measured}
    return {"broken": None, "failures": failures, "report": None if failures else report}


def check_isolation() -> list[str]:
    """Prove that the framework which trained the model cannot be reached."""
    try:
        importlib.import_module("torch")
    except ModuleNotFoundError:
        return []
    return ["torch must not be importable in the smoke test; it was imported. Check the guard"]
