"""What workers run in the tests of the Ray adapter; each writes its process id to a folder."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from components.errors import DataError, GateError, InfrastructureError

Report = Callable[[Mapping[str, Any]], None]


def begin(payload: str) -> dict[str, Any]:
    job: dict[str, Any] = json.loads(payload)
    Path(job["folder"], f"pid-{dist.get_rank()}-{os.getpid()}").touch()
    return job


def meet(payload: str, report: Report) -> None:
    """Sum the ranks over the group."""
    job = begin(payload)
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    print("a worker prints", flush=True)
    if dist.get_rank() == 0:
        seen = os.environ.get("TEAM_SEEN")
        report({"sum": total.item(), "world": dist.get_world_size(), "seen": seen})
        report({"sent": job["text"], "backend": dist.get_backend()})


def meet_and_refuse(payload: str, report: Report) -> None:
    """Meet, and then refuse."""
    meet(payload, report)
    dist.barrier()  # a refusal ends the job at once, also a report that is under way
    refuse(payload, report)


def count(payload: str, report: Report) -> None:
    """Count steps together; the number of steps done is the checkpoint."""
    job = begin(payload)
    checkpoint = Path(job["folder"], "checkpoint")
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    for step in range(first, job["steps"]):
        done = torch.ones(1)
        dist.all_reduce(done)
        assert done.item() == dist.get_world_size()
        time.sleep(job["seconds"])
        if dist.get_rank() == 0:
            checkpoint.with_suffix(".new").write_text(str(step + 1))
            checkpoint.with_suffix(".new").replace(checkpoint)
            report({"step": step, "first": first})


def refuse(payload: str, report: Report) -> None:
    """Rank 1 refuses while the others wait for it."""
    job = begin(payload)
    if dist.get_rank() == 1:
        if job["error"] == "gate":
            raise GateError("train", ["ä: no", "b"], culprit="layer", metrics={"loss": 1.5})
        if job["error"] == "data":
            raise DataError("rows are missing")
        if job["error"] == "infrastructure":
            raise InfrastructureError("the disk is full")
        raise KeyError("a bug")
    dist.barrier()
