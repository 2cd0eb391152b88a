"""Seconds of the stages between a validated model and a decision, and what they are spent on.

The flow runs in this process against an embedded server, on a warm state folder, and each stage is
profiled where it runs. A line below a stage is a function of assay with the seconds that passed
inside it and in all that it called, so lines overlap: one may lie within another. The profiler
itself slows Python down a little: compare shares, and take seconds from ``--plain``.

Usage: python benchmarks/release.py [--pipeline flights] [--least SHARE] [--plain] [--set KEY=VALUE]
"""

import argparse
import contextlib
import cProfile
import functools
import importlib
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from components.settings import load_settings

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("train", "validate", "export", "register", "smoke_test", "decide")
RELEASE = ("export", "register", "smoke_test", "decide")
AIM_S = 15.0
"""Seconds that export to decision may take for flights on two cores."""

Line = tuple[float, str]
Found = dict[str, tuple[float, list[Line]]]
"""Seconds of each stage, and its costliest functions."""


def watch(stage: str, work: Callable[..., Any], found: Found, plain: bool) -> Callable[..., Any]:
    """The same function, which leaves its seconds and its costliest callees."""

    @functools.wraps(work)
    def watched(*arguments: Any, **named: Any) -> Any:
        profile = None if plain else cProfile.Profile(time.perf_counter)
        started = time.perf_counter()
        try:
            if profile is None:
                return work(*arguments, **named)
            return profile.runcall(work, *arguments, **named)
        finally:
            seconds = time.perf_counter() - started
            found[stage] = (seconds, costs(profile) if profile else [])

    return watched


def costs(profile: cProfile.Profile) -> list[Line]:
    """Cumulative seconds of assay's own functions, the costliest first."""
    table: dict[tuple[str, int, str], tuple[Any, ...]] = vars(pstats.Stats(profile))["stats"]
    lines = []
    for (file, _, function), (_, _, _, seconds, _) in table.items():
        path = Path(file)
        if path.is_relative_to(ROOT / "components") and not function.startswith("<"):
            lines.append((float(seconds), f"{path.relative_to(ROOT / 'components')}:{function}"))
    return sorted(lines, reverse=True)


def print_report(found: Found, least: float) -> float:
    """One table of stages with their parts; returns the seconds from export to decision."""
    print("\n| stage | seconds | within it | seconds | share |")
    print("|---|---:|---|---:|---:|")
    for stage, (seconds, lines) in found.items():
        print(f"| {stage} | {seconds:.2f} | | | |")
        for inside, name in lines:
            if inside >= least * seconds and stage in RELEASE:
                print(f"| | | `{name}` | {inside:.2f} | {inside / seconds:.0%} |")
    total = sum(found[stage][0] for stage in RELEASE)
    print(f"\nExport to decision: {total:.2f} s (aim {AIM_S:g} s for flights on two cores)")
    return total


def run_watched(pipeline: str, assignments: Sequence[str], plain: bool) -> Found:
    """One run as the command does it, in this process, with every stage watched."""
    from flows.commands import prefect_api
    from flows.request import Request

    found: Found = {}
    settings = load_settings()
    # What flows.commands.run does, with a step between: tasks are imported once Prefect is set up.
    with contextlib.redirect_stdout(sys.stderr), prefect_api(settings, "") as server:
        from flows.embedded import execute

        for stage in STAGES:
            task = getattr(importlib.import_module(f"tasks.{stage}"), stage)
            task.fn = watch(stage, task.fn, found, plain)
        request = Request(
            pipeline=pipeline,
            as_of=None,
            seed=1,  # another version than the run that warmed the folder registered
            assignments=tuple(assignments),
            force=True,
            as_json=False,
        )
        execute(request, settings, server, time.perf_counter())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Warm the state folder with a run of the command, then watch a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipeline", default="flights")
    parser.add_argument("--least", type=float, default=0.08, help="smallest share to show")
    parser.add_argument("--plain", action="store_true", help="no profiler, only seconds")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    options = parser.parse_args(arguments)
    for key in [key for key in os.environ if key.startswith(("ASSAY_", "PREFECT_"))]:
        del os.environ[key]
    with tempfile.TemporaryDirectory(prefix="release-") as name:
        os.environ["ASSAY_HOME"] = str(Path(name) / "home")
        warm = [str(Path(sys.executable).with_name("assay")), "run", options.pipeline]
        for assignment in options.settings:
            warm += ["--set", assignment]
        done = subprocess.run(warm, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"assay run {options.pipeline} must pass; it gave\n{done.stderr[-3000:]}")
        found = run_watched(options.pipeline, options.settings, options.plain)
    print_report(found, options.least)


if __name__ == "__main__":
    main()
