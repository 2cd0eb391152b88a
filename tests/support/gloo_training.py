"""One of two processes that train together; it writes what it found as JSON.

Arguments: rank, the file by which the processes meet, a folder, the snapshot's folder and
fingerprint.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from safetensors.torch import save
from support.training_lab import (
    CPU,
    PIPELINE,
    LabModel,
    Stop,
    change,
    each_loss,
    in_pieces,
    make_rows,
    network,
    open_rows,
    plain,
)
from torch import Tensor, nn

from components.data.snapshot import open_snapshot
from components.errors import GateError, InfrastructureError
from components.storage import Storage
from components.train import loop
from components.train.checkpoint import Checkpoints
from components.train.config import TrainConfig
from components.train.device import reproducible
from components.train.loop import Reports, Trained, train_model
from components.train.objective import Objective
from components.train.parallel import Group
from components.train.run import run_training

ROWS = make_rows()
WEIGHTS = torch.tensor([0.5, 1.0, 3.0])


def told(trained: Trained) -> dict[str, Any]:
    return {
        "sha256": hashlib.sha256(save(trained.state)).hexdigest(),
        "history": [epoch.model_dump() for epoch in trained.history],
        "state": {name: tensor.tolist() for name, tensor in trained.state.items()},
        "resumed": trained.resumed,
    }


def train(
    group: Group, config: TrainConfig, build: Callable[[], nn.Module], **more: Any
) -> Trained:
    with reproducible(config):
        model = build()
        if group.rank:
            torch.manual_seed(config.seed + group.rank)  # dropout of its own
        each = config.parts // group.world
        shards = range(group.rank * each, (group.rank + 1) * each)
        feed = open_rows(ROWS, config, shards)
        return train_model(model, nn.functional.cross_entropy, feed, config, group=group, **more)


def operations(group: Group) -> dict[str, Any]:
    """The gradient of a batch that is dealt unevenly, and the small operations."""
    found: dict[str, Any] = {}
    inputs, labels = ROWS
    mine = slice(0, 11) if group.rank == 0 else slice(11, 17)
    for name, weights in (("even", None), ("weighted", WEIGHTS)):
        torch.manual_seed(0)
        model = plain()
        objective = Objective(model, each_loss, change(accumulate=2), CPU, weights, group)
        value = objective.backward([inputs[mine], labels[mine]], 17)
        group.sum_gradients(list(model.parameters()))
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found[name] = [float(group.sum(value)), gradient.tolist()]
    only_one, nobody = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3))
    if group.rank == 1:
        only_one.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found["flags"] = [
        group.sum_gradients([only_one, nobody], flag=group.rank == 1),
        group.sum_gradients([only_one, nobody], flag=False),
    ]
    found["only one"] = only_one.grad.tolist()
    found["nobody"] = nobody.grad
    strided = torch.arange(6.0).view(2, 3).t() * (1 - group.rank)
    group.share([strided])
    found["shared"] = strided.tolist()
    found["gathered"] = [int(t) for t in group.gather(torch.tensor(group.rank + 5))]
    return found


def pieces(group: Group, folder: Path, config: TrainConfig) -> dict[str, Any]:
    storage = Storage(folder)

    def run(stop: Stop) -> Trained:
        kept = Checkpoints(storage, "key", print)
        return train(group, config, network, checkpoints=kept, reports=Reports(stop=stop))

    trained, count = in_pieces(run, 0)
    return {**told(trained), "pieces": count}


def wanted_by_one(group: Group, folder: Path) -> int:
    """Only process 1 finds it time for checkpoints; process 0 writes them."""
    saved: list[int] = []
    save_all, every = Checkpoints.save, 3600.0 if group.rank == 0 else 0.0

    def note(self: Checkpoints, state: Any) -> None:
        saved.append(state.progress.step)
        save_all(self, state)

    Checkpoints.save = note
    try:
        kept = Checkpoints(Storage(folder), "key", print)
        train(group, change(shards=2, epochs=1), plain, checkpoints=kept, every_s=every)
    finally:
        Checkpoints.save = save_all
    return len(saved)


def apart(group: Group, folder: Path) -> str:
    """Each process keeps its checkpoints to itself, so only process 0 has one."""
    mine = Storage(folder / str(group.rank))
    config = change(shards=2, epochs=1)
    train(group, config, plain, checkpoints=Checkpoints(mine, "key", print))
    try:
        train(group, config, plain, checkpoints=Checkpoints(mine, "key", print))
    except InfrastructureError as error:
        return str(error)
    return ""


class Drawing(LabModel):
    """Notes what it draws in training, and the seed of the CPU's generator, which is 32 bits."""

    drawn: ClassVar[list[float]] = []
    seeds: ClassVar[set[int]] = set()

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.training:
            self.drawn.append(float(torch.rand(())))
            self.seeds.add(torch.initial_seed() % 2**32)
        return super().forward(*inputs)


def main(rank: int, meet: str, folder: Path, snapshots: Path, fingerprint: str) -> None:
    torch.set_num_threads(1)
    loop._LOOK_S = 0.0
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    group = Group.current()
    results: dict[str, Any] = operations(group)
    config = change(shards=2)
    results["plain"] = told(train(group, config, plain))
    results["first"] = told(train(group, config, network))
    results["second"] = told(train(group, config, network))
    results["four shards"] = told(train(group, change(shards=4), plain))
    results["pieces"] = pieces(group, folder / "kept", config)
    half = change(shards=2, precision="float16", clip_norm=0.5)
    results["float16"] = told(train(group, half, network))
    results["float16 pieces"] = pieces(group, folder / "half", half)
    results["saved"] = wanted_by_one(group, folder / "wanted")
    results["apart"] = apart(group, folder / "apart")
    snapshot = open_snapshot(Storage(snapshots), fingerprint)
    assert snapshot is not None
    pipeline = dataclasses.replace(PIPELINE, model=Drawing)
    trained, _ = run_training(pipeline, change(shards=2), snapshot, group=group)
    results["run"] = told(trained)
    results["drawn"], results["seeds"] = Drawing.drawn, list(Drawing.seeds)
    try:
        rows = ROWS[0].clone()
        rows[:, 0] = float("nan")
        with reproducible(config):
            feed = open_rows((rows, ROWS[1]), config, range(rank, rank + 1))
            train_model(plain(), nn.functional.cross_entropy, feed, config, group=group)
    except GateError as error:
        results["not finite"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
