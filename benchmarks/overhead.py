"""What Prefect costs: the same job as a bare script and through ``assay run``.

Cold processes on a warm state folder, in turn within each round, so that a machine whose speed
drifts treats all alike. Each round has a seed of its own: every run trains, exports and registers.

Usage: python benchmarks/overhead.py [--rounds N] [--pipelines digits,flights]
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from components.adapters.prefect_server import EmbeddedServer

VARIANTS = ("bare script", "running server", "embedded server")
ASSAY = Path(sys.executable).with_name("assay")
BARE = Path(__file__).with_name("bare_chain.py")


def command(variant: str, pipeline: str, home: Path, seed: int) -> list[str]:
    """The process that is timed."""
    if variant == "bare script":
        return [sys.executable, str(BARE), pipeline, str(home), str(seed)]
    return [str(ASSAY), "run", pipeline, "--seed", str(seed), "--json"]


def environment(variant: str, home: Path, url: str) -> dict[str, str]:
    """What the process sees: its own state folder, and a server where the variant has one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    named = {"PREFECT_API_URL": url} if variant == "running server" else {}
    return {**kept, **named, "ASSAY_HOME": str(home)}


def measure(variant: str, pipeline: str, home: Path, seed: int, url: str) -> float:
    """Seconds from the start of the process to its end."""
    started = time.perf_counter()
    done = subprocess.run(
        command(variant, pipeline, home, seed),
        env=environment(variant, home, url),
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise SystemExit(f"{variant}, {pipeline}: exit {done.returncode}\n{done.stderr[-3000:]}")
    return seconds


def report(pipeline: str, seconds: dict[str, list[float]]) -> None:
    """Medians, and the ratio and difference of each round against the bare script."""
    bare = seconds[VARIANTS[0]]
    print(f"\n{pipeline}: {len(bare)} rounds\n")
    print("| variant | median s | min s | max s | ratio to bare | seconds more |")
    print("|---|---:|---:|---:|---:|---:|")
    for variant, values in seconds.items():
        ratio = statistics.median(v / b for v, b in zip(values, bare, strict=True))
        more = statistics.median(v - b for v, b in zip(values, bare, strict=True))
        print(
            f"| {variant} | {statistics.median(values):.2f} | {min(values):.2f} | "
            f"{max(values):.2f} | {ratio:.2f} | {more:+.2f} |"
        )


def main() -> None:
    """Warm every state folder, then time the variants in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pipelines", default="digits,flights")
    arguments = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}"
    )
    with tempfile.TemporaryDirectory(prefix="overhead-") as name:
        folder = Path(name)
        server = EmbeddedServer(folder / "server")
        server.start()
        try:
            url = server.wait()
            for pipeline in arguments.pipelines.split(","):
                homes = {variant: folder / variant.replace(" ", "-") for variant in VARIANTS}
                for variant in VARIANTS:
                    measure(variant, pipeline, homes[variant], 0, url)
                seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
                for seed in range(1, arguments.rounds + 1):
                    for variant in VARIANTS:
                        taken = measure(variant, pipeline, homes[variant], seed, url)
                        seconds[variant].append(taken)
                report(pipeline, seconds)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
