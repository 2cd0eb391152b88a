"""Where training runs, and what makes it reproducible there."""

import contextlib
import os
import random
from collections.abc import Iterator

import numpy as np
import torch

from components.errors import InfrastructureError
from components.train.config import TrainConfig


def choose_device(config: TrainConfig) -> torch.device:
    """Resolve ``device``, before any work is done.

    Raises:
        InfrastructureError: A GPU is required, or asked for by name, and CUDA is not available.
    """
    available = torch.cuda.is_available()
    if (config.require_gpu or config.device == "cuda") and not available:
        asked = "require_gpu is set" if config.require_gpu else "device is cuda"
        raise InfrastructureError(
            f"training must run on a GPU because {asked}, but PyTorch {torch.__version__} finds no "
            "CUDA device here. Send the stage to a GPU worker, or set require_gpu=false and "
            "device=auto."
        )
    if config.require_gpu and config.device == "cpu":
        raise InfrastructureError(
            "require_gpu contradicts device=cpu. Set device=auto, or require_gpu=false."
        )
    use_cuda = available and config.device != "cpu"
    return torch.device("cuda" if use_cuda else "cpu")


@contextlib.contextmanager
def reproducible(config: TrainConfig) -> Iterator[None]:
    """Seed every generator, fix threads and algorithms, and put all of it back afterwards."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # cuBLAS reads this when its first handle is made; without it matrix products may differ.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(config.seed)
        random.seed(config.seed)
        np.random.seed(config.seed)
        torch.set_num_threads(config.threads)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.set_num_threads(threads)
            random.setstate(python)
            np.random.set_state(legacy)


_CPU_FULL = "can't allocate memory"


@contextlib.contextmanager
def memory_errors(config: TrainConfig) -> Iterator[None]:
    """Say which settings lower the memory that training needs, when a device has run out of it.

    Raises:
        InfrastructureError: The device ran out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # on a GPU, and of the CPU, it is the latter
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and _CPU_FULL not in str(error):
            raise
        rows = -(-config.batch_size // config.accumulate)
        raise InfrastructureError(
            f"training must fit the device's memory; it ran out with batch_size={config.batch_size}"
            f" in {config.accumulate} parts of {rows} rows, precision={config.precision} and "
            f"memory_rows={config.memory_rows}. Raise accumulate (--set "
            f"accumulate={config.accumulate * 2} gives the same steps in smaller parts), lower "
            "batch_size, or set memory_rows=0 to stream the rows."
        ) from error
