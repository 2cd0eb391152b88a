"""Ray's side of :mod:`components.adapters.ray_train`: the driver's process, and each worker.

Run as a module, this file is the driver: it reads a job as one line of JSON from stdin, writes
messages as lines of JSON to stdout, and ends when stdin does. The job itself is a task on the
cluster, so that a driver outside of it (``ray://``) needs nothing but a connection. Functions go to
the cluster by name: whatever runs there must have the same assay installed.
"""

import importlib
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from components.adapters.ray_train import encode_error
from components.errors import AssayError, InfrastructureError

_POLL_S = 0.2
_STOP_S = 5.0
_STARTS_WITHOUT_ROOM = 10
_STORE_BYTES = 80_000_000
_TRAIN_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
}

Job = dict[str, Any]
Send = Callable[[dict[str, Any]], None]


def drive(job: Job, send: Send) -> None:
    """Run the job, pass on what its workers say, and leave nothing running."""
    import ray
    from ray.util.queue import Queue

    try:
        _connect(job)
    except (OSError, RuntimeError, ValueError, ImportError, ray.exceptions.RayError) as error:
        where = job["address"] or "this machine"
        problem = InfrastructureError(
            f"Ray must start or be reached on {where}; it said: {_last_line(error)}. Mend that, "
            "or set ASSAY_RAY_ADDRESS to another cluster."
        )
        send({"kind": "error", "value": encode_error(problem)})
        send({"kind": "ended", "failure": "Ray could not be used."})
        return
    send({"kind": "connected"})
    try:
        messages = Queue(actor_options={"num_cpus": 0})
        remote = ray.remote(fit).options(num_cpus=0, max_retries=0)
        failure = _follow(remote.remote(json.dumps(job), messages), messages, send)
    except ray.exceptions.RayError as error:
        failure = f"the Ray cluster must outlive the job; it failed: {_last_line(error)}."
    finally:
        ray.shutdown()
    send({"kind": "ended", "failure": failure})


def _connect(job: Job) -> None:
    import ray

    if job["address"]:
        try:
            ray.init(address=job["address"], log_to_driver=False)
        except ConnectionAbortedError:  # a new cluster's ray:// server may miss its first client
            ray.init(address=job["address"], log_to_driver=False)
        return
    ray.init(
        address="local",
        num_cpus=job["workers"] * job["cpus"],
        num_gpus=None if job["use_gpu"] else 0,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=_STORE_BYTES,
        _temp_dir=job["folder"],
    )
    found = int(ray.cluster_resources().get("GPU", 0))
    if job["use_gpu"] and found < job["workers"]:
        ray.shutdown()
        raise ValueError(f"{job['workers']} workers need a GPU each, and there are {found}")


def _follow(task: Any, messages: Any, send: Send) -> str:
    """Pass on messages until the task is over or a worker's error ends it; say what failed."""
    import ray

    over = False
    while not over:
        over = bool(ray.wait([task], timeout=_POLL_S)[0])
        for text in messages.get_nowait_batch(messages.qsize()):
            message = json.loads(text)
            send(message)
            if message["kind"] == "error" and not message["again"]:
                ray.cancel(task)  # it takes its folder away; what does not end is ended anyway
                ray.wait([task], timeout=_STOP_S)
                return "a worker refused to go on."
    return str(ray.get(task))


def _last_line(error: BaseException) -> str:
    """Ray's errors are the output of a process; the reason comes last."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip().rstrip(".")[:300]


def fit(text: str, messages: Any) -> str:
    """A task on the cluster: hold the group of workers until it is done; say what failed."""
    os.environ.update(_TRAIN_ENVIRONMENT)  # read by Ray Train in this process
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    job = json.loads(text)
    resources = {"CPU": job["cpus"]} | ({"GPU": 1} if job["use_gpu"] else {})
    with tempfile.TemporaryDirectory(prefix="assay-ray-") as storage:  # Ray leaves a marker in it
        trainer = DataParallelTrainer(
            work,
            train_loop_config={**job, "messages": messages},
            scaling_config=ScalingConfig(
                num_workers=job["workers"],
                use_gpu=job["use_gpu"],
                resources_per_worker=resources,
            ),
            run_config=RunConfig(
                name="assay",
                storage_path=storage,
                failure_config=FailureConfig(
                    max_failures=job["max_failures"],
                    controller_failure_limit=_STARTS_WITHOUT_ROOM,
                ),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            return _describe(error, job)
    return ""


def _describe(error: Exception, job: Job) -> str:
    lost = getattr(error, "worker_failures", {})
    if not lost:
        return (
            f"Ray must place {job['workers']} workers with {job['cpus']} CPUs"
            f"{' and a GPU' if job['use_gpu'] else ''} each; it did not: "
            f"{_last_line(error)}. Enlarge the cluster, or lower workers."
        )
    reasons = "; ".join(
        f"rank {rank}: {_last_line(reason)}" for rank, reason in sorted(lost.items())
    )
    return (
        f"workers must not be lost more than {job['max_failures']} times; the last time it was "
        f"{reasons}. Mend that and run the same command again; training goes on from its last "
        "checkpoint."
    )


def work(config: Job) -> None:
    """What each worker runs: join the group, and call the entry."""
    import torch.distributed as dist

    messages = config["messages"]
    _join(config["use_gpu"])
    if dist.get_rank() == 0:
        messages.put(json.dumps({"kind": "started"}))

    def report(value: dict[str, Any]) -> None:
        messages.put(json.dumps({"kind": "report", "value": value}))

    module, _, name = config["entry"].partition(":")
    try:
        getattr(importlib.import_module(module), name)(config["payload"], report)
    except AssayError as error:
        again = isinstance(error, InfrastructureError)
        values = encode_error(error)
        messages.put(json.dumps({"kind": "error", "value": values, "again": again}))
        if again:
            raise RuntimeError(str(error)) from None
        return  # the others may wait for this one in a collective; the driver ends them all
    except Exception as error:  # Ray would keep the message and drop the type
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    dist.destroy_process_group()


def _join(use_gpu: bool) -> None:
    """Set up the process group.

    Ray Train would have rank 0 listen on every interface of its machine; here it listens on the
    address by which the cluster knows that machine.
    """
    import ray.train
    import torch.distributed as dist
    from ray.train.collective import broadcast_from_rank_zero

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    listener = None
    if rank == 0:
        here = ray.util.get_node_ip_address()
        family = socket.AF_INET6 if ":" in here else socket.AF_INET
        listener = socket.create_server((here, 0), family=family, backlog=world)
    host, port = broadcast_from_rank_zero(listener.getsockname()[:2] if listener else None)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, world, rank == 0, master_listen_fd=listener.detach() if listener else None
    )
    # Generators' states are gathered from the CPU, also where gradients are summed on GPUs.
    backend = "cpu:gloo,cuda:nccl" if use_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def _die_with_parent() -> None:
    """End in order when stdin does; the kernel ends what Ray started if there is no order."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_STOP_S)
    os._exit(1)


def main() -> None:
    """Be the driver."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever Ray prints goes to the log

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    drive(job, send)


if __name__ == "__main__":
    # Functions of __main__ would travel by value; those of the module travel by name.
    importlib.import_module("components.adapters.ray_driver").main()
