"""Gradient verification: what it catches, where it points, what it costs, and its false alarms.

Every operator of the fault catalogue (tests/faults) is applied to every architecture; the truth
comes from autograd on a sound model in float64. `verify_gradients` stands next to torch's
gradcheck, slow and fast, and to a check along one direction in the style of JAX's check_grads, on
the same faults and the same correct models. The slow gradcheck runs with the first seed only, and
only on models of at most 800 parameters.

Usage: python benchmarks/gradients.py [--seeds N] [--quick] [--workers N]

--quick takes one seed and leaves out the slow gradcheck. About seven minutes on two cores in full,
two with --quick.
"""

import argparse
import functools
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path += [str(CHECKOUT), str(CHECKOUT / "tests")]  # in this order: tests holds components too

import gradient_tables  # noqa: E402
from faults import campaign  # noqa: E402
from faults.campaign import Answer, Detector, Outcome  # noqa: E402
from gradient_large import measure  # noqa: E402
from gradient_references import gradcheck_fast, gradcheck_slow, one_direction  # noqa: E402

OURS = "verify_gradients"
DETECTORS: dict[str, Detector] = {
    OURS: campaign.verified,
    "gradcheck slow": gradcheck_slow,
    "gradcheck fast": gradcheck_fast,
    "one direction": one_direction,
}


class Clean(NamedTuple):
    """A correct model and what a detector said about it."""

    detector: str
    model: str
    seed: int
    tensors: int
    answer: Answer
    seconds: float


def faulty(
    detectors: tuple[str, ...], operator: str, architecture: str, seed: int
) -> dict[str, Outcome]:
    """One fault, judged by every detector; empty where the operator does not apply."""
    chosen = [d for d in detectors if d != "gradcheck slow" or seed == 0]
    outcomes = campaign.try_fault(
        campaign.BY_NAME[operator],
        campaign.ARCHITECTURE_BY_NAME[architecture],
        seed,
        [DETECTORS[name] for name in chosen],
    )
    return dict(zip(chosen, outcomes, strict=True)) if outcomes else {}


def clean(detectors: tuple[str, ...], index: int, seed: int) -> list[Clean]:
    """One correct model, judged by every detector; the references cannot be told of waivers."""
    case = campaign.CLEAN_CASES[index]
    tensors = len(list(campaign.built(case, seed).parameters()))
    rows = []
    for name in detectors:
        if name != OURS and (seed > 0 or getattr(case, "waivers", ())):
            continue
        started = time.perf_counter()
        answer = campaign.try_clean(case, seed, DETECTORS[name])
        if answer is not None:
            seconds = time.perf_counter() - started
            rows.append(Clean(name, case.name, seed, tensors, answer, seconds))
    return rows


def main() -> None:
    """Judge everything in a few processes, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    seeds = range(1 if arguments.quick else arguments.seeds)
    names = tuple(name for name in DETECTORS if not (arguments.quick and name == "gradcheck slow"))
    started = time.perf_counter()
    with ProcessPoolExecutor(
        arguments.workers, get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        cases = [(*pair, seed) for pair in campaign.CASES for seed in seeds]
        judged = pool.map(functools.partial(faulty, names), *zip(*cases, strict=True), chunksize=4)
        models = [(i, seed) for i in range(len(campaign.CLEAN_CASES)) for seed in seeds]
        correct = pool.map(functools.partial(clean, names), *zip(*models, strict=True), chunksize=4)
        outcomes = [row for row in judged if row]
        answers = [row for rows in correct for row in rows]
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, PyTorch {torch.__version__}\n\n"
        f"{len(campaign.OPERATORS)} operators, {len(campaign.ARCHITECTURE_BY_NAME)} architectures, "
        f"{len(seeds)} seeds: {len(outcomes)} of {len(cases)} faults applicable; "
        f"{time.perf_counter() - started:.0f} s in {arguments.workers} processes"
    )
    gradient_tables.detection(outcomes, names)
    gradient_tables.aims(outcomes, answers)
    gradient_tables.comparison(outcomes, names)
    gradient_tables.false_alarms(answers, names)
    gradient_tables.cost(answers, names, tuple(campaign.ARCHITECTURE_BY_NAME))
    gradient_tables.large(
        [measure(name, DETECTORS[name]) for name in names if name != "gradcheck slow"]
    )


if __name__ == "__main__":
    main()
