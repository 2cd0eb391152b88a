"""What checkpoints cost, and what an interruption costs.

Training of flights without checkpoints, with one after every epoch, and interrupted halfway and
resumed, in turn in one process; every way must end with the same weights.

Usage: python benchmarks/resume.py [--rounds N] [--pipeline NAME]
"""

import argparse
import statistics
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path

from safetensors.torch import save

from components.data.snapshot import Snapshot
from components.data.take import take_snapshot
from components.pipeline import Pipeline, load_pipeline
from components.plan import DEFAULT_AS_OF, open_source
from components.settings import load_settings
from components.storage import Storage
from components.train.checkpoint import Checkpoints
from components.train.loop import Reports
from components.train.run import run_training

ALLOWED = 1.03
NEVER_S = 1e9


def trained(
    pipeline: Pipeline, snapshot: Snapshot, checkpoints: Checkpoints | None, stop_after: int = 0
) -> tuple[float, str]:
    """Seconds of training, and the sha256 of the weights (empty if it was stopped)."""
    seen = 0

    def count(done: int, total: int) -> None:
        nonlocal seen
        seen = done

    reports = Reports(steps=count, stop=lambda: bool(stop_after) and seen >= stop_after)
    began = time.perf_counter()
    try:
        found, _ = run_training(
            pipeline,
            pipeline.config,
            snapshot,
            checkpoints=checkpoints,
            every_s=NEVER_S,
            reports=reports,
        )
    except KeyboardInterrupt:
        return time.perf_counter() - began, ""
    return time.perf_counter() - began, sha256(save(found.state)).hexdigest()


def main() -> int:
    """Print medians and ratios, and whether the bound holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pipeline", default="flights")
    arguments = parser.parse_args()
    pipeline = load_pipeline(arguments.pipeline)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = open_source(pipeline, load_settings(home=folder / "home"))
        source.prepare()
        snapshot = take_snapshot(
            source, pipeline.features, DEFAULT_AS_OF, Storage(folder / "snapshots")
        )
        rows, batch = snapshot.rows["train"], pipeline.config.batch_size
        halfway = pipeline.config.epochs * (rows // batch) // 2
        kept, interrupted, digests = [], [], set()
        for number in range(arguments.rounds):
            places = [Storage(folder / f"{kind}-{number}") for kind in ("kept", "interrupted")]
            plain_s, plain = trained(pipeline, snapshot, None)
            kept_s, whole = trained(pipeline, snapshot, Checkpoints(places[0], "key", print))
            first_s, _ = trained(pipeline, snapshot, Checkpoints(places[1], "key", print), halfway)
            second_s, again = trained(pipeline, snapshot, Checkpoints(places[1], "key", print))
            kept.append(kept_s / plain_s)
            interrupted.append((first_s + second_s) / plain_s)
            digests |= {plain, whole, again}
            print(
                f"round {number + 1}: without {plain_s:.2f} s, with checkpoints {kept_s:.2f} s "
                f"({kept[-1]:.3f}), interrupted at {first_s:.2f} s and resumed {second_s:.2f} s "
                f"({interrupted[-1]:.3f})",
                flush=True,
            )
        size = sum(path.stat().st_size for path in Path(places[0].url).iterdir())
    ratio = statistics.median(kept)
    print(
        f"checkpoint after every epoch / none: {ratio:.3f} (median); interrupted once / not: "
        f"{statistics.median(interrupted):.3f}; two checkpoints take {size / 1024:,.0f} KiB; "
        f"weights {'equal' if len(digests) == 1 else 'DIFFER'} in all {3 * len(kept)} runs"
    )
    print(f"the bound of {ALLOWED} {'holds' if ratio <= ALLOWED else 'is missed'}")
    return 0 if ratio <= ALLOWED and len(digests) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
